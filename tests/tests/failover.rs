//! A failover without warning: connections survive, only what was in flight gets an error, nothing
//! acknowledged is lost.

#![expect(clippy::print_stdout, reason = "a run shows what it measured")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::future::try_join_all;
use kornak_tests::load::{Doing, Kind, Load, LoadSpec, Report};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::connect;
use kornak_tests::run::wait::strict_timing;

/// Room for a shared machine where a bound is about the machine and not about the protocol.
fn slack() -> Duration {
    if strict_timing() { Duration::ZERO } else { Duration::from_secs(5) }
}

/// The table of what each client gets: in a transaction 40001, in flight 08007, else it waits.
fn only_units_in_flight_failed(report: &Report) {
    let mut seen = BTreeSet::new();
    for (client, problem) in report.problems() {
        let code = problem.sqlstate.as_deref().unwrap_or("none");
        let allowed: &[&str] = match problem.doing {
            // 25P02: the driver had closed a statement without waiting for the answer, and that
            // answer was the 40001.
            Doing::InTransaction => &["40001", "08007", "25P02"],
            Doing::Begin => &["08007", "57P03"],
            Doing::Commit | Doing::Write => &["08007", "57P03", "40001"],
            // A read is a statement in flight as any other on the primary's listener.
            Doing::Read => &["08007", "57P03"],
            Doing::Nothing | Doing::Connect | Doing::Waiting => &[],
        };
        seen.insert(format!("{:?} {code}", problem.doing));
        // Connecting anew is not answered from the proxy's cache when nothing is cached yet.
        let reconnects = client.kind == Kind::Reconnecting && code == "57P03";
        assert!(
            allowed.contains(&code) || reconnects,
            "client {} ({}) got {code} in {:?} at {:.2?}: {}",
            client.number,
            client.kind,
            problem.doing,
            problem.at,
            problem.message
        );
        let in_failure = report.clients[client.number].problems.len() + client.further_problems;
        assert!(in_failure <= 2, "client {} failed {in_failure} times", client.number);
    }
    println!("errors seen: {seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_postmaster_costs_only_what_was_in_flight() -> Result<()> {
    let cluster = Cluster::start(ClusterSpec { name: "postmaster", ..Default::default() }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    let (began, at) = (Instant::now(), load.elapsed());
    cluster.node(&leader)?.kill_postmaster()?;
    load.flows(10, Duration::from_secs(40)).await;
    println!(
        "postmaster of {leader} killed at {at:.1?}; everybody works after {:.2?}",
        began.elapsed()
    );
    cluster.healthy(Duration::from_secs(60)).await;

    let report = load.stop_and_verify(&cluster.app_on_leader().await?).await?;
    only_units_in_flight_failed(&report);
    let gap = report.longest_gap().length;
    assert!(gap < Duration::from_secs(3) + slack(), "service was away for {gap:?}");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_node_is_replaced_within_the_lease_and_returns_as_a_standby() -> Result<()> {
    let mut cluster = Cluster::start(ClusterSpec { name: "node", ..Default::default() }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    let (began, at) = (Instant::now(), load.elapsed());
    cluster.node_mut(&leader)?.kill_all();
    let new = cluster.new_leader(&leader, Duration::from_secs(60)).await;
    println!("{leader} lost at {at:.1?}; {new} writable after {:.2?}", began.elapsed());
    load.flows(10, Duration::from_secs(30)).await;

    cluster.node_mut(&leader)?.start_agent()?;
    cluster.healthy(Duration::from_secs(60)).await;
    println!("{leader} is back as a standby after {:.1?}", began.elapsed());
    assert_eq!(cluster.leader().await?, new);

    let report = load.stop_and_verify(&cluster.app_on_leader().await?).await?;
    only_units_in_flight_failed(&report);
    let limit = Duration::from_secs(u64::from(cluster.spec.ttl) + 2) + slack();
    let gap = report.longest_gap().length;
    assert!(gap < limit, "service was away for {gap:?}, more than {limit:?}");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_was_stopped_or_lost_whole_comes_back_with_all_it_had() -> Result<()> {
    let mut cluster = Cluster::start(ClusterSpec { name: "whole", ..Default::default() }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    let report = load.stop().await;

    // In order, as a maintenance window does it, the leader last.
    let leader = cluster.leader().await?;
    let mut names: Vec<String> = cluster.nodes.iter().map(|it| it.name().to_owned()).collect();
    names.sort_by_key(|name| *name == leader);
    for name in &names {
        cluster.node_mut(name)?.stop_agent(Duration::from_secs(60)).await;
    }
    let began = Instant::now();
    for name in &names {
        cluster.node_mut(name)?.start_agent()?;
    }
    cluster.healthy(Duration::from_secs(60)).await;
    println!("stopped in order; healthy {:.1?} after the start", began.elapsed());
    let verdict = report.verify(&cluster.app_on_leader().await?).await?;
    assert!(verdict.is_clean(), "{verdict}");

    // All at once, the store as well, as a loss of power does it.
    for node in &mut cluster.nodes {
        node.kill_all();
    }
    cluster.etcd.kill_all();
    let began = Instant::now();
    cluster.etcd.start_all()?;
    for node in &mut cluster.nodes {
        node.start_agent()?;
    }
    cluster.healthy(Duration::from_secs(90)).await;
    println!("lost at once; healthy {:.1?} after the start", began.elapsed());
    let verdict = report.verify(&cluster.app_on_leader().await?).await?;
    assert!(verdict.is_clean(), "{verdict}");
    // The proxy has found its way back by itself.
    cluster.proxy.ready(&cluster.app(), Duration::from_secs(20)).await;
    cluster.passed();
    Ok(())
}

/// `KORNAK_IDLE_SESSIONS` says how many there are; the default is what CI has time for.
fn idle_sessions() -> usize {
    let set = std::env::var("KORNAK_IDLE_SESSIONS").ok();
    set.map_or(150, |count| count.parse().expect("KORNAK_IDLE_SESSIONS is a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_come_back_all_at_once_are_let_in_by_turns() -> Result<()> {
    let sessions = idle_sessions();
    let cluster = Cluster::start(ClusterSpec {
        name: "stampede",
        nodes: 2,
        parameters: vec![format!("max_connections: {}", sessions + 50)],
        ..Default::default()
    })
    .await?;
    let mut clients = Vec::new();
    while clients.len() < sessions {
        let app = cluster.app();
        let more = (0..25.min(sessions - clients.len())).map(|_| connect(&app));
        clients.extend(try_join_all(more).await?);
    }
    let leader = cluster.leader().await?;
    let other = cluster.nodes.iter().find(|node| node.name() != leader).context("two nodes")?;
    cluster.node(&leader)?.kill_postmaster()?;
    let killed = Instant::now();
    // Everybody speaks at once.
    let asking = clients.iter().map(|client| client.query_one("SELECT pg_backend_pid()", &[]));
    let mut most = 0;
    let mut sampling = tokio::time::interval(Duration::from_millis(5));
    let mut asking = std::pin::pin!(try_join_all(asking));
    let rows = loop {
        tokio::select! {
            rows = &mut asking => break rows?,
            _ = sampling.tick() => {
                most = most.max(other.processes_titled(" authentication").len());
            }
        }
    };
    println!(
        "{} sessions work again after {:.2?}; {most} were logging in at once at most",
        rows.len(),
        killed.elapsed()
    );
    assert_eq!(rows.len(), sessions);
    // Those of the proxy's own connections come on top.
    assert!(most <= kornak_proxy::shared::MAX_LOGINS_PER_SERVER + 8, "{most} logins at once");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_data_cannot_be_read_is_replaced() -> Result<()> {
    let spec = ClusterSpec { name: "disk", nodes: 2, synchronous: false, ..ClusterSpec::default() };
    let cluster = Cluster::start(spec).await?;
    let leader = cluster.leader().await?;
    let node = cluster.node(&leader)?;
    let control = node.data_dir().join("global/pg_control");
    std::fs::rename(&control, control.with_extension("lost"))?;
    node.kill_postmaster()?;
    cluster.new_leader(&leader, Duration::from_secs(20)).await;
    cluster.passed();
    Ok(())
}
