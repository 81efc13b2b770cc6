//! Answers to bad input, and that others are served meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_protocol::frontend;
use kornak_tests::run::kornak;
use kornak_tests::run::port::Port;
use kornak_tests::run::postgres::{Postgres, SUPERUSER_PASSWORD, connect};
use kornak_tests::run::proxy::Proxy;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;
use kornak_tests::talk::{Login, Talker};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::Client;

const SOON: Duration = Duration::from_secs(15);

/// A server with a role `app`, and a proxy that finds it by `static:`.
struct Front {
    scratch: Scratch,
    proxy: Proxy,
    server: Postgres,
}

impl Front {
    async fn start(name: &str) -> Result<Self> {
        let scratch = Scratch::new(name);
        let server = Postgres::start(&scratch, "pg", &[]).await?;
        let admin = server.connect().await?;
        admin.batch_execute("CREATE ROLE app LOGIN PASSWORD 'right'").await?;
        let proxy = proxy(&scratch, server.port(), SUPERUSER_PASSWORD).await?;
        let front = Self { scratch, proxy, server };
        front.proxy.ready(&front.conninfo("app", "right"), SOON).await;
        Ok(front)
    }

    fn conninfo(&self, user: &str, password: &str) -> String {
        let port = self.proxy.primary();
        format!("host=127.0.0.1 port={port} user={user} password={password} dbname=postgres")
    }

    async fn login(&self, user: &str, password: &str) -> Result<Client, tokio_postgres::Error> {
        connect(&self.conninfo(user, password)).await
    }

    /// Checks that the server still serves.
    async fn serves(&self) -> Result<()> {
        let client = self.login("app", "right").await.context("log in as usual")?;
        let row = client.query_one("SELECT 40 + 2", &[]).await.context("query as usual")?;
        assert_eq!(row.get::<_, i32>(0), 42);
        Ok(())
    }

    async fn socket(&self) -> Result<TcpStream> {
        Ok(TcpStream::connect(("127.0.0.1", self.proxy.primary())).await?)
    }

    /// Server processes that belong to `app`.
    async fn sessions(&self) -> Result<i64> {
        let admin = self.server.connect().await?;
        let query = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
        Ok(admin.query_one(query, &[]).await?.get(0))
    }
}

async fn proxy(scratch: &Scratch, server: u16, password: &str) -> Result<Proxy> {
    let head =
        format!("scope: demo\nstatic:\n  members: [{{name: a, host: 127.0.0.1, port: {server}}}]");
    let lines = format!(
        "auth: {{method: scram, user: postgres, password: \"{password}\"}}\n\
         limits: {{login_timeout: 3s, hold_timeout: 1s, connect_timeout: 1s}}"
    );
    Proxy::start(scratch, "proxy", &head, &lines).await
}

fn sqlstate(error: &tokio_postgres::Error) -> String {
    error.code().map_or_else(|| format!("none ({error})"), |code| code.code().to_owned())
}

/// Everything until the other side closes; `None` if it does not in time.
async fn read_all(mut socket: TcpStream, limit: Duration) -> Option<Vec<u8>> {
    let mut answer = Vec::new();
    tokio::time::timeout(limit, socket.read_to_end(&mut answer)).await.ok()?.ok()?;
    Some(answer)
}

fn startup(user: &str) -> Vec<u8> {
    let mut body = 196_608_i32.to_be_bytes().to_vec();
    for word in ["user", user, "database", "postgres"] {
        body.extend_from_slice(word.as_bytes());
        body.push(0);
    }
    body.push(0);
    let length = i32::try_from(body.len() + 4).expect("short");
    [length.to_be_bytes().to_vec(), body].concat()
}

/// The most that the process has ever had in memory, in KiB: VmHWM of proc(5).
fn most_resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Not bad, but big: values pass through buffers of a bounded size. `KORNAK_BIG_VALUE_MB` makes them
/// as big as a server allows (1000).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_of_any_size_does_not_grow_the_proxy() -> Result<()> {
    let mut front = Front::start("big").await?;
    front.serves().await?;
    let proxy = &mut front.proxy;
    let mb = std::env::var("KORNAK_BIG_VALUE_MB").map_or(Ok(200), |mb| mb.parse::<usize>())?;
    let login = Login::new(proxy.primary(), "app", "right", "postgres");
    let mut talker = Talker::login(&login).await?;
    let pid = proxy.process().pid();
    let before = most_resident_kib(pid)?;

    talker.query(&format!("SELECT repeat('x', {mb} * 1000000)")).await?;
    let (tags, bytes) = talker.discard().await?;
    assert_eq!(tags, "TDCZ");
    assert!(bytes > mb as u64 * 1_000_000);
    let down = most_resident_kib(pid)?;

    // The other way: as text of a simple query, whose text is looked at, and as a parameter.
    // (PostgreSQL reads no literal of more than half a GB.)
    let text = format!("SELECT length('{}')", "y".repeat(mb.min(500) * 1_000_000));
    talker.query(&text).await?;
    drop(text);
    let arrived = format!("D {}", mb.min(500) * 1_000_000);
    let told = talker.told(1).await?;
    assert!(told.contains(&arrived), "{arrived} expected: {told:?}");
    let mut out = bytes::BytesMut::new();
    frontend::put_parse(b"", b"SELECT length($1::text)", &[], &mut out)?;
    let value = vec![b'z'; mb * 1_000_000];
    frontend::put_bind(b"", b"", &[Some(&value)], &mut out)?;
    drop(value);
    frontend::put_execute(b"", 0, &mut out)?;
    frontend::put_sync(&mut out);
    talker.send(&out).await?;
    drop(out);
    let arrived = format!("D {}", mb * 1_000_000);
    let told = talker.told(1).await?;
    assert!(told.contains(&arrived), "{arrived} expected: {told:?}");
    let up = most_resident_kib(pid)?;
    println!(
        "{mb} MB each; KiB resident: {before} before, {down} after the answer, {up} after all"
    );
    assert!(up < before + 4096, "the proxy has grown from {before} to {up} KiB");
    front.scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_and_an_unknown_role_get_the_same_answer() -> Result<()> {
    let mut front = Front::start("password").await?;
    let wrong = front.login("app", "wrong").await.err().context("a wrong password got in")?;
    let unknown = front.login("nobody", "wrong").await.err().context("an unknown role got in")?;
    assert_eq!(sqlstate(&wrong), "28P01");
    assert_eq!(sqlstate(&unknown), "28P01");
    let text =
        |error: &tokio_postgres::Error| error.as_db_error().map(|it| it.message().to_owned());
    assert_eq!(
        text(&wrong).map(|it| it.replace("app", "…")),
        text(&unknown).map(|it| it.replace("nobody", "…")),
        "the text does not tell which roles exist"
    );
    front.serves().await?;
    front.scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_startup_packets_are_closed_and_cost_nothing() -> Result<()> {
    let mut front = Front::start("startup").await?;
    let packets: [(&str, Vec<u8>); 6] = [
        ("http", b"GET / HTTP/1.1\r\nHost: here\r\n\r\n".to_vec()),
        ("a length of two gigabytes", [0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0].to_vec()),
        ("a negative length", [0xff, 0xff, 0xff, 0xff, 0, 3, 0, 0].to_vec()),
        ("a length too short for its version", [0, 0, 0, 4].to_vec()),
        ("parameters without an end", [0, 0, 0, 12, 0, 3, 0, 0, b'u', b's', b'e', b'r'].to_vec()),
        ("a version from the future", [0, 0, 0, 9, 0, 99, 0, 0, 0].to_vec()),
    ];
    for (what, bytes) in packets {
        let mut socket = front.socket().await?;
        socket.write_all(&bytes).await?;
        let answer = read_all(socket, SOON).await.with_context(|| format!("{what}: left open"))?;
        // Either nothing, or an ErrorResponse and nothing after it.
        assert!(answer.is_empty() || answer.first() == Some(&b'E'), "{what}: got {answer:?}");
    }
    front.serves().await?;
    front.scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_says_nothing_is_closed_after_the_login_timeout() -> Result<()> {
    let mut front = Front::start("silent").await?;
    let began = Instant::now();
    let silent = front.socket().await?;
    let mut half = front.socket().await?;
    half.write_all(&[0, 0]).await?;
    let mut unanswering = front.socket().await?;
    unanswering.write_all(&startup("app")).await?;
    front.serves().await?;
    for (what, socket) in
        [("silent", silent), ("half a length", half), ("no password", unanswering)]
    {
        read_all(socket, SOON).await.with_context(|| format!("{what}: left open"))?;
    }
    let took = began.elapsed();
    assert!(took > Duration::from_secs(1) && took < Duration::from_secs(10), "after {took:?}");
    front.serves().await?;
    front.scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_after_the_login_ends_the_session_and_its_server_connection() -> Result<()> {
    let mut front = Front::start("garbage").await?;
    // SCRAM by hand is long; so a real client logs in through a pipe of ours that adds the garbage.
    let pipe = Port::free();
    let listener = tokio::net::TcpListener::bind(pipe.address()).await?;
    let target = front.proxy.primary();
    let (spoil, mut spoiled) = tokio::sync::mpsc::channel::<Vec<u8>>(1);
    let forward = tokio::spawn(async move {
        let (mut client, _) = listener.accept().await?;
        let mut server = TcpStream::connect(("127.0.0.1", target)).await?;
        let (mut up, mut down) = ([0; 4096], [0; 4096]);
        let mut answers = Vec::new();
        let mut garbage_sent = false;
        loop {
            tokio::select! {
                read = client.read(&mut up), if !garbage_sent => {
                    let length = read?;
                    server.write_all(up.get(..length).unwrap_or_default()).await?;
                }
                read = server.read(&mut down) => {
                    let length = read?;
                    let bytes = down.get(..length).unwrap_or_default();
                    if length == 0 {
                        return Ok::<_, std::io::Error>(answers);
                    }
                    if garbage_sent {
                        answers.extend_from_slice(bytes);
                    } else {
                        client.write_all(bytes).await?;
                    }
                }
                Some(bytes) = spoiled.recv() => {
                    garbage_sent = true;
                    server.write_all(&bytes).await?;
                }
            }
        }
    });
    let port = pipe.number();
    let conninfo = format!("host=127.0.0.1 port={port} user=app password=right dbname=postgres");
    let client = connect(&conninfo).await.context("log in through the pipe")?;
    client.simple_query("SELECT 1").await?;
    assert!(front.sessions().await? >= 1);
    spoil.send(vec![0x07, 0xff, 0xff, 0xff, 0xff, 1, 2, 3]).await?;
    let answers = tokio::time::timeout(SOON, forward).await.context("left open")???;
    let text = String::from_utf8_lossy(&answers);
    assert!(text.contains("08P01"), "a protocol violation is named: {text:?}");
    until(SOON, "its server connection is gone", || async {
        match front.sessions().await {
            Ok(0) => Ok(()),
            Ok(left) => Err(format!("{left} left")),
            Err(error) => Err(error.to_string()),
        }
    })
    .await;
    front.serves().await?;
    front.scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_where_nobody_listens_is_57p03_after_the_hold_and_not_a_dead_proxy() -> Result<()> {
    let mut scratch = Scratch::new("nohost");
    let nobody = Port::free();
    let proxy = proxy(&scratch, nobody.number(), SUPERUSER_PASSWORD).await?;
    let port = proxy.primary();
    let conninfo = format!("host=127.0.0.1 port={port} user=app password=right dbname=postgres");
    for _ in 0..2 {
        let attempt = tokio::time::timeout(SOON, connect(&conninfo)).await.context("no answer")?;
        let error = attempt.err().context("logged in to nobody")?;
        assert_eq!(sqlstate(&error), "57P03");
    }
    assert_eq!(proxy.status().code("/metrics").await?, 200, "the status page answers meanwhile");
    scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_proxys_own_wrong_password_is_told_to_the_operator_not_to_clients() -> Result<()> {
    let mut scratch = Scratch::new("wrongauth");
    let server = Postgres::start(&scratch, "pg", &[]).await?;
    let admin = server.connect().await?;
    admin.batch_execute("CREATE ROLE app LOGIN PASSWORD 'right'").await?;
    let mut proxy = proxy(&scratch, server.port(), "not-the-password").await?;
    let port = proxy.primary();
    let conninfo = format!("host=127.0.0.1 port={port} user=app password=right dbname=postgres");
    let attempt = tokio::time::timeout(SOON, connect(&conninfo)).await.context("no answer")?;
    let error = attempt.err().context("got in")?;
    let text = error.as_db_error().map(|it| it.message().to_owned()).unwrap_or_default();
    assert!(!text.contains("not-the-password") && !text.contains("postgres\""), "{text}");
    let process = proxy.process();
    until(SOON, "the log says what is wrong", || async {
        let log = process.tail(50);
        if log.contains("password authentication failed") { Ok(()) } else { Err(log) }
    })
    .await;
    assert!(!process.tail(1000).contains("not-the-password"), "no password in a log");
    scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_file_is_refused_with_its_line_and_key() -> Result<()> {
    let mut scratch = Scratch::new("file");
    let file = scratch.join("proxy.yml");
    std::fs::write(&file, "scope: demo\nproxy:\n  limits: {hold_timeout: soon}\n")?;
    for word in ["proxy", "check"] {
        let output = kornak_tests::run::cluster::run(kornak::with_file(word, &file)).await?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{word} took it");
        for part in ["proxy.yml", "3", "hold_timeout"] {
            assert!(text.contains(part), "{word} does not name {part}: {text}");
        }
    }
    scratch.passed();
    Ok(())
}
