//! Which processes run on a data directory, and how to end them.
//!
//! A postmaster makes its data directory the working directory of every process it starts, and each of
//! them has a session of its own, so neither a process group nor the family tree finds them all; the
//! working directory does. Only server programs count: an administrator's shell that happens to stand
//! in the directory cannot commit anything. The logging collector does not count either: it writes
//! nothing but the log, and must live a moment longer to write why the server ended.
//!
//! Nothing here touches the disk that the data directory is on, which may hang: `/proc` is enough.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kornak_cluster::discard;
use rustix::process::{Pid, Signal, kill_process};

use super::mounts;

/// A process that runs on a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    /// The logging collector, which ends by itself after all the others.
    pub logger: bool,
}

/// The ending that the kernel appends to the name of a file that has been deleted.
const DELETED: &[u8] = b" (deleted)";

/// Server processes whose working directory is `data_dir` (absolute, without symbolic links),
/// whoever started them. Zombies have no working directory and are not among them.
///
/// # Errors
/// `/proc` cannot be read, so nothing is known.
pub fn processes_in(data_dir: &Path) -> io::Result<Vec<Process>> {
    find(data_dir, &[])
}

/// The processes of [`processes_in`], and server processes that the kernel has given to this
/// process as the nearest that cares for orphans: the directory may have been renamed under them.
/// Only for who starts no other servers. Children of `postmaster` count as well: where their
/// programs have capabilities the kernel does not show their directory.
pub(super) fn processes_held(data_dir: &Path, postmaster: Option<u32>) -> io::Result<Vec<Process>> {
    let parents: Vec<u32> = [Some(std::process::id()), postmaster].into_iter().flatten().collect();
    find(data_dir, &parents)
}

fn find(data_dir: &Path, parents: &[u32]) -> io::Result<Vec<Process>> {
    let entries = fs::read_dir("/proc")?;
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let proc = entry.path();
        let is_ours = runs_in(&proc, data_dir) || is_child(&proc, parents);
        if is_ours && is_server(&proc) {
            found.push(Process { pid, logger: is_logger(&proc) });
        }
    }
    Ok(found)
}

/// Whether this process is a server on `data_dir`.
pub(super) fn is_server_in(pid: u32, data_dir: &Path) -> bool {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    runs_in(&proc, data_dir) && is_server(&proc)
}

fn runs_in(proc: &Path, data_dir: &Path) -> bool {
    let cwd = fs::read_link(proc.join("cwd"));
    cwd.is_ok_and(|cwd| alive_name(cwd.as_os_str()) == data_dir)
        && mounts::is_same_directory(proc, data_dir)
}

/// A living one: zombies are only waited for.
fn is_child(proc: &Path, parents: &[u32]) -> bool {
    if parents.is_empty() {
        return false;
    }
    let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
    let mut fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
    let mut field = || fields.as_mut()?.next();
    let state = field();
    let parent = field().and_then(|field| field.parse().ok());
    state != Some("Z") && parent.is_some_and(|parent| parents.contains(&parent))
}

/// By the name of its program; one that cannot be read counts, to be on the safe side.
fn is_server(proc: &Path) -> bool {
    match fs::read_link(proc.join("exe")) {
        Ok(exe) => {
            let name = alive_name(exe.as_os_str());
            let name = name.file_name().map(OsStr::as_bytes).unwrap_or_default();
            name.windows(8).any(|part| part == b"postgres") || name == b"postmaster"
        }
        Err(_) => true,
    }
}

/// `postgres: logger`, or `postgres: <cluster_name>: logger`, padded.
fn is_logger(proc: &Path) -> bool {
    let title = fs::read(proc.join("cmdline")).unwrap_or_default();
    let title = title.split(|byte| *byte == 0).next().unwrap_or_default().trim_ascii();
    title.starts_with(b"postgres: ") && title.ends_with(b": logger")
}

pub(super) fn alive_name(name: &OsStr) -> PathBuf {
    let bytes = name.as_bytes();
    PathBuf::from(OsStr::from_bytes(bytes.strip_suffix(DELETED).unwrap_or(bytes)))
}

/// Kills what runs on the data directory, the postmaster's children included. Returns how many are still there,
/// loggers not counted; a logger is only killed `with_loggers`. What cannot be seen is not known to be gone.
pub(super) fn kill_once(data_dir: &Path, postmaster: Option<u32>, with_loggers: bool) -> usize {
    let Ok(found) = processes_held(data_dir, postmaster) else { return 1 };
    for process in &found {
        if !process.logger || with_loggers {
            kill(process.pid);
        }
    }
    found.iter().filter(|process| !process.logger).count()
}

/// Counts logging collectors on the data directory; kills them if their time has come.
pub(super) fn kill_loggers(data_dir: &Path, now: bool) -> usize {
    let Ok(mut found) = processes_held(data_dir, None) else { return 1 };
    found.retain(|process| process.logger);
    if now {
        for process in &found {
            kill(process.pid);
        }
    }
    found.len()
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended meanwhile; the next look will tell.
        discard::may_be_gone_already(kill_process(pid, Signal::KILL));
    }
}
