//! A node's agent as a process, with the file a Patroni user would write: `kornak agent`, or
//! Patroni itself on the same file.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tokio_postgres::Client;

use super::kornak;
use super::lan::Host;
use super::patroni::Patroni;
use super::port::Port;
use super::postgres::{SUPERUSER_PASSWORD, bin_dir, connect, superuser, superuser_at};
use super::process::Process;
use super::rest::Rest;
use super::scratch::{Scratch, freeze_below, kill_below, processes_below};

/// The differences between clusters.
#[derive(Debug, Clone, Default)]
pub struct AgentSpec {
    pub scope: String,
    pub name: String,
    /// `host:port` of each etcd member.
    pub etcd: Vec<String>,
    pub ttl: u32,
    pub synchronous: bool,
    pub failsafe: bool,
    /// Lines of `tags:`, such as `nofailover: true`.
    pub tags: Vec<String>,
    /// Lines of `bootstrap.dcs:`.
    pub dcs: Vec<String>,
    /// Lines of `bootstrap:`.
    pub bootstrap: Vec<String>,
    /// Lines of `watchdog:`; without any it is off.
    pub watchdog: Vec<String>,
    /// Lines of `bootstrap.dcs.postgresql.parameters:`.
    pub parameters: Vec<String>,
    /// Lines of `postgresql:`.
    pub postgresql: Vec<String>,
    /// Lines of `pg_hba`, each with its dash; the usual ones if there are none.
    pub pg_hba: Vec<String>,
    /// The settings that each role's login needs besides name and password: `, sslmode: require`.
    pub login: String,
    /// Seconds of `kornak.guard.agent_timeout`; 0: the guard starts no other agent. The default if `None`.
    pub agent_timeout: Option<u32>,
    /// Seconds of `kornak.failover.suspect_after`; 0, the default: leases are waited for.
    pub suspect_after: u32,
    /// Where it runs; on this machine's own address if `None`.
    pub host: Option<Arc<Host>>,
    /// Other sections, or other lines of `bootstrap:`, as whole text at the end of the file; `{port}` in it
    /// is the server's.
    pub sections: String,
}

const PG_HBA: [&str; 3] = [
    "- local all all scram-sha-256",
    "- host replication replicator samenet scram-sha-256",
    "- host all all samenet scram-sha-256",
];

/// Which program is a node's agent.
#[derive(Debug, Clone)]
pub enum Program {
    Kornak,
    Patroni(Patroni),
}

/// One node: its agent, and through it the guard and PostgreSQL.
#[derive(Debug)]
pub struct Node {
    name: String,
    program: Program,
    host: Option<Arc<Host>>,
    postgres: Port,
    rest: Port,
    home: PathBuf,
    file: PathBuf,
    log: PathBuf,
    agent: Option<Process>,
}

impl Node {
    /// Writes its file and starts nothing yet.
    fn prepare(scratch: &Scratch, spec: &AgentSpec, program: Program) -> Result<Self> {
        let home = scratch.server_dir(&spec.name);
        let [postgres, rest] = Port::several().map(|port: Port| match &spec.host {
            Some(host) => port.at(&host.address()),
            None => port,
        });
        let file = scratch.join(&format!("{}.yml", spec.name));
        let node = Self {
            name: spec.name.clone(),
            program,
            host: spec.host.clone(),
            postgres,
            rest,
            log: scratch.join(&format!("{}-agent.log", spec.name)),
            home,
            file,
            agent: None,
        };
        fs::write(&node.file, node.yaml(spec)).context("write the agent's file")?;
        Ok(node)
    }

    /// Writes its file and starts the agent.
    pub fn start(scratch: &Scratch, spec: &AgentSpec, program: Program) -> Result<Self> {
        let mut node = Self::prepare(scratch, spec, program)?;
        node.start_agent()?;
        Ok(node)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The log file of the agent.
    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn data_dir(&self) -> PathBuf {
        self.home.join("data")
    }

    pub fn port(&self) -> u16 {
        self.postgres.number()
    }

    /// The address of its server.
    pub fn address(&self) -> String {
        super::port::host_of(self.port())
    }

    /// The agent's REST API.
    pub fn rest(&self) -> Rest {
        Rest::new(&self.rest.address())
    }

    /// A superuser's connection to this server, past every proxy.
    pub async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        connect(&superuser(self.port())).await
    }

    /// Connects to another database of the server.
    pub async fn connect_to(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let login =
            superuser(self.port()).replace("dbname=postgres", &format!("dbname={database}"));
        connect(&login).await
    }

    /// The agent's log so far.
    pub fn agent_log(&self) -> Result<String> {
        fs::read_to_string(&self.log).context("read the agent's log")
    }

    /// The agent's process, if it was started and not killed by us.
    pub fn agent(&mut self) -> Option<&mut Process> {
        self.agent.as_mut()
    }

    /// Changes its file; whoever runs hears of it by [`Self::reload`].
    pub fn edit(&self, from: &str, to: &str) -> Result<()> {
        let text = fs::read_to_string(&self.file).context("read the agent's file")?;
        ensure!(text.contains(from), "no {from:?} in {}", self.file.display());
        fs::write(&self.file, text.replace(from, to)).context("write the agent's file")
    }

    /// SIGHUP: its file has changed.
    pub fn reload(&self) -> Result<()> {
        self.agent.as_ref().context("the agent does not run")?.signal(Signal::HUP)
    }

    /// Another port for its server, from the next start of the agent on.
    pub fn move_port(&mut self) -> Result<()> {
        let port = Port::free();
        let at = |port: u16| format!(":{port}\n");
        self.edit(&at(self.port()), &at(port.number()))?;
        self.postgres = port;
        Ok(())
    }

    /// Starts the agent (again).
    pub fn start_agent(&mut self) -> Result<()> {
        let command = match &self.program {
            Program::Kornak => kornak::with_file("agent", &self.file),
            Program::Patroni(patroni) => patroni.daemon(&self.file),
        };
        let command = match &self.host {
            Some(host) => host.run(&command),
            None => command,
        };
        let process = Process::spawn(&format!("agent of {}", self.name), command, &self.log)?;
        self.agent = Some(process);
        Ok(())
    }

    /// The program that [`Self::start_agent`] starts from now on.
    pub fn set_program(&mut self, program: Program) {
        self.program = program;
    }

    /// `kill -9` of the agent alone; guard and server go on for as long as they may.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }

    /// SIGSTOP of the agent alone.
    pub fn freeze_agent(&self) -> Result<()> {
        self.agent.as_ref().context("the agent does not run")?.freeze()
    }

    pub fn thaw_agent(&self) -> Result<()> {
        self.agent.as_ref().context("the agent does not run")?.signal(Signal::CONT)
    }

    /// SIGTERM, and the clean end that it promises.
    pub async fn stop_agent(&mut self, limit: Duration) -> Option<std::process::ExitStatus> {
        let mut agent = self.agent.take()?;
        Some(agent.terminate(limit).await)
    }

    /// First line of `postmaster.pid`.
    pub fn postmaster(&self) -> Option<u32> {
        let text = fs::read_to_string(self.data_dir().join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse().ok()
    }

    /// `kill -9` of the postmaster alone.
    pub fn kill_postmaster(&self) -> Result<()> {
        let pid = self.postmaster().with_context(|| format!("no postmaster on {}", self.name))?;
        super::process::send(pid, Signal::KILL)
    }

    /// Everything of this node at once: agent, guard, postmaster and backends, as a loss of power
    /// would (but the page cache stays). The agent comes first, for it would start them again.
    pub fn kill_all(&mut self) {
        self.agent = None;
        // One that the guard has started; the guard would take seconds to start another.
        kill_below(&self.file);
        kill_below(&self.home);
    }

    /// Cuts the power of the host: it says nothing to nobody any more, and all its processes are
    /// gone.
    pub fn lose_power(&mut self) -> Result<()> {
        self.cut_off()?;
        self.kill_all();
        Ok(())
    }

    /// Cuts the host off its network; everything on the host goes on.
    pub fn cut_off(&self) -> Result<()> {
        self.host.as_ref().context("it has no host of its own")?.cut_off()
    }

    /// The network is back.
    pub fn reconnect(&self) -> Result<()> {
        self.host.as_ref().context("it has no host of its own")?.reconnect()
    }

    /// A superuser's login by the server's own socket, which needs no network.
    pub fn console(&self) -> String {
        superuser_at(&self.home.display().to_string(), self.port())
    }

    /// The host is on the network again and starts the agent.
    pub fn get_power(&mut self) -> Result<()> {
        self.reconnect()?;
        self.start_agent()
    }

    /// Everything of this node stands still, and its kernel goes on answering for it: a host whose disk
    /// is gone, or a paused container.
    ///
    /// # Panics
    /// When it does not stand still within some seconds.
    pub fn freeze_all(&self) -> Result<()> {
        self.freeze_agent()?;
        freeze_below(&self.home);
        freeze_below(&self.file);
        Ok(())
    }

    /// Everything that [`Self::freeze_all`] has frozen goes on, the agent last.
    pub fn thaw_all(&self) -> Result<()> {
        for pid in self.processes() {
            super::process::send(pid, Signal::CONT)?;
        }
        self.thaw_agent()
    }

    /// The agent that the guard has started in place of ours.
    pub fn started_by_guard(&self) -> Option<u32> {
        let text = fs::read_to_string(self.home.join("data.guard/agent.started")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    }

    /// Processes of this node: guard, postmaster, backends, the agent's helpers, and an agent that the guard has
    /// started.
    pub fn processes(&self) -> Vec<u32> {
        let agent = self.agent.as_ref().map(Process::pid);
        let named = processes_below(&self.file).into_iter().filter(|pid| Some(*pid) != agent);
        processes_below(&self.home).into_iter().chain(named).collect()
    }

    /// The first process of this node whose title has this word, such as `walreceiver`.
    pub fn process_titled(&self, word: &str) -> Option<u32> {
        self.processes_titled(word).into_iter().next()
    }

    /// All of them.
    pub fn processes_titled(&self, word: &str) -> Vec<u32> {
        let is_titled = |pid: &u32| {
            let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&title).contains(word)
        };
        self.processes().into_iter().filter(is_titled).collect()
    }

    fn yaml(&self, spec: &AgentSpec) -> String {
        let AgentSpec { scope, name, etcd, ttl, synchronous, failsafe, tags, .. } = spec;
        let lines = |lines: &[String], indent: &str| -> String {
            lines.iter().map(|line| format!("{indent}{line}\n")).collect()
        };
        let parameters = lines(&spec.parameters, "        ");
        let is_given = spec.parameters.iter().any(|line| line.starts_with("max_connections:"));
        let connections = if is_given { "" } else { "        max_connections: 100\n" };
        let postgresql = lines(&spec.postgresql, "  ");
        let pg_hba = match spec.pg_hba.as_slice() {
            [] => lines(&PG_HBA.map(str::to_owned), "    "),
            given => lines(given, "    "),
        };
        let login = &spec.login;
        let (dcs, bootstrap) = (lines(&spec.dcs, "    "), lines(&spec.bootstrap, "  "));
        // Nobody wants the machine that runs the tests to be reset.
        let watchdog = match spec.watchdog.as_slice() {
            [] => "  mode: off\n".to_owned(),
            given => lines(given, "  "),
        };
        let mut sections = spec.sections.replace("{port}", &self.port().to_string());
        let guard =
            spec.agent_timeout.map(|seconds| format!("guard: {{agent_timeout: {seconds}}}"));
        let suspects = (spec.suspect_after > 0)
            .then(|| format!("failover: {{suspect_after: {}}}", spec.suspect_after));
        let own: Vec<String> = guard.into_iter().chain(suspects).collect();
        if !own.is_empty() {
            sections.push_str(&format!("kornak: {{{}}}\n", own.join(", ")));
        }
        let (data, home, rest) = (self.data_dir(), self.home.display(), self.rest.address());
        let hosts = etcd.join(", ");
        let address = self.postgres.address();
        let bin = bin_dir();
        let tags = match tags.as_slice() {
            [] => String::new(),
            lines => format!("tags:\n  {}\n", lines.join("\n  ")),
        };
        // Patroni's rule for the three timings: loop_wait + 2 * retry_timeout <= ttl.
        format!(
            r#"scope: {scope}
name: {name}
restapi:
  listen: {rest}
  connect_address: {rest}
etcd3:
  hosts: [{hosts}]
bootstrap:
  dcs:
    ttl: {ttl}
    loop_wait: 1
    retry_timeout: 3
    maximum_lag_on_failover: 1048576
    synchronous_mode: {synchronous}
    failsafe_mode: {failsafe}
{dcs}    postgresql:
      use_pg_rewind: true
      use_slots: true
      parameters:
{connections}        wal_log_hints: "on"
{parameters}  initdb:
    - encoding: UTF8
    - data-checksums
    - no-sync
{bootstrap}watchdog:
{watchdog}postgresql:
  listen: {address}
  connect_address: {address}
  data_dir: {data}
  bin_dir: {bin}
  pgpass: {home}/pgpass
  authentication:
    superuser: {{username: postgres, password: "{SUPERUSER_PASSWORD}"{login}}}
    replication: {{username: replicator, password: replicator-password{login}}}
    rewind: {{username: rewind_user, password: rewind-password{login}}}
  parameters:
    unix_socket_directories: {home}
    shared_buffers: 32MB
    log_line_prefix: '%m [%p] %a '
    log_checkpoints: "on"
  pg_hba:
{pg_hba}{postgresql}{tags}{sections}"#,
            data = data.display(),
            bin = bin.display(),
        )
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill_all();
    }
}
