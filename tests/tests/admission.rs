//! Who may come in, on a real server: names and words of the startup packet, what a pooled login may
//! do, limits of clients and of their time, balancers, the status port, and what the lookup role says
//! to a server that nobody knows.

use std::fs;
use std::net::TcpListener as StdListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::{BufMut, BytesMut};
use kornak_protocol::error::ErrorView;
use kornak_protocol::startup::{ProtocolVersion, put_startup};
use kornak_tests::run::kornak;
use kornak_tests::run::port::Port;
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect, sqlstate};
use kornak_tests::run::process::Process;
use kornak_tests::run::rest::Rest;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_postgres::Client;

const SOON: Duration = Duration::from_secs(20);

/// A proxy with the listeners that a test writes.
struct Proxy {
    ports: Vec<Port>,
    status: Port,
    process: Process,
}

impl Proxy {
    /// `listeners`: what each has besides a name, an address and the target `primary`.
    async fn start(
        scratch: &Scratch,
        name: &str,
        server: u16,
        listeners: &[&str],
        lines: &str,
    ) -> Result<Self> {
        let ports: Vec<Port> = listeners.iter().map(|_| Port::free()).collect();
        let status = Port::free();
        let mut text = format!(
            "scope: demo\nstatic: {{members: [{{name: a, host: 127.0.0.1, port: {server}}}]}}\n\
             proxy:\n  listeners:\n"
        );
        for (at, (more, port)) in listeners.iter().zip(&ports).enumerate() {
            let address = port.address();
            text +=
                &format!("    - {{name: l{at}, listen: \"{address}\", target: primary{more}}}\n");
        }
        let lines = lines.replace("STATUS", &status.address());
        text += &lines.lines().map(|line| format!("  {line}\n")).collect::<String>();
        let file = scratch.join(&format!("{name}.yml"));
        fs::write(&file, text)?;
        let command = kornak::with_file("proxy", &file);
        let process = Process::spawn(name, command, &scratch.join(&format!("{name}.log")))?;
        let proxy = Self { ports, status, process };
        for port in &proxy.ports {
            let address = port.address();
            until(SOON, "the proxy listens", || async {
                TcpStream::connect(&address).await.map(drop).map_err(|error| error.to_string())
            })
            .await;
        }
        Ok(proxy)
    }

    fn conninfo(&self, listener: usize, user: &str, more: &str) -> String {
        let port = self.ports[listener].number();
        let database = if more.contains("dbname") { "" } else { "dbname=postgres" };
        format!("host=127.0.0.1 port={port} user={user} password=right {database} {more}")
    }

    async fn ready(&self) {
        until(SOON, "a login", || async {
            let login = connect(&self.conninfo(0, "app", "")).await;
            login.map(drop).map_err(|error| format!("{error:?}"))
        })
        .await;
    }

    async fn login(&self, listener: usize, user: &str) -> Result<Client, tokio_postgres::Error> {
        connect(&self.conninfo(listener, user, "")).await
    }

    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.process.log())?)
    }
}

fn startup(params: &[(&str, &str)]) -> BytesMut {
    let mut out = BytesMut::new();
    let params = params.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    put_startup(ProtocolVersion::V3_0, params, &mut out).expect("it is well formed");
    out
}

/// The first message that comes, an error as its code and text.
async fn first_answer(port: u16, bytes: &[u8]) -> Result<String> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
    socket.write_all(bytes).await?;
    let mut answer = Vec::new();
    let reading = async {
        while answer.len() < 5
            || answer.len()
                < 1 + u32::from_be_bytes([answer[1], answer[2], answer[3], answer[4]]) as usize
        {
            // A reset is as good as an orderly end.
            if socket.read_buf(&mut answer).await.unwrap_or(0) == 0 {
                break;
            }
        }
    };
    tokio::time::timeout(SOON, reading).await.context("no answer")?;
    Ok(match answer.first() {
        None => "closed".to_owned(),
        Some(b'E') => {
            let view = ErrorView::parse_prefix(&answer[5..]);
            let text = String::from_utf8_lossy(view.message.unwrap_or_default());
            format!("{} {text}", view.sqlstate())
        }
        Some(tag) => char::from(*tag).to_string(),
    })
}

fn auth(rules: &str) -> String {
    format!(
        "auth:\n  user: postgres\n  password: \"{SUPERUSER_PASSWORD}\"\n  rules:\n{rules}    - {{method: scram}}\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_come_in() -> Result<()> {
    let mut scratch = Scratch::new("admission");
    let server = Postgres::start(&scratch, "pg", &[]).await?;
    let admin = server.connect().await?;
    let long = "r".repeat(63);
    admin
        .batch_execute(&format!(
            "CREATE ROLE app LOGIN PASSWORD 'right'; CREATE ROLE {long} LOGIN PASSWORD 'right'; \
             CREATE ROLE trusted LOGIN"
        ))
        .await?;
    admin.batch_execute("CREATE DATABASE secret OWNER app").await?;
    what_a_login_says_is_read_as_a_server_reads_it(&scratch, &server, &long).await?;
    a_balancer_is_believed_if_it_is_named(&scratch, &server).await?;
    the_status_port_shows_names_to_who_has_the_password(&scratch, &server).await?;
    the_lookup_password_is_for_verified_servers(&scratch).await?;
    scratch.passed();
    Ok(())
}

async fn what_a_login_says_is_read_as_a_server_reads_it(
    scratch: &Scratch,
    server: &Postgres,
    long: &str,
) -> Result<()> {
    let rules = format!(
        "    - {{database: secret, method: reject}}\n    - {{user: {long}, method: md5}}\n    - {{user: /^rrr, method: reject}}\n"
    );
    let lines = format!("status: {{listen: \"STATUS\"}}\n{}", auth(&rules));
    let proxy = Proxy::start(scratch, "words", server.port(), &[""], &lines).await?;
    proxy.ready().await;
    let port = proxy.ports[0].number();
    let say = async |word: &str| {
        let params = [("user", "app"), ("database", "secret"), ("replication", word)];
        first_answer(port, &startup(&params)).await
    };
    for word in ["of", "F", "fals", "no", "0"] {
        let told = say(word).await?;
        assert!(told.starts_with("28000 the proxy rejects"), "replication={word}: {told}");
    }
    for word in ["maybe", "", "o", "Database"] {
        let told = say(word).await?;
        let expected = format!("22023 invalid value for parameter \"replication\": \"{word}\"");
        assert_eq!(told, expected, "as PostgreSQL: {:?}", {
            let params = [("user", "app"), ("database", "secret"), ("replication", word)];
            first_answer(server.port(), &startup(&params)).await?
        });
    }
    // Cut as this server cuts it, the name is that of the second rule, not only of the third.
    let version = server.connect().await?.query_one("SHOW server_version_num", &[]).await?;
    let cuts = version.get::<_, String>(0).parse::<u32>()? < 170_000;
    let client = connect(&proxy.conninfo(0, &format!("{long}yyy"), "")).await;
    if cuts {
        let client = client.context("PostgreSQL would cut the name")?;
        let row = client.query_one("SELECT length(current_user)", &[]).await?;
        assert_eq!(row.get::<_, i32>(0), 63);
    } else {
        assert_eq!(sqlstate(client), "28000");
    }
    let forged = "2026-01-01T00:00:00Z  INFO forged";
    for (user, database) in [(format!("x\n{forged}"), "postgres"), ("app".to_owned(), "secret\n")] {
        for more in [("replication", "off"), ("application_name", "x\ny")] {
            let params = [("user", user.as_str()), ("database", database), more];
            first_answer(port, &startup(&params)).await?;
        }
    }
    let rejected = format!("r\n{forged}");
    first_answer(port, &startup(&[("user", rejected.as_str()), ("database", "secret")])).await?;
    let log = proxy.log()?;
    assert!(log.contains("login refused"), "{log}");
    assert!(!log.lines().any(|line| line.starts_with(forged)), "{log}");
    Ok(())
}

async fn a_balancer_is_believed_if_it_is_named(scratch: &Scratch, server: &Postgres) -> Result<()> {
    let rules = "    - {address: 10.0.0.0/8, user: trusted, method: trust}\n    - {address: 192.0.2.0/24, method: reject}\n";
    let lines = format!("status: {{listen: \"STATUS\"}}\n{}", auth(rules));
    let listeners = [
        "",
        ", proxy_protocol: true",
        ", proxy_protocol: [127.0.0.0/8]",
        ", proxy_protocol: [10.0.0.5]",
    ];
    let proxy = Proxy::start(scratch, "balanced", server.port(), &listeners, &lines).await?;
    proxy.ready().await;
    let says = async |listener: usize, source: &str| {
        let mut bytes = format!("PROXY TCP4 {source} 10.9.9.9 7 5000\r\n").into_bytes();
        bytes.extend_from_slice(&startup(&[("user", "trusted"), ("database", "postgres")]));
        first_answer(proxy.ports[listener].number(), &bytes).await
    };
    let refused = "28000 the proxy rejects";
    assert!(says(1, "192.0.2.7").await?.starts_with(refused), "a claim is held against its author");
    assert!(says(2, "192.0.2.7").await?.starts_with(refused), "a named balancer is believed");
    assert_eq!(says(3, "10.0.0.1").await?, "closed", "nobody else speaks there");
    let warned = proxy.log()?;
    assert!(warned.contains("name the balancers"), "{warned}");
    // Whoever claims an address that a rule trusts is asked for a password.
    let mut socket = TcpStream::connect(("127.0.0.1", proxy.ports[1].number())).await?;
    socket.write_all(b"PROXY TCP4 10.0.0.1 10.9.9.9 7 5000\r\n").await?;
    socket.write_all(&startup(&[("user", "trusted"), ("database", "postgres")])).await?;
    let mut head = [0; 9];
    socket.read_exact(&mut head).await?;
    assert_eq!(head[0], b'R');
    assert_eq!(head[5..9], 10u32.to_be_bytes(), "SASL is asked for, not AuthenticationOk");
    Ok(())
}

async fn the_status_port_shows_names_to_who_has_the_password(
    scratch: &Scratch,
    server: &Postgres,
) -> Result<()> {
    let shown = "status: {listen: \"STATUS\", authentication: {username: watch, password: word}}\n";
    let open = "status: {listen: \"STATUS\"}\n";
    let pooled = [", pool_mode: transaction"];
    let lines = format!("{shown}{}", auth(""));
    let private = Proxy::start(scratch, "private", server.port(), &pooled, &lines).await?;
    let lines = format!("{open}{}", auth(""));
    let public = Proxy::start(scratch, "public", server.port(), &pooled, &lines).await?;
    for proxy in [&private, &public] {
        proxy.ready().await;
    }
    let _kept = (private.login(0, "app").await?, public.login(0, "app").await?);
    for path in ["/", "/status", "/metrics"] {
        let answer = Rest::new(&public.status.address()).get(path).await?;
        assert_eq!(answer.code, 200);
        assert!(!answer.text.contains("app"), "{path}: {}", answer.text);
        let answer = Rest::new(&private.status.address()).get(path).await?;
        assert_eq!(answer.code, 401, "{path}");
        let request = |word: &str| {
            format!(
                "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Basic {word}\r\n\r\n"
            )
        };
        // watch:word and watch:sword
        for (word, code, named) in
            [("d2F0Y2g6d29yZA==", "200", true), ("d2F0Y2g6c3dvcmQ=", "401", false)]
        {
            let mut socket = TcpStream::connect(private.status.address()).await?;
            socket.write_all(request(word).as_bytes()).await?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer).await?;
            assert!(answer.starts_with(&format!("HTTP/1.1 {code}")), "{path}: {answer}");
            assert_eq!(answer.contains("app"), named, "{path}: {answer}");
        }
    }
    Ok(())
}

/// A server that asks for a password in clear text, then for an md5 hash, and hears nothing.
async fn the_lookup_password_is_for_verified_servers(scratch: &Scratch) -> Result<()> {
    let listener = StdListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    let listener = TcpListener::from_std(listener)?;
    let lines = format!("status: {{listen: \"STATUS\"}}\n{}", auth(""));
    let _proxy = Proxy::start(scratch, "unverified", port, &[""], &lines).await?;
    for asked in [&[0, 0, 0, 3][..], &[0, 0, 0, 5, 1, 2, 3, 4]] {
        let until_asked = Instant::now() + SOON;
        loop {
            anyhow::ensure!(Instant::now() < until_asked, "nobody logs in");
            let (mut socket, _) = tokio::time::timeout(SOON, listener.accept()).await??;
            let mut packet = whole_packet(&mut socket).await?;
            if packet.get(4..8) == Some(&80_877_103u32.to_be_bytes()) {
                // No TLS.
                socket.write_all(b"N").await?;
                packet = whole_packet(&mut socket).await?;
            }
            if !packet.windows(4).any(|part| part == b"user") {
                continue;
            }
            let mut question = BytesMut::new();
            question.put_u8(b'R');
            question.put_u32(asked.len() as u32 + 4);
            question.extend_from_slice(asked);
            socket.write_all(&question).await?;
            let mut answer = Vec::new();
            // A reset is as good as an orderly end.
            let _ = tokio::time::timeout(SOON, socket.read_to_end(&mut answer)).await?;
            assert!(!answer.starts_with(b"p"), "it said {:?}", String::from_utf8_lossy(&answer));
            break;
        }
    }
    Ok(())
}

async fn whole_packet(socket: &mut TcpStream) -> Result<BytesMut> {
    let mut packet = BytesMut::new();
    let length = |packet: &BytesMut| packet.first_chunk().map_or(8, |it| u32::from_be_bytes(*it));
    while packet.len() < length(&packet) as usize {
        if socket.read_buf(&mut packet).await? == 0 {
            break;
        }
    }
    Ok(packet)
}
