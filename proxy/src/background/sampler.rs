//! Asks the servers once a second what sessions hold that the messages do not show.
//!
//! A lock that a function took, a temporary table that one made: neither shows in a command tag. When
//! a server is lost it cannot be asked any more, and a session that believes to hold a mutex must
//! not live on while another client gets it, nor one go on without its table (docs/safety.md A11). The
//! sample is a second old at most; what was done after it is not seen unless the statement's text
//! names it, which pins by itself. Temporary tables have a module of their own (`temporary`).

mod temporary;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kornak_cluster::Node;
use kornak_config::proxy::KeepSessions;
use tokio_util::sync::CancellationToken;

use crate::net::backend::{Address, Connected, DialError};
use crate::registry::Handle;
use crate::shared::Shared;
use temporary::Databases;

/// How old a sample may be.
const EVERY: Duration = Duration::from_secs(1);

/// Locks of idle backends: those of a transaction are over with it. Of PostgreSQL's two kinds of keys:
/// Citus locks shards with kinds of its own, and a lock that is seen just before a transaction ends would
/// look like one of an idle session.
const QUERY: &str = "SELECT DISTINCT l.pid::text FROM pg_catalog.pg_locks l \
    JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid \
    WHERE l.locktype = 'advisory' AND l.objsubid IN (1, 2) AND l.granted AND a.state = 'idle'";

/// Whether somebody changes a database as a whole, which fails after five seconds in which anybody else
/// is connected to it, or to the one that is copied.
const CHANGES: &str = r"SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_activity
    WHERE backend_type = 'client backend' AND state = 'active' AND query OPERATOR(pg_catalog.~*)
    E'^(\\s|--[^\\n]*\\n|/\\*([^*]|\\*[^/])*\\*/)*(create|alter|drop)\\s+database')::text";

/// One server with sessions on it.
#[derive(Default)]
struct Server {
    connected: Option<Connected>,
    databases: Databases,
}

/// The sessions on one server, by the process ids that they have there.
type Sessions = HashMap<u32, Arc<Handle>>;

/// Samples until told to stop.
pub async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut servers: HashMap<Arc<str>, Server> = HashMap::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.cancelled() => return,
        }
        shared.registry.recheck_suspects();
        let mut by_node: HashMap<Arc<str>, Sessions> = HashMap::new();
        for handle in shared.registry.all() {
            let Some(target) = handle.cancel_target() else { continue };
            by_node.entry(handle.node()).or_default().insert(target.key.pid, handle);
        }
        if shared.lender.has_idle() {
            // Nobody has a server, and there are connections to it all the same.
            let standings = shared.standings();
            for serving in standings.0.values().filter_map(|it| it.serving.as_ref().ok()) {
                by_node.entry(Arc::clone(&serving.name)).or_default();
            }
        }
        servers.retain(|name, _| by_node.contains_key(name));
        let topology = shared.topology();
        let nodes = topology.groups.values().flat_map(|group| group.nodes.values());
        for node in nodes {
            let Some((name, sessions)) = by_node.get_key_value(node.name.as_str()) else {
                continue;
            };
            let server = servers.entry(Arc::clone(name)).or_default();
            if let Err(error) = sample(&shared, node, sessions, server).await {
                server.connected = None;
                // It is tried again; sessions keep what was seen last.
                tracing::debug!(
                    server = %name,
                    error = &error as &dyn std::error::Error,
                    "locks of sessions could not be asked for"
                );
            }
        }
    }
}

async fn sample(
    shared: &Shared,
    node: &Node,
    sessions: &Sessions,
    server: &mut Server,
) -> Result<(), DialError> {
    let limit = shared.settings().limits.connect_timeout;
    // Given back when it has answered: one that was left in the middle of an answer is of no use.
    let mut connected = match server.connected.take() {
        Some(connected) => connected,
        None => shared.prober.connect(&Address::from(node), limit).await?,
    };
    let locking: HashSet<u32> = pids(ask(&mut connected, QUERY, &[], limit).await?).collect();
    for handle in sessions.values() {
        // Its connection may have changed hands since.
        let target = handle.cancel_target();
        handle.set_advisory_locks(target.is_some_and(|it| locking.contains(&it.key.pid)));
    }
    let changes = ask(&mut connected, CHANGES, &[], limit).await?;
    if changes.first().and_then(|row| row.first()).is_some_and(|it| it.as_deref() == Some(b"true"))
    {
        // Without us it would not have to wait for anybody.
        server.databases = Databases::default();
        shared.lender.spare();
        server.connected = Some(connected);
        return Ok(());
    }
    // On standbys there are none.
    let leads =
        shared.standings().0.values().any(|standing| {
            standing.serving.as_ref().is_ok_and(|serving| *serving.name == *node.name)
        });
    if leads && shared.settings().failover.keep_sessions == KeepSessions::Clean {
        server.databases.sample(shared, node, sessions, &mut connected).await?;
    }
    server.connected = Some(connected);
    Ok(())
}

async fn ask(
    connected: &mut Connected,
    query: &str,
    values: &[Option<&[u8]>],
    limit: Duration,
) -> Result<Vec<Vec<Option<Bytes>>>, DialError> {
    let asked = tokio::time::timeout(limit, connected.query(query, values)).await;
    asked.map_err(|_| DialError::Timeout)?
}

fn pids(rows: Vec<Vec<Option<Bytes>>>) -> impl Iterator<Item = u32> {
    rows.into_iter().filter_map(|row| {
        let value = row.into_iter().next()??;
        std::str::from_utf8(&value).ok()?.parse().ok()
    })
}
