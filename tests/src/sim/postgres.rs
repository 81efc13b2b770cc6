//! The modelled server: what of PostgreSQL decides about commits: its log, its timelines, who streams
//! from it, whom commits wait for, and how it starts, stops, crashes and is promoted.
//!
//! The server is no process of the executor, because its processes do not obey the agent: a stop that was asked
//! for goes on when the agent dies. Each start gets a number, and what was begun under another number is
//! forgotten.

mod names;
mod stream;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use kornak_agent::guard::{Exit, Watched};
use kornak_cluster::Moment;

pub use names::Names;
use stream::{receive_soon, wake_standbys};

use super::disk::{Disk, Record};
use super::exec::Reply;
use super::host::{self, end};
use super::net::End;
use super::world::World;

/// A walsender that hears nothing for so long ends (`wal_sender_timeout`).
const SENDER_TIMEOUT: Duration = Duration::from_secs(3);

/// A server that runs on a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Run {
    #[default]
    Down,
    /// The postmaster is gone, backends are not.
    Leftovers,
    Starting,
    Standby,
    Promoting,
    Primary,
    /// A fast stop is under way.
    Stopping,
}

/// Why a server did nothing for a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Read-only, starting, stopping or down: certainly not executed.
    NotPrimary,
}

/// A server's answer to a write.
pub type Outcome = Result<(), Refused>;

struct Waiting {
    needs: usize,
    record: Record,
    reply: Option<Reply<Outcome>>,
}

#[derive(Debug, Clone)]
struct Sender {
    flushed: usize,
    heard: Moment,
    /// Start number of the standby it serves.
    of: u32,
    /// The walsender has not read the newest names yet.
    late: Option<Late>,
}

/// A walsender that goes by older names.
#[derive(Debug, Clone)]
struct Late {
    names: String,
    /// Records that it had sent when they changed.
    sent: usize,
}

/// One walsender, as the server shows it.
#[derive(Debug, Clone)]
pub struct Row {
    pub standby: usize,
    /// Number of the standby's start.
    pub of: u32,
    pub flushed: usize,
    pub sent: usize,
    /// The names that it goes by, if they are not the newest.
    pub older_names: Option<String>,
}

/// A server.
#[derive(Default)]
pub struct Postgres {
    pub run: Run,
    /// Counts starts and ends.
    number: u32,
    since: Moment,
    waiting: Vec<Waiting>,
    senders: BTreeMap<usize, Sender>,
    /// Open transactions of sessions, by session.
    open: BTreeSet<u64>,
    /// On a standby: since when it has not been streaming.
    broken_since: Option<Moment>,
    /// A look at the upstream is due already.
    receiving: bool,
    /// Start number of the upstream it streams from.
    stream: Option<(usize, u32)>,
    /// Of a standby that has started: how much it shows until when, while it reads its own log.
    pub reading: Option<(usize, Moment)>,
    /// A standby has streamed since it was started.
    pub has_streamed: bool,
    /// The startup process has not read yet that another server, or none, is to be followed, and goes by this.
    unread: Option<Option<usize>>,
}

impl Postgres {
    /// Runs as primary.
    pub fn is_primary(&self) -> bool {
        matches!(self.run, Run::Primary)
    }

    /// For the trace.
    pub fn describe(&self) -> String {
        format!(
            "server {:?}, stream {:?}, broken since {:?}, looks {}",
            self.run, self.stream, self.broken_since, self.receiving
        )
    }

    /// Runs as a standby and streams.
    pub fn streams(&self) -> bool {
        self.run == Run::Standby && self.stream.is_some()
    }

    /// The startup process of a standby that follows nobody knows it, and pauses.
    pub fn pauses(&self) -> bool {
        self.run == Run::Standby && self.stream.is_none() && self.unread.is_none()
    }

    /// Whom the startup process of a standby goes by.
    pub fn follows(&self, disk: &Disk) -> Option<usize> {
        let follows = self.unread.unwrap_or(disk.upstream);
        follows.filter(|_| self.run == Run::Standby)
    }

    /// Changes when the server starts, ends or takes another role: agents notice that at once.
    pub fn state(&self) -> (Run, u32) {
        (self.run, self.number)
    }

    /// Could give an acknowledgement: accepts writes, or has some under way.
    pub fn may_acknowledge(&self) -> bool {
        match self.run {
            Run::Primary => true,
            Run::Leftovers => !self.waiting.is_empty(),
            _ => false,
        }
    }

    /// The server's walsenders; `end`: how much there is to be sent.
    pub fn senders(&self, end: usize) -> impl Iterator<Item = Row> {
        self.senders.iter().map(move |(standby, sender)| Row {
            standby: *standby,
            of: sender.of,
            flushed: sender.flushed,
            sent: sender.late.as_ref().map_or(end, |late| late.sent),
            older_names: sender.late.as_ref().map(|late| late.names.clone()),
        })
    }

    /// Client backends that are not idle.
    pub fn busy(&self) -> usize {
        self.waiting.iter().filter(|waiting| waiting.reply.is_some()).count() + self.open.len()
    }
}

fn set(w: &Rc<World>, index: usize, run: Run) {
    let mut server = w.hosts[index].server.borrow_mut();
    server.run = run;
    server.since = w.hosts[index].now(w);
    drop(server);
    w.say(index, format_args!("server is {run:?}"));
    w.checker.borrow_mut().disturbed();
    if matches!(run, Run::Down | Run::Leftovers) {
        w.hosts[index].kept.take();
    }
    let pid = w.hosts[index].server.borrow().number;
    w.hosts[index].watched.send_replace(match run {
        Run::Down => Watched::Gone { pid, exit: Exit::Unknown },
        Run::Leftovers => Watched::Ending { pid, exit: Exit::Unknown },
        _ => Watched::Running { pid },
    });
}

/// Whether any process runs on the data directory.
pub fn any_process(w: &World, index: usize) -> bool {
    w.hosts[index].server.borrow().run != Run::Down
}

/// All processes are gone, without a word to anybody (loss of power).
pub fn vanish(w: &Rc<World>, index: usize) {
    let mut server = w.hosts[index].server.borrow_mut();
    for waiting in server.waiting.drain(..) {
        if let Some(reply) = waiting.reply {
            w.net.lose(reply);
        }
    }
    let number = server.number + 1;
    *server = Postgres { number, ..Postgres::default() };
}

/// SIGKILL of every process.
pub fn kill_all(w: &Rc<World>, index: usize) {
    w.hosts[index].disk.borrow_mut().clean = false;
    end_all(w, index);
}

fn end_all(w: &Rc<World>, index: usize) {
    let mut server = w.hosts[index].server.borrow_mut();
    if server.run == Run::Down {
        return;
    }
    let (number, stream) = (server.number, server.stream);
    // Dropping the replies is what a reset connection is to its client.
    *server = Postgres { number: number + 1, ..Postgres::default() };
    drop(server);
    set(w, index, Run::Down);
    if let Some((upstream, _)) = stream {
        // Its walsender sees the connection end.
        let there = Rc::clone(w);
        host::after(w, upstream, w.net.delay(&w.rng), move |_| {
            let mut server = there.hosts[upstream].server.borrow_mut();
            if there.net.passes(end(index), end(upstream))
                && server.senders.get(&index).is_some_and(|sender| sender.of == number)
            {
                server.senders.remove(&index);
            }
        });
    }
}

/// SIGKILL of the postmaster alone: backends go on until they notice.
pub fn kill_postmaster(w: &Rc<World>, index: usize, linger: Duration) {
    if matches!(w.hosts[index].server.borrow().run, Run::Down | Run::Leftovers) {
        return;
    }
    w.hosts[index].disk.borrow_mut().clean = false;
    let was = w.hosts[index].server.borrow().run;
    if linger.is_zero() || was != Run::Primary {
        return end_all(w, index);
    }
    w.hosts[index].server.borrow_mut().open.clear();
    set(w, index, Run::Leftovers);
    let number = w.hosts[index].server.borrow().number;
    host::after(w, index, linger, move |w| {
        if w.hosts[index].server.borrow().number == number {
            end_all(w, index);
        }
    });
}

/// `pg_ctl start`, permitted by the guard. False if it cannot be begun.
pub fn start(w: &Rc<World>, index: usize, as_standby: bool) -> bool {
    let host = &w.hosts[index];
    if any_process(w, index) || host.disk.borrow().torn {
        return false;
    }
    host.disk.borrow_mut().standby_signal = as_standby;
    let clean = host.disk.borrow().clean;
    let number = {
        let mut server = host.server.borrow_mut();
        let number = server.number + 1;
        *server = Postgres { number, ..Postgres::default() };
        number
    };
    set(w, index, Run::Starting);
    let recovery = if clean { w.rng.millis(20, 120) } else { w.rng.millis(50, 2500) };
    host::once_on_disk(w, index, recovery, move |w| {
        if w.hosts[index].server.borrow().number != number {
            return;
        }
        if w.hosts[index].does_not_start.get() {
            w.say(index, format_args!("server PANICs as it starts"));
            return end_all(w, index);
        }
        w.hosts[index].disk.borrow_mut().clean = false;
        if w.hosts[index].disk.borrow().standby_signal {
            w.hosts[index].disk.borrow_mut().was_primary = false;
            let now = w.hosts[index].now(w);
            let mut server = w.hosts[index].server.borrow_mut();
            server.broken_since = Some(now);
            if w.plan.untrue {
                let shown = w.hosts[index].disk.borrow().wal.len();
                let shown = shown.saturating_sub(w.rng.below(30)).max(1);
                server.reading = Some((shown, now + w.rng.millis(0, 8000)));
            }
            drop(server);
            set(w, index, Run::Standby);
            receive_soon(w, index, Duration::ZERO);
        } else {
            writable(w, index, None);
        }
    });
    true
}

/// The promote signal, permitted by the guard. Nothing happens if there is no standby to promote.
pub fn promote(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    if host.server.borrow().run != Run::Standby {
        return;
    }
    set(w, index, Run::Promoting);
    let number = host.server.borrow().number;
    let takes = if w.rng.chance(50) { w.rng.millis(300, 3000) } else { w.rng.millis(20, 200) };
    // A server is promoted when it has read its own log to the end.
    let reads =
        host.server.borrow().reading.map_or(Duration::ZERO, |(_, until)| until.since(host.now(w)));
    host::once_on_disk(w, index, reads + takes, move |w| {
        if w.hosts[index].server.borrow().number == number {
            let timeline = w.next_timeline();
            writable(w, index, Some(timeline));
        }
    });
}

fn writable(w: &Rc<World>, index: usize, timeline: Option<u32>) {
    let host = &w.hosts[index];
    {
        let mut disk = host.disk.borrow_mut();
        if let Some(timeline) = timeline {
            disk.wal.begin_timeline(timeline);
        }
        let record = w.next_number();
        disk.wal.append(record);
        disk.wal.flush();
        disk.was_primary = true;
        disk.clean = false;
        disk.standby_signal = false;
    }
    set(w, index, Run::Primary);
    let now = host.disk.borrow().wal.timeline();
    w.say(index, format_args!("WRITABLE on timeline {now}"));
    w.checker.borrow_mut().became_writable(w, index, timeline.is_some());
}

/// `pg_ctl stop -m fast`: ends clients, writes the shutdown checkpoint, waits for walsenders.
pub fn stop_fast(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    let run = host.server.borrow().run;
    match run {
        Run::Down | Run::Stopping => return,
        Run::Leftovers | Run::Starting | Run::Promoting => return kill_all(w, index),
        Run::Standby | Run::Primary => {}
    }
    let number = {
        let mut server = host.server.borrow_mut();
        server.waiting.clear();
        server.open.clear();
        server.number
    };
    set(w, index, Run::Stopping);
    let checkpoint = w.rng.millis(10, 80);
    host::once_on_disk(w, index, checkpoint, move |w| {
        if w.hosts[index].server.borrow().number != number {
            return;
        }
        if run == Run::Primary {
            let record = w.next_number();
            let mut disk = w.hosts[index].disk.borrow_mut();
            disk.wal.append(record);
            disk.wal.flush();
            drop(disk);
            wake_standbys(w, index);
        }
        finish_stop(w, index, number);
    });
}

fn finish_stop(w: &Rc<World>, index: usize, number: u32) {
    if w.hosts[index].server.borrow().number != number {
        return;
    }
    drop_silent_senders(w, index);
    let end = w.hosts[index].disk.borrow().wal.flushed();
    let done = w.hosts[index].server.borrow().senders.values().all(|sender| sender.flushed >= end);
    if done {
        w.hosts[index].disk.borrow_mut().clean = true;
        return end_all(w, index);
    }
    host::after(w, index, Duration::from_millis(5), move |w| finish_stop(w, index, number));
}

/// Walsenders whose standby says nothing are over.
pub fn drop_silent_senders(w: &Rc<World>, index: usize) {
    let now = w.hosts[index].now(w);
    let mut server = w.hosts[index].server.borrow_mut();
    server.senders.retain(|_, sender| now.since(sender.heard) < SENDER_TIMEOUT);
}

/// A client's write: executed and answered, refused, or (the reply dropped) nobody knows.
pub fn write(w: &Rc<World>, index: usize, record: Record, reply: Reply<Outcome>) {
    let host = &w.hosts[index];
    if !host.up.get() {
        return w.net.lose(reply);
    }
    if host.frozen.get() {
        let later = move |w: &Rc<World>| write(w, index, record, reply);
        return host::after(w, index, Duration::ZERO, later);
    }
    if host.server.borrow().run != Run::Primary {
        return reply.give(Err(Refused::NotPrimary));
    }
    let needs = {
        let mut disk = host.disk.borrow_mut();
        disk.wal.append(record);
        disk.wal.len()
    };
    w.checker.borrow_mut().executed(w, index, record);
    let number = {
        let mut server = host.server.borrow_mut();
        server.waiting.push(Waiting { needs, record, reply: Some(reply) });
        server.number
    };
    let fsync = w.rng.between(Duration::from_micros(200), Duration::from_millis(3));
    host::once_on_disk(w, index, fsync, move |w| {
        let server = &w.hosts[index].server;
        let alive = matches!(server.borrow().run, Run::Primary | Run::Leftovers);
        if server.borrow().number != number || !alive {
            return;
        }
        w.hosts[index].disk.borrow_mut().wal.flush();
        wake_standbys(w, index);
        release(w, index, None);
    });
}

/// A session begins or ends a transaction of several statements. False if refused.
pub fn transaction(w: &World, index: usize, session: u64, open: bool) -> bool {
    let host = &w.hosts[index];
    let mut server = host.server.borrow_mut();
    if !host.alive() || server.run != Run::Primary {
        return false;
    }
    if open {
        server.open.insert(session);
        return true;
    }
    server.open.remove(&session)
}

/// A client's connection is gone: its transaction is rolled back, an answer is not read.
pub fn disconnect(w: &World, index: usize, session: u64) {
    w.hosts[index].server.borrow_mut().open.remove(&session);
}

/// Ends walsenders, but those for these standbys.
pub fn end_senders(w: &World, index: usize, keep: &[usize]) {
    w.hosts[index].server.borrow_mut().senders.retain(|standby, _| keep.contains(standby));
}

/// Ends the clients' backends.
pub fn end_clients(w: &World, index: usize) {
    let mut server = w.hosts[index].server.borrow_mut();
    server.waiting.clear();
    server.open.clear();
}

/// Acknowledges what need not be waited for any longer; by the names that this walsender has read.
fn release(w: &Rc<World>, index: usize, by: Option<usize>) {
    let host = &w.hosts[index];
    let mut server = host.server.borrow_mut();
    let (flushed, names) = {
        let disk = host.disk.borrow();
        let late = by.and_then(|by| Some((by, server.senders.get(&by)?.late.as_ref()?)));
        let names = Names::parse(late.map_or(&disk.sync_names, |(_, late)| &late.names));
        // A walsender lets nothing go whose standby has no place among the names that it goes by; that nobody is
        // waited for is the checkpointer's to say, which goes by the newest.
        if late.is_some_and(|(by, _)| !names.names(&w.hosts[by].name)) {
            return;
        }
        (disk.wal.flushed(), names)
    };
    if by.is_some_and(|by| !names.names(&w.hosts[by].name)) {
        // A walsender without a priority lets nobody go.
        return;
    }
    let senders = server.senders.clone();
    let mut done = Vec::new();
    server.waiting.retain_mut(|waiting| {
        let free = flushed >= waiting.needs && names.satisfied(w, &senders, waiting.needs);
        if free && let Some(reply) = waiting.reply.take() {
            done.push((waiting.record, waiting.needs, reply));
        }
        !free
    });
    drop(server);
    for (record, needs, reply) in done {
        w.checker.borrow_mut().acknowledged(w, index, record, needs);
        reply.give(Ok(()));
    }
}

/// `ALTER SYSTEM SET synchronous_standby_names` and a reload.
pub fn set_sync_names(w: &Rc<World>, index: usize, names: &str) {
    w.say(index, format_args!("commits wait for {names:?}"));
    let old = std::mem::replace(&mut w.hosts[index].disk.borrow_mut().sync_names, names.to_owned());
    if w.hosts[index].server.borrow().run == Run::Primary {
        if w.plan.late_names && old != names {
            read_late(w, index, &old);
        }
        release(w, index, None);
    }
}

/// Some walsenders get no processor for a moment, and go by the names that they have read.
fn read_late(w: &Rc<World>, index: usize, old: &str) {
    let sent = w.hosts[index].disk.borrow().wal.flushed();
    let mut server = w.hosts[index].server.borrow_mut();
    for (standby, sender) in &mut server.senders {
        if sender.late.is_some() || !w.rng.chance(300) {
            continue;
        }
        sender.late = Some(Late { names: old.to_owned(), sent });
        let (standby, of) = (*standby, sender.of);
        host::after(w, index, w.rng.millis(1, 1500), move |w| {
            let mut server = w.hosts[index].server.borrow_mut();
            if let Some(sender) = server.senders.get_mut(&standby).filter(|it| it.of == of) {
                sender.late = None;
            }
        });
    }
}

/// `primary_conninfo` and a reload.
pub fn follow(w: &Rc<World>, index: usize, upstream: Option<usize>) {
    let old = std::mem::replace(&mut w.hosts[index].disk.borrow_mut().upstream, upstream);
    let (run, number) = w.hosts[index].server.borrow().state();
    if run != Run::Standby {
        return;
    }
    if !w.plan.suspect_after.is_zero() && w.rng.chance(200) {
        // A query is in the way of the process that has to read it.
        w.hosts[index].server.borrow_mut().unread.get_or_insert(old);
        return host::after(w, index, w.rng.millis(1, 4000), move |w| {
            if w.hosts[index].server.borrow().number == number {
                has_read(w, index);
            }
        });
    }
    has_read(w, index);
}

/// The startup process knows whom it follows.
fn has_read(w: &Rc<World>, index: usize) {
    let now = w.hosts[index].now(w);
    let mut server = w.hosts[index].server.borrow_mut();
    server.unread = None;
    if server.run == Run::Standby {
        let mut disk = w.hosts[index].disk.borrow_mut();
        if disk.upstream.is_none() {
            // A walreceiver flushes what it has before it ends.
            disk.wal.flush();
        }
        drop(disk);
        server.stream = None;
        server.broken_since.get_or_insert(now);
        drop(server);
        receive_soon(w, index, Duration::from_millis(1));
    }
}

/// The end a client talks to.
pub fn client_end(index: usize) -> End {
    end(index)
}
