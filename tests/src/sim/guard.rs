//! The guard beside a server, by the rules of `kornak_agent::guard`: armed with a deadline, level
//! triggered, and nothing becomes writable without it.

use std::rc::Rc;
use std::time::Duration;

use kornak_cluster::Moment;

use super::postgres;
use super::scenario::Mutation;
use super::world::World;

/// Killing begins so long before the deadline.
pub const BUDGET: Duration = Duration::from_millis(200);

/// What one guard knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Guard {
    #[default]
    Disarmed,
    /// On the host's clock.
    Armed { fire_at: Moment },
    /// Has killed, and goes on until it is shown that nothing runs.
    Fired,
}

impl Guard {
    /// Whether the moment for killing has come.
    pub fn late(self, now: Moment) -> bool {
        match self {
            Self::Disarmed => false,
            Self::Armed { fire_at } => now >= fire_at,
            Self::Fired => true,
        }
    }
}

/// Takes a deadline, later or earlier. False if it has come.
pub fn arm(w: &Rc<World>, index: usize, deadline: Moment) -> bool {
    let host = &w.hosts[index];
    let now = host.now(w);
    let too_late = w.plan.mutation == Some(Mutation::GuardArmedTooLate);
    if too_late && !host.server.borrow().is_primary() {
        return true;
    }
    if host.guard.borrow().late(now) {
        return false;
    }
    let fire_at = deadline.minus(BUDGET);
    if *host.guard.borrow() == Guard::Disarmed && now >= fire_at {
        return false;
    }
    host.guard.replace(Guard::Armed { fire_at });
    let there = Rc::clone(w);
    w.exec.spawn(host.guard_process.get(), async move {
        let clock = *there.hosts[index].clock.borrow();
        there.exec.sleep(clock.until(fire_at, there.exec.now())).await;
        look(&there, index);
    });
    now < fire_at
}

/// The node says that it is no primary; once late, only an empty process table proves it.
pub fn disarm(w: &Rc<World>, index: usize) -> bool {
    let host = &w.hosts[index];
    if host.guard.borrow().late(host.now(w)) && postgres::any_process(w, index) {
        return false;
    }
    host.guard.replace(Guard::Disarmed);
    true
}

/// Whether a server may be started or promoted to be writable.
pub fn permits(w: &World, index: usize) -> bool {
    let host = &w.hosts[index];
    let careless = [Mutation::GuardArmedTooLate, Mutation::GuardIsEdgeTriggered];
    if w.plan.mutation.is_some_and(|mutation| careless.contains(&mutation)) {
        return true;
    }
    matches!(*host.guard.borrow(), Guard::Armed { .. }) && !host.guard.borrow().late(host.now(w))
}

/// Whether even a standby may be started: never beside a guard that has fired.
pub fn permits_standby(w: &World, index: usize) -> bool {
    let host = &w.hosts[index];
    !host.guard.borrow().late(host.now(w))
}

/// Kills if it is time.
fn look(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    let guard = *host.guard.borrow();
    if !guard.late(host.now(w)) || w.plan.mutation == Some(Mutation::GuardNeverFires) {
        return;
    }
    if w.plan.mutation == Some(Mutation::GuardIsEdgeTriggered) {
        // Looks once, sees no primary, and thinks that its work is done.
        host.guard.replace(Guard::Disarmed);
        if !host.server.borrow().is_primary() {
            return;
        }
    } else {
        host.guard.replace(Guard::Fired);
    }
    if postgres::any_process(w, index) {
        w.say(index, format_args!("GUARD fires"));
        postgres::kill_all(w, index);
    }
    if *host.guard.borrow() == Guard::Fired {
        // Until nothing is left.
        let there = Rc::clone(w);
        w.exec.spawn(host.guard_process.get(), async move {
            there.exec.sleep(Duration::from_millis(500)).await;
            look(&there, index);
        });
    }
}
