//! Bookkeeping of the answers that a server still owes, pure.
//!
//! A client may send many requests before it reads the first answer. [`Pipeline`] is told of each
//! client message as it is *forwarded* and of each server message as it arrives, and knows from
//! that at any byte: whether the session stands between transactions with nothing owed (only then
//! may it move to another server), which request the next answer belongs to, and what can
//! truthfully be said of the requests in flight if the server is lost ([`Pipeline::loss`],
//! docs/safety.md A10).
//!
//! Rules it stands on (`/docs/current/protocol-flow.html`): Query, FunctionCall and Sync owe one
//! ReadyForQuery each; after an error in the extended protocol a server discards *everything* up
//! to the next Sync, simple queries included; Flush owes nothing; COPY swallows Sync
//! ([`crate::copy`]).
//!
//! Not here: half-received messages (both [`crate::frame::Scanner`]s must stand at a boundary as
//! well), what a session holds, and any text of SQL: the caller classifies a request into a
//! [`Fate`] before it is forwarded ([`crate::frontend::fate_of`]).

use std::collections::VecDeque;

use crate::copy::CopyState;
use crate::limits::MAX_OWED;
use crate::txn::TransactionStatus;

mod fuzz;
mod loss;
#[cfg(test)]
mod tests;
mod words;

pub use fuzz::fuzz_pipeline;
use loss::Judge;
pub use loss::Loss;
pub use words::{Fate, Kind, Owner, Received, Sent, Unit};

/// A server message that no request explains. The connection can no longer be followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PipelineError {
    /// The message answers nothing that was asked.
    #[error("server message {} answers nothing that was asked", tag.escape_ascii())]
    Unexpected {
        /// Type byte of the message.
        tag: u8,
    },
    /// ReadyForQuery with a status that does not exist.
    #[error("ready for query with an unknown status")]
    BadStatus,
}

/// Answers that one server connection owes its client.
#[derive(Debug)]
pub struct Pipeline {
    /// Requests not yet answered, oldest first. Bounded by [`MAX_OWED`] through
    /// [`Pipeline::must_wait`] and by blurring.
    owed: VecDeque<Owner>,
    /// How many of them owe a ReadyForQuery.
    ready_owed: usize,
    status: TransactionStatus,
    /// Effect of the units that were answered since the last ReadyForQuery.
    judge: Judge,
    copy: CopyState,
    /// Syncs that the running COPY has swallowed.
    swallowed: u32,
    /// Of these, Syncs of a COPY that failed: it may have failed before it swallowed them, and then
    /// each of them is answered. What follows is judged only when a [`Sent::Marker`] was answered.
    doubtful: u32,
    /// After an error the server discards everything until a Sync that was not yet forwarded.
    skipping: bool,
    /// An extended message was forwarded after the last Sync, Query or FunctionCall.
    unsynced: bool,
    /// Something was answered since the last ReadyForQuery.
    answered: bool,
    /// An error was, too.
    error_passed: bool,
    /// The count may be wrong: a COPY was mixed with other messages. Never cleared.
    lost: bool,
    terminated: bool,
}

impl Pipeline {
    /// A connection that has just reported `status` and owes nothing.
    pub fn new(status: TransactionStatus) -> Self {
        Self {
            owed: VecDeque::new(),
            ready_owed: 0,
            status,
            judge: Judge::of(status),
            copy: CopyState::None,
            swallowed: 0,
            doubtful: 0,
            skipping: false,
            unsynced: false,
            answered: false,
            error_passed: false,
            lost: false,
            terminated: false,
        }
    }

    /// A client message was forwarded.
    pub fn sent(&mut self, sent: Sent) {
        let still = |token| Unit { fate: Fate::Stays, token };
        if self.must_settle() && sent.is_request() {
            self.lost = true;
        }
        match sent {
            Sent::Flush | Sent::CopyData => {}
            Sent::Terminate => self.terminated = true,
            Sent::CopyDone | Sent::CopyFail => self.client_ended_copy(),
            Sent::Sync if self.copy.swallows_sync() => {
                self.swallowed = self.swallowed.saturating_add(1);
            }
            Sent::Sync => {
                self.skipping = false;
                self.unsynced = false;
                self.push(Kind::Sync, still(0));
            }
            Sent::OwnSync(token) => {
                self.unsynced = false;
                self.push(Kind::Sync, still(token));
            }
            Sent::Query(unit) => self.request(Kind::Query, unit),
            Sent::FunctionCall(unit) => self.request(Kind::FunctionCall, unit),
            Sent::Execute(unit) => self.request(Kind::Execute, unit),
            Sent::Parse(token) => self.request(Kind::Parse, still(token)),
            Sent::Bind(token) => self.request(Kind::Bind, still(token)),
            Sent::Describe(token) => self.request(Kind::Describe, still(token)),
            Sent::Close(token) => self.request(Kind::Close, still(token)),
            Sent::Marker => {
                self.push(Kind::Marker, still(0));
                self.push(Kind::MarkerSync, still(0));
            }
        }
    }

    fn request(&mut self, kind: Kind, unit: Unit) {
        if self.copy.swallows_sync() {
            // The server takes it for an error of the COPY, or, if the COPY had failed before,
            // for a request. Only the server knows.
            self.lost = true;
        }
        if self.skipping {
            return;
        }
        self.unsynced = !matches!(kind, Kind::Query | Kind::FunctionCall);
        self.push(kind, unit);
    }

    fn push(&mut self, kind: Kind, unit: Unit) {
        let owner = Owner { kind, unit };
        if owner.owes_ready() {
            self.ready_owed += 1;
            self.owed.push_back(owner);
            return;
        }
        // Waiting helps only if the server will answer what it has; inside one endless batch it
        // may be waiting for us. There the requests are no longer told apart.
        let full = if self.ready_owed > 0 { 2 * MAX_OWED } else { MAX_OWED };
        if self.owed.len() < full {
            self.owed.push_back(owner);
            return;
        }
        let unknown = owner.executes() && !matches!(unit.fate, Fate::Stays | Fate::OfSession);
        let fate = if unknown { Fate::Unknown } else { Fate::Stays };
        match self.owed.back_mut() {
            Some(last) if last.kind == Kind::Blur => {
                if unknown {
                    last.unit.fate = fate;
                }
            }
            _ => self.owed.push_back(Owner { kind: Kind::Blur, unit: Unit { fate, token: 0 } }),
        }
    }

    fn client_ended_copy(&mut self) {
        if self.copy.swallows_sync() {
            self.copy.client_finished();
        } else if self.owed.len() > usize::from(self.copy.is_active()) {
            self.push(Kind::CopyEnd, Unit { fate: Fate::Stays, token: 0 });
        }
    }

    /// A server message arrived. `body` needs its first byte for ReadyForQuery only.
    #[inline]
    pub fn received(&mut self, tag: u8, body: &[u8]) -> Result<Received, PipelineError> {
        match tag {
            b'D' | b'd' => {
                self.answered = true;
                Ok(Received::Data)
            }
            b'N' | b'A' | b'S' => Ok(Received::Async),
            b'Z' => self.ready(body),
            b'E' => Ok(Received::Failed(self.failed())),
            _ => self.answer(tag),
        }
    }

    fn answer(&mut self, tag: u8) -> Result<Received, PipelineError> {
        use Kind::{Bind, Blur, Close, Describe, Execute, FunctionCall, Parse, Query};
        self.answered = true;
        self.settle();
        let front = match self.owed.front() {
            Some(front) => *front,
            None if self.lost => return Ok(Received::Async),
            None => return Err(PipelineError::Unexpected { tag }),
        };
        match (tag, front.kind) {
            (b'3', Kind::Marker) => {
                self.pop();
                self.doubtful = 0;
                Ok(Received::Ours)
            }
            (b'c', _)
            | (b't', Describe | Blur)
            | (b'V', FunctionCall)
            | (b'T', Query | Execute) => Ok(Received::Part(front)),
            (b'C' | b'I', Query) => {
                self.copy = CopyState::None;
                Ok(Received::Done(front))
            }
            (b'1', Parse) | (b'2', Bind) | (b'3', Close) | (b'T' | b'n', Describe) => {
                self.pop();
                Ok(Received::Done(front))
            }
            (b'C' | b'I' | b's', Execute) => {
                self.copy = CopyState::None;
                self.pop();
                Ok(Received::Done(front))
            }
            (b'1' | b'2' | b'3' | b'T' | b'n' | b'C' | b'I' | b's', Blur) => {
                self.copy = CopyState::None;
                Ok(Received::Done(front))
            }
            (b'G' | b'H' | b'W', Query | Execute | Blur) => {
                self.open_copy(tag);
                Ok(Received::Copy(front, self.copy))
            }
            _ if self.lost => Ok(Received::Async),
            _ => Err(PipelineError::Unexpected { tag }),
        }
    }

    /// Accounts for a COPY that begins: messages that were forwarded behind it before its answer came
    /// were read by the server as part of the COPY.
    fn open_copy(&mut self, tag: u8) {
        self.copy = CopyState::opened_by(tag).unwrap_or_default();
        self.swallowed = 0;
        while self.copy.swallows_sync() {
            match self.owed.get(1).map(|next| next.kind) {
                None => break,
                Some(Kind::Sync) => {
                    self.owed.remove(1);
                    self.ready_owed -= 1;
                    self.swallowed = self.swallowed.saturating_add(1);
                }
                Some(Kind::CopyEnd) => {
                    self.owed.remove(1);
                    self.copy.client_finished();
                }
                Some(_) => {
                    self.lost = true;
                    break;
                }
            }
        }
        if self.swallowed > 0 && self.ready_owed == 0 {
            // The batch goes on until the Sync behind the COPY's data.
            self.unsynced = true;
        }
    }

    fn failed(&mut self) -> Option<Owner> {
        self.answered = true;
        self.error_passed = true;
        self.settle();
        if self.copy.is_active() {
            // The COPY may have failed before it swallowed them.
            self.doubtful = self.doubtful.saturating_add(self.swallowed);
        }
        self.swallowed = 0;
        self.copy = CopyState::None;
        let Some(front) = self.owed.front().copied() else {
            self.skipping = self.unsynced;
            return None;
        };
        if !front.owes_ready() {
            self.pop();
            // Never executed, so they do not count for what may have happened.
            let judge = self.judge;
            while let Some(next) = self.owed.front().filter(|next| next.kind != Kind::Sync) {
                // A Sync that the COPY had not swallowed would have it executed.
                self.lost |= self.doubtful > 0 && !next.is_unasked();
                self.pop();
            }
            self.judge = judge;
            self.skipping = self.owed.is_empty();
        }
        // Which ReadyForQuery is whose can be told of one only.
        self.lost |= self.doubtful > 0 && self.owed().count() > 1;
        Some(front)
    }

    fn ready(&mut self, body: &[u8]) -> Result<Received, PipelineError> {
        let status = body.first().and_then(|byte| TransactionStatus::from_byte(*byte));
        let status = status.ok_or(PipelineError::BadStatus)?;
        self.settle();
        while self.owed.front().is_some_and(|front| front.kind == Kind::Blur) {
            self.owed.pop_front();
        }
        let owner = match self.owed.front().copied() {
            Some(front) if front.kind == Kind::MarkerSync => {
                self.pop();
                self.turned(status);
                return Ok(Received::Ours);
            }
            Some(front) if front.owes_ready() => {
                self.pop();
                Some(front)
            }
            // A Sync that the COPY had not swallowed when it failed.
            None | Some(Owner { kind: Kind::Marker, .. }) if self.doubtful > 0 => {
                self.doubtful -= 1;
                self.skipping = false;
                self.unsynced = false;
                None
            }
            _ if self.lost => None,
            _ => return Err(PipelineError::Unexpected { tag: b'Z' }),
        };
        self.turned(status);
        Ok(Received::Ready(status, owner))
    }

    fn turned(&mut self, status: TransactionStatus) {
        self.status = status;
        self.judge = Judge::of(status);
        self.copy = CopyState::None;
        self.swallowed = 0;
        self.answered = false;
        self.error_passed = false;
        self.settle();
    }

    /// Takes the oldest request off, and remembers what it may have done.
    fn pop(&mut self) {
        let Some(front) = self.owed.pop_front() else { return };
        if front.owes_ready() {
            self.ready_owed -= 1;
        }
        if front.executes() {
            self.judge = self.judge.after(front.unit.fate);
        }
        if self.owed.is_empty() && self.owed.capacity() > 64 {
            // A long batch is over; an idle session holds no buffer.
            self.owed = VecDeque::new();
        }
    }

    /// Drops ends of COPY data at the front: the COPY they belonged to never began.
    fn settle(&mut self) {
        while self.owed.front().is_some_and(|front| front.kind == Kind::CopyEnd) {
            self.owed.pop_front();
        }
    }

    /// Whether the client must not be read any further until the server has answered: as many
    /// requests as we keep are owed. Overshoot by what one buffer holds is allowed for.
    pub fn must_wait(&self) -> bool {
        self.ready_owed > 0 && self.owed.len() >= MAX_OWED
    }

    /// The status that the last ReadyForQuery reported.
    pub fn status(&self) -> TransactionStatus {
        self.status
    }

    /// Where a COPY of the oldest request stands.
    pub fn copy(&self) -> CopyState {
        self.copy
    }

    /// How many ReadyForQuery the server owes for what was forwarded.
    pub fn ready_owed(&self) -> usize {
        self.ready_owed
    }

    /// How many requests are not yet answered.
    pub fn owed_len(&self) -> usize {
        self.owed.len()
    }

    /// The requests not yet answered, oldest first.
    pub fn owed(&self) -> impl Iterator<Item = &Owner> {
        self.owed.iter().filter(|owner| !owner.is_unasked())
    }

    /// The request that the next answer belongs to.
    pub fn next_owner(&self) -> Option<&Owner> {
        self.owed().next()
    }

    /// Whether a batch of the extended protocol was begun and its Sync not yet forwarded.
    pub fn is_unsynced(&self) -> bool {
        self.unsynced || self.skipping
    }

    /// Whether a ReadyForQuery more than is owed may come, and everything else was answered: a
    /// [`Sent::Marker`] would tell. Not where the count is lost: which answer is the marker's cannot be told there.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful > 0 && !self.lost && self.owed.is_empty() && !self.is_unsynced()
    }

    /// Whether no request may be forwarded before that is settled.
    #[inline]
    pub fn must_settle(&self) -> bool {
        self.doubtful > 0 && !self.skipping && !self.lost
    }

    /// Whether the server will answer what it was sent without another word of the client.
    pub fn will_answer(&self) -> bool {
        self.ready_owed > 0 && !matches!(self.copy, CopyState::In { client_done: false })
    }

    /// Whether both sides stream, as in replication.
    pub fn is_streaming(&self) -> bool {
        matches!(self.copy, CopyState::Both { .. })
    }

    /// Whether the server discards what is forwarded until it sees a Sync.
    pub fn is_skipping(&self) -> bool {
        self.skipping
    }

    /// Whether a request was forwarded whose end (its ReadyForQuery) has not been seen.
    pub fn in_flight(&self) -> bool {
        !self.owed.is_empty() || self.is_unsynced() || self.copy.is_active() || self.doubtful > 0
    }

    /// Whether anything was answered since the last ReadyForQuery, notices aside.
    pub fn answered(&self) -> bool {
        self.answered
    }

    /// Whether an ErrorResponse was answered since the last ReadyForQuery: the request at the
    /// front has had its one error.
    pub fn error_passed(&self) -> bool {
        self.error_passed
    }

    /// Whether the count can no longer be relied upon. Such a session is pinned.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Whether the client has said good-bye.
    pub fn is_terminated(&self) -> bool {
        self.terminated
    }

    /// Whether the session stands between transactions and owes nothing, as far as messages
    /// that were forwarded whole tell. Both scanners must stand at a boundary as well.
    pub fn movable(&self) -> bool {
        self.status == TransactionStatus::Idle
            && !self.in_flight()
            && !self.lost
            && !self.terminated
    }

    /// Fate of the requests in flight if the server is lost now.
    pub fn loss(&self) -> Loss {
        if self.lost || self.copy.is_active() {
            return Loss::Unknown;
        }
        let judge = self.owed.iter().fold(self.judge, |judge, owner| {
            let judge = if owner.executes() { judge.after(owner.unit.fate) } else { judge };
            if owner.owes_ready() { judge.behind_batch() } else { judge }
        });
        judge.loss(self.in_flight())
    }
}
