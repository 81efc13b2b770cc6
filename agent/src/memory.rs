//! The agent's memory of the store, for when the store shows nothing usable: the last good values
//! ([`kornak_cluster::Known`]), of which the configuration outlives the agent in a file beside the data
//! directory, as Patroni's `patroni.dynamic.json` does; and as long as that one is in the data directory. The members and
//! the leader outlive it as well (`seen.json`), for an agent that begins while the store is away.

mod seen;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kornak_cluster::{ClusterConfig, ClusterState, Doubt, GroupId, Known, SafetyKey};
use kornak_dcs::keys::Keys;
use kornak_dcs::{Reach, View};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::machine::Machine;
use seen::Seen;

/// See the module. One for each data directory; it outlives an instance of the agent.
#[derive(Debug)]
pub struct Memory {
    machine: Machine,
    path: PathBuf,
    inner: Mutex<Inner>,
    /// The content that the file has, or is about to have.
    kept: Mutex<Option<Kept>>,
    /// As `path` and `kept`, of the cluster as it was seen last.
    seen_path: PathBuf,
    seen: Mutex<Option<Seen>>,
}

#[derive(Debug, Default)]
struct Inner {
    known: Known,
    /// The state that was read from the newest view.
    last: Option<(Arc<View>, Option<String>, Arc<ClusterState>)>,
    /// The last log message about each key.
    said: BTreeMap<SafetyKey, Doubt>,
}

/// The file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Kept {
    /// Of the cluster whose configuration it is.
    system_identifier: String,
    config: Map<String, Value>,
    /// The counterpart of the file is in the data directory; older versions of Kornak made none.
    #[serde(default)]
    shown: bool,
}

impl Memory {
    /// Reads what an earlier agent has left; a file that cannot be read counts as none. So does one whose
    /// counterpart `shown` in the data directory was removed.
    pub fn load(machine: Machine, path: PathBuf, shown: &Path, first: ClusterConfig) -> Self {
        let read = || serde_json::from_slice::<Kept>(&machine.read(&path)?).ok();
        let kept = read().filter(|kept| !kept.shown || machine.exists(shown));
        let cached = kept.clone().and_then(|kept| {
            let text = Value::Object(kept.config).to_string();
            Some((kept.system_identifier, ClusterConfig::parse(&text)?))
        });
        let known = Known::with_cached(cached).beginning_with(first);
        let inner = Mutex::new(Inner { known, ..Inner::default() });
        let seen_path = path.with_file_name("seen.json");
        let seen = || serde_json::from_slice(&machine.read(&seen_path)?).ok();
        let seen = Mutex::new(seen());
        Self { machine, path, inner, kept: Mutex::new(kept), seen_path, seen }
    }

    /// The group's state by the newest view, with what is remembered. `own_identifier`: of the data
    /// directory.
    pub fn read(
        &self,
        view: &watch::Receiver<Arc<View>>,
        keys: &Keys,
        group: Option<GroupId>,
        own_identifier: Option<&str>,
    ) -> Arc<ClusterState> {
        let mut inner = self.inner.lock();
        // Behind the lock: an older view after a newer one would look like a store that was restored.
        let view = Arc::clone(&view.borrow());
        if let Some((seen, identifier, state)) = &inner.last
            && Arc::ptr_eq(seen, &view)
            && identifier.as_deref() == own_identifier
        {
            return Arc::clone(state);
        }
        let mut state = keys.state(&view);
        if state.handover.as_ref().is_some_and(|record| record.group != group) {
            // Another group's, which may have a member of the same name.
            state.handover = None;
        }
        if view.reach != Reach::Never {
            inner.known.fill(&mut state, own_identifier);
            // While a cluster is being made its keys are not there yet.
            let is_made = match state.initialize.as_deref() {
                Some(identifier) => !identifier.is_empty(),
                None => own_identifier.is_some(),
            };
            if is_made {
                inner.say(&state, keys);
            }
        } else if let Some(remembered) = self.remembered(own_identifier) {
            state = remembered;
        }
        let state = Arc::new(state);
        inner.last = Some((view, own_identifier.map(str::to_owned), Arc::clone(&state)));
        state
    }

    /// Keeps the configuration for the next agent, if it has changed. Returns at once; the file is written
    /// in the background.
    pub fn keep(self: &Arc<Self>, cluster: &ClusterState, own_identifier: Option<&str>) {
        let initialize = || cluster.initialize.clone().filter(|identifier| !identifier.is_empty());
        let identifier = own_identifier.map(str::to_owned).or_else(initialize);
        let (Some(config), Some(system_identifier)) = (&cluster.config, identifier) else { return };
        let new = Kept { system_identifier, config: config.raw.clone(), shown: true };
        {
            let mut kept = self.kept.lock();
            if kept.as_ref() == Some(&new) {
                return;
            }
            *kept = Some(new);
        }
        let memory = Arc::clone(self);
        self.machine.spawn_blocking(move || memory.write());
    }

    /// The cluster of this data directory as it was seen last, by this agent or one before.
    fn remembered(&self, own_identifier: Option<&str>) -> Option<ClusterState> {
        let seen = self.seen.lock();
        let seen = seen.as_ref().filter(|seen| own_identifier == Some(&seen.system_identifier))?;
        let kept = self.kept.lock();
        let kept = kept.as_ref().filter(|kept| kept.system_identifier == seen.system_identifier);
        let config = kept.map(|kept| Value::Object(kept.config.clone()).to_string());
        Some(seen.state(config.and_then(|text| ClusterConfig::parse(&text))))
    }

    /// Keeps for the next agent what the store shows now, if it has changed. Returns at once; the file is written in
    /// the background.
    pub fn keep_seen(self: &Arc<Self>, cluster: &ClusterState, own_identifier: Option<&str>) {
        let (Some(own), true) = (own_identifier, cluster.initialize.as_deref() == own_identifier)
        else {
            return;
        };
        {
            let mut seen = self.seen.lock();
            let new = Seen::of(cluster, own.to_owned(), seen.as_ref());
            if seen.as_ref() == Some(&new) {
                return;
            }
            *seen = Some(new);
        }
        let memory = Arc::clone(self);
        self.machine.spawn_blocking(move || memory.write_seen());
    }

    fn write_seen(&self) {
        let seen = self.seen.lock();
        let Some(text) = seen.as_ref().and_then(|seen| serde_json::to_vec(seen).ok()) else {
            return;
        };
        if let Err(error) = self.machine.write(&self.seen_path, &text) {
            let (error, file) = (&error as &dyn std::error::Error, self.seen_path.display());
            warn!(error, %file, "members could not be noted for a restart without the store");
        }
    }

    fn write(&self) {
        // Held while writing, so that the newest is written last.
        let mut kept = self.kept.lock();
        let Some(text) = kept.as_ref().and_then(|kept| serde_json::to_vec(kept).ok()) else {
            return;
        };
        if let Err(error) = self.machine.write(&self.path, &text) {
            warn!(
                error = &error as &dyn std::error::Error,
                file = %self.path.display(),
                "configuration could not be saved for a restart of the agent"
            );
            *kept = None;
        }
    }
}

impl Inner {
    /// Says once what is odd, and that it is over.
    fn say(&mut self, state: &ClusterState, keys: &Keys) {
        for (key, doubt) in &state.doubts {
            if self.said.get(key) == Some(doubt) {
                continue;
            }
            let name = name(*key, keys);
            match doubt {
                Doubt::Kept => warn!(
                    key = name,
                    "key is missing in the store or invalid: its last good value stays in force"
                ),
                Doubt::Unreadable | Doubt::Unknown => warn!(
                    key = name,
                    "key is missing in the store or invalid, and no good value is known: nothing that needs it is decided here; write it again"
                ),
            }
        }
        for key in self.said.keys().filter(|key| !state.doubts.contains_key(key)) {
            info!(key = name(*key, keys), "key is valid again");
        }
        self.said.clone_from(&state.doubts);
    }
}

fn name(key: SafetyKey, keys: &Keys) -> String {
    match key {
        SafetyKey::Config => keys.config(),
        SafetyKey::Sync => keys.sync(),
        SafetyKey::Failsafe => keys.failsafe(),
        SafetyKey::Unfenced => keys.unfenced(),
        SafetyKey::Handover => keys.handover(),
        SafetyKey::Initialize => keys.initialize(),
    }
}

#[cfg(test)]
mod tests {
    use kornak_cluster::Scope;
    use kornak_dcs::memory::MemoryDcs;
    use kornak_dcs::{Dcs, Op, Txn};

    use super::*;

    #[tokio::test]
    async fn a_configuration_outlives_the_agent_and_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dynamic.json");
        let keys = Keys::new(&Scope::new("service", "demo", None));
        let store = MemoryDcs::manual();
        let follow = store.follow(keys.root());
        for (key, value) in [(keys.config(), r#"{"pause":true}"#), (keys.initialize(), "7")] {
            store.txn(Txn::just(Op::put(key, value))).await.unwrap();
        }
        let view = follow.subscribe();
        let shown = dir.path().join("patroni.dynamic.json");
        let first = ClusterConfig::parse(r#"{"ttl":77}"#).unwrap();
        let load = || Memory::load(Machine::real(), path.clone(), &shown, first.clone());
        let memory = Arc::new(load());
        let state = memory.read(&view, &keys, None, Some("7"));
        memory.keep(&state, Some("7"));
        while !path.exists() {
            tokio::task::yield_now().await;
        }
        store.txn(Txn::just(Op::delete(keys.config()))).await.unwrap();
        std::fs::write(&shown, "{}").unwrap();
        for memory in [&memory, &Arc::new(load())] {
            let state = memory.read(&view, &keys, None, Some("7"));
            assert!(state.config.as_ref().is_some_and(|config| config.pause));
            assert!(state.is_kept(SafetyKey::Config) && state.config_revision.is_none());
        }
        let other = load().read(&view, &keys, None, Some("8"));
        assert_eq!(other.config, None, "another cluster's data lies here now");
        std::fs::remove_file(&shown).unwrap();
        let forgotten = load().read(&view, &keys, None, Some("7"));
        assert_eq!(forgotten.config, None, "the operator has removed it");
        store.txn(Txn::just(Op::delete(keys.initialize()))).await.unwrap();
        let new = load().read(&view, &keys, None, Some("7"));
        assert_eq!(new.config, Some(first.clone()), "a new cluster of this data");
        assert!(!new.is_kept(SafetyKey::Config));
        assert_eq!(load().read(&view, &keys, None, None).config, None, "there is no data");
    }
}
