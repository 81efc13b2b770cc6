//! Which faults there are, and which one comes next: pure.

use std::fmt;
use std::time::Duration;

use crate::sim::rng::Rng;

/// A database host, by its number.
pub type NodeNumber = usize;

/// One thing that breaks. A fault that is not over by itself is healed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    KillPostmaster(NodeNumber),
    FreezePostmaster(NodeNumber),
    KillAgent(NodeNumber),
    FreezeAgent(NodeNumber),
    KillGuard(NodeNumber),
    KillProxy(usize),
    FreezeProxy(usize),
    /// The host loses its power.
    LosePower(NodeNumber),
    FreezeHost(NodeNumber),
    /// No packet from or to the host.
    CutOff(NodeNumber),
    /// Neither direction between the host and the store.
    CutFromStore(NodeNumber),
    /// Packets from the first host to the second get lost, the other direction works.
    Deafen(NodeNumber, NodeNumber),
    /// The host's packets come late, and some never.
    Disturb(NodeNumber),
    /// No byte is free where the host's data directory is.
    FillDisk(NodeNumber),
    KillStoreMember(usize),
    FreezeStoreMember(usize),
    /// Two of three members at once: the store is away.
    LoseStoreMajority,
    MoveStoreLeader,
    /// All members begin again from an older copy.
    RestoreStore,
    /// PATCH /config with other timings.
    Configure,
    /// A planned switchover to any candidate.
    SwitchOver,
    /// POST /restart of a member.
    Restart(NodeNumber),
}

impl Fault {
    /// Name of the kind, for the table.
    pub fn kind(self) -> &'static str {
        match self {
            Self::KillPostmaster(_) => "kill postmaster",
            Self::FreezePostmaster(_) => "freeze postmaster",
            Self::KillAgent(_) => "kill agent",
            Self::FreezeAgent(_) => "freeze agent",
            Self::KillGuard(_) => "kill guard",
            Self::KillProxy(_) => "kill proxy",
            Self::FreezeProxy(_) => "freeze proxy",
            Self::LosePower(_) => "lose power",
            Self::FreezeHost(_) => "freeze host",
            Self::CutOff(_) => "cut off",
            Self::CutFromStore(_) => "cut from store",
            Self::Deafen(..) => "one-way loss",
            Self::Disturb(_) => "delay and loss",
            Self::FillDisk(_) => "full disk",
            Self::KillStoreMember(_) => "kill etcd member",
            Self::FreezeStoreMember(_) => "freeze etcd member",
            Self::LoseStoreMajority => "etcd majority lost",
            Self::MoveStoreLeader => "move etcd leader",
            Self::RestoreStore => "restore etcd",
            Self::Configure => "patch configuration",
            Self::SwitchOver => "switchover",
            Self::Restart(_) => "restart member",
        }
    }

    /// Whether two faults concern the same process or link, so that the second waits for the first's end.
    pub fn meets(self, other: Self) -> bool {
        let (mine, theirs) = (self.node(), other.node());
        let store = |fault: Self| {
            matches!(
                fault,
                Self::KillStoreMember(_)
                    | Self::FreezeStoreMember(_)
                    | Self::LoseStoreMajority
                    | Self::RestoreStore
                    | Self::MoveStoreLeader
            )
        };
        let proxy = |fault: Self| match fault {
            Self::KillProxy(number) | Self::FreezeProxy(number) => Some(number),
            _ => None,
        };
        (mine.is_some() && mine == theirs)
            || (store(self) && store(other))
            || (proxy(self).is_some() && proxy(self) == proxy(other))
    }

    fn node(self) -> Option<NodeNumber> {
        match self {
            Self::KillPostmaster(node)
            | Self::FreezePostmaster(node)
            | Self::KillAgent(node)
            | Self::FreezeAgent(node)
            | Self::KillGuard(node)
            | Self::LosePower(node)
            | Self::FreezeHost(node)
            | Self::CutOff(node)
            | Self::CutFromStore(node)
            | Self::Deafen(node, _)
            | Self::Disturb(node)
            | Self::FillDisk(node)
            | Self::Restart(node) => Some(node),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match *self {
            Self::Deafen(from, to) => write!(f, " node{from} to node{to}"),
            Self::KillProxy(number) | Self::FreezeProxy(number) => write!(f, " {number}"),
            Self::KillStoreMember(number) | Self::FreezeStoreMember(number) => {
                write!(f, " {number}")
            }
            other => other.node().map_or(Ok(()), |node| write!(f, " node{node}")),
        }
    }
}

/// The things that can be broken.
#[derive(Debug, Clone, Copy)]
pub struct Targets {
    pub nodes: usize,
    pub proxies: usize,
    pub store: usize,
    /// Whether the kernel can delay packets.
    pub netem: bool,
    /// The node that leads, as far as is known: faults look for it more often than for others.
    pub leader: Option<NodeNumber>,
}

/// Chooses the next fault; none of those under way concerns the same thing.
pub fn choose(rng: &Rng, targets: Targets, under_way: &[Fault]) -> Option<Fault> {
    for _ in 0..20 {
        let fault = any(rng, targets);
        let free = !under_way.iter().any(|other| fault.meets(*other));
        if free && (targets.netem || !matches!(fault, Fault::Disturb(_))) {
            return Some(fault);
        }
    }
    None
}

fn any(rng: &Rng, targets: Targets) -> Fault {
    let node = match targets.leader {
        Some(leader) if rng.chance(500) => leader,
        _ => rng.below(targets.nodes),
    };
    let other = (node + 1 + rng.below(targets.nodes.saturating_sub(1))) % targets.nodes.max(1);
    let proxy = rng.below(targets.proxies);
    let member = rng.below(targets.store);
    let all = [
        (14, Fault::KillPostmaster(node)),
        (6, Fault::FreezePostmaster(node)),
        (8, Fault::KillAgent(node)),
        (8, Fault::FreezeAgent(node)),
        (5, Fault::KillGuard(node)),
        (4, Fault::KillProxy(proxy)),
        (3, Fault::FreezeProxy(proxy)),
        (6, Fault::LosePower(node)),
        (6, Fault::FreezeHost(node)),
        (6, Fault::CutOff(node)),
        (6, Fault::CutFromStore(node)),
        (6, Fault::Deafen(node, other)),
        (6, Fault::Disturb(node)),
        (4, Fault::FillDisk(node)),
        (4, Fault::KillStoreMember(member)),
        (4, Fault::FreezeStoreMember(member)),
        (3, Fault::LoseStoreMajority),
        (3, Fault::MoveStoreLeader),
        (1, Fault::RestoreStore),
        (4, Fault::Configure),
        (14, Fault::SwitchOver),
        (5, Fault::Restart(node)),
    ];
    let sum: usize = all.iter().map(|(weight, _)| weight).sum();
    let mut place = rng.below(sum);
    for (weight, fault) in all {
        match place.checked_sub(weight) {
            Some(rest) => place = rest,
            None => return fault,
        }
    }
    Fault::SwitchOver
}

/// Time until the next fault: often short enough that the last one is not over.
pub fn pause(rng: &Rng) -> Duration {
    if rng.chance(300) { rng.millis(200, 2_000) } else { rng.millis(2_000, 9_000) }
}

/// How long a fault lasts.
pub fn duration(rng: &Rng, fault: Fault) -> Duration {
    match fault {
        Fault::LosePower(_) | Fault::CutOff(_) | Fault::FreezeHost(_) => rng.millis(500, 20_000),
        _ => rng.millis(200, 10_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: Targets =
        Targets { nodes: 3, proxies: 2, store: 3, netem: true, leader: Some(1) };

    #[test]
    fn every_kind_of_fault_comes_up() {
        let rng = Rng::new(1);
        let mut kinds: Vec<&str> =
            (0..2_000).filter_map(|_| choose(&rng, TARGETS, &[])).map(Fault::kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        assert_eq!(kinds.len(), 22, "{kinds:?}");
    }

    #[test]
    fn a_node_has_one_fault_at_a_time_and_others_have_theirs_meanwhile() {
        let rng = Rng::new(2);
        let first = Fault::LosePower(0);
        let chosen: Vec<Fault> = (0..500).filter_map(|_| choose(&rng, TARGETS, &[first])).collect();
        assert!(chosen.iter().all(|fault| !fault.meets(first)));
        assert!(chosen.contains(&Fault::LosePower(1)));
    }
}
