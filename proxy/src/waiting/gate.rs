//! The gate at which sessions wait while a handover drains.
//!
//! A transaction may start only inside the gate. Closing it and counting who is inside must not
//! race: a session *first* counts itself in and *then* looks whether the gate is closed; who closes
//! it *first* closes and *then* counts. With sequentially consistent atomics one of the two sees the
//! other, so "closed and nobody inside" is proof that nobody is, and nobody will be (docs/safety.md A5).
//!
//! Counters are one per thread, each on a cache line of its own: starting a transaction costs no
//! traffic between cores. Not here: when to close ([`crate::waiting::hold`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst};

use kornak_cluster::discard;
use tokio::sync::{Notify, watch};

/// Which sessions a handover affects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Sessions on a leader, or whose target is one.
    Leading,
    /// Sessions on standbys.
    Following,
    /// Sessions on the leaders of a Citus cluster's worker groups.
    Workers,
}

impl Side {
    fn bit(self) -> u8 {
        1 << self.index()
    }

    fn index(self) -> usize {
        match self {
            Self::Leading => 0,
            Self::Following => 1,
            Self::Workers => 2,
        }
    }
}

/// A set of sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sides(u8);

impl Sides {
    /// Nobody.
    pub const NONE: Self = Self(0);
    /// Sessions on leaders.
    pub const LEADING: Self = Self(1);
    /// Sessions on standbys.
    pub const FOLLOWING: Self = Self(2);
    /// Sessions on workers.
    pub const WORKERS: Self = Self(4);
    /// Sessions that may reach any group of a Citus cluster's primaries.
    pub const REACHING: Self = Self(5);
    /// Everybody: a Citus session may reach any node.
    pub const ALL: Self = Self(7);

    /// Whether the side is in the set.
    pub fn contains(self, side: Side) -> bool {
        self.0 & side.bit() != 0
    }

    /// The sides of either set.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether nobody is in the set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Sessions of one thread that are inside, by side.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Lane {
    inside: [AtomicUsize; 3],
}

/// The gate of one proxy.
#[derive(Debug)]
pub struct Gate {
    closed: AtomicU8,
    lanes: Vec<Lane>,
    /// Somebody left while the gate was closed.
    left: Notify,
    /// The closed sides, for tasks that wait.
    announced: watch::Sender<Sides>,
}

impl Gate {
    /// An open gate for so many threads.
    pub fn new(threads: usize) -> Self {
        let lanes = (0..threads.max(1)).map(|_| Lane::default()).collect();
        let announced = watch::Sender::new(Sides::NONE);
        Self { closed: AtomicU8::new(0), lanes, left: Notify::new(), announced }
    }

    /// Lets nobody of these sides in any more, and everybody else again.
    pub fn close(&self, sides: Sides) {
        self.closed.store(sides.0, SeqCst);
        self.announced.send_if_modified(|known| std::mem::replace(known, sides) != sides);
    }

    /// The sides that are closed.
    pub fn closed(&self) -> Sides {
        Sides(self.closed.load(SeqCst))
    }

    /// Whether this side is closed. May be a moment old; [`Ticket::enter`] decides.
    #[inline]
    pub fn is_closed(&self, side: Side) -> bool {
        self.closed().contains(side)
    }

    /// How many of these sides are inside.
    pub fn inside(&self, sides: Sides) -> usize {
        let count = |side: Side| -> usize {
            self.lanes
                .iter()
                .filter_map(|lane| lane.inside.get(side.index()))
                .map(|n| n.load(SeqCst))
                .sum()
        };
        let all = [Side::Leading, Side::Following, Side::Workers];
        all.into_iter().filter(|side| sides.contains(*side)).map(count).sum()
    }

    /// Waits until nobody of these sides is inside. Meaningful only while they are closed.
    pub async fn wait_empty(&self, sides: Sides) {
        loop {
            let left = self.left.notified();
            if self.inside(sides) == 0 {
                return;
            }
            left.await;
        }
    }

    /// Waits until this side is open.
    pub async fn wait_open(&self, side: Side) {
        let mut announced = self.announced.subscribe();
        // The sender lives as long as we do.
        discard::sender_outlives_waiters(announced.wait_for(|closed| !closed.contains(side)).await);
    }

    fn counter(&self, lane: usize, side: Side) -> Option<&AtomicUsize> {
        self.lanes.get(lane % self.lanes.len()).and_then(|lane| lane.inside.get(side.index()))
    }
}

/// One session's way through the gate. Leaves by itself when dropped.
#[derive(Debug)]
pub struct Ticket {
    gate: Arc<Gate>,
    lane: usize,
    inside: Option<Side>,
}

impl Ticket {
    /// A ticket of a session on this thread, outside.
    pub fn new(gate: &Arc<Gate>, lane: usize) -> Self {
        Self { gate: Arc::clone(gate), lane, inside: None }
    }

    /// Whether the session is inside.
    #[inline]
    pub fn is_inside(&self) -> bool {
        self.inside.is_some()
    }

    /// Goes in, unless this side is closed.
    #[inline]
    pub fn enter(&mut self, side: Side) -> bool {
        if self.inside.is_some() {
            return true;
        }
        let Some(counter) = self.gate.counter(self.lane, side) else { return false };
        counter.fetch_add(1, SeqCst);
        self.inside = Some(side);
        if self.gate.is_closed(side) {
            self.leave();
            return false;
        }
        true
    }

    /// Goes out.
    #[inline]
    pub fn leave(&mut self) {
        let Some(side) = self.inside.take() else { return };
        if let Some(counter) = self.gate.counter(self.lane, side) {
            counter.fetch_sub(1, SeqCst);
        }
        if self.gate.closed.load(SeqCst) != 0 {
            self.gate.left.notify_waiters();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_lets_the_other_side_in() {
        let gate = Arc::new(Gate::new(2));
        gate.close(Sides::LEADING);
        let mut ticket = Ticket::new(&gate, 0);
        assert!(!ticket.enter(Side::Leading));
        assert!(ticket.enter(Side::Following));
        assert_eq!((gate.inside(Sides::LEADING), gate.inside(Sides::ALL)), (0, 1));
    }

    #[tokio::test]
    async fn who_is_inside_when_it_closes_is_waited_for() {
        let gate = Arc::new(Gate::new(1));
        let mut ticket = Ticket::new(&gate, 0);
        assert!(ticket.enter(Side::Leading));
        gate.close(Sides::ALL);
        let empty = gate.wait_empty(Sides::ALL);
        tokio::pin!(empty);
        tokio::select! {
            biased;
            () = &mut empty => panic!("somebody is inside"),
            () = tokio::task::yield_now() => drop(ticket),
        }
        empty.await;
    }

    #[test]
    fn closing_and_entering_never_miss_each_other() {
        for _ in 0..2_000 {
            let gate = Arc::new(Gate::new(1));
            let other = Arc::clone(&gate);
            let entering = std::thread::spawn(move || {
                let mut ticket = Ticket::new(&other, 0);
                let entered = ticket.enter(Side::Leading);
                // Whoever was let in stays.
                (entered, ticket)
            });
            gate.close(Sides::LEADING);
            let empty = gate.inside(Sides::LEADING) == 0;
            let (entered, _ticket) = entering.join().unwrap();
            // Whoever was let in is still there: who saw the gate empty must have kept them out,
            // or seen the one who looked at the gate a moment too late.
            assert!(!(empty && entered), "entered a gate that was seen empty");
        }
    }
}
