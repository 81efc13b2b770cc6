//! `kornak-gaps`: what clients see of switchovers and failures, with Kornak and with Patroni behind HAProxy.
//!
//! Both get the same nodes, the same configuration file, the same etcd and the same mixed load, in one
//! run. Patroni's timing is the same too (`loop_wait: 1`, which is shorter than its default of 10), and
//! HAProxy is configured as Patroni's documentation says.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use kornak_tests::load::{Load, LoadSpec, Report};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::haproxy::HaProxy;
use kornak_tests::run::wait::until;

/// Until every client works again after an event; longer than a lease, Patroni's loops and HAProxy's checks.
const RECOVERY_LIMIT: Duration = Duration::from_secs(150);

/// Measures what clients see of switchovers and failures, and prints one table.
#[derive(Debug, Parser)]
struct Arguments {
    /// Times that each event happens
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The events that happen
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Event::value_variants().to_vec())]
    events: Vec<Event>,
    /// The systems that look after the cluster
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = System::value_variants().to_vec())]
    systems: Vec<System>,
    /// The lease of the leader key, in seconds
    #[arg(long, default_value_t = 30)]
    ttl: u32,
    /// Without synchronous mode
    #[arg(long)]
    asynchronous: bool,
    /// Kornak's `kornak.failover.suspect_after`, in seconds; 0: off
    #[arg(long, default_value_t = 0)]
    suspect_after: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Event {
    /// A planned switchover
    Switchover,
    /// The leader's postmaster is killed
    Postmaster,
    /// Agent, guard and server of the leader are killed
    HostLost,
    /// Agent, guard and server of the leader stand still
    HostFrozen,
    /// The leader's agent stands still, its server does not
    AgentFrozen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum System {
    /// Agents and proxy of Kornak
    Kornak,
    /// Patroni and HAProxy
    Patroni,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Switchover => "switchover",
            Self::Postmaster => "postmaster",
            Self::HostLost => "host-lost",
            Self::HostFrozen => "host-frozen",
            Self::AgentFrozen => "agent-frozen",
        })
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kornak => "kornak",
            Self::Patroni => "patroni",
        })
    }
}

/// A cluster and the port that applications use.
struct Bench {
    cluster: Cluster,
    haproxy: Option<HaProxy>,
}

impl Bench {
    async fn start(system: System, arguments: &Arguments) -> Result<Self> {
        let cluster = Cluster::start(ClusterSpec {
            name: "gaps",
            ttl: arguments.ttl,
            synchronous: !arguments.asynchronous,
            suspect_after: if system == System::Kornak { arguments.suspect_after } else { 0 },
            patroni: if system == System::Patroni { &[0, 1, 2] } else { &[] },
            ..Default::default()
        })
        .await?;
        let haproxy = (system == System::Patroni).then(|| HaProxy::start(&cluster)).transpose()?;
        Ok(Self { cluster, haproxy })
    }

    fn app(&self) -> String {
        match &self.haproxy {
            Some(haproxy) => Cluster::app_on(haproxy.primary()),
            None => self.cluster.app(),
        }
    }

    /// One event under load; what the clients saw, and how many acknowledged rows are missing.
    async fn round(&mut self, event: Event) -> Result<Seen> {
        let load = self.start_load().await;
        load.flows(20, RECOVERY_LIMIT).await;
        let leader = self.cluster.leader().await?;
        self.happen(event, &leader).await?;
        // After a crash Patroni's leader starts its server again in place.
        if matches!(event, Event::HostLost | Event::HostFrozen) {
            self.cluster.new_leader(&leader, RECOVERY_LIMIT).await;
        }
        load.flows(20, RECOVERY_LIMIT).await;
        let report = load.stop().await;
        self.repair(event, &leader).await?;
        let verdict = report.verify(&self.cluster.app_on_leader().await?).await?;
        Ok(Seen::new(&report, verdict.missing.len()))
    }

    /// HAProxy needs some seconds to find the primary.
    async fn start_load(&self) -> Load {
        let spec = LoadSpec::mixed(&self.app());
        let load = until(RECOVERY_LIMIT, "applications reach the primary", || async {
            Load::start(&spec).await.map_err(|error| format!("{error:#}"))
        });
        load.await
    }

    async fn happen(&mut self, event: Event, leader: &str) -> Result<()> {
        match event {
            Event::Switchover => self.cluster.switchover_to_the_next().await.map(drop),
            Event::Postmaster => self.cluster.node(leader)?.kill_postmaster(),
            Event::HostLost => {
                self.cluster.node_mut(leader)?.kill_all();
                Ok(())
            }
            Event::HostFrozen => self.cluster.node(leader)?.freeze_all(),
            Event::AgentFrozen => self.cluster.node(leader)?.freeze_agent(),
        }
    }

    async fn repair(&mut self, event: Event, leader: &str) -> Result<()> {
        let node = self.cluster.node_mut(leader)?;
        match event {
            Event::Switchover | Event::Postmaster => {}
            Event::AgentFrozen => node.thaw_agent()?,
            Event::HostLost | Event::HostFrozen => {
                node.kill_all();
                node.start_agent()?;
            }
        }
        self.cluster.healthy(RECOVERY_LIMIT).await;
        Ok(())
    }
}

/// The clients' view of one event.
struct Seen {
    errors: usize,
    lost_connections: usize,
    longest_gap: Duration,
    missing: usize,
}

impl Seen {
    fn new(report: &Report, missing: usize) -> Self {
        Self {
            errors: report.errors(),
            lost_connections: report.lost_connections(),
            longest_gap: report.longest_gap().length,
            missing,
        }
    }
}

/// One row of the table.
struct Row {
    event: Event,
    system: System,
    seen: Vec<Seen>,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gaps: Vec<f64> =
            self.seen.iter().map(|seen| seen.longest_gap.as_secs_f64()).collect();
        gaps.sort_by(f64::total_cmp);
        let (least, most) = (gaps.first().unwrap_or(&0.0), gaps.last().unwrap_or(&0.0));
        let median = gaps.get(gaps.len() / 2).unwrap_or(&0.0);
        let sum = |of: fn(&Seen) -> usize| self.seen.iter().map(of).sum::<usize>();
        write!(
            f,
            "| {} | {} | {} | {} | {} | {median:.2} s ({least:.2} to {most:.2}) | {} |",
            self.event,
            self.system,
            self.seen.len(),
            sum(|seen| seen.errors),
            sum(|seen| seen.lost_connections),
            sum(|seen| seen.missing),
        )
    }
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the table is what it is for")]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut rows = Vec::new();
    for system in &arguments.systems {
        let mut bench = Bench::start(*system, &arguments).await.context("start a cluster")?;
        for event in &arguments.events {
            let mut row = Row { event: *event, system: *system, seen: Vec::new() };
            for _ in 0..arguments.rounds {
                row.seen.push(bench.round(*event).await?);
            }
            println!("{row}");
            rows.push(row);
        }
        bench.cluster.passed();
    }
    rows.sort_by_key(|row| row.event as usize);
    println!(
        "\n| event | system | rounds | errors | lost connections | longest gap: median (range) | \
         missing rows |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for row in &rows {
        println!("{row}");
    }
    // Missing rows of a competitor are its own affair.
    let ours = rows.iter().filter(|row| row.system == System::Kornak);
    let lost = ours.flat_map(|row| &row.seen).any(|seen| seen.missing > 0);
    Ok(if lost { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
