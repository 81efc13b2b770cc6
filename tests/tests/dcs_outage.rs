//! The store away: with failsafe mode no client notices.
//!
//! `KORNAK_OUTAGE_SECONDS` says for how long; 26 by default, more than two leases.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::agent::Node;
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::kornak;
use kornak_tests::run::postgres::connect;
use kornak_tests::run::process::{is_alive, send};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::wait::until_true;
use rustix::process::Signal;
use serde_json::{Value, json};

fn outage() -> Duration {
    let named = std::env::var("KORNAK_OUTAGE_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(named.unwrap_or(26))
}

const LIMIT: Duration = Duration::from_secs(30);

/// Waits until a new agent of the node answers so.
async fn answers(cluster: &Cluster, node: &str, path: &str) -> Result<()> {
    let rest = cluster.node(node)?.rest();
    until_true(LIMIT, &format!("the agent of {node} answers {path}"), || async {
        rest.get(path).await.is_ok_and(|answer| answer.code == 200)
    })
    .await;
    Ok(())
}

/// Waits until every member has confirmed the leader in its last round.
async fn confirmed(cluster: &Cluster, leader: &str) -> Result<()> {
    let rest = cluster.node(leader)?.rest();
    until_true(LIMIT, "every member confirms the leader", || async {
        let said = rest.get("/patroni").await.and_then(|answer| answer.json());
        said.is_ok_and(|said| said["failsafe_mode_is_active"] == true)
    })
    .await;
    Ok(())
}

/// Asks as an operator does: the answers are the cluster as it is known, and that nobody can take over.
async fn operator_is_told(cluster: &Cluster, leader: &str) -> Result<()> {
    let node = cluster.node(leader)?;
    let wish = json!({"leader": leader});
    let answer = node.rest().post("/switchover", &wish).await?;
    assert_eq!(answer.code, 412, "{}", answer.text);
    assert!(answer.text.contains("the store does not answer"), "{}", answer.text);

    let mut command = kornak::with_file("-c", node.file());
    command.arg("list");
    let list = tokio::task::spawn_blocking(move || command.output()).await??;
    let (out, err) = (String::from_utf8_lossy(&list.stdout), String::from_utf8_lossy(&list.stderr));
    let mut names = cluster.nodes.iter().map(Node::name);
    assert!(names.all(|name| out.contains(name)) && out.contains("Leader"), "{out}{err}");
    assert!(err.contains("the store does not answer") && !list.status.success(), "{err}");
    Ok(())
}

/// Waits until a client writes through the proxy on the server of `node`, at once or after a while.
async fn serves(proxy: &Proxy, node: &Node) {
    until_true(LIMIT, "the proxy serves the leader", || async {
        let Ok(client) = connect(&Cluster::app_on(proxy.primary())).await else { return false };
        let port = client.query_one("SELECT current_setting('port')::int", &[]).await;
        let here = port.is_ok_and(|row| row.get::<_, i32>(0) == i32::from(node.port()));
        let write = "CREATE TABLE IF NOT EXISTS written (i int); INSERT INTO written VALUES (1)";
        here && client.batch_execute(write).await.is_ok()
    })
    .await;
}

/// Nobody gets in for longer than the proxy waits for the store and looks at each server.
async fn nobody_is_served(proxy: &Proxy) {
    let conninfo = Cluster::app_on(proxy.primary());
    let login = async { connect(&conninfo).await?.simple_query("SELECT 1").await };
    let outcome = tokio::time::timeout(Duration::from_secs(6), login).await;
    assert!(!matches!(outcome, Ok(Ok(_))), "a file that is wrong is not served from");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_old_or_wrong_leads_a_proxy_nowhere_wrong() -> Result<()> {
    let mut cluster =
        Cluster::start(ClusterSpec { name: "outage-file", ..Default::default() }).await?;
    let mut proxy = cluster.pooled_proxy(2).await?;
    let path = proxy.file().with_extension("known.json");
    let noted = || fs::read_to_string(&path).ok();
    let before = cluster.leader().await?;
    until_true(LIMIT, "the leader is noted with its timeline", || async {
        noted().is_some_and(|text| text.contains(&format!("\"name\": \"{before}\"")))
            && noted().is_some_and(|text| text.contains("\"timeline\": 1"))
    })
    .await;
    let old = fs::read_to_string(&path)?;
    let leader = cluster.sync_standby(LIMIT).await;
    cluster.switchover(&before, &leader).await?;
    until_true(LIMIT, "the new timeline is noted", || async {
        noted().is_some_and(|text| text.contains("\"timeline\": 2"))
    })
    .await;
    let new = fs::read_to_string(&path)?;
    cluster.etcd.kill_all();

    // The file of before the switchover: its leader is a standby now, and another is on a higher timeline.
    fs::write(&path, &old)?;
    proxy.restart().await?;
    serves(&proxy, cluster.node(&leader)?).await;

    let mut stranger: Value = serde_json::from_str(&new)?;
    stranger["groups"]["0"]["system_identifier"] = json!("7000000000000000001");
    // What this proxy has seen is newer than what any server has: the one that had it is not there.
    let mut newer: Value = serde_json::from_str(&new)?;
    newer["groups"]["0"]["timeline"] = json!(99);
    for wrong in [stranger.to_string(), newer.to_string(), "{".to_owned()] {
        fs::write(&path, &wrong)?;
        proxy.restart().await?;
        nobody_is_served(&proxy).await;
    }
    fs::write(&path, &new)?;
    proxy.restart().await?;
    serves(&proxy, cluster.node(&leader)?).await;
    cluster.passed();
    Ok(())
}

/// While the store is away: a standby's agent and server, the synchronous standby's agent, and the leader's agent are
/// killed in turn, and the agents started again.
async fn restart_in_turn(cluster: &mut Cluster, leader: &str, synchronous: &str) -> Result<()> {
    let names = cluster.nodes.iter().map(|node| node.name().to_owned());
    let mut others = names.filter(|name| ![leader, synchronous].contains(&name.as_str()));
    let spare = &others.next().context("three nodes")?;
    drop(others);
    let node = cluster.node_mut(spare)?;
    let before = node.postmaster().context("its server runs")?;
    node.kill_agent();
    send(before, Signal::KILL)?;
    until_true(LIMIT, "its server is gone", || async { !is_alive(before) }).await;
    node.start_agent()?;
    let streams = format!(
        "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND application_name = '{spare}'"
    );
    let console = cluster.node(leader)?.connect().await?;
    until_true(LIMIT, "the standby follows again", || async {
        console.query_one(&streams, &[]).await.is_ok_and(|row| row.get::<_, i64>(0) == 1)
    })
    .await;
    for (node, path) in [(synchronous, "/replica"), (leader, "/primary")] {
        let postmaster = cluster.node(node)?.postmaster();
        confirmed(cluster, leader).await?;
        cluster.node_mut(node)?.kill_agent();
        cluster.node_mut(node)?.start_agent()?;
        answers(cluster, node, path).await?;
        assert_eq!(cluster.node(node)?.postmaster(), postmaster, "its server runs on");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_stop_and_come_back_without_a_client_noticing() -> Result<()> {
    let spec = ClusterSpec { name: "outage", ttl: 12, ..Default::default() };
    let mut cluster = Cluster::start(spec).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    // So that a round of the members' words lasts for the lease, almost.
    let change = json!({"retry_timeout": 5});
    let changed = cluster.node(&leader)?.rest().patch("/config", &change).await?;
    assert_eq!(changed.code, 200);
    // Another proxy, which is started again while the store is away.
    let mut other = cluster.pooled_proxy(2).await?;
    let noted = other.file().with_extension("known.json");
    let is_noted = || async { noted.exists() };
    until_true(Duration::from_secs(20), "the other proxy notes the servers", is_noted).await;

    let synchronous = cluster.sync_standby(LIMIT).await;
    let watch = cluster.watch_writes();
    let end = tokio::time::Instant::now() + outage();
    cluster.etcd.kill_all();
    println!("etcd killed at {:.1?}", load.elapsed());
    other.restart().await?;
    let asked = Instant::now();
    let client = connect(&Cluster::app_on(other.primary())).await?;
    client.batch_execute("CREATE TABLE without_store (i int); DROP TABLE without_store").await?;
    println!("a proxy that was started without the store serves after {:.1?}", asked.elapsed());
    load.flows(10, LIMIT).await;
    restart_in_turn(&mut cluster, &leader, &synchronous).await?;
    println!("all were restarted at {:.1?}", load.elapsed());
    operator_is_told(&cluster, &leader).await?;
    // The new agent of the leader rests on the members, for longer than what it has taken over.
    let lease = Duration::from_secs(u64::from(cluster.spec.ttl) + 2);
    let end = end.max(tokio::time::Instant::now() + lease);
    while tokio::time::Instant::now() < end {
        // Every client goes on all the time, not only at the end.
        load.flows(10, Duration::from_secs(30)).await;
        assert_eq!(watch.writable(), std::slice::from_ref(&leader), "at {:.1?}", load.elapsed());
    }
    cluster.etcd.start_all()?;
    println!("etcd started at {:.1?}", load.elapsed());
    cluster.etcd.healthy(Duration::from_secs(30)).await;
    cluster.healthy(Duration::from_secs(30)).await;
    client.simple_query("SELECT 1").await?;
    // Longer than a lease: a leader that failed to take its key back would be gone by then.
    let lease = Duration::from_secs(u64::from(cluster.spec.ttl) + 2);
    let end = tokio::time::Instant::now() + lease;
    while tokio::time::Instant::now() < end {
        load.flows(10, Duration::from_secs(30)).await;
    }

    let report = load.stop().await;
    println!("{report}");
    assert_eq!(cluster.leader().await?, leader, "the leader has not changed");
    assert_eq!((report.errors(), report.lost_connections(), report.stale_reads()), (0, 0, 0));
    let verdict = report.verify(&cluster.app_on_leader().await?).await?;
    assert!(verdict.is_clean(), "{verdict}");
    let seen = watch.finish().await;
    assert!(seen.spans.iter().all(|span| span.node == leader), "{:?}", seen.spans);

    // And the cluster is not only alive, it can still change hands.
    let candidate = cluster.sync_standby(Duration::from_secs(20)).await;
    cluster.switchover(&leader, &candidate).await?;
    assert_eq!(cluster.leader().await?, candidate);
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_failsafe_a_primary_stops_before_its_lease_can_have_run_out() -> Result<()> {
    let spec = ClusterSpec { name: "nofailsafe", failsafe: false, ..Default::default() };
    let mut cluster = Cluster::start(spec).await?;
    let leader = cluster.leader().await?;
    let watch = cluster.watch_writes();
    kornak_tests::run::wait::until(
        Duration::from_secs(10),
        "the watch sees the leader",
        || async {
            if watch.writable() == [leader.clone()] { Ok(()) } else { Err("not yet".to_owned()) }
        },
    )
    .await;
    cluster.etcd.kill_all();
    let lease = Duration::from_secs(u64::from(cluster.spec.ttl));
    kornak_tests::run::wait::until(lease, "nobody accepts writes", || async {
        let writable = watch.writable();
        if writable.is_empty() { Ok(()) } else { Err(format!("{writable:?}")) }
    })
    .await;
    cluster.etcd.start_all()?;
    cluster.etcd.healthy(Duration::from_secs(30)).await;
    cluster.healthy(Duration::from_secs(60)).await;
    let seen = watch.finish().await;
    assert_eq!(seen.overlaps(), [], "never two");
    cluster.passed();
    Ok(())
}
