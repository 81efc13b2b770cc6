//! A modelled proxy: what it does with whom when the leadership moves, and its part in a planned
//! handover. Its clients' sessions are requests that wait, run, or are answered with the truth about
//! an unknown outcome.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use kornak_cluster::{Ack, ClusterState, Epoch, Handover, ProxyRegistration, Revision};
use kornak_dcs::{DcsError, Op, Txn};
use kornak_proxy::cluster::standing::Proof;
use kornak_proxy::waiting::gate::{Gate, Side, Sides, Ticket};
use kornak_proxy::waiting::hold::{Effect, Facts, Hold, State as Holding};

use super::disk::Record;
use super::exec::{Notify, ProcessId, Reply, slot};
use super::host::index_of;
use super::net::{self, End};
use super::postgres::{self, Outcome};
use super::scenario::Mutation;
use super::store;
use super::world::World;

/// How long a request waits for somebody who accepts writes.
const HOLD_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a server may take to answer a write, before the connection is given up.
const SERVER_TIMEOUT: Duration = Duration::from_secs(8);

const LEASE: Duration = Duration::from_secs(6);

/// The longest a drain holds anybody.
const MAX_HOLD: Duration = Duration::from_secs(1);

/// A proxy's answer to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    Done,
    /// 08007: may have been executed.
    Unknown,
    /// 40001 or 57P03: certainly not executed.
    NotDone,
}

/// A proxy, over all its lives.
pub struct Proxy {
    pub index: usize,
    pub process: Cell<ProcessId>,
    pub up: Cell<bool>,
    state: RefCell<State>,
    changed: Notify,
    /// Writes done for clients since the last fault was healed.
    pub served: Cell<u32>,
}

#[derive(Debug)]
struct State {
    registered: bool,
    revision: Revision,
    route: Option<(usize, Epoch)>,
    /// The route has shown that it accepts writes.
    ready: bool,
    /// Counts how often a route has shown that.
    proof: Proof,
    record: Option<Handover>,
    gate: Arc<Gate>,
    /// Grows when all server connections are dropped.
    connections: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            registered: false,
            revision: Revision::NONE,
            route: None,
            ready: false,
            proof: Proof::NONE,
            record: None,
            gate: Arc::new(Gate::new(1)),
            connections: 0,
        }
    }
}

impl Proxy {
    /// A proxy that does not run yet.
    pub fn new(index: usize, idle: ProcessId) -> Self {
        Self {
            index,
            process: Cell::new(idle),
            up: Cell::new(false),
            state: RefCell::default(),
            changed: Notify::default(),
            served: Cell::new(0),
        }
    }

    /// For the trace.
    pub fn describe(&self) -> String {
        match self.state.try_borrow() {
            Ok(state) => format!("served {}, {state:?}", self.served.get()),
            Err(_) => "just changing".to_owned(),
        }
    }
}

/// Starts a proxy that does not run.
pub fn start(w: &Rc<World>, index: usize) {
    let proxy = &w.proxies[index];
    if proxy.up.replace(true) {
        return;
    }
    let process = w.exec.process();
    proxy.process.set(process);
    proxy.state.replace(State::default());
    w.checker.borrow_mut().proxy_forgot(index);
    w.exec.spawn(process, register(Rc::clone(w), index));
    w.exec.spawn(process, probe(Rc::clone(w), index));
    w.exec.spawn(process, obey(Rc::clone(w), index));
}

/// SIGKILL.
pub fn kill(w: &Rc<World>, index: usize) {
    let proxy = &w.proxies[index];
    if proxy.up.replace(false) {
        w.note(format_args!("proxy {index} KILLED"));
        w.exec.kill(proxy.process.get());
    }
}

/// The store's watch, or a lagging member of the store, shows a state.
pub fn show(w: &Rc<World>, index: usize, state: Arc<ClusterState>) {
    let there = Rc::clone(w);
    w.exec.spawn(w.proxies[index].process.get(), async move {
        take_in(&there, index, &state);
    });
}

fn take_in(w: &Rc<World>, index: usize, cluster: &ClusterState) {
    let proxy = &w.proxies[index];
    let mut state = proxy.state.borrow_mut();
    if let Some(leader) = &cluster.leader
        && let Some(host) = index_of(w, &leader.name)
    {
        let older = state.route.is_some_and(|(_, known)| {
            known == leader.epoch || leader.epoch.is_older_than(known) == Some(true)
        });
        let same = state.route.is_some_and(|(_, known)| known == leader.epoch);
        let walks_back = w.plan.mutation == Some(Mutation::ProxyWalksBack) && !same;
        if !older || walks_back {
            state.route = Some((host, leader.epoch));
            state.ready = false;
            state.connections += 1;
            w.checker.borrow_mut().routed(w, index, leader.epoch);
        }
    }
    if cluster.revision >= state.revision {
        state.revision = cluster.revision;
        state.record.clone_from(&cluster.handover);
    }
    drop(state);
    proxy.changed.notify();
}

/// Obeys the handover record, as `kornak_proxy::handover` does with the same two.
async fn obey(w: Rc<World>, index: usize) {
    let proxy = &w.proxies[index];
    let mut hold = Hold::default();
    loop {
        let seen = proxy.changed.version();
        let mut effects = Vec::new();
        let (record, waits) = {
            let mut state = proxy.state.borrow_mut();
            let record = state.record.clone();
            let facts = Facts {
                record: record.as_ref(),
                inside: state.gate.inside(Sides::LEADING),
                serving: state.route.filter(|_| state.ready).map(|(_, epoch)| epoch),
                proof: state.proof,
                to_listen: 0,
                max_hold: MAX_HOLD,
            };
            let switched = matches!(hold.state(), Holding::Switching { .. });
            hold.on(&facts, w.exec.now(), &mut effects);
            if !switched && matches!(hold.state(), Holding::Switching { .. }) {
                // The leader is about to stop: whoever serves has to prove it anew.
                state.connections += 1;
                state.ready = false;
            }
            (record, hold.deadline())
        };
        let mut ack = None;
        for effect in effects {
            let gate = Arc::clone(&proxy.state.borrow().gate);
            match effect {
                Effect::Close => gate.close(Sides::LEADING),
                Effect::Open(_) | Effect::OpenMost(_) => gate.close(Sides::NONE),
                Effect::Acknowledge(attempt) => ack = Some(attempt),
            }
            proxy.changed.notify();
        }
        if let (Some(attempt), Some(_)) = (ack, record) {
            let value = json(&Ack { id: attempt.id.clone(), attempt: attempt.number });
            let put = Op::put(w.store.keys.ack(&format!("p{index}")), value);
            if store::txn(&w, End::Proxy(index), Txn::just(put)).await.is_ok() {
                hold.acknowledged(&attempt);
            }
            continue;
        }
        let changed = proxy.changed.changed_since(seen);
        match waits {
            Some(deadline) => {
                let left = deadline.since(w.exec.now());
                w.exec.within(left, changed).await;
            }
            None => changed.await,
        }
    }
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("records are plain data with string keys")
}

/// Keeps the registration; nothing is served before it stands.
async fn register(w: Rc<World>, index: usize) {
    let from = End::Proxy(index);
    let id = format!("p{index}");
    loop {
        let Ok(granted) = store::grant(&w, from, LEASE).await else {
            w.exec.sleep(Duration::from_millis(500)).await;
            continue;
        };
        let registration = ProxyRegistration {
            speaks: vec![1],
            host: String::new(),
            pid: 0,
            status: None,
            cancel: None,
            prepares: false,
        };
        let key = w.store.keys.proxy(&id);
        let put = Txn::just(Op::put_leased(key, json(&registration), granted.lease));
        if store::txn(&w, from, put).await.is_err() {
            continue;
        }
        let Ok((now, _)) = store::read(&w, from).await else { continue };
        take_in(&w, index, &now);
        w.proxies[index].state.borrow_mut().registered = true;
        w.proxies[index].changed.notify();
        loop {
            w.exec.sleep(LEASE / 3).await;
            if let Err(DcsError::LeaseLost) = store::keep_alive(&w, from, granted.lease).await {
                break;
            }
        }
    }
}

/// Asks the server of a new route until it accepts writes.
async fn probe(w: Rc<World>, index: usize) {
    let proxy = &w.proxies[index];
    loop {
        let seen = proxy.changed.version();
        let wanted = {
            let state = proxy.state.borrow();
            state.route.filter(|_| !state.ready && state.registered)
        };
        let Some((host, epoch)) = wanted else {
            proxy.changed.changed_since(seen).await;
            continue;
        };
        let (from, limit) = (End::Proxy(index), Duration::from_millis(500));
        let writable = net::call(&w, from, postgres::client_end(host), limit, move |w, reply| {
            let there = &w.hosts[host];
            if !there.up.get() {
                w.net.lose(reply);
            } else if there.alive() && there.server.borrow().is_primary() {
                reply.give(());
            }
        });
        if writable.await.is_some() {
            let mut state = proxy.state.borrow_mut();
            if state.route == Some((host, epoch)) {
                state.ready = true;
                state.proof = state.proof.next();
                drop(state);
                proxy.changed.notify();
            }
        } else {
            w.exec.sleep(Duration::from_millis(60)).await;
        }
    }
}

/// A client's request: a write alone, or at the end of a transaction.
pub async fn submit(
    w: &Rc<World>,
    index: usize,
    session: u64,
    record: Record,
    in_transaction: bool,
) -> Said {
    let proxy = &w.proxies[index];
    if !proxy.up.get() {
        return Said::NotDone;
    }
    let (reply, answer) = slot();
    let there = Rc::clone(w);
    w.exec.spawn(proxy.process.get(), async move {
        let said = serve(&there, index, session, record, in_transaction).await;
        reply.give(said);
    });
    // A proxy that dies leaves its clients without an answer.
    answer.await.unwrap_or(Said::Unknown)
}

/// A session inside the gate, and its server transaction open, for as long as it lives.
struct Active {
    ticket: Ticket,
    w: Rc<World>,
    proxy: usize,
    host: usize,
    session: u64,
}

impl Drop for Active {
    fn drop(&mut self) {
        let proxy = &self.w.proxies[self.proxy];
        self.ticket.leave();
        proxy.changed.notify();
        postgres::disconnect(&self.w, self.host, self.session);
    }
}

async fn serve(
    w: &Rc<World>,
    index: usize,
    session: u64,
    record: Record,
    in_transaction: bool,
) -> Said {
    let proxy = &w.proxies[index];
    let began = w.exec.now();
    let mut refused_in = None;
    loop {
        let seen = proxy.changed.version();
        let open = {
            let state = proxy.state.borrow();
            let mut ticket = Ticket::new(&state.gate, 0);
            let flows = state.ready && state.registered && ticket.enter(Side::Leading);
            let route = state.route.filter(|_| flows);
            route.map(|(host, epoch)| (host, epoch, state.connections, ticket))
        };
        let Some((host, epoch, connections, ticket)) = open else {
            let waited = w.exec.now().since(began);
            let rest = HOLD_TIMEOUT.saturating_sub(waited);
            let changed = proxy.changed.changed_since(seen);
            if w.exec.within(rest, changed).await.is_none() {
                return Said::NotDone;
            }
            continue;
        };
        let active = Active { ticket, w: Rc::clone(w), proxy: index, host, session };
        if in_transaction {
            if !begin(w, index, host, session).await {
                // Nothing was done yet; a server that refuses is asked again once it has proven itself.
                drop(active);
                unready(proxy, epoch);
                if refused_in.replace(epoch) == Some(epoch) {
                    return Said::NotDone;
                }
                continue;
            }
            w.exec.sleep(w.rng.millis(1, 60)).await;
            if proxy.state.borrow().connections != connections {
                return Said::NotDone;
            }
        }
        match run(w, index, host, record, connections).await {
            Some(Ok(())) => {
                proxy.served.set(proxy.served.get() + 1);
                return Said::Done;
            }
            Some(Err(postgres::Refused::NotPrimary)) => {
                w.checker.borrow_mut().refused(record);
                drop(active);
                unready(proxy, epoch);
                if in_transaction || refused_in.replace(epoch) == Some(epoch) {
                    return Said::NotDone;
                }
            }
            None if w.plan.mutation == Some(Mutation::ProxySendsAgain) => {
                drop(active);
                unready(proxy, epoch);
            }
            None => {
                drop(active);
                unready(proxy, epoch);
                return Said::Unknown;
            }
        }
    }
}

fn unready(proxy: &Proxy, epoch: Epoch) {
    let mut state = proxy.state.borrow_mut();
    if state.route.is_some_and(|(_, now)| now == epoch) {
        state.ready = false;
    }
    drop(state);
    proxy.changed.notify();
}

async fn begin(w: &Rc<World>, index: usize, host: usize, session: u64) -> bool {
    let (from, limit) = (End::Proxy(index), Duration::from_secs(2));
    let begun =
        net::call(w, from, postgres::client_end(host), limit, move |w, reply: Reply<()>| {
            if postgres::transaction(w, host, session, true) {
                reply.give(());
            }
        });
    begun.await.is_some()
}

/// Sends the write and waits for its end. `None`: nobody knows whether it was executed.
async fn run(
    w: &Rc<World>,
    index: usize,
    host: usize,
    record: Record,
    connections: u64,
) -> Option<Outcome> {
    let proxy = &w.proxies[index];
    w.checker.borrow_mut().sent(w, record);
    let (from, to) = (End::Proxy(index), postgres::client_end(host));
    let answer = Box::pin(net::call(w, from, to, SERVER_TIMEOUT, move |w, reply| {
        postgres::write(w, host, record, reply);
    }));
    let cut = Box::pin(async {
        loop {
            let seen = proxy.changed.version();
            if proxy.state.borrow().connections != connections {
                return;
            }
            proxy.changed.changed_since(seen).await;
        }
    });
    match select(answer, cut).await {
        Either::Left((outcome, _)) => outcome,
        Either::Right(_) => None,
    }
}
