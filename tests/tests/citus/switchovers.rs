//! Planned switchovers under load.

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::citus::{CitusCluster, CitusSpec};
use kornak_tests::run::wait::{strict_timing, until};

use super::{Loads, SOON, distribute, needs_citus, nothing_was_noticed};

/// One of each group; `KORNAK_CITUS_SWITCHOVERS=15` makes it the promise, ten of workers and five of
/// the coordinator.
fn switchovers() -> usize {
    let wanted = std::env::var("KORNAK_CITUS_SWITCHOVERS").ok();
    wanted.and_then(|wanted| wanted.parse().ok()).unwrap_or(3)
}

/// How soon after the command `pg_dist_node` is right on every node.
fn right_limit() -> Duration {
    Duration::from_secs(if strict_timing() { 2 } else { 5 })
}

/// The promise, and what a busy machine may make of it.
fn gap_limit() -> Duration {
    if strict_timing() { Duration::from_millis(500) } else { Duration::from_secs(5) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switchovers_of_workers_and_coordinator_cost_no_client_an_error() -> Result<()> {
    needs_citus!();
    let cluster = CitusCluster::start(CitusSpec::default()).await?;
    let loads = Loads::start(&cluster).await?;
    for group in [1, 2, 0].into_iter().cycle().take(switchovers()) {
        let (began, at) = (Instant::now(), loads.coordinator.elapsed());
        cluster.switchover(group).await?;
        let (took, ended) = (began.elapsed(), Instant::now());
        until(right_limit(), "pg_dist_node is right on every node", || {
            cluster.primaries_are_right()
        })
        .await;
        println!(
            "group {group} at {at:.1?}, command took {took:.2?}, pg_dist_node right {:.2?} later",
            ended.elapsed()
        );
        loads.flow(5).await;
        cluster.healthy(SOON).await;
    }
    let reports = loads.stop(&cluster).await?;
    nothing_was_noticed(&reports);
    cluster.nothing_prepared(SOON).await;
    cluster.passed();
    Ok(())
}

/// `INSERT` with `\watch 0.01` in psql, as in the article that shows a gap of 2,893 ms.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_writer_waits_for_a_moment_in_a_switchover() -> Result<()> {
    needs_citus!();
    let cluster =
        CitusCluster::start(CitusSpec { name: "citus-gap", ..CitusSpec::default() }).await?;
    distribute(&cluster).await?;
    for group in [2, 1, 2, 1, 0, 0] {
        let one = LoadSpec {
            writers: 1,
            transactions: 0,
            readers: 0,
            reconnecting: 0,
            ..LoadSpec::mixed(&cluster.app())
        };
        let load = Load::start(&one).await?;
        load.flows(50, SOON).await;
        cluster.switchover(group).await?;
        load.flows(50, SOON).await;
        let report = load.stop().await;
        let gap = report.longest_gap().length;
        println!("group {group}: {gap:.0?}");
        assert_eq!((report.errors(), report.lost_connections()), (0, 0), "{report}");
        assert!(gap < gap_limit(), "the client waited {gap:?}, more than {:?}", gap_limit());
        cluster.healthy(SOON).await;
    }
    cluster.passed();
    Ok(())
}
