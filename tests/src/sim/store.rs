//! The store: the real twin of etcd in memory on simulated time, behind a network.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use kornak_cluster::{ClusterState, Moment, Pledged, RaftTerm, Revision, Scope};
use kornak_dcs::keys::Keys;
use kornak_dcs::memory::MemoryDcs;
use kornak_dcs::{
    Dcs, DcsError, Follow, Granted, LeaseId, Op, Reach, Remaining, Renewed, Txn, TxnOutcome, View,
};

use super::exec::slot;
use super::host;
use super::net::End;
use super::world::World;

/// A client of the store gives an operation up after so long; it may still be done.
const LIMIT: Duration = Duration::from_secs(2);

/// Old states that a lagging member of the store may still show.
const REMEMBERED: usize = 40;

/// The store's contents at one revision: raw, for agents, and parsed.
#[derive(Debug, Clone)]
pub struct Shown {
    pub view: Arc<View>,
    pub state: Arc<ClusterState>,
}

/// The store of a world.
pub struct Store {
    root: MemoryDcs,
    hosts: Vec<MemoryDcs>,
    follow: RefCell<Follow>,
    pub keys: Keys,
    up: Cell<bool>,
    /// No writes are taken (etcd's alarm NOSPACE).
    full: Cell<bool>,
    /// The members of `failsafe`, as it last made sense.
    failsafe: RefCell<Option<BTreeSet<String>>>,
    /// The members do not run: leases neither end nor grow older.
    stopped: Cell<bool>,
    /// True time up to which the store's clock has been moved.
    advanced: Cell<Moment>,
    alarm: Cell<Option<Moment>>,
    view: RefCell<Arc<View>>,
    state: RefCell<Arc<ClusterState>>,
    past: RefCell<VecDeque<Shown>>,
}

impl Store {
    /// An empty store.
    pub fn new(hosts: usize) -> Self {
        let root = MemoryDcs::manual();
        let keys = Keys::new(&Scope::new("sim", "world", None));
        let follow = root.follow(keys.root());
        Self {
            hosts: (0..hosts).map(|_| root.new_handle()).collect(),
            root,
            follow: RefCell::new(follow),
            keys,
            up: Cell::new(true),
            full: Cell::new(false),
            failsafe: RefCell::default(),
            stopped: Cell::new(false),
            advanced: Cell::new(Moment::default()),
            alarm: Cell::new(None),
            view: RefCell::new(Arc::new(View::empty())),
            state: RefCell::default(),
            past: RefCell::default(),
        }
    }

    /// The true contents now, which nobody in the world sees.
    pub fn truth(&self) -> Arc<ClusterState> {
        Arc::clone(&self.state.borrow())
    }

    /// The contents that the store shows now.
    pub fn shown(&self) -> Shown {
        Shown { view: Arc::clone(&self.view.borrow()), state: self.truth() }
    }

    /// Contents that the store showed before, as a lagging member would.
    pub fn lagging(&self, back: usize) -> Option<Shown> {
        let past = self.past.borrow();
        past.get(past.len().checked_sub(back + 1)?).cloned()
    }

    /// Whether it answers.
    pub fn is_up(&self) -> bool {
        self.up.get()
    }

    /// Makes the store stop or start answering; leases go on counting, as with etcd members that are alive and
    /// have no quorum they do after the next election.
    pub fn set_up(&self, w: &Rc<World>, up: bool) {
        self.up.set(up);
        if up && self.stopped.replace(false) {
            let now = w.exec.now();
            self.root.restart(now.since(self.advanced.get()));
            self.advanced.set(now);
            self.set_alarm(w);
        }
    }

    /// Every member of the store ends. With [`Store::set_up`] they start again on their disks, where leases have not ended.
    pub fn stop(&self, w: &Rc<World>) {
        self.settle(w);
        self.up.set(false);
        self.stopped.set(true);
    }

    /// A new raft leader.
    pub fn elect(&self, w: &Rc<World>) {
        self.settle(w);
        self.root.elect();
        self.set_alarm(w);
    }

    /// This host's renewals are answered by a deposed leader.
    pub fn deposed(&self, host: usize, deposed: bool) {
        if let Some(handle) = self.hosts.get(host) {
            handle.answer_from_deposed_leader(deposed);
        }
    }

    /// When the lease that the leader key hangs on would end without a further renewal: no later
    /// than this.
    pub fn delete_leader_key(&self, w: &Rc<World>) {
        self.settle(w);
        let txn = Txn::just(Op::delete(self.keys.leader()));
        // Memory answers at once, and a delete without conditions is not refused.
        let _ = self.root.txn(txn).now_or_never();
        self.changed(w);
    }

    fn handle(&self, from: End) -> &MemoryDcs {
        match from {
            End::Host(host) => self.hosts.get(host).unwrap_or(&self.root),
            End::Proxy(_) | End::Store => &self.root,
        }
    }

    /// Moves the store's clock to the world's.
    fn settle(&self, w: &Rc<World>) {
        if self.stopped.get() {
            return;
        }
        let now = w.exec.now();
        self.root.advance(now.since(self.advanced.get()));
        self.advanced.set(now);
        self.changed(w);
    }

    fn set_alarm(&self, w: &Rc<World>) {
        let Some(end) = self.root.next_lease_end().filter(|_| !self.stopped.get()) else { return };
        if self.alarm.get().is_some_and(|alarm| alarm <= end && alarm > w.exec.now()) {
            return;
        }
        self.alarm.set(Some(end));
        let later = Rc::clone(w);
        w.exec.after(end.since(w.exec.now()) + Duration::from_micros(1), move || {
            later.store.alarm.set(None);
            later.store.settle(&later);
            later.store.set_alarm(&later);
        });
    }

    /// Takes in what has changed and sends it to the followers.
    fn changed(&self, w: &Rc<World>) {
        let new = self.follow.borrow_mut().current();
        let old = Arc::clone(&self.view.borrow());
        if Arc::ptr_eq(&new, &old) {
            return;
        }
        let state = Arc::new(merge(&self.keys, &self.state.borrow(), &old, &new));
        if let Some(list) = &state.failsafe {
            self.failsafe.replace(Some(list.keys().cloned().collect()));
        }
        self.note_deposal(w, &self.truth(), &state);
        self.view.replace(new);
        self.state.replace(state);
        let shown = self.shown();
        let mut past = self.past.borrow_mut();
        past.push_back(shown.clone());
        if past.len() > REMEMBERED {
            past.pop_front();
        }
        drop(past);
        w.checker.borrow_mut().disturbed();
        w.publish(&shown);
    }

    /// The leader key went with a change of `sync`, by promises to its leadership.
    fn note_deposal(&self, w: &Rc<World>, old: &ClusterState, new: &ClusterState) {
        let Some(leader) = old.leader.as_ref().filter(|_| new.leader.is_none()) else { return };
        let promised = |of: &Pledged| of.pledge.is_some_and(|it| it.of.epoch == leader.epoch);
        let renamed = new.sync_revision != old.sync_revision;
        let Some(index) = host::index_of(w, &leader.name).filter(|_| renamed) else { return };
        if new.pledges.values().any(promised) {
            let left = self.root.time_to_live(leader.lease).now_or_never();
            let left = left.and_then(Result::ok).map_or(Duration::ZERO, |told| told.left);
            w.checker.borrow_mut().deposed(w, index, left + Duration::from_secs(1), (old, new));
        }
    }

    /// Whom a leader without the store asks, as the store last said in words that make sense.
    pub fn failsafe_list(&self) -> Option<BTreeSet<String>> {
        self.failsafe.borrow().clone()
    }

    /// Lets it be full, or have room.
    pub fn set_full(&self, full: bool) {
        self.full.set(full);
    }

    /// Whether it takes no writes.
    pub fn is_full(&self) -> bool {
        self.full.get()
    }

    /// An operator, or fate, writes past everybody. `None`: deletes.
    pub fn write(&self, w: &Rc<World>, key: &str, value: Option<&str>) {
        self.settle(w);
        let op = match value {
            Some(value) => Op::put(key, value),
            None => Op::delete(key),
        };
        // Memory answers at once, and a write without conditions is not refused.
        let _ = self.root.txn(Txn::just(op)).now_or_never();
        self.changed(w);
    }

    /// Value and revision of a key.
    pub fn found(&self, key: &str) -> Option<(String, Revision)> {
        let view = self.view.borrow();
        view.get(key).map(|found| (found.value.clone(), found.mod_revision))
    }

    /// Refused for lack of space, as etcd refuses whatever could write.
    fn room_for(&self, writes: bool) -> Result<(), DcsError> {
        match self.full.get() && writes {
            true => Err(DcsError::Full { detail: "no space".to_owned() }),
            false => Ok(()),
        }
    }

    /// Sets the world up before it begins.
    pub fn prepare(&self, w: &Rc<World>, puts: &[(String, String)]) {
        for (key, value) in puts {
            let _ = self.root.txn(Txn::just(Op::put(key, value))).now_or_never();
        }
        self.changed(w);
    }
}

/// The state that `new` shows; only keys that differ from `old` are parsed.
fn merge(keys: &Keys, state: &ClusterState, old: &View, new: &View) -> ClusterState {
    let mut merged = state.clone();
    merged.store = new.store;
    merged.revision = new.revision;
    let differs = |key: &&String| {
        old.keys.get(*key).map(|found| found.mod_revision)
            != new.keys.get(*key).map(|found| found.mod_revision)
    };
    let gone = old.keys.keys().filter(|key| !new.keys.contains_key(*key));
    let names: Vec<&String> = new.keys.keys().filter(differs).chain(gone).collect();
    for key in names {
        let mut one = View { keys: BTreeMap::new(), reach: Reach::Live, ..View::empty() };
        one.store = new.store;
        one.revision = new.revision;
        if let Some(found) = new.keys.get(key) {
            one.keys.insert(key.clone(), found.clone());
        }
        let mut part = keys.state(&one);
        merged.unreadable.append(&mut part.unreadable);
        let is = |name: String| *key == name;
        if let Some(name) = key.strip_prefix(&keys.member("")) {
            replace(&mut merged.members, name, part.members.remove(name));
        } else if let Some(name) = key.strip_prefix(&keys.acks()) {
            replace(&mut merged.acks, name, part.acks.remove(name));
        } else if let Some(name) = key.strip_prefix(&keys.proxies()) {
            replace(&mut merged.proxies, name, part.proxies.remove(name));
        } else if is(keys.leader()) {
            merged.leader = part.leader;
        } else if is(keys.sync()) {
            (merged.sync, merged.sync_revision) = (part.sync, part.sync_revision);
        } else if is(keys.status()) {
            merged.status = part.status;
        } else if is(keys.handover()) {
            merged.handover = part.handover;
            merged.handover_revision = part.handover_revision;
        } else {
            // Rare: everything is read anew.
            return keys.state(new);
        }
    }
    merged
}

fn replace<T>(map: &mut BTreeMap<String, T>, name: &str, value: Option<T>) {
    match value {
        Some(value) => drop(map.insert(name.to_owned(), value)),
        None => drop(map.remove(name)),
    }
}

/// An operation of `from` on the store: late, lost, or done without an answer.
async fn ask<T: 'static>(
    w: &Rc<World>,
    from: End,
    operation: impl FnOnce(&MemoryDcs) -> Result<T, DcsError> + 'static,
) -> Result<T, DcsError> {
    let unknown = || DcsError::Unknown { detail: "no answer".into() };
    if !w.net.passes(from, End::Store) || !w.store.is_up() {
        if w.rng.chance(500) {
            w.exec.sleep(w.rng.millis(1, 300)).await;
            return Err(DcsError::Unreachable { detail: "refused".into() });
        }
        w.exec.sleep(LIMIT).await;
        return Err(unknown());
    }
    let (reply, answer) = slot();
    let there = Rc::clone(w);
    w.exec.after(w.net.delay(&w.rng), move || {
        if !there.store.is_up() {
            there.net.lose(reply);
            return;
        }
        there.store.settle(&there);
        let result = operation(there.store.handle(from));
        there.store.changed(&there);
        there.store.set_alarm(&there);
        if !there.net.passes(End::Store, from) {
            there.net.lose(reply);
            return;
        }
        there.exec.after(there.net.delay(&there.rng), move || reply.give(result));
    });
    w.exec.within(LIMIT, answer).await.flatten().unwrap_or_else(|| Err(unknown()))
}

fn now<T>(future: impl Future<Output = Result<T, DcsError>>) -> Result<T, DcsError> {
    future.now_or_never().expect("the store in memory never waits")
}

/// See [`Dcs::txn`].
pub async fn txn(w: &Rc<World>, from: End, txn: Txn) -> Result<TxnOutcome, DcsError> {
    let there = Rc::clone(w);
    let writes = txn.then.iter().chain(&txn.otherwise).any(|op| matches!(op, Op::Put { .. }));
    ask(w, from, move |store| {
        there.store.room_for(writes)?;
        now(store.txn(txn))
    })
    .await
}

/// Does a transaction after `delay`, if the store answers then, and tells nobody.
pub fn txn_late(w: &Rc<World>, from: End, txn: Txn, delay: Duration) {
    let there = Rc::clone(w);
    w.exec.after(delay, move || {
        if there.store.is_up() {
            there.store.settle(&there);
            // Nobody waits for the answer.
            drop(now(there.store.handle(from).txn(txn)));
            there.store.changed(&there);
            there.store.set_alarm(&there);
        }
    });
}

/// See [`Dcs::grant`].
pub async fn grant(w: &Rc<World>, from: End, ttl: Duration) -> Result<Granted, DcsError> {
    let there = Rc::clone(w);
    ask(w, from, move |store| {
        there.store.room_for(true)?;
        now(store.grant(ttl))
    })
    .await
}

/// See [`Dcs::keep_alive`].
pub async fn keep_alive(w: &Rc<World>, from: End, lease: LeaseId) -> Result<Renewed, DcsError> {
    ask(w, from, move |store| now(store.keep_alive(lease))).await
}

/// See [`Dcs::time_to_live`].
pub async fn time_to_live(w: &Rc<World>, from: End, lease: LeaseId) -> Result<Remaining, DcsError> {
    ask(w, from, move |store| now(store.time_to_live(lease))).await
}

/// See [`Dcs::revoke`].
pub async fn revoke(w: &Rc<World>, from: End, lease: LeaseId) -> Result<(), DcsError> {
    ask(w, from, move |store| now(store.revoke(lease))).await
}

/// See [`Dcs::range`].
pub async fn range(w: &Rc<World>, from: End, prefix: String) -> Result<View, DcsError> {
    ask(w, from, move |store| now(store.range(&prefix))).await
}

/// Reads everything, linearizably.
pub async fn read(w: &Rc<World>, from: End) -> Result<(Arc<ClusterState>, RaftTerm), DcsError> {
    let there = Rc::clone(w);
    ask(w, from, move |store| {
        let prefix = there.store.keys.leader();
        let view = now(store.range(&prefix))?;
        Ok((there.store.truth(), view.raft_term))
    })
    .await
}
