//! Which bounds a connection more would break, and whose idle one makes room for it.
//!
//! A pool lies within four: its own, its listener's, and across all listeners its role's and its
//! database's, which clients with a connection to themselves share with it.

use std::collections::HashMap;

use bytes::Bytes;
use kornak_cluster::Moment;

use super::{Effect, KindId, Pools, SlotId, SlotState};

/// Whose connections they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    pub user: Bytes,
    pub database: Bytes,
}

/// How many server connections a role and a database may have, and have.
#[derive(Debug, Default)]
pub struct Shares {
    pub per_user: Option<usize>,
    pub per_database: Option<usize>,
    users: HashMap<Bytes, usize>,
    databases: HashMap<Bytes, usize>,
}

impl Shares {
    /// With these bounds; `None`: without.
    pub fn new(per_user: Option<usize>, per_database: Option<usize>) -> Self {
        Self { per_user, per_database, ..Self::default() }
    }

    /// Whether there is a bound.
    pub fn is_any(&self) -> bool {
        self.per_user.is_some() || self.per_database.is_some()
    }

    /// Counted whether there is a bound or not: a reload may bring one.
    pub(super) fn take(&mut self, owner: &Owner) {
        *self.users.entry(owner.user.clone()).or_insert(0) += 1;
        *self.databases.entry(owner.database.clone()).or_insert(0) += 1;
    }

    pub(super) fn give_back(&mut self, owner: &Owner) {
        fn less(counts: &mut HashMap<Bytes, usize>, name: &Bytes) {
            if let Some(count) = counts.get_mut(name) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(name);
                }
            }
        }
        less(&mut self.users, &owner.user);
        less(&mut self.databases, &owner.database);
    }

    fn is_full(limit: Option<usize>, counts: &HashMap<Bytes, usize>, name: &Bytes) -> bool {
        limit.is_some_and(|limit| counts.get(name).copied().unwrap_or(0) >= limit)
    }
}

/// The bounds that are reached of those around a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Full {
    pool: bool,
    listener: bool,
    user: bool,
    database: bool,
}

impl Full {
    fn is_any(self) -> bool {
        self != Self::default()
    }
}

impl Pools {
    /// The bounds around an owner, whatever the listener.
    fn full_of(&self, owner: &Owner) -> Full {
        let shares = &self.shares;
        Full {
            user: Shares::is_full(shares.per_user, &shares.users, &owner.user),
            database: Shares::is_full(shares.per_database, &shares.databases, &owner.database),
            ..Full::default()
        }
    }

    fn full_around(&self, pool: u32) -> Option<Full> {
        let pool = self.pools.get(pool as usize)?;
        let listener = self.listeners.get(pool.listener)?;
        Some(Full {
            pool: pool.slots >= listener.limits.pool_size,
            listener: listener.slots >= listener.limits.max_servers,
            ..self.full_of(&pool.owner)
        })
    }

    /// Whether the kind's pool, its listener, its role or its database has more connections than it may: bounds
    /// were lowered.
    pub(super) fn is_beyond(&self, kind: KindId) -> bool {
        let pool = self.kinds.get(kind.0 as usize).and_then(|it| self.pools.get(it.pool as usize));
        let Some(pool) = pool else { return false };
        let Some(listener) = self.listeners.get(pool.listener) else { return false };
        let Shares { per_user, per_database, users, databases } = &self.shares;
        pool.slots > listener.limits.pool_size
            || listener.slots > listener.limits.max_servers
            || Shares::is_full(per_user.map(|it| it + 1), users, &pool.owner.user)
            || Shares::is_full(per_database.map(|it| it + 1), databases, &pool.owner.database)
    }

    /// Whether both pools lie within each of these bounds, so that a connection of the one can make
    /// room for one of the other.
    fn share(&self, full: Full, one: u32, other: u32) -> bool {
        let (Some(a), Some(b)) = (self.pools.get(one as usize), self.pools.get(other as usize))
        else {
            return false;
        };
        (!full.pool || one == other)
            && (!full.listener || a.listener == b.listener)
            && (!full.user || a.owner.user == b.owner.user)
            && (!full.database || a.owner.database == b.owner.database)
    }

    /// A kind that cannot grow because of bounds which it shares with this one, has fewer connections,
    /// and whose oldest client has waited longer than any of ours.
    pub(super) fn poorer(&self, of: KindId) -> Option<KindId> {
        let own = self.kinds.get(of.0 as usize)?;
        let pool = self.pools.get(own.pool as usize)?;
        let listener = self.listeners.get(pool.listener)?;
        if !self.shares.is_any() && listener.waiting == own.waiting {
            return None;
        }
        if !self.full_around(own.pool)?.is_any() {
            return None;
        }
        let ours = own.oldest();
        let found = self.kinds.iter().filter(|(id, kind)| {
            *id != of.0 as usize
                && kind.waiting > kind.opening
                && kind.ready + kind.opening < own.ready + own.opening
                && ours.is_none_or(|ours| kind.oldest().is_some_and(|theirs| theirs < ours))
                && self
                    .full_around(kind.pool)
                    .is_some_and(|full| full.is_any() && self.share(full, kind.pool, own.pool))
        });
        found.min_by_key(|(_, kind)| kind.oldest()).map(|(id, _)| KindId(id as u32))
    }

    /// Whether one more connection of the kind may be opened; closes an idle one of others for it.
    pub(super) fn make_room(&mut self, id: KindId, out: &mut Vec<Effect>) -> bool {
        let Some(pool) = self.kinds.get(id.0 as usize).map(|kind| kind.pool) else { return false };
        let Some(full) = self.full_around(pool) else { return false };
        if !full.is_any() {
            return true;
        }
        let near = |kind: &KindId| {
            let owner = self.kinds.get(kind.0 as usize).map(|kind| kind.pool);
            *kind != id && owner.is_some_and(|owner| self.share(full, pool, owner))
        };
        let victim = self.longest_idle(near);
        self.close_idle(victim, out)
    }

    /// A client wants a connection to itself; closes an idle one of a pool for it. `false` if there is
    /// no room.
    pub fn take_own(&mut self, owner: &Owner, out: &mut Vec<Effect>) -> bool {
        let full = self.full_of(owner);
        let near = |kind: &KindId| {
            let pool = self.kinds.get(kind.0 as usize).map(|kind| kind.pool as usize);
            pool.and_then(|pool| self.pools.get(pool)).is_some_and(|pool| {
                (!full.user || pool.owner.user == owner.user)
                    && (!full.database || pool.owner.database == owner.database)
            })
        };
        if full.is_any() {
            let victim = self.longest_idle(near);
            if !self.close_idle(victim, out) {
                return false;
            }
        }
        self.shares.take(owner);
        true
    }

    /// Counts a server connection of a client that is let in whatever the bounds say.
    pub fn take_own_anyhow(&mut self, owner: &Owner) {
        self.shares.take(owner);
    }

    /// Notes that an owner's server connection has ended.
    pub fn give_back_own(&mut self, owner: &Owner, now: Moment, out: &mut Vec<Effect>) {
        self.shares.give_back(owner);
        if self.shares.is_any() {
            self.grow_waiting(None, now, out);
        }
    }

    fn longest_idle(&self, near: impl Fn(&KindId) -> bool) -> Option<usize> {
        let idle = self.slots.iter().filter_map(|(at, slot)| match slot.state {
            SlotState::Idle { since } if near(&slot.kind) => Some((since, at)),
            SlotState::Idle { .. } | SlotState::Opening | SlotState::Lent => None,
        });
        idle.min().map(|(_, at)| at)
    }

    fn close_idle(&mut self, victim: Option<usize>, out: &mut Vec<Effect>) -> bool {
        let Some(slot) = victim.and_then(|at| self.slots.try_remove(at)) else { return false };
        let victim = SlotId(victim.unwrap_or_default() as u32);
        let kind = self.vacate(&slot);
        self.forget_idle(kind, victim);
        out.push(Effect::Close { slot: victim });
        true
    }
}
