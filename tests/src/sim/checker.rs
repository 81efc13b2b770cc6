//! The six sentences of the design, looked at after every event.
//!
//! Allowances, each of which the design states: a host that was frozen as a whole may show an old
//! primary for as long as its guard takes to wake ([`WAKE`]); in synchronous mode such a primary may
//! not acknowledge anything all the same. An operator who deletes the leader key by hand takes the
//! proof away from a primary that will notice by the next renewal; until the lease would have ended it
//! is not counted against it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use kornak_cluster::{ClusterState, Epoch, Moment, SyncMode};

use super::disk::{Record, Wal};
use super::host;
use super::ports::promise;
use super::world::World;

/// How long the processes of a thawed host take to run again.
pub const WAKE: Duration = Duration::from_millis(10);

/// Everybody who lives, and has the store, knows of maintenance mode by then, and what was begun before is over.
const PAUSE_KNOWN: Duration = Duration::from_secs(12);

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// 1
    TwoPrimaries { hosts: Vec<String> },
    /// 1, in the only form that counts in synchronous mode: an acknowledgement beside another primary.
    AcknowledgedBesides { host: String, other: String },
    /// 2
    PromotedWithoutKey { host: String },
    /// In maintenance mode, during a handover, or beside a primary without a guard.
    DeposedWrongly { host: String },
    /// One that has promised to acknowledge nothing to the deposed leader follows it.
    FenceIsOpen { host: String, other: String },
    /// Maintenance mode has been on for long.
    PromotedInMaintenance { host: String },
    /// 3
    PrimaryPastItsLease { host: String },
    /// 4
    LostCommit { host: String, record: Record },
    /// 4, strict: a commit was acknowledged that one host alone has.
    AcknowledgedAlone { host: String, record: Record },
    /// 5
    ProxyWalkedBack { proxy: usize, from: Epoch, to: Epoch },
    /// 6
    SentAgain { record: Record },
    /// 6, from the server's side.
    ExecutedTwice { record: Record },
    /// A client was told something untrue.
    ToldWrong { record: Record },
    /// A standby's log goes on with another history than its own.
    Corrupted { host: String, upstream: String },
    /// The holder of the leader key neither serves nor gives it up, although another one could lead.
    KeyWithoutServer { host: String },
    /// After the last fault was healed nobody could write, or some client could not.
    NoPrimary,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TwoPrimaries { hosts } => {
                write!(f, "sentence 1: {} accept writes at the same time", hosts.join(" and "))
            }
            Self::AcknowledgedBesides { host, other } => {
                write!(f, "sentence 1: {host} acknowledged a commit while {other} was primary")
            }
            Self::PromotedWithoutKey { host } => {
                write!(f, "sentence 2: {host} became writable without the leader key")
            }
            Self::PromotedInMaintenance { host } => {
                write!(f, "{host} was promoted although maintenance mode is on")
            }
            Self::DeposedWrongly { host } => {
                write!(f, "{host} was deposed in maintenance mode or during a handover")
            }
            Self::FenceIsOpen { host, other } => {
                write!(
                    f,
                    "{host} was deposed while {other}, which has promised otherwise, follows it"
                )
            }
            Self::PrimaryPastItsLease { host } => {
                write!(f, "sentence 3: {host} accepts writes without a lease or a promise of all")
            }
            Self::LostCommit { host, record } => {
                write!(
                    f,
                    "sentence 4: acknowledged commit {record} is not on the new primary {host}"
                )
            }
            Self::AcknowledgedAlone { host, record } => {
                write!(f, "sentence 4: strict mode acknowledged {record}, which only {host} has")
            }
            Self::ProxyWalkedBack { proxy, from, to } => write!(
                f,
                "sentence 5: proxy {proxy} moved from epoch {} back to {}",
                from.revision, to.revision
            ),
            Self::SentAgain { record } => {
                write!(f, "sentence 6: {record} was sent again although it may have been executed")
            }
            Self::ExecutedTwice { record } => write!(f, "sentence 6: {record} was executed twice"),
            Self::ToldWrong { record } => write!(f, "a client was told what is not so of {record}"),
            Self::Corrupted { host, upstream } => {
                write!(f, "{host} streams from {upstream} onto a log that is not a part of it")
            }
            Self::KeyWithoutServer { host } => {
                write!(f, "liveness: {host} holds the leader key and does not serve")
            }
            Self::NoPrimary => write!(f, "liveness: after the last fault not everybody can write"),
        }
    }
}

/// The checker's memory.
#[derive(Default)]
pub struct Checker {
    broken: Option<Broken>,
    /// Something has changed that the state checks look at.
    dirty: bool,
    acknowledged: BTreeSet<Record>,
    executed: BTreeSet<Record>,
    sent: BTreeMap<Record, bool>,
    routed: BTreeMap<usize, Epoch>,
    /// An operator deleted the leader key; its lease would have lasted until then.
    deleted_until: Option<Moment>,
    /// Commits that an operator's deletion of the key excuses.
    forgiven: BTreeSet<Record>,
    /// Leaders whose standbys have deposed them, and until when their leases would have lasted.
    deposed: Vec<(usize, Moment)>,
    /// How many there were.
    pub deposals: u32,
    /// Primaries that maintenance mode has left without a guard.
    unfenced: BTreeSet<usize>,
    pub promotions: u32,
}

impl Checker {
    /// The first promise that was broken.
    pub fn broken(&self) -> Option<&Broken> {
        self.broken.as_ref()
    }

    /// Something has changed.
    pub fn disturbed(&mut self) {
        self.dirty = true;
    }

    /// Commits that clients may rely on.
    pub fn acknowledged_count(&self) -> usize {
        self.acknowledged.len()
    }

    /// A promise is broken; the first one counts.
    pub fn found(&mut self, w: &World, broken: Broken) {
        if self.broken.is_none() {
            tell_why(w);
            w.note(format_args!("BROKEN {broken}"));
            self.broken = Some(broken);
        }
    }

    /// An operator deletes the leader key.
    pub fn key_deleted(&mut self, w: &World) {
        self.deleted_until = Some(w.exec.now() + w.plan.ttl);
    }

    /// The standbys of a leader have deposed it. Until its lease would have ended it is writable, and acknowledges nothing.
    pub fn deposed(
        &mut self,
        w: &World,
        host: usize,
        left: Duration,
        (before, after): (&ClusterState, &ClusterState),
    ) {
        w.say(host, format_args!("DEPOSED by its standbys"));
        let paused = before.config.as_ref().is_some_and(|config| config.pause);
        if paused || before.handover.is_some() || before.unfenced.is_some() {
            self.found(w, Broken::DeposedWrongly { host: w.hosts[host].name.clone() });
        }
        let Some(of) = before.leadership() else { return };
        let promised = after.pledges.iter().filter(|(_, pledged)| pledged.to(of).is_some());
        for index in promised.filter_map(|(name, _)| host::index_of(w, name)) {
            let other = &w.hosts[index];
            if other.server.borrow().follows(&other.disk.borrow()) == Some(host) {
                let (host, other) = (w.hosts[host].name.clone(), other.name.clone());
                self.found(w, Broken::FenceIsOpen { host, other });
            }
        }
        let named = after.sync.iter().flat_map(|sync| {
            sync.standbys().into_iter().chain(sync.leader.clone()).collect::<Vec<_>>()
        });
        for index in named.filter_map(|name| host::index_of(w, &name)) {
            self.has_everything(w, index);
        }
        self.deposals += 1;
        self.deposed.push((host, w.exec.now() + left));
    }

    fn is_deposed(&self, w: &World, host: usize) -> bool {
        self.deposed.iter().any(|(index, until)| *index == host && w.exec.now() <= *until)
    }

    /// Looks at the state of everything. False ends the run.
    pub fn look(&mut self, w: &World) -> bool {
        if self.broken.is_some() {
            return false;
        }
        if std::mem::take(&mut self.dirty) {
            self.note_unfenced(w);
            let writers: Vec<usize> = (0..w.hosts.len())
                .filter(|index| {
                    let host = &w.hosts[*index];
                    host.alive() && host.server.borrow().may_acknowledge()
                })
                .collect();
            for host in &writers {
                if !entitled(w, *host) && !self.excused(w, *host) {
                    let host = w.hosts[*host].name.clone();
                    self.found(w, Broken::PrimaryPastItsLease { host });
                }
            }
            let unexcused = writers.iter().filter(|host| !self.excused(w, **host)).count();
            if writers.len() > 1 && unexcused > 1 {
                let hosts = writers.iter().map(|host| w.hosts[*host].name.clone()).collect();
                self.found(w, Broken::TwoPrimaries { hosts });
            }
            if writers.iter().any(|host| self.excused(w, *host)) {
                // Look again when the excuse may be over.
                self.dirty = true;
            }
        }
        self.broken.is_none()
    }

    /// In maintenance mode, and until its guard is back or it has ended, a primary is the operator's; the next leader takes
    /// the mark away.
    fn note_unfenced(&mut self, w: &World) {
        let truth = w.store.truth();
        let marked = truth.unfenced.as_ref().and_then(|it| host::index_of(w, &it.member));
        let guarded = |index: usize| marked != Some(index) && entitled(w, index);
        let primary = |index: usize| w.hosts[index].server.borrow().may_acknowledge();
        self.unfenced.retain(|index| primary(*index) && !guarded(*index));
        self.unfenced.extend(marked.filter(|index| primary(*index)));
    }

    fn excused(&self, w: &World, host: usize) -> bool {
        self.is_deposed(w, host) || self.excused_otherwise(w, host)
    }

    fn excused_otherwise(&self, w: &World, host: usize) -> bool {
        let now = w.exec.now();
        let marked = self.unfenced.contains(&host);
        let woke = w.hosts[host].thawed_at.get();
        woke.is_some_and(|at| now.since(at) <= WAKE)
            || marked
            || self.deleted_until.is_some_and(|until| now <= until)
    }

    /// A server has become writable.
    pub fn became_writable(&mut self, w: &Rc<World>, index: usize, promoted: bool) {
        self.promotions += 1;
        let host = &w.hosts[index];
        let paused = w.paused_since.get().is_some_and(|at| w.exec.now().since(at) > PAUSE_KNOWN);
        if promoted && paused && w.store.truth().handover.is_none() {
            self.found(w, Broken::PromotedInMaintenance { host: host.name.clone() });
        }
        if !entitled(w, index) && !self.excused(w, index) {
            self.found(w, Broken::PromotedWithoutKey { host: host.name.clone() });
        }
        let leads = entitled(w, index) || !self.is_deposed(w, index);
        if w.plan.sync != SyncMode::Off && leads && !self.excused_otherwise(w, index) {
            self.has_everything(w, index);
            // Commits that nobody was told of are visible from now on, and count as told; but where the store takes no
            // writes a leader starts in place although it cannot take its standbys' names out of it.
            if !w.store.is_full() {
                self.acknowledged.extend(host.disk.borrow().wal.records());
            }
        }
    }

    /// Every acknowledged commit is on this host.
    pub fn has_everything(&mut self, w: &World, index: usize) {
        let there: BTreeSet<Record> =
            w.hosts[index].disk.borrow().wal.records().iter().copied().collect();
        let mut missing = self.acknowledged.difference(&there);
        if let Some(record) = missing.find(|it| !self.forgiven.contains(it)).copied() {
            let host = w.hosts[index].name.clone();
            self.found(w, Broken::LostCommit { host, record });
        }
    }

    /// A server executes a client's write.
    pub fn executed(&mut self, w: &World, _: usize, record: Record) {
        if !self.executed.insert(record) {
            self.found(w, Broken::ExecutedTwice { record });
        }
    }

    /// A server acknowledges a commit that ends after `needs` records.
    pub fn acknowledged(&mut self, w: &World, index: usize, record: Record, needs: usize) {
        // The others tell where they stand after the key is gone, when in quorum mode nothing may be
        // acknowledged any more; an operator who deletes it takes that away from a primary that lives.
        let deleted = self.deleted_until.is_some_and(|until| w.exec.now() <= until);
        self.acknowledged.insert(record);
        let quorum = w.plan.sync == SyncMode::Quorum || w.plan.changing;
        if quorum && deleted {
            self.forgiven.insert(record);
        }
        if w.plan.sync == SyncMode::Off {
            return;
        }
        let other = (0..w.hosts.len()).find(|other| {
            let host = &w.hosts[*other];
            *other != index && host.alive() && host.server.borrow().is_primary()
        });
        let (host, deleted) = (w.hosts[index].name.clone(), self.deleted_until);
        // A commit that reached the new primary before it was promoted is safe, whoever says so.
        if let Some(other) = other
            && !entitled(w, index)
            && deleted.is_none_or(|until| w.exec.now() > until)
            && !w.hosts[other].disk.borrow().wal.contains(record)
        {
            let other = w.hosts[other].name.clone();
            self.found(w, Broken::AcknowledgedBesides { host: host.clone(), other });
        }
        if w.plan.strict {
            let holders = w.hosts.iter().filter(|host| {
                let disk = host.disk.borrow();
                disk.wal.flushed() >= needs && disk.wal.last_of(needs) == Some(record)
            });
            if holders.count() < 2 {
                self.found(w, Broken::AcknowledgedAlone { host, record });
            }
        }
    }

    /// A proxy sends a write to a server.
    pub fn sent(&mut self, w: &World, record: Record) {
        if self.sent.insert(record, true) == Some(true) {
            self.found(w, Broken::SentAgain { record });
        }
    }

    /// The server said that it did nothing.
    pub fn refused(&mut self, record: Record) {
        self.sent.insert(record, false);
    }

    /// A client was told that its write is done.
    pub fn told_done(&mut self, w: &World, record: Record) {
        if !self.acknowledged.contains(&record) {
            self.found(w, Broken::ToldWrong { record });
        }
    }

    /// A client was told that its write was not done.
    pub fn told_not_done(&mut self, w: &World, record: Record) {
        if self.executed.contains(&record) {
            self.found(w, Broken::ToldWrong { record });
        }
    }

    /// A proxy serves this leadership from now on.
    pub fn routed(&mut self, w: &World, proxy: usize, to: Epoch) {
        if let Some(from) = self.routed.insert(proxy, to)
            && to.is_older_than(from) == Some(true)
        {
            self.found(w, Broken::ProxyWalkedBack { proxy, from, to });
        }
    }

    /// A proxy starts anew; it reads linearizably before it serves, and has no earlier life.
    pub fn proxy_forgot(&mut self, proxy: usize) {
        self.routed.remove(&proxy);
    }

    /// A standby is about to receive from an upstream.
    pub fn streams(&mut self, w: &World, standby: (usize, &Wal), upstream: (usize, &Wal)) {
        let (index, mine) = standby;
        if mine.last() != upstream.1.last_of(mine.len()) {
            let host = w.hosts[index].name.clone();
            let upstream = w.hosts[upstream.0].name.clone();
            self.found(w, Broken::Corrupted { host, upstream });
        }
    }
}

/// For the trace: what the store says, and who has promised what.
fn tell_why(w: &World) {
    let truth = w.store.truth();
    let leader = truth.leader.as_ref().map(|leader| leader.name.as_str());
    let list = truth.failsafe.as_ref().map(|list| list.keys().cloned().collect::<Vec<_>>());
    w.note(format_args!("in the store: leader {leader:?}, failsafe {list:?}"));
    for host in &w.hosts {
        w.say(host.index, format_args!("clock {}, promise {:?}", host.now(w), promise(host)));
        // The one that is just changing cannot be looked at.
        if let Ok(server) = host.server.try_borrow() {
            w.say(host.index, format_args!("{}", server.describe()));
        }
    }
    for proxy in &w.proxies {
        w.note(format_args!("proxy {}: {}", proxy.index, proxy.describe()));
    }
}

/// Whether this host may be primary: the key is its own, or every member that could lead otherwise
/// has promised not to.
fn entitled(w: &World, index: usize) -> bool {
    let truth = w.store.truth();
    let name = &w.hosts[index].name;
    if let Some(leader) = &truth.leader {
        return leader.name == *name;
    }
    let list = w.store.failsafe_list();
    (w.plan.failsafe || w.plan.changing && list.is_some())
        && w.hosts.iter().filter(|host| host.index != index).all(|host| {
            let asked = list.as_ref().is_some_and(|list| list.contains(&host.name));
            let bound = promise(host).is_some_and(|promise| {
                let boot = format!("boot-{}", host.clock.borrow().boot);
                let until = Moment::at_millis(promise.until_ms);
                promise.leader == *name && (promise.boot_id != boot || host.now(w) < until)
            });
            bound || !asked
        })
}
