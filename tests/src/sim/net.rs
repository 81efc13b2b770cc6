//! The network: messages are late, lost, or done although nobody hears the answer.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use super::exec::{Reply, slot};
use super::rng::Rng;
use super::world::World;

/// Hosts that can be cut off from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    Store,
    /// A host with its agent and server.
    Host(usize),
    Proxy(usize),
}

/// The links of a world.
#[derive(Default)]
pub struct Net {
    /// Directions that are cut, and how often.
    cuts: RefCell<BTreeMap<(End, End), u32>>,
    /// Unanswered questions whose asker must not learn that nobody will answer.
    lost: RefCell<Vec<Box<dyn Any>>>,
    /// How many times as often as usual messages are slow; 0: never.
    slowness: Cell<usize>,
}

impl Net {
    /// Whether a message from one to the other arrives.
    pub fn passes(&self, from: End, to: End) -> bool {
        from == to || !self.cuts.borrow().contains_key(&(from, to))
    }

    /// Whether both hear each other.
    pub fn both(&self, one: End, other: End) -> bool {
        self.passes(one, other) && self.passes(other, one)
    }

    /// Cuts one direction.
    pub fn cut(&self, from: End, to: End) {
        *self.cuts.borrow_mut().entry((from, to)).or_default() += 1;
    }

    /// Undoes one [`Net::cut`].
    pub fn heal(&self, from: End, to: End) {
        let mut cuts = self.cuts.borrow_mut();
        if let Some(count) = cuts.get_mut(&(from, to)) {
            *count -= 1;
            if *count == 0 {
                cuts.remove(&(from, to));
            }
        }
    }

    /// Undoes every cut.
    pub fn heal_all(&self) {
        self.cuts.borrow_mut().clear();
    }

    /// Messages are slow so many times as often as usual; 0 is never.
    pub fn set_slowness(&self, times: usize) {
        self.slowness.set(times);
    }

    /// How long a message takes: mostly a millisecond, sometimes seconds.
    pub fn delay(&self, rng: &Rng) -> Duration {
        let fate = rng.below(1000) / self.slowness.get().max(1);
        if self.slowness.get() == 0 || fate >= 100 {
            return rng.between(Duration::from_micros(100), Duration::from_millis(2));
        }
        match fate {
            0..3 => rng.millis(400, 4000),
            3..20 => rng.millis(30, 400),
            _ => rng.millis(2, 30),
        }
    }

    /// Keeps an unanswered question, so that its asker waits until it gives up.
    pub fn lose<T: 'static>(&self, reply: Reply<T>) {
        self.lost.borrow_mut().push(Box::new(reply));
    }

    /// Drops what was lost, when the world ends.
    pub fn clear(&self) {
        let lost = std::mem::take(&mut *self.lost.borrow_mut());
        drop(lost);
    }
}

/// A question to another end: `handle` runs there on arrival and gets the reply to fill or drop.
/// `None`: no answer within `limit`, or the connection broke.
pub async fn call<T: 'static>(
    w: &Rc<World>,
    from: End,
    to: End,
    limit: Duration,
    handle: impl FnOnce(&Rc<World>, Reply<T>) + 'static,
) -> Option<T> {
    let (back, heard) = slot::<T>();
    if !w.net.passes(from, to) {
        w.net.lose(back);
    } else {
        let arrived = Rc::clone(w);
        w.exec.after(w.net.delay(&w.rng), move || {
            if !arrived.net.passes(from, to) {
                arrived.net.lose(back);
                return;
            }
            let (reply, answer) = slot::<T>();
            handle(&arrived, reply);
            let w = Rc::clone(&arrived);
            // The way back, as long as somebody may still answer.
            arrived.exec.spawn(arrived.wire, async move {
                let value = answer.await;
                w.exec.sleep(w.net.delay(&w.rng)).await;
                match value {
                    _ if !w.net.passes(to, from) => w.net.lose(back),
                    Some(value) => back.give(value),
                    None => drop(back),
                }
            });
        });
    }
    w.exec.within(limit, heard).await.flatten()
}
