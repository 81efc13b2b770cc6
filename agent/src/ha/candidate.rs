//! Decides which members may be promoted when the leader key is free, and the order among them.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::time::Duration;

use kornak_cluster::{
    ClusterConfig, ClusterState, HandoverPhase, Lsn, MemberState, SafetyKey, SyncMode, SyncState,
    Timeline,
};

use super::decision::Why;
use super::snapshot::{Peer, Race, Snapshot};
use super::unfenced;

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
    /// The end of its log; a lower bound unless `wal_known`.
    pub position: Lsn,
    pub wal_known: bool,
    pub timeline: Timeline,
    /// Runs as a primary already (and holds no lease).
    pub primary: bool,
}

/// Judges whether this node may lead now that nobody does.
pub fn judge(s: &Snapshot, standing: Standing) -> Verdict {
    if let Some(why) = barred(s).or_else(|| unknown(s, standing)) {
        return Verdict::No(why);
    }
    if let Some(verdict) = planned(s, standing) {
        return verdict;
    }
    let named = named(s);
    let forced = is_forced(s, &s.me);
    if let Some(why) = held_back(s, standing, named == Some(s.me.as_str()), forced) {
        return Verdict::No(why);
    }
    if let Some(refusal) = unfit(s, &s.me, standing, forced) {
        return Verdict::No(refusal);
    }
    let Some(race) = fresh(s) else { return Verdict::Ask };
    if !forced && let Some(why) = unfenced::bars(s, standing, race) {
        return Verdict::No(why);
    }
    among_peers(s, standing, race, named)
}

/// Whether this node would race if nobody led, as far as that depends on itself alone.
pub(super) fn is_fit(s: &Snapshot, standing: Standing) -> bool {
    barred(s).or_else(|| unknown(s, standing)).is_none()
        && held_back(s, standing, false, false).is_none()
        && unfit(s, &s.me, standing, false).is_none()
}

/// Reasons without an exception.
fn barred(s: &Snapshot) -> Option<Why> {
    if s.tags.nofailover() {
        Some(Why::NoFailoverTag)
    } else if s.lacks_watchdog {
        Some(Why::NoWatchdog)
    } else if s.race_not_before.is_some_and(|moment| s.now < moment) {
        Some(Why::LostRecently)
    } else if s.cluster.is_unknown(SafetyKey::Unfenced) && !is_forced(s, &s.me) {
        // Only an operator who names this member can know that the other is gone.
        Some(Why::UnfencedPrimary)
    } else {
        None
    }
}

/// Facts that have to be known before anybody races. A primary whose cluster has no configuration yet is about to
/// be adopted.
fn unknown(s: &Snapshot, standing: Standing) -> Option<Why> {
    if s.cluster.is_unknown(SafetyKey::Config) || (s.cluster.config.is_none() && !standing.primary)
    {
        return Some(Why::ConfigUnknown);
    }
    let unnamed = !is_forced(s, &s.me);
    (s.cluster.is_unknown(SafetyKey::Handover) && unnamed).then_some(Why::HandoverUnknown)
}

/// A planned handover that has passed its point of no return decides alone, also in maintenance
/// mode: an operator asked for it. `None`: there is none, or it leaves the choice to the race (the
/// old leader on its way back).
fn planned(s: &Snapshot, standing: Standing) -> Option<Verdict> {
    let record = s.cluster.handover.as_ref().filter(|record| record.is_understood())?;
    if !matches!(record.phase, HandoverPhase::Switch | HandoverPhase::Promote) {
        return None;
    }
    if record.candidate.as_deref() == Some(s.me.as_str()) {
        return Some(match record.wal_end {
            // The leader takes its mark back with the key.
            _ if unfenced::mark(s).is_some() => Verdict::No(Why::UnfencedPrimary),
            Some(needed) if standing.position < needed => {
                Verdict::No(Why::CandidateLacksWal { needed })
            }
            Some(_) => Verdict::TakeOver,
            None => Verdict::No(Why::OtherIsCandidate),
        });
    }
    (record.leader != s.me).then_some(Verdict::No(Why::OtherIsCandidate))
}

/// Whether a promise to a leader without the store still binds this node. A leader that has itself
/// released the key to this node has no use for the promise any more.
pub fn promise_binds(s: &Snapshot) -> bool {
    let released_to_me = s.cluster.handover.as_ref().is_some_and(|record| {
        record.is_understood()
            && record.wal_end.is_some()
            && record.candidate.as_deref() == Some(s.me.as_str())
    });
    !released_to_me && s.promise_until.is_some_and(|until| s.now < until)
}

/// Reasons that hold against automatic failover only, or against all but the named candidate.
fn held_back(s: &Snapshot, standing: Standing, named: bool, forced: bool) -> Option<Why> {
    let config = s.cluster.config.as_ref();
    if promise_binds(s) {
        return Some(Why::PromisedFailsafe);
    }
    // A primary that lives through maintenance takes its key again when the store is back.
    if config.is_some_and(|config| config.pause) && !standing.primary && !named {
        return Some(Why::Paused);
    }
    // A leader that cannot reach the store asks the members of this list; whoever is not in it
    // would not be asked and could race against a legal primary. Should nobody of the list ever come
    // back, an operator has to say that its leader is gone.
    if !is_listed(s, &s.me) && !standing.primary && !forced {
        return Some(match s.cluster.is_unknown(SafetyKey::Failsafe) {
            true => Why::FailsafeUnknown,
            false => Why::NotInFailsafeList,
        });
    }
    None
}

/// Whether a leader without the store would ask this member.
fn is_listed(s: &Snapshot, name: &str) -> bool {
    if !s.cluster.config.as_ref().is_some_and(|config| config.failsafe_mode) {
        return true;
    }
    match &s.cluster.failsafe {
        Some(list) => list.contains_key(name),
        // Never written, as opposed to lost: no leader asks anybody.
        None => !s.cluster.is_unknown(SafetyKey::Failsafe),
    }
}

/// The member that a manual request names, if the request is due.
fn named(s: &Snapshot) -> Option<&str> {
    let request = &s.cluster.failover;
    request.scheduled_at.is_none().then_some(request.member.as_deref()).flatten()
}

/// A manual *failover* to a member overrides the synchronous standby rule and the lag, for the
/// operator said so by name; a switchover (which names the leader) does not.
fn is_forced(s: &Snapshot, name: &str) -> bool {
    s.cluster.failover.leader.is_none() && named(s) == Some(name)
}

/// Reasons in what a node has.
fn unfit(s: &Snapshot, name: &str, standing: Standing, forced: bool) -> Option<Why> {
    let behind = standing.timeline < s.cluster.timeline();
    if standing.primary && behind {
        return Some(Why::TimelineBehind);
    }
    if forced {
        return None;
    }
    if !standing.wal_known {
        return Some(Why::OwnWalUnread);
    }
    let defaults = ClusterConfig::default;
    let config = s.cluster.config.as_ref().map_or_else(|| Cow::Owned(defaults()), Cow::Borrowed);
    if config.sync_mode() != SyncMode::Off
        && let Some(why) = not_synchronous(&s.cluster, name, standing)
    {
        return Some(why);
    }
    let optime = s.cluster.status.as_ref().map_or(Lsn(0), |status| status.optime);
    let lag_bytes = optime.bytes_ahead_of(standing.position);
    if lag_bytes > config.maximum_lag_on_failover {
        return Some(Why::TooFarBehind { lag_bytes });
    }
    (config.check_timeline && behind).then_some(Why::TimelineBehind)
}

/// Whether synchronous mode forbids that this member takes over.
fn not_synchronous(cluster: &ClusterState, name: &str, standing: Standing) -> Option<Why> {
    if cluster.is_unknown(SafetyKey::Sync) {
        // A primary whose leader key has vanished with all the rest has what it acknowledged.
        let goes_on = standing.primary && cluster.sync_revision.is_none();
        return (!goes_on).then_some(Why::SyncUnknown);
    }
    let before = cluster.sync_before.as_ref();
    let led = before.and_then(|sync| sync.leader.as_deref()) == Some(name);
    if standing.primary && led {
        return None;
    }
    let named = |sync: &SyncState| sync.is_empty() || sync.matches(name);
    let both = cluster.sync.as_ref().is_none_or(named) && before.is_none_or(named);
    (!both).then_some(Why::NotSynchronous)
}

/// The answers, if they and this node's own look were made after nobody led, and nobody has led since.
fn fresh(s: &Snapshot) -> Option<&Race> {
    s.race.as_ref().filter(|race| {
        s.now.since(race.asked_at) <= RACE_FRESH
            && s.observed_at >= race.asked_at
            && s.cluster.sync_revision == race.sync_revision
    })
}

/// Compares this node with those that answered. Who does not answer does not block the race.
fn among_peers(s: &Snapshot, standing: Standing, race: &Race, named: Option<&str>) -> Verdict {
    let answered = || race.peers.iter().filter_map(|(name, peer)| Some((name, peer.as_ref()?)));
    if answered().any(|(_, peer)| peer.primary) && !standing.primary {
        return Verdict::No(Why::OtherIsPrimary);
    }
    let config = s.cluster.config.as_ref();
    let synchronous = config.is_some_and(|config| config.sync_mode() != SyncMode::Off);
    let sync = s.cluster.sync.as_ref().filter(|sync| synchronous && !sync.is_empty());
    let missing = sync.and_then(|sync| quorum_missing(sync, s, standing, race));
    match named {
        Some(name) if name == s.me => {
            return match missing.filter(|_| !is_forced(s, name)) {
                Some(why) => Verdict::No(why),
                None => Verdict::Claim(Why::NamedCandidate),
            };
        }
        // A candidate that may not lead must not keep the others from it.
        Some(name) if answered().any(|(peer, facts)| peer == name && may_lead(s, name, facts)) => {
            return Verdict::No(Why::OtherIsCandidate);
        }
        _ => {}
    }
    for (name, peer) in answered() {
        let rival = !peer.tags.nofailover()
            && !peer.stands_back
            && sync.is_none_or(|sync| sync.matches(name))
            && is_listed(s, name);
        if !rival {
            continue;
        }
        if standing.primary {
            // Its own position was read before the standbys said what they have received since.
            if peer.timeline > standing.timeline {
                return Verdict::No(Why::TimelineBehind);
            }
            continue;
        }
        let Some(theirs) = peer.position else { continue };
        match compare(peer.timeline, theirs, standing) {
            Log::Ahead => return Verdict::No(Why::PeerAhead { position: theirs }),
            Log::Same if peer.tags.failover_priority() > s.tags.failover_priority() => {
                return Verdict::No(Why::PeerPreferred);
            }
            Log::Same | Log::Behind | Log::Elsewhere => {}
        }
    }
    match missing {
        Some(why) => Verdict::No(why),
        None => Verdict::Claim(Why::MostAdvanced),
    }
}

/// Another member's log beside this node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    Ahead,
    Same,
    Behind,
    /// On an older timeline, and further than this node: the two may have parted.
    Elsewhere,
}

/// Positions are compared on one timeline. A higher timeline is that of a later leader, and whoever is on it has
/// followed that leader. One on a lower timeline may have been left on a way that nobody went on, so its position
/// proves something only where this node has as much. A timeline of 0 was not told.
fn compare(timeline: Timeline, position: Lsn, mine: Standing) -> Log {
    match timeline.cmp(&mine.timeline) {
        _ if timeline == Timeline(0) => {}
        Ordering::Greater => return Log::Ahead,
        Ordering::Less if position > mine.position => return Log::Elsewhere,
        Ordering::Less => return Log::Behind,
        Ordering::Equal => {}
    }
    match position.cmp(&mine.position) {
        Ordering::Greater => Log::Ahead,
        Ordering::Equal => Log::Same,
        Ordering::Less => Log::Behind,
    }
}

/// Whether the answer proves that a synchronous standby has no more than this node.
pub(super) fn is_vote(peer: &Peer, standing: Standing) -> bool {
    let has_no_more =
        |position| matches!(compare(peer.timeline, position, standing), Log::Same | Log::Behind);
    peer.identified && !peer.primary && peer.position.is_some_and(has_no_more)
}

/// In quorum mode an acknowledged commit is on some of the voters, one knows not which. So many others
/// must be seen to have no more than this node that one of them, or this node, has it. The former
/// leader has everything and needs nobody.
fn quorum_missing(sync: &SyncState, s: &Snapshot, standing: Standing, race: &Race) -> Option<Why> {
    if sync.leader.as_deref().is_some_and(|leader| leader.eq_ignore_ascii_case(&s.me)) {
        return None;
    }
    let voters = sync.standbys();
    let votes = voters.iter().filter(|voter| {
        let same = |name: &&String| name.eq_ignore_ascii_case(voter);
        let peer = race.peers.keys().find(same).and_then(|name| race.peers.get(name));
        peer.and_then(Option::as_ref).is_some_and(|peer| is_vote(peer, standing))
    });
    let votes = u32::try_from(votes.count()).unwrap_or(u32::MAX);
    (votes < sync.quorum).then_some(Why::QuorumMissing { votes, needed: sync.quorum })
}

/// Whether the store shows somebody running who could take over from `me` without losing anything that
/// this mode promises to keep.
pub fn somebody_may_take_over(me: &str, cluster: &ClusterState) -> bool {
    let config = cluster.config.clone().unwrap_or_default();
    let optime = cluster.status.as_ref().map_or(Lsn(0), |status| status.optime);
    let fit = |name: &str| {
        cluster.members.get(name).is_some_and(|member| {
            let lag = optime.bytes_ahead_of(member.xlog_location.unwrap_or(optime));
            name != me
                && member.state == MemberState::Running
                && lag <= config.maximum_lag_on_failover
        })
    };
    let able = |name: &str| {
        fit(name) && cluster.members.get(name).is_some_and(|member| !member.tags.nofailover())
    };
    if config.sync_mode() == SyncMode::Off {
        return cluster.members.keys().any(|name| able(name));
    }
    let Some(sync) = cluster.sync.as_ref() else { return false };
    let standbys = sync.standbys();
    let running = standbys.iter().filter(|name| fit(name)).count();
    standbys.iter().any(|name| able(name)) && running > sync.quorum as usize
}

/// Whether a named candidate would find itself fit.
fn may_lead(s: &Snapshot, name: &str, peer: &Peer) -> bool {
    let standing = Standing {
        position: peer.position.unwrap_or_default(),
        wal_known: peer.position.is_some(),
        timeline: peer.timeline,
        primary: peer.primary,
    };
    let forced = is_forced(s, name);
    !peer.tags.nofailover()
        && !peer.stands_back
        && (forced || is_listed(s, name))
        && unfit(s, name, standing, forced).is_none()
}
