//! The machine that the shell runs on: a clock, tasks, chance, and a few small files that outlive the
//! agent.
//!
//! The product has [`Machine::real`]. The simulation runs the same shell on hosts whose time, disks and processes are
//! its own, so nothing in the shell asks tokio for the time or for a task, nor the system for one of those files; and
//! a `select!` in it names its order, for chance would be tokio's.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{AbortHandle, abortable};
use kornak_cluster::{Moment, discard};
use tokio::sync::oneshot;

use crate::guard::boottime_now;

/// A future that can be handed to another task.
pub type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// One kind of machine.
pub trait Ports: Send + Sync + fmt::Debug {
    /// The boot-time clock.
    fn now(&self) -> Moment;
    /// Ends after this time.
    fn sleep(&self, duration: Duration) -> Boxed<()>;
    /// Runs a task for as long as the process lives.
    fn spawn(&self, work: Boxed<()>);
    /// Runs what may wait for a disk.
    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>);
    /// A random number.
    fn random(&self) -> u64;
    /// A small file; `None`: there is none, or it cannot be read.
    fn read(&self, path: &Path) -> Option<Vec<u8>>;
    /// There is such a file, readable or not.
    fn exists(&self, path: &Path) -> bool;
    /// Writes a small file whole and durably.
    ///
    /// # Errors
    /// The file was not written, or may not survive a loss of power.
    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()>;
    /// Removes a small file; one that cannot be removed stays.
    fn remove(&self, path: &Path);
}

/// The machine. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Machine(Arc<dyn Ports>);

/// An operation took too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no answer in time")]
pub struct Late;

/// A task ended without a result: it was aborted, or it panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the task was broken off")]
pub struct BrokenOff;

impl Machine {
    /// The one that this process runs on.
    pub fn real() -> Self {
        Self::new(Real)
    }

    /// A machine whose clock stands still.
    #[cfg(test)]
    pub(crate) fn standing_at(now: Moment) -> Self {
        Self::new(tests::Standing(now))
    }

    /// Any.
    pub fn new(ports: impl Ports + 'static) -> Self {
        Self(Arc::new(ports))
    }

    /// The boot-time clock.
    pub fn now(&self) -> Moment {
        self.0.now()
    }

    /// How long ago that was.
    pub fn since(&self, then: Moment) -> Duration {
        self.now().since(then)
    }

    /// Waits.
    pub fn sleep(&self, duration: Duration) -> Boxed<()> {
        self.0.sleep(duration)
    }

    /// Gives `work` up after `limit`.
    ///
    /// # Errors
    /// `limit` has passed, and `work` was given up.
    pub async fn timeout<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = T>,
    ) -> Result<T, Late> {
        tokio::select! {
            biased;
            value = work => Ok(value),
            () = self.sleep(limit) => Err(Late),
        }
    }

    /// Runs a task, also if nobody waits for its result.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let (result, outcome) = oneshot::channel();
        let finished = Arc::new(AtomicBool::new(false));
        let at_the_end = AtTheEnd(Arc::clone(&finished));
        let (work, abort) = abortable(async move {
            let _at_the_end = at_the_end;
            // Who has started it may have no use for the result.
            discard::receiver_may_be_gone(result.send(work.await));
        });
        self.0.spawn(Box::pin(async move {
            discard::goes_on_either_way(work.await);
        }));
        Task { outcome, finished, abort }
    }

    /// Runs what may wait for a disk, also if nobody waits for its result.
    pub fn spawn_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Task<T> {
        let (result, outcome) = oneshot::channel();
        let finished = Arc::new(AtomicBool::new(false));
        let at_the_end = AtTheEnd(Arc::clone(&finished));
        self.0.spawn_blocking(Box::new(move || {
            let _at_the_end = at_the_end;
            discard::receiver_may_be_gone(result.send(work()));
        }));
        // A thread cannot be broken off.
        let (abort, _) = AbortHandle::new_pair();
        Task { outcome, finished, abort }
    }

    /// A random number.
    pub fn random(&self) -> u64 {
        self.0.random()
    }

    /// See [`Ports::read`].
    pub fn read(&self, path: &Path) -> Option<Vec<u8>> {
        self.0.read(path)
    }

    /// See [`Ports::exists`].
    pub fn exists(&self, path: &Path) -> bool {
        self.0.exists(path)
    }

    /// See [`Ports::write`].
    ///
    /// # Errors
    /// The file was not written, or may not survive a loss of power.
    pub fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        self.0.write(path, contents)
    }

    /// See [`Ports::remove`].
    pub fn remove(&self, path: &Path) {
        self.0.remove(path);
    }
}

/// A task that was started; dropped, it goes on.
#[derive(Debug)]
pub struct Task<T> {
    outcome: oneshot::Receiver<T>,
    finished: Arc<AtomicBool>,
    abort: AbortHandle,
}

struct AtTheEnd(Arc<AtomicBool>);

impl Drop for AtTheEnd {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl<T> Task<T> {
    /// Whether the task's result is there, or will never be.
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Breaks it off at its next wait.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// For breaking it off while somebody waits for it.
    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

impl<T> Future for Task<T> {
    type Output = Result<T, BrokenOff>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.outcome).poll(context).map_err(|_| BrokenOff)
    }
}

/// See [`Machine::real`].
#[derive(Debug)]
struct Real;

impl Ports for Real {
    fn now(&self) -> Moment {
        boottime_now()
    }

    fn sleep(&self, duration: Duration) -> Boxed<()> {
        Box::pin(tokio::time::sleep(duration))
    }

    fn spawn(&self, work: Boxed<()>) {
        tokio::spawn(work);
    }

    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
        tokio::task::spawn_blocking(work);
    }

    fn random(&self) -> u64 {
        rand::random()
    }

    fn read(&self, path: &Path) -> Option<Vec<u8>> {
        std::fs::read(path).ok()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        crate::durable::write(path, contents)
    }

    fn remove(&self, path: &Path) {
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, file = %path.display(), "file could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_has_one_result_or_none() {
        let machine = Machine::real();
        assert_eq!(machine.spawn(async { 7 }).await, Ok(7));
        let hangs = machine.spawn(std::future::pending::<()>());
        assert!(!hangs.is_finished());
        hangs.abort();
        assert_eq!(hangs.await, Err(BrokenOff));
        let fails = machine.spawn(async { assert!(machine_is_broken(), "as it should") });
        while !fails.is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(fails.await, Err(BrokenOff));
        let limit = Duration::from_millis(1);
        assert_eq!(machine.timeout(limit, std::future::pending::<()>()).await, Err(Late));
        assert_eq!(machine.spawn_blocking(|| 8).await, Ok(8));
    }

    fn machine_is_broken() -> bool {
        false
    }

    #[derive(Debug)]
    pub(super) struct Standing(pub(super) Moment);

    impl Ports for Standing {
        fn now(&self) -> Moment {
            self.0
        }

        fn sleep(&self, duration: Duration) -> Boxed<()> {
            Real.sleep(duration)
        }

        fn spawn(&self, work: Boxed<()>) {
            Real.spawn(work);
        }

        fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
            Real.spawn_blocking(work);
        }

        fn random(&self) -> u64 {
            Real.random()
        }

        fn read(&self, path: &Path) -> Option<Vec<u8>> {
            Real.read(path)
        }

        fn exists(&self, path: &Path) -> bool {
            Real.exists(path)
        }

        fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
            Real.write(path, contents)
        }

        fn remove(&self, path: &Path) {
            Real.remove(path);
        }
    }
}
