//! The pools' hands: keeps idle connections, carries out what [`Pools`] decides, and knows who sits
//! behind each number. All of it under one lock that is held for a decision and never while waiting.
//!
//! A connection that is lent is accounted for by its [`Lease`]: dropped in whatever way, its place
//! becomes free.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::mem::Discriminant;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kornak_cluster::{Moment, discard};
use kornak_protocol::auth::Credentials;
use kornak_protocol::params::Parameters;
use parking_lot::{Mutex, MutexGuard};
use slab::Slab;
use tokio::sync::mpsc::UnboundedSender;

use super::mailbox::{Delivery, Mailbox};
use super::room::Owner;
use super::settled::Settled;
use super::{
    Effect, Event, Forgotten, KindId, Limits, MemberId, PoolCount, PoolId, Pools, Shares, SlotId,
};
use crate::admission::identity::Identity;
use crate::net::backend::DialError;
use crate::pool::link::Link;
use crate::session::pooled::ConnectionState;
use crate::session::statements::Texts;

/// An order to a thread: open a connection of this kind.
#[derive(Debug)]
pub struct Order {
    pub slot: SlotId,
    pub kind: Arc<Kind>,
}

/// A startup packet on a listener, and how to log in with it.
#[derive(Debug)]
pub struct Kind {
    pub id: KindId,
    pub listener: usize,
    pub pool: PoolId,
    pub user: Bytes,
    pub database: Bytes,
    /// The packet for servers; without `application_name`, which every client sets for itself.
    pub startup: Bytes,
    /// Shared by its sessions: the pool logs in, not they.
    pub nobody: Arc<Identity>,
    /// Of the client that logged in last: the newest password. All of its clients have proven
    /// themselves in one way, or a login that proves nothing would take the proof from the others.
    credentials: Mutex<Credentials>,
    /// A server has taken them.
    taken: AtomicBool,
    proof: Proof,
    /// The parameters that a server reported at the last login.
    welcome: Mutex<Option<(Instant, Arc<Parameters>)>>,
    /// A login is under way that asks a server whether it still lets these clients in.
    checking: AtomicBool,
}

/// In which way clients have proven who they are, and so how to log in in their name.
type Proof = Discriminant<Credentials>;

impl Kind {
    /// The identity for a login at a server.
    pub fn identity(&self) -> Identity {
        let credentials = self.credentials.lock().clone();
        Identity {
            user: self.user.clone(),
            startup: self.startup.clone(),
            credentials,
            was_taken: self.taken.load(Relaxed),
        }
    }

    /// The parameters that a server reported, and how long ago it let one of these clients in.
    pub fn welcome(&self) -> Option<(Duration, Arc<Parameters>)> {
        let welcome = self.welcome.lock();
        let (when, params) = welcome.as_ref()?;
        Some((when.elapsed(), Arc::clone(params)))
    }

    /// A server has let one of them in.
    pub fn welcomed(&self, params: &Arc<Parameters>) {
        self.taken.store(true, Relaxed);
        *self.welcome.lock() = Some((Instant::now(), Arc::clone(params)));
    }

    /// A server has refused one of them: the next has to be asked about.
    pub fn unwelcome(&self) {
        *self.welcome.lock() = None;
    }

    /// Begins to ask a server; `false` if somebody does already.
    pub fn begin_check(&self) -> bool {
        !self.checking.swap(true, AcqRel)
    }

    /// The server has answered, or nobody has.
    pub fn end_check(&self) {
        self.checking.store(false, Release);
    }
}

/// The place of a pooled connection among all connections, and the state that sessions have left on
/// it.
#[derive(Debug)]
pub struct Lease {
    pub slot: SlotId,
    pub lane: usize,
    /// The state that sessions have left on the connection.
    pub state: ConnectionState,
    lender: Arc<Lender>,
    /// The connection is lent: its end has to be reported.
    is_out: bool,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.is_out {
            self.lender.gone(self.slot);
        }
    }
}

/// A client's membership in a kind; ends when dropped.
#[derive(Debug)]
pub struct Member {
    pub kind: Arc<Kind>,
    pub lane: usize,
    pub is_waiting: bool,
    /// When it began to wait.
    pub since: Instant,
    id: MemberId,
    mailbox: Arc<Mailbox>,
    lender: Arc<Lender>,
}

/// A client that joins.
#[derive(Debug)]
pub struct Newcomer {
    pub listener: usize,
    pub user: Bytes,
    pub database: Bytes,
    pub startup: Bytes,
    pub credentials: Credentials,
}

#[derive(Debug)]
struct Inner {
    pools: Pools,
    effects: Vec<Effect>,
    /// Connections that are not lent.
    resting: HashMap<SlotId, Settled>,
    mailboxes: Slab<Arc<Mailbox>>,
    kinds: HashMap<KindId, Arc<Kind>>,
    by_startup: HashMap<(usize, Bytes, Proof), KindId>,
    by_role: HashMap<(usize, Bytes, Bytes), PoolId>,
}

/// Lends server connections to clients.
#[derive(Debug)]
pub struct Lender {
    inner: Mutex<Inner>,
    clock: Instant,
    lanes: Vec<UnboundedSender<Order>>,
    /// Clients that wait, by listener; the last is of none.
    queued: Vec<AtomicUsize>,
    pub texts: Texts,
}

impl Lender {
    /// Without a connection. `lanes` take orders, one for each thread.
    pub fn new(
        lanes: Vec<UnboundedSender<Order>>,
        limits: impl IntoIterator<Item = Limits>,
        shares: Shares,
    ) -> Self {
        let limits: Vec<Limits> = limits.into_iter().collect();
        let queued = (0..=limits.len()).map(|_| AtomicUsize::new(0)).collect();
        let inner = Inner {
            pools: Pools::new(lanes.len(), limits).with_shares(shares),
            effects: Vec::new(),
            resting: HashMap::new(),
            mailboxes: Slab::new(),
            kinds: HashMap::new(),
            by_startup: HashMap::new(),
            by_role: HashMap::new(),
        };
        let (clock, texts) = (Instant::now(), Texts::default());
        Self { inner: Mutex::new(inner), clock, lanes, queued, texts }
    }

    /// Other bounds hold from now on.
    pub fn set_limits(
        &self,
        limits: impl IntoIterator<Item = Limits>,
        per_user: Option<usize>,
        per_database: Option<usize>,
    ) {
        self.inner.lock().pools.set_limits(limits, per_user, per_database);
        // Whoever waits may have room now, and what is beyond the bounds rests no longer.
        self.happened(self.inner.lock(), Event::Tick, self.now(), None, None);
    }

    fn queued(&self, listener: usize) -> &AtomicUsize {
        let last = self.queued.len() - 1;
        &self.queued[listener.min(last)]
    }

    /// How many threads there are.
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    fn now(&self) -> Moment {
        Moment::new(self.clock.elapsed())
    }

    /// Takes a client in; `waker` wakes its task.
    pub fn join(self: &Arc<Self>, newcomer: Newcomer, waker: Waker, lane: usize) -> Member {
        let mut inner = self.inner.lock();
        let Newcomer { listener, user, database, startup, credentials } = newcomer;
        let proof = std::mem::discriminant(&credentials);
        let known = inner.by_startup.get(&(listener, startup.clone(), proof)).copied();
        let kind = match known.and_then(|id| inner.kinds.get(&id).cloned()) {
            Some(kind) => {
                let mut known = kind.credentials.lock();
                if *known != credentials {
                    *known = credentials;
                    kind.taken.store(false, Relaxed);
                }
                drop(known);
                kind
            }
            None => {
                let role = (listener, user.clone(), database.clone());
                let pool = match inner.by_role.get(&role) {
                    Some(pool) => *pool,
                    None => inner.pools.add_pool(listener, &user, &database),
                };
                inner.by_role.insert(role, pool);
                let id = inner.pools.add_kind(pool);
                let nobody = Identity {
                    user: user.clone(),
                    startup: startup.clone(),
                    credentials: Credentials::None,
                    was_taken: false,
                };
                let kind = Arc::new(Kind {
                    id,
                    nobody: nobody.into(),
                    listener,
                    pool,
                    user,
                    database,
                    startup: startup.clone(),
                    credentials: Mutex::new(credentials),
                    taken: AtomicBool::new(false),
                    proof,
                    welcome: Mutex::new(None),
                    checking: AtomicBool::new(false),
                });
                inner.by_startup.insert((listener, startup, proof), id);
                inner.kinds.insert(id, Arc::clone(&kind));
                kind
            }
        };
        inner.pools.join(kind.id);
        let mailbox = Arc::new(Mailbox::new(waker));
        let id = MemberId(inner.mailboxes.insert(Arc::clone(&mailbox)) as u32);
        let (lender, since) = (Arc::clone(self), self.clock);
        Member { kind, lane, is_waiting: false, since, id, mailbox, lender }
    }

    /// A connection was opened for an order.
    pub fn opened(
        self: &Arc<Self>,
        order: &Order,
        lane: usize,
        link: Box<Link>,
        params: Parameters,
        lifetime: Duration,
    ) {
        let params = Arc::new(params);
        order.kind.welcomed(&params);
        let lease = Lease {
            slot: order.slot,
            lane,
            state: ConnectionState::fresh(params),
            lender: Arc::clone(self),
            is_out: false,
        };
        let mut inner = self.inner.lock();
        inner.resting.insert(order.slot, Settled::fresh(link, lease));
        let now = self.now();
        let event = Event::Opened { slot: order.slot, expires: now + lifetime };
        // Nobody is asking: what is given goes to a mailbox.
        self.happened(inner, event, now, None, None);
    }

    /// An order could not be carried out.
    pub fn failed(&self, order: &Order, error: DialError) {
        let event = Event::Failed { slot: order.slot };
        let error = Arc::new(error);
        self.happened(self.inner.lock(), event, self.now(), None, Some(&error));
    }

    /// A client gives its connection back, fit for the next.
    pub fn release(&self, mut settled: Settled) {
        let Some(lease) = &mut settled.link_mut().lease else { return };
        lease.is_out = false;
        let slot = lease.slot;
        let mut inner = self.inner.lock();
        inner.resting.insert(slot, settled);
        self.happened(inner, Event::Released { slot }, self.now(), None, None);
    }

    fn gone(&self, slot: SlotId) {
        self.happened(self.inner.lock(), Event::Gone { slot }, self.now(), None, None);
    }

    /// Time passes.
    pub fn tick(&self) {
        self.happened(self.inner.lock(), Event::Tick, self.now(), None, None);
        let mut inner = self.inner.lock();
        let unused = inner.kinds.values().filter(|kind| Arc::strong_count(kind) == 1);
        let unused: Vec<Arc<Kind>> = unused.cloned().collect();
        for kind in unused {
            let forgotten = inner.pools.forget_if_empty(kind.id);
            inner.forget(&kind, forgotten);
        }
    }

    /// Whether any connection rests here.
    pub fn has_idle(&self) -> bool {
        !self.inner.lock().resting.is_empty()
    }

    /// Ends idle connections beyond those that clients would have without a pool.
    pub fn spare(&self) {
        self.happened(self.inner.lock(), Event::Spare, self.now(), None, None);
    }

    /// Ends idle connections of a thread that are not good any more.
    pub fn sift(&self, lane: usize, mut is_good: impl FnMut(&mut Link) -> bool) {
        let bad: Vec<SlotId> = {
            let mut inner = self.inner.lock();
            let resting = inner.resting.iter_mut();
            resting
                .filter(|(_, it)| it.link().lease.as_ref().is_some_and(|it| it.lane == lane))
                .filter_map(|(slot, it)| (!is_good(it.link_mut())).then_some(*slot))
                .collect()
        };
        for slot in bad {
            let mut inner = self.inner.lock();
            // It may have been lent since. What is not here must not be on offer for a moment.
            let Some(closed) = inner.resting.remove(&slot) else { continue };
            self.happened(inner, Event::Gone { slot }, self.now(), None, None);
            drop(closed);
        }
    }

    /// A client is to have a server connection to itself. `anyhow`: whatever the bounds say. `None` if
    /// there is no room.
    pub fn take_own(
        self: &Arc<Self>,
        user: &Bytes,
        database: &Bytes,
        anyhow: bool,
    ) -> Option<OwnServer> {
        let owner = Owner { user: user.clone(), database: database.clone() };
        let mut inner = self.inner.lock();
        let mut effects = Vec::new();
        let taken = match anyhow {
            true => {
                inner.pools.take_own_anyhow(&owner);
                true
            }
            false => inner.pools.take_own(&owner, &mut effects),
        };
        self.carry_out(inner, effects, None, None);
        taken.then(|| OwnServer { lender: Arc::clone(self), owner })
    }

    /// Whether the client's pool has a server connection, or one is on its way.
    pub fn has_server(&self, kind: &Kind) -> bool {
        let count = self.inner.lock().pools.count(kind.pool, self.now());
        count.idle + count.lent + count.opening > 0
    }

    /// Counts of each pool: listener, role, database.
    pub fn counts(&self) -> Vec<(usize, Bytes, Bytes, PoolCount)> {
        let inner = self.inner.lock();
        let now = self.now();
        let pools = inner.by_role.iter();
        pools
            .map(|((listener, user, database), pool)| {
                (*listener, user.clone(), database.clone(), inner.pools.count(*pool, now))
            })
            .collect()
    }

    /// Lets the core decide and does what it says. The connection given to `asker` is answered.
    fn happened(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        event: Event,
        now: Moment,
        asker: Option<MemberId>,
        error: Option<&Arc<DialError>>,
    ) -> Option<Settled> {
        let mut effects = std::mem::take(&mut inner.effects);
        inner.pools.on(event, now, &mut effects);
        self.carry_out(inner, effects, asker, error)
    }

    fn carry_out(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        mut effects: Vec<Effect>,
        asker: Option<MemberId>,
        error: Option<&Arc<DialError>>,
    ) -> Option<Settled> {
        let mut given = None;
        let mut closed = Vec::new();
        for effect in effects.drain(..) {
            match effect {
                Effect::Give { slot, member } => {
                    let Some(mut settled) = inner.resting.remove(&slot) else { continue };
                    if let Some(lease) = &mut settled.link_mut().lease {
                        lease.is_out = true;
                    }
                    if asker == Some(member) {
                        given = Some(settled);
                    } else if let Some(mailbox) = inner.mailboxes.get(member.0 as usize) {
                        mailbox.deliver(Delivery::Server(settled));
                    }
                }
                Effect::Open { slot, kind, lane } => {
                    let (kind, lane) = (inner.kinds.get(&kind), self.lanes.get(lane));
                    if let (Some(kind), Some(lane)) = (kind, lane) {
                        // A thread that takes no orders has ended, and so will we.
                        discard::receiver_may_be_gone(
                            lane.send(Order { slot, kind: Arc::clone(kind) }),
                        );
                    }
                }
                Effect::Close { slot } => closed.extend(inner.resting.remove(&slot)),
                Effect::Notice { member, ahead } => {
                    if let Some(mailbox) = inner.mailboxes.get(member.0 as usize) {
                        mailbox.notice(ahead);
                    }
                }
                Effect::Look { member } => {
                    if let Some(mailbox) = inner.mailboxes.get(member.0 as usize) {
                        mailbox.look();
                    }
                }
                Effect::Expire { member, why } => {
                    if let Some(mailbox) = inner.mailboxes.get(member.0 as usize) {
                        mailbox.deliver(Delivery::Expired(why));
                    }
                }
                Effect::Refuse { member, .. } => {
                    let mailbox = inner.mailboxes.get(member.0 as usize);
                    if let (Some(mailbox), Some(error)) = (mailbox, error) {
                        mailbox.deliver(Delivery::Failed(Arc::clone(error)));
                    }
                }
            }
        }
        inner.effects = effects;
        drop(inner);
        for mut settled in closed {
            crate::net::backend::say_good_bye(&mut settled.link_mut().stream);
        }
        given
    }
}

impl Member {
    /// Asks for a connection; without one at hand the mailbox gets it.
    pub fn ask(&mut self) -> Option<Settled> {
        let event = Event::Ask { member: self.id, kind: self.kind.id, lane: self.lane };
        let lender = &self.lender;
        let given = lender.happened(lender.inner.lock(), event, lender.now(), Some(self.id), None);
        self.is_waiting = given.is_none();
        if self.is_waiting {
            self.since = Instant::now();
            self.lender.queued(self.kind.listener).fetch_add(1, Relaxed);
        }
        given
    }

    /// Takes the delivery from the mailbox; the wait is over then.
    pub fn delivery(&mut self) -> Option<Delivery> {
        let delivery = self.mailbox.take();
        if delivery.is_some() && std::mem::take(&mut self.is_waiting) {
            self.lender.queued(self.kind.listener).fetch_sub(1, Relaxed);
        }
        delivery
    }

    /// How many are in front, if the client is to be told.
    pub fn take_notice(&self) -> Option<u32> {
        self.mailbox.take_notice()
    }

    /// Whether it is to see whether its client is still there.
    pub fn take_look(&self) -> bool {
        self.mailbox.take_look()
    }

    /// Whether somebody waits for a connection of this listener.
    #[inline]
    pub fn others_wait(&self) -> bool {
        self.lender.queued(self.kind.listener).load(Relaxed) > 0
    }

    /// Stops waiting. What was brought meanwhile goes back.
    pub fn withdraw(&mut self) {
        if !std::mem::take(&mut self.is_waiting) {
            return;
        }
        self.lender.queued(self.kind.listener).fetch_sub(1, Relaxed);
        let event = Event::Withdraw { member: self.id, kind: self.kind.id };
        let lender = &self.lender;
        lender.happened(lender.inner.lock(), event, lender.now(), None, None);
        if let Some(Delivery::Server(settled)) = self.mailbox.take() {
            lender.release(settled);
        }
    }

    /// The lender of the member's connections.
    pub fn lender(&self) -> &Arc<Lender> {
        &self.lender
    }
}

/// A place among a role's and a database's server connections, of a client that has one to itself.
#[derive(Debug)]
pub struct OwnServer {
    lender: Arc<Lender>,
    owner: Owner,
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let mut inner = self.lender.inner.lock();
        let mut effects = Vec::new();
        inner.pools.give_back_own(&self.owner, self.lender.now(), &mut effects);
        self.lender.carry_out(inner, effects, None, None);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.withdraw();
        let mut inner = self.lender.inner.lock();
        inner.mailboxes.try_remove(self.id.0 as usize);
        let forgotten = inner.pools.leave(self.kind.id);
        inner.forget(&self.kind, forgotten);
    }
}

impl Inner {
    fn forget(&mut self, kind: &Kind, forgotten: Forgotten) {
        if forgotten == Forgotten::Nothing {
            return;
        }
        self.kinds.remove(&kind.id);
        self.by_startup.remove(&(kind.listener, kind.startup.clone(), kind.proof));
        if forgotten == Forgotten::KindAndPool {
            self.by_role.remove(&(kind.listener, kind.user.clone(), kind.database.clone()));
        }
    }
}
