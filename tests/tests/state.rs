//! The state that sessions hold is there after each switchover, over TLS and in the clear: the servers are asked.
//!
//! `KORNAK_STATE_SWITCHOVERS` says how many there are; the default is what CI has time for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::{connect, connect_hearing, describe, text};
use kornak_tests::run::wait::until;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio_postgres::{AsyncMessage, Client, Statement};

const SOON: Duration = Duration::from_secs(20);

/// Between two units of what goes on in the background.
const PACE: Duration = Duration::from_millis(5);

fn switchovers() -> usize {
    let set = std::env::var("KORNAK_STATE_SWITCHOVERS").ok();
    set.map_or(2, |count| count.parse().expect("KORNAK_STATE_SWITCHOVERS is a number"))
}

async fn all_of(client: &Client, wanted: &[(&str, &str)]) -> Result<()> {
    for (query, value) in wanted {
        let found = text(client, query).await?;
        ensure!(found == *value, "{query}: expected {value:?}, found {found:?}");
    }
    Ok(())
}

/// A client that set things by every way there is.
struct Setter(Client);

impl Setter {
    const HOLDS: [(&str, &str); 9] = [
        ("SHOW search_path", "app, pg_temp"),
        ("SHOW statement_timeout", "77s"),
        ("SHOW application_name", "state"),
        ("SHOW my.own", "it's mine"),
        ("SHOW my.function", "set"),
        ("SHOW work_mem", "4MB"),
        ("SHOW DateStyle", "SQL, DMY"),
        ("SELECT current_user", "app_writer"),
        ("SELECT session_user", "app"),
    ];

    async fn new(conninfo: &str) -> Result<Self> {
        let client = connect(conninfo).await?;
        client.batch_execute("SET search_path TO app, pg_temp").await?;
        client.batch_execute("BEGIN; SET statement_timeout = '77s'; COMMIT").await?;
        client.batch_execute("BEGIN").await?;
        client.batch_execute("SET application_name = 'state'").await?;
        client.batch_execute("COMMIT").await?;
        client.batch_execute("SET my.own = 'it''s mine'").await?;
        client.batch_execute("SET DateStyle = 'SQL, DMY'").await?;
        client.batch_execute("BEGIN").await?;
        client.batch_execute("SET work_mem = '64MB'").await?;
        client.batch_execute("ROLLBACK").await?;
        // By functions: no tag tells, the text only warns, and the server has to be asked.
        client.query_one("SELECT set_config('my.function', 'set', false)", &[]).await?;
        client.query_one("SELECT pg_try_advisory_lock(1, pg_backend_pid())", &[]).await?;
        client.query_one("SELECT pg_advisory_unlock_all()", &[]).await?;
        client.batch_execute("SET ROLE app_writer").await?;
        Ok(Self(client))
    }

    async fn check(&self) -> Result<()> {
        all_of(&self.0, &Self::HOLDS).await
    }
}

/// A client with prepared statements, of which one is never used before it moves.
struct Preparer {
    client: Client,
    used: Statement,
    unused: Statement,
    gone: Statement,
}

impl Preparer {
    async fn new(conninfo: &str) -> Result<Self> {
        let client = connect(conninfo).await?;
        let used = client.prepare("SELECT $1::int + 1").await?;
        let unused = client.prepare("SELECT count(*) FROM app.kept WHERE id = $1").await?;
        let gone = client.prepare("SELECT 'gone'::text").await?;
        client.batch_execute("DEALLOCATE ALL").await?;
        let (used, unused) = (
            client.prepare_typed("SELECT $1::int + 1", used.params()).await?,
            client
                .prepare_typed("SELECT count(*) FROM app.kept WHERE id = $1", unused.params())
                .await?,
        );
        Ok(Self { client, used, unused, gone })
    }

    async fn check(&self) -> Result<()> {
        let (next, one) = (
            self.client.query_one(&self.used, &[&41]).await?.get::<_, i32>(0),
            self.client.query_one(&self.unused, &[&7_i32]).await?.get::<_, i64>(0),
        );
        ensure!((next, one) == (42, 1), "prepared statements answer {next} and {one}");
        let gone = self.client.query(&self.gone, &[]).await;
        let code = gone.err().and_then(|error| error.code().cloned());
        ensure!(code.is_some_and(|it| it.code() == "26000"), "what was deallocated stays away");
        Ok(())
    }
}

/// A client that listens and says nothing else.
struct Listener {
    client: Client,
    told: UnboundedReceiver<AsyncMessage>,
    /// The numbers that came, in order.
    heard: Vec<u64>,
    notices: usize,
}

impl Listener {
    async fn new(conninfo: &str) -> Result<Self> {
        let (client, told) = connect_hearing(conninfo).await?;
        // Of several statements at once nothing is read; the server is asked.
        client.batch_execute("LISTEN news; LISTEN other").await?;
        client.batch_execute("LISTEN \"Other News\"").await?;
        client.batch_execute("LISTEN third").await?;
        client.batch_execute("UNLISTEN third").await?;
        client.batch_execute("BEGIN").await?;
        client.batch_execute("LISTEN fourth").await?;
        client.batch_execute("ROLLBACK").await?;
        Ok(Self { client, told, heard: Vec::new(), notices: 0 })
    }

    fn hear(&mut self) {
        while let Ok(message) = self.told.try_recv() {
            match message {
                AsyncMessage::Notification(it) if it.channel() == "news" => {
                    self.heard.push(it.payload().parse().expect("a number"));
                }
                AsyncMessage::Notice(_) => self.notices += 1,
                _ => {}
            }
        }
    }

    async fn check(&self) -> Result<()> {
        let query = "SELECT string_agg(c, '; ' ORDER BY c) FROM pg_listening_channels() c";
        all_of(&self.client, &[(query, "Other News; news; other")]).await
    }
}

/// Work in the background for as long as the switchovers last.
struct Background {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Result<u64>>>,
}

impl Background {
    async fn start(conninfos: &[String]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let notifier = connect(&conninfos[0]).await?;
        let mut tasks = vec![tokio::spawn(notify(notifier, Arc::clone(&stop)))];
        for conninfo in conninfos {
            tasks.push(tokio::spawn(pipeline(connect(conninfo).await?, Arc::clone(&stop))));
        }
        Ok(Self { stop, tasks })
    }

    /// Answers how many notifications were sent, and how many statements by each pipeline.
    async fn end(self) -> Result<Vec<u64>> {
        self.stop.store(true, Ordering::Relaxed);
        try_join_all(self.tasks).await?.into_iter().collect()
    }
}

/// Sends numbers from 1 on; each was committed before the next is sent.
async fn notify(client: Client, stop: Arc<AtomicBool>) -> Result<u64> {
    let notify = client.prepare("SELECT pg_notify('news', $1)").await?;
    let (mut number, mut pace) = (0, tokio::time::interval(PACE));
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        client.query(&notify, &[&number.to_string()]).await.context("notify")?;
        pace.tick().await;
    }
    Ok(number)
}

/// Sixteen statements at a time, each with its Sync, without waiting for answers.
async fn pipeline(client: Client, stop: Arc<AtomicBool>) -> Result<u64> {
    let add = client.prepare("SELECT $1::int8 + 1").await?;
    let (mut number, mut pace) = (0_u64, tokio::time::interval(PACE));
    while !stop.load(Ordering::Relaxed) {
        let asked: Vec<i64> = (0..16).map(|at| number as i64 + at).collect();
        let (client, add) = (&client, &add);
        let answers =
            asked.iter().map(|asked| async move { client.query_one(add, &[asked]).await });
        for (asked, row) in asked.iter().zip(try_join_all(answers).await.context("pipeline")?) {
            ensure!(row.get::<_, i64>(0) == asked + 1, "an answer of another request");
        }
        number += 16;
        pace.tick().await;
    }
    Ok(number)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_sessions_hold_is_there_after_each_switchover() -> Result<()> {
    let cluster = Cluster::start(ClusterSpec {
        name: "state",
        tls: true,
        proxy: "failover: {listen: move}",
        ..Default::default()
    })
    .await?;
    let admin = cluster.connect_to_leader().await?;
    admin.batch_execute("CREATE ROLE app_writer; GRANT app_writer TO app").await?;
    let plain = cluster.app();
    let encrypted = format!("{plain} sslmode=require");
    let maker = connect(&plain).await?;
    maker
        .batch_execute(
            "CREATE SCHEMA app; CREATE TABLE app.kept (id int); INSERT INTO app.kept VALUES (7); \
             GRANT USAGE ON SCHEMA app TO app_writer; \
             CREATE FUNCTION app.hide() RETURNS void LANGUAGE plpgsql AS $$ BEGIN \
                 CREATE TEMP TABLE hidden (a int); END $$",
        )
        .await?;
    drop(maker);

    let mut holders = Vec::new();
    for conninfo in [&plain, &encrypted] {
        let setter = Setter::new(conninfo).await?;
        let preparer = Preparer::new(conninfo).await?;
        holders.push((setter, preparer, Listener::new(conninfo).await?));
    }
    // Nothing that it sent names a temporary table.
    let hider = connect(&plain).await?;
    hider.query("SELECT app.hide()", &[]).await?;
    let mut load = LoadSpec::mixed(&encrypted);
    load.writers = 4;
    let load = Load::start(&load).await?;
    let background = Background::start(&[plain.clone(), encrypted.clone()]).await?;
    load.flows(20, Duration::from_secs(30)).await;

    for round in 1..=switchovers() {
        let done = cluster.switchover_to_the_next().await?;
        println!("{round:>2}. {done}");
        for (setter, preparer, listener) in &holders {
            listener.check().await?;
            setter.check().await?;
            preparer.check().await?;
        }
        if round == 1 {
            let error = hider.simple_query("SELECT * FROM hidden").await;
            let error = error.err().context("a session that lacks its table must not go on")?;
            assert!(error.is_closed() || describe(&error).contains("57P01"), "{error}");
        }
        load.flows(5, Duration::from_secs(20)).await;
        cluster.healthy(Duration::from_secs(45)).await;
    }

    let done = background.end().await?;
    println!("notifications and pipelined statements: {done:?}");
    let sent = done[0];
    for (number, (_, _, listener)) in holders.iter_mut().enumerate() {
        let last = until(SOON, "every notification came", || {
            listener.hear();
            let last = listener.heard.last().copied().unwrap_or(0);
            async move { if last == sent { Ok(last) } else { Err(format!("{last} of {sent}")) } }
        })
        .await;
        assert_eq!(listener.heard, (1..=last).collect::<Vec<_>>(), "listener {number}");
        assert_eq!(listener.notices, switchovers(), "told of each move");
    }
    let report = load.stop_and_verify(&cluster.app_on_leader().await?).await?;
    assert_eq!((report.errors(), report.lost_connections(), report.stale_reads()), (0, 0, 0));
    cluster.passed();
    Ok(())
}
