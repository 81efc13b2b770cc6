//! `kornak-sessions`: what a switchover and a crash cost when many sessions are open that seldom speak.
//!
//! One connection for each session, half of them writing and half reading, each with a pause between two statements. A
//! session that has a server of its own has to log in again somewhere; how long those wait that have something to say
//! is what counts.

use std::collections::BTreeMap;
use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use kornak_tests::run::cluster::{Cluster, ClusterSpec};
use kornak_tests::run::postgres::{connect, text};
use kornak_tests::run::wait::until;
use rand::RngExt as _;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(120);
/// A statement without an answer for so long counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);
/// Sessions that log in at once at the start, so that a machine of two cores gets them all in.
const LOGINS: usize = 16;

/// Measures what many sessions see of a switchover and of a crash, and prints one table.
#[derive(Debug, Parser)]
struct Arguments {
    /// Sessions and the pause of each between two statements, in milliseconds
    #[arg(long, value_delimiter = ',', default_values_t = ["100:500".to_owned(), "600:2000".to_owned()])]
    series: Vec<String>,
    /// The events that happen
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Event::value_variants().to_vec())]
    events: Vec<Event>,
    /// Times that each event happens
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Through a pooled listener with so many server connections
    #[arg(long)]
    pooled: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Event {
    /// A planned switchover
    Switchover,
    /// The leader's postmaster is killed
    Crash,
}

/// The sessions' view since the last event.
#[derive(Debug, Default)]
struct Seen {
    statements: u64,
    /// Of statements that were under way after the event began, in milliseconds.
    waits: Vec<u64>,
    errors: BTreeMap<String, usize>,
    acknowledged: u64,
}

struct Shared {
    seen: parking_lot::Mutex<Seen>,
    began: Instant,
    /// Milliseconds since `began` of the event.
    event_at: AtomicU64,
    logins: Semaphore,
    connected: AtomicU64,
    stop: CancellationToken,
}

struct Session {
    number: usize,
    pause: Duration,
    conninfo: String,
    shared: Arc<Shared>,
}

impl Session {
    async fn run(self) {
        let mut client = None;
        let mut first = true;
        while !self.shared.stop.is_cancelled() {
            let Some(it) = &client else {
                let turn = self.shared.logins.acquire().await;
                match timeout(PATIENCE, connect(&self.conninfo)).await {
                    Ok(Ok(made)) => client = Some(made),
                    Ok(Err(error)) => self.failed("login", &error),
                    Err(_) => drop(self.shared.seen.lock().errors.insert("no login".to_owned(), 1)),
                }
                drop(turn);
                if first && client.is_some() {
                    first = false;
                    self.shared.connected.fetch_add(1, Relaxed);
                }
                continue;
            };
            let pause = self.pause.mul_f64(rand::rng().random_range(0.5..1.5));
            tokio::select! {
                () = sleep(pause) => {}
                () = self.shared.stop.cancelled() => return,
            }
            if !self.speak(it).await {
                client = None;
            }
        }
    }

    /// One statement; false if the connection is of no use any more.
    async fn speak(&self, client: &Client) -> bool {
        let writes = self.number.is_multiple_of(2);
        let number = self.number;
        let statement = match writes {
            true => format!("INSERT INTO said (session) VALUES ({number})"),
            false => format!("SELECT count(*) FROM said WHERE session = {number}"),
        };
        let began = Instant::now();
        let answer = timeout(PATIENCE, client.simple_query(&statement)).await;
        let ended = Instant::now();
        let event = self.shared.began + Duration::from_millis(self.shared.event_at.load(Relaxed));
        {
            let mut seen = self.shared.seen.lock();
            seen.statements += 1;
            if ended > event {
                let wait = ended.duration_since(began).as_millis();
                seen.waits.push(u64::try_from(wait).unwrap_or(u64::MAX));
            }
            if writes && matches!(answer, Ok(Ok(_))) {
                seen.acknowledged += 1;
            }
        }
        match answer {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                self.failed(if writes { "write" } else { "read" }, &error);
                !client.is_closed()
            }
            Err(_) => {
                *self.shared.seen.lock().errors.entry("no answer".to_owned()).or_default() += 1;
                false
            }
        }
    }

    fn failed(&self, doing: &str, error: &tokio_postgres::Error) {
        let code = error.code().map_or("connection", |code| code.code());
        *self.shared.seen.lock().errors.entry(format!("{doing} {code}")).or_default() += 1;
    }
}

/// One row of the table.
struct Row {
    sessions: usize,
    pause: Duration,
    event: Event,
    command: Duration,
    seen: Seen,
    missing: i64,
}

impl Row {
    fn wait(&self, part: f64) -> f64 {
        let mut waits = self.seen.waits.clone();
        waits.sort_unstable();
        let at = ((waits.len() as f64 * part) as usize).min(waits.len().saturating_sub(1));
        waits.get(at).copied().unwrap_or_default() as f64 / 1000.0
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let event = match self.event {
            Event::Switchover => "switchover",
            Event::Crash => "crash",
        };
        let errors: Vec<String> =
            self.seen.errors.iter().map(|(what, times)| format!("{times} × {what}")).collect();
        write!(
            f,
            "| {} ({:.1} s) | {event} | {:.2} s | {:.2} s | {:.2} s | {:.2} s | {} | {} |",
            self.sessions,
            self.pause.as_secs_f64(),
            self.command.as_secs_f64(),
            self.wait(1.0),
            self.wait(0.99),
            self.wait(0.5),
            if errors.is_empty() { "0".to_owned() } else { errors.join(", ") },
            self.missing,
        )
    }
}

struct Bench {
    cluster: Cluster,
    conninfo: String,
    rounds: usize,
}

impl Bench {
    async fn row(&self, sessions: usize, pause: Duration, events: &[Event]) -> Result<Vec<Row>> {
        let admin = self.cluster.app_on_leader().await?;
        admin.batch_execute("DROP TABLE IF EXISTS said; CREATE TABLE said (session int)").await?;
        admin.batch_execute("CREATE INDEX ON said (session)").await?;
        let shared = Arc::new(Shared {
            seen: parking_lot::Mutex::default(),
            began: Instant::now(),
            event_at: AtomicU64::new(u64::from(u32::MAX)),
            logins: Semaphore::new(LOGINS),
            connected: AtomicU64::new(0),
            stop: CancellationToken::new(),
        });
        let mut tasks = JoinSet::new();
        for number in 0..sessions {
            let (conninfo, shared) = (self.conninfo.clone(), Arc::clone(&shared));
            tasks.spawn(Session { number, pause, conninfo, shared }.run());
        }
        until(LIMIT, "all sessions are connected", || async {
            let connected = shared.connected.load(Relaxed);
            if connected == sessions as u64 { Ok(()) } else { Err(format!("{connected}")) }
        })
        .await;
        let mut rows = Vec::new();
        let mut acknowledged = 0;
        for event in events.iter().flat_map(|event| std::iter::repeat_n(*event, self.rounds)) {
            sleep(pause * 2).await;
            acknowledged += std::mem::take(&mut *shared.seen.lock()).acknowledged;
            let began = Instant::now();
            let at = u64::try_from(shared.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            shared.event_at.store(at, Relaxed);
            let leader = self.cluster.leader().await?;
            match event {
                Event::Switchover => drop(self.cluster.switchover_to_the_next().await?),
                Event::Crash => self.cluster.node(&leader)?.kill_postmaster()?,
            }
            let command = began.elapsed();
            self.cluster.healthy(LIMIT).await;
            // Each session has spoken since, and the slowest has its answer.
            sleep(pause * 2).await;
            let seen = std::mem::take(&mut *shared.seen.lock());
            shared.event_at.store(u64::from(u32::MAX), Relaxed);
            acknowledged += seen.acknowledged;
            rows.push(Row { sessions, pause, event, command, seen, missing: 0 });
            println_row(rows.last());
        }
        shared.stop.cancel();
        while tasks.join_next().await.is_some() {}
        acknowledged += shared.seen.lock().acknowledged;
        let admin = self.cluster.app_on_leader().await?;
        let there: i64 = text(&admin, "SELECT count(*) FROM said").await?.parse()?;
        let missing = i64::try_from(acknowledged)? - there;
        for row in &mut rows {
            row.missing = missing.max(0);
        }
        Ok(rows)
    }
}

#[expect(clippy::print_stdout, reason = "progress of a long measurement")]
fn println_row(row: Option<&Row>) {
    if let Some(row) = row {
        println!("{row}");
    }
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the table is what it is for")]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut series = Vec::new();
    for text in &arguments.series {
        let Some((sessions, pause)) = text.split_once(':') else { bail!("{text}: no pause") };
        series.push((sessions.parse::<usize>()?, Duration::from_millis(pause.parse()?)));
    }
    let most = series.iter().map(|(sessions, _)| *sessions).max().context("no series")?;
    let cluster = Cluster::start(ClusterSpec {
        name: "sessions",
        ttl: 30,
        parameters: vec![format!("max_connections: {}", most + 50)],
        ..Default::default()
    })
    .await?;
    let pooled = match arguments.pooled {
        Some(size) => Some(cluster.pooled_proxy(size).await?),
        None => None,
    };
    let port =
        pooled.as_ref().map_or(cluster.proxy.primary(), kornak_tests::run::proxy::Proxy::primary);
    let bench = Bench { conninfo: Cluster::app_on(port), cluster, rounds: arguments.rounds };
    let mut all = Vec::new();
    for (sessions, pause) in series {
        all.extend(bench.row(sessions, pause, &arguments.events).await?);
    }
    println!(
        "\n| sessions (pause) | event | command | longest wait | 99 of 100 | half | errors | missing rows |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in &all {
        println!("{row}");
    }
    let lost = all.iter().any(|row| row.missing > 0);
    drop(pooled);
    bench.cluster.passed();
    Ok(if lost { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
