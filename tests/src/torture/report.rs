//! The results of a run, as a table.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::Mode;
use super::clients::Seen;
use super::history::{Anomaly, Lists, Outcome, Step};
use super::usage::Usage;
use crate::run::watch::Verdict;

/// Anomalies that are printed one by one.
const SHOWN: usize = 20;

/// Everything that was seen.
#[derive(Debug)]
pub struct Report {
    /// Faults by kind.
    pub counts: BTreeMap<&'static str, usize>,
    pub seen: Seen,
    pub anomalies: Vec<Anomaly>,
    pub usage: Usage,
    /// Whether every node has returned without help, or what was seen instead.
    pub returned: Result<(), String>,
    /// Time from the last repair until then.
    pub took: Duration,
    /// The servers that were writable, and when.
    pub writable: Verdict,
    pub lists: Lists,
}

impl Report {
    /// Whether the cluster kept its promises. Without synchronous replication a lost primary may take
    /// commits with it; nothing may ever be executed twice.
    pub fn is_good(&self, mode: Mode) -> bool {
        let allowed = |anomaly: &Anomaly| mode == Mode::Off && anomaly.is_loss();
        self.returned.is_ok() && self.anomalies.iter().all(allowed)
    }

    fn appends(&self, outcome: Outcome) -> usize {
        let units = self.seen.units.iter().filter(|unit| unit.outcome == outcome);
        let steps = units.flat_map(|unit| &unit.steps);
        steps.filter(|step| matches!(step, Step::Append(..))).count()
    }

    fn anomalies_of(&self, kind: &str) -> usize {
        self.anomalies.iter().filter(|anomaly| anomaly.kind() == kind).count()
    }
}

const KINDS: [&str; 8] = [
    "lost",
    "duplicated",
    "executed though denied",
    "strange",
    "read, then taken back",
    "reordered",
    "stale read",
    "cycle",
];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: usize = self.counts.values().sum();
        writeln!(f, "\n{all} faults:")?;
        for (kind, count) in &self.counts {
            writeln!(f, "  {kind:<24}{count:>6}")?;
        }
        let failed: usize = self.seen.errors.values().map(|(count, _)| count).sum();
        let (gap, at) = self.seen.longest_gap;
        writeln!(
            f,
            "{} units, {} connections, {} conflicts of serializable transactions, {failed} errors; \
             longest gap of a client {:.1} s, at {:.1} s",
            self.seen.units.len(),
            self.seen.connections,
            self.seen.conflicts,
            gap.as_secs_f64(),
            at.as_secs_f64(),
        )?;
        for (code, (count, text)) in &self.seen.errors {
            writeln!(f, "  {count:>6} x {code}: {text}")?;
        }
        let there: usize = self.lists.values().map(Vec::len).sum();
        writeln!(
            f,
            "appends: {} acknowledged, {} denied, {} of unknown outcome; {there} are there",
            self.appends(Outcome::Acknowledged),
            self.appends(Outcome::Denied),
            self.appends(Outcome::Unknown),
        )?;
        for kind in KINDS {
            writeln!(f, "  {kind:<24}{:>6}", self.anomalies_of(kind))?;
        }
        for anomaly in self.anomalies.iter().take(SHOWN) {
            writeln!(f, "    {anomaly}")?;
        }
        let overlaps = self.writable.overlaps();
        writeln!(f, "servers seen writable at the same time: {}", overlaps.len())?;
        for overlap in overlaps.iter().take(SHOWN) {
            writeln!(f, "    {overlap}")?;
        }
        match &self.returned {
            Ok(()) => writeln!(f, "every node returned within {:.1} s", self.took.as_secs_f64())?,
            Err(seen) => writeln!(f, "NOT EVERY NODE RETURNED: {seen}")?,
        }
        write!(f, "{}", self.usage)
    }
}
