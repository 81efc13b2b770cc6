//! The cluster that is tortured, and the hands that break and repair it.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use tokio::time::timeout;

use super::clients::CREATE;
use super::faults::{Fault, NodeNumber, Targets};
use super::{Mode, Spec};
use crate::run::agent::{AgentSpec, Node, Program};
use crate::run::etcd::Etcd;
use crate::run::kornak;
use crate::run::lan::{Host, Lan};
use crate::run::postgres::{SUPERUSER_PASSWORD, connect, describe};
use crate::run::process::{Process, is_alive, send};
use crate::run::proxy::Proxy;
use crate::run::scratch::Scratch;
use crate::run::wait::until;
use crate::run::watch::WriteWatch;
use crate::sim::rng::Rng;

const NODES: usize = 3;
const STORE_MEMBERS: usize = 3;

/// Megabytes of each database host's disk: small enough that filling it takes no time.
const DISK: u32 = 900;

/// For the first healthy cluster.
const START: Duration = Duration::from_secs(120);

/// How soon a supervisor starts again what has ended (systemd's `RestartSec` in deploy/).
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// For a question to a REST API while hosts may be frozen.
const PATIENCE: Duration = Duration::from_secs(2);

/// All of it; ends with everything it started.
pub struct World {
    nodes: Vec<Database>,
    proxies: Vec<Balancer>,
    etcd: Etcd,
    store_hosts: Vec<Arc<Host>>,
    netem: bool,
    /// An older copy of the store.
    backup: Option<PathBuf>,
    /// Switchovers and restarts that are under way.
    commands: Vec<Process>,
    disks: Vec<Disk>,
    scratch: Scratch,
}

struct Database {
    node: Node,
    host: Arc<Host>,
    /// When its agent was seen to have ended.
    ended: Option<Instant>,
    /// Whether nothing may start it again yet: its host has no power.
    down: bool,
    filler: Option<PathBuf>,
}

struct Balancer {
    proxy: Proxy,
    ended: Option<Instant>,
}

/// A small file system for one host.
struct Disk(PathBuf);

impl World {
    /// Starts everything and waits until it is healthy.
    ///
    /// # Panics
    /// When it is not healthy within two minutes.
    pub async fn start(lan: Arc<Lan>, spec: &Spec) -> Result<Self> {
        let scratch = Scratch::new("torture");
        let mut store_hosts = Vec::new();
        for _ in 0..STORE_MEMBERS {
            store_hosts.push(lan.host().await?);
        }
        let etcd = Etcd::start_on(&store_hosts).await?;
        let (mut nodes, mut disks) = (Vec::new(), Vec::new());
        for index in 0..NODES {
            let host = lan.host().await?;
            disks.push(Disk::mount(&scratch.join(&format!("node{index}")), DISK)?);
            let agent = agent_spec(spec, &etcd, index, Arc::clone(&host));
            let node = Node::start(&scratch, &agent, Program::Kornak)?;
            nodes.push(Database { node, host, ended: None, down: false, filler: None });
        }
        let head = format!("scope: demo\netcd3:\n  hosts: [{}]", etcd.endpoints().join(", "));
        let auth =
            format!("auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}");
        let mut proxies = Vec::new();
        for (index, more) in ["", ", pool_mode: transaction, pool_size: 6"].iter().enumerate() {
            let (name, host) = (format!("proxy{index}"), lan.host().await?);
            let proxy = Proxy::start_on(&scratch, &name, &head, more, &auth, Some(host)).await?;
            proxies.push(Balancer { proxy, ended: None });
        }
        let netem = nodes.iter().all(|it| it.host.disturb("delay 1ms").is_ok());
        if netem {
            nodes.iter().try_for_each(|it| it.host.calm())?;
        }
        let world = Self {
            nodes,
            proxies,
            etcd,
            store_hosts,
            netem,
            backup: None,
            commands: Vec::new(),
            disks,
            scratch,
        };
        world.healthy(START).await.map_err(anyhow::Error::msg)?;
        world.prepare(spec).await?;
        world.healthy(START).await.map_err(anyhow::Error::msg)?;
        Ok(world)
    }

    /// Chooses the synchronous mode and makes the table.
    async fn prepare(&self, spec: &Spec) -> Result<()> {
        let mode = match spec.mode {
            Mode::On => json!({"synchronous_mode": true}),
            Mode::Strict => json!({"synchronous_mode": true, "synchronous_mode_strict": true}),
            Mode::Quorum => json!({"synchronous_mode": "quorum"}),
            Mode::Off => json!({"synchronous_mode": false}),
        };
        let node = self.nodes.first().context("a node")?;
        let answer = node.node.rest().patch("/config", &mode).await?;
        ensure!(answer.code == 200, "PATCH /config: {} {}", answer.code, answer.text);
        until(Duration::from_secs(30), "the table", || async {
            let client = connect(&self.app()).await.map_err(|error| describe(&error))?;
            client.batch_execute(CREATE).await.map_err(|error| describe(&error))
        })
        .await;
        Ok(())
    }

    /// A login through the first proxy.
    pub fn app(&self) -> String {
        self.ways().swap_remove(0)
    }

    /// A login to the primary through each proxy.
    pub fn ways(&self) -> Vec<String> {
        let logins = self.proxies.iter().map(|it| {
            let port = it.proxy.primary();
            crate::run::postgres::superuser(port).replace("connect_timeout=3", "connect_timeout=30")
        });
        logins.collect()
    }

    pub fn watch_writes(&self) -> WriteWatch {
        let servers = self.nodes.iter().map(|it| (it.node.name().to_owned(), it.node.console()));
        WriteWatch::start(servers.collect())
    }

    /// Agents and proxies, by name and process.
    pub fn watched(&mut self) -> Vec<(String, u32)> {
        let mut found = Vec::new();
        for it in &mut self.nodes {
            let name = it.node.name().to_owned();
            if let Some(agent) = it.node.agent() {
                found.push((format!("{name} agent"), agent.pid()));
            }
            if let Some(guard) = guard_of(&it.node) {
                found.push((format!("{name} guard"), guard));
            }
        }
        for (index, it) in self.proxies.iter_mut().enumerate() {
            found.push((format!("proxy{index}"), it.proxy.process().pid()));
        }
        found
    }

    /// The things that may be broken next.
    pub async fn targets(&self) -> Targets {
        let leader = self.leader().await;
        Targets {
            nodes: NODES,
            proxies: self.proxies.len(),
            store: STORE_MEMBERS,
            netem: self.netem,
            leader,
        }
    }

    async fn leader(&self) -> Option<NodeNumber> {
        let members = self.members().await.ok()?;
        let leader = members.iter().find(|member| member.1 == "leader")?;
        self.nodes.iter().position(|it| it.node.name() == leader.0)
    }

    /// Name, role and state of each member, by the first API that answers.
    async fn members(&self) -> Result<Vec<(String, String, String)>, String> {
        let mut last = "no API answers".to_owned();
        for it in &self.nodes {
            let rest = it.node.rest();
            let answer = match timeout(PATIENCE, rest.get("/cluster")).await {
                Ok(Ok(answer)) => answer.json().map_err(|error| error.to_string())?,
                Ok(Err(error)) => {
                    last = format!("{error:#}");
                    continue;
                }
                Err(_) => continue,
            };
            let text = |member: &serde_json::Value, key: &str| {
                member[key].as_str().unwrap_or_default().to_owned()
            };
            let members = answer["members"].as_array().cloned().unwrap_or_default();
            let told =
                members.iter().map(|it| (text(it, "name"), text(it, "role"), text(it, "state")));
            return Ok(told.collect());
        }
        Err(last)
    }

    /// Waits for one leader, and for every other node to stream from it.
    async fn healthy(&self, limit: Duration) -> Result<(), String> {
        let began = Instant::now();
        let mut seen = String::new();
        while began.elapsed() < limit {
            match self.look().await {
                Ok(()) => return Ok(()),
                Err(what) => seen = what,
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Err(seen)
    }

    async fn look(&self) -> Result<(), String> {
        let members = self.members().await?;
        let leads = |it: &&(String, String, String)| it.1 == "leader" && it.2 == "running";
        let streams = |it: &&(String, String, String)| it.1 != "leader" && it.2 == "streaming";
        let leaders = members.iter().filter(leads).count();
        let standbys = members.iter().filter(streams).count();
        if leaders != 1 || standbys != NODES - 1 {
            return Err(format!("{members:?}"));
        }
        // The store may remember for a while what has ended.
        for it in &self.nodes {
            let connected = timeout(PATIENCE, it.node.connect()).await;
            connected.map_err(|_| "a server is silent")?.map_err(|error| describe(&error))?;
        }
        Ok(())
    }

    /// Waits until every node is back, and keeps starting what has ended meanwhile.
    pub async fn return_of_all(&mut self, limit: Duration) -> Result<(), String> {
        let began = Instant::now();
        loop {
            self.keep_running().map_err(|error| format!("{error:#}"))?;
            let seen = self.healthy(Duration::from_secs(1)).await;
            if seen.is_ok() || began.elapsed() > limit {
                return seen;
            }
        }
    }

    /// Starts again what has ended, as a supervisor does.
    pub fn keep_running(&mut self) -> Result<()> {
        self.commands.retain_mut(|command| command.exited().is_none());
        let now = Instant::now();
        for it in &mut self.nodes {
            let ended = it.node.agent().is_none_or(|agent| agent.exited().is_some());
            if !ended || it.down {
                it.ended = None;
            } else if now >= *it.ended.get_or_insert(now) + RESTART_AFTER {
                it.node.start_agent()?;
                it.ended = None;
            }
        }
        for it in &mut self.proxies {
            if it.proxy.process().exited().is_none() {
                it.ended = None;
            } else if now >= *it.ended.get_or_insert(now) + RESTART_AFTER {
                it.proxy.begin_again()?;
                it.ended = None;
            }
        }
        Ok(())
    }

    /// Stops the receiver of a standby, and `lead` later kills the leader's postmaster; what the receiver had not
    /// read by then is lost. Returns the two names; `None`: nobody leads, or
    /// the receiver has just ended.
    pub async fn crash_with_a_stopped_receiver(
        &self,
        rng: &Rng,
        lead: Duration,
    ) -> Result<Option<(String, String)>> {
        let Some(leader) = self.leader().await else { return Ok(None) };
        let others: Vec<NodeNumber> = (0..NODES).filter(|node| *node != leader).collect();
        let other = &self.nodes[others[rng.below(others.len())]].node;
        let receiver = other.processes().into_iter().find(|pid| {
            let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&title).contains(": walreceiver")
        });
        let Some(receiver) = receiver else { return Ok(None) };
        send(receiver, Signal::STOP)?;
        tokio::time::sleep(lead).await;
        self.signal_postmaster(leader, Signal::KILL);
        let _ = send(receiver, Signal::TERM);
        let _ = send(receiver, Signal::CONT);
        Ok(Some((self.nodes[leader].node.name().to_owned(), other.name().to_owned())))
    }

    /// Breaks something. What is gone already cannot be broken, and that is no error.
    pub async fn inject(&mut self, fault: Fault, rng: &Rng) -> Result<()> {
        match fault {
            Fault::KillPostmaster(node) => self.signal_postmaster(node, Signal::KILL),
            Fault::FreezePostmaster(node) => self.signal_postmaster(node, Signal::STOP),
            Fault::KillAgent(node) => self.signal_agent(node, Signal::KILL),
            Fault::FreezeAgent(node) => self.signal_agent(node, Signal::STOP),
            Fault::KillGuard(node) => {
                if let Some(guard) = guard_of(&self.nodes[node].node) {
                    let _ = send(guard, Signal::KILL);
                }
            }
            Fault::KillProxy(number) => self.signal_proxy(number, Signal::KILL),
            Fault::FreezeProxy(number) => self.signal_proxy(number, Signal::STOP),
            Fault::LosePower(node) => {
                self.nodes[node].down = true;
                self.nodes[node].node.lose_power()?;
            }
            Fault::FreezeHost(node) => self.signal_host(node, Signal::STOP),
            Fault::CutOff(node) => self.nodes[node].host.cut_off()?,
            Fault::CutFromStore(node) => self.between_node_and_store(node, Host::deafen)?,
            Fault::Deafen(from, to) => {
                self.nodes[from].host.deafen(&self.nodes[to].host.address())?;
            }
            Fault::Disturb(node) => {
                let (delay, loss) = (5 + rng.below(150), rng.below(30));
                let words = format!("delay {delay}ms {}ms loss {loss}%", delay / 2);
                self.nodes[node].host.disturb(&words)?;
            }
            Fault::FillDisk(node) => self.nodes[node].filler = Some(self.disks[node].fill()?),
            Fault::KillStoreMember(member) => self.etcd.kill_member(member),
            Fault::FreezeStoreMember(member) => self.etcd.freeze_member(member)?,
            Fault::LoseStoreMajority => (1..STORE_MEMBERS).for_each(|it| self.etcd.kill_member(it)),
            Fault::MoveStoreLeader => {
                let _ = timeout(PATIENCE, self.etcd.move_leader()).await;
            }
            Fault::RestoreStore => self.restore_store().await?,
            Fault::Configure => self.configure(rng).await,
            Fault::SwitchOver => self.command(&["switchover", "--force"])?,
            Fault::Restart(node) => {
                let name = self.nodes[node].node.name().to_owned();
                self.command(&["restart", "demo", &name, "--force"])?;
            }
        }
        Ok(())
    }

    /// Repairs it, if anything is left to be repaired.
    pub async fn heal(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::FreezePostmaster(node) => self.signal_postmaster(node, Signal::CONT),
            Fault::FreezeAgent(node) => self.signal_agent(node, Signal::CONT),
            Fault::FreezeProxy(number) => self.signal_proxy(number, Signal::CONT),
            Fault::LosePower(node) => {
                self.nodes[node].down = false;
                self.nodes[node].node.reconnect()?;
            }
            Fault::FreezeHost(node) => self.signal_host(node, Signal::CONT),
            Fault::CutOff(node) => self.nodes[node].host.reconnect()?,
            Fault::CutFromStore(node) => self.between_node_and_store(node, Host::undeafen)?,
            Fault::Deafen(from, to) => {
                self.nodes[from].host.undeafen(&self.nodes[to].host.address())?;
            }
            Fault::Disturb(node) => self.nodes[node].host.calm()?,
            Fault::FillDisk(node) => {
                if let Some(filler) = self.nodes[node].filler.take() {
                    fs::remove_file(filler).context("empty the disk")?;
                }
            }
            Fault::FreezeStoreMember(member) => self.etcd.thaw_member(member)?,
            Fault::KillStoreMember(_) | Fault::LoseStoreMajority | Fault::RestoreStore => {
                self.etcd.start_all()?;
            }
            Fault::KillPostmaster(_)
            | Fault::KillAgent(_)
            | Fault::KillGuard(_)
            | Fault::KillProxy(_)
            | Fault::MoveStoreLeader
            | Fault::Configure
            | Fault::SwitchOver
            | Fault::Restart(_) => {}
        }
        // A copy of the store that may be restored later.
        if self.backup.is_none() || matches!(fault, Fault::SwitchOver) {
            let saved = timeout(PATIENCE, self.etcd.snapshot()).await;
            self.backup = saved.ok().and_then(Result::ok).or(self.backup.take());
        }
        Ok(())
    }

    fn signal_postmaster(&self, node: NodeNumber, signal: Signal) {
        if let Some(pid) = self.nodes[node].node.postmaster().filter(|pid| is_alive(*pid)) {
            let _ = send(pid, signal);
        }
    }

    fn signal_agent(&mut self, node: NodeNumber, signal: Signal) {
        if let Some(agent) = self.nodes[node].node.agent() {
            let _ = agent.signal(signal);
        }
    }

    fn signal_host(&mut self, node: NodeNumber, signal: Signal) {
        self.signal_agent(node, signal);
        for pid in self.nodes[node].node.processes() {
            let _ = send(pid, signal);
        }
    }

    fn signal_proxy(&mut self, number: usize, signal: Signal) {
        let _ = self.proxies[number].proxy.process().signal(signal);
    }

    fn between_node_and_store(
        &self,
        node: NodeNumber,
        change: fn(&Host, &str) -> Result<()>,
    ) -> Result<()> {
        let host = &self.nodes[node].host;
        for member in &self.store_hosts {
            change(host, &member.address())?;
            change(member, &host.address())?;
        }
        Ok(())
    }

    async fn restore_store(&mut self) -> Result<()> {
        match self.backup.clone() {
            Some(backup) => self.etcd.restore_in_place(&backup).await,
            None => Ok(()),
        }
    }

    async fn configure(&self, rng: &Rng) {
        let change = match rng.below(4) {
            0 => json!({"ttl": 20, "loop_wait": 5}),
            1 => json!({"ttl": 8, "loop_wait": 1}),
            2 => json!({"maximum_lag_on_failover": 1_048_576 * (1 + rng.below(8))}),
            _ => json!({"synchronous_node_count": 1 + rng.below(2)}),
        };
        for it in &self.nodes {
            let answer = timeout(PATIENCE, it.node.rest().patch("/config", &change)).await;
            if matches!(answer, Ok(Ok(answer)) if answer.code == 200) {
                return;
            }
        }
    }

    /// Starts an operator's command and does not wait for it.
    fn command(&mut self, words: &[&str]) -> Result<()> {
        let file = self.nodes[0].node.file().display().to_string();
        let mut command = kornak::command(["-c", &file]);
        command.args(words);
        let log = self.scratch.join("operator.log");
        self.commands.push(Process::spawn("an operator's command", command, &log)?);
        Ok(())
    }

    /// Says that nothing needs to be kept.
    pub fn passed(&mut self) {
        self.scratch.passed();
        self.etcd.passed();
    }
}

/// The guard of a node: a process of the program that names the data directory.
fn guard_of(node: &Node) -> Option<u32> {
    node.processes().into_iter().find(|pid| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words);
        words.split('\0').nth(1).is_some_and(|word| word == "guard")
    })
}

fn agent_spec(spec: &Spec, etcd: &Etcd, index: usize, host: Arc<Host>) -> AgentSpec {
    let parameters = ["max_wal_size: 64MB", "min_wal_size: 32MB", "max_prepared_transactions: 10"];
    AgentSpec {
        scope: "demo".to_owned(),
        name: format!("node{index}"),
        etcd: etcd.endpoints(),
        ttl: 8,
        synchronous: spec.mode != Mode::Off,
        failsafe: true,
        parameters: parameters.map(str::to_owned).to_vec(),
        host: Some(host),
        // A leader that is lost while a member rewinds itself leaves that member with nothing that could be
        // used, and nobody is there to say so.
        postgresql: vec!["remove_data_directory_on_rewind_failure: true".to_owned()],
        ..AgentSpec::default()
    }
}

impl Disk {
    fn mount(dir: &Path, megabytes: u32) -> Result<Self> {
        fs::create_dir_all(dir).context("make a mount point")?;
        let options = format!("size={megabytes}m,mode=0755");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir);
        let output = command.output().context("run mount")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(Self(dir.to_owned()))
    }

    /// Takes every free byte.
    fn fill(&self) -> Result<PathBuf> {
        let path = self.0.join("filler");
        let mut options = OpenOptions::new();
        let mut file = options.create(true).append(true).open(&path).context("fill the disk")?;
        for size in [1 << 20, 1 << 16, 1 << 12] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        Ok(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
