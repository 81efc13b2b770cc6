//! Which sessions hold advisory locks, asked of the servers once a second.
//!
//! A lock that a function took shows in no command tag. When a server is lost it cannot be asked any
//! more, and a session that believes to hold a mutex must not live on while another client gets it
//! (SAFETY.md A11). The sample is a second old at most; what was locked after it is not seen unless
//! the statement's text names `pg_advisory_lock`, which pins by itself.
//!
//! Not here: temporary tables made inside functions, which only a session of the same database could
//! see; a planned switchover asks each session itself.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kornak_cluster::Node;
use tokio_util::sync::CancellationToken;

use crate::backend::{Address, Connected, DialError};
use crate::shared::Shared;

/// How old a sample may be.
const EVERY: Duration = Duration::from_secs(1);

/// Locks of idle backends: those of a transaction are over with it. Of PostgreSQL's two kinds of keys:
/// Citus locks shards with kinds of its own, and a lock that is seen just before a transaction ends would
/// look like one of an idle session.
const QUERY: &str = "SELECT DISTINCT l.pid::text FROM pg_catalog.pg_locks l \
    JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
    WHERE l.locktype = 'advisory' AND l.objsubid IN (1, 2) AND l.granted AND a.state = 'idle'";

/// Samples until told to stop.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut open: HashMap<Arc<str>, Connected> = HashMap::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
        let sessions = shared.registry.by_node();
        open.retain(|name, _| sessions.contains_key(name));
        let topology = shared.topology();
        let nodes = topology.groups.values().flat_map(|group| group.nodes.values());
        for node in nodes.filter(|node| sessions.contains_key(node.name.as_str())) {
            let name: Arc<str> = node.name.as_str().into();
            let known = open.remove(&name);
            match sample(&shared, node, known).await {
                Ok((connected, pids)) => {
                    note(&shared, &name, &pids);
                    open.insert(name, connected);
                }
                // It is tried again; sessions keep what was seen last.
                Err(error) => tracing::debug!(
                    server = %name,
                    error = &error as &dyn std::error::Error,
                    "advisory locks cannot be asked for"
                ),
            }
        }
    }
}

async fn sample(
    shared: &Shared,
    node: &Node,
    known: Option<Connected>,
) -> Result<(Connected, HashSet<u32>), DialError> {
    let limit = shared.settings.limits.connect_timeout;
    let mut connected = match known {
        Some(connected) => connected,
        None => {
            let address = Address::from(node);
            shared.prober.connect(&address, limit).await?
        }
    };
    let asked = tokio::time::timeout(limit, connected.query(QUERY, &[])).await;
    let rows = asked.map_err(|_| DialError::Timeout)??;
    let pid = |row: Vec<Option<Bytes>>| {
        let value = row.into_iter().next()??;
        std::str::from_utf8(&value).ok()?.parse().ok()
    };
    Ok((connected, rows.into_iter().filter_map(pid).collect()))
}

fn note(shared: &Shared, name: &Arc<str>, pids: &HashSet<u32>) {
    for handle in shared.registry.all() {
        if handle.node() == *name {
            let target = handle.cancel_target();
            handle.set_advisory_locks(target.is_some_and(|it| pids.contains(&it.key.pid)));
        }
    }
}
