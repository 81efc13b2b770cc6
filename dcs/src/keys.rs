//! The whole key layout, and how it is read.
//!
//! Below `/<namespace>/<scope>/[<group>/]`, shared with Patroni (its formats, see
//! `kornak_cluster::state` and `kornak_cluster::member`):
//!
//! | key | value | lease | written by |
//! | --- | --- | --- | --- |
//! | `initialize` | system identifier, `''` while someone bootstraps | no | create-if-absent; the bootstrapping node fills it in |
//! | `config` | dynamic configuration, JSON | no | compare-and-swap on its revision |
//! | `leader` | member name, plain text | the leader's own | create-if-absent; deleted by its holder only |
//! | `members/<name>` | a node's account of itself, JSON | the node's | that node |
//! | `status` | optime and slots, JSON | no | the leader |
//! | `sync` | who may take over, JSON | no | the leader, compare-and-swap on its revision |
//! | `history` | list of past timelines, JSON | no | the leader |
//! | `failover` | manual request, JSON; cleared by `{}`, never deleted | no | REST, operator |
//! | `failsafe` | names and REST URLs of the members, JSON | no | the leader |
//! | `kornak/unfenced` | a primary that no guard would stop | no | that member |
//! | `kornak/fence/<name>` | a standby's promise to acknowledge nothing to a lost leader | no | that member |
//!
//! Below `/<namespace>/<scope>/kornak/`, one level that Patroni ignores (its loaders take only group
//! numbers and names they know there). See `kornak_cluster::handover`:
//!
//! | key | value | lease | written by |
//! | --- | --- | --- | --- |
//! | `handover` | the planned switchover under way | its owner's | old leader, then candidate |
//! | `handover/acks/<proxy>` | this proxy holds | the proxy's | that proxy |
//! | `proxies/<proxy>` | a proxy that obeys handovers | the proxy's | that proxy |
//! | `citus` | whether `pg_dist_node` agrees with the store | no | the coordinator's leader |

use kornak_cluster::{
    ClusterConfig, ClusterState, Doubt, Epoch, FailoverRequest, GroupId, HistoryEntry, Leader,
    Pledged, SafetyKey, Scope,
};
use serde::de::DeserializeOwned;

use crate::view::View;

/// Names of the keys of one group.
#[derive(Debug, Clone)]
pub struct Keys {
    base: String,
    root: String,
}

impl Keys {
    pub fn new(scope: &Scope) -> Self {
        Self { base: scope.base(), root: scope.root() }
    }

    /// Prefix of the group's keys.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Prefix of the whole cluster's keys.
    pub fn root(&self) -> &str {
        &self.root
    }

    pub fn initialize(&self) -> String {
        format!("{}initialize", self.base)
    }

    pub fn config(&self) -> String {
        format!("{}config", self.base)
    }

    pub fn leader(&self) -> String {
        format!("{}leader", self.base)
    }

    pub fn member(&self, name: &str) -> String {
        format!("{}members/{name}", self.base)
    }

    pub fn status(&self) -> String {
        format!("{}status", self.base)
    }

    pub fn sync(&self) -> String {
        format!("{}sync", self.base)
    }

    pub fn history(&self) -> String {
        format!("{}history", self.base)
    }

    pub fn failover(&self) -> String {
        format!("{}failover", self.base)
    }

    pub fn failsafe(&self) -> String {
        format!("{}failsafe", self.base)
    }

    pub fn handover(&self) -> String {
        format!("{}kornak/handover", self.root)
    }

    pub fn acks(&self) -> String {
        format!("{}kornak/handover/acks/", self.root)
    }

    pub fn ack(&self, proxy: &str) -> String {
        format!("{}{proxy}", self.acks())
    }

    pub fn proxies(&self) -> String {
        format!("{}kornak/proxies/", self.root)
    }

    pub fn proxy(&self, proxy: &str) -> String {
        format!("{}{proxy}", self.proxies())
    }

    pub fn citus(&self) -> String {
        format!("{}kornak/citus", self.root)
    }

    /// Of this group: each has a primary of its own.
    pub fn unfenced(&self) -> String {
        format!("{}kornak/unfenced", self.base)
    }

    /// Of this group, too.
    pub fn fences(&self) -> String {
        format!("{}kornak/fence/", self.base)
    }

    pub fn fence(&self, member: &str) -> String {
        format!("{}{member}", self.fences())
    }

    /// Reads a group's state out of a view of the whole cluster ([`Keys::root`]).
    pub fn state(&self, view: &View) -> ClusterState {
        let mut state =
            ClusterState { store: view.store, revision: view.revision, ..ClusterState::default() };
        for (name, found) in view.below(&self.base) {
            self.read_key(name, found, view.store, &mut state);
        }
        self.read_own(view, &mut state);
        state
    }

    fn read_key(&self, name: &str, found: &crate::KeyValue, store: u64, state: &mut ClusterState) {
        let text = found.value.as_str();
        match name {
            "initialize" => {
                state.initialize = Some(text.to_owned());
                state.initialize_revision = found.mod_revision;
                if !text.bytes().all(|byte| byte.is_ascii_digit()) {
                    doubt(found, SafetyKey::Initialize, state);
                }
            }
            "config" => {
                state.config = ClusterConfig::parse(text);
                state.config_revision = found.mod_revision;
                if state.config.is_none() {
                    doubt(found, SafetyKey::Config, state);
                }
            }
            "leader" => {
                state.leader = Some(Leader {
                    name: text.to_owned(),
                    lease: found.lease,
                    epoch: Epoch { store, revision: found.create_revision },
                    mod_revision: found.mod_revision,
                });
            }
            "status" => state.status = json(found, &mut state.unreadable),
            "sync" => {
                state.sync_revision = found.mod_revision;
                state.sync = decisive(found, SafetyKey::Sync, state);
            }
            "history" => state.history = HistoryEntry::parse_list(text),
            "failover" => {
                state.failover = FailoverRequest::parse(text);
                state.failover_revision = found.mod_revision;
            }
            "failsafe" => state.failsafe = decisive(found, SafetyKey::Failsafe, state),
            _ => {
                let member = name.strip_prefix("members/").filter(|name| !name.contains('/'));
                if let Some(member) = member
                    && let Some(value) = json(found, &mut state.unreadable)
                {
                    state.members.insert(member.to_owned(), value);
                }
            }
        }
    }

    fn read_own(&self, view: &View, state: &mut ClusterState) {
        if let Some(found) = view.get(&self.handover()) {
            state.handover_revision = found.mod_revision;
            state.handover = decisive(found, SafetyKey::Handover, state);
        }
        if let Some(found) = view.get(&self.unfenced()) {
            state.unfenced_revision = found.mod_revision;
            state.unfenced = decisive(found, SafetyKey::Unfenced, state);
        }
        for (member, found) in view.below(&self.fences()) {
            let pledge = json(found, &mut state.unreadable);
            let pledged = Pledged { pledge, revision: found.mod_revision };
            state.pledges.insert(member.to_owned(), pledged);
        }
        if let Some(found) = view.get(&self.citus()) {
            state.citus = json(found, &mut state.unreadable);
        }
        for (proxy, found) in view.below(&self.acks()) {
            if let Some(ack) = json(found, &mut state.unreadable) {
                state.acks.insert(proxy.to_owned(), ack);
            }
        }
        for (proxy, found) in view.below(&self.proxies()) {
            if let Some(registration) = json(found, &mut state.unreadable) {
                state.proxies.insert(proxy.to_owned(), registration);
            }
        }
    }
}

/// The groups that a view of the whole cluster shows: `None` stands for a plain cluster's own keys.
pub fn groups(scope: &Scope, view: &View) -> Vec<Option<GroupId>> {
    let root = scope.root();
    let mut found: Vec<Option<GroupId>> = view
        .below(&root)
        .filter_map(|(name, _)| {
            let first = name.split('/').next()?;
            match GroupId::parse(first) {
                Some(group) if name.contains('/') => Some(Some(group)),
                _ if first == "kornak" => None,
                _ => Some(None),
            }
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Reads a value on which something dangerous depends: one that makes no sense is in doubt, and not absent.
fn decisive<T: DeserializeOwned>(
    found: &crate::KeyValue,
    key: SafetyKey,
    state: &mut ClusterState,
) -> Option<T> {
    let read = serde_json::from_str(&found.value).ok();
    if read.is_none() {
        doubt(found, key, state);
    }
    read
}

fn doubt(found: &crate::KeyValue, key: SafetyKey, state: &mut ClusterState) {
    state.unreadable.push(found.key.clone());
    state.doubts.insert(key, Doubt::Unreadable);
}

fn json<T: DeserializeOwned>(found: &crate::KeyValue, unreadable: &mut Vec<String>) -> Option<T> {
    match serde_json::from_str(&found.value) {
        Ok(value) => Some(value),
        Err(_) => {
            unreadable.push(found.key.clone());
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_group_has_its_own_mark() {
        let scope = Scope::new("service", "demo", None);
        let of = |group| Keys::new(&scope.with_group(GroupId(group))).unfenced();
        assert_ne!(of(0), of(1));
        assert_eq!(of(1), "/service/demo/1/kornak/unfenced");
        assert_eq!(Keys::new(&scope).unfenced(), "/service/demo/kornak/unfenced");
    }
}
