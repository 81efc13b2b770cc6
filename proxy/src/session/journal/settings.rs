//! The settings of a session, as its transactions commit.

use kornak_protocol::txn::TransactionStatus;

use super::cursors::Cursors;
use super::{Change, Journal, MAX_SETTINGS, MAX_SETTINGS_BYTES, Pin};
use crate::sabotage::{self, Sabotage};

impl Journal {
    pub(super) fn discard_all(&mut self) {
        self.settings = self.base.clone();
        self.unfit = true;
        self.block.roll_back();
        self.context.settle(&self.settings);
        self.channels.clear();
        self.cursors = Cursors::default();
        if !sabotage::is(Sabotage::Discard) {
            self.forget_all();
        }
        for pin in [
            Pin::Temporary,
            Pin::HoldCursor,
            Pin::Listen,
            Pin::Setting,
            Pin::Advisory,
            Pin::LongStatement,
        ] {
            self.pins.remove(pin);
        }
        // What was forwarded behind it is still to be asked for.
        if !self.suspected {
            if !self.lasting {
                self.pins.remove(Pin::Opaque);
                self.unseen = false;
            }
            self.custom.clear();
            self.called = false;
        }
        self.makes_temporary = false;
    }

    /// ReadyForQuery: `failed` tells whether an error was answered since the last one.
    pub fn ready(&mut self, status: TransactionStatus, failed: bool) {
        if self.cursors.is_any() {
            self.cursors.ready(status == TransactionStatus::Idle, failed);
            self.pin_by_cursors();
        }
        if status != TransactionStatus::Idle {
            return;
        }
        self.portals.clear();
        // A COMMIT before the error has been heeded already.
        match failed {
            true => self.block.roll_back(),
            false => self.commit(),
        }
    }

    /// A transaction has committed.
    pub(super) fn commit(&mut self) {
        self.cursors.committed();
        if self.block.is_empty() {
            self.block.roll_back();
            return;
        }
        for change in self.block.commit() {
            self.apply(change);
        }
        self.context.settle(&self.settings);
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Set(name, text) => {
                self.settings.retain(|(known, _)| *known != name);
                if *name == *AUTHORIZATION {
                    // It ends the role that was taken on before.
                    self.settings.retain(|(known, _)| **known != *b"role");
                }
                let bytes: usize = self.settings.iter().map(|(_, text)| text.len()).sum();
                if self.settings.len() >= MAX_SETTINGS || bytes + text.len() > MAX_SETTINGS_BYTES {
                    self.pins.add(Pin::TooMuch);
                } else {
                    self.settings.push((name, text));
                }
            }
            Change::Reset(name) => {
                self.settings.retain(|(known, _)| *known != name);
                if *name == *AUTHORIZATION {
                    self.settings.retain(|(known, _)| **known != *b"role");
                }
                if let Some(base) = self.base.iter().find(|(known, _)| *known == name) {
                    self.settings.push(base.clone());
                    self.unfit = true;
                }
            }
            Change::Listen(name) => {
                if !self.channels.add(name) {
                    self.pins.add(Pin::TooMuch);
                }
            }
            Change::Unlisten(name) => self.channels.remove(&name),
            Change::UnlistenAll => {
                self.channels.clear();
                self.pins.remove(Pin::Listen);
            }
            Change::ResetAll => {
                self.unfit |= !self.base.is_empty();
                let stays = |name: &[u8]| name == b"role" || name == AUTHORIZATION;
                self.settings.retain(|(name, _)| stays(name));
                self.settings.extend(self.base.iter().cloned());
            }
        }
    }
}

/// The name by which the user is known that a session acts as.
pub(super) const AUTHORIZATION: &[u8] = b"session authorization";
