//! The way of a Parse: shared under a number of ours, or refused in the server's own time.

use std::sync::Arc;

use super::wire::{put_parse, put_unnamed};
use super::{Change, Content, Counts, ENTRY_BYTES, Injected, Meaning, Statements, Treatment};

/// Prepared statements of one client, in bytes; what clients share counts for each.
const MAX_BYTES: usize = 4 << 20;

/// A longer name is left to the server, and with it the connection to its client: no message is looked at
/// far enough for two of these.
const MAX_NAME: usize = 7 * 1024;

/// Never valid SQL: its error is told in words of ours.
const TAKEN: &[u8] = b"kornak refuses this statement\0\0\0";

impl Statements {
    /// A Parse is forwarded. `content` is `None` if the message is too long to be kept.
    pub fn parse(
        &mut self,
        name: &[u8],
        content: Option<Arc<Content>>,
        len: usize,
        injected: &mut Vec<Injected>,
        out: &mut Vec<u8>,
    ) -> (Treatment, Counts) {
        if name.is_empty() {
            let before = std::mem::replace(&mut self.unnamed, content);
            let there = std::mem::replace(&mut self.unnamed_there, true);
            let change = Change::Unnamed { before, there, by_query: false };
            return (Treatment::AsIs, Counts::Parse(self.mark(0, change)));
        }
        if self.by_sql.contains(name) || self.long.contains(name) || self.is_preparing(name) {
            // The server has this very name, and refuses.
            let mark = self.mark(0, Change::Raw { name: name.into() });
            return (Treatment::AsIs, Counts::Parse(mark));
        }
        let Some(content) = content.filter(|_| name.len() <= MAX_NAME) else {
            if self.names.contains_key(name) {
                return self.refuse(TAKEN, Change::Refused { name: name.into() }, len, out);
            }
            self.long.insert(name.into());
            return (Treatment::TooLong, Counts::Parse(0));
        };
        if self.has(name) {
            // The server knows our name as well and refuses the same way (42P05).
            let number = self.present_text(&content.body, injected, out);
            put_parse(number, &content.body, out);
            let mark = self.mark(0, Change::Refused { name: name.into() });
            return (Treatment::Head { skip: len }, Counts::Parse(mark));
        }
        self.make_room(injected, out);
        let sent = self.enter(&content.body);
        self.named.push((sent.number, name.into()));
        put_parse(sent.number, &content.body, out);
        if self.dropping.is_some() {
            self.made_since.insert(name.into());
        }
        let meaning = Meaning { content, context: self.context };
        let before = self.set(name.into(), Some(meaning));
        let change = Change::Name { name: name.into(), before, sent: Some(sent) };
        (Treatment::Head { skip: len }, Counts::Parse(self.mark(0, change)))
    }

    /// A Parse is forwarded whose text of this length is more than is kept: it is refused.
    pub fn refuse_if_full(
        &mut self,
        name: &[u8],
        text: usize,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Option<(Treatment, Counts)> {
        let is_new = !name.is_empty()
            && !self.names.contains_key(name)
            && !self.by_sql.contains(name)
            && !self.is_preparing(name)
            && !self.long.contains(name);
        let is_full = self.bytes + text + name.len() + ENTRY_BYTES > MAX_BYTES;
        (is_new && is_full).then(|| self.refuse(TAKEN, Change::TooMuch, len, out))
    }

    /// Sends what the server refuses in place of a Parse.
    fn refuse(
        &mut self,
        text: &[u8],
        change: Change,
        len: usize,
        out: &mut Vec<u8>,
    ) -> (Treatment, Counts) {
        put_unnamed(text, out);
        self.unnamed_there = false;
        (Treatment::Head { skip: len }, Counts::Parse(self.mark(0, change)))
    }
}
