//! The mixed load: the one workload by which every promise to clients is measured.
//!
//! Eight clients write with autocommit, four in transactions of two statements, four read what was
//! acknowledged before, two connect anew for every query; each thinks for 10 ms between its units.
//! They speak the simple and the extended protocol, with statements prepared once, prepared for
//! each use, and not prepared at all, for a proxy has to follow them all.
//!
//! Every row has an id that the client chose, so that afterwards it can be told what became of it:
//! [`Report::verify`] finds rows that were acknowledged and are not there, transactions of which
//! half is there, and rows of which a client was told that they were *not* written.
//!
//! Not here: who runs the cluster, and what happens to it meanwhile.

mod client;
mod report;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use rand::RngExt as _;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

pub use report::{ClientReport, Doing, Fate, Gap, Kind, Problem, Report, Verdict};

use crate::run::postgres::connect;
use crate::run::wait::until;
use client::LoadClient;

/// Where the rows go.
pub(crate) const TABLE: &str = "kornak_load";

/// How many clients do what.
#[derive(Debug, Clone)]
pub struct LoadSpec {
    /// Keyword/value string of libpq.
    pub conninfo: String,
    pub writers: usize,
    pub transactions: usize,
    pub readers: usize,
    pub reconnecting: usize,
    /// Between two units of one client.
    pub think: Duration,
    /// A unit without an answer for so long counts as an error, and its connection as lost.
    pub patience: Duration,
}

impl LoadSpec {
    /// The mix described above.
    pub fn mixed(conninfo: &str) -> Self {
        Self {
            conninfo: conninfo.to_owned(),
            writers: 8,
            transactions: 4,
            readers: 4,
            reconnecting: 2,
            think: Duration::from_millis(10),
            patience: Duration::from_secs(60),
        }
    }

    fn kinds(&self) -> Vec<Kind> {
        [
            (Kind::Writer, self.writers),
            (Kind::Transaction, self.transactions),
            (Kind::Reader, self.readers),
            (Kind::Reconnecting, self.reconnecting),
        ]
        .into_iter()
        .flat_map(|(kind, clients)| std::iter::repeat_n(kind, clients))
        .collect()
    }
}

/// The state that the clients of one run share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) began: Instant,
    pub(crate) next_id: AtomicI64,
    /// Successful units of each client.
    pub(crate) done: Vec<AtomicU64>,
    /// Ids that were acknowledged lately, for the readers to ask for.
    pub(crate) recent: Mutex<Recent>,
    pub(crate) stop: CancellationToken,
}

/// The last acknowledged ids. As many as are written in about a second: older ones are on every
/// server anyway.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    ids: Vec<i64>,
    next: usize,
}

impl Recent {
    const KEPT: usize = 1024;

    pub(crate) fn push(&mut self, id: i64) {
        if self.ids.len() < Self::KEPT {
            self.ids.push(id);
        } else {
            self.ids[self.next % Self::KEPT] = id;
        }
        self.next += 1;
    }

    /// The newest one half of the time, else any.
    pub(crate) fn pick(&self) -> Option<i64> {
        let newest = self.next.checked_sub(1)?;
        let mut rng = rand::rng();
        let index = if rng.random_bool(0.5) { newest } else { rng.random_range(0..self.next) };
        self.ids.get(index % Self::KEPT.min(self.ids.len())).copied()
    }
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    tasks: JoinSet<ClientReport>,
    first_id: i64,
}

impl Load {
    /// Makes the table if need be and starts all clients.
    pub async fn start(spec: &LoadSpec) -> Result<Self> {
        let client = connect(&spec.conninfo).await.context("connect to make the table")?;
        client
            .batch_execute(&format!(
                "CREATE TABLE IF NOT EXISTS {TABLE} (id bigint PRIMARY KEY, client integer NOT NULL)"
            ))
            .await
            .context("make the table")?;
        // Runs against one table do not meet: 2^31 runs of 2^31 rows.
        let first_id = i64::from(rand::rng().random_range(1..i32::MAX)) << 31;
        let kinds = spec.kinds();
        let shared = Arc::new(Shared {
            began: Instant::now(),
            next_id: AtomicI64::new(first_id),
            done: kinds.iter().map(|_| AtomicU64::new(0)).collect(),
            recent: Mutex::default(),
            stop: CancellationToken::new(),
        });
        let mut tasks = JoinSet::new();
        for (number, kind) in kinds.into_iter().enumerate() {
            tasks.spawn(LoadClient::new(number, kind, spec, Arc::clone(&shared)).run());
        }
        Ok(Self { shared, tasks, first_id })
    }

    /// Time since the start, as in the report.
    pub fn elapsed(&self) -> Duration {
        self.shared.began.elapsed()
    }

    /// Successful units so far, all clients together.
    pub fn units(&self) -> u64 {
        self.shared.done.iter().map(|done| done.load(Ordering::Relaxed)).sum()
    }

    /// Waits until each client has had `more` further successes.
    ///
    /// # Panics
    /// When one has not within `limit`.
    pub async fn flows(&self, more: u64, limit: Duration) {
        let counts = || self.shared.done.iter().map(|done| done.load(Ordering::Relaxed));
        let goals: Vec<u64> = counts().map(|count| count + more).collect();
        until(limit, "every client of the load goes on", || async {
            let behind: Vec<String> = counts()
                .zip(&goals)
                .enumerate()
                .filter(|(_, (count, goal))| count < goal)
                .map(|(client, (count, goal))| format!("client {client}: {count} of {goal}"))
                .collect();
            if behind.is_empty() { Ok(()) } else { Err(behind.join(", ")) }
        })
        .await;
    }

    /// Lets every client finish its unit, and collects what they saw.
    pub async fn stop(mut self) -> Report {
        self.shared.stop.cancel();
        let mut clients = Vec::new();
        while let Some(ended) = self.tasks.join_next().await {
            clients.push(ended.expect("a client of the load does not panic"));
        }
        clients.sort_by_key(|client| client.number);
        let last_id = self.shared.next_id.load(Ordering::Relaxed);
        Report { clients, lasted: self.shared.began.elapsed(), ids: self.first_id..last_id }
    }

    /// [`Self::stop`], and a check of what holds whatever has failed: the server that `leader` is connected to has everything
    /// that was acknowledged, and no client has lost its connection. Prints both reports.
    ///
    /// # Panics
    /// If one of the two does not hold.
    #[expect(clippy::print_stdout, reason = "a run shows what it measured")]
    pub async fn stop_and_verify(self, leader: &Client) -> Result<Report> {
        let report = self.stop().await;
        println!("{report}");
        let verdict = report.verify(leader).await?;
        println!("{verdict}");
        assert!(verdict.is_clean(), "{verdict}");
        assert_eq!(report.lost_connections(), 0, "client connections survive");
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_is_the_one_that_was_promised() {
        let kinds = LoadSpec::mixed("").kinds();
        let count = |kind| kinds.iter().filter(|it| **it == kind).count();
        assert_eq!(
            [Kind::Writer, Kind::Transaction, Kind::Reader, Kind::Reconnecting].map(count),
            [8, 4, 4, 2]
        );
    }

    #[test]
    fn a_reader_asks_only_for_what_was_acknowledged() {
        let mut recent = Recent::default();
        assert_eq!(recent.pick(), None);
        for id in 0..5000 {
            recent.push(id);
            let picked = recent.pick().unwrap();
            assert!((id - 1024..=id).contains(&picked) && picked >= 0, "{picked} after {id}");
        }
    }
}
