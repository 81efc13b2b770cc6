//! The store away: with failsafe mode no client notices.
//!
//! `KORNAK_OUTAGE_SECONDS` says for how long; 20 by default, more than two leases.

use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::connect;
use kornak_tests::run::wait::until_true;

fn outage() -> Duration {
    let named = std::env::var("KORNAK_OUTAGE_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(named.unwrap_or(20))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_may_stop_and_come_back_without_a_client_noticing() -> Result<()> {
    let mut cluster = Cluster::start(ClusterSpec { name: "outage", ..Default::default() }).await?;
    let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
    load.flows(20, Duration::from_secs(30)).await;
    let leader = cluster.leader().await?;
    // Another proxy, which is started again while the store is away.
    let mut other = cluster.pooled_proxy(2).await?;
    let noted = other.file().with_extension("known.json");
    let is_noted = || async { noted.exists() };
    until_true(Duration::from_secs(20), "the other proxy notes the servers", is_noted).await;

    let watch = cluster.watch_writes();
    cluster.etcd.kill_all();
    println!("etcd killed at {:.1?}", load.elapsed());
    other.restart().await?;
    let asked = Instant::now();
    let client = connect(&Cluster::app_on(other.primary())).await?;
    client.batch_execute("CREATE TABLE without_store (i int); DROP TABLE without_store").await?;
    println!("a proxy that was started without the store serves after {:.1?}", asked.elapsed());
    let end = tokio::time::Instant::now() + outage();
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
