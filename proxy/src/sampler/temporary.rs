//! Temporary tables that functions made.
//!
//! Catalogs do not tell whose they are (before PostgreSQL 16 nothing does), so this looks in each
//! database whether there are others than a second ago, and if so has the sessions ask that did
//! something there since: each asks on its own connection, between two of its client's statements,
//! as before a switchover ([`crate::client`]). Where nobody makes temporary tables this costs one
//! query a second and database.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use kornak_cluster::Node;

use super::{Sessions, ask, pids};
use crate::backend::{Address, Connected, DialError};
use crate::client::examine::MARK;
use crate::registry::Flags;
use crate::shared::Shared;

/// Databases of one server that are looked at, each over a connection of its own: a server takes a
/// hundred if nobody has raised `max_connections`.
const MAX_DATABASES: usize = 8;

/// In which databases these processes are.
const DATABASES: &str = "SELECT DISTINCT datname::text FROM pg_catalog.pg_stat_activity \
    WHERE pid = ANY($1::int[]) AND datname IS NOT NULL";

/// Every temporary relation of a database. By what depends on its schemas, for which there is an
/// index; more than that many are as good as all of them, to see that there are others.
const RELATIONS: &str = "SELECT d.objid::text FROM pg_catalog.pg_namespace n \
    JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_namespace'::regclass \
     AND d.refobjid = n.oid AND d.classid = 'pg_catalog.pg_class'::regclass \
    WHERE n.nspname LIKE 'pg\\_temp\\_%' LIMIT 10000";

/// Which of these processes are in the database.
const ALL: &str = "SELECT pid::text FROM pg_catalog.pg_stat_activity \
    WHERE pid = ANY($1::int[]) AND datname = pg_catalog.current_database()";

/// Which of them may have made one since the last look, with room for a late one: not those that have
/// asked since. Who may not see the states of others takes them all.
fn active() -> String {
    format!(
        "{ALL} AND (state IS DISTINCT FROM 'idle' \
                    OR state_change > pg_catalog.clock_timestamp() - interval '5 seconds' \
                       AND pg_catalog.starts_with(query, '{}') IS NOT TRUE)",
        MARK.trim_end(),
    )
}

/// The databases of one server.
#[derive(Default)]
pub(super) struct Databases(BTreeMap<String, Database>);

struct Database {
    connected: Connected,
    /// The relations of the last look; `None` before the first.
    seen: Option<HashSet<Bytes>>,
}

impl Databases {
    /// Looks at each, and has sessions ask.
    pub(super) async fn sample(
        &mut self,
        shared: &Shared,
        node: &Node,
        sessions: &Sessions,
        main: &mut Connected,
    ) -> Result<(), DialError> {
        let limit = shared.settings.limits.connect_timeout;
        let list = array(sessions.keys());
        let rows = ask(main, DATABASES, &[Some(list.as_bytes())], limit).await?;
        let name =
            |row: Vec<Option<Bytes>>| String::from_utf8(row.into_iter().next()??.into()).ok();
        let mut names: Vec<String> = rows.into_iter().filter_map(name).collect();
        names.sort_unstable();
        names.truncate(MAX_DATABASES);
        self.0.retain(|known, _| names.contains(known));
        for name in names {
            // Given back when it has answered.
            let known = self.0.remove(&name);
            match look(shared, node, sessions, &name, known).await {
                Ok(database) => drop(self.0.insert(name, database)),
                Err(error) => tracing::debug!(
                    database = name,
                    error = &error as &dyn std::error::Error,
                    "temporary tables cannot be asked for"
                ),
            }
        }
        Ok(())
    }
}

async fn look(
    shared: &Shared,
    node: &Node,
    sessions: &Sessions,
    name: &str,
    known: Option<Database>,
) -> Result<Database, DialError> {
    let limit = shared.settings.limits.connect_timeout;
    let mut database = match known {
        Some(database) => database,
        None => {
            let connected = shared.prober.connect_to(&Address::from(node), name, limit).await?;
            Database { connected, seen: None }
        }
    };
    let rows = ask(&mut database.connected, RELATIONS, &[], limit).await?;
    let found: HashSet<Bytes> =
        rows.into_iter().filter_map(|row| row.into_iter().next()?).collect();
    let query = match &database.seen {
        Some(seen) if *seen == found => return Ok(database),
        None if found.is_empty() => None,
        None => Some(ALL.to_owned()),
        Some(_) => Some(active()),
    };
    if let Some(query) = query {
        let list = array(sessions.keys());
        let rows = ask(&mut database.connected, &query, &[Some(list.as_bytes())], limit).await?;
        for handle in pids(rows).filter_map(|pid| sessions.get(&pid)) {
            handle.raise(Flags::EXAMINE);
        }
    }
    database.seen = Some(found);
    Ok(database)
}

/// As PostgreSQL writes an array of numbers.
fn array<'a>(pids: impl Iterator<Item = &'a u32>) -> String {
    let numbers: Vec<String> = pids.map(u32::to_string).collect();
    format!("{{{}}}", numbers.join(","))
}
