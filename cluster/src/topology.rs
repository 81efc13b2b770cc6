//! Facts about a cluster that a proxy needs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::citus::CitusRegistration;
use crate::epoch::Epoch;
use crate::handover::Handover;
use crate::id::GroupId;
use crate::lsn::{Lsn, Timeline};
use crate::member::{MemberRole, MemberState};
use crate::numbers::Revision;
use crate::state::ClusterState;

/// Whether a node leads its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeRole {
    Primary,
    Standby,
}

/// One database server as a proxy sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    pub group: GroupId,
    /// Shared by whoever is connected to it.
    pub host: Arc<str>,
    pub port: u16,
    pub role: NodeRole,
    /// Runs and answers, by its own account.
    pub running: bool,
    /// By its own account it has finished its promotion (or never needed one).
    pub says_primary: bool,
    /// How far behind the leader's last known position, in bytes; `None` if unknown.
    pub lag_bytes: Option<u64>,
    pub noloadbalance: bool,
    pub timeline: Option<Timeline>,
    /// REST base, `http://host:port`.
    pub api_base: String,
    /// Whether the member runs Kornak's agent.
    pub kornak: bool,
}

/// One HA group: a plain cluster is group 0 alone.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Group {
    /// `None`: the leader key is absent, which means *unknown*, not *nobody* (the leader may be
    /// living in failsafe mode).
    pub leader: Option<(String, Epoch)>,
    pub nodes: BTreeMap<String, Node>,
    pub system_identifier: Option<String>,
}

/// Immutable; replaced whole.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Topology {
    /// Revision of the store it was read at.
    pub revision: Revision,
    pub groups: BTreeMap<GroupId, Arc<Group>>,
    pub handover: Option<Handover>,
    /// Modification revision of the handover record.
    pub handover_revision: Revision,
    /// The registered proxies that can be reached by others: where, by their ids.
    pub proxies: BTreeMap<String, String>,
    /// In a Citus cluster: groups that every database's metadata know; `None`: nobody says.
    pub registered: Option<BTreeSet<GroupId>>,
    /// In a Citus cluster: what a leader of the coordinator has said of the metadata.
    pub registration: Option<CitusRegistration>,
}

/// Source of the newest report about the metadata of a Citus cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoken<'a> {
    /// No Kornak leads the coordinator: Patroni's leaders do not speak.
    Nobody,
    /// A former leader of the coordinator.
    Formerly(&'a CitusRegistration),
    /// The coordinator's leader, or its last leader while there is none.
    Now(&'a CitusRegistration),
}

/// How far the nodes of a Citus cluster have heard of a group's primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Heard {
    /// `pg_dist_node` names another one.
    Nowhere,
    /// The coordinator's names it.
    Coordinator,
    /// Every node's does, or there is nobody who would say so.
    Everywhere,
}

impl Topology {
    /// Whether clients of the workers' listener may be sent to this group: until it is registered it
    /// has no distributed tables.
    pub fn is_worker(&self, group: GroupId) -> bool {
        group != GroupId::COORDINATOR
            && self.registered.as_ref().is_none_or(|registered| registered.contains(&group))
    }

    /// The newest report about the metadata of a Citus cluster.
    pub fn spoken(&self) -> Spoken<'_> {
        let Some(registration) = &self.registration else { return Spoken::Nobody };
        let coordinator = self.groups.get(&GroupId::COORDINATOR);
        let leader = coordinator.and_then(|group| Some((&group.leader.as_ref()?.0, group)));
        match leader.filter(|(name, _)| **name != registration.member) {
            None => Spoken::Now(registration),
            Some((name, group)) if group.nodes.get(name).is_none_or(|node| node.kornak) => {
                Spoken::Formerly(registration)
            }
            Some(_) => Spoken::Nobody,
        }
    }

    /// How far the nodes of a Citus cluster have heard that `primary` is this group's. `excused`:
    /// groups that cannot hear of anything.
    pub fn heard_of(
        &self,
        group: GroupId,
        primary: &Node,
        excused: impl Fn(GroupId) -> bool,
    ) -> Heard {
        let registration = match self.spoken() {
            Spoken::Nobody => return Heard::Everywhere,
            Spoken::Formerly(_) => return Heard::Nowhere,
            Spoken::Now(registration) => registration,
        };
        let address = format!("{}:{}", primary.host, primary.port);
        let heard = registration.databases.values().map(|database| {
            if database.primaries.get(&group) != Some(&address) {
                Heard::Nowhere
            } else if database.behind.iter().all(|group| excused(*group)) {
                Heard::Everywhere
            } else {
                Heard::Coordinator
            }
        });
        heard.min().unwrap_or(Heard::Nowhere)
    }
}

impl Group {
    /// The node that holds the leader key.
    pub fn primary(&self) -> Option<&Node> {
        let (name, _) = self.leader.as_ref()?;
        self.nodes.get(name)
    }

    /// Builds the group from what the store says.
    pub fn from_state(id: GroupId, state: &ClusterState) -> Self {
        let optime = state.status.as_ref().map(|status| status.optime);
        let leader = state.leader.as_ref().filter(|leader| !is_creating(&leader.name, state));
        let nodes = state.members.iter().filter_map(|(name, member)| {
            let (host, port) = member.conn_address()?;
            let leads = leader.is_some_and(|leader| leader.name == *name);
            let replayed: Option<Lsn> = member.replay_lsn.or(member.xlog_location);
            let lag_bytes = match (optime, replayed) {
                (Some(optime), Some(replayed)) => Some(optime.bytes_ahead_of(replayed)),
                _ => None,
            };
            let node = Node {
                name: name.clone(),
                group: id,
                host: host.into(),
                port,
                role: if leads { NodeRole::Primary } else { NodeRole::Standby },
                running: member.state == MemberState::Running,
                says_primary: member.role == MemberRole::Primary,
                lag_bytes: if leads { Some(0) } else { lag_bytes },
                noloadbalance: member.tags.noloadbalance(),
                timeline: member.timeline,
                api_base: member.api_base().to_owned(),
                kornak: member.kornak.is_some(),
            };
            Some((name.clone(), node))
        });
        Self {
            nodes: nodes.collect(),
            leader: leader.map(|leader| (leader.name.clone(), leader.epoch)),
            system_identifier: state.initialize.clone().filter(|sysid| !sysid.is_empty()),
        }
    }
}

/// The leader makes the cluster's first server: it takes writes, of the scripts that fill it, and may be made
/// anew. Both the store and the leader's own account have to say so.
fn is_creating(leader: &str, state: &ClusterState) -> bool {
    state.initialize.as_deref() == Some("")
        && state.members.get(leader).is_some_and(|member| member.state == MemberState::Initializing)
}

#[cfg(test)]
mod tests {
    use crate::numbers::LeaseId;
    use serde_json::json;

    use super::*;
    use crate::{Leader, Member};

    #[test]
    fn a_leader_that_still_makes_the_cluster_serves_nobody() {
        let state = |initialize: Option<&str>, says: &str| {
            let member: Member = serde_json::from_value(json!({
                "conn_url": "postgres://a:5432/postgres", "api_url": "http://a:8008/patroni",
                "state": says, "role": "primary",
            }))
            .unwrap();
            let leader = Leader {
                name: "a".to_owned(),
                lease: LeaseId(7),
                epoch: Epoch { store: 1, revision: Revision(5) },
                mod_revision: Revision(5),
            };
            ClusterState {
                initialize: initialize.map(str::to_owned),
                leader: Some(leader),
                members: [("a".to_owned(), member)].into(),
                ..ClusterState::default()
            }
        };
        let creating = "initializing new cluster";
        for (initialize, says, leads) in [
            (Some(""), creating, false),
            (Some("7000000000000000001"), creating, true),
            // Somebody has emptied the key of a cluster that works.
            (Some(""), "running", true),
            (None, "running", true),
        ] {
            let group = Group::from_state(GroupId(0), &state(initialize, says));
            assert_eq!(group.leader.is_some(), leads, "{initialize:?} {says}");
            assert_eq!(group.nodes["a"].role == NodeRole::Primary, leads);
        }
    }
}
