//! A leader that is lost is deposed by its synchronous standbys, long before its lease ends, and nothing that was
//! acknowledged is lost; one that shows a sign of life is not.

#![expect(clippy::print_stdout, reason = "a run shows what it measured")]

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::process::send;
use kornak_tests::run::wait::{strict_timing, until};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(60);

fn spec(name: &'static str) -> ClusterSpec {
    ClusterSpec { name, ttl: 30, suspect_after: 2, ..Default::default() }
}

/// Waits for another server than that of `old` that accepts writes; `old` is not asked.
async fn successor(cluster: &Cluster, old: &str) -> String {
    until(LIMIT, "another server accepts writes", || async {
        for node in cluster.nodes.iter().filter(|node| node.name() != old) {
            let Ok(client) = node.connect().await else { continue };
            let row = client.query_one("SELECT pg_is_in_recovery()", &[]).await;
            if row.is_ok_and(|row| !row.get::<_, bool>(0)) {
                return Ok(node.name().to_owned());
            }
        }
        Err("all are in recovery".to_owned())
    })
    .await
}

/// The leader's host is lost, or stands still, and comes back when another one leads.
async fn lost(name: &'static str, frozen: bool) -> Result<()> {
    let mut cluster = Cluster::start(spec(name)).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, LIMIT).await;
    let leader = cluster.leader().await?;
    let began = Instant::now();
    match frozen {
        true => cluster.node(&leader)?.freeze_all()?,
        false => cluster.node_mut(&leader)?.kill_all(),
    }
    let new = successor(&cluster, &leader).await;
    let took = began.elapsed();
    println!("{leader} lost (frozen: {frozen}); {new} writable after {took:.2?}");
    load.flows(10, LIMIT).await;
    match frozen {
        // It may acknowledge nothing from here on.
        true => cluster.node(&leader)?.thaw_all()?,
        false => cluster.node_mut(&leader)?.start_agent()?,
    }
    cluster.healthy(LIMIT).await;
    println!("{leader} is back as a standby after {:.1?}", began.elapsed());
    assert_eq!(cluster.leader().await?, new);

    let report = load.stop_and_verify(&cluster.app_on_leader().await?).await?;
    let limit = Duration::from_secs(if strict_timing() { 5 } else { 10 });
    assert!(took < limit, "the lease of 30 s was waited for: {took:.2?}");
    let gap = report.longest_gap().length;
    assert!(gap < limit, "service was away for {gap:?}");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_leader_is_deposed_long_before_its_lease_ends() -> Result<()> {
    lost("deposed", false).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stands_still_is_deposed_and_acknowledges_nothing_when_it_is_back()
-> Result<()> {
    lost("deposed-frozen", true).await
}

/// Checks for so long that clients go on and the leader key stays the same.
async fn stays(cluster: &Cluster, load: &Load, key: &str, lasts: Duration) -> Result<()> {
    let began = Instant::now();
    while began.elapsed() < lasts {
        load.flows(5, LIMIT).await;
        assert_eq!(cluster.key("leader").await?, key);
    }
    Ok(())
}

/// Whether the leader key changes within this time.
async fn deposed_within(cluster: &Cluster, key: &str, lasts: Duration) -> Result<bool> {
    let began = Instant::now();
    while began.elapsed() < lasts {
        if cluster.key("leader").await.map_or(true, |now| now != key) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_shows_a_sign_of_life_is_not_deposed() -> Result<()> {
    let cluster = Cluster::start(ClusterSpec { agent_timeout: Some(0), ..spec("alive") }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, LIMIT).await;
    let leader = cluster.leader().await?;
    let node = cluster.node(&leader)?;
    let (key, postmaster) = (cluster.key("leader").await?, node.postmaster());

    // Everything stands still, for less than it takes.
    for _ in 0..3 {
        node.freeze_all()?;
        let deposed = deposed_within(&cluster, &key, Duration::from_millis(1500)).await?;
        node.thaw_all()?;
        assert!(!deposed, "1.5 s are enough");
        stays(&cluster, &load, &key, Duration::from_secs(2)).await?;
    }
    // The agent answers nothing and renews nothing, the server works.
    node.freeze_agent()?;
    stays(&cluster, &load, &key, Duration::from_secs(8)).await?;
    node.thaw_agent()?;
    stays(&cluster, &load, &key, Duration::from_secs(2)).await?;
    // The server stands still, the agent renews.
    let postmaster = postmaster.expect("it runs");
    let servers: Vec<u32> = node.processes_titled("postgres:");
    for pid in servers.iter().chain([&postmaster]) {
        send(*pid, Signal::STOP)?;
    }
    let deposed = deposed_within(&cluster, &key, Duration::from_secs(5)).await?;
    for pid in servers.iter().chain([&postmaster]) {
        send(*pid, Signal::CONT)?;
    }
    assert!(!deposed, "it renews");
    stays(&cluster, &load, &key, Duration::from_secs(2)).await?;

    assert_eq!(cluster.node(&leader)?.postmaster(), Some(postmaster));
    load.stop_and_verify(&cluster.app_on_leader().await?).await?;
    cluster.passed();
    Ok(())
}
