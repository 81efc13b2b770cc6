//! The guard beside a server: the shipped fence, on the host's clock, with its hands on the modelled server.

use std::rc::Rc;
use std::time::Duration;

use kornak_agent::guard::bequest::Bequest;
use kornak_agent::guard::fence::Fence;
use kornak_agent::guard::{Answered, Fencing, GuardError, Kept, Watched};
use kornak_cluster::Moment;
use tokio::sync::watch;

use super::Life;
use crate::sim::postgres;
use crate::sim::scenario::Mutation;
use crate::sim::world::World;

/// Stopping begins so long before the deadline: the product's default.
const BUDGET: Duration = Duration::from_secs(1);

/// Between two looks of a guard that has fired.
const AGAIN: Duration = Duration::from_millis(100);

/// The agent's side.
#[derive(Debug)]
pub struct Guard {
    pub life: Life,
    pub watched: watch::Receiver<Watched>,
}

impl kornak_agent::guard::Guard for Guard {
    fn arm(&self, deadline: Moment) -> Answered<'_> {
        let life = self.life;
        life.ask(async move |w| {
            life.step(&w).await;
            let armed = arm(&w, life.host, deadline);
            life.step(&w).await;
            armed.map_err(|why| GuardError::Refused { command: "ARM", why: why.to_owned() })
        })
    }

    fn disarm(&self) -> Answered<'_> {
        let life = self.life;
        life.ask(async move |w| {
            life.step(&w).await;
            let disarmed = disarm(&w, life.host);
            life.step(&w).await;
            disarmed.map_err(|why| GuardError::Refused { command: "DISARM", why: why.to_owned() })
        })
    }

    fn keep(&self, text: String) -> Answered<'_> {
        let life = self.life;
        life.ask(async move |w| {
            life.step(&w).await;
            if postgres::any_process(&w, life.host) {
                w.hosts[life.host].kept.replace(Bequest::new(text));
            }
            life.step(&w).await;
            Ok(())
        })
    }

    fn kept(&self) -> Answered<'_, Option<Kept>> {
        let life = self.life;
        life.ask(async move |w| {
            life.step(&w).await;
            let host = &w.hosts[life.host];
            let kept = host.kept.borrow().left(&host.fence.borrow(), host.now(&w), BUDGET);
            life.step(&w).await;
            Ok(kept)
        })
    }

    fn watch(&self) -> watch::Receiver<Watched> {
        self.watched.clone()
    }
}

fn arm(w: &Rc<World>, index: usize, deadline: Moment) -> Result<(), &'static str> {
    let host = &w.hosts[index];
    let too_late = w.plan.mutation == Some(Mutation::GuardArmedTooLate);
    if too_late && !host.server.borrow().is_primary() {
        return Ok(());
    }
    let armed = host.fence.borrow_mut().arm(deadline, host.now(w), BUDGET);
    let fire_at = host.fence.borrow().fire_at();
    if let Some(fire_at) = fire_at {
        look_at(w, index, fire_at);
    }
    armed
}

fn disarm(w: &Rc<World>, index: usize) -> Result<(), &'static str> {
    let host = &w.hosts[index];
    let left = usize::from(postgres::any_process(w, index));
    host.kept.take();
    host.fence.borrow_mut().disarm(host.now(w), left)
}

fn look_at(w: &Rc<World>, index: usize, moment: Moment) {
    let there = Rc::clone(w);
    w.exec.spawn(w.hosts[index].guard_process.get(), async move {
        let clock = *there.hosts[index].clock.borrow();
        there.exec.sleep(clock.until(moment, there.exec.now())).await;
        look(&there, index);
    });
}

/// Stops or kills if it is time.
fn look(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    let now = host.now(w);
    if !host.fence.borrow().late(now) || w.plan.mutation == Some(Mutation::GuardNeverFires) {
        return;
    }
    if w.plan.mutation == Some(Mutation::GuardIsEdgeTriggered) {
        // Looks once, sees no primary, and thinks that its work is done.
        host.fence.replace(Fence::Disarmed);
        if host.server.borrow().is_primary() {
            postgres::kill_all(w, index);
        }
        return;
    }
    let first = host.fence.borrow_mut().fire();
    if postgres::any_process(w, index) {
        if host.fence.borrow().kills(now) {
            w.say(index, format_args!("GUARD kills"));
            postgres::kill_all(w, index);
        } else if first {
            w.say(index, format_args!("GUARD stops"));
            postgres::stop_fast(w, index);
        }
    }
    look_at(w, index, now + AGAIN);
}

/// Whether a server may be started or promoted to be writable.
pub(super) fn permits(w: &World, index: usize, fencing: Fencing) -> Result<(), &'static str> {
    let host = &w.hosts[index];
    let careless = [Mutation::GuardArmedTooLate, Mutation::GuardIsEdgeTriggered];
    if w.plan.mutation.is_some_and(|mutation| careless.contains(&mutation)) {
        return Ok(());
    }
    host.fence.borrow().may_write(fencing, host.now(w))
}
