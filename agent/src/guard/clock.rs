//! The clock of deadlines.

use std::time::Duration;

use kornak_cluster::Moment;
use rustix::time::{ClockId, Timespec, clock_gettime};

/// Now, on the clock that only moves forward and counts the time a host was suspended
/// (`CLOCK_BOOTTIME`). The same in every process of one host, until its next boot.
pub fn boottime_now() -> Moment {
    Moment::new(duration(clock_gettime(ClockId::Boottime)))
}

/// Time since 1970 by the wall clock, which may jump.
pub(super) fn realtime_now() -> Duration {
    duration(clock_gettime(ClockId::Realtime))
}

/// For timers that fire at a moment of [`boottime_now`]'s clock.
pub(super) fn timespec(moment: Moment) -> Timespec {
    Timespec::try_from(moment.since_start()).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}

fn duration(time: Timespec) -> Duration {
    Duration::try_from(time).unwrap_or_default()
}
