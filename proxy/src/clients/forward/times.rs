//! The activity of a session and its beginning, for bounds of its client's time.

use super::Conversation;
use crate::clients::serve::patience::{self, Times};
use crate::registry::Doing;

impl Conversation {
    /// The activity of the session and its beginning, for its client's time.
    pub fn times(&self) -> Times {
        let held = self.handle.doing() == Doing::Held || self.is_waiting() || self.is_blocked();
        let owes = self.session.owed() > 0 || !self.client_scanner.at_boundary();
        let doing = match self.session.in_transaction() {
            _ if held => patience::Doing::Held,
            true if owes => patience::Doing::Answering,
            true => patience::Doing::IdleInTransaction,
            false if self.is_quiet() => patience::Doing::Idle,
            false => patience::Doing::Answering,
        };
        // Without a bound nobody noted when the server spoke; after a reload that brings one it counts from there.
        let since = self.shared.timed_since.lock().unwrap_or(self.began);
        let last_said = self.last_heard.max(self.last_told).max(since);
        Times { doing, last_said, began: self.began.max(since) }
    }
}
