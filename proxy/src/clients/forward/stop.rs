//! Why the data path ends.

use std::sync::Arc;

use bytes::Bytes;
use kornak_protocol::error::ErrorView;
use kornak_protocol::frame::FrameError;
use kornak_protocol::sqlstate::SqlState;

use crate::net::backend::DialError;
use crate::session::words::{self, About};

/// Why the path ended.
#[derive(Debug)]
pub enum Stop {
    /// The client has something to say and there is no way to a server now.
    Wants,
    /// The server connection is gone; what it said last, if anything.
    ServerLost(Option<LastWords>),
    /// The client has left.
    ClientGone,
    /// The client says nothing more and is owed answers.
    ClientEnded,
    /// The client, whose request waits, has closed its side.
    HungUp,
    /// The client's bytes cannot be followed, and everything before them is answered.
    ClientGarbage(FrameError),
    /// The server's bytes cannot be followed.
    ServerGarbage,
    /// Somebody wants our attention.
    Flagged,
    /// The server connection lacks what the session has set.
    Unfit,
    /// The session may hold no more what keeps its server connection from others.
    Examine,
    /// The session rests, and its connection must be reset before another client gets it.
    Reset,
    /// The pool has no server connection for the request.
    Denied(Denied),
}

/// Why a pool lends nothing.
#[derive(Debug)]
pub enum Denied {
    /// Others had all connections for too long.
    Busy,
    /// There is none.
    NoServer,
    /// The login was refused.
    Login(Arc<DialError>),
}

/// A FATAL of a server.
#[derive(Debug, Clone)]
pub struct LastWords {
    pub sqlstate: SqlState,
    /// The whole message.
    pub message: Bytes,
}

impl LastWords {
    /// Whom they concern.
    pub fn about(&self) -> About {
        let Some(body) = self.message.get(5..).filter(|body| !body.is_empty()) else {
            return words::about_state(self.sqlstate);
        };
        words::about(&ErrorView::parse_prefix(body))
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use kornak_protocol::error::ErrorFields;
    use kornak_protocol::sqlstate::{ADMIN_SHUTDOWN, CRASH_SHUTDOWN, INTERNAL_ERROR};

    use super::*;

    fn said(sqlstate: SqlState, text: &'static str, routine: &'static str) -> About {
        let mut message = BytesMut::new();
        ErrorFields::fatal(sqlstate, text).routine(routine).put(&mut message);
        LastWords { sqlstate, message: message.freeze() }.about()
    }

    #[test]
    fn what_citus_repeats_is_told_from_what_the_server_says() {
        let text = "terminating connection due to administrator command";
        assert_eq!(said(ADMIN_SHUTDOWN, text, "DefaultCitusNoticeReceiver"), About::Server);
        assert_eq!(said(ADMIN_SHUTDOWN, text, "ProcessInterrupts"), About::Either);
        let text = "postmaster was shut down, exiting";
        assert_eq!(said(INTERNAL_ERROR, text, "FinishConnectionIO"), About::Server);
    }

    #[test]
    fn words_too_long_to_be_kept_are_judged_by_their_code() {
        let nothing = |sqlstate| LastWords { sqlstate, message: Bytes::new() }.about();
        assert_eq!(nothing(ADMIN_SHUTDOWN), About::Either);
        assert_eq!(nothing(CRASH_SHUTDOWN), About::Server);
    }
}
