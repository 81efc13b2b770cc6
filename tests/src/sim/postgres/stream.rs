//! How the log gets from a primary to its standbys, and how primaries hear what those have.

use std::rc::Rc;
use std::time::Duration;

use super::{Run, Sender, release};
use crate::sim::host::{self, end};
use crate::sim::world::World;

/// A standby says where it stands at least this often.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// A standby without a stream tries again after so long.
const RETRY: Duration = Duration::from_millis(400);

pub(super) fn wake_standbys(w: &Rc<World>, index: usize) {
    let standbys: Vec<usize> = w.hosts[index].server.borrow().senders.keys().copied().collect();
    for standby in standbys {
        receive_soon(w, standby, w.net.delay(&w.rng));
    }
}

/// Lets a standby look at its upstream.
pub(super) fn receive_soon(w: &Rc<World>, index: usize, delay: Duration) {
    let number = {
        let mut server = w.hosts[index].server.borrow_mut();
        if server.receiving || server.run != Run::Standby {
            return;
        }
        server.receiving = true;
        server.number
    };
    host::after(w, index, delay, move |w| {
        if w.hosts[index].server.borrow().number != number {
            return;
        }
        w.hosts[index].server.borrow_mut().receiving = false;
        if w.hosts[index].server.borrow().run == Run::Standby {
            receive(w, index, number);
        }
    });
}

fn receive(w: &Rc<World>, index: usize, number: u32) {
    let host = &w.hosts[index];
    let follows = host.server.borrow().unread.unwrap_or(host.disk.borrow().upstream);
    let upstream = follows.filter(|upstream| *upstream != index);
    // No stream is asked for before the own log has been read to its end.
    let reads = host.server.borrow().reading.is_some_and(|(_, until)| host.now(w) < until);
    let hangs = host.disk_hangs.get();
    let reachable = upstream.filter(|_| !reads && !hangs).filter(|upstream| {
        let there = &w.hosts[*upstream];
        there.alive()
            && w.net.both(end(index), end(*upstream))
            && serves(w, *upstream, there.server.borrow().run)
            && host.disk.borrow().wal.may_follow(&there.disk.borrow().wal)
    });
    let Some(upstream) = reachable else {
        let now = host.now(w);
        let mut server = host.server.borrow_mut();
        server.stream = None;
        server.broken_since.get_or_insert(now);
        drop(server);
        return receive_soon(w, index, RETRY);
    };
    let from = &w.hosts[upstream];
    let more = {
        let theirs = from.disk.borrow();
        let mut mine = host.disk.borrow_mut();
        w.checker.borrow_mut().streams(w, (index, &mine.wal), (upstream, &theirs.wal));
        let more = mine.wal.receive(&theirs.wal);
        // Now and then the newest part is not on disk yet when the next message comes.
        if more == 0 || !w.rng.chance(100) {
            mine.wal.flush();
        }
        more
    };
    let flushed = host.disk.borrow().wal.flushed();
    let up_number = from.server.borrow().number;
    {
        let mut server = host.server.borrow_mut();
        server.broken_since = None;
        server.stream = Some((upstream, up_number));
        server.has_streamed = true;
    }
    // The status message travels back.
    let there = Rc::clone(w);
    host::after(w, upstream, w.net.delay(&w.rng), move |_| {
        if !there.net.passes(end(index), end(upstream)) {
            return;
        }
        hear(&there, upstream, up_number, index, number, flushed);
    });
    let behind = more > 0 && flushed < host.disk.borrow().wal.len();
    receive_soon(w, index, if behind { Duration::from_millis(3) } else { STATUS_EVERY });
}

/// Whether a server in this state sends its log.
fn serves(w: &World, upstream: usize, run: Run) -> bool {
    match run {
        Run::Primary | Run::Leftovers => true,
        // During a fast stop only to those that were there.
        Run::Stopping => !w.hosts[upstream].server.borrow().senders.is_empty(),
        _ => false,
    }
}

fn hear(w: &Rc<World>, index: usize, number: u32, from: usize, of: u32, flushed: usize) {
    let now = w.hosts[index].now(w);
    {
        let mut server = w.hosts[index].server.borrow_mut();
        if server.number != number {
            return;
        }
        let accepts = server.run == Run::Primary;
        match server.senders.get_mut(&from) {
            Some(sender) if sender.of == of => {
                sender.flushed = sender.flushed.max(flushed);
                sender.heard = now;
            }
            _ if accepts => {
                server.senders.insert(from, Sender { flushed, heard: now, of, late: None });
            }
            _ => return,
        }
    }
    release(w, index, Some(from));
    let end = w.hosts[index].disk.borrow().wal.flushed();
    if flushed < end {
        receive_soon(w, from, w.net.delay(&w.rng));
    }
}
