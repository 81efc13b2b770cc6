//! The agent's shell around the real [`decide`]: look, decide, apply, wait; jobs and errands beside
//! it. It follows `kornak_agent::driver` step by step, with one difference: every instruction is a
//! point at which the process may be killed or frozen.

pub mod handover;
pub mod jobs;
pub mod keeper;
pub mod leading;
pub mod rest;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use kornak_agent::ha::sync::Writes;
use kornak_agent::ha::upstream::Source;
use kornak_agent::ha::{Action, Decision, Job, Lease, Race, Server, Snapshot, Store, Why, decide};
use kornak_cluster::{ClusterState, Lsn, Moment};

use super::exec::{Notify, ProcessId, TaskId};
use super::host::{self, Host};
use super::net::End;
use super::postgres;
use super::scenario::Mutation;
use super::world::World;
use keeper::{Ahead, Held};

/// A store that says nothing for so long is away.
const SILENCE: Duration = Duration::from_secs(3);

/// Between two looks at a server in which nothing seems to happen.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Time the agent itself takes to stop a server.
pub const STOP_BUDGET: Duration = Duration::from_secs(1);

/// A node whose attempt to lead failed leaves the race to others for so long.
const BACK_OFF: Duration = Duration::from_secs(5);

/// One life of an agent.
pub struct Agent {
    pub w: Rc<World>,
    pub host: usize,
    pub process: ProcessId,
    /// Asks for a cycle.
    pub cycle: Notify,
    view: RefCell<Arc<ClusterState>>,
    /// On the host's clock; `None` before the first word of the store.
    heard: Cell<Option<Moment>>,
    lost_since: Cell<Option<Moment>>,
    pub held: Cell<Option<Held>>,
    /// Grows when a leadership is given up; a renewal under way must not bring it back.
    pub given_up: Cell<u64>,
    pub claiming: Cell<bool>,
    pub ahead: Cell<Option<Ahead>>,
    pub gate: Gate,
    job: RefCell<Option<(Job, TaskId)>>,
    errand: Cell<Option<TaskId>>,
    race: RefCell<Option<Race>>,
    pub race_not_before: Cell<Option<Moment>>,
    /// The last failsafe round was accepted by everybody.
    pub confirmed: Cell<bool>,
    pub unproven_failsafe: RefCell<Option<BTreeMap<String, String>>>,
    pub sync_writes: Cell<Writes>,
    /// `synchronous_standby_names` and where the log ended when it was first seen in effect.
    names_seen: RefCell<Option<(String, Lsn)>>,
    told: RefCell<Option<(Action, Why)>>,
    /// The last look at the server.
    seen: RefCell<Option<Seen>>,
}

/// A look at a server, and in which life of it.
#[derive(Clone)]
struct Seen {
    at: Moment,
    state: (postgres::Run, u32),
    server: Server,
}

/// Serializes operations on the leader key.
#[derive(Default)]
pub struct Gate {
    closed: Cell<bool>,
    opened: Notify,
}

/// Opens the gate when dropped.
pub struct Passing<'a>(&'a Gate);

impl Gate {
    /// Waits for the others.
    pub async fn pass(&self) -> Passing<'_> {
        while self.closed.get() {
            let seen = self.opened.version();
            self.opened.changed_since(seen).await;
        }
        self.closed.set(true);
        Passing(self)
    }
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        self.0.closed.set(false);
        self.0.opened.notify();
    }
}

/// Starts the agent of a host that is up.
pub fn start(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    if !host.up.get() || host.agent.borrow().is_some() {
        return;
    }
    let process = w.exec.process();
    host.agent_process.set(process);
    if w.plan.mutation == Some(Mutation::PromiseNotDurable) {
        host.disk.borrow_mut().promise = None;
    }
    let agent = Rc::new(Agent {
        w: Rc::clone(w),
        host: index,
        process,
        cycle: Notify::default(),
        view: RefCell::default(),
        heard: Cell::new(None),
        lost_since: Cell::new(None),
        held: Cell::new(None),
        given_up: Cell::new(0),
        claiming: Cell::new(false),
        ahead: Cell::new(None),
        gate: Gate::default(),
        job: RefCell::default(),
        errand: Cell::new(None),
        race: RefCell::default(),
        race_not_before: Cell::new(None),
        confirmed: Cell::default(),
        unproven_failsafe: RefCell::default(),
        sync_writes: Cell::default(),
        names_seen: RefCell::default(),
        told: RefCell::default(),
        seen: RefCell::default(),
    });
    host.agent.replace(Some(Rc::clone(&agent)));
    if host.frozen.get() {
        w.exec.freeze(process);
    }
    w.say(index, format_args!("agent starts"));
    w.exec.spawn(process, drive(Rc::clone(&agent)));
    w.exec.spawn(process, keeper::run(Rc::clone(&agent)));
    w.exec.spawn(process, leading::run(Rc::clone(&agent)));
    w.exec.spawn(process, leading::publish(Rc::clone(&agent)));
    w.exec.spawn(process, rest::rounds(agent));
}

/// SIGKILL of the agent; guard and server go on.
pub fn kill(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    if let Some(agent) = host.agent.take() {
        w.say(index, format_args!("agent KILLED"));
        w.exec.kill(agent.process);
        agent.abandon();
    }
}

impl Agent {
    /// Breaks the cycle between a dead agent and its world.
    fn abandon(&self) {
        self.job.take();
        self.race.take();
    }

    /// The machine it runs on.
    pub fn machine(&self) -> &Host {
        &self.w.hosts[self.host]
    }

    /// Its end of the network.
    pub fn end(&self) -> End {
        host::end(self.host)
    }

    /// What the host's clock shows.
    pub fn now(&self) -> Moment {
        self.machine().now(&self.w)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.machine().name
    }

    /// The newest state it has seen.
    pub fn cluster(&self) -> Arc<ClusterState> {
        Arc::clone(&self.view.borrow())
    }

    /// The next instruction: a moment in which anything may happen to the process.
    pub async fn step(&self) {
        let pause = if self.w.faults_on() && self.w.rng.chance(self.w.plan.stalls_per_mille) {
            self.w.rng.millis(20, 3000)
        } else {
            self.w.rng.between(Duration::from_micros(20), Duration::from_micros(400))
        };
        self.w.exec.sleep(pause).await;
    }

    /// Waits.
    pub async fn sleep(&self, delay: Duration) {
        self.w.exec.sleep(delay).await;
    }

    /// A line for the trace.
    pub fn say(&self, text: std::fmt::Arguments<'_>) {
        self.w.say(self.host, text);
    }

    /// The store's watch shows a state, or a sign of life.
    pub fn show(self: &Rc<Self>, state: Arc<ClusterState>) {
        let agent = Rc::clone(self);
        self.w.exec.spawn(self.process, async move {
            agent.heard.set(Some(agent.now()));
            if state.revision > agent.view.borrow().revision {
                agent.view.replace(state);
                agent.cycle.notify();
            } else if agent.lost_since.get().is_some() {
                agent.cycle.notify();
            }
        });
    }

    /// How fresh the knowledge of the store is.
    pub fn reach(&self) -> Store {
        let now = self.now();
        match self.heard.get() {
            None => Store::Never,
            Some(heard) if now.since(heard) < SILENCE => {
                self.lost_since.set(None);
                Store::Live
            }
            Some(_) => {
                let since = self.lost_since.get().unwrap_or(now);
                self.lost_since.set(Some(since));
                Store::Lost { since }
            }
        }
    }

    /// What the server said of itself when it was last looked at.
    pub fn observe(&self) -> Server {
        self.observed().1
    }

    /// The same, and when that was.
    fn observed(&self) -> (Moment, Server) {
        let now = self.now();
        let state = self.machine().server.borrow().state();
        match &*self.seen.borrow() {
            Some(seen)
                if self.w.plan.untrue && seen.state == state && now.since(seen.at) < LOOK_EVERY =>
            {
                return (seen.at, seen.server.clone());
            }
            _ => {}
        }
        (now, self.look_again())
    }

    /// Something may have changed: the next decision is made from a new look.
    pub fn notice(&self) {
        self.seen.take();
    }

    /// Looks at the server now.
    pub fn look_again(&self) -> Server {
        let server = self.live();
        let state = self.machine().server.borrow().state();
        let seen = Seen { at: self.now(), state, server: server.clone() };
        self.seen.replace(Some(seen));
        server
    }

    fn live(&self) -> Server {
        let disk = self.machine().disk.borrow();
        let mut seen = self.names_seen.borrow_mut();
        if self.machine().server.borrow().is_primary() {
            if seen.as_ref().is_none_or(|(names, _)| *names != disk.sync_names) {
                *seen = Some((disk.sync_names.clone(), disk.wal.end()));
            }
        } else {
            *seen = None;
        }
        let since = seen.as_ref().map_or(Lsn(0), |(_, since)| *since);
        drop((disk, seen));
        postgres::look(&self.w, self.host, since)
    }

    fn look(&self) -> Snapshot {
        let store = self.reach();
        let mut cluster = self.cluster();
        if cluster.leader.is_some() {
            self.race.take();
        }
        self.forget_promise(&cluster, store);
        if self.w.plan.mutation == Some(Mutation::CandidateIgnoresSync) && cluster.leader.is_none()
        {
            Arc::make_mut(&mut cluster).sync = None;
        }
        if self.w.plan.mutation == Some(Mutation::QuorumIgnored)
            && let Some(sync) = Arc::make_mut(&mut cluster).sync.as_mut()
        {
            sync.quorum = 0;
        }
        if self.w.plan.mutation == Some(Mutation::FailsafeListIgnored) {
            Arc::make_mut(&mut cluster).failsafe = None;
        }
        let promise = self.machine().disk.borrow().promise.clone();
        let boot = self.machine().clock.borrow().boot;
        let promise_until = promise
            .map(|promise| if promise.boot == boot { promise.until } else { self.again(promise) });
        let job = self.running_job();
        let race = self.race.borrow().clone();
        let (observed_at, server) = self.observed();
        Snapshot {
            now: self.now(),
            observed_at,
            me: self.name().to_owned(),
            tags: self.w.plan.tags[self.host].clone(),
            store,
            cluster,
            data: postgres::control(&self.w, self.host),
            server,
            lease: match self.held.get() {
                Some(held) => Lease::Mine { epoch: held.epoch, until: held.until },
                None => Lease::None,
            },
            job,
            race,
            promise_until,
            confirmed: self.confirmed.get(),
            // There is no maintenance mode, and so no server without a guard.
            leaderless_since: None,
            race_not_before: self.race_not_before.get(),
            lacks_watchdog: false,
            clones_alone: false,
            lacks_slots: false,
            failed_starts: 0,
            store_is_full: false,
            stop_budget: STOP_BUDGET,
        }
    }

    /// A promise of another boot counts again in full from now on.
    fn again(&self, promise: super::disk::Promise) -> Moment {
        let until = self.now() + promise.length;
        let boot = self.machine().clock.borrow().boot;
        self.machine().disk.borrow_mut().promise =
            Some(super::disk::Promise { boot, until, ..promise });
        until
    }

    /// A promise has served its purpose once another leadership than the one it was given to is seen.
    fn forget_promise(&self, cluster: &ClusterState, store: Store) {
        let Some(leader) = cluster.leader.as_ref().filter(|_| store == Store::Live) else { return };
        let mut disk = self.machine().disk.borrow_mut();
        let newer = |promise: &super::disk::Promise| leader.epoch.revision > promise.revision;
        let any = self.w.plan.mutation == Some(Mutation::PromiseForgottenWhileLeaderShows);
        if disk.promise.as_ref().is_some_and(|promise| any || newer(promise)) {
            disk.promise = None;
        }
    }

    /// The job under way.
    pub fn running_job(&self) -> Option<Job> {
        let mut job = self.job.borrow_mut();
        if job.is_some_and(|(_, task)| !self.w.exec.runs(task)) {
            *job = None;
        }
        job.map(|(job, _)| job)
    }

    /// Starts a job unless one is under way.
    pub fn begin(self: &Rc<Self>, job: Job, work: impl Future<Output = ()> + 'static) {
        if self.running_job().is_some() {
            return;
        }
        let agent = Rc::clone(self);
        let task = self.w.exec.spawn(self.process, async move {
            work.await;
            agent.notice();
            agent.cycle.notify();
        });
        self.job.replace(Some((job, task)));
    }

    /// Changes what is known of the writes of `sync`.
    pub fn note_sync_write<T>(&self, change: impl FnOnce(&mut Writes) -> T) -> T {
        let mut writes = self.sync_writes.get();
        let answer = change(&mut writes);
        self.sync_writes.set(writes);
        answer
    }

    fn errand(self: &Rc<Self>, work: impl Future<Output = ()> + 'static) {
        if self.errand.get().is_some_and(|task| self.w.exec.runs(task)) {
            return;
        }
        let agent = Rc::clone(self);
        let task = self.w.exec.spawn(self.process, async move {
            work.await;
            agent.notice();
            agent.cycle.notify();
        });
        self.errand.set(Some(task));
    }

    fn apply(self: &Rc<Self>, decision: &Decision, cluster: &Arc<ClusterState>) {
        let agent = Rc::clone(self);
        match decision.action.clone() {
            Action::Wait | Action::CopySlots | Action::Lead | Action::Refuse => {}
            Action::Look => self.notice(),
            // Every host of the model has the cluster's data from the start.
            Action::Bootstrap
            | Action::Clone { .. }
            | Action::CloneWithoutLeader
            | Action::DemoteCluster => {}
            Action::Rejoin { leader } => self.begin(Job::Rejoin, jobs::rejoin(agent, leader)),
            Action::StartPrimary => self.begin(Job::StartPrimary, jobs::start_primary(agent)),
            Action::Promote => self.begin(Job::Promote, jobs::promote(agent)),
            Action::Demote { immediate } => {
                if self.running_job().is_some_and(|job| job != Job::Demote)
                    && let Some((_, task)) = self.job.take()
                {
                    self.w.exec.abort(task);
                }
                self.begin(Job::Demote, jobs::demote(agent, immediate));
            }
            Action::AskPeers => self.errand(async move {
                let race = rest::ask_all(&agent).await;
                agent.race.replace(Some(race));
            }),
            Action::Claim { take_over } => {
                self.errand(jobs::claim(agent, Arc::clone(cluster), take_over));
            }
            Action::Follow { upstream } => self.errand(async move {
                agent.step().await;
                let upstream = match upstream {
                    Source::Member(name) => host::index_of(&agent.w, &name),
                    Source::Remote | Source::Archive => None,
                };
                postgres::follow(&agent.w, agent.host, upstream);
            }),
            Action::Release => {
                self.race_not_before.set(Some(self.now() + BACK_OFF));
                // From this moment on nothing is held; the next decision must not start a primary.
                let held = keeper::give_up(self);
                self.w.exec.spawn(self.process, async move {
                    keeper::release_given_up(&agent, held, Vec::new(), Vec::new()).await.ok();
                    jobs::disarm(&agent).await;
                });
            }
        }
    }

    fn tell(&self, decision: &Decision) {
        let now = (decision.action.clone(), decision.why);
        if self.told.borrow().as_ref() != Some(&now) {
            self.say(format_args!("decides {:?}: {:?}", now.0, now.1));
            self.told.replace(Some(now));
        }
    }
}

async fn drive(agent: Rc<Agent>) {
    loop {
        let seen = agent.cycle.version();
        keeper::take_up_again_if_ours(&agent);
        let snapshot = agent.look();
        let decision = decide(&snapshot);
        agent.tell(&decision);
        // Between the look and the step.
        agent.step().await;
        agent.apply(&decision, &snapshot.cluster);
        let changed = agent.cycle.changed_since(seen);
        if let Either::Left(_) = select(changed, agent.w.exec.sleep(decision.recheck)).await {
            // Many changes at once are one reason to look.
            agent.sleep(Duration::from_micros(300)).await;
        }
    }
}
