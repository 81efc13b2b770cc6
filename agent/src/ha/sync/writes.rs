//! A leader's record of its own writes of `sync`, each of which compares the key's revision.
//!
//! A view of the store may be older than the last write, and a write without an answer may be done
//! late: a standby is named then that nobody here knows of.

use kornak_cluster::{ClusterState, Revision};
use kornak_dcs::{DcsError, TxnOutcome};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writes {
    /// One that is under way or has no answer, or one of an earlier life of this agent, may yet be done by the
    /// store.
    open: bool,
    /// A read of the store is older than our last write until it shows this revision.
    shown_from: Revision,
}

impl Default for Writes {
    /// After a start.
    fn default() -> Self {
        Self { open: true, shown_from: Revision(0) }
    }
}

impl Writes {
    /// Whether one may be done late.
    pub fn may_be_open(&self) -> bool {
        self.open
    }

    /// Whether `cluster` was read before the last one that has an answer.
    pub fn are_newer_than(&self, cluster: &ClusterState) -> bool {
        cluster.revision < self.shown_from
    }

    /// Whether `cluster` has all of them.
    pub fn are_shown_by(&self, cluster: &ClusterState) -> bool {
        !self.open && !self.are_newer_than(cluster)
    }

    /// One is about to be sent. Answers with what was known before, for [`Self::end`].
    pub fn begin(&mut self) -> Self {
        std::mem::replace(self, Self { open: true, ..*self })
    }

    /// The leader key was claimed, with a write of this one, at this revision.
    pub fn claimed(&mut self, revision: Revision) {
        *self = Self { open: false, shown_from: revision };
    }

    /// Notes the result of a write. A write that has succeeded changes the revision that those
    /// before it compare, so that they will not be done any more.
    pub fn end(&mut self, before: Self, result: &Result<TxnOutcome, DcsError>) {
        *self = match result {
            Ok(outcome) => {
                Self { open: before.open && !outcome.succeeded, shown_from: outcome.revision }
            }
            Err(error) => Self { open: before.open || error.outcome_is_unknown(), ..*self },
        };
    }
}
