//! The view that the agent shows of itself, and the commands that it takes: the seam between the driver and the
//! REST API. The API answers from the newest [`NodeView`] in memory and never touches the server or
//! the store for a health check.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{
    ClusterState, Epoch, Lsn, MemberRole, MemberState, Moment, Scope, Tags, Timeline, XLog,
};
use serde_json::{Map, Value};
use tokio::sync::{mpsc, oneshot, watch};

use crate::ha::{Action, Why};

/// The agent's latest knowledge, replaced whole after every look.
#[derive(Debug, Clone)]
pub struct NodeView {
    pub name: String,
    pub scope: Scope,
    pub tags: Tags,
    /// As published in the member key.
    pub state: MemberState,
    pub role: MemberRole,
    /// The server runs, is not in recovery and this node's lease is proven: the only state in which
    /// `/primary` is 200.
    pub leads: bool,
    /// Holds the leader key with a proven lease, whatever the server does.
    pub holds_lock: bool,
    pub server_version: Option<u32>,
    /// `YYYY-MM-DD HH:MM:SS.ffffff+00:00`.
    pub postmaster_start_time: Option<String>,
    pub timeline: Option<Timeline>,
    pub xlog: XLog,
    /// The positions in `xlog` are all that the server has: it runs, and has read its own log to the end.
    pub wal_known: bool,
    /// `streaming` or `in archive recovery`, on a standby.
    pub replication_state: Option<String>,
    /// A standby that replicates from nobody.
    pub detached: bool,
    /// Where the upstream's WAL ended when it last spoke to this standby.
    pub latest_end_lsn: Option<Lsn>,
    pub replication: Vec<ReplicationView>,
    pub system_identifier: Option<String>,
    /// Seconds since 1970 at which the store was last known to answer.
    pub dcs_last_seen: u64,
    /// The store can be read and written now.
    pub dcs_reachable: bool,
    pub failsafe_active: bool,
    /// A watchdog is required and cannot be had.
    pub watchdog_failed: bool,
    /// The last attempt to lead failed here, and others have the first go.
    pub stands_back: bool,
    pub pending_restart: Option<Value>,
    pub scheduled_restart: Option<Value>,
    pub cluster: Arc<ClusterState>,
    /// The last decision, for the operator.
    pub action: Action,
    pub why: Why,
    /// When the look at the server began that this view comes from.
    pub observed_at: Moment,
    /// When the last cycle ended; a stuck agent shows here.
    pub cycle_at: Moment,
    /// Until when the lease is proven.
    pub lease_until: Option<Moment>,
    /// Decisions since the start.
    pub cycles: u64,
}

/// One row of `pg_stat_replication` as `/patroni` shows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ReplicationView {
    pub usename: String,
    pub application_name: String,
    pub client_addr: Option<String>,
    pub state: String,
    pub sync_state: String,
    pub sync_priority: i32,
}

/// The latest view, for any number of readers.
pub type NodeViews = watch::Receiver<Arc<NodeView>>;

/// Something that was asked through the REST API. Each carries where its answer goes.
#[derive(Debug)]
pub enum Command {
    /// Planned switchover. Only a leader carries it out.
    Switchover {
        candidate: Option<String>,
        answer: oneshot::Sender<CommandResult>,
    },
    /// Write a manual failover request: promotes `candidate` although there is no leader, or
    /// makes the leader hand over to it.
    Failover {
        candidate: String,
        answer: oneshot::Sender<CommandResult>,
    },
    Restart {
        /// For the server to take connections; else `primary_start_timeout` decides.
        timeout: Option<Duration>,
        answer: oneshot::Sender<CommandResult>,
    },
    Reload {
        answer: oneshot::Sender<CommandResult>,
    },
    Reinitialize {
        /// Give up what else is under way.
        force: bool,
        /// Copy from the leader, whoever else offers himself.
        from_leader: bool,
        answer: oneshot::Sender<CommandResult>,
    },
    /// Change the dynamic configuration: merge (PATCH) or replace (PUT).
    Configure {
        change: Map<String, Value>,
        replace: bool,
        answer: oneshot::Sender<Result<Map<String, Value>, ConfigureError>>,
    },
    /// Write or clear (`None`) a scheduled switchover.
    Schedule {
        request: Option<kornak_cluster::FailoverRequest>,
        answer: oneshot::Sender<CommandResult>,
    },
    /// A leader that cannot reach the store asks to stay (`POST /failsafe`).
    Failsafe {
        leader: String,
        /// For how long it asks the member to stay away; `None`: it does not say (Patroni).
        asked: Option<Duration>,
        /// The leadership that it rests on; `None`: it does not say.
        epoch: Option<Epoch>,
        /// How far its slots are.
        slots: BTreeMap<String, Lsn>,
        answer: oneshot::Sender<FailsafeAnswer>,
    },
    /// Look at the server now: somebody asks where it stands.
    Look,
    /// Start a checkpoint now: the leader of a handover asks its candidate.
    Checkpoint {
        answer: oneshot::Sender<CommandResult>,
    },
}

/// The result of a command: a sentence for the person who asked.
pub type CommandResult = Result<String, CommandError>;

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Cannot be done in this state of the cluster (412 or 503).
    #[error("{0}")]
    NotPossible(String),
    /// Was tried and failed (503).
    #[error("{0}")]
    Failed(String),
}

/// Why the dynamic configuration was not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigureError {
    #[error("somebody else changed the configuration at the same time")]
    Conflict,
    #[error("there is no configuration in the store")]
    Missing,
    /// The text names the key.
    #[error("{0}")]
    Invalid(String),
    #[error("the store could not be written: {0}")]
    Store(String),
}

/// Answer to a leader that asks to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailsafeAnswer {
    /// The promise is on disk, for so long. `lsn` is this standby's position.
    Accepted { lsn: Lsn, promised: Duration },
    /// The store has named another leader.
    NotTheLeader,
    /// This node leads, or is about to.
    Leading,
    /// Failsafe mode is off.
    Off,
}

/// Commands that wait for the driver. Bounded: an operator's requests come one at a time, and a
/// leader in failsafe mode asks once a second.
pub const COMMAND_QUEUE: usize = 32;

/// Where commands go.
pub type Commands = mpsc::Sender<Command>;
