//! A proxy without a store: the members' REST API says who they are, their servers who leads.

use std::time::Duration;

use anyhow::{Context, Result};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::connect;
use kornak_tests::run::wait::until;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_follows_a_cluster_by_its_rest_api_alone() -> Result<()> {
    let mut cluster =
        Cluster::start(ClusterSpec { name: "rest-source", ..Default::default() }).await?;
    let proxy = cluster.proxy_by_rest().await?;
    let app = Cluster::app_on(proxy.primary());
    proxy.ready(&app, Duration::from_secs(30)).await;
    let client = connect(&app).await.context("connect")?;
    client.batch_execute("CREATE TABLE said (n int)").await?;
    client.batch_execute("INSERT INTO said VALUES (1)").await?;
    let reader = connect(&Cluster::app_on(proxy.standbys())).await?;
    let reads: bool = reader.query_one("SELECT pg_is_in_recovery()", &[]).await?.get(0);
    assert!(reads, "the standbys' listener leads to a standby");

    let leader = cluster.leader().await?;
    cluster.node_mut(&leader)?.kill_all();
    // The same session goes on: at most the statement that is in flight when the host goes fails.
    until(Duration::from_secs(60), "the session writes to the next primary", || async {
        client.batch_execute("INSERT INTO said VALUES (2)").await.map_err(|error| error.to_string())
    })
    .await;
    let kept: i64 = client.query_one("SELECT count(*) FROM said WHERE n = 1", &[]).await?.get(0);
    assert_eq!(kept, 1);
    let next = cluster.new_leader(&leader, Duration::from_secs(30)).await;
    let there = cluster.node(&next)?.connect().await?;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state = 'idle'";
    let sessions: i64 = there.query_one(sql, &[]).await?.get(0);
    assert!(sessions >= 1, "the session is on {next}");
    drop(proxy);
    cluster.passed();
    Ok(())
}
