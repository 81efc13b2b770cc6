//! Logins to the candidate of a planned switchover that sessions begin while the switchover is prepared.
//!
//! Not here: when a session begins one and uses it ([`crate::clients::client`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::MAX_LOGINS_PER_SERVER;
use crate::cluster::route::Candidate;
use crate::net::backend::{Connected, DialError};

/// Logins at once while clients work on: the candidate's host has other things to do.
const CALMLY: usize = 4;

/// A login that was not used is kept for so long after the switchover: its session has said nothing since.
const KEPT: Duration = Duration::from_secs(30);

/// A login under way; dropping it ends the login.
pub type Login = AbortOnDropHandle<Result<Connected, DialError>>;

/// A session's login to the candidate.
#[derive(Debug)]
pub struct Begun {
    pub candidate: Candidate,
    pub login: Login,
    pub when: Instant,
}

/// Logins to the candidate that were begun while a switchover was prepared, by session.
#[derive(Debug)]
pub struct Ahead {
    begun: Mutex<HashMap<u64, Begun>>,
    /// Whose turn it is to log in; of the handover that is under way.
    turns: Mutex<Arc<Semaphore>>,
    /// Clients are held: nobody waits for a turn any more.
    hurry: AtomicBool,
}

impl Default for Ahead {
    fn default() -> Self {
        let turns = Mutex::new(Arc::new(Semaphore::new(CALMLY)));
        Self { begun: Mutex::default(), turns, hurry: AtomicBool::new(false) }
    }
}

impl Ahead {
    /// Clients are held: sessions that wait for their turn log in as fast as the server takes it.
    pub fn hurry(&self) {
        if !self.hurry.swap(true, SeqCst) {
            self.turns.lock().add_permits(MAX_LOGINS_PER_SERVER);
        }
    }

    /// The handover is over. Answers whether logins are left that may still be used, to be dropped later.
    pub fn over(&self) -> bool {
        if !self.hurry.swap(false, SeqCst) {
            // Nobody was held for it: there is no other server to go to.
            self.begun.lock().clear();
            return false;
        }
        *self.turns.lock() = Arc::new(Semaphore::new(CALMLY));
        !self.begun.lock().is_empty()
    }

    /// Drops, some time after a switchover, the logins that nobody has used.
    pub async fn drop_unused(&self) {
        tokio::time::sleep(KEPT).await;
        self.begun.lock().retain(|_, begun| begun.when.elapsed() < KEPT);
    }

    /// Whether logins are under way.
    pub fn is_busy(&self) -> bool {
        self.begun.lock().values().any(|begun| !begun.login.is_finished())
    }

    /// The turns of the handover that is under way.
    pub fn turns(&self) -> Arc<Semaphore> {
        Arc::clone(&self.turns.lock())
    }

    /// The logins that were begun, to add one.
    pub fn begun(&self) -> MutexGuard<'_, HashMap<u64, Begun>> {
        self.begun.lock()
    }

    /// Takes a session's login to this server, if the session has begun one.
    pub fn take(&self, session: u64, server: &str) -> Option<Begun> {
        let begun = self.begun.lock().remove(&session)?;
        (*begun.candidate.name == *server).then_some(begun)
    }
}
