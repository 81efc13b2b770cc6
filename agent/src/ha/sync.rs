//! Which standbys are synchronous, and in which order the two places that say so are changed.
//!
//! `synchronous_standby_names` says for whom commits wait: for `waits` of the standbys in `set`. `sync` in
//! the store says who may take over: one of the voters that has as much as `quorum` others of them. An
//! acknowledged commit is on `waits` standbys of the set, so it is on one of the `quorum + 1` voters
//! that were compared if
//!
//! ```text
//! quorum + waits >= |voters ∪ set|                                                  (1)
//! ```
//!
//! for else the two groups could miss each other. Priority mode (`on`) is the case `waits = |set|`,
//! `quorum = 0`: each voter has everything. (1) must hold in every moment, for the two places cannot be
//! changed at once; and it speaks of commits under the names now in force. What was acknowledged before
//! they were is on a standby that has flushed as much as the log was long when they came into force: such
//! a standby is *ready*, and a write to the store must also keep
//!
//! ```text
//! every group of quorum + 1 voters has a ready one, or was such a group before      (2)
//! ```
//!
//! From these two follow all transitions; [`plan`] takes the next step of the shortest way that keeps
//! both, and prefers ways on which somebody can take over all the time.

mod force;
mod names;
mod writes;

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Duration;

use kornak_cluster::{ClusterConfig, ClusterState, SyncMode, SyncState};

use super::snapshot::{PrimaryFacts, walsender_of};
pub use force::{InForce, Sample, Walsender};
pub use names::Names;
pub use writes::Writes;

/// A synchronous standby that has acknowledged nothing for so long makes way for another one. Its host may have
/// lost its power, of which the server hears after `wal_sender_timeout` (a minute) and the store after `ttl`; commits
/// wait for it all that time. A disk that writes a checkpoint may need a second or two.
const SILENT_AFTER: Duration = Duration::from_secs(5);

/// The next change towards what synchronous mode asks for. One at a time; the next one is decided on
/// what is observed after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SyncStep {
    /// All is as it should be, or something has to happen elsewhere first.
    Settled,
    /// The next step is known and has to wait until all of the server goes by the names in force.
    Await,
    /// Write this to the store, by compare-and-swap.
    Publish(SyncState),
    /// Put this into `synchronous_standby_names`.
    SetNames(String),
}

/// Names in lower case, for they compare without case.
type Set = BTreeSet<String>;

/// The content of the two places, and the standbys that are ready.
struct Now<'a> {
    /// In the store.
    voters: Set,
    quorum: usize,
    /// In the server. `None`: somebody else's words, of which nothing can be concluded.
    waits: usize,
    set: Option<Set>,
    ready: Set,
    /// As written.
    spelled: &'a [String],
}

impl Now<'_> {
    /// (1), for these voters and the names in force.
    fn covers(&self, voters: &Set, quorum: usize) -> bool {
        voters.is_empty()
            || self.set.as_ref().is_some_and(|set| quorum + self.waits >= voters.union(set).count())
    }

    /// (2).
    fn has_past(&self, voters: &Set, quorum: usize) -> bool {
        let unready: Set = voters.difference(&self.ready).cloned().collect();
        unready.len() <= quorum || (unready.is_subset(&self.voters) && quorum >= self.quorum)
    }

    fn may_publish(&self, voters: &Set, quorum: usize) -> bool {
        self.covers(voters, quorum) && self.has_past(voters, quorum)
    }

    /// (1), for the voters in the store and these names.
    fn may_wait_for(&self, set: &Set, waits: usize) -> bool {
        self.voters.is_empty() || self.quorum + waits >= self.voters.union(set).count()
    }
}

/// Decides the next step for the leader `me`.
pub fn plan(me: &str, cluster: &ClusterState, facts: &PrimaryFacts) -> SyncStep {
    let Some(config) = cluster.config.clone() else { return SyncStep::Settled };
    let stored = cluster.sync.clone().unwrap_or_default();
    let mode = config.sync_mode();
    if mode == SyncMode::Off {
        return without_sync(&stored, facts);
    }
    if stored.leader.as_deref() != Some(me) {
        return SyncStep::Publish(SyncState::new(me, &[]));
    }
    let able = able(cluster, facts, &stored, &config);
    let names = Names::parse(&facts.sync_names);
    let now = now(&stored, names.as_ref(), facts, &able, config.use_slots());
    let chosen: Vec<String> = match mode {
        SyncMode::Quorum => able.clone(),
        _ => able.iter().take(config.synchronous_node_count as usize).cloned().collect(),
    };
    let target = first_without_the_lost(&now, lower(&chosen));
    let waits = target.len().min(config.synchronous_node_count as usize);
    let step = towards(&now, &target, waits, mode == SyncMode::Quorum);
    let spell = |set: &Set| -> Vec<String> {
        let known = now.spelled.iter().chain(cluster.members.keys());
        let mut known: Vec<String> = known.cloned().collect();
        known.sort_unstable();
        known.dedup();
        known.retain(|name| set.contains(&name.to_lowercase()));
        known
    };
    match step {
        Step::None => SyncStep::Settled,
        // Commits may still be acknowledged by older names, of which nothing is known here. Whom the store names
        // meanwhile is covered by all of them; nobody at all always is.
        Step::Store(voters, _) if facts.sync_names_since.is_none() && !voters.is_empty() => {
            SyncStep::Await
        }
        Step::Store(voters, quorum) => {
            let quorum = u32::try_from(quorum).unwrap_or(u32::MAX);
            SyncStep::Publish(SyncState::with_quorum(me, &spell(&voters), quorum))
        }
        Step::Server(set, waits) => {
            let wanted = Names::of(&spell(&set), waits, mode, config.synchronous_mode_strict);
            let wanted = wanted.to_string();
            if wanted == facts.sync_names { SyncStep::Settled } else { SyncStep::SetNames(wanted) }
        }
    }
}

enum Step {
    None,
    Store(Set, usize),
    Server(Set, usize),
}

/// Keeps only the standbys that commits wait for and that are still able: a lost standby is let go
/// before somebody else is taken in.
fn first_without_the_lost(now: &Now<'_>, chosen: Set) -> Set {
    let Some(set) = &now.set else { return chosen };
    let left: Set = set.intersection(&chosen).cloned().collect();
    if left.is_empty() || left.len() == set.len() || now.voters.is_empty() { chosen } else { left }
}

/// The next step to commits that wait for `waits` of `target`, and to its members as the voters.
fn towards(now: &Now<'_>, target: &Set, waits: usize, quorum_mode: bool) -> Step {
    let quorum = target.len() - waits;
    let names_are = |set: &Set, waits| now.set.as_ref() == Some(set) && now.waits == waits;
    if !names_are(target, waits) {
        if now.may_wait_for(target, waits) {
            return Step::Server(target.clone(), waits);
        }
        // Only newcomers: commits wait for more of them, until the store knows them.
        let more = target.len().saturating_sub(now.quorum);
        if quorum_mode && now.voters.is_subset(target) && more > waits && now.voters != *target {
            return if names_are(target, more) {
                publish(now, target, quorum)
            } else {
                Step::Server(target.clone(), more)
            };
        }
        let left: Set = now.voters.intersection(target).cloned().collect();
        let needed = now.set.as_ref().map_or(0, |set| left.union(set).count());
        let mut smaller = quorum.max(needed.saturating_sub(now.waits));
        if !now.has_past(&left, smaller) {
            smaller = smaller.max(now.quorum);
        }
        let (left, smaller) = if left.is_empty() { (left, 0) } else { (left, smaller) };
        return if now.may_publish(&left, smaller) && (now.voters != left || now.quorum != smaller) {
            Step::Store(left, smaller)
        } else if now.voters.is_empty() {
            Step::None
        } else {
            Step::Store(Set::new(), 0)
        };
    }
    match publish(now, target, quorum) {
        // The words may differ although they mean the same.
        Step::None => Step::Server(target.clone(), waits),
        step => step,
    }
}

/// Makes voters of all of `target`, or of as many as are ready.
fn publish(now: &Now<'_>, target: &Set, quorum: usize) -> Step {
    let known: Set = now.voters.intersection(target).cloned().collect();
    let some: Set =
        known.union(&now.ready).filter(|name| target.contains(*name)).cloned().collect();
    let stays = (known, quorum.max(now.quorum));
    for (voters, quorum) in [(target.clone(), quorum), (some, quorum), stays] {
        let quorum = if voters.is_empty() { 0 } else { quorum };
        if voters == now.voters && quorum == now.quorum {
            return Step::None;
        }
        // A group larger than all voters would never come together.
        let electable = voters.is_empty() || quorum < voters.len();
        if electable && now.may_publish(&voters, quorum) {
            return Step::Store(voters, quorum);
        }
    }
    Step::None
}

fn now<'a>(
    stored: &SyncState,
    names: Option<&Names>,
    facts: &PrimaryFacts,
    able: &'a [String],
    uses_slots: bool,
) -> Now<'a> {
    // Where that is unknown, nobody is named anyway.
    let has_the_past = |flush| facts.sync_names_since.is_none_or(|since| flush >= since);
    let ready = facts
        .standbys
        .iter()
        .filter(|row| row.streaming && row.synchronous && has_the_past(row.flush))
        .filter(|row| walsender_of(&facts.standbys, &row.application_name, uses_slots).is_some())
        .map(|row| row.application_name.to_lowercase())
        .collect();
    Now {
        voters: lower(&stored.standbys()),
        quorum: stored.quorum as usize,
        waits: names.map_or(0, |names| names.waits),
        set: names.map(|names| lower(&names.standbys)),
        ready,
        spelled: able,
    }
}

fn lower(names: &[String]) -> Set {
    names.iter().map(|name| name.to_lowercase()).collect()
}

/// Mode off: the store stops naming anybody first, then commits stop waiting.
fn without_sync(stored: &SyncState, facts: &PrimaryFacts) -> SyncStep {
    if !stored.is_empty() {
        SyncStep::Publish(SyncState::default())
    } else if facts.sync_names.is_empty() || !Names::are_ours(&facts.sync_names) {
        SyncStep::Settled
    } else {
        SyncStep::SetNames(String::new())
    }
}

/// Standbys that can be synchronous, in order: those that answer first, of them those that may take
/// over, then by priority; of equals current ones as long as they stream and keep up, then by how
/// much they have.
fn able(
    cluster: &ClusterState,
    facts: &PrimaryFacts,
    stored: &SyncState,
    config: &ClusterConfig,
) -> Vec<String> {
    let current = lower(&stored.standbys());
    let furthest = match facts.standbys.as_slice() {
        [] | [_] => facts.lsn,
        rows => rows.iter().map(|row| row.acknowledged).max().unwrap_or(facts.lsn),
    };
    let mut able: Vec<_> = cluster
        .members
        .iter()
        .filter_map(|(name, member)| {
            let row = walsender_of(&facts.standbys, name, config.use_slots())?;
            let lag = furthest.bytes_ahead_of(row.acknowledged);
            if config.maximum_lag_on_syncnode.is_some_and(|most| lag > most) {
                return None;
            }
            let tags = &member.tags;
            let cascades = tags.replicatefrom().is_some_and(|from| {
                cluster.leader.as_ref().is_none_or(|leader| leader.name != from)
            });
            (!tags.nosync() && !tags.nostream() && !cascades).then(|| {
                let is_current = current.contains(&name.to_lowercase());
                let answers = row.silent < SILENT_AFTER;
                let rank =
                    (answers, !tags.nofailover(), tags.sync_priority(), is_current, row.flush);
                (Reverse(rank), name.clone())
            })
        })
        .collect();
    able.sort();
    able.into_iter().map(|(_, name)| name).collect()
}

/// The `synchronous_standby_names` of a server that is about to be promoted, before its agent knows
/// of any standby.
pub fn names_at_promotion(config: &ClusterConfig) -> String {
    match config.sync_mode() {
        SyncMode::Off => String::new(),
        mode => Names::of(&[], 0, mode, config.synchronous_mode_strict).to_string(),
    }
}
