//! The clients: each appends to lists and reads them, through one proxy or the other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt as _;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, Error, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

use super::history::{Key, Lists, Number, Outcome, Step, Unit};
use crate::load::{Doing, Fate};
use crate::run::postgres::{connect, describe};

/// Table of the lists.
const TABLE: &str = "torture";

/// Lists that are appended to at the same time: few, so that transactions meet.
const ACTIVE: i64 = 8;

/// Numbers in a list before the next one takes its place: reads return whole lists.
const LENGTH: i64 = 60;

/// An answer that takes longer is given up, and its connection with it. Longer than every fault but a lost host.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two units of one client.
const THINK: std::ops::Range<u64> = 15..35;

/// Statement that makes the table.
pub const CREATE: &str =
    "CREATE TABLE IF NOT EXISTS torture (key bigint PRIMARY KEY, numbers bigint[] NOT NULL)";

/// How clients are made.
#[derive(Debug, Clone)]
pub struct ClientSpec {
    /// Logins to the primary through each proxy.
    pub ways: Vec<String>,
    /// Statements that each connection begins with.
    pub settings: Vec<String>,
    pub clients: usize,
    /// Whether a client sends an append of unknown outcome again: wrong on purpose.
    pub sends_again: bool,
}

/// The experience of all clients.
#[derive(Debug, Default)]
pub struct Seen {
    pub units: Vec<Unit>,
    /// Failures by SQLSTATE, or by `closed` and `silent`; each with its first text.
    pub errors: BTreeMap<String, (usize, String)>,
    /// Transactions that met another one: the usual price of serializable transactions.
    pub conflicts: usize,
    pub connections: usize,
    /// The longest time without a success of one client, and when it began.
    pub longest_gap: (Duration, Duration),
}

/// Running clients.
#[derive(Debug)]
pub struct Clients {
    tasks: JoinSet<Seen>,
    stop: CancellationToken,
}

impl Clients {
    pub fn start(spec: &ClientSpec, began: Instant) -> Self {
        let stop = CancellationToken::new();
        let next = Arc::new(AtomicI64::new(0));
        let mut tasks = JoinSet::new();
        for number in 0..spec.clients {
            let client = One {
                spec: spec.clone(),
                way: number,
                next: Arc::clone(&next),
                began,
                last_success: began.elapsed(),
                again: None,
                seen: Seen::default(),
            };
            tasks.spawn(client.run(stop.clone()));
        }
        Self { tasks, stop }
    }

    /// Lets each client end its unit.
    pub async fn stop(mut self) -> Seen {
        self.stop.cancel();
        let mut all = Seen::default();
        while let Some(ended) = self.tasks.join_next().await {
            let seen = ended.expect("a client does not panic");
            all.units.extend(seen.units);
            all.conflicts += seen.conflicts;
            all.connections += seen.connections;
            all.longest_gap = all.longest_gap.max(seen.longest_gap);
            for (code, (count, text)) in seen.errors {
                all.errors.entry(code).or_insert((0, text)).0 += count;
            }
        }
        all.units.sort_by_key(|unit| unit.began);
        all
    }
}

/// Reads every list.
pub async fn lists(client: &Client) -> Result<Lists, Error> {
    let rows = client.query("SELECT key, numbers FROM torture", &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

struct One {
    spec: ClientSpec,
    way: usize,
    next: Arc<AtomicI64>,
    began: Instant,
    last_success: Duration,
    /// The steps to send again, as [`ClientSpec::sends_again`] asks.
    again: Option<Vec<Step>>,
    seen: Seen,
}

/// A unit that failed: where it was, and what it was told; `None` if there was no answer in time.
struct Failure(Doing, Option<Error>);

impl One {
    async fn run(mut self, stop: CancellationToken) -> Seen {
        let mut connection = None;
        while !stop.is_cancelled() {
            self.unit(&mut connection).await;
            let think = rand::rng().random_range(THINK);
            sleep(Duration::from_millis(think)).await;
        }
        self.gap_ends();
        self.seen
    }

    async fn unit(&mut self, connection: &mut Option<Client>) {
        if connection.as_ref().is_none_or(Client::is_closed) {
            *connection = None;
            match timeout(PATIENCE, self.connect()).await {
                Ok(Ok(client)) => *connection = Some(client),
                Ok(Err(error)) => return self.failed(&Failure(Doing::Connect, Some(error))),
                Err(_) => return self.failed(&Failure(Doing::Connect, None)),
            }
        }
        let Some(client) = connection.as_ref() else { return };
        if let Some(mut again) = self.again.take() {
            // Its outcome is what the first attempt was told.
            let _ = timeout(PATIENCE, perform(client, &mut again)).await;
        }
        let began = self.began.elapsed();
        let mut steps = self.plan();
        let ended = match timeout(PATIENCE, perform(client, &mut steps)).await {
            Ok(ended) => ended,
            Err(_) => Err(Failure(Doing::Waiting, None)),
        };
        let outcome = match &ended {
            Ok(()) => Outcome::Acknowledged,
            Err(Failure(doing, error)) => {
                let code = error.as_ref().and_then(Error::code).map(|code| code.code().to_owned());
                match Fate::of(*doing, code.as_deref()) {
                    Fate::NotExecuted => Outcome::Denied,
                    Fate::Unknown => Outcome::Unknown,
                }
            }
        };
        if self.spec.sends_again && outcome == Outcome::Unknown {
            self.again = Some(steps.clone());
        }
        self.seen.units.push(Unit { began, ended: self.began.elapsed(), steps, outcome });
        match ended {
            Ok(()) => self.gap_ends(),
            Err(failure) => {
                self.failed(&failure);
                // A connection that said nothing for so long, or is in a transaction still, is not used again.
                let usable = failure.1.is_some() && !client.is_closed();
                let clean =
                    usable && timeout(PATIENCE, client.batch_execute("ROLLBACK")).await.is_ok();
                if !clean {
                    *connection = None;
                }
            }
        }
    }

    /// Connects through the next proxy.
    async fn connect(&mut self) -> Result<Client, Error> {
        self.way += 1;
        self.seen.connections += 1;
        let way = &self.spec.ways[self.way % self.spec.ways.len()];
        let client = connect(way).await?;
        for setting in &self.spec.settings {
            client.batch_execute(setting).await?;
        }
        Ok(client)
    }

    fn plan(&self) -> Vec<Step> {
        let mut rng = rand::rng();
        let steps = if rng.random_bool(0.7) { 1 } else { rng.random_range(2..=4) };
        let mut plan = Vec::new();
        for _ in 0..steps {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let key = number / (ACTIVE * LENGTH) * ACTIVE + rng.random_range(0..ACTIVE);
            let append = rng.random_bool(0.6);
            plan.push(if append { Step::Append(key, number) } else { Step::Read(key, None) });
        }
        plan
    }

    fn failed(&mut self, failure: &Failure) {
        let Failure(_, error) = failure;
        let (code, text) = match error {
            None => ("silent".to_owned(), "no answer".to_owned()),
            Some(error) => {
                let code = error.code().map_or("closed", |code| code.code());
                (code.to_owned(), describe(error))
            }
        };
        if code == "40001" && text.contains("could not serialize") {
            self.seen.conflicts += 1;
        } else {
            self.seen.errors.entry(code).or_insert((0, text)).0 += 1;
        }
    }

    fn gap_ends(&mut self) {
        let now = self.began.elapsed();
        let gap = now.saturating_sub(self.last_success);
        self.seen.longest_gap = self.seen.longest_gap.max((gap, self.last_success));
        self.last_success = now;
    }
}

async fn perform(client: &Client, steps: &mut [Step]) -> Result<(), Failure> {
    let alone = steps.len() == 1;
    let fail = |doing| move |error| Failure(doing, Some(error));
    if !alone {
        client.batch_execute("BEGIN").await.map_err(fail(Doing::Begin))?;
    }
    for step in steps {
        match step {
            Step::Append(key, number) => {
                let doing = if alone { Doing::Write } else { Doing::InTransaction };
                append(client, *key, *number).await.map_err(fail(doing))?;
            }
            Step::Read(key, seen) => {
                let doing = if alone { Doing::Read } else { Doing::InTransaction };
                *seen = Some(read(client, *key).await.map_err(fail(doing))?);
            }
        }
    }
    if !alone {
        // A COMMIT that is answered by ROLLBACK has committed nothing.
        client.batch_execute("COMMIT").await.map_err(fail(Doing::Commit))?;
    }
    Ok(())
}

/// By the simple protocol for even numbers and the extended protocol for odd ones.
async fn append(client: &Client, key: Key, number: Number) -> Result<(), Error> {
    if number % 2 == 0 {
        let text = format!(
            "INSERT INTO {TABLE} VALUES ({key}, ARRAY[{number}]) \
             ON CONFLICT (key) DO UPDATE SET numbers = {TABLE}.numbers || EXCLUDED.numbers"
        );
        return client.batch_execute(&text).await;
    }
    let text = "INSERT INTO torture VALUES ($1, ARRAY[$2::bigint]) \
                ON CONFLICT (key) DO UPDATE SET numbers = torture.numbers || EXCLUDED.numbers";
    client.execute(text, &[&key, &number]).await.map(drop)
}

async fn read(client: &Client, key: Key) -> Result<Vec<Number>, Error> {
    if key % 2 == 0 {
        let text = format!("SELECT array_to_string(numbers, ',') FROM {TABLE} WHERE key = {key}");
        let messages = client.simple_query(&text).await?;
        let row = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        let numbers = row.unwrap_or_default().split(',').filter_map(|number| number.parse().ok());
        return Ok(numbers.collect());
    }
    let rows = client.query("SELECT numbers FROM torture WHERE key = $1", &[&key]).await?;
    Ok(rows.first().map(|row| row.get(0)).unwrap_or_default())
}
