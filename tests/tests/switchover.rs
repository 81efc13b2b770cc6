//! A planned switchover costs no client an error.
//!
//! `KORNAK_STRICT_TIMING=1` holds the longest gap to the promise of 500 ms; without it a shared
//! machine may take longer, and only the errors and the rows are judged strictly.

use std::time::Duration;

use anyhow::{Context, Result};
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::wait::strict_timing;
use rustix::process::Signal;

const SWITCHOVERS: usize = 10;

/// The promise, and what a busy machine may make of it.
fn gap_limit() -> Duration {
    if strict_timing() { Duration::from_millis(500) } else { Duration::from_secs(3) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_switchovers_under_load_cost_no_client_an_error() -> Result<()> {
    let cluster = Cluster::start(ClusterSpec { name: "switchover", ..Default::default() }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;

    for round in 1..=SWITCHOVERS {
        let at = load.elapsed();
        let done = cluster.switchover_to_the_next().await?;
        println!("{round:>2}. {done}, asked for at {at:.1?}");
        load.flows(10, Duration::from_secs(20)).await;
        cluster.healthy(Duration::from_secs(45)).await;
    }

    let report = load.stop_and_verify(&cluster.app_on_leader().await?).await?;
    assert_eq!((report.errors(), report.lost_connections(), report.stale_reads()), (0, 0, 0));
    let gap = report.longest_gap();
    assert!(gap.length < gap_limit(), "a client waited {gap:?}, more than {:?}", gap_limit());
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_held_for_what_is_impossible_or_for_a_standby_that_hangs() -> Result<()> {
    let cluster = Cluster::start(ClusterSpec { name: "refused", ..Default::default() }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(10, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    // The codes and texts are Patroni's: scripts look at them.
    let (code, text) = cluster.post_switchover(&leader, "nobody").await?;
    assert_eq!((code, text.as_str()), (412, "candidate name does not match with sync_standby"));
    let (code, text) = cluster.post_switchover(&leader, &leader).await?;
    assert_eq!((code, text.as_str()), (400, "Switchover target and source are the same"));
    let body = serde_json::json!({"leader": "nobody", "candidate": leader});
    let answer = cluster.node(&leader)?.rest().post("/switchover", &body).await?;
    assert_eq!((answer.code, answer.text.as_str()), (412, "leader name does not match"));
    load.flows(10, Duration::from_secs(10)).await;
    assert_eq!(cluster.leader().await?, leader);

    // A fast shutdown waits for every walsender, up to wal_sender_timeout (60 s): one whose standby
    // takes nothing more is ended first (docs/safety.md A8).
    let candidate = cluster.sync_standby(Duration::from_secs(20)).await;
    let third =
        cluster.nodes.iter().find(|node| ![leader.as_str(), &candidate].contains(&node.name()));
    let third = third.context("three nodes")?;
    let receiver = third.process_titled("walreceiver").context("the third node streams")?;
    kornak_tests::run::process::freeze(receiver)?;
    load.flows(10, Duration::from_secs(20)).await;
    cluster.switchover(&leader, &candidate).await?;
    load.flows(10, Duration::from_secs(20)).await;
    let report = load.stop().await;
    println!("{report}");
    assert_eq!((report.errors(), report.lost_connections()), (0, 0));
    let gap = report.longest_gap();
    assert!(gap.length < Duration::from_secs(10), "a client waited {gap:?}");
    kornak_tests::run::process::send(receiver, Signal::CONT)?;
    cluster.healthy(Duration::from_secs(60)).await;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_asked_to_stop_hands_over_first() -> Result<()> {
    let mut cluster = Cluster::start(ClusterSpec { name: "sigterm", ..Default::default() }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(10, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    let stopped = cluster.node_mut(&leader)?.stop_agent(Duration::from_secs(60)).await;
    assert!(stopped.is_some_and(|status| status.success()), "the agent ended with {stopped:?}");
    assert_eq!(cluster.node(&leader)?.postmaster(), None, "its server has stopped as well");
    let new = cluster.new_leader(&leader, Duration::from_secs(20)).await;
    load.flows(10, Duration::from_secs(20)).await;
    let report = load.stop().await;
    println!("{leader} stopped, {new} leads\n{report}");
    let verdict = report.verify(&cluster.app_on_leader().await?).await?;
    assert_eq!((report.errors(), report.lost_connections()), (0, 0));
    assert!(verdict.is_clean(), "{verdict}");

    cluster.node_mut(&leader)?.start_agent()?;
    cluster.healthy(Duration::from_secs(60)).await;
    cluster.passed();
    Ok(())
}
