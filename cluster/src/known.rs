//! The last good value of each key, which stays in force while the store shows none or an unreadable one.
//!
//! A value that is absent or unreadable says nothing: it must not turn maintenance mode off, name other
//! synchronous standbys or let anybody race. [`Known`] keeps the last good value of each key that decides
//! something and fills it in; where nothing good was ever seen, the state says so ([`Doubt::Unknown`]) and
//! whoever needs the key decides nothing. A store whose history goes back (a restored backup, another store)
//! is noticed here as well: what it says of synchronous standbys is of the past until a leader writes it again.
//!
//! Pure: no clock, no file. Not here: what is decided from the values.

use std::collections::BTreeMap;
use std::fmt;

use crate::config::ClusterConfig;
use crate::handover::{Handover, Unfenced};
use crate::member::{MemberRole, MemberState};
use crate::numbers::Revision;
use crate::state::{ClusterState, SyncState};

/// A key on which a promotion, a drop or a change of mode depends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SafetyKey {
    Config,
    Sync,
    Failsafe,
    Unfenced,
    Handover,
    Initialize,
}

impl fmt::Display for SafetyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Config => "config",
            Self::Sync => "sync",
            Self::Failsafe => "failsafe",
            Self::Unfenced => "unfenced",
            Self::Handover => "handover",
            Self::Initialize => "initialize",
        })
    }
}

/// Why a key's value in a [`ClusterState`] is not simply what the store says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Doubt {
    /// The store's value makes no sense, and nobody has looked for a better one.
    Unreadable,
    /// The value is absent or makes no sense; the last good one is in force.
    Kept,
    /// The value is absent or makes no sense, and no good one was ever seen.
    Unknown,
}

/// Earlier values of `sync` that are remembered to be known again in a restored store. A leader writes one
/// or two for each standby that comes or goes.
const WITNESSED: usize = 64;

/// The last reading of a key that left no doubt.
#[derive(Debug, Clone, Default)]
enum LastRead<T> {
    #[default]
    Never,
    /// The key was positively absent.
    Absent,
    Value(T),
}

impl<T> From<Option<T>> for LastRead<T> {
    fn from(read: Option<T>) -> Self {
        read.map_or(Self::Absent, Self::Value)
    }
}

/// The last good values. One for each agent, fed with every view in the order in which they came.
#[derive(Debug, Clone, Default)]
pub struct Known {
    config: Option<ClusterConfig>,
    /// From an earlier life of the agent: the system identifier of its cluster, and what was in force.
    cached: Option<(String, ClusterConfig)>,
    /// Configuration that a new cluster begins with (`bootstrap.dcs`).
    first: Option<ClusterConfig>,
    /// The data at hand is a new cluster's, whose configuration is not in the store yet.
    begins: bool,
    /// `Some` of an empty one: nobody was named, for sure.
    sync: Option<SyncState>,
    /// By the revision at which each was written.
    witnessed: BTreeMap<Revision, SyncState>,
    failsafe: LastRead<BTreeMap<String, String>>,
    unfenced: LastRead<Unfenced>,
    handover: LastRead<Handover>,
    initialize: Option<String>,
    leader: Option<String>,
    /// The store's id and the highest revision seen in it.
    seen: Option<(u64, Revision)>,
    /// How often the store's history has gone back.
    rewound: u32,
    /// First revision of this history that was seen; values that were written until then may be of the past.
    past_until: Revision,
    /// `sync` in force before the history went back.
    sync_before: Option<SyncState>,
}

impl Known {
    /// With the configuration that an earlier life of the agent has kept, for the cluster of this system
    /// identifier.
    pub fn with_cached(cached: Option<(String, ClusterConfig)>) -> Self {
        Self { cached, ..Self::default() }
    }

    /// With what a cluster begins with that is made of data which is there already.
    #[must_use]
    pub fn beginning_with(self, first: ClusterConfig) -> Self {
        Self { first: Some(first), ..self }
    }

    /// Takes a newer state in and fills in what it lacks. `own_identifier`: of the data directory, if
    /// there is one.
    pub fn fill(&mut self, state: &mut ClusterState, own_identifier: Option<&str>) {
        self.note_history(state);
        self.fill_initialize(state);
        self.fill_config(state, own_identifier);
        self.fill_sync(state);
        self.fill_failsafe(state);
        self.fill_handover(state);
        self.fill_unfenced(state);
        if let Some(leader) = &state.leader {
            self.leader = Some(leader.name.clone());
        }
        state.last_leader.clone_from(&self.leader);
        state.rewound = self.rewound;
    }

    fn note_history(&mut self, state: &ClusterState) {
        match self.seen {
            Some((store, revision)) if store != state.store || state.revision < revision => {
                self.rewound = self.rewound.saturating_add(1);
                self.past_until = state.revision;
                self.sync_before = self.sync.clone().filter(|sync| !sync.is_empty());
            }
            _ => {}
        }
        self.seen = Some((state.store, state.revision));
    }

    fn fill_initialize(&mut self, state: &mut ClusterState) {
        let unreadable = state.doubts.contains_key(&SafetyKey::Initialize);
        match state.initialize.as_deref() {
            Some(good) if !good.is_empty() && !unreadable => {
                self.initialize = Some(good.to_owned());
            }
            found => {
                let doubt = match (&self.initialize, found) {
                    (Some(_), _) => Some(Doubt::Kept),
                    _ if unreadable => Some(Doubt::Unknown),
                    // A new cluster, or one that is being created.
                    _ => None,
                };
                if let Some(doubt) = doubt {
                    state.initialize.clone_from(&self.initialize);
                    state.doubts.insert(SafetyKey::Initialize, doubt);
                }
            }
        }
    }

    fn fill_config(&mut self, state: &mut ClusterState, own_identifier: Option<&str>) {
        if self.config.is_none()
            && let Some((identifier, config)) = &self.cached
            && own_identifier.or(state.initialize.as_deref()) == Some(identifier)
        {
            self.config = Some(config.clone());
        }
        if let Some(config) = state.config.take() {
            let config = config.repaired(self.config.as_ref());
            self.config = Some(config.clone());
            state.config = Some(config);
            self.begins = false;
            return;
        }
        let unreadable = state.doubts.contains_key(&SafetyKey::Config);
        let new = state.initialize.is_none() && state.leader.is_none() && own_identifier.is_some();
        if self.config.is_none() && !unreadable && (self.begins || new) {
            state.config.clone_from(&self.first);
            self.begins = true;
            return;
        }
        let doubt = match &self.config {
            Some(_) => Some(Doubt::Kept),
            None if unreadable => Some(Doubt::Unknown),
            None => None,
        };
        state.config.clone_from(&self.config);
        if let Some(doubt) = doubt {
            state.doubts.insert(SafetyKey::Config, doubt);
        }
    }

    fn fill_sync(&mut self, state: &mut ClusterState) {
        let mode = state.config.as_ref().map(ClusterConfig::sync_mode);
        let off = mode == Some(crate::config::SyncMode::Off);
        let readable = !state.doubts.contains_key(&SafetyKey::Sync);
        if readable && let Some(sync) = state.sync.clone() {
            if self.rewound > 0
                && state.sync_revision <= self.past_until
                && self.sync_before.is_some()
            {
                // Of the past, or written by a leader before this member looked: never less strict than both.
                if self.witnessed.get(&state.sync_revision) == Some(&sync) {
                    state.sync.clone_from(&self.sync_before);
                    state.doubts.insert(SafetyKey::Sync, Doubt::Kept);
                } else {
                    state.sync_before.clone_from(&self.sync_before);
                }
                return;
            }
            self.sync_before = None;
            self.witness(state.sync_revision, &sync);
            self.sync = Some(sync);
            return;
        }
        if readable && off {
            // Patroni deletes the key when it turns the mode off: nobody is named then.
            self.sync = Some(SyncState::default());
            self.sync_before = None;
            return;
        }
        match &self.sync {
            Some(sync) if sync.is_empty() && readable => {}
            Some(sync) => {
                state.sync = Some(sync.clone());
                state.doubts.insert(SafetyKey::Sync, Doubt::Kept);
            }
            None if readable && (off || mode.is_none()) => {}
            None => {
                state.doubts.insert(SafetyKey::Sync, Doubt::Unknown);
            }
        }
    }

    fn witness(&mut self, revision: Revision, sync: &SyncState) {
        self.witnessed.insert(revision, sync.clone());
        while self.witnessed.len() > WITNESSED {
            self.witnessed.pop_first();
        }
    }

    fn fill_failsafe(&mut self, state: &mut ClusterState) {
        let unreadable = state.doubts.contains_key(&SafetyKey::Failsafe);
        let on = state.config.as_ref().is_some_and(|config| config.failsafe_mode);
        match (&state.failsafe, unreadable) {
            (Some(list), false) => self.failsafe = LastRead::Value(list.clone()),
            // Before the mode is on nobody needs a list, and before anybody has led there is none.
            (None, false) if !on || self.begins => self.failsafe = LastRead::Absent,
            (_, unreadable) => match &self.failsafe {
                LastRead::Absent if !unreadable => {}
                LastRead::Absent => {
                    state.failsafe = None;
                    state.doubts.insert(SafetyKey::Failsafe, Doubt::Kept);
                }
                LastRead::Value(last) => {
                    state.failsafe = Some(last.clone());
                    state.doubts.insert(SafetyKey::Failsafe, Doubt::Kept);
                }
                LastRead::Never => {
                    state.doubts.insert(SafetyKey::Failsafe, Doubt::Unknown);
                }
            },
        }
    }

    /// The record hangs on a lease, so that its absence is its regular end.
    fn fill_handover(&mut self, state: &mut ClusterState) {
        if !state.doubts.contains_key(&SafetyKey::Handover) {
            self.handover = state.handover.clone().into();
            return;
        }
        let (handover, doubt) = match &self.handover {
            LastRead::Value(last) => (Some(last.clone()), Doubt::Kept),
            LastRead::Absent => (None, Doubt::Kept),
            LastRead::Never => (state.handover.take(), Doubt::Unknown),
        };
        state.handover = handover;
        state.doubts.insert(SafetyKey::Handover, doubt);
    }

    fn fill_unfenced(&mut self, state: &mut ClusterState) {
        let doubt = if state.doubts.contains_key(&SafetyKey::Unfenced) {
            match &self.unfenced {
                LastRead::Value(mark) => {
                    state.unfenced = Some(mark.clone());
                    Doubt::Kept
                }
                LastRead::Absent => {
                    state.unfenced = None;
                    Doubt::Kept
                }
                LastRead::Never => Doubt::Unknown,
            }
        } else if let LastRead::Value(mark) = &self.unfenced
            && state.unfenced.is_none()
            && !is_taken_back(mark, state)
        {
            state.unfenced = Some(mark.clone());
            Doubt::Kept
        } else {
            self.unfenced = state.unfenced.clone().into();
            return;
        };
        state.doubts.insert(SafetyKey::Unfenced, doubt);
    }
}

/// Whether a mark that is not there any more was taken back by its owner: while it proved its lease after
/// maintenance, when its server was no primary any more, or because another member leads.
fn is_taken_back(mark: &Unfenced, state: &ClusterState) -> bool {
    let paused = state.config.as_ref().is_some_and(|config| config.pause);
    match &state.leader {
        Some(leader) if leader.name != mark.member => return true,
        Some(_) if !paused => return true,
        _ => {}
    }
    let released = state
        .handover
        .as_ref()
        .is_some_and(|record| record.leader == mark.member && record.wal_end.is_some());
    let member = state.members.get(&mark.member);
    released
        || member.is_some_and(|member| {
            member.role != MemberRole::Primary || member.state != MemberState::Running
        })
}

#[cfg(test)]
mod tests;
