//! Stopping the server, and what a stop in order leaves behind.
//!
//! A stop in order is over for everybody else when the control file says "shut down": from then on
//! nothing can be written. What the postmaster then waits for, an archiver and receivers that have not
//! confirmed everything, may take for ever; it is ended by force once it has had its time, and only because
//! of what the control file says.

use std::fs;
use std::time::Duration;

use kornak_cluster::discard;
use tokio::time::{Instant, timeout};
use tracing::{info, warn};

use super::Postgres;
use crate::guard::{GuardClient, GuardError, ServerSignal, processes_in};

/// Between two looks at processes that nobody holds.
const GONE_LOOK: Duration = Duration::from_millis(5);
/// A server that has nothing to wait for has ended by then.
const FIRST_LOOK: Duration = Duration::from_millis(200);
/// Between two looks at the control file of a server that stops.
const CONTROL_LOOK: Duration = Duration::from_millis(50);
/// For a server without work to end at once when told so.
const IMMEDIATE_LIMIT: Duration = Duration::from_secs(2);
/// For processes to end that were killed.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// An archiver, or a walsender, is waited for as long as it gets anything done within this. What a walsender has
/// sent arrives without it.
const PATIENCE: Duration = Duration::from_secs(5);
/// The archiver's command may take so long for the file that it works on.
const ARCHIVE_COMMAND_LIMIT: Duration = Duration::from_secs(2);
const ARCHIVER_LOOK: Duration = Duration::from_millis(20);

/// How a server is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Waits for clients.
    Smart,
    /// Ends clients, writes a shutdown checkpoint, lets walsenders send it.
    Fast,
    /// As if it had crashed.
    Immediate,
    /// SIGKILL for every process.
    Kill,
}

/// Why the server is not proven stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    #[error("stop the server")]
    Guard(#[from] GuardError),
    #[error("processes of the server still run after {0:?}: stop it harder")]
    StillRunning(Duration),
    /// Only a clean shutdown allows what was asked.
    #[error("the control file does not say that the server has shut down")]
    NotShutDown,
}

/// The result of a stop in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// No process is left.
    Gone,
    /// The control file says "shut down". What is left sends or archives what was written.
    Lingers,
}

impl Postgres {
    /// Stops the server. Without an error no process is left on the data directory: none that could
    /// commit, and none that could write to the log. (A logging collector may live on for a second.)
    pub async fn stop(&self, mode: StopMode, limit: Duration) -> Result<(), StopError> {
        let deadline = Instant::now() + limit;
        let guard = self.guard().await?;
        self.tells_to_end();
        let signal = match mode {
            StopMode::Smart => Some(ServerSignal::Smart),
            StopMode::Fast => Some(ServerSignal::Fast),
            StopMode::Immediate => Some(ServerSignal::Immediate),
            StopMode::Kill => None,
        };
        // Clients may be waiting: no look at all processes first.
        let signalled = match signal {
            Some(signal) => match guard.signal(signal).await {
                Err(GuardError::Refused { .. }) => false,
                outcome => outcome.map(|_| true)?,
            },
            None => false,
        };
        if !signalled {
            let status = guard.status().await?;
            if status.postmaster.is_none() && status.left == 0 {
                return Ok(());
            }
            // Orphans of a postmaster that is gone do no good.
            if signal.is_none() || status.postmaster.is_none() {
                guard.kill_all().await?;
            }
        }
        let gone = wait_until_gone(&guard, deadline).await?;
        self.sql().forget().await;
        if gone {
            info!(?mode, "server stopped");
            Ok(())
        } else {
            Err(StopError::StillRunning(limit))
        }
    }

    /// Stops the server fast and returns as soon as nothing can be written any more.
    pub async fn stop_writing(&self, limit: Duration) -> Result<Stopped, StopError> {
        let began = Instant::now();
        let deadline = began + limit;
        match self.stop(StopMode::Fast, FIRST_LOOK.min(limit)).await {
            Ok(()) => return Ok(Stopped::Gone),
            Err(StopError::StillRunning(_)) => {}
            Err(error) => return Err(error),
        }
        let guard = self.guard().await?;
        loop {
            if self.has_shut_down().await {
                info!(
                    elapsed_ms = began.elapsed().as_millis(),
                    "server has shut down, its processes linger"
                );
                return Ok(Stopped::Lingers);
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(StopError::StillRunning(limit));
            }
            if wait_until_gone(&guard, (now + CONTROL_LOOK).min(deadline)).await? {
                self.sql().forget().await;
                return Ok(Stopped::Gone);
            }
        }
    }

    /// Whether the control file proves that nothing was written since a clean shutdown. Of a server that
    /// starts it may still say so.
    pub async fn has_shut_down(&self) -> bool {
        self.controldata().await.is_ok_and(|control| control.state.is_clean())
    }

    /// Lets what a stop in order has left behind do its work while it does, then ends it.
    pub async fn end_in_time(&self) -> Result<(), StopError> {
        let guard = self.guard().await?;
        let mut waiting = (self.segments_to_archive(), self.senders());
        let mut progress = Instant::now();
        while !wait_until_gone(&guard, Instant::now() + CONTROL_LOOK * 4).await? {
            let now = Instant::now();
            let left = (self.segments_to_archive(), self.senders());
            if left != waiting {
                progress = now;
                waiting = left;
            }
            if now.duration_since(progress) >= PATIENCE {
                let (segments, senders) = (waiting.0, waiting.1.len());
                warn!(
                    segments,
                    senders,
                    "neither the archiver nor a walsender of a server that has shut down makes progress; \
                     it is ended, and what is not archived is left in pg_wal until this node is primary again"
                );
                return self.end_lingering().await;
            }
        }
        Ok(())
    }

    /// Ends what a stop in order has left behind; between two files of the archiver, for many commands (`cp`) leave half
    /// a file in the archive when they are killed.
    pub async fn end_lingering(&self) -> Result<(), StopError> {
        if !self.has_shut_down().await {
            return Err(StopError::NotShutDown);
        }
        let guard = self.guard().await?;
        let deadline = Instant::now() + ARCHIVE_COMMAND_LIMIT;
        while self.archives() && Instant::now() < deadline {
            let look = (Instant::now() + ARCHIVER_LOOK).min(deadline);
            if wait_until_gone(&guard, look).await? {
                break;
            }
        }
        match self.stop(StopMode::Immediate, IMMEDIATE_LIMIT).await {
            Err(StopError::StillRunning(_)) => self.stop(StopMode::Kill, KILL_LIMIT).await,
            outcome => outcome,
        }
    }

    /// The titles of the walsenders that run, which say how far each has sent.
    fn senders(&self) -> Vec<Vec<u8>> {
        self.titled(": walsender ").into_iter().map(|(_, title)| title).collect()
    }

    /// Whether the archiver's command works on a file.
    fn archives(&self) -> bool {
        let works = |(pid, _): &(u32, Vec<u8>)| {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            children.is_ok_and(|children| !children.trim().is_empty())
        };
        self.titled(": archiver").iter().any(works)
    }

    /// The server's processes with this in their titles: a server that stops cannot be asked.
    fn titled(&self, part: &str) -> Vec<(u32, Vec<u8>)> {
        let Ok(dir) = fs::canonicalize(self.data_dir()) else { return Vec::new() };
        let title = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let processes = processes_in(&dir).unwrap_or_default();
        let titled = processes.into_iter().map(|process| (process.pid, title(process.pid)));
        titled.filter(|(_, title)| String::from_utf8_lossy(title).contains(part)).collect()
    }

    fn segments_to_archive(&self) -> usize {
        let Ok(entries) = fs::read_dir(self.data_dir().join("pg_wal/archive_status")) else {
            return 0;
        };
        let ready = |name: std::ffi::OsString| name.as_encoded_bytes().ends_with(b".ready");
        entries.flatten().filter(|entry| ready(entry.file_name())).count()
    }
}

/// False: something is left at the deadline.
async fn wait_until_gone(guard: &GuardClient, deadline: Instant) -> Result<bool, GuardError> {
    let mut watch = guard.watch();
    loop {
        let status = guard.status().await?;
        if status.postmaster.is_none() && status.left == 0 {
            return Ok(true);
        }
        let now = Instant::now();
        if now >= deadline {
            return Ok(false);
        }
        // News wake us; processes that nobody holds make none.
        let pause = if status.postmaster.is_some() { deadline - now } else { GONE_LOOK };
        discard::goes_on_either_way(timeout(pause.min(deadline - now), watch.changed()).await);
    }
}
