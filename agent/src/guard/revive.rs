//! An agent that says nothing while its server leads is ended, and another is started.
//!
//! The agent asks for it (`WATCH`), beats several times a second (`BEAT`), and says when it ends because somebody has
//! asked it to (`LEAVE`). The process is held by a descriptor from the moment it connects, so that its number given to
//! another is never hit. Where systemd has started it, the guard only ends it: systemd starts the next.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kornak_cluster::{Moment, discard};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};
use tracing::{info, warn};

use super::patience::{Do, Patience};
use super::recipe::Recipe;
use super::spawn::Origin;

/// Names the agent that the guard has started: its number and when it began.
const STARTED: &str = "agent.started";

/// The process at the other end of the socket.
struct Peer {
    pid: u32,
    handle: OwnedFd,
}

impl Peer {
    fn of(stream: &UnixStream) -> Option<Self> {
        let found = socket_peercred(stream).ok()?;
        let handle = pidfd_open(found.pid, PidfdFlags::empty()).ok()?;
        let pid = u32::try_from(found.pid.as_raw_nonzero().get()).ok()?;
        (found.uid == geteuid()).then_some(Self { pid, handle })
    }
}

struct Watch {
    agent: Peer,
    recipe: Recipe,
    patience: Patience,
    /// Killed, or gone: its end has been written down.
    ended: bool,
}

/// The part of the guard that watches over the agent.
pub(super) struct Reviver {
    runtime_dir: PathBuf,
    /// The newest client, until it asks to be watched.
    peer: Option<Peer>,
    watch: Option<Watch>,
    /// The agent that this guard has started last.
    started: Option<u32>,
}

impl Reviver {
    pub(super) fn new(runtime_dir: &Path) -> Self {
        Self { runtime_dir: runtime_dir.to_owned(), peer: None, watch: None, started: None }
    }

    /// A client has connected. One that somebody else has started need not know how to beat.
    pub(super) fn connected(&mut self, stream: &UnixStream) {
        self.peer = Peer::of(stream);
        let pid = self.peer.as_ref().map(|peer| peer.pid);
        let is_known = |known: Option<u32>| known.is_some() && known == pid;
        if !is_known(self.started) && !is_known(self.watch.as_ref().map(|it| it.agent.pid)) {
            self.watch = None;
        }
    }

    /// The client wants to be ended and started again when it is silent for so long.
    pub(super) fn watch(&mut self, timeout: Duration, now: Moment) -> Result<(), String> {
        if timeout.is_zero() {
            self.watch = None;
            return Ok(());
        }
        let agent = match (self.peer.take(), self.watch.take()) {
            (Some(peer), before) => {
                let patience = before.map(|before| before.patience);
                (peer, patience)
            }
            (None, Some(before)) => (before.agent, Some(before.patience)),
            (None, None) => return Err("it is not known who asks".to_owned()),
        };
        let (agent, patience) = agent;
        let recipe = Recipe::read(agent.pid)
            .map_err(|error| format!("see how process {} was started: {error}", agent.pid))?;
        let mut patience = patience.unwrap_or_else(|| Patience::new(timeout, now));
        patience.allow(timeout);
        self.watch = Some(Watch { agent, recipe, patience, ended: false });
        Ok(())
    }

    pub(super) fn beat(&mut self, leads: bool, now: Moment) {
        if let Some(watch) = &mut self.watch {
            watch.patience.beat(leads, now);
        }
    }

    /// The agent ends because it was asked to.
    pub(super) fn leave(&mut self) {
        self.watch = None;
        self.forget();
    }

    /// A child of the guard's has ended.
    pub(super) fn reaped(&mut self, pid: u32) {
        if self.started == Some(pid) {
            self.forget();
        }
    }

    /// Does what is to be done now; returns what is to be written down.
    pub(super) fn look(&mut self, now: Moment, may_lead: bool, origin: &Origin) -> Option<String> {
        let watch = self.watch.as_mut()?;
        let lives = !has_ended(&watch.agent.handle);
        let pid = watch.agent.pid;
        match watch.patience.look(now, may_lead, lives) {
            Do::Nothing => None,
            Do::Kill if watch.ended || is_asked_to_end(pid) => None,
            Do::Kill => {
                let outputs = watch.recipe.outputs(&self.runtime_dir);
                discard::may_be_gone_already(pidfd_send_signal(&watch.agent.handle, Signal::KILL));
                watch.ended = true;
                let said = format!("agent {pid} is silent and is ended");
                if watch.recipe.is_a_service() {
                    return Some(format!("{said}; systemd starts the next"));
                }
                wait_for_end(&watch.agent.handle);
                if !has_ended(&watch.agent.handle) {
                    // The first process of a container, or one that waits for a disk. Another is started when it is gone.
                    return Some(format!("{said}, which takes time"));
                }
                Some(format!("{said}; {}", self.start(outputs, origin)))
            }
            Do::Start if watch.recipe.is_a_service() => None,
            Do::Start => {
                let outputs = watch.recipe.outputs(&self.runtime_dir);
                let begun = self.start(outputs, origin);
                Some(format!("agent {pid} is gone; {begun}"))
            }
        }
    }

    fn start(&mut self, outputs: io::Result<[fs::File; 2]>, origin: &Origin) -> String {
        let Some(watch) = &mut self.watch else { return String::new() };
        watch.patience.has_started();
        let started = outputs.and_then(|outputs| watch.recipe.start(origin, outputs));
        match started {
            Ok(child) => {
                let pid = child.id();
                if let Some(handle) = open(pid) {
                    watch.agent = Peer { pid, handle };
                    watch.ended = false;
                }
                self.started = Some(pid);
                let noted = note(&self.runtime_dir.join(STARTED), pid);
                let noted =
                    noted.map_or_else(|e| format!(", which is not noted: {e}"), |()| String::new());
                format!("started agent {pid}{noted}")
            }
            Err(error) => format!("another cannot be started: {error}"),
        }
    }

    fn forget(&mut self) {
        if self.started.take().is_some() {
            discard::may_be_gone_already(fs::remove_file(self.runtime_dir.join(STARTED)));
        }
    }
}

/// A killed process is gone within milliseconds unless it waits for a disk; then the next one does not get its port, and
/// is started again later.
fn wait_for_end(handle: &OwnedFd) {
    let limit = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    discard::goes_on_either_way(poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&limit)));
}

fn has_ended(handle: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(handle, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

fn open(pid: u32) -> Option<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// A stopped process has been sent SIGTERM or SIGINT and cannot act on it: somebody wants it to end, not to begin anew.
fn is_asked_to_end(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    let pending = pending.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let bit = |signal: Signal| 1_u64 << (signal.as_raw() - 1);
    pending.is_some_and(|mask| mask & (bit(Signal::TERM) | bit(Signal::INT)) != 0)
}

/// When a process began, in ticks since the host did: with its number this is one process only.
fn began(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The third field follows the name in parentheses; this is the 22nd.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn note(path: &Path, pid: u32) -> io::Result<()> {
    let began = began(pid).ok_or_else(|| io::Error::other("it has ended"))?;
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    writeln!(options.custom_flags(flags).open(path)?, "{pid} {began}")
}

/// An agent that is being started takes the place of one that the guard has started by itself: an operator, or a
/// supervisor that does not know of the guard's, means this one. The server goes on, as after a crash of the agent.
pub(crate) fn replace_started(runtime_dir: &Path) {
    let text = fs::read_to_string(runtime_dir.join(STARTED)).unwrap_or_default();
    let mut fields = text.split_whitespace();
    let pid = fields.next().and_then(|field| field.parse::<u32>().ok());
    let known = fields.next().and_then(|field| field.parse::<u64>().ok());
    let (Some(pid), Some(known)) = (pid, known) else { return };
    if pid == std::process::id() {
        warn!("started by the guard: the agent before was silent or gone while its server led");
        return;
    }
    let Some(handle) = open(pid) else { return };
    // Looked at with the process in hand: its number is nobody else's any more.
    if began(pid) != Some(known) || has_ended(&handle) {
        return;
    }
    info!(agent = pid, "taking the place of the agent that the guard has started");
    if pidfd_send_signal(&handle, Signal::KILL).is_ok() {
        wait_for_end(&handle);
    }
}
