//! `pg_dist_poolinfo` of the server that this node leads: through which pool the others are reached.
//!
//! A task of its own: clients wait in a switchover until every node's table names the new primary's pool,
//! and whatever else a leader has to keep in order may wait for a server that is away.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::database::APPLICATION;
use crate::citus::plan::Address;
use crate::citus::seen::Seen;
use crate::context::Context;
use crate::postgres::{SqlError, ask, literal};

/// Rows may come by themselves, with the metadata of a node that was added.
const EVERY: Duration = Duration::from_secs(5);

/// After a failure.
const SOON: Duration = Duration::from_millis(500);

/// Works while this node leads its group, until `stop`.
pub(super) async fn run(ctx: Arc<Context>, databases: Vec<String>, stop: CancellationToken) {
    let scope = ctx.settings.scope.whole();
    let mut view = ctx.view.clone();
    let mut observed = ctx.observation.clone();
    let mut done: Option<Due> = None;
    let mut complained: Option<String> = None;
    // What wakes this task every second must not put the next look off.
    let mut again = Instant::now() + EVERY;
    let mut rest_until = None;
    loop {
        let seen = Seen::read(&scope, &view.borrow_and_update().clone());
        observed.borrow_and_update();
        let due = due(&seen).filter(|_| ctx.leads_primary());
        let rests = rest_until.is_some_and(|until| Instant::now() < until);
        if due.is_some() && due != done && !rests {
            match write(&ctx, &databases, due.as_ref()).await {
                Ok(()) => {
                    complained = None;
                    done = due;
                    again = Instant::now() + EVERY;
                    // What the store says may have changed meanwhile.
                    continue;
                }
                Err(error) => {
                    let text = error.to_string();
                    if complained.as_ref() != Some(&text) {
                        let error: &dyn std::error::Error = &error;
                        warn!(error, "pg_dist_poolinfo could not be updated");
                        complained = Some(text);
                    }
                    again = Instant::now() + SOON;
                    rest_until = Some(again);
                }
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            _ = view.changed() => {}
            _ = observed.changed() => {}
            () = tokio::time::sleep_until(again) => {
                done = None;
                again = Instant::now() + EVERY;
            }
        }
    }
}

/// The statement to run, with the facts that make it due again when one of them changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Due {
    statement: String,
    primaries: Vec<Option<Address>>,
    switches: bool,
}

/// `None`: no member has a pool, the table is the operator's.
fn due(seen: &Seen) -> Option<Due> {
    Some(Due {
        statement: statement(seen)?,
        primaries: seen.wanted.values().map(|want| want.primary.clone()).collect(),
        switches: seen.handover.is_some(),
    })
}

async fn write(ctx: &Context, databases: &[String], due: Option<&Due>) -> Result<(), SqlError> {
    let Some(due) = due else { return Ok(()) };
    for database in databases {
        let client = ctx.postgres.connect_to_database(database, APPLICATION).await?;
        let rows = ask(&client, "write pg_dist_poolinfo", &due.statement).await?;
        let changed = rows.first().and_then(|row| row.first().cloned().flatten());
        if let Some(rows) = changed.filter(|count| count != "0") {
            info!(database = %database, rows = %rows, "pg_dist_poolinfo changed");
        }
    }
    Ok(())
}

/// `pg_dist_poolinfo` has a row for each node whose member has a pool, and no other; the table is the
/// operator's while no member has one.
///
/// A primary's row follows the leader key, also while the row still has the former leader's address:
/// whoever connected to the new address through the old pool would keep that connection.
pub(super) fn statement(seen: &Seen) -> Option<String> {
    if seen.pools.is_empty() {
        return None;
    }
    let led = |address: &Address| {
        let mut leaders = seen.leaders.iter();
        leaders.find(|(_, it)| it.address.as_ref() == Some(address)).map(|(group, _)| *group)
    };
    let values: Vec<String> = seen
        .pools
        .iter()
        .map(|(at, pool)| {
            let leads = led(at).map_or("NULL".to_owned(), |group| group.to_string());
            format!("({}, {}, {}, {leads}::int)", literal(&at.host), at.port, literal(pool))
        })
        .collect();
    let known = seen.leaders.iter().filter(|(_, leader)| leader.address.is_some());
    let known: Vec<String> = known.map(|(group, _)| group.to_string()).collect();
    Some(format!(
        "WITH wanted AS (SELECT n.nodeid, v.pool FROM pg_catalog.pg_dist_node n \
           JOIN (VALUES {values}) AS v (host, port, pool, leads) \
             ON CASE WHEN n.noderole = 'primary' AND n.groupid = ANY ('{{{known}}}'::int[]) \
               THEN v.leads = n.groupid ELSE v.host = n.nodename AND v.port = n.nodeport END), \
         gone AS (DELETE FROM pg_catalog.pg_dist_poolinfo p \
           WHERE NOT EXISTS (SELECT FROM wanted w WHERE w.nodeid = p.nodeid) RETURNING 1), \
         changed AS (INSERT INTO pg_catalog.pg_dist_poolinfo (nodeid, poolinfo) \
           SELECT nodeid, pool FROM wanted \
           ON CONFLICT (nodeid) DO UPDATE SET poolinfo = EXCLUDED.poolinfo \
           WHERE pg_dist_poolinfo.poolinfo <> EXCLUDED.poolinfo RETURNING 1) \
         SELECT (SELECT count(*) FROM gone) + (SELECT count(*) FROM changed)",
        values = values.join(", "),
        known = known.join(","),
    ))
}

#[cfg(test)]
mod tests {
    use kornak_cluster::GroupId;

    use super::*;
    use crate::citus::plan::Group;
    use crate::citus::seen::Leader;

    fn at(host: &str) -> Address {
        Address { host: host.to_owned(), port: 5432 }
    }

    fn seen(leader: &str) -> Seen {
        let mut seen = Seen::default();
        let holder =
            Leader { name: leader.to_owned(), address: Some(at(leader)), api: None, kornak: true };
        seen.leaders.insert(GroupId(1), holder);
        seen.wanted.insert(GroupId(1), Group { primary: Some(at(leader)), ..Group::default() });
        seen
    }

    #[test]
    fn the_table_is_the_operators_while_no_member_has_a_pool() {
        assert_eq!(due(&seen("a")), None);
    }

    #[test]
    fn the_pool_is_written_again_as_soon_as_somebody_else_has_the_leader_key() {
        let with_pools = |leader: &str| {
            let mut seen = seen(leader);
            for host in ["a", "b"] {
                seen.pools.insert(at(host), format!("host={host} port=6432"));
            }
            seen
        };
        let before = due(&with_pools("a"));
        assert!(before.is_some());
        assert_eq!(due(&with_pools("a")), before);
        let mut claimed = with_pools("a");
        claimed.leaders.insert(GroupId(1), with_pools("b").leaders[&GroupId(1)].clone());
        let claimed = due(&claimed);
        assert_ne!(claimed, before, "before the new leader accepts writes");
        assert_ne!(due(&with_pools("b")), claimed, "and when its row has changed");
    }
}
