//! The ways to the server: directly, through HAProxy, PgBouncer and Kornak.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use kornak_tests::run::port::Port;
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect, program, server_user};
use kornak_tests::run::process::Process;
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;

/// Role, database and password of pgbench.
pub const APP: &str = "app";
pub const APP_PASSWORD: &str = "app-password";

/// Server connections that clients of a transaction pool share.
pub const SHARED: u32 = 40;

/// For pgbench's tables: 10 branches, a million accounts, 150 MB, which fit in memory.
const SCALE: &str = "10";

/// One way: its name in the table, and where pgbench connects.
#[derive(Debug, Clone)]
pub struct Way {
    pub name: &'static str,
    pub port: u16,
    /// A client's prepared statements work (PgBouncer's transaction mode before 1.21: no).
    pub prepared: bool,
    /// The clients of this way share server connections.
    pub pooled: bool,
    /// The process of this way; the server's own sessions are processes and not measured.
    pub pid: Option<u32>,
}

/// Everything that runs; ends when dropped, in this order.
#[derive(Debug)]
pub struct Stage {
    _processes: Vec<Process>,
    _proxy: Proxy,
    _pooled: Proxy,
    _server: Postgres,
    ways: Vec<Way>,
    _ports: Vec<Port>,
    scratch: Scratch,
}

impl Stage {
    /// Starts the server with pgbench's tables, and all ways to it.
    pub async fn start() -> Result<Self> {
        let scratch = Scratch::new("bench");
        let (cert, key) = certificate(&scratch)?;
        let (ssl_cert, ssl_key) = (format!("ssl_cert_file={cert}"), format!("ssl_key_file={key}"));
        // The disk is not what is compared: no waits for it.
        let settings = [
            "max_connections=450",
            "shared_buffers=256MB",
            "fsync=off",
            "synchronous_commit=off",
            "max_wal_size=4GB",
            "autovacuum=off",
            "ssl=on",
            &ssl_cert,
            &ssl_key,
        ];
        let server = Postgres::start(&scratch, "pg", &settings).await?;
        let admin = server.connect().await.context("connect as superuser")?;
        admin.batch_execute(&format!("CREATE ROLE {APP} LOGIN PASSWORD '{APP_PASSWORD}'")).await?;
        admin.batch_execute(&format!("CREATE DATABASE {APP} OWNER {APP}")).await?;
        let mut init = pgbench(server.port(), false);
        init.args(["-i", "-q", "-s", SCALE]);
        let output = kornak_tests::run::cluster::run(init).await?;
        anyhow::ensure!(
            output.status.success(),
            "pgbench -i: {}",
            String::from_utf8_lossy(&output.stderr)
        );

        let [haproxy, session, transaction] = Port::several();
        let processes = vec![
            start_haproxy(&scratch, &haproxy, server.port())?,
            start_pgbouncer(&scratch, "session", &session, server.port(), (&cert, &key))?,
            start_pgbouncer(&scratch, "transaction", &transaction, server.port(), (&cert, &key))?,
        ];
        let head = format!(
            "scope: bench\nstatic:\n  members: [{{name: a, host: 127.0.0.1, port: {}}}]\nlog: {{level: WARNING}}",
            server.port()
        );
        let lines = format!(
            "auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}\n\
             tls: {{client: {{cert: {cert}, key: {key}}}, server: {{sslmode: disable}}}}"
        );
        let mut proxy = Proxy::start(&scratch, "kornak", &head, &lines).await?;
        let more = format!(", pool_mode: transaction, pool_size: {SHARED}");
        let mut pooled = Proxy::start_as(&scratch, "pooled", &head, &more, &lines).await?;
        let prepared = pgbouncer_keeps_statements().await;
        let pid = |at: usize| processes.get(at).map(Process::pid);
        let alone = |name, port, pid| Way { name, port, prepared: true, pooled: false, pid };
        let shared = |name, port, pid, prepared| Way { name, port, prepared, pooled: true, pid };
        let kornak = Some(proxy.process().pid());
        let sharing = Some(pooled.process().pid());
        let ways = vec![
            alone("direct", server.port(), None),
            alone("HAProxy", haproxy.number(), pid(0)),
            alone("PgBouncer session", session.number(), pid(1)),
            shared("PgBouncer transact.", transaction.number(), pid(2), prepared),
            alone("Kornak", proxy.primary(), kornak),
            shared("Kornak transact.", pooled.primary(), sharing, true),
        ];
        let ports = vec![haproxy, session, transaction];
        let stage = Self {
            _processes: processes,
            _proxy: proxy,
            _pooled: pooled,
            _server: server,
            ways,
            _ports: ports,
            scratch,
        };
        for way in &stage.ways {
            let conninfo = format!(
                "host=127.0.0.1 port={} user={APP} password={APP_PASSWORD} dbname={APP}",
                way.port
            );
            until(Duration::from_secs(15), &format!("{} serves", way.name), || async {
                match connect(&conninfo).await {
                    Ok(client) => client.simple_query("SELECT 1").await.map(drop),
                    Err(error) => Err(error),
                }
                .map_err(|error| error.to_string())
            })
            .await;
        }
        Ok(stage)
    }

    pub fn ways(&self) -> &[Way] {
        &self.ways
    }

    /// Where scripts may be written.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Everything has been measured, nothing needs to be kept.
    pub fn passed(&mut self) {
        self.scratch.passed();
    }
}

/// pgbench as the application, on this port, with or without TLS.
pub fn pgbench(port: u16, tls: bool) -> Command {
    let mut command = program("pgbench");
    command
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", APP])
        .env("PGPASSWORD", APP_PASSWORD)
        .env("PGSSLMODE", if tls { "require" } else { "disable" })
        .env("PGGSSENCMODE", "disable")
        .env("PGDATABASE", APP)
        // No certificates of whoever runs this, which the server's user may not read.
        .env("HOME", "/nonexistent");
    command
}

fn as_server_user(mut command: Command) -> Command {
    if let Some(user) = server_user() {
        command.uid(user.uid).gid(user.gid);
    }
    command.current_dir("/");
    command
}

fn start_haproxy(scratch: &Scratch, port: &Port, server: u16) -> Result<Process> {
    let file = scratch.join("haproxy.cfg");
    let text = format!(
        "global\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 4s\n  timeout client 30m\n  \
         timeout server 30m\nlisten primary\n  bind {}\n  server a 127.0.0.1:{server}\n",
        port.address()
    );
    fs::write(&file, text).context("write haproxy.cfg")?;
    let mut command = as_server_user(Command::new("/usr/sbin/haproxy"));
    command.args(["-db", "-f"]).arg(&file);
    Process::spawn("HAProxy", command, &scratch.join("haproxy.log"))
}

/// A certificate of its own for everybody who ends TLS, readable to the servers' user.
fn certificate(scratch: &Scratch) -> Result<(String, String)> {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
    let home = scratch.server_dir("tls");
    let (cert, key) = (home.join("cert.pem"), home.join("key.pem"));
    fs::write(&cert, made.cert.pem()).context("write a certificate")?;
    fs::write(&key, made.signing_key.serialize_pem()).context("write a key")?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    if let Some(user) = server_user() {
        for file in [&cert, &key] {
            std::os::unix::fs::chown(file, Some(user.uid), Some(user.gid))?;
        }
    }
    Ok((cert.display().to_string(), key.display().to_string()))
}

fn start_pgbouncer(
    scratch: &Scratch,
    mode: &str,
    port: &Port,
    server: u16,
    (cert, key): (&str, &str),
) -> Result<Process> {
    let home = scratch.server_dir(&format!("pgbouncer-{mode}"));
    let (file, users) = (home.join("pgbouncer.ini"), home.join("users.txt"));
    fs::write(&users, format!("\"{APP}\" \"{APP_PASSWORD}\"\n")).context("write users.txt")?;
    let text = format!(
        "[databases]\n{APP} = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
         listen_port = {}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n\
         pool_mode = {mode}\nmax_client_conn = 2500\ndefault_pool_size = {}\n\
         log_connections = 0\nlog_disconnections = 0\nserver_tls_sslmode = disable\n\
         client_tls_sslmode = allow\nclient_tls_cert_file = {cert}\nclient_tls_key_file = {key}\n",
        port.number(),
        users.display(),
        if mode == "session" { 160 } else { SHARED },
    );
    fs::write(&file, text).context("write pgbouncer.ini")?;
    let mut command = as_server_user(Command::new("/usr/sbin/pgbouncer"));
    command.arg("-q").arg(&file);
    Process::spawn("PgBouncer", command, &scratch.join(&format!("pgbouncer-{mode}.log")))
}

/// Since 1.21, and only with a limit that is not 0: then the default is 200 from 1.24 on. Taken as
/// no, unless the release says otherwise.
async fn pgbouncer_keeps_statements() -> bool {
    let mut command = Command::new("/usr/sbin/pgbouncer");
    command.arg("--version");
    let Ok(output) = kornak_tests::run::cluster::run(command).await else { return false };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let release = text.split_whitespace().nth(1).unwrap_or_default();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (1, 24)
}
