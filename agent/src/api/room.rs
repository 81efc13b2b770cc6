//! Admission of connections to the REST API when there are many: connections that wait for a request keep
//! no caller out.
//!
//! A connection is *idle* unless a request of it is being answered. When there is no room the one that has
//! been idle longest makes way. Only connections at work can fill the room, and of those an address that is
//! no member's may have a part, and all such addresses together not everything: members ask each other in a
//! race and in failsafe mode, and must be heard.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::task::AbortHandle;

/// Connections at once. Load balancers keep a handful; each costs some kilobytes.
const CONNECTIONS: usize = 256;

/// Of these, for members alone: every member of a large cluster, some connections each.
const FOR_MEMBERS: usize = 32;

/// For one address that is no member's: a monitoring host, or a load balancer with many checks.
const PER_ADDRESS: usize = 64;

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Room {
    seats: Arc<Mutex<Seats>>,
}

#[derive(Debug, Default)]
struct Seats {
    taken: HashMap<u64, Taken>,
    /// Grows with each change, so that it orders them.
    clock: u64,
    members: HashSet<IpAddr>,
}

#[derive(Debug)]
struct Taken {
    from: IpAddr,
    /// Requests under way.
    working: usize,
    /// When it was idle first.
    idle_since: u64,
    task: Option<AbortHandle>,
    /// The connection is being closed for another one, and must not begin a request any more.
    ended: bool,
}

/// The decision about a new connection.
#[derive(Debug)]
pub(super) enum Verdict {
    Seated(Seat),
    Full,
}

/// A place in the room, given back when its last clone is dropped.
#[derive(Debug, Clone)]
pub(super) struct Seat {
    held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    id: u64,
    seats: Weak<Mutex<Seats>>,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Work {
    held: Arc<Held>,
}

impl Room {
    /// Where members speak from.
    pub(super) fn set_members(&self, members: HashSet<IpAddr>) {
        self.seats.lock().members = members;
    }

    /// Makes room for a connection, or says that there is none.
    pub(super) fn admit(&self, from: IpAddr) -> Verdict {
        let from = from.to_canonical();
        let mut seats = self.seats.lock();
        if !seats.make_way(from) {
            return Verdict::Full;
        }
        seats.clock += 1;
        let id = seats.clock;
        let taken = Taken { from, working: 0, idle_since: id, task: None, ended: false };
        seats.taken.insert(id, taken);
        let seats = Arc::downgrade(&self.seats);
        Verdict::Seated(Seat { held: Arc::new(Held { id, seats }) })
    }
}

impl Seats {
    fn make_way(&mut self, from: IpAddr) -> bool {
        let is_member = self.members.contains(&from);
        if !is_member {
            if self.count(|taken| taken.from == from) >= PER_ADDRESS
                && !self.end_idlest(|taken| taken.from == from)
            {
                return false;
            }
            let members = self.members.clone();
            let stranger = |taken: &Taken| !members.contains(&taken.from);
            if self.count(stranger) >= CONNECTIONS - FOR_MEMBERS && !self.end_idlest(stranger) {
                return false;
            }
        }
        self.count(|_| true) < CONNECTIONS || self.end_idlest(|_| true)
    }

    fn count(&self, which: impl Fn(&Taken) -> bool) -> usize {
        self.taken.values().filter(|taken| !taken.ended && which(taken)).count()
    }

    fn end_idlest(&mut self, which: impl Fn(&Taken) -> bool) -> bool {
        let idle = self.taken.values_mut();
        let idle = idle.filter(|taken| taken.working == 0 && !taken.ended && which(taken));
        let Some(idlest) = idle.min_by_key(|taken| taken.idle_since) else { return false };
        idlest.ended = true;
        if let Some(task) = &idlest.task {
            task.abort();
        }
        true
    }
}

impl Seat {
    /// The task that serves the connection; it is aborted if the connection has to make way.
    pub(super) fn ends_with(&self, task: AbortHandle) {
        self.held.change(|taken, _| {
            if taken.ended {
                task.abort();
            }
            taken.task = Some(task);
        });
    }

    /// A request has come; until the answer is dropped the connection is at work.
    pub(super) fn work(&self) -> Work {
        self.held.change(|taken, _| taken.working += 1);
        Work { held: Arc::clone(&self.held) }
    }
}

impl Held {
    fn change(&self, change: impl FnOnce(&mut Taken, u64)) {
        let Some(seats) = self.seats.upgrade() else { return };
        let mut seats = seats.lock();
        seats.clock += 1;
        let now = seats.clock;
        if let Some(taken) = seats.taken.get_mut(&self.id) {
            change(taken, now);
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.held.change(|taken, now| {
            taken.working -= 1;
            taken.idle_since = now;
        });
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(seats) = self.seats.upgrade() {
            seats.lock().taken.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(room: &Room, from: &str) -> Option<Seat> {
        match room.admit(from.parse().unwrap()) {
            Verdict::Seated(seat) => Some(seat),
            Verdict::Full => None,
        }
    }

    fn alive(seat: &Seat) -> bool {
        let seats = seat.held.seats.upgrade().unwrap();
        let seats = seats.lock();
        !seats.taken[&seat.held.id].ended
    }

    #[test]
    fn idle_connections_make_way_the_idlest_first() {
        let room = Room::default();
        let held: Vec<Seat> = (0..PER_ADDRESS).map(|_| seat(&room, "10.0.0.1").unwrap()).collect();
        let work = held[0].work();
        assert!(seat(&room, "10.0.0.1").is_some());
        assert!(alive(&held[0]) && !alive(&held[1]) && alive(&held[2]));
        drop(work);
    }

    #[test]
    fn a_member_is_heard_while_strangers_keep_all_their_connections_at_work() {
        let room = Room::default();
        room.set_members(["10.9.9.9".parse().unwrap()].into());
        let mut busy = Vec::new();
        for n in 0..100 {
            for _ in 0..PER_ADDRESS + 1 {
                let Some(seat) = seat(&room, &format!("10.0.0.{n}")) else { continue };
                busy.push((seat.work(), seat));
            }
        }
        assert_eq!(busy.len(), CONNECTIONS - FOR_MEMBERS);
        let members: Vec<Seat> =
            (0..FOR_MEMBERS).map(|_| seat(&room, "10.9.9.9").unwrap()).collect();
        assert!(seat(&room, "10.9.9.9").is_some(), "idle ones make way for it as well");
        assert!(!alive(&members[0]));
        busy.truncate(10);
        assert!(seat(&room, "10.0.0.200").is_some(), "what has ended leaves room");
    }
}
