//! A directory for one test, and the end of everything that runs in it.
//!
//! Three ways to end: the test passes and the directory is removed; it fails and the directory
//! stays, with the ends of its logs printed; it is killed (a runner's timeout) and a small shell
//! that waits for our end does the killing. In each of them every process that has the directory
//! as its working directory or in its arguments is gone afterwards: agents, guards and the servers
//! they started, which are not our children.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::process::{is_running, tail};

/// Waits for the end of its input, which is the end of the test, and kills what is left.
const REAPER: &str = r#"
cat >/dev/null
for round in 1 2 3 4 5; do
  found=no
  for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    [ "$pid" != "$$" ] || continue
    case "$(readlink "$process/cwd" 2>/dev/null) $(tr '\0' ' ' <"$process/cmdline" 2>/dev/null)" in
      *"$KORNAK_SCRATCH"*) kill -9 "$pid" 2>/dev/null && found=yes ;;
    esac
  done
  [ $found = yes ] || exit 0
  sleep 0.2
done
"#;

/// Lines of each log that are printed when a test fails.
const TAIL_LINES: usize = 40;

/// A directory that the OS user of the servers can reach.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    reaper: Child,
    passed: bool,
}

impl Scratch {
    /// Makes `/tmp/kornak-<name>-<random>`; `KORNAK_TEST_DIR` names another parent.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new(name: &str) -> Self {
        let parent = std::env::var_os("KORNAK_TEST_DIR").map_or("/tmp".into(), PathBuf::from);
        let path = tempfile::Builder::new()
            .prefix(&format!("kornak-{name}-"))
            .tempdir_in(&parent)
            .unwrap_or_else(|error| panic!("make a directory in {}: {error}", parent.display()))
            .keep();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
        let reaper = Command::new("/bin/sh")
            .args(["-c", REAPER])
            .env("KORNAK_SCRATCH", &path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .process_group(0)
            .spawn()
            .expect("a shell is on every machine");
        Self { path, reaper, passed: false }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path below.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a directory below that belongs to the user the servers run as.
    pub fn server_dir(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir_all(&path).expect("the scratch directory is ours");
        if let Some(user) = super::postgres::server_user() {
            std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid)).expect("we are root");
        }
        path
    }

    /// The test has passed: nothing needs to be shown or kept.
    pub fn passed(&mut self) {
        self.passed = true;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        kill_below(&self.path);
        // The reaper ends when its input does; nothing is left for it to do.
        drop(self.reaper.stdin.take());
        let _ = self.reaper.kill();
        let _ = self.reaper.wait();
        if self.passed && !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.path);
            return;
        }
        let mut out = std::io::stderr().lock();
        for log in logs_below(&self.path) {
            let _ = writeln!(out, "── {} ──\n{}", log.display(), tail(&log, TAIL_LINES));
        }
        let _ = writeln!(out, "kept for a look: {}", self.path.display());
    }
}

/// Ids of the processes that work in `dir` or name it in their arguments.
pub fn processes_below(dir: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let needle = dir.as_os_str().as_encoded_bytes();
    let mine = std::process::id();
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&pid| pid != mine)
        .filter(|pid| {
            let cwd = fs::read_link(format!("/proc/{pid}/cwd"));
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            cwd.is_ok_and(|cwd| cwd.starts_with(dir))
                || words.windows(needle.len()).any(|part| part == needle)
        })
        .collect()
}

/// Kills them until none is left, for at most five seconds.
pub fn kill_below(dir: &Path) {
    let start = Instant::now();
    loop {
        let pids = processes_below(dir);
        if pids.is_empty() || start.elapsed() > Duration::from_secs(5) {
            return;
        }
        for pid in pids {
            kill_and_await(pid);
        }
    }
}

/// Stops them (SIGSTOP) until each of them stands still: some end meanwhile, some have just begun.
///
/// # Panics
/// When they do not stand still within five seconds.
pub fn freeze_below(dir: &Path) {
    let start = Instant::now();
    loop {
        let moving: Vec<u32> =
            processes_below(dir).into_iter().filter(|pid| is_running(*pid)).collect();
        if moving.is_empty() {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{moving:?} do not stand still");
        for pid in moving {
            // One that has ended needs nothing.
            let _ = super::process::send(pid, Signal::STOP);
        }
    }
}

/// By a descriptor, so that a number given to another process meanwhile is never hit.
fn kill_and_await(pid: u32) {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&second));
}

fn logs_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                // PostgreSQL's own data: large, and no logs in it.
                if !["base", "global", "pg_wal", "member"].iter().any(|skip| name == *skip) {
                    todo.push(path);
                }
            } else if path.extension().is_some_and(|end| end == "log") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}
