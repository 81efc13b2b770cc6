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

use std::collections::BTreeMap;
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

/// For clients to write before the next crash, at least.
const WORK: Duration = Duration::from_secs(1);

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
    /// Instead of faults by chance: so often the leader's postmaster is killed, another member's receiver having
    /// been stopped a moment before.
    pub crashes: Option<usize>,
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
    let mut run = Run { usage: Usage::default(), counts: BTreeMap::new(), began, rng };
    match spec.crashes {
        Some(count) => run.crash_the_leader(&mut world, count).await?,
        None => run.break_things(&mut world, spec.length).await?,
    }
    println!("{:>8.1?}  everything is healed", began.elapsed());
    let healed = Instant::now();
    let returned = world.return_of_all(RETURN).await;
    let took = healed.elapsed();
    let seen = clients.stop().await;
    let Run { mut usage, counts, .. } = run;
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

/// The state of a run so far.
struct Run {
    usage: Usage,
    counts: BTreeMap<&'static str, usize>,
    began: Instant,
    rng: Rng,
}

#[expect(clippy::print_stdout, reason = "the story is what the command is for")]
impl Run {
    /// Faults by chance, for so long; in the end all are healed.
    async fn break_things(&mut self, world: &mut World, length: Duration) -> Result<()> {
        let began = self.began;
        let mut under_way: Vec<UnderWay> = Vec::new();
        let mut next = began + faults::pause(&self.rng);
        let mut sample = began;
        while began.elapsed() < length {
            let now = Instant::now();
            let over = under_way.extract_if(.., |one| one.until <= now).collect::<Vec<_>>();
            for one in over {
                println!("{:>8.1?}  healed: {}", began.elapsed(), one.fault);
                world.heal(one.fault).await?;
            }
            world.keep_running()?;
            if now >= sample {
                self.usage.look(began.elapsed(), &world.watched());
                sample = now + SAMPLE;
            }
            if now >= next && under_way.len() < AT_ONCE {
                let busy: Vec<Fault> = under_way.iter().map(|one| one.fault).collect();
                if let Some(fault) = faults::choose(&self.rng, world.targets().await, &busy) {
                    println!("{:>8.1?}  {fault}", began.elapsed());
                    *self.counts.entry(fault.kind()).or_insert(0) += 1;
                    world.inject(fault, &self.rng).await?;
                    let until = Instant::now() + faults::duration(&self.rng, fault);
                    under_way.push(UnderWay { fault, until });
                }
                next = now + faults::pause(&self.rng);
            }
            sleep(Duration::from_millis(100)).await;
        }
        for one in under_way {
            world.heal(one.fault).await?;
        }
        Ok(())
    }

    /// The leader's server is killed again and again, each time with a receiver that has been stopped.
    async fn crash_the_leader(&mut self, world: &mut World, count: usize) -> Result<()> {
        let mut number = 1;
        while number <= count {
            let whole = world.return_of_all(RETURN).await;
            whole.map_err(|seen| anyhow::anyhow!("before crash {number}: {seen}"))?;
            self.usage.look(self.began.elapsed(), &world.watched());
            // For clients to have something under way.
            sleep(WORK + Duration::from_millis(50) * u32::try_from(self.rng.below(20))?).await;
            let lead = Duration::from_millis(50) * u32::try_from(1 + self.rng.below(12))?;
            let crash = world.crash_with_a_stopped_receiver(&self.rng, lead).await?;
            let Some((leader, stopped)) = crash else { continue };
            println!(
                "{:>8.1?}  crash {number}: {leader}, the receiver of {stopped} stopped {lead:?} before",
                self.began.elapsed()
            );
            *self.counts.entry("kill postmaster").or_insert(0) += 1;
            number += 1;
        }
        Ok(())
    }
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
