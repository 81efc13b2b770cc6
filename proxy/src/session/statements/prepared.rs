//! The statements that one server connection has prepared.

use std::collections::HashMap;

use bytes::Bytes;

/// The statements that a server connection has prepared, over all its clients.
#[derive(Debug, Default)]
pub struct Prepared {
    /// By context and text; the number is its name.
    pub(super) known: HashMap<Key, Entry>,
    pub(super) last_number: u32,
    pub(super) clock: u64,
    /// Numbers to be closed whose Close was not answered.
    pub(super) to_close: Vec<u32>,
}

/// The settings that a text was read with, and the text with its parameter types.
pub(super) type Key = (u64, Bytes);

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) number: u32,
    pub(super) used: u64,
    /// The batch in which it was sent, until the server has confirmed it.
    pub(super) unconfirmed: Option<u32>,
}

impl Prepared {
    /// Everything was closed by the client's DISCARD ALL or DEALLOCATE ALL, or by ours.
    pub fn clear(&mut self) {
        self.known.clear();
        self.to_close.clear();
    }

    /// Notes that the plans are of no use any more: they are closed one by one, and prepared again.
    pub fn outdate(&mut self) {
        self.to_close.extend(self.known.drain().map(|(_, entry)| entry.number));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}
