//! A Citus cluster of real processes: etcd, groups of agents with their servers, a proxy in front.
//!
//! The extension is not in Debian's archive; a test that needs it looks for it first
//! ([`is_installed`]) and says aloud that it does nothing without.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard};
use tokio_postgres::Client;

use super::agent::{AgentSpec, Node, Program};
use super::certificates::{Pair, Workshop};
use super::cluster::run;
use super::etcd::Etcd;
use super::kornak;
use super::lan::{CENTRE, Lan};
use super::patroni::Patroni;
use super::port::host_of;
use super::postgres::{SUPERUSER_PASSWORD, bin_dir, connect, describe};
use super::proxy::Proxy;
use super::scratch::Scratch;
use super::wait::until;

/// Role of the applications and its password.
const APP: &str = "app";
const APP_PASSWORD: &str = "an-app-password";

/// From the first process to a cluster in which every node streams and is registered.
const START_LIMIT: Duration = Duration::from_secs(150);

/// For what an earlier statement has set in motion.
const SOON: Duration = Duration::from_secs(10);

/// See `Cluster`.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Whether PostgreSQL has the extension. Without it a test says so and does nothing.
pub fn is_installed() -> bool {
    // Debian's layout, and that of PostgreSQL's own `make install`.
    let bin = bin_dir();
    let version = bin.parent().and_then(Path::file_name).unwrap_or_default();
    let debian = bin.join("../../../../share/postgresql").join(version);
    [debian, bin.join("../share"), bin.join("../share/postgresql")]
        .iter()
        .any(|share| share.join("extension/citus.control").exists())
}

/// The differences between tests.
#[derive(Debug, Clone)]
pub struct CitusSpec {
    pub name: &'static str,
    /// Members of each group, the coordinator's first.
    pub members: Vec<usize>,
    pub databases: Vec<&'static str>,
    pub ttl: u32,
    /// Workers say that they have a pool; it is the server itself.
    pub pools: bool,
    /// Names of the members whose agent is Patroni, with one database: it takes no more.
    pub patroni: Vec<&'static str>,
    /// Lines under `postgresql` in the file of each group's first member.
    pub first: Vec<&'static str>,
    /// Each node has a host of its own there.
    pub lan: Option<Arc<Lan>>,
    /// Every node shows a certificate to every other and checks the other's, as in the layout that
    /// Citus's authors describe: one certificate, which is its own authority.
    pub verified: bool,
}

impl Default for CitusSpec {
    fn default() -> Self {
        Self {
            name: "citus",
            members: vec![2, 2, 2],
            databases: vec!["citus"],
            ttl: 8,
            pools: false,
            patroni: Vec::new(),
            first: Vec::new(),
            lan: None,
            verified: false,
        }
    }
}

/// All of it. Ends with everything it started.
#[derive(Debug)]
pub struct CitusCluster {
    pub spec: CitusSpec,
    pub groups: BTreeMap<u32, Vec<Node>>,
    pub proxy: Proxy,
    pub etcd: Etcd,
    pub scratch: Scratch,
    patroni: Option<Patroni>,
    certificate: Option<Pair>,
    _turn: MutexGuard<'static, ()>,
}

/// A row of `pg_dist_node`: group, role, port.
pub type Registered = (i32, String, i32);

impl CitusCluster {
    /// Starts it, waits until it is healthy, and makes the role of the applications.
    pub async fn start(spec: CitusSpec) -> Result<Self> {
        let turn = ONE_AT_A_TIME.lock().await;
        let began = Instant::now();
        let scratch = Scratch::new(spec.name);
        let centre = if spec.lan.is_some() { CENTRE } else { "127.0.0.1" };
        let etcd = Etcd::start_at(centre, 1).await?;
        let head = format!("scope: demo\netcd3:\n  hosts: [{}]", etcd.endpoints().join(", "));
        let mut auth =
            format!("auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}");
        let verified = spec.verified.then(|| Workshop::new(&scratch).self_signed("node", "citus"));
        let certificate = verified.transpose()?;
        if let Some(Pair { cert, key }) = &certificate {
            let (cert, key) = (cert.display(), key.display());
            auth.push_str(&format!(
                "\ntls: {{server: {{sslmode: verify-ca, ca: {cert}, cert: {cert}, key: {key}}}}}"
            ));
        }
        let proxy = Proxy::start(&scratch, "proxy", &head, &auth).await?;
        let groups = BTreeMap::new();
        let patroni = (!spec.patroni.is_empty()).then(Patroni::installed).transpose()?;
        let mut cluster =
            Self { spec, groups, proxy, etcd, scratch, patroni, certificate, _turn: turn };
        for (group, members) in cluster.spec.members.clone().into_iter().enumerate() {
            cluster.add_group(u32::try_from(group)?, members).await?;
        }
        cluster.healthy(START_LIMIT).await;
        cluster.create_app().await?;
        cluster.proxy.ready(&cluster.app(), Duration::from_secs(15)).await;
        tracing::info!(elapsed_ms = began.elapsed().as_millis(), "Citus cluster started");
        Ok(cluster)
    }

    /// The settings of a node's file.
    pub fn agent_spec(&self, group: u32, name: &str) -> AgentSpec {
        let databases = self.spec.databases.join(", ");
        let pool = match self.spec.pools && group > 0 {
            true => "kornak: {citus: {poolinfo: 'host=127.0.0.1 port={port}'}}\n",
            false => "",
        };
        let spec = AgentSpec {
            scope: "demo".to_owned(),
            name: name.to_owned(),
            etcd: self.etcd.endpoints(),
            ttl: self.spec.ttl,
            synchronous: true,
            failsafe: true,
            sections: format!("citus: {{group: {group}, databases: [{databases}]}}\n{pool}"),
            ..AgentSpec::default()
        };
        match &self.certificate {
            Some(pair) => with_certificate(spec, pair),
            // Citus turns TLS on, with a certificate of its own, and asks for it between nodes.
            None => spec,
        }
    }

    /// Adds a member to a group.
    pub async fn add_member(&mut self, group: u32) -> Result<&mut Node> {
        let number = self.groups.get(&group).map_or(0, Vec::len) + 1;
        let kind = if group == 0 { "coord".to_owned() } else { format!("work{group}-") };
        let mut spec = self.agent_spec(group, &format!("{kind}{number}"));
        if let Some(lan) = &self.spec.lan {
            spec.host = Some(lan.host().await?);
        }
        if number == 1 {
            spec.postgresql.extend(self.spec.first.iter().map(ToString::to_string));
        }
        let patroni = self.patroni.clone().filter(|_| self.spec.patroni.contains(&&*spec.name));
        let program = match patroni {
            Some(patroni) => {
                let database = self.spec.databases.first().context("no database")?;
                // It says at no other level what it tells the server.
                spec.sections = format!(
                    "citus: {{group: {group}, database: {database}}}\nlog: {{level: DEBUG}}\n"
                );
                // What a copy waits for, as Kornak's asks for it anyway.
                spec.postgresql.push("basebackup: [{checkpoint: fast}]".to_owned());
                Program::Patroni(patroni)
            }
            None => Program::Kornak,
        };
        let node = Node::start(&self.scratch, &spec, program)?;
        let nodes = self.groups.entry(group).or_default();
        nodes.push(node);
        nodes.last_mut().context("just added")
    }

    /// Adds a whole group.
    pub async fn add_group(&mut self, group: u32, members: usize) -> Result<()> {
        for _ in 0..members {
            self.add_member(group).await?;
        }
        Ok(())
    }

    /// Takes a group away as an operator does: its agents are stopped, then its keys are removed.
    pub async fn remove_group(&mut self, group: u32) -> Result<()> {
        let leader = self.leader(group).await?;
        let mut nodes = self.groups.remove(&group).context("no such group")?;
        nodes.sort_by_key(|node| node.name() == leader);
        for node in &mut nodes {
            let ended = node.stop_agent(Duration::from_secs(20)).await;
            ensure!(ended.is_some_and(|status| status.success()), "the agent ended with {ended:?}");
        }
        let answers = self.scratch.join("answers");
        fs::write(&answers, "demo\nYes I am aware\n")?;
        let mut command = kornak::command(["remove", "demo", "--group", &group.to_string()]);
        let any = self.nodes().next().context("no node")?;
        command.arg("-c").arg(any.file()).stdin(fs::File::open(&answers)?);
        succeeded(&run(command).await?, "remove")
    }

    /// Says that the test has passed, so that nothing is printed or kept, and ends everything.
    pub fn passed(mut self) {
        self.scratch.passed();
        self.etcd.passed();
    }

    /// An application's connection string through the proxy to the coordinator.
    pub fn app(&self) -> String {
        Self::app_on(self.proxy.primary(), "citus")
    }

    /// Through the workers' listener.
    pub fn app_on_workers(&self) -> String {
        Self::app_on(self.proxy.workers(), "citus")
    }

    /// Through the standbys' listener.
    pub fn app_reading(&self) -> String {
        Self::app_on(self.proxy.standbys(), "citus")
    }

    /// On any port.
    pub fn app_on(port: u16, database: &str) -> String {
        format!(
            "host={} port={port} user={APP} password={APP_PASSWORD} dbname={database} \
             connect_timeout=30",
            host_of(port),
        )
    }

    /// The superuser's, on any port.
    pub fn superuser_on(port: u16, database: &str) -> String {
        format!(
            "host={} port={port} user=postgres password='{}' dbname={database} \
             connect_timeout=30",
            host_of(port),
            SUPERUSER_PASSWORD.replace('\'', "\\'")
        )
    }

    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.groups.values().flatten()
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes().find(|node| node.name() == name).context("no such node")
    }

    pub fn node_mut(&mut self, name: &str) -> Result<&mut Node> {
        let mut nodes = self.groups.values_mut().flatten();
        nodes.find(|node| node.name() == name).context("no such node")
    }

    /// `GET /cluster` of a group, by the first node that answers.
    pub async fn cluster_of(&self, group: u32) -> Result<Value> {
        let mut last = anyhow::anyhow!("no node");
        for node in self.groups.get(&group).into_iter().flatten() {
            let rest = node.rest();
            match tokio::time::timeout(Duration::from_secs(3), rest.get("/cluster")).await {
                Ok(Ok(answer)) => return answer.json(),
                Ok(Err(error)) => last = error,
                Err(_) => last = anyhow::anyhow!("no answer"),
            }
        }
        Err(last)
    }

    /// Name and role of a group's members.
    pub async fn members(&self, group: u32) -> Result<Vec<(String, String, String)>> {
        let cluster = self.cluster_of(group).await?;
        let members = cluster["members"].as_array().context("no members")?;
        let text = |member: &Value, key: &str| member[key].as_str().unwrap_or_default().to_owned();
        let member =
            |member: &Value| (text(member, "name"), text(member, "role"), text(member, "state"));
        Ok(members.iter().map(member).collect())
    }

    /// The leader's name, by the members' own word.
    pub async fn leader(&self, group: u32) -> Result<String> {
        let members = self.members(group).await?;
        let leader = members.iter().find(|(_, role, _)| role == "leader");
        Ok(leader.with_context(|| format!("no leader among {members:?}"))?.0.clone())
    }

    /// The rows that `pg_dist_node` of the coordinator should have, by the members' word.
    pub async fn expected(&self) -> Result<Vec<Registered>> {
        let mut rows = Vec::new();
        for group in self.groups.keys() {
            for (name, role, state) in self.members(*group).await? {
                let port = i32::from(self.node(&name)?.port());
                if role == "leader" {
                    rows.push((i32::try_from(*group)?, "primary".to_owned(), port));
                } else if matches!(state.as_str(), "running" | "streaming") {
                    rows.push((i32::try_from(*group)?, "secondary".to_owned(), port));
                }
            }
        }
        rows.sort();
        Ok(rows)
    }

    /// The rows of a server's `pg_dist_node`.
    pub async fn registered(&self, port: u16, database: &str) -> Result<Vec<Registered>> {
        let client = connect(&Self::superuser_on(port, database)).await?;
        let rows = client
            .query(
                "SELECT groupid, noderole::text, nodeport FROM pg_dist_node ORDER BY 1, 2, 3",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect())
    }

    /// Each group has one leader and a synchronous standby if it can, every standby streams, and
    /// `pg_dist_node` is right on every node in every database.
    ///
    /// # Panics
    /// When `limit` has passed.
    pub async fn healthy(&self, limit: Duration) {
        until(limit, "a healthy Citus cluster", || async {
            for (group, nodes) in &self.groups {
                let members =
                    self.members(*group).await.map_err(|error| format!("{group}: {error:#}"))?;
                let count = |wanted: &dyn Fn(&str, &str) -> bool| {
                    members.iter().filter(|(_, role, state)| wanted(role, state)).count()
                };
                let leaders = count(&|role, state| role == "leader" && state == "running");
                let streaming = count(&|role, state| role != "leader" && state == "streaming");
                let safe = count(&|role, _| matches!(role, "sync_standby" | "quorum_standby"));
                if leaders != 1 || streaming != nodes.len() - 1 || (nodes.len() > 1 && safe == 0) {
                    return Err(format!("group {group}: {members:?}"));
                }
            }
            self.right().await
        })
        .await;
    }

    /// `pg_dist_node` is right on every node, and every node has what the coordinator has.
    pub async fn right(&self) -> Result<(), String> {
        let text = |error: anyhow::Error| format!("{error:#}");
        let expected = self.expected().await.map_err(text)?;
        for database in &self.spec.databases {
            for node in self.nodes() {
                let found = self.registered(node.port(), database).await;
                let found = found.map_err(|error| format!("{}: {error:#}", node.name()))?;
                if found != expected {
                    return Err(format!(
                        "{database} on {}: {found:?}, expected {expected:?}",
                        node.name()
                    ));
                }
            }
        }
        Ok(())
    }

    /// The primaries in `pg_dist_node` are the leaders, on every leader and in every database: a standby
    /// that has just been a primary takes a moment to come back.
    pub async fn primaries_are_right(&self) -> Result<(), String> {
        let text = |error: anyhow::Error| format!("{error:#}");
        let mut leaders = Vec::new();
        for group in self.groups.keys() {
            let leader = self.leader(*group).await.map_err(text)?;
            leaders.push((*group, self.node(&leader).map_err(text)?.port()));
        }
        for database in &self.spec.databases {
            for (_, port) in &leaders {
                let rows = self.registered(*port, database).await.map_err(text)?;
                let wrong = leaders.iter().find(|(group, port)| {
                    let group = i32::try_from(*group).unwrap_or_default();
                    !rows.contains(&(group, "primary".to_owned(), i32::from(*port)))
                });
                if wrong.is_some() {
                    return Err(format!("{database} on {port}: {rows:?}, leaders are {leaders:?}"));
                }
            }
        }
        Ok(())
    }

    /// Prepared transactions on every primary.
    async fn prepared(&self) -> Result<Vec<(String, String)>> {
        let mut found = Vec::new();
        for group in self.groups.keys() {
            let leader = self.leader(*group).await?;
            let client = connect(&Self::superuser_on(self.node(&leader)?.port(), "citus")).await?;
            let rows = client.query("SELECT gid FROM pg_prepared_xacts", &[]).await?;
            found.extend(rows.iter().map(|row| (leader.clone(), row.get(0))));
        }
        Ok(found)
    }

    /// Waits until no primary has a prepared transaction: one that a daemon of Citus makes for its own
    /// purposes lasts a moment, and one that a failover has left is recovered.
    ///
    /// # Panics
    /// When `limit` has passed.
    pub async fn nothing_prepared(&self, limit: Duration) {
        until(limit, "nothing is left prepared", || async {
            match self.prepared().await {
                Ok(left) if left.is_empty() => Ok(()),
                Ok(left) => Err(format!("{left:?}")),
                Err(error) => Err(format!("{error:#}")),
            }
        })
        .await;
    }

    /// The coordinator's primary, past the proxy.
    pub async fn coordinator(&self, database: &str) -> Result<Client> {
        let leader = self.leader(0).await?;
        let port = self.node(&leader)?.port();
        connect(&Self::superuser_on(port, database)).await.context("connect to the coordinator")
    }

    /// `kornak switchover --group N` as an operator types it; its candidate is the group's choice.
    pub async fn switchover(&self, group: u32) -> Result<String> {
        let leader = self.leader(group).await?;
        let file = self.node(&leader)?.file().to_owned();
        let mut command = kornak::command(["switchover"]);
        command.arg("-c").arg(file).args(["--group", &group.to_string()]);
        command.args(["--leader", &leader, "--force"]);
        let output = run(command).await?;
        succeeded(&output, "switchover")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    async fn create_app(&self) -> Result<()> {
        let client = self.coordinator("citus").await?;
        client.batch_execute(&format!("CREATE ROLE {APP} LOGIN PASSWORD '{APP_PASSWORD}'")).await?;
        for group in self.groups.keys() {
            let port = self.node(&self.leader(*group).await?)?.port();
            for database in &self.spec.databases {
                let client = connect(&Self::superuser_on(port, database)).await?;
                let grant = format!("GRANT CREATE ON SCHEMA public TO {APP}");
                until(SOON, "the application's role is on every node", || async {
                    client.batch_execute(&grant).await.map_err(|error| describe(&error))
                })
                .await;
            }
            self.admit_app(*group).await?;
        }
        Ok(())
    }

    /// Gives every node the same verifier of the applications' password. `CREATE ROLE` makes one on each,
    /// and a session can move only to servers that have the one it has proven.
    pub async fn share_verifier(&self) -> Result<()> {
        let client = self.coordinator("citus").await?;
        let alter = format!("ALTER ROLE {APP} PASSWORD '{APP_PASSWORD}'");
        client.batch_execute(&alter).await.context("change the password")
    }

    /// Lets the applications' role log in from a group to the others.
    pub async fn admit_app(&self, group: u32) -> Result<()> {
        let leader = self.leader(group).await?;
        let port = self.node(&leader)?.port();
        let login = format!(
            "INSERT INTO pg_dist_authinfo VALUES (0, '{APP}', 'password={APP_PASSWORD}') \
             ON CONFLICT DO NOTHING"
        );
        for database in &self.spec.databases {
            let client = connect(&Self::superuser_on(port, database)).await?;
            client.batch_execute(&login).await.context("note the login")?;
        }
        Ok(())
    }
}

/// Nodes verify each other; what connects in the clear is a test's own.
fn with_certificate(mut spec: AgentSpec, Pair { cert, key }: &Pair) -> AgentSpec {
    let (cert, key) = (cert.display(), key.display());
    spec.login =
        format!(", sslmode: verify-ca, sslrootcert: {cert}, sslcert: {cert}, sslkey: {key}");
    spec.parameters = vec![
        "ssl: \"on\"".to_owned(),
        format!("ssl_ca_file: {cert}"),
        format!("ssl_cert_file: {cert}"),
        format!("ssl_key_file: {key}"),
        format!(
            "citus.node_conninfo: sslrootcert={cert} sslkey={key} sslcert={cert} sslmode=verify-ca"
        ),
    ];
    let rules = [
        "local all all scram-sha-256",
        "hostssl replication all samenet scram-sha-256 clientcert=verify-ca",
        "hostssl all all samenet scram-sha-256 clientcert=verify-ca",
        "hostnossl all all samenet scram-sha-256",
    ];
    spec.pg_hba = rules.map(|rule| format!("- {rule}")).to_vec();
    spec
}

fn succeeded(output: &Output, what: &str) -> Result<()> {
    ensure!(
        output.status.success(),
        "kornak {what} ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
