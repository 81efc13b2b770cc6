//! Decides which sessions wait, for all reasons together: pure.
//!
//! A planned handover ([`super::hold`]), a group without a primary ([`super::outage`]) and a standby that
//! does not run ([`super::read_source`]) each keep sessions waiting, by rules of their own. [`Waits`] asks
//! the three of them about the same facts and joins their answers: one set of sides, one time to look again.
//!
//! Not here: closing the gate, writing the acknowledgement, telling the log
//! ([`crate::background::handover`]).

#[cfg(test)]
mod tests;

use std::time::Duration;

use kornak_cluster::{GroupId, Moment, Topology};

use crate::cluster::standing::Standings;
use crate::waiting::gate::Sides;
use crate::waiting::hold::{self, Attempt, Hold, State};
use crate::waiting::outage::{self, Outages};
use crate::waiting::read_source::{self, Readings, Source};

/// How long sessions on standbys wait for another group's standby, before they read from its primary:
/// a former primary that was stopped in order follows within two seconds, one that crashed takes three.
const STANDBY_PATIENCE: Duration = Duration::from_secs(5);

/// The share of a session's own patience after which a group that stays away holds nobody any more: whoever
/// waits for another group goes on, and is not refused.
const OUTAGE_SHARE: f32 = 0.95;

/// The facts at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    pub cluster: &'a Topology,
    pub standings: &'a Standings,
    /// Sessions of the [`affected`] sides inside the gate.
    pub inside: usize,
    /// Sessions that listened on the server named by [`Waits::former_leader`] and listen nowhere else yet.
    pub to_listen: usize,
    /// The longest this proxy lets anybody be held by a drain.
    pub max_hold: Duration,
    /// How long a session waits for a server.
    pub hold_timeout: Duration,
}

/// The sides that wait, and the steps that the shell takes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// Sessions on these sides wait; the others start transactions.
    pub closed: Sides,
    /// Whom sessions on standbys ask for what other groups hold.
    pub source: Source,
    /// Nobody is inside and nobody will be: the leader is to hear it.
    pub acknowledge: Option<Attempt>,
    /// A handover has closed the gate just now: who is inside is counted once more.
    pub look_again: bool,
    /// When to look again even if nothing changes.
    pub deadline: Option<Moment>,
}

/// A change that the log and the metrics tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The handover holds nobody any more.
    Opened {
        held: Duration,
    },
    /// The handover holds sessions on workers only from now on.
    OnlyWorkersWait {
        held: Duration,
    },
    Outage(outage::Event),
    Reading(read_source::Event),
}

/// The reasons for which sessions wait.
#[derive(Debug, Clone, Default)]
pub struct Waits {
    hold: Hold,
    /// The sides that the handover holds.
    held: Sides,
    /// Group and leader of the handover that is under way, or was the last.
    group: GroupId,
    former: String,
    outages: Outages,
    readings: Readings,
}

/// The sides that a handover holds: in a Citus cluster any session may reach any node.
pub fn affected(cluster: &Topology) -> Sides {
    if cluster.groups.len() > 1 { Sides::ALL } else { Sides::LEADING }
}

impl Waits {
    /// Looks at the facts and moves on. Asking twice with the same facts changes nothing.
    pub fn on(&mut self, facts: &Facts<'_>, now: Moment, events: &mut Vec<Event>) -> Decision {
        let mut decision = Decision::default();
        self.hold_for_handover(facts, now, &mut decision, events);
        let mut told = Vec::new();
        let patience = facts.hold_timeout.mul_f32(OUTAGE_SHARE);
        let (cluster, standings) = (facts.cluster, facts.standings);
        self.outages.on(&outage::Facts { cluster, standings, patience }, now, &mut told);
        events.extend(told.into_iter().map(Event::Outage));
        let mut told = Vec::new();
        self.readings.on(cluster, STANDBY_PATIENCE.min(patience), now, &mut told);
        events.extend(told.into_iter().map(Event::Reading));
        let away = self.outages.closed();
        decision.closed = self.held.union(away).union(self.readings.closed(away));
        decision.source = self.readings.source();
        let deadlines = [self.hold.deadline(), self.outages.deadline(), self.readings.deadline()];
        decision.deadline = deadlines.into_iter().flatten().min();
        decision
    }

    fn hold_for_handover(
        &mut self,
        facts: &Facts<'_>,
        now: Moment,
        decision: &mut Decision,
        events: &mut Vec<Event>,
    ) {
        let record = facts.cluster.handover.as_ref();
        if let Some(record) = record {
            self.group = record.group.unwrap_or(GroupId::COORDINATOR);
            self.former.clone_from(&record.leader);
        }
        let (standings, group) = (facts.standings, self.group);
        let seen = hold::Facts {
            record,
            inside: facts.inside,
            serving: standings.serving(group).ok().map(|serving| serving.epoch),
            proof: standings.proof(group),
            to_listen: facts.to_listen,
            max_hold: facts.max_hold,
        };
        let mut effects = Vec::new();
        self.hold.on(&seen, now, &mut effects);
        for effect in effects {
            match effect {
                hold::Effect::Close => {
                    self.held = affected(facts.cluster);
                    decision.look_again = true;
                }
                hold::Effect::Open(held) => {
                    self.held = Sides::NONE;
                    events.push(Event::Opened { held });
                }
                hold::Effect::OpenMost(held) => {
                    self.held = Sides::WORKERS;
                    events.push(Event::OnlyWorkersWait { held });
                }
                hold::Effect::Acknowledge(attempt) => decision.acknowledge = Some(attempt),
            }
        }
    }

    /// The acknowledgement was written.
    pub fn acknowledged(&mut self, written: &Attempt) {
        self.hold.acknowledged(written);
    }

    /// The leader that is being replaced and its group, while sessions wait for the one after it.
    pub fn former_leader<'a>(&'a self, cluster: &'a Topology) -> Option<(&'a str, GroupId)> {
        if !matches!(self.hold.state(), State::Switching { .. }) {
            return None;
        }
        Some(match &cluster.handover {
            Some(record) => (&record.leader, record.group.unwrap_or(GroupId::COORDINATOR)),
            None => (&self.former, self.group),
        })
    }

    /// Whether a drain waits for the sessions that are inside.
    pub fn is_draining(&self) -> bool {
        matches!(self.hold.state(), State::Draining { acknowledged: false, .. })
    }

    /// How far the handover is.
    pub fn handover(&self) -> &State {
        self.hold.state()
    }

    /// The groups without a primary.
    pub fn outages(&self) -> &Outages {
        &self.outages
    }

    /// How the groups are read by sessions on standbys.
    pub fn readings(&self) -> &Readings {
        &self.readings
    }
}
