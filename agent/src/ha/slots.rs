//! Which replication slots a server has to have, and what has to be done to those that are there.
//!
//! Every node keeps a slot for each other member, so that whoever is promoted still has the log that the
//! others need; where a slot is not in use it is moved along with what the store knows of its owner.
//! The slot of a member that has vanished is kept for a while. Permanent slots are the operator's, and
//! so are those that are to be ignored; any other that nobody uses would keep log for ever and is
//! dropped, as by Patroni. A logical slot is somebody's place in a stream of changes, and is kept for as long
//! as a vanished member's, unless the operator has just taken it off the list.

use std::collections::{BTreeMap, BTreeSet};

use kornak_cluster::slots::{KeptIn, SlotKind};
use kornak_cluster::{ClusterConfig, ClusterState, Lsn, Moment, Tags};

use super::upstream::{feedback_reaches_the_leader, streams_from};

/// A slot as it is found (`pg_replication_slots`).
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Deserialize)]
pub struct Found {
    pub name: String,
    pub physical: bool,
    pub database: Option<String>,
    pub plugin: Option<String>,
    pub active: bool,
    pub temporary: bool,
    /// The slot holds back vacuum; a physical slot that is not in use should not.
    pub holds_xmin: bool,
    /// PostgreSQL has removed log that it needs.
    pub lost: bool,
    /// Kept on standbys by PostgreSQL itself (17 and later).
    pub failover: bool,
    /// Made by PostgreSQL's slot synchronization from the primary's slot of this name.
    pub synced: bool,
    pub restart: Option<Lsn>,
    pub confirmed: Option<Lsn>,
}

impl Found {
    /// How far its user is.
    pub fn position(&self) -> Option<Lsn> {
        self.confirmed.or(self.restart)
    }
}

/// How far slots are that others keep: not passing ones, and none that has lost its log, which is of no use to a
/// standby that copies it.
pub fn positions(found: &[Found]) -> impl Iterator<Item = (String, Lsn)> {
    let lasting = found.iter().filter(|slot| !slot.temporary && (slot.physical || !slot.lost));
    lasting.filter_map(|slot| Some((slot.name.clone(), slot.position()?)))
}

/// A slot that has to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub kind: SlotKind,
    /// Where it is to be moved if it is not in use.
    pub to: Option<Lsn>,
}

/// The changes to a member's slots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Dropped first: some of them are created again.
    pub drop: Vec<String>,
    pub create_physical: Vec<String>,
    /// On a primary.
    pub create_logical: Vec<(String, String, String)>,
    /// On a standby, where a logical slot can only be copied from the primary's files.
    pub copy_logical: Vec<String>,
    pub advance: Vec<(String, Lsn)>,
    /// Logical slots that nobody has asked for, seen for the first time: they are dropped later, and somebody
    /// should hear of it before.
    pub unknown_logical: Vec<String>,
}

/// The memory of slots between two plans.
#[derive(Debug, Clone, Default)]
pub struct GoneSince {
    /// Since when a slot that has no owner is kept.
    since: BTreeMap<String, Moment>,
    /// Slots that had an owner.
    wanted: BTreeSet<String>,
}

/// The node that the slots are on.
#[derive(Debug, Clone, Copy)]
pub struct Here<'a> {
    pub name: &'a str,
    pub tags: &'a Tags,
    /// The node leads: its slots are the ones that are used, and other members' slots follow them.
    pub leads: bool,
    /// The node's server may be where somebody decodes changes: a primary, or a standby of PostgreSQL 16 or later. A
    /// logical slot that nobody has asked for on another standby is left over from when it led: useless there,
    /// and wrong once it leads again, for the catalogs were vacuumed meanwhile.
    pub decodes: bool,
    /// The node is a standby, and another node leads.
    pub follows: bool,
    /// Where a standby has replayed to; no slot can be moved beyond.
    pub replayed: Option<Lsn>,
}

/// The slots that the node has to have. `slot_name`: how a member's slot is called.
pub fn wanted(
    here: Here<'_>,
    cluster: &ClusterState,
    slot_name: impl Fn(&str) -> String,
) -> BTreeMap<String, Wanted> {
    let config = cluster.config.clone().unwrap_or_default();
    let own = slot_name(here.name);
    let status = cluster.status.clone().unwrap_or_default();
    let known = |name: &str| status.slots.get(name).copied().filter(|_| !here.leads);
    let mut wanted = BTreeMap::new();
    let physical = |to| Wanted { kind: SlotKind::Physical, to };
    let retains = !config.member_slots_ttl.is_zero();
    for (name, member) in &cluster.members {
        if name == here.name || member.tags.nostream() {
            continue;
        }
        let in_use = streams_from(name, here.name, cluster);
        let may_be_needed = retains && (here.leads || !here.tags.nofailover());
        if !in_use && !may_be_needed {
            continue;
        }
        let slot = slot_name(name);
        // A leader knows of a member that cascades only what that member says.
        let to = if here.leads { member.xlog_location } else { known(&slot) };
        wanted.insert(slot, physical(to.filter(|_| !in_use)));
    }
    if retains && !here.tags.nofailover() && !here.leads {
        for slot in status.retain_slots.iter().filter(|slot| **slot != own) {
            wanted.entry(slot.clone()).or_insert_with(|| physical(known(slot)));
        }
    }
    let standby_cluster = config.standby_cluster.is_some();
    for slot in config.permanent_slots() {
        let kept = match slot.kept_in {
            KeptIn::Every => true,
            KeptIn::Primary => !standby_cluster,
            KeptIn::Standby => standby_cluster,
        };
        let logical = slot.kind != SlotKind::Physical;
        // In a standby cluster logical slots would have to come from the other cluster; and where no feedback
        // reaches the primary it vacuums what they need.
        let fed = feedback_reaches_the_leader(here.tags, cluster);
        let possible = !logical || (!standby_cluster && fed);
        if kept && possible && slot.name != own && (here.leads || !here.tags.nofailover()) {
            let to = known(&slot.name);
            match wanted.get(&slot.name) {
                // Also a member's, which moves with what that member says.
                Some(members) if members.kind == slot.kind && here.leads => {}
                _ => drop(wanted.insert(slot.name.clone(), Wanted { kind: slot.kind, to })),
            }
        }
    }
    wanted
}

/// Compares what has to be there with what is.
pub fn plan(
    here: Here<'_>,
    config: &ClusterConfig,
    wanted: &BTreeMap<String, Wanted>,
    found: &[Found],
    retained: &[String],
    now: Moment,
    gone_since: &mut GoneSince,
) -> Plan {
    let mut plan = Plan::default();
    gone_since.since.retain(|name, _| !wanted.contains_key(name));
    gone_since.wanted.extend(wanted.keys().cloned());
    // What is gone need not be remembered.
    gone_since
        .wanted
        .retain(|name| wanted.contains_key(name) || found.iter().any(|slot| slot.name == *name));
    for slot in found {
        if here.follows && is_left_over(slot) {
            plan.drop.push(slot.name.clone());
            continue;
        }
        match wanted.get(&slot.name) {
            Some(wish) if agrees(slot, &wish.kind) => keep(here, slot, wish, &mut plan),
            Some(_) if !slot.active => plan.drop.push(slot.name.clone()),
            Some(_) => {}
            None if is_somebody_elses(slot, config) => {}
            None => {
                let is_members = retained.contains(&slot.name);
                let is_unknown =
                    !slot.physical && here.decodes && !gone_since.wanted.contains(&slot.name);
                if is_unknown && !gone_since.since.contains_key(&slot.name) {
                    plan.unknown_logical.push(slot.name.clone());
                }
                let since = *gone_since.since.entry(slot.name.clone()).or_insert(now);
                let waits = is_members || is_unknown;
                if !waits || now.since(since) >= config.member_slots_ttl {
                    plan.drop.push(slot.name.clone());
                }
            }
        }
    }
    for (name, wish) in wanted {
        let there = found.iter().any(|slot| slot.name == *name);
        if there && !plan.drop.contains(name) {
            continue;
        }
        match &wish.kind {
            SlotKind::Physical => plan.create_physical.push(name.clone()),
            SlotKind::Logical { database, plugin } if here.leads => {
                plan.create_logical.push((name.clone(), database.clone(), plugin.clone()));
            }
            // Only one that the leader is known to have can be copied.
            SlotKind::Logical { .. } if wish.to.is_some() => plan.copy_logical.push(name.clone()),
            SlotKind::Logical { .. } => {}
        }
    }
    plan
}

fn keep(here: Here<'_>, slot: &Found, wish: &Wanted, plan: &mut Plan) {
    if slot.failover && !slot.physical {
        return;
    }
    if slot.active {
        return;
    }
    // What holds vacuum back with nobody behind it, or has lost its log, is made anew.
    if slot.physical && (slot.lost || (slot.holds_xmin && wish.to.is_some())) {
        plan.drop.push(slot.name.clone());
        return;
    }
    // A copy that has become unusable here is made again while the leader's is fine.
    if !slot.physical && slot.lost && !here.leads && wish.to.is_some() {
        plan.drop.push(slot.name.clone());
        return;
    }
    let Some(to) = wish.to else { return };
    let to = here.replayed.map_or(to, |replayed| to.min(replayed));
    if slot.position().is_none_or(|at| at < to) {
        plan.advance.push((slot.name.clone(), to));
    }
}

fn agrees(slot: &Found, kind: &SlotKind) -> bool {
    match kind {
        SlotKind::Physical => slot.physical,
        SlotKind::Logical { database, plugin } => {
            !slot.physical
                && slot.database.as_ref() == Some(database)
                && slot.plugin.as_ref() == Some(plugin)
        }
    }
}

/// Whether a standby's slot is a failover slot from when the server was the primary: PostgreSQL makes none like that on
/// a standby, and does not synchronize the new primary's slot of this name while it is there.
fn is_left_over(slot: &Found) -> bool {
    !slot.physical && slot.failover && !slot.synced && !slot.active && !slot.temporary
}

/// In use, passing, PostgreSQL's own, or named by the operator as not ours.
fn is_somebody_elses(slot: &Found, config: &ClusterConfig) -> bool {
    let kind = if slot.physical { "physical" } else { "logical" };
    slot.active
        || slot.temporary
        || slot.failover
        || slot.name.starts_with("citus_shard_")
        || config.names_slot(&slot.name)
        || config.ignored_slots().iter().any(|matcher| {
            matcher.matches(&slot.name, kind, slot.database.as_deref(), slot.plugin.as_deref())
        })
}

#[cfg(test)]
mod tests;
