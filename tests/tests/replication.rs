//! Synchronous standbys and upstreams, while standbys come and go.

use std::time::Duration;

use anyhow::{Context, Result};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::describe;
use kornak_tests::run::wait::until;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// Waits until the store's `sync` is as asked for.
async fn sync_is(cluster: &Cluster, what: &str, fits: impl Fn(&Value, &[String]) -> bool) -> Value {
    until(LIMIT, what, || async {
        let text = cluster.key("sync").await.map_err(|error| format!("{error:#}"))?;
        let sync: Value = serde_json::from_str(&text).map_err(|_| text.clone())?;
        let standbys = sync["sync_standby"].as_str().unwrap_or_default();
        let mut standbys: Vec<String> =
            standbys.split(',').filter(|it| !it.is_empty()).map(str::to_owned).collect();
        standbys.sort_unstable();
        if fits(&sync, &standbys) { Ok(sync) } else { Err(text) }
    })
    .await
}

async fn names_in_force(cluster: &Cluster) -> Result<String> {
    let leader = cluster.connect_to_leader().await?;
    Ok(leader.query_one("SHOW synchronous_standby_names", &[]).await?.get(0))
}

async fn one(cluster: &Cluster, sql: &str) -> Result<()> {
    let client = cluster.connect_to_leader().await?;
    client.batch_execute(sql).await.map_err(|error| anyhow::anyhow!(describe(&error)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn synchronous_modes_keep_their_word_while_standbys_come_and_go() -> Result<()> {
    let spec = ClusterSpec { name: "modes", ..Default::default() };
    let mut cluster = Cluster::start(spec).await?;
    one(&cluster, "CREATE TABLE kept (id int)").await?;

    // A synchronous standby dies: the other one takes its place, and the first comes back.
    let leader = cluster.leader().await?;
    let lost = cluster.sync_standby(LIMIT).await;
    let names: Vec<String> = cluster.nodes.iter().map(|it| it.name().to_owned()).collect();
    let other = names.iter().find(|name| **name != leader && **name != lost).cloned();
    let other = other.context("three nodes")?;
    cluster.node_mut(&lost)?.kill_all();
    sync_is(&cluster, "the other standby is synchronous", |_, names| names == [other.clone()])
        .await;
    one(&cluster, "INSERT INTO kept VALUES (1)").await?;
    cluster.node_mut(&lost)?.start_agent()?;
    cluster.healthy(LIMIT).await;

    // Strict mode without a standby: writes wait, and somebody says so.
    cluster.configure(&json!({"synchronous_mode_strict": true})).await?;
    for name in [&lost, &other] {
        cluster.node_mut(name)?.kill_all();
    }
    sync_is(&cluster, "no standby is named", |_, names| names.is_empty()).await;
    until(LIMIT, "commits wait for anybody", || async {
        match names_in_force(&cluster).await {
            Ok(names) if names == "*" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let waiting = cluster.connect_to_leader().await?;
    let write = waiting.batch_execute("INSERT INTO kept VALUES (2)");
    tokio::pin!(write);
    let early = tokio::time::timeout(Duration::from_secs(2), write.as_mut()).await;
    assert!(early.is_err(), "a write went on without a standby: {early:?}");
    let log = cluster.node(&leader)?.agent_log()?;
    assert!(log.contains("writes wait until a synchronous standby comes"), "{log}");
    cluster.node_mut(&other)?.start_agent()?;
    write.await.map_err(|error| anyhow::anyhow!(describe(&error)))?;
    cluster.node_mut(&lost)?.start_agent()?;
    cluster.healthy(LIMIT).await;

    // Quorum mode: both vote, one of them is waited for.
    cluster
        .configure(&json!({"synchronous_mode": "quorum", "synchronous_mode_strict": null}))
        .await?;
    let sync =
        sync_is(&cluster, "two voters", |sync, names| sync["quorum"] == 1 && names.len() == 2)
            .await;
    println!("quorum mode: {sync}, {}", names_in_force(&cluster).await?);
    until(LIMIT, "commits wait for any of the two", || async {
        match names_in_force(&cluster).await {
            Ok(names) if names.starts_with("ANY 1 (") && names.contains(',') => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(cluster.node(&lost)?.rest().code("/quorum").await?, 200);
    // One is frozen as a whole: commits go on with the other, and what they left is not lost with
    // the leader.
    one(&cluster, "INSERT INTO kept SELECT generate_series(3, 100)").await?;
    cluster.node_mut(&leader)?.kill_all();
    let new = cluster.new_leader(&leader, LIMIT).await;
    let client = cluster.node(&new)?.connect().await?;
    let count: i64 = client.query_one("SELECT count(*) FROM kept", &[]).await?.get(0);
    assert_eq!(count, 100, "every acknowledged row is on {new}");
    cluster.node_mut(&leader)?.start_agent()?;
    sync_is(&cluster, "two voters again", |sync, names| sync["quorum"] == 1 && names.len() == 2)
        .await;
    cluster.passed();
    Ok(())
}

/// Slots of a node by name, with where each stands.
async fn slots(cluster: &Cluster, node: &str) -> Result<Vec<(String, bool)>, String> {
    let node = cluster.node(node).map_err(|error| format!("{error:#}"))?;
    let client = node.connect().await.map_err(|error| describe(&error))?;
    let rows = client
        .query("SELECT slot_name::text, active FROM pg_replication_slots ORDER BY 1", &[])
        .await
        .map_err(|error| describe(&error))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Waits until `cascade` uses its slot on `from`.
async fn streams_from(cluster: &Cluster, cascade: &str, from: &str) {
    until(LIMIT, &format!("{cascade} streams from {from}"), || async {
        let slots = slots(cluster, from).await?;
        if slots.contains(&(cascade.to_owned(), true)) { Ok(()) } else { Err(format!("{slots:?}")) }
    })
    .await;
}

/// How far the consumer of `cdc` is, by a node's own slot.
async fn confirmed(cluster: &Cluster, node: &str) -> Result<i64> {
    let sql = "SELECT (confirmed_flush_lsn - '0/0')::int8 FROM pg_replication_slots \
               WHERE slot_name = 'cdc'";
    let client = cluster.node(node)?.connect().await?;
    Ok(client.query_one(sql, &[]).await?.get(0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cascade_and_permanent_slots_survive_a_failover() -> Result<()> {
    let spec = ClusterSpec {
        name: "slots",
        synchronous: false,
        parameters: vec!["wal_level: logical".to_owned()],
        ..Default::default()
    };
    let mut cluster = Cluster::start(spec).await?;
    let leader = cluster.leader().await?;
    let upstream = cluster.nodes.iter().map(|it| it.name().to_owned()).find(|it| *it != leader);
    let upstream = upstream.context("three nodes")?;
    let cascade = cluster.add_node(|agent| {
        agent.tags = vec![format!("replicatefrom: {upstream}"), "nofailover: true".to_owned()];
    })?;
    cluster.healthy(LIMIT).await;
    streams_from(&cluster, &cascade, &upstream).await;

    // A logical slot that is kept everywhere, and a consumer that is half through.
    let app = cluster.app_on_leader().await?;
    app.batch_execute("CREATE TABLE cdc (id int); INSERT INTO cdc VALUES (0)").await?;
    cluster
        .configure(&json!({"slots": {
            "cdc": {"type": "logical", "database": "app", "plugin": "test_decoding"},
            "kept": {"type": "physical"},
        }, "ignore_slots": [{"name": "strangers"}]}))
        .await?;
    let admin = cluster.connect_to_leader().await?;
    admin.query("SELECT pg_create_physical_replication_slot('strangers', true)", &[]).await?;
    let candidates: Vec<String> = cluster.nodes.iter().map(|it| it.name().to_owned()).collect();
    for name in candidates.iter().filter(|name| **name != cascade) {
        until(LIMIT, &format!("{name} has both permanent slots"), || async {
            let found = slots(&cluster, name).await?;
            let has = |slot: &str| found.iter().any(|(name, _)| name == slot);
            if has("cdc") && has("kept") { Ok(()) } else { Err(format!("{found:?}")) }
        })
        .await;
    }
    cluster.healthy(LIMIT).await;
    let superuser = cluster.node(&leader)?.connect_to("app").await?;
    superuser.batch_execute("INSERT INTO cdc VALUES (1)").await?;
    let change = "SELECT data FROM pg_logical_slot_get_changes('cdc', NULL, NULL) \
                  WHERE data LIKE 'table%'";
    let rows = superuser.query(change, &[]).await?;
    let before: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    superuser.batch_execute("INSERT INTO cdc VALUES (2)").await?;
    // Standbys move their copies along with what the consumer has confirmed.
    let wanted = confirmed(&cluster, &leader).await?;
    for name in candidates.iter().filter(|name| **name != cascade && **name != leader) {
        until(LIMIT, &format!("{name} has moved its copy along"), || async {
            match confirmed(&cluster, name).await {
                Ok(at) if at >= wanted => Ok(()),
                other => Err(format!("{other:?}, {wanted} wanted")),
            }
        })
        .await;
    }
    assert!(slots(&cluster, &leader).await.unwrap().iter().any(|(name, _)| name == "strangers"));

    cluster.node_mut(&leader)?.kill_all();
    let new = cluster.new_leader(&leader, LIMIT).await;
    println!("{leader} lost, {new} leads");
    let consumer = cluster.node(&new)?.connect_to("app").await?;
    let rows = consumer.query(change, &[]).await?;
    let after: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    println!("before: {before:?}; after: {after:?}");
    assert!(before.iter().any(|row| row.contains("integer]:1")), "{before:?}");
    assert!(after.iter().any(|row| row.contains("integer]:2")), "the consumer goes on: {after:?}");
    assert!(!after.iter().any(|row| row.contains("integer]:1")), "nothing twice: {after:?}");

    // The cascade follows its upstream through the failover; without it, the leader.
    streams_from(&cluster, &cascade, &upstream).await;
    cluster.node_mut(&leader)?.start_agent()?;
    cluster.healthy(LIMIT).await;
    if upstream != new {
        cluster.node_mut(&upstream)?.kill_all();
        streams_from(&cluster, &cascade, &new).await;
    }
    cluster.passed();
    Ok(())
}
