//! Published holes of other proxies of this protocol, tried on this one. What needs a server that
//! lies has a real one behind a wire that changes its words.
//!
//! Elsewhere: CVE-2025-12819 and CVE-2025-2291 (login.rs: `search_path` of a startup packet, VALID
//! UNTIL), CVE-2021-23214 (tls.rs). CVE-2026-6667 is about a command that proxies here do not have: the
//! status page only tells.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{BufMut, BytesMut};
use kornak_protocol::frame::take_frame;
use kornak_tests::run::port::Port;
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::scratch::Scratch;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_postgres::Client;

const SOON: Duration = Duration::from_secs(15);

/// The changed form of a server's message.
type Lie = Arc<dyn Fn(u8, &[u8]) -> Option<Vec<u8>> + Send + Sync>;

/// A wire to a server: what it says to the role `evil` is changed on the way.
struct Wire {
    port: Port,
    lie: Arc<Mutex<Option<Lie>>>,
}

impl Wire {
    async fn start(server: u16) -> Result<Self> {
        let port = Port::free();
        let listener = TcpListener::bind(port.address()).await?;
        let lie: Arc<Mutex<Option<Lie>>> = Arc::default();
        let known = Arc::clone(&lie);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, server, Arc::clone(&known)));
            }
        });
        Ok(Self { port, lie })
    }

    fn lies(&self, lie: impl Fn(u8, &[u8]) -> Option<Vec<u8>> + Send + Sync + 'static) {
        *self.lie.lock() = Some(Arc::new(lie));
    }
}

async fn carry(mut client: TcpStream, server: u16, lie: Arc<Mutex<Option<Lie>>>) -> Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", server)).await?;
    let mut first = BytesMut::new();
    client.read_buf(&mut first).await?;
    server.write_all(&first).await?;
    let evil = first.windows(6).any(|name| name == b"\0evil\0");
    let Some(lie) = lie.lock().clone().filter(|_| evil) else {
        tokio::io::copy_bidirectional(&mut client, &mut server).await?;
        return Ok(());
    };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    let mut said = BytesMut::new();
    while from_server.read_buf(&mut said).await? > 0 {
        while let Some(frame) = take_frame(&mut said, 1 << 20)? {
            let mut out = BytesMut::new();
            match lie(frame.tag, &frame.body) {
                Some(changed) => out.extend_from_slice(&changed),
                None => put(frame.tag, &frame.body, &mut out),
            }
            to_client.write_all(&out).await?;
        }
    }
    Ok(())
}

fn put(tag: u8, body: &[u8], out: &mut BytesMut) {
    out.put_u8(tag);
    out.put_u32(body.len() as u32 + 4);
    out.put_slice(body);
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = BytesMut::new();
    put(tag, body, &mut out);
    out.to_vec()
}

struct Front {
    scratch: Scratch,
    proxy: Proxy,
    wire: Wire,
    _server: Postgres,
}

impl Front {
    async fn start(name: &str) -> Result<Self> {
        let scratch = Scratch::new(name);
        let server = Postgres::start(&scratch, "pg", &[]).await?;
        let admin = server.connect().await?;
        admin.batch_execute("CREATE ROLE good LOGIN PASSWORD 'right'").await?;
        admin.batch_execute("CREATE ROLE evil LOGIN PASSWORD 'right'").await?;
        let wire = Wire::start(server.port()).await?;
        let head = format!(
            "scope: demo\nstatic:\n  members: [{{name: a, host: 127.0.0.1, port: {}}}]",
            wire.port.number()
        );
        let lines = format!(
            "auth: {{method: scram, user: postgres, password: \"{SUPERUSER_PASSWORD}\"}}\n\
             limits: {{login_timeout: 5s, hold_timeout: 2s, connect_timeout: 2s}}\n\
             tls: {{server: {{sslmode: disable}}}}"
        );
        let proxy = Proxy::start(&scratch, "proxy", &head, &lines).await?;
        let front = Self { scratch, proxy, wire, _server: server };
        front.proxy.ready(&front.conninfo("good"), SOON).await;
        Ok(front)
    }

    fn conninfo(&self, user: &str) -> String {
        let port = self.proxy.primary();
        format!("host=127.0.0.1 port={port} user={user} password=right dbname=postgres")
    }

    /// The others do not notice, and what happened cost no memory to speak of.
    async fn is_well(&mut self, what: &str) -> Result<()> {
        let client = connect(&self.conninfo("good")).await.context(what.to_owned())?;
        ensure!(client.query_one("SELECT 42", &[]).await?.get::<_, i32>(0) == 42, "{what}");
        ensure!(self.proxy.process().exited().is_none(), "{what}: the proxy has ended");
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.proxy.process().pid()))?;
        let most =
            status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let most: u64 = most.trim().trim_end_matches(" kB").parse()?;
        ensure!(most < 128 << 10, "{what}: the proxy has had {most} KiB");
        Ok(())
    }

    async fn evil(&self) -> Result<Client, String> {
        let client = timeout(SOON, connect(&self.conninfo("evil"))).await;
        client.map_err(|_| "no answer".to_owned())?.map_err(|error| format!("{error:?}"))
    }
}

/// CVE-2026-6664: lengths inside a client's SCRAM message, before anybody has proven who he is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lengths_in_a_scram_message_are_not_believed() -> Result<()> {
    let mut front = Front::start("cve-scram").await?;
    for length in [i32::MAX, i32::MAX - 3, i32::MIN, -2, 1 << 20, 5] {
        let mut socket = TcpStream::connect(("127.0.0.1", front.proxy.primary())).await?;
        let mut startup = 196_608_i32.to_be_bytes().to_vec();
        startup.extend_from_slice(b"user\0good\0database\0postgres\0\0");
        let size = i32::try_from(startup.len() + 4)?;
        socket.write_all(&[&size.to_be_bytes()[..], &startup].concat()).await?;
        let mut inbox = BytesMut::new();
        while inbox.len() < 9 {
            ensure!(socket.read_buf(&mut inbox).await? > 0, "asked for no SASL");
        }
        let first = [&b"SCRAM-SHA-256\0"[..], &length.to_be_bytes(), b"n,,n=,r=abcdefgh"].concat();
        socket.write_all(&message(b'p', &first)).await?;
        let mut answer = Vec::new();
        timeout(SOON, socket.read_to_end(&mut answer)).await.context("it does not close")??;
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert!(text.contains("08P01"), "length {length}: {text:?}");
        front.is_well(&format!("length {length}")).await?;
    }
    front.scratch.passed();
    Ok(())
}

/// CVE-2026-6665: a server whose last SCRAM message is not one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_servers_last_scram_message_is_bounded_and_checked() -> Result<()> {
    let mut front = Front::start("cve-final").await?;
    let long: Vec<u8> = [&b"v="[..], &[b'A'; 500_000]].concat();
    let mut claims = message(b'R', b"\0\0\0\x0cv=AAAA");
    claims.splice(1..5, i32::MAX.to_be_bytes());
    let bodies: [&[u8]; 6] = [
        &long,
        b"",
        b"v=",
        b"v=AAAA",
        b"v=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        b"e=other-error,v=\xff\xfe\0",
    ];
    let lies = bodies.iter().map(|body| message(b'R', &[&b"\0\0\0\x0c"[..], body].concat()));
    for (number, lie) in lies.chain([claims]).enumerate() {
        front.wire.lies(move |tag, body| {
            (tag == b'R' && body.starts_with(b"\0\0\0\x0c")).then(|| lie.clone())
        });
        let told = front.evil().await.err().context("a server that does not know the password")?;
        front.is_well(&format!("lie {number}: {told}")).await?;
    }
    front.scratch.passed();
    Ok(())
}

/// CVE-2026-6666: errors that lack what every error has, at the login and in a session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_without_their_fields_harm_nobody() -> Result<()> {
    let mut front = Front::start("cve-error").await?;
    let bodies: [&'static [u8]; 6] =
        [b"\0", b"", b"SERROR\0Mno code\0\0", b"C\0\0", b"SFATAL\0", b"VFATAL\0C5\0M\0\0"];
    for body in bodies {
        front.wire.lies(move |tag, _| (tag == b'R').then(|| message(b'E', body)));
        let told = front.evil().await.err().context("the login failed")?;
        front.is_well(&format!("at the login {body:?}: {told}")).await?;

        front.wire.lies(move |tag, _| (tag == b'T').then(|| message(b'E', body)));
        let evil = front.evil().await.map_err(anyhow::Error::msg)?;
        let told = timeout(SOON, evil.simple_query("SELECT 1")).await.context("no answer")?;
        front.is_well(&format!("in a session {body:?}: {:?}", told.err())).await?;
    }
    front.scratch.passed();
    Ok(())
}
