//! Who may be promoted when the leader key is free, and the order among them.

use std::time::Duration;

use kornak_cluster::{FailoverRequest, HandoverPhase, Lsn, SyncMode, Timeline};

use super::decision::Why;
use super::snapshot::{Race, Snapshot};

/// How long the answers of the other members count.
pub const RACE_FRESH: Duration = Duration::from_millis(1500);

/// Verdict of a node over itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// May create the leader key.
    Claim(Why),
    /// May create it as the candidate of a planned handover.
    TakeOver,
    /// Must ask the other members first.
    Ask,
    No(Why),
}

/// Where this node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub position: Lsn,
    pub timeline: Timeline,
    /// Runs as a primary already (and holds no lease).
    pub primary: bool,
}

/// Judges whether this node may lead now that nobody does.
pub fn judge(s: &Snapshot, standing: Standing) -> Verdict {
    if let Some(verdict) = barred(s) {
        return verdict;
    }
    if let Some(record) = s.cluster.handover.as_ref().filter(|record| record.is_understood()) {
        match (record.phase, record.wal_end) {
            (HandoverPhase::Switch | HandoverPhase::Promote, wal_end)
                if record.candidate.as_deref() == Some(s.me.as_str()) =>
            {
                return match wal_end {
                    Some(needed) if standing.position < needed => {
                        Verdict::No(Why::CandidateLacksWal { needed })
                    }
                    Some(_) => Verdict::TakeOver,
                    None => Verdict::No(Why::OtherIsCandidate),
                };
            }
            (HandoverPhase::Switch | HandoverPhase::Promote, _)
                if record.leader != s.me =>
            {
                return Verdict::No(Why::OtherIsCandidate);
            }
            _ => {}
        }
    }
    let request = &s.cluster.failover;
    let named = request.scheduled_at.is_none().then_some(request.member.as_deref()).flatten();
    let is_failover = request.leader.is_none() && named.is_some();
    if let Some(refusal) = unfit(s, standing, is_failover && named == Some(s.me.as_str())) {
        return Verdict::No(refusal);
    }
    let Some(race) = fresh(s) else { return Verdict::Ask };
    among_peers(s, standing, race, request)
}

/// Reasons that need no comparison and no exception.
fn barred(s: &Snapshot) -> Option<Verdict> {
    let config = s.cluster.config.as_ref();
    let why = if config.is_some_and(|config| config.pause) {
        Why::Paused
    } else if s.tags.nofailover() {
        Why::NoFailoverTag
    } else if s.promise_until.is_some_and(|until| s.now < until) {
        Why::PromisedFailsafe
    } else if s.race_not_before.is_some_and(|moment| s.now < moment) {
        Why::LostRecently
    } else if s.cluster.unfenced.as_ref().is_some_and(|unfenced| unfenced.member != s.me) {
        Why::UnfencedPrimary
    } else {
        return None;
    };
    Some(Verdict::No(why))
}

/// Reasons in this node's own state. A manual failover to this node overrides the synchronous
/// standby rule and the lag, for the operator said so by name.
fn unfit(s: &Snapshot, standing: Standing, forced: bool) -> Option<Why> {
    let config = s.cluster.config.clone().unwrap_or_default();
    if standing.primary && standing.timeline < s.cluster.timeline() {
        return Some(Why::TimelineBehind);
    }
    if forced {
        return None;
    }
    if config.synchronous_mode != SyncMode::Off
        && let Some(sync) = s.cluster.sync.as_ref().filter(|sync| !sync.is_empty())
        && !sync.matches(&s.me)
    {
        return Some(Why::NotSynchronous);
    }
    let optime = s.cluster.status.as_ref().map_or(Lsn(0), |status| status.optime);
    let lag_bytes = optime.bytes_ahead_of(standing.position);
    if lag_bytes > config.maximum_lag_on_failover {
        return Some(Why::TooFarBehind { lag_bytes });
    }
    if config.check_timeline && standing.timeline < s.cluster.timeline() {
        return Some(Why::TimelineBehind);
    }
    None
}

fn fresh(s: &Snapshot) -> Option<&Race> {
    s.race.as_ref().filter(|race| s.now.since(race.asked_at) <= RACE_FRESH)
}

/// Compares this node with those that answered. Who does not answer does not block the race.
fn among_peers(
    s: &Snapshot,
    standing: Standing,
    race: &Race,
    request: &FailoverRequest,
) -> Verdict {
    let answered = || race.peers.iter().filter_map(|(name, peer)| Some((name, peer.as_ref()?)));
    if answered().any(|(_, peer)| peer.primary) && !standing.primary {
        return Verdict::No(Why::OtherIsPrimary);
    }
    let named = request.scheduled_at.is_none().then_some(request.member.as_deref()).flatten();
    match named {
        Some(name) if name == s.me => return Verdict::Claim(Why::NamedCandidate),
        Some(name) if answered().any(|(peer, facts)| peer == name && !facts.tags.nofailover()) => {
            return Verdict::No(Why::OtherIsCandidate);
        }
        _ => {}
    }
    let synchronous = s.cluster.config.as_ref().is_some_and(|c| c.synchronous_mode != SyncMode::Off);
    let sync = s.cluster.sync.as_ref().filter(|sync| synchronous && !sync.is_empty());
    let mine = (standing.timeline, standing.position);
    for (name, peer) in answered() {
        let rival = !peer.tags.nofailover() && sync.is_none_or(|sync| sync.matches(name));
        if !rival {
            continue;
        }
        let theirs = (peer.timeline, peer.position);
        if theirs > mine {
            return Verdict::No(Why::PeerAhead { position: peer.position });
        }
        if theirs == mine && peer.tags.failover_priority() > s.tags.failover_priority() {
            return Verdict::No(Why::PeerPreferred);
        }
    }
    Verdict::Claim(Why::MostAdvanced)
}
