//! The settings that the text of a prepared statement is read with: literals are folded under a time zone or
//! a date style, names are looked up along a search path. Clients with different ones share no statements.

use std::hash::{DefaultHasher, Hash, Hasher};

use super::Settings;
use super::text::{Setting, set};
use crate::sabotage::{self, Sabotage};
use bytes::Bytes;

/// Parameters that change nothing of what a text means.
const INDIFFERENT: [&[u8]; 22] = [
    b"application_name",
    b"statement_timeout",
    b"lock_timeout",
    b"transaction_timeout",
    b"idle_in_transaction_session_timeout",
    b"idle_session_timeout",
    b"deadlock_timeout",
    b"work_mem",
    b"maintenance_work_mem",
    b"temp_buffers",
    b"temp_file_limit",
    b"extra_float_digits",
    b"client_min_messages",
    b"log_min_duration_statement",
    b"log_statement",
    b"synchronous_commit",
    b"default_transaction_isolation",
    b"default_transaction_read_only",
    b"default_transaction_deferrable",
    b"client_connection_check_interval",
    b"jit",
    b"check_function_bodies",
];

/// Whether a parameter may change what a text means. Those of applications are read by functions only.
pub(super) fn matters(name: &[u8]) -> bool {
    !name.contains(&b'.') && !INDIFFERENT.contains(&name)
}

/// The settings in force when a text is read.
#[derive(Debug, Default)]
pub(super) struct Context {
    /// Of the settings that are committed.
    settings: u64,
    /// Of statements that set something since the session was last quiet, answered or not.
    said: u64,
}

impl Context {
    /// A number that differs where settings differ; 0 for none.
    pub(super) fn number(&self) -> u64 {
        match self.said {
            _ if sabotage::is(Sabotage::Contexts) => 0,
            0 => self.settings,
            _ => hash(&(self.settings, self.said)),
        }
    }

    /// Notes that these settings are in force.
    pub(super) fn settle(&mut self, settings: &Settings) {
        let mut hasher = DefaultHasher::new();
        let mut any = false;
        for setting in settings.iter().filter(|(name, _)| matters(name)) {
            setting.hash(&mut hasher);
            any = true;
        }
        self.settings = if any { hasher.finish().max(1) } else { 0 };
    }

    /// A SET or the like was forwarded.
    pub(super) fn say(&mut self, text: &Bytes) {
        let indifferent = match set(text) {
            Setting::Set(list) => !list.iter().any(|(name, _)| matters(name)),
            Setting::Reset(name) => !matters(&name),
            Setting::Local | Setting::ResetAll | Setting::Unknown(_) => false,
        };
        if !indifferent {
            self.said = hash(&(self.said, text)).max(1);
        }
    }

    /// Something was forwarded that may have set anything: nothing is shared until the session is quiet.
    /// `turn` is never used twice.
    pub(super) fn blur(&mut self, turn: (u64, u32)) {
        self.said = hash(&(self.said, turn)).max(1);
    }

    /// Nothing is in flight and no transaction open.
    pub(super) fn quiet(&mut self) {
        self.said = 0;
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
