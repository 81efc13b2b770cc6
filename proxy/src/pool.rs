//! The decisions of transaction pooling: which client gets which server connection, and when. Pure.
//!
//! ```text
//! client asks ──► an idle connection? ──► given
//!      │ no            room for one more? ──► opened, given when it is there
//!      │               an idle one of others? ──► closed, one opened in its place
//!      └─► waits, first come first served ──► given │ told to wait │ refused when its time is up
//! released ──► the oldest who waits │ a poorer kind that waits longer │ idle
//! ```
//! Connections belong to *kinds* (a startup packet: what RESET goes back to), kinds to *pools* (a
//! role and a database on a listener), pools to listeners. Each level above the kind has a bound.
//!
//! Order: within a kind first come, first served, except that a connection goes to its own thread's
//! clients unless another thread's client has waited [`LANE_PATIENCE`] longer: moving a socket
//! between threads costs system calls. Between kinds that share a bound, a connection that becomes
//! free goes to the one that waits longest if it has fewer connections, so nobody starves and nobody
//! takes turns for nothing.
//!
//! Not here: sockets and who sits behind a [`MemberId`] ([`lender`]), what a connection must be told
//! before its next client uses it ([`crate::clients::client`]), prepared statements ([`crate::session::statements`]).

mod event;
pub mod lender;
pub mod link;
pub mod mailbox;
mod room;
pub mod settled;
#[cfg(test)]
mod tests;
mod time;

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use kornak_cluster::Moment;
use slab::Slab;

pub use event::{Effect, Event, Expired, KindId, Limits, MemberId, PoolCount, PoolId, SlotId};
use room::Owner;
pub use room::Shares;

/// How much longer than its own thread's clients another thread's client must have waited to be
/// given a connection. Well below what anybody notices, well above a transaction's length.
pub const LANE_PATIENCE: Duration = Duration::from_millis(20);

/// Pause after a login that failed before a kind that has other connections tries another.
const LOGIN_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Waiting {
    member: MemberId,
    since: Moment,
    noticed: bool,
    /// When it was last asked to look whether its client is still there.
    looked: Moment,
}

#[derive(Debug, Default)]
struct Kind {
    pool: u32,
    clients: usize,
    /// By thread, the one used last at the end.
    idle: Vec<Vec<SlotId>>,
    /// By thread, the oldest first.
    queues: Vec<VecDeque<Waiting>>,
    waiting: usize,
    opening: usize,
    /// Idle or lent.
    ready: usize,
    retry_at: Moment,
}

#[derive(Debug)]
struct Pool {
    listener: usize,
    /// Whose connections they are.
    owner: Owner,
    kinds: Vec<KindId>,
    /// Places taken.
    slots: usize,
    idle: usize,
    waiting: usize,
}

#[derive(Debug)]
struct Listener {
    limits: Limits,
    slots: usize,
    idle: usize,
    waiting: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Opening,
    Idle { since: Moment },
    Lent,
}

#[derive(Debug)]
struct Slot {
    kind: KindId,
    lane: usize,
    state: SlotState,
    expires: Moment,
}

/// All pools of a proxy.
#[derive(Debug)]
pub struct Pools {
    lanes: usize,
    listeners: Vec<Listener>,
    pools: Slab<Pool>,
    kinds: Slab<Kind>,
    slots: Slab<Slot>,
    /// Bounds that go across listeners.
    shares: Shares,
}

/// The part that was empty and is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forgotten {
    /// The kind has clients or connections.
    Nothing,
    Kind,
    KindAndPool,
}

impl Pools {
    /// No pool yet. One entry of `limits` for each listener.
    pub fn new(lanes: usize, limits: impl IntoIterator<Item = Limits>) -> Self {
        let listener = |limits| Listener { limits, slots: 0, idle: 0, waiting: 0 };
        Self {
            lanes: lanes.max(1),
            listeners: limits.into_iter().map(listener).collect(),
            pools: Slab::new(),
            kinds: Slab::new(),
            slots: Slab::new(),
            shares: Shares::default(),
        }
    }

    /// With bounds for roles and databases, whatever the listener.
    pub fn with_shares(self, shares: Shares) -> Self {
        Self { shares, ..self }
    }

    /// Other bounds hold from now on. Connections beyond them end when they are given back.
    pub fn set_limits(
        &mut self,
        limits: impl IntoIterator<Item = Limits>,
        per_user: Option<usize>,
        per_database: Option<usize>,
    ) {
        for (listener, limits) in self.listeners.iter_mut().zip(limits) {
            listener.limits = limits;
        }
        (self.shares.per_user, self.shares.per_database) = (per_user, per_database);
    }

    /// A role and database on a listener.
    pub fn add_pool(&mut self, listener: usize, user: &Bytes, database: &Bytes) -> PoolId {
        let owner = Owner { user: user.clone(), database: database.clone() };
        let pool = Pool { listener, owner, kinds: Vec::new(), slots: 0, idle: 0, waiting: 0 };
        PoolId(self.pools.insert(pool) as u32)
    }

    /// A startup packet of the pool.
    pub fn add_kind(&mut self, pool: PoolId) -> KindId {
        let kind = Kind {
            pool: pool.0,
            idle: vec![Vec::new(); self.lanes],
            queues: (0..self.lanes).map(|_| VecDeque::new()).collect(),
            ..Kind::default()
        };
        let kind = KindId(self.kinds.insert(kind) as u32);
        if let Some(pool) = self.pools.get_mut(pool.0 as usize) {
            pool.kinds.push(kind);
        }
        kind
    }

    /// A client of this kind has come.
    pub fn join(&mut self, kind: KindId) {
        if let Some(kind) = self.kinds.get_mut(kind.0 as usize) {
            kind.clients += 1;
        }
    }

    /// Notes that a client has left, and forgets what is empty then.
    pub fn leave(&mut self, kind: KindId) -> Forgotten {
        if let Some(kind) = self.kinds.get_mut(kind.0 as usize) {
            kind.clients = kind.clients.saturating_sub(1);
        }
        self.forget_if_empty(kind)
    }

    /// Forgets a kind that has no client and no connection, and its pool if that was its last kind.
    pub fn forget_if_empty(&mut self, id: KindId) -> Forgotten {
        let at = id.0 as usize;
        let empty = self
            .kinds
            .get(at)
            .is_some_and(|kind| kind.clients + kind.waiting + kind.opening + kind.ready == 0);
        if !empty {
            return Forgotten::Nothing;
        }
        let pool = self.kinds.remove(at).pool as usize;
        let Some(left) = self.pools.get_mut(pool) else { return Forgotten::Kind };
        left.kinds.retain(|kind| *kind != id);
        if !left.kinds.is_empty() {
            return Forgotten::Kind;
        }
        self.pools.remove(pool);
        Forgotten::KindAndPool
    }

    /// Which kind a place belongs to.
    pub fn kind_of(&self, slot: SlotId) -> Option<KindId> {
        self.slots.get(slot.0 as usize).map(|slot| slot.kind)
    }

    /// Counts of a pool.
    pub fn count(&self, pool: PoolId, now: Moment) -> PoolCount {
        let mut count = PoolCount::default();
        let kinds = self.pools.get(pool.0 as usize).map(|pool| pool.kinds.as_slice());
        for kind in kinds.unwrap_or_default() {
            let Some(kind) = self.kinds.get(kind.0 as usize) else { continue };
            let idle: usize = kind.idle.iter().map(Vec::len).sum();
            count.clients += kind.clients;
            count.waiting += kind.waiting;
            count.opening += kind.opening;
            count.idle += idle;
            count.lent += kind.ready - idle;
            if let Some(oldest) = kind.oldest() {
                count.longest_wait = count.longest_wait.max(now.since(oldest));
            }
        }
        count
    }

    /// Takes what happened in; what is to be done about it goes to `out`.
    pub fn on(&mut self, event: Event, now: Moment, out: &mut Vec<Effect>) {
        match event {
            Event::Ask { member, kind, lane } => self.ask(member, kind, lane, now, out),
            Event::Withdraw { member, kind } => self.withdraw(member, kind),
            Event::Opened { slot, expires } => self.opened(slot, expires, now, out),
            Event::Failed { slot } => self.failed(slot, now, out),
            Event::Released { slot } => self.released(slot, now, out),
            Event::Gone { slot } => self.gone(slot, now, out),
            Event::Spare => self.spare(now, out),
            Event::Tick => self.tick(now, out),
        }
    }

    fn ask(
        &mut self,
        member: MemberId,
        id: KindId,
        lane: usize,
        now: Moment,
        out: &mut Vec<Effect>,
    ) {
        let lane = lane % self.lanes;
        let Some(kind) = self.kinds.get_mut(id.0 as usize) else { return };
        let own = kind.idle.get_mut(lane).and_then(Vec::pop);
        let found = own.or_else(|| kind.idle.iter_mut().rev().find_map(Vec::pop));
        if let Some(slot) = found {
            self.count_idle(id, false);
            self.lend(slot, member, Some(lane), out);
            return;
        }
        if let Some(queue) = kind.queues.get_mut(lane) {
            queue.push_back(Waiting { member, since: now, noticed: false, looked: now });
        }
        self.count_waiting(id, true);
        self.grow(id, now, out);
    }

    fn lend(&mut self, slot: SlotId, member: MemberId, lane: Option<usize>, out: &mut Vec<Effect>) {
        if let Some(known) = self.slots.get_mut(slot.0 as usize) {
            known.state = SlotState::Lent;
            known.lane = lane.unwrap_or(known.lane);
            out.push(Effect::Give { slot, member });
        }
    }

    fn withdraw(&mut self, member: MemberId, id: KindId) {
        let Some(kind) = self.kinds.get_mut(id.0 as usize) else { return };
        for queue in &mut kind.queues {
            if let Some(at) = queue.iter().position(|waiting| waiting.member == member) {
                queue.remove(at);
                self.count_waiting(id, false);
                return;
            }
        }
    }

    fn opened(&mut self, id: SlotId, expires: Moment, now: Moment, out: &mut Vec<Effect>) {
        let Some(slot) = self.slots.get_mut(id.0 as usize) else { return };
        slot.expires = expires;
        slot.state = SlotState::Lent;
        let kind = slot.kind;
        if let Some(kind) = self.kinds.get_mut(kind.0 as usize) {
            kind.opening -= 1;
            kind.ready += 1;
        }
        self.pass_on(id, now, out);
    }

    fn failed(&mut self, id: SlotId, now: Moment, out: &mut Vec<Effect>) {
        let Some(slot) = self.slots.try_remove(id.0 as usize) else { return };
        let lane = slot.lane;
        let kind = self.vacate(&slot);
        let Some(known) = self.kinds.get_mut(kind.0 as usize) else { return };
        if known.ready == 0 {
            if let Some((member, _)) = known.take_next(lane) {
                self.count_waiting(kind, false);
                out.push(Effect::Refuse { member, slot: id });
            }
        } else {
            known.retry_at = now + LOGIN_PAUSE;
        }
        self.grow_whoever_waits(kind, now, out);
    }

    fn released(&mut self, id: SlotId, now: Moment, out: &mut Vec<Effect>) {
        let Some(slot) = self.slots.get(id.0 as usize) else { return };
        if now >= slot.expires || self.is_beyond(slot.kind) {
            out.push(Effect::Close { slot: id });
            self.gone(id, now, out);
            return;
        }
        self.pass_on(id, now, out);
    }

    /// A connection that nobody has: to whoever is next, or to rest.
    fn pass_on(&mut self, id: SlotId, now: Moment, out: &mut Vec<Effect>) {
        let Some(slot) = self.slots.get(id.0 as usize) else { return };
        let (kind, lane) = (slot.kind, slot.lane);
        if let Some(poorer) = self.poorer(kind) {
            out.push(Effect::Close { slot: id });
            if let Some(slot) = self.slots.try_remove(id.0 as usize) {
                self.vacate(&slot);
            }
            self.grow(poorer, now, out);
            return;
        }
        let Some(known) = self.kinds.get_mut(kind.0 as usize) else { return };
        if let Some((member, to)) = known.take_next(lane) {
            self.count_waiting(kind, false);
            self.lend(id, member, Some(to), out);
            return;
        }
        if let Some(rest) = known.idle.get_mut(lane) {
            rest.push(id);
        }
        if let Some(slot) = self.slots.get_mut(id.0 as usize) {
            slot.state = SlotState::Idle { since: now };
        }
        self.count_idle(kind, true);
    }

    fn gone(&mut self, id: SlotId, now: Moment, out: &mut Vec<Effect>) {
        let Some(slot) = self.slots.try_remove(id.0 as usize) else { return };
        let kind = self.vacate(&slot);
        if let SlotState::Idle { .. } = slot.state {
            self.forget_idle(kind, id);
        }
        self.grow_whoever_waits(kind, now, out);
    }

    fn forget_idle(&mut self, kind: KindId, id: SlotId) {
        if let Some(known) = self.kinds.get_mut(kind.0 as usize) {
            for rest in &mut known.idle {
                rest.retain(|slot| *slot != id);
            }
        }
        self.count_idle(kind, false);
    }

    /// Frees the counts of a place that was taken out.
    fn vacate(&mut self, slot: &Slot) -> KindId {
        if let Some(kind) = self.kinds.get_mut(slot.kind.0 as usize) {
            match slot.state {
                SlotState::Opening => kind.opening -= 1,
                SlotState::Idle { .. } | SlotState::Lent => kind.ready -= 1,
            }
            if let Some(pool) = self.pools.get_mut(kind.pool as usize) {
                pool.slots -= 1;
                self.shares.give_back(&pool.owner);
                if let Some(listener) = self.listeners.get_mut(pool.listener) {
                    listener.slots -= 1;
                }
            }
        }
        slot.kind
    }

    /// Opens connections for a kind as long as it waits for more than are on their way and there is
    /// room, or room can be made.
    fn grow(&mut self, id: KindId, now: Moment, out: &mut Vec<Effect>) {
        loop {
            let Some(kind) = self.kinds.get(id.0 as usize) else { return };
            let pauses = kind.ready > 0 && now < kind.retry_at;
            if kind.opening >= kind.waiting || pauses || !self.make_room(id, out) {
                return;
            }
            let Some(kind) = self.kinds.get_mut(id.0 as usize) else { return };
            let longest = (0..kind.queues.len()).max_by_key(|lane| {
                (kind.queues.get(*lane).map_or(0, VecDeque::len), std::cmp::Reverse(*lane))
            });
            let lane = longest.unwrap_or(0);
            kind.opening += 1;
            let pool = kind.pool;
            let slot = Slot { kind: id, lane, state: SlotState::Opening, expires: now };
            let slot = SlotId(self.slots.insert(slot) as u32);
            if let Some(pool) = self.pools.get_mut(pool as usize) {
                pool.slots += 1;
                self.shares.take(&pool.owner);
                if let Some(listener) = self.listeners.get_mut(pool.listener) {
                    listener.slots += 1;
                }
            }
            out.push(Effect::Open { slot, kind: id, lane });
        }
    }

    /// After a place became free: first the kind that lost it, then whoever waits longest.
    fn grow_whoever_waits(&mut self, first: KindId, now: Moment, out: &mut Vec<Effect>) {
        let pool = self.kinds.get(first.0 as usize).map(|kind| kind.pool);
        let listener = pool.and_then(|pool| self.pools.get(pool as usize)).map(|p| p.listener);
        let Some(listener) = listener else { return };
        self.grow_waiting(Some(listener), now, out);
    }

    /// Opens what can be opened for whoever waits, here or anywhere, the oldest first.
    fn grow_waiting(&mut self, listener: Option<usize>, now: Moment, out: &mut Vec<Effect>) {
        // A bound of a role or a database may be what somebody on another listener waits for.
        let listener = listener.filter(|_| !self.shares.is_any());
        let waits = |at: usize| self.listeners.get(at).is_some_and(|it| it.waiting > 0);
        if listener.is_some_and(|listener| !waits(listener)) {
            return;
        }
        let mut waiting: Vec<(Option<Moment>, KindId)> = self
            .kinds
            .iter()
            .filter(|(_, kind)| {
                let near = |pool: &Pool| listener.is_none_or(|listener| pool.listener == listener);
                kind.waiting > kind.opening && self.pools.get(kind.pool as usize).is_some_and(near)
            })
            .map(|(id, kind)| (kind.oldest(), KindId(id as u32)))
            .collect();
        waiting.sort_by_key(|(oldest, _)| *oldest);
        for (_, kind) in waiting {
            self.grow(kind, now, out);
        }
    }

    fn limits_of(&self, kind: KindId) -> Option<Limits> {
        let pool = self.kinds.get(kind.0 as usize)?.pool;
        let listener = self.pools.get(pool as usize)?.listener;
        self.listeners.get(listener).map(|listener| listener.limits)
    }

    fn count_idle(&mut self, kind: KindId, more: bool) {
        self.count_in(kind, |pool, listener| {
            for count in [&mut pool.idle, &mut listener.idle] {
                *count = if more { *count + 1 } else { *count - 1 };
            }
        });
    }

    fn count_waiting(&mut self, id: KindId, more: bool) {
        if let Some(kind) = self.kinds.get_mut(id.0 as usize) {
            kind.waiting = if more { kind.waiting + 1 } else { kind.waiting - 1 };
        }
        self.count_in(id, |pool, listener| {
            for count in [&mut pool.waiting, &mut listener.waiting] {
                *count = if more { *count + 1 } else { *count - 1 };
            }
        });
    }

    fn count_in(&mut self, kind: KindId, change: impl FnOnce(&mut Pool, &mut Listener)) {
        let Some(kind) = self.kinds.get(kind.0 as usize) else { return };
        let Some(pool) = self.pools.get_mut(kind.pool as usize) else { return };
        if let Some(listener) = self.listeners.get_mut(pool.listener) {
            change(pool, listener);
        }
    }
}

impl Kind {
    /// Since when the oldest client waits.
    fn oldest(&self) -> Option<Moment> {
        if self.waiting == 0 {
            return None;
        }
        self.queues.iter().filter_map(|queue| queue.front().map(|front| front.since)).min()
    }

    /// Takes who is next for a connection of this thread, and the thread it goes to.
    fn take_next(&mut self, lane: usize) -> Option<(MemberId, usize)> {
        if self.waiting == 0 {
            return None;
        }
        let front = |at: usize| self.queues.get(at)?.front().map(|front| front.since);
        let own = front(lane);
        let other = (0..self.queues.len()).filter(|at| *at != lane);
        let other = other.filter_map(|at| Some((front(at)?, at))).min();
        let at = match (own, other) {
            (Some(own), Some((since, at))) if since + LANE_PATIENCE < own => at,
            (Some(_), _) => lane,
            (None, Some((_, at))) => at,
            (None, None) => return None,
        };
        let next = self.queues.get_mut(at)?.pop_front()?;
        Some((next.member, at))
    }
}
