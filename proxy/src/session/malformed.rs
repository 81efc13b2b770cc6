//! Messages that no server can read. A server answers each with an error and goes on, so the session does too:
//! nothing of such a message counts but its answer.

use bytes::BytesMut;
use kornak_protocol::backend;
use kornak_protocol::frame::Seen;
use kornak_protocol::pipeline::{Fate, Sent, Unit};
use kornak_protocol::txn::TransactionStatus;

use super::Session;
use super::answers::Verdict;

/// Whether an idle server ignores a message: what is left of a COPY that is over, and Flush.
#[inline]
pub fn is_ignored(seen: &Seen<'_>) -> bool {
    match seen.tag {
        b'd' | b'c' | b'f' => true,
        b'H' => seen.len == 4,
        _ => false,
    }
}

impl Session {
    /// A message that the server cannot read is forwarded. Answers whether a batch ends here.
    #[cold]
    pub(super) fn forwarded_malformed(&mut self, tag: u8) -> bool {
        let ends = matches!(tag, b'Q' | b'S');
        self.pipeline.sent(match tag {
            b'S' => Sent::Sync,
            // An answer and a ReadyForQuery, as a Query; but it drops no unnamed statement.
            b'Q' => Sent::FunctionCall(Unit { fate: Fate::Stays, token: 0 }),
            _ => Sent::Describe(0),
        });
        ends
    }
}

/// Appends a server's answer to a message that cannot be read; answers whether everything is skipped now
/// up to the next Sync.
pub(super) fn put_malformed(tag: u8, status: TransactionStatus, out: &mut BytesMut) -> bool {
    Verdict::Malformed.put(out);
    let ends = matches!(tag, b'Q' | b'S');
    if ends {
        backend::put_ready_for_query(status, out);
    }
    !ends
}
