//! A whole cluster of real processes: etcd, one agent for each node with its guard and PostgreSQL,
//! and a proxy in front.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};
use tokio_postgres::Client;

use super::agent::{AgentSpec, Node, Program};
use super::certificates::Workshop;
use super::etcd::Etcd;
use super::kornak;
use super::lan::{CENTRE, Lan};
use super::patroni::Patroni;
use super::port::{Port, host_of};
use super::postgres::{SUPERUSER_PASSWORD, connect, describe};
use super::proxy::Proxy;
use super::scratch::Scratch;
use super::wait::until;
use super::watch::WriteWatch;
use crate::talk::Login;

/// Role and database of the applications, and its password.
const APP: &str = "app";
const APP_PASSWORD: &str = "an-app's-password";

/// From the first process to a cluster in which every node streams: three initdb, two copies.
const START_LIMIT: Duration = Duration::from_secs(90);

/// One cluster at a time in a test process: they measure milliseconds on shared cores. Runners
/// that give each test a process keep them apart by their own means.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// The differences between tests.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// Names the scratch directory.
    pub name: &'static str,
    pub nodes: usize,
    pub etcd_members: usize,
    /// Seconds.
    pub ttl: u32,
    pub synchronous: bool,
    pub failsafe: bool,
    /// Lines of `bootstrap.dcs.postgresql.parameters:`.
    pub parameters: Vec<String>,
    /// Numbers of the nodes whose agent is Patroni.
    pub patroni: &'static [usize],
    /// More of the proxy's listener for the primary: `, pool_mode: transaction`.
    pub listener: &'static str,
    /// More lines below `proxy:`.
    pub proxy: &'static str,
    /// Seconds that a leader's agent may be silent, as in [`AgentSpec`].
    pub agent_timeout: Option<u32>,
    /// Seconds, as in [`AgentSpec`].
    pub suspect_after: u32,
    /// The proxy has a certificate.
    pub tls: bool,
    /// Each node has a host of its own there.
    pub lan: Option<Arc<Lan>>,
}

impl Default for ClusterSpec {
    /// Three nodes, one etcd, synchronous, failsafe on, as the documentation recommends; the lease
    /// is short, for tests wait for it.
    fn default() -> Self {
        Self {
            name: "cluster",
            nodes: 3,
            etcd_members: 1,
            ttl: 8,
            synchronous: true,
            failsafe: true,
            parameters: Vec::new(),
            patroni: &[],
            listener: "",
            proxy: "",
            agent_timeout: None,
            suspect_after: 0,
            tls: false,
            lan: None,
        }
    }
}

/// A member's entry in `GET /cluster`.
#[derive(Debug, Clone)]
pub struct Member {
    pub name: String,
    pub role: String,
    pub state: String,
}

/// All of it. Ends with everything it started.
#[derive(Debug)]
pub struct Cluster {
    pub spec: ClusterSpec,
    pub nodes: Vec<Node>,
    pub proxy: Proxy,
    pub etcd: Etcd,
    scratch: Scratch,
    _turn: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Starts it, waits until it is healthy, and makes the role and database of the applications.
    ///
    /// # Panics
    /// When it is not healthy within 90 s, saying what it looks like instead.
    pub async fn start(spec: ClusterSpec) -> Result<Self> {
        let turn = ONE_AT_A_TIME.lock().await;
        let began = Instant::now();
        let scratch = Scratch::new(spec.name);
        let centre = if spec.lan.is_some() { CENTRE } else { "127.0.0.1" };
        let etcd = Etcd::start_at(centre, spec.etcd_members).await?;
        let patroni = (!spec.patroni.is_empty()).then(Patroni::installed).transpose()?;
        let mut nodes = Vec::new();
        for index in 0..spec.nodes {
            let program = match &patroni {
                Some(patroni) if spec.patroni.contains(&index) => Program::Patroni(patroni.clone()),
                _ => Program::Kornak,
            };
            let mut agent = agent_spec(&spec, &etcd, index);
            if let Some(lan) = &spec.lan {
                agent.host = Some(lan.host().await?);
            }
            nodes.push(Node::start(&scratch, &agent, program)?);
        }
        let head = format!("scope: demo\netcd3:\n  hosts: [{}]", etcd.endpoints().join(", "));
        let mut lines = format!(
            "auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}\n{}",
            spec.proxy
        );
        if spec.tls {
            let pair = Workshop::new(&scratch).self_signed("proxy", "localhost")?;
            let (cert, key) = (pair.cert.display(), pair.key.display());
            write!(lines, "\ntls: {{client: {{cert: {cert}, key: {key}}}}}")?;
        }
        let proxy = Proxy::start_as(&scratch, "proxy", &head, spec.listener, &lines).await?;
        let cluster = Self { spec, nodes, proxy, etcd, scratch, _turn: turn };
        cluster.healthy(START_LIMIT).await;
        cluster.create_app().await?;
        cluster.proxy.ready(&cluster.app(), Duration::from_secs(15)).await;
        tracing::info!(elapsed_ms = began.elapsed().as_millis(), "cluster started");
        Ok(cluster)
    }

    /// Starts one more node; `change` may give it tags and settings of its own.
    pub fn add_node(&mut self, change: impl FnOnce(&mut AgentSpec)) -> Result<String> {
        let mut agent = agent_spec(&self.spec, &self.etcd, self.nodes.len());
        change(&mut agent);
        self.nodes.push(Node::start(&self.scratch, &agent, Program::Kornak)?);
        self.spec.nodes += 1;
        Ok(agent.name)
    }

    /// The value of one of the cluster's keys in the store; empty if there is none.
    pub async fn key(&self, key: &str) -> Result<String> {
        let path = format!("/service/demo/{key}");
        let value = self.etcd.ctl(&["get", "--print-value-only", &path]).await?;
        Ok(value.trim().to_owned())
    }

    /// Changes the dynamic configuration by `PATCH /config`.
    pub async fn configure(&self, change: &Value) -> Result<()> {
        let node = self.nodes.first().context("no node")?;
        let answer = node.rest().patch("/config", change).await?;
        ensure!(answer.code == 200, "PATCH /config: {} {}", answer.code, answer.text);
        Ok(())
    }

    /// Says that the test has passed, so that nothing is printed or kept, and ends everything.
    pub fn passed(mut self) {
        self.scratch.passed();
        self.etcd.passed();
    }

    /// A path in the cluster's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// An application's connection string through the proxy to the primary.
    pub fn app(&self) -> String {
        Self::app_on(self.proxy.primary())
    }

    /// A connection string through the standbys' listener.
    pub fn app_reading(&self) -> String {
        Self::app_on(self.proxy.standbys())
    }

    /// Another proxy, which learns of the cluster by the members' REST API alone.
    pub async fn proxy_by_rest(&self) -> Result<Proxy> {
        let bases = self.nodes.iter().map(|node| format!("\"{}\"", node.rest().base()));
        let head = format!("rest:\n  members: [{}]", bases.collect::<Vec<_>>().join(", "));
        let auth =
            format!("auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}");
        Proxy::start(&self.scratch, "proxy-by-rest", &head, &auth).await
    }

    /// Another proxy, whose clients share so many server connections.
    pub async fn pooled_proxy(&self, size: usize) -> Result<Proxy> {
        let head = format!("scope: demo\netcd3:\n  hosts: [{}]", self.etcd.endpoints().join(", "));
        let auth =
            format!("auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}");
        let pool = format!(", pool_mode: transaction, pool_size: {size}");
        Proxy::start_as(&self.scratch, "pooled", &head, &pool, &auth).await
    }

    /// One more proxy with two listeners for the primary, a plain and a pooled one, and the port of
    /// the latter.
    pub async fn proxy_with_a_pool(&self, size: usize) -> Result<(Proxy, Port)> {
        let head = format!("scope: demo\netcd3:\n  hosts: [{}]", self.etcd.endpoints().join(", "));
        let auth =
            format!("auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}");
        let [port] = Port::several();
        let pooled = format!(
            "}}\n    - {{name: pooled, listen: \"{}\", target: primary, pool_mode: transaction, \
             pool_size: {size}",
            port.address()
        );
        let proxy = Proxy::start_as(&self.scratch, "both", &head, &pooled, &auth).await?;
        Ok((proxy, port))
    }

    /// An application's login through a listener, message by message.
    pub fn app_login(port: u16) -> Login {
        Login::new(port, APP, APP_PASSWORD, APP)
    }

    /// An application's connection string through a listener.
    pub fn app_on(port: u16) -> String {
        format!(
            "host={} port={port} user={APP} password='{}' dbname={APP} connect_timeout=30",
            host_of(port),
            APP_PASSWORD.replace('\'', "\\'")
        )
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name() == name).context("no such node")
    }

    pub fn node_mut(&mut self, name: &str) -> Result<&mut Node> {
        self.nodes.iter_mut().find(|node| node.name() == name).context("no such node")
    }

    /// The members, by the first REST API that answers.
    pub async fn members(&self) -> Result<Vec<Member>> {
        let mut last = anyhow::anyhow!("no node");
        for node in &self.nodes {
            let rest = node.rest();
            match tokio::time::timeout(Duration::from_secs(3), rest.get("/cluster")).await {
                Ok(Ok(answer)) => return parse_members(&answer.json()?),
                Ok(Err(error)) => last = error,
                Err(_) => last = anyhow::anyhow!("no answer"),
            }
        }
        Err(last.context("no node's REST API answers /cluster"))
    }

    /// The leader's name, by the members' own word.
    pub async fn leader(&self) -> Result<String> {
        let members = self.members().await?;
        let leader = members.iter().find(|member| member.role == "leader");
        Ok(leader.with_context(|| format!("no leader among {members:?}"))?.name.clone())
    }

    /// Waits for another leader than `old` that accepts writes; its name.
    pub async fn new_leader(&self, old: &str, limit: Duration) -> String {
        until(limit, &format!("a writable leader other than {old}"), || async {
            let leader = self.leader().await.map_err(|error| format!("{error:#}"))?;
            if leader == old {
                return Err(format!("the leader is still {leader}"));
            }
            let node = self.node(&leader).map_err(|error| format!("{error:#}"))?;
            let client = node.connect().await.map_err(|error| describe(&error))?;
            match client.query_one("SELECT pg_is_in_recovery()", &[]).await {
                Ok(row) if !row.get::<_, bool>(0) => Ok(leader),
                Ok(_) => Err(format!("{leader} is in recovery")),
                Err(error) => Err(describe(&error)),
            }
        })
        .await
    }

    /// Waits for one leader, every other node streaming from it, and in synchronous mode a
    /// synchronous standby.
    ///
    /// # Panics
    /// When `limit` has passed.
    pub async fn healthy(&self, limit: Duration) {
        until(limit, "a healthy cluster", || async {
            let members = self.members().await.map_err(|error| format!("{error:#}"))?;
            let count =
                |wanted: &dyn Fn(&Member) -> bool| members.iter().filter(|it| wanted(it)).count();
            let leaders = count(&|it| it.role == "leader" && it.state == "running");
            let streaming = count(&|it| it.role != "leader" && it.state == "streaming");
            let synchronous = count(&|it| it.role == "sync_standby");
            let wanted = usize::from(self.spec.synchronous && self.spec.nodes > 1);
            if leaders != 1 || streaming != self.spec.nodes - 1 || synchronous < wanted {
                return Err(format!("{members:?}"));
            }
            // What the store remembers may outlive a server for as long as a lease.
            for member in &members {
                let node = self.node(&member.name).map_err(|error| format!("{error:#}"))?;
                let client = node.connect().await.map_err(|error| describe(&error))?;
                let row = client.query_one("SELECT pg_is_in_recovery()", &[]).await;
                let in_recovery: bool = row.map_err(|error| describe(&error))?.get(0);
                if in_recovery == (member.role == "leader") {
                    return Err(format!("{} in recovery: {in_recovery}; {members:?}", member.name));
                }
            }
            Ok(())
        })
        .await;
    }

    /// Waits for a synchronous standby that streams; its name. In asynchronous mode, any standby.
    ///
    /// # Panics
    /// When `limit` has passed.
    pub async fn sync_standby(&self, limit: Duration) -> String {
        let wanted = if self.spec.synchronous { "sync_standby" } else { "replica" };
        until(limit, "a standby that may take over", || async {
            let members = self.members().await.map_err(|error| format!("{error:#}"))?;
            let found = members.iter().find(|it| it.role == wanted && it.state == "streaming");
            found.map(|member| member.name.clone()).ok_or_else(|| format!("{members:?}"))
        })
        .await
    }

    /// The watch over who accepts writes, on the hosts themselves.
    pub fn watch_writes(&self) -> WriteWatch {
        let servers = self.nodes.iter().map(|node| (node.name().to_owned(), node.console()));
        WriteWatch::start(servers.collect())
    }

    /// A superuser's connection to the server of the leader.
    pub async fn connect_to_leader(&self) -> Result<Client> {
        let leader = self.leader().await?;
        self.node(&leader)?.connect().await.context("connect to the leader")
    }

    /// The application's database on the leader's own port, past the proxy.
    pub async fn app_on_leader(&self) -> Result<Client> {
        let leader = self.leader().await?;
        let port = self.node(&leader)?.port();
        connect(&Self::app_on(port)).await.context("connect to the leader as the application")
    }

    /// `kornak switchover` as an operator types it.
    pub async fn switchover(&self, leader: &str, candidate: &str) -> Result<()> {
        let file = self.node(leader)?.file().to_owned();
        let mut command = kornak::command(["switchover"]);
        command.arg("-c").arg(file);
        command.args(["--leader", leader, "--candidate", candidate, "--force"]);
        let output = run(command).await?;
        ensure!(
            output.status.success(),
            "kornak switchover ({}): {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Switches over to any member that may take over, which then leads: each node in turn, and in synchronous
    /// mode the synchronous standby. Answers with what was done.
    pub async fn switchover_to_the_next(&self) -> Result<String> {
        let leader = self.leader().await?;
        let candidate = self.sync_standby(Duration::from_secs(20)).await;
        let began = Instant::now();
        self.switchover(&leader, &candidate).await?;
        let took = began.elapsed();
        // The former leader's REST API shows a change of the store some milliseconds later.
        until(Duration::from_secs(5), &format!("{candidate} leads"), || async {
            let leads = self.leader().await.map_err(|error| format!("{error:#}"))?;
            if leads == candidate { Ok(()) } else { Err(format!("{leads} leads")) }
        })
        .await;
        Ok(format!("{leader} -> {candidate}, the command took {took:.2?}"))
    }

    /// Asks for a switchover by `POST /switchover`; answers with the status and the text.
    pub async fn post_switchover(&self, leader: &str, candidate: &str) -> Result<(u16, String)> {
        let body = json!({"leader": leader, "candidate": candidate});
        let answer = self.node(leader)?.rest().post("/switchover", &body).await?;
        Ok((answer.code, answer.text))
    }

    async fn create_app(&self) -> Result<()> {
        let client = self.connect_to_leader().await?;
        let password = APP_PASSWORD.replace('\'', "''");
        client.batch_execute(&format!("CREATE ROLE {APP} LOGIN PASSWORD '{password}'")).await?;
        client.batch_execute(&format!("CREATE DATABASE {APP} OWNER {APP}")).await?;
        Ok(())
    }
}

fn agent_spec(spec: &ClusterSpec, etcd: &Etcd, index: usize) -> AgentSpec {
    AgentSpec {
        scope: "demo".to_owned(),
        name: format!("node{index}"),
        etcd: etcd.endpoints(),
        ttl: spec.ttl,
        synchronous: spec.synchronous,
        failsafe: spec.failsafe,
        parameters: spec.parameters.clone(),
        agent_timeout: spec.agent_timeout,
        suspect_after: spec.suspect_after,
        ..AgentSpec::default()
    }
}

/// Runs a command to its end without stopping this thread's other tasks.
pub async fn run(mut command: Command) -> Result<Output> {
    let name = format!("{:?}", command.get_program());
    tokio::task::spawn_blocking(move || command.output())
        .await
        .context("wait for a command")?
        .with_context(|| format!("run {name}"))
}

fn parse_members(cluster: &Value) -> Result<Vec<Member>> {
    let list = cluster["members"].as_array().with_context(|| format!("no members in {cluster}"))?;
    let text = |member: &Value, key: &str| member[key].as_str().unwrap_or_default().to_owned();
    Ok(list
        .iter()
        .map(|member| Member {
            name: text(member, "name"),
            role: text(member, "role"),
            state: text(member, "state"),
        })
        .collect())
}
