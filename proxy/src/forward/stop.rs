//! Why the data path ends.

use std::sync::Arc;

use bytes::Bytes;
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
    /// The client's bytes cannot be followed.
    ClientGarbage,
    /// The server's bytes cannot be followed.
    ServerGarbage,
    /// Somebody wants our attention.
    Flagged,
    /// The server connection lacks what the session has set.
    Unfit,
    /// The session may hold no more what keeps its server connection from others.
    Examine,
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
