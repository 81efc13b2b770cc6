//! A host's boot-time clock: it runs a little fast or slow, counts suspended time, and starts anew
//! with each boot.

use std::time::Duration;

use kornak_cluster::Moment;

use super::rng::Rng;

/// Clocks differ from true time by at most this many parts in a thousand, far more than real ones.
const MAX_DRIFT_PER_MILLE: u64 = 5;

/// One host's clock.
#[derive(Debug, Clone, Copy)]
pub struct HostClock {
    booted: Moment,
    /// Shown time runs `rate` millionths as fast as true time.
    rate: u64,
    /// Names the boot.
    pub boot: u32,
}

impl HostClock {
    /// A host that booted some time before the world began.
    pub fn new(rng: &Rng) -> Self {
        let drift = MAX_DRIFT_PER_MILLE * 1000;
        let rate = 1_000_000 - drift + rng.next() % (2 * drift + 1);
        Self { booted: Moment::default(), rate, boot: 1 }
    }

    /// The time that the clock shows.
    pub fn show(&self, now: Moment) -> Moment {
        let up = u64::try_from(now.since(self.booted).as_micros()).unwrap_or(u64::MAX);
        Moment::new(Duration::from_micros(up / 1000 * self.rate / 1000 + 1_000_000_000))
    }

    /// How much true time passes until it shows `shown`.
    pub fn until(&self, shown: Moment, now: Moment) -> Duration {
        let left = u64::try_from(shown.since(self.show(now)).as_micros()).unwrap_or(u64::MAX / 4);
        // Rounded up: a timer never fires before the clock shows its time.
        Duration::from_micros(left / 1000 * 1_000_000_000 / self.rate + 2001)
    }

    /// The host was down; its clock starts again.
    pub fn reboot(&mut self, now: Moment) {
        self.booted = now;
        self.boot += 1;
    }
}
