//! Failsafe mode: a leader stays although the store is away, while every member confirms it.
//!
//! The confirmation is a promise that outlives a restart of the member that gave it: it is on disk
//! before the answer is sent. The leader's deadline moves only by a round that *all* members of the
//! list accepted, counted from the moment the round began; a failed round is not a demotion, the
//! deadline is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterState, Epoch, Moment};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// Between two rounds.
pub const ROUND_EVERY: Duration = Duration::from_secs(1);

/// The longest promise that can be asked for. A lease that is longer than this is relied on only for so long.
pub const LONGEST_PROMISE: Duration = Duration::from_secs(600);

/// How long a member may take to answer.
pub const ROUND_TIMEOUT: Duration = Duration::from_millis(1500);

/// A promise not to race, as it lies on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// To whom it was given.
    pub leader: String,
    /// The boot in which `until_ms` counts; another boot starts the clock anew.
    pub boot_id: String,
    /// Milliseconds on the boot-time clock.
    pub until_ms: u64,
    /// How long it was given for, milliseconds; after a reboot it counts again in full.
    pub length_ms: u64,
}

/// Keeps the promise of this node. It ends with its time and not before: a leader key that shows up
/// meanwhile may be the one of the leader that it was given to.
#[derive(Debug, Clone)]
pub struct Promises {
    machine: Machine,
    path: PathBuf,
    boot_id: String,
    current: Arc<Mutex<Option<Promise>>>,
}

impl Promises {
    /// Reads what was promised before. A promise of an earlier boot counts from `now` in full.
    pub fn load(machine: Machine, path: PathBuf, boot_id: String, now: Moment) -> Self {
        let read = || -> Option<Promise> {
            let promise: Promise = serde_json::from_slice(&machine.read(&path)?).ok()?;
            if promise.boot_id == boot_id {
                return Some(promise);
            }
            let until = now + Duration::from_millis(promise.length_ms);
            Some(Promise { boot_id: boot_id.clone(), until_ms: millis(until), ..promise })
        };
        let current = Arc::new(Mutex::new(read()));
        Self { machine, path, boot_id, current }
    }

    /// Promises `leader` not to race for `length` from `now`, on disk before it returns. What was promised
    /// before stays promised: a shorter length does not bring its end nearer.
    ///
    /// # Errors
    /// The promise could not be made durable; then it must not be given.
    pub fn give(&self, leader: &str, now: Moment, length: Duration) -> std::io::Result<()> {
        let mut current = self.current.lock();
        let before = current.as_ref().map(|promise| Moment::at_millis(promise.until_ms));
        let until = before.unwrap_or_default().max(now + length);
        let promise = Promise {
            leader: leader.to_owned(),
            boot_id: self.boot_id.clone(),
            until_ms: millis(until),
            length_ms: millis(Moment::new(until.since(now))),
        };
        self.machine.write(&self.path, &serde_json::to_vec(&promise)?)?;
        *current = Some(promise);
        Ok(())
    }

    /// Until when this node must not race.
    pub fn until(&self) -> Option<Moment> {
        self.current.lock().as_ref().map(|promise| Moment::at_millis(promise.until_ms))
    }

    /// To whom the last promise was given.
    pub fn leader(&self) -> Option<String> {
        self.current.lock().as_ref().map(|promise| promise.leader.clone())
    }

    /// Whether a promise is in force.
    pub fn in_force(&self, now: Moment) -> bool {
        self.until().is_some_and(|until| now < until)
    }
}

fn millis(moment: Moment) -> u64 {
    u64::try_from(moment.since_start().as_millis()).unwrap_or(u64::MAX)
}

/// Whom a leader has to ask: everybody in the list that the store had last, and in the list that was
/// to be written next if that write has not been proven. `None` if failsafe mode is off.
pub fn whom_to_ask(
    me: &str,
    cluster: &ClusterState,
    unproven: Option<&BTreeMap<String, String>>,
) -> Option<BTreeMap<String, String>> {
    if !cluster.config.as_ref()?.failsafe_mode {
        return None;
    }
    let mut list = cluster.failsafe.clone()?;
    list.extend(unproven.into_iter().flatten().map(|(name, url)| (name.clone(), url.clone())));
    list.remove(me);
    Some(list)
}

/// How long a member promises to stay away: for as long as it is `asked`, and by its own `ttl`; Patroni's
/// leaders do not say, and ask every `loop_wait`.
pub fn promise_length(ttl: Duration, asked: Option<Duration>) -> Duration {
    let asked = asked.unwrap_or_default().min(LONGEST_PROMISE);
    ttl.max(Duration::from_secs(20)).max(asked)
}

/// How long a leader may rely on a round: not longer than its lease, and than the shortest promise in it.
/// Who does not say (Patroni) promises the `ttl` that is configured.
pub fn relied_on(lease: Duration, ttl: Duration, promised: &[Option<Duration>]) -> Duration {
    promised.iter().map(|promised| promised.unwrap_or(ttl)).fold(lease, Duration::min)
}

/// Whether a request to stay comes from the member that the store named as the leader, or that it has named since.
/// Somebody who knows of no leader at all cannot tell, and the leader would stop without this member's word; nor can
/// one who was away (`seen_by_us` is false: an agent before has noted what is known), unless the leader tells its epoch.
pub fn is_from_leader(
    name: &str,
    epoch: Option<Epoch>,
    cluster: &ClusterState,
    seen_by_us: bool,
    promised: Option<&str>,
) -> bool {
    let leader = cluster.leader.as_ref();
    let older = match (epoch, leader) {
        (Some(theirs), Some(leader)) => theirs.is_older_than(leader.epoch),
        _ => None,
    };
    match older {
        Some(true) => return false,
        Some(false) if epoch != leader.map(|leader| leader.epoch) => return true,
        _ => {}
    }
    let named = leader.map(|leader| leader.name.as_str()).or(cluster.last_leader.as_deref());
    match named.filter(|_| seen_by_us || older.is_some()).or(promised) {
        Some(leader) => leader == name,
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kornak_cluster::{ClusterConfig, Leader, LeaseId, Revision};

    #[test]
    fn a_promise_outlives_a_restart_and_starts_again_after_a_reboot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("promise");
        let at = Moment::at_millis;
        let promises = Promises::load(Machine::real(), path.clone(), "boot-1".into(), at(0));
        assert!(!promises.in_force(at(0)));
        promises.give("p", at(1_000), Duration::from_secs(20)).unwrap();
        let restarted = Promises::load(Machine::real(), path.clone(), "boot-1".into(), at(2_000));
        assert!(restarted.in_force(at(20_999)) && !restarted.in_force(at(21_000)));
        let rebooted = Promises::load(Machine::real(), path.clone(), "boot-2".into(), at(500));
        assert!(rebooted.in_force(at(20_499)) && !rebooted.in_force(at(20_500)));
    }

    #[test]
    fn a_promise_only_grows_and_is_as_long_as_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let at = Moment::at_millis;
        let seconds = Duration::from_secs;
        let promises =
            Promises::load(Machine::real(), dir.path().join("promise"), "boot-1".into(), at(0));
        promises.give("p", at(1_000), seconds(60)).unwrap();
        promises.give("p", at(2_000), seconds(20)).unwrap();
        assert_eq!(promises.until(), Some(at(61_000)));
        let rebooted =
            Promises::load(Machine::real(), dir.path().join("promise"), "boot-2".into(), at(0));
        assert_eq!(rebooted.until(), Some(at(59_000)), "what was left of it");

        assert_eq!(promise_length(seconds(20), Some(seconds(60))), seconds(60));
        assert_eq!(promise_length(seconds(30), None), seconds(30));
        assert_eq!(promise_length(seconds(4), None), seconds(20));
        assert_eq!(promise_length(seconds(30), Some(Duration::MAX)), LONGEST_PROMISE);
        let relied = |promised: &[Option<Duration>]| relied_on(seconds(60), seconds(30), promised);
        assert_eq!(relied(&[]), seconds(60));
        assert_eq!(relied(&[Some(seconds(60)), Some(seconds(90))]), seconds(60));
        assert_eq!(relied(&[Some(seconds(60)), None]), seconds(30), "Patroni goes by its own ttl");
    }

    #[test]
    fn only_whom_the_store_named_may_ask_to_stay() {
        let mut cluster = ClusterState::default();
        let asks = |name: &str, cluster: &ClusterState, promised: Option<&str>| {
            is_from_leader(name, None, cluster, true, promised)
        };
        assert!(asks("x", &cluster, None), "nothing was ever read");
        assert!(!asks("x", &cluster, Some("a")));
        cluster.last_leader = Some("b".to_owned());
        assert!(asks("b", &cluster, Some("a")) && !asks("a", &cluster, Some("a")));
    }

    #[test]
    fn a_leadership_is_compared_with_the_last_one_that_was_seen() {
        let at = |revision| Epoch { store: 1, revision: Revision(revision) };
        let leader = Leader {
            name: "a".to_owned(),
            lease: LeaseId(1),
            epoch: at(7),
            mod_revision: Revision(7),
        };
        let cluster = ClusterState { leader: Some(leader), ..ClusterState::default() };
        let elsewhere = Epoch { store: 2, revision: Revision(9) };
        for (name, epoch, seen_by_us, expected) in [
            ("a", Some(at(7)), true, true),
            ("b", Some(at(7)), true, false),
            ("b", Some(at(8)), true, true),
            ("b", Some(at(8)), false, true),
            ("a", Some(at(6)), true, false),
            ("a", Some(at(6)), false, false),
            ("b", Some(elsewhere), true, false),
            ("b", Some(elsewhere), false, true),
            ("b", None, true, false),
            ("b", None, false, true),
        ] {
            let from = is_from_leader(name, epoch, &cluster, seen_by_us, None);
            assert_eq!(from, expected, "{name} {epoch:?} {seen_by_us}");
        }
    }

    #[test]
    fn a_leader_asks_the_old_list_and_the_one_that_may_have_been_written() {
        let mut cluster = ClusterState::default();
        let list = |names: &[&str]| -> BTreeMap<String, String> {
            names.iter().map(|name| ((*name).to_owned(), format!("http://{name}"))).collect()
        };
        cluster.failsafe = Some(list(&["a", "b"]));
        assert_eq!(whom_to_ask("a", &cluster, None), None, "off unless /config says so");
        cluster.config = ClusterConfig::parse(r#"{"failsafe_mode":true}"#);
        assert_eq!(whom_to_ask("a", &cluster, None), Some(list(&["b"])));
        assert_eq!(whom_to_ask("a", &cluster, Some(&list(&["a", "c"]))), Some(list(&["b", "c"])));
    }
}
