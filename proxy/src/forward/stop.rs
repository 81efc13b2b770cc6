//! Why the data path ends.

use std::sync::Arc;

use bytes::Bytes;
use kornak_protocol::error::ErrorView;
use kornak_protocol::frame::FrameError;
use kornak_protocol::sqlstate::SqlState;

use crate::backend::DialError;

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
    /// Whether they are those of a server behind this one: Citus says what the FATAL of a worker that
    /// goes down says, and ends its own session with it. Neither was meant for the client.
    pub fn are_a_workers(&self) -> bool {
        let body = self.message.get(5..).unwrap_or_default();
        ErrorView::parse_prefix(body).routine == Some(b"DefaultCitusNoticeReceiver")
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use kornak_protocol::error::ErrorFields;
    use kornak_protocol::sqlstate::ADMIN_SHUTDOWN;

    use super::*;

    fn words(routine: &'static str) -> LastWords {
        let text = "terminating connection due to unexpected postmaster exit";
        let mut message = BytesMut::new();
        ErrorFields::fatal(ADMIN_SHUTDOWN, text).routine(routine).put(&mut message);
        LastWords { sqlstate: ADMIN_SHUTDOWN, message: message.freeze() }
    }

    #[test]
    fn what_citus_repeats_is_told_from_what_the_server_says() {
        assert!(words("DefaultCitusNoticeReceiver").are_a_workers());
        assert!(!words("ProcessInterrupts").are_a_workers());
        let nothing = LastWords { sqlstate: ADMIN_SHUTDOWN, message: Bytes::new() };
        assert!(!nothing.are_a_workers());
    }
}
