//! One tool at a time on a data directory, and no server on one that a tool has left half done. Both
//! hold across deaths of the agent: a tool that outlives its agent keeps its claim, for the lock is on
//! its standard input; and what it was about is written down, in the data directory ([`super::marker`]) or,
//! where a tool would remove that, beside it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{FlockOperation, OFlags, flock};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::marker::{Mark, Means, Purpose, contents};
use super::os::{OsUser, as_user, make_parents, remove_file, write_file};
use super::tool::ToolError;
use super::{DataDirState, Inner, Postgres, place};
use crate::guard::make_runtime_dir;

/// For a tool that was killed to end.
const GIVEN_UP: Duration = Duration::from_secs(2);

/// The right to change the data directory. A tool inherits it.
#[derive(Debug)]
pub(super) struct Claim {
    lock: File,
}

impl Claim {
    /// Standard input of the tool: empty, and locked until it ends.
    pub(super) fn stdin(&self) -> io::Result<Stdio> {
        self.lock.try_clone().map(Stdio::from)
    }
}

/// The work that has been begun and not finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// A copy, or the removal before it.
    Copy,
    /// The first server of a cluster.
    Bootstrap,
    /// pg_rewind: neither the old nor the new. It cannot be rewound again, for what differed is no
    /// longer known; only a new copy helps.
    Rewind,
}

/// A rewind that is under way. It is noted beside the data directory, for pg_rewind removes what its source does
/// not have; and it says which directory it is about, for somebody may put another one there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rewinding {
    /// Of `PG_VERSION`, which pg_rewind writes to and does not replace.
    identity: (u64, u64, u128),
    /// The boot of the host in which the rewind began: what has been written since is on disk only as
    /// long as the host runs.
    pub(super) boot: String,
}

fn identity(dir: &Path) -> io::Result<(u64, u64, u128)> {
    let file = fs::metadata(dir.join("PG_VERSION"))?;
    // Not every file system knows it.
    let born = file.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    Ok((file.dev(), file.ino(), born.unwrap_or_default().as_nanos()))
}

pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

impl Inner {
    fn lock_file(&self) -> PathBuf {
        self.guard_config.runtime_dir.join("tool.lock")
    }

    /// The folders above the data directory and our own beside it.
    pub(super) fn prepare_place(&self) -> io::Result<()> {
        let dir = &self.guard_config.runtime_dir;
        if !dir.exists() {
            make_parents(&self.settings.data_dir, self.user.as_ref())?;
            make_parents(dir, self.user.as_ref())?;
        }
        make_runtime_dir(dir)
    }

    /// Refused while a tool works, even one of an earlier agent.
    pub(super) fn claim(&self) -> Result<Claim, ToolError> {
        let path = self.lock_file();
        let failed = |source| ToolError::Claim { path: path.clone(), source };
        self.prepare_place().map_err(failed)?;
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600);
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let lock = options.open(&path).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Claim { lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(ToolError::Busy { lock: path }),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// As `claim`; a tool that was given up a moment ago is waited for until it has ended.
    pub(super) async fn claim_soon(&self) -> Result<Claim, ToolError> {
        let patience = tokio::time::Instant::now() + GIVEN_UP;
        loop {
            match self.claim() {
                Err(ToolError::Busy { .. }) if tokio::time::Instant::now() < patience => {
                    tokio::time::sleep(GIVEN_UP / 100).await;
                }
                claimed => return claimed,
            }
        }
    }

    /// Where earlier versions noted what they had begun: `copy` or `rewind`. It does not tell what it is
    /// about, so it is no reason to remove anything.
    fn old_note(&self) -> PathBuf {
        let mut path = self.settings.data_dir.as_os_str().to_owned();
        path.push(".unfinished");
        PathBuf::from(path)
    }

    /// An operator's command has begun, and its directory could not be marked yet.
    fn command_note(&self) -> PathBuf {
        self.guard_config.runtime_dir.join("command")
    }

    fn rewind_note(&self) -> PathBuf {
        self.guard_config.runtime_dir.join("rewind")
    }

    /// The output of pg_rewind.
    pub(super) fn rewind_log(&self) -> PathBuf {
        self.guard_config.runtime_dir.join("rewind.log")
    }

    /// Files of this server that a rewind takes from its source.
    pub(super) fn kept_files(&self) -> PathBuf {
        self.guard_config.runtime_dir.join("rewind.files")
    }

    /// The work that is half done.
    pub(super) fn unfinished(&self) -> Option<Unfinished> {
        match Mark::load(&self.settings.data_dir) {
            Ok(Some(Mark { purpose: Purpose::Copy, .. })) | Err(_) => Some(Unfinished::Copy),
            Ok(Some(Mark { purpose: Purpose::Bootstrap, .. })) => Some(Unfinished::Bootstrap),
            Ok(None) if self.rewinding().is_some() => Some(Unfinished::Rewind),
            Ok(None) => match fs::read_to_string(self.old_note()) {
                Ok(text) if text.trim() == "rewind" => Some(Unfinished::Rewind),
                Ok(_) => Some(Unfinished::Copy),
                Err(_) => self.command_note().exists().then_some(Unfinished::Copy),
            },
        }
    }

    /// Why it is not known whether what is there is complete.
    fn doubt(&self) -> Option<String> {
        let about = |what: &str, note: &Path| {
            format!(
                "{what}, and what is there may be incomplete: reinitialize this member, or empty the \
                 directory; if it is complete, remove {}",
                note.display()
            )
        };
        let (old, command) = (self.old_note(), self.command_note());
        match fs::read_to_string(&old) {
            Ok(text) if text.trim() == "rewind" => {
                Some(about("a rewind by an earlier version was broken off", &old))
            }
            Ok(_) => Some(about("a copy by an earlier version was broken off", &old)),
            Err(_) if command.exists() => {
                Some(about("a command was broken off as it began", &command))
            }
            Err(_) => None,
        }
    }

    /// A rewind of what is there now has been begun.
    pub(super) fn rewinding(&self) -> Option<Rewinding> {
        let text = fs::read(self.rewind_note()).ok()?;
        let note: Rewinding = serde_json::from_slice(&text).ok()?;
        (identity(&self.settings.data_dir).ok()? == note.identity).then_some(note)
    }

    /// From now on the data directory is of no use.
    pub(super) fn begin_rewind(&self) -> io::Result<()> {
        let identity = as_user(self.user.as_ref(), || identity(&self.settings.data_dir))?;
        let note = Rewinding { identity, boot: boot_id()? };
        write_file(&self.rewind_note(), &serde_json::to_vec(&note)?, 0o600, None)
    }

    /// From now on it is.
    pub(super) fn finish_rewind(&self) -> io::Result<()> {
        remove_file(&self.rewind_note(), None)?;
        place::remove_tree(&self.kept_files())
    }

    pub(super) fn note_command(&self) -> io::Result<()> {
        write_file(&self.command_note(), "", 0o600, None)
    }

    pub(super) fn forget_command(&self) -> io::Result<()> {
        remove_file(&self.command_note(), None)
    }

    /// The directory is empty: whatever was noted of it is of no use any more.
    pub(super) fn forget_notes(&self) -> io::Result<()> {
        remove_file(&self.old_note(), self.user.as_ref())?;
        self.forget_command()?;
        self.finish_rewind()
    }
}

impl Postgres {
    /// The work that was left half done; a server is started on it only by the code that goes on
    /// with that work.
    pub fn unfinished(&self) -> Option<Unfinished> {
        self.inner.unfinished()
    }

    /// Looks at the data directory. An unreadable one is an error, not an empty one.
    pub fn data_dir_state(&self) -> io::Result<DataDirState> {
        let dir = self.data_dir();
        let found = match contents(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(DataDirState::Missing);
            }
            found => found?,
        };
        match Mark::load(dir)?.map(|mark| mark.means()) {
            Some(Means::Nothing | Means::Complete) => return Ok(DataDirState::Empty),
            Some(Means::GoesOn | Means::BeginsAnew) => return Ok(DataDirState::Begun),
            None if found.is_empty() => return Ok(DataDirState::Empty),
            None => {}
        }
        if let Some(why) = self.inner.doubt() {
            return Ok(DataDirState::Foreign { why });
        }
        let foreign = || DataDirState::Foreign {
            why: "it holds files, and no complete PostgreSQL cluster".to_owned(),
        };
        match fs::read_to_string(dir.join("PG_VERSION")) {
            Ok(version) => {
                let major = version.trim().split('.').next().and_then(|major| major.parse().ok());
                let complete = dir.join("global/pg_control").exists();
                Ok(match major {
                    Some(version) if complete => DataDirState::Cluster { version },
                    _ => foreign(),
                })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(foreign()),
            Err(error) => Err(error),
        }
    }

    /// Works on the files of the data directory, with the rights of their account, where it may take as long as
    /// it does. Nobody else works on them until it is done, even if its caller has gone.
    pub(super) async fn place<T: Send + 'static>(
        &self,
        claim: &Claim,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (inner, lock) = (Arc::clone(&self.inner), claim.lock.try_clone()?);
        let done = tokio::task::spawn_blocking(move || {
            let _held = lock;
            let user: Option<&OsUser> = inner.user.as_ref();
            as_user(user, || work(&inner.settings.data_dir))
        });
        done.await.map_err(io::Error::other)?
    }

    /// After the death of an agent, possibly in the middle of anything: what is complete takes its place. Does
    /// nothing while a tool of that agent still works.
    pub async fn settle(&self) {
        let Ok(claim) = self.inner.claim() else { return };
        match self.place(&claim, place::settle).await {
            Ok(false) => {}
            Ok(true) => info!("unfinished work of an earlier agent in the data directory settled"),
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "unfinished work of an earlier agent could not be settled"
            ),
        }
    }

    /// Takes away what a copy or a bootstrap has left that was broken off, as far as nothing of it is of use.
    pub async fn clear_leftovers(&self) -> io::Result<()> {
        let claim = self.inner.claim_soon().await.map_err(io::Error::other)?;
        if matches!(self.data_dir_state()?, DataDirState::Empty) {
            self.place(&claim, place::clear).await?;
        }
        if self.data_dir_state()? == DataDirState::Missing || place::is_untouched(self.data_dir())?
        {
            self.inner.forget_command()?;
        }
        Ok(())
    }

    /// Whether the first server of a cluster, which is being made here, can go on from where it is.
    pub fn goes_on(&self) -> bool {
        let mark = Mark::load(self.data_dir());
        mark.is_ok_and(|mark| mark.is_some_and(|mark| mark.means() == Means::GoesOn))
    }
}
