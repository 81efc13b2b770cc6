//! The promise of this node to acknowledge nothing to a leader that seems lost, as it lies on disk, and the leader that is
//! suspected. Not here: what is decided about them ([`crate::ha::depose`]) and done (`depose`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterState, Epoch, Moment};
use parking_lot::Mutex;

use crate::ha::depose::Given;
use crate::machine::Machine;

/// A member that was silent when it was asked last is not asked where it stands for so long.
const SILENT_FOR: Duration = Duration::from_secs(5);

/// The leader that shows no sign of life, if there is one.
#[derive(Debug, Default)]
pub struct Suspicion(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    now: Option<Epoch>,
    /// The last one that was suspected, and when.
    last: Option<(String, Moment)>,
}

impl Suspicion {
    /// The term of the leader that is suspected now.
    pub fn of(&self) -> Option<Epoch> {
        self.0.lock().now
    }

    /// The member that has just been found to answer nothing.
    pub fn silent(&self, now: Moment) -> Option<String> {
        let inner = self.0.lock();
        let (name, at) = inner.last.as_ref()?;
        (now.since(*at) < SILENT_FOR).then(|| name.clone())
    }

    /// Notes the leader that is suspected now. True if this is news.
    pub(crate) fn set(&self, suspected: Option<(Epoch, &str)>, now: Moment) -> bool {
        let mut inner = self.0.lock();
        if let Some((_, name)) = suspected {
            inner.last = Some((name.to_owned(), now));
        }
        let suspected = suspected.map(|(epoch, _)| epoch);
        std::mem::replace(&mut inner.now, suspected) != suspected
    }
}

/// How often a leader renews its lease, at least, that may be deposed when it does not.
pub fn renews_every(suspect_after: Duration) -> Option<Duration> {
    (!suspect_after.is_zero()).then(|| suspect_after / 4)
}

/// The promise of this node, on disk.
#[derive(Debug, Clone)]
pub struct Pledges {
    machine: Machine,
    path: PathBuf,
    current: Arc<Mutex<Option<Given>>>,
}

impl Pledges {
    /// Reads what was promised before. A file that makes no sense was not written by a promise that was given.
    pub fn load(machine: Machine, path: PathBuf) -> Self {
        let read = machine.read(&path).and_then(|text| serde_json::from_slice(&text).ok());
        Self { machine, path, current: Arc::new(Mutex::new(read)) }
    }

    /// The promise, whether or not it still binds.
    pub fn given(&self) -> Option<Given> {
        self.current.lock().clone()
    }

    /// Whether this node's server may follow nobody whom the store names as the leader now.
    pub fn bind(&self, cluster: &ClusterState) -> bool {
        self.current.lock().as_ref().is_some_and(|given| given.binds(cluster))
    }

    /// Whether a leader of that name was promised that nothing is acknowledged to it.
    pub fn are_to(&self, leader: &str, cluster: &ClusterState) -> bool {
        let current = self.current.lock();
        current.as_ref().is_some_and(|given| given.leader == leader && given.binds(cluster))
    }

    /// Gives it, on disk before it returns.
    ///
    /// # Errors
    /// The promise could not be made durable; then nothing may rest on it.
    pub fn give(&self, given: Given) -> std::io::Result<()> {
        let mut current = self.current.lock();
        if current.as_ref() == Some(&given) {
            return Ok(());
        }
        self.machine.write(&self.path, &serde_json::to_vec(&given)?)?;
        *current = Some(given);
        Ok(())
    }

    /// Forgets it: it is known to have no object any more. One that comes back after a loss of power has none, either.
    pub(crate) fn forget(&self) {
        let mut current = self.current.lock();
        self.machine.remove(&self.path);
        *current = None;
    }
}

#[cfg(test)]
mod tests {
    use kornak_cluster::{Leadership, Revision};

    use super::*;

    #[test]
    fn a_promise_outlives_a_restart_and_ends_when_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fence");
        let load = || Pledges::load(Machine::real(), path.clone());
        let of =
            Leadership { epoch: Epoch { store: 1, revision: Revision(50) }, sync: Revision(60) };
        let given = Given { leader: "b".to_owned(), of };
        assert_eq!(load().given(), None);
        load().give(given.clone()).unwrap();
        let restarted = load();
        assert_eq!(restarted.given(), Some(given));
        let nobody = ClusterState::default();
        assert!(restarted.bind(&nobody) && restarted.are_to("b", &nobody));
        assert!(!restarted.are_to("c", &nobody));
        restarted.forget();
        assert_eq!((restarted.given(), load().given()), (None, None));
    }
}
