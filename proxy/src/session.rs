//! One client's conversation, without sockets, clocks or servers: what is forwarded is told to it
//! message by message, and it says what is true when the server goes away.
//!
//! ```text
//!          ┌──────────── forwarded, received ───────────┐
//!          ▼                                            │
//! login ► Open ── server lost ──► Open (nothing was in flight, or it was answered)
//!          ▲                 ├──► Skipping: the batch had its error, its Sync is still to come
//!          └── Sync, ROLLBACK└──► Dead: an open transaction was lost; we answer until it is ended
//! ```
//! In `Skipping` and `Dead` no server is needed and nothing is forwarded.
//!
//! The data path does not go through here byte by byte: [`crate::clients::forward`] passes buffers on and
//! shows heads only. Not here: waiting, moving, when to give up ([`crate::clients::client`]).

pub mod answers;
pub mod dead;
pub mod fuzz;
pub mod journal;
mod leave;
pub mod malformed;
mod own_name;
pub mod pooled;
pub mod statements;
#[cfg(test)]
mod tests;
pub mod words;

use std::sync::Arc;

use bytes::BytesMut;
use kornak_cluster::discard;
use kornak_config::proxy::{FailoverSettings, KeepSessions, ListenPolicy, UnknownOutcome};
use kornak_protocol::backend;
use kornak_protocol::error::{ErrorView, Severity};
use kornak_protocol::frame::Seen;
use kornak_protocol::frontend;
use kornak_protocol::params::Parameters;
use kornak_protocol::pipeline::{Kind, Loss, Pipeline, PipelineError, Received, Sent, Unit};
use kornak_protocol::sqlstate::{ADMIN_SHUTDOWN, CRASH_SHUTDOWN, SqlState};
use kornak_protocol::txn::{CommandTag, TransactionStatus};

use answers::{Answer, Verdict, put_owed};
use dead::{After, DeadTransaction};
use journal::{Journal, Pin};
use malformed::put_malformed;
use own_name::OwnName;

/// The part that answers the client: the server, or the session itself.
#[derive(Debug)]
enum Mode {
    Open,
    /// Everything up to the next Sync is ignored; it gets ReadyForQuery with this status.
    Skipping(TransactionStatus),
    Dead(DeadTransaction),
}

/// The task that a server message gives to the shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Pass it on.
    Pass,
    /// The server ends this connection; the client must not see it yet.
    LastWords(SqlState),
    /// Pass an error on in its place.
    Replace(Verdict),
    /// Pass an error on, then it.
    Precede(Verdict),
    /// Keep it from the client.
    Swallow,
    /// Pass on in its place what [`Session::take_edited`] has.
    Edited,
}

/// The effect of a client message in `Skipping` or `Dead`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// The message was answered or ignored; the session continues.
    Stay,
    /// The session is idle and open again.
    Open,
}

/// The future of a session whose server was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aftermath {
    /// The session lives on; the messages for its client are in the output.
    Lives,
    /// The session ends with this error.
    Ends(Verdict),
    /// The session ends without a message to the client, in the middle of another message.
    Breaks,
}

/// One conversation.
#[derive(Debug)]
pub struct Session {
    pipeline: Pipeline,
    journal: Journal,
    mode: Mode,
    /// The parameters that the client has been told of its server.
    told: Arc<Parameters>,
    name: OwnName,
    /// A commit is acknowledged that no standby has confirmed (docs/safety.md A13).
    unconfirmed: bool,
    /// Nothing was forwarded since it was quiet but queries that read.
    only_reads: bool,
    /// Errors of ours since they were last counted.
    errors: Vec<Verdict>,
    /// The message that is passed on in place of a server's message.
    edited: BytesMut,
    policy: FailoverSettings,
}

impl Session {
    /// A session that has just logged in and was told these parameters.
    pub fn new(told: impl Into<Arc<Parameters>>) -> Self {
        Self {
            pipeline: Pipeline::new(TransactionStatus::Idle),
            journal: Journal::default(),
            mode: Mode::Open,
            told: told.into(),
            name: OwnName::default(),
            unconfirmed: false,
            only_reads: true,
            errors: Vec::new(),
            edited: BytesMut::new(),
            policy: FailoverSettings::default(),
        }
    }

    /// Sets the policy for the loss of the session's server.
    pub fn set_policy(&mut self, policy: FailoverSettings) {
        self.policy = policy;
        if policy.listen == ListenPolicy::Move {
            self.journal.move_channels();
        }
    }

    /// Whether it listens on channels that move with it.
    pub fn listens(&self) -> bool {
        self.journal.listens()
    }

    /// On how many channels.
    pub fn channels(&self) -> usize {
        self.journal.channels()
    }

    /// Names of parameters of its own that the session may have set; no server lists them.
    pub fn custom(&self) -> impl Iterator<Item = &[u8]> {
        self.journal.custom()
    }

    /// The parameters that the client has been told of its server.
    pub fn told(&self) -> &Parameters {
        &self.told
    }

    /// Adds a reason not to move.
    pub fn pin(&mut self, pin: Pin) {
        self.journal.pin(pin);
    }

    /// Why the session cannot be moved.
    pub fn pinned(&self) -> Option<Pin> {
        if self.pipeline.is_lost() { Some(Pin::Lost) } else { self.journal.pinned() }
    }

    /// Whether messages are forwarded, rather than answered here.
    #[inline]
    pub fn is_open(&self) -> bool {
        matches!(self.mode, Mode::Open)
    }

    /// Messages whose answers are owed.
    pub(crate) fn owed(&self) -> usize {
        self.pipeline.owed_len()
    }

    /// Whether the session is between transactions and owes nothing. The scanners must stand at a
    /// boundary as well.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.pipeline.movable() && self.is_open()
    }

    /// Whether the client has said good-bye.
    pub fn is_terminated(&self) -> bool {
        self.pipeline.is_terminated()
    }

    /// Whether the client must not be read before the server has answered.
    #[inline]
    pub fn must_wait(&self) -> bool {
        self.pipeline.must_wait()
    }

    /// Whether the batches forwarded so far are complete and not all answered: under a closed gate
    /// nothing more is forwarded until it is known whether a transaction is open.
    pub fn stands_between_batches(&self) -> bool {
        self.pipeline.ready_owed() > 0
            && !self.pipeline.is_unsynced()
            // The client of a COPY has to go on, or it never ends.
            && !self.pipeline.copy().swallows_sync()
    }

    /// Whether a transaction block is open or a request in flight.
    pub fn in_transaction(&self) -> bool {
        self.pipeline.status() != TransactionStatus::Idle || !self.is_open()
    }

    /// A client message is forwarded. Answers whether the next ReadyForQuery is owed for it, that
    /// is, whether a batch ends here.
    #[inline]
    pub fn forwarded(&mut self, seen: &Seen<'_>) -> bool {
        if frontend::is_malformed(seen) {
            return self.forwarded_malformed(seen.tag);
        }
        let body = seen.body;
        let sent = match seen.tag {
            b'Q' => {
                let (sql, is_whole) = frontend::query_prefix(body);
                let unit = self.journal.query(sql, is_whole, None);
                self.only_reads &= self.journal.last_reads();
                Sent::Query(unit)
            }
            b'P' => match frontend::ParseMessage::parse(body) {
                Ok(parse) => {
                    Sent::Parse(self.journal.parse(parse, seen.is_whole().then_some(body)))
                }
                Err(_) => self.unreadable(Sent::Parse(0)),
            },
            b'B' => {
                match frontend::Bind::parse(body) {
                    Ok(bind) => self.journal.bind(bind),
                    Err(_) => self.journal.pin(Pin::Lost),
                }
                Sent::Bind(0)
            }
            b'E' => match frontend::Execute::parse(body) {
                Ok(execute) => {
                    let unit = self.journal.execute(execute.portal);
                    self.only_reads &= self.journal.last_reads();
                    Sent::Execute(unit)
                }
                Err(_) => self.unreadable(Sent::Execute(UNKNOWN)),
            },
            b'C' => match frontend::Target::parse(body) {
                Ok(target) => Sent::Close(self.journal.close(target)),
                Err(_) => self.unreadable(Sent::Close(0)),
            },
            b'D' => Sent::Describe(0),
            b'S' => Sent::Sync,
            b'H' => Sent::Flush,
            b'd' => Sent::CopyData,
            b'c' => Sent::CopyDone,
            b'f' => Sent::CopyFail,
            b'F' => {
                self.only_reads = false;
                self.journal.function_call(body);
                Sent::FunctionCall(UNKNOWN)
            }
            b'X' => Sent::Terminate,
            _ => return false,
        };
        self.pipeline.sent(sent);
        matches!(sent, Sent::Query(_) | Sent::FunctionCall(_) | Sent::Sync)
    }

    /// A simple query that is answered was not skipped.
    #[inline]
    fn query_ran(&mut self, received: &Received) {
        if let Some(shared) = &mut self.journal.statements
            && let Received::Done(owner) | Received::Failed(Some(owner)) = received
            && owner.kind == Kind::Query
        {
            shared.query_ran(self.pipeline.ready_owed());
        }
    }

    /// A name is longer than what is looked at.
    fn unreadable(&mut self, sent: Sent) -> Sent {
        self.journal.pin(Pin::Lost);
        sent
    }

    /// A server message arrived.
    #[inline]
    pub fn received(&mut self, seen: &Seen<'_>) -> Result<Heard, PipelineError> {
        match seen.tag {
            b'E' => {
                let view = ErrorView::parse_prefix(seen.body);
                if view.severity().ends_session() || words::is_orphans(&view) {
                    return Ok(Heard::LastWords(view.sqlstate()));
                }
                self.error_heard(&view, seen);
                self.speak_for_a_lost_node(&view, seen);
            }
            b'N' if self.notice(seen.body) => return Ok(Heard::Swallow),
            b'S' => {
                if let Some(heard) = self.parameter(seen.body) {
                    return Ok(heard);
                }
            }
            _ => {}
        }
        let failed = self.pipeline.error_passed();
        let received = self.pipeline.received(seen.tag, seen.body)?;
        self.query_ran(&received);
        match received {
            Received::Ours => return Ok(Heard::Swallow),
            Received::Done(owner) if self.is_shared(&owner) => return Ok(self.shared_done(&owner)),
            Received::Done(owner) if matches!(seen.tag, b'C' | b'1' | b'3') => {
                let text = seen.body.strip_suffix(b"\0").unwrap_or(seen.body);
                let tag = (seen.tag == b'C').then_some(CommandTag(text));
                if let Some(tag) = self.journal.done(owner, tag) {
                    self.edited.clear();
                    // A constant tag always fits.
                    discard::message_fits(backend::put_command_complete(tag, &mut self.edited));
                    return Ok(Heard::Edited);
                }
                if tag.is_some() && std::mem::take(&mut self.unconfirmed) {
                    self.errors.push(Verdict::Unknown);
                    return Ok(Heard::Replace(Verdict::Unknown));
                }
            }
            Received::Failed(Some(owner)) if self.is_shared(&owner) => {
                return Ok(self.shared_failed(&owner));
            }
            Received::Failed(owner) => {
                if let Some(owner) = owner {
                    self.journal.failed(owner);
                }
                if !self.edited.is_empty() {
                    return Ok(Heard::Edited);
                }
            }
            Received::Ready(_, Some(owner)) if self.is_shared(&owner) => {
                if let Some(shared) = &mut self.journal.statements {
                    shared.ready(self.pipeline.ready_owed());
                }
                return Ok(Heard::Swallow);
            }
            Received::Ready(status, _) => {
                self.journal.ready(status, failed);
                if let Some(shared) = &mut self.journal.statements {
                    shared.ready(self.pipeline.ready_owed());
                }
                if self.pipeline.movable() {
                    self.only_reads = true;
                    self.journal.quiet();
                }
                if std::mem::take(&mut self.unconfirmed) {
                    self.errors.push(Verdict::Unknown);
                    return Ok(Heard::Precede(Verdict::Unknown));
                }
            }
            _ => {}
        }
        Ok(Heard::Pass)
    }

    /// Answers whether the notice is about a server that goes down, which the client need not know.
    #[cold]
    fn notice(&mut self, body: &[u8]) -> bool {
        let view = ErrorView::parse_prefix(body);
        if view.severity() != Severity::Warning {
            return false;
        }
        if view.routine == Some(b"SyncRepWaitForLSN") {
            self.unconfirmed = true;
        }
        matches!(view.sqlstate(), ADMIN_SHUTDOWN | CRASH_SHUTDOWN)
            && view.routine == Some(b"quickdie")
    }

    #[cold]
    fn parameter(&mut self, body: &[u8]) -> Option<Heard> {
        let (name, value) = backend::parameter_status(body).ok()?;
        let heard = self.name_reported(name, value);
        if heard.is_none() && Arc::make_mut(&mut self.told).set(name, value).is_err() {
            self.journal.pin(Pin::TooMuch);
        }
        heard
    }

    /// Whether all that is in flight changes nothing, whether it was done or not: BEGIN, Parse,
    /// Describe, Sync.
    #[inline]
    pub fn is_harmless(&self) -> bool {
        self.pipeline.loss() == Loss::Harmless && !self.pipeline.answered()
    }

    /// The server is gone and nothing of what is in flight was answered to the client: if it is
    /// harmless and the session may move, it is forgotten, to be forwarded again.
    pub fn forget_harmless(&mut self) -> bool {
        let movable = self.pinned().is_none() && !self.pipeline.is_terminated();
        if !movable || self.pipeline.loss() != Loss::Harmless {
            return false;
        }
        self.pipeline = Pipeline::new(TransactionStatus::Idle);
        self.only_reads = true;
        self.journal.lost_server();
        true
    }

    /// Whether the request in flight may run again elsewhere if its server is a standby: a single
    /// batch of queries, outside of a transaction block, of which nothing was answered. Not a statement
    /// that writes: on a coordinator of Citus one may, through a standby (`citus.writable_standby_coordinator`).
    #[inline]
    pub fn is_single_batch(&self) -> bool {
        self.only_reads
            && self.pipeline.status() == TransactionStatus::Idle
            && self.pipeline.ready_owed() <= 1
            && !self.pipeline.answered()
            && !self.pipeline.copy().is_active()
    }

    /// The standby is gone and nothing of what it was asked was answered to the client: if the
    /// session may move, the batch is forgotten, to be forwarded again.
    pub fn forget_read(&mut self) -> bool {
        let movable = self.pinned().is_none() && !self.pipeline.is_terminated();
        if !movable || !self.is_single_batch() {
            return false;
        }
        self.pipeline = Pipeline::new(TransactionStatus::Idle);
        self.only_reads = true;
        self.journal.lost_server();
        true
    }

    /// Whether the client was told that its server is a standby, and not that it was promoted since.
    #[inline]
    pub fn is_on_standby(&self) -> bool {
        self.told.in_hot_standby() == Some(true)
    }

    /// Whether each transaction outside of a block is read-only, as the server says of itself (PostgreSQL 14 and newer).
    #[inline]
    pub fn is_read_only_by_default(&self) -> bool {
        self.told.get("default_transaction_read_only") == Some(b"on".as_slice())
    }

    /// The server is gone. `half_told`: the client has received a part of a message that will never
    /// be whole. `sudden`: nobody had announced it.
    pub fn lose_server(&mut self, half_told: bool, sudden: bool, out: &mut BytesMut) -> Aftermath {
        use TransactionStatus::{Failed, Idle};
        let pipeline = std::mem::replace(&mut self.pipeline, Pipeline::new(Idle));
        self.only_reads = true;
        let all = sudden && self.policy.keep_sessions == KeepSessions::All;
        let pinned = match (pipeline.is_lost(), all) {
            (true, _) => Some(Pin::Lost),
            (false, true) => self.journal.pinned_for_certain(),
            (false, false) => self.journal.pinned(),
        };
        // What was sent meanwhile never reaches it, and nobody was held back until it listened again.
        let pinned = pinned.or((sudden && self.listens()).then_some(Pin::Listen));
        self.journal.lost_server();
        self.unconfirmed = false;
        if half_told || pipeline.is_terminated() {
            return Aftermath::Breaks;
        }
        if pinned.is_some() || pipeline.copy().is_active() {
            self.errors.push(Verdict::Ends(pinned));
            return Aftermath::Ends(Verdict::Ends(pinned));
        }
        if sudden && self.policy.keep_sessions == KeepSessions::None {
            self.errors.push(Verdict::NotKept);
            return Aftermath::Ends(Verdict::NotKept);
        }
        if pipeline.loss() == Loss::Unknown && self.policy.unknown_outcome == UnknownOutcome::Close
        {
            self.errors.push(Verdict::UnknownEnds);
            return Aftermath::Ends(Verdict::UnknownEnds);
        }
        let in_flight = pipeline.in_flight();
        let answer = |first, others, status| Answer { first, others, status };
        let answer = match pipeline.loss() {
            Loss::Nothing => return Aftermath::Lives,
            Loss::Retry if !in_flight => {
                self.mode = Mode::Dead(DeadTransaction::new(false, false, Verdict::Retry));
                return Aftermath::Lives;
            }
            Loss::Harmless => answer(Verdict::NotDone, Verdict::NotDone, Idle),
            Loss::Retry => answer(Verdict::Retry, Verdict::Retry, Failed),
            Loss::AlreadyFailed => answer(Verdict::Dead, Verdict::Dead, Failed),
            Loss::RolledBack => answer(Verdict::Retry, Verdict::NotDone, Idle),
            Loss::Unknown => answer(Verdict::Unknown, Verdict::Unknown, Idle),
        };
        let open = put_owed(&pipeline, answer, out, &mut self.errors);
        self.mode = match (answer.status, open) {
            (Idle, false) => Mode::Open,
            (Idle, true) => Mode::Skipping(Idle),
            (_, open) => Mode::Dead(DeadTransaction::new(true, open, answer.others)),
        };
        Aftermath::Lives
    }

    /// Refuses a request that was not forwarded: its first message.
    pub fn refuse(&mut self, seen: &Seen<'_>, verdict: Verdict, out: &mut BytesMut) {
        let idle = TransactionStatus::Idle;
        match seen.tag {
            b'S' => backend::put_ready_for_query(idle, out),
            _ if malformed::is_ignored(seen) => {}
            tag => {
                verdict.put(out);
                self.errors.push(verdict);
                if matches!(tag, b'Q' | b'F') {
                    backend::put_ready_for_query(idle, out);
                } else {
                    self.mode = Mode::Skipping(idle);
                }
            }
        }
    }

    /// Answers a client message in place of the server.
    pub fn answer(&mut self, seen: &Seen<'_>, out: &mut BytesMut) -> Answered {
        let after = match &mut self.mode {
            Mode::Open => After::Over,
            Mode::Skipping(status) if seen.tag == b'S' => {
                if frontend::is_malformed(seen) {
                    put_malformed(seen.tag, *status, out);
                } else {
                    backend::put_ready_for_query(*status, out);
                }
                After::Over
            }
            Mode::Skipping(_) => After::Stay,
            Mode::Dead(dead) => {
                let (after, error) = dead.on(seen, &mut self.journal, out);
                self.errors.extend(error);
                after
            }
        };
        if after == After::Over {
            self.mode = Mode::Open;
            return Answered::Open;
        }
        Answered::Stay
    }

    /// Appends the messages that a new server has to be told before anything else; answers how many ReadyForQuery it
    /// will owe.
    pub fn put_replay(&self, out: &mut BytesMut) -> usize {
        self.journal.put_replay(out)
    }

    /// Appends what makes the unnamed statement again; answers whether that is anything. A server may
    /// refuse it.
    pub fn put_unnamed(&self, out: &mut BytesMut) -> bool {
        self.journal.put_unnamed(out)
    }

    /// Whether a new server needs no more than the login.
    pub fn is_clean(&self) -> bool {
        self.journal.is_clean()
    }

    /// The session is on a new server, which reports these parameters: what differs is told.
    pub fn moved(&mut self, reported: &Parameters, out: &mut BytesMut) {
        for (name, value) in self.told.diff(reported) {
            // Both came from a server's message, so they fit into one.
            discard::message_fits(backend::put_parameter_status(name, value, out));
        }
        let told = Arc::make_mut(&mut self.told);
        for (name, value) in reported.iter() {
            if told.set(name, value).is_err() {
                self.journal.pin(Pin::TooMuch);
            }
        }
    }

    /// The server connection was given up while the session was quiet.
    pub fn detached(&mut self) {
        self.journal.lost_server();
    }

    /// Errors of ours since the last call, to be counted.
    pub fn take_errors(&mut self) -> Vec<Verdict> {
        std::mem::take(&mut self.errors)
    }
}

/// A request of which nothing is known.
const UNKNOWN: Unit = Unit { fate: kornak_protocol::pipeline::Fate::Unknown, token: 0 };
