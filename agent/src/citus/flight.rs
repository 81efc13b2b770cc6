//! The order of things on the coordinator's leader, for one database: which question, transaction or
//! answer comes next. Pure: facts in, one [`Next`] out.
//!
//! ```text
//!              before_demote                     after_promote, or the store says so
//!  Grounded ───────────────────► Open (renamed) ─────────────────────────────────────► Grounded
//!     │ ▲                          │ nobody came until the deadline: roll back, read the rows again
//!     └─┘ rows differ: one transaction
//! ```
//! There is at most one open transaction, and while it is open only its own group is looked at: it holds
//! the lock of `pg_dist_node`. Whatever gets lost (a notification, an answer, the connection, this
//! agent) the rows are read again and compared with the store: nothing is remembered that is not a row,
//! a key, or the open transaction itself.
//!
//! Not here: SQL (`citus_tasks::keeper`), which updates make the rows right ([`super::plan`]).

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use kornak_cluster::{GroupId, Moment, Revision};

use super::plan::{self, Address, Role, Row, Step};
use super::seen::Seen;

/// How long a notification may wait for the store's view to show what it speaks of.
const VIEW_PATIENCE: Duration = Duration::from_secs(2);

/// Between two looks at rows that other nodes do not have yet.
const SYNC_PAUSE: Duration = Duration::from_millis(100);

/// The pause while clients are held for the metadata.
const SYNC_PAUSE_IN_HANDOVER: Duration = Duration::from_millis(10);

/// Between two looks when nodes have been behind for [`SYNC_SOON`]: one of them is away, or somebody wants it so.
const SYNC_PAUSE_OF_OLD: Duration = Duration::from_secs(1);
const SYNC_SOON: Duration = Duration::from_secs(5);

/// Between two looks at rows that a person may have changed.
const REREAD: Duration = Duration::from_secs(5);

/// An announcement of another group's leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The group's server is about to be stopped: nobody may write to it through the coordinator.
    BeforeDemote,
    /// Another member has the key and is about to be promoted.
    BeforePromote,
    /// The group's server accepts writes (again).
    AfterPromote,
}

/// `POST /citus`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub event: Event,
    pub group: GroupId,
    /// The sender, which must be the group's leader by the store.
    pub leader: String,
    pub received: Moment,
    /// How long an open transaction may wait for its end.
    pub timeout: Duration,
    /// After so long whoever holds a lock that is needed is ended.
    pub cooldown: Duration,
    /// Of a Kornak leader, whose proxies hold everybody for so long: nobody is ended, and it is over when
    /// the lock is not there in time.
    pub hold: Option<Duration>,
    /// Revision of its handover record; 0 if there is none.
    pub record: Revision,
}

/// The open transaction.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Flight {
    #[default]
    Grounded,
    Open {
        group: GroupId,
        /// Where the row pointed before.
        former: Address,
        until: Moment,
        /// Revision of the handover record that it belongs to; 0: of a leader that writes none.
        record: Revision,
    },
}

/// The facts at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    pub now: Moment,
    /// This node's server is the coordinator's primary, by a proven lease.
    pub leads: bool,
    /// `pg_dist_node`; `None`: has to be read.
    pub rows: Option<&'a [Row]>,
    pub read_at: Moment,
    /// Since when some node has not had the rows.
    pub behind_since: Option<Moment>,
    pub seen: &'a Seen,
    pub flight: &'a Flight,
    /// In the order in which they came.
    pub requests: &'a [Request],
    /// Rows that Citus would not add or remove.
    pub hopeless: &'a BTreeSet<Address>,
    /// Not to be tried before this moment: the last attempt failed.
    pub not_before: Moment,
}

/// The answer to the sender of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Done,
    /// Another group's transaction is open.
    Busy,
    /// The request was not carried out in time.
    Late,
    /// This node does not lead the coordinator.
    NotHere,
    /// The server refused.
    Failed,
}

/// The next action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Wait for something to happen; not longer than until then.
    Rest {
        until: Moment,
    },
    /// Read `pg_dist_node`.
    Load,
    /// Let go of everything that only a leader has.
    StandDown,
    /// Open the transaction with this update, for this request.
    Open {
        request: usize,
        step: Step,
        former: Address,
    },
    /// Update, in the open transaction or in one of its own, and commit. Whoever asked is told.
    Commit {
        steps: Vec<Step>,
        request: Option<usize>,
    },
    /// Add or remove a row.
    Member(Step),
    /// Give the open transaction up.
    Rollback,
    Answer {
        request: usize,
        answer: Answer,
    },
}

/// Chooses the one next step.
pub fn next(f: &Facts<'_>) -> Next {
    if !f.leads {
        return stand_down(f);
    }
    if let Some(request) = f.requests.iter().position(|request| limit(request) <= f.now) {
        return Next::Answer { request, answer: Answer::Late };
    }
    match f.flight {
        Flight::Open { group, former, until, record } => {
            in_flight(f, *group, former, *until, *record)
        }
        Flight::Grounded => grounded(f),
    }
}

fn stand_down(f: &Facts<'_>) -> Next {
    if !f.requests.is_empty() {
        return Next::Answer { request: 0, answer: Answer::NotHere };
    }
    if *f.flight != Flight::Grounded || f.rows.is_some() {
        return Next::StandDown;
    }
    Next::Rest { until: f.now + REREAD }
}

/// When a request is over.
fn limit(request: &Request) -> Moment {
    let patience = match (request.event, request.hold) {
        (Event::BeforeDemote, Some(hold)) => hold,
        (Event::BeforeDemote, None) => request.timeout,
        (Event::BeforePromote | Event::AfterPromote, _) => VIEW_PATIENCE,
    };
    request.received + patience
}

fn rest(f: &Facts<'_>, until: Moment) -> Next {
    let until = f.requests.iter().map(limit).fold(until, Moment::min);
    Next::Rest { until }
}

/// The address of the sender, once the store says that it leads.
fn sender(f: &Facts<'_>, request: &Request) -> Option<Address> {
    let leader = f.seen.leaders.get(&request.group)?;
    leader.address.clone().filter(|_| leader.name == request.leader)
}

/// Updates with what the sender says of itself, which the store may learn a moment later.
fn updates_for(f: &Facts<'_>, rows: &[Row], group: GroupId, primary: Address) -> Vec<Step> {
    let mut wanted = f.seen.wanted.clone();
    wanted.entry(group).or_default().primary = Some(primary);
    plan::updates(rows, &wanted)
}

fn in_flight(
    f: &Facts<'_>,
    group: GroupId,
    former: &Address,
    until: Moment,
    record: Revision,
) -> Next {
    let rows = f.rows.unwrap_or_default();
    for (request, asked) in f.requests.iter().enumerate() {
        match asked.event {
            Event::BeforeDemote if asked.group != group && asked.hold.is_some() => {
                return Next::Answer { request, answer: Answer::Busy };
            }
            Event::BeforeDemote | Event::BeforePromote if asked.group == group => {
                return Next::Answer { request, answer: Answer::Done };
            }
            Event::AfterPromote if asked.group == group => {
                if let Some(primary) = sender(f, asked) {
                    let steps = updates_for(f, rows, group, primary);
                    return Next::Commit { steps, request: Some(request) };
                }
            }
            _ => {}
        }
    }
    // The notification was lost: the store tells as well.
    let primary = f.seen.wanted.get(&group).and_then(|want| want.primary.as_ref());
    let over = !record.is_none() && f.seen.revision >= record && !f.seen.switches(group);
    if primary.is_some_and(|primary| primary != former || over) {
        return Next::Commit { steps: plan::updates(rows, &f.seen.wanted), request: None };
    }
    if f.now >= until {
        return Next::Rollback;
    }
    rest(f, until)
}

fn grounded(f: &Facts<'_>) -> Next {
    if f.now < f.not_before {
        return rest(f, f.not_before);
    }
    let Some(rows) = f.rows else { return Next::Load };
    for (request, asked) in f.requests.iter().enumerate() {
        if asked.event == Event::AfterPromote
            && let Some(primary) = sender(f, asked)
        {
            let steps = updates_for(f, rows, asked.group, primary);
            return match steps.is_empty() {
                true => Next::Answer { request, answer: Answer::Done },
                false => Next::Commit { steps, request: Some(request) },
            };
        }
    }
    let steps = plan::updates(rows, &f.seen.wanted);
    if !steps.is_empty() {
        return Next::Commit { steps, request: None };
    }
    for (request, asked) in f.requests.iter().enumerate() {
        match asked.event {
            Event::BeforePromote => return Next::Answer { request, answer: Answer::Done },
            Event::BeforeDemote if sender(f, asked).is_some() => return open(rows, request, asked),
            _ => {}
        }
    }
    let stale = f.read_at + REREAD;
    if rows.iter().any(|row| !row.synced) {
        let is_old = f.behind_since.is_some_and(|since| f.now.since(since) > SYNC_SOON);
        let pause = match (f.seen.handover.is_some(), is_old) {
            (true, false) => SYNC_PAUSE_IN_HANDOVER,
            (true, true) | (false, false) => SYNC_PAUSE,
            (false, true) => SYNC_PAUSE_OF_OLD,
        };
        return reread(f, f.read_at + pause);
    }
    // Adding and removing takes locks on every node.
    if f.seen.handover.is_some() {
        return reread(f, stale);
    }
    match plan::membership(rows, &f.seen.wanted, f.hopeless) {
        Some(step) => Next::Member(step),
        None => reread(f, stale),
    }
}

/// The rows are read again at that moment.
fn reread(f: &Facts<'_>, at: Moment) -> Next {
    if f.now >= at { Next::Load } else { rest(f, at) }
}

fn open(rows: &[Row], request: usize, asked: &Request) -> Next {
    let row = rows.iter().find(|row| row.group == asked.group && row.role == Role::Primary);
    match row {
        Some(row) => Next::Open {
            request,
            step: Step::Update { node: row.node, to: row.address.undemoted().demoted() },
            former: row.address.undemoted(),
        },
        // Not registered yet: nothing can be written through the coordinator.
        None => Next::Answer { request, answer: Answer::Done },
    }
}
