//! Prepared statements of the extended protocol over connections that change hands, pure.
//!
//! A client's names are its own; on a server a statement is known by its text, its parameter types and the
//! settings that it was read with (its context: a time zone, a search path), under a name of ours that is
//! never used twice on one connection. What a client forwards is
//! rewritten on the way:
//!
//! | client sends | the server gets |
//! | --- | --- |
//! | Parse of a text | Parse under our name; if this connection had the text, the new one stands for it from then on |
//! | Bind, Describe of a name | the same with our name, behind a Parse if this connection lacks the text |
//! | Close of a name | Close of a name that nobody has: others may use the text |
//! | SQL's DEALLOCATE, EXECUTE, PREPARE of a name | the same with our name, or a statement that does nothing and is answered as DEALLOCATE (`statements::sql`) |
//!
//! Every answer still comes from the server and in its place, so errors, skipping to Sync and
//! pipelining need no bookkeeping of their own: what was changed here ahead of the answer is taken
//! back when the answer does not come ([`Statements::ready`]). A message whose meaning hangs on a batch
//! that is not answered yet waits for it ([`Statements::must_wait`]).
//!
//! The unnamed statement is the client's as well: a connection that has changed hands gets it again.
//!
//! Not here: SQL's PREPARE, which pins ([`crate::session::journal`]).

mod batches;
mod parse;
mod prepared;
mod sql;
#[cfg(test)]
mod tests;
mod texts;
mod undo;
mod wire;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::{BufMut, Bytes};
use kornak_protocol::frontend::{self, Target};

pub use prepared::Prepared;
use prepared::{Entry, Key};
pub use sql::{Front, Rewritten};
pub use texts::{Texts, content_of};

use crate::sabotage::{self, Sabotage};
use crate::session::journal::Statement;
use wire::{name_of, put_parse, put_target};

/// Names of ours begin with this; the colon keeps them apart from what drivers make up.
const PREFIX: &str = "_kornak:";

/// A name that no statement has.
pub(crate) const NOBODY: &[u8] = b"_kornak:0";

/// In a mark: the answer is for us, the client must not see it.
const SWALLOW: u32 = 1 << 31;

/// In a mark: it belongs to a change of ours.
const OURS: u32 = 1 << 30;

/// In a mark: the client must not see an error either.
const SILENT: u32 = 1 << 29;

/// A statement's text and parameter types.
#[derive(Debug)]
pub struct Content {
    /// The body of its Parse, without the name.
    pub body: Bytes,
    /// The effects that the execution of the statement can have.
    pub statement: Statement,
    /// The statement's text, if executing it changes the session.
    pub note: Option<Bytes>,
    /// The statement's text may leave something in the session that no command tag shows.
    pub is_opaque: bool,
    /// The statement calls functions that may leave something in the session.
    pub calls: bool,
}

/// The treatment of one message on its way to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// The message goes as it is.
    AsIs,
    /// The message's first `skip` bytes, the head included, are replaced by what was appended to
    /// the output.
    Head { skip: usize },
    /// The statement cannot be shared, it is too long to be kept: its session needs this connection.
    TooLong,
    /// The long statements of the session are gone.
    ClosedLong { skip: usize },
}

/// A message that is put in front of the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    Parse(u32),
    Close(u32),
}

/// The part of the client in the answer to a marked message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Pass,
    Swallow,
}

/// A message that was rewritten: what it counts as, for the server's answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counts {
    Parse(u32),
    Close(u32),
}

#[derive(Debug)]
enum Change {
    /// The client's name meant `before`; its text may have been sent with it.
    Name { name: Box<[u8]>, before: Option<Meaning>, sent: Option<Sent> },
    /// The unnamed statement was sent or closed, or is dropped by a Query; `before` is what is left if that
    /// is not done, and `there` whether the connection has it then.
    Unnamed { before: Option<Arc<Content>>, there: bool, by_query: bool },
    /// A text was sent.
    Sent(Sent),
    /// A Parse of a name that the client has: the server refuses it.
    Refused { name: Box<[u8]> },
    /// A Parse of more than is kept: the server refuses what is sent in its place.
    TooMuch,
    /// A Parse went as it was, for SQL has this name on the server.
    Raw { name: Box<[u8]> },
    /// A number was to be closed.
    Closed { number: u32 },
}

/// A text that was sent under a number, and the entry that it stands in for.
#[derive(Debug)]
struct Sent {
    key: Key,
    number: u32,
    replaced: Option<Entry>,
}

/// The meaning of a client's name: a text, and the context in which the client had it prepared.
#[derive(Debug, Clone)]
struct Meaning {
    content: Arc<Content>,
    context: u64,
}

#[derive(Debug)]
struct Ahead {
    mark: u32,
    batch: u32,
    change: Change,
}

/// One client's statements, and those of the connection it has at the moment.
#[derive(Debug)]
pub struct Statements {
    names: HashMap<Box<[u8]>, Meaning>,
    /// Names of statements that are too long to be kept.
    long: HashSet<Box<[u8]>>,
    /// Names that SQL's PREPARE has made; the session keeps its connection meanwhile.
    by_sql: HashSet<Box<[u8]>>,
    bytes: usize,
    /// The settings that a text is read with.
    context: u64,
    /// The last name that looked like one of ours and was none.
    nobody: Option<Box<[u8]>>,
    /// All statements are about to be dropped, in this batch; those that were made since are not.
    dropping: Option<u32>,
    /// The last batch in which SQL makes or drops statements under names of its own.
    sql_batch: Option<u32>,
    /// The name that SQL's PREPARE makes in this batch, executed by a message.
    preparing: Option<Box<[u8]>>,
    /// A Parse under a name that SQL was believed to have was taken by the server.
    raw: bool,
    made_since: HashSet<Box<[u8]>>,
    /// Numbers of statements that were made or dropped since nothing was in flight, and the client's names of
    /// them: what an error says of one of them is about a name that may mean something else by now.
    named: Vec<(u32, Box<[u8]>)>,
    /// The statement that SQL's EXECUTE named last, and the number that it was given.
    executed: Option<(u32, Box<[u8]>)>,
    unnamed: Option<Arc<Content>>,
    /// The connection's unnamed statement is ours.
    unnamed_there: bool,
    server: Option<Box<Prepared>>,
    /// Changes made ahead of the server's answers, oldest first.
    ahead: VecDeque<Ahead>,
    last_mark: u32,
    /// The batch that is being forwarded: how many ends of batches were. And how many of these the server
    /// has passed.
    batch: u32,
    ended: u32,
    /// Statements that one server connection keeps.
    limit: usize,
}

impl Statements {
    /// None yet. `limit`: statements kept on one server connection, at least 1.
    pub fn new(limit: usize) -> Self {
        Self {
            names: HashMap::new(),
            long: HashSet::new(),
            by_sql: HashSet::new(),
            preparing: None,
            bytes: 0,
            context: 0,
            nobody: None,
            dropping: None,
            sql_batch: None,
            raw: false,
            made_since: HashSet::new(),
            named: Vec::new(),
            executed: None,
            unnamed: None,
            unnamed_there: false,
            server: None,
            ahead: VecDeque::new(),
            last_mark: 0,
            batch: 0,
            ended: 0,
            limit: limit.max(1),
        }
    }

    /// Takes the statements of a connection over.
    pub fn attach(&mut self, server: Box<Prepared>) {
        self.server = Some(server);
        self.unnamed_there = sabotage::is(Sabotage::Unnamed);
    }

    /// Gives them back; nothing must be in flight.
    pub fn detach(&mut self) -> Option<Box<Prepared>> {
        self.dropped_all();
        self.sql_batch = None;
        self.undo_until(self.batch.wrapping_add(1));
        self.batch = 0;
        self.ended = 0;
        self.last_mark = 0;
        self.named.clear();
        self.server.take()
    }

    /// The connection is gone, and with it all that was not answered.
    pub fn lost_server(&mut self) {
        drop(self.detach());
    }

    /// The content that a name of the client's stands for.
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Content>> {
        match name {
            b"" => self.unnamed.as_ref(),
            name => self.names.get(name).map(|meaning| &meaning.content),
        }
    }

    /// Notes the settings with which the next forwarded message is read.
    pub fn in_context(&mut self, context: u64) {
        self.context = context;
    }

    /// A Parse that was not forwarded: the client was answered by us.
    pub fn define(&mut self, name: &[u8], content: Arc<Content>) {
        if name.is_empty() {
            self.unnamed = Some(content);
            return;
        }
        let meaning = Meaning { content, context: self.context };
        self.set(name.into(), Some(meaning));
    }

    /// A Close that was not forwarded.
    pub fn undefine(&mut self, name: &[u8]) {
        match name {
            b"" => self.unnamed = None,
            name => drop(self.set(name.into(), None)),
        }
    }

    /// Plans of this connection are outdated.
    pub fn outdate(&mut self) {
        if let Some(server) = &mut self.server {
            server.outdate();
        }
    }

    /// The connection turned out to have no statement of this number.
    pub fn is_gone(&mut self, number: u32) {
        if let Some(server) = &mut self.server {
            server.known.retain(|_, entry| entry.number != number);
        }
    }

    /// The answer to a marked message (`1` or `3`).
    pub fn answered(&mut self, mark: u32) -> Answer {
        let at = self.ahead.iter().position(|ahead| ahead.mark == mark);
        let ahead = at.and_then(|at| self.ahead.remove(at));
        match ahead.map(|ahead| ahead.change) {
            Some(Change::Name { sent: Some(sent), .. } | Change::Sent(sent)) => self.confirm(sent),
            Some(Change::Raw { name }) => {
                self.by_sql.remove(&name);
                self.long.insert(name);
                self.raw = true;
            }
            _ => {}
        }
        match mark & SWALLOW != 0 {
            true => Answer::Swallow,
            false => Answer::Pass,
        }
    }

    /// The server tried what this mark stands for, and failed: the old unnamed statement is gone then.
    /// Answers what the client has to be told instead.
    pub fn failed(&mut self, mark: u32) -> Option<Refusal> {
        let found = self.ahead.iter_mut().find(|ahead| ahead.mark == mark && mark & SWALLOW == 0);
        match &mut found?.change {
            Change::Unnamed { before, there, .. } => (*before, *there) = (None, false),
            Change::Refused { name } => return Some(Refusal::Exists(name.clone())),
            Change::TooMuch => return Some(Refusal::TooMuch),
            _ => {}
        }
        None
    }

    /// Whether a mark is one of ours.
    #[inline]
    pub fn is_mark(token: u32) -> bool {
        token & OURS != 0
    }

    /// Whether nothing of what a mark stands for is for the client, its error included.
    pub fn is_silent(mark: u32) -> bool {
        mark & SILENT != 0
    }

    /// The mark of a Sync of ours.
    pub const SYNC: u32 = OURS | SWALLOW | SILENT;

    fn confirm(&mut self, sent: Sent) {
        let Some(server) = &mut self.server else { return };
        match server.known.get_mut(&sent.key) {
            Some(entry) if entry.number == sent.number => entry.unconfirmed = None,
            // It was sent again under another number meanwhile, which closes this one.
            _ => match undo::standing_in(&mut self.ahead, sent.number) {
                Some(entry) => entry.unconfirmed = None,
                None => server.to_close.push(sent.number),
            },
        }
        server.to_close.extend(sent.replaced.map(|entry| entry.number));
    }

    /// A Bind is forwarded; `skip` is the length of its head and its two names.
    pub fn bind(
        &mut self,
        bind: frontend::Bind<'_>,
        body_len: usize,
        injected: &mut Vec<Injected>,
        out: &mut Vec<u8>,
    ) -> Treatment {
        let skip = 5 + bind.portal.len() + 1 + bind.statement.len() + 1;
        let ours = match self.reach(bind.statement, injected, out) {
            Reached::AsIs => return Treatment::AsIs,
            Reached::Name(ours) => ours,
        };
        let len = 4 + body_len - bind.statement.len() + ours.len();
        out.put_u8(b'B');
        out.put_u32(len as u32);
        out.put_slice(bind.portal);
        out.put_u8(0);
        out.put_slice(&ours);
        out.put_u8(0);
        Treatment::Head { skip }
    }

    /// A Describe is forwarded.
    pub fn describe(
        &mut self,
        target: Target<'_>,
        len: usize,
        injected: &mut Vec<Injected>,
        out: &mut Vec<u8>,
    ) -> Treatment {
        let Target::Statement(name) = target else { return Treatment::AsIs };
        match self.reach(name, injected, out) {
            Reached::AsIs => Treatment::AsIs,
            Reached::Name(ours) => {
                put_target(b'D', &ours, out);
                Treatment::Head { skip: len }
            }
        }
    }

    /// A Close is forwarded.
    pub fn close(
        &mut self,
        target: Target<'_>,
        len: usize,
        out: &mut Vec<u8>,
    ) -> (Treatment, Counts) {
        let Target::Statement(name) = target else { return (Treatment::AsIs, Counts::Close(0)) };
        if name.is_empty() {
            let before = self.unnamed.take();
            let there = std::mem::take(&mut self.unnamed_there);
            let change = Change::Unnamed { before, there, by_query: false };
            return (Treatment::AsIs, Counts::Close(self.mark(0, change)));
        }
        if self.long.remove(name) {
            let treatment = match self.long.is_empty() {
                true => Treatment::ClosedLong { skip: 0 },
                false => Treatment::AsIs,
            };
            return (treatment, Counts::Close(0));
        }
        if self.by_sql.contains(name) || self.is_preparing(name) {
            self.preparing = None;
            return (Treatment::AsIs, Counts::Close(0));
        }
        let before = self.set(name.into(), None);
        let mark = self.mark(0, Change::Name { name: name.into(), before, sent: None });
        put_target(b'C', NOBODY, out);
        (Treatment::Head { skip: len }, Counts::Close(mark))
    }

    /// Sees to it that the connection has what the client means by a name.
    fn reach(&mut self, name: &[u8], injected: &mut Vec<Injected>, out: &mut Vec<u8>) -> Reached {
        if (name.is_empty() || self.has(name))
            && let Some(number) = self.in_place_of(name, injected, out)
        {
            self.named.push((number, name.into()));
            return Reached::Name(name_of(number));
        }
        if name.is_empty() {
            if self.unnamed_there {
                return Reached::AsIs;
            }
            let Some(content) = self.unnamed.clone() else {
                // The connection may have somebody else's.
                self.nobody = None;
                return Reached::Name(NOBODY.into());
            };
            wire::put_unnamed(&content.body, out);
            self.unnamed_there = true;
            let before = Some(content);
            let change = Change::Unnamed { before, there: false, by_query: false };
            injected.push(Injected::Parse(self.mark(SWALLOW, change)));
            return Reached::AsIs;
        }
        if self.has(name) {
            return Reached::Name(name_of(self.present(name, injected, out)));
        }
        if name.starts_with(PREFIX.as_bytes()) {
            // Ours must not be reached by it.
            self.nobody = Some(name.into());
            return Reached::Name(NOBODY.into());
        }
        // The server says that it does not exist, in the client's own words.
        Reached::AsIs
    }

    /// The number under which the connection has what a name means; sends it if it has not.
    fn present(&mut self, name: &[u8], injected: &mut Vec<Injected>, out: &mut Vec<u8>) -> u32 {
        let Some(meaning) = self.names.get(name) else { return 0 };
        let key = (meaning.context, meaning.content.body.clone());
        if let Some(number) = self.find(&key) {
            return number;
        }
        let context = self.context;
        if let Some(meaning) = self.names.get_mut(name) {
            // Settings of the past are not made again for it.
            meaning.context = context;
        }
        let number = self.present_text(&key.1, injected, out);
        self.named.push((number, name.into()));
        number
    }

    fn present_text(
        &mut self,
        body: &Bytes,
        injected: &mut Vec<Injected>,
        out: &mut Vec<u8>,
    ) -> u32 {
        if let Some(number) = self.find(&(self.context, body.clone())) {
            return number;
        }
        self.make_room(injected, out);
        let sent = self.enter(body);
        let number = sent.number;
        put_parse(number, body, out);
        injected.push(Injected::Parse(self.mark(SWALLOW, Change::Sent(sent))));
        number
    }

    /// The number of a text that the connection has, or will have if this batch comes so far.
    fn find(&mut self, key: &Key) -> Option<u32> {
        let batch = self.batch;
        let server = self.server.as_mut()?;
        let entry = server.known.get_mut(key)?;
        if entry.unconfirmed.is_some_and(|sent_in| sent_in != batch) {
            // An earlier batch may fail before it comes to it.
            return None;
        }
        server.clock += 1;
        entry.used = server.clock;
        Some(entry.number)
    }

    fn enter(&mut self, body: &Bytes) -> Sent {
        let (batch, key) = (self.batch, (self.context, body.clone()));
        let Some(server) = &mut self.server else { return Sent { key, number: 0, replaced: None } };
        server.last_number += 1;
        server.clock += 1;
        let (number, used) = (server.last_number, server.clock);
        let entry = Entry { number, used, unconfirmed: Some(batch) };
        let replaced = server.known.insert(key.clone(), entry);
        if let Some(entry) = &replaced {
            // What is in flight may still name it.
            let (number, name) = (entry.number, self.name_of_key(&key));
            self.named.extend(name.map(|name| (number, name)));
        }
        Sent { key, number, replaced }
    }

    /// Closes what was left behind, and the text that was used longest ago if there are too many.
    fn make_room(&mut self, injected: &mut Vec<Injected>, out: &mut Vec<u8>) {
        let Some(server) = &mut self.server else { return };
        let mut numbers = std::mem::take(&mut server.to_close);
        while server.known.len() >= self.limit {
            let confirmed = server.known.iter().filter(|(_, entry)| entry.unconfirmed.is_none());
            let oldest = confirmed.min_by_key(|(_, entry)| entry.used);
            let Some(key) = oldest.map(|(key, _)| key.clone()) else { break };
            numbers.extend(server.known.remove(&key).map(|entry| entry.number));
        }
        for number in numbers {
            put_target(b'C', &name_of(number), out);
            injected.push(Injected::Close(self.mark(SWALLOW, Change::Closed { number })));
        }
    }

    fn mark(&mut self, bits: u32, change: Change) -> u32 {
        self.last_mark = (self.last_mark + 1) & SEQUENCE;
        let mark = self.last_mark | OURS | bits;
        self.ahead.push_back(Ahead { mark, batch: self.batch, change });
        mark
    }

    fn set(&mut self, name: Box<[u8]>, meaning: Option<Meaning>) -> Option<Meaning> {
        let len = name.len();
        let cost = |meaning: &Meaning| meaning.content.body.len() + len + ENTRY_BYTES;
        self.bytes += meaning.as_ref().map_or(0, cost);
        let before = match meaning {
            Some(meaning) => self.names.insert(name, meaning),
            None => self.names.remove(&name),
        };
        self.bytes -= before.as_ref().map_or(0, cost);
        before
    }
}

/// Bytes that an entry takes beside its text.
const ENTRY_BYTES: usize = 128;

/// The error for a client in place of a server's error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// 42P05 with its own name.
    Exists(Box<[u8]>),
    /// 53400: more statements than are kept.
    TooMuch,
}

/// The part of a mark that counts.
const SEQUENCE: u32 = SILENT - 1;

enum Reached {
    AsIs,
    Name(Box<[u8]>),
}
