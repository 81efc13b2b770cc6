//! One client of the load: its units, and what it makes of their failures.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use tokio_postgres::error::Error;
use tokio_postgres::{Client, Statement};

use super::report::{ClientReport, Doing, Fate, Kind, Problem};
use super::{LoadSpec, Shared, TABLE};
use crate::run::postgres::{connect, describe};

/// After a failure: long enough not to fill the report while a server is away, short enough not to
/// lengthen the gaps that are measured.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(20);

/// How a client sends its statements; clients of one kind take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speech {
    /// Query messages.
    Simple,
    /// A named statement, prepared once for each connection.
    PreparedOnce,
    /// A statement prepared and closed for each use.
    PreparedEach,
}

/// A connection and what was prepared on it.
struct Link {
    client: Client,
    statement: Option<Statement>,
}

/// A unit that did not work.
struct Failure {
    doing: Doing,
    error: Option<Error>,
}

pub(super) struct LoadClient {
    kind: Kind,
    speech: Speech,
    conninfo: String,
    think: Duration,
    patience: Duration,
    shared: Arc<Shared>,
    report: ClientReport,
    /// `None` before the first one: the logins of all clients at once are no gap of the service.
    last_success: Option<Instant>,
}

impl LoadClient {
    pub(super) fn new(number: usize, kind: Kind, spec: &LoadSpec, shared: Arc<Shared>) -> Self {
        let speech = match number % 3 {
            0 => Speech::Simple,
            1 => Speech::PreparedOnce,
            _ => Speech::PreparedEach,
        };
        Self {
            kind,
            speech,
            conninfo: spec.conninfo.clone(),
            think: spec.think,
            patience: spec.patience,
            last_success: None,
            shared,
            report: ClientReport::new(number, kind),
        }
    }

    pub(super) async fn run(mut self) -> ClientReport {
        let mut link = None;
        while !self.shared.stop.is_cancelled() {
            let worked = self.unit(&mut link).await;
            sleep(if worked { self.think } else { PAUSE_AFTER_FAILURE }).await;
        }
        // A client that never came back has a gap as well.
        self.gap_until(Instant::now());
        self.report
    }

    /// One unit, from the first attempt to the bookkeeping.
    async fn unit(&mut self, link: &mut Option<Link>) -> bool {
        let start = Instant::now();
        if link.as_ref().is_some_and(|link| link.client.is_closed()) {
            *link = None;
            self.note(start, Doing::Nothing, None, &[], true);
        }
        let ids = self.ids();
        let ended = timeout(self.patience, self.attempt(link, &ids)).await;
        match ended {
            Ok(Ok(())) => {
                self.succeeded(start, &ids);
                if self.kind == Kind::Reconnecting {
                    *link = None;
                }
                true
            }
            Ok(Err(failure)) => {
                let lost = self.recover(link, &failure).await;
                self.note(start, failure.doing, failure.error.as_ref(), &ids, lost);
                false
            }
            Err(_) => {
                *link = None;
                self.note(start, Doing::Waiting, None, &ids, true);
                false
            }
        }
    }

    /// The ids that this unit writes, or the one that it reads.
    fn ids(&self) -> Vec<i64> {
        let fresh = || self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        match self.kind {
            Kind::Writer | Kind::Reconnecting => vec![fresh()],
            Kind::Transaction => vec![fresh(), fresh()],
            Kind::Reader => self.shared.recent.lock().pick().into_iter().collect(),
        }
    }

    async fn attempt(&mut self, link: &mut Option<Link>, ids: &[i64]) -> Result<(), Failure> {
        let fail = |doing| move |error| Failure { doing, error: Some(error) };
        if link.is_none() {
            let client = connect(&self.conninfo).await.map_err(fail(Doing::Connect))?;
            *link = Some(Link { client, statement: None });
        }
        let Some(link) = link.as_mut() else { return Ok(()) };
        if self.kind == Kind::Transaction {
            link.client.batch_execute("BEGIN").await.map_err(fail(Doing::Begin))?;
        }
        let doing = match self.kind {
            Kind::Transaction => Doing::InTransaction,
            Kind::Reader => Doing::Read,
            Kind::Writer | Kind::Reconnecting => Doing::Write,
        };
        for id in ids {
            let rows = self.statement(link, *id).await.map_err(fail(doing))?;
            if rows == 0 {
                // An INSERT … RETURNING gives its row; only a reader can get here.
                self.report.stale_reads.push((self.shared.began.elapsed(), *id));
            }
        }
        if self.kind == Kind::Transaction {
            link.client.batch_execute("COMMIT").await.map_err(fail(Doing::Commit))?;
        }
        Ok(())
    }

    /// Sends one statement about `id`; the number of rows that came back.
    async fn statement(&self, link: &mut Link, id: i64) -> Result<usize, Error> {
        let number = i32::try_from(self.report.number).unwrap_or(i32::MAX);
        let reading = self.kind == Kind::Reader;
        if self.speech == Speech::Simple || self.kind == Kind::Reconnecting {
            let text = if reading {
                format!("SELECT id FROM {TABLE} WHERE id = {id}")
            } else {
                format!("INSERT INTO {TABLE} (id, client) VALUES ({id}, {number}) RETURNING id")
            };
            let messages = link.client.simple_query(&text).await?;
            let is_row = |it: &&_| matches!(it, tokio_postgres::SimpleQueryMessage::Row(_));
            return Ok(messages.iter().filter(is_row).count());
        }
        let text = if reading {
            format!("SELECT id FROM {TABLE} WHERE id = $1 AND $2::integer >= 0")
        } else {
            format!("INSERT INTO {TABLE} (id, client) VALUES ($1, $2) RETURNING id")
        };
        if self.speech == Speech::PreparedEach {
            return Ok(link.client.query(&text, &[&id, &number]).await?.len());
        }
        let statement = match &link.statement {
            Some(statement) => statement.clone(),
            None => link.statement.insert(link.client.prepare(&text).await?).clone(),
        };
        Ok(link.client.query(&statement, &[&id, &number]).await?.len())
    }

    /// Brings the connection back to where a unit can begin. Whether it is lost.
    async fn recover(&self, link: &mut Option<Link>, failure: &Failure) -> bool {
        let Some(open) = link.as_mut() else {
            return false;
        };
        let fatal = failure.error.as_ref().is_some_and(|error| {
            error.is_closed()
                || error.as_db_error().is_none()
                || error.as_db_error().is_some_and(|told| told.severity() != "ERROR")
        });
        if fatal || open.client.is_closed() || self.kind == Kind::Reconnecting {
            *link = None;
            // A client that reconnects for every query has not lost what it would have closed.
            return self.kind != Kind::Reconnecting;
        }
        if self.kind == Kind::Transaction {
            let rollback = timeout(self.patience, open.client.batch_execute("ROLLBACK")).await;
            if !matches!(rollback, Ok(Ok(()))) {
                *link = None;
                return true;
            }
        }
        false
    }

    fn succeeded(&mut self, start: Instant, ids: &[i64]) {
        let now = Instant::now();
        self.report.latencies.push(now - start);
        if self.last_success.is_some() {
            self.gap_until(now);
        }
        self.last_success = Some(now);
        if self.kind != Kind::Reader {
            self.report.acknowledged.push(ids.to_vec());
            let mut recent = self.shared.recent.lock();
            for id in ids {
                recent.push(*id);
            }
        }
        if let Some(done) = self.shared.done.get(self.report.number) {
            done.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn gap_until(&mut self, now: Instant) {
        let since = self.last_success.unwrap_or(self.shared.began);
        self.report.gap(since - self.shared.began, now - since);
    }

    fn note(
        &mut self,
        start: Instant,
        doing: Doing,
        error: Option<&Error>,
        ids: &[i64],
        lost_connection: bool,
    ) {
        let sqlstate = error.and_then(Error::code).map(|code| code.code().to_owned());
        let message = match (error, doing) {
            (Some(error), _) => describe(error),
            (None, Doing::Waiting) => format!("no answer within {:?}", self.patience),
            (None, _) => "the connection was closed while idle".to_owned(),
        };
        let ids = if self.kind == Kind::Reader { Vec::new() } else { ids.to_vec() };
        self.report.problem(Problem {
            at: self.shared.began.elapsed(),
            began: start - self.shared.began,
            fate: Fate::of(doing, sqlstate.as_deref()),
            doing,
            sqlstate,
            message,
            lost_connection,
            ids,
        });
    }
}
