//! Faults: which, when, and for how long.

pub mod lost;
pub mod scripts;
pub mod settings;
pub mod unseen;

use std::rc::Rc;
use std::time::Duration;

use super::agent;
use super::host;
use super::net::End;
use super::postgres;
use super::proxy;
use super::scenario::Kind;
use super::world::{Stall, World};

/// Kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    KillPostmaster,
    LosePower,
    KillAgent,
    FreezeAgent,
    FreezeHost,
    KillGuard,
    CutStore,
    CutStoreOneWay,
    CutHosts,
    Isolate,
    StoreAway,
    StoreRestarts,
    Election,
    WatchStalls,
    CutProxy,
    KillProxy,
    FreezeProxy,
    Switchover,
    Ambush,
    DeleteLeaderKey,
    StalledStream,
    VoterDown,
    WrongAddress,
    ChangeSettings,
    Maintenance,
    OddKey,
    StoreFull,
    DoesNotStart,
    HungDisk,
    LeaderLost,
}

use Fault::{
    Ambush, ChangeSettings, CutHosts, CutProxy, CutStore, CutStoreOneWay, DeleteLeaderKey,
    DoesNotStart, Election, FreezeAgent, FreezeHost, FreezeProxy, HungDisk, Isolate, KillAgent,
    KillGuard, KillPostmaster, KillProxy, LeaderLost, LosePower, Maintenance, OddKey,
    StalledStream, StoreAway, StoreFull, StoreRestarts, Switchover, VoterDown, WatchStalls,
    WrongAddress,
};

/// Each as often as it is named.
const ANY: &[Fault] = &[
    KillPostmaster,
    KillPostmaster,
    KillPostmaster,
    LosePower,
    LosePower,
    KillAgent,
    KillAgent,
    FreezeAgent,
    FreezeAgent,
    FreezeHost,
    FreezeHost,
    KillGuard,
    CutStore,
    CutStore,
    CutStoreOneWay,
    CutStoreOneWay,
    CutHosts,
    CutHosts,
    Isolate,
    Isolate,
    StoreAway,
    StoreRestarts,
    Election,
    Election,
    WatchStalls,
    WatchStalls,
    CutProxy,
    KillProxy,
    FreezeProxy,
    Switchover,
    Switchover,
    DeleteLeaderKey,
];

const STORE: &[Fault] = &[
    StoreAway,
    StoreAway,
    StoreRestarts,
    CutStore,
    CutStore,
    CutStoreOneWay,
    KillAgent,
    KillAgent,
    CutHosts,
    CutHosts,
    FreezeAgent,
    LosePower,
    Isolate,
    KillPostmaster,
    Election,
    WatchStalls,
    Switchover,
];

const OUTAGE: &[Fault] = &[
    StoreRestarts,
    StoreRestarts,
    StoreRestarts,
    StoreRestarts,
    StoreAway,
    StoreAway,
    KillAgent,
    KillPostmaster,
    CutStore,
    Election,
];

const AWAY: &[Fault] = &[
    StoreAway,
    StoreAway,
    StoreAway,
    StoreRestarts,
    CutStore,
    CutStore,
    CutStoreOneWay,
    KillAgent,
    KillAgent,
    KillAgent,
    KillAgent,
    KillAgent,
    KillAgent,
    KillPostmaster,
    KillPostmaster,
    FreezeAgent,
    FreezeHost,
    LosePower,
    CutHosts,
    Isolate,
    Election,
    WatchStalls,
    DeleteLeaderKey,
    Switchover,
];

const SETTINGS: &[Fault] = &[
    ChangeSettings,
    ChangeSettings,
    ChangeSettings,
    ChangeSettings,
    Maintenance,
    Maintenance,
    OddKey,
    OddKey,
    StoreFull,
    KillPostmaster,
    KillPostmaster,
    LosePower,
    KillAgent,
    FreezeAgent,
    CutStore,
    StoreAway,
    StoreRestarts,
    CutHosts,
    Isolate,
    Switchover,
    WatchStalls,
    Election,
];

const DISKS: &[Fault] = &[
    DoesNotStart,
    DoesNotStart,
    DoesNotStart,
    HungDisk,
    HungDisk,
    HungDisk,
    KillPostmaster,
    KillAgent,
    Switchover,
    LosePower,
];

const PLANNED: &[Fault] = &[
    Ambush,
    Switchover,
    Switchover,
    Switchover,
    Switchover,
    Switchover,
    KillAgent,
    FreezeAgent,
    FreezeHost,
    CutStore,
    CutStoreOneWay,
    Isolate,
    KillPostmaster,
    LosePower,
    KillProxy,
    FreezeProxy,
    Election,
    WatchStalls,
    CutHosts,
    CutProxy,
];

const CHURN: &[Fault] = &[
    KillPostmaster,
    KillPostmaster,
    CutHosts,
    CutHosts,
    CutHosts,
    WatchStalls,
    WatchStalls,
    KillAgent,
    CutStoreOneWay,
    FreezeAgent,
    LosePower,
    KillGuard,
    Switchover,
    Isolate,
    Election,
];

const UNTRUE: &[Fault] = &[
    StalledStream,
    StalledStream,
    StalledStream,
    StalledStream,
    StalledStream,
    VoterDown,
    VoterDown,
    WrongAddress,
    WrongAddress,
    WrongAddress,
    WrongAddress,
    KillPostmaster,
    LosePower,
    KillAgent,
    CutHosts,
    FreezeAgent,
    Switchover,
    WatchStalls,
];

const FENCE: &[Fault] = &[
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LeaderLost,
    LosePower,
    FreezeHost,
    Isolate,
    KillPostmaster,
    KillAgent,
    CutStore,
    StoreRestarts,
    Switchover,
    Switchover,
    FreezeAgent,
    Maintenance,
];

/// Lets things go wrong until it is time to stop.
pub async fn run(w: Rc<World>, kind: Kind) {
    if kind == Kind::Situations {
        return scripts::run(w).await;
    }
    if kind == Kind::Unseen {
        return unseen::run(w).await;
    }
    let list = match kind {
        Kind::Failsafe => STORE,
        Kind::Outage => OUTAGE,
        Kind::Away => AWAY,
        Kind::Settings => SETTINGS,
        Kind::Disks => DISKS,
        Kind::Handover => PLANNED,
        Kind::Churn => CHURN,
        Kind::Untrue => UNTRUE,
        Kind::Fence => FENCE,
        _ => ANY,
    };
    w.exec.sleep(Duration::from_secs(3)).await;
    loop {
        w.exec.sleep(w.rng.between(Duration::from_millis(1), w.plan.fault_every * 2)).await;
        if !w.faults_on() {
            return;
        }
        let Some(fault) = w.rng.pick(list) else { return };
        happen(&w, *fault);
        // Sometimes two at once, milliseconds apart.
        if w.rng.chance(200)
            && let Some(fault) = w.rng.pick(list)
        {
            w.exec.sleep(w.rng.millis(0, 400)).await;
            if w.faults_on() {
                happen(&w, *fault);
            }
        }
    }
}

/// A host; more often than not the leader.
fn victim(w: &World) -> usize {
    let leader = w.store.truth().leader.as_ref().and_then(|leader| host::index_of(w, &leader.name));
    match leader {
        Some(leader) if w.rng.chance(600) => leader,
        _ => w.rng.below(w.hosts.len()),
    }
}

fn later(w: &Rc<World>, delay: Duration, what: impl FnOnce(&Rc<World>) + 'static) {
    let there = Rc::clone(w);
    w.exec.after(delay, move || {
        // What is mended at the end is mended already.
        if there.faults_on() {
            what(&there);
        }
    });
}

fn cut_for(w: &Rc<World>, links: Vec<(End, End)>, lasts: Duration) {
    for (from, to) in &links {
        w.net.cut(*from, *to);
    }
    later(w, lasts, move |w| {
        w.note(format_args!("mended {links:?}"));
        for (from, to) in &links {
            w.net.heal(*from, *to);
        }
    });
}

fn happen(w: &Rc<World>, fault: Fault) {
    let at = victim(w);
    let here = End::Host(at);
    let lasts = match w.rng.below(3) {
        0 => w.rng.millis(50, 1500),
        _ => w.rng.between(Duration::from_millis(500), w.plan.ttl * 5 / 2),
    };
    w.note(format_args!("FAULT {fault:?} at {} for {lasts:?}", w.hosts[at].name));
    match fault {
        KillPostmaster => {
            let linger = if w.rng.chance(500) { w.rng.millis(50, 3000) } else { Duration::ZERO };
            if w.hosts[at].alive() {
                postgres::kill_postmaster(w, at, linger);
            }
        }
        LosePower => {
            host::lose_power(w, at);
            later(w, lasts, move |w| {
                if !w.hosts[at].up.get() {
                    host::boot(w, at);
                }
            });
        }
        KillAgent => {
            agent::kill(w, at);
            let soon = if w.rng.chance(500) { w.rng.millis(1, 300) } else { lasts };
            later(w, soon, move |w| agent::start(w, at));
        }
        FreezeAgent => {
            w.exec.freeze(w.hosts[at].agent_process.get());
            later(w, lasts, move |w| {
                // A host that is frozen as a whole wakes as a whole.
                if !w.hosts[at].frozen.get() {
                    w.exec.thaw(w.hosts[at].agent_process.get(), Duration::ZERO);
                }
            });
        }
        FreezeHost => {
            host::freeze(w, at);
            later(w, lasts, move |w| host::thaw(w, at));
        }
        KillGuard => kill_guard(w, at),
        CutStore => cut_for(w, vec![(here, End::Store), (End::Store, here)], lasts),
        CutStoreOneWay => {
            let link = if w.rng.chance(500) { (here, End::Store) } else { (End::Store, here) };
            cut_for(w, vec![link], lasts);
        }
        CutHosts => {
            let other = End::Host(w.rng.below(w.hosts.len()));
            cut_for(w, vec![(here, other), (other, here)], lasts);
        }
        Isolate => {
            let with_store = w.rng.chance(500);
            let mut others: Vec<End> = (0..w.hosts.len()).map(End::Host).collect();
            others.extend((0..w.proxies.len()).map(End::Proxy).filter(|_| w.rng.chance(500)));
            others.extend(with_store.then_some(End::Store));
            let links = others.iter().filter(|end| **end != here);
            cut_for(w, links.flat_map(|end| [(here, *end), (*end, here)]).collect(), lasts);
        }
        WatchStalls => {
            let end = match w.rng.below(3) {
                0 => End::Proxy(w.rng.below(w.proxies.len())),
                _ => here,
            };
            let how = if w.rng.chance(500) { Stall::Silent } else { Stall::Stale };
            w.stalled.borrow_mut().insert(end, how);
            later(w, lasts, move |w| {
                w.stalled.borrow_mut().remove(&end);
            });
        }
        CutProxy | KillProxy | FreezeProxy => proxy_fault(w, fault, at, lasts),
        Switchover => {
            let name = w.hosts[w.rng.below(w.hosts.len())].name.clone();
            agent::switch_over(w, w.rng.chance(500).then_some(name.as_str()));
        }
        Ambush => drop(w.exec.spawn(w.wire, scripts::ambush(Rc::clone(w)))),
        LeaderLost => drop(w.exec.spawn(w.wire, lost::leader(Rc::clone(w)))),
        StalledStream | VoterDown | WrongAddress => untrue(w, fault, lasts),
        StoreAway | StoreRestarts | StoreFull | Election | DeleteLeaderKey | ChangeSettings
        | Maintenance | OddKey => in_the_store(w, fault, at, lasts),
        DoesNotStart | HungDisk => on_a_disk(w, fault, at),
    }
}

/// Faults of the store, and in what it holds.
fn in_the_store(w: &Rc<World>, fault: Fault, at: usize, lasts: Duration) {
    match fault {
        StoreAway => {
            w.store.set_up(w, false);
            later(w, lasts * 2, |w| w.store.set_up(w, true));
        }
        StoreRestarts => {
            w.store.stop(w);
            later(w, lasts * 2, |w| w.store.set_up(w, true));
        }
        Election => {
            // It answers with its own, old term.
            w.store.deposed(at, true);
            w.store.elect(w);
            later(w, w.rng.millis(200, 5000), move |w| w.store.deposed(at, false));
        }
        ChangeSettings => settings::change(w),
        Maintenance => {
            settings::patch(w, "pause", serde_json::json!(true));
            let lasts = if w.rng.chance(500) { lasts } else { w.rng.millis(10_000, 30_000) };
            later(w, lasts, |w| settings::patch(w, "pause", serde_json::json!(false)));
        }
        OddKey => {
            settings::spoil(w);
            later(w, lasts, settings::restore);
        }
        StoreFull => {
            w.store.set_full(true);
            later(w, lasts, |w| w.store.set_full(false));
        }
        _ => {
            w.checker.borrow_mut().key_deleted(w);
            w.store.delete_leader_key(w);
        }
    }
}

/// Faults of a server's disk.
fn on_a_disk(w: &Rc<World>, fault: Fault, at: usize) {
    let lasts = w.rng.millis(1000, 100_000);
    if fault == DoesNotStart {
        w.hosts[at].does_not_start.set(true);
        if w.hosts[at].alive() {
            postgres::kill_postmaster(w, at, Duration::ZERO);
        }
        later(w, lasts, move |w| w.hosts[at].does_not_start.set(false));
    } else {
        w.hosts[at].disk_hangs.set(true);
        later(w, lasts, move |w| w.hosts[at].disk_hangs.set(false));
    }
}

/// Faults that make answers untrue, or costly if they are.
fn untrue(w: &Rc<World>, fault: Fault, lasts: Duration) {
    let mut stalled = None;
    if fault == WrongAddress {
        let at = w.rng.below(w.hosts.len());
        // The standby that stalls answers in place of the one that it is to be compared with.
        let other = (at + 1) % w.hosts.len();
        w.answered_by.borrow_mut().insert(at, other);
        later(w, lasts * 2, move |w| {
            w.answered_by.borrow_mut().remove(&at);
        });
        stalled = Some(other);
    }
    w.exec.spawn(w.wire, scripts::leader_lost_beside(Rc::clone(w), stalled, fault == VoterDown));
}

fn proxy_fault(w: &Rc<World>, fault: Fault, at: usize, lasts: Duration) {
    let index = w.rng.below(w.proxies.len());
    match fault {
        CutProxy => {
            let other = if w.rng.chance(500) { End::Host(at) } else { End::Store };
            let (here, way) = (End::Proxy(index), w.rng.below(3));
            let links = [(here, other), (other, here)];
            let links = links.into_iter().enumerate().filter(|(at, _)| way == 2 || *at == way);
            cut_for(w, links.map(|(_, link)| link).collect(), lasts);
        }
        KillProxy => {
            proxy::kill(w, index);
            later(w, lasts, move |w| proxy::start(w, index));
        }
        _ => {
            w.exec.freeze(w.proxies[index].process.get());
            later(w, lasts, move |w| {
                w.exec.thaw(w.proxies[index].process.get(), Duration::ZERO);
            });
        }
    }
}

/// The guard dies, and the kernel ends the server with it; the agent begins anew.
fn kill_guard(w: &Rc<World>, at: usize) {
    let host = &w.hosts[at];
    if !host.alive() {
        return;
    }
    w.exec.kill(host.guard_process.get());
    postgres::kill_all(w, at);
    agent::kill(w, at);
    host.guard_process.set(w.exec.process());
    host.fence.take();
    later(w, w.rng.millis(10, 2000), move |w| agent::start(w, at));
}
