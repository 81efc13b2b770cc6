//! The store in memory: etcd's semantics without etcd, for the demo, for simulations and for tests.
//!
//! Handles ([`MemoryDcs::clone`], [`MemoryDcs::new_handle`]) share one store, and each stands for one
//! process with its own way to it: [`MemoryDcs::cut`] cuts off that process alone. Operations are
//! done when their future is first polled and never wait, so with a manual clock
//! ([`MemoryDcs::manual`]) a run is a function of the calls made. With the real clock one thread
//! ends leases when they are over; it ends with the store.
//!
//! Faults are those that docs/safety.md goes through: unreachable, outcome unknown (done, not done, or done later), watches
//! that go silent without an error, a deposed raft leader that still answers renewals, an election.
//!
//! Not here: persistence. A store with the real clock has a random cluster id and random lease numbers,
//! so that nothing remembered of an earlier one is taken for its own.

mod state;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use kornak_cluster::Moment;
use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::{
    Dcs, DcsError, DcsFuture, Follow, Granted, LeaseId, RaftTerm, Reach, Remaining, Renewed, Txn,
    TxnOutcome, View,
};
use state::{State, Touched};

/// A handle on a store in memory.
#[derive(Debug)]
pub struct MemoryDcs {
    store: Arc<Store>,
    link: Arc<Link>,
}

/// Fate of a transaction whose answer is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The transaction was done, the answer was lost.
    Answer,
    /// The transaction itself was lost.
    Request,
    /// The transaction lies with a stalled member, and is done at [`MemoryDcs::deliver_late`].
    Late,
}

#[derive(Debug)]
struct Store {
    inner: Mutex<Inner>,
    clock: Clock,
}

#[derive(Debug)]
struct Inner {
    state: State,
    /// Time of a manual clock.
    manual_now: Moment,
    followers: Vec<Follower>,
}

#[derive(Debug)]
struct Follower {
    prefix: String,
    link: Arc<Link>,
    view: watch::Sender<Arc<View>>,
}

#[derive(Debug)]
enum Clock {
    Manual,
    Real { start: Instant, alarm: Arc<Alarm> },
}

/// Wakes the thread that ends leases.
#[derive(Debug, Default)]
struct Alarm {
    due: Mutex<Due>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Due {
    at: Option<Instant>,
    over: bool,
    running: bool,
}

/// One process's way to the store.
#[derive(Debug, Default)]
struct Link {
    faults: Mutex<Faults>,
}

#[derive(Debug, Default)]
struct Faults {
    cut: bool,
    silent: bool,
    lose_next_txn: Option<Lost>,
    deposed_term: Option<RaftTerm>,
    late: Vec<Txn>,
}

impl MemoryDcs {
    /// An empty store whose leases run on the real clock.
    pub fn new() -> Self {
        let start = Instant::now();
        let first_lease = LeaseId(i64::from(rand::random::<u32>()) << 16);
        let state = State::new(rand::random(), first_lease);
        Self::with_clock(state, Clock::Real { start, alarm: Arc::default() })
    }

    /// An empty store whose clock stands still until [`MemoryDcs::advance`].
    pub fn manual() -> Self {
        Self::with_clock(State::new(0x6b6f_726e, LeaseId(1000)), Clock::Manual)
    }

    fn with_clock(state: State, clock: Clock) -> Self {
        let inner = Inner { state, manual_now: Moment::default(), followers: Vec::new() };
        Self { store: Arc::new(Store { inner: Mutex::new(inner), clock }), link: Arc::default() }
    }

    /// Another process's handle on the same store, without faults.
    #[must_use]
    pub fn new_handle(&self) -> Self {
        Self { store: Arc::clone(&self.store), link: Arc::default() }
    }

    /// A handle that shares this one's faults as well: keep it to cut off what was given away.
    #[must_use]
    pub fn same_handle(&self) -> Self {
        Self { store: Arc::clone(&self.store), link: Arc::clone(&self.link) }
    }

    /// Moves a manual clock on, ending leases in order on the way. Does nothing with the real clock.
    pub fn advance(&self, by: Duration) {
        let mut inner = self.store.inner.lock();
        inner.manual_now = inner.manual_now + by;
        self.store.expire(&mut inner);
    }

    /// The store's own clock.
    pub fn now(&self) -> Moment {
        self.store.now(&self.store.inner.lock())
    }

    /// When the next lease will end unless it is renewed, on [`MemoryDcs::now`]'s clock.
    pub fn next_lease_end(&self) -> Option<Moment> {
        self.store.inner.lock().state.next_end()
    }

    /// Cuts this handle off: operations fail with [`DcsError::Unreachable`], follows are
    /// [`Reach::Lost`] at once (silence them first to delay that).
    pub fn cut(&self) {
        let mut inner = self.store.inner.lock();
        self.link.faults.lock().cut = true;
        inner.refresh(|follower| Arc::ptr_eq(&follower.link, &self.link));
    }

    /// Undoes [`MemoryDcs::cut`]; follows show the newest state.
    pub fn heal(&self) {
        let mut inner = self.store.inner.lock();
        self.link.faults.lock().cut = false;
        inner.refresh(|follower| Arc::ptr_eq(&follower.link, &self.link));
    }

    /// Lets the answer, or the request, of this handle's next transaction be lost: it fails with
    /// [`DcsError::Unknown`].
    pub fn lose_next_txn(&self, lost: Lost) {
        self.link.faults.lock().lose_next_txn = Some(lost);
    }

    /// Runs this handle's transactions that were [`Lost::Late`], in order, each as the store is now.
    /// Their answers go nowhere. Works while the handle is cut off: they are on the other side.
    pub fn deliver_late(&self) -> Vec<Result<TxnOutcome, DcsError>> {
        let late = std::mem::take(&mut self.link.faults.lock().late);
        late.iter().map(|txn| self.operate_beyond(|state, _| state.txn(txn))).collect()
    }

    /// Stops this handle's follows from showing anything new, without an error, as a stalled etcd
    /// member does; everything else works. The etcd implementation notices within
    /// [`crate::etcd::SILENCE`]; here it lasts until it is undone.
    pub fn silence(&self, silent: bool) {
        let mut inner = self.store.inner.lock();
        self.link.faults.lock().silent = silent;
        inner.refresh(|follower| Arc::ptr_eq(&follower.link, &self.link));
    }

    /// Renewals of this handle are answered by a raft leader that was deposed and does not know:
    /// with the term of now and without any effect, until undone.
    pub fn answer_from_deposed_leader(&self, deposed: bool) {
        let inner = self.store.inner.lock();
        self.link.faults.lock().deposed_term = deposed.then_some(inner.state.term);
    }

    /// A new raft leader: the term grows and every lease starts anew.
    pub fn elect(&self) {
        let mut inner = self.store.inner.lock();
        let now = self.store.now(&inner);
        self.store.expire(&mut inner);
        inner.state.elect(now);
        self.store.set_alarm(&inner);
    }

    /// The store as a whole was down for `away` and is back with what its disk holds: no lease has ended meanwhile, and
    /// every one starts anew. For a manual clock, which moves on by `away`.
    pub fn restart(&self, away: Duration) {
        let mut inner = self.store.inner.lock();
        inner.manual_now = inner.manual_now + away;
        let now = self.store.now(&inner);
        inner.state.elect(now);
        self.store.set_alarm(&inner);
    }

    /// Runs `step` on the state as of now, and shows followers what it touched.
    fn operate<T>(
        &self,
        step: impl FnOnce(&mut State, Moment) -> Result<(T, Touched), DcsError>,
    ) -> Result<T, DcsError> {
        if self.link.faults.lock().cut {
            return Err(DcsError::Unreachable { detail: "cut off".into() });
        }
        self.operate_beyond(step)
    }

    /// [`MemoryDcs::operate`] on the far side of a cut.
    fn operate_beyond<T>(
        &self,
        step: impl FnOnce(&mut State, Moment) -> Result<(T, Touched), DcsError>,
    ) -> Result<T, DcsError> {
        let mut inner = self.store.inner.lock();
        let now = self.store.now(&inner);
        self.store.expire(&mut inner);
        let (answer, touched) = step(&mut inner.state, now)?;
        inner.show(&touched);
        self.store.set_alarm(&inner);
        Ok(answer)
    }

    fn run_txn(&self, txn: &Txn) -> Result<TxnOutcome, DcsError> {
        let lost = {
            let mut faults = self.link.faults.lock();
            if faults.cut { None } else { faults.lose_next_txn.take() }
        };
        match lost {
            None => self.operate(|state, _| state.txn(txn)),
            Some(Lost::Request) => Err(DcsError::Unknown { detail: "the request was lost".into() }),
            Some(Lost::Late) => {
                self.link.faults.lock().late.push(txn.clone());
                Err(DcsError::Unknown { detail: "the request is on its way".into() })
            }
            Some(Lost::Answer) => {
                self.operate(|state, _| state.txn(txn))?;
                Err(DcsError::Unknown { detail: "the answer was lost".into() })
            }
        }
    }

    fn renew(&self, lease: LeaseId) -> Result<Renewed, DcsError> {
        let deposed = self.link.faults.lock().deposed_term;
        self.operate(|state, now| {
            let renewed = match deposed {
                Some(raft_term) => Renewed { ttl: state.lease_ttl(lease)?, raft_term },
                None => Renewed { ttl: state.renew(lease, now)?, raft_term: state.term },
            };
            Ok((renewed, Touched::new()))
        })
    }
}

impl Default for MemoryDcs {
    fn default() -> Self {
        Self::new()
    }
}

impl Clone for MemoryDcs {
    /// Another process's handle, see [`MemoryDcs::new_handle`].
    fn clone(&self) -> Self {
        self.new_handle()
    }
}

impl Dcs for MemoryDcs {
    fn range(&self, prefix: &str) -> DcsFuture<'_, View> {
        let prefix = prefix.to_owned();
        Box::pin(async move {
            self.operate(|state, _| Ok((state.view(&prefix, Reach::Live), Touched::new())))
        })
    }

    fn txn(&self, txn: Txn) -> DcsFuture<'_, TxnOutcome> {
        Box::pin(async move { self.run_txn(&txn) })
    }

    fn grant(&self, ttl: Duration) -> DcsFuture<'_, Granted> {
        Box::pin(async move {
            self.operate(|state, now| {
                let lease = state.grant(ttl, now);
                Ok((Granted { lease, ttl, raft_term: state.term }, Touched::new()))
            })
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> DcsFuture<'_, Renewed> {
        Box::pin(async move { self.renew(lease) })
    }

    fn time_to_live(&self, lease: LeaseId) -> DcsFuture<'_, Remaining> {
        Box::pin(async move {
            self.operate(|state, now| Ok((state.remaining(lease, now)?, Touched::new())))
        })
    }

    fn revoke(&self, lease: LeaseId) -> DcsFuture<'_, ()> {
        Box::pin(async move { self.operate(|state, _| Ok(((), state.revoke(lease)?))) })
    }

    fn follow(&self, prefix: &str) -> Follow {
        let (view, seen) = watch::channel(Arc::new(View::empty()));
        let follower = Follower { prefix: prefix.to_owned(), link: Arc::clone(&self.link), view };
        let mut inner = self.store.inner.lock();
        self.store.expire(&mut inner);
        follower.refresh(&inner.state);
        inner.followers.push(follower);
        Follow::new(seen, None)
    }
}

impl Store {
    fn now(&self, inner: &Inner) -> Moment {
        match &self.clock {
            Clock::Manual => inner.manual_now,
            Clock::Real { start, .. } => Moment::new(start.elapsed()),
        }
    }

    fn expire(&self, inner: &mut Inner) {
        let now = self.now(inner);
        let touched = inner.state.expire(now);
        inner.show(&touched);
    }

    /// Makes sure that somebody will end the next lease in time.
    fn set_alarm(self: &Arc<Self>, inner: &Inner) {
        let Clock::Real { start, alarm } = &self.clock else { return };
        let at = inner.state.next_end().map(|end| *start + end.since_start());
        let mut due = alarm.due.lock();
        if due.at == at {
            return;
        }
        due.at = at;
        alarm.changed.notify_all();
        if !due.running {
            due.running = true;
            let store = Arc::downgrade(self);
            let alarm = Arc::clone(alarm);
            std::thread::spawn(move || end_leases(&store, &alarm));
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Clock::Real { alarm, .. } = &self.clock {
            alarm.due.lock().over = true;
            alarm.changed.notify_all();
        }
    }
}

/// Ends leases when they are over, until the store is dropped.
fn end_leases(store: &Weak<Store>, alarm: &Alarm) {
    loop {
        let mut due = alarm.due.lock();
        loop {
            if due.over {
                return;
            }
            match due.at {
                None => alarm.changed.wait(&mut due),
                Some(at) if at > Instant::now() => {
                    alarm.changed.wait_until(&mut due, at);
                }
                Some(_) => break,
            }
        }
        drop(due);
        let Some(store) = store.upgrade() else { return };
        let mut inner = store.inner.lock();
        store.expire(&mut inner);
        store.set_alarm(&inner);
    }
}

impl Inner {
    /// Shows followers what changed.
    fn show(&mut self, touched: &Touched) {
        if !touched.is_empty() {
            self.refresh(|follower| touched.iter().any(|key| key.starts_with(&follower.prefix)));
        }
    }

    fn refresh(&mut self, of: impl Fn(&Follower) -> bool) {
        self.followers.retain(|follower| !follower.view.is_closed());
        for follower in self.followers.iter().filter(|follower| of(follower)) {
            follower.refresh(&self.state);
        }
    }
}

impl Follower {
    fn refresh(&self, state: &State) {
        let faults = self.link.faults.lock();
        if faults.silent {
            return;
        }
        let seen = Arc::clone(&self.view.borrow());
        let view = match (faults.cut, seen.reach) {
            (false, _) => state.view(&self.prefix, Reach::Live),
            (true, Reach::Never | Reach::Lost) => return,
            (true, Reach::Live) => View { reach: Reach::Lost, ..View::clone(&seen) },
        };
        if view != *seen {
            self.view.send_replace(Arc::new(view));
        }
    }
}
