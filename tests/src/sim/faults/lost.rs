//! A leader that is lost, or seems so, while its standbys may depose it; and what comes in between.

use std::rc::Rc;
use std::time::Duration;

use super::scripts::{between, comes, cut, heal, leader as leader_of, named};
use super::{happen, later};
use crate::sim::agent;
use crate::sim::host;
use crate::sim::net::End;
use crate::sim::postgres;
use crate::sim::world::{Stall, World};

/// The leader is lost for a while that ends at any step of its deposal or long after it, and others have troubles of their own.
pub async fn leader(w: Rc<World>) {
    // Half of the time the cluster is well before.
    if w.rng.chance(500) {
        comes(&w, Duration::from_secs(20), World::is_well).await;
    }
    let Some(leads) = leader_of(&w).filter(|_| w.faults_on()) else { return };
    let lasts = match w.rng.below(4) {
        0 => w.rng.millis(200, 2500),
        1 | 2 => w.rng.millis(1500, 6000),
        _ => w.rng.between(Duration::from_secs(6), w.plan.ttl * 2),
    };
    if w.rng.chance(400) {
        // A claim comes late, mostly after the leader has.
        w.freezes_at_deposal.set(Some(w.rng.millis(200, 9000)));
    }
    if w.rng.chance(100) {
        w.freezes_at_promotion.set(Some(w.rng.millis(200, 20_000)));
    }
    if w.rng.chance(500) {
        w.exec.spawn(w.wire, beside(Rc::clone(&w), leads));
    }
    if w.rng.chance(300) {
        w.exec.sleep(w.rng.millis(0, 400)).await;
    }
    if w.faults_on() {
        lose(&w, leads, lasts);
    }
}

/// Lets the leader vanish for a while.
fn lose(w: &Rc<World>, leads: usize, lasts: Duration) {
    match w.rng.below(8) {
        0 | 1 => {
            host::lose_power(w, leads);
            later(w, lasts, move |w| {
                if !w.hosts[leads].up.get() {
                    host::boot(w, leads);
                }
            });
        }
        2 | 3 => {
            host::freeze(w, leads);
            later(w, lasts, move |w| host::thaw(w, leads));
        }
        way => {
            // From everybody; from the store and some hosts; from the hosts alone; from the store alone.
            let one = w.rng.below(w.hosts.len());
            let others = (0..w.hosts.len()).filter(|other| {
                *other != leads && (way < 6 || way == 7 || (way == 6 && *other != one))
            });
            let mut links: Vec<(End, End)> =
                others.flat_map(|other| between(End::Host(leads), End::Host(other))).collect();
            if way != 7 || w.rng.chance(300) {
                links.extend(between(End::Host(leads), End::Store));
            }
            // Its clients go on, if they do not need the others.
            let proxy = w.rng.below(w.proxies.len() + 1);
            if proxy < w.proxies.len() && w.rng.chance(500) {
                links.extend(between(End::Host(leads), End::Proxy(proxy)));
            }
            w.note(format_args!("cut {links:?} for {lasts:?}"));
            cut(w, &links);
            later(w, lasts, move |w| {
                w.note(format_args!("mended {links:?}"));
                heal(w, &links);
            });
        }
    }
}

/// Troubles of a standby, at any step of a deposal.
async fn beside(w: Rc<World>, leads: usize) {
    for _ in 0..=w.rng.below(3) {
        w.exec.sleep(w.rng.millis(0, 4000)).await;
        if !w.faults_on() {
            return;
        }
        let standbys = named(&w);
        let any = w.rng.below(w.hosts.len());
        let at = match w.rng.below(standbys.len() + 1) {
            0 => any,
            index => standbys.get(index - 1).copied().unwrap_or(any),
        };
        if at == leads {
            continue;
        }
        let lasts = w.rng.millis(20, 5000);
        match w.rng.below(7) {
            0 | 1 => {
                agent::kill(&w, at);
                later(&w, w.rng.millis(1, 1500), move |w| agent::start(w, at));
            }
            2 => {
                if w.hosts[at].alive() {
                    postgres::kill_postmaster(&w, at, Duration::ZERO);
                }
            }
            3 => {
                let links = between(End::Host(at), End::Store);
                let links = if w.rng.chance(500) { links.to_vec() } else { links[..1].to_vec() };
                cut(&w, &links);
                later(&w, lasts, move |w| heal(w, &links));
            }
            4 => {
                w.exec.freeze(w.hosts[at].agent_process.get());
                later(&w, lasts, move |w| {
                    if !w.hosts[at].frozen.get() {
                        w.exec.thaw(w.hosts[at].agent_process.get(), Duration::ZERO);
                    }
                });
            }
            5 => {
                let how = if w.rng.chance(500) { Stall::Silent } else { Stall::Stale };
                w.stalled.borrow_mut().insert(End::Host(at), how);
                later(&w, lasts, move |w| {
                    w.stalled.borrow_mut().remove(&End::Host(at));
                });
            }
            _ if w.rng.chance(500) => happen(&w, super::Fault::Election),
            _ => {
                host::lose_power(&w, at);
                later(&w, lasts, move |w| {
                    if !w.hosts[at].up.get() {
                        host::boot(w, at);
                    }
                });
            }
        }
    }
}

/// An agent is about to depose its leader.
pub fn at_deposal(w: &Rc<World>, index: usize) {
    let Some(lasts) = w.freezes_at_deposal.take().filter(|_| w.faults_on()) else { return };
    w.say(index, format_args!("agent FROZEN as it deposes the leader, for {lasts:?}"));
    w.exec.freeze(w.hosts[index].agent_process.get());
    later(w, lasts, move |w| {
        if !w.hosts[index].frozen.get() {
            w.exec.thaw(w.hosts[index].agent_process.get(), Duration::ZERO);
        }
    });
}

/// An agent has asked to depose its leader: it may be lost itself, before it leads.
pub fn after_deposal(w: &Rc<World>, index: usize) {
    if !w.faults_on() || !w.rng.chance(150) {
        return;
    }
    let lasts = w.rng.millis(500, 20_000);
    w.say(index, format_args!("LOST after it has deposed the leader, for {lasts:?}"));
    host::lose_power(w, index);
    later(w, lasts, move |w| {
        if !w.hosts[index].up.get() {
            host::boot(w, index);
        }
    });
}
