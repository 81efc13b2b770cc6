//! Citus with the real extension. Without it each test says so and does nothing.

#![expect(clippy::print_stdout, reason = "a run shows what it did")]

mod certificates;
mod changes;
mod failovers;
mod growth;
mod patroni;
mod readers;
mod switchovers;

use std::time::Duration;

use anyhow::Result;
use kornak_tests::load::{Load, LoadSpec, Report};
use kornak_tests::run::citus::CitusCluster;
use kornak_tests::run::postgres::connect;

/// Without the extension a test says so and does nothing.
macro_rules! needs_citus {
    () => {
        if !kornak_tests::run::citus::is_installed() {
            println!("SKIPPED: the Citus extension is not installed");
            return Ok(());
        }
    };
}
use needs_citus;

/// For every client of a load to go on after something has happened.
const SOON: Duration = Duration::from_secs(45);

/// The mixed load through the coordinator, and a fifth of it through the workers.
struct Loads {
    coordinator: Load,
    workers: Load,
}

impl Loads {
    /// On a distributed table, which is made.
    async fn start(cluster: &CitusCluster) -> Result<Self> {
        distribute(cluster).await?;
        let coordinator = Load::start(&LoadSpec::mixed(&cluster.app())).await?;
        let few = LoadSpec {
            writers: 2,
            transactions: 1,
            readers: 1,
            reconnecting: 0,
            ..LoadSpec::mixed(&cluster.app_on_workers())
        };
        let loads = Self { coordinator, workers: Load::start(&few).await? };
        loads.flow(20).await;
        Ok(loads)
    }

    /// Waits until each client has had so many further successes.
    async fn flow(&self, more: u64) {
        self.coordinator.flows(more, SOON).await;
        self.workers.flows(more, SOON).await;
    }

    /// Time since each of them began, as in their reports.
    fn elapsed(&self) -> [Duration; 2] {
        [self.coordinator.elapsed(), self.workers.elapsed()]
    }

    /// The reports of the clients; every acknowledged row is there, and no transaction is torn.
    async fn stop(self, cluster: &CitusCluster) -> Result<[Report; 2]> {
        let reports = [self.coordinator.stop().await, self.workers.stop().await];
        let [first, second] = &reports;
        println!("through the coordinator:\n{first}\nthrough the workers:\n{second}");
        let metrics = cluster.proxy.status().get("/metrics").await?.text;
        for line in metrics.lines().filter(|line| line.starts_with("kornak_proxy_pinned_closed")) {
            println!("{line}");
        }
        let coordinator = cluster.coordinator("citus").await?;
        for report in &reports {
            let verdict = report.verify(&coordinator).await?;
            println!("{verdict}");
            assert!(verdict.is_clean(), "{verdict}");
        }
        Ok(reports)
    }
}

/// Makes the load's table, distributed over all workers.
async fn distribute(cluster: &CitusCluster) -> Result<()> {
    let client = connect(&cluster.app()).await?;
    client
        .batch_execute(
            "CREATE TABLE kornak_load (id bigint PRIMARY KEY, client integer NOT NULL); \
             SELECT create_distributed_table('kornak_load', 'id', shard_count => 8)",
        )
        .await?;
    Ok(())
}

/// No client had an error, lost its connection or missed a row.
fn nothing_was_noticed(reports: &[Report]) {
    for report in reports {
        assert_eq!((report.errors(), report.lost_connections(), report.stale_reads()), (0, 0, 0));
    }
}
