//! One child process with a log file. Killed when dropped.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::wait::until;

/// Longer than it takes until a stopped process stands still, on a busy machine.
const STILL: Duration = Duration::from_secs(5);

/// A running (or already ended) child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    started: Instant,
}

impl Process {
    /// Starts `command` with both its outputs appended to `log`, in a process group of its own, so
    /// that a Ctrl-C at the test's terminal is handled by the test alone.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let out = append(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone().context("share the log file")?)
            .stderr(out)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {:?}", command.get_program()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), started: Instant::now() })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal; an error means that the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        send(self.pid(), signal).with_context(|| format!("signal {} of {}", self.pid(), self.name))
    }

    /// SIGSTOP, and returns when it stands still.
    pub fn freeze(&self) -> Result<()> {
        freeze(self.pid()).with_context(|| format!("freeze {} of {}", self.pid(), self.name))
    }

    /// Kills it and collects it.
    pub fn kill(&mut self) {
        // Both fail only if the process has been collected before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// `None` while it runs.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for it to end by itself.
    pub async fn exit(&mut self, limit: Duration) -> ExitStatus {
        let (name, log) = (self.name.clone(), self.log.clone());
        let child = std::cell::RefCell::new(&mut self.child);
        until(limit, &format!("the exit of {name}"), || async {
            match child.borrow_mut().try_wait() {
                Ok(Some(status)) => Ok(status),
                Ok(None) => Err(format!("still running; its log ends in:\n{}", tail(&log, 5))),
                Err(error) => Err(error.to_string()),
            }
        })
        .await
    }

    /// Asks it to end and waits until it has.
    pub async fn terminate(&mut self, limit: Duration) -> ExitStatus {
        // Gone already: exit() finds out.
        let _ = self.signal(Signal::TERM);
        self.exit(limit).await
    }

    /// The last lines of its log.
    pub fn tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Sends a signal to any process by its id.
pub fn send(pid: u32, signal: Signal) -> Result<()> {
    let raw = i32::try_from(pid).context("a process id out of range")?;
    let pid = Pid::from_raw(raw).context("process id 0")?;
    Ok(kill_process(pid, signal)?)
}

/// SIGSTOP, and returns when none of its threads runs any more: on a busy machine a thread goes on
/// for tens of milliseconds after the signal was sent, and answers what it is asked.
///
/// # Panics
/// When it does not stand still within five seconds.
pub fn freeze(pid: u32) -> Result<()> {
    send(pid, Signal::STOP)?;
    let start = Instant::now();
    while is_running(pid) {
        assert!(start.elapsed() < STILL, "{pid} does not stand still");
        std::thread::yield_now();
    }
    Ok(())
}

/// Whether such a process exists and is not a zombie.
pub fn is_alive(pid: u32) -> bool {
    state(pid).is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Whether one of its threads is alive and not stopped by a signal.
pub fn is_running(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads
        .flatten()
        .filter_map(|thread| state_in(&thread.path().join("stat")))
        .any(|state| !matches!(state, 'Z' | 'X' | 'T' | 't'))
}

fn state(pid: u32) -> Option<char> {
    state_in(Path::new(&format!("/proc/{pid}/stat")))
}

/// The letter of proc(5).
fn state_in(stat: &Path) -> Option<char> {
    let stat = fs::read_to_string(stat).ok()?;
    // The name in parentheses may hold anything, the state follows the last one.
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// The last `lines` of a file, or nothing.
pub fn tail(file: &Path, lines: usize) -> String {
    let bytes = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn append(log: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    options.open(log).with_context(|| format!("open {}", log.display()))
}
