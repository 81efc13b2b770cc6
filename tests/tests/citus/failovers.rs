//! Failovers without warning under load: connections survive, what was in flight may fail, and
//! whatever begins later waits until the group has a primary that the coordinator knows.

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Doing, Problem, Report};
use kornak_tests::run::citus::{CitusCluster, CitusSpec};
use kornak_tests::run::lan::on_a_lan;
use kornak_tests::run::postgres::{connect, describe};
use kornak_tests::run::wait::{strict_timing, until};

use tokio_postgres::Client;

use super::{Loads, SOON, distribute, needs_citus};

/// The fault of a primary.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// `kill -9` of its postmaster.
    Postmaster,
    /// Every process of the host ends at once, and comes back when the test says so.
    Host,
    /// The host says nothing any more, and comes back when the test says so.
    Power,
    /// Every process of the host stands still, and its kernel goes on answering for them.
    Frozen,
}

/// After so long the proxy knows that a primary has died: what begins later has to wait. One that says
/// nothing is lost after three seconds.
fn notice(blow: Blow) -> Duration {
    let room = Duration::from_millis(if strict_timing() { 100 } else { 1000 });
    match blow {
        Blow::Postmaster | Blow::Host => room,
        Blow::Frozen | Blow::Power => Duration::from_secs(3) + 2 * room,
    }
}

/// The promise is a second; a busy machine may take longer. Those who wait for a silent server are given
/// some seconds to end.
fn registration_limit(blow: Blow) -> Duration {
    let limit = Duration::from_secs(if strict_timing() { 1 } else { 5 });
    if matches!(blow, Blow::Frozen) { limit + Duration::from_secs(5) } else { limit }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_postmaster_is_killed_costs_only_what_was_in_flight() -> Result<()> {
    needs_citus!();
    strike("citus-worker", 1, Blow::Postmaster).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_whose_postmaster_is_killed_costs_only_what_was_in_flight() -> Result<()> {
    needs_citus!();
    strike("citus-coordinator", 0, Blow::Postmaster).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_host_is_lost_costs_only_what_was_in_flight() -> Result<()> {
    needs_citus!();
    strike("citus-host", 2, Blow::Host).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_host_stands_still_is_replaced_in_the_metadata_too() -> Result<()> {
    needs_citus!();
    strike("citus-frozen", 2, Blow::Frozen).await
}

#[test]
fn a_worker_whose_host_loses_its_power_costs_only_what_was_in_flight() -> Result<()> {
    needs_citus!();
    let name = "failovers::a_worker_whose_host_loses_its_power_costs_only_what_was_in_flight";
    on_a_lan(name, async |lan| {
        let spec = CitusSpec { name: "citus-power", lan: Some(lan), ..CitusSpec::default() };
        strike_in(CitusCluster::start(spec).await?, 2, Blow::Power).await
    })
}

#[test]
fn a_coordinator_whose_host_loses_its_power_costs_only_what_was_in_flight() -> Result<()> {
    needs_citus!();
    let name = "failovers::a_coordinator_whose_host_loses_its_power_costs_only_what_was_in_flight";
    on_a_lan(name, async |lan| {
        let spec = CitusSpec { name: "citus-dark", lan: Some(lan), ..CitusSpec::default() };
        strike_in(CitusCluster::start(spec).await?, 0, Blow::Power).await
    })
}

async fn strike(name: &'static str, group: u32, blow: Blow) -> Result<()> {
    let spec = CitusSpec { name, ..CitusSpec::default() };
    strike_in(CitusCluster::start(spec).await?, group, blow).await
}

async fn strike_in(mut cluster: CitusCluster, group: u32, blow: Blow) -> Result<()> {
    let loads = Loads::start(&cluster).await?;
    let leader = cluster.leader(group).await?;
    let (began, at) = (Instant::now(), loads.elapsed());
    match blow {
        Blow::Postmaster => cluster.node(&leader)?.kill_postmaster()?,
        Blow::Host => cluster.node_mut(&leader)?.kill_all(),
        Blow::Power => cluster.node_mut(&leader)?.lose_power()?,
        Blow::Frozen => cluster.node(&leader)?.freeze_all()?,
    }
    let (led, registered) = succession(&cluster, group, &leader).await;
    println!(
        "group {group}, {blow:?} of {leader} at {:.1?}: led after {led:.2?}, registered \
         {registered:.2?} later",
        at[0]
    );
    if matches!(blow, Blow::Frozen | Blow::Power) {
        newcomers_work(&cluster).await;
        println!("who comes anew works after {:.2?}", began.elapsed());
    }
    if matches!(blow, Blow::Frozen) {
        // What is in flight there ends with the host and not before.
        cluster.node_mut(&leader)?.kill_all();
    }
    loads.flow(10).await;
    println!("everybody works after {:.2?}", began.elapsed());
    if matches!(blow, Blow::Host | Blow::Frozen) {
        cluster.node_mut(&leader)?.start_agent()?;
    }
    if matches!(blow, Blow::Power) {
        nothing_is_left_of(&cluster, &leader).await?;
        println!("the others have ended its sessions after {:.2?}", began.elapsed());
        cluster.node_mut(&leader)?.get_power()?;
    }
    cluster.healthy(SOON).await;
    loads.flow(5).await;
    if matches!(blow, Blow::Frozen) {
        cluster.nothing_prepared(SOON).await;
    }
    let reports = loads.stop(&cluster).await?;
    for (report, at) in reports.iter().zip(at) {
        only_units_in_flight_failed(report, at, blow);
    }
    assert!(registered < registration_limit(blow), "registered after {registered:?}");
    cluster.nothing_prepared(SOON).await;
    cluster.passed();
    Ok(())
}

/// A transaction of two groups that is committed on the one where it began, whose other half is prepared:
/// what Citus leaves, and has acknowledged, when a worker is lost before the second phase.
async fn half_committed(
    cluster: &CitusCluster,
    origin: u32,
    prepared_on: u32,
    id: i64,
    number: i64,
) -> Result<()> {
    let on = async |group: u32| -> Result<Client> {
        let port = cluster.node(&cluster.leader(group).await?)?.port();
        Ok(connect(&CitusCluster::superuser_on(port, "citus")).await?)
    };
    let shard = "SELECT 'kornak_load_' || \
        get_shard_id_for_distribution_column('kornak_load', $1::bigint)";
    let shard: String = on(0).await?.query_one(shard, &[&id]).await?.get(0);
    let name = format!("citus_{origin}_999_{number}_{id}");
    let half = format!("BEGIN; INSERT INTO {shard} VALUES ({id}, 0); PREPARE TRANSACTION '{name}'");
    let record =
        format!("INSERT INTO pg_dist_transaction (groupid, gid) VALUES ({prepared_on}, '{name}')");
    // Nobody looks for what is left between the two halves: without its record the one that is prepared would be rolled back.
    let mut origin = on(origin).await?;
    let origin = origin.transaction().await?;
    origin.batch_execute("LOCK TABLE pg_dist_transaction IN ACCESS EXCLUSIVE MODE").await?;
    on(prepared_on).await?.batch_execute(&half).await?;
    origin.batch_execute(&record).await?;
    Ok(origin.commit().await?)
}

/// An id whose shard a group has.
async fn id_on(cluster: &CitusCluster, group: u32, from: i64) -> Result<i64> {
    let query = "SELECT min(n) FROM generate_series($2::bigint, $2 + 200) n JOIN pg_dist_placement p \
        ON p.shardid = get_shard_id_for_distribution_column('kornak_load', n) WHERE p.groupid = $1";
    let group = i32::try_from(group)?;
    Ok(cluster.coordinator("citus").await?.query_one(query, &[&group, &from]).await?.get(0))
}

/// Checks that a client that waits in a failover sees what was acknowledged before it, wherever
/// that was begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_before_a_failover_is_seen_after_it() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-halves", ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    distribute(&cluster).await?;
    let readers = [connect(&cluster.app()).await?, connect(&cluster.app_on_workers()).await?];
    for round in 0..3_i64 {
        let first = id_on(&cluster, 1, 1_000 * (round + 1)).await?;
        let second = id_on(&cluster, 1, first + 1).await?;
        half_committed(&cluster, 0, 1, first, i64::MAX).await?;
        half_committed(&cluster, 2, 1, second, i64::MAX).await?;
        let leader = cluster.leader(1).await?;
        cluster.node(&leader)?.kill_postmaster()?;
        let began = Instant::now();
        until(SOON, "the proxy knows of it", || async {
            let status = cluster.proxy.status().get("/status").await;
            let status = status.map_err(|error| format!("{error:#}"))?.text;
            if status.contains("\"without_primary\":[1]") { Ok(()) } else { Err(status) }
        })
        .await;
        for reader in &readers {
            let query = "SELECT count(*) FROM kornak_load WHERE id = ANY ($1)";
            let seen: i64 = reader.query_one(query, &[&vec![first, second]]).await?.get(0);
            println!("{seen} of 2 seen {:.2?} after the blow", began.elapsed());
            assert_eq!(seen, 2, "what was acknowledged is not seen");
        }
        cluster.healthy(SOON).await;
        cluster.nothing_prepared(SOON).await;
    }
    cluster.passed();
    Ok(())
}

/// Citus leaves alone what a session that still lives has prepared; when that ends, somebody has to come
/// back to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_session_keeps_prepared_is_ended_soon_after_it() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-kept", ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    distribute(&cluster).await?;
    let id = id_on(&cluster, 2, 1).await?;
    let mut session = cluster.coordinator("citus").await?;
    let session = session.transaction().await?;
    let other = id_on(&cluster, 1, 1).await?;
    session.execute("INSERT INTO kornak_load VALUES ($1, 0)", &[&other]).await?;
    let number = "SELECT transaction_number FROM get_current_transaction_id()";
    let number = session.query_one(number, &[]).await?.get(0);
    half_committed(&cluster, 0, 2, id, number).await?;
    let leader = cluster.leader(2).await?;
    cluster.node(&leader)?.kill_postmaster()?;
    cluster.healthy(SOON).await;
    let port = cluster.node(&cluster.leader(2).await?)?.port();
    let worker = connect(&CitusCluster::superuser_on(port, "citus")).await?;
    let left = "SELECT count(*) FROM pg_prepared_xacts WHERE gid LIKE 'citus_0_999_%'";
    // Longer than agents take to believe that nothing is left.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(4) {
        assert_eq!(worker.query_one(left, &[]).await?.get::<_, i64>(0), 1, "its session lives");
    }
    session.rollback().await?;
    let ended = Instant::now();
    cluster.nothing_prepared(Duration::from_secs(5)).await;
    println!("ended {:.2?} after its session", ended.elapsed());
    let reader = connect(&cluster.app()).await?;
    let seen = reader.query_one("SELECT count(*) FROM kornak_load WHERE id = $1", &[&id]).await?;
    assert_eq!(seen.get::<_, i64>(0), 1);
    cluster.passed();
    Ok(())
}

/// Waits until a new session writes through the coordinator and through a worker, to every group.
async fn newcomers_work(cluster: &CitusCluster) {
    until(SOON, "new sessions work", || async {
        for login in [cluster.app(), cluster.app_on_workers()] {
            let client = connect(&login).await.map_err(|error| describe(&error))?;
            for id in 1..=20_i64 {
                let write = "INSERT INTO kornak_load VALUES ($1, 0) ON CONFLICT DO NOTHING";
                let wrote = async { client.execute(write, &[&id]).await };
                match tokio::time::timeout(Duration::from_secs(20), wrote).await {
                    Ok(wrote) => wrote.map(drop).map_err(|error| describe(&error))?,
                    Err(_) => return Err(format!("row {id} has to wait")),
                }
            }
        }
        Ok(())
    })
    .await;
}

/// Waits until no server has a session that a lost node had opened, with the locks that it holds.
async fn nothing_is_left_of(cluster: &CitusCluster, lost: &str) -> Result<()> {
    let address: std::net::IpAddr = cluster.node(lost)?.address().parse()?;
    let left = "SELECT count(*) FROM pg_stat_activity WHERE client_addr = $1 \
                AND backend_type = 'client backend'";
    for node in cluster.nodes().filter(|node| node.name() != lost) {
        let client = node.connect().await?;
        until(SOON, "the sessions of the lost node end", || async {
            let row = client.query_one(left, &[&address]).await;
            let count: i64 = row.map_err(|error| describe(&error))?.get(0);
            if count == 0 { Ok(()) } else { Err(format!("{count} on {}", node.name())) }
        })
        .await;
    }
    Ok(())
}

/// How long it took until somebody else led, and then until the coordinator had its address.
async fn succession(cluster: &CitusCluster, group: u32, former: &str) -> (Duration, Duration) {
    let began = Instant::now();
    let text = |error: anyhow::Error| format!("{error:#}");
    let port = until(SOON, "another member leads", || async {
        let leader = cluster.leader(group).await.map_err(text)?;
        if leader == former {
            return Err(format!("{leader} does"));
        }
        cluster.node(&leader).map(|node| i32::from(node.port())).map_err(text)
    })
    .await;
    let (led, since) = (began.elapsed(), Instant::now());
    until(SOON, "the coordinator knows it", || async {
        let coordinator = cluster.leader(0).await.map_err(text)?;
        let coordinator = cluster.node(&coordinator).map_err(text)?.port();
        let rows = cluster.registered(coordinator, "citus").await.map_err(text)?;
        let group = i32::try_from(group).unwrap_or_default();
        let row = (group, "primary".to_owned(), port);
        if rows.contains(&row) { Ok(()) } else { Err(format!("{rows:?}")) }
    })
    .await;
    (led, since.elapsed())
}

/// Nothing failed but units that had begun before the blow could be known, one for each client; no
/// connection was lost, but of those that waited for a silent server, and nobody waited in vain.
fn only_units_in_flight_failed(report: &Report, blow: Duration, kind: Blow) {
    let notice = notice(kind);
    let most = if strict_timing() { 1 } else { 2 };
    let ended = |problem: &Problem| {
        matches!(kind, Blow::Frozen | Blow::Power) && problem.sqlstate.as_deref() == Some("57P01")
    };
    let lost = report.problems().filter(|(_, it)| it.lost_connection && !ended(it)).count();
    // A silent server's end is what acknowledges some transactions, half a second before all of each is
    // seen.
    let stale = if matches!(kind, Blow::Frozen) { 0 } else { report.stale_reads() };
    assert_eq!((lost, stale), (0, 0), "{report}");
    for (client, problem) in report.problems() {
        let (number, kind) = (client.number, client.kind);
        let (began, doing) = (problem.began, problem.doing);
        let failed = client.problems.len() + client.further_problems;
        assert!(failed <= most, "client {number} ({kind}) failed {failed} times");
        assert!(
            began <= blow + notice && problem.at >= blow,
            "client {number} ({kind}) began at {began:.2?}, the blow was at {blow:.2?}: {}",
            problem.message
        );
        let waits = matches!(doing, Doing::Nothing | Doing::Connect | Doing::Waiting);
        assert!(!waits, "client {number} ({kind}) in {doing:?}: {}", problem.message);
    }
}
