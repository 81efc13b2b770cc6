//! Failovers without warning under load: connections survive, what was in flight may fail, and
//! whatever begins later waits until the group has a primary that the coordinator knows.

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Doing, Problem, Report};
use kornak_tests::run::citus::{CitusCluster, CitusSpec};
use kornak_tests::run::postgres::{connect, describe};
use kornak_tests::run::wait::{strict_timing, until};

use super::{Loads, SOON, needs_citus};

/// What happens to a primary.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// `kill -9` of its postmaster.
    Postmaster,
    /// Every process of the host ends at once, and comes back when the test says so.
    Host,
    /// Every process of the host stands still, and its kernel goes on answering for them.
    Frozen,
}

/// After so long the proxy knows that a primary has died: what begins later has to wait. One that says
/// nothing is lost after three seconds.
fn notice(blow: Blow) -> Duration {
    let room = Duration::from_millis(if strict_timing() { 100 } else { 1000 });
    match blow {
        Blow::Postmaster | Blow::Host => room,
        Blow::Frozen => Duration::from_secs(3) + 2 * room,
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

async fn strike(name: &'static str, group: u32, blow: Blow) -> Result<()> {
    let mut cluster = CitusCluster::start(CitusSpec { name, ..CitusSpec::default() }).await?;
    let loads = Loads::start(&cluster).await?;
    let leader = cluster.leader(group).await?;
    let (began, at) = (Instant::now(), loads.elapsed());
    match blow {
        Blow::Postmaster => cluster.node(&leader)?.kill_postmaster()?,
        Blow::Host => cluster.node_mut(&leader)?.kill_all(),
        Blow::Frozen => cluster.node(&leader)?.freeze_all()?,
    }
    let (led, registered) = succession(&cluster, group, &leader).await;
    println!(
        "group {group}, {blow:?} of {leader} at {:.1?}: led after {led:.2?}, registered \
         {registered:.2?} later",
        at[0]
    );
    if matches!(blow, Blow::Frozen) {
        newcomers_work(&cluster).await;
        println!("who comes anew works after {:.2?}", began.elapsed());
        // What is in flight there ends with the host and not before.
        cluster.node_mut(&leader)?.kill_all();
    }
    loads.flow(10).await;
    println!("everybody works after {:.2?}", began.elapsed());
    if matches!(blow, Blow::Host | Blow::Frozen) {
        cluster.node_mut(&leader)?.start_agent()?;
    }
    cluster.healthy(SOON).await;
    loads.flow(5).await;
    let reports = loads.stop(&cluster).await?;
    for (report, at) in reports.iter().zip(at) {
        only_units_in_flight_failed(report, at, blow);
    }
    assert!(registered < registration_limit(blow), "registered after {registered:?}");
    cluster.nothing_prepared(SOON).await;
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
        matches!(kind, Blow::Frozen) && problem.sqlstate.as_deref() == Some("57P01")
    };
    let lost = report.problems().filter(|(_, it)| it.lost_connection && !ended(it)).count();
    assert_eq!((lost, report.stale_reads()), (0, 0), "{report}");
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
