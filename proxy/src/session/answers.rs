//! The proxy's own answers to a client whose server cannot answer.
//!
//! Exactly one ErrorResponse for each request that got none, and one ReadyForQuery for each that is
//! owed: a driver counts them. Not here: which error is true ([`super::Session::lose_server`]).

use bytes::BytesMut;
use kornak_protocol::backend;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::frame::FrameError;
use kornak_protocol::pipeline::{Kind, Owner, Pipeline};
use kornak_protocol::sqlstate::{
    ADMIN_SHUTDOWN, CANNOT_CONNECT_NOW, CONFIGURATION_LIMIT_EXCEEDED, IN_FAILED_SQL_TRANSACTION,
    PROTOCOL_VIOLATION, QUERY_CANCELED, SERIALIZATION_FAILURE, SqlState, TOO_MANY_CONNECTIONS,
    TRANSACTION_RESOLUTION_UNKNOWN,
};
use kornak_protocol::txn::TransactionStatus;

use super::journal::Pin;

/// An error of ours, as a word; [`Verdict::fields`] has the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// 40001: the transaction is certainly rolled back.
    Retry,
    /// 08007: the outcome is unknown.
    Unknown,
    /// 08007: the same, and the session ends.
    UnknownEnds,
    /// 57P03: nothing was executed.
    NotDone,
    /// 57P03: no server within the hold time.
    NoServer,
    /// 53300: every server connection of the pool was busy for too long.
    Busy,
    /// 53400: more prepared statements than are kept of one client.
    TooManyStatements,
    /// 25P02: the transaction is dead.
    Dead,
    /// 57014: cancelled while it was held.
    Cancelled,
    /// 57P01: the session ends, for this reason.
    Ends(Option<Pin>),
    /// 57P01: no session outlives a failover, by `keep_sessions: none`.
    NotKept,
    /// 57P01: the proxy shuts down.
    Shutdown,
    /// 08P01: a message that no server could read; the session goes on.
    Malformed,
    /// 08P01: what came could not be followed.
    Garbage(FrameError),
}

impl Verdict {
    /// The SQLSTATE.
    pub fn sqlstate(self) -> SqlState {
        match self {
            Self::Retry => SERIALIZATION_FAILURE,
            Self::Unknown | Self::UnknownEnds => TRANSACTION_RESOLUTION_UNKNOWN,
            Self::NotDone | Self::NoServer => CANNOT_CONNECT_NOW,
            Self::Busy => TOO_MANY_CONNECTIONS,
            Self::TooManyStatements => CONFIGURATION_LIMIT_EXCEEDED,
            Self::Dead => IN_FAILED_SQL_TRANSACTION,
            Self::Cancelled => QUERY_CANCELED,
            Self::Ends(_) | Self::NotKept | Self::Shutdown => ADMIN_SHUTDOWN,
            Self::Malformed => PROTOCOL_VIOLATION,
            Self::Garbage(error) => error.sqlstate(),
        }
    }

    /// The error as the client reads it.
    pub fn fields(self) -> ErrorFields {
        let state = self.sqlstate();
        match self {
            Self::Retry => ErrorFields::error(state, "transaction was rolled back by a failover")
                .hint("Run the transaction again."),
            Self::Unknown | Self::UnknownEnds => {
                let text = "connection to the server was lost, outcome unknown";
                let error = match self {
                    Self::Unknown => ErrorFields::error(state, text),
                    _ => ErrorFields::fatal(state, text),
                };
                error
                    .detail("The statement was sent and may or may not have been committed.")
                    .hint("Look before running it again.")
            }
            Self::NotDone => ErrorFields::error(state, "statement was not executed: failover")
                .hint("Nothing was changed; run it again."),
            Self::NoServer => ErrorFields::error(state, "no server is available")
                .detail("The statement was held back and not executed.")
                .hint("Try again later."),
            Self::Busy => ErrorFields::error(state, "no server connection became free in time")
                .detail("The statement was held back and not executed.")
                .hint(
                    "All connections of the pool are in use: see its pool_size and wait_timeout.",
                ),
            Self::TooManyStatements => {
                ErrorFields::error(state, "too many prepared statements of one client of a pool")
                    .detail("The proxy keeps 4 MB of them for each client.")
                    .hint(
                        "Close those that are not used any more, or use a listener without a pool.",
                    )
            }
            Self::Dead => ErrorFields::error(
                state,
                "current transaction is aborted, commands ignored until end of transaction block",
            ),
            Self::Cancelled => ErrorFields::error(state, "canceling statement due to user request"),
            Self::Ends(pin) => {
                let error = ErrorFields::fatal(state, "terminating connection due to failover");
                match pin {
                    Some(pin) => error.hint(pin.hint()),
                    None => error,
                }
            }
            Self::NotKept => ErrorFields::fatal(state, "terminating connection due to failover")
                .hint("The proxy is set to keep no sessions (keep_sessions: none)."),
            Self::Shutdown => {
                ErrorFields::fatal(state, "terminating connection due to administrator command")
            }
            // A server's words.
            Self::Malformed => ErrorFields::error(state, "invalid message format"),
            Self::Garbage(FrameError::UnknownType { tag }) => {
                ErrorFields::fatal(state, format!("invalid frontend message type {tag}"))
            }
            Self::Garbage(_) => ErrorFields::fatal(state, "invalid message format"),
        }
    }

    /// Appends the ErrorResponse.
    pub fn put(self, out: &mut BytesMut) {
        self.fields().routine("kornak").put(out);
    }
}

/// The answer to the requests in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The oldest request.
    pub first: Verdict,
    /// The verdict about the requests behind the first one.
    pub others: Verdict,
    /// Status of every ReadyForQuery.
    pub status: TransactionStatus,
}

/// Appends the answers of everything in flight and notes the errors among them. The result says
/// whether a batch is left open whose Sync is still to come; it has had its error.
pub fn put_owed(
    pipeline: &Pipeline,
    answer: Answer,
    out: &mut BytesMut,
    errors: &mut Vec<Verdict>,
) -> bool {
    let mut verdict = answer.first;
    let mut told = pipeline.error_passed() || pipeline.is_skipping();
    let mut tell = |verdict: Verdict, out: &mut BytesMut| {
        verdict.put(out);
        errors.push(verdict);
    };
    for owner in pipeline.owed() {
        if !told {
            tell(verdict, out);
            told = true;
        }
        if ends_batch(owner) {
            backend::put_ready_for_query(answer.status, out);
            verdict = answer.others;
            told = false;
        }
    }
    if pipeline.is_unsynced() && pipeline.owed().next().is_none() && !told {
        // Everything of the batch was answered, its Sync has not come yet.
        tell(verdict, out);
    }
    pipeline.is_unsynced()
}

fn ends_batch(owner: &Owner) -> bool {
    matches!(owner.kind, Kind::Query | Kind::FunctionCall | Kind::Sync)
}
