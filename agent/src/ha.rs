//! The decision: one function from facts to the next step.
//!
//! The decision is total, deterministic and cannot wait: no I/O, no clock, nothing remembered between calls
//! that is not a fact in the [`Snapshot`]. Killing the agent between any two steps therefore changes
//! nothing but the time at which the next step is taken.
//!
//! The safety argument, by the sentences of ARCHITECTURE.md:
//! - (1, 3) A primary whose lease is not proven for longer than its stop budget is stopped here, and
//!   by the guard if this agent does not run.
//! - (2) [`Action::Promote`] is decided only with [`Lease::Mine`] and time left in it.
//! - (4) In synchronous mode only a member that `sync` names may claim, see [`candidate`].
//!
//! Not here: how long a step takes and whether it succeeds (`driver`), the planned handover on the
//! old leader's side (`handover`; here it is a [`Job`]), who is a synchronous standby ([`sync`]).

pub mod candidate;
pub mod decision;
pub mod depose;
pub mod request;
pub mod rival;
mod serving;
pub mod slots;
pub mod snapshot;
pub mod switchover;
pub mod sync;
#[cfg(test)]
mod tests;
mod unfenced;
pub mod upstream;

use std::time::Duration;

use kornak_cluster::{Epoch, MemberRole, SafetyKey, StandbyCluster, SyncMode};

use candidate::{Standing, Verdict};
pub use decision::{Action, Decision, Why};
pub use snapshot::{
    Control, DataDir, Job, Lease, Peer, PrimaryFacts, Race, Server, SlotUse, Snapshot,
    StandbyFacts, StandbyRow, Store, Stray,
};
use upstream::Source;

/// How long a standby may be without its stream before it is looked at as diverged.
const BROKEN_AFTER: Duration = Duration::from_secs(5);

/// Between two questions to the other members while nobody leads.
const RACE_PAUSE: Duration = Duration::from_millis(500);

/// Between two looks of a candidate whose last bytes of WAL are on their way.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Chooses the one next step for this node.
pub fn decide(s: &Snapshot) -> Decision {
    if let Some(job) = s.job {
        return while_busy(s, job);
    }
    if s.store == Store::Never {
        return wait(s, Why::StoreNeverRead);
    }
    if let (Store::Remembered { since }, Lease::None) = (s.store, s.lease) {
        return serving::begun_without_store(s, since);
    }
    if let Some(decision) = serving::without_usable_data(s) {
        return decision;
    }
    match &s.data {
        DataDir::Foreign { .. } => decision(Action::Refuse, Why::DataDirUnusable, s),
        DataDir::Empty => without_data(s),
        DataDir::Begun { control, filling } => begun(s, control, *filling),
        DataDir::Initialized(control) if !belongs(s, control) => {
            decision(Action::Refuse, Why::WrongSystemIdentifier, s)
        }
        DataDir::Initialized(control) => with_data(s, control),
    }
}

/// A step is under way: it is left alone, unless the server has to stop for safety's sake.
fn while_busy(s: &Snapshot, job: Job) -> Decision {
    let becoming_writable = matches!(job, Job::StartPrimary | Job::Promote);
    let runs = !matches!(s.server, Server::Stopped);
    match (&s.server, s.lease) {
        _ if paused(s) => {}
        (Server::Primary(_), Lease::Mine { until, .. })
            if s.now + s.stop_budget >= until && job != Job::Demote =>
        {
            return decision(Action::Demote { immediate: true }, Why::LeaseUnproven, s);
        }
        // The key was taken away while the server was on its way.
        (_, Lease::None) if becoming_writable && runs => {
            return decision(Action::Demote { immediate: true }, Why::LeaseLost, s);
        }
        _ => {}
    }
    wait(s, Why::BusyWith(job))
}

fn belongs(s: &Snapshot, control: &Control) -> bool {
    match s.cluster.initialize.as_deref() {
        None | Some("") => true,
        Some(_) if s.cluster.is_unknown(SafetyKey::Initialize) => true,
        Some(identifier) => identifier == control.system_identifier,
    }
}

fn without_data(s: &Snapshot) -> Decision {
    if s.store != Store::Live {
        return wait(s, Why::StoreLost);
    }
    if paused(s) {
        return wait(s, Why::Paused);
    }
    match (&s.cluster.leader, s.cluster.initialize.as_deref()) {
        (Some(leader), _) if leader.name == s.me => {
            decision(Action::Release, Why::NothingHereYet, s)
        }
        (Some(leader), _) if leader_is_up(s) => {
            decision(Action::Clone { from: leader.name.clone() }, Why::NothingHereYet, s)
        }
        (Some(_), _) => wait(s, Why::WaitingForLeader),
        (None, None) if s.race_not_before.is_some_and(|moment| s.now < moment) => {
            wait(s, Why::LostRecently)
        }
        (None, _) if s.cluster.is_unknown(SafetyKey::Initialize) => wait(s, Why::InitializeUnknown),
        (None, None) if s.cluster.is_unknown(SafetyKey::Config) => wait(s, Why::ConfigUnknown),
        (None, None) if others_have_data(s) => wait(s, Why::MembersWithoutCluster),
        (None, None) if !s.tags.nofailover() => decision(Action::Bootstrap, Why::ClusterIsNew, s),
        (None, Some("")) => wait(s, Why::OtherBootstraps),
        (None, Some(_)) if s.clones_alone => {
            decision(Action::CloneWithoutLeader, Why::NothingHereYet, s)
        }
        (None, _) => wait(s, Why::WaitingForLeader),
    }
}

/// The first server of a cluster is half made, by an agent that has died or a step that has failed. It is gone on
/// with, or made anew, by the holder of the leader key alone; it never races.
fn begun(s: &Snapshot, control: &Control, filling: bool) -> Decision {
    let runs = s.server != Server::Stopped;
    match (&s.lease, &s.cluster.leader, s.cluster.initialize.as_deref()) {
        // The store knows the cluster: nothing but the note is missing, and it goes with the next look.
        (_, _, Some(known)) if filling && known == control.system_identifier => {
            with_data(s, control)
        }
        (Lease::Mine { until, .. }, _, _) if runs && s.now + s.stop_budget >= *until => {
            decision(Action::Demote { immediate: true }, Why::LeaseUnproven, s)
        }
        _ if serving::is_blind(s) => {
            decision(Action::Demote { immediate: true }, Why::StoreLost, s)
        }
        _ if s.store != Store::Live => wait(s, Why::StoreLost),
        (Lease::Mine { .. }, _, None | Some("")) => {
            decision(Action::Bootstrap, Why::ClusterIsNew, s)
        }
        (Lease::None, Some(leader), _) if leader.name == s.me => wait(s, Why::LeaseBeingProven),
        (_, Some(_), _) | (_, _, Some(_)) if runs => {
            decision(Action::Demote { immediate: true }, Why::OtherBootstraps, s)
        }
        _ => without_data(s),
    }
}

/// There is a cluster, whatever became of the key that says so: another one beside it would be refused by
/// its members, or take their place.
fn others_have_data(s: &Snapshot) -> bool {
    let others = || s.cluster.members.iter().filter(|(name, _)| **name != s.me);
    !s.cluster.history.is_empty()
        || others().any(|(_, member)| member.role != MemberRole::Uninitialized)
}

/// The leader has said that it is a running primary.
fn leader_is_up(s: &Snapshot) -> bool {
    use kornak_cluster::{MemberRole, MemberState};
    s.cluster.leader_member().is_some_and(|(_, member)| {
        member.state == MemberState::Running
            && matches!(member.role, MemberRole::Primary | MemberRole::StandbyLeader)
    })
}

fn with_data(s: &Snapshot, control: &Control) -> Decision {
    match &s.server {
        Server::Leftovers => decision(Action::Demote { immediate: true }, Why::ProcessesLeft, s),
        Server::Stopped => stopped(s, control),
        Server::Starting { .. } => starting(s),
        Server::Stopping { .. } if control.clean && ends_what_lingers(s) => {
            decision(Action::Demote { immediate: false }, Why::StillStopping, s)
        }
        Server::Silent { .. } | Server::Closed { .. } | Server::Stopping { .. } => {
            unheard(s, control)
        }
        Server::Standby(facts) => standby(s, facts),
        Server::Primary(facts) => primary(s, facts),
    }
}

/// In maintenance mode a server that an operator stops is left alone, unless it has handed over.
fn ends_what_lingers(s: &Snapshot) -> bool {
    !paused(s) || s.cluster.leader.as_ref().is_some_and(|leader| leader.name != s.me)
}

fn stopped(s: &Snapshot, control: &Control) -> Decision {
    if paused(s) {
        // An operator works on the server. Without the key another member can be named as the leader.
        return match s.lease {
            Lease::Mine { .. } if s.store_is_full => wait(s, Why::StoreFull),
            Lease::Mine { .. } => decision(Action::Release, Why::Paused, s),
            Lease::None => wait(s, Why::Paused),
        };
    }
    if serving::is_blind(s) {
        return decision(Action::Release, Why::StoreLost, s);
    }
    if s.store != Store::Live {
        return serving::down_without_store(s, control);
    }
    match (&s.lease, &s.cluster.leader) {
        // Who knows the configuration may lead: whether this server may be a primary is not known here.
        (Lease::Mine { .. }, _) if s.cluster.is_unknown(SafetyKey::Config) => {
            decision(Action::Release, Why::ConfigUnknown, s)
        }
        (Lease::Mine { .. }, _) if serving::does_not_start(s, control) => {
            decision(Action::Release, Why::DoesNotStart, s)
        }
        (Lease::Mine { .. }, _) if standby_cluster(s).is_some() => {
            decision(Action::Rejoin { leader: None }, Why::StandbyCluster, s)
        }
        (Lease::Mine { .. }, _) if !control.was_primary => {
            // It won the key and stopped before it was promoted. A standby that is started in place
            // would go on with the timeline of the primary it followed; it has to be promoted.
            decision(Action::Rejoin { leader: None }, Why::KeyIsOursServerIsDown, s)
        }
        (Lease::Mine { until, .. }, _) if s.now + s.stop_budget < *until => {
            if s.store_is_full {
                decision(Action::StartPrimary, Why::StoreFull, s)
            } else if a_standby_has_everything(s) {
                decision(Action::Release, Why::StandbyHasEverything, s)
            } else if no_time_to_start(s) && candidate::somebody_may_take_over(&s.me, &s.cluster) {
                decision(Action::Release, Why::NoTimeToStart, s)
            } else {
                decision(Action::StartPrimary, Why::KeyIsOursServerIsDown, s)
            }
        }
        (Lease::Mine { .. }, _) => wait(s, Why::LeaseUnproven),
        (Lease::None, Some(_)) if depose::binds(s) => {
            decision(Action::Rejoin { leader: None }, Why::Deposal(depose::Reason::Pledged), s)
        }
        (Lease::None, Some(leader)) if leader.name != s.me => {
            decision(Action::Rejoin { leader: Some(leader.name.clone()) }, Why::ServerDown, s)
        }
        // The key bears our name and is not proven ours: the keeper finds out, or it expires.
        (Lease::None, Some(_)) if control.was_primary => wait(s, Why::LeaseBeingProven),
        // A standby is one whoever leads.
        (Lease::None, Some(_)) => decision(Action::Rejoin { leader: None }, Why::ServerDown, s),
        (Lease::None, None) => decision(Action::Rejoin { leader: None }, Why::WaitingForLeader, s),
    }
}

/// In synchronous mode, a member that `sync` names has every acknowledged commit (in quorum mode: one
/// of so many has); if enough have been heard of as running, a failover to them is faster than crash
/// recovery and loses nothing.
fn a_standby_has_everything(s: &Snapshot) -> bool {
    let Some(sync) = s.cluster.sync.as_ref() else { return false };
    is_synchronous(s)
        && sync.leader.as_deref() == Some(s.me.as_str())
        && candidate::somebody_may_take_over(&s.me, &s.cluster)
}

/// The operator prefers any failover to a crash recovery.
fn no_time_to_start(s: &Snapshot) -> bool {
    s.cluster.config.as_ref().is_some_and(|config| config.primary_start_timeout.is_zero())
}

fn standby_cluster(s: &Snapshot) -> Option<&StandbyCluster> {
    s.cluster.config.as_ref()?.standby_cluster.as_ref()
}

fn starting(s: &Snapshot) -> Decision {
    match s.lease {
        Lease::Mine { until, .. } if s.now + s.stop_budget >= until && !paused(s) => {
            decision(Action::Demote { immediate: true }, Why::LeaseUnproven, s)
        }
        Lease::Mine { .. } => serving::while_starting(s),
        Lease::None => wait(s, Why::ServerStarting),
    }
}

/// Runs, and tells the agent nothing. It is stopped only when it is known to be a primary without a
/// right to it: that an answer is missing says nothing, least of all while a server starts. A leader
/// is given time, for a busy server may be slow; the lease is renewed apart from the server's health.
fn unheard(s: &Snapshot, control: &Control) -> Decision {
    match (&s.lease, &s.cluster.leader) {
        (Lease::Mine { until, .. }, _) if s.now + s.stop_budget >= *until && !paused(s) => {
            decision(Action::Demote { immediate: true }, Why::LeaseUnproven, s)
        }
        (Lease::Mine { .. }, _) => serving::while_unheard(s, control),
        (Lease::None, Some(leader))
            if leader.name != s.me && s.store == Store::Live && control.is_primarys() =>
        {
            decision(Action::Demote { immediate: true }, Why::OtherLeads, s)
        }
        (Lease::None, _) => wait(s, serving::why_unheard(s)),
    }
}

fn standby(s: &Snapshot, facts: &StandbyFacts) -> Decision {
    if let Lease::Mine { until, epoch } = s.lease {
        return if s.now + s.stop_budget < until && s.store == Store::Live {
            won(s, facts, epoch)
        } else if serving::is_blind(s) {
            decision(Action::Release, Why::StoreLost, s)
        } else {
            wait(s, Why::LeaseUnproven)
        };
    }
    if s.store != Store::Live {
        return wait(s, Why::StoreLost);
    }
    let Some(leader) = &s.cluster.leader else {
        if unfenced::is_left(s, facts) {
            let upstream = Source::Archive;
            return decision(Action::Follow { upstream }, Why::LeavesUnfenced, s);
        }
        let standing = Standing {
            position: facts.position(),
            wal_known: facts.wal_known,
            timeline: facts.timeline,
            primary: false,
        };
        return race(s, standing);
    };
    if leader.name == s.me {
        return wait(s, Why::LeaseBeingProven);
    }
    depose::step(s, facts).unwrap_or_else(|| follow(s, facts, &leader.name))
}

/// The key is ours and the server still a standby.
fn won(s: &Snapshot, facts: &StandbyFacts, epoch: Epoch) -> Decision {
    // A claim without an answer may be done late, after this node has given its word to another.
    if candidate::promise_binds(s) {
        return decision(Action::Release, Why::PromisedFailsafe, s);
    }
    if s.cluster.config.is_none() {
        return decision(Action::Release, Why::ConfigUnknown, s);
    }
    if standby_cluster(s).is_some() {
        return lead_standby_cluster(s, facts);
    }
    // The promotion was tried and forbidden, before anything of it was done.
    if s.race_not_before.is_some_and(|moment| s.now < moment) {
        return decision(Action::Release, Why::LostRecently, s);
    }
    // Commits that are acknowledged here while the store still names the standbys of the former
    // leader would be lost by a failover to one of them. The claim writes both at once.
    if is_synchronous(s) {
        if s.cluster.leader.as_ref().is_none_or(|leader| leader.epoch != epoch) {
            return wait(s, Why::ViewBehindLease);
        }
        let named = s.cluster.sync.as_ref().and_then(|sync| sync.leader.as_deref());
        // A standby cluster that ends names nobody yet; the promotion begins with that.
        let unnamed = named.is_none() && !s.cluster.is_unknown(SafetyKey::Sync);
        if named != Some(s.me.as_str()) && !unnamed {
            return decision(Action::Release, Why::SyncNotOurs, s);
        }
    }
    decision(Action::Promote, Why::WonLease, s)
}

/// The leader of a standby cluster replicates from elsewhere and is never promoted.
fn lead_standby_cluster(s: &Snapshot, facts: &StandbyFacts) -> Decision {
    let remote = standby_cluster(s).and_then(|section| section.remote.clone());
    let remote = remote.filter(|_| !s.tags.nostream());
    if facts.upstream == remote {
        return decision(Action::Lead, Why::StandbyCluster, s);
    }
    let upstream = if remote.is_some() { Source::Remote } else { Source::Archive };
    decision(Action::Follow { upstream }, Why::UpstreamChanged, s)
}

fn follow(s: &Snapshot, facts: &StandbyFacts, leader: &str) -> Decision {
    let Some(upstream) = upstream::source(&s.me, &s.tags, &s.cluster) else {
        return wait(s, Why::WaitingForLeader);
    };
    let target = match &upstream {
        Source::Archive => None,
        Source::Remote => standby_cluster(s).and_then(|section| section.remote.clone()),
        Source::Member(name) => {
            let member = s.cluster.members.get(name);
            match member.and_then(kornak_cluster::Member::conn_address) {
                None => return wait(s, Why::WaitingForLeader),
                address => address,
            }
        }
    };
    if facts.upstream != target {
        return decision(Action::Follow { upstream }, Why::UpstreamChanged, s);
    }
    if upstream == Source::Archive {
        return keep_following(s);
    }
    let broken = facts.not_streaming_since.is_some_and(|since| s.now.since(since) > BROKEN_AFTER);
    if broken && leader_is_up(s) && !paused(s) {
        let leader = Some(leader.to_owned());
        return decision(Action::Rejoin { leader }, Why::ReplicationBroken, s);
    }
    keep_following(s)
}

/// The standby replicates from the right server: the logical slots of the leader are all that can be missing.
fn keep_following(s: &Snapshot) -> Decision {
    match s.lacks_slots {
        true => decision(Action::CopySlots, Why::SlotsMissing, s),
        false => wait(s, Why::AlreadyFollows),
    }
}

fn primary(s: &Snapshot, facts: &PrimaryFacts) -> Decision {
    match (&s.lease, &s.cluster.leader) {
        (Lease::Mine { until, .. }, _) if s.now + s.stop_budget >= *until => {
            if paused(s) {
                wait(s, Why::Paused)
            } else {
                decision(Action::Demote { immediate: false }, Why::LeaseUnproven, s)
            }
        }
        (Lease::Mine { .. }, _) if standby_cluster(s).is_some() && !paused(s) => {
            decision(Action::DemoteCluster, Why::StandbyCluster, s)
        }
        (Lease::Mine { .. }, _) => decision(Action::Lead, Why::Healthy, s),
        (Lease::None, Some(leader)) if s.store == Store::Live && leader.name != s.me => {
            decision(Action::Demote { immediate: true }, Why::OtherLeads, s)
        }
        // Maintenance mode may be on. The guard, if it is armed, bounds how long this may last.
        (Lease::None, None) if s.cluster.is_unknown(SafetyKey::Config) => {
            wait(s, Why::ConfigUnknown)
        }
        (Lease::None, None) if s.store == Store::Live => {
            let standing = Standing {
                position: facts.lsn,
                wal_known: true,
                timeline: facts.timeline,
                primary: true,
            };
            match race(s, standing) {
                // Nobody proved us the leader and we may not become it: stop, unless an operator
                // keeps everything as it is.
                Decision { action: Action::Wait, why, .. } if !paused(s) => {
                    decision(Action::Demote { immediate: true }, why, s)
                }
                decision => decision,
            }
        }
        _ if paused(s) => wait(s, Why::Paused),
        // The guard, armed by whoever started this primary, bounds how long this may last.
        _ => wait(s, Why::LeaseBeingProven),
    }
}

fn race(s: &Snapshot, standing: Standing) -> Decision {
    match candidate::judge(s, standing) {
        Verdict::Ask => decision(Action::AskPeers, Why::PeersUnknown, s),
        Verdict::Claim(why) => decision(Action::Claim { take_over: false }, why, s),
        Verdict::TakeOver => decision(Action::Claim { take_over: true }, Why::NamedCandidate, s),
        Verdict::No(why @ Why::CandidateLacksWal { .. }) => {
            Decision { recheck: LOOK_PAUSE, ..decision(Action::Look, why, s) }
        }
        Verdict::No(why) => Decision { recheck: RACE_PAUSE, ..wait(s, why) },
    }
}

fn is_synchronous(s: &Snapshot) -> bool {
    s.cluster.config.as_ref().is_some_and(|config| config.sync_mode() != SyncMode::Off)
}

pub(crate) fn paused(s: &Snapshot) -> bool {
    s.cluster.config.as_ref().is_some_and(|config| config.pause)
}

fn wait(s: &Snapshot, why: Why) -> Decision {
    decision(Action::Wait, why, s)
}

fn decision(action: Action, why: Why, s: &Snapshot) -> Decision {
    Decision { action, why, recheck: recheck(s) }
}

/// The longest sleep: a lease that runs out must be noticed in time to stop the server.
fn recheck(s: &Snapshot) -> Duration {
    let loop_wait = s.cluster.config.as_ref().map_or(Duration::from_secs(10), |c| c.loop_wait);
    let regular = loop_wait.min(Duration::from_secs(1));
    match s.lease {
        Lease::Mine { until, .. } => {
            let left = until.since(s.now + s.stop_budget);
            // What follows from its end is decided already once it has come.
            if left.is_zero() { regular } else { regular.min(left.max(Duration::from_millis(20))) }
        }
        Lease::None => regular,
    }
}
