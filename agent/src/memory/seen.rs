//! The cluster as the store has shown it last, beside the data directory: an agent that begins while the store is away
//! knows by it whom to follow, and of whom a leader asks to stay.
//!
//! Nothing is raced for by it, and nobody becomes a primary by it.

use std::collections::BTreeMap;

use kornak_cluster::{
    ClusterConfig, ClusterState, Doubt, Epoch, Leader, LeaseId, Member, Revision, SafetyKey,
};
use serde::{Deserialize, Serialize};

/// The file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Seen {
    pub(super) system_identifier: String,
    store: u64,
    leader: Option<SeenLeader>,
    /// Without what changes all the time.
    members: BTreeMap<String, Member>,
    failsafe: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct SeenLeader {
    name: String,
    revision: Revision,
    lease: i64,
}

impl Seen {
    /// The note of a state that the store shows now. If its leader key is gone, the leader that `before` names stays noted.
    pub(super) fn of(
        cluster: &ClusterState,
        system_identifier: String,
        before: Option<&Self>,
    ) -> Self {
        let leader = cluster.leader.as_ref().map(|leader| SeenLeader {
            name: leader.name.clone(),
            revision: leader.epoch.revision,
            lease: leader.lease.0,
        });
        let before = before.filter(|before| before.store == cluster.store);
        let members = cluster.members.iter().map(|(name, member)| {
            let lasting = Member {
                xlog_location: None,
                replay_lsn: None,
                receive_lsn: None,
                replication_state: None,
                pending_restart_reason: None,
                scheduled_restart: None,
                ..member.clone()
            };
            (name.clone(), lasting)
        });
        Self {
            system_identifier,
            store: cluster.store,
            leader: leader.or_else(|| before.and_then(|before| before.leader.clone())),
            members: members.collect(),
            failsafe: cluster.failsafe.clone(),
        }
    }

    /// As a state. What is not remembered is not known.
    pub(super) fn state(&self, config: Option<ClusterConfig>) -> ClusterState {
        let leader = self.leader.as_ref().map(|leader| Leader {
            name: leader.name.clone(),
            lease: LeaseId(leader.lease),
            epoch: Epoch { store: self.store, revision: leader.revision },
            mod_revision: leader.revision,
        });
        let unknown = [SafetyKey::Sync, SafetyKey::Unfenced, SafetyKey::Handover];
        let mut doubts: BTreeMap<_, _> = unknown.map(|key| (key, Doubt::Unknown)).into();
        if config.is_none() {
            doubts.insert(SafetyKey::Config, Doubt::Unknown);
        }
        ClusterState {
            store: self.store,
            initialize: Some(self.system_identifier.clone()),
            config,
            last_leader: leader.as_ref().map(|leader| leader.name.clone()),
            leader,
            members: self.members.clone(),
            failsafe: self.failsafe.clone(),
            doubts,
            ..ClusterState::default()
        }
    }
}
