//! Client stacks in switchovers and a crash: programs in other languages write through both kinds of
//! listeners, and what they say of it is compared with what is there.
//!
//! A program is told where to write by the environment and says one line for each unit of work, to its
//! standard output:
//!
//! ```text
//! WORKER OP ok IDS|-
//! WORKER OP error SQLSTATE|- IDS|- MESSAGE
//! WORKER OP wrong WHAT
//! ```
//!
//! Not here: what a stack does, which is in tests/clients.

mod crowd;
mod report;
mod said;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use tokio::time::sleep;

pub use report::Row;
pub use said::{Heard, Phase, Told};

use crate::run::cluster::{Cluster, ClusterSpec};
use crate::run::port::Port;
use crate::run::proxy::Proxy;

/// Connections of the pooled listener: fewer than there are clients.
const POOL: usize = 8;

/// Until each worker has written once: interpreters start slowly on a busy machine.
const START: Duration = Duration::from_secs(240);

/// How long nothing may be heard of a worker.
const SILENCE: Duration = Duration::from_secs(30);

/// Until every node follows the new primary, on a busy machine.
const HEALTHY: Duration = Duration::from_secs(120);

/// For programs to end by themselves.
const END: Duration = Duration::from_secs(90);

/// A program with one set of settings.
#[derive(Debug, Clone)]
pub struct Stack {
    /// Stacks of a group run at the same time.
    pub group: String,
    pub name: String,
    pub processes: u64,
    pub command: String,
}

impl Stack {
    /// Reads `GROUP NAME PROCESSES COMMAND…`, one a line.
    pub fn list(text: &str) -> Result<Vec<Self>> {
        let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
        lines
            .map(|line| {
                let mut words = line.split_whitespace();
                let mut word = || words.next().with_context(|| format!("too few words: {line}"));
                let (group, name) = (word()?.to_owned(), word()?.to_owned());
                let processes = word()?.parse().with_context(|| format!("no number: {line}"))?;
                let command = words.collect::<Vec<_>>().join(" ");
                ensure!(!command.is_empty(), "no command: {line}");
                Ok(Self { group, name, processes, command })
            })
            .collect()
    }
}

/// Where things are, and how long they take.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The programs' sources.
    pub sources: PathBuf,
    /// The folder of the built programs, with `GROUP.skipped` where one could not be built.
    pub built: PathBuf,
    /// Between two events.
    pub pause: Duration,
    pub switchovers: usize,
    /// Without it nothing is killed.
    pub crash: bool,
}

/// A cluster for clients of all kinds.
#[derive(Debug)]
pub struct Stage {
    cluster: Cluster,
    proxy: Proxy,
    pooled: Port,
    runs: i32,
}

/// One program on one listener.
struct Run {
    stack: Stack,
    pooled: bool,
    number: i32,
    heard: Arc<Mutex<Heard>>,
    children: Vec<Child>,
}

impl Drop for Run {
    fn drop(&mut self) {
        for child in &mut self.children {
            // Both fail only if it has been collected before.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Stage {
    /// Three nodes and a proxy with a plain and a pooled listener.
    pub async fn start() -> Result<Self> {
        let parameters = vec!["max_connections: 300".to_owned()];
        let spec = ClusterSpec { name: "clients", parameters, ..Default::default() };
        let cluster = Cluster::start(spec).await?;
        let (proxy, pooled) = cluster.proxy_with_a_pool(POOL).await?;
        let admin = cluster.app_on_leader().await?;
        admin
            .batch_execute("CREATE TABLE written (run int NOT NULL, id bigint NOT NULL, note text)")
            .await?;
        Ok(Self { cluster, proxy, pooled, runs: 0 })
    }

    /// Ends everything; nothing is kept.
    pub fn end(self) {
        self.cluster.passed();
    }

    /// Where the outputs of the programs are.
    pub fn path(&self, name: &str) -> PathBuf {
        self.cluster.path(name)
    }

    /// Runs stacks at the same time, each on both listeners.
    pub async fn play(&mut self, stacks: &[Stack], spec: &Spec) -> Result<Vec<Row>> {
        let stop = self.path(&format!("stop-{}", self.runs));
        let phase = Arc::new(AtomicU8::new(Phase::Steady as u8));
        let mut runs = Vec::new();
        for (stack, pooled) in stacks.iter().flat_map(|it| [(it, false), (it, true)]) {
            self.runs += 1;
            runs.push(self.run(stack, pooled, spec, &stop, &phase)?);
        }
        let set = |it: Phase| phase.store(it as u8, Relaxed);
        let asked = self.events(&runs, spec, set).await;
        fs::write(&stop, "").context("tell the programs to stop")?;
        let hung = self.ended(&mut runs).await;
        if spec.crash {
            self.cluster.healthy(HEALTHY).await;
        }
        let refused = asked?;
        let mut rows = Vec::new();
        for (run, hung) in runs.iter().zip(hung) {
            let there = self.there(run.number).await?;
            let heard = run.heard.lock();
            let verdict = Row::of(&run.stack.name, run.pooled, &heard, &there);
            rows.push(Row { hung, refused: refused.clone(), ..verdict });
        }
        Ok(rows)
    }

    fn run(
        &self,
        stack: &Stack,
        pooled: bool,
        spec: &Spec,
        stop: &Path,
        phase: &Arc<AtomicU8>,
    ) -> Result<Run> {
        let port = if pooled { self.pooled.number() } else { self.proxy.primary() };
        let login = Cluster::app_login(port);
        let heard = Arc::new(Mutex::new(Heard::new(phase)));
        let log = self.path(&format!("run-{}-{}.err", self.runs, stack.name));
        let errors = fs::File::create(&log).context("make a log")?;
        let mut children = Vec::new();
        for process in 0..stack.processes {
            let mut child = Command::new("/bin/sh")
                .args(["-c", &format!("exec {}", stack.command)])
                .env("SOURCES", &spec.sources)
                .env("BUILT", &spec.built)
                .envs([
                    ("PGHOST", "127.0.0.1"),
                    ("PGUSER", &login.user),
                    ("PGAPPNAME", &stack.name),
                ])
                .envs([("PGPASSWORD", &login.password), ("PGDATABASE", &login.database)])
                .env("PGPORT", port.to_string())
                .env("RUN", self.runs.to_string())
                .env("WORKER", (process * 10).to_string())
                .env("STOP", stop)
                .current_dir(&spec.built)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(errors.try_clone().context("share a log")?)
                .spawn()
                .with_context(|| format!("start {}", stack.command))?;
            let output = child.stdout.take().context("its output is piped")?;
            let heard = Arc::clone(&heard);
            std::thread::spawn(move || {
                for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                    heard.lock().line(&String::from_utf8_lossy(&line), Instant::now());
                }
            });
            children.push(child);
        }
        Ok(Run { stack: stack.clone(), pooled, number: self.runs, heard, children })
    }

    /// Lets things happen; the answers to switchovers that were refused.
    async fn events(
        &self,
        runs: &[Run],
        spec: &Spec,
        set: impl Fn(Phase),
    ) -> Result<Option<String>> {
        let mut refused = None;
        flowing(runs, START).await;
        sleep(spec.pause).await;
        set(Phase::Switchovers);
        for _ in 0..spec.switchovers {
            if let Err(error) = self.move_on().await {
                refused = Some(format!("{error:#}"));
            }
            flowing(runs, SILENCE).await;
            sleep(spec.pause).await;
            self.cluster.healthy(HEALTHY).await;
        }
        if spec.crash {
            let leader = self.cluster.leader().await?;
            set(Phase::Crash);
            self.cluster.node(&leader)?.kill_postmaster()?;
            self.cluster.new_leader(&leader, Duration::from_secs(60)).await;
            flowing(runs, SILENCE).await;
            set(Phase::After);
            sleep(spec.pause).await;
            flowing(runs, SILENCE).await;
        }
        Ok(refused)
    }

    /// A planned switchover. One that fails for the servers' sake (a checkpoint that takes too long on a
    /// busy machine) is tried again; one that clients hold up is not.
    pub(crate) async fn move_on(&self) -> Result<()> {
        for tries in 0.. {
            let old = self.cluster.leader().await?;
            let candidate = self.cluster.sync_standby(SILENCE).await;
            match self.cluster.switchover(&old, &candidate).await {
                Err(error) if tries < 2 && !format!("{error:#}").contains("kept running") => {
                    self.cluster.healthy(HEALTHY).await;
                }
                ended => return ended,
            }
        }
        Ok(())
    }

    /// Which programs did not end by themselves.
    async fn ended(&self, runs: &mut [Run]) -> Vec<bool> {
        let until = Instant::now() + END;
        let mut hung = Vec::new();
        for run in runs {
            let mut left = true;
            while left && Instant::now() < until {
                left = run.children.iter_mut().any(|it| matches!(it.try_wait(), Ok(None)));
                sleep(Duration::from_millis(50)).await;
            }
            hung.push(left);
        }
        hung
    }

    async fn there(&self, number: i32) -> Result<Vec<i64>> {
        let client = self.cluster.app_on_leader().await?;
        let rows = client.query("SELECT id FROM written WHERE run = $1", &[&number]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

/// Waits until every worker that has been heard of has done something from now on, or `limit` has
/// passed: what does not go on is in the report.
async fn flowing(runs: &[Run], limit: Duration) {
    let (began, seen) = (Instant::now(), runs.iter().map(|it| it.heard.lock().done()));
    let seen: Vec<_> = seen.collect();
    while began.elapsed() < limit {
        let all = runs.iter().zip(&seen).all(|(run, seen)| {
            let now = run.heard.lock().done();
            now.len() >= run.children.len()
                && now.iter().all(|(worker, done)| seen.get(worker).is_none_or(|it| done > it))
        });
        if all {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
}
