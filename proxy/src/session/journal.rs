//! What a session holds on its server: what moves with it, and what pins it.
//!
//! Command tags say cheaply that something was changed; the text that was sent says what. Settings
//! count once the transaction that made them is over, prepared statements at once. Where text and
//! tag leave a doubt the session is pinned: it is not moved, it ends with 57P01 (DESIGN.md §6).
//!
//! Not here: `currval`, random seeds and plan caches, which are neither moved nor pin (SAFETY.md
//! A11), and what functions do out of sight.

mod channels;
mod cursors;
mod custom;
mod pin;
mod pooled;
mod text;

use std::collections::{HashMap, VecDeque};

use bytes::{BufMut, Bytes, BytesMut};
use kornak_protocol::frontend::{self, StatementKind};
use kornak_protocol::pipeline::{Fate, Kind, Owner, Unit};
use kornak_protocol::txn::{CommandTag, TagKind, TransactionStatus};

use crate::pool::statements::Statements;
use channels::{Channels, Named};
use cursors::Cursors;
pub use pin::{Pin, Pins};
pub use pooled::Examined;
use text::{Setting, last_word, leaves_unseen, setting_name};

/// Bytes of prepared statements kept of one session; a driver's cache of 256 statements of 2 KiB
/// fits, and ten thousand such sessions are 5 GB at the very worst.
pub const MAX_PREPARED_BYTES: usize = 512 * 1024;

/// Longest text of a statement that is remembered until its answer: a SET, a DEALLOCATE.
const MAX_NOTE_BYTES: usize = 4 * 1024;

/// Settings kept of one session; PostgreSQL has about 350, a session sets a few.
const MAX_SETTINGS: usize = 128;

/// Named portals followed in one transaction; of more the fate is not known.
const MAX_PORTALS: usize = 256;

/// What is known of a statement from its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statement {
    /// What it can do to its transaction.
    pub fate: Fate,
    /// Its first keyword.
    pub kind: StatementKind,
}

impl Statement {
    const UNKNOWN: Self = Self { fate: Fate::Unknown, kind: StatementKind::Other };

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

/// What was sent and has to be remembered until its answer comes.
#[derive(Debug)]
enum Note {
    Parse {
        name: Box<[u8]>,
        message: Bytes,
    },
    CloseStatement(Box<[u8]>),
    /// A single statement that changes the session, with its text.
    Text(Bytes),
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

/// What was set, in the order in which it was: a name and the statement that set it.
pub type Settings = Vec<(Box<[u8]>, Bytes)>;

/// The journal of one session.
#[derive(Debug, Default)]
pub struct Journal {
    /// Of a session whose connections change hands, in place of `prepared`.
    pub(super) statements: Option<Box<Statements>>,
    /// What is set again when the client resets everything.
    base: Settings,
    /// The server connection may hold something else than `settings`.
    unfit: bool,
    /// A text was seen whose effects no server shows.
    unseen: bool,
    prepared: HashMap<Box<[u8]>, Prepared>,
    prepared_bytes: usize,
    /// What is known of it; it is not made again.
    unnamed: Option<(Statement, Option<Bytes>)>,
    portals: HashMap<Box<[u8]>, (Statement, Option<Bytes>)>,
    unnamed_portal: Option<(Statement, Option<Bytes>)>,
    /// In the order they were made; each by the statement that made it.
    settings: Settings,
    /// Names that only functions set.
    custom: Vec<Box<[u8]>>,
    /// It listens on them; empty unless channels move.
    channels: Channels,
    channels_move: bool,
    cursors: Cursors,
    pending: Vec<Change>,
    rolled_back: bool,
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

    /// A simple query is forwarded; `is_whole` tells whether its text is.
    pub fn query(&mut self, sql: &[u8], is_whole: bool) -> Unit {
        let statement = self.judge(sql, is_whole);
        let note = remembered(statement, sql, is_whole);
        Unit { fate: statement.fate, token: self.note(note.map(Note::Text)) }
    }

    fn judge(&mut self, sql: &[u8], is_whole: bool) -> Statement {
        let statement = Statement::of(sql, is_whole);
        // CREATE TEMP is followed by its tag, which knows whether it succeeded.
        if statement.kind != StatementKind::CreateTemp && frontend::may_touch_session_state(sql) {
            self.opaque(sql, is_whole);
        }
        if statement.kind == StatementKind::CreateTemp && statement.fate == Fate::Unknown {
            self.pins.add(Pin::Temporary);
        }
        if statement.fate == Fate::Unknown {
            self.cursors.unfollowed(sql, is_whole);
        }
        statement
    }

    fn opaque(&mut self, sql: &[u8], is_whole: bool) {
        self.pins.add(Pin::Opaque);
        self.unseen |= leaves_unseen(sql) || !is_whole;
        self.note_custom(sql);
    }

    fn note(&mut self, note: Option<Note>) -> u32 {
        let Some(note) = note else { return 0 };
        self.next_token = self.next_token.wrapping_add(1).max(1);
        self.notes.push_back((self.next_token, note));
        self.next_token
    }

    /// A Parse is forwarded. `message` is the whole message if it is at hand.
    pub fn parse(&mut self, parse: frontend::ParseMessage<'_>, body: Option<&[u8]>) -> u32 {
        let statement = self.judge(parse.sql, parse.is_whole);
        let note = remembered(statement, parse.sql, parse.is_whole);
        if parse.statement.is_empty() {
            self.unnamed = Some((statement, note));
            return 0;
        }
        let entry = Prepared { statement, note, message: None };
        match self.prepared.get_mut(parse.statement) {
            // The server will refuse it, or a Close is on its way: whichever runs, we do not know.
            Some(known) => known.statement = Statement::UNKNOWN,
            None => {
                self.prepared.insert(parse.statement.into(), entry);
            }
        }
        let Some(body) = body else {
            self.pins.add(Pin::TooMuch);
            return 0;
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
            name => self.prepared.get(name).map(|p| (p.statement, p.note.clone())),
        };
        self.bind_as(bind.portal, known.unwrap_or((Statement::UNKNOWN, None)));
    }

    fn bind_as(&mut self, portal: &[u8], bound: (Statement, Option<Bytes>)) {
        if portal.is_empty() {
            self.unnamed_portal = Some(bound);
        } else if self.portals.len() < MAX_PORTALS {
            self.portals.insert(portal.into(), bound);
        } else {
            self.portals.remove(portal);
        }
    }

    /// An Execute is forwarded.
    pub fn execute(&mut self, portal: &[u8]) -> Unit {
        let bound = match portal {
            b"" => self.unnamed_portal.clone(),
            name => self.portals.get(name).cloned(),
        };
        let (statement, note) = bound.unwrap_or((Statement::UNKNOWN, None));
        let token = self.note(note.map(Note::Text));
        Unit { fate: statement.fate, token }
    }

    /// A Close is forwarded.
    pub fn close(&mut self, target: frontend::Target<'_>) -> u32 {
        match target {
            frontend::Target::Statement(b"") | frontend::Target::Portal(_) => 0,
            frontend::Target::Statement(name) => self.note(Some(Note::CloseStatement(name.into()))),
        }
    }

    /// What is known of a statement that a Bind names; for transactions that we answer for.
    pub fn kind_of(&self, statement: &[u8]) -> Option<Statement> {
        if let Some(shared) = &self.statements {
            return shared.get(statement).map(|content| content.statement);
        }
        match statement {
            b"" => self.unnamed.as_ref().map(|known| known.0),
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
        if let Some(content) = body.and_then(crate::pool::statements::content_of) {
            let content = Self::content(parse, Bytes::copy_from_slice(content));
            shared.define(parse.statement, content.into());
        }
    }

    fn confirm_unforwarded(&mut self) {
        while let Some((_, note)) = self.notes.pop_front() {
            if let Note::Parse { name, message } = note {
                self.confirm(&name, message);
            }
        }
    }

    /// The owner's answer is complete (`1`, `3`, or `C` with its tag).
    pub fn done(&mut self, owner: Owner, tag: Option<CommandTag<'_>>) {
        while self.notes.front().is_some_and(|(token, _)| is_before(*token, owner.unit.token)) {
            self.notes.pop_front();
        }
        let is_ours = owner.unit.token != 0;
        let front = self.notes.front().filter(|(t, _)| is_ours && *t == owner.unit.token);
        match (owner.kind, front) {
            (Kind::Parse, Some((_, Note::Parse { name, message }))) => {
                let (name, message) = (name.clone(), message.clone());
                self.confirm(&name, message);
            }
            (Kind::Close, Some((_, Note::CloseStatement(name)))) => {
                let name = name.clone();
                self.forget(&name);
            }
            (Kind::Query | Kind::Execute, Some((_, Note::Text(text)))) => {
                let text = text.clone();
                self.command(tag, Some(&text));
            }
            (Kind::Query | Kind::Execute | Kind::Blur, _) => self.command(tag, None),
            _ => {}
        }
    }

    fn confirm(&mut self, name: &[u8], message: Bytes) {
        self.prepared_bytes += message.len();
        if self.prepared_bytes > MAX_PREPARED_BYTES {
            self.pins.add(Pin::TooMuch);
        }
        let body = message.get(5..).unwrap_or_default();
        let Ok(parse) = frontend::ParseMessage::parse(body) else { return };
        // Read again: a Close that was on its way may have taken the entry with it.
        let statement = Statement::of(parse.sql, parse.is_whole);
        let note = remembered(statement, parse.sql, parse.is_whole);
        self.prepared.insert(name.into(), Prepared { statement, note, message: Some(message) });
    }

    fn forget(&mut self, name: &[u8]) {
        if let Some(gone) = self.prepared.remove(name) {
            self.prepared_bytes -= gone.message.map_or(0, |message| message.len());
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

    fn command(&mut self, tag: Option<CommandTag<'_>>, text: Option<&Bytes>) {
        let Some(tag) = tag else { return };
        self.pins.1 |= undoes(tag);
        match tag.kind() {
            TagKind::Set => self.set(text),
            TagKind::Reset => self.reset(text),
            TagKind::Commit => self.cursors.committed(),
            TagKind::Rollback => {
                self.cursors.rolled_back();
                // ROLLBACK TO leaves us in the block, and we keep no savepoints' settings.
                self.rolled_back = true;
            }
            TagKind::Prepare => self.pins.add(Pin::SqlPrepare),
            TagKind::DeallocateAll => self.forget_all(),
            TagKind::Deallocate => match text.and_then(|text| last_word(text)) {
                Some(name) => self.forget(&name),
                None => self.pins.add(Pin::SqlPrepare),
            },
            TagKind::DiscardAll => self.discard_all(),
            TagKind::Listen => match text.and_then(|text| channels::named(text)) {
                Some(Named::One(name)) if self.channels_move => {
                    self.pending.push(Change::Listen(name));
                }
                _ => self.pins.add(Pin::Listen),
            },
            TagKind::Unlisten => match text.and_then(|text| channels::named(text)) {
                Some(Named::One(name)) => self.pending.push(Change::Unlisten(name)),
                Some(Named::All) => self.pending.push(Change::UnlistenAll),
                None if self.channels.is_empty() => {}
                None => self.pins.add(Pin::Listen),
            },
            TagKind::DeclareCursor => {
                self.cursors.declared(text.map(|text| &text[..]));
                self.pin_by_cursors();
            }
            TagKind::CloseCursor => {
                self.cursors.closed(text.map(|text| &text[..]));
                self.pin_by_cursors();
            }
            TagKind::CloseCursorAll => {
                self.cursors = Cursors::default();
                self.pin_by_cursors();
            }
            TagKind::CreateRelation if text.is_some() => self.pins.add(Pin::Temporary),
            TagKind::Load => self.pins.add(Pin::Load),
            _ => {}
        }
    }

    fn pin_by_cursors(&mut self) {
        if !self.cursors.is_any_held() {
            self.pins.remove(Pin::HoldCursor);
        } else if !self.pins.has(Pin::HoldCursor) {
            self.pins.add(Pin::HoldCursor);
        }
    }

    fn set(&mut self, text: Option<&Bytes>) {
        let Some(text) = text else {
            self.pins.add(Pin::Setting);
            return;
        };
        match setting_name(text) {
            Setting::Local => {}
            Setting::Session(name) => self.pending.push(Change::Set(name, text.clone())),
            Setting::Unknown => self.pins.add(Pin::Setting),
        }
    }

    fn reset(&mut self, text: Option<&Bytes>) {
        match text.and_then(|text| last_word(text)) {
            Some(name) if name.as_ref() == b"all" => self.pending.push(Change::ResetAll),
            Some(name) => self.pending.push(Change::Reset(name)),
            None => self.pins.add(Pin::Setting),
        }
    }

    fn discard_all(&mut self) {
        self.settings = self.base.clone();
        self.unfit = true;
        self.pending.clear();
        self.custom.clear();
        self.channels.clear();
        self.cursors = Cursors::default();
        self.forget_all();
        for pin in [Pin::Temporary, Pin::HoldCursor, Pin::Listen, Pin::Setting, Pin::Opaque] {
            self.pins.remove(pin);
        }
        self.unseen = false;
    }

    /// ReadyForQuery: `failed` tells whether an error was answered since the last one.
    pub fn ready(&mut self, status: TransactionStatus, failed: bool) {
        if self.cursors.is_any() {
            self.cursors.ready(status == TransactionStatus::Idle, failed);
            self.pin_by_cursors();
        }
        if status != TransactionStatus::Idle {
            if std::mem::take(&mut self.rolled_back) && !self.pending.is_empty() {
                self.pins.add(Pin::Setting);
            }
            return;
        }
        self.portals.clear();
        let taken_back = std::mem::take(&mut self.rolled_back) || failed;
        if self.pending.is_empty() {
            return;
        }
        for change in std::mem::take(&mut self.pending) {
            if !taken_back {
                self.apply(change);
            }
        }
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Set(name, text) => {
                self.settings.retain(|(known, _)| *known != name);
                if self.settings.len() >= MAX_SETTINGS {
                    self.pins.add(Pin::TooMuch);
                } else {
                    self.settings.push((name, text));
                }
            }
            Change::Reset(name) => {
                self.settings.retain(|(known, _)| *known != name);
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
                self.unfit = true;
                let stays = |name: &[u8]| name == b"role" || name == b"session authorization";
                self.settings.retain(|(name, _)| stays(name));
                self.settings.extend(self.base.iter().cloned());
            }
        }
    }

    /// The server is gone: what was in flight or not committed is forgotten.
    pub fn lost_server(&mut self) {
        if let Some(shared) = &mut self.statements {
            shared.lost_server();
        }
        self.notes.clear();
        self.pending.clear();
        self.portals.clear();
        self.unnamed_portal = None;
        self.rolled_back = false;
        self.prepared.retain(|_, known| known.message.is_some());
        self.cursors.ready(true, true);
        // The unnamed statement does not outlive its server; drivers send Parse with each use.
        self.unnamed = None;
    }

    /// Nothing is in flight: notes of requests that failed are of no use any more.
    pub fn quiet(&mut self) {
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
}

/// Tokens wrap; half of the circle is the past.
fn is_before(token: u32, than: u32) -> bool {
    than != 0 && than.wrapping_sub(token).wrapping_sub(1) < u32::MAX / 2
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
            | K::Declare
            | K::Close
            | K::Listen
            | K::Unlisten
            | K::CreateTemp
    );
    let fits = is_whole && sql.len() <= MAX_NOTE_BYTES && statement.fate != Fate::Unknown;
    (matters && fits).then(|| Bytes::copy_from_slice(sql))
}

/// Whether a command may have ended what pins the session.
fn undoes(tag: CommandTag<'_>) -> bool {
    use TagKind as T;
    let ends = [T::Deallocate, T::Unlisten, T::CloseCursor, T::Discard, T::DiscardTemp];
    ends.contains(&tag.kind()) || tag.verb() == b"DROP"
}
