//! Citus with the real extension.

use std::time::Duration;

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::citus::{CitusCluster, CitusSpec, is_installed};
use kornak_tests::run::postgres::connect;

/// Without the extension a test says so and does nothing.
macro_rules! needs_citus {
    () => {
        if !is_installed() {
            println!("SKIPPED: the Citus extension is not installed");
            return Ok(());
        }
    };
}

/// Ten of workers and five of the coordinator, alternating; `KORNAK_CITUS_SWITCHOVERS` sets another
/// number, for a hurry.
fn switchovers() -> usize {
    let wanted = std::env::var("KORNAK_CITUS_SWITCHOVERS").ok();
    wanted.and_then(|wanted| wanted.parse().ok()).unwrap_or(15)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switchovers_of_workers_and_coordinator_cost_no_client_an_error() -> Result<()> {
    needs_citus!();
    let cluster = CitusCluster::start(CitusSpec::default()).await?;
    let client = connect(&cluster.app()).await?;
    client
        .batch_execute(
            "CREATE TABLE kornak_load (id bigint PRIMARY KEY, client integer NOT NULL); \
             SELECT create_distributed_table('kornak_load', 'id', shard_count => 8)",
        )
        .await?;
    let through_coordinator = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    let few = LoadSpec {
        writers: 2,
        transactions: 1,
        readers: 1,
        reconnecting: 0,
        ..LoadSpec::mixed(&cluster.app_on_workers())
    };
    let through_workers = Load::start(&few).await?;
    through_coordinator.flows(20, Duration::from_secs(30)).await;
    for group in [1, 2, 0].into_iter().cycle().take(switchovers()) {
        let began = std::time::Instant::now();
        let at = through_coordinator.elapsed();
        cluster.switchover(group).await?;
        println!("group {group} at {at:.1?}, command took {:.2?}", began.elapsed());
        through_coordinator.flows(5, Duration::from_secs(20)).await;
        through_workers.flows(5, Duration::from_secs(20)).await;
        cluster.healthy(Duration::from_secs(45)).await;
    }
    let (first, second) = (through_coordinator.stop().await, through_workers.stop().await);
    println!("through the coordinator:\n{first}\nthrough the workers:\n{second}");
    let coordinator = cluster.coordinator("citus").await?;
    for report in [&first, &second] {
        let verdict = report.verify(&coordinator).await?;
        println!("{verdict}");
        assert_eq!((report.errors(), report.lost_connections(), report.stale_reads()), (0, 0, 0));
        assert!(verdict.is_clean(), "{verdict}");
    }
    assert_eq!(cluster.prepared().await?, []);
    cluster.passed();
    Ok(())
}
