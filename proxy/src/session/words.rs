//! Judges what an error says about the server that it comes from, and about servers behind that one: pure.
//!
//! Citus's coordinator and workers repeat to their clients what other nodes said when they died, under
//! SQLSTATEs that say nothing (XX000) or that were meant for another session (57P01).

use bytes::{Buf, BufMut};
use kornak_protocol::error::{ErrorView, Severity};
use kornak_protocol::frame::Seen;
use kornak_protocol::pipeline::Loss;
use kornak_protocol::sqlstate::{
    ADMIN_SHUTDOWN, CANNOT_CONNECT_NOW, CRASH_SHUTDOWN, INTERNAL_ERROR, PROTOCOL_VIOLATION,
    SERIALIZATION_FAILURE, SqlState, TRANSACTION_RESOLUTION_UNKNOWN,
};

use super::Session;

/// The subject of the last words of a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// This session alone.
    Session,
    /// The server, which goes down, or one behind it.
    Server,
    /// Either; the server has to be asked.
    Either,
}

/// Citus repeats the FATAL of a worker and ends its own session with it.
const REPEATED: &[u8] = b"DefaultCitusNoticeReceiver";

/// Citus repeats the ERROR of another node, or says what libpq said of the connection to it.
const REPORTED: &[u8] = b"ReportResultError";

/// RAISE of PL/pgSQL.
const RAISED: &[u8] = b"exec_stmt_raise";

/// Said by processes that find their postmaster gone: PostgreSQL's in the
/// server's language, Citus's never translated.
const ORPHANED: [&[u8]; 2] = [b"postmaster was shut down", b"unexpected postmaster exit"];

/// PostgreSQL's functions that say so, whatever the language.
const ORPHANS: [&[u8]; 2] = [b"secure_read", b"secure_write"];

/// Texts of libpq for a connection that broke, where the other side gave no SQLSTATE.
const BROKEN: [&[u8]; 8] = [
    b"server closed the connection unexpectedly",
    b"could not receive data from server",
    b"could not send data to server",
    b"no connection to the server",
    b"connection not open",
    b"SSL SYSCALL error",
    b"SSL connection has been closed unexpectedly",
    b"SSL error",
];

/// Texts of Citus for a transaction that is over here, and whose part on another node is not known
/// to be.
const ENDED: [&[u8]; 1] = [b"could not commit transaction for shard"];

/// The subject of a FATAL or a PANIC.
pub fn about(view: &ErrorView<'_>) -> About {
    let state = view.sqlstate();
    let repeated = state == ADMIN_SHUTDOWN && view.routine == Some(REPEATED);
    // One PANIC ends every session of the server.
    if repeated || is_orphans(view) || view.severity() == Severity::Panic {
        return About::Server;
    }
    about_state(state)
}

/// [`about`] where only the SQLSTATE is known.
pub fn about_state(state: SqlState) -> About {
    match state {
        CRASH_SHUTDOWN => About::Server,
        ADMIN_SHUTDOWN | CANNOT_CONNECT_NOW => About::Either,
        PROTOCOL_VIOLATION => About::Session,
        // Internal and system errors, lost connections: a server that dies is a reason for each.
        other if matches!(&other.class(), b"XX" | b"58" | b"08") => About::Either,
        _ => About::Session,
    }
}

/// Whether a process of the server speaks whose postmaster is gone; an ERROR of it has a FATAL behind
/// it, or nothing.
pub fn is_orphans(view: &ErrorView<'_>) -> bool {
    // Whoever repeats it, or raises such a text, lives.
    let said_itself = ![Some(REPORTED), Some(RAISED)].contains(&view.routine);
    let state = view.sqlstate();
    if !said_itself || !matches!(state, ADMIN_SHUTDOWN | CRASH_SHUTDOWN | INTERNAL_ERROR) {
        return false;
    }
    let said = view.message.unwrap_or_default();
    let by_function =
        state == ADMIN_SHUTDOWN && view.routine.is_some_and(|routine| ORPHANS.contains(&routine));
    by_function || ORPHANED.iter().any(|text| contains(said, text))
}

/// Whether the ERROR repeats what a node behind the server said when it went down.
fn is_of_a_lost_node(view: &ErrorView<'_>) -> bool {
    let said = view.message.unwrap_or_default();
    let says = |texts: &[&[u8]]| texts.iter().any(|text| contains(said, text));
    let is_reported = view.routine == Some(REPORTED);
    match view.sqlstate() {
        ADMIN_SHUTDOWN | CRASH_SHUTDOWN | CANNOT_CONNECT_NOW => is_reported,
        INTERNAL_ERROR if is_reported => says(&ORPHANED) || says(&BROKEN),
        INTERNAL_ERROR => view.routine != Some(RAISED) && says(&ENDED),
        _ => false,
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

impl Session {
    /// An ERROR that repeats the end of a node behind the server gets the SQLSTATE that is true of the
    /// statement, as if its own server had been lost; text and length stay.
    pub(super) fn speak_for_a_lost_node(&mut self, view: &ErrorView<'_>, seen: &Seen<'_>) {
        if !is_of_a_lost_node(view) || !seen.is_whole() || !self.edited.is_empty() {
            return;
        }
        let state = match self.pipeline.loss() {
            Loss::Retry => SERIALIZATION_FAILURE,
            Loss::Unknown => TRANSACTION_RESOLUTION_UNKNOWN,
            Loss::Nothing | Loss::Harmless | Loss::AlreadyFailed | Loss::RolledBack => return,
        };
        if let Some(body) = with_state(seen.body, state) {
            self.edited.put_u8(seen.tag);
            self.edited.put_u32(body.len() as u32 + 4);
            self.edited.put_slice(&body);
        }
    }
}

/// An error with another SQLSTATE in its place.
fn with_state(body: &[u8], state: SqlState) -> Option<Vec<u8>> {
    let mut left = body;
    while left.has_remaining() {
        let field = left.get_u8();
        let end = left.iter().position(|byte| *byte == 0)?;
        if field == b'C' && end == state.as_bytes().len() {
            let at = body.len() - left.len();
            let mut edited = body.to_vec();
            edited.get_mut(at..at + end)?.copy_from_slice(state.as_bytes());
            return Some(edited);
        }
        left.advance(end + 1);
    }
    None
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use kornak_protocol::error::ErrorFields;

    use super::*;

    fn body(severity: &str, code: &str, text: &str, routine: &str) -> Vec<u8> {
        format!("S{severity}\0V{severity}\0C{code}\0M{text}\0R{routine}\0\0").into_bytes()
    }

    #[test]
    fn the_last_words_of_a_dying_server_are_told_from_those_for_one_session() {
        let ends = "terminating connection due to administrator command";
        let gone = "terminating connection due to unexpected postmaster exit";
        let rows = [
            ("FATAL", "57P01", ends, "ProcessInterrupts", About::Either),
            ("FATAL", "57P01", gone, "secure_read", About::Server),
            ("FATAL", "57P01", "arrêt des connexions", "secure_read", About::Server),
            ("FATAL", "57P01", gone, "", About::Server),
            ("FATAL", "57P01", ends, "DefaultCitusNoticeReceiver", About::Server),
            (
                "FATAL",
                "XX000",
                "postmaster was shut down, exiting",
                "FinishConnectionIO",
                About::Server,
            ),
            ("FATAL", "XX000", "postmaster was shut down, exiting", "", About::Server),
            ("FATAL", "57P02", "crash", "quickdie", About::Server),
            ("FATAL", "57P03", "the database system is shutting down", "", About::Either),
            ("PANIC", "53100", "could not write to log file", "XLogWrite", About::Server),
            ("PANIC", "XX000", "stuck spinlock", "s_lock_stuck", About::Server),
            ("FATAL", "XX000", "something of an extension", "hook", About::Either),
            ("FATAL", "58P01", "could not open file", "mdopenfork", About::Either),
            ("FATAL", "08006", "connection to client lost", "ProcessInterrupts", About::Either),
            ("FATAL", "08P01", "invalid frontend message type", "SocketBackend", About::Session),
            ("FATAL", "57P04", "database dropped", "", About::Session),
            ("FATAL", "57P05", "idle-session timeout", "ProcessInterrupts", About::Session),
            ("FATAL", "25P03", "idle-in-transaction timeout", "ProcessInterrupts", About::Session),
            ("FATAL", "28000", "role is not permitted to log in", "", About::Session),
            ("FATAL", "40001", "conflict with recovery", "ProcessInterrupts", About::Session),
        ];
        for (severity, code, text, routine, expected) in rows {
            let body = body(severity, code, text, routine);
            let found = about(&ErrorView::parse_prefix(&body));
            assert_eq!(found, expected, "{severity} {code} {text} {routine}");
        }
    }

    #[test]
    fn an_error_is_a_dying_servers_own_or_one_of_a_node_behind_it_or_neither() {
        let died = "postmaster was shut down, exiting";
        let closed = "server closed the connection unexpectedly\n\tThis probably means";
        let rows = [
            ("XX000", died, "WaitForAllConnections", true, false),
            ("XX000", died, "ReportResultError", false, true),
            ("XX000", closed, "ReportResultError", false, true),
            (
                "XX000",
                "SSL connection has been closed unexpectedly",
                "ReportResultError",
                false,
                true,
            ),
            ("57P01", "terminating connection due to …", "ReportResultError", false, true),
            ("57P03", "the database system is shutting down", "ReportResultError", false, true),
            ("XX000", "cache lookup failed", "ReportResultError", false, false),
            ("23505", "duplicate key", "ReportResultError", false, false),
            ("P0001", died, "exec_stmt_raise", false, false),
            ("XX000", died, "exec_stmt_raise", false, false),
            ("08006", closed, "ReportConnectionError", false, false),
            (
                "XX000",
                "could not commit transaction for shard 1 on at least one active node",
                "x",
                false,
                true,
            ),
            ("XX000", "could not commit transaction for shard 1", "exec_stmt_raise", false, false),
            ("XX000", closed, "dblink_res_error", false, false),
        ];
        for (code, text, routine, own, behind) in rows {
            let body = body("ERROR", code, text, routine);
            let view = ErrorView::parse_prefix(&body);
            assert_eq!(
                (is_orphans(&view), is_of_a_lost_node(&view)),
                (own, behind),
                "{code} {text}"
            );
        }
    }

    #[test]
    fn only_the_sqlstate_of_an_error_is_changed() {
        let mut message = BytesMut::new();
        ErrorFields::error(INTERNAL_ERROR, "lost").routine("ReportResultError").put(&mut message);
        let body = message.split_off(5);
        let edited = with_state(&body, SERIALIZATION_FAILURE).unwrap();
        let (before, after) =
            (ErrorView::parse(&body).unwrap(), ErrorView::parse(&edited).unwrap());
        assert_eq!(after.sqlstate(), SERIALIZATION_FAILURE);
        assert_eq!((after.message, after.routine), (before.message, before.routine));
        assert_eq!(with_state(b"Mno code\0\0", SERIALIZATION_FAILURE), None);
    }
}
