//! From whom sessions on the coordinator's standbys read the other groups of a Citus cluster: pure.
//!
//! With `citus.use_secondary_nodes=always` Citus reads from any of a group's rows for standbys and has
//! no other to turn to: one that does not run fails the statement (08006, 57P03), a group without such a
//! row every statement that needs it. In a group of two both happen at each change of its leader, until
//! the former primary follows. So such sessions wait for that, a little while, and then read from the
//! primaries until every row's server runs again.
//!
//! ```text
//!          a row's server does not run         patience, or no row is left
//! Standbys ──────────────────────────► Waiting ──────────────────────────► Primaries
//!   ▲ ▲                                   │                                  │
//!   │ └───────────────────────────────────┘       every row's server runs    │
//!   └────────────────────────────────────────────────────────────────────────┘
//! ```
//! A group that is seen for the first time is not waited for. Who reads from primaries waits with
//! everybody else while a group has none ([`crate::waiting::outage`]).
//!
//! Rows are known by what the coordinator's leader publishes. Where nobody does (Patroni's, or a release
//! that does not say where standbys are), sessions read from standbys whatever they do.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kornak_cluster::topology::Spoken;
use kornak_cluster::{GroupId, Moment, NodeRole, Topology};

use crate::waiting::gate::{Side, Sides};

/// Whom a session on a standby of the coordinator asks for what other groups hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Source {
    #[default]
    Standbys,
    Primaries,
}

/// A change that the log tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// New transactions of sessions on standbys wait for the group's.
    Began { group: GroupId },
    /// The group's standbys run; so long those sessions waited.
    Ended { group: GroupId, held: Duration },
    /// Sessions on standbys read from this group's primary from now on.
    Primaries { group: GroupId },
    /// The group is no reason for that any more.
    Standbys { group: GroupId },
}

/// How a group can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    Standbys,
    Waiting { since: Moment, until: Moment },
    Primaries,
}

/// How a group's rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rows {
    /// Each names a standby that runs.
    Running,
    /// One names a server that does not, or that leads.
    Resting,
    /// There is none, in some database.
    Missing,
}

/// All groups' readings.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Readings(BTreeMap<GroupId, Reading>);

impl Readings {
    /// Whom to ask.
    pub fn source(&self) -> Source {
        match self.0.values().any(|reading| *reading == Reading::Primaries) {
            true => Source::Primaries,
            false => Source::Standbys,
        }
    }

    /// The sides that have to wait, when groups without a primary keep `others` waiting.
    pub fn closed(&self, others: Sides) -> Sides {
        let reached = match self.source() {
            // Standbys of the coordinator follow what it knows.
            Source::Primaries => others.contains(Side::Leading),
            Source::Standbys => self.waiting().next().is_some(),
        };
        if reached { Sides::FOLLOWING } else { Sides::NONE }
    }

    /// Groups whose standbys are waited for.
    pub fn waiting(&self) -> impl Iterator<Item = GroupId> + '_ {
        let waits =
            |(_, reading): &(&GroupId, &Reading)| matches!(reading, Reading::Waiting { .. });
        self.0.iter().filter(waits).map(|(group, _)| *group)
    }

    /// Groups for whose sake everything is read from primaries.
    pub fn without_standby(&self) -> impl Iterator<Item = GroupId> + '_ {
        let is_one = |(_, reading): &(&GroupId, &Reading)| **reading == Reading::Primaries;
        self.0.iter().filter(is_one).map(|(group, _)| *group)
    }

    /// When to look again even if nothing changes.
    pub fn deadline(&self) -> Option<Moment> {
        let until = |reading: &Reading| match reading {
            Reading::Waiting { until, .. } => Some(*until),
            Reading::Standbys | Reading::Primaries => None,
        };
        self.0.values().filter_map(until).min()
    }

    /// Looks at the cluster and moves on. Asking twice at one moment changes nothing. `patience`: how
    /// long standbys are waited for.
    pub fn on(
        &mut self,
        cluster: &Topology,
        patience: Duration,
        now: Moment,
        events: &mut Vec<Event>,
    ) {
        let groups = rows(cluster);
        self.0.retain(|group, reading| {
            let stays = groups.contains_key(group);
            match reading {
                Reading::Waiting { since, .. } if !stays => {
                    events.push(Event::Ended { group: *group, held: now.since(*since) });
                }
                Reading::Primaries if !stays => events.push(Event::Standbys { group: *group }),
                _ => {}
            }
            stays
        });
        for (group, rows) in groups {
            let before = self.0.get(&group).copied();
            let reading = step(before, rows, patience, now);
            if before != Some(reading) {
                events.extend(event(group, before, reading, now));
                self.0.insert(group, reading);
            }
        }
    }
}

fn step(before: Option<Reading>, rows: Rows, patience: Duration, now: Moment) -> Reading {
    match (before, rows) {
        (_, Rows::Running) => Reading::Standbys,
        (_, Rows::Missing) | (None | Some(Reading::Primaries), Rows::Resting) => Reading::Primaries,
        (Some(Reading::Standbys), Rows::Resting) => {
            Reading::Waiting { since: now, until: now + patience }
        }
        (Some(Reading::Waiting { until, .. }), Rows::Resting) if now >= until => Reading::Primaries,
        (Some(waiting @ Reading::Waiting { .. }), Rows::Resting) => waiting,
    }
}

fn event(group: GroupId, before: Option<Reading>, reading: Reading, now: Moment) -> Option<Event> {
    match (before, reading) {
        (_, Reading::Waiting { .. }) => Some(Event::Began { group }),
        (_, Reading::Primaries) => Some(Event::Primaries { group }),
        (Some(Reading::Waiting { since, .. }), Reading::Standbys) => {
            Some(Event::Ended { group, held: now.since(since) })
        }
        (Some(Reading::Primaries), Reading::Standbys) => Some(Event::Standbys { group }),
        (Some(Reading::Standbys) | None, Reading::Standbys) => None,
    }
}

/// How each registered group's rows are; of none if nobody says.
fn rows(cluster: &Topology) -> BTreeMap<GroupId, Rows> {
    let registration = match cluster.spoken() {
        Spoken::Nobody => return BTreeMap::new(),
        // Standbys are where they were when the coordinator lost its leader.
        Spoken::Formerly(registration) | Spoken::Now(registration) => registration,
    };
    let databases = registration.databases.values();
    let told: Option<Vec<_>> = databases.map(|it| it.secondaries.as_ref()).collect();
    let Some(told) = told else { return BTreeMap::new() };
    let of = |group: GroupId| {
        let rows = told.iter().map(|rows| rows_of(cluster, group, rows.get(&group)));
        (group, rows.max().unwrap_or(Rows::Missing))
    };
    registration.groups().into_iter().map(of).collect()
}

fn rows_of(cluster: &Topology, group: GroupId, rows: Option<&BTreeSet<String>>) -> Rows {
    let Some(rows) = rows.filter(|rows| !rows.is_empty()) else { return Rows::Missing };
    let runs = |address: &String| {
        let nodes = cluster.groups.get(&group).into_iter().flat_map(|group| group.nodes.values());
        let mut nodes = nodes.filter(|node| format!("{}:{}", node.host, node.port) == *address);
        nodes.any(|node| node.running && node.role == NodeRole::Standby && !node.says_primary)
    };
    // What the coordinator has itself its standby reads from its own disk.
    match group == GroupId::COORDINATOR || rows.iter().all(runs) {
        true => Rows::Running,
        false => Rows::Resting,
    }
}
