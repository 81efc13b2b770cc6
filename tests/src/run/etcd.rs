//! A real etcd of one or more members.
//!
//! Data lies in a scratch directory and survives a restart. Elections are fast, for everything is
//! on one machine: a heartbeat of 50 ms and an election timeout of 500 ms.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::lan::Host;
use super::port::Port;
use super::process::Process;
use super::rest::Rest;
use super::scratch::Scratch;
use super::wait::until;

/// A running etcd cluster; its processes end with it.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    tls: Option<TlsFiles>,
    // After the members, so that they are gone before their directory.
    scratch: Scratch,
}

/// PEM files with which members speak TLS to clients, and ask for certificates of theirs.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug)]
struct Member {
    name: String,
    client: Port,
    peer: Port,
    host: Option<Arc<Host>>,
    process: Option<Process>,
}

impl Etcd {
    /// Starts this many members and waits until each answers a linearizable read.
    ///
    /// # Panics
    /// When that takes more than 30 s.
    pub async fn start(members: usize) -> Result<Self> {
        Self::start_at("127.0.0.1", members).await
    }

    /// Starts etcd on another address of this host.
    ///
    /// # Panics
    /// When that takes more than 30 s.
    pub async fn start_at(host: &str, members: usize) -> Result<Self> {
        let mut etcd = Self::new(host, members, None);
        etcd.start_all()?;
        etcd.healthy(Duration::from_secs(30)).await;
        Ok(etcd)
    }

    /// Starts one member on each host.
    ///
    /// # Panics
    /// When that takes more than 30 s.
    pub async fn start_on(hosts: &[Arc<Host>]) -> Result<Self> {
        let mut etcd = Self::new("127.0.0.1", hosts.len(), None);
        for (member, host) in etcd.members.iter_mut().zip(hosts) {
            let [client, peer] = Port::several().map(|port: Port| port.at(&host.address()));
            (member.client, member.peer) = (client, peer);
            member.host = Some(Arc::clone(host));
        }
        etcd.start_all()?;
        etcd.healthy(Duration::from_secs(30)).await;
        Ok(etcd)
    }

    /// Starts one member that lets only clients with certificates in. Waiting until it answers is
    /// left to the caller, who has one.
    pub fn start_with_tls(tls: TlsFiles) -> Result<Self> {
        let mut etcd = Self::new("127.0.0.1", 1, Some(tls));
        etcd.start_all()?;
        Ok(etcd)
    }

    fn new(host: &str, members: usize, tls: Option<TlsFiles>) -> Self {
        let members = (0..members)
            .map(|index| Member {
                name: format!("etcd{index}"),
                client: Port::free().at(host),
                peer: Port::free().at(host),
                host: None,
                process: None,
            })
            .collect();
        Self { members, tls, scratch: Scratch::new("etcd") }
    }

    /// `host:port` of each member's client port.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client.address()).collect()
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Starts every member that does not run.
    pub fn start_all(&mut self) -> Result<()> {
        (0..self.members.len()).try_for_each(|index| self.start_member(index))
    }

    /// Starts one member on its old ports and data, if it does not run.
    pub fn start_member(&mut self, index: usize) -> Result<()> {
        let peers: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{}=http://{}", member.name, member.peer.address()))
            .collect();
        let member = self.members.get_mut(index).context("no such member")?;
        if member.process.is_some() {
            return Ok(());
        }
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let client = format!("{scheme}://{}", member.client.address());
        let peer = format!("http://{}", member.peer.address());
        let mut command = Command::new("etcd");
        command
            .args(["--name", &member.name])
            .arg("--data-dir")
            .arg(self.scratch.join(&member.name))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(","), "--initial-cluster-state", "new"])
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(["--logger", "zap", "--log-level", "warn"])
            .current_dir("/");
        if let Some(tls) = &self.tls {
            command.arg("--trusted-ca-file").arg(&tls.ca).arg("--client-cert-auth");
            command.arg("--cert-file").arg(&tls.certificate).arg("--key-file").arg(&tls.key);
        }
        let log = self.scratch.join(&format!("{}.log", member.name));
        let command = match &member.host {
            Some(host) => host.run(command.env("PATH", "/usr/bin:/bin")),
            None => command,
        };
        member.process = Some(Process::spawn(&member.name, command, &log)?);
        Ok(())
    }

    /// `kill -9` of every member.
    pub fn kill_all(&mut self) {
        for member in &mut self.members {
            member.process = None;
        }
    }

    /// `kill -9` of one member.
    pub fn kill_member(&mut self, index: usize) {
        if let Some(member) = self.members.get_mut(index) {
            member.process = None;
        }
    }

    /// SIGSTOP of one member: its connections stay open and say nothing.
    pub fn freeze_member(&self, index: usize) -> Result<()> {
        self.process(index)?.freeze()
    }

    pub fn thaw_member(&self, index: usize) -> Result<()> {
        self.process(index)?.signal(Signal::CONT)
    }

    /// Waits until every member answers that it has a leader.
    ///
    /// # Panics
    /// When `limit` has passed.
    pub async fn healthy(&self, limit: Duration) {
        for member in &self.members {
            let rest = Rest::new(&member.client.address());
            until(limit, &format!("{} is healthy", member.name), || async {
                match rest.get("/health").await {
                    Ok(answer) if answer.text.contains("true") => Ok(()),
                    Ok(answer) => Err(answer.text),
                    Err(error) => Err(format!("{error:#}")),
                }
            })
            .await;
        }
    }

    /// Runs `etcdctl` against the first member that runs, and answers with what it printed.
    pub async fn ctl(&self, args: &[&str]) -> Result<String> {
        let member = self.members.iter().find(|member| member.process.is_some());
        let endpoint = member.context("no member runs")?.client.address();
        let output = tokio::process::Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &endpoint])
            .args(args)
            .output()
            .await
            .context("run etcdctl")?;
        ensure!(output.status.success(), "etcdctl: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Saves a backup of what it holds.
    pub async fn snapshot(&self) -> Result<PathBuf> {
        let path = self.scratch.join("snapshot.db");
        self.ctl(&["snapshot", "save", &path.display().to_string()]).await?;
        Ok(path)
    }

    /// Ends its only member and starts it anew from a backup, as an operator does after losing it: under
    /// the old addresses, with older revisions, as another cluster.
    pub async fn restore(&mut self, snapshot: &Path) -> Result<()> {
        self.kill_all();
        let member = self.members.first().context("a member")?;
        let dir = self.scratch.join(&member.name);
        std::fs::remove_dir_all(&dir).context("remove the lost data")?;
        let peer = format!("http://{}", member.peer.address());
        let output = tokio::process::Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["snapshot", "restore"])
            .arg(snapshot)
            .args(["--name", &member.name, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("{}={peer}", member.name)])
            .args(["--initial-cluster-token", "restored", "--data-dir"])
            .arg(&dir)
            .output()
            .await
            .context("run etcdctl")?;
        ensure!(output.status.success(), "etcdctl: {}", String::from_utf8_lossy(&output.stderr));
        self.start_all()
    }

    /// Ends every member and starts all of them from a backup under their old addresses and with the default
    /// token, so that the cluster's id is the old one and its revisions are smaller than before.
    pub async fn restore_in_place(&mut self, snapshot: &Path) -> Result<()> {
        self.kill_all();
        let peers: Vec<String> = self
            .members
            .iter()
            .map(|member| format!("{}=http://{}", member.name, member.peer.address()))
            .collect();
        for member in &self.members {
            let dir = self.scratch.join(&member.name);
            std::fs::remove_dir_all(&dir).context("remove the lost data")?;
            let peer = format!("http://{}", member.peer.address());
            let output = tokio::process::Command::new("etcdctl")
                .env("ETCDCTL_API", "3")
                .args(["snapshot", "restore"])
                .arg(snapshot)
                .args(["--name", &member.name, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &peers.join(","), "--data-dir"])
                .arg(&dir)
                .output()
                .await
                .context("run etcdctl")?;
            ensure!(
                output.status.success(),
                "etcdctl: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        self.start_all()
    }

    /// Makes another member the leader of the raft group. An error means that no leader answered.
    pub async fn move_leader(&self) -> Result<()> {
        let endpoints = self.endpoints().join(",");
        let all = ["--endpoints", &endpoints, "--command-timeout=3s"];
        let status = self.ctl(&[&all[..], &["endpoint", "status", "-w", "json"]].concat()).await?;
        let status: serde_json::Value =
            serde_json::from_str(&status).context("parse the status")?;
        let id = |value: &serde_json::Value| value.as_u64().unwrap_or_default();
        let list = status.as_array().context("a list of members")?;
        let leader = list.first().map_or(0, |first| id(&first["Status"]["leader"]));
        let other = list.iter().map(|it| id(&it["Status"]["header"]["member_id"]));
        let other = other.into_iter().find(|it| *it != leader).context("another member")?;
        self.ctl(&[&all[..], &["move-leader", &format!("{other:x}")]].concat()).await.map(drop)
    }

    /// The test has passed, nothing needs to be kept.
    pub fn passed(&mut self) {
        self.scratch.passed();
    }

    fn process(&self, index: usize) -> Result<&Process> {
        let process = self.members.get(index).and_then(|member| member.process.as_ref());
        process.context("the member does not run")
    }
}
