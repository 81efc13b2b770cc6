//! Servers found by asking, without a store; and what bad input gets.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at what it did not expect")]

mod common;

use std::time::{Duration, Instant};

use common::{Load, PASSWORD, Proxy, Scratch, Server, connect, free_port, until};
use kornak_config::proxy::{Source, StaticMember};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

fn members(servers: &[&Server]) -> Source {
    let member = |server: &&Server| StaticMember {
        name: server.name.clone(),
        host: "127.0.0.1".to_owned(),
        port: server.port,
    };
    Source::Static { members: servers.iter().map(member).collect() }
}

async fn one(client: &Client, sql: &str) -> String {
    let rows = client.simple_query(sql).await.unwrap();
    let row = rows.iter().find_map(|row| match row {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    row.unwrap_or_default()
}

fn code(error: &tokio_postgres::Error) -> &str {
    error.code().map_or("none", |code| code.code())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_outlive_a_failover_that_only_the_servers_tell_of() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let b = a.standby(&scratch, "b");
    let proxy = Proxy::start(members(&[&a, &b]), None).await;
    let load = Load::start(proxy.port(0), 4, 2, 0).await;
    load.more(10).await;
    let reader = connect(proxy.port(1)).await.unwrap();
    assert_eq!(one(&reader, "SELECT pg_is_in_recovery()").await, "t", "readers are on the standby");
    a.stop("immediate");
    b.promote();
    load.more(10).await;
    let account = load.finish().await;
    let errors = account.errors.lock().clone();
    assert_eq!(account.lost.load(std::sync::atomic::Ordering::SeqCst), 0, "{errors:?}");
    // 25P02: the driver had closed a statement without waiting, and that answer was the 40001.
    let allowed = ["08007", "40001", "57P03", "25P02"];
    assert!(errors.iter().all(|e| allowed.contains(&e.as_str())), "{errors:?}");
    assert_eq!(
        one(&reader, "SELECT pg_is_in_recovery()").await,
        "f",
        "it fell back to the primary"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_takes_its_state_along() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let b = a.standby(&scratch, "b");
    let proxy = Proxy::start(members(&[&a, &b]), None).await;
    let client = connect(proxy.port(0)).await.unwrap();
    client.batch_execute("SET work_mem = '5MB'").await.unwrap();
    client.batch_execute("SET search_path TO pg_catalog").await.unwrap();
    let statement = client.prepare("SELECT $1::int + 1").await.unwrap();
    let pinned = connect(proxy.port(0)).await.unwrap();
    pinned.batch_execute("CREATE TEMP TABLE mine (a int)").await.unwrap();
    let bereft = connect(proxy.port(0)).await.unwrap();
    bereft.batch_execute("CREATE ROLE guest").await.unwrap();
    bereft.batch_execute("SET ROLE guest").await.unwrap();
    a.sql().await.batch_execute("DROP ROLE guest").await.unwrap();
    a.stop("fast");
    b.promote();
    // It is not given a session in which it would be somebody else.
    assert_eq!(code(&bereft.batch_execute("SELECT 1").await.unwrap_err()), "57P01");
    assert_eq!(one(&client, "SHOW work_mem").await, "5MB");
    assert_eq!(one(&client, "SHOW search_path").await, "pg_catalog");
    let row = client.query_one(&statement, &[&41]).await.unwrap();
    assert_eq!(row.get::<_, i32>(0), 42);
    until("the pinned session has ended", || async { pinned.is_closed() }).await;
    let metrics = proxy.page("/metrics").await;
    assert!(metrics.contains("kornak_proxy_pinned_closed_total{reason=\"temporary_table\"} 1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_is_cancelled_wherever_it_is() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let proxy = Proxy::start(members(&[&a]), None).await;
    let client = connect(proxy.port(0)).await.unwrap();
    let cancel = client.cancel_token();
    let watch = a.sql().await;
    let (slept, ()) = tokio::join!(client.batch_execute("SELECT pg_sleep(60)"), async {
        until("it sleeps", || async {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
            one(&watch, sql).await == "1"
        })
        .await;
        cancel.cancel_query(NoTls).await.unwrap();
    });
    assert_eq!(code(&slept.unwrap_err()), "57014");
    a.stop("fast");
    let (held, ()) = tokio::join!(client.batch_execute("SELECT 1"), async {
        until("it is held", || async {
            proxy.page("/metrics").await.contains("kornak_proxy_sessions{state=\"held\"} 1")
        })
        .await;
        cancel.cancel_query(NoTls).await.unwrap();
    });
    assert_eq!(code(&held.unwrap_err()), "57014");
    a.start();
    client.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_server_a_query_fails_and_the_connection_stays() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let proxy = Proxy::start_with(members(&[&a]), None, |settings| {
        settings.limits.hold_timeout = Duration::from_millis(300);
    })
    .await;
    until("the server is found", || async { connect(proxy.port(0)).await.is_ok() }).await;
    let client = connect(proxy.port(0)).await.unwrap();
    let statement = client.prepare("SELECT 1").await.unwrap();
    a.stop("immediate");
    // A statement that was sent before the proxy had noticed has an unknown outcome.
    let first = client.batch_execute("SELECT 1").await.unwrap_err();
    assert!(matches!(code(&first), "57P03" | "08007"), "{first:?}");
    let refused = client.batch_execute("SELECT 1").await.unwrap_err();
    assert_eq!(code(&refused), "57P03");
    let refused = client.query(&statement, &[]).await.unwrap_err();
    assert_eq!(code(&refused), "57P03");
    let late = connect(proxy.port(0)).await.expect("a login is answered from memory");
    assert_eq!(code(&late.batch_execute("SELECT 1").await.unwrap_err()), "57P03");
    // Known or not, who cannot be judged is asked the same and told the same.
    for user in ["postgres", "nobody"] {
        let mut config = Config::new();
        config.host("127.0.0.1").port(proxy.port(0)).user(user).password("wrong");
        let refused = config.dbname("postgres").connect(NoTls).await.map(drop).unwrap_err();
        assert_eq!(code(&refused), "57P03", "{user}");
    }
    a.start();
    until("the server is found again", || async { client.batch_execute("SELECT 1").await.is_ok() })
        .await;
    client.query_one(&statement, &[]).await.unwrap();
    late.batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_an_administrator_ends_has_ended() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let proxy = Proxy::start(members(&[&a]), None).await;
    let client = connect(proxy.port(0)).await.unwrap();
    let pid = one(&client, "SELECT pg_backend_pid()").await;
    let admin = a.sql().await;
    admin.batch_execute(&format!("SELECT pg_terminate_backend({pid})")).await.unwrap();
    until("it has ended", || async { client.is_closed() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_log_in_is_told_so() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let proxy = Proxy::start_with(members(&[&a]), None, |settings| {
        settings.limits.max_clients = 3;
        settings.limits.superuser_reserved_connections = 0;
    })
    .await;
    let login = |user: &str, password: &str, database: &str| {
        let mut config = Config::new();
        config.host("127.0.0.1").port(proxy.port(0));
        config.user(user).password(password).dbname(database);
        async move { config.connect(NoTls).await.map(drop) }
    };
    login("postgres", PASSWORD, "postgres").await.unwrap();
    assert_eq!(code(&login("postgres", "wrong", "postgres").await.unwrap_err()), "28P01");
    assert_eq!(code(&login("nobody", "wrong", "postgres").await.unwrap_err()), "28P01");
    assert_eq!(code(&login("postgres", PASSWORD, "nix").await.unwrap_err()), "3D000");
    let mut kept = Vec::new();
    for _ in 0..3 {
        until("a place is free", || async {
            proxy
                .page("/metrics")
                .await
                .contains("kornak_proxy_listener_sessions{listener=\"primary\"} ")
        })
        .await;
        kept.push(connect(proxy.port(0)).await.unwrap());
    }
    assert_eq!(code(&login("postgres", PASSWORD, "postgres").await.unwrap_err()), "53300");
    kept[0].batch_execute("SELECT 1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_is_closed_and_others_are_served() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let proxy = Proxy::start_with(members(&[&a]), None, |settings| {
        settings.limits.login_timeout = Duration::from_secs(3);
    })
    .await;
    let served = connect(proxy.port(0)).await.unwrap();
    let port = proxy.port(0);
    let say = |bytes: Vec<u8>| async move {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        let mut answer = Vec::new();
        let began = Instant::now();
        drop(stream.read_to_end(&mut answer).await);
        (answer, began.elapsed())
    };
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 64],
        b"\0\0\0\x04".to_vec(),
        [&[0, 0, 0x27, 0x20, 0, 3, 0, 0][..], &[b'x'; 100]].concat(),
        b"\0\0\0\x08\x04\xd2\x16\x2fxx".to_vec(),
        Vec::new(),
    ] {
        let (answer, took) = say(bytes.clone()).await;
        assert!(took < Duration::from_secs(8), "{bytes:?}");
        assert!(!answer.starts_with(b"R"), "{bytes:?}");
        assert_eq!(one(&served, "SELECT 1").await, "1");
    }
    // A version that is not served is told so.
    let (answer, _) = say(b"\0\0\0\x09\0\x02\0\0\0".to_vec()).await;
    assert!(String::from_utf8_lossy(&answer).contains("0A000"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_after_the_login_ends_the_session() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let proxy = Proxy::start(members(&[&a]), None).await;
    let served = connect(proxy.port(0)).await.unwrap();
    let socket = std::net::TcpStream::connect(("127.0.0.1", proxy.port(0))).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut garbage = TcpStream::from_std(socket.try_clone().unwrap()).unwrap();
    let mut config = Config::new();
    config.user("postgres").password(PASSWORD).dbname("postgres");
    let stream = TcpStream::from_std(socket).unwrap();
    let (client, mut connection) = config.connect_raw(stream, NoTls).await.unwrap();
    let told =
        tokio::spawn(async move { std::future::poll_fn(|cx| connection.poll_message(cx)).await });
    garbage.write_all(b"!\0\0\0\x05I").await.unwrap();
    let Some(Err(error)) = told.await.unwrap() else { panic!("no error was told") };
    assert_eq!(code(&error), "08P01");
    drop(client);
    assert_eq!(one(&served, "SELECT 1").await, "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relayed_login_is_the_servers_affair() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let proxy = Proxy::start_with(members(&[&a]), None, |settings| {
        settings.auth.rules = kornak_config::proxy::AuthSettings::relay().rules;
    })
    .await;
    let relayed = connect(proxy.port(0)).await.unwrap();
    assert_eq!(one(&relayed, "SELECT 1").await, "1");
    let mut config = Config::new();
    config.host("127.0.0.1").port(proxy.port(0)).user("postgres").password("wrong");
    assert_eq!(code(&config.connect(NoTls).await.map(drop).unwrap_err()), "28P01");
    a.stop("fast");
    until("a session that cannot move has ended", || async { relayed.is_closed() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_settings_do_not_start_and_wrong_servers_do_no_harm() {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let nobody =
        StaticMember { name: "x".to_owned(), host: "127.0.0.1".to_owned(), port: free_port() };
    let Source::Static { members: mut list } = members(&[&a]) else { unreachable!() };
    list.push(nobody);
    let proxy = Proxy::start(Source::Static { members: list }, None).await;
    let client = connect(proxy.port(0)).await.unwrap();
    assert_eq!(one(&client, "SELECT 1").await, "1");
    let status = proxy.page("/status").await;
    assert!(status.contains("\"serving\":\"a\""), "{status}");
    assert!(proxy.page("/").await.contains("kornak proxy"));
    // The port is taken: another proxy says so and names the listener.
    let taken = proxy.port(0);
    let mut settings = kornak_config::ProxySettings::new(
        kornak_cluster::Scope::new("service", "demo", None),
        members(&[&a]),
    );
    settings.listeners.truncate(1);
    settings.listeners[0].listen =
        kornak_config::Listen { hosts: vec!["127.0.0.1".to_owned()], port: taken };
    let stop = tokio_util::sync::CancellationToken::new();
    let error = kornak_proxy::start(settings, None, stop).await.unwrap_err();
    assert!(error.to_string().contains("`primary`"), "{error}");
    // It stops when told, and its sessions end in order.
    proxy.stop.cancel();
    until("the session has ended", || async { client.is_closed() }).await;
    proxy.running.join.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_that_no_server_takes_is_told_so() {
    let nobody =
        StaticMember { name: "x".to_owned(), host: "127.0.0.1".to_owned(), port: free_port() };
    let proxy = Proxy::start_with(Source::Static { members: vec![nobody] }, None, |settings| {
        settings.limits.hold_timeout = Duration::from_millis(300);
    })
    .await;
    let error = connect(proxy.port(0)).await.map(drop).unwrap_err();
    assert_eq!(code(&error), "57P03");
}
