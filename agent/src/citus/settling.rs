//! How long distributed transactions that a change of a primary has left prepared are looked for. Pure.
//!
//! ```text
//!            other primaries           nothing is left, long enough after
//! Unknown ──────────────────► Pending ─────────────────────────────────────► Settled
//!                              ▲ ▲ │ other primaries                            │
//!                              │ └─┘                                            │
//!                              └────────────────────────────────────────────────┘
//! ```
//! Right after a change what is left cannot be told from what is under way, and Citus leaves alone what
//! belongs to a session that has not ended. So one look that finds nothing is not enough.

use std::collections::BTreeMap;
use std::time::Duration;

use kornak_cluster::{GroupId, Moment};

use super::plan::Address;

/// Every group's primary; `None`: nobody leads it.
pub type Primaries = BTreeMap<GroupId, Option<Address>>;

/// A distributed transaction that is prepared for so long is nobody's who works.
pub const STALE: Duration = Duration::from_secs(1);

/// Transactions that a change of a primary has left prepared are stale after this time.
const LONG_ENOUGH: Duration = Duration::from_secs(2);

/// Between two rounds when nothing changes.
pub const EVERY: Duration = Duration::from_secs(5);

/// Between two rounds when something failed or was changed.
const SOON: Duration = Duration::from_millis(500);

/// The pause within [`QUICK_FOR`] of a change of a primary: clients wait for what it has left
/// prepared.
const QUICK: Duration = Duration::from_millis(100);
const QUICK_FOR: Duration = Duration::from_secs(3);

/// Whether anything has to be looked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Settling {
    /// This server does not lead, or has just begun to.
    #[default]
    Unknown,
    Pending {
        primaries: Primaries,
        since: Moment,
    },
    Settled {
        primaries: Primaries,
    },
}

impl Settling {
    /// Takes a look at who leads. Answers whether transactions have to be recovered now; not while a
    /// switchover is under way: one server is away, and whoever looks after it only takes time from it.
    pub fn look(&mut self, now_lead: &Primaries, switches: bool, now: Moment) -> bool {
        let known = match self {
            Self::Unknown => None,
            Self::Pending { primaries, .. } | Self::Settled { primaries } => Some(&*primaries),
        };
        if known != Some(now_lead) {
            // They may be those again that they were two changes before.
            *self = Self::Pending { primaries: now_lead.clone(), since: now };
        }
        matches!(self, Self::Pending { .. }) && !switches
    }

    /// Takes the result of a round; `recovered`: transactions were recovered in it, `done`: all of it worked
    /// and nothing was left anywhere. Answers when the next round is due.
    pub fn tried(&mut self, recovered: bool, done: bool, now: Moment) -> Duration {
        let age = match self {
            Self::Pending { since, .. } if recovered => now.since(*since),
            _ => return if done { EVERY } else { SOON },
        };
        match done {
            true if age > LONG_ENOUGH => {
                if let Self::Pending { primaries, .. } = std::mem::take(self) {
                    *self = Self::Settled { primaries };
                }
                EVERY
            }
            false if age < QUICK_FOR => QUICK,
            _ => SOON,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn led_by(host: &str) -> Primaries {
        let at = Address { host: host.to_owned(), port: 5432 };
        [(GroupId(1), (!host.is_empty()).then_some(at))].into()
    }

    fn at(millis: u64) -> Moment {
        Moment::at_millis(millis)
    }

    /// `a` leads since zero, and a round at this time has found nothing.
    fn looked_at(millis: u64) -> Settling {
        let mut settling = Settling::default();
        assert!(settling.look(&led_by("a"), false, at(0)));
        settling.tried(true, true, at(millis));
        settling
    }

    #[test]
    fn one_look_that_finds_nothing_is_not_enough() {
        let mut settling = looked_at(100);
        assert!(settling.look(&led_by("a"), false, at(600)));
        assert_eq!(settling.tried(true, true, at(700)), SOON);
        assert!(settling.look(&led_by("a"), false, at(2_100)));
        assert_eq!(settling.tried(true, true, at(2_200)), EVERY);
        assert!(!settling.look(&led_by("a"), false, at(7_000)));
        assert_eq!(settling.tried(false, true, at(7_000)), EVERY);
    }

    #[test]
    fn what_is_left_is_looked_for_until_it_is_gone() {
        let mut settling = looked_at(3_000);
        assert!(settling.look(&led_by("b"), false, at(10_000)));
        assert_eq!(settling.tried(true, false, at(10_100)), QUICK, "clients wait");
        assert_eq!(settling.tried(true, false, at(14_000)), SOON, "nobody does any more");
        assert!(settling.look(&led_by("b"), false, at(60_000)));
        assert_eq!(settling.tried(true, true, at(60_000)), EVERY);
        assert!(!settling.look(&led_by("b"), false, at(65_000)));
    }

    #[test]
    fn a_primary_that_leads_again_is_another_one() {
        let mut settling = looked_at(3_000);
        assert!(settling.look(&led_by("b"), false, at(10_000)));
        assert_eq!(settling.tried(true, true, at(10_100)), SOON);
        assert!(settling.look(&led_by("a"), false, at(12_000)), "it was settled for a before");
        assert_eq!(settling.tried(true, true, at(12_100)), SOON, "its time begins anew");
    }

    #[test]
    fn nothing_is_looked_for_in_a_switchover_but_after_it() {
        let mut settling = looked_at(3_000);
        assert!(!settling.look(&led_by(""), true, at(10_000)));
        assert!(!settling.look(&led_by("b"), true, at(10_200)));
        assert_eq!(settling.tried(false, true, at(10_200)), EVERY);
        assert!(settling.look(&led_by("b"), false, at(10_300)));
    }
}
