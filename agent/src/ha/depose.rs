//! Deposing a leader that is lost, without waiting for its lease: in a synchronous mode its standbys can see to it that no
//! commit is acknowledged by it any more (docs/safety.md, *Failover without waiting for the lease*).
//!
//! Three decisions, each a function of facts: whether the leader is lost ([`Signs`]), what a standby promises and for how
//! long that binds it ([`Given`]), and whether the promises in the store are enough ([`standing`]). Suspicion costs
//! time when it is wrong, and no commit: that rests on promises and on what their transactions compare.

use std::time::Duration;

use kornak_cluster::{
    ClusterState, Epoch, Leader, Leadership, Lsn, Moment, Pledge, Revision, SyncMode, SyncState,
    Timeline,
};
use serde::{Deserialize, Serialize};

use super::candidate::{self, Standing};
use super::decision::{Action, Decision, Why};
use super::snapshot::{Snapshot, StandbyFacts, Store};
use super::{decision, wait};

/// Questions in a row that a leader has to leave unanswered.
const LEAST_ASKED: u32 = 2;

/// Why something is done, or waited for, about a leader that may be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    LeaderLost,
    LeaderLives,
    Pledged,
    PledgeOver,
    FenceStands,
}

impl Reason {
    /// As a person reads it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LeaderLost => {
                "the leader is lost: it renews no lease, and neither its agent nor its server answers"
            }
            Self::LeaderLives => "the leader shows signs of life, or may not be deposed now",
            Self::Pledged => "nothing is acknowledged to a leader that seems lost",
            Self::PledgeOver => "another leadership has begun",
            Self::FenceStands => "the lost leader can acknowledge nothing any more",
        }
    }
}

/// The suspicion and the promise of this node against a leader that may be lost.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Deposing {
    /// Switched on here.
    pub on: bool,
    /// The term of the leader that shows no sign of life.
    pub suspected: Option<Epoch>,
    /// The promise on this node's disk.
    pub given: Option<Given>,
}

/// A promise of this node, as it lies on disk: its server follows nobody of that leadership.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Given {
    pub leader: String,
    #[serde(flatten)]
    pub of: Leadership,
}

impl Given {
    /// Whether it still binds, by what the store shows. It is over when a newer leadership shows: whatever was sent on the
    /// strength of it compares the old one. That nobody leads ends nothing: the old leader may be somewhere, and ask to stay.
    pub fn binds(&self, cluster: &ClusterState) -> bool {
        let Some(now) = cluster.leadership() else { return true };
        match self.of.epoch.is_older_than(now.epoch) {
            // Another store, in which nothing of the one before can be done.
            None => false,
            Some(older) => !older && (now.epoch != self.of.epoch || now.sync <= self.of.sync),
        }
    }
}

/// The signs of life of one leader, as one of its standbys sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signs {
    of: Epoch,
    /// Since when nothing that was asked has been answered, and how often that was.
    unanswered: Option<(Moment, u32)>,
    /// The end of the log that it has sent.
    received: Lsn,
    /// Age of the last renewal, when it was last asked for.
    renewed: Duration,
}

impl Signs {
    /// The signs of a leader that was asked nothing yet.
    pub fn of(epoch: Epoch) -> Self {
        Self { of: epoch, unanswered: None, received: Lsn(0), renewed: Duration::ZERO }
    }

    /// The term of the leader whose signs these are.
    pub fn epoch(&self) -> Epoch {
        self.of
    }

    /// The store said how old the last renewal is at least.
    pub fn renewed(&mut self, age: Duration) {
        self.renewed = age;
    }

    /// The leader was asked at `at`, by its REST API and its server, and this end of the log was here afterwards.
    pub fn asked(&mut self, at: Moment, answered: bool, received: Lsn) {
        let sends = received > self.received && self.unanswered.is_some();
        self.received = self.received.max(received);
        self.unanswered = match self.unanswered {
            _ if answered || sends => None,
            Some((since, count)) => Some((since, count + 1)),
            None => Some((at, 1)),
        };
    }

    /// Something that was asked has no answer yet.
    pub fn is_overdue(&self) -> bool {
        self.unanswered.is_some()
    }

    /// Nothing may be concluded from what was seen before.
    pub fn forget(&mut self) {
        *self = Self { received: self.received, ..Self::of(self.of) };
    }

    /// Whether all of them are missing for so long.
    pub fn are_missing(&self, now: Moment, after: Duration) -> bool {
        let silent =
            |(since, count): (Moment, u32)| count >= LEAST_ASKED && now.since(since) >= after / 2;
        self.renewed >= after && self.unanswered.is_some_and(silent)
    }
}

/// The leadership that a fence may end, if the rules allow one now.
pub fn fenceable(me: &str, cluster: &ClusterState) -> Option<Leadership> {
    let config = cluster.config.as_ref()?;
    let leader = cluster.leader.as_ref()?;
    let (_, member) = cluster.leader_member()?;
    let sync = cluster.sync.as_ref()?;
    let voters = sync.standbys();
    let allowed = config.sync_mode() != SyncMode::Off
        && !config.pause
        && config.standby_cluster.is_none()
        && cluster.doubts.is_empty()
        && cluster.sync_before.is_none()
        && cluster.handover_revision.is_none()
        && cluster.unfenced_revision.is_none()
        && cluster.only_kornak();
    let fit = leader.name != me
        && !leader.lease.is_none()
        && member.fences
        && sync.leader.as_deref() == Some(leader.name.as_str())
        && (sync.quorum as usize) < voters.len()
        && voters.iter().any(|voter| voter.eq_ignore_ascii_case(me));
    (allowed && fit).then(|| cluster.leadership()).flatten()
}

/// A fence that stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The members whose promises make it, and the revisions of their keys.
    pub counted: Vec<(String, Revision)>,
    /// The members with the best position among them; it covers everything that was acknowledged.
    pub best: Vec<String>,
}

/// The fence around this leadership, if so many voters have promised that every set of standbys by which a commit can be
/// acknowledged has one of them: `quorum + 1`, see [`super::sync`].
pub fn standing(cluster: &ClusterState, of: Leadership) -> Option<Fence> {
    let sync = cluster.sync.as_ref().filter(|_| cluster.sync_revision == of.sync)?;
    let voters = sync.standbys();
    let is_voter = |name: &String| voters.iter().any(|voter| voter.eq_ignore_ascii_case(name));
    let promised: Vec<(&String, Pledge, Revision)> = cluster
        .pledges
        .iter()
        .filter(|(name, _)| is_voter(name))
        .filter_map(|(name, found)| Some((name, found.to(of)?, found.revision)))
        .collect();
    if voters.is_empty() || promised.len() <= sync.quorum as usize {
        return None;
    }
    let end = |pledge: &Pledge| -> (Timeline, Lsn) { (pledge.timeline, pledge.position) };
    let most = promised.iter().map(|(_, pledge, _)| end(pledge)).max()?;
    let best = promised.iter().filter(|(_, pledge, _)| end(pledge) == most);
    Some(Fence {
        best: best.map(|(name, _, _)| (*name).clone()).collect(),
        counted: promised.iter().map(|(name, _, at)| ((*name).clone(), *at)).collect(),
    })
}

/// The leader to depose and the fence around it, for a transaction by `me`; and who may take over then.
pub fn claim<'a>(me: &str, cluster: &'a ClusterState) -> Option<(&'a Leader, Fence, SyncState)> {
    let of = fenceable(me, cluster)?;
    let fence = standing(cluster, of).filter(|fence| fence.best.iter().any(|best| best == me))?;
    let others: Vec<String> = fence.best.iter().filter(|best| *best != me).cloned().collect();
    Some((cluster.leader.as_ref()?, fence, SyncState::new(me, &others)))
}

/// The step of a standby whose leader may be lost. `None`: nothing of this concerns it.
pub(super) fn step(s: &Snapshot, facts: &StandbyFacts) -> Option<Decision> {
    let possible = fenceable(&s.me, &s.cluster).filter(|_| s.deposing.on);
    let lost = possible.filter(|of| s.deposing.suspected == Some(of.epoch));
    let Some(given) = &s.deposing.given else {
        let ready = facts.wal_known && !candidate::promise_binds(s) && s.store == Store::Live;
        let of = lost.filter(|_| ready)?;
        return Some(decision(Action::Pledge(of), Why::Deposal(Reason::LeaderLost), s));
    };
    if !given.binds(&s.cluster) {
        return Some(decision(Action::EndPledge, Why::Deposal(Reason::PledgeOver), s));
    }
    if s.cluster.leadership().is_some_and(|now| now != given.of) {
        // What is shown is older than the promise.
        return Some(wait(s, Why::Deposal(Reason::Pledged)));
    }
    if lost != Some(given.of) {
        return Some(decision(Action::EndPledge, Why::Deposal(Reason::LeaderLives), s));
    }
    let own = s.cluster.pledges.get(&s.me);
    if own.and_then(|found| found.to(given.of)).is_none() {
        return Some(decision(Action::Pledge(given.of), Why::Deposal(Reason::LeaderLost), s));
    }
    let standing = Standing {
        position: facts.position(),
        wal_known: facts.wal_known,
        timeline: facts.timeline,
        primary: false,
    };
    let deposes = claim(&s.me, &s.cluster).is_some() && candidate::is_fit(s, standing);
    Some(match deposes {
        true => decision(Action::Depose, Why::Deposal(Reason::FenceStands), s),
        false => wait(s, Why::Deposal(Reason::Pledged)),
    })
}

/// Whether this node's server may replicate from nobody of the leadership in force.
pub(super) fn binds(s: &Snapshot) -> bool {
    s.deposing.given.as_ref().is_some_and(|given| given.binds(&s.cluster))
}
