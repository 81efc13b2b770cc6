//! One tool at a time on a data directory, and no server on one that a tool has left half done. Both
//! hold across deaths of the agent: a tool that outlives its agent keeps its claim, for the lock is on
//! its standard input; and what it was about is written down beside the data directory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use super::files::beside;
use super::os::{remove_file, write_file};
use super::tool::ToolError;
use super::{Inner, Postgres};
use crate::guard::make_runtime_dir;

/// For a tool that was killed to end.
const GIVEN_UP: Duration = Duration::from_secs(2);

/// The right to change the data directory with a tool. The tool inherits it.
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

/// What a tool has begun and not finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// initdb, pg_basebackup or a custom method: what is there was made here and can be thrown away.
    Copy,
    /// pg_rewind: neither the old nor the new. It cannot be rewound again, for what differed is no
    /// longer known; only a new copy helps.
    Rewind,
}

impl Unfinished {
    fn word(self) -> &'static str {
        match self {
            Self::Copy => "copy\n",
            Self::Rewind => "rewind\n",
        }
    }
}

impl Inner {
    /// Refused while a tool works, even one of an earlier agent.
    pub(super) fn claim(&self) -> Result<Claim, ToolError> {
        let dir = &self.guard_config.runtime_dir;
        let path = dir.join("tool.lock");
        let failed = |source| ToolError::Claim { path: path.clone(), source };
        make_runtime_dir(dir).map_err(failed)?;
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600);
        let lock = options.open(&path).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Claim { lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(ToolError::Busy { lock: path }),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The same; a tool that was given up a moment ago is waited for until it has ended.
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

    fn unfinished_file(&self) -> PathBuf {
        beside(&self.settings, "unfinished")
    }

    /// What is half done.
    pub(super) fn unfinished(&self) -> Option<Unfinished> {
        let text = std::fs::read_to_string(self.unfinished_file()).ok()?;
        Some(if text == Unfinished::Copy.word() { Unfinished::Copy } else { Unfinished::Rewind })
    }

    /// From now on the data directory is of no use.
    pub(super) fn begin(&self, what: Unfinished) -> Result<(), ToolError> {
        let path = self.unfinished_file();
        write_file(&path, what.word(), 0o600, None)
            .map_err(|source| ToolError::Claim { path, source })
    }

    /// From now on it is.
    pub(super) fn finish(&self) -> Result<(), ToolError> {
        let path = self.unfinished_file();
        remove_file(&path).map_err(|source| ToolError::Claim { path, source })
    }
}

impl Postgres {
    /// What a tool has left half done; the server is not started on it.
    pub fn unfinished(&self) -> Option<Unfinished> {
        self.inner.unfinished()
    }
}
