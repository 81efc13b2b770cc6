//! What agents ask each other: where do you stand, and may I stay.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use kornak_agent::failsafe::{ROUND_EVERY, ROUND_TIMEOUT, promise_length, whom_to_ask};
use kornak_agent::ha::{DataDir, Job, Peer, Race, Server, Stray};
use kornak_agent::peers::{Asked, Identity, PeerStatus};
use kornak_cluster::{Lsn, MemberState, Timeline};
use kornak_dcs::lease::fence_at;
use serde_json::json;

use super::{Agent, handover, keeper};
use crate::sim::disk::Promise;
use crate::sim::exec::Reply;
use crate::sim::host::{end, index_of};
use crate::sim::net;
use crate::sim::postgres;
use crate::sim::scenario::Mutation;
use crate::sim::world::{SYSID, World};

const SCOPE: &str = "demo";

const PEER_TIMEOUT: Duration = Duration::from_millis(1000);

/// Hands a request to the agent of a host, as its kernel would: one that is dead resets the
/// connection, one that is frozen answers when it is thawed.
fn serve<T: 'static, F: Future<Output = ()> + 'static>(
    w: &Rc<World>,
    index: usize,
    reply: Reply<T>,
    handler: impl FnOnce(Rc<Agent>, Reply<T>) -> F,
) {
    let host = &w.hosts[index];
    if !host.up.get() {
        return w.net.lose(reply);
    }
    let Some(agent) = host.agent.borrow().clone() else { return };
    let process = agent.process;
    w.exec.spawn(process, handler(agent, reply));
}

/// Asks all other members where they stand.
pub async fn ask_all(agent: &Rc<Agent>) -> Race {
    let cluster = agent.cluster();
    let asked_at = agent.now();
    let others = cluster.members.keys().filter(|name| *name != agent.name());
    let answers = others.map(|name| async move {
        let Some(index) = index_of(&agent.w, name) else { return (name.clone(), None) };
        let other = agent.w.answered_by.borrow().get(&index).copied();
        let index = other.unwrap_or(index);
        let answer = net::call(&agent.w, agent.end(), end(index), PEER_TIMEOUT, move |w, reply| {
            serve(w, index, reply, |there, reply| async move {
                there.step().await;
                let status = stand(&there);
                // In the other kinds of worlds such a member does not answer at all.
                if there.w.plan.untrue || status.state == MemberState::Running {
                    reply.give(status);
                }
            });
        });
        (name.clone(), answer.await.and_then(|status| understand(agent, name, status)))
    });
    let peers = join_all(answers).await.into_iter().collect();
    let (sync_revision, stray) = (cluster.sync_revision, Stray::Unheard);
    Race { asked_at, sync_revision, peers, stray }
}

/// `GET /patroni` of this member.
fn stand(agent: &Agent) -> PeerStatus {
    let stands_back = agent.race_not_before.get().is_some_and(|moment| agent.now() < moment);
    let from_memory = agent.w.plan.mutation == Some(Mutation::AnswersFromMemory);
    let server = if from_memory { agent.observe() } else { agent.look_again() };
    let (state, role, timeline, xlog) = match server {
        Server::Standby(facts) => {
            let xlog = facts.wal_known.then(|| json!({"received_location": facts.position().0}));
            ("running", "replica", facts.timeline, xlog)
        }
        Server::Primary(facts) => {
            ("running", "primary", facts.timeline, Some(json!({"location": facts.lsn.0})))
        }
        Server::Starting { .. } => ("starting", "replica", Timeline(0), None),
        _ => ("stopped", "replica", Timeline(0), None),
    };
    PeerStatus::from_json(&json!({
        "state": state, "role": role, "timeline": timeline.0, "xlog": xlog,
        "tags": agent.w.plan.tags[agent.host], "stands_back": stands_back,
        "database_system_identifier": SYSID, "patroni": {"scope": SCOPE, "name": agent.name()}
    }))
}

/// What an answer means to who has asked the member `name`.
fn understand(agent: &Agent, name: &str, mut status: PeerStatus) -> Option<Peer> {
    let mutation = agent.w.plan.mutation;
    if mutation == Some(Mutation::NameNotChecked) {
        status.name = Some(name.to_owned());
    }
    let cluster = Identity { scope: SCOPE, system_identifier: Some(SYSID) };
    let mut peer = status.of(&Asked { name, cluster })?;
    if mutation == Some(Mutation::DownCounts) {
        peer.position.get_or_insert(Lsn(0));
    }
    Some(peer)
}

/// The leader's failsafe rounds.
pub async fn rounds(agent: Rc<Agent>) {
    loop {
        agent.sleep(ROUND_EVERY).await;
        let Some(held) = agent.held.get() else {
            agent.confirmed.set(false);
            continue;
        };
        let leads = match agent.observe() {
            Server::Primary(_) => true,
            Server::Stopped | Server::Starting { .. } => {
                matches!(postgres::control(&agent.w, agent.host), DataDir::Initialized(c) if c.was_primary)
            }
            _ => false,
        };
        let unproven = agent.now().since(held.proven_at) > (held.ttl / 3).max(ROUND_EVERY * 2);
        let confirmed = leads && unproven && round(&agent, held).await;
        agent.confirmed.set(confirmed);
    }
}

async fn round(agent: &Rc<Agent>, held: keeper::Held) -> bool {
    let began = agent.now();
    let cluster = agent.cluster();
    let unproven = agent.unproven_failsafe.borrow().clone();
    let Some(list) = whom_to_ask(agent.name(), &cluster, unproven.as_ref()) else { return false };
    agent.step().await;
    let revision = held.epoch.revision;
    let asked = list.keys().map(|name| async move {
        let Some(index) = index_of(&agent.w, name) else { return false };
        let me = agent.name().to_owned();
        let answer =
            net::call(&agent.w, agent.end(), end(index), ROUND_TIMEOUT, move |w, reply| {
                serve(w, index, reply, |there, reply| async move {
                    there.step().await;
                    reply.give(promise(&there, me, revision).await);
                });
            });
        answer.await == Some(true)
    });
    let all = join_all(asked).await.into_iter().all(|accepted| accepted);
    if all {
        let until = fence_at(began, held.ttl, keeper::margin(agent));
        let asked: Vec<&String> = list.keys().collect();
        agent.say(format_args!("{asked:?} confirm this leader"));
        keeper::extend_by_failsafe(agent, until).await;
    }
    all
}

/// Answers a leader that asks to stay. True: the promise is on disk.
async fn promise(agent: &Rc<Agent>, to: String, revision: u64) -> bool {
    let leading = agent.held.get().is_some() || matches!(agent.observe(), Server::Primary(_));
    if !agent.w.plan.failsafe || leading || agent.claiming.get() {
        return false;
    }
    let length = promise_length(agent.w.plan.ttl, None);
    let until = agent.now() + length;
    let boot = agent.machine().clock.borrow().boot;
    // Between the look above and the word on disk nothing is awaited: the process does one thing.
    agent.machine().disk.borrow_mut().promise = Some(Promise { to, boot, until, length, revision });
    agent.say(format_args!("promises not to race until {until}"));
    agent.cycle.notify();
    agent.step().await;
    true
}

/// An operator asks the leader for a switchover.
pub fn switch_over(w: &Rc<World>, candidate: Option<String>) {
    for host in &w.hosts {
        let Some(agent) = host.agent.borrow().clone() else { continue };
        if agent.held.get().is_none() {
            continue;
        }
        let there = Rc::clone(&agent);
        w.exec.spawn(agent.process, async move {
            there.step().await;
            let work = handover::hand_over(Rc::clone(&there), candidate);
            there.begin(Job::Handover, work);
        });
        return;
    }
}

/// The leader of a handover asks its candidate to prepare.
pub async fn prepare_candidate(agent: &Rc<Agent>, candidate: usize) {
    let limit = Duration::from_secs(2);
    let asked = net::call(&agent.w, agent.end(), end(candidate), limit, move |w, reply| {
        serve(w, candidate, reply, |there, reply| async move {
            keeper::grant_ahead(&there, handover::SHORT_LEASE).await;
            reply.give(Lsn(0));
        });
    });
    asked.await;
}
