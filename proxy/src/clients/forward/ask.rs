//! When a session asks its server what it holds ([`crate::clients::client`] asks): before a switchover, and
//! when somebody has made a temporary table ([`crate::background::sampler`]).

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::Conversation;
use crate::registry::Doing;
use crate::session::journal::Pin;

/// How long after its declaration a cursor WITH HOLD is waited for. Frameworks read a result by one
/// and close it within milliseconds; who holds everybody up for longer is not waited for.
const CURSOR_PATIENCE: Duration = Duration::from_secs(5);

impl Conversation {
    /// The session stands between transactions. With a young cursor WITH HOLD it stays inside all the
    /// same: a switchover waits for that as for a transaction, but not for one that is kept.
    pub fn leave_gate(&mut self) {
        if !self.has_young_cursor() {
            self.ticket.leave();
        }
        self.said_again = false;
        self.handle.set_pin(self.session.pinned());
        self.handle.set_listens(self.session.listens());
        self.handle.set_doing(Doing::Idle);
    }

    fn has_young_cursor(&mut self) -> bool {
        if self.session.pinned() != Some(Pin::HoldCursor) {
            self.cursor_since = None;
            return false;
        }
        self.cursor_since.get_or_insert_with(Instant::now).elapsed() < CURSOR_PATIENCE
    }

    /// Somebody waits at the gate: its cursor may have grown old.
    pub fn leave_if_idle(&mut self) {
        if self.ticket.is_inside() && self.is_settled && self.is_quiet() {
            self.leave_gate();
        }
    }

    /// Whether the session, which is about to leave the gate, was to ask and was busy; or, before a
    /// switchover, did something since it asked last that may pin it.
    #[inline]
    pub(super) fn must_ask(&mut self) -> bool {
        if std::mem::take(&mut self.to_ask) {
            return self.is_askable();
        }
        self.shared.asks.load(Relaxed)
            && self.is_askable()
            && (self.session.take_doubt()
                // It will not come in again before the switchover.
                || self.shared.gate.is_closed(self.side))
    }

    /// Whether an idle session may ask its server: it enters the gate for that.
    pub fn may_ask(&mut self) -> bool {
        self.to_ask = !self.is_quiet();
        !self.to_ask
            && self.is_askable()
            && self.may_use_link()
            // Whoever asks it in its turn is inside for it.
            && (self.ticket.enter(self.side) || self.handle.is_asked())
    }

    fn is_askable(&self) -> bool {
        let leads = self.link.as_ref().is_some_and(|link| link.leading);
        leads && self.member.is_none() && self.session.pinned().is_none_or(Pin::can_be_examined)
    }
}
