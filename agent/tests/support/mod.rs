//! Real servers for tests: each has a directory of its own, a free port, and a guard that is this very
//! test binary, called again.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot begin has failed")]

use std::ffi::OsString;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kornak_agent::guard::{self, Fencing, GuardConfig, processes_in};
use kornak_agent::postgres::{Options, OsUser, Postgres, StartAs, Upstream, slot_name_of};
use rustix::process::{Pid, Signal, kill_process};

/// Long enough for a busy machine; nothing waits for it to pass.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Where PostgreSQL's programs are.
const BIN_DIR: &str = "/usr/lib/postgresql/15/bin";
const GUARD_ARGS: &str = "KORNAK_TEST_GUARD_ARGS";

/// To be called by a test named `guard_process`: becomes the guard if it was started as one.
pub fn become_guard() {
    if let Some(args) = std::env::var_os(GUARD_ARGS) {
        let args: Vec<OsString> =
            args.to_string_lossy().split('\t').skip(1).map(OsString::from).collect();
        guard::main(args);
    }
}

/// A directory for servers, removed with everything that still runs in it.
pub struct Field {
    dir: tempfile::TempDir,
    nodes: Vec<PathBuf>,
    guard_program: PathBuf,
    user: Option<OsUser>,
}

impl Field {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("kornak-agent-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let user = OsUser::to_become("postgres").unwrap();
        if let Some(user) = &user {
            std::os::unix::fs::chown(dir.path(), Some(user.uid), Some(user.gid)).unwrap();
        }
        let guard_program = dir.path().join("guard.sh");
        let test = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/sh\nIFS='\t'\n{GUARD_ARGS}=\"$*\" exec '{}' guard_process --exact --nocapture \
             --test-threads=1\n",
            test.display()
        );
        fs::write(&guard_program, script).unwrap();
        fs::set_permissions(&guard_program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir, nodes: Vec::new(), guard_program, user }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn node(&mut self, name: &str) -> Node {
        self.node_with(name, |_| {})
    }

    /// A server that does not exist yet.
    pub fn node_with(&mut self, name: &str, change: impl FnOnce(&mut GuardConfig)) -> Node {
        let data_dir = self.dir.path().join(name);
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let text = format!(
            "scope: demo\nname: {name}\nrestapi: {{listen: '127.0.0.1:1'}}\n\
             etcd3: {{host: '127.0.0.1:1'}}\n\
             postgresql:\n  listen: 127.0.0.1:{port}\n  connect_address: 127.0.0.1:{port}\n  \
             data_dir: {data}\n  bin_dir: {BIN_DIR}\n  \
             parameters: {{unix_socket_directories: '', fsync: 'off', shared_buffers: 8MB}}\n  \
             authentication:\n    superuser: {{username: postgres, password: s3cret-super}}\n    \
             replication: {{username: replicator, password: \"re:pl'ica\"}}\n    \
             rewind: {{username: rewinder, password: s3cret-rewind}}\n",
            data = data_dir.display()
        );
        let file = self.dir.path().join(format!("{name}.yml"));
        fs::write(&file, text).unwrap();
        let loaded = kornak_config::load_agent(Some(&file), &[]).unwrap();
        let mut guard = GuardConfig::new(&data_dir);
        guard.program = self.guard_program.clone();
        guard.linger = Duration::from_secs(2);
        guard.stop_budget = Duration::from_millis(500);
        change(&mut guard);
        self.nodes.push(data_dir);
        let options = Options {
            name: name.to_owned(),
            cluster_name: "demo".to_owned(),
            settings: loaded.settings.postgresql,
            citus: false,
            os_user: "postgres".to_owned(),
            guard: guard.clone(),
            first_ttl: Duration::from_secs(30),
        };
        let postgres = Postgres::new(options.clone()).unwrap();
        Node { postgres, options, guard, port, user: self.user.clone() }
    }
}

impl Drop for Field {
    fn drop(&mut self) {
        for data_dir in &self.nodes {
            for process in processes_in(data_dir).unwrap() {
                kill(process.pid, Signal::KILL);
            }
        }
    }
}

pub struct Node {
    pub postgres: Postgres,
    pub options: Options,
    pub guard: GuardConfig,
    pub port: u16,
    pub user: Option<OsUser>,
}

impl Node {
    /// initdb, a primary that nobody else can replace, its roles.
    pub async fn bootstrap(&self) {
        self.postgres.initdb(&[], &[]).await.unwrap();
        self.postgres.start_first(&StartAs::Primary(Fencing::Unfenced)).await.unwrap();
        self.postgres.wait_ready(LIMIT).await.unwrap();
        self.postgres.create_roles().await.unwrap();
        self.postgres.finish_first().await.unwrap();
    }

    /// A directory that belongs to the servers' account.
    pub fn dir(&self, path: &Path) {
        fs::create_dir_all(path).unwrap();
        if let Some(user) = &self.user {
            std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).unwrap();
        }
    }

    pub async fn start_primary(&self) {
        self.postgres.start(&StartAs::Primary(Fencing::Unfenced)).await.unwrap();
        self.postgres.wait_ready(LIMIT).await.unwrap();
    }

    pub fn upstream(&self) -> Upstream {
        Upstream::new("127.0.0.1", self.port, None)
    }

    /// Another agent for the same data directory, as after a restart.
    pub fn again(&self) -> Postgres {
        Postgres::new(self.options.clone()).unwrap()
    }

    pub async fn execute(&self, statement: &str) -> Option<String> {
        let value = self.postgres.sql().value("do what a test wants", statement).await;
        value.unwrap_or_else(|error| panic!("{statement}: {error:?}"))
    }

    /// Processes of the server, the logging collector included.
    pub fn processes(&self) -> usize {
        processes_in(&self.options.settings.data_dir).unwrap().len()
    }

    /// A session that works and never looks up.
    pub async fn busy_backend(&self) {
        let client = self.postgres.sql().connect_patiently().await.unwrap();
        tokio::spawn(async move {
            let _ = client
                .batch_execute(
                    "DO $$ DECLARE i bigint := 0; BEGIN LOOP i := i + 1; END LOOP; END $$",
                )
                .await;
        });
        until("the backend works", async || {
            let question = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO $$%' \
                            AND state = 'active'";
            self.execute(question).await.as_deref() == Some("1")
        })
        .await;
    }
}

/// Makes `b` a copy of the primary `a` that streams from it.
pub async fn stream(a: &Node, b: &Node) {
    a.postgres.create_physical_slot(&slot_name_of("b")).await.unwrap();
    b.postgres.clone_from(Some(&a.upstream()), false).await.unwrap();
    let upstream = Upstream { slot: Some("b".to_owned()), ..a.upstream() };
    b.postgres.start(&StartAs::Standby(Some(upstream))).await.unwrap();
    b.postgres.wait_ready(LIMIT).await.unwrap();
    until("b streams", async || b.postgres.status().await.is_ok_and(|s| s.is_streaming())).await;
}

/// Waits for a condition, with a limit.
pub async fn until(what: &str, mut met: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !met().await {
        assert!(begun.elapsed() < LIMIT, "not reached in {LIMIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn kill(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(i32::try_from(pid).unwrap()) {
        let _ = kill_process(pid, signal);
    }
}
