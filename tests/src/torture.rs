//! Torture: a cluster on hosts of its own in which something breaks every few seconds, often a second
//! thing before the first is repaired, while clients append to lists and read them ([`history`]).
//!
//! Three database hosts, three etcd members and two proxies (the second one pools transactions), each in a
//! network namespace. Whatever has ended is started again, as systemd does. At the end everything is
//! healed, every node has to return without help, and what clients saw is compared with the lists.

pub mod clients;
pub mod faults;
pub mod history;
pub mod report;
pub mod usage;
pub mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::time::sleep;

use crate::run::lan::Lan;
use crate::run::postgres::connect;
use crate::run::wait::until;
use crate::sim::rng::Rng;
use clients::{ClientSpec, Clients};
use faults::Fault;
use report::Report;
use usage::Usage;
use world::World;

/// For every node to return after the last fault was healed. Copies of whole servers take their time.
const RETURN: Duration = Duration::from_secs(240);

/// How much may go on at once.
const AT_ONCE: usize = 3;

/// Between two looks at what processes use.
const SAMPLE: Duration = Duration::from_secs(10);

/// The synchronous mode of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    On,
    Strict,
    Quorum,
    Off,
}

/// Something wrong on purpose, which the check has to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mutation {
    /// Clients do not wait for standbys (`synchronous_commit = local`).
    LocalCommit,
    /// Clients append again after an unknown outcome.
    SendAgain,
}

/// One run.
#[derive(Debug, Clone)]
pub struct Spec {
    pub length: Duration,
    pub seed: u64,
    pub mode: Mode,
    pub mutation: Option<Mutation>,
    pub clients: usize,
}

/// A fault that is not over.
struct UnderWay {
    fault: Fault,
    until: Instant,
}

/// Lives through one run and judges it.
///
/// # Panics
/// When the cluster cannot be started, or a node does not return.
#[expect(clippy::print_stdout, reason = "the story is what the command is for")]
pub async fn run(lan: Arc<Lan>, spec: &Spec) -> Result<Report> {
    let rng = Rng::new(spec.seed);
    let mut world = World::start(lan, spec).await?;
    let began = Instant::now();
    let clients = Clients::start(&client_spec(&world, spec), began);
    let watch = world.watch_writes();
    let mut usage = Usage::default();
    let mut counts = std::collections::BTreeMap::new();
    let mut under_way: Vec<UnderWay> = Vec::new();
    let mut next = began + faults::pause(&rng);
    let mut sample = began;
    while began.elapsed() < spec.length {
        let now = Instant::now();
        let over = under_way.extract_if(.., |one| one.until <= now).collect::<Vec<_>>();
        for one in over {
            println!("{:>8.1?}  healed: {}", began.elapsed(), one.fault);
            world.heal(one.fault).await?;
        }
        world.keep_running()?;
        if now >= sample {
            usage.look(began.elapsed(), &world.watched());
            sample = now + SAMPLE;
        }
        if now >= next && under_way.len() < AT_ONCE {
            let busy: Vec<Fault> = under_way.iter().map(|one| one.fault).collect();
            if let Some(fault) = faults::choose(&rng, world.targets().await, &busy) {
                println!("{:>8.1?}  {fault}", began.elapsed());
                *counts.entry(fault.kind()).or_insert(0) += 1;
                world.inject(fault, &rng).await?;
                let until = Instant::now() + faults::duration(&rng, fault);
                under_way.push(UnderWay { fault, until });
            }
            next = now + faults::pause(&rng);
        }
        sleep(Duration::from_millis(100)).await;
    }
    for one in under_way {
        world.heal(one.fault).await?;
    }
    println!("{:>8.1?}  everything is healed", began.elapsed());
    let healed = Instant::now();
    let returned = world.return_of_all(RETURN).await;
    let took = healed.elapsed();
    let seen = clients.stop().await;
    usage.look(began.elapsed(), &world.watched());
    let writable = watch.finish().await;
    let lists = until(Duration::from_secs(60), "the lists", || async {
        let reader = connect(&world.app()).await.map_err(|error| error.to_string())?;
        clients::lists(&reader).await.map_err(|error| error.to_string())
    })
    .await;
    let anomalies = history::check(&seen.units, &lists);
    let report = Report { counts, seen, anomalies, usage, returned, took, writable, lists };
    if report.is_good(spec.mode) {
        world.passed();
    }
    Ok(report)
}

fn client_spec(world: &World, spec: &Spec) -> ClientSpec {
    let mut settings = vec!["SET default_transaction_isolation = serializable".to_owned()];
    if spec.mutation == Some(Mutation::LocalCommit) {
        settings.push("SET synchronous_commit = local".to_owned());
    }
    ClientSpec {
        ways: world.ways(),
        settings,
        clients: spec.clients,
        sends_again: spec.mutation == Some(Mutation::SendAgain),
    }
}

/// Runs in the network that [`crate::run::lan::run_inside`] has made.
pub fn run_here(spec: &Spec) -> Result<Report> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().context("start a runtime")?;
    runtime.block_on(async {
        let lan = Arc::new(Lan::new()?);
        let report = run(Arc::clone(&lan), spec).await?;
        lan.passed();
        Ok(report)
    })
}
