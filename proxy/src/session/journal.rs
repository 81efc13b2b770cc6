//! The journal of what a session holds on its server: what moves with the session, and what pins it.
//!
//! Command tags say cheaply that something was changed; the text that was sent says what. Settings
//! count once the transaction that made them is over, prepared statements at once. Where text and
//! tag leave a doubt the session is pinned: it is not moved, it ends with 57P01
//! (docs/protocol.md, *What a session holds*).
//!
//! Not here: `currval`, random seeds and plan caches, which are neither moved nor pin
//! (docs/safety.md A11), and what functions do out of sight.

mod block;
mod channels;
mod context;
mod cursors;
mod custom;
mod pin;
mod pooled;
mod settings;
mod steps;
mod text;

use std::collections::{HashMap, VecDeque};

use bytes::{BufMut, Bytes, BytesMut};
use kornak_protocol::frontend::{self, StatementKind};
use kornak_protocol::pipeline::Fate;

use crate::session::statements::Statements;
use block::Block;
use channels::Channels;
use context::Context;
use cursors::Cursors;
pub use pin::{Pin, Pins};
pub use pooled::Examined;
use steps::Note;
pub use steps::SqlEdits;
pub use text::{Named, executed, prepared};

/// Bytes of prepared statements kept of one session; a driver's cache of 256 statements of 2 KiB
/// fits, and ten thousand such sessions are 5 GB at the very worst.
pub const MAX_PREPARED_BYTES: usize = 512 * 1024;

/// Bytes that an entry takes beside its text.
const ENTRY_BYTES: usize = 128;

/// Longest text of a statement that is remembered until its answer: a SET, a DEALLOCATE. A token with its
/// claims is a few KiB.
const MAX_NOTE_BYTES: usize = 64 * 1024;

/// Requests noted of one endless batch, twice what a pipeline tells apart.
const MAX_NOTES: usize = 2 * kornak_protocol::limits::MAX_OWED;

/// Settings kept of one session; PostgreSQL has about 350, a session sets a few.
const MAX_SETTINGS: usize = 128;

/// Bytes of their statements; the claims of a token are a few KiB.
const MAX_SETTINGS_BYTES: usize = 256 * 1024;

/// Named portals followed in one transaction; of more the fate is not known.
const MAX_PORTALS: usize = 256;

/// The properties of a statement that its text shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statement {
    /// The effect that the statement can have on its transaction.
    pub fate: Fate,
    /// The statement's first keyword.
    pub kind: StatementKind,
}

impl Statement {
    const UNKNOWN: Self = Self { fate: Fate::Unknown, kind: StatementKind::Other };

    fn reads(self) -> bool {
        use StatementKind as K;
        // Several statements have a fate that is not known.
        matches!(self.kind, K::Select | K::Show | K::Empty) && self.fate != Fate::Unknown
    }

    fn of(sql: &[u8], is_whole: bool) -> Self {
        let kind = frontend::statement_kind(sql);
        let fate = if is_whole { frontend::fate_of(sql) } else { Fate::Unknown };
        Self { fate, kind }
    }
}

#[derive(Debug, Clone)]
struct Prepared {
    statement: Statement,
    /// Text of a statement whose execution changes the session.
    note: Option<Bytes>,
    /// The Parse message, once the server has confirmed it.
    message: Option<Bytes>,
}

/// A statement that a portal stands for.
#[derive(Debug, Clone)]
struct Bound {
    statement: Statement,
    note: Option<Bytes>,
    /// The execution of the statement is answered as DEALLOCATE.
    retag: bool,
}

impl Bound {
    const UNKNOWN: Self = Self { statement: Statement::UNKNOWN, note: None, retag: false };
}

#[derive(Debug)]
enum Change {
    Set(Box<[u8]>, Bytes),
    Reset(Box<[u8]>),
    ResetAll,
    Listen(Box<[u8]>),
    Unlisten(Box<[u8]>),
    UnlistenAll,
}

/// Parameters in the order in which they were set: a name and the statement that set it.
pub type Settings = Vec<(Box<[u8]>, Bytes)>;

/// The journal of one session.
#[derive(Debug, Default)]
pub struct Journal {
    /// Of a session whose connections change hands, in place of `prepared`.
    pub(super) statements: Option<Box<Statements>>,
    /// The settings that are set again when the client resets everything.
    base: Settings,
    /// The server connection may hold something else than `settings`.
    unfit: bool,
    /// A text was seen whose effects no server shows.
    unseen: bool,
    /// A text was seen whose effects no server shows and no command takes away.
    lasting: bool,
    prepared: HashMap<Box<[u8]>, Prepared>,
    prepared_bytes: usize,
    /// The unnamed statement that was forwarded last, and the one that the server has confirmed.
    unnamed: Option<Bound>,
    unnamed_message: Option<Bytes>,
    portals: HashMap<Box<[u8]>, Bound>,
    unnamed_portal: Option<Bound>,
    /// In the order they were made; each by the statement that made it.
    settings: Settings,
    /// Names that only functions set.
    custom: Vec<Box<[u8]>>,
    /// The channels that the session listens on; empty unless channels move.
    channels: Channels,
    channels_move: bool,
    cursors: Cursors,
    /// The statement that was forwarded last to be executed reads, by its first word.
    last_reads: bool,
    block: Block,
    context: Context,
    /// Functions of an application's own were called since the server was last asked.
    called: bool,
    /// Functions may have left parameters of their own on the connection.
    leftovers: bool,
    /// Something that may leave anything was forwarded behind the last DISCARD ALL, whose answer may be still to
    /// come.
    suspected: bool,
    /// Tells the session from others.
    id: u64,
    /// Grows with everything that may have set anything.
    turn: u32,
    /// A text that could not be taken apart may have set parameters that it does not name plainly.
    sets_unknown: bool,
    /// Tables that it creates may be temporary, whatever their statements say.
    makes_temporary: bool,
    pins: Pins,
    notes: VecDeque<(u32, Note)>,
    next_token: u32,
}

impl Journal {
    /// Adds a reason not to move.
    pub fn pin(&mut self, pin: Pin) {
        self.pins.add(pin);
    }

    /// Why the session cannot be moved.
    pub fn pinned(&self) -> Option<Pin> {
        self.pins.first()
    }

    /// Whether DISCARD ALL would take away whatever the session holds.
    pub fn may_be_discarded(&self) -> bool {
        let stays = [Pin::Load, Pin::Relay, Pin::Replication];
        !self.unseen && !stays.into_iter().any(|pin| self.pins.has(pin))
    }

    /// Why it cannot be moved, leaving out what only might be held.
    pub fn pinned_for_certain(&self) -> Option<Pin> {
        self.pins.without(Pin::Opaque).first()
    }

    /// Channels move with the session, instead of pinning it. Not where connections change hands: the
    /// session keeps one while it listens.
    pub fn move_channels(&mut self) {
        self.channels_move = self.statements.is_none();
    }

    /// Whether the session listens on channels that move.
    pub fn listens(&self) -> bool {
        !self.channels.is_empty()
    }

    /// On how many.
    pub fn channels(&self) -> usize {
        self.channels.len()
    }

    /// Whether the statement that was forwarded last to be executed reads, by its first word.
    pub fn last_reads(&self) -> bool {
        self.last_reads
    }

    /// A Parse is forwarded. `message` is the whole message if it is at hand.
    pub fn parse(&mut self, parse: frontend::ParseMessage<'_>, body: Option<&[u8]>) -> u32 {
        let statement = self.judge(parse.sql, parse.is_whole);
        let note = remembered(statement, parse.sql, parse.is_whole);
        let is_unnamed = parse.statement.is_empty();
        let is_kept = !self.pins.has(Pin::TooMuch);
        if is_unnamed {
            self.unnamed = Some(Bound { statement, note, retag: false });
        } else if is_kept {
            let entry = Prepared { statement, note, message: None };
            match self.prepared.get_mut(parse.statement) {
                // The server will refuse it, or a Close is on its way: whichever runs, we do not know.
                Some(known) => known.statement = Statement::UNKNOWN,
                None => {
                    self.prepared.insert(parse.statement.into(), entry);
                }
            }
        }
        let Some(body) = body.filter(|_| is_kept) else {
            if !is_unnamed {
                self.pins.add(Pin::TooMuch);
            }
            return self.note(Some(Note::Dropped { name: parse.statement.into() }));
        };
        let mut message = BytesMut::with_capacity(body.len() + 5);
        message.put_u8(b'P');
        message.put_u32(4 + body.len() as u32);
        message.put_slice(body);
        self.note(Some(Note::Parse { name: parse.statement.into(), message: message.freeze() }))
    }

    /// A Bind is forwarded.
    pub fn bind(&mut self, bind: frontend::Bind<'_>) {
        let known = match bind.statement {
            b"" => self.unnamed.clone(),
            name => self.prepared.get(name).map(|it| Bound {
                statement: it.statement,
                note: it.note.clone(),
                retag: false,
            }),
        };
        self.bind_as(bind.portal, known.unwrap_or(Bound::UNKNOWN));
    }

    fn bind_as(&mut self, portal: &[u8], bound: Bound) {
        if portal.is_empty() {
            self.unnamed_portal = Some(bound);
        } else if self.portals.len() < MAX_PORTALS {
            self.portals.insert(portal.into(), bound);
        } else {
            self.portals.remove(portal);
        }
    }

    /// A Close is forwarded.
    pub fn close(&mut self, target: frontend::Target<'_>) -> u32 {
        match target {
            frontend::Target::Portal(_) => 0,
            frontend::Target::Statement(name) => self.note(Some(Note::CloseStatement(name.into()))),
        }
    }

    /// The properties of a statement that a Bind names; for transactions that the proxy answers
    /// for.
    pub fn kind_of(&self, statement: &[u8]) -> Option<Statement> {
        if let Some(shared) = &self.statements {
            return shared.get(statement).map(|content| content.statement);
        }
        match statement {
            b"" => self.unnamed.as_ref().map(|known| known.statement),
            name => self.prepared.get(name).map(|p| p.statement),
        }
    }

    /// A Parse that we answer ourselves: it has to be made on the next server.
    pub fn parse_unforwarded(&mut self, parse: frontend::ParseMessage<'_>, body: Option<&[u8]>) {
        let Some(shared) = &mut self.statements else {
            self.parse(parse, body);
            self.confirm_unforwarded();
            return;
        };
        if let Some(content) = body.and_then(crate::session::statements::content_of) {
            let content = Self::content(parse, Bytes::copy_from_slice(content));
            shared.define(parse.statement, content.into());
        }
    }

    /// A Close that we answer ourselves.
    pub fn close_unforwarded(&mut self, name: &[u8]) {
        match &mut self.statements {
            Some(shared) => shared.undefine(name),
            None => self.forget(name),
        }
    }

    fn confirm_unforwarded(&mut self) {
        while let Some((_, note)) = self.notes.pop_front() {
            if let Note::Parse { name, message } = note {
                self.confirm(&name, message);
            }
        }
    }

    fn confirm(&mut self, name: &[u8], message: Bytes) {
        if name.is_empty() {
            self.unnamed_message = Some(message);
            return;
        }
        self.prepared_bytes += message.len() + name.len() + ENTRY_BYTES;
        if self.prepared_bytes > MAX_PREPARED_BYTES {
            // Nothing of it will be said to another server.
            self.pins.add(Pin::TooMuch);
            self.prepared = HashMap::new();
            self.prepared_bytes = 0;
            return;
        }
        let body = message.get(5..).unwrap_or_default();
        let Ok(parse) = frontend::ParseMessage::parse(body) else { return };
        // Read again: a Close that was on its way may have taken the entry with it.
        let statement = Statement::of(parse.sql, parse.is_whole);
        let note = remembered(statement, parse.sql, parse.is_whole);
        self.prepared.insert(name.into(), Prepared { statement, note, message: Some(message) });
    }

    fn forget(&mut self, name: &[u8]) {
        if name.is_empty() {
            self.unnamed_message = None;
        }
        if let Some(gone) = self.prepared.remove(name) {
            let cost = |message: Bytes| message.len() + name.len() + ENTRY_BYTES;
            self.prepared_bytes -= gone.message.map_or(0, cost);
        }
    }

    fn forget_all(&mut self) {
        self.prepared.clear();
        self.prepared_bytes = 0;
        if let Some(shared) = &mut self.statements {
            shared.forget_all();
        }
        self.pins.remove(Pin::SqlPrepare);
    }

    /// The server is gone: what was in flight or not committed is forgotten.
    pub fn lost_server(&mut self) {
        if let Some(shared) = &mut self.statements {
            shared.lost_server();
        }
        self.notes.clear();
        self.block.roll_back();
        self.context.quiet();
        self.cursors.ready(true, true);
        self.portals.clear();
        self.unnamed_portal = None;
        self.prepared.retain(|_, known| known.message.is_some());
        // What was confirmed is made again.
        let parse = self.unnamed_message.as_deref().and_then(|message| message.get(5..));
        let parse = parse.and_then(|body| frontend::ParseMessage::parse(body).ok());
        self.unnamed = parse.map(|parse| {
            let statement = Statement::of(parse.sql, parse.is_whole);
            let note = remembered(statement, parse.sql, parse.is_whole);
            Bound { statement, note, retag: false }
        });
    }

    /// Nothing is in flight: notes of requests that failed are of no use any more.
    pub fn quiet(&mut self) {
        self.context.quiet();
        if !self.notes.is_empty() {
            self.notes.clear();
            // Nobody is left who could mistake a new note for an old one.
            self.next_token = 0;
        }
    }

    /// Whether a new server needs nothing but the login.
    pub fn is_clean(&self) -> bool {
        self.settings.is_empty() && self.prepared.is_empty() && self.channels.is_empty()
    }

    /// Appends what a new server has to be told, each with a Sync or as a query of its own, and
    /// answers how many ReadyForQuery that makes.
    pub fn put_replay(&self, out: &mut BytesMut) -> usize {
        let mut owed = 0;
        for (_, text) in &self.settings {
            if frontend::put_query(text, out).is_ok() {
                owed += 1;
            }
        }
        for message in self.prepared.values().filter_map(|known| known.message.as_ref()) {
            out.put_slice(message);
            frontend::put_sync(out);
            owed += 1;
        }
        owed + self.channels.put(out)
    }

    /// Appends what makes the unnamed statement again, with a Sync; answers whether there is one. A
    /// server may refuse it: it may have become invalid since, which its client hears when it uses it.
    pub fn put_unnamed(&self, out: &mut BytesMut) -> bool {
        let Some(message) = &self.unnamed_message else { return false };
        out.put_slice(message);
        frontend::put_sync(out);
        true
    }
}

/// The text, if the statement is a single one and its answer may change what the session holds.
fn remembered(statement: Statement, sql: &[u8], is_whole: bool) -> Option<Bytes> {
    use StatementKind as K;
    let matters = matches!(
        statement.kind,
        K::Set
            | K::SetLocal
            | K::Reset
            | K::Deallocate
            | K::Discard
            | K::Declare
            | K::Close
            | K::Listen
            | K::Unlisten
            | K::CreateTemp
            | K::Prepare
            | K::Savepoint
            | K::Release
            | K::RollbackTo
    );
    let fits = is_whole && sql.len() <= MAX_NOTE_BYTES && statement.fate != Fate::Unknown;
    (matters && fits).then(|| Bytes::copy_from_slice(sql))
}
