//! Plans the changes of `pg_dist_node`, statement by statement. Pure.
//!
//! Three rules of Citus shape it (its reference, "Cluster management functions"):
//! - a group's primary keeps its row (`nodeid`), whoever it is: placements hang on it;
//! - no two rows have the same address, so rows whose servers trade places go by way of a third
//!   address. The primary's row gives way first: what writes to it waits until it has an address again;
//! - rows may be *updated* while nodes are down, the others hear of it later; *adding* and *removing*
//!   rows is done on every node at once and fails while one of them is behind.
//!
//! So all updates are one transaction, and rows are added or removed one by one when nothing is left to
//! update and every node has the metadata. A group without a known leader is left as it is.
//!
//! Not here: when a transaction is opened and ended ([`super::flight`]), SQL (`citus_tasks::keeper`).

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use kornak_cluster::GroupId;

/// Host and port of a server, as `pg_dist_node` has them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Put behind the host of a primary's row while nobody serves the group. Patroni's word: a Patroni
/// coordinator that takes over knows what it means.
pub const DEMOTED: &str = "-demoted";

impl Address {
    /// Where nobody listens, so that whoever wants to connect has to wait for the row's lock instead.
    pub fn demoted(&self) -> Self {
        Self { host: format!("{}{DEMOTED}", self.host), port: self.port }
    }

    /// The address before [`Address::demoted`].
    pub fn undemoted(&self) -> Self {
        let host = self.host.strip_suffix(DEMOTED).unwrap_or(&self.host);
        Self { host: host.to_owned(), port: self.port }
    }

    /// A name that no host has, for a row that is in another one's way.
    fn parked(&self, node: i32) -> Self {
        Self { host: format!("{}-parked-{node}", self.host), port: self.port }
    }
}

/// `noderole`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Primary,
    Secondary,
}

impl Role {
    /// Citus' word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        }
    }
}

/// A row of `pg_dist_node`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub node: i32,
    pub group: GroupId,
    pub address: Address,
    pub role: Role,
    /// The node has the metadata, and they are up to date; true also for rows that get none.
    pub synced: bool,
}

/// The store's knowledge of one group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Group {
    /// The leader, if it runs as a primary.
    pub primary: Option<Address>,
    /// Running members that may be read from.
    pub secondaries: BTreeSet<Address>,
    /// Members that may be read from when they run again: a row that they have stays, for a restart is
    /// no reason to change every node's metadata twice.
    pub resting: BTreeSet<Address>,
}

impl Group {
    fn keeps(&self, address: &Address) -> bool {
        self.secondaries.contains(address) || self.resting.contains(address)
    }
}

/// Every group that has keys in the store.
pub type Wanted = BTreeMap<GroupId, Group>;

/// One statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// `citus_update_node`
    Update { node: i32, to: Address },
    /// `citus_set_coordinator_host`
    SetCoordinator { address: Address },
    /// `citus_add_node`
    Add { group: GroupId, address: Address, role: Role },
    /// `citus_remove_node`
    Remove { group: GroupId, address: Address },
}

/// Updates that make the rows what the store says, in an order in which each is possible.
pub fn updates(rows: &[Row], wanted: &Wanted) -> Vec<Step> {
    let targets = targets(rows, wanted);
    let mut now: BTreeMap<i32, Address> =
        rows.iter().map(|row| (row.node, row.address.clone())).collect();
    let primary = |node: &i32| rows.iter().any(|r| r.node == *node && r.role == Role::Primary);
    let mut steps = Vec::new();
    // Each row moves at most twice, so this ends; the bound is for a mistake of ours.
    for _ in 0..=rows.len() * 3 {
        let open: Vec<(i32, Address)> = targets
            .iter()
            .filter(|(node, target)| now.get(node) != Some(target))
            .map(|(node, target)| (*node, target.clone()))
            .collect();
        let Some((first, _)) = open.first() else { break };
        let holder = |address: &Address| {
            now.iter().find(|(_, held)| *held == address).map(|(node, _)| *node)
        };
        let free = open.iter().find(|(_, target)| holder(target).is_none());
        let (node, to) = match free {
            Some(step) => step.clone(),
            None => give_way(&open, *first, &now, holder, primary),
        };
        now.insert(node, to.clone());
        steps.push(Step::Update { node, to });
    }
    steps
}

/// Nobody can move: of those who are in the way, a primary that moves gives way first, then another
/// row that moves, then one that would have stayed.
fn give_way(
    open: &[(i32, Address)],
    first: i32,
    now: &BTreeMap<i32, Address>,
    holder: impl Fn(&Address) -> Option<i32>,
    primary: impl Fn(&i32) -> bool,
) -> (i32, Address) {
    let moves = |node: &i32| open.iter().any(|(open, _)| open == node);
    let in_the_way = open.iter().filter_map(|(_, target)| holder(target));
    let node = in_the_way.min_by_key(|node| (!moves(node), !primary(node), *node));
    let node = node.unwrap_or(first);
    let here = now.get(&node).cloned();
    let here = here.unwrap_or_else(|| Address { host: String::new(), port: 0 });
    let waits = primary(&node) && moves(&node);
    (node, if waits { here.undemoted().demoted() } else { here.parked(node) })
}

/// The address that each row should have; rows that stay as they are are not in it.
fn targets(rows: &[Row], wanted: &Wanted) -> BTreeMap<i32, Address> {
    let mut targets = BTreeMap::new();
    // A new primary's former row, and the former primary's address.
    let mut trade: Vec<(&Row, Address)> = Vec::new();
    for (group, want) in wanted {
        let of_role = |role| rows.iter().filter(move |r| r.group == *group && r.role == role);
        let Some(address) = &want.primary else { continue };
        let primary = of_role(Role::Primary).next();
        if let Some(row) = primary {
            targets.insert(row.node, address.clone());
        }
        let mut missing: BTreeSet<Address> = want.secondaries.clone();
        missing.remove(address);
        let mut free: Vec<&Row> = Vec::new();
        for row in of_role(Role::Secondary) {
            if row.address != *address && want.keeps(&row.address) {
                missing.remove(&row.address);
                targets.insert(row.node, row.address.clone());
            } else {
                free.push(row);
            }
        }
        free.sort_by_key(|row| row.node);
        let mut free = free.into_iter();
        for (address, row) in missing.into_iter().zip(free.by_ref()) {
            targets.insert(row.node, address);
        }
        let former = primary.map(|row| row.address.undemoted()).filter(|former| former != address);
        if let (Some(row), Some(former)) = (free.find(|row| row.address == *address), former) {
            trade.push((row, former));
        }
    }
    // Such a row cannot be removed in the same transaction. It gets the former primary's address, which
    // is back soon or is removed later, unless somebody else needs that.
    for (row, former) in trade {
        let taken = targets.values().any(|target| *target == former)
            || rows.iter().any(|r| r.address == former && !targets.contains_key(&r.node));
        targets.insert(row.node, if taken { row.address.parked(row.node) } else { former });
    }
    targets
}

/// The next row to add or remove. Only when [`updates`] has nothing to do and all rows are synced.
/// `hopeless`: rows that Citus would not add or remove, left for later.
pub fn membership(rows: &[Row], wanted: &Wanted, hopeless: &BTreeSet<Address>) -> Option<Step> {
    let has = |group: GroupId, role| rows.iter().any(|r| r.group == group && r.role == role);
    for (group, want) in wanted {
        let Some(address) = want.primary.clone() else { continue };
        match *group {
            group if has(group, Role::Primary) || hopeless.contains(&address) => {}
            GroupId::COORDINATOR => return Some(Step::SetCoordinator { address }),
            group => return Some(Step::Add { group, address, role: Role::Primary }),
        }
    }
    let unwanted = |row: &&Row| match wanted.get(&row.group) {
        // A group whose keys are all gone, its primary first: each removal is told to all primaries that
        // are registered, and fails if one does not hear of it. The coordinator is never removed.
        None => row.group != GroupId::COORDINATOR,
        Some(want) => {
            row.role == Role::Secondary && want.primary.is_some() && !want.keeps(&row.address)
        }
    };
    let gone = rows.iter().filter(unwanted).filter(|row| !hopeless.contains(&row.address));
    if let Some(row) = gone.min_by_key(|row| row.role) {
        return Some(Step::Remove { group: row.group, address: row.address.clone() });
    }
    for (group, want) in wanted {
        let known = |address: &Address| rows.iter().any(|row| row.address == *address);
        let mut new = want.secondaries.iter().filter(|address| !known(address));
        let new = new.find(|address| !hopeless.contains(address));
        let led = want.primary.is_some() && has(*group, Role::Primary);
        if let (Some(address), true) = (new, led) {
            let address = address.clone();
            return Some(Step::Add { group: *group, address, role: Role::Secondary });
        }
    }
    None
}

/// The disagreements, for people: one sentence for each row or group.
pub fn differences(rows: &[Row], wanted: &Wanted) -> Vec<String> {
    let mut found = Vec::new();
    for (group, want) in wanted {
        let Some(address) = &want.primary else { continue };
        let row = rows.iter().find(|row| row.group == *group && row.role == Role::Primary);
        match row {
            None => found.push(format!("group {group} is not registered")),
            Some(row) if row.address != *address => found.push(format!(
                "group {group} is registered at {}, its primary is {address}",
                row.address
            )),
            Some(_) => {}
        }
        let registered: BTreeSet<&Address> = rows
            .iter()
            .filter(|row| row.group == *group && row.role == Role::Secondary)
            .map(|row| &row.address)
            .collect();
        for missing in want.secondaries.iter().filter(|address| !registered.contains(address)) {
            found.push(format!("group {group} has a standby {missing} that is not registered"));
        }
        for extra in registered.into_iter().filter(|address| !want.keeps(address)) {
            found.push(format!("group {group} has a registered standby {extra} that is gone"));
        }
    }
    let gone: BTreeSet<GroupId> = rows
        .iter()
        .map(|row| row.group)
        .filter(|group| *group != GroupId::COORDINATOR && !wanted.contains_key(group))
        .collect();
    found.extend(gone.iter().map(|group| format!("group {group} is registered and is gone")));
    found
}
