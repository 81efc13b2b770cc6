//! Judges the history of clients: pure.
//!
//! Clients append numbers to lists and read the lists back, as the Elle checker's workload does (Kingsbury
//! and Alvaro: Elle, 2020). Every number is appended at most once, so a list tells its own history: a read
//! has to be a prefix of the list as it is at the end, and who read or wrote next to whom is known. All
//! transactions are serializable, so the order that results from it must have no cycle.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use petgraph::algo::kosaraju_scc;
use petgraph::graph::{DiGraph, NodeIndex};

/// Key of a list.
pub type Key = i64;

/// A number in a list; no two appends share one.
pub type Number = i64;

/// One statement of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Append(Key, Number),
    /// The list that was seen; `None` if the unit ended before it was.
    Read(Key, Option<Vec<Number>>),
}

/// The outcome that the client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Acknowledged,
    /// An error that says that nothing of it was committed.
    Denied,
    Unknown,
}

/// One autocommit statement or one transaction.
#[derive(Debug, Clone)]
pub struct Unit {
    /// When the client sent its first statement, since the run began.
    pub began: Duration,
    /// When the client had the last answer.
    pub ended: Duration,
    pub steps: Vec<Step>,
    pub outcome: Outcome,
}

/// The lists as they are at the end.
pub type Lists = BTreeMap<Key, Vec<Number>>;

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Anomaly {
    /// An append was acknowledged and is not there.
    Lost { key: Key, number: Number, at: Duration },
    /// An append is there more than once.
    Duplicated { key: Key, number: Number },
    /// An append is there although its client was told that it was not executed.
    Executed { key: Key, number: Number, at: Duration },
    /// A number is there that nobody appended.
    Strange { key: Key, number: Number },
    /// A read saw a number that is not there at the end.
    TakenBack { key: Key, number: Number, at: Duration },
    /// A read saw the numbers in another order than the end shows.
    Reordered { key: Key, at: Duration },
    /// A read lacks a number whose append had been acknowledged before the read began.
    Stale { key: Key, number: Number, at: Duration },
    /// Transactions that depend on each other in a circle; so many of them.
    Cycle { units: usize },
}

impl Anomaly {
    /// Name of the kind, for the table.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Lost { .. } => "lost",
            Self::Duplicated { .. } => "duplicated",
            Self::Executed { .. } => "executed though denied",
            Self::Strange { .. } => "strange",
            Self::TakenBack { .. } => "read, then taken back",
            Self::Reordered { .. } => "reordered",
            Self::Stale { .. } => "stale read",
            Self::Cycle { .. } => "cycle",
        }
    }

    /// Whether asynchronous replication allows it when a primary is lost.
    pub fn is_loss(&self) -> bool {
        !matches!(self, Self::Duplicated { .. } | Self::Strange { .. } | Self::Executed { .. })
    }
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Looks for every anomaly.
pub fn check(units: &[Unit], lists: &Lists) -> Vec<Anomaly> {
    let places = Places::of(lists);
    let mut found = places.repeated.clone();
    let mut known: HashSet<Number> = HashSet::new();
    for unit in units {
        let at = unit.ended;
        for step in &unit.steps {
            if let Step::Append(key, number) = *step {
                known.insert(number);
                let there = places.of.contains_key(&(key, number));
                let anomaly = match unit.outcome {
                    Outcome::Acknowledged if !there => Some(Anomaly::Lost { key, number, at }),
                    Outcome::Denied if there => Some(Anomaly::Executed { key, number, at }),
                    _ => None,
                };
                found.extend(anomaly);
            }
        }
    }
    for (&key, list) in lists {
        let strange = list.iter().filter(|number| !known.contains(number));
        found.extend(strange.map(|&number| Anomaly::Strange { key, number }));
    }
    let acknowledged = Acknowledged::of(units, &places);
    for unit in units.iter().filter(|unit| unit.outcome == Outcome::Acknowledged) {
        found.extend(reads(unit).filter_map(|(position, key, seen)| {
            // A transaction sees what it has appended itself.
            let own = own_appends(unit, key, position);
            judge_read(unit.began, key, seen, &own, lists)
                .or_else(|| acknowledged.missing_from(key, seen, unit.began, lists))
                .map(|anomaly| with_time(anomaly, unit.ended))
        }));
    }
    found.extend(cycles(units, lists, &places));
    found
}

fn with_time(anomaly: Anomaly, now: Duration) -> Anomaly {
    match anomaly {
        Anomaly::Stale { key, number, .. } => Anomaly::Stale { key, number, at: now },
        other => other,
    }
}

/// The reads of a unit with their positions in it.
fn reads(unit: &Unit) -> impl Iterator<Item = (usize, Key, &[Number])> {
    unit.steps.iter().enumerate().filter_map(|(position, step)| match step {
        Step::Read(key, Some(seen)) => Some((position, *key, seen.as_slice())),
        _ => None,
    })
}

fn own_appends(unit: &Unit, key: Key, before: usize) -> Vec<Number> {
    let steps = unit.steps.iter().take(before);
    steps
        .filter_map(|step| match step {
            Step::Append(of, number) if *of == key => Some(*number),
            _ => None,
        })
        .collect()
}

/// A read has to be a prefix of the final list.
fn judge_read(
    at: Duration,
    key: Key,
    seen: &[Number],
    own: &[Number],
    lists: &Lists,
) -> Option<Anomaly> {
    let list = lists.get(&key).map_or(&[][..], Vec::as_slice);
    if list.starts_with(seen) {
        return None;
    }
    let gone = seen.iter().find(|number| !list.contains(number));
    if let Some(&number) = gone {
        // The loss of the unit's own append is counted where it was appended.
        return (!own.contains(&number)).then_some(Anomaly::TakenBack { key, number, at });
    }
    Some(Anomaly::Reordered { key, at })
}

/// Where each number is.
struct Places {
    of: HashMap<(Key, Number), usize>,
    repeated: Vec<Anomaly>,
}

impl Places {
    fn of(lists: &Lists) -> Self {
        let mut places = Self { of: HashMap::new(), repeated: Vec::new() };
        for (&key, list) in lists {
            for (position, &number) in list.iter().enumerate() {
                if places.of.insert((key, number), position).is_some() {
                    places.repeated.push(Anomaly::Duplicated { key, number });
                }
            }
        }
        places
    }
}

/// How long each list was at least, by what had been acknowledged when.
struct Acknowledged {
    /// For each list: times of acknowledgement in their order, each with the length that the list had then.
    lengths: HashMap<Key, Vec<(Duration, usize)>>,
}

impl Acknowledged {
    fn of(units: &[Unit], places: &Places) -> Self {
        let mut lengths: HashMap<Key, Vec<(Duration, usize)>> = HashMap::new();
        for unit in units.iter().filter(|unit| unit.outcome == Outcome::Acknowledged) {
            for step in &unit.steps {
                if let Step::Append(key, number) = step
                    && let Some(position) = places.of.get(&(*key, *number))
                {
                    lengths.entry(*key).or_default().push((unit.ended, position + 1));
                }
            }
        }
        for list in lengths.values_mut() {
            list.sort_unstable();
            let mut longest = 0;
            for (_, length) in list {
                longest = longest.max(*length);
                *length = longest;
            }
        }
        Self { lengths }
    }

    fn missing_from(
        &self,
        key: Key,
        seen: &[Number],
        began: Duration,
        lists: &Lists,
    ) -> Option<Anomaly> {
        let list = self.lengths.get(&key)?;
        let before = list.partition_point(|(at, _)| *at < began);
        let (_, length) = list.get(before.checked_sub(1)?)?;
        let number = *lists.get(&key)?.get(*length - 1)?;
        (seen.len() < *length).then_some(Anomaly::Stale { key, number, at: began })
    }
}

/// Write-write, write-read and read-write dependencies between transactions that were committed.
fn cycles(units: &[Unit], lists: &Lists, places: &Places) -> Vec<Anomaly> {
    let mut graph: DiGraph<(), ()> = DiGraph::new();
    let nodes: Vec<NodeIndex> = units.iter().map(|_| graph.add_node(())).collect();
    let mut writer: HashMap<(Key, Number), NodeIndex> = HashMap::new();
    for (unit, &node) in units.iter().zip(&nodes) {
        for step in &unit.steps {
            if let Step::Append(key, number) = step
                && places.of.contains_key(&(*key, *number))
            {
                writer.insert((*key, *number), node);
            }
        }
    }
    let mut link = |from: Option<&NodeIndex>, to: Option<&NodeIndex>| {
        if let (Some(&from), Some(&to)) = (from, to)
            && from != to
        {
            graph.add_edge(from, to, ());
        }
    };
    for (&key, list) in lists {
        for pair in list.windows(2) {
            if let [first, second] = *pair {
                link(writer.get(&(key, first)), writer.get(&(key, second)));
            }
        }
    }
    let committed = units.iter().zip(&nodes);
    for (unit, node) in committed.filter(|(unit, _)| unit.outcome == Outcome::Acknowledged) {
        for (_, key, seen) in reads(unit) {
            let list = lists.get(&key).map_or(&[][..], Vec::as_slice);
            if !list.starts_with(seen) {
                continue;
            }
            if let Some(last) = seen.last() {
                link(writer.get(&(key, *last)), Some(node));
            }
            if let Some(next) = list.get(seen.len()) {
                link(Some(node), writer.get(&(key, *next)));
            }
        }
    }
    let circles = kosaraju_scc(&graph).into_iter().filter(|circle| circle.len() > 1);
    circles.map(|circle| Anomaly::Cycle { units: circle.len() }).collect()
}

#[cfg(test)]
mod tests;
