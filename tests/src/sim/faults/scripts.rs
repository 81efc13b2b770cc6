//! Faults that wait for a situation: several steps, each of which needs the one before.

use std::rc::Rc;
use std::time::Duration;

use kornak_cluster::SyncMode;
use serde_json::json;

use super::{later, settings};
use crate::sim::agent;
use crate::sim::host;
use crate::sim::net::End;
use crate::sim::postgres;
use crate::sim::world::World;

/// One situation after the other, each in a cluster that is well, until it is time to stop.
pub async fn run(w: Rc<World>) {
    while w.faults_on() {
        w.exec.sleep(w.rng.millis(1000, 4000)).await;
        comes(&w, Duration::from_secs(40), World::is_well).await;
        if !w.faults_on() {
            return;
        }
        let which = match w.rng.below(7) {
            // Elsewhere the situation is none.
            1..=3 | 5 if w.plan.sync == SyncMode::Off => {
                if w.plan.failsafe {
                    0
                } else {
                    6
                }
            }
            0 if !w.plan.failsafe => 4,
            which => which,
        };
        w.note(format_args!("SITUATION {which}"));
        match which {
            0 => unlisted(Rc::clone(&w)).await,
            1 | 2 => newly_named(Rc::clone(&w)).await,
            3 => lost_in_place(Rc::clone(&w)).await,
            4 => outage_then_lost(Rc::clone(&w)).await,
            5 => late_claim(Rc::clone(&w)).await,
            _ => {
                frozen_promotion(&w);
                w.exec.sleep(w.plan.ttl * 3).await;
            }
        }
    }
}

/// Waits for `what`, looking every few milliseconds. False: it did not come, or the faults are over.
pub(super) async fn comes(
    w: &Rc<World>,
    within: Duration,
    mut what: impl FnMut(&World) -> bool,
) -> bool {
    let began = w.exec.now();
    while w.faults_on() && w.exec.now().since(began) < within {
        if what(w) {
            return true;
        }
        w.exec.sleep(Duration::from_millis(2)).await;
    }
    false
}

pub(super) fn leader(w: &World) -> Option<usize> {
    let truth = w.store.truth();
    host::index_of(w, &truth.leader.as_ref()?.name)
}

/// The standbys that the store names.
pub(super) fn named(w: &World) -> Vec<usize> {
    let truth = w.store.truth();
    let standbys = truth.sync.as_ref().map(kornak_cluster::SyncState::standbys).unwrap_or_default();
    standbys.iter().filter_map(|name| host::index_of(w, name)).collect()
}

pub(super) fn lose_for(w: &Rc<World>, index: usize, lasts: Duration) {
    host::lose_power(w, index);
    later(w, lasts, move |w| {
        if !w.hosts[index].up.get() {
            host::boot(w, index);
        }
    });
}

/// Cuts both ways; what is cut is mended at the end of the faults in any case.
pub(super) fn cut(w: &World, links: &[(End, End)]) {
    links.iter().for_each(|(from, to)| w.net.cut(*from, *to));
}

pub(super) fn heal(w: &World, links: &[(End, End)]) {
    if w.faults_on() {
        links.iter().for_each(|(from, to)| w.net.heal(*from, *to));
    }
}

pub(super) fn between(one: End, other: End) -> [(End, End); 2] {
    [(one, other), (other, one)]
}

/// A member is down until the leader has taken it off the list of those whom it would ask, and comes back when the leader
/// rests on the others' word, which it cannot hear of.
async fn unlisted(w: Rc<World>) {
    let Some(leads) = leader(&w) else { return };
    let other = (leads + 1 + w.rng.below(w.hosts.len() - 1)) % w.hosts.len();
    host::lose_power(&w, other);
    let name = w.hosts[other].name.clone();
    let gone = |w: &World| w.store.failsafe_list().is_some_and(|list| !list.contains(&name));
    if comes(&w, w.plan.ttl + Duration::from_secs(8), gone).await && leader(&w) == Some(leads) {
        let mut links = between(End::Host(leads), End::Store).to_vec();
        links.extend(between(End::Host(leads), End::Host(other)));
        cut(&w, &links);
        w.exec.sleep(w.rng.millis(500, 4000)).await;
        if w.faults_on() && !w.hosts[other].up.get() {
            host::boot(&w, other);
        }
        w.exec.sleep(w.plan.ttl + Duration::from_secs(6)).await;
        heal(&w, &links);
    }
    if w.faults_on() && !w.hosts[other].up.get() {
        host::boot(&w, other);
    }
}

/// One more standby is named, and the leader is lost at once, when that one has received nothing since.
async fn newly_named(w: Rc<World>) {
    if w.plan.sync == SyncMode::Off || w.hosts.len() < 3 {
        return;
    }
    settings::patch(&w, "synchronous_node_count", json!(1));
    w.exec.sleep(Duration::from_secs(3)).await;
    let (Some(leads), before) = (leader(&w), named(&w)) else { return };
    if !w.faults_on() || before.is_empty() {
        return;
    }
    settings::patch(&w, "synchronous_node_count", json!(2));
    let more = |w: &World| named(w).iter().any(|index| !before.contains(index));
    if !comes(&w, Duration::from_secs(10), more).await || leader(&w) != Some(leads) {
        return;
    }
    let new = named(&w).into_iter().find(|index| !before.contains(index));
    let Some(new) = new.filter(|new| *new != leads) else { return };
    let links = between(End::Host(leads), End::Host(new));
    cut(&w, &links);
    w.exec.sleep(w.rng.millis(20, 400)).await;
    if w.faults_on() {
        // The one that has all of it is not there either.
        for old in before.iter().filter(|old| w.hosts[**old].alive()) {
            lose_for(&w, *old, w.plan.ttl * 2);
        }
        lose_for(&w, leads, w.plan.ttl * 2);
    }
    heal(&w, &links);
}

/// The synchronous standbys are down for a moment when the leader's server crashes, and the leader is lost for good as soon as it
/// has started in place.
async fn lost_in_place(w: Rc<World>) {
    let (Some(leads), standbys) = (leader(&w), named(&w)) else { return };
    let primary = |w: &World| w.hosts[leads].server.borrow().is_primary();
    if standbys.is_empty() || standbys.contains(&leads) || !primary(&w) {
        return;
    }
    for standby in &standbys {
        if w.hosts[*standby].alive() {
            postgres::kill_postmaster(&w, *standby, Duration::ZERO);
        }
    }
    w.exec.sleep(w.rng.millis(30, 400)).await;
    if !w.faults_on() || !w.hosts[leads].alive() {
        return;
    }
    postgres::kill_postmaster(&w, leads, Duration::ZERO);
    if comes(&w, Duration::from_secs(5), primary).await {
        w.exec.sleep(w.rng.millis(1, 300)).await;
        if w.faults_on() {
            lose_for(&w, leads, w.plan.ttl * 3);
        }
    }
}

/// The store stops for longer than a lease, just after the standbys have lost their streams; who is primary when it is back is
/// lost at once.
async fn outage_then_lost(w: Rc<World>) {
    let Some(leads) = leader(&w) else { return };
    let others = (0..w.hosts.len()).filter(|index| *index != leads);
    let links: Vec<(End, End)> =
        others.flat_map(|index| between(End::Host(leads), End::Host(index))).collect();
    cut(&w, &links);
    w.exec.sleep(w.rng.millis(50, 500)).await;
    if w.faults_on() {
        w.store.stop(&w);
    }
    w.exec.sleep(w.plan.ttl + w.rng.millis(0, 4000)).await;
    heal(&w, &links);
    if w.rng.chance(500) && w.faults_on() {
        agent::kill(&w, leads);
        later(&w, w.rng.millis(10, 2000), move |w| agent::start(w, leads));
    }
    if w.faults_on() {
        w.store.set_up(&w, true);
    }
    let writable = |w: &World| w.hosts.iter().any(|host| host.server.borrow().is_primary());
    if comes(&w, w.plan.ttl * 3, writable).await {
        w.exec.sleep(w.rng.millis(1, 400)).await;
        let primary = w.hosts.iter().find(|host| host.server.borrow().is_primary());
        if let Some(index) = primary.map(|host| host.index).filter(|_| w.faults_on()) {
            lose_for(&w, index, w.plan.ttl * 3);
        }
    }
}

/// A claim is on its way while another member leads, acknowledges, and gives the key up.
async fn late_claim(w: Rc<World>) {
    if w.plan.sync == SyncMode::Off || w.hosts.len() < 4 {
        return;
    }
    settings::patch(&w, "synchronous_node_count", json!(2));
    let two = |w: &World| named(w).len() > 1;
    if !comes(&w, Duration::from_secs(10), two).await {
        return;
    }
    let Some(first) = leader(&w) else { return };
    w.freezes_at_claim.set(true);
    lose_for(&w, first, w.plan.ttl * 3);
    let next = |w: &World| leader(w).is_some_and(|leader| leader != first);
    if !comes(&w, w.plan.ttl * 3, next).await {
        w.freezes_at_claim.set(false);
        return thaw_agents(&w);
    }
    let Some(second) = leader(&w) else { return thaw_agents(&w) };
    // As soon as a third member is named, so that the key is given up.
    let named_anew = |w: &World| {
        let its = w.store.truth().sync.as_ref().and_then(|sync| sync.leader.clone());
        its.as_ref() == Some(&w.hosts[second].name) && !named(w).is_empty()
    };
    if comes(&w, w.plan.ttl / 2, named_anew).await {
        w.exec.sleep(w.rng.millis(50, 300)).await;
        if w.faults_on() && w.hosts[second].alive() {
            postgres::kill_postmaster(&w, second, Duration::ZERO);
        }
        comes(&w, Duration::from_secs(1), |w| leader(w).is_none()).await;
    }
    thaw_agents(&w);
}

fn thaw_agents(w: &Rc<World>) {
    for host in w.hosts.iter().filter(|host| !host.frozen.get()) {
        w.exec.thaw(host.agent_process.get(), Duration::ZERO);
    }
}

/// An agent is about to send a claim: see `late_claim`.
pub fn at_claim(w: &Rc<World>, index: usize) {
    if w.freezes_at_claim.take() && w.faults_on() {
        w.say(index, format_args!("agent FROZEN as it claims"));
        w.exec.freeze(w.hosts[index].agent_process.get());
    }
}

/// The leader is lost, and the agent of its successor is frozen in the moment in which it sends the promotion, for longer
/// than its lease.
fn frozen_promotion(w: &Rc<World>) {
    let Some(leads) = leader(w) else { return };
    w.freezes_at_promotion.set(Some(w.plan.ttl + w.rng.millis(0, 2000)));
    lose_for(w, leads, w.plan.ttl * 4);
}

/// An agent is about to have its server promoted: see `frozen_promotion`.
pub fn at_promotion(w: &Rc<World>, index: usize) {
    let Some(lasts) = w.freezes_at_promotion.take().filter(|_| w.faults_on()) else { return };
    w.say(index, format_args!("agent FROZEN as it promotes, for {lasts:?}"));
    w.exec.freeze(w.hosts[index].agent_process.get());
    later(w, lasts, move |w| {
        if !w.hosts[index].frozen.get() {
            w.exec.thaw(w.hosts[index].agent_process.get(), Duration::ZERO);
        }
    });
}

/// A switchover in which the old leader sleeps from its release on, and wakes when the new one has
/// led, acknowledged commits, and died.
pub async fn ambush(w: Rc<World>) {
    agent::switch_over(&w, None);
    let mut released = None;
    for _ in 0..3000 {
        w.exec.sleep(Duration::from_millis(2)).await;
        let truth = w.store.truth();
        let record = truth.handover.as_ref().filter(|record| record.wal_end.is_some());
        released = record.map(|record| (record.leader.clone(), record.candidate.clone()));
        if released.is_some() || !w.faults_on() {
            break;
        }
    }
    let Some((old, Some(new))) = released else { return };
    let (Some(old), Some(new)) = (host::index_of(&w, &old), host::index_of(&w, &new)) else {
        return;
    };
    host::freeze(&w, old);
    w.exec.sleep(Duration::from_secs(3)).await;
    if !w.faults_on() || !w.hosts[new].server.borrow().is_primary() {
        return host::thaw(&w, old);
    }
    host::lose_power(&w, new);
    for _ in 0..200 {
        w.exec.sleep(Duration::from_millis(100)).await;
        if w.store.truth().leader.is_none() || !w.faults_on() {
            break;
        }
    }
    host::thaw(&w, old);
    w.exec.sleep(Duration::from_secs(4)).await;
    if !w.hosts[new].up.get() {
        host::boot(&w, new);
    }
}

/// One standby's stream stalls, so that the other one alone has the last commits; then the leader's server is lost, and
/// shortly before it the other one's as well if `both`.
pub async fn leader_lost_beside(w: Rc<World>, stalled: Option<usize>, both: bool) {
    let leader = w.store.truth().leader.clone();
    let Some(leader) = leader.and_then(|leader| host::index_of(&w, &leader.name)) else { return };
    let standbys: Vec<usize> = (0..w.hosts.len()).filter(|index| *index != leader).collect();
    let any = standbys[w.rng.below(standbys.len())];
    let stalled = stalled.filter(|stalled| standbys.contains(stalled)).unwrap_or(any);
    let (here, there) = (End::Host(leader), End::Host(stalled));
    let links = [(here, there), (there, here)];
    links.iter().for_each(|(from, to)| w.net.cut(*from, *to));
    w.exec.sleep(w.rng.millis(50, 600)).await;
    if both {
        let others = standbys.iter().filter(|index| **index != stalled);
        for other in others {
            if w.hosts[*other].alive() && w.faults_on() {
                postgres::kill_postmaster(&w, *other, Duration::ZERO);
            }
        }
        w.exec.sleep(w.rng.millis(0, 200)).await;
    }
    if !w.faults_on() {
        // What was cut is mended.
        return;
    }
    let heal = || links.iter().for_each(|(from, to)| w.net.heal(*from, *to));
    if !w.hosts[leader].alive() {
        return heal();
    }
    if both || w.rng.chance(300) {
        host::lose_power(&w, leader);
        later(&w, w.plan.ttl * 2, move |w| {
            if !w.hosts[leader].up.get() {
                host::boot(w, leader);
            }
        });
    } else {
        postgres::kill_postmaster(&w, leader, Duration::ZERO);
    }
    // Nothing is left to be received, and the standby is as quick as the others.
    heal();
}
