//! pgbench with many clients over a small pool, while others change tables, forget everything, cancel,
//! vanish, and the primary moves.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kornak_protocol::frontend::put_sync;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{SILENCE, Spec, Stage};
use crate::run::cluster::Cluster;
use crate::run::postgres::{program, text};
use crate::talk::{Talker, put_execution};

/// Transactions in a second, of all clients: what a busy machine of two cores can do.
const RATE: u32 = 100;

/// Errors that are printed one by one.
const SHOWN: usize = 20;

/// The other clients' activity meanwhile.
#[derive(Debug, Default)]
struct Others {
    stop: AtomicBool,
    changed: AtomicU64,
    discarded: AtomicU64,
    cancelled: AtomicU64,
    vanished: AtomicU64,
}

impl Stage {
    /// Runs it; a report, and whether no answer was wrong and no client had an error.
    pub async fn crowd(
        &self,
        spec: &Spec,
        clients: usize,
        length: Duration,
    ) -> Result<(String, bool)> {
        let admin = self.cluster.app_on_leader().await?;
        admin
            .batch_execute(&format!(
                "CREATE TABLE counters (client int PRIMARY KEY, n bigint NOT NULL);
                 CREATE TABLE said (client int NOT NULL, what text);
                 INSERT INTO counters SELECT n, 0 FROM generate_series(0, {clients} - 1) n"
            ))
            .await?;
        let login = Cluster::app_login(self.pooled.number());
        let log = self.path("pgbench.log");
        let output = std::fs::File::create(&log).context("make pgbench's log")?;
        // Copies: pgbench runs as somebody who may not see the sources.
        let mut scripts = Vec::new();
        for name in ["crowd.sql", "crowd-settings.sql"] {
            std::fs::copy(spec.sources.join(name), self.path(name)).context(name)?;
            scripts.push(self.path(name));
        }
        // A thread for each client: pgbench prepares inside transactions and waits with its thread.
        let mut pgbench = program("pgbench")
            .args(["-n", "-M", "prepared", "-D", "n=0", "-h", "127.0.0.1", "-U", &login.user])
            .args(["-p", &login.port.to_string(), "-R", &RATE.to_string()])
            .args(["-c", &clients.to_string(), "-j", &clients.to_string()])
            .args(["-T", &length.as_secs().to_string()])
            .args(scripts.iter().flat_map(|it| [OsStr::new("-f"), it.as_os_str()]))
            .arg(&login.database)
            .env("PGPASSWORD", &login.password)
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("share a log")?)
            .stderr(output)
            .spawn()
            .context("start pgbench")?;
        let others = Arc::new(Others::default());
        let mut tasks = JoinSet::new();
        let (port, it) = (login.port, &others);
        tasks.spawn(change(port, Arc::clone(it)));
        tasks.spawn(discard(port, Arc::clone(it)));
        tasks.spawn(cancel(port, Arc::clone(it)));
        tasks.spawn(vanish(port, Arc::clone(it)));
        let began = Instant::now();
        let mut moved = 0;
        while pgbench.try_wait().context("pgbench")?.is_none() {
            if moved < 2 && began.elapsed() > length * (moved + 1) / 3 {
                self.move_on().await?;
                moved += 1;
            }
            ensure!(began.elapsed() < length * 2 + SILENCE, "pgbench does not end");
            sleep(Duration::from_millis(200)).await;
        }
        others.stop.store(true, Relaxed);
        let mut faults = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended? {
                faults.push(format!("{error:#}"));
            }
        }
        let said = std::fs::read_to_string(&log).context("read what pgbench says")?;
        let bad = |line: &&str| {
            ["ERROR", "WRONG", "aborted", "FATAL", "fatal"].iter().any(|it| line.contains(it))
        };
        faults.extend(said.lines().filter(bad).map(str::to_owned));
        let whole = said.contains("number of transactions actually processed") && moved == 2;
        let admin = self.cluster.app_on_leader().await?;
        let done =
            text(&admin, "SELECT (sum(n) + (SELECT count(*) FROM said))::text FROM counters");
        let summary = said
            .lines()
            .filter(|line| line.starts_with("number of") || line.contains("latency average ="));
        let mut report = format!(
            "{clients} clients of pgbench -M prepared over {} connections, {moved} switchovers, {} changes of \
             tables, {} DISCARD ALL, {} cancels, {} clients gone\n{}\nrows and counts there: {}\n",
            super::POOL,
            others.changed.load(Relaxed),
            others.discarded.load(Relaxed),
            others.cancelled.load(Relaxed),
            others.vanished.load(Relaxed),
            summary.collect::<Vec<_>>().join("\n"),
            done.await?,
        );
        writeln!(report, "errors and wrong answers: {}", faults.len())?;
        for fault in faults.iter().take(SHOWN) {
            writeln!(report, "    {fault}")?;
        }
        Ok((report, whole && faults.is_empty()))
    }
}

/// Compares without notices (that all connections are busy) and descriptions of rows.
fn right(seen: &[String], wanted: &[&str]) -> Result<()> {
    let seen: Vec<_> = seen.iter().filter(|it| !it.starts_with('N') && *it != "T").collect();
    ensure!(seen == wanted, "{seen:?} instead of {wanted:?}");
    Ok(())
}

async fn change(port: u16, others: Arc<Others>) -> Result<()> {
    let mut client = Talker::login(&Cluster::app_login(port)).await?;
    while !others.stop.load(Relaxed) {
        for sql in [
            "ALTER TABLE counters ADD COLUMN extra int",
            "CREATE INDEX said_client ON said (client)",
            "ALTER TABLE counters DROP COLUMN extra",
            "DROP INDEX said_client",
            "ALTER TABLE said ALTER what SET DEFAULT 'y'",
        ] {
            let told = client.ask(sql).await?;
            ensure!(told.last().is_some_and(|it| it == "Z I"), "{sql}: {told:?}");
            ensure!(told.iter().all(|it| !it.starts_with('E')), "{sql}: {told:?}");
            others.changed.fetch_add(1, Relaxed);
            sleep(Duration::from_millis(150)).await;
        }
    }
    Ok(())
}

/// Prepares, forgets all, and must not be served from what is forgotten.
async fn discard(port: u16, others: Arc<Others>) -> Result<()> {
    let mut client = Talker::login(&Cluster::app_login(port)).await?;
    for number in 0_u64.. {
        if others.stop.load(Relaxed) {
            break;
        }
        let (mut out, sql) = (bytes::BytesMut::new(), format!("SELECT {number}"));
        put_execution("mine", Some(&sql), &mut out);
        put_sync(&mut out);
        client.send(&out).await?;
        right(&client.told(1).await?, &["1", "2", &format!("D {number}"), "C SELECT 1", "Z I"])?;
        let all = if number % 2 == 0 { "DISCARD ALL" } else { "DEALLOCATE ALL" };
        right(&client.ask(all).await?, &[&format!("C {all}"), "Z I"])?;
        let mut out = bytes::BytesMut::new();
        put_execution("mine", None, &mut out);
        put_sync(&mut out);
        client.send(&out).await?;
        right(&client.told(1).await?, &["E 26000", "Z I"])?;
        others.discarded.fetch_add(1, Relaxed);
        sleep(Duration::from_millis(30)).await;
    }
    Ok(())
}

async fn cancel(port: u16, others: Arc<Others>) -> Result<()> {
    let mut client = Talker::login(&Cluster::app_login(port)).await?;
    while !others.stop.load(Relaxed) {
        client.query("SELECT pg_sleep(60)").await?;
        sleep(Duration::from_millis(50)).await;
        // It may wait for a connection when the request comes, which then means nobody.
        let told = loop {
            client.cancel().await?;
            if let Ok(told) = tokio::time::timeout(Duration::from_millis(300), client.told(1)).await
            {
                break told?;
            }
        };
        right(&told, &["E 57014", "Z I"])?;
        // Now it does nothing: nobody else's statement may end by this.
        client.cancel().await?;
        others.cancelled.fetch_add(1, Relaxed);
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Clients that leave in transactions, in the middle of messages and of answers.
async fn vanish(port: u16, others: Arc<Others>) -> Result<()> {
    while !others.stop.load(Relaxed) {
        let mut client = Talker::login(&Cluster::app_login(port)).await?;
        match rand::random_range(0..4) {
            0 => drop(client.ask("BEGIN; SET LOCAL work_mem = '77kB'; SELECT 1").await?),
            1 => client.send(b"Q\0\0\0\x40SELECT 'half a mess").await?,
            2 => client.query("SELECT generate_series(1, 100000)").await?,
            _ => client.query("SELECT pg_sleep(1)").await?,
        }
        drop(client);
        others.vanished.fetch_add(1, Relaxed);
        sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
