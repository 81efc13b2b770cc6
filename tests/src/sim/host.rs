//! One machine: a disk, a clock, a server, a guard, an agent; what is killed, frozen and cut together.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use kornak_agent::guard::Watched;
use kornak_agent::guard::bequest::Bequest;
use kornak_agent::guard::fence::Fence;
use kornak_cluster::Moment;
use tokio::sync::watch;

use super::agent::{self, Agent};
use super::clock::HostClock;
use super::disk::Disk;
use super::exec::ProcessId;
use super::net::End;
use super::postgres::{self, Postgres};
use super::world::World;

/// Between two looks at a disk that hangs.
const DISK_LOOK: Duration = Duration::from_millis(50);

/// A machine of the cluster.
pub struct Host {
    pub index: usize,
    pub name: String,
    pub up: Cell<bool>,
    /// All of it is frozen, as a virtual machine that is paused without its clock noticing.
    pub frozen: Cell<bool>,
    /// When it was last thawed or an agent-less guard had to wake: see the checker's allowance.
    pub thawed_at: Cell<Option<Moment>>,
    /// The server ends as it starts.
    pub does_not_start: Cell<bool>,
    /// Nothing is written or read on the server's disk.
    pub disk_hangs: Cell<bool>,
    pub clock: RefCell<HostClock>,
    pub disk: RefCell<Disk>,
    pub server: RefCell<Postgres>,
    /// The guard's deadline.
    pub fence: RefCell<Fence>,
    /// The text that an agent has left to the next one with the server that runs.
    pub kept: RefCell<Bequest>,
    /// The postmaster as the guard sees it.
    pub watched: watch::Sender<Watched>,
    pub guard_process: Cell<ProcessId>,
    pub agent_process: Cell<ProcessId>,
    pub agent: RefCell<Option<Rc<Agent>>>,
    /// Calls of the server that came while everything was frozen.
    deferred: RefCell<Vec<Box<dyn FnOnce()>>>,
}

impl Host {
    /// A host with a disk, on which nothing runs yet.
    pub fn new(index: usize, disk: Disk, clock: HostClock, idle: ProcessId) -> Self {
        Self {
            index,
            name: name_of(index),
            up: Cell::new(true),
            frozen: Cell::new(false),
            thawed_at: Cell::new(None),
            does_not_start: Cell::new(false),
            disk_hangs: Cell::new(false),
            clock: RefCell::new(clock),
            disk: RefCell::new(disk),
            server: RefCell::default(),
            fence: RefCell::default(),
            kept: RefCell::default(),
            watched: watch::Sender::new(Watched::Nothing),
            guard_process: Cell::new(idle),
            agent_process: Cell::new(idle),
            agent: RefCell::new(None),
            deferred: RefCell::default(),
        }
    }

    /// The time on this host's clock.
    pub fn now(&self, w: &World) -> Moment {
        self.clock.borrow().show(w.exec.now())
    }

    /// Drops what refers to the world, when it ends.
    pub fn forget(&self) {
        self.agent.take();
        self.deferred.take();
        self.server.take();
    }

    /// Whether its programs run.
    pub fn alive(&self) -> bool {
        self.up.get() && !self.frozen.get()
    }
}

/// Names of hosts: `a`, `b`, `c` …
pub fn name_of(index: usize) -> String {
    char::from(b'a' + u8::try_from(index % 26).unwrap_or(0)).to_string()
}

/// The host of that name.
pub fn index_of(w: &World, name: &str) -> Option<usize> {
    w.hosts.iter().position(|host| host.name == name)
}

/// Switches a host on: guard and agent start as services.
pub fn boot(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    host.up.set(true);
    host.guard_process.set(w.exec.process());
    host.fence.take();
    host.kept.take();
    w.say(index, format_args!("boots"));
    agent::start(w, index);
}

/// The host loses power; what was not flushed is gone.
pub fn lose_power(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    if !host.up.get() {
        return;
    }
    w.say(index, format_args!("LOSES POWER"));
    host.up.set(false);
    host.frozen.set(false);
    host.deferred.take();
    agent::kill(w, index);
    w.exec.kill(host.guard_process.get());
    postgres::vanish(w, index);
    host.disk.borrow_mut().wal.lose_unflushed();
    host.clock.borrow_mut().reboot(w.exec.now());
    w.checker.borrow_mut().disturbed();
}

/// Everything on the host stands still.
pub fn freeze(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    if !host.alive() {
        return;
    }
    w.say(index, format_args!("FROZEN"));
    host.frozen.set(true);
    w.exec.freeze(host.guard_process.get());
    w.exec.freeze(host.agent_process.get());
}

/// Everything goes on, in any order.
pub fn thaw(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    if !host.frozen.get() {
        return;
    }
    w.say(index, format_args!("thawed"));
    host.frozen.set(false);
    host.thawed_at.set(Some(w.exec.now()));
    let wake = || w.rng.between(Duration::ZERO, Duration::from_millis(5));
    w.exec.thaw(host.guard_process.get(), wake());
    w.exec.thaw(host.agent_process.get(), wake());
    for call in host.deferred.take() {
        w.exec.after(wake(), call);
    }
    w.checker.borrow_mut().disturbed();
}

/// Calls `what` on this host after `delay`; a frozen host does it when it is thawed, one that has lost
/// power never. Only for the server, which is no process of the executor.
pub fn after(
    w: &Rc<World>,
    index: usize,
    delay: Duration,
    what: impl FnOnce(&Rc<World>) + 'static,
) {
    let (later, boot) = (Rc::clone(w), w.hosts[index].clock.borrow().boot);
    w.exec.after(delay, move || {
        let host = &later.hosts[index];
        if !host.up.get() || host.clock.borrow().boot != boot {
            return;
        }
        if host.frozen.get() {
            let again = Rc::clone(&later);
            host.deferred.borrow_mut().push(Box::new(move || what(&again)));
            return;
        }
        what(&later);
    });
}

/// As [`after`], for what ends with an answer of the server's disk.
pub fn once_on_disk<F: FnOnce(&Rc<World>) + 'static>(
    w: &Rc<World>,
    index: usize,
    delay: Duration,
    what: F,
) {
    after(w, index, delay, move |w| {
        if w.hosts[index].disk_hangs.get() {
            return once_on_disk(w, index, DISK_LOOK, what);
        }
        what(w);
    });
}

/// This host's end of the network.
pub fn end(index: usize) -> End {
    End::Host(index)
}
