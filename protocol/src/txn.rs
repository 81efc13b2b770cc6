//! Transaction status as servers report it, and the tags by which commands report success.

/// Status byte of ReadyForQuery (`/docs/current/protocol-message-formats.html`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TransactionStatus {
    /// `I`: not in a transaction block.
    Idle,
    /// `T`: in a transaction block.
    InBlock,
    /// `E`: in a failed transaction block; only its end is accepted.
    Failed,
}

impl TransactionStatus {
    /// The status that a byte stands for, if it is one.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            b'I' => Some(Self::Idle),
            b'T' => Some(Self::InBlock),
            b'E' => Some(Self::Failed),
            _ => None,
        }
    }

    /// The byte on the wire.
    pub fn as_byte(self) -> u8 {
        match self {
            Self::Idle => b'I',
            Self::InBlock => b'T',
            Self::Failed => b'E',
        }
    }
}

/// The tag of a CommandComplete message, without its terminator, such as `INSERT 0 1`.
///
/// A tag tells what was *executed*, whatever the client sent, which makes it the cheapest
/// witness of what a session holds; but it tells nothing of what functions did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandTag<'a>(pub &'a [u8]);

impl<'a> CommandTag<'a> {
    /// Kind of command that the tag reports.
    pub fn kind(self) -> TagKind {
        match self.0 {
            b"BEGIN" | b"START TRANSACTION" => TagKind::Begin,
            b"COMMIT" => TagKind::Commit,
            b"ROLLBACK" => TagKind::Rollback,
            b"SAVEPOINT" => TagKind::Savepoint,
            b"RELEASE" => TagKind::Release,
            b"PREPARE TRANSACTION" => TagKind::PrepareTransaction,
            b"SET" => TagKind::Set,
            b"RESET" => TagKind::Reset,
            b"DISCARD ALL" => TagKind::DiscardAll,
            b"DISCARD" | b"DISCARD PLANS" | b"DISCARD SEQUENCES" => TagKind::Discard,
            b"DISCARD TEMP" => TagKind::DiscardTemp,
            b"PREPARE" => TagKind::Prepare,
            b"DEALLOCATE" => TagKind::Deallocate,
            b"DEALLOCATE ALL" => TagKind::DeallocateAll,
            b"LISTEN" => TagKind::Listen,
            b"UNLISTEN" => TagKind::Unlisten,
            b"DECLARE CURSOR" => TagKind::DeclareCursor,
            b"CLOSE CURSOR" => TagKind::CloseCursor,
            b"CLOSE CURSOR ALL" => TagKind::CloseCursorAll,
            b"LOAD" => TagKind::Load,
            b"CALL" => TagKind::Call,
            b"DO" => TagKind::Do,
            b"CREATE TABLE" | b"CREATE TABLE AS" | b"SELECT INTO" | b"CREATE VIEW"
            | b"CREATE SEQUENCE" => TagKind::CreateRelation,
            _ => match self.verb() {
                b"COPY" => TagKind::Copy,
                b"SELECT" | b"FETCH" | b"MOVE" | b"INSERT" | b"UPDATE" | b"DELETE" | b"MERGE" => {
                    TagKind::Rows
                }
                _ => TagKind::Other,
            },
        }
    }

    /// The first word.
    pub fn verb(self) -> &'a [u8] {
        let end = memchr::memchr(b' ', self.0).unwrap_or(self.0.len());
        self.0.get(..end).unwrap_or_default()
    }

    /// The number of rows, for commands that report one.
    pub fn rows(self) -> Option<u64> {
        let begin = memchr::memrchr(b' ', self.0)?.checked_add(1)?;
        std::str::from_utf8(self.0.get(begin..)?).ok()?.parse().ok()
    }
}

/// The commands that leave something behind in a session or move its transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TagKind {
    /// `BEGIN`, `START TRANSACTION`.
    Begin,
    /// `COMMIT`: the transaction is durable.
    Commit,
    /// `ROLLBACK`; also the answer to COMMIT of a failed transaction, and to ROLLBACK TO.
    Rollback,
    /// `SAVEPOINT`.
    Savepoint,
    /// `RELEASE`.
    Release,
    /// `PREPARE TRANSACTION`.
    PrepareTransaction,
    /// `SET`: a parameter changed, for the session unless the transaction takes it back.
    Set,
    /// `RESET`.
    Reset,
    /// `DISCARD ALL`: the session holds nothing any more.
    DiscardAll,
    /// Another `DISCARD`.
    Discard,
    /// `DISCARD TEMP`.
    DiscardTemp,
    /// `PREPARE`: a statement prepared by SQL.
    Prepare,
    /// `DEALLOCATE` of one statement.
    Deallocate,
    /// `DEALLOCATE ALL`.
    DeallocateAll,
    /// `LISTEN`.
    Listen,
    /// `UNLISTEN`.
    Unlisten,
    /// `DECLARE CURSOR`; the tag does not say whether WITH HOLD.
    DeclareCursor,
    /// `CLOSE CURSOR`.
    CloseCursor,
    /// `CLOSE CURSOR ALL`.
    CloseCursorAll,
    /// `LOAD`.
    Load,
    /// `CALL`: a procedure, which may have committed.
    Call,
    /// `DO`: a block, which may have committed.
    Do,
    /// A table, view or sequence was made; the tag does not say whether it is temporary.
    CreateRelation,
    /// `COPY n`.
    Copy,
    /// Rows were read or written.
    Rows,
    /// Everything else.
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_of_three_bytes() {
        for byte in 0..=u8::MAX {
            let back = TransactionStatus::from_byte(byte).map(TransactionStatus::as_byte);
            assert_eq!(back, b"ITE".contains(&byte).then_some(byte));
        }
    }

    #[test]
    fn tags_are_told_apart() {
        let rows: &[(&[u8], TagKind, Option<u64>)] = &[
            (b"INSERT 0 17", TagKind::Rows, Some(17)),
            (b"SELECT 3", TagKind::Rows, Some(3)),
            (b"COPY 12", TagKind::Copy, Some(12)),
            (b"COMMIT", TagKind::Commit, None),
            (b"ROLLBACK", TagKind::Rollback, None),
            (b"DISCARD ALL", TagKind::DiscardAll, None),
            (b"SELECT INTO", TagKind::CreateRelation, None),
            (b"CREATE TABLE AS", TagKind::CreateRelation, None),
            (b"PREPARE TRANSACTION", TagKind::PrepareTransaction, None),
            (b"", TagKind::Other, None),
            (b" ", TagKind::Other, None),
            (b"SELECT 99999999999999999999999", TagKind::Rows, None),
        ];
        for &(tag, kind, count) in rows {
            assert_eq!((CommandTag(tag).kind(), CommandTag(tag).rows()), (kind, count), "{tag:?}");
        }
    }
}
