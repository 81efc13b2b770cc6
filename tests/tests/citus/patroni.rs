//! Patroni's agents and Kornak's in one Citus cluster: either may lead the coordinator's group while
//! the other leads the workers', and what one tells the other is understood.

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec, Report};
use kornak_tests::run::citus::{CitusCluster, CitusSpec};

use super::{distribute, needs_citus, nothing_was_noticed};

/// Patroni looks around once a second, and its switchovers take some.
const SOON: Duration = Duration::from_secs(90);

/// The message that a coordinator of either program notes when it makes writes to a worker's group wait: ours at
/// its usual level, Patroni the statement at DEBUG.
const KORNAK_WAITS: &str = "writes to the group blocked until its next primary serves";
const PATRONI_WAITS: &str = "-demoted";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patroni_and_kornak_lead_coordinator_and_workers_in_turn() -> Result<()> {
    needs_citus!();
    let patroni = vec!["coord2", "work1-2"];
    let spec = CitusSpec { name: "citus-patroni", ttl: 20, patroni, ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    distribute(&cluster).await?;
    let load = Load::start(&few(&cluster)).await?;
    load.flows(20, SOON).await;

    // Patroni leads the coordinator.
    lead(&cluster, &load, 0, "coord2").await?;
    lead(&cluster, &load, 1, "work1-1").await?;
    for to in ["work1-2", "work1-1"] {
        let before = said(&cluster, "coord2", PATRONI_WAITS)?;
        lead(&cluster, &load, 1, to).await?;
        assert!(said(&cluster, "coord2", PATRONI_WAITS)? > before, "Patroni was not told");
    }
    // Kornak's agents on both sides of the switchover: nobody notices, whoever leads the coordinator.
    let unnoticed = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    unnoticed.flows(5, SOON).await;
    let before = said(&cluster, "coord2", PATRONI_WAITS)?;
    for _ in 0..2 {
        switch(&cluster, 2).await?;
        unnoticed.flows(5, SOON).await;
    }
    assert!(said(&cluster, "coord2", PATRONI_WAITS)? > before, "Patroni was not told");
    let report = judged(&cluster, unnoticed).await?;
    nothing_was_noticed(&[report]);

    // Kornak leads the coordinator.
    lead(&cluster, &load, 0, "coord1").await?;
    for to in ["work1-2", "work1-1"] {
        let before = said(&cluster, "coord1", KORNAK_WAITS)?;
        lead(&cluster, &load, 1, to).await?;
        assert!(said(&cluster, "coord1", KORNAK_WAITS)? > before, "Kornak was not told");
    }

    // Patroni's switchovers are not silent; they lose nothing.
    judged(&cluster, load).await?;
    cluster.nothing_prepared(SOON).await;
    cluster.passed();
    Ok(())
}

/// Two writers and a reader through the coordinator.
fn few(cluster: &CitusCluster) -> LoadSpec {
    LoadSpec {
        writers: 2,
        transactions: 1,
        readers: 1,
        reconnecting: 0,
        ..LoadSpec::mixed(&cluster.app())
    }
}

/// Makes the member its group's leader, by a switchover if it is not.
async fn lead(cluster: &CitusCluster, load: &Load, group: u32, name: &str) -> Result<()> {
    if cluster.leader(group).await? != name {
        switch(cluster, group).await?;
        assert_eq!(cluster.leader(group).await?, name);
    }
    load.flows(5, SOON).await;
    Ok(())
}

async fn switch(cluster: &CitusCluster, group: u32) -> Result<()> {
    let from = cluster.leader(group).await?;
    let began = Instant::now();
    cluster.switchover(group).await?;
    let took = began.elapsed();
    cluster.healthy(SOON).await;
    println!("group {group} from {from} in {took:.1?}, all right after {:.1?}", began.elapsed());
    Ok(())
}

/// How many lines of a member's log have these words.
fn said(cluster: &CitusCluster, name: &str, words: &str) -> Result<usize> {
    let log = cluster.node(name)?.agent_log()?;
    Ok(log.lines().filter(|line| line.contains(words)).count())
}

async fn judged(cluster: &CitusCluster, load: Load) -> Result<Report> {
    let report = load.stop().await;
    println!("{report}");
    let verdict = report.verify(&cluster.coordinator("citus").await?).await?;
    println!("{verdict}");
    assert!(verdict.is_clean(), "{verdict}");
    Ok(report)
}
