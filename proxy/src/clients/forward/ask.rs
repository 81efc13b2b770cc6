//! When a session asks its server what it holds ([`crate::clients::client`] asks): before a switchover, and
//! when somebody has made a temporary table ([`crate::background::sampler`]).

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use kornak_config::proxy::KeepSessions;

use super::Conversation;
use crate::registry::Doing;
use crate::session::journal::Pin;

/// How long a session is waited for that has begun to hold what it may give up by itself: a cursor WITH
/// HOLD, a statement of SQL's PREPARE, a temporary table. Frameworks do so within milliseconds; who holds
/// everybody up for longer is not waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often a session asks whose statements call such functions all the time.
const ASK_PAUSE: Duration = Duration::from_secs(1);

impl Conversation {
    /// The session stands between transactions. With a young cursor WITH HOLD or the like it stays inside all the
    /// same: a switchover waits for that as for a transaction, but not for one that is kept.
    pub fn leave_gate(&mut self) {
        if !self.holds_something_young() {
            self.ticket.leave();
        }
        self.said_again = false;
        self.handle.set_pin(self.session.pinned());
        self.handle.set_listens(self.session.listens());
        self.handle.set_doing(Doing::Idle);
    }

    fn holds_something_young(&mut self) -> bool {
        if !self.session.pinned().is_some_and(Pin::may_be_short) {
            self.holds_since = None;
            return false;
        }
        self.holds_since.get_or_insert_with(Instant::now).elapsed() < PATIENCE
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
        if self.is_suspicious() {
            self.examined = Some(Instant::now());
            self.session.take_doubt();
            return true;
        }
        self.shared.asks.load(Relaxed)
            && self.is_askable()
            && (self.session.take_doubt()
                // It will not come in again before the switchover.
                || self.shared.gate.is_closed(self.side))
    }

    /// Whether the session may hold nothing that pins it, or nothing any more, and has not asked. It asks at
    /// once, for a crash leaves no time to: frameworks set a time zone by `set_config`.
    fn is_suspicious(&self) -> bool {
        self.session.pinned().is_some()
            && self.session.has_doubt()
            && self.examined.is_none_or(|when| when.elapsed() >= ASK_PAUSE)
            && self.shared.settings().failover.keep_sessions == KeepSessions::Clean
            && self.is_askable()
    }

    /// Whether an idle session had no time to ask about that before, and may now: it enters the gate.
    pub fn may_ask_late(&mut self) -> bool {
        let may = !self.ticket.is_inside()
            && self.is_quiet()
            && self.is_suspicious()
            && self.may_use_link()
            && self.ticket.enter(self.side);
        if may {
            self.examined = Some(Instant::now());
            self.session.take_doubt();
        }
        may
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
