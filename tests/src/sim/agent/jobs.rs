//! The steps that take longer than a cycle, as `kornak_agent::jobs` does them.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kornak_agent::ha::sync::Writes;
use kornak_cluster::{ClusterState, Handover, HandoverPhase, SyncMode, SyncState};
use kornak_dcs::lease::leader_checks;
use kornak_dcs::{Compare, Op, Txn};

use super::Agent;
use super::handover::{PROMOTE_LIMIT, SHORT_LEASE, json};
use super::keeper;
use crate::sim::host::index_of;
use crate::sim::postgres::{self, Run};
use crate::sim::scenario::Mutation;
use crate::sim::{guard, net, store};

const STOP_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(10);

/// What the server does now.
fn state(agent: &Agent) -> Run {
    agent.machine().server.borrow().run
}

/// Waits until the server is in one of these states. False if it takes longer than `limit`.
async fn reaches(agent: &Agent, states: &[Run], limit: Duration) -> bool {
    let began = agent.now();
    while !states.contains(&state(agent)) {
        if agent.now().since(began) >= limit {
            return false;
        }
        agent.sleep(POLL).await;
    }
    true
}

/// Stops the server and every process of it.
pub async fn stop(agent: &Agent, fast: bool, limit: Duration, only: Option<usize>) -> bool {
    agent.step().await;
    if fast {
        postgres::stop_fast(&agent.w, agent.host, only);
        return reaches(agent, &[Run::Down], limit).await;
    }
    agent.sleep(agent.w.rng.millis(2, 30)).await;
    postgres::kill_all(&agent.w, agent.host);
    reaches(agent, &[Run::Down], limit).await
}

/// Tells the guard that nothing here is writable.
pub async fn disarm(agent: &Agent) -> bool {
    agent.step().await;
    guard::disarm(&agent.w, agent.host)
}

async fn start_standby(agent: &Agent, upstream: Option<usize>) {
    agent.step().await;
    agent.machine().disk.borrow_mut().upstream = upstream;
    agent.step().await;
    if postgres::start(&agent.w, agent.host, true) {
        reaches(agent, &[Run::Standby, Run::Down], STOP_LIMIT).await;
    } else {
        agent.sleep(Duration::from_millis(500)).await;
    }
}

/// Brings the server back as a standby.
pub async fn rejoin(agent: Rc<Agent>, leader: Option<String>) {
    let Some(leader) = leader else {
        if disarm(&agent).await {
            start_standby(&agent, None).await;
        }
        return;
    };
    let Some(upstream) = index_of(&agent.w, &leader) else { return };
    let running = state(&agent) != Run::Down;
    let Some(diverged) = diverged(&agent, upstream).await else {
        return agent.sleep(Duration::from_millis(500)).await;
    };
    let torn = agent.machine().disk.borrow().torn;
    if running && !diverged {
        return;
    }
    if running && !stop(&agent, true, STOP_LIMIT, None).await {
        return;
    }
    if !disarm(&agent).await {
        return;
    }
    if diverged || torn {
        rewind(&agent, upstream).await;
    }
    start_standby(&agent, Some(upstream)).await;
}

/// Asks the leader's server whether this one can follow it. `None`: it does not answer.
async fn diverged(agent: &Rc<Agent>, upstream: usize) -> Option<bool> {
    let (me, limit) = (agent.host, Duration::from_secs(2));
    let asked =
        net::call(&agent.w, agent.end(), postgres::client_end(upstream), limit, move |w, reply| {
            let there = &w.hosts[upstream];
            if there.alive() && there.server.borrow().is_primary() {
                let theirs = there.disk.borrow();
                reply.give(!w.hosts[me].disk.borrow().wal.may_follow(&theirs.wal));
            }
        });
    asked.await
}

async fn rewind(agent: &Agent, upstream: usize) {
    agent.say(format_args!("rewinds"));
    agent.machine().disk.borrow_mut().torn = true;
    agent.sleep(agent.w.rng.millis(50, 800)).await;
    let there = &agent.w.hosts[upstream];
    if !there.alive() || !agent.w.net.both(agent.end(), postgres::client_end(upstream)) {
        return;
    }
    let theirs = there.disk.borrow().wal.clone();
    let mut disk = agent.machine().disk.borrow_mut();
    disk.wal.rewind_to_common(&theirs);
    disk.wal.receive(&theirs);
    disk.wal.flush();
    (disk.torn, disk.was_primary, disk.clean) = (false, false, true);
}

/// A server that starts again shows commits that no standby may have: the store names them again only
/// when they have everything.
async fn stand_alone(agent: &Rc<Agent>) -> bool {
    let cluster = agent.cluster();
    let alone = cluster.sync.as_ref().is_some_and(|sync| {
        sync.standbys().is_empty() && sync.leader.as_deref() == Some(agent.name())
    });
    let careless = agent.w.plan.mutation == Some(Mutation::StartsBesideItsStandbys);
    let believes = agent.w.plan.mutation == Some(Mutation::StandsAloneByAnOldView);
    let shown = believes || agent.sync_writes.get().are_shown_by(&cluster);
    if agent.w.plan.sync == SyncMode::Off || careless || (alone && shown) {
        return true;
    }
    let Some(held) = agent.held.get() else { return false };
    let (leader, key) = (agent.w.store.keys.leader(), agent.w.store.keys.sync());
    let mut txn = Txn::just(Op::put(&key, json(&SyncState::new(agent.name(), &[]))));
    txn.compare = leader_checks(&leader, held.lease, held.epoch);
    txn.compare.push(Compare::Modified { key, revision: cluster.sync_revision });
    let before = agent.note_sync_write(Writes::begin);
    let result = store::txn(&agent.w, agent.end(), txn).await;
    agent.note_sync_write(|writes| writes.end(before, &result));
    result.is_ok_and(|outcome| outcome.succeeded)
}

/// Starts the leader's server where it is.
pub async fn start_primary(agent: Rc<Agent>) {
    if !stand_alone(&agent).await {
        return agent.sleep(Duration::from_millis(500)).await;
    }
    agent.step().await;
    if postgres::start(&agent.w, agent.host, false) {
        reaches(&agent, &[Run::Primary, Run::Down], STOP_LIMIT).await;
    } else {
        agent.sleep(Duration::from_millis(500)).await;
    }
}

/// Makes the server primary.
pub async fn promote(agent: Rc<Agent>) {
    let planned = agent.cluster().handover.as_ref().is_some_and(|record| {
        record.phase == HandoverPhase::Promote && record.candidate.as_deref() == Some(agent.name())
    });
    let limit = if planned { PROMOTE_LIMIT } else { STOP_LIMIT };
    // Arms the guard, should it have been disarmed since.
    if keeper::renew(&agent).await.is_err() {
        return agent.sleep(Duration::from_millis(100)).await;
    }
    let careless = agent.w.plan.mutation == Some(Mutation::PromotedBesideItsStandbys);
    if !careless && !stand_alone(&agent).await {
        return agent.sleep(Duration::from_millis(500)).await;
    }
    agent.step().await;
    if is_strict(&agent) {
        postgres::set_sync_names(&agent.w, agent.host, "*");
    } else {
        postgres::set_sync_names(&agent.w, agent.host, "");
    }
    agent.step().await;
    let sent = postgres::promote(&agent.w, agent.host);
    if sent
        && reaches(&agent, &[Run::Primary, Run::Down], limit).await
        && state(&agent) == Run::Primary
    {
        agent.cycle.notify();
        if planned {
            finish_handover(&agent).await;
        }
        return;
    }
    agent.say(format_args!("promotion failed"));
    agent.race_not_before.set(Some(agent.now() + Duration::from_secs(5)));
    if stop(&agent, false, STOP_LIMIT, None).await {
        let key = agent.w.store.keys.handover();
        let also = if planned { vec![Op::delete(key)] } else { Vec::new() };
        keeper::release(&agent, Vec::new(), also).await.ok();
        disarm(&agent).await;
    }
}

fn is_strict(agent: &Agent) -> bool {
    agent.cluster().config.as_ref().is_some_and(|config| {
        config.synchronous_mode != SyncMode::Off && config.synchronous_mode_strict
    })
}

async fn finish_handover(agent: &Rc<Agent>) {
    let cluster = agent.cluster();
    let key = agent.w.store.keys.handover();
    let txn = Txn::just(Op::delete(&key))
        .when(Compare::Modified { key, revision: cluster.handover_revision })
        .and(Op::DeletePrefix { prefix: agent.w.store.keys.acks() });
    store::txn(&agent.w, agent.end(), txn).await.ok();
    keeper::move_to(agent, agent.w.plan.ttl).await.ok();
}

/// Stops the server for good.
pub async fn demote(agent: Rc<Agent>, immediate: bool) {
    let fast = !immediate && stop(&agent, true, super::STOP_BUDGET, None).await;
    if !fast && !stop(&agent, false, STOP_LIMIT, None).await {
        return;
    }
    disarm(&agent).await;
    let held = keeper::give_up(&agent);
    let there = Rc::clone(&agent);
    agent.w.exec.spawn(agent.process, async move {
        keeper::release_given_up(&there, held, Vec::new(), Vec::new()).await.ok();
    });
}

/// Creates the leader key for this node, if the store holds still what was decided on.
pub async fn claim(agent: Rc<Agent>, decided_on: Arc<ClusterState>, take_over: bool) {
    let looks_again = agent.w.plan.mutation == Some(Mutation::ClaimOnAnotherView);
    let cluster = if looks_again { agent.cluster() } else { decided_on };
    let config = cluster.config.clone().unwrap_or_default();
    let keys = &agent.w.store.keys;
    let mut when = Vec::new();
    let mut also = Vec::new();
    if agent.w.plan.mutation != Some(Mutation::ClaimOnOldSync) {
        when.push(Compare::Modified { key: keys.sync(), revision: cluster.sync_revision });
    }
    if config.synchronous_mode != SyncMode::Off {
        also.push(Op::put(keys.sync(), json(&SyncState::new(agent.name(), &[]))));
    }
    let stands_alone = !also.is_empty();
    let record = cluster.handover.clone().filter(|_| take_over);
    let ttl = if take_over { SHORT_LEASE } else { config.ttl };
    let key = keys.handover();
    if record.is_some() {
        when.push(Compare::Modified { key: key.clone(), revision: cluster.handover_revision });
    }
    let claimed = keeper::claim(&agent, ttl, when, |lease| {
        let promote = record.map(|record| {
            let record = Handover { phase: HandoverPhase::Promote, ..record };
            Op::put_leased(key, json(&record), lease)
        });
        also.into_iter().chain(promote).collect()
    });
    match claimed.await {
        Ok(epoch) if stands_alone => {
            agent.note_sync_write(|writes| writes.claimed(epoch.revision));
        }
        Ok(_) | Err(keeper::ClaimError::Lost) => {}
        Err(_) => agent.race_not_before.set(Some(agent.now() + Duration::from_secs(1))),
    }
}
