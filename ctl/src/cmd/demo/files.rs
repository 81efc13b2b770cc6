//! The files of a demo: configuration that a user could have written, and the note by which
//! `kornak list` finds the running demo.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use kornak_cluster::discard;
use serde_json::json;

use super::layout::{Layout, Node};
use super::ports::Ports;

/// The database of a Citus demo.
pub(super) const CITUS_DATABASE: &str = "citus";

/// Passwords of this cluster: a directory that is kept keeps them as well.
pub(super) struct Secrets {
    superuser: String,
    replication: String,
}

impl Secrets {
    /// Passwords of the cluster that lies in `dir`, or new ones, which are noted there.
    pub(super) fn of(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("passwords");
        if let Ok(text) = fs::read_to_string(&path)
            && let Some((superuser, replication)) = text.trim().split_once(' ')
        {
            return Ok(Self {
                superuser: superuser.to_owned(),
                replication: replication.to_owned(),
            });
        }
        let word = || format!("{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>());
        let secrets = Self { superuser: word(), replication: word() };
        secret_file(&path, &format!("{} {}\n", secrets.superuser, secrets.replication))?;
        Ok(secrets)
    }
}

/// Where PostgreSQL's programs are: the newest version that Debian's layout or `PATH` shows.
pub(super) fn postgres_bin_dir() -> anyhow::Result<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Vec::new();
    for root in ["/usr/lib/postgresql", "/usr/pgsql"] {
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let bin = entry.path().join("bin");
            let version = entry.file_name().to_string_lossy().parse().unwrap_or(0);
            if bin.join("postgres").exists() {
                found.push((version, bin));
            }
        }
    }
    found.sort();
    if let Some((_, bin)) = found.pop() {
        return Ok(bin);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path).find(|dir| dir.join("postgres").exists()) {
        Some(dir) => Ok(dir),
        None => bail!("PostgreSQL's server programs were not found; install postgresql-15"),
    }
}

fn secret_file(path: &Path, text: &str) -> anyhow::Result<()> {
    discard::may_be_gone_already(fs::remove_file(path));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes()).with_context(|| format!("write {}", path.display()))
}

/// An agent's file in Patroni's format.
pub(super) fn write_node(
    dir: &Path,
    bin_dir: &Path,
    ports: &Ports,
    node: &Node,
    secrets: &Secrets,
    synchronous: bool,
) -> anyhow::Result<PathBuf> {
    let path = dir.join(format!("{}.yml", node.name));
    secret_file(&path, &node_text(dir, bin_dir, ports, node, secrets, synchronous))?;
    Ok(path)
}

fn node_text(
    dir: &Path,
    bin_dir: &Path,
    ports: &Ports,
    node: &Node,
    secrets: &Secrets,
    synchronous: bool,
) -> String {
    let Node { index, name, group } = node;
    let (server, rest) = (ports.server(*index), ports.rest(*index));
    // Seven servers on one machine; and they have no certificates for each other.
    let (citus, memory, conninfo) = match group {
        Some(group) => (
            format!("citus: {{group: {group}, database: {CITUS_DATABASE}}}\n"),
            "16MB",
            "        citus.node_conninfo: sslmode=prefer\n",
        ),
        None => (String::new(), "64MB", ""),
    };
    let synchronous = match group {
        Some(_) if !synchronous => String::new(),
        _ => format!("    synchronous_mode: {synchronous}\n"),
    };
    format!(
        r#"scope: demo
name: {name}
{citus}restapi:
  listen: 127.0.0.1:{rest}
  connect_address: 127.0.0.1:{rest}
etcd3:
  hosts: 127.0.0.1:{etcd}
bootstrap:
  dcs:
    ttl: 20
    loop_wait: 5
    retry_timeout: 5
    failsafe_mode: true
{synchronous}    postgresql:
      use_pg_rewind: true
      parameters:
        max_connections: 200
        shared_buffers: {memory}
{conninfo}        wal_log_hints: "on"
  initdb:
    - encoding: UTF8
    - locale: C.UTF-8
    - data-checksums
# A demo must not reset the machine that it runs on.
watchdog:
  mode: off
postgresql:
  listen: 127.0.0.1:{server}
  connect_address: 127.0.0.1:{server}
  data_dir: {data}
  bin_dir: {bin}
  pgpass: {data}.pgpass
  authentication:
    superuser: {{username: postgres, password: "{superuser}"}}
    replication: {{username: replicator, password: "{replication}"}}
  remove_data_directory_on_rewind_failure: true
  remove_data_directory_on_diverged_timelines: true
"#,
        etcd = ports.etcd_client(),
        data = dir.join(name).display(),
        bin = bin_dir.display(),
        superuser = secrets.superuser,
        replication = secrets.replication,
    )
}

/// The proxy's file.
pub(super) fn write_proxy(
    dir: &Path,
    ports: &Ports,
    secrets: &Secrets,
    layout: &Layout,
) -> anyhow::Result<PathBuf> {
    let workers = match layout.is_citus() {
        true => format!(
            "    - {{name: workers, listen: \"127.0.0.1:{}\", target: workers}}\n",
            ports.workers()
        ),
        false => String::new(),
    };
    let text = format!(
        r#"scope: demo
etcd3:
  hosts: 127.0.0.1:{etcd}
proxy:
  listeners:
    - {{name: primary, listen: "127.0.0.1:{primary}", target: primary}}
{workers}    - {{name: standbys, listen: "127.0.0.1:{standbys}", target: standbys}}
  status: {{listen: "127.0.0.1:{status}"}}
  auth: {{method: scram, user: postgres, password: "{superuser}"}}
"#,
        etcd = ports.etcd_client(),
        primary = ports.primary(),
        standbys = ports.standbys(),
        status = ports.status(),
        superuser = secrets.superuser,
    );
    let path = dir.join("proxy.yml");
    secret_file(&path, &text)?;
    Ok(path)
}

/// A password file for the person's psql (/docs/current/libpq-pgpass.html).
pub(super) fn write_passfile(dir: &Path, secrets: &Secrets) -> anyhow::Result<PathBuf> {
    let path = dir.join("pgpass");
    secret_file(&path, &format!("127.0.0.1:*:*:postgres:{}\n", secrets.superuser))?;
    Ok(path)
}

/// The note that says where the running demo is; gone with it.
pub(super) struct Note(Option<PathBuf>);

impl Drop for Note {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // A note that stays names a process that is gone, which readers notice.
            discard::may_be_gone_already(fs::remove_file(path));
        }
    }
}

/// Tells the operator's verbs about this demo. A second demo leaves the first one's note alone.
pub(super) fn leave_note(dir: &Path, ports: &Ports, layout: &Layout) -> anyhow::Result<Note> {
    let path = crate::demo_note::path();
    if crate::demo_note::read(&path).is_some_and(|note| note.is_alive()) {
        println!("Another demo is running: kornak list and kornak switchover mean that one.");
        return Ok(Note(None));
    }
    let note = json!({
        "scope": "demo",
        "api": ports.rest_urls(),
        "groups": layout.by_group(|index| ports.rest_url(index)),
        "dir": dir,
        "pid": std::process::id(),
    });
    secret_file(&path, &note.to_string())?;
    Ok(Note(Some(path)))
}
