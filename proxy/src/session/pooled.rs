//! A session whose server connections change hands: what is different on the way to the server and
//! back. The rest is as for every session.

use std::ops::Range;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use kornak_protocol::error::{ErrorFields, ErrorView};
use kornak_protocol::frame::Seen;
use kornak_protocol::frontend::{self, Bind, ParseMessage, Target};
use kornak_protocol::limits::MAX_OWED;
use kornak_protocol::params::Parameters;
use kornak_protocol::pipeline::{Owner, Sent};
use kornak_protocol::sqlstate::{
    DUPLICATE_PSTATEMENT, FEATURE_NOT_SUPPORTED, UNDEFINED_PSTATEMENT,
};

use super::answers::Verdict;
use super::journal::{Examined, Journal, Pin, Settings, SqlEdits};
use super::own_name::{self, OwnName};
use super::{Heard, Session};
use crate::session::statements::{
    Answer, Content, Counts, Front, Injected, Prepared, Refusal, Statements, Texts, Treatment,
    content_of,
};

/// The state that a shared server connection carries from one session to the next.
#[derive(Debug)]
pub struct ConnectionState {
    /// The parameters that were set on the connection; `None` if they are not known.
    pub settings: Option<Settings>,
    /// The session whose functions may have left parameters on the connection that are not among
    /// `settings`.
    pub left_by: Option<u64>,
    /// The parameters that the server reported last.
    pub params: Arc<Parameters>,
    /// The `application_name` that the server gave it at its login.
    pub name: Bytes,
    /// The statements that are prepared on the connection; `None` while a session has it.
    pub prepared: Option<Box<Prepared>>,
}

impl ConnectionState {
    /// The state of a connection that has just logged in and reported these parameters.
    pub fn fresh(params: Arc<Parameters>) -> Self {
        let (settings, prepared) = (Some(Settings::new()), Some(Box::default()));
        let name = own_name::of_server(&params);
        Self { settings, left_by: None, params, name, prepared }
    }

    /// Notes that everything on the connection was reset, but not its prepared statements.
    pub fn was_reset(&mut self) {
        self.left_by = None;
        self.settings = Some(Settings::new());
    }

    /// Notes that everything on the connection was discarded, prepared statements included.
    pub fn discarded(&mut self) {
        self.was_reset();
        self.prepared = Some(Box::default());
    }
}

/// The changes to a buffer on its way to the server.
#[derive(Debug, Default)]
pub struct Edits {
    list: Vec<Edit>,
    /// The bytes that are put in.
    bytes: Vec<u8>,
    injected: Vec<Injected>,
}

#[derive(Debug)]
struct Edit {
    /// Where in the buffer.
    at: usize,
    /// So many bytes of it are left out.
    skip: usize,
    /// End of what is put in; it begins where the last one ended.
    end: usize,
}

impl Edits {
    /// Whether the buffer goes as it came.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Appends the buffer with its changes.
    pub fn apply(&mut self, data: &[u8], out: &mut BytesMut) {
        out.reserve(data.len() + self.bytes.len());
        let (mut at, mut begin) = (0, 0);
        for edit in self.list.drain(..) {
            out.extend_from_slice(data.get(at..edit.at).unwrap_or_default());
            out.extend_from_slice(self.bytes.get(begin..edit.end).unwrap_or_default());
            (at, begin) = (edit.at + edit.skip, edit.end);
        }
        out.extend_from_slice(data.get(at..).unwrap_or_default());
        self.bytes.clear();
    }
}

impl Session {
    /// A session whose connections change hands; `limit` statements are kept on each of them.
    pub fn pooled(told: Arc<Parameters>, limit: usize, base: Settings) -> Self {
        let name = OwnName::told(&told, !base.is_empty());
        let journal = Journal::pooled(Statements::new(limit), base);
        Self { journal, name, ..Self::new(told) }
    }

    /// Whether its connections change hands.
    #[inline]
    pub fn is_pooled(&self) -> bool {
        self.journal.statements.is_some()
    }

    /// Takes a connection: answers false if it must be made fit first. What the client is told of it
    /// is appended.
    pub fn attach(&mut self, state: &mut ConnectionState, out: &mut BytesMut) -> bool {
        if !self.journal.fits(state.settings.as_ref(), state.left_by) {
            return false;
        }
        if !Arc::ptr_eq(&self.told, &state.params) {
            self.moved_to(&state.params, out);
        }
        self.name.attach(&state.name);
        if let Some(shared) = &mut self.journal.statements {
            shared.attach(state.prepared.take().unwrap_or_default());
        }
        true
    }

    fn moved_to(&mut self, reported: &Arc<Parameters>, out: &mut BytesMut) {
        if *self.told == **reported {
            // From now on they are kept once.
            self.told = Arc::clone(reported);
            return;
        }
        self.moved(reported, out);
    }

    /// Appends the statements that make the connection fit; answers how many ReadyForQuery that
    /// makes.
    pub fn put_fit(&self, state: &ConnectionState, out: &mut BytesMut) -> usize {
        self.journal.put_fit(state.settings.as_ref(), state.left_by, out)
    }

    /// The connection was made fit.
    pub fn made_fit(&mut self, state: &mut ConnectionState) {
        state.left_by = self.journal.left_by(state.left_by);
        state.settings = Some(self.journal.made_fit());
    }

    /// Gives the connection back, between transactions.
    pub fn detach(&mut self, state: &mut ConnectionState) {
        state.left_by = self.journal.left_by(state.left_by);
        let settings = self.journal.settings();
        if settings != state.settings.as_ref() {
            state.settings = settings.cloned();
        }
        let reported = self.reported();
        if !Arc::ptr_eq(&reported, &state.params) {
            state.params = reported;
        }
        let shared = self.journal.statements.as_mut();
        state.prepared = shared.and_then(|shared| shared.detach());
        self.journal.lost_server();
    }

    /// Whether something was done since the last call that may change what pins.
    pub fn take_doubt(&mut self) -> bool {
        self.journal.take_doubt()
    }

    /// Whether [`Session::take_doubt`] would answer that.
    pub fn has_doubt(&self) -> bool {
        self.journal.has_doubt()
    }

    /// Whether its connection lacks what the session began with and has again.
    pub fn is_unfit(&self) -> bool {
        self.journal.is_unfit()
    }

    /// Appends what it began with and has again, as queries; answers how many.
    pub fn put_base(&mut self, out: &mut BytesMut) -> usize {
        self.name.restored();
        self.journal.put_base(out)
    }

    /// The server did not say what the session holds: it keeps its connection.
    pub fn not_examined(&mut self) {
        self.journal.not_examined();
    }

    /// The server has said what the session holds.
    pub fn examined(&mut self, found: &Examined<'_>) {
        self.journal.examined(found);
    }

    /// Whether a message must not be forwarded before earlier batches are answered.
    pub fn must_wait_for_answers(&mut self, seen: &Seen<'_>) -> bool {
        let owed = self.pipeline.ready_owed();
        let Some(shared) = self.journal.statements.as_ref().filter(|_| owed > 0) else {
            return false;
        };
        if shared.is_dropping_before() && matches!(seen.tag, b'P' | b'B' | b'D' | b'C') {
            // Whether there is what it names hangs on the answer.
            return true;
        }
        match seen.tag {
            b'Q' => shared.is_uncertain() && names_statements(frontend::query_prefix(seen.body).0),
            b'P' => ParseMessage::parse(seen.body)
                .is_ok_and(|parse| shared.must_wait(seen.tag, parse.statement)),
            b'B' => Bind::parse(seen.body).is_ok_and(|bind| {
                let names = |content: &Arc<Content>| {
                    names_statements(frontend::query_prefix(&content.body).0)
                };
                shared.must_wait(seen.tag, bind.statement)
                    || shared.is_uncertain() && shared.get(bind.statement).is_some_and(names)
            }),
            b'D' => matches!(Target::parse(seen.body),
                Ok(Target::Statement(name)) if shared.must_wait(seen.tag, name)),
            _ => false,
        }
    }

    /// As [`Session::forwarded`]; what has to be changed on the way goes to `edits`.
    pub fn forwarded_pooled(&mut self, seen: &Seen<'_>, texts: &Texts, edits: &mut Edits) -> bool {
        let malformed = frontend::is_malformed(seen);
        if malformed || !matches!(seen.tag, b'P' | b'B' | b'D' | b'C') {
            if let Some(shared) = &mut self.journal.statements {
                shared.in_context(0);
            }
            let owed = self.pipeline.ready_owed();
            let ends = match seen.tag {
                b'Q' if !malformed && !self.pipeline.is_skipping() => {
                    return self.query_pooled(seen, edits);
                }
                _ => self.forwarded(seen),
            };
            if self.pipeline.ready_owed() > owed
                && let Some(shared) = &mut self.journal.statements
            {
                shared.end_batch();
            }
            return ends;
        }
        if self.pipeline.is_skipping() {
            // The server does not look at it.
            return false;
        }
        let Self { journal, pipeline, .. } = self;
        let context = journal.context();
        let Some(mut shared) = journal.statements.take() else { return false };
        shared.in_context(context);
        let (at, len) = (seen.start.unwrap_or(0), seen.len as usize + 1);
        let begin = edits.bytes.len();
        let Edits { bytes, injected, .. } = &mut *edits;
        let done = match seen.tag {
            b'P' => ParseMessage::parse(seen.body).map(|parse| {
                let content = seen.is_whole().then(|| content_of(seen.body)).flatten();
                let size = content.map_or(0, <[u8]>::len);
                if let Some((treatment, counts)) =
                    shared.refuse_if_full(parse.statement, size, len, bytes)
                {
                    return (treatment, sent(counts));
                }
                let content = content.map(|content| content_for(parse, content, texts));
                let (treatment, counts) =
                    shared.parse(parse.statement, content, len, injected, bytes);
                (treatment, sent(counts))
            }),
            b'B' => Bind::parse(seen.body).map(|bind| {
                let content = shared.get(bind.statement);
                let retag = content.is_some_and(|content| shared.is_retagged(content));
                journal.bind_content(bind.portal, content, retag);
                (shared.bind(bind, seen.len as usize - 4, injected, bytes), Sent::Bind(0))
            }),
            b'D' => Target::parse(seen.body)
                .map(|target| (shared.describe(target, len, injected, bytes), Sent::Describe(0))),
            _ => Target::parse(seen.body).map(|target| {
                let (treatment, counts) = shared.close(target, len, bytes);
                (treatment, sent(counts))
            }),
        };
        journal.statements = Some(shared);
        let Ok((treatment, counts)) = done else {
            journal.pin(Pin::Lost);
            pipeline.sent(sent(match seen.tag {
                b'P' => Counts::Parse(0),
                _ => Counts::Close(0),
            }));
            return false;
        };
        for injected in injected.drain(..) {
            pipeline.sent(match injected {
                Injected::Parse(mark) => Sent::Parse(mark),
                Injected::Close(mark) => Sent::Close(mark),
            });
        }
        pipeline.sent(counts);
        let skip = match treatment {
            Treatment::Head { skip } => skip,
            Treatment::AsIs => 0,
            Treatment::TooLong => {
                journal.pin(Pin::LongStatement);
                0
            }
            Treatment::ClosedLong { skip } => {
                journal.closed_long();
                skip
            }
        };
        if skip > 0 || edits.bytes.len() > begin {
            edits.list.push(Edit { at, skip, end: edits.bytes.len() });
        }
        false
    }

    /// A Query of which the server must be told something else.
    fn query_pooled(&mut self, seen: &Seen<'_>, edits: &mut Edits) -> bool {
        let (sql, is_whole) = frontend::query_prefix(seen.body);
        let front = if self.pipeline.is_unsynced() { Front::Nothing } else { Front::Batch };
        let mut told = SqlEdits { front, ..SqlEdits::default() };
        let unit = self.journal.query(sql, is_whole, Some(&mut told));
        self.only_reads &= self.journal.last_reads();
        if !told.injected.is_empty() {
            for injected in told.injected.drain(..) {
                self.pipeline.sent(match injected {
                    Injected::Parse(mark) => Sent::Parse(mark),
                    Injected::Close(mark) => Sent::Close(mark),
                });
            }
            self.pipeline.sent(Sent::OwnSync(Statements::SYNC));
            frontend_sync(&mut told.before);
            if let Some(shared) = &mut self.journal.statements {
                shared.split_batch();
            }
        }
        self.pipeline.sent(Sent::Query(unit));
        if let Some(shared) = &mut self.journal.statements {
            shared.query();
            shared.end_batch();
        }
        if !told.pieces.is_empty() {
            edits.bytes.extend_from_slice(&told.before);
            put_edited(sql, &told.pieces, &mut edits.bytes);
            let (at, skip) = (seen.start.unwrap_or(0), seen.len as usize + 1);
            edits.list.push(Edit { at, skip, end: edits.bytes.len() });
        }
        true
    }

    /// Whether so much of an endless batch is unanswered that the server must be made to speak
    /// before more is forwarded: what is put in must be told apart from the client's own.
    pub fn must_flush(&self) -> bool {
        self.is_pooled()
            && self.pipeline.ready_owed() == 0
            && self.pipeline.owed_len() > MAX_OWED / 2
    }

    #[inline]
    pub(super) fn is_shared(&self, owner: &Owner) -> bool {
        Statements::is_mark(owner.unit.token) && self.is_pooled()
    }

    #[cold]
    pub(super) fn shared_done(&mut self, owner: &Owner) -> Heard {
        let Some(shared) = &mut self.journal.statements else { return Heard::Pass };
        let answer = shared.answered(owner.unit.token);
        if shared.take_raw() {
            self.journal.pin(Pin::LongStatement);
        }
        match answer {
            Answer::Pass => Heard::Pass,
            Answer::Swallow => Heard::Swallow,
        }
    }

    #[cold]
    pub(super) fn shared_failed(&mut self, owner: &Owner) -> Heard {
        let token = owner.unit.token;
        let Some(shared) = &mut self.journal.statements else { return Heard::Pass };
        if Statements::is_silent(token) {
            return Heard::Swallow;
        }
        match shared.failed(token) {
            Some(Refusal::TooMuch) => {
                self.errors.push(Verdict::TooManyStatements);
                return Heard::Replace(Verdict::TooManyStatements);
            }
            // A bad text is refused as such, a name that is taken by its name.
            Some(Refusal::Exists(name)) if !self.edited.is_empty() => {
                let text = String::from_utf8_lossy(&name).into_owned();
                let text = format!("prepared statement \"{text}\" already exists");
                self.edited.clear();
                ErrorFields::error(DUPLICATE_PSTATEMENT, text)
                    .routine("StorePreparedStatement")
                    .put(&mut self.edited);
            }
            _ => {}
        }
        if self.edited.is_empty() { Heard::Pass } else { Heard::Edited }
    }

    /// An error of the server's: what it says of statements that clients share, and the client's names in
    /// place of ours.
    pub(super) fn error_heard(&mut self, view: &ErrorView<'_>, seen: &Seen<'_>) {
        self.edited.clear();
        let Some(shared) = &mut self.journal.statements else { return };
        if view.sqlstate() == FEATURE_NOT_SUPPORTED
            && view.routine == Some(b"RevalidateCachedQuery")
        {
            // What other clients prepared is of no use any more.
            shared.outdate();
        }
        if let Some(body) = shared.with_own_names(seen.body) {
            if view.sqlstate() == UNDEFINED_PSTATEMENT {
                for number in Statements::numbers_in(seen.body).collect::<Vec<_>>() {
                    shared.is_gone(number);
                }
            }
            if seen.is_whole() {
                self.edited.put_u8(seen.tag);
                self.edited.put_u32(body.len() as u32 + 4);
                self.edited.put_slice(&body);
            }
        }
    }

    /// The message that is passed on in place of the one that was heard last.
    pub fn take_edited(&mut self) -> BytesMut {
        std::mem::take(&mut self.edited)
    }

    /// Whether functions may have left something in the session of which the server was not asked.
    #[inline]
    pub fn must_be_asked(&self) -> bool {
        self.journal.must_be_asked()
    }

    /// Whether something of the session's may be left on its connection: it is not given back as it is.
    pub fn must_keep(&self) -> bool {
        self.pinned().is_some() || self.must_be_asked()
    }
}

fn sent(counts: Counts) -> Sent {
    match counts {
        Counts::Parse(mark) => Sent::Parse(mark),
        Counts::Close(mark) => Sent::Close(mark),
    }
}

/// The content of a Parse: kept once if other clients may share it.
fn content_for(parse: ParseMessage<'_>, content: &[u8], texts: &Texts) -> Arc<Content> {
    let make = |body: Bytes| Journal::content(parse, body);
    match parse.statement.is_empty() {
        true => Arc::new(make(Bytes::copy_from_slice(content))),
        false => texts.find(content, make),
    }
}

/// Whether a text may name prepared statements.
fn names_statements(sql: &[u8]) -> bool {
    let words: [&[u8]; 3] = [b"execute", b"deallocate", b"prepare"];
    words.into_iter().any(|word| sql.windows(word.len()).any(|it| it.eq_ignore_ascii_case(word)))
}

fn frontend_sync(out: &mut Vec<u8>) {
    let mut sync = BytesMut::new();
    frontend::put_sync(&mut sync);
    out.extend_from_slice(&sync);
}

/// Appends a Query with other words in places of its text.
fn put_edited(sql: &[u8], pieces: &[(Range<usize>, Vec<u8>)], out: &mut Vec<u8>) {
    let (mut text, mut at) = (Vec::with_capacity(sql.len() + 32), 0);
    for (range, words) in pieces {
        text.extend_from_slice(sql.get(at..range.start).unwrap_or_default());
        text.extend_from_slice(words);
        at = range.end;
    }
    text.extend_from_slice(sql.get(at..).unwrap_or_default());
    out.put_u8(b'Q');
    out.put_u32(text.len() as u32 + 5);
    out.extend_from_slice(&text);
    out.put_u8(0);
}
