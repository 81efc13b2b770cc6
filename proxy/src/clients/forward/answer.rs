//! Requests that are answered here: of a transaction whose server is gone, and of those that were refused
//! before they were forwarded.

use kornak_protocol::frame::{Direction, Flow, FrameError, Scanner};

use super::{Conversation, Held, Moved, Stop};
use crate::registry::Doing;
use crate::session::Answered;
use crate::session::answers::Verdict;

impl Conversation {
    /// Answers in place of the server.
    pub(super) fn answer(&mut self, data: &[u8]) -> Moved {
        let (session, out) = (&mut self.session, &mut self.to_client);
        let mut gone = false;
        let scanned = self.client_scanner.scan(data, |seen| {
            if seen.tag == b'X' {
                gone = true;
                return Flow::StopAfter;
            }
            match session.answer(&seen, out) {
                Answered::Stay => Flow::Pass,
                Answered::Open => Flow::StopAfter,
            }
        });
        let at = scanned.map_err(Stop::ClientGarbage)?;
        if gone {
            return Err(Stop::ClientGone);
        }
        self.count_errors();
        self.drop_rest_of_message();
        let end = at - self.client_scanner.unshown();
        let stopped = at < data.len();
        self.client_scanner.reset();
        let rest = data.get(end..).unwrap_or_default();
        self.hold(rest, if stopped { Held::Blocked } else { Held::Partial });
        if self.session.is_open() {
            self.handle.set_doing(Doing::Idle);
        }
        Ok(true)
    }

    fn drop_rest_of_message(&mut self) {
        self.drop_client = self.client_scanner.remaining();
    }

    /// Refuses the request that is held back.
    pub fn refuse_held(&mut self, verdict: Verdict) -> Result<(), FrameError> {
        let held = self.held.split().freeze();
        let (session, out) = (&mut self.session, &mut self.to_client);
        let mut scanner = Scanner::new(Direction::Frontend);
        let scanned = scanner.scan(&held, |seen| {
            session.refuse(&seen, verdict, out);
            Flow::StopAfter
        });
        let at = scanned?;
        self.count_errors();
        self.drop_client = scanner.remaining();
        let end = at - scanner.unshown();
        let stopped = at < held.len();
        let rest = held.get(end..).unwrap_or_default();
        self.hold(rest, if stopped { Held::Blocked } else { Held::Partial });
        Ok(())
    }
}
