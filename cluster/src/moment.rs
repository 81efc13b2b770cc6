//! Time as a value that a test can write down.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

/// A point on a clock that only moves forward and counts suspended time (`CLOCK_BOOTTIME`), as the
/// time since that clock's start. Unlike `std::time::Instant` it can be made from a number, so a
/// test writes [`Moment::at_millis`], and agent and guard can exchange it on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment(Duration);

impl Moment {
    /// A moment so long after the clock's start.
    pub fn new(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// For tests and wire formats: milliseconds since the clock's start.
    pub fn at_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// Time since the clock's start.
    pub fn since_start(self) -> Duration {
        self.0
    }

    /// How long ago `earlier` was; zero if it has not come yet.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// The moment `back` before this one, or the clock's start.
    pub fn minus(self, back: Duration) -> Self {
        Self(self.0.saturating_sub(back))
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later))
    }
}

impl Sub for Moment {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}s", self.0.as_secs_f64())
    }
}
