//! Every session of this proxy: how to wake it, cancel its query, and what it is doing.
//!
//! A session parks without timers or channels of its own; whoever wants its attention raises a flag
//! and wakes its task. Not here: what it does about the flag ([`crate::clients::client`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::task::Wake;
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::admission::doors::Visit;
use crate::cluster::standing::Term;
use crate::net::cancel_target::{CancelTarget, Cancelling};
use crate::pool::lender::OwnServer;
use crate::session::journal::Pin;

/// Wants a session's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flags(u32);

impl Flags {
    /// Look whether the server connection may still be used.
    pub const RECHECK: Self = Self(1);
    /// The client wants the held query cancelled.
    pub const CANCEL: Self = Self(2);
    /// The proxy shuts down: end when idle.
    pub const STOP: Self = Self(4);
    /// The proxy shuts down: end now.
    pub const STOP_NOW: Self = Self(8);
    /// Ask the server what the session holds: it will be switched over, or a function may have made a
    /// temporary table.
    pub const EXAMINE: Self = Self(16);
    /// Look whether the client's time is up.
    pub const TIME: Self = Self(32);
    /// Ask what the session holds, if there was no time for that when it may have changed.
    pub const SUSPECT: Self = Self(64);

    /// Whether all of `other` are up.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The activity of a session, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Doing {
    Login,
    Idle,
    Active,
    Held,
    Dead,
}

impl Doing {
    /// Every state.
    pub const ALL: [Self; 5] = [Self::Login, Self::Idle, Self::Active, Self::Held, Self::Dead];

    /// Label of metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::Idle => "idle",
            Self::Active => "active",
            Self::Held => "held",
            Self::Dead => "failed_transaction",
        }
    }
}

/// The part of a session that other tasks see.
#[derive(Debug)]
pub struct Handle {
    pub id: u64,
    /// Index of its listener.
    pub listener: usize,
    /// Number of its thread.
    pub lane: usize,
    pub since: Instant,
    flags: AtomicU32,
    waker: AtomicWaker,
    doing: AtomicU8,
    pin: AtomicU8,
    /// The session held advisory locks when its server was asked last
    /// ([`crate::background::sampler`]).
    advisory: AtomicBool,
    /// The session was told to ask its server what it holds, and has not done so yet.
    asked: AtomicBool,
    /// The session listens on channels that move with it.
    listens: AtomicBool,
    /// Which sessions it belongs together with; 0: none.
    family: AtomicU64,
    /// Term of its server.
    term: AtomicU64,
    /// When its time is to be looked at, in milliseconds since it came.
    next_look: AtomicU64,
    /// Name of its server; empty if none.
    node: Mutex<Arc<str>>,
    target: Mutex<Option<Arc<CancelTarget>>>,
}

const NO_PIN: u8 = u8::MAX;

impl Wake for Handle {
    fn wake(self: Arc<Self>) {
        self.waker.wake();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.waker.wake();
    }
}

impl Handle {
    /// Remembers the task to wake.
    #[inline]
    pub fn park(&self, waker: &std::task::Waker) {
        self.waker.register(waker);
    }

    /// Whether any flag is up.
    #[inline]
    pub fn is_flagged(&self) -> bool {
        self.flags.load(Ordering::Acquire) != 0
    }

    /// Takes the flags down.
    pub fn take_flags(&self) -> Flags {
        Flags(self.flags.swap(0, Ordering::AcqRel))
    }

    /// Raises a flag and wakes the session.
    pub fn raise(&self, flag: Flags) {
        self.flags.fetch_or(flag.0, Ordering::AcqRel);
        self.waker.wake();
    }

    /// Tells the session, in its turn, to ask its server what it holds. Whoever does is inside the gate for it.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::Release);
        self.raise(Flags::EXAMINE);
    }

    /// Whether it has still to be done.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// The session has asked, or will when it has done what it does, or has nobody to ask.
    pub fn has_asked(&self) {
        self.asked.store(false, Ordering::Release);
    }

    /// Waits until a flag is up.
    pub async fn flagged(&self) {
        std::future::poll_fn(|cx| {
            self.park(cx.waker());
            if self.is_flagged() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }

    /// Shows what it is doing.
    #[inline]
    pub fn set_doing(&self, doing: Doing) {
        self.doing.store(doing as u8, Ordering::Relaxed);
    }

    /// The activity of the session.
    pub fn doing(&self) -> Doing {
        let now = self.doing.load(Ordering::Relaxed);
        Doing::ALL.into_iter().find(|doing| *doing as u8 == now).unwrap_or(Doing::Login)
    }

    /// Shows why it cannot be moved.
    pub fn set_pin(&self, pin: Option<Pin>) {
        self.pin.store(pin.map_or(NO_PIN, |pin| pin as u8), Ordering::Relaxed);
    }

    /// Why it cannot be moved, when last looked at.
    pub fn pin(&self) -> Option<Pin> {
        if self.holds_advisory_locks() {
            return Some(Pin::Advisory);
        }
        let now = self.pin.load(Ordering::Relaxed);
        Pin::ALL.into_iter().find(|pin| *pin as u8 == now)
    }

    /// Notes what its server says of its advisory locks.
    pub fn set_advisory_locks(&self, held: bool) {
        self.advisory.store(held, Ordering::Relaxed);
    }

    /// Whether it held advisory locks when its server was asked last.
    pub fn holds_advisory_locks(&self) -> bool {
        self.advisory.load(Ordering::Relaxed)
    }

    /// Shows whether it listens on channels that move with it.
    #[inline]
    pub fn set_listens(&self, listens: bool) {
        self.listens.store(listens, Ordering::Release);
    }

    /// When its time is to be looked at.
    pub fn set_next_look(&self, at: Instant) {
        let since = at.saturating_duration_since(self.since).as_millis();
        self.next_look.store(u64::try_from(since).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// See [`Handle::set_next_look`].
    pub fn next_look(&self) -> Instant {
        self.since + Duration::from_millis(self.next_look.load(Ordering::Relaxed))
    }

    /// Notes that the session belongs together with others.
    pub fn set_family(&self, family: u64) {
        self.family.store(family, Ordering::Relaxed);
    }

    /// Shows the term of its server.
    pub fn set_term(&self, term: Term) {
        self.term.store(term.0, Ordering::Release);
    }

    /// Shows which server it is on. What it held on another connection it holds no more.
    pub fn set_server(&self, node: &Arc<str>, target: Option<Arc<CancelTarget>>) {
        self.set_advisory_locks(false);
        *self.node.lock() = Arc::clone(node);
        *self.target.lock() = target;
    }

    /// Name of its server; empty if none.
    pub fn node(&self) -> Arc<str> {
        Arc::clone(&self.node.lock())
    }

    /// The session's server connection, to be looked at.
    pub fn cancel_target(&self) -> Option<Arc<CancelTarget>> {
        self.target.lock().clone()
    }

    /// Where its query can be cancelled now. The connection stays the session's until the answer is
    /// dropped.
    pub fn begin_cancel(&self) -> Option<Cancelling> {
        let target = self.target.lock();
        let target = target.as_ref()?;
        Some(CancelTarget::begin(target))
    }
}

/// All sessions.
#[derive(Debug, Default)]
pub struct Registry {
    sessions: Mutex<HashMap<u64, Arc<Handle>>>,
    /// By what their clients show in a cancel request.
    keys: Mutex<HashMap<ClientKey, Arc<Handle>>>,
    last_id: AtomicU64,
}

/// A session's entry; dropped with the session.
#[derive(Debug)]
pub struct Entry {
    registry: Arc<Registry>,
    handle: Arc<Handle>,
    key: Option<ClientKey>,
    /// How its client is counted.
    pub visit: Visit,
    /// The session's place among server connections, if it has a connection to itself.
    pub own_server: Option<OwnServer>,
}

/// A process id, and the secret that was told along with it.
type ClientKey = (u32, Arc<[u8]>);

impl Registry {
    /// Enters a session.
    pub fn enter(self: &Arc<Self>, listener: usize, lane: usize, visit: Visit) -> Entry {
        let mut sessions = self.sessions.lock();
        let handle = Arc::new(Handle {
            id: self.last_id.fetch_add(1, Ordering::Relaxed) + 1,
            listener,
            lane,
            since: Instant::now(),
            flags: AtomicU32::new(0),
            waker: AtomicWaker::new(),
            doing: AtomicU8::new(Doing::Login as u8),
            pin: AtomicU8::new(NO_PIN),
            advisory: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            listens: AtomicBool::new(false),
            family: AtomicU64::new(0),
            term: AtomicU64::new(0),
            next_look: AtomicU64::new(0),
            node: Mutex::new("".into()),
            target: Mutex::new(None),
        });
        sessions.insert(handle.id, Arc::clone(&handle));
        Entry { registry: Arc::clone(self), handle, key: None, visit, own_server: None }
    }

    /// Raises a flag on every session.
    pub fn raise_all(&self, flag: Flags) {
        let all: Vec<_> = self.sessions.lock().values().cloned().collect();
        for handle in all {
            handle.raise(flag);
        }
    }

    /// The session that a cancel request means.
    pub fn by_key(&self, pid: u32, key: &[u8]) -> Option<Arc<Handle>> {
        self.keys.lock().get(&(pid, key.into())).cloned()
    }

    /// Every session, in no order.
    pub fn all(&self) -> Vec<Arc<Handle>> {
        self.sessions.lock().values().cloned().collect()
    }

    /// How many sessions listened on a server that was switched over, and do not listen on its
    /// successor yet, which serves in this term. Those that have no server count whatever group it was
    /// of.
    pub fn to_listen(&self, former: &str, term: Term) -> usize {
        let waits = |handle: &&Arc<Handle>| {
            handle.listens.load(Ordering::Acquire) && {
                let node = handle.node();
                node.is_empty() || *node == *former && handle.term.load(Ordering::Acquire) != term.0
            }
        };
        self.sessions.lock().values().filter(waits).count()
    }

    /// Every session on this server.
    pub fn on(&self, server: &str) -> Vec<Arc<Handle>> {
        self.all().into_iter().filter(|handle| *handle.node() == *server).collect()
    }

    /// Every session on this server looks at what the flag asks for.
    pub fn raise_on(&self, server: &str, flag: Flags) {
        self.on(server).iter().for_each(|handle| handle.raise(flag));
    }

    /// Every session's time is to be looked at.
    pub fn look_anew(&self) {
        let now = Instant::now();
        self.sessions.lock().values().for_each(|handle| handle.set_next_look(now));
    }

    /// Sessions whose time is to be looked at do so, unless their request is held back: a server connection that
    /// is being opened for it would be given up.
    pub fn raise_time(&self, now: Instant) {
        let is_due = |handle: &&Arc<Handle>| {
            !matches!(handle.doing(), Doing::Held | Doing::Login) && handle.next_look() <= now
        };
        let due: Vec<_> = self.sessions.lock().values().filter(is_due).cloned().collect();
        due.iter().for_each(|handle| handle.raise(Flags::TIME));
    }

    /// Sessions that are pinned by what a server can be asked for see whether they have asked.
    pub fn recheck_suspects(&self) {
        for handle in self.all() {
            if handle.pin().is_some_and(Pin::can_be_examined) {
                handle.raise(Flags::SUSPECT);
            }
        }
    }

    /// Sessions with a cursor WITH HOLD or the like see whether they still keep the gate from being empty.
    pub fn recheck_cursors(&self) {
        for handle in self.all() {
            if handle.pin().is_some_and(Pin::may_be_short) {
                handle.raise(Flags::RECHECK);
            }
        }
    }

    /// Every session goes on with what it has held back.
    pub fn wake_all(&self) {
        self.all().iter().for_each(Wake::wake_by_ref);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sessions.lock().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The server that the first session of a family is on.
    pub fn node_of_family(&self, family: u64) -> Option<Arc<str>> {
        let sessions = self.sessions.lock();
        let own = sessions.values().filter(|it| it.family.load(Ordering::Relaxed) == family);
        own.min_by_key(|handle| handle.id).map(|handle| handle.node())
    }

    /// Sessions by server, for balancing.
    pub fn by_node(&self) -> HashMap<Arc<str>, usize> {
        let mut counts = HashMap::new();
        for handle in self.sessions.lock().values() {
            *counts.entry(handle.node()).or_insert(0) += 1;
        }
        counts
    }
}

impl Entry {
    /// The session's handle.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// Makes the session known by what its client will show in a cancel request; `false` if another
    /// session is known by the same, which must not be hit by this one's.
    pub fn set_key(&mut self, pid: u32, key: &[u8]) -> bool {
        let mut keys = self.registry.keys.lock();
        let new: ClientKey = (pid, key.into());
        if keys.contains_key(&new) {
            return false;
        }
        if let Some(old) = self.key.replace(new.clone()) {
            keys.remove(&old);
        }
        keys.insert(new, Arc::clone(&self.handle));
        true
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.registry.sessions.lock().remove(&self.handle.id);
        if let Some(key) = self.key.take() {
            self.registry.keys.lock().remove(&key);
        }
    }
}
