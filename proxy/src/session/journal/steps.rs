//! Requests and their answers, statement by statement: what was sent is remembered until the server has said
//! what became of it, in the order in which it was sent.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use kornak_protocol::frontend::{self, StatementKind};
use kornak_protocol::pipeline::{Fate, Kind, Owner, Unit};
use kornak_protocol::txn::{CommandTag, TagKind};

use super::cursors::Cursors;
use super::text::{self, Name};
use super::{Bound, Change, Journal, MAX_NOTES, Pin, Statement, channels, custom, remembered};
use crate::sabotage::{self, Sabotage};
use crate::session::statements::{Front, Injected, Rewritten};

/// A note about a sent message, for the time when its answer comes.
#[derive(Debug)]
pub(super) enum Note {
    Parse {
        name: Name,
        message: Bytes,
    },
    /// A Parse whose text is not kept.
    Dropped {
        name: Name,
    },
    CloseStatement(Name),
    /// A single statement.
    One(Step),
    /// The statements of a Query, those that are not answered yet.
    Several(VecDeque<Step>),
    /// A text that could not be taken apart.
    Lost {
        is_whole: bool,
    },
}

/// One statement.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// The statement's text, if its answer may change what the session holds.
    text: Option<Bytes>,
    /// The change of prepared statements that its answer confirms; 0 for none.
    mark: u32,
    /// The statement is answered as DEALLOCATE.
    retag: bool,
}

impl Step {
    fn matters(&self) -> bool {
        self.text.is_some() || self.mark != 0 || self.retag
    }
}

/// How much is known of the text that a tag belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sight {
    /// All that matters of it.
    Clear,
    /// The text is whole and could not be taken apart.
    Whole,
    /// The end of the text was not seen.
    Part,
}

/// The changes to a Query's text, for the server.
#[derive(Debug, Default)]
pub struct SqlEdits {
    /// The message of ours that may stand in front of the query.
    pub front: Front,
    pub injected: Vec<Injected>,
    /// The text that stands in front of the query.
    pub before: Vec<u8>,
    /// Parts of the text, in order, and what stands in their place.
    pub pieces: Vec<(Range<usize>, Vec<u8>)>,
}

impl Journal {
    /// A simple query is forwarded; `is_whole` tells whether its text is.
    pub fn query(&mut self, sql: &[u8], is_whole: bool, mut edits: Option<&mut SqlEdits>) -> Unit {
        let statement = Statement::of(sql, is_whole);
        self.last_reads = statement.reads();
        if statement.fate != Fate::Unknown {
            let step = self.step_of(statement, sql, 0..sql.len(), &mut edits);
            let note = step.matters().then_some(Note::One(step));
            return Unit { fate: statement.fate, token: self.note(note) };
        }
        let list = if is_whole { frontend::statements(sql) } else { None };
        let note = match list {
            None => {
                self.lose_sight(statement, sql, is_whole);
                Some(Note::Lost { is_whole })
            }
            Some(list) => {
                let mut steps = VecDeque::with_capacity(list.len());
                for range in list {
                    let text = sql.get(range.clone()).unwrap_or_default();
                    let statement = Statement::of(text, true);
                    steps.push_back(self.step_of(statement, text, range, &mut edits));
                }
                steps.iter().any(Step::matters).then_some(Note::Several(steps))
            }
        };
        Unit { fate: statement.fate, token: self.note(note) }
    }

    fn step_of(
        &mut self,
        statement: Statement,
        text: &[u8],
        range: Range<usize>,
        edits: &mut Option<&mut SqlEdits>,
    ) -> Step {
        use StatementKind as K;
        self.judge_as(statement, text, true);
        let note = remembered(statement, text, true);
        self.speak(statement, note.as_ref(), text);
        let mut step = Step { text: note, mark: 0, retag: false };
        let (Some(shared), Some(edits)) = (&mut self.statements, edits) else { return step };
        let names = [K::Deallocate, K::Execute, K::Prepare, K::Create, K::CreateTemp, K::Other];
        if !names.contains(&statement.kind) {
            return step;
        }
        let SqlEdits { front, injected, before, pieces } = &mut **edits;
        if let Some(Rewritten { text, mark, retag }) = shared.by_sql(text, *front, injected, before)
        {
            pieces.push((range, text));
            (step.mark, step.retag) = (mark, retag);
        } else if matches!(statement.kind, K::Deallocate | K::Prepare) {
            shared.named_by_sql();
        }
        step
    }

    /// Something is forwarded that changes how later texts are read.
    fn speak(&mut self, statement: Statement, note: Option<&Bytes>, text: &[u8]) {
        use StatementKind as K;
        let drops_all = match statement.kind {
            K::Discard => text.is_empty() || text::discards_all(text),
            K::Deallocate => matches!(text::prepared(text), Some((text::Named::All, _))),
            _ => false,
        };
        if statement.kind == K::Discard && drops_all {
            self.suspected = false;
        }
        if drops_all && let Some(shared) = &mut self.statements {
            shared.drop_all();
        }
        if self.statements.is_none() {
            return;
        }
        match (statement.kind, note) {
            (K::Set | K::SetLocal | K::Reset, Some(text)) => self.context.say(text),
            (K::Set | K::SetLocal | K::Reset | K::RollbackTo | K::Do | K::Call, _) => self.blur(),
            (K::Discard, _) => self.blur(),
            _ => {}
        }
    }

    pub(super) fn blur(&mut self) {
        self.turn = self.turn.wrapping_add(1);
        self.context.blur((self.id, self.turn));
    }

    pub(super) fn judge(&mut self, sql: &[u8], is_whole: bool) -> Statement {
        let statement = Statement::of(sql, is_whole);
        self.judge_as(statement, sql, is_whole);
        statement
    }

    fn judge_as(&mut self, statement: Statement, sql: &[u8], is_whole: bool) {
        use StatementKind as K;
        match statement.kind {
            // CREATE TEMP is followed by its tag, which knows whether it succeeded.
            K::CreateTemp if statement.fate != Fate::Unknown => {}
            K::CreateTemp => self.pins.add(Pin::Temporary),
            K::Do => {
                self.opaque(sql, is_whole);
                self.note_executed(sql);
            }
            K::Call | K::Execute => self.calls(),
            K::Begin | K::Commit | K::Savepoint | K::Release | K::Show | K::Empty => {}
            _ if frontend::may_touch_session_state(sql) => {
                if !custom::is_of_transaction(sql) {
                    self.opaque(sql, is_whole);
                } else if custom::reads_otherwise(sql) && self.statements.is_some() {
                    self.blur();
                }
                if frontend::calls_unknown(sql) {
                    self.calls();
                }
            }
            K::Set | K::SetLocal | K::Reset | K::Listen | K::Unlisten | K::Close => {}
            _ if frontend::calls_unknown(sql) => self.calls(),
            _ => {}
        }
    }

    /// A text that cannot be taken apart, or of which not all was seen.
    fn lose_sight(&mut self, statement: Statement, sql: &[u8], is_whole: bool) {
        self.cursors.unfollowed(sql, is_whole);
        self.judge_as(statement, sql, is_whole);
        // It may be prose in a literal: whether something was set, the tags say.
        self.sets_unknown = self.note_sets(sql);
        self.calls();
        if self.statements.is_some() {
            self.blur();
        }
    }

    pub(super) fn opaque(&mut self, sql: &[u8], is_whole: bool) {
        if sabotage::is(Sabotage::Texts) {
            return;
        }
        self.suspected = true;
        self.pins.add(Pin::Opaque);
        self.lasting |= text::leaves_what_lasts(sql);
        self.unseen |= text::leaves_unseen(sql) || !is_whole;
        self.leftovers = true;
        self.note_custom(sql);
        if self.statements.is_some() && custom::reads_otherwise(sql) {
            self.blur();
        }
    }

    /// Functions of an application's own making are called: the server is asked what they left before
    /// the connection changes hands.
    pub(super) fn calls(&mut self) {
        self.suspected = true;
        self.called = true;
        self.leftovers = true;
    }

    pub(super) fn note(&mut self, note: Option<Note>) -> u32 {
        let Some(note) = note else { return 0 };
        if self.notes.len() >= MAX_NOTES {
            self.pins.add(Pin::TooMuch);
            return 0;
        }
        self.next_token = self.next_token.wrapping_add(1).max(1);
        self.notes.push_back((self.next_token, note));
        self.next_token
    }

    /// An Execute is forwarded.
    pub fn execute(&mut self, portal: &[u8]) -> Unit {
        let bound = match portal {
            b"" => self.unnamed_portal.clone(),
            name => self.portals.get(name).cloned(),
        };
        let Bound { statement, note, retag } = bound.unwrap_or(Bound::UNKNOWN);
        self.last_reads = statement.reads();
        self.speak(statement, note.as_ref(), note.as_deref().unwrap_or_default());
        let mut step = Step { text: note, mark: 0, retag };
        if let (Some(shared), Some(text)) = (&mut self.statements, &step.text) {
            match statement.kind {
                _ if retag => step.mark = shared.deallocate(text),
                StatementKind::Prepare => shared.prepares(text),
                StatementKind::Deallocate => shared.named_by_sql(),
                _ => {}
            }
        }
        if statement.kind == StatementKind::Execute {
            self.calls();
        }
        let note = step.matters().then_some(Note::One(step));
        Unit { fate: statement.fate, token: self.note(note) }
    }

    /// A function call is forwarded; `body` is its beginning.
    pub fn function_call(&mut self, body: &[u8]) {
        let oid = body.first_chunk::<4>().map_or(0, |oid| u32::from_be_bytes(*oid));
        match oid {
            // Large objects: what they open is closed with the transaction.
            715 | 764 | 952..=958 | 964..=965 | 1004 | 3170..=3172 => {}
            SET_CONFIG => {
                self.suspected = true;
                self.pins.add(Pin::Opaque);
                match custom::argument(body) {
                    Some(name) => self.note_name(&name),
                    None => self.unseen = true,
                }
                self.leftovers = true;
                if self.statements.is_some() {
                    self.blur();
                }
            }
            // PostgreSQL's own: locks, for example.
            1..16384 => {
                self.suspected = true;
                self.pins.add(Pin::Opaque);
            }
            _ => self.calls(),
        }
    }

    /// The owner's answer is complete (`1`, `3`, or `C` with its tag). Answers the tag that the client is
    /// told instead, if it is another.
    pub fn done(&mut self, owner: Owner, tag: Option<CommandTag<'_>>) -> Option<&'static str> {
        while self.notes.front().is_some_and(|(token, _)| is_before(*token, owner.unit.token)) {
            self.notes.pop_front();
        }
        if owner.kind == Kind::Query {
            self.unnamed_message = None;
        }
        let is_ours = owner.unit.token != 0;
        let front = self.notes.front_mut().filter(|(t, _)| is_ours && *t == owner.unit.token);
        match (owner.kind, front.map(|(_, note)| note)) {
            (Kind::Parse, Some(Note::Parse { name, message })) => {
                let (name, message) = (std::mem::take(name), message.clone());
                self.confirm(&name, message);
            }
            (Kind::Parse, Some(Note::Dropped { name })) if name.is_empty() => {
                self.unnamed_message = None;
            }
            (Kind::Close, Some(Note::CloseStatement(name))) => {
                let name = name.clone();
                self.forget(&name);
            }
            (Kind::Query | Kind::Execute, Some(Note::One(step))) => {
                let step = std::mem::take(step);
                return self.stepped(tag, &step);
            }
            (Kind::Query, Some(Note::Several(steps))) => {
                let step = steps.pop_front().unwrap_or_default();
                return self.stepped(tag, &step);
            }
            (Kind::Query, Some(Note::Lost { is_whole })) => {
                let sight = if *is_whole { Sight::Whole } else { Sight::Part };
                self.command(tag, None, sight);
            }
            (Kind::Query | Kind::Execute, None) => self.command(tag, None, Sight::Clear),
            (Kind::Blur, _) => self.command(tag, None, Sight::Part),
            _ => {}
        }
        None
    }

    /// The owner's request failed.
    pub fn failed(&mut self, owner: Owner) {
        let token = owner.unit.token;
        let unnamed = |note: &Note| matches!(note, Note::Parse { name, .. } | Note::Dropped { name } if name.is_empty());
        let is_unnamed =
            || self.notes.iter().any(|(own, note)| *own == token && token != 0 && unnamed(note));
        if owner.kind == Kind::Query || owner.kind == Kind::Parse && is_unnamed() {
            self.unnamed_message = None;
        }
    }

    fn stepped(&mut self, tag: Option<CommandTag<'_>>, step: &Step) -> Option<&'static str> {
        if step.mark != 0
            && let Some(shared) = &mut self.statements
        {
            shared.answered(step.mark);
        }
        if step.retag && tag.is_some() {
            return Some("DEALLOCATE");
        }
        self.command(tag, step.text.as_ref(), Sight::Clear);
        None
    }

    fn command(&mut self, tag: Option<CommandTag<'_>>, text: Option<&Bytes>, sight: Sight) {
        let Some(tag) = tag else { return };
        self.pins.1 |= undoes(tag);
        match tag.kind() {
            TagKind::Set => self.set(text, sight),
            TagKind::Reset => self.reset(text),
            TagKind::Commit if sabotage::is(Sabotage::Chain) => {}
            TagKind::Commit | TagKind::PrepareTransaction => self.commit(),
            TagKind::Rollback if sabotage::is(Sabotage::Rollback) => {}
            TagKind::Rollback => self.roll_back(text, sight),
            TagKind::Savepoint => {
                if let Some(name) = text.and_then(|text| text::savepoint(text))
                    && !self.block.savepoint(name)
                {
                    self.pins.add(Pin::Setting);
                }
            }
            TagKind::Release => {
                if let Some(name) = text.and_then(|text| text::savepoint(text)) {
                    self.block.release(&name);
                }
            }
            TagKind::Prepare => {
                self.pins.add(Pin::SqlPrepare);
                if let (Some(shared), Some(text)) = (&mut self.statements, text) {
                    shared.prepared_by_sql(text);
                }
            }
            TagKind::DeallocateAll => self.forget_all(),
            TagKind::Deallocate => self.deallocated(text),
            TagKind::DiscardAll => self.discard_all(),
            TagKind::Listen => match text.and_then(|text| channels::named(text)) {
                Some(channels::Named::One(name)) if self.channels_move => {
                    self.change(Change::Listen(name));
                }
                _ => self.pins.add(Pin::Listen),
            },
            TagKind::Unlisten => match text.and_then(|text| channels::named(text)) {
                Some(channels::Named::One(name)) => self.change(Change::Unlisten(name)),
                Some(channels::Named::All) => self.change(Change::UnlistenAll),
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
            TagKind::CreateRelation if text.is_some() || self.makes_temporary => {
                self.pins.add(Pin::Temporary);
            }
            TagKind::Load => self.pins.add(Pin::Load),
            _ => {}
        }
    }

    pub(super) fn pin_by_cursors(&mut self) {
        if !self.cursors.is_any_held() {
            self.pins.remove(Pin::HoldCursor);
        } else if !self.pins.has(Pin::HoldCursor) {
            self.pins.add(Pin::HoldCursor);
        }
    }

    fn deallocated(&mut self, text: Option<&Bytes>) {
        if let Some(shared) = &mut self.statements {
            if let Some(text) = text {
                shared.deallocated_by_sql(text);
            }
            if !shared.has_long() {
                self.pins.remove(Pin::LongStatement);
            }
            return;
        }
        match text.and_then(|text| text::prepared(text)) {
            Some((text::Named::One(name), _)) => self.forget(&name),
            Some((text::Named::All, _)) => self.forget_all(),
            None => self.pins.add(Pin::SqlPrepare),
        }
    }

    fn set(&mut self, text: Option<&Bytes>, sight: Sight) {
        let Some(text) = text else {
            self.pins.add(Pin::Setting);
            if sight != Sight::Whole || self.sets_unknown {
                // Which parameter it was shows nowhere.
                self.pins.add(Pin::Opaque);
                self.unseen = true;
            }
            return;
        };
        self.makes_temporary |= memchr::memmem::find(text, b"pg_temp").is_some();
        let is_unseen = sabotage::is(Sabotage::Comment) && !text.starts_with(b"SET")
            || sabotage::is(Sabotage::Characteristics)
                && memchr::memmem::find(text, b"CHARACTERISTICS").is_some();
        if !is_unseen {
            self.setting(text::set(text));
        }
    }

    fn reset(&mut self, text: Option<&Bytes>) {
        match text {
            Some(_) if sabotage::is(Sabotage::Reset) => {}
            Some(text) => self.setting(text::reset(text)),
            None => self.pins.add(Pin::Setting),
        }
    }

    fn setting(&mut self, setting: text::Setting) {
        use text::Setting;
        match setting {
            Setting::Local => {}
            Setting::Set(list) => {
                for (name, text) in list {
                    self.change(Change::Set(name, text));
                }
            }
            Setting::Reset(name) => self.change(Change::Reset(name)),
            Setting::ResetAll => self.change(Change::ResetAll),
            Setting::Unknown(name) => {
                self.pins.add(Pin::Setting);
                match name {
                    Some(name) => self.note_name(&name),
                    None => {
                        self.pins.add(Pin::Opaque);
                        self.unseen = true;
                    }
                }
            }
        }
    }

    fn change(&mut self, change: Change) {
        if !self.block.push(change) {
            self.pins.add(Pin::TooMuch);
        }
    }

    fn roll_back(&mut self, text: Option<&Bytes>, sight: Sight) {
        let to = text.filter(|text| frontend::statement_kind(text) == StatementKind::RollbackTo);
        let is_followed = match to {
            Some(_) if sabotage::is(Sabotage::Savepoint) => true,
            Some(text) => {
                let name = text::savepoint(text);
                name.is_some_and(|name| self.block.roll_back_to(&name))
            }
            None => {
                if sight == Sight::Clear {
                    self.block.roll_back();
                    self.cursors.dropped();
                }
                sight == Sight::Clear
            }
        };
        self.cursors.rolled_back();
        if !is_followed && !self.block.is_empty() {
            // The server is asked what is left.
            self.pins.add(Pin::Setting);
            self.block.roll_back();
        }
    }
}

/// PostgreSQL's OID of `set_config`.
const SET_CONFIG: u32 = 2078;

/// Tokens wrap; half of the circle is the past.
fn is_before(token: u32, than: u32) -> bool {
    than != 0 && than.wrapping_sub(token).wrapping_sub(1) < u32::MAX / 2
}

/// Whether a command may have ended what pins the session.
fn undoes(tag: CommandTag<'_>) -> bool {
    use TagKind as T;
    let ends = [T::Deallocate, T::Unlisten, T::CloseCursor, T::Discard, T::DiscardTemp];
    ends.contains(&tag.kind()) || tag.verb() == b"DROP"
}
