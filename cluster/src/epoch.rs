//! Terms of leadership.

use serde::{Deserialize, Serialize};

use crate::numbers::Revision;

/// One term of leadership: the store's cluster id and the revision at which the leader key was
/// created. Patroni's leaders have one too, for it needs no key of its own.
///
/// Revisions of different stores say nothing about each other (a restore or a move to another etcd
/// starts small again), so [`Epoch::is_older_than`] answers only inside one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epoch {
    /// etcd's cluster id.
    pub store: u64,
    /// `create_revision` of the leader key.
    pub revision: Revision,
}

impl Epoch {
    /// `Some(true)` if this term ended before `other` began; `None` if they are not comparable.
    pub fn is_older_than(self, other: Self) -> Option<bool> {
        (self.store == other.store).then_some(self.revision < other.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_of_different_stores_are_not_compared() {
        let old = Epoch { store: 1, revision: Revision(900) };
        let restored = Epoch { store: 2, revision: Revision(3) };
        assert_eq!(restored.is_older_than(old), None);
        assert_eq!(old.is_older_than(Epoch { store: 1, revision: Revision(901) }), Some(true));
        assert_eq!(old.is_older_than(old), Some(false));
    }
}
