//! The status pages for people and Prometheus: `/`, `/status` (JSON), `/metrics`.
//!
//! Everything is computed when asked for. No SQL and no secrets are shown; names of roles and
//! databases, and what servers and files say of themselves, only to those who have shown a password.

mod metrics;
mod page;
pub mod serve;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{Html, IntoResponse, Json};
use axum::routing::get;
use serde::Serialize;

use crate::registry::Doing;
use crate::session::journal::Pin;
use crate::shared::{Phase, Shared};

/// The whole status.
#[derive(Debug, Serialize)]
pub struct Status {
    pub proxy: String,
    pub version: &'static str,
    pub scope: String,
    pub gate: GateStatus,
    pub groups: BTreeMap<u32, GroupStatus>,
    pub sessions: SessionStatus,
    pub pools: Vec<PoolStatus>,
    pub errors: BTreeMap<String, u64>,
    /// Troubles that a person should look at, by place.
    pub trouble: BTreeMap<&'static str, String>,
}

/// The sessions that are held, and why.
#[derive(Debug, Serialize)]
pub struct GateStatus {
    pub phase: Phase,
    pub handover: Option<String>,
    pub attempt: u32,
    pub acknowledged: bool,
    /// Groups of a Citus cluster for whose primary transactions wait.
    pub without_primary: Vec<u32>,
    /// Groups for whose standbys transactions of sessions on standbys wait.
    pub without_standby: Vec<u32>,
    /// Groups for whose sake sessions on standbys read other groups from their primaries.
    pub reads_primaries_for: Vec<u32>,
    pub registered: bool,
    /// New transactions of some sessions wait.
    pub closed: bool,
}

/// One group of servers.
#[derive(Debug, Serialize)]
pub struct GroupStatus {
    /// By the leader key.
    pub leader: Option<String>,
    pub epoch: Option<u64>,
    /// Proven to accept writes.
    pub serving: Option<String>,
    /// Why nobody is.
    pub why: Option<&'static str>,
    /// Distributed transactions that its predecessor has left prepared and nobody has ended.
    pub unfinished: usize,
    pub nodes: Vec<NodeStatus>,
}

/// One server.
#[derive(Debug, Serialize)]
pub struct NodeStatus {
    pub name: String,
    pub host: String,
    pub port: u16,
    pub role: &'static str,
    pub running: bool,
    pub lag_bytes: Option<u64>,
    pub sessions: usize,
}

/// Sessions, counted.
#[derive(Debug, Serialize)]
pub struct SessionStatus {
    pub total: usize,
    pub by_state: BTreeMap<&'static str, usize>,
    pub by_listener: BTreeMap<String, usize>,
    pub pinned: BTreeMap<&'static str, usize>,
}

/// The server connections of one role to one database through one listener; without names those of
/// the whole listener.
#[derive(Debug, Serialize)]
pub struct PoolStatus {
    pub listener: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    pub clients: usize,
    pub waiting: usize,
    /// How long the one that has waited longest has waited.
    pub longest_wait_seconds: f64,
    pub idle: usize,
    pub lent: usize,
    pub opening: usize,
}

/// How much a visitor is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Detail {
    /// Counts.
    Counts,
    /// Names as well.
    Names,
}

/// The text of a trouble for readers who may not see the details.
const SEE_LOG: &str = "see the proxy's log";

fn router(shared: Arc<Shared>, is_private: bool) -> Router {
    let detail = if is_private { Detail::Names } else { Detail::Counts };
    Router::new()
        .route("/", get(move |State(shared)| page(shared, detail)))
        .route(
            "/status",
            get(async move |State(shared): State<Arc<Shared>>| Json(look(&shared, detail))),
        )
        .route("/metrics", get(move |State(shared)| series(shared, detail)))
        .with_state(shared)
}

fn look(shared: &Shared, detail: Detail) -> Status {
    let holding = shared.holding.borrow().clone();
    let (topology, standings) = (shared.topology(), shared.standings());
    let by_node = shared.registry.by_node();
    let groups = topology.groups.iter().map(|(id, group)| {
        let serving = standings.serving(*id);
        let leader = group.leader.as_ref();
        let nodes = group.nodes.values().map(|node| NodeStatus {
            name: node.name.clone(),
            host: node.host.to_string(),
            port: node.port,
            role: if leader.is_some_and(|(name, _)| *name == node.name) {
                "leader"
            } else {
                "replica"
            },
            running: node.running,
            lag_bytes: node.lag_bytes,
            sessions: by_node.get(node.name.as_str()).copied().unwrap_or(0),
        });
        let status = GroupStatus {
            leader: leader.map(|(name, _)| name.clone()),
            epoch: leader.map(|(_, epoch)| epoch.revision.0),
            serving: serving.ok().map(|serving| serving.name.to_string()),
            why: serving.err().map(crate::cluster::standing::Why::as_str),
            unfinished: serving.map_or(0, |serving| serving.unfinished.len()),
            nodes: nodes.collect(),
        };
        (id.0, status)
    });
    let registered = *shared.registered.borrow();
    Status {
        proxy: shared.id.clone(),
        version: env!("CARGO_PKG_VERSION"),
        scope: shared.settings().scope.name.clone(),
        gate: GateStatus {
            phase: holding.phase,
            handover: holding.handover,
            attempt: holding.attempt,
            acknowledged: holding.acknowledged,
            without_primary: holding.without_primary,
            without_standby: holding.without_standby,
            reads_primaries_for: holding.reads_primaries_for,
            registered,
            closed: !shared.gate.closed().is_empty(),
        },
        groups: groups.collect(),
        sessions: sessions(shared),
        pools: pools(shared, detail),
        errors: shared.metrics.errors(),
        trouble: troubles(shared, detail),
    }
}

fn troubles(shared: &Shared, detail: Detail) -> BTreeMap<&'static str, String> {
    let known = shared.trouble.lock();
    let shown = |what: &String| match detail {
        Detail::Names => what.clone(),
        Detail::Counts => SEE_LOG.to_owned(),
    };
    known.iter().map(|(place, what)| (*place, shown(what))).collect()
}

fn pools(shared: &Shared, detail: Detail) -> Vec<PoolStatus> {
    let settings = shared.settings();
    let listeners = &settings.listeners;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let counts = shared.lender.counts().into_iter();
    let mut pools: Vec<PoolStatus> = counts
        .map(|(listener, user, database, count)| PoolStatus {
            listener: listeners.get(listener).map(|it| it.name.clone()).unwrap_or_default(),
            user: Some(text(&user)),
            database: Some(text(&database)),
            clients: count.clients,
            waiting: count.waiting,
            longest_wait_seconds: count.longest_wait.as_secs_f64(),
            idle: count.idle,
            lent: count.lent,
            opening: count.opening,
        })
        .collect();
    pools.sort_by(|a, b| {
        (&a.listener, &a.user, &a.database).cmp(&(&b.listener, &b.user, &b.database))
    });
    match detail {
        Detail::Names => pools,
        Detail::Counts => nameless(pools),
    }
}

/// One for each listener.
fn nameless(pools: Vec<PoolStatus>) -> Vec<PoolStatus> {
    let mut sums: Vec<PoolStatus> = Vec::new();
    for pool in pools {
        match sums.last_mut().filter(|sum| sum.listener == pool.listener) {
            None => sums.push(PoolStatus { user: None, database: None, ..pool }),
            Some(sum) => {
                sum.clients += pool.clients;
                sum.waiting += pool.waiting;
                sum.longest_wait_seconds = sum.longest_wait_seconds.max(pool.longest_wait_seconds);
                sum.idle += pool.idle;
                sum.lent += pool.lent;
                sum.opening += pool.opening;
            }
        }
    }
    sums
}

fn sessions(shared: &Shared) -> SessionStatus {
    let mut by_state: BTreeMap<_, _> = Doing::ALL.iter().map(|doing| (doing.as_str(), 0)).collect();
    let settings = shared.settings();
    let listeners = &settings.listeners;
    let mut by_listener: BTreeMap<String, usize> =
        listeners.iter().map(|listener| (listener.name.clone(), 0)).collect();
    let mut pinned = BTreeMap::new();
    let all = shared.registry.all();
    for handle in &all {
        *by_state.entry(handle.doing().as_str()).or_insert(0) += 1;
        if let Some(listener) = listeners.get(handle.listener) {
            *by_listener.entry(listener.name.clone()).or_insert(0) += 1;
        }
        if let Some(pin) = handle.pin() {
            *pinned.entry(Pin::as_str(pin)).or_insert(0) += 1;
        }
    }
    SessionStatus { total: all.len(), by_state, by_listener, pinned }
}

async fn series(shared: Arc<Shared>, detail: Detail) -> impl IntoResponse {
    let mut out = String::with_capacity(8 * 1024);
    shared.metrics.print(&mut out);
    metrics::print_status(&look(&shared, detail), &mut out);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], out)
}

async fn page(shared: Arc<Shared>, detail: Detail) -> Html<String> {
    Html(page::of(&look(&shared, detail)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_names_the_pools_of_a_listener_are_one() {
        let pool = |listener: &str, user: &str, waiting: usize, wait: f64| PoolStatus {
            listener: listener.to_owned(),
            user: Some(user.to_owned()),
            database: Some(user.to_owned()),
            clients: 2,
            waiting,
            longest_wait_seconds: wait,
            idle: 1,
            lent: 0,
            opening: 0,
        };
        let sums = nameless(vec![
            pool("a", "ann", 1, 3.0),
            pool("a", "joe", 2, 1.0),
            pool("b", "joe", 0, 0.0),
        ]);
        let seen = serde_json::to_string(&sums).unwrap();
        assert!(!seen.contains("ann") && !seen.contains("joe"), "{seen}");
        let counts: Vec<_> = sums.iter().map(|it| (it.clients, it.waiting, it.idle)).collect();
        assert_eq!(counts, [(4, 3, 2), (2, 0, 1)]);
        assert!(sums[0].longest_wait_seconds > 2.0);
    }
}
