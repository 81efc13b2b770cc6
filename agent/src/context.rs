//! The context of the agent's shell: one struct, made once, shared by reference.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kornak_cluster::{ClusterState, discard};
use kornak_config::agent::AgentSettings;
use kornak_dcs::keys::Keys;
use kornak_dcs::{Dcs, View};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::board::{Board, Signals};
use crate::counters::Counters;
use crate::failsafe::Promises;
use crate::guard::Guard;
use crate::ha::DataDir;
use crate::ha::switchover::Busy;
use crate::ha::sync::Writes;
use crate::lease::Keeper;
use crate::machine::Machine;
use crate::memory::Memory;
use crate::observe::Observation;
use crate::peers::Peers;
use crate::pledges::{Pledges, Suspicion};
use crate::postgres::{CallbackAction, Callbacks, Postgres, ServerProcess, StopError, Stopped};
use crate::schedule::RestartPlan;
use crate::server::Server;
use crate::watchdog::Watchdog;

/// A script that hangs must not keep a server from being stopped for ever.
const BEFORE_STOP_LIMIT: Duration = Duration::from_secs(60);

/// A stop without a limit: whoever stops the agent has one.
const AS_LONG_AS_IT_TAKES: Duration = Duration::from_secs(24 * 3600);

/// Shared by the driver, its jobs, the leader's housekeeping and the failsafe rounds.
#[derive(Debug)]
pub struct Context {
    pub name: String,
    /// The clock, tasks and files of this host.
    pub machine: Machine,
    pub settings: Arc<AgentSettings>,
    pub store: Arc<dyn Dcs>,
    pub keys: Keys,
    /// Everything below the cluster's root.
    pub view: watch::Receiver<Arc<View>>,
    /// The local server and its data directory.
    pub server: Arc<dyn Server>,
    /// The server, for making a data directory, for slots and for Citus.
    pub postgres: Postgres,
    pub guard: Arc<dyn Guard>,
    pub keeper: Keeper,
    pub peers: Peers,
    pub promises: Promises,
    /// The promise to acknowledge nothing more to a leader that is lost.
    pub pledges: Pledges,
    /// Whether the leader shows signs of life.
    pub suspicion: Suspicion,
    /// The newest look at the server.
    pub observation: watch::Receiver<Arc<Observation>>,
    /// The last good value of each key, which stays in force while the store shows none or an unreadable one.
    pub memory: Arc<Memory>,
    /// Tells the operator's commands what has happened.
    pub callbacks: Callbacks,
    /// The counters of the metrics.
    pub counters: Arc<Counters>,
    /// A restart that the REST API carries out at its time.
    pub restart_plan: RestartPlan,
    /// Resets the host if nobody proves the lease any more.
    pub watchdog: Watchdog,
    /// Of a node of a Citus cluster.
    pub citus: Option<Arc<crate::citus::Desk>>,
    /// Notes of one task for another.
    pub board: Board,
    /// Signals between the tasks.
    pub signals: Signals,
    /// Another driver ran before in this process, with other settings for the server.
    pub renewed: bool,
}

impl Context {
    /// The group's state as last seen, with the last good values where the store says something odd.
    pub fn cluster(&self) -> ClusterState {
        ClusterState::clone(&self.state())
    }

    /// As [`Context::cluster`], shared.
    pub fn state(&self) -> Arc<ClusterState> {
        let identifier = self.own_identifier();
        let group = self.settings.scope.group;
        let state = self.memory.read(&self.view, &self.keys, group, identifier.as_deref());
        if self.board.rewound.swap(state.rewound, Ordering::AcqRel) != state.rewound {
            warn!(
                store = state.store,
                revision = state.revision.0,
                "the store's history went back: it was restored, or is another one"
            );
            // Revisions of the history before say nothing about this one.
            *self.board.sync_writes.lock() = Writes::default();
        }
        state
    }

    /// The system identifier of the data directory, if there is one.
    pub fn own_identifier(&self) -> Option<String> {
        match &self.observation.borrow().data {
            DataDir::Initialized(control) => Some(control.system_identifier.clone()),
            DataDir::Empty | DataDir::Begun { .. } | DataDir::Foreign { .. } => None,
        }
    }

    /// Whether the store is known to take no writes.
    pub fn store_is_full(&self) -> bool {
        self.board.full.load(Ordering::Relaxed)
    }

    /// The server as last seen.
    pub fn observed(&self) -> Arc<Observation> {
        Arc::clone(&self.observation.borrow())
    }

    /// Waits for a look at the server that begins after this call. One that hangs shows as an old observation, which
    /// is what it is.
    pub async fn fresh_look(&self, limit: Duration) {
        let asked = self.machine.now();
        let mut observed = self.observation.clone();
        self.signals.look.notify_one();
        let seen = observed.wait_for(|observation| observation.at >= asked);
        discard::goes_on_either_way(self.machine.timeout(limit, seen).await);
    }

    /// The sessions that work on the server now. A server that does not answer counts as busy.
    pub async fn busy(&self) -> Busy {
        match self.server.activity().await {
            // Transactions that are prepared move with the log; they need not end.
            Ok(activity) => Busy {
                backends: u32::try_from(activity.busy.len()).unwrap_or(u32::MAX),
                oldest: Duration::from_millis(activity.oldest_transaction_ms()),
            },
            Err(_) => Busy { backends: u32::MAX, oldest: Duration::ZERO },
        }
    }

    /// This node's server is the primary of a cluster that has been made, by a proven lease.
    pub fn leads_primary(&self) -> bool {
        let made = self.cluster().initialize.is_some_and(|identifier| !identifier.is_empty());
        made && self.keeper.held().is_some()
            && matches!(self.observed().server, crate::ha::Server::Primary(_))
    }

    /// This node has the leader key of a standby cluster.
    pub fn leads_standby_cluster(&self) -> bool {
        let config = self.cluster().config;
        self.keeper.held().is_some()
            && config.is_some_and(|config| config.standby_cluster.is_some())
    }

    /// Puts the wanted configuration in force and notes what waits for a restart.
    pub async fn reload(&self) -> Result<(), crate::postgres::ConfigureError> {
        let pending = self.server.reload().await?;
        self.note_pending(pending);
        let role = crate::callbacks::role(&self.observed().server, self.leads_standby_cluster());
        self.callbacks.call(CallbackAction::Reload, role);
        self.signals.cycle.notify_one();
        Ok(())
    }

    /// Notes which parameters wait for a restart.
    pub fn note_pending(&self, pending: Vec<crate::postgres::PendingRestart>) {
        let reasons: serde_json::Map<String, serde_json::Value> = pending
            .into_iter()
            .map(|one| {
                let reason = serde_json::json!({"old_value": one.old, "new_value": one.new});
                (one.name, reason)
            })
            .collect();
        *self.board.pending_restart.lock() =
            (!reasons.is_empty()).then_some(serde_json::Value::Object(reasons));
    }

    /// Runs the operator's `before_stop`; what it answers changes nothing.
    pub async fn before_stop(&self) {
        let Some(command) = &self.settings.postgresql.before_stop else { return };
        let ran = self.postgres.run_script(command, &[], BEFORE_STOP_LIMIT).await;
        if let Err(error) = ran {
            warn!(error = &error as &dyn std::error::Error, "before_stop failed");
        }
    }

    /// Stops the server fast, as PostgreSQL calls it, after the operator's `before_stop`. Not for a stop
    /// that has to be quick. Standbys get the end of the log; nobody else is waited for, and an archiver
    /// only while it works.
    pub async fn stop_in_order(&self, limit: Duration) -> Result<(), StopError> {
        let runs = matches!(self.server.process().await, Ok(ServerProcess::Running { .. }));
        // After a handover it may have shut down already, and linger.
        if runs && !self.server.has_shut_down().await {
            self.before_stop().await;
            self.send_strangers_away().await;
        }
        match self.server.stop_writing(limit).await? {
            Stopped::Gone => Ok(()),
            Stopped::Lingers => self.server.end_in_time().await,
        }
    }

    /// Ends the walsenders of receivers that are no members: a stop does not wait for them.
    async fn send_strangers_away(&self) {
        let cluster = self.cluster();
        let members: Vec<&str> = cluster.members.keys().map(String::as_str).collect();
        if let Err(error) = self.server.terminate_walsenders_except(&members).await {
            // The server may be in any state.
            debug!(
                error = &error as &dyn std::error::Error,
                "WAL receivers of other standbys could not be ended"
            );
        }
    }

    /// How long a primary may take to stop before it is killed: what it has not sent yet would be
    /// missing after a failover. Only in synchronous mode somebody else has it for sure.
    pub fn stop_limit(&self) -> Duration {
        let config = self.cluster().config;
        config.and_then(|config| config.stop_limit()).unwrap_or(AS_LONG_AS_IT_TAKES)
    }

    /// This member's slot on a leader; `None` where slots are off.
    pub fn slot_name(&self, cluster: &ClusterState) -> Option<String> {
        let on = cluster.config.as_ref().is_none_or(kornak_cluster::ClusterConfig::use_slots);
        on.then(|| crate::postgres::slot_name_of(&self.name))
    }
}
