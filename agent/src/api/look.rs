//! A look at the server for one question: `GET /patroni` answers from it.
//!
//! When nobody leads, members ask each other how much of the log they have, and an answer counts as proof. It has to
//! be about a moment after the question, or it leaves out what was acknowledged in between. Questions that come
//! together share a look, and looks that are asked for have a distance, so that asking often is no way to load the
//! server.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{MemberState, Moment, discard};
use parking_lot::Mutex;

use super::{Api, status};
use crate::node::{Command, NodeView};

/// The longest a question waits for a look. Members wait a second for the answer.
const LIMIT: Duration = Duration::from_millis(800);

/// The shortest time between two looks that are asked for: a hundred a second cost a server a few percent of a core.
const APART: Duration = Duration::from_millis(10);

/// When the last look is, or was, asked for.
#[derive(Debug, Default)]
pub(super) struct Looks(Mutex<Moment>);

impl Looks {
    /// How long to wait before asking for a look; `None`: one that is still to be asked for will do.
    fn delay(&self, now: Moment) -> Option<Duration> {
        let mut last = self.0.lock();
        if *last > now {
            return None;
        }
        // The first one ever need not wait.
        let never = *last == Moment::default();
        *last = if never { now } else { now.max(*last + APART) };
        Some(last.since(now))
    }
}

impl Api {
    /// The node as of a look that began after this call. A server that does not answer in time is shown without
    /// anything that only a running server has.
    pub(super) async fn look(&self, known: Arc<NodeView>) -> Arc<NodeView> {
        let asked = self.machine.now();
        // Of a server that does not run nothing is shown that could count.
        if known.state != MemberState::Running || known.observed_at >= asked {
            return known;
        }
        let mut views = self.views.clone();
        if let Some(delay) = self.looks.delay(asked) {
            let commands = self.commands.clone();
            // Others may wait for the same look after this client has gone.
            let machine = self.machine.clone();
            self.machine.spawn(async move {
                machine.sleep(delay).await;
                // A queue that is full means a busy driver, and no answer in time.
                discard::goes_on_either_way(commands.try_send(Command::Look));
            });
        }
        let fresh = views.wait_for(|view| view.observed_at >= asked);
        match self.machine.timeout(LIMIT, fresh).await {
            Ok(Ok(view)) => Arc::clone(&view),
            Ok(Err(_)) | Err(_) => Arc::new(status::unanswered(&known)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_share_looks_and_looks_keep_a_distance() {
        let at = Moment::at_millis;
        let looks = Looks::default();
        assert_eq!(looks.delay(at(1000)), Some(Duration::ZERO));
        // The look has been asked for and may have begun: a question that comes later needs another one.
        assert_eq!(looks.delay(at(1002)), Some(Duration::from_millis(8)));
        assert_eq!(looks.delay(at(1003)), None, "that one will do");
        assert_eq!(looks.delay(at(1011)), Some(Duration::from_millis(9)));
        assert_eq!(looks.delay(at(2000)), Some(Duration::ZERO));
    }
}
