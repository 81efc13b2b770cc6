//! A group's leader tells the coordinator's what happens to it (`POST /citus`, Patroni's words), and
//! looks into the coordinator's `pg_dist_node` whether it was understood: that works with a Patroni
//! coordinator as well.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use kornak_cluster::{GroupId, Revision, discard};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::database::APPLICATION;
use crate::citus::desk::Standing;
use crate::citus::plan::Address;
use crate::citus::seen::{Leader, Seen};
use crate::context::Context;
use crate::guard::boottime_now;
use crate::ha::switchover::Busy;
use crate::postgres::{SqlError, ask, literal};

/// How long a coordinator may take over a notification that nobody is held for. Patroni's constant.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long clients may be held until every node has the new address. After that it is repaired while
/// they work.
const SYNC_LIMIT: Duration = Duration::from_secs(2);

/// Between two looks at the coordinator's rows.
const LOOK_PAUSE: Duration = Duration::from_millis(5);

/// The result of a request to make writes wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Paused {
    /// Writes wait, or there is nobody through whom they could come.
    Yes,
    /// Writes could not be made to wait in time; nothing has changed.
    No,
}

/// For the coordinator's answer to arrive: what it says is worth more than that it was late.
const ANSWER: Duration = Duration::from_millis(30);

fn seen(ctx: &Context) -> Seen {
    let view = std::sync::Arc::clone(&ctx.view.borrow());
    Seen::read(&ctx.settings.scope.whole(), &view)
}

pub(super) fn own_address(ctx: &Context) -> Address {
    let own = &ctx.settings.postgresql.connect_address;
    Address { host: own.host.clone(), port: own.port }
}

/// The coordinator's leader, if this node is a worker.
fn coordinator(ctx: &Context) -> Option<Leader> {
    ctx.settings.citus.as_ref()?;
    ctx.settings.scope.group.filter(|group| *group != GroupId::COORDINATOR)?;
    seen(ctx).coordinator().cloned()
}

fn event(ctx: &Context, kind: &str) -> Value {
    let config = ctx.cluster().config.unwrap_or_default();
    json!({
        "type": kind,
        "group": ctx.settings.scope.group.unwrap_or_default().0,
        "leader": ctx.name,
        "timeout": config.ttl.as_secs(),
        "cooldown": config.retry_timeout.as_secs(),
    })
}

/// Makes writes to this group that come through the coordinator wait, until [`unblock_writes`] or the next
/// primary's `announce`; nobody's transaction is ended for it. `hold`: clients are held no longer.
pub(crate) async fn block_writes(ctx: &Context, record: Revision, hold: Duration) -> Paused {
    let Some(leader) = coordinator(ctx) else { return Paused::Yes };
    let Some(api) = leader.api else { return Paused::Yes };
    let mut body = event(ctx, "before_demote");
    if let Some(body) = body.as_object_mut() {
        let hold_ms = u64::try_from(hold.saturating_sub(ANSWER).as_millis()).unwrap_or(u64::MAX);
        body.insert("kornak".to_owned(), json!({"hold_ms": hold_ms, "record": record}));
    }
    let began = boottime_now();
    match ctx.peers.post_json(&format!("{api}/citus"), &body, hold).await {
        Ok(answer) if answer.status == 200 => {
            let elapsed_ms = boottime_now().since(began).as_millis() as u64;
            info!(coordinator = %leader.name, elapsed_ms, "coordinator blocks writes to this group");
            Paused::Yes
        }
        Err(crate::peers::PeerError::Connect(error)) => {
            let error: &dyn std::error::Error = &error;
            warn!(coordinator = %leader.name, error, "coordinator could not be reached");
            Paused::Yes
        }
        Ok(answer) => {
            info!(coordinator = %leader.name, why = answer.text(), "coordinator refused to block writes");
            Paused::No
        }
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            warn!(coordinator = %leader.name, error, "coordinator did not answer in time");
            Paused::No
        }
    }
}

/// This node accepts writes (again). `true`: the coordinator says that it has registered it; Patroni's
/// says so in any case, and is not believed.
pub(crate) async fn unblock_writes(ctx: &Context) -> bool {
    let Some(leader) = coordinator(ctx) else { return false };
    let Some(api) = leader.api else { return false };
    let mut body = event(ctx, "after_promote");
    if let Some(body) = body.as_object_mut() {
        let patience = u64::try_from(PATIENCE.as_millis()).unwrap_or(u64::MAX);
        body.insert("kornak".to_owned(), json!({"hold_ms": patience}));
    }
    match ctx.peers.post_json(&format!("{api}/citus"), &body, PATIENCE).await {
        Ok(answer) if answer.status == 200 => return leader.kornak,
        Ok(answer) => {
            warn!(coordinator = %leader.name, status = answer.status, "coordinator was not told that this primary serves, it will see it in the store");
        }
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            warn!(coordinator = %leader.name, error, "coordinator was not told that this primary serves, it will see it in the store");
        }
    }
    false
}

/// Whether the coordinator, and then every node, knows this node as its group's primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Known {
    Nowhere,
    Coordinator,
    Everywhere,
}

/// Waits until this node is known at least so well in every database. `false`: not in time.
pub(crate) async fn until_known(ctx: &Context, wanted: Known) -> bool {
    let seen = seen(ctx);
    let ours = seen.coordinator().is_some_and(|leader| leader.kornak);
    let waiting = async {
        match (&ctx.citus, ctx.settings.scope.group) {
            // Who connects through a pool is seen on the nodes alone.
            _ if !ours || !seen.pools.is_empty() => until_rows_say(ctx, wanted).await,
            (Some(desk), Some(GroupId::COORDINATOR)) => {
                let mut standings = desk.standings.subscribe();
                let says = |now: &BTreeMap<String, Standing>| {
                    known_by(ctx, now, |it, group| (it.primaries.get(&group), it.behind.is_empty()))
                };
                // The sender lives as long as the agent.
                discard::sender_outlives_waiters(
                    standings.wait_for(|now| says(now) >= wanted).await,
                );
            }
            _ => {
                let mut view = ctx.view.clone();
                loop {
                    view.borrow_and_update();
                    let told = ctx.cluster().citus.unwrap_or_default();
                    let says = known_by(ctx, &told.databases, |it, group| {
                        (it.primaries.get(&group), it.behind.is_empty())
                    });
                    if says >= wanted || view.changed().await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    let known = tokio::time::timeout(SYNC_LIMIT, waiting).await.is_ok();
    if !known {
        warn!(wanted = ?wanted, "this primary is not registered in time, clients resume without it");
    }
    known
}

/// The property that all databases have in common: each has where a group's primary is, and whether
/// no node is behind.
fn known_by<T>(
    ctx: &Context,
    told: &BTreeMap<String, T>,
    of: impl Fn(&T, GroupId) -> (Option<&String>, bool),
) -> Known {
    let own = own_address(ctx).to_string();
    let group = ctx.settings.scope.group.unwrap_or_default();
    let databases = ctx.settings.citus.iter().flat_map(|citus| &citus.databases);
    let known = databases.map(|database| match told.get(database).map(|it| of(it, group)) {
        Some((Some(at), everywhere)) if *at == own => {
            if everywhere {
                Known::Everywhere
            } else {
                Known::Coordinator
            }
        }
        _ => Known::Nowhere,
    });
    known.min().unwrap_or(Known::Everywhere)
}

/// A coordinator of Patroni's tells nobody: its rows are looked at.
async fn until_rows_say(ctx: &Context, wanted: Known) {
    let mut open = Open::new();
    loop {
        match known(ctx, &mut open).await {
            Ok(found) if found >= wanted => return,
            Ok(_) => tokio::time::sleep(LOOK_PAUSE).await,
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "registration unknown");
                open.clear();
                tokio::time::sleep(LOOK_PAUSE * 10).await;
            }
        }
    }
}

/// Connections of one wait, by database: to the coordinator (`None`), and to other groups' primaries.
type Open = BTreeMap<(Option<Address>, String), tokio_postgres::Client>;

/// One look at every database.
async fn known(ctx: &Context, open: &mut Open) -> Result<Known, SqlError> {
    let Some(citus) = &ctx.settings.citus else { return Ok(Known::Everywhere) };
    let own = own_address(ctx);
    let group = ctx.settings.scope.group.unwrap_or_default();
    let mut least = Known::Everywhere;
    for database in &citus.databases {
        let statement = format!(
            "SELECT bool_or(groupid = {group} AND nodename = {} AND nodeport = {})::int, \
               bool_and(NOT hasmetadata OR metadatasynced)::int \
             FROM pg_catalog.pg_dist_node WHERE noderole = 'primary'",
            literal(&own.host),
            own.port
        );
        let row = row_of(ctx, open, None, database, &statement).await?;
        let (registered, synced) = (is_true(&row, 0), is_true(&row, 1));
        let known = if registered {
            match pools_follow(ctx, open, database, &own).await? {
                Known::Everywhere if !synced => Known::Coordinator,
                known => known,
            }
        } else {
            Known::Nowhere
        };
        least = least.min(known);
    }
    Ok(least)
}

/// Whose primaries reach this one through its own pool, if there are any pools: a connection through the
/// former primary's would be refused, or stay.
async fn pools_follow(
    ctx: &Context,
    open: &mut Open,
    database: &str,
    own: &Address,
) -> Result<Known, SqlError> {
    let seen = seen(ctx);
    if seen.pools.is_empty() {
        return Ok(Known::Everywhere);
    }
    let pool = seen.pools.get(own).map_or("NULL".to_owned(), |pool| literal(pool));
    let group = ctx.settings.scope.group.unwrap_or_default();
    let statement = format!(
        "SELECT (NOT EXISTS (SELECT FROM pg_catalog.pg_dist_node n \
             LEFT JOIN pg_catalog.pg_dist_poolinfo p USING (nodeid) \
             WHERE n.groupid = {group} AND n.noderole = 'primary' \
               AND p.poolinfo IS DISTINCT FROM {pool}))::int"
    );
    for (other, at) in pools_kept_by(&seen, group, own) {
        let row = row_of(ctx, open, Some(at), database, &statement).await?;
        if !is_true(&row, 0) {
            let is_coordinator = other == GroupId::COORDINATOR;
            return Ok(if is_coordinator { Known::Nowhere } else { Known::Coordinator });
        }
    }
    Ok(Known::Everywhere)
}

/// Primaries whose agents write `pg_dist_poolinfo`, the coordinator's first. Among them is the one that
/// has just been promoted: its table is its predecessor's, and sessions on a worker reach the worker's own
/// shards through it.
fn pools_kept_by(seen: &Seen, group: GroupId, own: &Address) -> Vec<(GroupId, Address)> {
    let kept = seen.leaders.iter().filter(|(other, leader)| leader.kornak && **other != group);
    let others = kept.filter_map(|(other, _)| {
        Some((*other, seen.wanted.get(other).and_then(|want| want.primary.clone())?))
    });
    let mut found: Vec<_> = others.chain([(group, own.clone())]).collect();
    found.sort();
    found
}

/// The first row that a server answers with; empty if there is none.
async fn row_of(
    ctx: &Context,
    open: &mut Open,
    at: Option<Address>,
    database: &str,
    statement: &str,
) -> Result<Vec<Option<String>>, SqlError> {
    let client = match open.entry((at.clone(), database.to_owned())) {
        Entry::Occupied(client) => client.into_mut(),
        Entry::Vacant(none) => none.insert(match at {
            None => to_coordinator(ctx, database).await?,
            Some(at) => ctx.postgres.connect_to(&at.host, at.port, database, APPLICATION).await?,
        }),
    };
    let rows = ask(client, "tell who is registered", statement).await?;
    Ok(rows.into_iter().next().unwrap_or_default())
}

/// Whether a truth value that was cast to a number is true; absent and NULL are not.
fn is_true(row: &[Option<String>], column: usize) -> bool {
    row.get(column).and_then(Option::as_deref) == Some("1")
}

async fn to_coordinator(ctx: &Context, database: &str) -> Result<tokio_postgres::Client, SqlError> {
    if ctx.settings.scope.group == Some(GroupId::COORDINATOR) {
        return ctx.postgres.connect_to_database(database, APPLICATION).await;
    }
    let at = seen(ctx).coordinator().and_then(|leader| leader.address.clone());
    let Some(at) = at else { return Err(SqlError::Refused) };
    ctx.postgres.connect_to(&at.host, at.port, database, APPLICATION).await
}

/// The sessions that work on the primaries of other groups: their transactions may reach this one, and a drain waits
/// for them. A server that gives no answer is left out.
async fn busy_elsewhere(ctx: &Context) -> Busy {
    let Some(citus) = &ctx.settings.citus else { return Busy::default() };
    let own = ctx.settings.scope.group;
    let others: Vec<Address> = seen(ctx)
        .wanted
        .into_iter()
        .filter(|(group, _)| Some(*group) != own)
        .filter_map(|(_, want)| want.primary)
        .collect();
    let database = citus.first_database();
    let statement = "SELECT count(*), coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0) \
        * 1000 FROM pg_stat_activity WHERE backend_type = 'client backend' \
        AND pid <> pg_backend_pid() AND state IS DISTINCT FROM 'idle' \
        AND application_name NOT LIKE 'Kornak %'";
    let asked = others.iter().map(|at| async move {
        let client = ctx.postgres.connect_to(&at.host, at.port, database, APPLICATION).await?;
        ask(&client, "tell who works", statement).await
    });
    let mut busy = Busy::default();
    for rows in futures_util::future::join_all(asked).await.into_iter().flatten() {
        let number = |n: usize| -> f64 {
            let text = rows.first().and_then(|row| row.get(n).cloned().flatten());
            text.and_then(|text| text.parse().ok()).unwrap_or_default()
        };
        busy.backends = busy.backends.saturating_add(number(0) as u32);
        busy.oldest = busy.oldest.max(Duration::from_millis(number(1).max(0.0) as u64));
    }
    busy
}

/// The sessions that work on any server that a handover of this one concerns: in a Citus cluster a
/// transaction that began on another node may come here, and every session is held.
pub(crate) async fn busy_anywhere(ctx: &Context) -> Busy {
    let (here, there) = tokio::join!(ctx.busy(), busy_elsewhere(ctx));
    Busy {
        backends: here.backends.saturating_add(there.backends),
        oldest: here.oldest.max(there.oldest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::citus::plan::Group;

    #[test]
    fn pools_are_looked_at_where_kornak_keeps_them_the_new_primary_among_them() {
        let at = |host: &str| Address { host: host.to_owned(), port: 5432 };
        let mut seen = Seen::default();
        for (group, host, kornak) in
            [(0, "c", true), (1, "former", true), (2, "x", true), (3, "p", false)]
        {
            let leader =
                Leader { name: host.to_owned(), address: Some(at(host)), api: None, kornak };
            seen.leaders.insert(GroupId(group), leader);
            let primary = Some(at(host));
            seen.wanted.insert(GroupId(group), Group { primary, ..Group::default() });
        }
        let found = |group, own: &str| -> Vec<(u32, String)> {
            let kept = pools_kept_by(&seen, GroupId(group), &at(own));
            kept.into_iter().map(|(group, at)| (group.0, at.host)).collect()
        };
        let named = |list: &[(u32, &str)]| -> Vec<(u32, String)> {
            list.iter().map(|(group, host)| (*group, (*host).to_owned())).collect()
        };
        assert_eq!(found(1, "new"), named(&[(0, "c"), (1, "new"), (2, "x")]));
        assert_eq!(found(0, "d"), named(&[(0, "d"), (1, "former"), (2, "x")]));
    }
}
