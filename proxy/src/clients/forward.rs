//! The fast path: whole buffers go from one socket to the other, and only message heads are looked
//! at on the way.
//!
//! An idle session owns no buffer: every thread has one scratch buffer, borrowed for the length of a
//! poll. What cannot be written at once is kept, at most one scratch buffer for each direction, and
//! the other side is not read until it is gone. Bytes of a message that is not yet known well enough
//! to be judged (a split head) are held back, so that what was forwarded is always accounted for.
//!
//! Not here: what to do when the path ends ([`crate::clients::client`]), what messages mean
//! ([`crate::session`]).

mod answer;
mod ask;
mod io;
mod leave;
mod lost;
pub mod pooled;
mod stop;
mod times;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};
use kornak_cluster::discard;
use kornak_config::proxy::Reruns;
use kornak_protocol::frame::{Direction, Flow, Scanner};

use crate::net::stream::Stream;
use crate::pool::lender::Member;
use crate::pool::link::Link;
use crate::registry::{Doing, Handle};
use crate::session::pooled::Edits;
use crate::session::{Heard, Session};
use crate::shared::Shared;
use crate::waiting::gate::{Side, Ticket};
use io::{flush, keep_front, poll_read, write};
pub use leave::Presence;
pub use stop::{Denied, LastWords, Stop};

/// Bytes of one read. Smaller ones cost system calls, larger ones the cache.
pub const SCRATCH_BYTES: usize = 64 * 1024;

/// Longest batch that is kept to be said again (docs/safety.md A9).
const MAX_KEPT_BYTES: usize = 16 * 1024;

/// A row that is split at the end of a buffer is held back up to this length, so that a server's
/// death seldom leaves a client in the middle of a message, where nothing can be said any more.
const MAX_HELD_ROW_BYTES: usize = 16 * 1024;

/// Why client bytes were not forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// The bytes are the beginning of a message.
    Partial,
    /// The gate, the server connection or an answer is missing.
    Blocked,
}

/// One session with its sockets.
#[derive(Debug)]
pub struct Conversation {
    pub client: Stream,
    pub to_client: BytesMut,
    held: BytesMut,
    held_is: Held,
    client_scanner: Scanner,
    /// Bytes of a refused message that are still to come from the client.
    drop_client: u32,
    /// The bytes that were forwarded since the session was quiet, as long as it is nothing but what changes
    /// nothing (BEGIN, Parse, Sync) and nothing of its answer was passed on: it may be said again
    /// to another server. Or a single read on a standby whose listener allows the same.
    kept: Vec<u8>,
    /// The requests in flight were sent before, to a server that was lost: a statement that kills servers
    /// is not carried from one to the next.
    said_again: bool,
    pub session: Session,
    pub link: Option<Box<Link>>,
    /// Of a session whose server connections change hands.
    pub member: Option<Box<Member>>,
    /// The session was pinned when it was last looked at, and when that was.
    examined: Option<Instant>,
    /// A Flush of ours was sent into an endless batch.
    flushed: bool,
    /// The client's end of its connection.
    pub presence: Presence,
    /// The client does not take what is for it as fast as it comes.
    is_behind: bool,
    /// The session was looked at since it became quiet.
    is_settled: bool,
    /// Since when it has a cursor WITH HOLD, or what else it may give up soon.
    pub holds_since: Option<Instant>,
    /// Since when it has the server connection that it has borrowed.
    borrowed: Option<Instant>,
    /// The session was busy when it should have asked its server what it holds.
    to_ask: bool,
    pub ticket: Ticket,
    pub side: Side,
    pub handle: Arc<Handle>,
    pub shared: Arc<Shared>,
    pub last_heard: Instant,
    /// The server has answered, if anybody wants to know.
    last_told: Instant,
    /// The transaction has begun that the session is in.
    began: Instant,
}

/// Whether anything was moved.
type Moved = Result<bool, Stop>;

impl Conversation {
    /// A session that has just logged in; `read` are bytes that the client has sent since.
    pub fn new(
        client: Stream,
        session: Session,
        read: BytesMut,
        side: Side,
        ticket: Ticket,
        handle: Arc<Handle>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            client,
            to_client: BytesMut::new(),
            held_is: if read.is_empty() { Held::Partial } else { Held::Blocked },
            // An idle session does not keep the buffer of its login.
            held: if read.is_empty() { BytesMut::new() } else { read },
            client_scanner: Scanner::new(Direction::Frontend),
            drop_client: 0,
            kept: Vec::new(),
            said_again: false,
            session,
            link: None,
            member: None,
            examined: None,
            flushed: false,
            presence: Presence::There,
            is_behind: false,
            is_settled: false,
            holds_since: None,
            borrowed: None,
            to_ask: false,
            ticket,
            side,
            handle,
            shared,
            last_heard: Instant::now(),
            last_told: Instant::now(),
            began: Instant::now(),
        }
    }

    /// Moves bytes until something has to be decided.
    pub fn poll(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Poll<Stop> {
        self.handle.park(cx.waker());
        loop {
            if self.handle.is_flagged() {
                return Poll::Ready(Stop::Flagged);
            }
            if self.is_waiting()
                && let Err(stop) = self.look_at_mailbox()
            {
                return Poll::Ready(stop);
            }
            let from_server = match self.server_to_client(cx, scratch) {
                Ok(moved) => moved,
                Err(stop) => return Poll::Ready(stop),
            };
            let from_client = match self.client_to_server(cx, scratch) {
                Ok(moved) => moved,
                Err(stop) => return Poll::Ready(stop),
            };
            if let Err(stop) = self.settle() {
                return Poll::Ready(stop);
            }
            self.settle_doubt(cx);
            self.end_copy(cx);
            if self.is_behind == self.to_client.is_empty() {
                self.is_behind = !self.is_behind;
                self.client.be_patient(self.is_behind);
            }
            if self.may_go() {
                return Poll::Ready(Stop::ClientGone);
            }
            if !from_server && !from_client {
                return Poll::Pending;
            }
        }
    }

    fn server_to_client(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Moved {
        if !flush(&mut self.client, &mut self.to_client, cx).map_err(|_| Stop::ClientGone)? {
            return Ok(false);
        }
        let Some(link) = &mut self.link else { return Ok(false) };
        let kept = link.tail.len();
        let Some(free) = keep_front(scratch, &link.tail) else { return Ok(false) };
        let n = match poll_read(&mut link.stream, cx, free) {
            Poll::Pending => return Ok(false),
            Poll::Ready(Ok(0) | Err(_)) => return Err(Stop::ServerLost(None)),
            Poll::Ready(Ok(n)) => n,
        };
        link.tail.clear();
        let settings = self.shared.settings();
        let limits = &settings.limits;
        if limits.client_idle_timeout.is_some() || limits.idle_transaction_timeout.is_some() {
            self.last_told = Instant::now();
        }
        let data = scratch.get(..kept + n).unwrap_or_default();
        self.is_settled = false;
        self.pass_to_client(data, cx)?;
        // Before more is read of the client: whoever never stops talking leaves all the same.
        self.settle()?;
        Ok(true)
    }

    /// If the session has become quiet, it leaves the gate and gives its connection back.
    #[inline]
    fn settle(&mut self) -> Result<(), Stop> {
        if self.is_settled || !self.ticket.is_inside() {
            return Ok(());
        }
        if self.session.is_streaming() {
            self.ticket.leave();
            return Ok(());
        }
        if !self.is_quiet() {
            return Ok(());
        }
        self.is_settled = true;
        if self.must_ask() {
            return Err(Stop::Examine);
        }
        self.leave_gate();
        if self.member.is_some() { self.rest() } else { Ok(()) }
    }

    fn pass_to_client(&mut self, data: &[u8], cx: &mut Context<'_>) -> Result<(), Stop> {
        let Some(link) = &mut self.link else { return Ok(()) };
        let session = &mut self.session;
        let mut row = None;
        let mut odd = None;
        let mut garbage = false;
        let scanned = link.scanner.scan(data, |seen| {
            if seen.tag == b'D' {
                row = if seen.end.is_none() && seen.len as usize <= MAX_HELD_ROW_BYTES {
                    seen.start
                } else {
                    None
                };
                return match session.received(&seen) {
                    Ok(_) => Flow::Pass,
                    Err(_) => {
                        garbage = true;
                        Flow::StopBefore
                    }
                };
            }
            match session.received(&seen) {
                Ok(Heard::Pass) => Flow::Pass,
                Ok(heard) => {
                    odd = Some((heard, seen.end, Bytes::copy_from_slice(seen.body)));
                    Flow::StopBefore
                }
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "server sent a message that was not asked for"
                    );
                    garbage = true;
                    Flow::StopBefore
                }
            }
        });
        let Ok(at) = scanned else { return Err(Stop::ServerGarbage) };
        if garbage {
            return Err(Stop::ServerGarbage);
        }
        let mut end = at;
        if let Some((heard, odd_end, body)) = odd {
            let before = data.get(..at).unwrap_or_default();
            let rest = data.get(at..).unwrap_or_default();
            return self.hear(
                heard,
                odd_end.map(|end| end.saturating_sub(at)),
                &body,
                before,
                rest,
                cx,
            );
        }
        let unshown = link.scanner.unshown();
        if unshown > 0 {
            end -= unshown;
        } else if let Some(start) = row {
            end = start;
        }
        if end < data.len() {
            link.tail.extend_from_slice(data.get(end..).unwrap_or_default());
            link.scanner = Scanner::new(Direction::Backend);
        }
        let pass = data.get(..end).unwrap_or_default();
        if !pass.is_empty() && self.kept.capacity() > 0 {
            self.kept = Vec::new();
        }
        self.shared.metrics.bytes_out.fetch_add(pass.len() as u64, Relaxed);
        write(&mut self.client, &mut self.to_client, pass, cx).map_err(|_| Stop::ClientGone)
    }

    /// A message that is not simply passed on: `rest` begins with it.
    #[cold]
    fn hear(
        &mut self,
        heard: Heard,
        len: Option<usize>,
        body: &[u8],
        before: &[u8],
        rest: &[u8],
        cx: &mut Context<'_>,
    ) -> Result<(), Stop> {
        if !before.is_empty() {
            self.kept.clear();
        }
        self.to_client.extend_from_slice(before);
        let Some(link) = &mut self.link else { return Ok(()) };
        link.scanner = Scanner::new(Direction::Backend);
        let len = len.unwrap_or(rest.len());
        let message = rest.get(..len).unwrap_or_default();
        match heard {
            Heard::LastWords(sqlstate) => {
                let whole = message.len() == body.len() + 5;
                let message = if whole { Bytes::copy_from_slice(message) } else { Bytes::new() };
                return Err(Stop::ServerLost(Some(LastWords { sqlstate, message })));
            }
            Heard::Replace(verdict) => verdict.put(&mut self.to_client),
            Heard::Precede(verdict) => {
                verdict.put(&mut self.to_client);
                self.to_client.extend_from_slice(message);
            }
            Heard::Pass => self.to_client.extend_from_slice(message),
            Heard::Swallow => {}
            Heard::Edited => self.to_client.extend_from_slice(&self.session.take_edited()),
        }
        let rest = Bytes::copy_from_slice(rest.get(len..).unwrap_or_default());
        self.pass_to_client(&rest, cx)
    }

    fn client_to_server(&mut self, cx: &mut Context<'_>, scratch: &mut [u8]) -> Moved {
        if let Some(link) = &mut self.link {
            // A broken connection shows itself when it is read; its last words are worth waiting for.
            match flush(&mut link.stream, &mut link.to_server, cx) {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(_) => link.to_server.clear(),
            }
        }
        if self.is_waiting() || self.must_flush(cx) {
            return Ok(false);
        }
        if self.presence == Presence::Ended {
            return self.client_ended(cx);
        }
        if self.held_is == Held::Blocked && !self.held.is_empty() {
            let held = self.held.split().freeze();
            return self.take_from_client(&held, cx);
        }
        if self.session.must_wait() || (!self.session.is_open() && !self.to_client.is_empty()) {
            return Ok(false);
        }
        if let Some(moved) = self.read_long(cx) {
            return moved;
        }
        let kept = self.held.len();
        let Some(free) = keep_front(scratch, &self.held) else { return Ok(false) };
        let n = match poll_read(&mut self.client, cx, free) {
            Poll::Pending => return Ok(false),
            Poll::Ready(Ok(0)) => return self.client_ended(cx),
            Poll::Ready(Err(_)) => return Err(Stop::ClientGone),
            Poll::Ready(Ok(n)) => n,
        };
        self.last_heard = Instant::now();
        self.held.clear();
        self.take_from_client(scratch.get(..kept + n).unwrap_or_default(), cx)?;
        Ok(true)
    }

    /// Client bytes, beginning at a message or in the middle of one that is being forwarded.
    fn take_from_client(&mut self, data: &[u8], cx: &mut Context<'_>) -> Moved {
        let mut data = data;
        if self.drop_client > 0 {
            let n = data.len().min(self.drop_client as usize);
            self.drop_client -= n as u32;
            data.advance(n);
        }
        if data.is_empty() {
            self.hold(data, Held::Partial);
            return Ok(true);
        }
        if !self.session.is_open() {
            return self.answer(data);
        }
        if self.client_scanner.at_boundary() && self.session.is_quiet() {
            data = self.skip_ignored(data)?;
        }
        let was_inside = self.ticket.is_inside() || self.session.is_streaming();
        let is_idle = !was_inside || self.is_settled;
        if is_idle {
            match data.first() {
                None => {
                    self.hold(data, Held::Partial);
                    return Ok(true);
                }
                Some(b'X') => return Err(Stop::ClientGone),
                _ if data.len() < 5 || self.is_part_of_long(data) => {
                    self.hold(data, Held::Partial);
                    return Ok(true);
                }
                _ => {}
            }
        }
        if !was_inside {
            if self.link.is_none() && self.member.is_some() {
                let borrowed = self.borrow_server();
                if !matches!(borrowed, Ok(true)) {
                    self.hold(data, Held::Blocked);
                    return borrowed;
                }
            }
            if !self.ticket.enter(self.side) || !self.may_use_link() {
                self.ticket.leave();
                self.hold(data, Held::Blocked);
                return Err(Stop::Wants);
            }
            if self.shared.losses.are_recent()
                && let Some(stop) = self.look_before()
            {
                self.ticket.leave();
                self.hold(data, Held::Blocked);
                return Err(stop);
            }
        }
        if is_idle {
            self.handle.set_doing(Doing::Active);
            self.began = self.last_heard;
        }
        self.pass_to_server(data, !was_inside, cx)
    }

    fn pass_to_server(&mut self, data: &[u8], first: bool, cx: &mut Context<'_>) -> Moved {
        let draining = self.shared.gate.is_closed(self.side) || self.has_had_its_share();
        let between = |session: &Session, scanner: &Scanner| {
            draining && scanner.at_boundary() && session.stands_between_batches()
        };
        if between(&self.session, &self.client_scanner) {
            self.hold(data, Held::Blocked);
            return Ok(false);
        }
        let session = &mut self.session;
        let mut edits = Edits::default();
        let (mut waits, mut ended) = (false, false);
        // Where the last message ends that may be passed on, should the next one be none.
        let mut good = data.len().min(self.client_scanner.remaining() as usize);
        let scanned = match &self.member {
            None => self.client_scanner.scan(data, |seen| {
                if session.ignores(&seen) || session.must_settle() {
                    waits = session.must_settle();
                    return Flow::StopBefore;
                }
                let ends = session.forwarded(&seen);
                good = seen.end.unwrap_or(good);
                if ends && draining { Flow::StopAfter } else { Flow::Pass }
            }),
            Some(member) => self.client_scanner.scan(data, |seen| {
                if seen.tag == b'X' {
                    // The connection outlives its client.
                    ended = true;
                    return Flow::StopBefore;
                }
                if session.ignores(&seen) {
                    return Flow::StopBefore;
                }
                if session.must_settle() || session.must_wait_for_answers(&seen) {
                    waits = true;
                    return Flow::StopBefore;
                }
                let ends = session.forwarded_pooled(&seen, &member.lender().texts, &mut edits);
                good = seen.end.unwrap_or(good);
                if ends && draining { Flow::StopAfter } else { Flow::Pass }
            }),
        };
        let (at, end) = match scanned {
            Ok(at) => (at, at - self.client_scanner.unshown()),
            Err(error) if good == 0 && !session.will_answer() => {
                return Err(Stop::ClientGarbage(error));
            }
            // A server answers what came before such a message, and ends the session then.
            Err(_) => {
                self.client_scanner.reset();
                waits = true;
                (good, good)
            }
        };
        if end == data.len() {
            self.hold(b"", Held::Partial);
        } else {
            let rest = data.get(end..).unwrap_or_default();
            let stopped = at < data.len();
            self.hold(rest, if stopped { Held::Blocked } else { Held::Partial });
            if !stopped {
                self.client_scanner.reset();
            }
        }
        if end == 0 && first {
            // Not even one message yet.
            self.ticket.leave();
            self.handle.set_doing(Doing::Idle);
            return Ok(true);
        }
        if waits && end == 0 {
            return Ok(false);
        }
        if end > 0 {
            self.is_settled = false;
        }
        let pass = data.get(..end).unwrap_or_default();
        let may_keep = (first || !self.kept.is_empty())
            && self.kept.len() + pass.len() <= MAX_KEPT_BYTES
            && self.client_scanner.at_boundary()
            && (self.session.is_harmless() || self.may_reread());
        match may_keep {
            true => self.kept.extend_from_slice(pass),
            false => self.kept.clear(),
        }
        let Some(link) = &mut self.link else { return Err(Stop::ServerLost(None)) };
        self.shared.metrics.bytes_in.fetch_add(pass.len() as u64, Relaxed);
        discard::reader_finds_out(if edits.is_empty() {
            write(&mut link.stream, &mut link.to_server, pass, cx)
        } else {
            edits.apply(pass, &mut link.to_server);
            flush(&mut link.stream, &mut link.to_server, cx).map(drop)
        });
        if ended { self.client_ended(cx) } else { Ok(true) }
    }

    /// Whether what is in flight is a read that may run again on another server (docs/safety.md A9): a standby or a
    /// read-only transaction of the primary has it, so that it cannot have written.
    fn may_reread(&self) -> bool {
        let Some(link) = self.link.as_ref().filter(|_| !self.said_again) else { return false };
        let on_standby = link.rereads && self.session.is_on_standby();
        let read_only = link.leading
            && self.member.is_none()
            && self.shared.settings().failover.reruns == Reruns::Reads
            && self.session.is_read_only_by_default();
        (on_standby || read_only) && self.session.is_single_batch()
    }

    /// Whether the session stands between transactions, to the byte.
    pub fn is_quiet(&self) -> bool {
        self.session.is_quiet()
            && self.client_scanner.at_boundary()
            && self.link.as_ref().is_none_or(|link| link.stands_still())
    }

    /// Whether the server connection is there and belongs to whoever should serve now.
    pub fn may_use_link(&mut self) -> bool {
        let generation = self.shared.generation();
        let Some(link) = &self.link else { return false };
        if link.generation == generation {
            return true;
        }
        let fits = self.shared.is_current(link) && !self.may_change();
        let Some(link) = &mut self.link else { return false };
        if fits {
            link.generation = generation;
        }
        fits
    }

    /// Whether a connection that suits it better can be had, and nothing keeps it on this one.
    fn may_change(&self) -> bool {
        // Nobody can listen on a standby.
        let free = self.session.pinned().is_none() && !self.session.listens();
        let returns = self.link.as_ref().is_some_and(|link| self.shared.may_change(link));
        returns && free && self.is_quiet()
    }

    fn count_errors(&mut self) {
        for verdict in self.session.take_errors() {
            self.shared.metrics.error(verdict.sqlstate());
        }
    }
}
