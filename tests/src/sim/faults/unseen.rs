//! Situations in which somebody acts on what another one has not seen yet: a write of the leader's that its own view does not
//! show, a list of members that one of them is not on, a release that arrives late.

use std::rc::Rc;
use std::time::Duration;

use kornak_cluster::SyncMode;

use super::later;
use super::scripts::{between, comes, cut, heal, leader, lose_for, named};
use crate::sim::agent;
use crate::sim::host;
use crate::sim::net::End;
use crate::sim::ports::About;
use crate::sim::postgres::{self, Run};
use crate::sim::world::{Stall, World};

/// A moment in an agent's dealings with the store that a situation waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trap {
    /// The leader names a synchronous standby; from then on it is shown nothing new, and perhaps not told that this is done.
    Naming { answered: bool },
    /// The leader lists this member among those that it asks without the store, and is shown nothing new from then on.
    Listing { member: usize },
    /// The leader gives its key up, which the store hears of late; its agent dies and starts again.
    Release,
}

/// The fate of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    AsUsual,
    Unanswered,
    Late(Duration),
}

/// Ways in which a member that is not asked may come to race.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The member comes back when the leader has no store any more.
    Unlisted,
    /// The leader has the store again for a moment, and its lease is about to end.
    Regained,
    /// The leader has listed the member and has not been shown so.
    Unseen,
}

/// Situations of this kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Situation {
    LateRelease,
    List(Way),
    Name { answered: bool },
    CrashedWithoutStore,
}

/// One situation after the other, each in a cluster that is well, until it is time to stop.
pub async fn run(w: Rc<World>) {
    let mut able = vec![Situation::LateRelease];
    if w.plan.sync == SyncMode::Off && w.plan.failsafe {
        able.extend([Way::Unlisted, Way::Regained, Way::Unseen].map(Situation::List));
    }
    if w.plan.sync != SyncMode::Off && !w.plan.strict {
        able.extend([true, false].map(|answered| Situation::Name { answered }));
    }
    if w.plan.sync != SyncMode::Off && w.plan.failsafe {
        able.push(Situation::CrashedWithoutStore);
    }
    while w.faults_on() {
        w.exec.sleep(w.rng.millis(1000, 4000)).await;
        comes(&w, Duration::from_secs(40), World::is_well).await;
        if !w.faults_on() {
            return;
        }
        let which = able[w.rng.below(able.len())];
        w.note(format_args!("SITUATION {which:?}"));
        match which {
            Situation::LateRelease => late_release(&w).await,
            Situation::List(way) => beside_the_list(&w, way).await,
            Situation::Name { answered } => named_unseen(&w, answered).await,
            Situation::CrashedWithoutStore => crashed_without_store(&w).await,
        }
        w.trap.set(None);
    }
}

/// An agent is about to send this transaction.
pub fn spring(w: &Rc<World>, index: usize, about: &About) -> Fate {
    let holds = || {
        w.say(index, format_args!("is shown nothing new from here on"));
        w.stalled.borrow_mut().insert(End::Host(index), Stall::Held);
    };
    match w.trap.get() {
        Some(Trap::Naming { answered }) if about.names_somebody() => {
            holds();
            w.trap.set(None);
            if answered { Fate::AsUsual } else { Fate::Unanswered }
        }
        Some(Trap::Listing { member })
            if about.lists.as_ref().is_some_and(|list| list.contains(&w.hosts[member].name)) =>
        {
            holds();
            w.trap.set(None);
            Fate::AsUsual
        }
        Some(Trap::Release) if about.releases => {
            w.trap.set(None);
            let delay = w.rng.millis(500, 3500);
            w.say(index, format_args!("release is on its way for {delay:?}"));
            later(w, Duration::ZERO, move |w| agent::kill(w, index));
            later(w, w.rng.millis(3, 80), move |w| agent::start(w, index));
            Fate::Late(delay)
        }
        _ => Fate::AsUsual,
    }
}

/// A switchover whose release arrives when the agent that has sent it has died and begun anew.
async fn late_release(w: &Rc<World>) {
    w.trap.set(Some(Trap::Release));
    agent::switch_over(w, None);
    if comes(w, Duration::from_secs(15), |w| w.trap.get().is_none()).await {
        w.exec.sleep(w.plan.ttl).await;
    }
}

/// Both ways of the links between a host and each other one.
fn around(w: &World, index: usize) -> Vec<(End, End)> {
    let others = (0..w.hosts.len()).filter(|other| *other != index);
    others.flat_map(|other| between(End::Host(index), End::Host(other))).collect()
}

/// A member has the store and hears of no other one, while the leader has lost the store and rests on the others' word.
async fn beside_the_list(w: &Rc<World>, way: Way) {
    let Some(leads) = leader(w) else { return };
    let other = (leads + 1 + w.rng.below(w.hosts.len() - 1)) % w.hosts.len();
    host::lose_power(w, other);
    let name = w.hosts[other].name.clone();
    let listed =
        |w: &World| w.store.failsafe_list().is_some_and(|list| list.contains(&w.hosts[other].name));
    let gone = comes(w, w.plan.ttl + Duration::from_secs(8), |w| !listed(w)).await;
    if gone && leader(w) == Some(leads) {
        let (store, apart) = (between(End::Host(leads), End::Store), around(w, other));
        cut(w, &apart);
        if way == Way::Unseen {
            w.trap.set(Some(Trap::Listing { member: other }));
        } else {
            cut(w, &store);
        }
        let began = w.exec.now();
        w.exec.sleep(w.rng.millis(200, 2500)).await;
        if w.faults_on() {
            host::boot(w, other);
        }
        match way {
            Way::Unlisted => {}
            Way::Regained => {
                comes(w, w.plan.ttl / 2, |w| w.store.truth().members.contains_key(&name)).await;
                let left = (began + w.plan.ttl).since(w.exec.now());
                w.exec.sleep(left.saturating_sub(w.rng.millis(800, 3000))).await;
                heal(w, &store);
                comes(w, Duration::from_millis(1200), listed).await;
                cut(w, &store);
            }
            Way::Unseen => {
                comes(w, Duration::from_secs(12), listed).await;
                // It is told that this is done, most of the time.
                w.exec.sleep(w.rng.millis(2, 60)).await;
                cut(w, &store);
            }
        }
        w.exec.sleep(w.plan.ttl + Duration::from_secs(6)).await;
        heal(w, &store);
        heal(w, &apart);
        shown_again(w, leads);
    }
    if w.faults_on() && !w.hosts[other].up.get() {
        host::boot(w, other);
    }
}

fn shown_again(w: &World, index: usize) {
    w.stalled.borrow_mut().remove(&End::Host(index));
}

/// A standby is named that the leader loses at once, without having been shown that the store names it; then the leader starts
/// in place, or goes on, and is lost.
async fn named_unseen(w: &Rc<World>, answered: bool) {
    let Some(leads) = leader(w) else { return };
    let apart = around(w, leads);
    cut(w, &apart);
    if !comes(w, Duration::from_secs(20), |w| named(w).is_empty()).await {
        return heal(w, &apart);
    }
    w.trap.set(Some(Trap::Naming { answered }));
    heal(w, &apart);
    let names = |w: &World| w.trap.get().is_none() && !named(w).is_empty();
    if !comes(w, Duration::from_secs(15), names).await || leader(w) != Some(leads) {
        return shown_again(w, leads);
    }
    if !answered {
        // Its stream ends, and is not only silent.
        for standby in named(w) {
            postgres::kill_postmaster(w, standby, Duration::ZERO);
        }
        w.exec.sleep(w.rng.millis(5, 40)).await;
    }
    cut(w, &apart);
    if answered {
        w.exec.sleep(w.rng.millis(30, 500)).await;
        if w.faults_on() && w.hosts[leads].alive() {
            postgres::kill_postmaster(w, leads, Duration::ZERO);
        }
        let primary = |w: &World| w.hosts[leads].server.borrow().is_primary();
        comes(w, Duration::from_secs(5), primary).await;
    } else {
        let waits_for_nobody = |w: &World| w.hosts[leads].disk.borrow().sync_names.is_empty();
        comes(w, Duration::from_secs(6), waits_for_nobody).await;
    }
    w.exec.sleep(w.rng.millis(1, 400)).await;
    if w.faults_on() {
        lose_for(w, leads, w.plan.ttl * 3);
    }
    shown_again(w, leads);
    heal(w, &apart);
}

/// The leader has no store and then no standbys when its server crashes, so that it starts as a standby; the store is back
/// before its lease has ended, and it is promoted and lost.
async fn crashed_without_store(w: &Rc<World>) {
    let (Some(leads), false) = (leader(w), named(w).is_empty()) else { return };
    let (store, apart) = (between(End::Host(leads), End::Store), around(w, leads));
    cut(w, &store);
    w.exec.sleep(w.rng.millis(3100, 4200)).await;
    cut(w, &apart);
    w.exec.sleep(w.rng.millis(30, 400)).await;
    if w.faults_on() && w.hosts[leads].alive() {
        postgres::kill_postmaster(w, leads, Duration::ZERO);
    }
    let runs = |w: &World, run| w.hosts[leads].server.borrow().state().0 == run;
    let began = |w: &World| [Run::Starting, Run::Standby].iter().any(|run| runs(w, *run));
    comes(w, Duration::from_secs(4), began).await;
    if w.rng.chance(500) && w.faults_on() {
        agent::kill(w, leads);
        later(w, w.rng.millis(5, 200), move |w| agent::start(w, leads));
    } else {
        comes(w, Duration::from_secs(3), |w| runs(w, Run::Standby)).await;
    }
    heal(w, &store);
    if comes(w, w.plan.ttl, |w| runs(w, Run::Primary)).await {
        w.exec.sleep(w.rng.millis(1, 300)).await;
        if w.faults_on() {
            lose_for(w, leads, w.plan.ttl * 4);
        }
    }
    heal(w, &apart);
}
