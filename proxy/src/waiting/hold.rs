//! Decides when sessions wait for a planned handover: pure, from the state of the store and of the sessions.
//!
//! ```text
//!          drain                 nobody inside: acknowledge
//! Open ───────────► Draining ──────────────┐
//!  ▲ ▲ ▲              │  │  ▲──────────────┘
//!  │ │ └ prepare, gone┘  │ max_hold + 300 ms by our own clock
//!  │ │                   ▼
//!  │ └── prepare, gone  Released (this attempt does not close the gate again)
//!  │                     │ switch
//!  │                     ▼
//!  └─ proven, deadline  Switching: connections to the leader are gone ([`crate::background::prover`] withdrew it)
//!  └─ gone, deadline ─  Settling: (Citus) everybody but the sessions on workers goes on
//! ```
//! Once the new leader is proven, those who listened on the old one are waited for, half a second at most.
//! The gate is a courtesy with a deadline, never a lock: whatever happens to the record, the store
//! or the leader, it opens again by our own clock (docs/safety.md A5).

use std::time::Duration;

use kornak_cluster::{Epoch, Handover, HandoverPhase, Moment};

use crate::cluster::standing::Proof;

/// How long we hold beyond what the record allows: the leader counts from before it wrote the record
/// and decides before `max_hold` is over, so its word has this long to reach us.
const GRACE: Duration = Duration::from_millis(300);

/// How long a candidate may take to become writable (docs/safety.md A6), and the old leader to notice.
const PROMOTION: Duration = Duration::from_secs(6);

/// How long everybody waits, once the new server has proven itself, for those who listened on the old
/// one to listen there: each has to log in and say so, most have logged in before.
const LISTEN_PATIENCE: Duration = Duration::from_millis(500);

/// Which drain of which handover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    pub id: String,
    pub number: u32,
}

/// The reason for which the gate is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Open,
    Draining {
        attempt: Attempt,
        since: Moment,
        until: Moment,
        acknowledged: bool,
    },
    /// `switched`: the release was from a switch that took too long, not from a drain.
    Released {
        attempt: Attempt,
        switched: bool,
    },
    Switching {
        attempt: Attempt,
        since: Moment,
        until: Moment,
        proof: Proof,
        /// A server has proven itself: for so long those who listened are waited for.
        patience: Option<Moment>,
    },
    /// In a Citus cluster: only sessions on workers wait, for their nodes to hear of the new primary.
    Settling {
        attempt: Attempt,
        since: Moment,
        until: Moment,
    },
}

/// The facts at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The record, if there is one that we understand.
    pub record: Option<&'a Handover>,
    /// Affected sessions inside the gate.
    pub inside: usize,
    /// The epoch of the server that has proven that it accepts writes, for the record's group.
    pub serving: Option<Epoch>,
    /// Number of the newest proof.
    pub proof: Proof,
    /// Sessions that listened on the old server and do not listen on the one that serves yet.
    pub to_listen: usize,
    /// The longest this proxy lets anybody be held by a drain.
    pub max_hold: Duration,
}

/// An action for the shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Close the gate for the affected sessions.
    Close,
    /// Open it; so long it was closed.
    Open(Duration),
    /// Open it, but for sessions on workers; so long it was closed for the others.
    OpenMost(Duration),
    /// Tell the leader that nobody is inside and nobody will be.
    Acknowledge(Attempt),
}

/// The hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    state: State,
}

impl Default for Hold {
    fn default() -> Self {
        Self { state: State::Open }
    }
}

impl Hold {
    /// The reason for which the gate is closed.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// When to look again even if nothing changes.
    pub fn deadline(&self) -> Option<Moment> {
        match &self.state {
            State::Switching { until, patience: Some(patience), .. } => Some(*until.min(patience)),
            State::Draining { until, .. }
            | State::Switching { until, .. }
            | State::Settling { until, .. } => Some(*until),
            State::Open | State::Released { .. } => None,
        }
    }

    /// The acknowledgement was written.
    pub fn acknowledged(&mut self, written: &Attempt) {
        if let State::Draining { attempt, acknowledged, .. } = &mut self.state
            && attempt == written
        {
            *acknowledged = true;
        }
    }

    /// Looks at the facts and moves on. Asking twice with the same facts changes nothing.
    pub fn on(&mut self, facts: &Facts<'_>, now: Moment, effects: &mut Vec<Effect>) {
        let record = facts.record.filter(|record| record.is_understood());
        match record.map(|record| (record, record.phase)) {
            Some((record, HandoverPhase::Drain)) => self.drain(record, facts, now, effects),
            Some((record, HandoverPhase::Switch)) => self.switch(record, facts, now, effects),
            Some((record, HandoverPhase::Promote)) => self.promote(record, facts, now, effects),
            Some((record, HandoverPhase::Settle)) => self.settle(record, facts, now, effects),
            Some((_, HandoverPhase::Prepare | HandoverPhase::Unknown)) | None => {
                self.resume(facts, now, effects);
            }
        }
    }

    fn drain(&mut self, record: &Handover, facts: &Facts<'_>, now: Moment, out: &mut Vec<Effect>) {
        let wanted = attempt_of(record);
        match &self.state {
            State::Released { attempt, .. } if *attempt == wanted => {}
            State::Draining { attempt, since, until, .. }
                if *attempt == wanted && now >= *until =>
            {
                out.push(Effect::Open(now.since(*since)));
                self.state = State::Released { attempt: wanted, switched: false };
            }
            State::Draining { attempt, acknowledged, .. } if *attempt == wanted => {
                // Who may let go before the leader decides must not promise to hold.
                let holds = facts.max_hold >= Duration::from_millis(record.max_hold_ms);
                if facts.inside == 0 && !acknowledged && holds {
                    out.push(Effect::Acknowledge(wanted));
                }
            }
            _ => {
                let hold = Duration::from_millis(record.max_hold_ms).min(facts.max_hold);
                let until = now + (hold + GRACE);
                out.push(Effect::Close);
                self.state =
                    State::Draining { attempt: wanted, since: now, until, acknowledged: false };
            }
        }
    }

    fn switch(&mut self, record: &Handover, facts: &Facts<'_>, now: Moment, out: &mut Vec<Effect>) {
        let wanted = attempt_of(record);
        match &self.state {
            State::Switching { since, until, .. } => {
                if now >= *until {
                    out.push(Effect::Open(now.since(*since)));
                    self.state = State::Released { attempt: wanted, switched: true };
                }
            }
            // Our patience with this switch is over; who wants a server waits for a proven one.
            State::Released { attempt, switched: true } if *attempt == wanted => {}
            before => {
                let since = match before {
                    State::Draining { since, .. } => *since,
                    _ => now,
                };
                let until = now + (Duration::from_millis(record.switch_hold_ms) + PROMOTION);
                out.push(Effect::Close);
                let proof = facts.proof;
                self.state =
                    State::Switching { attempt: wanted, since, until, proof, patience: None };
            }
        }
    }

    fn promote(
        &mut self,
        record: &Handover,
        facts: &Facts<'_>,
        now: Moment,
        out: &mut Vec<Effect>,
    ) {
        // In a Citus cluster the other nodes have to know it as well.
        let free = record.group.is_none() && self.is_free(facts, Some(record.epoch), now);
        match &self.state {
            State::Switching { since, until, .. } if now >= *until || free => {
                out.push(Effect::Open(now.since(*since)));
                self.state = State::Released { attempt: attempt_of(record), switched: true };
            }
            State::Switching { .. }
            | State::Settling { .. }
            | State::Released { .. }
            | State::Open => {}
            // We missed the switch; who serves is withdrawn by the change of the leader key.
            State::Draining { .. } => self.switch(record, facts, now, out),
        }
    }

    /// The coordinator knows its new primary, or the workers' one; workers do not yet.
    fn settle(&mut self, record: &Handover, facts: &Facts<'_>, now: Moment, out: &mut Vec<Effect>) {
        let free = self.is_free(facts, Some(record.epoch), now);
        match &self.state {
            State::Switching { since, until, .. } if now < *until && free => {
                out.push(Effect::OpenMost(now.since(*since)));
                let attempt = attempt_of(record);
                self.state = State::Settling { attempt, since: *since, until: *until };
            }
            State::Switching { since, until, .. } | State::Settling { since, until, .. }
                if now >= *until =>
            {
                out.push(Effect::Open(now.since(*since)));
                self.state = State::Released { attempt: attempt_of(record), switched: true };
            }
            State::Switching { .. }
            | State::Settling { .. }
            | State::Released { .. }
            | State::Open => {}
            State::Draining { .. } => self.switch(record, facts, now, out),
        }
    }

    /// Whether sessions may go on: a server has proven itself since the switch, or another than the
    /// former leader did, and who listened listens there, or was waited for long enough.
    fn is_free(&mut self, facts: &Facts<'_>, former: Option<Epoch>, now: Moment) -> bool {
        let State::Switching { proof, patience, .. } = &mut self.state else { return false };
        let Some(serving) = facts.serving else { return false };
        let another = former.is_some_and(|former| former != serving);
        if !another && facts.proof <= *proof {
            return false;
        }
        facts.to_listen == 0 || now >= *patience.get_or_insert(now + LISTEN_PATIENCE)
    }

    fn resume(&mut self, facts: &Facts<'_>, now: Moment, out: &mut Vec<Effect>) {
        let free = self.is_free(facts, None, now);
        match &self.state {
            State::Open => {}
            State::Released { .. } => self.state = State::Open,
            State::Draining { since, .. } | State::Settling { since, .. } => {
                out.push(Effect::Open(now.since(*since)));
                self.state = State::Open;
            }
            State::Switching { since, until, .. } => {
                if free || now >= *until {
                    out.push(Effect::Open(now.since(*since)));
                    self.state = State::Open;
                }
            }
        }
    }
}

fn attempt_of(record: &Handover) -> Attempt {
    Attempt { id: record.id.clone(), number: record.attempt }
}

#[cfg(test)]
mod tests;
