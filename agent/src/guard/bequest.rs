//! The text that an agent leaves to the next one. The guard keeps it, which outlives the agent, and forgets it with the
//! postmaster that it is about.

use std::time::Duration;

use kornak_cluster::Moment;

use super::fence::Fence;
use super::wire::{Kept, nanos};

/// The text, if there is one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bequest(Option<String>);

impl Bequest {
    /// An empty text leaves nothing.
    pub fn new(text: String) -> Self {
        Self(Some(text).filter(|text| !text.is_empty()))
    }

    /// The text with the armed deadline, as long as that is as good as when it was armed; else nothing.
    pub fn left(&self, fence: &Fence, now: Moment, budget: Duration) -> Option<Kept> {
        let (deadline, text) = (fence.unshortened(now, budget)?, self.0.clone()?);
        Some(Kept { deadline_ns: nanos(deadline), text })
    }

    /// [`Self::left`] for the wire.
    pub(super) fn shown(&self, fence: &Fence, now: Moment, budget: Duration) -> String {
        let left = self.left(fence, now, budget);
        left.and_then(|kept| serde_json::to_string(&kept).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_there_while_the_deadline_is_armed_and_has_not_come() {
        let (at, budget) = (Moment::at_millis, Duration::from_millis(100));
        let mut fence = Fence::Disarmed;
        let text = Bequest::new("x".to_owned());
        assert_eq!(text.left(&fence, at(0), budget), None);
        fence.arm(at(1000), at(0), budget).unwrap();
        let kept = Kept { deadline_ns: 1_000_000_000, text: "x".to_owned() };
        assert_eq!(text.left(&fence, at(899), budget), Some(kept));
        assert_eq!(text.left(&fence, at(900), budget), None, "the guard stops the server");
        assert_eq!(Bequest::new(String::new()).left(&fence, at(0), budget), None);
        fence.jumped(at(100), Duration::from_millis(300));
        assert_eq!(
            text.left(&fence, at(200), budget),
            None,
            "the lease may have run out meanwhile"
        );
        fence.arm(at(1000), at(300), budget).unwrap();
        fence.fire();
        assert_eq!(text.left(&fence, at(300), budget), None);
    }
}
