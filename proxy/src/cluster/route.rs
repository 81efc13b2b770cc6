//! Need to node: which server a session of a listener may use. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use kornak_cluster::{GroupId, Node, Topology};
use kornak_config::proxy::{Balance, ListenerSettings, Target};

use crate::cluster::standing::{Standings, Why};

/// A server that a session may use.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub node: Arc<Node>,
    pub name: Arc<str>,
    pub group: GroupId,
    /// The server is used as a leader: only with a fresh proof, and only through the gate.
    pub leading: bool,
}

/// Everybody that the listener's target allows, best class first; or why there is nobody. Standbys
/// that have `refused` are left out.
pub fn candidates(
    listener: &ListenerSettings,
    topology: &Topology,
    standings: &Standings,
    refused: &[Arc<str>],
) -> Result<Vec<Candidate>, Why> {
    let leader = |group: GroupId| {
        standings.serving(group).map(|serving| Candidate {
            node: Arc::clone(&serving.node),
            name: Arc::clone(&serving.name),
            group,
            leading: true,
        })
    };
    match &listener.target {
        Target::Primary => leader(GroupId::COORDINATOR).map(|one| vec![one]),
        Target::Workers => {
            let mut why = Why::NoLeader;
            let mut found = Vec::new();
            for group in topology.groups.keys().filter(|group| topology.is_worker(**group)) {
                match leader(*group) {
                    Ok(candidate) => found.push(candidate),
                    Err(reason) => why = reason,
                }
            }
            if found.is_empty() { Err(why) } else { Ok(found) }
        }
        Target::Standbys | Target::Any => {
            let mut found = followers(listener, topology, standings);
            found.retain(|candidate| !refused.contains(&candidate.name));
            let fallback = found.is_empty() && listener.fallback_to_primary;
            if listener.target == Target::Any || fallback {
                match leader(GroupId::COORDINATOR) {
                    Ok(candidate) => found.push(candidate),
                    Err(why) if found.is_empty() => return Err(why),
                    Err(_) => {}
                }
            }
            if found.is_empty() { Err(Why::NoLeader) } else { Ok(found) }
        }
        Target::Member(name) => {
            let node = topology.groups.values().find_map(|group| group.nodes.get(name));
            let Some(node) = node else { return Err(Why::NoLeader) };
            let leads = is_leader(node, topology, standings);
            if leads { leader(node.group).map(|one| vec![one]) } else { Ok(vec![follower(node)]) }
        }
    }
}

/// Whether a group has a standby that takes sessions.
pub fn has_standby(topology: &Topology, group: GroupId) -> bool {
    topology.groups.get(&group).is_some_and(|group| {
        let leader = group.leader.as_ref().map(|(name, _)| name);
        group.nodes.values().any(|node| {
            node.running && !node.noloadbalance && leader.is_some_and(|name| *name != node.name)
        })
    })
}

/// The group whose servers are asked for a role's verifier: groups of a Citus cluster may have
/// different ones for one password, and a proof for one is no proof for another. `worker`: the group
/// chosen by `clients::login`. `None`: any will do.
pub fn verified_by(
    listener: &ListenerSettings,
    topology: &Topology,
    worker: Option<GroupId>,
) -> Option<GroupId> {
    match &listener.target {
        Target::Workers => worker,
        Target::Primary | Target::Standbys | Target::Any => Some(GroupId::COORDINATOR),
        Target::Member(name) => {
            let node = topology.groups.values().find_map(|group| group.nodes.get(name));
            node.map(|node| node.group)
        }
    }
}

/// Whether a session's own worker group can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtHome {
    /// The session's group is all that is left of the candidates.
    Yes,
    /// The leader of the session's group is away.
    Away,
    /// The session's group is no worker any more.
    Moved,
}

/// Narrows candidates down to the group that the session is on, if that is there.
pub fn at_home(
    found: &mut Result<Vec<Candidate>, Why>,
    home: GroupId,
    topology: &Topology,
) -> AtHome {
    if !topology.groups.contains_key(&home) || !topology.is_worker(home) {
        return AtHome::Moved;
    }
    match found {
        Ok(candidates) if candidates.iter().any(|candidate| candidate.group == home) => {
            candidates.retain(|candidate| candidate.group == home);
            AtHome::Yes
        }
        _ => AtHome::Away,
    }
}

fn followers(
    listener: &ListenerSettings,
    topology: &Topology,
    standings: &Standings,
) -> Vec<Candidate> {
    let Some(group) = topology.groups.get(&GroupId::COORDINATOR) else { return Vec::new() };
    let near = |node: &&Node| match (listener.max_lag_bytes, node.lag_bytes) {
        (Some(most), Some(lag)) => lag <= most,
        _ => true,
    };
    group
        .nodes
        .values()
        .filter(|node| node.running && !node.noloadbalance)
        .filter(|node| !is_leader(node, topology, standings))
        .filter(near)
        .map(follower)
        .collect()
}

fn follower(node: &Node) -> Candidate {
    Candidate {
        name: node.name.as_str().into(),
        group: node.group,
        node: Arc::new(node.clone()),
        leading: false,
    }
}

/// Whether the node leads by the store, or serves by its own proof while the store knows nobody.
fn is_leader(node: &Node, topology: &Topology, standings: &Standings) -> bool {
    let group = topology.groups.get(&node.group);
    match group.and_then(|group| group.leader.as_ref()) {
        Some((name, _)) => *name == node.name,
        None => {
            let standing = standings.0.get(&node.group);
            standing.and_then(|s| s.last()).is_some_and(|last| *last.name == node.name)
        }
    }
}

/// Picks one. `sessions` are the sessions that each server has now, `dice` is random or a counter.
pub fn choose(
    candidates: &[Candidate],
    balance: Balance,
    sessions: &HashMap<Arc<str>, usize>,
    dice: usize,
) -> Option<Candidate> {
    let load = |c: &&Candidate| sessions.get(&c.name).copied().unwrap_or(0);
    let nth = |n: usize| candidates.get(n.checked_rem(candidates.len())?);
    let chosen = match balance {
        Balance::RoundRobin => nth(dice),
        Balance::Random => {
            let (a, b) = (nth(dice)?, nth(dice / candidates.len().max(1))?);
            [a, b].into_iter().min_by_key(load)
        }
        Balance::LeastSessions => {
            // Equal ones take turns, or a burst of logins would all see the same loads.
            let (head, tail) = candidates.split_at(dice.checked_rem(candidates.len())?);
            tail.iter().chain(head).min_by_key(load)
        }
    };
    chosen.cloned()
}

#[cfg(test)]
mod tests;
