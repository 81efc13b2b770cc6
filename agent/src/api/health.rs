//! Health checks: from what the node knows of itself to a status code. Pure.
//!
//! Paths are matched by substring and in Patroni's order (its documentation, *REST API*, health check
//! endpoints), because load balancers in the field rely on `/master`, `/primary/` and the like. The answers differ from Patroni's in one
//! thing: they are true. `/primary` is 200 only while the server accepts writes under a proven lease,
//! not from the moment the lock is held, nor until it is released; and an agent that is stuck stops
//! saying so when the lease it last proved has run out.
//!
//! While the store is away the synchronous standbys last known still count: nobody can change them
//! without the store.

use kornak_cluster::{ClusterState, Lsn, MemberRole, MemberState, Moment, SyncMode};
use serde_json::Value;

use crate::node::NodeView;
use crate::units;

/// The decoded parameters of a request, in order.
pub(super) type Query = Vec<(String, String)>;

/// Whether a load balancer may send clients here, by the path it asked for.
pub(super) fn is_healthy(view: &NodeView, path: &str, query: &Query, now: Moment) -> bool {
    let has = |word| path.contains(word);
    if has("standby_leader") || has("standby-leader") {
        return leads_standby_cluster(view);
    }
    if has("leader") {
        return leads(view, now);
    }
    if path == "/" || has("master") || has("primary") || has("read-write") {
        return accepts_writes(view, now);
    }
    let healthy = if has("replica") {
        serves_reads(view, query)
    } else if has("read-only") && !has("sync") && !has("quorum") {
        leads(view, now) || serves_reads(view, query)
    } else if has("health") {
        view.state == MemberState::Running
    } else {
        let standby = || serves_reads(view, query);
        match path {
            "/sync" | "/synchronous" => standby() && synchrony(view) == Synchrony::Sync,
            "/quorum" => standby() && synchrony(view) == Synchrony::Quorum,
            "/async" | "/asynchronous" => standby() && synchrony(view) == Synchrony::None,
            "/read-only-sync" | "/read-only-synchronous" => {
                leads(view, now) || (standby() && synchrony(view) == Synchrony::Sync)
            }
            "/read-only-quorum" => {
                leads(view, now) || (standby() && synchrony(view) == Synchrony::Quorum)
            }
            _ => false,
        }
    };
    healthy && has_tags(view, query)
}

/// The agent itself is not stuck: its last cycle is not longer ago than a leader's lease lasts.
pub(super) fn is_live(view: &NodeView, now: Moment) -> bool {
    let defaults = kornak_cluster::ClusterConfig::default();
    let config = view.cluster.config.as_ref().unwrap_or(&defaults);
    let grace = if view.role == MemberRole::Primary { config.ttl } else { 2 * config.ttl };
    config.pause || now.since(view.cycle_at) < config.loop_wait + grace
}

/// The server has caught up, so an orchestrator may go on to the next node.
pub(super) fn is_ready(view: &NodeView, query: &Query, now: Moment) -> bool {
    if leads(view, now) {
        return true;
    }
    if !view.dcs_reachable && !view.failsafe_active && view.latest_end_lsn.is_none() {
        return false;
    }
    let streams = view.state == MemberState::Running
        && view.replication_state.as_deref() == Some("streaming");
    let position = match parameter(query, "mode") {
        Some("write") => view.xlog.received_location,
        _ => view.xlog.replayed_location,
    };
    let limit = parameter(query, "lag").and_then(units::bytes);
    let allowed = || view.cluster.config.clone().unwrap_or_default().maximum_lag_on_failover;
    streams && lag_bytes(view, position) <= limit.unwrap_or_else(allowed)
}

/// How a standby takes part in commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Synchrony {
    None,
    Sync,
    Quorum,
}

/// How the member takes part in commits, by what `sync` names.
pub(super) fn synchrony_of(cluster: &ClusterState, name: &str) -> Synchrony {
    let named = cluster.sync.as_ref().is_some_and(|sync| {
        sync.standbys().iter().any(|standby| standby.eq_ignore_ascii_case(name))
    });
    match cluster.config.as_ref().map(kornak_cluster::ClusterConfig::sync_mode) {
        Some(SyncMode::On) if named => Synchrony::Sync,
        Some(SyncMode::Quorum) if named => Synchrony::Quorum,
        _ => Synchrony::None,
    }
}

/// How this node takes part in commits.
pub(super) fn synchrony(view: &NodeView) -> Synchrony {
    match view.role {
        MemberRole::Replica => synchrony_of(&view.cluster, &view.name),
        _ => Synchrony::None,
    }
}

/// The server is a primary under a lease that is still proven.
pub(crate) fn accepts_writes(view: &NodeView, now: Moment) -> bool {
    view.leads && view.lease_until.is_some_and(|until| now < until)
}

fn leads(view: &NodeView, now: Moment) -> bool {
    accepts_writes(view, now) || leads_standby_cluster(view)
}

fn leads_standby_cluster(view: &NodeView) -> bool {
    view.holds_lock && view.role == MemberRole::StandbyLeader && view.state == MemberState::Running
}

fn serves_reads(view: &NodeView, query: &Query) -> bool {
    let limit = parameter(query, "lag").and_then(units::bytes);
    view.role == MemberRole::Replica
        && view.state == MemberState::Running
        && !view.tags.noloadbalance()
        && limit.is_none_or(|limit| {
            // Of a leader that has told nothing it is not known how far it is.
            end(view).is_some() && lag_bytes(view, view.xlog.replayed_location) <= limit
        })
}

/// The end of the leader's log, as far as it is known.
fn end(view: &NodeView) -> Option<Lsn> {
    let published = view.cluster.status.as_ref().map(|status| status.optime);
    published.max(view.latest_end_lsn)
}

fn lag_bytes(view: &NodeView, position: Option<Lsn>) -> u64 {
    end(view).unwrap_or_default().bytes_ahead_of(position.unwrap_or_default())
}

/// Of a parameter that is given twice the first counts, and one without a value is none.
fn has_tags(view: &NodeView, query: &Query) -> bool {
    let keys =
        query.iter().filter_map(|(name, _)| name.strip_prefix("tag_").map(|key| (name, key)));
    keys.into_iter().all(|(name, key)| {
        let Some(wanted) = parameter(query, name) else { return true };
        match view.tags.0.get(key) {
            None | Some(Value::Null | Value::Array(_) | Value::Object(_)) => false,
            Some(Value::Bool(on)) => wanted == if *on { "true" } else { "false" },
            Some(Value::String(text)) => text == wanted,
            Some(Value::Number(number)) => number.to_string() == wanted,
        }
    })
}

fn parameter<'a>(query: &'a Query, key: &str) -> Option<&'a str> {
    let mut values = query.iter().filter(|(name, value)| name == key && !value.is_empty());
    values.next().map(|(_, value)| value.as_str())
}
