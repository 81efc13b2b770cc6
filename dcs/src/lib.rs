//! The distributed store: what Kornak asks of it, where everything lies in it, and the two
//! implementations: etcd v3 and a deterministic twin in memory.
//!
//! The store is the only channel between agents and proxies. Reads are *levels*, not events: a
//! consumer [follows](Dcs::follow) a prefix and looks at the newest [`View`] whenever it likes, so a
//! lost connection, a compaction or a restart of either side changes nothing but the age of what it
//! sees. Writes are [transactions](Txn); an outcome that is unknown says so ([`DcsError`]).
//!
//! Not here: what a leader or a failover is. Keys are strings, values are text.

pub mod contract;
pub mod error;
pub mod etcd;
pub mod fence;
pub mod keys;
pub mod lease;
pub mod memory;
pub mod view;

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

pub use error::DcsError;
pub use kornak_cluster::{LeaseId, RaftTerm, Revision};
pub use view::{Follow, KeyValue, Reach, View};

/// A future of the store; boxed so that [`Dcs`] can be used as a trait object.
pub type DcsFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, DcsError>> + Send + 'a>>;

/// Operations of a store. Its promises are written as functions in [`contract`].
pub trait Dcs: Send + Sync + std::fmt::Debug {
    /// Everything below `prefix`, read linearizably.
    fn range(&self, prefix: &str) -> DcsFuture<'_, View>;

    /// Runs `txn` atomically, and linearizably even if it only compares.
    fn txn(&self, txn: Txn) -> DcsFuture<'_, TxnOutcome>;

    /// A new lease that ends `ttl` after its last renewal. The store may grant another length.
    fn grant(&self, ttl: Duration) -> DcsFuture<'_, Granted>;

    /// Renews a lease once. [`DcsError::LeaseLost`] if it has ended.
    fn keep_alive(&self, lease: LeaseId) -> DcsFuture<'_, Renewed>;

    /// How long a lease has left unless it is renewed. [`DcsError::LeaseLost`] if it has ended. Of use to suspect a
    /// holder, and for nothing else: the answer need not be linearizable.
    fn time_to_live(&self, lease: LeaseId) -> DcsFuture<'_, Remaining>;

    /// Ends a lease and deletes what hangs on it.
    fn revoke(&self, lease: LeaseId) -> DcsFuture<'_, ()>;

    /// Keeps a [`View`] of everything below `prefix` fresh until the [`Follow`] is dropped: resumes
    /// after a lost connection, re-reads after a compaction, notices silence. The first read is
    /// made in the background.
    fn follow(&self, prefix: &str) -> Follow;
}

/// A lease that was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    pub lease: LeaseId,
    /// Time to live that the store granted, which may differ from the request.
    pub ttl: Duration,
    /// Raft term in which the answer was given.
    pub raft_term: RaftTerm,
}

/// A lease that was renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewed {
    pub ttl: Duration,
    pub raft_term: RaftTerm,
}

/// The time that a lease has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remaining {
    /// Time to live that a renewal gives it.
    pub granted: Duration,
    /// Rounded down to whole seconds.
    pub left: Duration,
}

impl Remaining {
    /// The last renewal was so long ago, or longer.
    pub fn age_at_least(self) -> Duration {
        self.granted.saturating_sub(self.left + Duration::from_secs(1))
    }

    /// The last renewal was not longer ago, unless the store has elected a leader since.
    pub fn age_at_most(self) -> Duration {
        self.granted.saturating_sub(self.left)
    }
}

/// `if all of compare { then } else { otherwise }`, atomically.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    pub compare: Vec<Compare>,
    pub then: Vec<Op>,
    pub otherwise: Vec<Op>,
}

/// A condition of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key was created at this revision; 0 means it does not exist.
    Created { key: String, revision: Revision },
    /// The key was last written at this revision; 0 means it does not exist.
    Modified { key: String, revision: Revision },
    /// The key exists and hangs on this lease.
    Lease { key: String, lease: LeaseId },
    /// The key exists and has this value.
    Value { key: String, value: String },
    /// No key below `prefix` was created after `revision`.
    NoneCreatedAfter { prefix: String, revision: Revision },
}

/// A step of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a value; `lease` 0 leaves the key without a lease.
    Put {
        key: String,
        value: String,
        lease: LeaseId,
    },
    Delete {
        key: String,
    },
    DeletePrefix {
        prefix: String,
    },
    /// Reads one key; the answers are in [`TxnOutcome::gets`], in order.
    Get {
        key: String,
    },
}

/// Outcome of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether all comparisons held, that is, `then` was run.
    pub succeeded: bool,
    /// Revision of the store after the transaction.
    pub revision: Revision,
    pub raft_term: RaftTerm,
    /// One entry for each [`Op::Get`] that was run.
    pub gets: Vec<Option<KeyValue>>,
}

impl Txn {
    /// A transaction without conditions.
    pub fn just(op: Op) -> Self {
        Self { compare: Vec::new(), then: vec![op], otherwise: Vec::new() }
    }

    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compare.push(compare);
        self
    }

    /// Adds a step.
    #[must_use]
    pub fn and(mut self, op: Op) -> Self {
        self.then.push(op);
        self
    }

    /// Whether it can be run again without doing anything twice.
    pub fn only_reads(&self) -> bool {
        self.then.iter().chain(&self.otherwise).all(|op| matches!(op, Op::Get { .. }))
    }

    /// Adds a step for the case that a condition does not hold.
    #[must_use]
    pub fn or_else(mut self, op: Op) -> Self {
        self.otherwise.push(op);
        self
    }
}

impl Op {
    /// Writes a value without a lease.
    pub fn put(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: LeaseId::NONE }
    }

    /// Writes a value that ends with `lease`.
    pub fn put_leased(key: impl Into<String>, value: impl Into<String>, lease: LeaseId) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease }
    }

    /// Deletes one key.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// Reads one key.
    pub fn get(key: impl Into<String>) -> Self {
        Self::Get { key: key.into() }
    }
}

/// A record of ours as it is stored.
pub fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("records are plain data with string keys")
}

impl Compare {
    /// The key does not exist.
    pub fn absent(key: impl Into<String>) -> Self {
        Self::Created { key: key.into(), revision: Revision::NONE }
    }
}
