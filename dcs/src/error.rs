//! Why an operation on the store did not succeed, by what the caller can do about it.

/// Failure of one operation. Only [`DcsError::Unreachable`] and the definite refusals promise that
/// nothing happened; after [`DcsError::Unknown`] a write may have been done, or *may yet be done*.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DcsError {
    /// No endpoint took the request; nothing was done.
    #[error("no store endpoint could be reached: {detail}")]
    Unreachable { detail: String },
    /// The request was sent and no answer came; it may have been done. A linearizable read that does
    /// not show it proves nothing: the request may lie with a stalled member of the store and be done
    /// when that wakes up, many seconds later. What must not happen late needs a condition that no
    /// longer holds by then, such as [`crate::Compare::Modified`].
    #[error("the store did not answer, the outcome is unknown: {detail}")]
    Unknown { detail: String },
    /// The lease has ended or never existed.
    #[error("the lease has ended")]
    LeaseLost,
    /// The revision asked for is no longer kept.
    #[error("the store has compacted that revision away")]
    Compacted,
    /// User, password, certificate or permission.
    #[error("the store refused access: {detail}")]
    Denied { detail: String },
    /// etcd's alarm NOSPACE: leases live on and keys can be deleted, but nothing can be written before
    /// somebody makes room.
    #[error(
        "the store takes no writes, it is out of space (alarm NOSPACE): compact and defragment etcd, then \
         etcdctl alarm disarm ({detail})"
    )]
    Full { detail: String },
    /// The store understood and refused; nothing was done.
    #[error("the store refused the request: {detail}")]
    Refused { detail: String },
}

impl DcsError {
    /// Whether a write may have been done although it failed.
    pub fn outcome_is_unknown(&self) -> bool {
        matches!(self, Self::Unknown { .. })
    }
}
