//! Decides which sessions wait while a group of a Citus cluster has no primary: pure.
//!
//! A session on the coordinator or on a worker may reach any group, and Citus answers at once with an
//! error of its own when it cannot connect. So as long as one group has no primary that accepts writes
//! *and* that `pg_dist_node` names, nobody starts a transaction on any of them. Nor before what the last
//! primary has left prepared is ended: Citus acknowledges a distributed transaction that a participant
//! lost before its second phase, and whoever reads then does not see it. What runs already
//! runs on; sessions on standbys are not concerned.
//!
//! ```text
//!          nobody serves               serves, the coordinator knows it
//! (none) ───────────────► Away ──────────────────────────► Spreading ──► (none)
//!   ▲                      │  nobody again ▲─────────────────┘ │  every node knows it
//!   │  it is right again   ▼  patience                         ▼ patience
//!   └────────────────── GivenUp ◄──────────────────────────────┘
//! ```
//! An outage begins only with a primary that is lost, never with metadata that differ: those are the
//! agents' to repair while everybody works. It ends by our own clock like every hold: a group that
//! stays away does not keep the others from working, and what reaches it gets Citus's error. A planned
//! switchover is [`crate::waiting::hold`]'s business, from its switch to its end.
//!
//! A plain cluster has no outages: its sessions wait for their own primary and nothing else.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kornak_cluster::topology::Heard;
use kornak_cluster::{GroupId, HandoverPhase, Moment, Topology};

use crate::cluster::standing::{Proof, Standings, Term, Why};
use crate::waiting::gate::Sides;

/// The facts at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    pub cluster: &'a Topology,
    pub standings: &'a Standings,
    /// How long one outage may hold anybody.
    pub patience: Duration,
}

/// A change that the log tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// New transactions wait.
    Began { group: GroupId, why: Why },
    /// Sessions on the coordinator continue, after they were held this long.
    Spreads { group: GroupId, held: Duration },
    /// All sessions may start transactions again.
    Ended { group: GroupId, held: Duration },
    /// Sessions continue: the group left the cluster, or no member is left that could lead it.
    Gone { group: GroupId, held: Duration },
    /// Patience ran out: sessions continue although the group has no primary.
    GivenUp { group: GroupId, held: Duration },
}

/// One group's outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outage {
    Away {
        since: Moment,
        until: Moment,
    },
    /// Workers do not all know the new primary yet.
    Spreading {
        since: Moment,
        until: Moment,
    },
    GivenUp,
}

/// How a group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Health {
    Nobody(Why),
    /// The group's primary accepts writes, and has transactions of its predecessor that nobody has
    /// ended.
    Unfinished,
    /// The group's primary accepts writes, and so far it is registered.
    Serves(Heard),
}

/// All outages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outages {
    open: BTreeMap<GroupId, Outage>,
    /// The term in which each group was last found right.
    right: BTreeMap<GroupId, Term>,
}

impl Outages {
    /// The sides that have to wait.
    pub fn closed(&self) -> Sides {
        let of = |outage: &Outage| match outage {
            Outage::Away { .. } => Sides::REACHING,
            Outage::Spreading { .. } => Sides::WORKERS,
            Outage::GivenUp => Sides::NONE,
        };
        self.open.values().map(of).fold(Sides::NONE, Sides::union)
    }

    /// Groups for which somebody waits.
    pub fn groups(&self) -> impl Iterator<Item = GroupId> + '_ {
        let held = |(_, outage): &(&GroupId, &Outage)| **outage != Outage::GivenUp;
        self.open.iter().filter(held).map(|(group, _)| *group)
    }

    /// When to look again even if nothing changes.
    pub fn deadline(&self) -> Option<Moment> {
        let until = |outage: &Outage| match outage {
            Outage::Away { until, .. } | Outage::Spreading { until, .. } => Some(*until),
            Outage::GivenUp => None,
        };
        self.open.values().filter_map(until).min()
    }

    /// Looks at the facts and moves on. Asking twice with the same facts changes nothing.
    pub fn on(&mut self, facts: &Facts<'_>, now: Moment, events: &mut Vec<Event>) {
        let groups: BTreeSet<GroupId> = concerned(facts).collect();
        let gone: Vec<GroupId> =
            self.open.keys().filter(|group| !groups.contains(group)).copied().collect();
        for group in gone {
            if let Some(held) = self.end(group, now) {
                events.push(Event::Gone { group, held });
            }
        }
        for group in groups {
            self.look(group, facts, now, events);
        }
    }

    fn look(&mut self, group: GroupId, facts: &Facts<'_>, now: Moment, events: &mut Vec<Event>) {
        let term = facts.standings.term(group);
        let health = match health(facts, group) {
            // A connection that broke, and the same run of the same server is there: nothing has changed.
            Health::Serves(_) if self.right.get(&group) == Some(&term) => {
                Health::Serves(Heard::Everywhere)
            }
            other => other,
        };
        let Some(outage) = self.open.get(&group).copied() else {
            // Another primary may have been proven before we looked: it is a stranger to the rows.
            let replaced = self.right.get(&group).is_some_and(|known| *known != term);
            let why = match health {
                _ if switches(facts.cluster, group) => None,
                Health::Nobody(why) => Some(why),
                Health::Serves(Heard::Everywhere) => None,
                Health::Serves(_) | Health::Unfinished => replaced.then_some(Why::Unproven),
            };
            match why {
                Some(why) => {
                    let until = now + facts.patience;
                    self.open.insert(group, Outage::Away { since: now, until });
                    events.push(Event::Began { group, why });
                    self.look(group, facts, now, events);
                }
                // Whether the rows follow is the candidate's care only once it has the record: Patroni's
                // does not take it.
                None if !stops(facts.cluster, group) => drop(self.right.insert(group, term)),
                None => {}
            }
            return;
        };
        match (outage, health) {
            (_, Health::Serves(Heard::Everywhere)) => {
                self.right.insert(group, term);
                if let Some(held) = self.end(group, now) {
                    events.push(Event::Ended { group, held });
                }
            }
            (Outage::GivenUp, _) => {}
            (Outage::Away { since, until } | Outage::Spreading { since, until }, _)
                if now >= until =>
            {
                self.open.insert(group, Outage::GivenUp);
                events.push(Event::GivenUp { group, held: now.since(since) });
            }
            (Outage::Away { since, until }, Health::Serves(Heard::Coordinator)) => {
                self.open.insert(group, Outage::Spreading { since, until });
                events.push(Event::Spreads { group, held: now.since(since) });
            }
            (Outage::Spreading { .. }, Health::Nobody(why)) => {
                let until = now + facts.patience;
                self.open.insert(group, Outage::Away { since: now, until });
                events.push(Event::Began { group, why });
            }
            (Outage::Away { .. } | Outage::Spreading { .. }, _) => {}
        }
    }

    /// How long somebody waited, if anybody still does.
    fn end(&mut self, group: GroupId, now: Moment) -> Option<Duration> {
        match self.open.remove(&group)? {
            Outage::Away { since, .. } | Outage::Spreading { since, .. } => Some(now.since(since)),
            Outage::GivenUp => None,
        }
    }
}

/// Whether somebody ends this prepared transaction of Citus soon (`citus_<group where it began>_…`): that
/// group's leader, if it is Kornak's. Patroni's leave it to Citus, which looks once a minute.
pub fn is_soon_ended(cluster: &Topology, name: &str) -> bool {
    let origin = name.strip_prefix("citus_").and_then(|rest| rest.split('_').next()?.parse().ok());
    let group = origin.and_then(|number| cluster.groups.get(&GroupId(number)));
    group.is_some_and(|group| group.primary().is_none_or(|leader| leader.kornak))
}

/// Groups that sessions elsewhere may reach, and that somebody may come back to: those that are
/// registered, or, where nobody says which those are, those that have served before; but none that was
/// shut down, leader, standbys and all.
fn concerned<'a>(facts: &Facts<'a>) -> impl Iterator<Item = GroupId> + 'a {
    let (cluster, standings) = (facts.cluster, facts.standings);
    let is_citus = cluster.groups.len() > 1;
    let reached = move |group: &GroupId| match &cluster.registered {
        Some(registered) => registered.contains(group),
        None => standings.proof(*group) != Proof::NONE,
    };
    let manned = move |group: &GroupId| {
        let group = cluster.groups.get(group);
        group.is_some_and(|group| group.leader.is_some() || !group.nodes.is_empty())
    };
    let groups = cluster.groups.keys().copied();
    groups.filter(move |group| is_citus && manned(group) && reached(group))
}

fn health(facts: &Facts<'_>, group: GroupId) -> Health {
    let serving = match facts.standings.serving(group) {
        Ok(serving) => serving,
        Err(why) => return Health::Nobody(why),
    };
    if !serving.unfinished.is_empty() {
        return Health::Unfinished;
    }
    let others_away = |other: GroupId| other != group && facts.standings.serving(other).is_err();
    Health::Serves(facts.cluster.heard_of(group, &serving.node, others_away))
}

/// Whether a planned switchover of the group is past its drain.
fn switches(cluster: &Topology, group: GroupId) -> bool {
    let taken =
        matches!(phase(cluster, group), Some(HandoverPhase::Promote | HandoverPhase::Settle));
    taken || stops(cluster, group)
}

/// Whether the former leader stops, and nobody has taken its place.
fn stops(cluster: &Topology, group: GroupId) -> bool {
    phase(cluster, group) == Some(HandoverPhase::Switch)
}

fn phase(cluster: &Topology, group: GroupId) -> Option<HandoverPhase> {
    let record = cluster.handover.as_ref().filter(|record| record.is_understood());
    record.filter(|record| record.group == Some(group)).map(|record| record.phase)
}
