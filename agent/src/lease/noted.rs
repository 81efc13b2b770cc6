//! The number of the leader key's lease, beside the data directory: only who has this data may take the
//! lease up again after a restart of the agent.
//!
//! The file is written whole and durably, in the background while the store is asked: nobody who is held in a
//! switchover waits for a disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kornak_dcs::LeaseId;
use parking_lot::Mutex;
use tracing::warn;

use crate::machine::{Machine, Task};

/// A disk that hangs must not keep a leader from leading; without the note a restart of the agent waits for
/// the lease to end.
const PATIENCE: Duration = Duration::from_secs(1);

/// The note. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Noted {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    machine: Machine,
    path: PathBuf,
    /// The content that the file is to have.
    wanted: Mutex<Option<LeaseId>>,
    /// Held while the file is being changed.
    file: Mutex<()>,
}

/// A note that is being written.
#[derive(Debug)]
pub(super) struct Writing {
    machine: Machine,
    task: Task<()>,
}

impl Writing {
    /// Waits until the note is on disk, within reason.
    pub(super) async fn done(self) {
        if self.machine.timeout(PATIENCE, self.task).await.is_err() {
            warn!(
                "disk is slow: the lease may not be noted, a restart may wait for the lease to end"
            );
        }
    }
}

impl Noted {
    /// Reads what is there.
    pub(super) fn new(path: PathBuf, machine: Machine) -> Self {
        let read =
            || String::from_utf8(machine.read(&path)?).ok()?.trim().parse().ok().map(LeaseId);
        let wanted = Mutex::new(read());
        Self { shared: Arc::new(Shared { machine, path, wanted, file: Mutex::new(()) }) }
    }

    pub(super) fn lease(&self) -> Option<LeaseId> {
        *self.shared.wanted.lock()
    }

    pub(super) fn note(&self, lease: LeaseId) -> Writing {
        *self.shared.wanted.lock() = Some(lease);
        let shared = Arc::clone(&self.shared);
        let machine = self.shared.machine.clone();
        let task = machine.spawn_blocking(move || shared.write(lease));
        Writing { machine, task }
    }

    pub(super) fn forget(&self) {
        self.shared.wanted.lock().take();
        // One that is being written removes itself afterwards.
        if let Some(_file) = self.shared.file.try_lock() {
            self.shared.remove();
        }
    }
}

impl Shared {
    fn write(&self, lease: LeaseId) {
        let _file = self.file.lock();
        if *self.wanted.lock() != Some(lease) {
            return;
        }
        if let Err(error) = self.machine.write(&self.path, lease.0.to_string().as_bytes()) {
            warn!(
                error = &error as &dyn std::error::Error,
                "lease could not be noted on disk, a restart will wait for the lease to end"
            );
        }
        if self.wanted.lock().is_none() {
            self.remove();
        }
    }

    fn remove(&self) {
        // Absent is as good as forgotten; a stale number is compared with the store before use.
        self.machine.remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_forgotten_is_not_there_and_what_is_noted_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leader-lease");
        let machine = Machine::real();
        let noted = Noted::new(path.clone(), machine.clone());
        noted.note(LeaseId(7)).done().await;
        assert_eq!(Noted::new(path.clone(), machine.clone()).lease(), Some(LeaseId(7)));
        let late = noted.note(LeaseId(8));
        noted.forget();
        late.done().await;
        assert_eq!((noted.lease(), path.exists()), (None, false));
        noted.note(LeaseId(9)).done().await;
        noted.note(LeaseId(10)).done().await;
        assert_eq!(Noted::new(path, machine).lease(), Some(LeaseId(10)));
    }
}
