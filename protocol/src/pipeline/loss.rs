//! Statements that are true of requests whose server was lost.
//!
//! A wrong 40001 makes a framework run a committed transaction again, so "rolled back" is said
//! only of what positively cannot have committed; everything else is "unknown" (docs/safety.md A10).

use super::Fate;
use crate::txn::TransactionStatus;

/// The truth about a session whose server was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Loss {
    /// Nothing was in flight and no transaction open: nobody needs to be told.
    Nothing,
    /// The requests in flight cannot have changed anything but their session (Parse, Describe, Sync, BEGIN,
    /// SET) and count as not executed: 57P03, or they are forwarded again.
    Harmless,
    /// A transaction was open and nothing forwarded can have ended it: it is rolled back. 40001
    /// to each request in flight, and to each one until the client ends the transaction.
    Retry,
    /// The transaction had failed before; the client knows. No new error.
    AlreadyFailed,
    /// The last thing in flight was the transaction's rollback: whatever was done of it, the
    /// transaction is rolled back. It may be answered with the tag ROLLBACK.
    RolledBack,
    /// The transaction may or may not have been committed: 08007 to each request in flight.
    Unknown,
}

/// State of the transaction, request by request, if the requests so far were executed, or lost, at
/// any point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judge {
    Idle,
    /// BEGIN is in flight and nothing behind it.
    Begun,
    /// BEGIN is in flight and ends its batch: if it fails, what follows stands alone.
    Unheard,
    Open,
    /// Open by a BEGIN whose batch is not answered.
    Opened,
    /// Behind the end of such a batch.
    Doubted,
    Failed,
    Ended,
    Unknown,
}

impl Judge {
    pub(super) fn of(status: TransactionStatus) -> Self {
        match status {
            TransactionStatus::Idle => Self::Idle,
            TransactionStatus::InBlock => Self::Open,
            TransactionStatus::Failed => Self::Failed,
        }
    }

    pub(super) fn after(self, fate: Fate) -> Self {
        match (self, fate) {
            (before, Fate::Nothing) => before,
            (Self::Unknown | Self::Ended, _) | (_, Fate::Unknown) => Self::Unknown,
            // Lost with its session, whether it was done or not.
            (before, Fate::OfSession) => before,
            // Autocommit: committed by the time its ReadyForQuery comes, or not.
            (Self::Idle, Fate::Stays | Fate::Revives) => Self::Unknown,
            (Self::Idle | Self::Begun, Fate::Begins) => Self::Begun,
            (Self::Unheard | Self::Opened | Self::Doubted, Fate::Begins) => self,
            // The BEGIN before may have failed, and this commits by itself then.
            (Self::Unheard | Self::Doubted, Fate::Stays | Fate::Revives) => Self::Unknown,
            // Outside of a block they do nothing.
            (Self::Idle, Fate::RollsBack | Fate::Commits) => Self::Idle,
            (Self::Begun | Self::Opened, Fate::Stays | Fate::Revives) => Self::Opened,
            (Self::Open, Fate::Stays | Fate::Revives) => Self::Open,
            (Self::Open, Fate::Begins) => Self::Open,
            (
                Self::Begun | Self::Unheard | Self::Open | Self::Opened | Self::Doubted,
                Fate::RollsBack,
            ) => Self::Ended,
            (
                Self::Begun | Self::Unheard | Self::Open | Self::Opened | Self::Doubted,
                Fate::Commits,
            ) => Self::Unknown,
            (Self::Failed, Fate::Stays | Fate::Begins) => Self::Failed,
            // Alive again from here on: a COMMIT behind it would commit.
            (Self::Failed, Fate::Revives) => Self::Open,
            // COMMIT of a failed transaction rolls back.
            (Self::Failed, Fate::RollsBack | Fate::Commits) => Self::Ended,
        }
    }

    /// A batch ends whose answer has not come.
    pub(super) fn behind_batch(self) -> Self {
        match self {
            Self::Begun => Self::Unheard,
            Self::Opened => Self::Doubted,
            before => before,
        }
    }

    pub(super) fn loss(self, in_flight: bool) -> Loss {
        match self {
            Self::Idle if in_flight => Loss::Harmless,
            Self::Idle => Loss::Nothing,
            Self::Begun | Self::Unheard => Loss::Harmless,
            Self::Open | Self::Opened | Self::Doubted => Loss::Retry,
            Self::Failed => Loss::AlreadyFailed,
            Self::Ended => Loss::RolledBack,
            Self::Unknown => Loss::Unknown,
        }
    }
}
