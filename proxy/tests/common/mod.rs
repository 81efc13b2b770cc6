//! Real PostgreSQL servers below a scratch directory, a proxy in this process, and clients that
//! keep an account of what they were told.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at what it did not expect")]

pub mod agents;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kornak_cluster::Scope;
use kornak_config::proxy::{AuthSettings, ListenerSettings, ProxySettings, Source, Target};
use kornak_config::{Listen, StoreSettings};
use kornak_dcs::Dcs;
use kornak_proxy::Running;
use parking_lot::Mutex;
use tokio_postgres::{Client, Config, NoTls};
use tokio_util::sync::CancellationToken;

pub const PASSWORD: &str = "a-superuser's-password";

/// A directory that the servers' user owns; removed at the end.
pub struct Scratch {
    pub dir: tempfile::TempDir,
}

impl Scratch {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("kornak-proxy-").tempdir_in("/tmp").unwrap();
        std::fs::write(dir.path().join("password"), PASSWORD).unwrap();
        if is_root() {
            let status = Command::new("chown").args(["-R", "postgres"]).arg(dir.path()).status();
            assert!(status.unwrap().success());
        }
        Self { dir }
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn bin(tool: &str) -> PathBuf {
    let newest = std::fs::read_dir("/usr/lib/postgresql")
        .expect("PostgreSQL is installed below /usr/lib/postgresql")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .max();
    let newest = newest.expect("a release is installed");
    format!("/usr/lib/postgresql/{newest}/bin/{tool}").into()
}

/// One of PostgreSQL's programs, as a user that it accepts.
fn tool(name: &str) -> Command {
    let mut command = if is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--"]).arg(bin(name));
        command
    } else {
        Command::new(bin(name))
    };
    command.current_dir("/tmp").env("PGPASSWORD", PASSWORD).stdout(Stdio::null());
    command
}

fn run(command: &mut Command) {
    let output = command.stderr(Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A server; killed when dropped.
pub struct Server {
    pub name: String,
    pub port: u16,
    pub data: PathBuf,
}

impl Server {
    /// A new primary.
    pub fn primary(scratch: &Scratch, name: &str) -> Self {
        let data = scratch.dir.path().join(name);
        let pw = scratch.dir.path().join("password");
        run(tool("initdb")
            .args(["-U", "postgres", "-A", "scram-sha-256", "-N", "--no-locale", "-E", "UTF8"])
            .arg("--pwfile")
            .arg(pw)
            .arg("-D")
            .arg(&data));
        let hba = data.join("pg_hba.conf");
        let mut rules = std::fs::read_to_string(&hba).unwrap();
        rules.push_str("host replication all 127.0.0.1/32 scram-sha-256\n");
        std::fs::write(&hba, rules).unwrap();
        let server = Self { name: name.to_owned(), port: free_port(), data };
        server.start();
        server
    }

    /// A standby of `self`, running.
    pub fn standby(&self, scratch: &Scratch, name: &str) -> Self {
        let data = scratch.dir.path().join(name);
        let source = format!("host=127.0.0.1 port={} user=postgres password={PASSWORD}", self.port);
        let source = source.replace('\'', "\\'");
        run(tool("pg_basebackup")
            .args(["-R", "-c", "fast", "-X", "stream", "-d", &source, "-D"])
            .arg(&data));
        let server = Self { name: name.to_owned(), port: free_port(), data };
        server.start();
        server
    }

    pub fn start(&self) {
        let options = format!(
            "-c port={} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' \
             -c shared_buffers=16MB -c fsync=off -c max_connections=200 -c max_prepared_transactions=10 -c hot_standby=on \
             -c wal_retrieve_retry_interval=100ms",
            self.port
        );
        run(tool("pg_ctl")
            .args(["start", "-w", "-t", "60", "-s", "-D"])
            .arg(&self.data)
            .arg("-l")
            .arg(self.log())
            .args(["-o", &options]));
    }

    fn log(&self) -> PathBuf {
        self.data.with_extension("log")
    }

    /// `fast` or `immediate`.
    pub fn stop(&self, mode: &str) {
        run(tool("pg_ctl").args(["stop", "-w", "-s", "-m", mode, "-D"]).arg(&self.data));
    }

    pub fn promote(&self) {
        run(tool("pg_ctl").args(["promote", "-w", "-s", "-D"]).arg(&self.data));
    }

    pub fn member(&self, role: &str) -> String {
        format!(
            r#"{{"conn_url":"postgres://127.0.0.1:{}/postgres","api_url":"http://127.0.0.1:1/patroni","state":"running","role":"{role}","version":"4.1.5","timeline":1,"kornak":1}}"#,
            self.port
        )
    }

    pub async fn sql(&self) -> Client {
        connect(self.port).await.expect("the server is up")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let stopped = tool("pg_ctl")
            .args(["stop", "-w", "-s", "-m", "immediate", "-D"])
            .arg(&self.data)
            .stderr(Stdio::null())
            .status();
        drop(stopped);
    }
}

pub async fn connect(port: u16) -> Result<Client, tokio_postgres::Error> {
    let mut config = Config::new();
    config.host("127.0.0.1").port(port).user("postgres").password(PASSWORD).dbname("postgres");
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// A proxy with a `primary` and a `standbys` listener and SCRAM.
pub struct Proxy {
    pub running: Running,
    pub stop: CancellationToken,
}

impl Proxy {
    pub async fn start(source: Source, store: Option<Arc<dyn Dcs>>) -> Self {
        Self::start_with(source, store, |_| {}).await
    }

    pub async fn start_with(
        source: Source,
        store: Option<Arc<dyn Dcs>>,
        change: impl FnOnce(&mut ProxySettings),
    ) -> Self {
        let mut settings = ProxySettings::new(Scope::new("service", "demo", None), source);
        settings.auth = AuthSettings::scram("postgres", Some(PASSWORD.to_owned().into()));
        let any = || Listen { hosts: vec!["127.0.0.1".to_owned()], port: 0 };
        settings.listeners = vec![
            ListenerSettings::new("primary", any(), Target::Primary),
            ListenerSettings::new("standbys", any(), Target::Standbys),
        ];
        settings.status = Some(kornak_config::proxy::StatusSettings::new(any()));
        settings.threads = Some(2);
        change(&mut settings);
        let stop = CancellationToken::new();
        let running = kornak_proxy::start(settings, store, stop.clone()).await.unwrap();
        Self { running, stop }
    }

    pub fn port(&self, listener: usize) -> u16 {
        self.running.listeners[listener].1.port()
    }

    /// The answer of a path of the status listener.
    pub async fn page(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream =
            tokio::net::TcpStream::connect(self.running.status.unwrap()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

pub fn memory() -> Source {
    Source::Dcs(StoreSettings::Memory)
}

/// Waits until `met`, looking every few milliseconds.
pub async fn until<F: Future<Output = bool>>(what: &str, mut met: impl FnMut() -> F) {
    let give_up = Instant::now() + Duration::from_secs(20);
    while !met().await {
        assert!(Instant::now() < give_up, "not reached: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Clients that write all the time, each with its account.
pub struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    pub account: Arc<Account>,
}

#[derive(Default)]
pub struct Account {
    pub acknowledged: AtomicU64,
    /// Rows whose fate the client was told to be unknown.
    pub unknown: AtomicU64,
    pub errors: Mutex<Vec<String>>,
    pub longest: Mutex<Duration>,
    /// Connections that were lost.
    pub lost: AtomicU64,
}

impl Load {
    /// `autocommit` single inserts, `transactions` of two, `fresh` a connection for each.
    pub async fn start(port: u16, autocommit: usize, transactions: usize, fresh: usize) -> Self {
        let client = connect(port).await.unwrap();
        client
            .batch_execute(
                "CREATE TABLE IF NOT EXISTS load (who int, n bigint, PRIMARY KEY (who, n))",
            )
            .await
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let account = Arc::new(Account::default());
        let mut tasks = Vec::new();
        for who in 0..autocommit + transactions + fresh {
            let (stop, account) = (Arc::clone(&stop), Arc::clone(&account));
            let style = if who < autocommit {
                Style::Autocommit
            } else if who < autocommit + transactions {
                Style::Transaction
            } else {
                Style::Fresh
            };
            tasks.push(tokio::spawn(writer(port, who as i32, style, stop, account)));
        }
        Self { stop, tasks, account }
    }

    pub fn written(&self) -> u64 {
        self.account.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits until everybody has written so many more rows on average.
    pub async fn more(&self, rows: u64) {
        let goal = self.written() + rows * self.tasks.len() as u64;
        until("more rows", || async { self.written() >= goal }).await;
    }

    pub async fn finish(self) -> Arc<Account> {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.account
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Style {
    Autocommit,
    Transaction,
    Fresh,
}

async fn writer(port: u16, who: i32, style: Style, stop: Arc<AtomicBool>, account: Arc<Account>) {
    let mut client = connect(port).await.unwrap();
    let mut n = 0i64;
    let mut insert = client.prepare("INSERT INTO load VALUES ($1, $2)").await.unwrap();
    while !stop.load(Ordering::SeqCst) {
        n += 1;
        let began = Instant::now();
        let written = match style {
            Style::Autocommit => client.execute(&insert, &[&who, &n]).await.map(|_| 1),
            Style::Transaction => two(&mut client, who, &mut n).await,
            Style::Fresh => match connect(port).await {
                Ok(fresh) => {
                    fresh.execute("INSERT INTO load VALUES ($1, $2)", &[&who, &n]).await.map(|_| 1)
                }
                Err(error) => Err(error),
            },
        };
        {
            let mut longest = account.longest.lock();
            *longest = (*longest).max(began.elapsed());
        }
        match written {
            Ok(rows) => {
                account.acknowledged.fetch_add(rows, Ordering::SeqCst);
            }
            Err(error) => {
                let code = error.code().map(|code| code.code().to_owned());
                if code.as_deref() == Some("08007") {
                    account.unknown.fetch_add(2, Ordering::SeqCst);
                }
                account.errors.lock().push(code.unwrap_or_else(|| format!("{error:?}")));
                if client.is_closed() {
                    account.lost.fetch_add(1, Ordering::SeqCst);
                    client = connect(port).await.unwrap();
                    insert = client.prepare("INSERT INTO load VALUES ($1, $2)").await.unwrap();
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn two(client: &mut Client, who: i32, n: &mut i64) -> Result<u64, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    transaction.execute("INSERT INTO load VALUES ($1, $2)", &[&who, n]).await?;
    *n += 1;
    transaction.execute("INSERT INTO load VALUES ($1, $2)", &[&who, n]).await?;
    transaction.commit().await?;
    Ok(2)
}
