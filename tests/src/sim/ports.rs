//! The world's answers to the shipped agent, in place of a machine, a store, a guard, a server and other members; and
//! what is broken in them on purpose.
//!
//! A defence of the agent is taken away where it meets the world: a store that ignores a comparison, a guard that acts
//! late, a server that tells old positions, a file that is not kept. So the agent has no switch for being broken.

mod carrier;
mod guard;
mod server;
mod store;

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use kornak_agent::failsafe;
use kornak_agent::machine::{Boxed, Ports};
use kornak_cluster::Moment;
use tokio::sync::oneshot;

pub use carrier::Carrier;
pub use guard::Guard;
pub use server::Server;
pub use store::{About, Store, as_shown, lets_the_list_grow, renews_what_is_lost};

use super::exec::ProcessId;
use super::host::Host;
use super::scenario::Mutation;
use super::world::{World, current};

/// Where the data directory would be.
pub const DATA_DIR: &str = "/nowhere";

/// An agent's life on a host. The world is looked up, for the agent's futures may be sent to other threads, which
/// nobody does here.
#[derive(Debug, Clone, Copy)]
pub struct Life {
    pub host: usize,
    pub process: ProcessId,
}

impl Life {
    /// Does `work` in the agent's process. It goes on if nobody waits for it any more, as a request that was sent does.
    pub fn ask<T, F>(self, work: impl FnOnce(Rc<World>) -> F) -> Boxed<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let w = current();
        let (give, answer) = oneshot::channel();
        let work = work(Rc::clone(&w));
        w.exec.spawn(self.process, async move {
            // Who has asked may have given up.
            let _ = give.send(work.await);
        });
        Box::pin(async move {
            match answer.await {
                Ok(value) => value,
                // The process is dead.
                Err(_) => std::future::pending().await,
            }
        })
    }

    /// The next instruction: a moment in which anything may happen to the process.
    pub async fn step(self, w: &Rc<World>) {
        let pause = if w.faults_on() && w.rng.chance(w.plan.stalls_per_mille) {
            w.rng.millis(20, 3000)
        } else {
            w.rng.between(Duration::from_micros(20), Duration::from_micros(400))
        };
        w.exec.sleep(pause).await;
    }
}

/// Clock, tasks, chance and files of a host.
#[derive(Debug)]
pub struct Local(pub Life);

impl Ports for Local {
    fn now(&self) -> Moment {
        let w = current();
        w.hosts[self.0.host].now(&w)
    }

    fn sleep(&self, duration: Duration) -> Boxed<()> {
        let w = current();
        Box::pin(Sleep { until: w.exec.now() + duration, armed: false })
    }

    fn spawn(&self, work: Boxed<()>) {
        current().exec.spawn(self.0.process, work);
    }

    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
        let w = current();
        let there = Rc::clone(&w);
        w.exec.spawn(self.0.process, async move {
            there.exec.sleep(there.rng.between(Duration::ZERO, Duration::from_millis(3))).await;
            work();
        });
    }

    fn random(&self) -> u64 {
        current().rng.next()
    }

    fn read(&self, path: &Path) -> Option<Vec<u8>> {
        current().hosts[self.0.host].disk.borrow().files.get(path).cloned()
    }

    fn exists(&self, path: &Path) -> bool {
        // What Kornak puts into a data directory is there as long as nobody restores another one.
        path.starts_with(DATA_DIR) || self.read(path).is_some()
    }

    fn write(&self, path: &Path, contents: &[u8]) -> std::io::Result<()> {
        let w = current();
        let mut disk = w.hosts[self.0.host].disk.borrow_mut();
        disk.files.insert(path.to_owned(), contents.to_owned());
        drop(disk);
        if path == promise_file() {
            w.say(self.0.host, format_args!("promises {:?}", promise(&w.hosts[self.0.host])));
        }
        Ok(())
    }

    fn remove(&self, path: &Path) {
        let w = current();
        if w.plan.mutation != Some(Mutation::ReleasedLeaseTakenUpAgain) {
            w.hosts[self.0.host].disk.borrow_mut().files.remove(path);
        }
    }
}

/// See [`Ports::sleep`].
struct Sleep {
    until: Moment,
    armed: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let w = current();
        if w.exec.now() >= self.until {
            return Poll::Ready(());
        }
        if !self.armed {
            self.armed = true;
            w.exec.wake_at(self.until, context.waker().clone());
        }
        Poll::Pending
    }
}

/// Where a promise to a leader without the store lies.
pub fn promise_file() -> PathBuf {
    PathBuf::from("/files/promise")
}

/// Where a promise to acknowledge nothing to a lost leader lies.
pub fn pledge_file() -> PathBuf {
    PathBuf::from("/files/fence")
}

/// The promise on a host's disk, and until when it binds on the host's clock; one of an earlier boot does in any case.
pub fn promise(host: &Host) -> Option<failsafe::Promise> {
    serde_json::from_slice(host.disk.borrow().files.get(&promise_file())?).ok()
}
