//! What a leader keeps in order while it leads, and the node's own member key, as
//! `kornak_agent::leading` and `kornak_agent::publish` do it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::select;
use kornak_agent::ha::sync::{Names, SyncStep, Writes, plan};
use kornak_agent::ha::{PrimaryFacts, Server, Store};
use kornak_cluster::{
    ClusterState, HistoryEntry, Lsn, Member, MemberRole, MemberState, Status, Timeline,
};
use kornak_dcs::lease::fence_at;
use kornak_dcs::{Compare, DcsError, Op, Txn};

use super::handover::json;
use super::{Agent, keeper};
use crate::sim::scenario::Mutation;
use crate::sim::{postgres, store};

const EVERY: Duration = Duration::from_secs(1);
const WHILE_CHANGING: Duration = Duration::from_millis(150);
const STATUS_EVERY: Duration = Duration::from_secs(3);

/// Works for as long as the process lives.
pub async fn run(agent: Rc<Agent>) {
    let mut status_at = None;
    loop {
        let mut pause = EVERY;
        if let Some((facts, cluster)) = leads(&agent)
            && let Ok(settled) = round(&agent, &facts, &cluster, &mut status_at).await
            && !settled
        {
            agent.notice();
            pause = WHILE_CHANGING;
        }
        agent.sleep(Duration::from_millis(50)).await;
        let seen = agent.cycle.version();
        select(agent.cycle.changed_since(seen), agent.w.exec.sleep(pause)).await;
    }
}

fn leads(agent: &Agent) -> Option<(PrimaryFacts, std::sync::Arc<ClusterState>)> {
    let held = agent.held.get().filter(|held| agent.now() < held.until)?;
    let Server::Primary(facts) = agent.observe() else { return None };
    let cluster = agent.cluster();
    let seen = cluster.leader.as_ref().is_some_and(|leader| leader.epoch == held.epoch);
    (seen && agent.reach() == Store::Live).then_some((facts, cluster))
}

async fn round(
    agent: &Rc<Agent>,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
    status_at: &mut Option<kornak_cluster::Moment>,
) -> Result<bool, DcsError> {
    let settled = synchronous(agent, facts, cluster).await?;
    failsafe(agent, cluster).await?;
    history(agent, facts, cluster).await?;
    let now = agent.now();
    if status_at.is_none_or(|at| now.since(at) >= STATUS_EVERY) {
        *status_at = Some(now);
        status(agent, facts, cluster).await?;
    }
    Ok(settled)
}

async fn synchronous(
    agent: &Rc<Agent>,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
) -> Result<bool, DcsError> {
    let stale = agent.w.plan.mutation == Some(Mutation::PlansFromOldView);
    let writes = agent.sync_writes.get();
    if writes.are_newer_than(cluster) && !stale {
        return Ok(false);
    }
    let mut step = plan(agent.name(), cluster, facts);
    // The open write could name a standby that commits stop waiting for now. A write that succeeds
    // changes the revision that it compares, so it will not be done any more.
    let ignored = agent.w.plan.mutation == Some(Mutation::OpenSyncWriteIgnored);
    if writes.may_be_open() && !ignored && matches!(step, SyncStep::SetNames(_)) {
        step = SyncStep::Publish(cluster.sync.clone().unwrap_or_default());
    }
    agent.step().await;
    match step {
        SyncStep::Settled => Ok(true),
        SyncStep::Await => Ok(false),
        SyncStep::Publish(sync) => {
            if agent.w.plan.mutation == Some(Mutation::NamesBeforeStore) {
                // The wrong order: commits stop waiting before the store stops naming.
                let standbys = sync.standbys();
                let waits = standbys.len().saturating_sub(sync.quorum as usize);
                let (mode, strict) = (agent.w.plan.sync, agent.w.plan.strict);
                let names = Names::of(&standbys, waits, mode, strict).to_string();
                postgres::set_sync_names(&agent.w, agent.host, &names);
                agent.step().await;
            }
            agent.say(format_args!("publishes sync {:?}", sync.sync_standby));
            let key = agent.w.store.keys.sync();
            let txn = Txn::just(Op::put(&key, json(&sync)))
                .when(Compare::Modified { key, revision: cluster.sync_revision });
            let before = agent.note_sync_write(Writes::begin);
            let result = store::txn(&agent.w, agent.end(), txn).await;
            agent.note_sync_write(|writes| writes.end(before, &result));
            result?;
            Ok(false)
        }
        SyncStep::SetNames(names) => {
            if agent.machine().server.borrow().is_primary() {
                postgres::set_sync_names(&agent.w, agent.host, &names);
                agent.notice();
            }
            Ok(false)
        }
    }
}

async fn failsafe(agent: &Rc<Agent>, cluster: &ClusterState) -> Result<(), DcsError> {
    // Its own member key may have ended meanwhile, and it must be able to race all the same.
    let names = cluster.members.keys().map(String::as_str).chain([agent.name()]);
    let wanted: BTreeMap<String, String> =
        names.map(|name| (name.to_owned(), format!("http://{name}"))).collect();
    if !agent.w.plan.failsafe || cluster.failsafe.as_ref() == Some(&wanted) {
        return Ok(());
    }
    let Some(held) = agent.held.get() else { return Ok(()) };
    // While the members' word is what this leader rests on, nobody may join the list who has not
    // given it: the store could let him race at once.
    let by_the_store = fence_at(held.proven_at, held.ttl, keeper::margin(agent));
    let careless = agent.w.plan.mutation == Some(Mutation::ListGrowsOverTheMembersHeads);
    if held.until > by_the_store && !careless {
        return Ok(());
    }
    // Who may have been written by a put that is still under way has to be asked as well.
    let mut unproven = agent.unproven_failsafe.borrow().clone().unwrap_or_default();
    unproven.extend(wanted.clone());
    agent.unproven_failsafe.replace(Some(unproven));
    agent.say(format_args!("publishes failsafe {:?}", wanted.keys().collect::<Vec<_>>()));
    let mine = Compare::Lease { key: agent.w.store.keys.leader(), lease: held.lease };
    let txn = Txn::just(Op::put(agent.w.store.keys.failsafe(), json(&wanted))).when(mine);
    store::txn(&agent.w, agent.end(), txn).await?;
    Ok(())
}

async fn history(
    agent: &Rc<Agent>,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
) -> Result<(), DcsError> {
    if facts.timeline.0 <= 1 || cluster.timeline() >= facts.timeline {
        return Ok(());
    }
    let rows = agent.machine().disk.borrow().wal.history().to_vec();
    let list: Vec<HistoryEntry> = rows
        .windows(2)
        .filter_map(|pair| match pair {
            [_, (next, begin)] => Some(HistoryEntry {
                timeline: Timeline(next - 1),
                lsn: crate::sim::disk::lsn(*begin),
                reason: "promotion".to_owned(),
                timestamp: None,
                new_leader: None,
            }),
            _ => None,
        })
        .collect();
    let put = Op::put(agent.w.store.keys.history(), HistoryEntry::print_list(&list));
    store::txn(&agent.w, agent.end(), Txn::just(put)).await?;
    Ok(())
}

async fn status(
    agent: &Rc<Agent>,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
) -> Result<(), DcsError> {
    let wanted = Status { optime: facts.lsn, ..Status::default() };
    if cluster.handover.is_some() || cluster.status.as_ref() == Some(&wanted) {
        return Ok(());
    }
    let Some(held) = agent.held.get() else { return Ok(()) };
    let mine = Compare::Lease { key: agent.w.store.keys.leader(), lease: held.lease };
    let txn = Txn::just(Op::put(agent.w.store.keys.status(), json(&wanted))).when(mine);
    store::txn(&agent.w, agent.end(), txn).await?;
    Ok(())
}

/// Keeps the member key equal to what the node is, on a lease of its own.
pub async fn publish(agent: Rc<Agent>) {
    let key = agent.w.store.keys.member(agent.name());
    let ttl = agent.w.plan.ttl;
    let mut lease = None;
    let mut renewed_at = agent.now();
    let mut written: Option<(Member, u64)> = None;
    loop {
        let every = (ttl / 4).clamp(Duration::from_millis(300), Duration::from_secs(5));
        if lease.is_none() {
            let granted = store::grant(&agent.w, agent.end(), ttl).await.ok();
            lease = granted.map(|granted| granted.lease);
            (renewed_at, written) = (agent.now(), None);
        } else if let Some(number) = lease
            && agent.now().since(renewed_at) >= every
        {
            match store::keep_alive(&agent.w, agent.end(), number).await {
                Ok(_) => renewed_at = agent.now(),
                Err(DcsError::LeaseLost) => lease = None,
                Err(_) => {}
            }
        }
        let member = account(&agent);
        let cluster = agent.cluster();
        // Deleted by somebody, or overwritten by an older put of ours that was done late.
        let shown = cluster.members.get(agent.name()) == Some(&member);
        let due = match &written {
            Some((text, revision)) => *text != member || (!shown && cluster.revision >= *revision),
            None => true,
        };
        if let Some(lease) = lease.filter(|_| due) {
            let txn = Txn::just(Op::put_leased(&key, json(&member), lease));
            let put = store::txn(&agent.w, agent.end(), txn).await;
            written = put.ok().map(|outcome| (member, outcome.revision));
        }
        let seen = agent.cycle.version();
        select(agent.cycle.changed_since(seen), agent.w.exec.sleep(every)).await;
        agent.sleep(Duration::from_millis(100)).await;
    }
}

fn account(agent: &Agent) -> Member {
    let (state, role) = match agent.observe() {
        Server::Primary(_) => (MemberState::Running, MemberRole::Primary),
        Server::Standby(_) => (MemberState::Running, MemberRole::Replica),
        Server::Starting { .. } => (MemberState::Starting, MemberRole::Replica),
        Server::Silent { .. } | Server::Stopping { .. } | Server::Closed { .. } => {
            (MemberState::Stopping, MemberRole::Demoted)
        }
        Server::Stopped | Server::Leftovers => (MemberState::Stopped, MemberRole::Demoted),
    };
    let name = agent.name();
    Member {
        conn_url: format!("postgres://{name}:5432/postgres"),
        api_url: format!("http://{name}:8008/patroni"),
        state,
        role,
        version: String::new(),
        proxy_url: None,
        checkpoint_after_promote: None,
        tags: agent.w.plan.tags[agent.host].clone(),
        pending_restart: false,
        pending_restart_reason: None,
        xlog_location: None::<Lsn>,
        replay_lsn: None,
        receive_lsn: None,
        replication_state: None,
        timeline: None,
        scheduled_restart: None,
        pause: false,
        kornak: Some(1),
        poolinfo: None,
    }
}
