//! The holder of the leader key serves writes or gives the key up, within a bound: the state of a
//! server never decides alone whether others may lead.
//!
//! A server that is not known to be in recovery is killed before the key is given up, for it may be on
//! its way to accept writes. In maintenance mode what runs is the operator's.

use std::time::Duration;

use kornak_cluster::{Moment, SafetyKey};

use super::candidate::somebody_may_take_over;
use super::decision::{Action, Decision, Why};
use super::snapshot::{Control, DataDir, Lease, Server, Snapshot, Store};
use super::{belongs, decision, paused, primary, wait};

/// A leader that gives no answer for less than this may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server that is begun anew takes a moment, however hasty the operator is.
const LEAST_START: Duration = Duration::from_secs(5);

/// For the store's first answer to an agent that knows its cluster from before.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// So many starts in a row that come to nothing are enough: the first may have been bad luck.
const FAILED_STARTS: u32 = 2;

/// How long a leader's server may take to come up while another member can lead.
fn start_limit(s: &Snapshot) -> Duration {
    s.cluster.config.clone().unwrap_or_default().primary_start_timeout.max(LEAST_START)
}

/// How long a leader's server may say nothing while another member can lead.
fn silence_limit(s: &Snapshot) -> Duration {
    let ttl = s.cluster.config.clone().unwrap_or_default().ttl;
    ttl.max(PATIENCE).min(start_limit(s))
}

fn another_can_lead(s: &Snapshot) -> bool {
    somebody_may_take_over(&s.me, &s.cluster)
}

/// Stops what may be or become writable, and gives the key up.
fn stop_and_release(s: &Snapshot, why: Why) -> Decision {
    decision(Action::Demote { immediate: true }, why, s)
}

/// The key is ours, and the data directory cannot be read, is empty, or is another cluster's. `None`: it
/// is not so.
pub(super) fn without_usable_data(s: &Snapshot) -> Option<Decision> {
    if s.lease == Lease::None {
        return None;
    }
    let why = match &s.data {
        DataDir::Foreign { .. } => Why::DataDirUnusable,
        DataDir::Empty => Why::NothingHereYet,
        // It is gone on with, see `begun`.
        DataDir::Begun { .. } => return None,
        DataDir::Initialized(control) if belongs(s, control) => return None,
        DataDir::Initialized(_) => Why::WrongSystemIdentifier,
    };
    Some(match &s.server {
        Server::Stopped => decision(Action::Release, why, s),
        Server::Leftovers => stop_and_release(s, Why::ProcessesLeft),
        // What has no data of its own must not serve: a copy or a new cluster that was not finished.
        Server::Standby(_) | Server::Primary(_) if why == Why::NothingHereYet && !paused(s) => {
            stop_and_release(s, why)
        }
        Server::Standby(_) => decision(Action::Release, why, s),
        // It serves by a lease that was proven from here. Whoever changed what the store says of the
        // cluster has made every other member unfit as well.
        Server::Primary(facts) => match primary(s, facts) {
            Decision { action: Action::Lead, .. } => decision(Action::Lead, why, s),
            otherwise => otherwise,
        },
        Server::Starting { since } if waited(s, *since) >= start_limit(s) => {
            stop_and_release(s, why)
        }
        Server::Silent { since } | Server::Closed { since } | Server::Stopping { since }
            if waited(s, *since) >= silence_limit(s) =>
        {
            stop_and_release(s, why)
        }
        Server::Starting { .. } => wait(s, Why::ServerStarting),
        Server::Silent { .. } | Server::Closed { .. } | Server::Stopping { .. } => {
            wait(s, why_unheard(s))
        }
    })
}

/// For how long; nothing is counted in maintenance mode.
fn waited(s: &Snapshot, since: Moment) -> Duration {
    if paused(s) { Duration::ZERO } else { s.now.since(since) }
}

/// The key is ours and its server has not come up, again and again.
pub(super) fn does_not_start(s: &Snapshot, control: &Control) -> bool {
    // A primary that crashed has all that there is: it is tried for as long as nobody else can lead.
    s.failed_starts >= FAILED_STARTS && (!control.was_primary || another_can_lead(s))
}

/// The server is down while the store is away. Nobody else can lead before the lease has ended. After that a
/// server may serve reads, unless another member was the last that led: the two logs may have parted.
pub(super) fn down_without_store(s: &Snapshot, control: &Control) -> Decision {
    let synchronous = super::is_synchronous(s)
        && s.cluster.sync.as_ref().is_none_or(|sync| !sync.standbys().is_empty());
    // A primary in place would show commits that a failover takes back, and nobody can be named or not now.
    let known = !s.cluster.is_unknown(SafetyKey::Config) && super::standby_cluster(s).is_none();
    let in_place = control.was_primary && known && !synchronous;
    match s.lease {
        Lease::Mine { until, .. } if in_place && s.now + s.stop_budget < until => {
            decision(Action::StartPrimary, Why::KeyIsOursServerIsDown, s)
        }
        _ if control.was_primary
            && s.cluster.leader.as_ref().is_some_and(|leader| leader.name != s.me) =>
        {
            wait(s, Why::StoreLost)
        }
        _ => decision(Action::Rejoin { leader: None }, Why::ServerDown, s),
    }
}

/// An agent that has begun without the store: a standby's server that is down starts and follows whom it followed.
/// A former primary waits for the store, as does everything else that would be done.
pub(super) fn begun_without_store(s: &Snapshot, since: Moment) -> Decision {
    match (&s.data, &s.server) {
        (DataDir::Initialized(control), Server::Stopped)
            if belongs(s, control)
                && !control.is_primarys()
                && !s.cluster.is_unknown(SafetyKey::Config)
                && !paused(s)
                && waited(s, since) >= STORE_PATIENCE =>
        {
            decision(Action::Rejoin { leader: None }, Why::ServerDown, s)
        }
        _ => wait(s, Why::StoreNeverRead),
    }
}

/// The lease goes on being proven, and the store's changes are not seen any more.
pub(super) fn is_blind(s: &Snapshot) -> bool {
    let ttl = s.cluster.config.clone().unwrap_or_default().ttl;
    match (s.lease, s.store) {
        _ if s.confirmed => false,
        (Lease::Mine { until, .. }, Store::Lost { since } | Store::Remembered { since }) => {
            // Without renewals the lease would have run out since.
            s.now + s.stop_budget < until && waited(s, since) >= ttl
        }
        _ => false,
    }
}

/// The key is ours and the server starts.
pub(super) fn while_starting(s: &Snapshot) -> Decision {
    match s.server {
        Server::Starting { since } if waited(s, since) >= start_limit(s) && another_can_lead(s) => {
            stop_and_release(s, Why::StartsTooLong)
        }
        _ => wait(s, Why::ServerStarting),
    }
}

/// The key is ours and the server tells the agent nothing.
pub(super) fn while_unheard(s: &Snapshot, control: &Control) -> Decision {
    let since = match s.server {
        // It answers: others may work on it, and a failover would change nothing about a password.
        Server::Closed { .. } if control.is_primarys() => None,
        Server::Closed { since } | Server::Silent { since } | Server::Stopping { since } => {
            Some(since)
        }
        _ => None,
    };
    if since.is_some_and(|since| waited(s, since) >= silence_limit(s)) && another_can_lead(s) {
        return stop_and_release(s, Why::SilentTooLong);
    }
    wait(s, why_unheard(s))
}

pub(super) fn why_unheard(s: &Snapshot) -> Why {
    match s.server {
        Server::Closed { .. } => Why::ServerClosed,
        _ => Why::ServerSilent,
    }
}
