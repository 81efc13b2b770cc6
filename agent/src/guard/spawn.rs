//! Starts a postmaster so that it cannot outlive the guard.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use kornak_cluster::discard;
use rustix::fs::{OFlags, fchown};
use rustix::process::{
    Gid, Signal, Uid, getpid, getppid, set_parent_process_death_signal, setpriority_process,
};

use super::account::run_as;
use super::wire::StartRequest;

/// Where a process says how willingly the kernel may kill it when memory is short.
pub(super) const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// The guard's own priority and limits before it raised them, for its children.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) nice: i32,
    pub(super) oom_score: String,
}

const ARENAS: &str = "PG_MALLOC_ARENA_MAX";

/// Starts the postmaster and returns its pid; it is not waited for.
#[expect(unsafe_code, reason = "code between fork and exec: only system calls, no allocation")]
pub(super) fn spawn(
    request: &StartRequest,
    data_dir: &Path,
    origin: &Origin,
) -> io::Result<std::process::Child> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    // The folder may have been the server's account's once.
    let log = options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(&request.log)?;
    let (uid, gid) = (request.uid.map(Uid::from_raw), request.gid.map(Gid::from_raw));
    if uid.is_some() || gid.is_some() {
        fchown(&log, uid, gid)?;
    }
    let mut command = Command::new(&request.program);
    command
        .args(&request.args)
        .envs(&request.env)
        .env("PG_OOM_ADJUST_FILE", OOM_SCORE)
        .env("PG_OOM_ADJUST_VALUE", &origin.oom_score)
        .current_dir(data_dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // Before what follows: a change of the account would take back the signal that the server gets at our death.
    if let (Some(uid), Some(gid)) = (request.uid, request.gid) {
        run_as(&mut command, uid, gid, &request.groups);
    }
    // As Patroni: glibc's arenas of a server may be limited without limiting the agent's.
    if let Some(arenas) = std::env::var_os(ARENAS) {
        command.env("MALLOC_ARENA_MAX", arenas).env_remove(ARENAS);
    }
    let guard = getpid();
    let nice = origin.nice;
    let before_exec = move || {
        // SIGQUIT is an immediate shutdown: the postmaster takes its children with it.
        set_parent_process_death_signal(Some(Signal::QUIT))?;
        if getppid() != Some(guard) {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe));
        }
        // A server that runs as another user may not be allowed to; then it stays important.
        discard::only_helps(setpriority_process(None, nice));
        accept_requests_to_end();
        Ok(())
    };
    // SAFETY: the closure runs in the forked child before exec and makes system calls only; it
    // neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(before_exec);
    }
    command.spawn()
}

/// For a child of the guard's, before it runs its program: what is ignored stays ignored.
#[expect(unsafe_code, reason = "std and rustix have no way to reset a signal")]
pub(super) fn accept_requests_to_end() {
    for signal in REQUESTS_TO_END {
        // SAFETY: `signal` of the C library; the default disposition runs no code.
        unsafe {
            set_disposition(signal.as_raw(), DEFAULT);
        }
    }
}

/// A guard ends when it is of no more use, not when a service manager, a terminal or a whole process
/// group is told to end: with it the server would end.
#[expect(unsafe_code, reason = "std and rustix have no way to ignore a signal")]
pub(super) fn ignore_requests_to_end() {
    for signal in REQUESTS_TO_END {
        // SAFETY: `signal` of the C library; an ignored signal runs no code.
        unsafe {
            set_disposition(signal.as_raw(), IGNORE);
        }
    }
}

const REQUESTS_TO_END: [Signal; 4] = [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT];
/// `SIG_DFL` and `SIG_IGN` of Linux.
const DEFAULT: usize = 0;
const IGNORE: usize = 1;

#[expect(unsafe_code, reason = "std and rustix have no way to ignore a signal")]
unsafe extern "C" {
    #[link_name = "signal"]
    fn set_disposition(signal: i32, disposition: usize) -> usize;
}
