//! Hosts without power, or without network: nobody resets their connections, and whoever waits for them waits
//! until a timer of his own ends it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use kornak_tests::load::{Doing, Load, LoadSpec, Report};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::lan::{Lan, on_a_lan};
use kornak_tests::run::wait::strict_timing;

/// For every client to go on.
const SOON: Duration = Duration::from_secs(60);

/// Room for a shared machine where a bound is about the machine and not about the protocol.
fn slack() -> Duration {
    if strict_timing() { Duration::ZERO } else { Duration::from_secs(5) }
}

fn spec(name: &'static str, lan: Arc<Lan>) -> ClusterSpec {
    ClusterSpec { name, lan: Some(lan), ..Default::default() }
}

#[test]
fn a_primary_without_power_costs_only_what_was_in_flight() -> Result<()> {
    on_a_lan("a_primary_without_power_costs_only_what_was_in_flight", async |lan| {
        let mut cluster = Cluster::start(spec("power-primary", lan)).await?;
        let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
        load.flows(20, SOON).await;
        let leader = cluster.leader().await?;
        let (began, at) = (Instant::now(), load.elapsed());
        cluster.node_mut(&leader)?.lose_power()?;
        let new = cluster.new_leader(&leader, SOON).await;
        println!("{leader} lost at {at:.1?}; {new} writable after {:.2?}", began.elapsed());
        load.flows(10, SOON).await;
        println!("everybody works after {:.2?}", began.elapsed());
        cluster.node_mut(&leader)?.get_power()?;
        cluster.healthy(SOON).await;
        println!("{leader} is back as a standby after {:.1?}", began.elapsed());

        let report = checked(&cluster, load).await?;
        for (client, problem) in report.problems() {
            let idle = matches!(problem.doing, Doing::Nothing | Doing::Connect | Doing::Waiting);
            assert!(!idle, "client {} in {:?}: {}", client.number, problem.doing, problem.message);
        }
        let limit = Duration::from_secs(u64::from(cluster.spec.ttl) + 2) + slack();
        let gap = report.longest_gap().length;
        assert!(gap < limit, "service was away for {gap:?}, more than {limit:?}");
        cluster.passed();
        Ok(())
    })
}

#[test]
fn a_synchronous_standby_without_power_makes_way_for_one_that_answers() -> Result<()> {
    on_a_lan("a_synchronous_standby_without_power_makes_way_for_one_that_answers", async |lan| {
        // Of which nothing depends here: it is longer than the whole test.
        let long = ClusterSpec { ttl: 300, ..spec("power-standby", lan) };
        let mut cluster = Cluster::start(long).await?;
        let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
        load.flows(20, SOON).await;
        let standby = cluster.sync_standby(SOON).await;
        let (began, at) = (Instant::now(), load.elapsed());
        cluster.node_mut(&standby)?.lose_power()?;
        println!("{standby} lost at {at:.1?}");
        load.flows(10, SOON).await;
        println!("everybody works after {:.2?}", began.elapsed());
        cluster.node_mut(&standby)?.get_power()?;
        cluster.healthy(SOON).await;
        println!("{standby} is back after {:.1?}", began.elapsed());

        let report = checked(&cluster, load).await?;
        assert_eq!(report.errors(), 0, "nobody has an error when a standby is lost");
        let limit = Duration::from_secs(8) + slack();
        let gap = report.longest_gap().length;
        assert!(gap < limit, "commits waited for {gap:?}, more than {limit:?}");
        cluster.passed();
        Ok(())
    })
}

/// The guard of the leader stops the server on its own, for nobody can tell it anything.
#[test]
fn a_leader_that_is_cut_off_stops_before_another_is_promoted() -> Result<()> {
    on_a_lan("a_leader_that_is_cut_off_stops_before_another_is_promoted", async |lan| {
        let cluster = Cluster::start(spec("cut-off", lan)).await?;
        let load = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
        load.flows(20, SOON).await;
        let leader = cluster.leader().await?;
        let watch = cluster.watch_writes();
        let (began, at) = (Instant::now(), load.elapsed());
        cluster.node(&leader)?.cut_off()?;
        let new = cluster.new_leader(&leader, SOON).await;
        println!("{leader} cut off at {at:.1?}; {new} writable after {:.2?}", began.elapsed());
        load.flows(10, SOON).await;
        cluster.node(&leader)?.reconnect()?;
        cluster.healthy(SOON).await;
        println!("{leader} is back as a standby after {:.1?}", began.elapsed());
        assert_eq!(cluster.leader().await?, new);
        checked(&cluster, load).await?;
        let seen = watch.finish().await;
        for span in &seen.spans {
            println!("{} writable {:.2?}..{:.2?}", span.node, span.from, span.to);
        }
        seen.assert_never_two();
        cluster.passed();
        Ok(())
    })
}

/// Checks what holds in any case: no connection is lost, and nothing that was acknowledged.
async fn checked(cluster: &Cluster, load: Load) -> Result<Report> {
    let report = load.stop_and_verify(&cluster.app_on_leader().await?).await?;
    for (client, _) in report.problems() {
        let failed = client.problems.len() + client.further_problems;
        assert!(failed <= 2, "client {} failed {failed} times", client.number);
    }
    Ok(report)
}
