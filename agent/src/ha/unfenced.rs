//! The primary that maintenance mode has left without a guard, once maintenance mode is over and nobody leads.
//!
//! The agent of such a server does not come back to stop it, so another member is promoted beside it only when it is
//! known to acknowledge nothing any more: it does not run; or commits there wait for standbys, and those that have
//! left it are so many that it waits for ever. Nothing of its host may be heard, for it is off, or cut off: then it is
//! given `ttl`, and after that the operator's word counts, who has ended maintenance mode.

use std::time::Duration;

use kornak_cluster::{SafetyKey, SyncMode, SyncState, Unfenced};

use super::candidate::{Standing, is_vote};
use super::decision::Why;
use super::snapshot::{Race, Snapshot, StandbyFacts, Stray};

/// Backends of a postmaster that was killed end within moments, and a server that is started again listens.
const REFUSED_FOR: Duration = Duration::from_secs(2);

/// Another member's mark.
pub(super) fn mark(s: &Snapshot) -> Option<&Unfenced> {
    s.cluster.unfenced.as_ref().filter(|mark| mark.member != s.me)
}

/// Why nobody may be promoted beside the server that is marked. `None`: it acknowledges nothing any more.
pub(super) fn bars(s: &Snapshot, standing: Standing, race: &Race) -> Option<Why> {
    let mark = mark(s)?;
    if race.stray == Stray::Standby || cannot_acknowledge(s, mark, standing, race) {
        return None;
    }
    let waited = s.leaderless_since.map_or(Duration::ZERO, |since| s.now.since(since));
    let limit = match race.stray {
        Stray::Runs => return Some(Why::UnfencedRuns),
        Stray::Refused => REFUSED_FOR,
        Stray::Unheard | Stray::Standby => s.cluster.config.clone().unwrap_or_default().ttl,
    };
    let left = limit.saturating_sub(waited);
    (!left.is_zero()).then_some(Why::UnfencedUnheard { left })
}

/// The standbys of which commits on the marked server wait for some.
fn waited_for<'a>(s: &'a Snapshot, mark: &Unfenced) -> Option<&'a SyncState> {
    let on = s.cluster.config.as_ref().is_some_and(|config| config.sync_mode() != SyncMode::Off);
    let sync = s.cluster.sync.as_ref().filter(|sync| !sync.is_empty())?;
    let current = !s.cluster.is_unknown(SafetyKey::Sync) && s.cluster.sync_before.is_none();
    let its = sync.leader.as_deref() == Some(mark.member.as_str());
    (on && current && its && sync.matches(&s.me)).then_some(sync)
}

/// By inequality (1) of [`super::sync`], a server from which this node and as many others as a candidate needs
/// have gone lacks what its commits wait for.
fn cannot_acknowledge(s: &Snapshot, mark: &Unfenced, standing: Standing, race: &Race) -> bool {
    let Some(sync) = waited_for(s, mark).filter(|_| !standing.primary) else { return false };
    let voters = sync.standbys();
    let is_voter = |name: &String| voters.iter().any(|voter| voter.eq_ignore_ascii_case(name));
    let left = race.peers.iter().filter(|(name, peer)| {
        let gone = peer.as_ref().is_some_and(|peer| peer.detached && is_vote(peer, standing));
        gone && is_voter(name)
    });
    left.count() >= sync.quorum as usize
}

/// A synchronous standby stops to acknowledge to the marked server where it takes more than the candidate's
/// going.
pub(super) fn is_left(s: &Snapshot, facts: &StandbyFacts) -> bool {
    s.leaderless_since.is_some()
        && facts.upstream.is_some()
        && mark(s).is_some_and(|mark| waited_for(s, mark).is_some_and(|sync| sync.quorum > 0))
}
