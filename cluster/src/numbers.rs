//! The numbers that a store gives to leases, revisions and raft terms, each as a type of its own: none of
//! them is ever compared with another kind.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A lease of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LeaseId(pub i64);

impl LeaseId {
    /// No lease, as etcd says it.
    pub const NONE: Self = Self(0);

    /// Whether there is no lease.
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }
}

/// As etcd's tools print it.
impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A state of the store: each transaction that writes has the next one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision of a key that does not exist, and of a store that was never seen.
    pub const NONE: Self = Self(0);

    /// Whether this is the revision of a key that does not exist.
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }

    /// The revision of the next write.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A term of the store's own leader, which grows with each election among the store's members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RaftTerm(pub u64);

impl RaftTerm {
    /// The term of an answer that names none.
    pub const NONE: Self = Self(0);

    /// The term after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for RaftTerm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
