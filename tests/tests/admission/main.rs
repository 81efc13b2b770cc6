//! Admission of clients on a real server: names and words of the startup packet, what a pooled login may
//! do, limits of clients and of their time, balancers, the status port, and what the lookup role says
//! to a server that nobody knows.

mod lookup;
mod reload;

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::BytesMut;
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
use tokio::net::TcpStream;
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
    lookup::the_lookup_password_is_for_verified_servers(&scratch).await?;
    scratch.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_many_may_come_in_and_for_how_long() -> Result<()> {
    let mut scratch = Scratch::new("limits");
    let server = Postgres::start(&scratch, "pg", &[]).await?;
    let admin = server.connect().await?;
    for role in ["app", "joe", "ann", "boss SUPERUSER"] {
        admin.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'right'")).await?;
    }
    a_pooled_login_is_checked_as_the_server_would(&scratch, &server, &admin).await?;
    strangers_keep_nobody_out(&scratch, &server).await?;
    clients_and_servers_are_bound_by_role_database_and_address(&scratch, &server).await?;
    a_clients_time_is_bound(&scratch, &server, &admin).await?;
    reload::other_settings_hold_while_clients_are_in(&scratch, &server).await?;
    who_is_in_goes_on_when_descriptors_are_few(&scratch, &server).await?;
    scratch.passed();
    Ok(())
}

/// With the pool's only connection in a transaction: no login waits for it, and each is judged anew.
async fn a_pooled_login_is_checked_as_the_server_would(
    scratch: &Scratch,
    server: &Postgres,
    admin: &Client,
) -> Result<()> {
    let lines = format!("status: {{listen: \"STATUS\"}}\n{}", auth(""));
    let pooled = [", pool_mode: transaction, pool_size: 1"];
    let proxy = Proxy::start(scratch, "judged", server.port(), &pooled, &lines).await?;
    proxy.ready().await;
    let busy = proxy.login(0, "app").await?;
    busy.batch_execute("BEGIN; SELECT 1").await?;
    for more in ["", "options='-c work_mem=5MB'", "application_name=x"] {
        let began = Instant::now();
        connect(&proxy.conninfo(0, "app", more)).await.context("beside a transaction")?;
        assert!(began.elapsed() < Duration::from_secs(2), "{more}: {:?}", began.elapsed());
    }
    admin.batch_execute("CREATE DATABASE shop").await?;
    let shop = connect(&proxy.conninfo(0, "app", "dbname=shop")).await?;
    shop.batch_execute("SELECT 1").await?;
    for (database, change, back, expected) in [
        ("postgres", "ALTER ROLE app NOLOGIN", "ALTER ROLE app LOGIN", "28000"),
        (
            "postgres",
            "ALTER ROLE app VALID UNTIL '2020-01-01'",
            "ALTER ROLE app VALID UNTIL 'infinity'",
            "28P01",
        ),
        ("postgres", "ALTER ROLE app PASSWORD 'other'", "ALTER ROLE app PASSWORD 'right'", "28P01"),
        (
            "postgres",
            "ALTER ROLE app CONNECTION LIMIT 0",
            "ALTER ROLE app CONNECTION LIMIT -1",
            "53300",
        ),
        (
            "shop",
            "REVOKE CONNECT ON DATABASE shop FROM PUBLIC",
            "GRANT CONNECT ON DATABASE shop TO PUBLIC",
            "42501",
        ),
        (
            "shop",
            "ALTER DATABASE shop ALLOW_CONNECTIONS false",
            "ALTER DATABASE shop ALLOW_CONNECTIONS true",
            "55000",
        ),
        (
            "shop",
            "ALTER DATABASE shop CONNECTION LIMIT 0",
            "ALTER DATABASE shop CONNECTION LIMIT -1",
            "53300",
        ),
        (
            "shop",
            "ALTER DATABASE shop RENAME TO store",
            "ALTER DATABASE store RENAME TO shop",
            "3D000",
        ),
    ] {
        if change.contains("RENAME") {
            let ends =
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'shop'";
            admin.batch_execute(ends).await?;
            until(SOON, "nobody is in the database", || async {
                admin.batch_execute(change).await.map_err(|error| format!("{error:?}"))
            })
            .await;
        } else {
            admin.batch_execute(change).await?;
        }
        let direct = format!(
            "host=127.0.0.1 port={} user=app password=right dbname={database}",
            server.port()
        );
        assert_eq!(sqlstate(connect(&direct).await), expected, "PostgreSQL: {change}");
        let through = connect(&proxy.conninfo(0, "app", &format!("dbname={database}"))).await;
        assert_eq!(sqlstate(through), expected, "{change}");
        admin.batch_execute(back).await?;
        let again = connect(&proxy.conninfo(0, "app", &format!("dbname={database}"))).await;
        again.map(drop).with_context(|| back.to_owned())?;
    }
    busy.batch_execute("COMMIT").await?;
    Ok(())
}

async fn strangers_keep_nobody_out(scratch: &Scratch, server: &Postgres) -> Result<()> {
    let lines = format!(
        "status: {{listen: \"STATUS\"}}\nlimits: {{max_client_conn: 2, superuser_reserved_connections: 1, \
         max_unauthenticated: 40, max_unauthenticated_per_address: 30}}\n{}",
        auth("")
    );
    let proxy = Proxy::start(scratch, "strangers", server.port(), &[""], &lines).await?;
    proxy.ready().await;
    let mut strangers = Vec::new();
    for at in 0..120 {
        let mut socket = TcpStream::connect(proxy.ports[0].address()).await?;
        let said = match at % 4 {
            0 => BytesMut::new(),
            1 => BytesMut::from(&b"\0\0"[..]),
            // Asked for a proof, and silent.
            2 => startup(&[("user", "app"), ("database", "postgres")]),
            _ => startup(&[("user", "nobody"), ("database", "postgres")]),
        };
        // It may have been sent away already.
        let _ = socket.write_all(&said).await;
        strangers.push(socket);
        if at % 30 == 29 {
            connect(&proxy.conninfo(0, "app", "")).await.context("beside strangers")?;
        }
    }
    let kept = [proxy.login(0, "app").await?, proxy.login(0, "joe").await?];
    assert_eq!(sqlstate(proxy.login(0, "app").await), "53300");
    let boss = proxy.login(0, "boss").await.context("the reserve is for superusers")?;
    assert_eq!(sqlstate(proxy.login(0, "boss").await), "53300", "and no larger");
    for client in kept.iter().chain([&boss]) {
        client.batch_execute("SELECT 1").await?;
    }
    let sent_away = Rest::new(&proxy.status.address()).get("/metrics").await?.text;
    assert!(!sent_away.contains("kornak_proxy_strangers_sent_away_total 0"), "{sent_away}");
    drop(strangers);
    Ok(())
}

async fn clients_and_servers_are_bound_by_role_database_and_address(
    scratch: &Scratch,
    server: &Postgres,
) -> Result<()> {
    let lines = format!(
        "status: {{listen: \"STATUS\"}}\nlimits: {{max_user_client_connections: 2, max_db_client_connections: 3, \
         max_address_client_connections: 4}}\n{}",
        auth("")
    );
    let proxy = Proxy::start(scratch, "bound", server.port(), &[""], &lines).await?;
    proxy.ready().await;
    let mut kept = vec![proxy.login(0, "app").await?, proxy.login(0, "app").await?];
    assert_eq!(sqlstate(proxy.login(0, "app").await), "53300", "of the role");
    kept.push(proxy.login(0, "joe").await?);
    assert_eq!(sqlstate(proxy.login(0, "joe").await), "53300", "of the database");
    let elsewhere = async || connect(&proxy.conninfo(0, "ann", "dbname=shop")).await;
    kept.push(elsewhere().await?);
    assert_eq!(sqlstate(elsewhere().await), "53300", "of the address");
    kept.push(proxy.login(0, "boss").await.context("superusers are not bound")?);
    drop(kept);
    until(SOON, "places are free again", || async {
        proxy.login(0, "app").await.map(drop).map_err(|error| format!("{error:?}"))
    })
    .await;
    // Server connections: of pools on two listeners and of clients that have one to themselves.
    let lines = format!(
        "status: {{listen: \"STATUS\"}}\nlimits: {{max_user_connections: 2}}\npool: {{query_wait_timeout: 1s}}\n{}",
        auth("")
    );
    let listeners = [", pool_mode: transaction", ""];
    let proxy = Proxy::start(scratch, "servers", server.port(), &listeners, &lines).await?;
    proxy.ready().await;
    let pooled = [proxy.login(0, "app").await?, proxy.login(0, "app").await?];
    pooled[0].batch_execute("BEGIN").await?;
    let own = proxy.login(1, "app").await?;
    assert_eq!(sqlstate(pooled[1].batch_execute("BEGIN").await), "53300", "it waits in vain");
    assert_eq!(sqlstate(proxy.login(1, "app").await), "53300");
    proxy.login(1, "joe").await.context("another role has its own")?;
    drop(own);
    until(SOON, "the place is the pool's", || async {
        pooled[1].batch_execute("SELECT 1").await.map_err(|error| format!("{error:?}"))
    })
    .await;
    // The idle connection of the pool makes room for a client that wants one to itself.
    proxy.login(1, "app").await.context("an idle one makes room")?;
    Ok(())
}

async fn a_clients_time_is_bound(
    scratch: &Scratch,
    server: &Postgres,
    admin: &Client,
) -> Result<()> {
    let lines = format!(
        "status: {{listen: \"STATUS\"}}\nlog_connections: true\nlog_disconnections: true\napplication_name_add_host: true\n\
         limits: {{client_idle_timeout: 3s, idle_transaction_timeout: 1s, transaction_timeout: 2s}}\n{}",
        auth("")
    );
    let listeners = ["", ", pool_mode: transaction"];
    let proxy = Proxy::start(scratch, "bounded", server.port(), &listeners, &lines).await?;
    proxy.ready().await;
    for listener in [0, 1] {
        let ends = async |what: &str, first: &str, then: &str, from: u64, to: u64| {
            let client = connect(&proxy.conninfo(listener, "app", "application_name=till")).await?;
            let began = Instant::now();
            client.batch_execute(first).await?;
            let closing = async {
                while !client.is_closed() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    // The last one is refused.
                    let _ = client.batch_execute(then).await;
                }
            };
            match then {
                "" => {
                    until(SOON, what, || async {
                        if client.is_closed() { Ok(()) } else { Err("it is open".to_owned()) }
                    })
                    .await;
                }
                _ => tokio::time::timeout(SOON, closing).await.with_context(|| what.to_owned())?,
            }
            let took = began.elapsed().as_millis() as u64;
            assert!((from..to).contains(&took), "{what} ({listener}): after {took} ms");
            anyhow::Ok(())
        };
        ends("a transaction is left lying", "BEGIN", "", 900, 1900).await?;
        ends("a transaction is long", "BEGIN", "SELECT 1", 1900, 2900).await?;
        ends("a client is idle", "SELECT 1", "", 2900, 4000).await?;
    }
    let log = proxy.log()?;
    for expected in
        ["client has logged in", "client session ended", "25P03", "25P04", "57P05", "role=app"]
    {
        assert!(log.contains(expected), "{expected}: {log}");
    }
    let client = connect(&proxy.conninfo(0, "app", "application_name=till")).await?;
    let query = "SELECT application_name FROM pg_stat_activity WHERE usename = 'app' AND application_name LIKE 'till - 127.0.0.1:%'";
    // An idle connection of the pool still has the name of its last client.
    assert!(!admin.query(query, &[]).await?.is_empty());
    let name: String = client.query_one("SHOW application_name", &[]).await?.get(0);
    assert!(name.starts_with("till - 127.0.0.1:"), "{name}");
    let pooled = connect(&proxy.conninfo(1, "app", "")).await?;
    let name: String = pooled.query_one("SHOW application_name", &[]).await?.get(0);
    assert!(name.starts_with("app - 127.0.0.1:"), "{name}");
    Ok(())
}

async fn who_is_in_goes_on_when_descriptors_are_few(
    scratch: &Scratch,
    server: &Postgres,
) -> Result<()> {
    let lines = format!("status: {{listen: \"STATUS\"}}\n{}", auth(""));
    let proxy = Proxy::start(scratch, "plenty", server.port(), &[""], &lines).await?;
    let file = scratch.join("plenty.yml");
    let mut proxy = proxy;
    proxy.process.kill();
    let mut command = std::process::Command::new("sh");
    command.arg("-c").arg("ulimit -n 200; exec \"$0\" \"$@\"");
    let few = kornak::with_file("proxy", &file);
    command.arg(few.get_program()).args(few.get_args());
    proxy.process = Process::spawn("few", command, &scratch.join("few.log"))?;
    proxy.ready().await;
    assert!(proxy.log()?.contains("too few file descriptors"));
    let working =
        futures_util::future::try_join_all((0..10).map(|_| proxy.login(0, "app"))).await?;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(proxy.ports[0].address()).await?);
    }
    for client in &working {
        client.batch_execute("SELECT 1").await?;
    }
    proxy.login(0, "joe").await.context("newcomers are served")?;
    drop(silent);
    let mut many = Vec::new();
    let full = loop {
        anyhow::ensure!(many.len() < 200, "there are not so many descriptors");
        match proxy.login(0, "app").await {
            Ok(client) => many.push(client),
            Err(error) => break sqlstate(Err::<(), _>(error)),
        }
    };
    assert_eq!(full, "53300");
    for client in working.iter().chain(&many) {
        client.batch_execute("SELECT 1").await?;
    }
    assert!(!proxy.log()?.contains("cannot be accepted"), "{}", proxy.log()?);
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
