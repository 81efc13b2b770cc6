//! State of the node and of its cluster, in Patroni's JSON (its documentation, *REST API*,
//! monitoring endpoint), and in Kornak's own for operators. Pure.

use kornak_cluster::{
    ClusterState, GroupId, HistoryEntry, Lsn, Member, MemberState, Moment, SyncMode, XLog,
};
use serde_json::{Map, Value, json};

use super::health::{self, Synchrony};
use crate::counters::words;
use crate::ha::Why;
use crate::node::NodeView;

/// The answer to `GET /patroni` when the server did not answer in time: state `unknown`, and the last role, as in Patroni.
pub(super) fn unanswered(view: &NodeView) -> NodeView {
    NodeView { state: MemberState::Unknown, ..view.clone() }
}

/// `GET /patroni`, and the body of every health check. `scheduled_restart` is shown as given.
///
/// Fields that only a running server has are left out while it does not run: a member that asks must not
/// take a stopped primary for a living one.
pub(super) fn node(view: &NodeView, scheduled_restart: Option<Value>) -> Map<String, Value> {
    let mut out = Map::new();
    let running = view.state == MemberState::Running;
    put(&mut out, "state", view.state.as_str());
    if let (true, Some(start)) = (running, &view.postmaster_start_time) {
        put(&mut out, "postmaster_start_time", start.as_str());
    }
    put(&mut out, "role", view.role.as_str());
    if running {
        running_server(view, &mut out);
    }
    if is_unlocked(view) {
        put(&mut out, "cluster_unlocked", true);
    }
    if view.failsafe_active {
        put(&mut out, "failsafe_mode_is_active", true);
    }
    if view.watchdog_failed {
        put(&mut out, "watchdog_failed", true);
    }
    if view.stands_back {
        put(&mut out, "stands_back", true);
    }
    put(&mut out, "dcs_last_seen", view.dcs_last_seen);
    if !view.tags.is_empty() {
        put(&mut out, "tags", view.tags.0.clone());
    }
    if let Some(identifier) = &view.system_identifier {
        put(&mut out, "database_system_identifier", identifier.as_str());
    }
    if let Some(reason) = &view.pending_restart {
        put(&mut out, "pending_restart", true);
        if reason.is_object() {
            put(&mut out, "pending_restart_reason", reason.clone());
        }
    }
    let version = kornak_cluster::member::COMPATIBLE_PATRONI_VERSION;
    let patroni = json!({"version": version, "scope": view.scope.name, "name": view.name});
    put(&mut out, "patroni", patroni);
    if let Some(restart) = scheduled_restart.or_else(|| view.scheduled_restart.clone()) {
        put(&mut out, "scheduled_restart", restart);
    }
    if view.cluster.config.as_ref().is_some_and(|config| config.pause) {
        put(&mut out, "pause", true);
    }
    out
}

/// Nobody leads as far as this node can tell: what it knew before the store went away is not counted.
pub(crate) fn is_unlocked(view: &NodeView) -> bool {
    view.cluster.leader.is_none() || !view.dcs_reachable
}

fn running_server(view: &NodeView, out: &mut Map<String, Value>) {
    if let Some(version) = view.server_version {
        put(out, "server_version", version);
    }
    let xlog = &view.xlog;
    let position = |lsn: Option<Lsn>| lsn.unwrap_or_default().0;
    if let Some(location) = xlog.location {
        put(out, "xlog", json!({"location": location.0}));
    } else if *xlog != XLog::default() && view.wal_known {
        // Who reads a position takes it for all that the server has.
        let standby = json!({
            "received_location": position(xlog.received_location),
            "replayed_location": position(xlog.replayed_location),
            "replayed_timestamp": xlog.replayed_timestamp,
            "paused": xlog.paused.unwrap_or(false),
        });
        put(out, "xlog", standby);
    }
    if let Some(timeline) = view.timeline {
        put(out, "timeline", timeline.0);
    }
    if let Some(state) = &view.replication_state {
        put(out, "replication_state", state.as_str());
    }
    if view.detached {
        put(out, "detached", true);
    }
    match health::synchrony(view) {
        Synchrony::Sync => put(out, "sync_standby", true),
        Synchrony::Quorum => put(out, "quorum_standby", true),
        Synchrony::None => {}
    }
    if !view.replication.is_empty() {
        put(out, "replication", json!(view.replication));
    }
}

/// `GET /cluster`.
pub(super) fn cluster(scope: &str, cluster: &ClusterState) -> Map<String, Value> {
    let mut out = Map::new();
    let members = cluster.members.iter().map(|(name, member)| member_row(cluster, name, member));
    put(&mut out, "members", members.collect::<Vec<_>>());
    if cluster.config.as_ref().is_some_and(|config| config.pause) {
        put(&mut out, "pause", true);
    }
    if let Some(at) = &cluster.failover.scheduled_at {
        let mut scheduled = Map::new();
        put(&mut scheduled, "at", at.as_str());
        if let Some(leader) = &cluster.failover.leader {
            put(&mut scheduled, "from", leader.as_str());
        }
        if let Some(candidate) = &cluster.failover.member {
            put(&mut scheduled, "to", candidate.as_str());
        }
        put(&mut out, "scheduled_switchover", scheduled);
    }
    put(&mut out, "scope", scope);
    if let Some(unfenced) = &cluster.unfenced {
        put(&mut out, "unfenced", unfenced.member.as_str());
    }
    if let Some(citus) = cluster.citus.as_ref().and_then(|citus| serde_json::to_value(citus).ok()) {
        put(&mut out, "citus", citus);
    }
    out
}

fn member_row(cluster: &ClusterState, name: &str, member: &Member) -> Value {
    let leads = cluster.leader.as_ref().is_some_and(|leader| leader.name == name);
    let standby_cluster = cluster.config.as_ref().is_some_and(|c| c.standby_cluster.is_some());
    let role = match (leads, standby_cluster, health::synchrony_of(cluster, name)) {
        (true, true, _) => "standby_leader",
        (true, false, _) => "leader",
        (false, _, Synchrony::Sync) => "sync_standby",
        (false, _, Synchrony::Quorum) => "quorum_standby",
        (false, _, Synchrony::None) => "replica",
    };
    let state = match &member.replication_state {
        Some(state) if role != "leader" => state.as_str(),
        _ => member.state.as_str(),
    };
    let mut row = Map::new();
    put(&mut row, "name", name);
    put(&mut row, "role", role);
    put(&mut row, "state", state);
    put(&mut row, "api_url", member.api_url.as_str());
    if let Some((host, port)) = member.conn_address() {
        put(&mut row, "host", host);
        put(&mut row, "port", port);
    }
    if let Some(timeline) = member.timeline {
        put(&mut row, "timeline", timeline.0);
    }
    if !member.tags.is_empty() {
        put(&mut row, "tags", member.tags.0.clone());
    }
    if member.pending_restart {
        put(&mut row, "pending_restart", true);
    }
    if let Some(reason) = &member.pending_restart_reason {
        put(&mut row, "pending_restart_reason", reason.clone());
    }
    if let Some(restart) = &member.scheduled_restart {
        put(&mut row, "scheduled_restart", restart.clone());
    }
    if !leads {
        lags(cluster, member, &mut row);
    }
    Value::Object(row)
}

fn lags(cluster: &ClusterState, member: &Member, row: &mut Map<String, Value>) {
    let end = cluster.status.as_ref().map(|status| status.optime);
    let positions = [
        ("receive_lag", "receive_lsn", member.receive_lsn),
        ("replay_lag", "replay_lsn", member.replay_lsn),
        ("lag", "lsn", member.xlog_location),
    ];
    for (lag_key, lsn_key, position) in positions {
        let position = position.filter(|lsn| *lsn > Lsn(0));
        let lag = match (end, position) {
            (Some(end), Some(position)) => Value::from(end.bytes_ahead_of(position)),
            _ => Value::from("unknown"),
        };
        put(row, lag_key, lag);
        let lsn = position.map_or_else(|| "unknown".to_owned(), |lsn| lsn.to_string());
        put(row, lsn_key, lsn);
    }
}

/// `GET /history`.
pub(super) fn history(entries: &[HistoryEntry]) -> Value {
    Value::Array(entries.iter().map(HistoryEntry::to_row).collect())
}

/// `GET /kornak/node`: what the agent is doing, and why.
pub(super) fn operator(view: &NodeView, now: Moment) -> Map<String, Value> {
    let mut out = Map::new();
    put(&mut out, "name", view.name.as_str());
    put(&mut out, "scope", view.scope.name.as_str());
    put(&mut out, "group", view.scope.group.map(|GroupId(group)| group));
    put(&mut out, "version", env!("CARGO_PKG_VERSION"));
    put(&mut out, "state", view.state.as_str());
    put(&mut out, "role", view.role.as_str());
    put(&mut out, "leads", view.leads);
    put(&mut out, "holds_leader_key", view.holds_lock);
    let lease = view.lease_until.map(|until| until.since(now).as_secs_f64());
    put(&mut out, "lease_left_seconds", lease.map(milliseconds));
    put(&mut out, "action", words(&view.action, ' '));
    put(&mut out, "why", view.why.as_str());
    put(&mut out, "job", job(view));
    put(&mut out, "cycles", view.cycles);
    let age = now.since(view.cycle_at).as_secs_f64();
    put(&mut out, "last_cycle_age_seconds", milliseconds(age));
    put(&mut out, "dcs_reachable", view.dcs_reachable);
    put(&mut out, "dcs_last_seen", view.dcs_last_seen);
    put(&mut out, "dcs_revision", view.cluster.revision.0);
    put(&mut out, "unreadable_keys", view.cluster.unreadable.clone());
    let config = view.cluster.config.as_ref();
    put(&mut out, "pause", config.is_some_and(|config| config.pause));
    put(&mut out, "failsafe_active", view.failsafe_active);
    put(
        &mut out,
        "synchronous_mode",
        match config.map(kornak_cluster::ClusterConfig::sync_mode) {
            Some(SyncMode::On) => "on",
            Some(SyncMode::Quorum) => "quorum",
            Some(SyncMode::Off) | None => "off",
        },
    );
    put(&mut out, "leader", view.cluster.leader.as_ref().map(|leader| leader.name.clone()));
    put(&mut out, "epoch", view.cluster.leader.as_ref().map(|leader| json!(leader.epoch)));
    put(&mut out, "handover", view.cluster.handover.as_ref().map(|record| json!(record)));
    put(&mut out, "unfenced", view.cluster.unfenced.as_ref().map(|record| json!(record)));
    out
}

/// The name of the job that the agent runs.
pub(crate) fn job(view: &NodeView) -> Option<&'static str> {
    match view.why {
        Why::BusyWith(job) => Some(job.as_str()),
        _ => None,
    }
}

fn milliseconds(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

fn put(out: &mut Map<String, Value>, key: &str, value: impl Into<Value>) {
    out.insert(key.to_owned(), value.into());
}
