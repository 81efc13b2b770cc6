//! The errors of clients whose server is lost: one row for each state that a session can be in,
//! with real servers, and agents played by the test so that every moment can be stopped at.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

#[path = "../../proxy/tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::BytesMut;
use common::agents::Agents;
use common::{PASSWORD, Proxy, Scratch, Server, memory, until};
use kornak_config::proxy::{KeepSessions, PoolMode, ProxySettings, UnknownOutcome};
use kornak_dcs::{Op, Txn};
use kornak_protocol::frontend::{put_flush, put_query, put_sync};
use kornak_tests::run::scratch::{freeze_below, kill_below};
use kornak_tests::talk::{Login, Talker, put_execution};

/// Statements of the busy sessions run until their server is gone.
const LONG: &str = "SELECT pg_sleep(60)";

fn login(proxy: &Proxy, listener: usize, name: &str) -> Login {
    Login::new(proxy.port(listener), "postgres", PASSWORD, "postgres")
        .with("application_name", name)
}

/// A session, by the name of its row.
async fn session(proxy: &Proxy, name: &str) -> Talker {
    Talker::login(&login(proxy, 0, name)).await.unwrap()
}

/// A session that does this, one query after another; the last one is not waited for.
async fn busy(proxy: &Proxy, before: &[&str], last: impl FnOnce(&mut BytesMut)) -> Talker {
    let mut talker = session(proxy, "busy").await;
    for sql in before {
        talker.ask(sql).await.unwrap();
    }
    let mut out = BytesMut::new();
    last(&mut out);
    talker.send(&out).await.unwrap();
    talker
}

fn query(sql: &'static str) -> impl FnOnce(&mut BytesMut) {
    move |out| put_query(sql.as_bytes(), out).unwrap()
}

/// Says this and is told that.
async fn row(name: &str, talker: &mut Talker, sql: &str, expected: &[&str]) {
    let told = talker.ask(sql).await;
    assert_eq!(told.as_deref().unwrap(), expected, "{name}: {sql}");
}

/// Says nothing and is told that.
async fn hears(name: &str, talker: &mut Talker, expected: &[&str]) {
    let ready = expected.iter().filter(|it| it.starts_with('Z') || **it == "closed").count();
    let told = talker.told(ready).await;
    assert_eq!(told.as_deref().unwrap(), expected, "{name}");
}

/// The session works, on a server that accepts writes.
async fn works(name: &str, talker: &mut Talker) {
    let expected = ["T", "D f", "C SELECT 1", "Z I"];
    row(name, talker, "SELECT pg_is_in_recovery()", &expected).await;
}

/// Waits until the page shows every pin, and so many sessions with temporary tables.
async fn pinned(proxy: &Proxy, tables: usize) {
    until("the page shows every pin", || async {
        let page = proxy.page("/status").await;
        let tables = format!("\"temporary_table\":{tables}");
        [&tables, "hold_cursor", "listen", "advisory_lock"].iter().all(|it| page.contains(*it))
    })
    .await;
}

async fn prepare(server: &Server) {
    let sql = "
        CREATE TABLE t (id integer PRIMARY KEY, v integer);
        CREATE TABLE d (id integer);
        CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
          $$ BEGIN PERFORM pg_sleep(60); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON d DEFERRABLE INITIALLY DEFERRED
          FOR EACH ROW EXECUTE FUNCTION slow();
        CREATE FUNCTION makes() RETURNS void LANGUAGE sql AS $$ CREATE TEMP TABLE m () $$;
        CREATE FUNCTION locks() RETURNS void LANGUAGE sql AS $$ SELECT pg_advisory_lock(7) $$;";
    server.sql().await.batch_execute(sql).await.unwrap();
}

/// Waits until so many statements of busy sessions run on the server.
async fn all_run(server: &Server, count: i64) {
    let admin = server.sql().await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'busy' \
               AND state = 'active'";
    until("every busy session runs its statement", || async {
        admin.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == count
    })
    .await;
}

async fn lead(agents: &Agents, server: &Server) {
    let member = server.member("primary");
    let keys = &agents.keys;
    let leader = Op::put(keys.leader(), &server.name);
    agents.put(Txn::just(leader).and(Op::put(keys.member(&server.name), member))).await;
}

async fn proxy(agents: &Agents, change: impl FnOnce(&mut ProxySettings)) -> Proxy {
    Proxy::start_with(memory(), Some(Arc::clone(&agents.store)), change).await
}

/// Sessions that have something to lose, each in a state of its own.
struct Idle {
    clean: Talker,
    held: Talker,
    cancelled: Talker,
    open: Talker,
    failed: Talker,
    stateful: Talker,
    pinned: Vec<(&'static str, Talker, &'static str)>,
}

impl Idle {
    async fn new(proxy: &Proxy) -> Self {
        let mut open = session(proxy, "open").await;
        row("open", &mut open, "BEGIN", &["C BEGIN", "Z T"]).await;
        row("open", &mut open, "INSERT INTO t VALUES (1, 1)", &["C INSERT 0 1", "Z T"]).await;
        let mut failed = session(proxy, "failed").await;
        row("failed", &mut failed, "BEGIN", &["C BEGIN", "Z T"]).await;
        row("failed", &mut failed, "SELECT 1/0", &["E 22012", "Z E"]).await;
        let mut stateful = session(proxy, "stateful").await;
        stateful.ask("SET work_mem = '5MB'").await.unwrap();
        // As Django sets its time zone: the server is asked what came of it.
        stateful.ask("SELECT set_config('my.own', 'x', false)").await.unwrap();
        stateful.execute("named", Some("SELECT 40 + 2")).await.unwrap();
        let mut sync = BytesMut::new();
        put_sync(&mut sync);
        stateful.send(&sync).await.unwrap();
        hears("stateful", &mut stateful, &["1", "2", "D 42", "C SELECT 1", "Z I"]).await;
        let mut pinned = Vec::new();
        for (name, sql, hint) in [
            ("temporary", "CREATE TEMP TABLE x (a integer)", "The session held temporary tables."),
            ("made by a function", "SELECT makes()", "The session held temporary tables."),
            (
                "hold",
                "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
                "The session held a cursor WITH HOLD.",
            ),
            (
                "listen",
                "LISTEN x",
                "The session was listening; notifications may have been missed.",
            ),
            ("advisory", "SELECT locks()", "The session held advisory locks."),
        ] {
            let mut talker = session(proxy, name).await;
            talker.ask(sql).await.unwrap();
            pinned.push((name, talker, hint));
        }
        Self {
            clean: session(proxy, "idle").await,
            held: session(proxy, "held").await,
            cancelled: session(proxy, "cancelled").await,
            open,
            failed,
            stateful,
            pinned,
        }
    }

    /// On the new server: dead transactions end, and what was held is there.
    async fn goes_on(&mut self) {
        let Self { open, failed, stateful, .. } = self;
        // The dead transaction is ended by nothing but its end.
        row("open", open, "SELECT 1", &["E 40001", "Z E"]).await;
        row("open", open, "ROLLBACK TO SAVEPOINT a", &["E 40001", "Z E"]).await;
        row("open", open, "COMMIT", &["C ROLLBACK", "Z I"]).await;
        row("failed", failed, "SELECT 1", &["E 25P02", "Z E"]).await;
        row("failed", failed, "ROLLBACK", &["C ROLLBACK", "Z I"]).await;
        works("open", open).await;
        works("failed", failed).await;
        assert_eq!(stateful.value("SHOW work_mem").await.unwrap(), "5MB");
        assert_eq!(stateful.value("SHOW my.own").await.unwrap(), "x");
        stateful.execute("named", None).await.unwrap();
        let mut sync = BytesMut::new();
        put_sync(&mut sync);
        stateful.send(&sync).await.unwrap();
        hears("stateful", stateful, &["2", "D 42", "C SELECT 1", "Z I"]).await;
    }
}

/// Sessions with something in flight, and what each is told.
async fn in_flight(main: &Proxy, close: &Proxy) -> Vec<(&'static str, Talker, Vec<&'static str>)> {
    let unknown = vec!["E 08007", "Z I"];
    let prepared = |out: &mut BytesMut| {
        put_execution("c", Some("COMMIT"), out);
        put_sync(out);
    };
    let mut named = busy(main, &[], prepared).await;
    named.told(1).await.unwrap();
    named.ask("BEGIN").await.unwrap();
    named.ask("INSERT INTO d VALUES (1)").await.unwrap();
    named.execute("c", None).await.unwrap();
    let mut sync = BytesMut::new();
    put_sync(&mut sync);
    named.send(&sync).await.unwrap();
    let pipeline = |out: &mut BytesMut| {
        for sql in ["SELECT 1", LONG, "INSERT INTO t VALUES (3, 3)"] {
            put_execution("", Some(sql), out);
            put_sync(out);
        }
    };
    let mut half = busy(main, &[], pipeline).await;
    hears("pipeline", &mut half, &["1", "2", "D 1", "C SELECT 1", "Z I"]).await;
    let mut copy = busy(main, &[], query("COPY t FROM STDIN")).await;
    assert_eq!(copy.next().await.unwrap().map(|frame| frame.tag), Some(b'G'));
    let extended = |out: &mut BytesMut| {
        put_execution("", Some("INSERT INTO t SELECT 2, 2 FROM pg_sleep(60)"), out);
        put_sync(out);
    };
    let flushed = |out: &mut BytesMut| {
        put_execution("", Some(LONG), out);
        put_flush(out);
    };
    let begin = ["BEGIN", "INSERT INTO d VALUES (1)"];
    let update = "UPDATE t SET v = 1 FROM pg_sleep(60)";
    let (multi, auto) =
        ("INSERT INTO d VALUES (1); COMMIT", "INSERT INTO t SELECT 2, 2 FROM pg_sleep(60)");
    vec![
        ("in a transaction", busy(main, &["BEGIN"], query(update)).await, vec!["E 40001", "Z E"]),
        ("autocommit", busy(main, &[], query(auto)).await, unknown.clone()),
        ("extended", busy(main, &[], extended).await, unknown.clone()),
        ("commit", busy(main, &begin, query("COMMIT")).await, unknown.clone()),
        ("several statements", busy(main, &["BEGIN"], query(multi)).await, unknown.clone()),
        ("a named COMMIT", named, unknown),
        ("half a pipeline", half, vec!["E 08007", "Z I", "E 08007", "Z I"]),
        ("no Sync yet", busy(main, &[], flushed).await, vec!["E 08007"]),
        ("COPY", copy, vec!["E 57P01 FATAL", "closed"]),
        (
            "to be closed",
            busy(close, &[], query(auto)).await,
            vec!["E 08007 FATAL Look before running it again.", "closed"],
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_client_is_told_what_is_true_when_the_primary_dies() -> Result<()> {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let b = a.standby(&scratch, "b");
    prepare(&a).await;
    let agents = Agents::new(&a, &b).await;
    let main = proxy(&agents, |_| ()).await;
    let short = proxy(&agents, |it| it.limits.hold_timeout = Duration::from_secs(3)).await;
    let none = proxy(&agents, |it| it.failover.keep_sessions = KeepSessions::None).await;
    let close = proxy(&agents, |it| {
        it.failover.unknown_outcome = UnknownOutcome::Close;
        it.failover.keep_sessions = KeepSessions::All;
    })
    .await;

    let mut idle = Idle::new(&main).await;
    let mut impatient = session(&short, "impatient").await;
    let mut not_kept = session(&none, "not kept").await;
    let mut kept = session(&close, "kept").await;
    kept.ask("SELECT set_config('a.b', 'c', false)").await?;
    session(&main, "login").await;
    let half = Talker::begin(&login(&main, 0, "login")).await?;
    let mut busy = in_flight(&main, &close).await;
    all_run(&a, busy.len() as i64).await;
    let mut dropped =
        Talker::login(&Login::new(main.port(0), "postgres", PASSWORD, "template1")).await?;
    dropped.ask("DO $$ BEGIN EXECUTE 'CREATE TE' || 'MP TABLE m ()'; END $$").await?;
    pinned(&main, 3).await;
    dropped.ask("DROP TABLE m").await?;
    pinned(&main, 2).await;

    kill_below(&a.data);
    // A cancel request for a session whose server is gone goes nowhere, and ends.
    busy[0].1.cancel().await?;
    for (name, talker, expected) in &mut busy {
        if *name == "no Sync yet" {
            let told = talker.next().await?.unwrap();
            assert_eq!(kornak_tests::talk::show(&told), expected[0], "{name}");
            let mut sync = BytesMut::new();
            put_sync(&mut sync);
            talker.send(&sync).await?;
            hears(name, talker, &["Z I"]).await;
        } else {
            hears(name, talker, expected).await;
        }
    }
    for (name, talker, hint) in &mut idle.pinned {
        hears(name, talker, &[&format!("E 57P01 FATAL {hint}"), "closed"]).await;
    }
    let hint = "E 57P01 FATAL The proxy is set to keep no sessions (keep_sessions: none).";
    hears("not kept", &mut not_kept, &[hint, "closed"]).await;

    // Nobody leads: who has something to say waits, and may change its mind.
    idle.held.query("INSERT INTO t VALUES (100, 1)").await?;
    idle.cancelled.query("INSERT INTO t VALUES (101, 1)").await?;
    until("it is held", || async { main.page("/status").await.contains(r#""held":2"#) }).await;
    idle.cancelled.cancel().await?;
    hears("cancelled", &mut idle.cancelled, &["E 57014", "Z I"]).await;
    row("impatient", &mut impatient, "SELECT 1", &["E 57P03", "Z I"]).await;
    let mut late = half.finish().await?;
    let mut fresh = session(&main, "login").await;

    // The key is b's, and b is still in recovery.
    lead(&agents, &b).await;
    until("the proxy has looked at b", || async {
        main.page("/status").await.contains("still in recovery")
    })
    .await;
    assert!(idle.held.is_silent().await, "nothing runs on a server in recovery");
    b.promote();
    hears("held", &mut idle.held, &["C INSERT 0 1", "Z I"]).await;
    for (name, talker) in [
        ("idle", &mut idle.clean),
        ("cancelled", &mut idle.cancelled),
        ("impatient", &mut impatient),
        ("a login that had begun", &mut late),
        ("a login meanwhile", &mut fresh),
        ("kept", &mut kept),
        ("dropped", &mut dropped),
    ] {
        works(name, talker).await;
    }

    idle.goes_on().await;
    // After 40001 the session goes on, too.
    row("in a transaction", &mut busy[0].1, "ROLLBACK", &["C ROLLBACK", "Z I"]).await;
    works("in a transaction", &mut busy[0].1).await;
    assert_eq!(idle.clean.value("SELECT string_agg(id::text, ' ') FROM t").await?, "100");
    let metrics = main.page("/metrics").await;
    assert!(metrics.contains(r#"pinned_closed_total{reason="advisory_lock"} 1"#), "{metrics}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_freezes_without_a_word_is_left_when_another_leads() -> Result<()> {
    let scratch = Scratch::new();
    let a = Server::primary(&scratch, "a");
    let b = a.standby(&scratch, "b");
    prepare(&a).await;
    let agents = Agents::new(&a, &b).await;
    let main = proxy(&agents, |_| ()).await;

    // What is meant for one session alone ends that session alone.
    let mut ended = session(&main, "ended").await;
    let mut slow = session(&main, "slow").await;
    let mut other = session(&main, "other").await;
    a.sql().await.execute("SELECT pg_terminate_backend($1)", &[&(ended.key.pid as i32)]).await?;
    hears("terminated", &mut ended, &["E 57P01 FATAL", "closed"]).await;
    slow.ask("SET idle_session_timeout = '200ms'").await?;
    hears("idle_session_timeout", &mut slow, &["E 57P05 FATAL", "closed"]).await;
    works("other", &mut other).await;

    let mut open = session(&main, "open").await;
    open.ask("BEGIN").await?;
    open.ask("SELECT 1").await?;
    let mut waiting = busy(&main, &[], query(LONG)).await;
    all_run(&a, 1).await;
    freeze_below(&a.data);
    let began = Instant::now();
    // Sent to a server that never answers: nobody knows what it did with it.
    other.query("INSERT INTO t VALUES (5, 5)").await?;
    assert!(other.is_silent().await);
    b.promote();
    lead(&agents, &b).await;
    hears("in flight", &mut waiting, &["E 08007", "Z I"]).await;
    hears("sent meanwhile", &mut other, &["E 08007", "Z I"]).await;
    row("open", &mut open, "COMMIT", &["E 40001", "Z I"]).await;
    for (name, talker) in
        [("in flight", &mut waiting), ("sent meanwhile", &mut other), ("open", &mut open)]
    {
        works(name, talker).await;
    }
    works("fresh", &mut session(&main, "fresh").await).await;
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    kill_below(&a.data);
    Ok(())
}

/// The port of the server that a session is on.
async fn port(talker: &mut Talker) -> Result<u16> {
    Ok(talker.value("SELECT inet_server_port()").await?.parse()?)
}

/// A primary, two standbys, and the agents of all three.
async fn with_two_standbys(scratch: &Scratch) -> (Server, Server, Server, Agents) {
    let a = Server::primary(scratch, "a");
    let (b, c) = (a.standby(scratch, "b"), a.standby(scratch, "c"));
    let agents = Agents::new(&a, &b).await;
    agents.put(Txn::just(Op::put(agents.keys.member("c"), c.member("replica")))).await;
    (a, b, c, agents)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_run_again_where_that_is_allowed_and_come_back_to_a_standby() -> Result<()> {
    let scratch = Scratch::new();
    let (a, b, c, agents) = with_two_standbys(&scratch).await;
    let again = proxy(&agents, |it| it.listeners[1].retry_reads = true).await;
    let once = proxy(&agents, |_| ()).await;
    until("both standbys are known", || async { again.page("/status").await.contains(r#""c""#) })
        .await;

    let reading = |proxy: &Proxy| {
        let login = login(proxy, 1, "reader");
        async move { Talker::login(&login).await.unwrap() }
    };
    let mut reader = reading(&again).await;
    let lost = if port(&mut reader).await? == b.port { &b } else { &c };
    let left = if lost.port == b.port { &c } else { &b };
    let mut block = on(&again, lost).await?;
    let mut plain = on(&once, lost).await?;
    reader.query("SELECT pg_is_in_recovery() FROM pg_sleep(1)").await?;
    block.ask("BEGIN").await?;
    block.query(LONG).await?;
    plain.query(LONG).await?;
    let admin = lost.sql().await;
    until("all three run", || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' \
                   AND application_name = 'reader'";
        admin.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 3
    })
    .await;
    kill_below(&lost.data);
    agents.put(Txn::just(Op::delete(agents.keys.member(&lost.name)))).await;
    hears("allowed", &mut reader, &["T", "D t", "C SELECT 1", "Z I"]).await;
    assert_eq!(port(&mut reader).await?, left.port);
    hears("in a block", &mut block, &["E 40001", "Z E"]).await;
    hears("not allowed", &mut plain, &["E 08007", "Z I"]).await;

    // Without a standby the primary serves, until there is one again.
    left.stop("immediate");
    agents.put(Txn::just(Op::delete(agents.keys.member(&left.name)))).await;
    reader.ask("SET work_mem = '6MB'").await?;
    assert_eq!(port(&mut reader).await?, a.port);
    left.start();
    agents.put(Txn::just(Op::put(agents.keys.member(&left.name), left.member("replica")))).await;
    until("the proxy knows of the standby", || async {
        again.page("/status").await.contains(&format!("\"{}\"", left.name))
    })
    .await;
    assert_eq!(port(&mut reader).await?, left.port, "back on a standby");
    assert_eq!(reader.value("SHOW work_mem").await?, "6MB");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_on_standbys_runs_reads_again_and_comes_back_to_a_standby() -> Result<()> {
    let scratch = Scratch::new();
    let (a, b, c, agents) = with_two_standbys(&scratch).await;
    let pooled = proxy(&agents, |it| {
        it.listeners[1].retry_reads = true;
        it.listeners[1].pool_mode = PoolMode::Transaction;
        it.listeners[1].pool_size = Some(1);
    })
    .await;
    until("both standbys are known", || async { pooled.page("/status").await.contains(r#""c""#) })
        .await;
    let mut reader = Talker::login(&login(&pooled, 1, "reader")).await?;
    let lost = if port(&mut reader).await? == b.port { &b } else { &c };
    let left = if lost.port == b.port { &c } else { &b };
    reader.query("SELECT pg_is_in_recovery() FROM pg_sleep(1)").await?;
    let admin = lost.sql().await;
    until("it runs", || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' \
                   AND application_name = 'reader'";
        admin.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    kill_below(&lost.data);
    agents.put(Txn::just(Op::delete(agents.keys.member(&lost.name)))).await;
    hears("again", &mut reader, &["T", "D t", "C SELECT 1", "Z I"]).await;
    assert_eq!(port(&mut reader).await?, left.port);

    left.stop("immediate");
    agents.put(Txn::just(Op::delete(agents.keys.member(&left.name)))).await;
    reader.ask("SET work_mem = '6MB'").await?;
    assert_eq!(port(&mut reader).await?, a.port, "for want of a standby");
    left.start();
    agents.put(Txn::just(Op::put(agents.keys.member(&left.name), left.member("replica")))).await;
    until("it is back on a standby", || async {
        let mut other = Talker::login(&login(&pooled, 1, "reader")).await.unwrap();
        port(&mut other).await.unwrap() == left.port
    })
    .await;
    assert_eq!(port(&mut reader).await?, left.port);
    assert_eq!(reader.value("SHOW work_mem").await?, "6MB");
    let line = r#"kornak_proxy_pool_waiting_clients{listener="standbys"} 0"#;
    let metrics = pooled.page("/metrics").await;
    assert!(metrics.contains(line), "{metrics}");
    Ok(())
}

/// A reader on this server.
async fn on(proxy: &Proxy, server: &Server) -> Result<Talker> {
    // Those on the other server stay, so that the next one is balanced to this one.
    let mut others = Vec::new();
    for _ in 0..20 {
        let mut talker = Talker::login(&login(proxy, 1, "reader")).await?;
        if port(&mut talker).await? == server.port {
            return Ok(talker);
        }
        others.push(talker);
    }
    anyhow::bail!("no session on {}", server.name)
}
