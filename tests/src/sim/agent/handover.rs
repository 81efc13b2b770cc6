//! The planned handover on the old leader's side, as `kornak_agent::handover` does it, with the real
//! judgements of `ha::switchover`.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::select;
use kornak_agent::ha::Server;
use kornak_agent::ha::switchover::{self, Busy, Gate};
use kornak_cluster::{Handover, HandoverPhase, Lsn, SyncMode, SyncState};
use kornak_dcs::{Compare, LeaseId, Op, Txn};

use super::{Agent, jobs, keeper, rest};
use crate::sim::host::index_of;
use crate::sim::scenario::Mutation;
use crate::sim::store;

/// Lease of the record, and of the leader key from `prepare` on.
pub const SHORT_LEASE: Duration = Duration::from_secs(5);

/// For the candidate to become writable.
pub const PROMOTE_LIMIT: Duration = Duration::from_secs(5);

/// Clients are held no longer than this by one drain.
pub const MAX_HOLD: Duration = Duration::from_secs(1);

/// A proxy that hears nothing more resumes so long after [`MAX_HOLD`].
pub const SELF_RELEASE: Duration = Duration::from_millis(300);

const SWITCH_HOLD: Duration = Duration::from_secs(5);
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(1);
const DRAINS: u32 = 3;

/// The handover could not go on; whatever runs goes on running.
struct Failed;

struct Run {
    agent: Rc<Agent>,
    record: Handover,
    lease: LeaseId,
    revision: u64,
    keep_alive: crate::sim::exec::TaskId,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.agent.w.exec.abort(self.keep_alive);
    }
}

/// A record as it is stored.
pub fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("records are plain data with string keys")
}

/// Hands the leadership over.
pub async fn hand_over(agent: Rc<Agent>, asked: Option<String>) {
    let Server::Primary(facts) = agent.look_again() else { return };
    let cluster = agent.cluster();
    let chosen =
        switchover::candidate(agent.name(), &cluster, &facts.standbys, facts.lsn, asked.as_deref());
    let Ok(candidate) = chosen else { return };
    let Some(mut run) = begin(&agent, &candidate).await else { return };
    agent.say(format_args!("HANDOVER to {candidate} begins"));
    let Some(index) = index_of(&agent.w, &candidate) else { return };
    rest::prepare_candidate(&agent, index).await;
    let drained = match keeper::move_to(&agent, SHORT_LEASE).await {
        Ok(()) => run.drain().await,
        Err(_) => Err(Failed),
    };
    if drained.is_err() {
        agent.say(format_args!("handover given up before the switch"));
        return run.abandon().await;
    }
    run.switch(&candidate, index).await;
}

async fn begin(agent: &Rc<Agent>, candidate: &str) -> Option<Run> {
    let epoch = agent.held.get()?.epoch;
    let granted = store::grant(&agent.w, agent.end(), SHORT_LEASE).await.ok()?;
    let record = Handover {
        v: 1,
        id: format!("{:08x}", agent.w.rng.next() >> 32),
        attempt: 1,
        phase: HandoverPhase::Prepare,
        group: None,
        leader: agent.name().to_owned(),
        candidate: Some(candidate.to_owned()),
        epoch,
        max_hold_ms: 1000,
        switch_hold_ms: 5000,
        wal_end: None,
    };
    let key = agent.w.store.keys.handover();
    let txn = Txn::just(Op::put_leased(&key, json(&record), granted.lease))
        .when(Compare::absent(&key))
        .and(Op::DeletePrefix { prefix: agent.w.store.keys.acks() });
    let outcome = store::txn(&agent.w, agent.end(), txn).await.ok()?;
    if !outcome.succeeded {
        return None;
    }
    let there = Rc::clone(agent);
    let keep_alive = agent.w.exec.spawn(agent.process, async move {
        loop {
            there.sleep(SHORT_LEASE / 5).await;
            store::keep_alive(&there.w, there.end(), granted.lease).await.ok();
        }
    });
    let (lease, revision) = (granted.lease, outcome.revision);
    Some(Run { agent: Rc::clone(agent), record, lease, revision, keep_alive })
}

impl Run {
    async fn write(&mut self, mut when: Vec<Compare>) -> Result<bool, Failed> {
        let key = self.agent.w.store.keys.handover();
        when.push(Compare::Modified { key: key.clone(), revision: self.revision });
        let then = vec![Op::put_leased(&key, json(&self.record), self.lease)];
        let txn = Txn { compare: when, then, otherwise: Vec::new() };
        let outcome = store::txn(&self.agent.w, self.agent.end(), txn).await.map_err(|_| Failed)?;
        if outcome.succeeded {
            self.revision = outcome.revision;
        }
        Ok(outcome.succeeded)
    }

    async fn drain(&mut self) -> Result<(), Failed> {
        for attempt in 1..=DRAINS {
            keeper::renew(&self.agent).await.map_err(|_| Failed)?;
            if self.try_drain().await? {
                return Ok(());
            }
            self.record.attempt += 1;
            self.record.phase = HandoverPhase::Prepare;
            if !self.write(Vec::new()).await? {
                return Err(Failed);
            }
            self.agent.sleep(Duration::from_millis(300) * attempt).await;
        }
        Err(Failed)
    }

    async fn try_drain(&mut self) -> Result<bool, Failed> {
        let agent = Rc::clone(&self.agent);
        let (listing, _) = store::read(&agent.w, agent.end()).await.map_err(|_| Failed)?;
        let began = agent.now();
        self.record.phase = HandoverPhase::Drain;
        if !self.write(Vec::new()).await? {
            return Err(Failed);
        }
        loop {
            let acks = agent.cluster().acks.clone();
            let backends = agent.machine().server.borrow().busy();
            let busy = Busy {
                backends: u32::try_from(backends).unwrap_or(u32::MAX),
                oldest: Duration::ZERO,
            };
            let attempt = (self.record.id.as_str(), self.record.attempt);
            match switchover::gate(
                agent.now(),
                began,
                MAX_HOLD,
                attempt,
                &listing.proxies,
                &acks,
                busy,
            ) {
                Gate::Open => break,
                Gate::TimeUp => return Ok(false),
                Gate::Waiting => {}
            }
            let seen = agent.cycle.version();
            let poll = agent.w.exec.sleep(Duration::from_millis(5));
            select(agent.cycle.changed_since(seen), poll).await;
            agent.step().await;
        }
        // Who was fit when the handover began may have lost its stream since.
        let Server::Primary(facts) = agent.observe() else { return Err(Failed) };
        let candidate = self.record.candidate.as_deref();
        let cluster = agent.cluster();
        switchover::candidate(agent.name(), &cluster, &facts.standbys, facts.lsn, candidate)
            .map_err(|_| Failed)?;
        let held = agent.held.get().ok_or(Failed)?;
        if agent.now().since(held.proven_at) > held.ttl / 2 {
            return Ok(false);
        }
        self.record.phase = HandoverPhase::Switch;
        let keys = &agent.w.store.keys;
        let when = vec![
            Compare::Lease { key: keys.leader(), lease: held.lease },
            Compare::NoneCreatedAfter { prefix: keys.proxies(), revision: listing.revision },
        ];
        if !self.write(when).await? {
            self.record.phase = HandoverPhase::Drain;
            return Ok(false);
        }
        Ok(agent.now().since(began) < MAX_HOLD)
    }

    async fn switch(&mut self, candidate: &str, index: usize) {
        let agent = Rc::clone(&self.agent);
        if !jobs::stop(&agent, true, SWITCH_HOLD, Some(index)).await {
            return self.go_back().await;
        }
        let wal_end = agent.machine().disk.borrow().wal.end();
        if !self.release(wal_end).await {
            return self.go_back().await;
        }
        let began = agent.now();
        while agent.now().since(began) < TAKE_OVER_LIMIT {
            if agent.cluster().leader.as_ref().is_some_and(|leader| leader.name == candidate) {
                agent.say(format_args!("handed over"));
                return;
            }
            let seen = agent.cycle.version();
            let poll = agent.w.exec.sleep(Duration::from_millis(50));
            select(agent.cycle.changed_since(seen), poll).await;
        }
        self.go_back().await;
    }

    async fn release(&mut self, wal_end: Lsn) -> bool {
        self.record.wal_end = Some(wal_end);
        let keys = &self.agent.w.store.keys;
        let also = vec![Op::put_leased(keys.handover(), json(&self.record), self.lease)];
        let when = vec![Compare::Modified { key: keys.handover(), revision: self.revision }];
        match keeper::release(&self.agent, when, also).await {
            Ok(Some(revision)) => {
                self.revision = revision;
                true
            }
            Ok(None) => false,
            // Counts as released; the wait for the candidate finds out.
            Err(error) => error.outcome_is_unknown(),
        }
    }

    /// The candidate does not have the key: take it again, and start in place.
    async fn go_back(&mut self) {
        let agent = Rc::clone(&self.agent);
        agent.say(format_args!("handover failed, goes back"));
        if agent.held.get().is_none() && !self.claim_again().await {
            return;
        }
        if jobs::stop(&agent, false, SWITCH_HOLD, None).await {
            jobs::start_primary(Rc::clone(&agent)).await;
        }
        self.abandon().await;
    }

    /// Only if nobody has led since: the record is as it was released.
    async fn claim_again(&mut self) -> bool {
        let agent = Rc::clone(&self.agent);
        let keys = &agent.w.store.keys;
        let blind = agent.w.plan.mutation == Some(Mutation::GoesBackBlindly);
        let mut when = Vec::new();
        if !blind {
            let Ok((state, _)) = store::read(&agent.w, agent.end()).await else { return false };
            let ours = state.handover.as_ref().is_some_and(|record| *record == self.record);
            if !ours {
                return false;
            }
            let revision = state.handover_revision;
            when.push(Compare::Modified { key: keys.handover(), revision });
        }
        // `sync` stays as it was when the server stopped: nobody has led since.
        let mut also = vec![Op::delete(keys.handover())];
        if blind && agent.w.plan.sync != SyncMode::Off {
            let standbys: Vec<String> = self.record.candidate.clone().into_iter().collect();
            also.push(Op::put(keys.sync(), json(&SyncState::new(agent.name(), &standbys))));
        }
        keeper::claim(&agent, SHORT_LEASE, when, |_| also).await.is_ok()
    }

    async fn abandon(&mut self) {
        let agent = Rc::clone(&self.agent);
        agent.w.exec.abort(self.keep_alive);
        let key = agent.w.store.keys.handover();
        let txn = Txn::just(Op::delete(&key))
            .when(Compare::Modified { key, revision: self.revision })
            .and(Op::DeletePrefix { prefix: agent.w.store.keys.acks() });
        store::txn(&agent.w, agent.end(), txn).await.ok();
        keeper::move_to(&agent, agent.w.plan.ttl).await.ok();
    }
}
