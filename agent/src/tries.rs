//! When a step that failed is tried again: at once after the first failure, which may have been bad luck,
//! then with growing pauses. Arithmetic alone.

use std::time::Duration;

use kornak_cluster::{ClusterState, Moment, Revision};

use crate::ha::Server;

/// A server that has answered for so long has come up.
const SETTLED: Duration = Duration::from_secs(10);

/// The first repetition may be quick.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// The longest pause: an operator who has repaired something should not wait much longer until it
/// is noticed.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The failures in a row.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    failures: u32,
    not_before: Option<Moment>,
    up_since: Option<Moment>,
    situation: Option<Situation>,
}

/// When it changes, what failed before may succeed now.
#[derive(Debug, PartialEq, Eq)]
struct Situation {
    leader: Option<(String, Revision)>,
    config: Revision,
    leader_is_ready: Option<(kornak_cluster::MemberState, Option<bool>)>,
}

impl Situation {
    fn of(cluster: &ClusterState) -> Self {
        let leader = cluster.leader.as_ref();
        Self {
            leader: leader.map(|leader| (leader.name.clone(), leader.epoch.revision)),
            config: cluster.config_revision,
            leader_is_ready: cluster
                .leader_member()
                .map(|(_, member)| (member.state, member.checkpoint_after_promote)),
        }
    }
}

/// Before the next try, after so many failures in a row.
fn pause(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        1 => FIRST_PAUSE,
        more => Duration::from_secs(1_u64 << (more - 2).min(8)).min(LONGEST_PAUSE),
    }
}

impl Tries {
    /// Attempts in a row that came to nothing.
    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether a step that failed before may be tried now.
    pub(crate) fn may(&self, now: Moment) -> bool {
        self.not_before.is_none_or(|moment| now >= moment)
    }

    /// A step has failed. Returns the pause before the next.
    pub(crate) fn failed(&mut self, now: Moment) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let pause = pause(self.failures);
        self.not_before = Some(now + pause);
        pause
    }

    /// Nothing has failed, and it is too early.
    pub(crate) fn wait(&mut self, now: Moment, pause: Duration) {
        self.not_before = Some(now + pause);
    }

    /// The server has ended by itself. `Some`: as it started, so the next start is not before this pause is
    /// over.
    pub(crate) fn ended(&mut self, now: Moment) -> Option<Duration> {
        let settled = self.up_since.take().is_some_and(|since| now.since(since) >= SETTLED);
        if settled {
            (self.failures, self.not_before) = (0, None);
            return None;
        }
        Some(self.failed(now))
    }

    /// A person has asked for something: it is tried at once.
    pub(crate) fn asked(&mut self) {
        self.not_before = None;
    }

    /// Notes the state of the server and of the store.
    pub(crate) fn saw(&mut self, server: &Server, cluster: &ClusterState, now: Moment) {
        match server {
            Server::Standby(_) | Server::Primary(_) => {
                let since = *self.up_since.get_or_insert(now);
                if now.since(since) >= SETTLED {
                    (self.failures, self.not_before) = (0, None);
                }
            }
            // A look that failed does not make a server young again.
            Server::Silent { .. } | Server::Closed { .. } => {}
            _ => self.up_since = None,
        }
        let situation = Situation::of(cluster);
        if self.situation.as_ref().is_some_and(|before| *before != situation) {
            self.not_before = None;
        }
        self.situation = Some(situation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment::at_millis(seconds * 1000)
    }

    #[test]
    fn pauses_grow_from_an_instant_to_seconds() {
        let millis: Vec<_> = (0..8).map(|failures| pause(failures).as_millis()).collect();
        assert_eq!(millis, [0, 200, 1000, 2000, 4000, 8000, 10_000, 10_000]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }

    #[test]
    fn a_server_that_ends_as_it_starts_is_not_started_in_a_tight_loop() {
        let (mut tries, up, cluster) = (
            Tries::default(),
            Server::Standby(crate::ha::StandbyFacts::default()),
            ClusterState::default(),
        );
        tries.saw(&up, &cluster, at(0));
        assert_eq!(tries.ended(at(60)), None, "it ran for a minute: started again at once");
        assert!(tries.may(at(60)));
        assert_eq!(tries.ended(at(61)), Some(FIRST_PAUSE));
        tries.saw(&up, &cluster, at(62));
        assert_eq!(tries.ended(at(63)), Some(Duration::from_secs(1)), "a second is no success");
        assert!(!tries.may(at(63)) && tries.may(at(64)));
        tries.saw(&up, &cluster, at(65));
        tries.saw(&up, &cluster, at(75));
        assert_eq!(tries.failures(), 0);
    }

    #[test]
    fn a_change_of_the_configuration_or_of_the_leader_is_a_reason_to_try_at_once() {
        let (mut tries, down) = (Tries::default(), Server::Stopped);
        let mut cluster = ClusterState::default();
        tries.saw(&down, &cluster, at(0));
        for _ in 0..5 {
            tries.failed(at(1));
        }
        tries.saw(&down, &cluster, at(2));
        assert!(!tries.may(at(2)));
        cluster.config_revision = Revision(7);
        tries.saw(&down, &cluster, at(2));
        assert!(tries.may(at(2)));
        assert_eq!(tries.failures(), 5, "it has not succeeded yet");
    }
}
