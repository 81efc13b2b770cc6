//! Which standbys are synchronous, and in which order the two places that say so are changed.
//!
//! `sync` in the store says who may take over; `synchronous_standby_names` says whom commits wait
//! for. Whoever the store names must be waited for. So a standby is *added* in PostgreSQL first and
//! in the store once it has everything committed before, and *removed* in the store first.

use std::cmp::Reverse;

use kornak_cluster::{ClusterState, SyncMode, SyncState};

use super::snapshot::PrimaryFacts;

/// The next change towards what synchronous mode asks for. One at a time; the next one is decided on
/// what is observed after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SyncStep {
    /// All is as it should be.
    Settled,
    /// Write this to the store, by compare-and-swap.
    Publish(SyncState),
    /// Put this into `synchronous_standby_names`.
    SetNames(String),
}

/// Decides the next step for the leader `me`.
pub fn plan(me: &str, cluster: &ClusterState, facts: &PrimaryFacts) -> SyncStep {
    let config = cluster.config.clone().unwrap_or_default();
    let stored = cluster.sync.clone().unwrap_or_default();
    if config.synchronous_mode == SyncMode::Off {
        return without_sync(&stored, facts);
    }
    if stored.leader.as_deref() != Some(me) {
        return SyncStep::Publish(SyncState::new(me, &[]));
    }
    let wanted = choose(cluster, facts, &stored, config.synchronous_node_count as usize);
    let kept: Vec<String> =
        stored.standbys().into_iter().filter(|name| contains(&wanted, name)).collect();
    if kept.len() < stored.standbys().len() {
        return SyncStep::Publish(SyncState::new(me, &kept));
    }
    let names = names_for(&wanted, config.synchronous_mode_strict);
    if facts.sync_names != names {
        return SyncStep::SetNames(names);
    }
    let ready: Vec<String> = wanted
        .iter()
        .filter(|name| contains(&kept, name) || caught_up(facts, name))
        .cloned()
        .collect();
    if ready.len() > kept.len() {
        return SyncStep::Publish(SyncState::new(me, &ready));
    }
    SyncStep::Settled
}

/// Mode off: the store stops naming anybody first, then commits stop waiting.
fn without_sync(stored: &SyncState, facts: &PrimaryFacts) -> SyncStep {
    if !stored.is_empty() {
        SyncStep::Publish(SyncState::default())
    } else if facts.sync_names.is_empty() || !is_ours(&facts.sync_names) {
        SyncStep::Settled
    } else {
        SyncStep::SetNames(String::new())
    }
}

/// Whether the setting was written by synchronous mode (and not by a user who manages it himself).
fn is_ours(names: &str) -> bool {
    names == "*" || names.starts_with(|c: char| c.is_ascii_digit())
}

/// Current ones first as long as they stream, then those that may take over, then by priority and by
/// how much they have.
fn choose(
    cluster: &ClusterState,
    facts: &PrimaryFacts,
    stored: &SyncState,
    count: usize,
) -> Vec<String> {
    let current = stored.standbys();
    let mut able: Vec<_> = facts
        .standbys
        .iter()
        .filter(|row| row.streaming)
        .filter_map(|row| {
            let (name, member) = cluster
                .members
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(&row.application_name))?;
            let tags = &member.tags;
            (!tags.nosync() && tags.replicatefrom().is_none_or(str::is_empty)).then(|| {
                let rank =
                    (contains(&current, name), !tags.nofailover(), tags.sync_priority(), row.flush);
                (Reverse(rank), name.clone())
            })
        })
        .collect();
    able.sort();
    // A standby that has connected again may still be there a second time.
    let mut names: Vec<String> = Vec::new();
    for (_, name) in able {
        if names.len() < count && !names.contains(&name) {
            names.push(name);
        }
    }
    names.sort_unstable();
    names
}

/// `synchronous_standby_names` for these (/docs/current/runtime-config-replication.html).
pub fn names_for(wanted: &[String], strict: bool) -> String {
    match wanted {
        [] if strict => "*".to_owned(),
        [] => String::new(),
        names => {
            let quoted: Vec<String> =
                names.iter().map(|name| format!("\"{}\"", name.replace('"', "\"\""))).collect();
            format!("{} ({})", names.len(), quoted.join(","))
        }
    }
}

/// It is waited for, and has all that was committed before it was.
fn caught_up(facts: &PrimaryFacts, name: &str) -> bool {
    facts.standbys.iter().any(|row| {
        row.application_name.eq_ignore_ascii_case(name)
            && row.streaming
            && row.synchronous
            && row.flush >= facts.sync_names_since
    })
}

fn contains(names: &[String], name: &str) -> bool {
    names.iter().any(|known| known.eq_ignore_ascii_case(name))
}
