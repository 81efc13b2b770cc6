//! A leader's agent that is gone or frozen: its server ends before another begins.
//!
//! In asynchronous mode nothing but fencing protects what was acknowledged, so it is used here.

#![expect(clippy::print_stdout, reason = "a run shows what it measured")]

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::agent::Node;
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::connect;
use kornak_tests::run::process::{is_alive, send};
use kornak_tests::run::wait::{until, until_true};
use rustix::process::Signal;

fn asynchronous(name: &'static str) -> ClusterSpec {
    ClusterSpec { name, synchronous: false, agent_timeout: Some(0), ..Default::default() }
}

/// The treatment of the agent, and how it comes back.
enum Fate {
    Killed,
    Frozen,
}

async fn fence(name: &'static str, fate: Fate) -> Result<()> {
    let mut cluster = Cluster::start(asynchronous(name)).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    let watch = cluster.watch_writes();
    let (began, at) = (Instant::now(), load.elapsed());
    match fate {
        Fate::Killed => cluster.node_mut(&leader)?.kill_agent(),
        Fate::Frozen => cluster.node(&leader)?.freeze_agent()?,
    }
    let new = cluster.new_leader(&leader, Duration::from_secs(60)).await;
    println!("agent of {leader} gone at {at:.1?}; {new} writable after {:.2?}", began.elapsed());
    load.flows(10, Duration::from_secs(30)).await;
    // The proxy leads to the new one, and to nobody else.
    let new_port = i32::from(cluster.node(&new)?.port());
    for _ in 0..20 {
        let client = connect(&cluster.app()).await?;
        let row = client.query_one("SELECT inet_server_port()", &[]).await?;
        assert_eq!(row.get::<_, i32>(0), new_port, "the proxy leads to {new}");
    }
    match fate {
        Fate::Killed => cluster.node_mut(&leader)?.start_agent()?,
        Fate::Frozen => cluster.node(&leader)?.thaw_agent()?,
    }
    cluster.healthy(Duration::from_secs(90)).await;
    println!("{leader} is back as a standby after {:.1?}", began.elapsed());
    assert_eq!(cluster.leader().await?, new);

    let report = load.stop().await;
    println!("{report}");
    let seen = watch.finish().await;
    for span in &seen.spans {
        println!("{} writable {:.2?}..{:.2?}", span.node, span.from, span.to);
    }
    seen.assert_never_two();
    let verdict = report.verify(&cluster.app_on_leader().await?).await?;
    println!("{verdict}");
    assert!(verdict.is_clean(), "{verdict}");
    assert_eq!(report.lost_connections(), 0, "client connections survive");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_takes_its_primary_with_it_before_another_is_promoted() -> Result<()> {
    fence("killed", Fate::Killed).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_agent_is_fenced_by_its_guard_and_rejoins_when_it_thaws() -> Result<()> {
    fence("frozen", Fate::Frozen).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_started_again_in_time_adopts_the_server_that_runs() -> Result<()> {
    let mut cluster = Cluster::start(asynchronous("adopted")).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    let postmaster = cluster.node(&leader)?.postmaster();
    cluster.node_mut(&leader)?.kill_agent();
    cluster.node_mut(&leader)?.start_agent()?;
    // Longer than the lease: without the new agent the guard would have fired.
    let lease = Duration::from_secs(u64::from(cluster.spec.ttl) + 2);
    let end = tokio::time::Instant::now() + lease;
    while tokio::time::Instant::now() < end {
        load.flows(10, Duration::from_secs(10)).await;
    }
    let report = load.stop().await;
    println!("{report}");
    assert_eq!(report.errors(), 0);
    assert_eq!(cluster.leader().await?, leader);
    assert_eq!(cluster.node(&leader)?.postmaster(), postmaster, "the server was not restarted");
    cluster.passed();
    Ok(())
}

const LIMIT: Duration = Duration::from_secs(30);

/// Waits for an agent that the guard has started, other than `before`, and that answers.
async fn another_agent(node: &Node, before: Option<u32>) -> u32 {
    until(LIMIT, "the guard starts an agent", || async {
        let started = node.started_by_guard();
        let pid = started.filter(|_| started != before).ok_or("none")?;
        let answer = node.rest().get("/primary").await.map_err(|error| error.to_string())?;
        if answer.code == 200 { Ok(pid) } else { Err(format!("it answers {}", answer.code)) }
    })
    .await
}

/// Frozen, then killed: the guard starts another agent each time; one that is started by hand takes its place, and
/// one that is asked to end stays away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_silent_while_its_server_leads_is_replaced_unnoticed() -> Result<()> {
    let spec = ClusterSpec { name: "revived", nodes: 2, ttl: 20, ..Default::default() };
    let mut cluster = Cluster::start(spec).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(10, LIMIT).await;
    let leader = cluster.leader().await?;
    let (postmaster, key) = (cluster.node(&leader)?.postmaster(), cluster.key("leader").await?);
    let timeline = "SELECT timeline_id FROM pg_control_checkpoint()";
    let at_first: i32 = cluster.app_on_leader().await?.query_one(timeline, &[]).await?.get(0);

    cluster.node(&leader)?.freeze_agent()?;
    let second = another_agent(cluster.node(&leader)?, None).await;
    load.flows(10, LIMIT).await;
    send(second, Signal::KILL)?;
    let third = another_agent(cluster.node(&leader)?, Some(second)).await;
    assert!(!is_alive(second), "there is one at a time");
    load.flows(10, LIMIT).await;
    // Somebody knows nothing of it and starts an agent by hand.
    cluster.node_mut(&leader)?.start_agent()?;
    until_true(LIMIT, "the agent of the guard's makes room", || async { !is_alive(third) }).await;
    let ours = |log: &str| log.matches("leadership taken up again").count() >= 3;
    until_true(LIMIT, "ours has taken the leadership up", || async {
        cluster.node(&leader).and_then(Node::agent_log).is_ok_and(|log| ours(&log))
    })
    .await;
    load.flows(10, LIMIT).await;

    let report = load.stop().await;
    println!("{report}");
    assert_eq!(report.errors(), 0);
    assert_eq!(cluster.node(&leader)?.postmaster(), postmaster, "the server was not restarted");
    assert_eq!(cluster.key("leader").await?, key);
    let at_last: i32 = cluster.app_on_leader().await?.query_one(timeline, &[]).await?.get(0);
    assert_eq!(at_last, at_first);
    // Nothing had to be waited for: less than the timeout of the guard, let alone the lease.
    let gap = report.longest_gap();
    println!("longest gap {gap:?}");
    assert!(gap.length < Duration::from_secs(2), "{gap:?}");

    let node = cluster.node_mut(&leader)?;
    node.stop_agent(LIMIT).await.expect("it runs");
    assert_eq!(node.processes(), Vec::<u32>::new(), "what is asked to end stays away");
    cluster.passed();
    Ok(())
}
