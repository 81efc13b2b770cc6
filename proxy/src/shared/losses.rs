//! That a leader was lost a moment ago, by some session.
//!
//! A server that dies takes all its sessions' connections along, but the sessions notice one after the other. What is
//! sent meanwhile over a connection that is dead already would have an unknown outcome. So from the first loss on every
//! session looks before it begins anything, and waits for the prover's look at the server, until a moment has passed.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use kornak_cluster::{GroupId, discard};

use super::Shared;

/// How long after a loss others look: a guard kills what is left of a server within much less.
const RECENT: Duration = Duration::from_secs(2);

/// Between two looks of a session that waits: its own connection may turn out to be dead.
const LOOK: Duration = Duration::from_millis(10);

static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// When a leader was lost last.
#[derive(Debug, Default)]
pub struct Losses {
    /// Milliseconds since the first one of the process, and one more; 0: none of late.
    last: AtomicU64,
}

impl Losses {
    /// A leader was lost now.
    pub fn note(&self) {
        self.last.store(now(), Relaxed);
    }

    /// Whether one was lost a moment ago. Nearly always one look at a number.
    #[inline]
    pub fn are_recent(&self) -> bool {
        let last = self.last.load(Relaxed);
        last != 0 && self.is_recent(last)
    }

    #[cold]
    fn is_recent(&self, last: u64) -> bool {
        let recent = now().saturating_sub(last) < RECENT.as_millis() as u64;
        if !recent {
            // Unless there is a newer one.
            discard::goes_on_either_way(self.last.compare_exchange(last, 0, Relaxed, Relaxed));
        }
        recent
    }
}

fn now() -> u64 {
    u64::try_from(BEGAN.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
}

/// Waits for the look at a server that is in doubt, or a little while.
pub async fn verdict(shared: &Shared, group: GroupId) {
    if !shared.losses.are_recent() || !shared.is_doubted(group) {
        return;
    }
    let mut standings = shared.standings.subscribe();
    tokio::select! {
        _ = standings.changed() => {}
        () = tokio::time::sleep(LOOK) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_recent_for_a_while() {
        let losses = Losses::default();
        assert!(!losses.are_recent());
        losses.note();
        assert!(losses.are_recent());
        let last = losses.last.load(Relaxed);
        losses.last.store(last + RECENT.as_millis() as u64, Relaxed);
        assert!(losses.are_recent(), "one that another thread has just noted");
    }
}
