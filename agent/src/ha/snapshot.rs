//! The facts of a decision: each observed or read from the store, none remembered
//! from an earlier decision.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterState, Epoch, Lsn, Moment, Revision, Tags, Timeline};

use super::depose::Deposing;

/// Everything that [`super::decide`] looks at.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub now: Moment,
    /// When the look at the server began that `server` and `data` come from.
    pub observed_at: Moment,
    /// This node's name.
    pub me: String,
    pub tags: Tags,
    pub store: Store,
    pub cluster: Arc<ClusterState>,
    pub data: DataDir,
    pub server: Server,
    pub lease: Lease,
    /// The job that this agent runs.
    pub job: Option<Job>,
    /// The answers of the other members, if they were asked.
    pub race: Option<Race>,
    /// A leader whose POST /failsafe this node has accepted keeps it from racing until then.
    pub promise_until: Option<Moment>,
    /// The lease is not proven by the store, and every member has just confirmed this leader.
    pub confirmed: bool,
    /// Since when nobody leads and a failover is allowed, as far as this node has seen.
    pub leaderless_since: Option<Moment>,
    /// No race before this moment: the last attempt to lead failed here.
    pub race_not_before: Option<Moment>,
    /// A copy can be made here without a running member (`no_leader`).
    pub clones_alone: bool,
    /// The leader has logical slots that this standby has to copy.
    pub lacks_slots: bool,
    /// A watchdog is required and there is none: this node must not lead.
    pub lacks_watchdog: bool,
    /// Attempts in a row to bring the server up that came to nothing: the step failed, or the server ended
    /// before it had answered for a while.
    pub failed_starts: u32,
    /// The store takes no writes: a leader key that is given up could not be created again.
    pub store_is_full: bool,
    /// A leader that may be lost, and what was promised for that.
    pub deposing: Deposing,
    /// Time the agent itself needs to stop a server; it acts so long before the guard does.
    pub stop_budget: Duration,
}

/// How fresh the knowledge of the store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Nothing was ever read.
    Never,
    /// This agent has read nothing since then; what is known is what an agent before has noted.
    Remembered {
        since: Moment,
    },
    Live,
    /// Lost since then; what is known is as of then.
    Lost {
        since: Moment,
    },
}

/// The content of the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataDir {
    /// Not there, or empty.
    Empty,
    /// There is something, and it is not a data directory that can be used.
    Foreign {
        reason: String,
    },
    /// The first server of a cluster, which is being made here: it is no member before it is complete.
    Begun {
        control: Control,
        /// Nothing but roles, databases and `post_bootstrap` was missing.
        filling: bool,
    },
    Initialized(Control),
}

/// The relevant output of `pg_controldata`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    pub system_identifier: String,
    pub timeline: Timeline,
    /// Was shut down in an orderly way, as primary or as standby.
    pub clean: bool,
    /// The last thing the server was is a primary (running, or shut down as one).
    pub was_primary: bool,
    /// `standby.signal` is there: what starts or runs on it is no primary before it is promoted, whatever
    /// the control file says, which may be a copy of a primary's.
    pub standby_signal: bool,
}

impl Control {
    /// Whether a server on it accepts writes, or will as soon as it is up.
    pub fn is_primarys(&self) -> bool {
        self.was_primary && !self.standby_signal
    }
}

/// The postgres on this node, with all its processes.
#[derive(Debug, Clone, PartialEq)]
pub enum Server {
    /// No process is left.
    Stopped,
    /// The postmaster is gone and others still run; nothing may be concluded from its absence.
    Leftovers,
    /// The postmaster runs and does not take connections yet, since then.
    Starting {
        since: Moment,
    },
    /// Runs, but the agent gets no answer, since then.
    Silent {
        since: Moment,
    },
    /// Says itself that it is shutting down, since then.
    Stopping {
        since: Moment,
    },
    /// Answers, and does not let the agent in, since then: a password, a certificate, no place left.
    /// Others may well work on it.
    Closed {
        since: Moment,
    },
    Standby(StandbyFacts),
    Primary(PrimaryFacts),
}

/// A server in recovery.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StandbyFacts {
    pub timeline: Timeline,
    pub received: Lsn,
    pub replayed: Lsn,
    /// The end of what this node has on disk is known. After a start it is not, before the server has read its
    /// own log to the end: more may be flushed, and acknowledged, than was received or replayed since.
    pub wal_known: bool,
    pub streaming: bool,
    /// Host and port it replicates from, as configured; `None` if from nowhere.
    pub upstream: Option<(String, u16)>,
    /// Since when it has not been streaming; `None` while it is.
    pub not_streaming_since: Option<Moment>,
}

impl StandbyFacts {
    /// The furthest WAL this node has; a lower bound unless [`Self::wal_known`].
    pub fn position(&self) -> Lsn {
        self.received.max(self.replayed)
    }
}

/// A server that accepts writes.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PrimaryFacts {
    pub timeline: Timeline,
    pub lsn: Lsn,
    pub standbys: Vec<StandbyRow>,
    /// `synchronous_standby_names` in effect.
    pub sync_names: String,
    /// WAL position when every process of the server was first seen to go by `sync_names`; `None`: not yet, and
    /// commits may still be acknowledged by older names.
    pub sync_names_since: Option<Lsn>,
}

/// One row of `pg_stat_replication`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StandbyRow {
    /// Members use their name.
    pub application_name: String,
    pub streaming: bool,
    /// `sync_state` is `sync` or `quorum`.
    pub synchronous: bool,
    pub flush: Lsn,
    /// The position that commits wait for: `flush`, or the replayed position (`synchronous_commit:
    /// remote_apply`).
    pub acknowledged: Lsn,
    /// The slot that tells which member this is, besides its name.
    pub slot: SlotUse,
    /// For how long it has owed an acknowledgement and given none.
    pub silent: Duration,
}

/// The state of the slot of the member that a walsender is named after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SlotUse {
    /// There is no such slot, which tells nothing.
    #[default]
    Absent,
    /// This walsender uses it: it is the member.
    Held,
    /// The slot is there, and this walsender does not use it.
    NotHeld,
}

/// The walsender of a member, if there is no doubt which it is: another cluster's server may stream under the name
/// of a member here, and commits that PostgreSQL takes for acknowledged by the member may be that server's alone.
pub fn walsender_of<'a>(
    rows: &'a [StandbyRow],
    member: &str,
    uses_slots: bool,
) -> Option<&'a StandbyRow> {
    let is_named =
        |row: &&StandbyRow| row.streaming && row.application_name.eq_ignore_ascii_case(member);
    let mut named = rows.iter().filter(is_named);
    let row = named.next().filter(|_| named.next().is_none())?;
    (!uses_slots || row.slot != SlotUse::NotHeld).then_some(row)
}

impl StandbyRow {
    /// [`Self::silent`], if `before` was seen so long `ago`. It owes what the log had then: it is sent WAL at
    /// once, and acknowledges what it has flushed.
    pub fn silence(&self, before: &PrimaryFacts, ago: Duration) -> Duration {
        let name = &self.application_name;
        match before.standbys.iter().find(|row| row.application_name == *name) {
            Some(known)
                if known.acknowledged == self.acknowledged && self.acknowledged < before.lsn =>
            {
                known.silent + ago
            }
            _ => Duration::ZERO,
        }
    }
}

/// This node's claim to leadership.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// The leader key is not ours, as far as was proven.
    None,
    /// Proven against the store, or confirmed by every member while the store is away.
    Mine {
        epoch: Epoch,
        /// The server must not accept writes after this.
        until: Moment,
    },
}

/// Work that takes longer than a cycle. One at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Job {
    Bootstrap,
    Clone,
    Rejoin,
    StartPrimary,
    Promote,
    Demote,
    Handover,
    Restart,
    Reinitialize,
}

impl Job {
    /// A word for logs and the REST API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bootstrap => "bootstrap",
            Self::Clone => "clone",
            Self::Rejoin => "rejoin",
            Self::StartPrimary => "start primary",
            Self::Promote => "promote",
            Self::Demote => "demote",
            Self::Handover => "handover",
            Self::Restart => "restart",
            Self::Reinitialize => "reinitialize",
        }
    }
}

/// The other members' answers to "where do you stand?".
#[derive(Debug, Clone, PartialEq)]
pub struct Race {
    /// Before any member was asked, and after nobody led.
    pub asked_at: Moment,
    /// Revision of the store's `sync` when they were asked. Every leadership in synchronous mode changes it, so
    /// answers from before one count for nothing after it.
    pub sync_revision: Revision,
    /// By name; a member without an answer is `None`.
    pub peers: BTreeMap<String, Option<Peer>>,
    /// The server that `unfenced` names.
    pub stray: Stray,
}

/// The state of a server that maintenance mode has left without a guard, asked by SQL after nobody
/// led.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stray {
    /// The server was not asked, or nothing came back.
    #[default]
    Unheard,
    /// The server's host answers that nobody listens there.
    Refused,
    /// The server is in recovery, and accepts no writes.
    Standby,
    /// The server answers, and is not known to be in recovery.
    Runs,
}

/// One member's answer, given after the question.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Peer {
    /// The member runs as a primary.
    pub primary: bool,
    /// The end of its log, looked at after the question. `None`: its server does not run, does not answer, or has
    /// not read its own log to the end yet.
    pub position: Option<Lsn>,
    /// 0 if it did not say.
    pub timeline: Timeline,
    /// The answer bears the name, scope and system identifier of the member that was asked.
    pub identified: bool,
    pub tags: Tags,
    /// The member runs as a standby and replicates from nobody: it acknowledges nothing to a former
    /// leader.
    pub detached: bool,
    /// The member would not take the key now, so nobody waits for it: its watchdog has failed, or its last
    /// attempt to lead.
    pub stands_back: bool,
}
