//! A cluster that grows and shrinks while it works.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_tests::load::{Load, LoadSpec, Report};
use kornak_tests::run::citus::{CitusCluster, CitusSpec};
use kornak_tests::run::postgres::{connect, describe};
use kornak_tests::run::wait::until;
use tokio_postgres::Client;

use super::{Loads, SOON, needs_citus, nothing_was_noticed};

/// For a group to be made, and for shards to be moved to it.
const LONG: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_worker_group_comes_and_goes_and_nobody_notices() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-growth", ..CitusSpec::default() };
    let mut cluster = CitusCluster::start(spec).await?;
    cluster.share_verifier().await?;
    let loads = Loads::start(&cluster).await?;

    let began = Instant::now();
    cluster.add_group(3, 2).await?;
    cluster.healthy(LONG).await;
    cluster.admit_app(3).await?;
    println!("group 3 is registered everywhere after {:.1?}", began.elapsed());
    loads.flow(5).await;

    let coordinator = cluster.coordinator("citus").await?;
    let began = Instant::now();
    coordinator.batch_execute("SELECT rebalance_table_shards('kornak_load')").await?;
    println!("shards moved to it within {:.1?}", began.elapsed());
    assert!(shards_on(&cluster, &coordinator, 3).await? > 0);
    let visitor = on_group(&cluster, 3).await?;
    loads.flow(10).await;

    let leader = cluster.leader(3).await?;
    let port = cluster.node(&leader)?.port();
    let began = Instant::now();
    coordinator.batch_execute(&format!("SELECT citus_drain_node('127.0.0.1', {port})")).await?;
    println!("and back within {:.1?}", began.elapsed());
    loads.flow(5).await;
    let began = Instant::now();
    cluster.remove_group(3).await?;
    until(SOON, "group 3 is removed", || async {
        cluster.right().await?;
        match group_of(&visitor).await {
            Ok(group @ (1 | 2)) => Ok(group),
            other => Err(format!("its session is on {other:?}")),
        }
    })
    .await;
    println!("removed within {:.1?}", began.elapsed());
    loads.flow(10).await;

    let reports = loads.stop(&cluster).await?;
    nothing_was_noticed(&reports);
    cluster.nothing_prepared(SOON).await;
    cluster.passed();
    Ok(())
}

/// A session through the workers' listener on this group.
async fn on_group(cluster: &CitusCluster, group: i32) -> Result<Client> {
    until(SOON, "a session on the new group", || async {
        let client = connect(&cluster.app_on_workers()).await.map_err(|e| describe(&e))?;
        match group_of(&client).await {
            Ok(found) if found == group => Ok(Ok(client)),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

async fn group_of(client: &Client) -> Result<i32, String> {
    let row = client.query_one("SELECT groupid FROM pg_dist_local_group", &[]).await;
    row.map(|row| row.get(0)).map_err(|error| describe(&error))
}

async fn shards_on(cluster: &CitusCluster, coordinator: &Client, group: u32) -> Result<i64> {
    let leader = cluster.leader(group).await?;
    let port = i32::from(cluster.node(&leader)?.port());
    let query = "SELECT count(*) FROM citus_shards WHERE nodeport = $1";
    Ok(coordinator.query_one(query, &[&port]).await?.get(0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_metadata_of_two_databases_are_kept_true() -> Result<()> {
    needs_citus!();
    let databases = vec!["citus", "second"];
    let spec = CitusSpec { name: "citus-two", databases, ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    // First, for it gives every node the coordinator's verifier of the role, and a session that has
    // proven another one cannot move.
    let second = CitusCluster::app_on(cluster.proxy.primary(), "second");
    connect(&second)
        .await?
        .batch_execute(
            "CREATE TABLE kornak_load (id bigint PRIMARY KEY, client integer NOT NULL); \
             SELECT create_distributed_table('kornak_load', 'id', shard_count => 8)",
        )
        .await?;
    let loads = Loads::start(&cluster).await?;
    let few = LoadSpec {
        writers: 2,
        transactions: 1,
        readers: 1,
        reconnecting: 1,
        ..LoadSpec::mixed(&second)
    };
    let other = Load::start(&few).await?;
    other.flows(20, SOON).await;
    for group in [1, 0] {
        cluster.switchover(group).await?;
        cluster.healthy(SOON).await;
        loads.flow(5).await;
        other.flows(5, SOON).await;
    }
    let report = other.stop().await;
    println!("in the second database:\n{report}");
    let verdict = report.verify(&cluster.coordinator("second").await?).await?;
    assert!(verdict.is_clean(), "{verdict}");
    nothing_was_noticed(&[report]);

    let leader = cluster.leader(2).await?;
    cluster.node(&leader)?.kill_postmaster()?;
    loads.flow(10).await;
    cluster.healthy(SOON).await;
    let lost: usize = loads.stop(&cluster).await?.iter().map(Report::lost_connections).sum();
    assert_eq!(lost, 0);
    cluster.nothing_prepared(SOON).await;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pools_follow_a_switchover() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-pools", pools: true, ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    let loads = Loads::start(&cluster).await?;
    pools_are_right(&cluster).await;
    for group in [1, 2] {
        cluster.switchover(group).await?;
        loads.flow(5).await;
        pools_are_right(&cluster).await;
        cluster.healthy(SOON).await;
    }
    let reports = loads.stop(&cluster).await?;
    nothing_was_noticed(&reports);
    cluster.passed();
    Ok(())
}

/// Every leader's `pg_dist_poolinfo` names, for each worker's row, the pool of the server that the row
/// stands for now.
async fn pools_are_right(cluster: &CitusCluster) {
    let text = |error: anyhow::Error| format!("{error:#}");
    until(SOON, "pools are right on every primary", || async {
        for group in cluster.groups.keys() {
            let leader = cluster.leader(*group).await.map_err(text)?;
            let wrong = wrong_pools(cluster, &leader).await.map_err(text)?;
            if !wrong.is_empty() {
                return Err(format!("on {leader}: {wrong:?}"));
            }
        }
        Ok(())
    })
    .await;
}

async fn wrong_pools(cluster: &CitusCluster, node: &str) -> Result<Vec<(i32, Option<String>)>> {
    let client = cluster.node(node)?.connect_to("citus").await.context("connect")?;
    let query = "SELECT n.nodeport, p.poolinfo FROM pg_dist_node n \
        LEFT JOIN pg_dist_poolinfo p USING (nodeid) \
        WHERE groupid > 0 AND p.poolinfo IS DISTINCT FROM 'host=127.0.0.1 port=' || n.nodeport";
    let rows = client.query(query, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
