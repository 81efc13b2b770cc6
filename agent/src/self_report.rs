//! The node's account of itself: a [`NodeView`] for the REST API, a [`Member`] for the store.
//! Both are made from the same look, so they never disagree.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kornak_cluster::member::{COMPATIBLE_PATRONI_VERSION, KORNAK_RECORDS_VERSION};
use kornak_cluster::{Member, MemberRole, MemberState, XLog};
use kornak_config::agent::CitusSettings;

use crate::context::Context;
use crate::ha::{DataDir, Decision, Job, Lease, Server, Snapshot, Store};
use crate::node::{NodeView, ReplicationView};
use crate::observe::Observation;
use crate::publish::Account;

/// One look, with what was decided from it.
pub(crate) struct Shown<'a> {
    pub(crate) ctx: &'a Context,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) decision: &'a Decision,
    pub(crate) observation: &'a Observation,
    pub(crate) dcs_last_seen: u64,
    pub(crate) cycles: u64,
}

/// The state in Patroni's words.
fn state(snapshot: &Snapshot) -> MemberState {
    match (snapshot.job, &snapshot.server) {
        (Some(Job::Bootstrap), _) => MemberState::Initializing,
        // Over when it replicates again.
        (Some(Job::Reinitialize), Server::Standby(facts)) if facts.streaming => {
            MemberState::Running
        }
        (Some(Job::Clone), Server::Stopped) | (Some(Job::Reinitialize), _) => {
            MemberState::CreatingReplica
        }
        (Some(Job::Restart), Server::Stopped | Server::Starting { .. }) => MemberState::Restarting,
        (Some(Job::Demote), Server::Primary(_)) => MemberState::Stopping,
        (
            _,
            Server::Primary(_) | Server::Standby(_) | Server::Silent { .. } | Server::Closed { .. },
        ) => MemberState::Running,
        (_, Server::Starting { .. }) => MemberState::Starting,
        (_, Server::Stopping { .. }) => MemberState::Stopping,
        (_, Server::Leftovers) => MemberState::Crashed,
        // In maintenance mode a server that is down is nobody's fault, whatever ended it.
        (_, Server::Stopped) if crate::ha::paused(snapshot) => MemberState::Stopped,
        (_, Server::Stopped) => match &snapshot.data {
            DataDir::Initialized(control) if !control.clean => MemberState::Crashed,
            _ => MemberState::Stopped,
        },
    }
}

fn role(snapshot: &Snapshot) -> MemberRole {
    let mine = matches!(snapshot.lease, Lease::Mine { .. });
    let config = snapshot.cluster.config.as_ref();
    let standby_cluster = config.is_some_and(|config| config.standby_cluster.is_some());
    match (&snapshot.server, &snapshot.data) {
        (Server::Primary(_), _) => MemberRole::Primary,
        (Server::Standby(_), _) if mine && standby_cluster => MemberRole::StandbyLeader,
        (Server::Standby(_), _) if snapshot.job == Some(Job::Promote) => MemberRole::Promoted,
        (Server::Standby(_), _) => MemberRole::Replica,
        (_, DataDir::Initialized(control)) if mine && control.was_primary => MemberRole::Primary,
        (Server::Stopped | Server::Leftovers, DataDir::Initialized(control))
            if control.was_primary =>
        {
            MemberRole::Demoted
        }
        (_, DataDir::Initialized(_)) => MemberRole::Replica,
        (_, DataDir::Empty | DataDir::Begun { .. } | DataDir::Foreign { .. }) => {
            MemberRole::Uninitialized
        }
    }
}

/// The view for the REST API.
pub(crate) fn view(shown: &Shown<'_>) -> NodeView {
    let Shown { ctx, snapshot, decision, observation, .. } = shown;
    let status = observation.status.as_deref();
    let (holds_lock, lease_until) = match snapshot.lease {
        Lease::Mine { until, .. } => (snapshot.now < until, Some(until)),
        Lease::None => (false, None),
    };
    let primary = matches!(snapshot.server, Server::Primary(_));
    let in_recovery = matches!(snapshot.server, Server::Standby(_));
    let stopping = matches!(snapshot.job, Some(Job::Demote));
    // What is written before the cluster is complete goes with it if it never is.
    let complete =
        !matches!(snapshot.data, DataDir::Begun { .. }) && snapshot.job != Some(Job::Bootstrap);
    NodeView {
        name: ctx.name.clone(),
        scope: ctx.settings.scope.clone(),
        tags: ctx.settings.tags.clone(),
        state: state(snapshot),
        role: role(snapshot),
        leads: primary && holds_lock && !stopping && complete,
        holds_lock,
        server_version: status.map(|status| status.version),
        postmaster_start_time: status.map(|status| status.postmaster_start_time.clone()),
        timeline: status.map(|status| status.timeline),
        xlog: status.map_or_else(XLog::default, |status| XLog {
            location: primary.then_some(status.position()),
            received_location: match &snapshot.server {
                Server::Standby(facts) => Some(facts.received),
                _ => None,
            },
            replayed_location: status.replayed_lsn.filter(|_| in_recovery),
            replayed_timestamp: status.replay_timestamp.clone().filter(|_| in_recovery),
            paused: in_recovery.then_some(status.replay_paused),
        }),
        wal_known: match &snapshot.server {
            Server::Standby(facts) => facts.wal_known,
            server => matches!(server, Server::Primary(_)),
        },
        replication_state: status.filter(|_| in_recovery).map(|status| {
            if status.is_streaming() { "streaming" } else { "in archive recovery" }.to_owned()
        }),
        detached: matches!(&snapshot.server, Server::Standby(facts) if facts.upstream.is_none()),
        latest_end_lsn: None,
        replication: status.map(replication).unwrap_or_default(),
        system_identifier: match &snapshot.data {
            DataDir::Initialized(control) => Some(control.system_identifier.clone()),
            _ => None,
        },
        dcs_last_seen: shown.dcs_last_seen,
        dcs_reachable: snapshot.store == Store::Live,
        failsafe_active: ctx.board.failsafe_active.load(Ordering::Relaxed),
        watchdog_failed: snapshot.lacks_watchdog,
        stands_back: snapshot.race_not_before.is_some_and(|moment| snapshot.now < moment),
        pending_restart: ctx.board.pending_restart.lock().clone(),
        scheduled_restart: None,
        cluster: Arc::clone(&snapshot.cluster),
        action: decision.action.clone(),
        why: decision.why,
        observed_at: snapshot.observed_at,
        cycle_at: snapshot.now,
        lease_until,
        cycles: shown.cycles,
    }
}

fn replication(status: &crate::postgres::ServerStatus) -> Vec<ReplicationView> {
    let rows = status.replication.iter().map(|row| ReplicationView {
        usename: row.user.clone().unwrap_or_default(),
        application_name: row.application_name.clone(),
        client_addr: row.client_addr.clone(),
        state: row.state.clone().unwrap_or_default(),
        sync_state: row.sync_state.clone().unwrap_or_default(),
        sync_priority: row.sync_priority.and_then(|p| i32::try_from(p).ok()).unwrap_or(0),
    });
    rows.collect()
}

/// Where clients of this node's server connect to.
pub(crate) fn conn_url(settings: &kornak_config::agent::AgentSettings) -> String {
    let postgresql = &settings.postgresql;
    format!("postgres://{}/{}", postgresql.connect_address, database(settings))
}

fn database(settings: &kornak_config::agent::AgentSettings) -> &str {
    let citus = settings.citus.as_ref();
    citus.map_or(settings.postgresql.database.as_str(), CitusSettings::first_database)
}

/// The member key for the store.
pub(crate) fn member(ctx: &Context, view: &NodeView) -> Account {
    let postgresql = &ctx.settings.postgresql;
    let database = database(&ctx.settings);
    let running = view.state == MemberState::Running;
    let standby = running && view.role != MemberRole::Primary;
    let receive = view.xlog.received_location;
    let replay = view.xlog.replayed_location;
    let config = view.cluster.config.clone().unwrap_or_default();
    let leads = view.leads || view.role == MemberRole::StandbyLeader;
    let member = Member {
        conn_url: conn_url(&ctx.settings),
        api_url: format!("{}/patroni", ctx.settings.restapi.base_url()),
        state: view.state,
        role: view.role,
        version: COMPATIBLE_PATRONI_VERSION.to_owned(),
        proxy_url: postgresql
            .proxy_address
            .as_ref()
            .map(|address| format!("postgres://{address}/{database}")),
        checkpoint_after_promote: (leads && ctx.board.checkpoint_pending.load(Ordering::Relaxed))
            .then_some(false),
        tags: view.tags.clone(),
        pending_restart: view.pending_restart.is_some(),
        pending_restart_reason: view.pending_restart.clone(),
        xlog_location: view
            .xlog
            .location
            .or(receive.max(replay))
            .filter(|_| running && view.wal_known),
        replay_lsn: replay.filter(|_| standby),
        receive_lsn: receive.filter(|_| standby),
        replication_state: view.replication_state.clone().filter(|_| standby),
        timeline: view.timeline.filter(|_| running),
        scheduled_restart: ctx.restart_plan.published(),
        pause: config.pause,
        kornak: Some(KORNAK_RECORDS_VERSION),
        fences: !ctx.settings.kornak.failover.suspect_after.is_zero(),
        poolinfo: ctx.settings.kornak.citus.poolinfo.clone(),
    };
    Account { member, ttl: config.ttl }
}

/// A node that has not looked yet.
pub(crate) fn before_first_cycle(ctx: &Context) -> NodeView {
    use crate::ha::{Action, Why};
    NodeView {
        name: ctx.name.clone(),
        scope: ctx.settings.scope.clone(),
        tags: ctx.settings.tags.clone(),
        state: MemberState::Starting,
        role: MemberRole::Uninitialized,
        leads: false,
        holds_lock: false,
        server_version: None,
        postmaster_start_time: None,
        timeline: None,
        xlog: XLog::default(),
        wal_known: false,
        replication_state: None,
        detached: false,
        latest_end_lsn: None,
        replication: Vec::new(),
        system_identifier: None,
        dcs_last_seen: 0,
        dcs_reachable: false,
        failsafe_active: false,
        watchdog_failed: false,
        stands_back: false,
        pending_restart: None,
        scheduled_restart: None,
        cluster: Arc::default(),
        action: Action::Wait,
        why: Why::StoreNeverRead,
        observed_at: kornak_cluster::Moment::default(),
        cycle_at: ctx.machine.now(),
        lease_until: None,
        cycles: 0,
    }
}
