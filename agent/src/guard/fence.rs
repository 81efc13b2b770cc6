//! When the guard must kill, and what it must refuse: arithmetic alone.

use std::time::Duration;

use kornak_cluster::Moment;

use super::wire::Fencing;

/// Why a guard that stops or has stopped a server takes no new deadline.
pub const HAS_FIRED: &str = "the deadline has come: disarm when nothing is left";

/// The deadline and what has come of it.
///
/// ```text
/// Disarmed ──ARM──► Armed ──deadline − budget──► Fired ──DISARM, nothing left──► Disarmed
///     ▲               │ ▲└─ARM: a new deadline
///     └────DISARM─────┘ └─(a jump of the clock may bring the end of it nearer)
/// ```
///
/// The first half of the budget is for a fast stop, in which a primary hands its standbys the last
/// of its WAL; the second half is for killing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fence {
    #[default]
    Disarmed,
    Armed {
        /// As the agent gave it.
        deadline: Moment,
        /// When the fast stop begins.
        fire_at: Moment,
        /// When killing begins.
        kill_at: Moment,
    },
    /// Stopping, killing, or guarding what has been killed. Only a proof that nothing runs ends it.
    Fired { deadline: Moment, kill_at: Moment },
}

impl Fence {
    /// Takes a new deadline, later or earlier. The server is stopped `budget` before it.
    pub fn arm(
        &mut self,
        deadline: Moment,
        now: Moment,
        budget: Duration,
    ) -> Result<(), &'static str> {
        if self.late(now) {
            return Err(HAS_FIRED);
        }
        let fire_at = deadline.minus(budget);
        if *self == Self::Disarmed && now >= fire_at {
            return Err("this deadline is past");
        }
        *self = Self::Armed { deadline, fire_at, kill_at: deadline.minus(budget / 2) };
        if now >= fire_at { Err("this deadline is past: killing") } else { Ok(()) }
    }

    /// The client says that this node is no primary. Once late, only the absence of processes proves it.
    pub fn disarm(&mut self, now: Moment, left: usize) -> Result<(), &'static str> {
        if self.late(now) && left > 0 {
            return Err("the deadline has come and processes are left");
        }
        *self = Self::Disarmed;
        Ok(())
    }

    /// The moment for stopping has come.
    pub fn late(&self, now: Moment) -> bool {
        match self {
            Self::Disarmed => false,
            Self::Armed { fire_at, .. } => now >= *fire_at,
            Self::Fired { .. } => true,
        }
    }

    /// The moment for killing has come.
    pub fn kills(&self, now: Moment) -> bool {
        match self {
            Self::Disarmed => false,
            Self::Armed { kill_at, .. } | Self::Fired { kill_at, .. } => now >= *kill_at,
        }
    }

    /// Remembers that stopping has begun. True the first time.
    pub fn fire(&mut self) -> bool {
        match *self {
            Self::Armed { deadline, kill_at, .. } => {
                *self = Self::Fired { deadline, kill_at };
                true
            }
            Self::Disarmed | Self::Fired { .. } => false,
        }
    }

    /// The host may have stood still: the lease must be proven again within `grace`.
    pub fn jumped(&mut self, now: Moment, grace: Duration) {
        if let Self::Armed { fire_at, kill_at, .. } = self {
            *fire_at = (*fire_at).min(now + grace);
            *kill_at = (*kill_at).min(now + grace);
        }
    }

    /// Whether a server may become or start writable.
    pub fn may_write(&self, fencing: Fencing, now: Moment) -> Result<(), &'static str> {
        match (self, fencing) {
            _ if self.late(now) => Err("the deadline has come"),
            (Self::Disarmed, Fencing::Armed) => Err("not armed"),
            _ => Ok(()),
        }
    }

    /// The deadline, if it has not come and no jump of the clock has brought its effect nearer.
    pub fn unshortened(&self, now: Moment, budget: Duration) -> Option<Moment> {
        match self {
            Self::Armed { deadline, fire_at, .. }
                if now < *fire_at && *fire_at == deadline.minus(budget) =>
            {
                Some(*deadline)
            }
            _ => None,
        }
    }

    /// When to wake up for stopping.
    pub fn fire_at(&self) -> Option<Moment> {
        match self {
            Self::Armed { fire_at, .. } => Some(*fire_at),
            Self::Disarmed | Self::Fired { .. } => None,
        }
    }

    /// As the agent gave it.
    pub fn deadline(&self) -> Option<Moment> {
        match self {
            Self::Armed { deadline, .. } | Self::Fired { deadline, .. } => Some(*deadline),
            Self::Disarmed => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(100);

    fn at(millis: u64) -> Moment {
        Moment::at_millis(millis)
    }

    fn armed(deadline: u64) -> Fence {
        let mut fence = Fence::Disarmed;
        fence.arm(at(deadline), at(0), BUDGET).expect("in time");
        fence
    }

    #[test]
    fn stopping_begins_a_budget_before_the_deadline_and_killing_half_of_it() {
        let mut fence = armed(1000);
        assert!(!fence.late(at(899)));
        assert!(fence.late(at(900)));
        assert!(!fence.kills(at(949)));
        assert!(fence.kills(at(950)));
        fence.fire();
        assert!(!fence.kills(at(949)));
        assert!(fence.kills(at(950)));
        assert_eq!(fence.deadline(), Some(at(1000)));
    }

    #[test]
    fn a_deadline_moves_both_ways_until_it_has_come() {
        let mut fence = armed(1000);
        fence.arm(at(5000), at(100), BUDGET).unwrap();
        assert_eq!(fence.fire_at(), Some(at(4900)));
        fence.arm(at(2000), at(200), BUDGET).unwrap();
        assert_eq!(fence.fire_at(), Some(at(1900)));
        assert!(fence.arm(at(9000), at(1900), BUDGET).is_err(), "too late to be extended");
        assert_eq!(fence.fire_at(), Some(at(1900)));
    }

    #[test]
    fn a_deadline_that_is_past_kills_a_primary_and_spares_a_standby() {
        let mut fence = armed(1000);
        assert!(fence.arm(at(150), at(100), BUDGET).is_err());
        assert!(fence.late(at(100)));
        let mut fence = Fence::Disarmed;
        assert!(fence.arm(at(150), at(100), BUDGET).is_err());
        assert_eq!(fence, Fence::Disarmed);
    }

    #[test]
    fn once_fired_only_an_empty_directory_disarms() {
        let mut fence = armed(1000);
        assert!(fence.fire());
        assert!(!fence.fire());
        assert!(fence.late(at(0)), "even if the clock were to go back");
        assert!(fence.arm(at(9000), at(950), BUDGET).is_err());
        assert!(fence.disarm(at(950), 1).is_err());
        fence.disarm(at(950), 0).unwrap();
        assert_eq!(fence, Fence::Disarmed);
        fence.arm(at(9000), at(960), BUDGET).unwrap();
    }

    #[test]
    fn a_jump_of_the_clock_asks_for_a_new_proof() {
        let mut fence = armed(10_000);
        fence.jumped(at(100), Duration::from_millis(2000));
        assert_eq!(fence.fire_at(), Some(at(2100)));
        assert!(fence.kills(at(2100)), "the whole grace was time to prove it");
        fence.jumped(at(200), Duration::from_millis(60_000));
        assert_eq!(fence.fire_at(), Some(at(2100)), "never later");
        fence.arm(at(20_000), at(300), BUDGET).unwrap();
        assert_eq!(fence.fire_at(), Some(at(19_900)));
    }

    #[test]
    fn who_may_be_writable() {
        let mut fired = armed(1000);
        fired.fire();
        for (fence, fencing, now, expected) in [
            (Fence::Disarmed, Fencing::Armed, 0, false),
            (Fence::Disarmed, Fencing::Unfenced, 0, true),
            (armed(1000), Fencing::Armed, 899, true),
            (armed(1000), Fencing::Armed, 900, false),
            (armed(1000), Fencing::Unfenced, 900, false),
            (fired, Fencing::Unfenced, 0, false),
        ] {
            assert_eq!(fence.may_write(fencing, at(now)).is_ok(), expected, "{fence:?} {now}");
        }
    }
}
