//! The messages of both sides, as the bookkeeping names them.

use crate::copy::CopyState;
use crate::txn::TransactionStatus;

/// Effect of a request on the transaction it runs in, as far as it is *positively* known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// A single statement that cannot end a transaction block.
    Stays,
    /// A single statement that changes its session at most, and nothing that outlives it: `SET`,
    /// `SHOW`, `DEALLOCATE`, …
    OfSession,
    /// `BEGIN` alone.
    Begins,
    /// `ROLLBACK TO SAVEPOINT` alone: it can bring a failed transaction back to life.
    Revives,
    /// `ROLLBACK` or `ABORT` alone, without AND CHAIN.
    RollsBack,
    /// `COMMIT` or `END` alone, without AND CHAIN.
    Commits,
    /// An empty query, which does nothing.
    Nothing,
    /// Anything else: several statements, a text that is not known, CALL, DO, AND CHAIN, …
    Unknown,
}

/// One request that executes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    /// Effect on the transaction.
    pub fate: Fate,
    /// The caller's own mark; comes back with the answers.
    pub token: u32,
}

/// A client message that has been forwarded. Those that owe an answer of their own carry the
/// caller's mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// `Q`.
    Query(Unit),
    /// `F`.
    FunctionCall(Unit),
    /// `P`.
    Parse(u32),
    /// `B`.
    Bind(u32),
    /// `D`.
    Describe(u32),
    /// `C`.
    Close(u32),
    /// `E`.
    Execute(Unit),
    /// `S`.
    Sync,
    /// A Sync of the caller's own, with its mark.
    OwnSync(u32),
    /// `H`.
    Flush,
    /// `d`.
    CopyData,
    /// `c`.
    CopyDone,
    /// `f`.
    CopyFail,
    /// `X`.
    Terminate,
    /// Our own Close of a statement that nobody has, with its Sync: how many ReadyForQuery come
    /// before its answer settles [`super::Pipeline::is_doubtful`].
    Marker,
}

impl Sent {
    pub(super) fn is_request(self) -> bool {
        use Sent::{CopyData, CopyDone, CopyFail, Flush, Marker, Terminate};
        !matches!(self, Flush | CopyData | CopyDone | CopyFail | Terminate | Marker)
    }
}

/// Kind of the request that an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Simple query.
    Query,
    /// Function call.
    FunctionCall,
    /// Parse.
    Parse,
    /// Bind.
    Bind,
    /// Describe.
    Describe,
    /// Close.
    Close,
    /// Execute.
    Execute,
    /// Sync.
    Sync,
    /// One of very many extended messages in one batch, no longer told apart.
    Blur,
    /// Not a request: the end of the client's COPY data, sent before the COPY was answered.
    CopyEnd,
    /// Our own Close of a statement that nobody has.
    Marker,
    /// The Sync behind it.
    MarkerSync,
}

/// The request that an answer belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Kind of the message that was sent.
    pub kind: Kind,
    /// Fate and mark of the request; the fate of one that executes nothing is [`Fate::Stays`].
    pub unit: Unit,
}

impl Owner {
    pub(super) fn owes_ready(self) -> bool {
        matches!(self.kind, Kind::Query | Kind::FunctionCall | Kind::Sync | Kind::MarkerSync)
    }

    /// Whether it is none of the client's requests.
    pub(super) fn is_unasked(self) -> bool {
        matches!(self.kind, Kind::CopyEnd | Kind::Marker | Kind::MarkerSync)
    }

    pub(super) fn executes(self) -> bool {
        matches!(self.kind, Kind::Query | Kind::FunctionCall | Kind::Execute | Kind::Blur)
    }
}

/// Kind of a server's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Rows or COPY data.
    Data,
    /// Answers nothing: notice, notification, parameter.
    Async,
    /// A part of the owner's answer that does not complete it (RowDescription of a query, …).
    Part(Owner),
    /// The owner's answer is complete; a simple query may have more of them.
    Done(Owner),
    /// The owner opened a COPY.
    Copy(Owner, CopyState),
    /// An error; `None` if no request was owed anything (the server speaks for itself).
    Failed(Option<Owner>),
    /// An answer to our own marker.
    Ours,
    /// ReadyForQuery, with the request that it ends.
    Ready(TransactionStatus, Option<Owner>),
}
