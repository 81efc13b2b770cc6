//! The server connection is gone.

use bytes::BytesMut;

use super::{Conversation, Held, Stop};
use crate::registry::Doing;
use crate::session::Aftermath;
use crate::session::journal::Pin;

impl Conversation {
    /// The server connection is gone: tells the client what is true.
    /// `sudden`: nobody had announced it.
    pub fn lose_server(&mut self, sudden: bool) -> Aftermath {
        let may_reread = self.may_reread();
        let half_told = self.link.take().is_some_and(|link| link.scanner.remaining() > 0);
        // Who listened must not go on as if nothing had been missed.
        let may_go_on = !sudden || !self.session.listens();
        if may_go_on && !self.kept.is_empty() {
            if self.session.forget_harmless() {
                self.say_again();
                return Aftermath::Lives;
            }
            if may_reread && self.session.forget_read() {
                self.said_again = true;
                self.say_again();
                return Aftermath::Lives;
            }
        }
        self.kept.clear();
        if self.handle.holds_advisory_locks() {
            self.session.pin(Pin::Advisory);
        }
        let aftermath = self.session.lose_server(half_told, sudden, &mut self.to_client);
        self.count_errors();
        self.drop_client += self.client_scanner.remaining();
        self.client_scanner.reset();
        self.ticket.leave();
        self.handle.set_server(&self.shared.nobody, None);
        let doing = if self.session.is_open() { Doing::Idle } else { Doing::Dead };
        self.handle.set_doing(doing);
        aftermath
    }

    /// A leader was lost a moment ago, by another session: whether this one's server is there is looked at before it
    /// is sent anything, for what it was sent might have been executed. `None`: it may be sent.
    #[cold]
    pub(super) fn look_before(&mut self) -> Option<Stop> {
        let link = self.link.as_mut().filter(|link| link.leading)?;
        if !link.is_alive() {
            return Some(Stop::ServerLost(None));
        }
        // Its process may be about to go: one look at the server answers for all sessions.
        let doubted = self.member.is_none() && self.shared.is_doubted(link.group);
        doubted.then_some(Stop::Wants)
    }

    /// Puts back what was forwarded and changed nothing.
    fn say_again(&mut self) {
        let mut held = BytesMut::from(&*std::mem::take(&mut self.kept));
        held.extend_from_slice(&self.held);
        self.held = held;
        self.held_is = Held::Blocked;
        self.client_scanner.reset();
        self.ticket.leave();
        self.handle.set_server(&self.shared.nobody, None);
    }
}
