//! Failovers without warning under load: connections survive, what was in flight may fail, and
//! whatever begins later waits until the group has a primary that the coordinator knows.

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Doing, Report};
use kornak_tests::run::citus::{CitusCluster, CitusSpec};
use kornak_tests::run::wait::{strict_timing, until};

use super::{Loads, SOON, needs_citus};

/// What happens to a primary.
#[derive(Debug, Clone, Copy)]
enum Blow {
    /// `kill -9` of its postmaster.
    Postmaster,
    /// Every process of the host ends at once, and comes back when the test says so.
    Host,
}

/// After so long the proxy knows that a primary has died: what begins later has to wait.
fn notice() -> Duration {
    Duration::from_millis(if strict_timing() { 100 } else { 1000 })
}

/// The promise is a second; a busy machine may take longer.
fn registration_limit() -> Duration {
    Duration::from_secs(if strict_timing() { 1 } else { 5 })
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

async fn strike(name: &'static str, group: u32, blow: Blow) -> Result<()> {
    let mut cluster = CitusCluster::start(CitusSpec { name, ..CitusSpec::default() }).await?;
    let loads = Loads::start(&cluster).await?;
    let leader = cluster.leader(group).await?;
    let (began, at) = (Instant::now(), loads.elapsed());
    match blow {
        Blow::Postmaster => cluster.node(&leader)?.kill_postmaster()?,
        Blow::Host => cluster.node_mut(&leader)?.kill_all(),
    }
    let (led, registered) = succession(&cluster, group, &leader).await;
    println!(
        "group {group}, {blow:?} of {leader} at {:.1?}: led after {led:.2?}, registered \
         {registered:.2?} later",
        at[0]
    );
    loads.flow(10).await;
    println!("everybody works after {:.2?}", began.elapsed());
    if matches!(blow, Blow::Host) {
        cluster.node_mut(&leader)?.start_agent()?;
    }
    cluster.healthy(SOON).await;
    loads.flow(5).await;
    let reports = loads.stop(&cluster).await?;
    for (report, at) in reports.iter().zip(at) {
        only_units_in_flight_failed(report, at, notice());
    }
    assert!(registered < registration_limit(), "registered after {registered:?}");
    cluster.nothing_prepared(SOON).await;
    cluster.passed();
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
/// connection was lost and nobody waited in vain.
fn only_units_in_flight_failed(report: &Report, blow: Duration, notice: Duration) {
    let most = if strict_timing() { 1 } else { 2 };
    assert_eq!((report.lost_connections(), report.stale_reads()), (0, 0), "{report}");
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
