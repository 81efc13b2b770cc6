//! Planned switchovers under load.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::citus::{CitusCluster, CitusSpec};
use kornak_tests::run::postgres::{connect, describe};
use kornak_tests::run::wait::{strict_timing, until};

use super::{Loads, SOON, distribute, needs_citus, nothing_was_noticed};

/// One of each group; `KORNAK_CITUS_SWITCHOVERS=15` makes it the promise, ten of workers and five of
/// the coordinator.
fn switchovers() -> usize {
    let wanted = std::env::var("KORNAK_CITUS_SWITCHOVERS").ok();
    wanted.and_then(|wanted| wanted.parse().ok()).unwrap_or(3)
}

/// How soon after the command `pg_dist_node` is right on every node.
fn right_limit() -> Duration {
    Duration::from_secs(if strict_timing() { 2 } else { 5 })
}

/// The promise, and what a busy machine may make of it.
fn gap_limit() -> Duration {
    if strict_timing() { Duration::from_millis(500) } else { Duration::from_secs(5) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switchovers_of_workers_and_coordinator_cost_no_client_an_error() -> Result<()> {
    needs_citus!();
    let cluster = CitusCluster::start(CitusSpec::default()).await?;
    let loads = Loads::start(&cluster).await?;
    for group in [1, 2, 0].into_iter().cycle().take(switchovers()) {
        let (began, at) = (Instant::now(), loads.coordinator.elapsed());
        cluster.switchover(group).await?;
        let (took, ended) = (began.elapsed(), Instant::now());
        until(right_limit(), "pg_dist_node is right on every node", || {
            cluster.primaries_are_right()
        })
        .await;
        println!(
            "group {group} at {at:.1?}, command took {took:.2?}, pg_dist_node right {:.2?} later",
            ended.elapsed()
        );
        loads.flow(5).await;
        cluster.healthy(SOON).await;
    }
    let reports = loads.stop(&cluster).await?;
    nothing_was_noticed(&reports);
    cluster.nothing_prepared(SOON).await;
    cluster.passed();
    Ok(())
}

/// `INSERT` with `\watch 0.01` in psql, as in the article that shows a gap of 2,893 ms.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_writer_waits_for_a_moment_in_a_switchover() -> Result<()> {
    needs_citus!();
    let cluster =
        CitusCluster::start(CitusSpec { name: "citus-gap", ..CitusSpec::default() }).await?;
    distribute(&cluster).await?;
    for group in [2, 1, 2, 1, 0, 0] {
        let one = LoadSpec {
            writers: 1,
            transactions: 0,
            readers: 0,
            reconnecting: 0,
            ..LoadSpec::mixed(&cluster.app())
        };
        let load = Load::start(&one).await?;
        load.flows(50, SOON).await;
        cluster.switchover(group).await?;
        load.flows(50, SOON).await;
        let report = load.stop().await;
        let gap = report.longest_gap().length;
        println!("group {group}: {gap:.0?}");
        assert_eq!((report.errors(), report.lost_connections()), (0, 0), "{report}");
        assert!(gap < gap_limit(), "the client waited {gap:?}, more than {:?}", gap_limit());
        cluster.healthy(SOON).await;
    }
    cluster.passed();
    Ok(())
}

/// A transaction that will not end in time keeps a switchover waiting, wherever it began, and costs
/// nobody else a stall (SAFETY scenario A14).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchover_waits_for_a_long_transaction_and_holds_nobody_meanwhile() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-long", ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    let loads = Loads::start(&cluster).await?;
    let mut long = connect(&cluster.app_on_workers()).await?;
    let transaction = long.transaction().await?;
    transaction.execute("INSERT INTO kornak_load VALUES (1, 0)", &[]).await?;
    let (began, ended) = (Instant::now(), Cell::new(None));
    let switching = async {
        let done = cluster.switchover(1).await;
        ended.set(Some(began.elapsed()));
        done
    };
    let working = async {
        until(SOON, "the switchover is prepared", || async {
            let log = cluster.nodes().filter_map(|node| node.agent_log().ok());
            let begun = log.filter(|log| log.contains("switchover begun")).count();
            if begun > 0 { Ok(()) } else { Err("no".to_owned()) }
        })
        .await;
        // Two seconds and more of units, while the switchover would like to begin.
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(3) {
            loads.flow(5).await;
        }
        assert_eq!(ended.get(), None, "it did not wait");
        let text = cluster.proxy.status().get("/metrics").await?.text;
        assert!(text.contains("kornak_proxy_handover_seconds_count 0\n"), "somebody was held");
        transaction.commit().await.map_err(anyhow::Error::from)
    };
    let (switched, worked) = tokio::join!(switching, working);
    worked?;
    switched?;
    println!("the command took {:.1?}", ended.get());
    cluster.healthy(SOON).await;
    let reports = loads.stop(&cluster).await?;
    nothing_was_noticed(&reports);
    cluster.passed();
    Ok(())
}

/// A lock on a group's shards is waited for without force, and nobody is held longer than a drain lasts
/// (SAFETY scenario A7.4).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_on_the_shards_puts_a_switchover_off_and_ends_nobody() -> Result<()> {
    needs_citus!();
    let spec = CitusSpec { name: "citus-lock", members: vec![1, 2, 1], ..CitusSpec::default() };
    let cluster = CitusCluster::start(spec).await?;
    distribute(&cluster).await?;
    let before = cluster.leader(1).await?;
    let bystander = connect(&cluster.app()).await?;
    let holder = cluster.coordinator("citus").await?;
    // What a rebalance or a direct client's transaction holds, without a session on the worker.
    let lock = "BEGIN; SELECT citus_pause_node_within_txn(nodeid) FROM pg_dist_node \
        WHERE groupid = 1 AND noderole = 'primary'";
    holder.batch_execute(lock).await?;
    let (since, longest) = (Cell::new(Instant::now()), Cell::new(Duration::ZERO));
    let switching = cluster.switchover(1);
    let holding = async {
        until(SOON, "the coordinator refuses", || async {
            let began = Instant::now();
            bystander.simple_query("SELECT 1").await.map_err(|error| describe(&error))?;
            longest.set(longest.get().max(began.elapsed()));
            let log = cluster.node(&before).and_then(kornak_tests::run::agent::Node::agent_log);
            let log = log.map_err(|error| format!("{error:#}"))?;
            let refused =
                ["coordinator refused to block writes", "coordinator did not answer in time"];
            if refused.iter().any(|words| log.contains(words)) {
                return Ok(());
            }
            // A transaction that is old is waited for before anybody is held; a young one is not.
            if log.contains("switchover begun") && since.get().elapsed() > Duration::from_secs(2) {
                let again = holder.batch_execute(&format!("COMMIT; {lock}")).await;
                again.map_err(|error| describe(&error))?;
                since.set(Instant::now());
            }
            Err("not yet".to_owned())
        })
        .await;
        assert_eq!(cluster.leader(1).await?, before, "it still leads");
        holder.batch_execute("COMMIT").await.map_err(anyhow::Error::from)
    };
    let (switched, held) = tokio::join!(switching, holding);
    held?;
    switched?;
    println!("nobody waited longer than {:.1?}", longest.get());
    assert!(longest.get() < gap_limit(), "a bystander waited {:?}", longest.get());
    assert_ne!(cluster.leader(1).await?, before);
    cluster.healthy(SOON).await;
    cluster.passed();
    Ok(())
}
