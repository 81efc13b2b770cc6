//! The agent's side of the guard.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{Moment, discard};
use rustix::fs::{Mode, OFlags, fchown, open};
use rustix::process::{Gid, Uid, geteuid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{error, info, warn};

use super::serve::socket_path;
use super::wire::{
    Answer, Command, Exit, Fencing, GuardStatus, Kept, Lines, ServerSignal, StartRequest, VERSION,
};

/// The guard answers at once; only a START waits for a disk.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// For a guard to start and to listen.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to connect to a guard that is starting or ending.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);
/// Requests that wait for their turn. An agent asks one thing at a time from a few tasks.
const MAX_WAITING_REQUESTS: usize = 16;

/// Which guard, and how to start it if it is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardConfig {
    /// The program; it is called with `guard` as its first argument. Default: this one.
    pub program: PathBuf,
    pub data_dir: PathBuf,
    /// Lock, socket and log. Default: `<data_dir>.guard`, created with mode 0700.
    pub runtime_dir: PathBuf,
    /// Killing begins so long before the deadline. Default 1 s.
    pub stop_budget: Duration,
    /// A guard that is of no use lives on for so long. Default 10 s.
    pub linger: Duration,
    /// If the wall clock jumps while armed, the lease must be proven again within this time
    /// (see [`GuardClient::jumps`]). Default `None`: jumps do not matter.
    pub jump_grace: Option<Duration>,
}

impl GuardConfig {
    /// The defaults for a data directory.
    pub fn new(data_dir: &Path) -> Self {
        let mut runtime_dir = data_dir.as_os_str().to_owned();
        runtime_dir.push(".guard");
        Self {
            program: own_program(),
            data_dir: data_dir.to_owned(),
            runtime_dir: PathBuf::from(runtime_dir),
            stop_budget: Duration::from_secs(1),
            linger: Duration::from_secs(10),
            jump_grace: None,
        }
    }
}

/// This program, also after an upgrade has removed it from under us.
fn own_program() -> PathBuf {
    let named = std::env::current_exe().ok().filter(|program| program.exists());
    named.unwrap_or_else(|| PathBuf::from("/proc/self/exe"))
}

/// Why the guard did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The runtime directory cannot be made or opened.
    #[error(
        "prepare {dir} for the guard: make it writable or name another directory with kornak.state_dir"
    )]
    RuntimeDir {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The program cannot be run.
    #[error("start the guard {program}")]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Nobody greets on the socket in time. A guard that hangs must be killed by hand: nothing
    /// else stops a primary of its in time.
    #[error("no guard answers in {dir}: see guard.log there, and end a guard that hangs")]
    NoAnswer { dir: PathBuf },
    /// The guard speaks another version of the protocol.
    #[error("the guard {pid} speaks version {version}: stop the server and end that guard first")]
    Version { version: u32, pid: u32 },
    /// The guard has ended or talks to another agent. A server that it held has been stopped, unless
    /// another agent is connected.
    #[error("the connection to the guard is lost")]
    Lost,
    /// The guard took too long; whether the command was done is unknown.
    #[error("the guard has not answered {command} in time")]
    Timeout { command: &'static str },
    /// The guard has refused the command.
    #[error("the guard refuses {command}: {why}")]
    Refused { command: &'static str, why: String },
}

/// The state of the postmaster as the guard has seen it. [`GuardClient::watch`] shows the latest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watched {
    /// No postmaster is held.
    Nothing,
    Running {
        pid: u32,
    },
    /// The postmaster has ended, the other processes are being killed.
    Ending {
        pid: u32,
        exit: Exit,
    },
    /// The postmaster has ended and no process is left on the data directory.
    Gone {
        pid: u32,
        exit: Exit,
    },
    /// The guard has ended, or another agent has taken our place: connect again.
    Lost,
}

impl Watched {
    /// The postmaster, while it runs.
    pub fn running(self) -> Option<u32> {
        match self {
            Self::Running { pid } => Some(pid),
            _ => None,
        }
    }
}

struct Request {
    command: Command,
    answer: oneshot::Sender<Result<String, String>>,
}

/// A connection to the guard of one data directory. Clones share it. When it is lost
/// ([`Watched::Lost`]) it stays lost.
#[derive(Clone)]
pub struct GuardClient {
    requests: mpsc::Sender<Request>,
    watched: Arc<watch::Sender<Watched>>,
    jumps: watch::Receiver<u64>,
    fired: watch::Receiver<bool>,
    pid: u32,
}

impl fmt::Debug for GuardClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardClient")
            .field("pid", &self.pid)
            .field("watched", &*self.watched.borrow())
            .finish_non_exhaustive()
    }
}

impl GuardClient {
    /// Connects to the guard of the data directory; starts it if there is none. Takes the place of
    /// another client. Takes 5 s at most.
    pub async fn connect_or_start(config: &GuardConfig) -> Result<Self, GuardError> {
        let dir = open_runtime_dir(&config.runtime_dir)
            .map_err(|source| GuardError::RuntimeDir { dir: config.runtime_dir.clone(), source })?;
        let no_answer = || GuardError::NoAnswer { dir: config.runtime_dir.clone() };
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let mut child: Option<tokio::process::Child> = None;
        while Instant::now() < deadline {
            if let Ok(stream) = UnixStream::connect(socket_path(&dir)).await {
                match timeout_at(deadline, Self::greet(stream)).await {
                    // It was just ending: try the next.
                    Ok(Err(GuardError::Lost)) => {}
                    Ok(outcome) => return outcome,
                    Err(_) => return Err(no_answer()),
                }
            } else if child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None))) {
                child = Some(spawn(config)?);
            }
            sleep(CONNECT_PAUSE).await;
        }
        Err(no_answer())
    }

    async fn greet(stream: UnixStream) -> Result<Self, GuardError> {
        let (mut reader, writer) = stream.into_split();
        let mut lines = Lines::default();
        let mut early = Vec::new();
        while early.is_empty() {
            early = read_lines(&mut reader, &mut lines).await.ok_or(GuardError::Lost)?;
        }
        let Some(Answer::Hello { version, pid }) = Answer::parse(&early.remove(0)) else {
            return Err(GuardError::Lost);
        };
        if version != VERSION {
            return Err(GuardError::Version { version, pid });
        }
        let (requests, waiting) = mpsc::channel(MAX_WAITING_REQUESTS);
        let (watched, _) = watch::channel(Watched::Nothing);
        let watched = Arc::new(watched);
        let (jumped, jumps) = watch::channel(0);
        let (has_fired, fired) = watch::channel(false);
        let line = Line {
            reader,
            writer,
            lines,
            waiting,
            watched: Arc::clone(&watched),
            jumped,
            has_fired,
        };
        tokio::spawn(line.run(early));
        let client = Self { requests, watched, jumps, fired, pid };
        let status = client.status().await?;
        if let Some(pid) = status.postmaster {
            client.saw_running(pid);
        }
        Ok(client)
    }

    /// Process id of the guard.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Memory of the guard that cannot be paged out, in KiB (`VmLck` of proc(5)). With 0 a disk that
    /// hangs could keep the guard from acting. `None`: the guard is gone.
    pub fn locked_kib(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"))?;
        locked.trim().strip_suffix("kB")?.trim().parse().ok()
    }

    /// Watches the postmaster; changes show within milliseconds.
    pub fn watch(&self) -> watch::Receiver<Watched> {
        self.watched.subscribe()
    }

    /// Counts the jumps of the wall clock. After one, a lease that is not proven and armed again within
    /// [`GuardConfig::jump_grace`] is over.
    pub fn jumps(&self) -> watch::Receiver<u64> {
        self.jumps.clone()
    }

    /// Turns true when the deadline has come and the guard kills.
    pub fn fired(&self) -> watch::Receiver<bool> {
        self.fired.clone()
    }

    /// The guard has ended, or another agent has taken our place.
    pub fn is_lost(&self) -> bool {
        *self.watched.borrow() == Watched::Lost
    }

    /// Starts the postmaster and returns its pid; it is not ready yet.
    pub async fn start(&self, request: StartRequest) -> Result<u32, GuardError> {
        let answer = self.ask("START", Command::Start(Box::new(request))).await?;
        let pid =
            answer.parse().map_err(|_| GuardError::Refused { command: "START", why: answer })?;
        self.saw_running(pid);
        Ok(pid)
    }

    /// Holds a postmaster that somebody else has started.
    pub async fn adopt(&self, pid: u32) -> Result<(), GuardError> {
        self.ask("ADOPT", Command::Adopt(pid)).await?;
        self.saw_running(pid);
        Ok(())
    }

    /// This node may be primary until `deadline`. When this returns without an error, whatever is
    /// writable then is killed in time.
    pub async fn arm(&self, deadline: Moment) -> Result<(), GuardError> {
        self.ask("ARM", Command::Arm(deadline)).await.map(drop)
    }

    /// The server is proven stopped, or in recovery with no promotion under way; or the cluster is
    /// paused.
    pub async fn disarm(&self) -> Result<(), GuardError> {
        self.ask("DISARM", Command::Disarm).await.map(drop)
    }

    /// Asks the server to end recovery. Refused if the deadline has come, or if not armed.
    pub async fn promote(&self, fencing: Fencing) -> Result<(), GuardError> {
        self.ask("PROMOTE", Command::Promote(fencing)).await.map(drop)
    }

    /// Signals the postmaster.
    pub async fn signal(&self, signal: ServerSignal) -> Result<(), GuardError> {
        self.ask("SIGNAL", Command::Signal(signal)).await.map(drop)
    }

    /// Kills every process on the data directory; [`Watched::Gone`] follows if one was held.
    pub async fn kill_all(&self) -> Result<(), GuardError> {
        self.ask("KILL", Command::Kill).await.map(drop)
    }

    /// Everything that the guard knows, looked at now.
    pub async fn status(&self) -> Result<GuardStatus, GuardError> {
        let answer = self.ask("STATUS", Command::Status).await?;
        serde_json::from_str(&answer)
            .map_err(|error| GuardError::Refused { command: "STATUS", why: error.to_string() })
    }

    /// Asks to be ended and started again when this process is silent for `timeout` while its server leads. A guard
    /// of an earlier release refuses.
    pub(super) async fn watch_agent(&self, timeout: Duration) -> Result<(), GuardError> {
        self.ask("WATCH", Command::Watch(timeout)).await.map(drop)
    }

    /// This process lives.
    pub(super) async fn beat(&self, leads: bool) -> Result<(), GuardError> {
        self.ask("BEAT", Command::Beat { leads }).await.map(drop)
    }

    /// This process ends because somebody has asked it to.
    pub(super) async fn leave(&self) -> Result<(), GuardError> {
        self.ask("LEAVE", Command::Leave).await.map(drop)
    }

    /// Leaves a text to the next agent; it is there for as long as the postmaster lives and the guard is armed.
    /// Empty: nothing is left. A guard of an earlier release keeps nothing, which is no error.
    pub async fn keep(&self, text: String) -> Result<(), GuardError> {
        match self.ask("KEEP", Command::Keep(text)).await {
            Err(GuardError::Refused { .. }) => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// The text that an agent has left with the server that runs now, if the deadline that it armed has not come.
    pub async fn kept(&self) -> Result<Option<Kept>, GuardError> {
        let answer = match self.ask("KEPT", Command::Kept).await {
            Err(GuardError::Refused { .. }) => return Ok(None),
            answer => answer?,
        };
        Ok(serde_json::from_str(&answer).ok())
    }

    async fn ask(&self, word: &'static str, command: Command) -> Result<String, GuardError> {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.requests.send(Request { command, answer }).await.map_err(|_| GuardError::Lost)?;
            answered.await.map_err(|_| GuardError::Lost)
        };
        match timeout(ANSWER_TIMEOUT, asked).await {
            Ok(answer) => answer?.map_err(|why| GuardError::Refused { command: word, why }),
            Err(_) => Err(GuardError::Timeout { command: word }),
        }
    }

    /// Unless it has ended already: that news may have come first.
    fn saw_running(&self, pid: u32) {
        self.watched.send_if_modified(|watched| {
            let news = match *watched {
                Watched::Ending { pid: ended, .. } | Watched::Gone { pid: ended, .. } => {
                    ended != pid
                }
                Watched::Nothing => true,
                Watched::Running { pid: running } => running != pid,
                Watched::Lost => false,
            };
            if news {
                *watched = Watched::Running { pid };
            }
            news
        });
    }
}

/// Makes the directory of lock, socket and logs, if need be.
pub(crate) fn make_runtime_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if !geteuid().is_root() {
        return Ok(());
    }
    // Who may write next to it may have put a link there, or a directory of its own.
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let found = File::from(open(dir, flags, Mode::empty())?);
    if found.metadata()?.uid() != 0 {
        fchown(&found, Some(Uid::ROOT), Some(Gid::ROOT))?;
        found.set_permissions(fs::Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn open_runtime_dir(dir: &Path) -> io::Result<File> {
    make_runtime_dir(dir)?;
    // An absolute path, for the guard has another working directory.
    File::open(fs::canonicalize(dir)?)
}

fn spawn(config: &GuardConfig) -> Result<tokio::process::Child, GuardError> {
    let failed = |source| GuardError::Spawn { program: config.program.clone(), source };
    let runtime_dir = fs::canonicalize(&config.runtime_dir).map_err(failed)?;
    let data_dir = std::path::absolute(&config.data_dir).map_err(failed)?;
    let millis = |duration: Duration| duration.as_millis().to_string();
    let mut command = tokio::process::Command::new(&config.program);
    // What the guard does not have, the server does not get.
    super::hide_settings(&mut command);
    let child = command
        .arg("guard")
        .arg("--data-dir")
        .arg(data_dir)
        .arg("--runtime-dir")
        .arg(runtime_dir)
        .args(["--stop-budget-ms", &millis(config.stop_budget)])
        .args(["--linger-ms", &millis(config.linger)])
        .args(["--jump-grace-ms", &millis(config.jump_grace.unwrap_or_default())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(false)
        .spawn()
        .map_err(failed)?;
    info!(guard = child.id(), "guard started");
    Ok(child)
}

/// The task that owns the socket.
struct Line {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    lines: Lines,
    waiting: mpsc::Receiver<Request>,
    watched: Arc<watch::Sender<Watched>>,
    jumped: watch::Sender<u64>,
    has_fired: watch::Sender<bool>,
}

impl Line {
    async fn run(mut self, early: Vec<String>) {
        let mut owed = None;
        for line in early {
            self.heard(&line, &mut owed);
        }
        loop {
            tokio::select! {
                read = read_lines(&mut self.reader, &mut self.lines) => match read {
                    Some(lines) => lines.iter().for_each(|line| self.heard(line, &mut owed)),
                    None => break,
                },
                // One request at a time: the guard's answers carry no number.
                request = self.waiting.recv(), if owed.is_none() => match request {
                    Some(Request { command, answer }) => {
                        let line = format!("{command}\n");
                        if self.writer.write_all(line.as_bytes()).await.is_err() {
                            break;
                        }
                        owed = Some(answer);
                    }
                    None => return,
                },
            }
        }
        warn!("connection to the guard lost");
        self.watched.send_replace(Watched::Lost);
    }

    fn heard(&self, line: &str, owed: &mut Option<oneshot::Sender<Result<String, String>>>) {
        match Answer::parse(line) {
            Some(Answer::Ok(text)) => answer(owed, Ok(text)),
            Some(Answer::Err(why)) => answer(owed, Err(why)),
            Some(Answer::Exited { pid, exit }) => {
                info!(pid, %exit, "postmaster ended");
                self.watched.send_replace(Watched::Ending { pid, exit });
            }
            Some(Answer::Gone) => {
                self.watched.send_if_modified(|watched| match *watched {
                    Watched::Ending { pid, exit } => {
                        *watched = Watched::Gone { pid, exit };
                        true
                    }
                    _ => false,
                });
            }
            Some(Answer::Fired) => {
                error!("lease was not proven in time, guard kills the server");
                self.has_fired.send_replace(true);
            }
            Some(Answer::Jumped { millis }) => {
                warn!(elapsed_ms = millis, "wall clock jumped");
                self.jumped.send_modify(|jumps| *jumps += 1);
            }
            Some(Answer::Hello { .. }) | None => {}
        }
    }
}

fn answer(
    owed: &mut Option<oneshot::Sender<Result<String, String>>>,
    answer: Result<String, String>,
) {
    if let Some(owed) = owed.take() {
        // Whoever asked may have given up.
        discard::receiver_may_be_gone(owed.send(answer));
    }
}

/// Waits for at least some bytes. `None`: the connection is over.
async fn read_lines(reader: &mut OwnedReadHalf, lines: &mut Lines) -> Option<Vec<String>> {
    let mut buffer = [0; 4096];
    match reader.read(&mut buffer).await {
        Ok(length) if length > 0 => lines.push(buffer.get(..length)?).ok(),
        _ => None,
    }
}
