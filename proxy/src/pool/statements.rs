//! Prepared statements of the extended protocol over connections that change hands, pure.
//!
//! A client's names are its own; on a server a statement is known by its text and parameter types,
//! under a name of ours that is never used twice on one connection. What a client forwards is
//! rewritten on the way:
//!
//! | client sends | the server gets |
//! | --- | --- |
//! | Parse of a text that this connection has | Close of a name that nobody has; its CloseComplete becomes ParseComplete |
//! | Parse of a new text | Parse under our name |
//! | Bind, Describe of a name | the same with our name, behind a Parse if this connection lacks the text |
//! | Close of a name | Close of a name that nobody has: others may use the text |
//!
//! Every answer still comes from the server and in its place, so errors, skipping to Sync and
//! pipelining need no bookkeeping of their own: what was changed here ahead of the answer is taken
//! back when the answer does not come ([`Statements::ready`]). A message whose meaning hangs on a batch
//! that is not answered yet waits for it ([`Statements::must_wait`]).
//!
//! The unnamed statement is the client's as well: a connection that has changed hands gets it again.
//!
//! Not here: SQL's PREPARE, which pins ([`crate::session::journal`]).

mod prepared;
#[cfg(test)]
mod tests;
mod texts;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::{BufMut, Bytes};
use kornak_protocol::frontend::{self, Target};

use prepared::Entry;
pub use prepared::Prepared;
pub use texts::{Texts, content_of};

use crate::session::journal::Statement;

/// Names of ours begin with this; the colon keeps them apart from what drivers make up.
const PREFIX: &str = "_kornak:";

/// A name that no statement has.
pub(crate) const NOBODY: &[u8] = b"_kornak:0";

/// In a mark: the answer is for us, the client must not see it.
const SWALLOW: u32 = 1 << 31;

/// In a mark: it belongs to a change of ours.
const OURS: u32 = 1 << 30;

/// A statement's text and parameter types.
#[derive(Debug)]
pub struct Content {
    /// The body of its Parse, without the name.
    pub body: Bytes,
    /// What its execution can do.
    pub statement: Statement,
    /// Its text, if executing it changes the session.
    pub note: Option<Bytes>,
    /// Its text may leave something in the session that no command tag shows.
    pub is_opaque: bool,
}

/// What is done to one message on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Treatment {
    /// It goes as it is.
    AsIs,
    /// Its first `skip` bytes, the head included, are replaced by what was appended to the output.
    Head { skip: usize },
    /// The statement cannot be shared: too long to be kept.
    TooLong,
}

/// A message that is put in front of the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    Parse(u32),
    Close(u32),
}

/// What the answer to a marked message is to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Pass,
    Swallow,
    /// It is told ParseComplete.
    Parsed,
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
    Name { name: Box<[u8]>, before: Option<Arc<Content>>, sent: Option<(Bytes, u32)> },
    /// The unnamed statement was sent or closed; `before` is what is left if that is not done.
    Unnamed { before: Option<Arc<Content>> },
    /// A text was sent under this number.
    Sent { body: Bytes, number: u32 },
    /// A number was to be closed.
    Closed { number: u32 },
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
    names: HashMap<Box<[u8]>, Arc<Content>>,
    bytes: usize,
    unnamed: Option<Arc<Content>>,
    /// The connection's unnamed statement is ours.
    unnamed_there: bool,
    server: Option<Box<Prepared>>,
    /// Changes made ahead of the server's answers, oldest first.
    ahead: VecDeque<Ahead>,
    last_mark: u32,
    /// The batch that is being forwarded, and how many have ended.
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
            bytes: 0,
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
        self.unnamed_there = false;
    }

    /// Gives them back; nothing must be in flight.
    pub fn detach(&mut self) -> Option<Box<Prepared>> {
        self.undo_until(self.batch.wrapping_add(1));
        self.batch = 0;
        self.ended = 0;
        self.last_mark = 0;
        self.server.take()
    }

    /// The connection is gone, and with it all that was not answered.
    pub fn lost_server(&mut self) {
        let _ = self.detach();
    }

    /// What a name of the client's means.
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Content>> {
        match name {
            b"" => self.unnamed.as_ref(),
            name => self.names.get(name),
        }
    }

    /// Bytes that the client's statements take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A Parse that was not forwarded: the client was answered by us.
    pub fn define(&mut self, name: &[u8], content: Arc<Content>) {
        if name.is_empty() {
            self.unnamed = Some(content);
            return;
        }
        self.set(name.into(), Some(content));
    }

    /// The client has dropped all of its statements by SQL; the connection's are gone with them.
    pub fn forget_all(&mut self) {
        self.names.clear();
        self.bytes = 0;
        self.unnamed_there = false;
        if let Some(server) = &mut self.server {
            server.clear();
        }
    }

    /// A simple query was forwarded: it drops the unnamed statement.
    pub fn query(&mut self) {
        self.unnamed = None;
        self.unnamed_there = false;
    }

    /// Plans of this connection are outdated.
    pub fn outdate(&mut self) {
        if let Some(server) = &mut self.server {
            server.outdate();
        }
    }

    /// What is forwarded next belongs to the batch behind so many that owe a ReadyForQuery.
    pub fn in_batch(&mut self, owed: usize) {
        self.batch = self.ended.wrapping_add(owed as u32);
    }

    /// A ReadyForQuery came: what its batch did not confirm was not done.
    pub fn ready(&mut self) {
        self.ended = self.ended.wrapping_add(1);
        self.undo_until(self.ended);
    }

    /// The answer to a marked message (`1` or `3`).
    pub fn answered(&mut self, mark: u32) -> Answer {
        while let Some(ahead) = self.ahead.pop_front() {
            if ahead.mark != mark {
                continue;
            }
            if let Change::Name { sent: Some((body, number)), .. } | Change::Sent { body, number } =
                ahead.change
            {
                self.confirm(&body, number);
            }
            break;
        }
        match (mark & SWALLOW != 0, mark & PARSED != 0) {
            (true, _) => Answer::Swallow,
            (false, true) => Answer::Parsed,
            (false, false) => Answer::Pass,
        }
    }

    /// The server tried what this mark stands for, and failed: the old unnamed statement is gone then.
    pub fn failed(&mut self, mark: u32) {
        let found = self.ahead.iter_mut().find(|ahead| ahead.mark == mark && mark & SWALLOW == 0);
        if let Some(Ahead { change: Change::Unnamed { before }, .. }) = found {
            *before = None;
        }
    }

    /// Whether a mark is one of ours.
    #[inline]
    pub fn is_mark(token: u32) -> bool {
        token & OURS != 0
    }

    fn confirm(&mut self, body: &Bytes, number: u32) {
        let Some(server) = &mut self.server else { return };
        match server.known.get_mut(body) {
            Some(entry) if entry.number == number => entry.unconfirmed = None,
            // It was sent again under another number meanwhile.
            _ => server.to_close.push(number),
        }
    }

    /// Whether what a name means hangs on a batch before this one that is not answered yet: the message
    /// must not be forwarded before.
    pub fn must_wait(&self, tag: u8, name: &[u8]) -> bool {
        let concerns = |ahead: &&Ahead| match &ahead.change {
            Change::Name { name: theirs, .. } => **theirs == *name,
            Change::Unnamed { .. } => name.is_empty(),
            Change::Sent { .. } | Change::Closed { .. } => false,
        };
        let last = self.ahead.iter().rev().find(concerns);
        let replaces = tag == b'C' || tag == b'P' && name.is_empty();
        !replaces && last.is_some_and(|ahead| ahead.batch != self.batch)
    }

    /// A Parse is forwarded. `content` is `None` if the message is too long to be kept.
    pub fn parse(
        &mut self,
        name: &[u8],
        content: Option<Arc<Content>>,
        len: usize,
        injected: &mut Vec<Injected>,
        out: &mut Vec<u8>,
    ) -> (Treatment, Counts) {
        let Some(content) = content else { return (Treatment::TooLong, Counts::Parse(0)) };
        if name.is_empty() {
            let before = self.unnamed.replace(content);
            self.unnamed_there = true;
            let mark = self.mark(0, Change::Unnamed { before });
            return (Treatment::AsIs, Counts::Parse(mark));
        }
        if self.names.contains_key(name) {
            // The server knows our name as well and refuses the same way (42P05).
            let number = self.present(&content.body, injected, out);
            put_parse(number, &content.body, out);
            return (Treatment::Head { skip: len }, Counts::Parse(0));
        }
        let counts = if self.find(&content.body).is_some() {
            put_target(b'C', NOBODY, out);
            let before = self.set(name.into(), Some(content));
            let change = Change::Name { name: name.into(), before, sent: None };
            Counts::Close(self.mark(PARSED, change))
        } else {
            self.make_room(injected, out);
            let number = self.enter(&content.body);
            put_parse(number, &content.body, out);
            let sent = Some((content.body.clone(), number));
            let before = self.set(name.into(), Some(content));
            Counts::Parse(self.mark(0, Change::Name { name: name.into(), before, sent }))
        };
        (Treatment::Head { skip: len }, counts)
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
            self.unnamed_there = false;
            return (Treatment::AsIs, Counts::Close(self.mark(0, Change::Unnamed { before })));
        }
        let before = self.set(name.into(), None);
        let mark = self.mark(0, Change::Name { name: name.into(), before, sent: None });
        put_target(b'C', NOBODY, out);
        (Treatment::Head { skip: len }, Counts::Close(mark))
    }

    /// Sees to it that the connection has what the client means by a name.
    fn reach(&mut self, name: &[u8], injected: &mut Vec<Injected>, out: &mut Vec<u8>) -> Reached {
        if name.is_empty() {
            if self.unnamed_there {
                return Reached::AsIs;
            }
            let Some(content) = self.unnamed.clone() else {
                // The connection may have somebody else's.
                return Reached::Name(NOBODY.into());
            };
            out.put_u8(b'P');
            out.put_u32(4 + 1 + content.body.len() as u32);
            out.put_u8(0);
            out.put_slice(&content.body);
            self.unnamed_there = true;
            let change = Change::Unnamed { before: Some(content) };
            injected.push(Injected::Parse(self.mark(SWALLOW, change)));
            return Reached::AsIs;
        }
        match self.names.get(name).cloned() {
            // The server says that it does not exist, in the client's own words; ours must not be
            // reached by them.
            None if name.starts_with(PREFIX.as_bytes()) => Reached::Name(NOBODY.into()),
            None => Reached::AsIs,
            Some(content) => {
                let number = self.present(&content.body, injected, out);
                Reached::Name(name_of(number))
            }
        }
    }

    /// The number under which the connection has a text; sends it if it has not.
    fn present(&mut self, body: &Bytes, injected: &mut Vec<Injected>, out: &mut Vec<u8>) -> u32 {
        if let Some(number) = self.find(body) {
            return number;
        }
        self.make_room(injected, out);
        let number = self.enter(body);
        put_parse(number, body, out);
        let change = Change::Sent { body: body.clone(), number };
        injected.push(Injected::Parse(self.mark(SWALLOW, change)));
        number
    }

    /// The number of a text that the connection has, or will have if this batch comes so far.
    fn find(&mut self, body: &Bytes) -> Option<u32> {
        let batch = self.batch;
        let server = self.server.as_mut()?;
        let entry = server.known.get_mut(body)?;
        if entry.unconfirmed.is_some_and(|sent_in| sent_in != batch) {
            // An earlier batch may fail before it comes to it.
            return None;
        }
        server.clock += 1;
        entry.used = server.clock;
        Some(entry.number)
    }

    fn enter(&mut self, body: &Bytes) -> u32 {
        let batch = self.batch;
        let Some(server) = &mut self.server else { return 0 };
        server.last_number += 1;
        server.clock += 1;
        let (number, used) = (server.last_number, server.clock);
        server.known.insert(body.clone(), Entry { number, used, unconfirmed: Some(batch) });
        number
    }

    /// Closes what was left behind, and the text that was used longest ago if there are too many.
    fn make_room(&mut self, injected: &mut Vec<Injected>, out: &mut Vec<u8>) {
        let Some(server) = &mut self.server else { return };
        let mut numbers = std::mem::take(&mut server.to_close);
        while server.known.len() >= self.limit {
            let confirmed = server.known.iter().filter(|(_, entry)| entry.unconfirmed.is_none());
            let oldest = confirmed.min_by_key(|(_, entry)| entry.used);
            let Some(body) = oldest.map(|(body, _)| body.clone()) else { break };
            numbers.extend(server.known.remove(&body).map(|entry| entry.number));
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

    fn set(&mut self, name: Box<[u8]>, content: Option<Arc<Content>>) -> Option<Arc<Content>> {
        let cost = |content: &Arc<Content>| content.body.len();
        self.bytes += content.as_ref().map_or(0, cost);
        let before = match content {
            Some(content) => self.names.insert(name, content),
            None => self.names.remove(&name),
        };
        self.bytes -= before.as_ref().map_or(0, cost);
        before
    }

    /// Takes back what batches before this one did not confirm.
    fn undo_until(&mut self, batch: u32) {
        let past = |ahead: &Ahead| ahead.batch.wrapping_sub(batch) > u32::MAX / 2;
        let n = self.ahead.iter().take_while(|ahead| past(ahead)).count();
        for at in (0..n).rev() {
            let Some(Ahead { change, .. }) = self.ahead.remove(at) else { continue };
            match change {
                Change::Name { name, before, sent } => {
                    if let Some((body, number)) = sent {
                        self.undo_sent(&body, number);
                    }
                    self.undo_name(at, name, before);
                }
                Change::Unnamed { before } => self.undo_unnamed(at, before),
                Change::Sent { body, number } => self.undo_sent(&body, number),
                Change::Closed { number } => {
                    if let Some(server) = &mut self.server {
                        server.to_close.push(number);
                    }
                }
            }
        }
    }

    fn undo_unnamed(&mut self, from: usize, before: Option<Arc<Content>>) {
        let later = self.ahead.iter_mut().skip(from).find_map(|ahead| match &mut ahead.change {
            Change::Unnamed { before } => Some(before),
            _ => None,
        });
        match later {
            Some(theirs) => *theirs = before,
            None => {
                self.unnamed = before;
                self.unnamed_there = false;
            }
        }
    }

    fn undo_sent(&mut self, body: &Bytes, number: u32) {
        if let Some(server) = &mut self.server
            && server.known.get(body).is_some_and(|entry| entry.number == number)
        {
            server.known.remove(body);
        }
    }

    /// A later batch that changed the same name did so on top of what never was.
    fn undo_name(&mut self, from: usize, name: Box<[u8]>, before: Option<Arc<Content>>) {
        let later = self.ahead.iter_mut().skip(from).find_map(|ahead| match &mut ahead.change {
            Change::Name { name: theirs, before, .. } if *theirs == name => Some(before),
            _ => None,
        });
        match later {
            Some(theirs) => *theirs = before,
            None => {
                self.set(name, before);
            }
        }
    }
}

/// In a mark: CloseComplete stands for ParseComplete.
const PARSED: u32 = 1 << 29;

/// What is left of a mark to count with.
const SEQUENCE: u32 = PARSED - 1;

enum Reached {
    AsIs,
    Name(Box<[u8]>),
}

fn name_of(number: u32) -> Box<[u8]> {
    format!("{PREFIX}{number}").into_bytes().into_boxed_slice()
}

fn put_parse(number: u32, body: &[u8], out: &mut Vec<u8>) {
    let name = name_of(number);
    out.put_u8(b'P');
    out.put_u32((4 + name.len() + 1 + body.len()) as u32);
    out.put_slice(&name);
    out.put_u8(0);
    out.put_slice(body);
}

fn put_target(tag: u8, name: &[u8], out: &mut Vec<u8>) {
    out.put_u8(tag);
    out.put_u32((4 + 1 + name.len() + 1) as u32);
    out.put_u8(b'S');
    out.put_slice(name);
    out.put_u8(0);
}
