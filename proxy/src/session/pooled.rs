//! A session whose server connections change hands: what is different on the way to the server and
//! back. The rest is as for every session.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use kornak_protocol::error::ErrorView;
use kornak_protocol::frame::Seen;
use kornak_protocol::frontend::{Bind, ParseMessage, Target};
use kornak_protocol::limits::MAX_OWED;
use kornak_protocol::params::Parameters;
use kornak_protocol::pipeline::{Owner, Sent};
use kornak_protocol::sqlstate::FEATURE_NOT_SUPPORTED;

use super::journal::{Examined, Journal, Pin, Settings};
use super::{Heard, Session};
use crate::pool::lender::Lease;
use crate::pool::statements::{
    Answer, Counts, Injected, Prepared, Statements, Texts, Treatment, content_of,
};

/// Bytes of prepared statements of one client; what they share with others counts all the same.
const MAX_STATEMENT_BYTES: usize = 4 << 20;

/// What is changed in a buffer on its way to the server.
#[derive(Debug, Default)]
pub struct Edits {
    list: Vec<Edit>,
    /// What is put in.
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
        let journal = Journal::pooled(Statements::new(limit), base);
        Self { journal, ..Self::new(told) }
    }

    /// Whether its connections change hands.
    #[inline]
    pub fn is_pooled(&self) -> bool {
        self.journal.statements.is_some()
    }

    /// Takes a connection: answers false if it must be made fit first. What the client is told of it
    /// is appended.
    pub fn attach(&mut self, lease: &mut Lease, out: &mut BytesMut) -> bool {
        if !self.journal.fits(lease.settings.as_ref()) {
            return false;
        }
        if !Arc::ptr_eq(&self.told, &lease.params) {
            self.moved_to(&lease.params, out);
        }
        if let Some(shared) = &mut self.journal.statements {
            shared.attach(lease.prepared.take().unwrap_or_default());
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

    /// What makes the connection fit, and how many ReadyForQuery that makes.
    pub fn put_fit(&self, lease: &Lease, out: &mut BytesMut) -> usize {
        self.journal.put_fit(lease.settings.as_ref(), out)
    }

    /// The connection was made fit.
    pub fn made_fit(&mut self, lease: &mut Lease) {
        lease.settings = Some(self.journal.made_fit());
    }

    /// Gives the connection back, between transactions.
    pub fn detach(&mut self, lease: &mut Lease) {
        let settings = self.journal.settings();
        if settings != lease.settings.as_ref() {
            lease.settings = settings.cloned();
        }
        if !Arc::ptr_eq(&self.told, &lease.params) {
            lease.params = Arc::clone(&self.told);
        }
        let shared = self.journal.statements.as_mut();
        lease.prepared = shared.and_then(|shared| shared.detach());
        self.journal.lost_server();
    }

    /// Whether something was done since the last call that may change what pins.
    pub fn take_doubt(&mut self) -> bool {
        self.journal.take_doubt()
    }

    /// The server has said what the session holds.
    pub fn examined(&mut self, found: &Examined<'_>) {
        self.journal.examined(found);
    }

    /// Whether a message must not be forwarded before earlier batches are answered.
    pub fn must_wait_for_answers(&mut self, seen: &Seen<'_>) -> bool {
        let owed = self.pipeline.ready_owed();
        let Some(shared) = self.journal.statements.as_mut().filter(|_| owed > 0) else {
            return false;
        };
        shared.in_batch(owed);
        match seen.tag {
            b'P' => ParseMessage::parse(seen.body)
                .is_ok_and(|parse| shared.must_wait(seen.tag, parse.statement)),
            b'B' => {
                Bind::parse(seen.body).is_ok_and(|bind| shared.must_wait(seen.tag, bind.statement))
            }
            b'D' => matches!(Target::parse(seen.body),
                Ok(Target::Statement(name)) if shared.must_wait(seen.tag, name)),
            _ => false,
        }
    }

    /// As [`Session::forwarded`]; what has to be changed on the way goes to `edits`.
    pub fn forwarded_pooled(&mut self, seen: &Seen<'_>, texts: &Texts, edits: &mut Edits) -> bool {
        if !matches!(seen.tag, b'P' | b'B' | b'D' | b'C') {
            let ends = self.forwarded(seen);
            if seen.tag == b'Q'
                && !self.pipeline.is_skipping()
                && let Some(shared) = &mut self.journal.statements
            {
                shared.query();
            }
            return ends;
        }
        if self.pipeline.is_skipping() {
            // The server does not look at it.
            return false;
        }
        let owed = self.pipeline.ready_owed();
        let Self { journal, pipeline, .. } = self;
        let Some(mut shared) = journal.statements.take() else { return false };
        shared.in_batch(owed);
        let (at, len) = (seen.start.unwrap_or(0), seen.len as usize + 1);
        let begin = edits.bytes.len();
        let Edits { bytes, injected, .. } = &mut *edits;
        let done = match seen.tag {
            b'P' => ParseMessage::parse(seen.body).map(|parse| {
                let content = seen.is_whole().then(|| content_of(seen.body)).flatten();
                let make = |body: Bytes| Journal::content(parse, body);
                let content = content.map(|content| match parse.statement {
                    b"" => Arc::new(make(Bytes::copy_from_slice(content))),
                    _ => texts.find(content, make),
                });
                let (treatment, counts) =
                    shared.parse(parse.statement, content, len, injected, bytes);
                (treatment, sent(counts))
            }),
            b'B' => Bind::parse(seen.body).map(|bind| {
                let content = shared.get(bind.statement);
                journal.bind_content(bind.portal, content);
                (shared.bind(bind, seen.len as usize - 4, injected, bytes), Sent::Bind(0))
            }),
            b'D' => Target::parse(seen.body)
                .map(|target| (shared.describe(target, len, injected, bytes), Sent::Describe(0))),
            _ => Target::parse(seen.body).map(|target| {
                let (treatment, counts) = shared.close(target, len, bytes);
                (treatment, sent(counts))
            }),
        };
        if shared.bytes() > MAX_STATEMENT_BYTES {
            journal.pin(Pin::TooMuch);
        }
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
                journal.pin(Pin::TooMuch);
                0
            }
        };
        if skip > 0 || edits.bytes.len() > begin {
            edits.list.push(Edit { at, skip, end: edits.bytes.len() });
        }
        false
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
        match shared.answered(owner.unit.token) {
            Answer::Pass => Heard::Pass,
            Answer::Swallow => Heard::Swallow,
            Answer::Parsed => Heard::Parsed,
        }
    }

    #[cold]
    pub(super) fn shared_failed(&mut self, owner: &Owner) {
        if let Some(shared) = &mut self.journal.statements {
            shared.failed(owner.unit.token);
        }
    }

    /// "cached plan must not change result type": what other clients prepared is of no use any more.
    pub(super) fn error_heard(&mut self, view: &ErrorView<'_>) {
        if let Some(shared) = &mut self.journal.statements
            && view.sqlstate() == FEATURE_NOT_SUPPORTED
            && view.routine == Some(b"RevalidateCachedQuery")
        {
            shared.outdate();
        }
    }

    /// The statements of a connection, when everything on it was discarded.
    pub fn discarded(lease: &mut Lease) {
        lease.settings = Some(Settings::new());
        lease.prepared = Some(Box::<Prepared>::default());
    }
}

fn sent(counts: Counts) -> Sent {
    match counts {
        Counts::Parse(mark) => Sent::Parse(mark),
        Counts::Close(mark) => Sent::Close(mark),
    }
}
