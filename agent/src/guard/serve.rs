//! The guard's loop: one thread, one `poll`.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use kornak_cluster::{Moment, discard};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{
    Pid, PidfdFlags, Resource, Signal, WaitOptions, WaitStatus, geteuid, getpid,
    getpriority_process, getrlimit, pidfd_open, pidfd_send_signal, set_child_subreaper,
    setpriority_process, setsid, wait,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::args::Args;
use super::bequest::Bequest;
use super::clock::{boottime_now, realtime_now, timespec};
use super::fence::Fence;
use super::kill::{is_server_in, kill_loggers, kill_once, processes_held};
use super::revive::Reviver;
use super::spawn::{OOM_SCORE, Origin, ignore_requests_to_end, spawn};
use super::wire::{
    Answer, Command, Exit, GuardStatus, Lines, ServerSignal, StartRequest, VERSION, nanos,
};

/// Name of the socket in the runtime directory.
pub(super) const SOCKET: &str = "guard.sock";
const LOCK: &str = "guard.lock";
const LOG: &str = "guard.log";

/// Between two looks while processes are being stopped or killed.
const KILLING_LOOK: Duration = Duration::from_millis(5);
/// Between two looks while nothing may run.
const FIRED_LOOK: Duration = Duration::from_millis(100);
/// Between two looks otherwise: for jumps of the clock and for children to be reaped.
const IDLE_LOOK: Duration = Duration::from_millis(500);
/// How long a logging collector may live on.
const LOGGER_GRACE: Duration = Duration::from_secs(1);
/// Notes kept while the log may not be written; killing has few.
const MAX_NOTES: usize = 100;
/// The wall clock ran this much further than the boot clock: the host stood still.
const JUMP: Duration = Duration::from_secs(1);

/// `kornak guard`: runs until nobody needs it. Arguments: `--data-dir`, `--runtime-dir`, and in
/// milliseconds `--stop-budget-ms`, `--linger-ms`, `--jump-grace-ms` (0: jumps do not matter).
/// Ends with 0, also if another guard has the data directory already.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let outcome = Args::parse(args)
        .map_err(io::Error::other)
        .and_then(Guard::new)
        .and_then(|guard| guard.map_or(Ok(()), Guard::run));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            discard::nowhere_to_report(writeln!(io::stderr(), "kornak guard: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// The socket in a runtime directory, by a path that is short however long the directory's is: the
/// address of a unix socket holds 107 bytes only.
pub(super) fn socket_path(runtime_dir: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", runtime_dir.as_raw_fd()))
}

/// The data directory as the kernel shows it as a working directory; it may not exist yet.
pub(super) fn real_path(data_dir: &Path) -> PathBuf {
    fs::canonicalize(data_dir).unwrap_or_else(|_| {
        let parent = data_dir.parent().and_then(|parent| fs::canonicalize(parent).ok());
        match (parent, data_dir.file_name()) {
            (Some(parent), Some(name)) => parent.join(name),
            _ => data_dir.to_owned(),
        }
    })
}

/// A postmaster that the guard watches.
struct Postmaster {
    pid: u32,
    handle: OwnedFd,
    adopted: bool,
    kept: Bequest,
}

/// The processes that must be gone.
struct Ending {
    since: Moment,
    /// GONE has been said.
    said: bool,
}

struct Client {
    stream: UnixStream,
    lines: Lines,
}

struct Guard {
    args: Args,
    /// [`real_path`] of the data directory.
    real_dir: PathBuf,
    origin: Origin,
    log: File,
    /// Not yet written to the log.
    notes: Vec<String>,
    runtime_dir: File,
    _lock: File,
    listener: UnixListener,
    timer: OwnedFd,
    client: Option<Client>,
    postmaster: Option<Postmaster>,
    last_exit: Option<Exit>,
    fence: Fence,
    reviver: Reviver,
    ending: Option<Ending>,
    /// Since when nobody has been connected and nothing has run.
    idle_since: Option<Moment>,
    /// Both clocks at the last look.
    clocks: (Moment, Duration),
}

impl Guard {
    /// `None`: another guard has this data directory.
    fn new(args: Args) -> io::Result<Option<Self>> {
        let runtime_dir = File::open(&args.runtime_dir)?;
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let lock = options.open(args.runtime_dir.join(LOCK))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        let log = options.open(args.runtime_dir.join(LOG))?;
        // It is the leader of its group only if started by a shell; then it has a session already.
        discard::only_helps(setsid());
        std::env::set_current_dir("/")?;
        ignore_requests_to_end();
        set_child_subreaper(Some(getpid()))?;
        let origin = become_important();
        let socket = socket_path(&runtime_dir);
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&socket)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC)?;
        Ok(Some(Self {
            real_dir: real_path(&args.data_dir),
            origin,
            log,
            notes: Vec::new(),
            runtime_dir,
            _lock: lock,
            listener,
            timer,
            client: None,
            postmaster: None,
            last_exit: None,
            fence: Fence::Disarmed,
            reviver: Reviver::new(&args.runtime_dir),
            args,
            ending: None,
            idle_since: None,
            clocks: (boottime_now(), realtime_now()),
        }))
    }

    fn run(mut self) -> io::Result<()> {
        self.note("started");
        loop {
            self.reap();
            self.enforce();
            self.watch_clocks();
            self.watch_agent();
            self.write_notes();
            if self.unneeded() {
                // The lock is held until the process has ended, so no other guard has bound it yet.
                discard::may_be_gone_already(fs::remove_file(socket_path(&self.runtime_dir)));
                self.note("ended: nobody is connected and nothing runs");
                self.write_notes();
                return Ok(());
            }
            self.wait_for_something()?;
        }
    }

    /// Stops, then kills whatever must not run. Called in each turn of the loop: level-triggered.
    fn enforce(&mut self) {
        let now = boottime_now();
        let late = self.fence.late(now);
        if !late && self.ending.is_none() {
            return;
        }
        if late && self.fence.fire() {
            self.say(&Answer::Fired);
            self.note("fired: the deadline has come");
            // Unlike a kill it lets the standbys have what was acknowledged.
            if let Err(error) = self.signal(Signal::INT) {
                self.note(&error);
            }
        }
        if self.is_draining(now) {
            return;
        }
        let first = self.postmaster.as_ref().map(|postmaster| postmaster.pid);
        let loggers = self.ending.as_ref().is_some_and(|e| now.since(e.since) >= LOGGER_GRACE);
        if !late && self.ending.as_ref().is_some_and(|ending| ending.said) {
            // All were gone: what runs now is a tool's, but for the logging collector.
            if kill_loggers(&self.real_dir, loggers) == 0 {
                self.ending = None;
            }
            return;
        }
        if first.is_some() {
            // By its handle: its number may be another process's by now.
            discard::may_be_gone_already(self.signal(Signal::KILL));
        }
        let mut left = kill_once(&self.real_dir, first, loggers);
        if late && self.ending.is_none() && (left > 0 || first.is_some()) {
            self.ending = Some(Ending { since: now, said: false });
        }
        self.reap();
        if left == 0 {
            // A process may have been born behind the first look's back.
            left = kill_once(&self.real_dir, None, loggers);
        }
        if left > 0 || self.postmaster.is_some() {
            return;
        }
        let Some(ending) = &mut self.ending else { return };
        if !ending.said {
            ending.said = true;
            self.say(&Answer::Gone);
        }
        if kill_loggers(&self.real_dir, loggers) == 0 {
            self.ending = None;
        }
    }

    /// A fast stop is under way, and there is still time for it.
    fn is_draining(&self, now: Moment) -> bool {
        matches!(self.fence, Fence::Fired { .. })
            && self.ending.is_none()
            && self.postmaster.is_some()
            && !self.fence.kills(now)
    }

    /// Collects the status of children: the postmaster, and orphans that the kernel gave us.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or_default();
            if self.postmaster.as_ref().is_some_and(|postmaster| postmaster.pid == pid) {
                self.postmaster_ended(pid, exit_of(status));
            }
            self.reviver.reaped(pid);
        }
        if let Some(postmaster) = &self.postmaster
            && postmaster.adopted
            && has_ended(&postmaster.handle)
        {
            self.postmaster_ended(postmaster.pid, Exit::Unknown);
        }
    }

    fn postmaster_ended(&mut self, pid: u32, exit: Exit) {
        self.postmaster = None;
        self.last_exit = Some(exit);
        if self.ending.is_none() {
            self.ending = Some(Ending { since: boottime_now(), said: false });
        }
        self.say(&Answer::Exited { pid, exit });
        self.note(&format!("postmaster {pid} ended: {exit}"));
    }

    fn watch_clocks(&mut self) {
        let (boot, real) = (boottime_now(), realtime_now());
        let (boot_before, real_before) = self.clocks;
        self.clocks = (boot, real);
        let Some(grace) = self.args.jump_grace else { return };
        let jump = real.saturating_sub(real_before).saturating_sub(boot.since(boot_before));
        if jump > JUMP && self.fence.fire_at().is_some() {
            self.fence.jumped(boot, grace);
            let millis = u64::try_from(jump.as_millis()).unwrap_or(u64::MAX);
            self.say(&Answer::Jumped { millis });
            self.note(&format!("the wall clock jumped by {millis} ms"));
        }
    }

    /// An agent that is silent while its server leads is replaced, unless the lease is as good as over.
    fn watch_agent(&mut self) {
        let now = boottime_now();
        let may_lead = self.postmaster.is_some()
            && self.ending.is_none()
            && matches!(self.fence.fire_at(), Some(end) if now < end);
        if let Some(what) = self.reviver.look(now, may_lead, &self.origin) {
            self.note(&what);
        }
    }

    fn unneeded(&mut self) -> bool {
        let now = boottime_now();
        let waiting_for_nothing = matches!(self.fence, Fence::Disarmed | Fence::Fired { .. });
        let idle = self.client.is_none()
            && self.postmaster.is_none()
            && self.ending.is_none()
            && waiting_for_nothing;
        if !idle {
            self.idle_since = None;
            return false;
        }
        let since = *self.idle_since.get_or_insert(now);
        now.since(since) >= self.args.linger
    }

    fn wait_for_something(&mut self) -> io::Result<()> {
        let value = self.fence.fire_at().map_or(Timespec::default(), timespec);
        let spec = Itimerspec { it_interval: Timespec::default(), it_value: value };
        // Absolute, on the clock that counts suspended time: it is due when a host wakes up.
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec)?;
        let look = match (&self.ending, &self.fence) {
            (Some(_), _) => KILLING_LOOK,
            _ if self.is_draining(boottime_now()) => KILLING_LOOK,
            (None, Fence::Fired { .. }) => FIRED_LOOK,
            (None, _) => IDLE_LOOK,
        };
        let mut fds = vec![
            PollFd::new(&self.listener, PollFlags::IN),
            PollFd::new(&self.timer, PollFlags::IN),
        ];
        if let Some(client) = &self.client {
            fds.push(PollFd::new(&client.stream, PollFlags::IN));
        }
        if let Some(postmaster) = &self.postmaster {
            fds.push(PollFd::new(&postmaster.handle, PollFlags::IN));
        }
        match poll(&mut fds, Some(&timespec(Moment::new(look)))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        // First what must not wait; requests are judged by the state after it.
        self.reap();
        self.enforce();
        self.accept();
        self.read_requests();
        Ok(())
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                self.reviver.connected(&stream);
                self.client = Some(Client { stream, lines: Lines::default() });
                self.say(&Answer::Hello { version: VERSION, pid: std::process::id() });
            }
        }
    }

    fn read_requests(&mut self) {
        let mut buffer = [0; 16 * 1024];
        while let Some(client) = &mut self.client {
            let lines = match client.stream.read(&mut buffer) {
                Ok(0) => None,
                Ok(length) => buffer.get(..length).and_then(|got| client.lines.push(got).ok()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => None,
            };
            let Some(lines) = lines else {
                self.client = None;
                return;
            };
            for line in lines {
                let answer = Command::parse(&line).and_then(|command| self.execute(command));
                self.say(&answer.map_or_else(Answer::Err, Answer::Ok));
            }
        }
    }

    fn execute(&mut self, command: Command) -> Result<String, String> {
        let now = boottime_now();
        match command {
            Command::Start(request) => self.start(&request).map(|pid| pid.to_string()),
            Command::Adopt(pid) => self.adopt(pid).map(|()| pid.to_string()),
            Command::Arm(deadline) => {
                self.fence.arm(deadline, now, self.args.stop_budget)?;
                Ok(String::new())
            }
            Command::Disarm => {
                self.fence.disarm(now, self.left())?;
                self.keep(String::new());
                Ok(String::new())
            }
            Command::Promote(fencing) => {
                self.fence.may_write(fencing, now)?;
                let file = self.real_dir.join("promote");
                File::create(&file).map_err(|error| format!("create promote file: {error}"))?;
                // The disk may have taken its time.
                if let Err(error) = self.fence.may_write(fencing, boottime_now()) {
                    discard::may_be_gone_already(fs::remove_file(&file));
                    return Err(error.to_owned());
                }
                self.signal(Signal::USR1)
            }
            Command::Signal(signal) => self.signal(match signal {
                ServerSignal::Smart => Signal::TERM,
                ServerSignal::Fast => Signal::INT,
                ServerSignal::Immediate => Signal::QUIT,
                ServerSignal::Reload => Signal::HUP,
                ServerSignal::Usr1 => Signal::USR1,
            }),
            Command::Kill => {
                self.ending = Some(Ending { since: now, said: false });
                Ok(String::new())
            }
            Command::Watch(timeout) => {
                self.reviver.watch(timeout, now)?;
                Ok(String::new())
            }
            Command::Beat { leads } => {
                self.reviver.beat(leads, now);
                Ok(String::new())
            }
            Command::Leave => {
                self.reviver.leave();
                Ok(String::new())
            }
            Command::Keep(text) => {
                self.keep(text);
                Ok(String::new())
            }
            Command::Kept => Ok(self.postmaster.as_ref().map_or_else(String::new, |postmaster| {
                postmaster.kept.shown(&self.fence, now, self.args.stop_budget)
            })),
            Command::Status => serde_json::to_string(&self.status()).map_err(|e| e.to_string()),
        }
    }

    fn start(&mut self, request: &StartRequest) -> Result<u32, String> {
        if let Some(postmaster) = &self.postmaster {
            return Err(format!("postmaster {} is running", postmaster.pid));
        }
        self.real_dir = real_path(&self.args.data_dir);
        if self.left() > 0 {
            return Err("processes of another server run on the data directory".to_owned());
        }
        let signal_file =
            ["standby.signal", "recovery.signal"].iter().any(|f| self.real_dir.join(f).exists());
        match request.writable {
            None if !signal_file => return Err("no standby.signal: it would be writable".into()),
            None if self.fence.late(boottime_now()) => return Err("the deadline has come".into()),
            None => {}
            Some(fencing) => self.fence.may_write(fencing, boottime_now())?,
        }
        let failed = |error: io::Error| format!("start {}: {error}", request.program.display());
        let mut child = spawn(request, &self.real_dir, &self.origin).map_err(failed)?;
        let pid = child.id();
        let handle = open_handle(pid).map_err(|error| {
            // It cannot be watched, so it must not run.
            discard::may_be_gone_already(child.kill());
            kill_once(&self.real_dir, Some(pid), true);
            failed(error)
        })?;
        self.postmaster =
            Some(Postmaster { pid, handle, adopted: false, kept: Bequest::default() });
        self.ending = None;
        self.note(&format!("postmaster {pid} started"));
        Ok(pid)
    }

    fn adopt(&mut self, pid: u32) -> Result<(), String> {
        match &self.postmaster {
            Some(postmaster) if postmaster.pid == pid => return Ok(()),
            Some(postmaster) => return Err(format!("postmaster {} is running", postmaster.pid)),
            None => {}
        }
        self.real_dir = real_path(&self.args.data_dir);
        let handle = open_handle(pid).map_err(|error| format!("process {pid}: {error}"))?;
        if !is_server_in(pid, &self.real_dir) {
            return Err(format!("process {pid} is no server on the data directory"));
        }
        self.postmaster = Some(Postmaster { pid, handle, adopted: true, kept: Bequest::default() });
        self.ending = None;
        self.note(&format!("postmaster {pid} adopted"));
        Ok(())
    }

    fn keep(&mut self, text: String) {
        if let Some(postmaster) = &mut self.postmaster {
            postmaster.kept = Bequest::new(text);
        }
    }

    fn signal(&self, signal: Signal) -> Result<String, String> {
        let postmaster = self.postmaster.as_ref().ok_or("no postmaster is running")?;
        pidfd_send_signal(&postmaster.handle, signal)
            .map_err(|error| format!("signal {}: {error}", postmaster.pid))?;
        Ok(String::new())
    }

    /// Server processes on the data directory, the logging collector not counted.
    fn left(&self) -> usize {
        let postmaster = self.postmaster.as_ref().map(|postmaster| postmaster.pid);
        // What cannot be seen is not known to be gone.
        processes_held(&self.real_dir, postmaster)
            .map_or(1, |found| found.iter().filter(|process| !process.logger).count())
    }

    fn status(&self) -> GuardStatus {
        GuardStatus {
            version: VERSION,
            guard_pid: std::process::id(),
            postmaster: self.postmaster.as_ref().map(|postmaster| postmaster.pid),
            adopted: self.postmaster.as_ref().is_some_and(|postmaster| postmaster.adopted),
            last_exit: self.last_exit,
            armed_ns: self.fence.deadline().map(nanos),
            fired: matches!(self.fence, Fence::Fired { .. }),
            left: u32::try_from(self.left()).unwrap_or(u32::MAX),
            now_ns: nanos(boottime_now()),
        }
    }

    /// A client that does not listen is dropped: nothing may block the guard.
    fn say(&mut self, answer: &Answer) {
        if let Some(client) = &mut self.client {
            let line = format!("{answer}\n");
            let sent = client.stream.write(line.as_bytes());
            if sent.ok() != Some(line.len()) {
                self.client = None;
            }
        }
    }

    /// For whoever wonders afterwards.
    fn note(&mut self, what: &str) {
        if self.notes.len() < MAX_NOTES {
            self.notes.push(format!("{} {what}", nanos(boottime_now())));
        }
    }

    /// Writes the notes down, unless something is to be killed: the disk may hang.
    fn write_notes(&mut self) {
        if self.ending.is_none() && !self.is_draining(boottime_now()) {
            for note in self.notes.drain(..) {
                discard::nowhere_to_report(writeln!(&self.log, "{note}"));
            }
        }
    }
}

fn open_handle(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn has_ended(handle: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(handle, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

fn exit_of(status: WaitStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Unknown,
    }
}

/// Makes it unlikely that the guard cannot run when it must; as far as it is allowed to.
fn become_important() -> Origin {
    let origin = Origin {
        nice: getpriority_process(None).unwrap_or_default(),
        oom_score: fs::read_to_string(OOM_SCORE).unwrap_or_default().trim().to_owned(),
    };
    discard::only_helps(fs::write(OOM_SCORE, "-1000"));
    discard::only_helps(setpriority_process(None, -20));
    // With a limit on locked memory, a lock on future pages would make allocations fail.
    let unlimited = geteuid().is_root() || getrlimit(Resource::Memlock).current.is_none();
    let future = if unlimited { MlockAllFlags::FUTURE } else { MlockAllFlags::empty() };
    discard::only_helps(mlockall(MlockAllFlags::CURRENT | future));
    origin
}
