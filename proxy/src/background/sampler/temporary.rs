//! Temporary tables that functions made.
//!
//! Catalogs do not tell whose they are (before PostgreSQL 16 nothing does), so this looks in each
//! database whether there are others than a second ago, and if so has the sessions ask that did
//! something there since: each asks on its own connection, between two of its client's statements,
//! as before a switchover ([`crate::clients::client`]). Where nobody makes temporary tables this costs one
//! query a second and database.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kornak_cluster::Node;

use super::{Sessions, ask, pids};
use crate::clients::client::examine::MARK;
use crate::net::backend::{Address, Connected, DialError};
use crate::registry::Flags;
use crate::shared::Shared;

/// Databases of one server to which a connection is kept: a server takes a hundred if nobody has raised
/// `max_connections`. Of the others one is looked at each time, over a connection for that look.
const MAX_KEPT: usize = 8;

/// How much longer ago than the last look something may have been done: a statement that ended while
/// that look was on its way.
const ROOM: Duration = Duration::from_secs(4);

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

/// Which of them may have made one in that time: not those that have asked since. Who may not see the
/// states of others takes them all.
fn active(within: Duration) -> String {
    format!(
        "{ALL} AND (state IS DISTINCT FROM 'idle' \
                    OR state_change > pg_catalog.clock_timestamp() - interval '{} seconds' \
                       AND pg_catalog.starts_with(query, '{}') IS NOT TRUE)",
        within.as_secs() + 1,
        MARK.trim_end(),
    )
}

/// The databases of one server.
#[derive(Default)]
pub(super) struct Databases(BTreeMap<String, Database>);

#[derive(Default)]
struct Database {
    connected: Option<Connected>,
    /// When it was looked at, if it was, and its relations then.
    last: Option<(Instant, HashSet<Bytes>)>,
    /// When a look was tried.
    tried: Option<Instant>,
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
        let limit = shared.settings().limits.connect_timeout;
        let list = array(sessions.keys());
        let rows = ask(main, DATABASES, &[Some(list.as_bytes())], limit).await?;
        let name =
            |row: Vec<Option<Bytes>>| String::from_utf8(row.into_iter().next()??.into()).ok();
        let mut names: Vec<String> = rows.into_iter().filter_map(name).collect();
        names.sort_unstable();
        self.0.retain(|known, _| names.contains(known));
        for name in &names {
            self.0.entry(name.clone()).or_default();
        }
        for name in self.due() {
            let Some(database) = self.0.get_mut(&name) else { continue };
            if let Err(error) = look(shared, node, sessions, &name, database).await {
                tracing::debug!(
                    database = name,
                    error = &error as &dyn std::error::Error,
                    "temporary tables of sessions could not be asked for"
                );
            }
        }
        let kept = self.0.values_mut().filter(|it| it.connected.is_some());
        kept.skip(MAX_KEPT).for_each(|it| it.connected = None);
        Ok(())
    }

    /// Databases with a connection, others as long as there is room for one, and the one that waits
    /// longest.
    fn due(&self) -> Vec<String> {
        let (open, mut closed): (Vec<_>, Vec<_>) =
            self.0.iter().partition(|(_, it)| it.connected.is_some());
        closed.sort_by_key(|(_, it)| it.tried);
        let room = MAX_KEPT.saturating_sub(open.len()).max(1);
        let names = open.into_iter().chain(closed.into_iter().take(room));
        names.map(|(name, _)| name.clone()).collect()
    }
}

async fn look(
    shared: &Shared,
    node: &Node,
    sessions: &Sessions,
    name: &str,
    database: &mut Database,
) -> Result<(), DialError> {
    let limit = shared.settings().limits.connect_timeout;
    let now = Instant::now();
    database.tried = Some(now);
    // Given back when it has answered.
    let mut connected = match database.connected.take() {
        Some(connected) => connected,
        None => shared.prober.connect_to(&Address::from(node), name, limit).await?,
    };
    let rows = ask(&mut connected, RELATIONS, &[], limit).await?;
    let found: HashSet<Bytes> =
        rows.into_iter().filter_map(|row| row.into_iter().next()?).collect();
    let query = match &database.last {
        Some((_, seen)) if *seen == found => None,
        None if found.is_empty() => None,
        None => Some(ALL.to_owned()),
        Some((when, _)) => Some(active(now.duration_since(*when) + ROOM)),
    };
    if let Some(query) = query {
        let list = array(sessions.keys());
        let rows = ask(&mut connected, &query, &[Some(list.as_bytes())], limit).await?;
        for handle in pids(rows).filter_map(|pid| sessions.get(&pid)) {
            handle.raise(Flags::EXAMINE);
        }
    }
    database.last = Some((now, found));
    database.connected = Some(connected);
    Ok(())
}

/// As PostgreSQL writes an array of numbers.
fn array<'a>(pids: impl Iterator<Item = &'a u32>) -> String {
    let numbers: Vec<String> = pids.map(u32::to_string).collect();
    format!("{{{}}}", numbers.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn databases_that_have_no_connection_are_looked_at_in_turn() {
        let mut databases = Databases::default();
        let began = Instant::now();
        for number in 0..11 {
            databases.0.entry(format!("d{number:02}")).or_default();
        }
        assert_eq!(databases.due().len(), MAX_KEPT, "there is room for so many");
        let seconds = |n: u64| Some(began + Duration::from_secs(n));
        for (number, database) in databases.0.values_mut().enumerate() {
            database.tried = seconds(number as u64);
        }
        // Nothing could be opened: those that were tried longest ago are next.
        databases.0.entry("d00".to_owned()).or_default().tried = seconds(20);
        let due = databases.due();
        assert_eq!((due.first().map(String::as_str), due.len()), (Some("d01"), MAX_KEPT));
        assert!(!due.contains(&"d00".to_owned()));
    }
}
