//! The state that all parts of one proxy share. Nothing here is global: several proxies may share a
//! process.

pub mod ahead;
pub mod losses;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use arc_swap::ArcSwap;
use bytes::Bytes;
use kornak_cluster::{GroupId, LeaseId, Timeline, Topology};
use kornak_config::ProxySettings;
use kornak_config::rules::Rules;
use kornak_protocol::params::Parameters;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, watch};

use ahead::Ahead;
use losses::Losses;

use crate::admission::access::Access;
use crate::admission::buckets::Buckets;
use crate::admission::doors::Doors;
use crate::admission::identity::Identity;
use crate::admission::lanes::Lanes;
use crate::admission::verifiers::Verifiers;
use crate::cluster::probe::Prober;
use crate::cluster::route;
use crate::cluster::standing::{Generation, Proof, Standing, Standings};
use crate::metrics::Metrics;
use crate::net::tls::{ClientSide, ServerTls};
use crate::pool::lender::Lender;
use crate::pool::link::Link;
use crate::registry::{Flags, Registry};
use crate::waiting::gate::Gate;
use crate::waiting::read_source::Source;

/// Identifier of a cluster, and the timeline that its last known leader was on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bar {
    pub identifier: Option<String>,
    pub timeline: Option<Timeline>,
}

/// Logins to one server at once. A mass of sessions that move costs a server 5 to 10 ms each; more
/// at once would only make each of them slower.
pub const MAX_LOGINS_PER_SERVER: usize = 64;

/// Sessions that ask at once what they hold, before a switchover: clients go on working meanwhile.
const MAX_QUESTIONS: usize = 16;

/// Kinds of sessions (startup packets) whose parameters are remembered for logins that are answered
/// while no server is there. An application has a few; 1,024 cost 2 MB.
const MAX_WELCOMES: usize = 1024;

/// Requests that are passed on at once; each costs a connection to every peer for a moment, and anyone
/// can send one. Later ones wait, and are dropped with their connection by `login_timeout`.
const MAX_PASSED_ON: usize = 16;

/// The state of one proxy.
pub struct Shared {
    /// The settings that hold; a reload puts others in their place.
    settings: ArcSwap<ProxySettings>,
    /// Names this proxy in the store and in logs.
    pub id: String,
    pub gate: Arc<Gate>,
    pub registry: Arc<Registry>,
    pub metrics: Metrics,
    pub topology: watch::Sender<Arc<Topology>>,
    pub standings: watch::Sender<Arc<Standings>>,
    /// The state of the gate, for the status page.
    pub holding: watch::Sender<Holding>,
    /// Server connections may be opened: we are registered, or there is no store to register in.
    pub registered: watch::Sender<bool>,
    /// Whether our registration was there when the store was last looked at.
    pub registration_seen: watch::Sender<bool>,
    /// The lease of our registration; 0 if it has to be written again.
    pub lease: AtomicI64,
    /// Revision of the store in which the registration was written.
    pub registered_at: AtomicU64,
    pub prober: Arc<Prober>,
    pub verifiers: Verifiers,
    pub access: Access,
    pub doors: Arc<Doors>,
    /// Cancel requests that meant nobody here, by address.
    pub cancels: Mutex<Buckets>,
    pub client_tls: ClientSide,
    /// Where other proxies of the cluster reach this one.
    pub reached_at: Option<String>,
    /// Encrypts what goes to them, if they can.
    pub peer_tls: ServerTls,
    /// Cancel requests that are being passed on to them.
    pub passing_on: Semaphore,
    /// The rules of logins: who may log in, and how.
    pub rules: ArcSwap<Rules>,
    /// Lends server connections where the listener's clients share them.
    pub lender: Arc<Lender>,
    /// Name of no server.
    pub nobody: Arc<str>,
    /// The store has answered since the start.
    pub store_seen: AtomicBool,
    /// Bars that a server must reach, known from before the start, by group; only while the store has not answered.
    pub bars: Mutex<HashMap<GroupId, Bar>>,
    /// A planned handover is being prepared: who becomes idle asks its server what it holds.
    pub asks: AtomicBool,
    /// Room for questions to servers what a session holds.
    pub asking: Semaphore,
    /// Servers that were lost lately.
    pub losses: Losses,
    /// Logins that were begun while a switchover is prepared.
    pub ahead: Ahead,
    /// A session listens again on its new server.
    pub listens_again: Notify,
    /// Grows whenever a connection might have to be given up; sessions look before they start a
    /// transaction.
    generation: AtomicU64,
    /// The proof that was doubted last, by group.
    doubts: Mutex<HashMap<GroupId, Proof>>,
    doubted: Notify,
    dialling: Mutex<HashMap<Arc<str>, Arc<Semaphore>>>,
    welcomes: Mutex<HashMap<Bytes, Welcome>>,
    dice: AtomicUsize,
    /// Sessions on standbys of a Citus cluster's coordinator read other groups from their primaries.
    reads_primaries: AtomicBool,
    /// Why the last thing that a person should know of went wrong.
    pub trouble: Mutex<HashMap<&'static str, String>>,
    /// When settings were read again: bounds of clients' times count from there.
    pub timed_since: Mutex<Option<Instant>>,
}

/// The properties that sessions with the same startup packet have in common.
struct Welcome {
    when: Instant,
    params: Arc<Parameters>,
    /// Of the session that logged in last.
    identity: Weak<Identity>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The reason for which the gate is closed, if it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    #[default]
    Open,
    /// A switchover waits for the ends of transactions.
    Draining,
    /// A switchover has waited too long: clients go on.
    Released,
    /// The old leader stops and the new one is promoted.
    Switching,
    /// A Citus cluster's metadata follow a switchover.
    Settling,
    /// A group has no primary.
    Failover,
    /// A group has no standby: only sessions on standbys wait.
    Reading,
}

impl Phase {
    /// The phase as status and logs show it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Draining => "draining",
            Self::Released => "released",
            Self::Switching => "switching",
            Self::Settling => "settling",
            Self::Failover => "failover",
            Self::Reading => "reading",
        }
    }
}

/// The state of the gate.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holding {
    pub phase: Phase,
    pub handover: Option<String>,
    pub attempt: u32,
    pub acknowledged: bool,
    /// Groups of a Citus cluster for whose primary somebody waits.
    pub without_primary: Vec<u32>,
    /// Groups for whose standbys sessions on standbys wait.
    pub without_standby: Vec<u32>,
    /// Groups for whose sake sessions on standbys read from primaries.
    pub reads_primaries_for: Vec<u32>,
}

impl Shared {
    /// A proxy that knows nothing of its cluster yet.
    pub fn new(
        settings: ProxySettings,
        id: String,
        lender: Arc<Lender>,
        prober: Prober,
        client_tls: ClientSide,
        peer_tls: ServerTls,
        reached_at: Option<String>,
    ) -> Self {
        let prober = Arc::new(prober);
        let lanes = Arc::new(Lanes::new(Arc::clone(&prober)));
        let verifiers = Verifiers::new(&settings.auth, Arc::clone(&lanes));
        Self {
            id,
            gate: Arc::new(Gate::new(lender.lanes())),
            registry: Arc::new(Registry::default()),
            metrics: Metrics::default(),
            topology: watch::Sender::new(Arc::new(Topology::default())),
            standings: watch::Sender::new(Arc::new(Standings::default())),
            holding: watch::Sender::new(Holding::default()),
            registered: watch::Sender::new(!matches!(
                settings.source,
                kornak_config::proxy::Source::Dcs(_)
            )),
            registration_seen: watch::Sender::new(true),
            lease: AtomicI64::new(0),
            registered_at: AtomicU64::new(0),
            prober,
            verifiers,
            access: Access::new(lanes),
            doors: Arc::new(Doors::new(&settings.limits)),
            cancels: Mutex::default(),
            client_tls,
            reached_at,
            peer_tls,
            passing_on: Semaphore::new(MAX_PASSED_ON),
            rules: ArcSwap::from_pointee(settings.auth.rules.clone()),
            lender,
            nobody: "".into(),
            store_seen: AtomicBool::new(false),
            bars: Mutex::default(),
            asks: AtomicBool::new(false),
            asking: Semaphore::new(MAX_QUESTIONS),
            losses: Losses::default(),
            ahead: Ahead::default(),
            listens_again: Notify::new(),
            generation: AtomicU64::new(1),
            doubts: Mutex::new(HashMap::new()),
            doubted: Notify::new(),
            dialling: Mutex::new(HashMap::new()),
            welcomes: Mutex::new(HashMap::new()),
            dice: AtomicUsize::new(rand::random_range(0..1024)),
            reads_primaries: AtomicBool::new(false),
            trouble: Mutex::new(HashMap::new()),
            timed_since: Mutex::new(None),
            settings: ArcSwap::from_pointee(settings),
        }
    }

    /// The settings that hold now. For a moment: whoever waits with them in hand keeps others from being cheap.
    #[inline]
    pub fn settings(&self) -> arc_swap::Guard<Arc<ProxySettings>> {
        self.settings.load()
    }

    /// Other settings hold from now on.
    pub fn set_settings(&self, settings: ProxySettings) {
        self.doors.set_bounds(&settings.limits);
        // Nobody counted until now: nobody's time is up at once.
        *self.timed_since.lock() = Some(Instant::now());
        self.rules.store(Arc::new(settings.auth.rules.clone()));
        self.settings.store(Arc::new(settings));
        self.registry.look_anew();
    }

    /// The cluster as last seen.
    pub fn topology(&self) -> Arc<Topology> {
        Arc::clone(&self.topology.borrow())
    }

    /// The servers that serve.
    pub fn standings(&self) -> Arc<Standings> {
        Arc::clone(&self.standings.borrow())
    }

    /// Changes one group's standing; sessions look at their connections if its term ended.
    pub fn change_standing(&self, group: GroupId, change: impl FnOnce(&mut Standing)) {
        let mut ended = false;
        self.standings.send_if_modified(|standings| {
            let mut next = Standings::clone(standings);
            let standing = next.0.entry(group).or_default();
            let before = standing.clone();
            change(standing);
            ended = before.term != standing.term;
            let changed = before != *standing;
            if changed {
                *standings = Arc::new(next);
            }
            changed
        });
        if ended {
            self.recheck();
        }
    }

    /// The cluster has changed.
    pub fn set_topology(&self, topology: Arc<Topology>) {
        self.put_topology(None, topology);
    }

    /// As [`Shared::set_topology`], unless something else than `before` is known by now. False: nothing was
    /// changed.
    pub fn replace_topology(&self, before: &Arc<Topology>, topology: Arc<Topology>) -> bool {
        self.put_topology(Some(before), topology)
    }

    fn put_topology(&self, before: Option<&Arc<Topology>>, topology: Arc<Topology>) -> bool {
        let mut moved = false;
        let mut put = true;
        self.topology.send_if_modified(|known| {
            if before.is_some_and(|before| !Arc::ptr_eq(before, known)) {
                put = false;
                return false;
            }
            let leaders = |t: &Topology| -> Vec<_> {
                let parts = |(id, g): (&GroupId, &Arc<kornak_cluster::topology::Group>)| {
                    (*id, g.leader.as_ref().map(|l| l.0.clone()), route::has_standby(t, *id))
                };
                t.groups.iter().map(parts).collect()
            };
            moved = leaders(known) != leaders(&topology) || known.registered != topology.registered;
            let changed = **known != *topology;
            *known = topology;
            changed
        });
        if moved {
            // A follower may lead now: its sessions belong elsewhere. Or there is a standby again for
            // those whom a leader took in.
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
        put
    }

    /// Every session looks whether its server connection may still be used.
    pub fn recheck(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.registry.raise_all(Flags::RECHECK);
    }

    /// Whom sessions on standbys of a Citus cluster's coordinator ask for what other groups hold.
    pub fn source(&self) -> Source {
        match self.reads_primaries.load(Ordering::Acquire) {
            true => Source::Primaries,
            false => Source::Standbys,
        }
    }

    /// Changes it; sessions log in again before their next transaction.
    pub fn set_source(&self, source: Source) {
        let primaries = source == Source::Primaries;
        if self.reads_primaries.swap(primaries, Ordering::AcqRel) != primaries {
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Whether a connection should be exchanged: it leads to a leader for want of a standby and there is
    /// a standby again, or it reads other groups from other servers than it should by now.
    pub fn may_change(&self, link: &Link) -> bool {
        link.source.is_some_and(|source| source != self.source())
            || link.stands_in && route::has_standby(&self.topology.borrow(), link.group)
    }

    /// Whether the server of a connection still has the part for which the connection was opened.
    pub fn is_current(&self, link: &Link) -> bool {
        if link.leading {
            let worker =
                link.group == GroupId::COORDINATOR || self.topology.borrow().is_worker(link.group);
            return worker && self.standings.borrow().term(link.group) == link.term;
        }
        let topology = self.topology.borrow();
        let group = topology.groups.get(&link.group);
        let leads = group.and_then(|group| group.leader.as_ref());
        leads.is_none_or(|(name, _)| **name != *link.node)
    }

    /// See [`Shared::recheck`].
    #[inline]
    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    /// A session could not use the server that was proven by `proof`.
    pub fn doubt(&self, group: GroupId, proof: Proof) {
        let mut doubts = self.doubts.lock();
        let doubt = doubts.entry(group).or_insert(Proof::NONE);
        if *doubt < proof {
            *doubt = proof;
            drop(doubts);
            self.doubted.notify_waiters();
        }
    }

    /// Whether the newest proof of a group is doubted.
    pub fn is_doubted(&self, group: GroupId) -> bool {
        let proof = self.standings.borrow().proof(group);
        self.doubts.lock().get(&group).is_some_and(|doubt| *doubt >= proof)
    }

    /// Completes at the next doubt.
    pub fn doubted(&self) -> tokio::sync::futures::Notified<'_> {
        self.doubted.notified()
    }

    /// The queue of logins to one server.
    pub fn queue_of(&self, server: &Arc<str>) -> Arc<Semaphore> {
        let mut dialling = self.dialling.lock();
        let queue = dialling.entry(Arc::clone(server));
        Arc::clone(queue.or_insert_with(|| Arc::new(Semaphore::new(MAX_LOGINS_PER_SERVER))))
    }

    /// The parameters that a session with this startup packet was told at login, if there was one
    /// lately.
    pub fn welcome(&self, startup: &Bytes) -> Option<Arc<Parameters>> {
        self.welcomes.lock().get(startup).map(|it| Arc::clone(&it.params))
    }

    /// Remembers it, and answers the one copy that equal sessions share.
    pub fn remember_welcome(&self, startup: &Bytes, params: &Parameters) -> Arc<Parameters> {
        let mut welcomes = self.welcomes.lock();
        if let Some(known) = welcomes.get_mut(startup)
            && *known.params == *params
        {
            known.when = Instant::now();
            return Arc::clone(&known.params);
        }
        if welcomes.len() >= MAX_WELCOMES {
            let oldest = welcomes.iter().min_by_key(|(_, known)| known.when);
            if let Some(key) = oldest.map(|(key, _)| key.clone()) {
                welcomes.remove(&key);
            }
        }
        let params = Arc::new(params.clone());
        let (when, identity) = (Instant::now(), Weak::new());
        welcomes.insert(startup.clone(), Welcome { when, params: Arc::clone(&params), identity });
        params
    }

    /// The one copy that equal sessions share; as long as there is one, and no longer, since it holds
    /// secrets.
    pub fn same_identity(&self, identity: Identity) -> Arc<Identity> {
        let mut welcomes = self.welcomes.lock();
        let Some(known) = welcomes.get_mut(&identity.startup) else { return identity.into() };
        if let Some(same) = known.identity.upgrade().filter(|it| **it == identity) {
            return same;
        }
        let identity = Arc::new(identity);
        known.identity = Arc::downgrade(&identity);
        identity
    }

    /// The lease of our registration, 0 if there is none.
    pub fn lease(&self) -> LeaseId {
        LeaseId(self.lease.load(Ordering::Acquire))
    }

    /// The next turn, for balancing.
    pub fn dice(&self) -> usize {
        self.dice.fetch_add(1, Ordering::Relaxed)
    }

    /// Notes a trouble by its place, or that it is over. Answers whether it is a new one, to be
    /// logged.
    pub fn set_trouble(&self, place: &'static str, what: Option<String>) -> bool {
        let mut troubles = self.trouble.lock();
        let Some(what) = what else {
            troubles.remove(place);
            return false;
        };
        let is_new = troubles.get(place) != Some(&what);
        troubles.insert(place, what);
        is_new
    }
}
