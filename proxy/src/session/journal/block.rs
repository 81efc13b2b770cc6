//! The changes of a transaction so far, in order: they count when the transaction commits, and are taken back
//! with it, or with a savepoint.

use super::Change;
use super::text::Name;

/// Changes and savepoints of one transaction that are kept; more pin the session.
const MAX_KEPT: usize = 4096;

/// The changes of the transaction that is open, implicit or not.
#[derive(Debug, Default)]
pub(super) struct Block {
    changes: Vec<Change>,
    /// With how many changes were made before.
    savepoints: Vec<(Name, usize)>,
}

impl Block {
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Whether the last change of a parameter is a RESET; `None` if there is none.
    pub(super) fn resets(&self, name: &[u8]) -> Option<bool> {
        self.changes.iter().rev().find_map(|change| match change {
            Change::Set(it, _) if **it == *name => Some(false),
            Change::Reset(it) if **it == *name => Some(true),
            Change::ResetAll => Some(true),
            _ => None,
        })
    }

    /// Answers false if there are too many.
    pub(super) fn push(&mut self, change: Change) -> bool {
        let fits = self.changes.len() < MAX_KEPT;
        if fits {
            self.changes.push(change);
        }
        fits
    }

    /// The transaction is over; what it changed is answered.
    pub(super) fn commit(&mut self) -> Vec<Change> {
        self.savepoints.clear();
        std::mem::take(&mut self.changes)
    }

    pub(super) fn roll_back(&mut self) {
        self.savepoints.clear();
        self.changes.clear();
    }

    /// Answers false if there are too many.
    pub(super) fn savepoint(&mut self, name: Name) -> bool {
        let fits = self.savepoints.len() < MAX_KEPT;
        if fits {
            self.savepoints.push((name, self.changes.len()));
        }
        fits
    }

    pub(super) fn release(&mut self, name: &[u8]) {
        if let Some(at) = self.position(name) {
            self.savepoints.truncate(at);
        }
    }

    /// Answers false if there is no such savepoint.
    pub(super) fn roll_back_to(&mut self, name: &[u8]) -> bool {
        let Some(at) = self.position(name) else { return false };
        if let Some((_, changes)) = self.savepoints.get(at) {
            self.changes.truncate(*changes);
        }
        self.savepoints.truncate(at + 1);
        true
    }

    fn position(&self, name: &[u8]) -> Option<usize> {
        self.savepoints.iter().rposition(|(known, _)| **known == *name)
    }
}
