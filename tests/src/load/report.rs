//! The clients' view of a run, and the fate of their rows.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio_postgres::Client;

use super::TABLE;

/// The activity of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// One INSERT at a time, autocommit.
    Writer,
    /// Two INSERTs between BEGIN and COMMIT.
    Transaction,
    /// Reads a row that was acknowledged to somebody.
    Reader,
    /// Connects, one INSERT, disconnects.
    Reconnecting,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Writer => "writer",
            Self::Transaction => "transaction",
            Self::Reader => "reader",
            Self::Reconnecting => "reconnecting",
        })
    }
}

/// Where in its unit a client was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Doing {
    /// Idle: the connection was closed under it.
    Nothing,
    Connect,
    Begin,
    /// A statement of an open transaction.
    InTransaction,
    Commit,
    /// An autocommit INSERT.
    Write,
    Read,
    /// Had no answer for longer than it waits.
    Waiting,
}

/// The conclusion that a client may draw about a unit that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The client was told, or can tell, that nothing of the unit was committed.
    NotExecuted,
    /// The unit may have been committed.
    Unknown,
}

impl Fate {
    /// From where the client was and the SQLSTATE it got (PostgreSQL documentation, Appendix A).
    pub fn of(doing: Doing, sqlstate: Option<&str>) -> Self {
        match doing {
            // Nothing that could commit had been sent.
            Doing::Nothing | Doing::Connect | Doing::Begin | Doing::InTransaction | Doing::Read => {
                Self::NotExecuted
            }
            Doing::Waiting => Self::Unknown,
            Doing::Commit | Doing::Write => match sqlstate {
                // The connection's own failures say nothing, nor does a server that ends: it may
                // have committed and been waiting for a standby (57P01, 57P02).
                None | Some("57P01" | "57P02" | "XX000") => Self::Unknown,
                Some(code) if code.starts_with("08") => Self::Unknown,
                Some(_) => Self::NotExecuted,
            },
        }
    }
}

/// One failed unit, or one connection lost while idle.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Since the load began.
    pub at: Duration,
    /// When the unit began, since the load began.
    pub began: Duration,
    pub doing: Doing,
    pub sqlstate: Option<String>,
    pub message: String,
    pub lost_connection: bool,
    pub fate: Fate,
    /// Rows that the unit would have written.
    pub ids: Vec<i64>,
}

/// A time without success.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gap {
    pub length: Duration,
    /// When it began, since the load began.
    pub at: Duration,
}

/// Failures that are kept one by one for each client; more are only counted, for a server that is
/// away for long gives fifty a second.
const PROBLEMS_KEPT: usize = 2_000;

/// The experience of one client.
#[derive(Debug, Clone)]
pub struct ClientReport {
    pub number: usize,
    pub kind: Kind,
    /// The ids of each acknowledged unit.
    pub acknowledged: Vec<Vec<i64>>,
    pub latencies: Vec<Duration>,
    pub longest_gap: Gap,
    pub problems: Vec<Problem>,
    /// The number of problems beyond the ones that are kept.
    pub further_problems: usize,
    /// A row that had been acknowledged was not found: when, and which.
    pub stale_reads: Vec<(Duration, i64)>,
}

impl ClientReport {
    pub(super) fn new(number: usize, kind: Kind) -> Self {
        Self {
            number,
            kind,
            acknowledged: Vec::new(),
            latencies: Vec::new(),
            longest_gap: Gap { length: Duration::ZERO, at: Duration::ZERO },
            problems: Vec::new(),
            further_problems: 0,
            stale_reads: Vec::new(),
        }
    }

    pub(super) fn gap(&mut self, at: Duration, length: Duration) {
        self.longest_gap = self.longest_gap.max(Gap { length, at });
    }

    pub(super) fn problem(&mut self, problem: Problem) {
        // What may have written a row is needed to judge the table.
        if self.problems.len() < PROBLEMS_KEPT || problem.doing > Doing::Begin {
            self.problems.push(problem);
        } else {
            self.further_problems += 1;
        }
    }

    fn errors(&self) -> usize {
        self.problems.len() + self.further_problems
    }

    fn lost_connections(&self) -> usize {
        self.problems.iter().filter(|problem| problem.lost_connection).count()
    }
}

/// The experience of all clients. Its `Display` is a table.
#[derive(Debug, Clone)]
pub struct Report {
    pub clients: Vec<ClientReport>,
    pub lasted: Duration,
    /// Every id that this run may have written.
    pub ids: Range<i64>,
}

/// The fate of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Acknowledged rows looked for.
    pub acknowledged: usize,
    /// Acknowledged, and not there.
    pub missing: Vec<i64>,
    /// Transactions of which only one row is there.
    pub torn: Vec<Vec<i64>>,
    /// There, although the client had reason to believe they were not written.
    pub denied: Vec<i64>,
    /// Of unknown outcome, and there.
    pub unknown_present: usize,
    /// Of unknown outcome, and not there.
    pub unknown_absent: usize,
    /// There, and written by nobody.
    pub strange: Vec<i64>,
}

impl Verdict {
    /// Nothing was lost, torn, invented or lied about.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty()
            && self.torn.is_empty()
            && self.denied.is_empty()
            && self.strange.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} acknowledged rows, {} missing; {} transactions torn; {} rows written though denied; \
             {} unknown outcomes ({} written); {} strange rows",
            self.acknowledged,
            self.missing.len(),
            self.torn.len(),
            self.denied.len(),
            self.unknown_present + self.unknown_absent,
            self.unknown_present,
            self.strange.len(),
        )
    }
}

impl Report {
    /// Failed units and connections lost while idle.
    pub fn errors(&self) -> usize {
        self.clients.iter().map(ClientReport::errors).sum()
    }

    /// Connections that ended without the client asking for it.
    pub fn lost_connections(&self) -> usize {
        self.clients.iter().map(ClientReport::lost_connections).sum()
    }

    /// Reads that did not find a row acknowledged before.
    pub fn stale_reads(&self) -> usize {
        self.clients.iter().map(|client| client.stale_reads.len()).sum()
    }

    /// The longest time any client had no success.
    pub fn longest_gap(&self) -> Gap {
        let longest = self.clients.iter().map(|client| client.longest_gap).max();
        longest.unwrap_or(Gap { length: Duration::ZERO, at: Duration::ZERO })
    }

    /// Units that succeeded.
    pub fn units(&self) -> usize {
        self.clients.iter().map(|client| client.latencies.len()).sum()
    }

    /// Every failure that is kept, with its client.
    pub fn problems(&self) -> impl Iterator<Item = (&ClientReport, &Problem)> {
        self.clients.iter().flat_map(|client| client.problems.iter().map(move |it| (client, it)))
    }

    /// Reads the whole table of the server that `client` is connected to, and judges.
    pub async fn verify(&self, client: &Client) -> Result<Verdict> {
        let query = format!("SELECT id FROM {TABLE} WHERE id >= $1 AND id < $2");
        let rows = client
            .query(&query, &[&self.ids.start, &self.ids.end])
            .await
            .context("read the table of the load")?;
        Ok(self.judge(&rows.iter().map(|row| row.get(0)).collect()))
    }

    fn judge(&self, present: &HashSet<i64>) -> Verdict {
        let mut verdict = Verdict::default();
        let mut known: HashSet<i64> = HashSet::new();
        let mut units: Vec<&[i64]> = Vec::new();
        for client in &self.clients {
            for ids in &client.acknowledged {
                units.push(ids);
                verdict.acknowledged += ids.len();
                verdict.missing.extend(ids.iter().filter(|id| !present.contains(id)));
            }
            for problem in &client.problems {
                units.push(&problem.ids);
                let (there, gone): (Vec<i64>, Vec<i64>) =
                    problem.ids.iter().partition(|id| present.contains(id));
                match problem.fate {
                    Fate::NotExecuted => verdict.denied.extend(there),
                    Fate::Unknown => {
                        verdict.unknown_present += there.len();
                        verdict.unknown_absent += gone.len();
                    }
                }
            }
        }
        for ids in units {
            known.extend(ids);
            let there = ids.iter().filter(|id| present.contains(id)).count();
            if there != 0 && there != ids.len() {
                verdict.torn.push(ids.to_vec());
            }
        }
        verdict.strange = present.difference(&known).copied().collect();
        verdict
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<14}{:>8}{:>9}{:>9}{:>9}{:>13}{:>10}{:>8}{:>12}{:>7}",
            "kind",
            "clients",
            "units",
            "p50 ms",
            "p99 ms",
            "longest gap",
            "at",
            "errors",
            "lost conns",
            "stale"
        )?;
        for kind in [Kind::Writer, Kind::Transaction, Kind::Reader, Kind::Reconnecting] {
            let of_kind = || self.clients.iter().filter(|client| client.kind == kind);
            let mut latencies: Vec<Duration> =
                of_kind().flat_map(|client| client.latencies.iter().copied()).collect();
            latencies.sort_unstable();
            let Some(gap) = of_kind().map(|client| client.longest_gap).max() else { continue };
            writeln!(
                f,
                "{:<14}{:>8}{:>9}{:>9.1}{:>9.1}{:>10.0} ms{:>8.1} s{:>8}{:>12}{:>7}",
                kind,
                of_kind().count(),
                latencies.len(),
                quantile_ms(&latencies, 0.5),
                quantile_ms(&latencies, 0.99),
                gap.length.as_secs_f64() * 1e3,
                gap.at.as_secs_f64(),
                of_kind().map(ClientReport::errors).sum::<usize>(),
                of_kind().map(ClientReport::lost_connections).sum::<usize>(),
                of_kind().map(|client| client.stale_reads.len()).sum::<usize>(),
            )?;
        }
        // One line for each sort of failure, with its first text.
        let mut sorts: BTreeMap<(&str, Doing, Kind), (usize, &Problem)> = BTreeMap::new();
        for (client, problem) in self.problems() {
            let code = problem.sqlstate.as_deref().unwrap_or("-----");
            sorts.entry((code, problem.doing, client.kind)).or_insert((0, problem)).0 += 1;
        }
        for ((code, doing, kind), (count, first)) in sorts {
            let at = first.at.as_secs_f64();
            writeln!(
                f,
                "  {count:>5} x {code} {kind} in {doing:?}, first at {at:.2} s: {}",
                first.message
            )?;
        }
        write!(f, "{} units in {:.1} s", self.units(), self.lasted.as_secs_f64())
    }
}

/// The value below which `part` of the sorted values lie, in milliseconds.
fn quantile_ms(sorted: &[Duration], part: f64) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index into a list that fits in memory"
    )]
    let index = (sorted.len() as f64 * part) as usize;
    sorted.get(index).map_or(0.0, |value| value.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests;
