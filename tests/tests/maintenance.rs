//! Planned work of operators: switchovers and restarts at a set time, maintenance mode, and the end
//! of everything.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures_util::future::join_all;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::describe;
use kornak_tests::run::wait::until;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// `seconds` from now, as an operator writes it.
async fn soon(cluster: &Cluster, seconds: u32) -> Result<String> {
    let client = cluster.connect_to_leader().await?;
    let sql = format!(
        "SELECT to_char((now() + '{seconds} s') AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US') \
         || '+00:00'"
    );
    Ok(client.query_one(&sql, &[]).await?.get(0))
}

async fn started_at(cluster: &Cluster, node: &str) -> Result<String> {
    let client = cluster.node(node)?.connect().await?;
    let sql = "SELECT pg_postmaster_start_time()::text";
    Ok(client.query_one(sql, &[]).await?.get(0))
}

/// Seconds that the lease of the leader key was granted for.
async fn granted(cluster: &Cluster) -> Result<u64> {
    let key = cluster.etcd.ctl(&["get", "/service/demo/leader", "--write-out=json"]).await?;
    let key: Value = serde_json::from_str(&key)?;
    let lease = key["kvs"][0]["lease"].as_u64().context("a leader key with a lease")?;
    let words = ["lease", "timetolive", &format!("{lease:x}"), "--write-out=json"];
    let lease: Value = serde_json::from_str(&cluster.etcd.ctl(&words).await?)?;
    lease["granted-ttl"].as_u64().context("no granted-ttl")
}

fn other(cluster: &Cluster, than: &[&str]) -> Result<String> {
    let mut names = cluster.nodes.iter().map(|node| node.name().to_owned());
    names.find(|name| !than.contains(&name.as_str())).context("another node")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_asked_for_is_done_at_its_time() -> Result<()> {
    let spec = ClusterSpec { name: "planned", synchronous: false, ..Default::default() };
    let cluster = Cluster::start(spec).await?;
    let leader = cluster.leader().await?;
    let standby = other(&cluster, &[&leader])?;

    // A change of ttl reaches the lease of the leader that is there, without a change of leadership.
    let ttl = u64::from(cluster.spec.ttl);
    for wanted in [ttl + 4, ttl] {
        cluster.configure(&json!({"ttl": wanted})).await?;
        until(LIMIT, "the lease is of the configured length", || async {
            match granted(&cluster).await {
                Ok(granted) if granted == wanted => Ok(()),
                found => Err(format!("{found:?}")),
            }
        })
        .await;
    }
    assert_eq!(cluster.leader().await?, leader);

    // A restart that is only for servers with something pending is dropped; the next one happens.
    let rest = cluster.node(&standby)?.rest();
    let before = started_at(&cluster, &standby).await?;
    let pending = json!({"schedule": soon(&cluster, 2).await?, "restart_pending": true});
    assert_eq!(rest.post("/restart", &pending).await?.code, 202);
    let published = || async {
        let text = cluster.key(&format!("members/{standby}")).await.map_err(|e| e.to_string())?;
        let member: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        Ok::<_, String>(member["scheduled_restart"].clone())
    };
    until(LIMIT, "the restart is published", || async {
        let shown = published().await?;
        if shown["restart_pending"] == true { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
    until(LIMIT, "the restart is dropped", || async {
        let shown = published().await?;
        if shown.is_null() { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
    assert_eq!(started_at(&cluster, &standby).await?, before, "its condition was not met");
    let plain = json!({"schedule": soon(&cluster, 2).await?, "role": "replica", "timeout": 30});
    assert_eq!(rest.post("/restart", &plain).await?.code, 202);
    assert_eq!(rest.post("/restart", &plain).await?.code, 409, "one at a time");
    until(LIMIT, "the standby was restarted", || async {
        match started_at(&cluster, &standby).await {
            Ok(now) if now != before => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    cluster.healthy(LIMIT).await;

    // A switchover at a set time; the request is cleared afterwards.
    let request =
        json!({"leader": leader, "candidate": standby, "scheduled_at": soon(&cluster, 3).await?});
    let answer = rest.post("/switchover", &request).await?;
    assert_eq!(answer.code, 202, "{}", answer.text);
    assert!(cluster.key("failover").await?.contains("scheduled_at"));
    assert_eq!(cluster.leader().await?, leader, "not before its time");
    assert_eq!(cluster.new_leader(&leader, LIMIT).await, standby);
    until(LIMIT, "the request is cleared", || async {
        match cluster.key("failover").await {
            Ok(text) if text == "{}" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    cluster.healthy(LIMIT).await;

    // What another tool writes into the store is carried out as well, and nonsense is cleared.
    let stale = format!(r#"{{"leader":"{leader}","member":"{standby}"}}"#);
    cluster.etcd.ctl(&["put", "/service/demo/failover", &stale]).await?;
    until(LIMIT, "a request to a former leader is cleared", || async {
        match cluster.key("failover").await {
            Ok(text) if text == "{}" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(cluster.leader().await?, standby);
    let back = format!(r#"{{"leader":"{standby}","member":"{leader}"}}"#);
    cluster.etcd.ctl(&["put", "/service/demo/failover", &back]).await?;
    assert_eq!(cluster.new_leader(&standby, LIMIT).await, leader);
    cluster.passed();
    Ok(())
}

/// Waits until the mark of an unfenced primary is there, or not; what it says.
async fn unfenced(cluster: &Cluster, wanted: bool) -> String {
    until(LIMIT, &format!("a mark of an unfenced primary: {wanted}"), || async {
        let text = cluster.key("kornak/unfenced").await.map_err(|error| format!("{error:#}"))?;
        if text.is_empty() == wanted { Err(text) } else { Ok(text) }
    })
    .await
}

/// For as long as a lease would have lasted, all but `dead` stay standbys.
async fn nobody_is_promoted(cluster: &Cluster, dead: &str, lease: Duration) -> Result<()> {
    let end = tokio::time::Instant::now() + lease;
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    while tokio::time::Instant::now() < end {
        ticks.tick().await;
        for node in cluster.nodes.iter().filter(|node| node.name() != dead) {
            let client = node.connect().await?;
            let row = client.query_one("SELECT pg_is_in_recovery()", &[]).await?;
            assert!(row.get::<_, bool>(0), "{} was promoted in maintenance mode", node.name());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_maintenance_mode_a_dead_primary_is_not_replaced_but_by_name() -> Result<()> {
    let spec = ClusterSpec { name: "pause", synchronous: false, ..Default::default() };
    let mut cluster = Cluster::start(spec).await?;
    let leader = cluster.leader().await?;
    cluster.configure(&json!({"pause": true})).await?;
    let mark = unfenced(&cluster, true).await;
    assert!(mark.contains(&leader), "{mark}");

    // The agent may be stopped for work on it: its server goes on, longer than the lease.
    let postmaster = cluster.node(&leader)?.postmaster();
    cluster.node_mut(&leader)?.stop_agent(Duration::from_secs(30)).await;
    let lease = Duration::from_secs(u64::from(cluster.spec.ttl) + 3);
    let client = cluster.node(&leader)?.connect().await?;
    client.batch_execute("CREATE TABLE t (i int)").await?;
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    let still = async {
        loop {
            ticks.tick().await;
            client.batch_execute("INSERT INTO t VALUES (1)").await?;
        }
    };
    let ended: Result<Result<()>, _> = tokio::time::timeout(lease, still).await;
    if let Ok(Err(error)) = ended {
        panic!("the primary did not stay writable: {error:#}");
    }
    cluster.node_mut(&leader)?.start_agent()?;
    until(LIMIT, "the leader has its key again", || async {
        match cluster.leader().await {
            Ok(name) if name == leader => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(cluster.node(&leader)?.postmaster(), postmaster, "the server was left alone");
    unfenced(&cluster, true).await;

    // Its server dies: nobody takes over, until somebody is named.
    let client = cluster.node(&leader)?.connect().await?;
    drop(client);
    cluster.node(&leader)?.kill_postmaster()?;
    unfenced(&cluster, false).await;
    nobody_is_promoted(&cluster, &leader, lease).await?;
    let candidate = other(&cluster, &[&leader])?;
    let answer = cluster
        .node(&candidate)?
        .rest()
        .post("/failover", &json!({"candidate": candidate}))
        .await?;
    assert_eq!(answer.code, 200, "{}", answer.text);
    assert_eq!(cluster.new_leader(&leader, LIMIT).await, candidate);

    // In maintenance mode a switchover to a named candidate works as well.
    let third = other(&cluster, &[&leader, &candidate])?;
    until(LIMIT, "the third follows the new leader", || async {
        let members = cluster.members().await.map_err(|error| format!("{error:#}"))?;
        let found = members.iter().any(|it| it.name == third && it.state == "streaming");
        if found { Ok(()) } else { Err(format!("{members:?}")) }
    })
    .await;
    let (code, text) = cluster.post_switchover(&candidate, &third).await?;
    assert_eq!(code, 200, "{text}");
    assert_eq!(cluster.new_leader(&candidate, LIMIT).await, third);
    cluster.configure(&json!({"pause": false})).await?;
    unfenced(&cluster, false).await;
    cluster.healthy(LIMIT).await;
    let client = cluster.connect_to_leader().await?;
    client
        .batch_execute("INSERT INTO t VALUES (2)")
        .await
        .map_err(|error| anyhow::anyhow!(describe(&error)))?;
    cluster.passed();
    Ok(())
}

/// The leader looks for somebody to hand over to, everybody is going, and so is the store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_stops_all_at_once_with_its_store_stops_soon() -> Result<()> {
    let mut cluster = Cluster::start(ClusterSpec { name: "leaving", ..Default::default() }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(10, Duration::from_secs(60)).await;
    let report = load.stop().await;
    let began = Instant::now();
    // The agents hear of it first, by no more than it takes to tell them.
    let ends = join_all(cluster.nodes.iter_mut().map(async |node| {
        let ended = node.stop_agent(Duration::from_secs(120)).await;
        (node.name().to_owned(), ended, began.elapsed())
    }));
    let (ends, ()) = tokio::join!(ends, async { cluster.etcd.kill_all() });
    let slow = ends.iter().find(|(_, _, after)| *after > Duration::from_secs(17));
    assert!(slow.is_none(), "{slow:?}");
    assert!(ends.iter().all(|(_, ended, _)| ended.is_some_and(|it| it.success())), "{ends:?}");
    cluster.etcd.start_all()?;
    for node in &mut cluster.nodes {
        node.start_agent()?;
    }
    cluster.healthy(Duration::from_secs(60)).await;
    let verdict = report.verify(&cluster.app_on_leader().await?).await?;
    assert!(verdict.is_clean(), "{verdict}");
    cluster.passed();
    Ok(())
}
