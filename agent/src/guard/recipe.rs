//! How to start an agent again: as the kernel shows that it was started.
//!
//! The guard reads the recipe from `/proc` while the agent lives: program, arguments, environment, working directory, and
//! where it writes its log. The environment may hold passwords; it stays in the guard's memory, which is not swapped
//! out, and is given to nothing but the new agent.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use kornak_cluster::discard;
use rustix::fs::{Mode, OFlags};
use rustix::process::{setpriority_process, setsid};

use super::kill::alive_name;
use super::spawn::{Origin, accept_requests_to_end};

/// Arguments and environment together; Linux takes no more from a program with the usual limits.
const MAX_BYTES: u64 = 2 * 1024 * 1024;
/// Takes the log where the old one's is out of reach: a socket, or a pipe whose writer is gone.
const LOG: &str = "agent.log";

/// How an agent was started.
pub(super) struct Recipe {
    pid: u32,
    program: PathBuf,
    args: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    folder: PathBuf,
    /// Standard output and error, where they can be opened without keeping somebody from seeing their end.
    outputs: [Option<File>; 2],
}

impl Recipe {
    /// Reads how a process was started.
    pub(super) fn read(pid: u32) -> io::Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let program = alive_name(fs::read_link(proc.join("exe"))?.as_os_str());
        let environment = words(&proc.join("environ"))?
            .iter()
            .filter_map(|word| {
                let at = word.as_bytes().iter().position(|byte| *byte == b'=')?;
                let (name, value) = word.as_bytes().split_at(at);
                let value = value.get(1..)?;
                Some((OsStr::from_bytes(name).to_owned(), OsStr::from_bytes(value).to_owned()))
            })
            .collect();
        Ok(Self {
            pid,
            program,
            args: words(&proc.join("cmdline"))?,
            environment,
            folder: fs::read_link(proc.join("cwd"))?,
            outputs: [1, 2].map(|number| lasting(&proc, number)),
        })
    }

    /// systemd starts it again by itself; two of them would be one too many.
    pub(super) fn is_a_service(&self) -> bool {
        let is = |name: &str, is: &dyn Fn(&OsStr) -> bool| {
            self.environment.iter().any(|(known, value)| known == name && is(value))
        };
        is("NOTIFY_SOCKET", &|_| true)
            || is("SYSTEMD_EXEC_PID", &|pid| pid == OsStr::new(&self.pid.to_string()))
    }

    /// Where the process, if it is there, writes to: what is only open in it is lost with it.
    pub(super) fn outputs(&self, runtime_dir: &Path) -> io::Result<[File; 2]> {
        let proc = PathBuf::from(format!("/proc/{}", self.pid));
        let open = |number: u8, kept: &Option<File>| match kept {
            Some(file) => file.try_clone(),
            None => again(&proc, number).map_or_else(|| own_log(runtime_dir), Ok),
        };
        let [out, err] = &self.outputs;
        Ok([open(1, out)?, open(2, err)?])
    }

    /// Starts an agent in place of the one that was.
    #[expect(unsafe_code, reason = "code between fork and exec: only system calls, no allocation")]
    pub(super) fn start(&self, origin: &Origin, [out, err]: [File; 2]) -> io::Result<Child> {
        let (first, rest) = match self.args.split_first() {
            Some((first, rest)) => (first.as_os_str(), rest),
            None => (self.program.as_os_str(), &[][..]),
        };
        let mut command = Command::new(&self.program);
        command
            .arg0(first)
            .args(rest)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err);
        let Origin { nice, oom_score } = origin.clone();
        let before_exec = move || {
            // It has nothing to do with the guard's terminal, which is none.
            setsid()?;
            discard::only_helps(setpriority_process(None, nice));
            let score =
                rustix::fs::open(c"/proc/self/oom_score_adj", OFlags::WRONLY, Mode::empty());
            if let Ok(file) = score {
                discard::only_helps(rustix::io::write(&file, oom_score.as_bytes()));
            }
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
}

/// The words of a file of `/proc`, which end in a zero byte each.
fn words(path: &Path) -> io::Result<Vec<OsString>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("longer than a command line can be"));
    }
    let mut words: Vec<OsString> =
        bytes.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
    // What follows the last zero byte.
    words.pop();
    Ok(words)
}

/// A regular file or a device. A pipe's reader would not see its end if the guard kept it open.
fn lasting(proc: &Path, number: u8) -> Option<File> {
    let kind = fs::metadata(proc.join(format!("fd/{number}"))).ok()?.file_type();
    (kind.is_file() || kind.is_char_device()).then(|| again(proc, number)).flatten()
}

/// Opens what another process writes to. A socket cannot be opened.
fn again(proc: &Path, number: u8) -> Option<File> {
    let flags = (OFlags::NOCTTY | OFlags::NONBLOCK).bits().cast_signed();
    let mut options = OpenOptions::new();
    let file = options.append(true).custom_flags(flags).open(proc.join(format!("fd/{number}")));
    let file = file.ok()?;
    // Not to wait for a reader of a pipe was for the opening alone.
    let flags = rustix::fs::fcntl_getfl(&file).ok()?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).ok()?;
    Some(file)
}

fn own_log(runtime_dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).mode(0o600);
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(runtime_dir.join(LOG))
}
