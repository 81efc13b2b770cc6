//! A whole cluster in one seed: hosts, store, network, proxies, clients, and who looks at them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Arguments;
use std::rc::Rc;
use std::time::Duration;

use kornak_cluster::{Moment, SyncMode, SyncState};
use serde_json::{Value, json};

use super::agent;
use super::checker::{Broken, Checker};
use super::client::{self, Tally};
use super::clock::HostClock;
use super::disk::{Disk, Wal};
use super::exec::{Exec, ProcessId};
use super::faults::{self, settings::OddKey, unseen::Trap};
use super::host::{self, Host};
use super::net::{End, Net};
use super::postgres::Run;
use super::proxy::{self, Proxy};
use super::rng::Rng;
use super::scenario::{Kind, Mutation, Scenario};
use super::store::{Shown, Store};
use super::trace::{self, Trace};

/// The cluster's system identifier.
pub const SYSID: &str = "7000000000000000001";

/// After the last fault everybody writes again within this: a promise to a leader without the store
/// (20 s), then a lease, then a failed attempt or two.
pub const RECOVERY: Duration = Duration::from_secs(120);

/// As [`RECOVERY`], in worlds that lack nothing but their store from time to time.
const RECOVERY_FROM_OUTAGE: Duration = Duration::from_secs(45);

/// The part of the store that a follower is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stall {
    /// Nothing at all.
    Silent,
    /// Signs of life, and the past.
    Stale,
    /// Signs of life, and for an agent nothing but what it knows.
    Held,
}

/// Everything there is.
pub struct World {
    pub exec: Rc<Exec>,
    pub rng: Rng,
    pub trace: Trace,
    pub plan: Scenario,
    pub net: Net,
    pub store: Store,
    pub hosts: Vec<Host>,
    pub proxies: Vec<Proxy>,
    pub checker: RefCell<Checker>,
    pub tally: Cell<Tally>,
    /// Whatever is no process of the cluster: messages on their way, clients, the hand of fate.
    pub wire: ProcessId,
    pub stalled: RefCell<BTreeMap<End, Stall>>,
    /// Hosts whose REST address is another one's for a while.
    pub answered_by: RefCell<BTreeMap<usize, usize>>,
    /// The next agent that promotes its server is frozen then for so long.
    pub freezes_at_promotion: Cell<Option<Duration>>,
    /// The next agent that sends a claim is frozen then.
    pub freezes_at_claim: Cell<bool>,
    /// The moment that a situation waits for.
    pub trap: Cell<Option<Trap>>,
    /// The next agent that deposes its leader is frozen then for so long.
    pub freezes_at_deposal: Cell<Option<Duration>>,
    /// The dynamic configuration as an operator wants it.
    pub config: RefCell<Value>,
    /// When maintenance mode began.
    pub paused_since: Cell<Option<Moment>>,
    /// Keys that are missing or make no sense.
    pub odd: RefCell<Vec<OddKey>>,
    faults: Cell<bool>,
    over: Cell<bool>,
    numbers: Cell<u64>,
    timelines: Cell<u32>,
}

/// How a world went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub tally: Tally,
    pub promotions: u32,
    pub deposals: u32,
    pub acknowledged: usize,
    /// Simulated time.
    pub lasted: Duration,
    pub broken: Option<Broken>,
    /// The end of the story, if it was asked for.
    pub trace: String,
}

impl World {
    fn new(seed: u64, kind: Kind, mutation: Option<Mutation>, tell: bool) -> Rc<Self> {
        let rng = Rng::new(seed);
        let plan = Scenario::draw(&rng, kind, mutation);
        let exec = Exec::new();
        let wire = exec.process();
        let idle = exec.process();
        let first = 1;
        let hosts = (0..plan.nodes)
            .map(|index| {
                let disk = Disk {
                    wal: Wal::new(first),
                    standby_signal: index > 0,
                    upstream: None,
                    sync_names: String::new(),
                    clean: true,
                    was_primary: index == 0,
                    torn: false,
                    files: BTreeMap::new(),
                };
                Host::new(index, disk, HostClock::new(&rng), idle)
            })
            .collect();
        let proxies = (0..plan.proxies).map(|index| Proxy::new(index, idle)).collect();
        let store = Store::new(plan.nodes);
        Rc::new(Self {
            exec,
            rng,
            trace: Trace::new(tell),
            net: Net::default(),
            store,
            hosts,
            proxies,
            checker: RefCell::default(),
            tally: Cell::default(),
            wire,
            stalled: RefCell::default(),
            answered_by: RefCell::default(),
            freezes_at_promotion: Cell::new(None),
            freezes_at_claim: Cell::new(false),
            trap: Cell::new(None),
            freezes_at_deposal: Cell::new(None),
            config: RefCell::new(plan.config()),
            paused_since: Cell::new(None),
            odd: RefCell::default(),
            faults: Cell::new(true),
            over: Cell::new(false),
            numbers: Cell::new(first + 1),
            timelines: Cell::new(2),
            plan,
        })
    }

    /// A number that was never used.
    pub fn next_number(&self) -> u64 {
        self.numbers.replace(self.numbers.get() + 1)
    }

    /// A timeline that was never used: two promotions that did not know of each other would take the
    /// same number in PostgreSQL; docs/safety.md says what this leaves out.
    pub fn next_timeline(&self) -> u32 {
        self.timelines.replace(self.timelines.get() + 1)
    }

    /// The value of `failsafe` that lists every host.
    pub fn everybody(&self) -> String {
        let urls = self
            .hosts
            .iter()
            .map(|host| (host.name.clone(), json!(format!("http://{}:8008/patroni", host.name))));
        Value::Object(urls.collect()).to_string()
    }

    /// Whether things still go wrong.
    pub fn faults_on(&self) -> bool {
        self.faults.get()
    }

    /// A line of a host's story.
    pub fn say(&self, index: usize, text: Arguments<'_>) {
        let name = &self.hosts[index].name;
        self.trace.line(self.exec.now(), format_args!("{name}: {text}"));
    }

    /// A line of the story.
    pub fn note(&self, text: Arguments<'_>) {
        self.trace.line(self.exec.now(), format_args!("-- {text}"));
    }

    /// The store has changed: whoever follows it will see.
    pub fn publish(self: &Rc<Self>, shown: &Shown) {
        if self.store.is_up() {
            for end in self.followers() {
                self.send_view(end, shown, true);
            }
        }
    }

    fn followers(&self) -> Vec<End> {
        let hosts = (0..self.hosts.len()).map(End::Host);
        hosts.chain((0..self.proxies.len()).map(End::Proxy)).collect()
    }

    fn send_view(self: &Rc<Self>, end: End, shown: &Shown, new: bool) {
        let stalled = self.stalled.borrow().get(&end).copied();
        if stalled == Some(Stall::Silent) || (new && stalled.is_some()) {
            return;
        }
        if !self.net.both(end, End::Store) {
            return;
        }
        let (there, shown) = (Rc::clone(self), shown.clone());
        self.exec.after(self.net.delay(&self.rng), move || {
            if !there.net.both(end, End::Store) {
                return;
            }
            match end {
                End::Host(index) => agent::show(&there, index, shown.view),
                End::Proxy(index) => proxy::show(&there, index, shown.state),
                End::Store => {}
            }
        });
    }

    /// Signs of life, and what was missed; sometimes from a member of the store that lags behind.
    fn beat(self: &Rc<Self>) {
        if !self.store.is_up() {
            return;
        }
        for end in self.followers() {
            let lags = self.faults_on() && self.rng.chance(100);
            let stale = self.stalled.borrow().contains_key(&end);
            let back = if lags || stale { 1 + self.rng.below(30) } else { 0 };
            let shown = self.store.lagging(back).unwrap_or_else(|| self.store.shown());
            self.send_view(end, &shown, false);
        }
    }

    /// Everything is mended, and nothing breaks any more.
    pub fn heal(self: &Rc<Self>) {
        self.note(format_args!("HEALED"));
        self.faults.set(false);
        self.net.set_slowness(0);
        self.net.heal_all();
        self.stalled.borrow_mut().clear();
        self.answered_by.borrow_mut().clear();
        faults::settings::mend(self);
        self.store.set_up(self, true);
        for index in 0..self.hosts.len() {
            self.store.deposed(index, false);
            self.hosts[index].disk_hangs.set(false);
            self.hosts[index].does_not_start.set(false);
            host::thaw(self, index);
            self.exec.thaw(self.hosts[index].agent_process.get(), Duration::ZERO);
            if !self.hosts[index].up.get() {
                host::boot(self, index);
            }
            agent::start(self, index);
        }
        for proxy in &self.proxies {
            proxy::start(self, proxy.index);
            self.exec.thaw(proxy.process.get(), Duration::ZERO);
            proxy.served.set(0);
        }
    }

    /// One primary, everybody else follows it, the clients of every proxy write, and the store says so: every member is
    /// there, and in synchronous mode a standby is named.
    pub fn is_well(&self) -> bool {
        let truth = self.store.truth();
        let listed = self.hosts.iter().all(|host| truth.members.contains_key(&host.name));
        let leads = |index: usize| self.hosts[index].server.borrow().is_primary();
        let able = |index: usize| !leads(index) && !self.plan.tags[index].nofailover();
        let somebody = self.plan.sync != SyncMode::Off && (0..self.hosts.len()).any(able);
        let named = truth.sync.as_ref().is_some_and(|sync| !sync.standbys().is_empty());
        if !listed || (somebody && !named) {
            return false;
        }
        let primaries = self.hosts.iter().filter(|host| host.server.borrow().is_primary()).count();
        let following = self.hosts.iter().filter(|host| host.server.borrow().streams()).count();
        primaries == 1
            && following + 1 == self.hosts.len()
            && self.proxies.iter().all(|proxy| proxy.served.get() >= 3)
    }
}

async fn beats(w: Rc<World>) {
    loop {
        w.exec.sleep(Duration::from_secs(1)).await;
        w.beat();
    }
}

/// Ends the faults, then the world.
async fn referee(w: Rc<World>, kind: Kind) {
    let limit = if kind == Kind::Outage { RECOVERY_FROM_OUTAGE } else { RECOVERY };
    w.exec.sleep(w.plan.faults_until).await;
    w.heal();
    let healed = w.exec.now();
    while !w.is_well() {
        if w.exec.now().since(healed) > limit {
            w.checker.borrow_mut().found(&w, Broken::NoPrimary);
            return;
        }
        w.exec.sleep(Duration::from_millis(250)).await;
    }
    let primary = w.hosts.iter().find(|host| host.server.borrow().is_primary());
    if let Some(primary) = primary.filter(|_| w.plan.sync != SyncMode::Off) {
        w.checker.borrow_mut().has_everything(&w, primary.index);
    }
    w.over.set(true);
}

/// The holder of the leader key serves or gives it up within this, while another one can lead: two starts or one silence of
/// [`Scenario::start_timeout`], a lease, and stalls.
const SERVES_WITHIN: Duration = Duration::from_secs(60);

/// Looks at that.
async fn holder(w: Rc<World>) {
    let mut idle = None;
    while w.faults_on() {
        w.exec.sleep(Duration::from_millis(500)).await;
        let truth = w.store.truth();
        let leader = truth.leader.as_ref();
        let holds = leader.and_then(|it| Some((host::index_of(&w, &it.name)?, it.epoch)));
        let idles = holds.filter(|(index, _)| {
            let host = &w.hosts[*index];
            let serves = host.server.borrow().is_primary() && !host.disk_hangs.get();
            !serves && w.hosts.iter().any(|other| other.index != *index && can_lead(&w, other))
        });
        let Some(idles) = idles else {
            idle = None;
            continue;
        };
        let (known, since) = *idle.get_or_insert((idles, w.exec.now()));
        if known != idles {
            idle = None;
        } else if w.exec.now().since(since) > SERVES_WITHIN {
            let host = w.hosts[idles.0].name.clone();
            w.checker.borrow_mut().found(&w, Broken::KeyWithoutServer { host });
            return;
        }
    }
}

/// Whether a standby is fit to take over.
fn can_lead(w: &World, host: &Host) -> bool {
    let truth = w.store.truth();
    let named = w.plan.sync == SyncMode::Off
        || truth.sync.as_ref().is_some_and(|sync| sync.quorum == 0 && sync.matches(&host.name));
    let well = host.alive() && !host.disk_hangs.get() && !host.does_not_start.get();
    let runs = host.server.borrow().state().0 == Run::Standby && host.agent.borrow().is_some();
    named && well && runs && !w.plan.tags[host.index].nofailover()
}

thread_local! {
    /// The world that this thread lives through.
    static CURRENT: RefCell<Option<Rc<World>>> = const { RefCell::new(None) };
}

/// The world that this thread lives through.
pub fn current() -> Rc<World> {
    let current = CURRENT.with_borrow(Option::clone);
    current.expect("agents live in worlds alone")
}

/// Lives through one world.
pub fn live(seed: u64, kind: Kind, mutation: Option<Mutation>, tell: bool) -> Report {
    if tell {
        return tracing::subscriber::with_default(trace::subscriber(), || {
            live_through(seed, kind, mutation, true)
        });
    }
    live_through(seed, kind, mutation, false)
}

fn live_through(seed: u64, kind: Kind, mutation: Option<Mutation>, tell: bool) -> Report {
    let w = World::new(seed, kind, mutation, tell);
    CURRENT.replace(Some(Rc::clone(&w)));
    w.net.set_slowness(w.plan.slowness);
    w.note(format_args!("seed {seed}, {kind:?}, {:?}", w.plan));
    let keys = &w.store.keys;
    let mut puts = vec![
        (keys.initialize(), SYSID.to_owned()),
        (keys.config(), w.config.borrow().to_string()),
        (keys.history(), "[]".to_owned()),
    ];
    // As the leader that was the last has left it.
    if w.plan.failsafe {
        puts.push((keys.failsafe(), w.everybody()));
    }
    if w.plan.sync != SyncMode::Off {
        let alone = SyncState::new(&w.hosts[0].name, &[]);
        puts.push((keys.sync(), json!(alone).to_string()));
    }
    w.store.prepare(&w, &puts);
    for index in 0..w.hosts.len() {
        host::boot(&w, index);
    }
    let mut session = 0;
    for index in 0..w.proxies.len() {
        proxy::start(&w, index);
        for _ in 0..w.plan.clients {
            session += 1;
            w.exec.spawn(w.wire, client::run(Rc::clone(&w), index, session));
        }
    }
    w.exec.spawn(w.wire, beats(Rc::clone(&w)));
    w.exec.spawn(w.wire, faults::run(Rc::clone(&w), kind));
    if kind == Kind::Disks {
        w.exec.spawn(w.wire, holder(Rc::clone(&w)));
    }
    w.exec.spawn(w.wire, referee(Rc::clone(&w), kind));
    let end = Moment::new(w.plan.faults_until + RECOVERY + Duration::from_secs(5));
    w.exec.run(end, || w.checker.borrow_mut().look(&w) && !w.over.get());
    let report = Report {
        tally: w.tally.get(),
        promotions: w.checker.borrow().promotions,
        deposals: w.checker.borrow().deposals,
        acknowledged: w.checker.borrow().acknowledged_count(),
        lasted: w.exec.now().since_start(),
        broken: w.checker.borrow().broken().cloned(),
        trace: w.trace.tell(),
    };
    end_world(&w);
    CURRENT.take();
    report
}

/// Breaks the cycles, so that thousands of worlds fit into memory.
fn end_world(w: &Rc<World>) {
    for host in &w.hosts {
        w.exec.kill(host.agent_process.get());
        host.forget();
    }
    w.net.clear();
    w.exec.clear();
    w.net.clear();
    w.exec.clear();
}
