//! Cancel requests: through the proxy that has the session and through another one of the cluster, for
//! clients of protocol 3.0 and 3.2, on listeners with several servers, for a query that is held; and
//! never for anybody else's query.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use kornak_config::proxy::{ServerSideTls, SslMode};
use kornak_protocol::auth::Credentials;
use kornak_protocol::backend::BackendKey;
use kornak_protocol::error::ErrorView;
use kornak_protocol::startup::{ProtocolVersion, put_cancel_request, put_startup};
use kornak_proxy::net::backend::{Account, Address, Connected, connect, next_frame};
use kornak_proxy::net::tls::ServerTls;
use kornak_tests::run::etcd::Etcd;
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const SOON: Duration = Duration::from_secs(20);

/// A session in the middle of a long query.
struct Sleeper {
    connected: Connected,
    key: BackendKey,
}

async fn session(port: u16, version: ProtocolVersion) -> Result<(Connected, BackendKey)> {
    let mut startup = BytesMut::new();
    let params: [(&[u8], &[u8]); 2] = [(b"user", b"app"), (b"database", b"postgres")];
    put_startup(version, params, &mut startup)?;
    let settings = ServerSideTls { sslmode: SslMode::Disable, ..ServerSideTls::default() };
    let tls = ServerTls::new(&settings)?;
    let address = Address { host: "127.0.0.1".into(), port };
    let password = Credentials::Password(b"right".to_vec().into());
    let account = Account { startup: &startup, user: b"app", credentials: &password, own: None };
    let connected = connect(&address, &tls, account, SOON).await?;
    let key = connected.key.clone().context("no BackendKeyData")?;
    Ok((connected, key))
}

async fn say(connected: &mut Connected, sql: &str) -> Result<()> {
    let mut query = b"Q".to_vec();
    query.extend_from_slice(&u32::try_from(sql.len() + 5)?.to_be_bytes());
    query.extend_from_slice(sql.as_bytes());
    query.push(0);
    Ok(connected.stream.write_all(&query).await?)
}

/// The SQLSTATE of the answer to the query under way.
async fn refusal(connected: &mut Connected) -> Result<String> {
    let reading = async {
        let mut sqlstate = None;
        loop {
            let frame = next_frame(&mut connected.stream, &mut connected.rest).await?;
            match frame.tag {
                b'E' => sqlstate = Some(ErrorView::parse_prefix(&frame.body).sqlstate()),
                b'Z' => return Ok::<_, anyhow::Error>(sqlstate),
                _ => {}
            }
        }
    };
    let found = tokio::time::timeout(SOON, reading).await.context("no answer")??;
    Ok(found.context("the query was answered as if nothing had happened")?.to_string())
}

impl Sleeper {
    /// Sleeps at `server` through `port`.
    async fn start(port: u16, version: ProtocolVersion, server: &Postgres) -> Result<Self> {
        let (mut connected, key) = session(port, version).await?;
        let expected = if version == ProtocolVersion::V3_0 { 4 } else { 32 };
        assert_eq!(key.key.len(), expected, "length of a cancel key in {version}");
        say(&mut connected, "SELECT pg_sleep(300)").await?;
        let sleeper = Self { connected, key };
        until(SOON, "the server sleeps, under the process id that the client was told", || async {
            match sleeper.sleeps(server).await {
                Ok(true) => Ok(()),
                Ok(false) => Err("not active".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
        Ok(sleeper)
    }

    async fn sleeps(&self, server: &Postgres) -> Result<bool> {
        let sql = "SELECT count(*) FROM pg_stat_activity \
                   WHERE pid = $1 AND state = 'active' AND query LIKE 'SELECT pg_sleep%'";
        let pid = i32::try_from(self.key.pid)?;
        let row = server.connect().await?.query_one(sql, &[&pid]).await?;
        Ok(row.get::<_, i64>(0) == 1)
    }

    async fn is_cancelled(&mut self) -> Result<()> {
        let sqlstate = refusal(&mut self.connected).await?;
        ensure!(sqlstate == "57014", "{sqlstate} instead of query_canceled");
        Ok(())
    }
}

/// Sends a request and waits for the proxy to close: by then it has done what it will do.
async fn cancel(port: u16, pid: u32, key: &Bytes) -> Result<()> {
    let mut packet = BytesMut::new();
    put_cancel_request(pid, key, &mut packet)?;
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
    socket.write_all(&packet).await?;
    let mut nothing = Vec::new();
    tokio::time::timeout(SOON, socket.read_to_end(&mut nothing)).await.context("left open")??;
    ensure!(nothing.is_empty(), "a cancel request was answered: {nothing:?}");
    Ok(())
}

/// A store that says that `a` leads and `b` follows, without agents: two servers of their own.
async fn store(a: &Postgres, b: &Postgres) -> Result<Etcd> {
    let etcd = Etcd::start(1).await?;
    for (name, role, server) in [("a", "primary", a), ("b", "replica", b)] {
        let port = server.port();
        let member = format!(
            r#"{{"conn_url":"postgres://127.0.0.1:{port}/postgres","api_url":"http://127.0.0.1:1/patroni","state":"running","role":"{role}","version":"4.1.5","timeline":1}}"#
        );
        etcd.ctl(&["put", &format!("/service/demo/members/{name}"), &member]).await?;
    }
    etcd.ctl(&["put", "/service/demo/leader", "a"]).await?;
    Ok(etcd)
}

async fn proxy(scratch: &Scratch, name: &str, etcd: &Etcd) -> Result<Proxy> {
    let hosts: Vec<String> =
        etcd.endpoints().iter().map(|it| it.trim_start_matches("http://").to_owned()).collect();
    let head = format!("scope: demo\netcd3: {{hosts: \"{}\"}}", hosts.join(","));
    let lines = format!(
        "name: {name}\nauth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}\n\
         limits: {{hold_timeout: 60s}}"
    );
    let proxy = Proxy::start(scratch, name, &head, &lines).await?;
    for port in [proxy.primary(), proxy.standbys()] {
        let app = format!("host=127.0.0.1 port={port} user=app password=right dbname=postgres");
        proxy.ready(&app, SOON).await;
    }
    Ok(proxy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_request_finds_its_query_through_any_proxy_and_hits_no_other() -> Result<()> {
    let mut scratch = Scratch::new("cancel");
    let a = Postgres::start(&scratch, "a", &[]).await?;
    let b = Postgres::start(&scratch, "b", &[]).await?;
    // The same verifier on both, as on servers that are copies of each other.
    let admin = a.connect().await?;
    admin.batch_execute("CREATE ROLE app LOGIN PASSWORD 'right'").await?;
    let sql = "SELECT rolpassword FROM pg_authid WHERE rolname = 'app'";
    let verifier: String = admin.query_one(sql, &[]).await?.get(0);
    let sql = format!("CREATE ROLE app LOGIN PASSWORD '{verifier}'");
    b.connect().await?.batch_execute(&sql).await?;
    let mut etcd = store(&a, &b).await?;
    let one = proxy(&scratch, "one", &etcd).await?;
    let two = proxy(&scratch, "two", &etcd).await?;
    until(SOON, "both proxies are registered", || async {
        let found = etcd.ctl(&["get", "--prefix", "/service/demo/kornak/proxies/"]).await;
        let found = found.map_err(|error| error.to_string())?;
        if found.matches("\"cancel\"").count() == 2 { Ok(()) } else { Err(found) }
    })
    .await;

    // On the leader and on a listener with other servers, through the proxy itself and another.
    for (through, server) in [(one.primary(), &a), (one.standbys(), &b)] {
        for version in [ProtocolVersion::V3_0, ProtocolVersion::V3_2] {
            for sent_to in [one.primary(), one.standbys(), two.primary(), two.standbys()] {
                let mut sleeper = Sleeper::start(through, version, server).await?;
                let key = sleeper.key.clone();
                cancel(sent_to, key.pid, &key.key).await?;
                let what = format!("{version}: session on {through}, request sent to {sent_to}");
                sleeper.is_cancelled().await.context(what)?;
            }
        }
    }

    // Nobody else is hit: not by the secret of another, nor without one, nor by a request that
    // claims to have been passed on.
    let bystander = Sleeper::start(one.primary(), ProtocolVersion::V3_0, &a).await?;
    let long = Sleeper::start(two.primary(), ProtocolVersion::V3_2, &a).await?;
    let mut other = Sleeper::start(one.primary(), ProtocolVersion::V3_0, &a).await?;
    let pid = bystander.key.pid;
    let lie = [b"kornak passed on".as_slice(), &other.key.key].concat();
    for key in
        [other.key.key.clone(), long.key.key.clone(), Bytes::from(lie), Bytes::from_static(&[0; 4])]
    {
        for port in [one.primary(), two.primary()] {
            cancel(port, pid, &key).await?;
        }
    }
    assert!(bystander.sleeps(&a).await? && long.sleeps(&a).await? && other.sleeps(&a).await?);
    cancel(two.primary(), other.key.pid, &other.key.key.clone()).await?;
    other.is_cancelled().await?;
    assert!(bystander.sleeps(&a).await? && long.sleeps(&a).await?);

    // A query that is held because the server is gone.
    let (mut idle, key) = session(one.primary(), ProtocolVersion::V3_0).await?;
    drop(a);
    let held = async |one: &Proxy| -> Result<i64> {
        let status = one.status().get("/status").await?;
        Ok(status.json()?["sessions"]["by_state"]["held"].as_i64().unwrap_or(0))
    };
    say(&mut idle, "SELECT 1").await?;
    until(SOON, "the query is held", || async {
        match held(&one).await {
            Ok(1) => Ok(()),
            Ok(n) => Err(format!("{n} held")),
            Err(error) => Err(error.to_string()),
        }
    })
    .await;
    cancel(two.primary(), key.pid, &key.key).await?;
    assert_eq!(refusal(&mut idle).await?, "57014");
    etcd.passed();
    scratch.passed();
    Ok(())
}
