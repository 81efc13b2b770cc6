//! Clients that leave, in whatever moment, and what is left of what they said.
//!
//! An idle server ignores Flush and the rest of a COPY that is over; these messages end here, so that a
//! client that sends nothing else has neither a server connection nor a place inside the gate. A client
//! that has shut its sending side is served until everything it has asked is answered; whether it
//! is still there shows when something is written to it, so it is told a parameter that it knows.

use bytes::BytesMut;
use kornak_cluster::discard;
use kornak_protocol::backend;
use kornak_protocol::frame::{Direction, Flow, Scanner};
use kornak_protocol::frontend;
use kornak_protocol::frontend::Target;

use std::pin::Pin;
use std::task::Context;

use tokio::io::AsyncWrite as _;

use super::io::write;
use super::{Conversation, Held, Moved, Stop};
use crate::net::stream::HungUp;
use crate::session::malformed::is_ignored;
use crate::session::statements::NOBODY;

/// The known state of the client's end of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Presence {
    /// The client may speak.
    #[default]
    There,
    /// The client has shut its sending side, and was there when it was told something after that.
    Listens,
    /// The client has said its last: end of stream, or Terminate behind a request.
    Ended,
}

impl Conversation {
    /// Leaves out what an idle server would ignore. What is left begins at a message.
    pub(super) fn skip_ignored<'a>(&mut self, data: &'a [u8]) -> Result<&'a [u8], Stop> {
        if !matches!(data.first(), Some(b'd' | b'c' | b'f' | b'H')) {
            return Ok(data);
        }
        let mut scanner = Scanner::new(Direction::Frontend);
        let scanned = scanner
            .scan(data, |seen| if is_ignored(&seen) { Flow::Pass } else { Flow::StopBefore });
        let at = scanned.map_err(Stop::ClientGarbage)?;
        self.drop_client = scanner.remaining();
        Ok(data.get(at - scanner.unshown()..).unwrap_or_default())
    }

    /// The client will say nothing more. It is served as long as the server answers by itself.
    #[cold]
    pub(super) fn client_ended(&mut self, cx: &mut Context<'_>) -> Moved {
        self.held.clear();
        if self.presence == Presence::Ended {
            return Ok(false);
        }
        if self.is_answered() {
            return Err(Stop::ClientGone);
        }
        self.presence = Presence::Ended;
        if !self.session.will_answer() {
            // A batch without its Sync: what was flushed of it is still to come.
            if self.session.is_copying_in() || self.session.owed() == 0 {
                return Err(Stop::ClientGone);
            }
            let Some(link) = &mut self.link else { return Err(Stop::ClientGone) };
            let mut bye = BytesMut::new();
            frontend::put_terminate(&mut bye);
            self.session.terminated();
            // An error shows itself when the connection is read.
            discard::reader_finds_out(write(&mut link.stream, &mut link.to_server, &bye, cx));
        }
        Err(Stop::ClientEnded)
    }

    /// A client that will say nothing more cannot end its COPY: the server is told so by the end of the stream, and
    /// what it says of that is for the client.
    pub(super) fn end_copy(&mut self, cx: &mut Context<'_>) {
        let is_open = self.presence == Presence::Ended
            && self.session.is_copying_in()
            && !self.session.is_terminated();
        let Some(link) = self.link.as_mut().filter(|it| is_open && it.to_server.is_empty()) else {
            return;
        };
        // Shut down when the operating system is ready for it; an error shows itself when the connection is read.
        if Pin::new(&mut link.stream).poll_shutdown(cx).is_ready() {
            self.session.terminated();
        }
    }

    /// Whether nothing is owed to the client any more.
    fn is_answered(&self) -> bool {
        !self.session.is_open() || self.link.is_none() || !self.session.in_flight()
    }

    /// A client that has ended may go: it has been told everything.
    pub(super) fn may_go(&self) -> bool {
        self.presence == Presence::Ended && self.is_answered() && self.to_client.is_empty()
    }

    /// Whether the client's side is closed, as far as the kernel knows; what it has said before may
    /// still be unread. Not of one of which that is known and that was there all the same.
    pub fn has_hung_up(&self) -> bool {
        match self.client.hung_up() {
            HungUp::No => false,
            HungUp::Half => self.presence != Presence::Listens,
            HungUp::Whole => true,
        }
    }

    /// Tells the client a parameter that it knows, if a message may begin here. If it has gone, its
    /// kernel says so.
    pub fn tell_something_known(&mut self) -> bool {
        let mid_message = self.link.as_ref().is_some_and(|link| link.scanner.remaining() > 0);
        if mid_message || !self.to_client.is_empty() {
            return false;
        }
        let known = self.session.told().iter().next();
        let Some((name, value)) = known else { return false };
        // What a server has said fits into a message.
        backend::put_parameter_status(name, value, &mut self.to_client).is_ok()
    }

    /// A COPY has failed in such a way that the server may owe one ReadyForQuery more than we
    /// know: asks for something whose answer comes behind it.
    pub(super) fn settle_doubt(&mut self, cx: &mut Context<'_>) {
        if !self.session.is_doubtful() || !self.client_scanner.at_boundary() {
            return;
        }
        let Some(link) = &mut self.link else { return };
        let mut marker = BytesMut::new();
        // A constant name always fits.
        discard::message_fits(frontend::put_close(Target::Statement(NOBODY), &mut marker));
        frontend::put_sync(&mut marker);
        self.session.marked();
        // An error shows itself when the connection is read.
        discard::reader_finds_out(write(&mut link.stream, &mut link.to_server, &marker, cx));
    }

    /// Whether bytes are held back until something else has happened.
    pub fn is_blocked(&self) -> bool {
        self.held_is == Held::Blocked && !self.held.is_empty()
    }

    /// Keeps bytes of the client's that are not forwarded yet.
    pub(super) fn hold(&mut self, data: &[u8], why: Held) {
        self.held.extend_from_slice(data);
        self.held_is = why;
        if self.held.is_empty() && self.held.capacity() > 0 {
            self.held = BytesMut::new();
        }
    }
}
