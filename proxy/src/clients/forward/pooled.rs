//! Borrowing a server connection when the client begins to speak, and giving it back when its
//! transaction is over. Without waiting: all of it happens within a poll.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use kornak_cluster::discard;
use kornak_config::proxy::PoolReset;
use kornak_protocol::error::{ErrorFields, Severity};
use kornak_protocol::frontend;
use kornak_protocol::sqlstate::SUCCESSFUL_COMPLETION;

use super::io::{poll_read, write};
use super::{Conversation, Denied, Moved, SCRATCH_BYTES, Stop};
use crate::metrics::count;
use crate::pool::Expired;
use crate::pool::link::Link;
use crate::pool::mailbox::Delivery;
use crate::pool::settled::{Returned, Settled};
use crate::registry::Doing;
use crate::session::journal::Pin;

/// A client that never stops talking keeps its connection from others for so long; then they have
/// their turn between two of its batches.
const SHARE: Duration = Duration::from_millis(50);

/// A pinned session is asked again after this long whether it still holds what pinned it; sooner if
/// it did something about it.
const EXAMINE_PAUSE: Duration = Duration::from_secs(1);

/// Texts of pooled sessions up to this length are looked at whole, for that kept back meanwhile: generated
/// INSERTs of thousands of rows fit. A longer one that is prepared by name keeps its connection.
pub const MAX_WHOLE_BYTES: u32 = 1 << 20;

/// From this length on a text is not read by way of the scratch buffer.
const MIN_LONG_BYTES: usize = 16 * 1024;

impl Conversation {
    /// Texts are shown whole from now on.
    pub fn show_whole_texts(&mut self) {
        self.client_scanner.show_whole(MAX_WHOLE_BYTES);
    }

    /// Whether the session waits for a server connection of its pool.
    #[inline]
    pub fn is_waiting(&self) -> bool {
        self.member.as_ref().is_some_and(|member| member.is_waiting)
    }

    /// Gets a server connection, if there is one at hand; otherwise it will be brought.
    pub(super) fn borrow_server(&mut self) -> Result<bool, Stop> {
        loop {
            let Some(member) = &mut self.member else { return Ok(false) };
            match member.ask() {
                // It has ended while it rested.
                Some(settled) => {
                    let mut link = settled.into_link();
                    if link.is_alive() {
                        return self.take_link(link).map(|()| true);
                    }
                }
                None => {
                    self.handle.set_doing(Doing::Held);
                    return Ok(false);
                }
            }
        }
    }

    /// Looks whether something was brought.
    #[cold]
    pub(super) fn look_at_mailbox(&mut self) -> Result<(), Stop> {
        let Some(member) = &mut self.member else { return Ok(()) };
        if let Some(ahead) = member.take_notice() {
            notice(ahead).put(&mut self.to_client);
        }
        let look = member.take_look();
        let Some(delivery) = member.delivery() else {
            return if look && self.has_hung_up() { Err(Stop::HungUp) } else { Ok(()) };
        };
        self.shared.metrics.pool_wait.record(member.since.elapsed());
        match delivery {
            Delivery::Server(settled) if self.has_hung_up() => {
                hand_over(&self.shared, settled);
                Err(Stop::HungUp)
            }
            Delivery::Server(settled) => {
                let mut link = settled.into_link();
                // Dropped, the request asks again.
                if link.is_alive() { self.take_link(link) } else { Ok(()) }
            }
            Delivery::Expired(Expired::Busy) => Err(Stop::Denied(Denied::Busy)),
            Delivery::Expired(Expired::NoServer) => Err(Stop::Denied(Denied::NoServer)),
            Delivery::Failed(error) => Err(Stop::Denied(Denied::Login(error))),
        }
    }

    fn take_link(&mut self, mut link: Box<Link>) -> Result<(), Stop> {
        self.handle.set_doing(Doing::Idle);
        let lane = self.handle.lane;
        let Some(lease) = &mut link.lease else { return Ok(()) };
        if lease.lane != lane {
            lease.lane = lane;
            if link.stream.rehome().is_err() {
                // Out of file descriptors; the connection is dropped.
                return Err(Stop::Denied(Denied::NoServer));
            }
        }
        self.side = link.side;
        self.handle.set_server(&link.node, link.target.clone());
        let fits = match &mut link.lease {
            Some(lease) => self.session.attach(&mut lease.state, &mut self.to_client),
            None => true,
        };
        self.link = Some(link);
        self.borrowed = Some(Instant::now());
        if fits { Ok(()) } else { Err(Stop::Unfit) }
    }

    /// The session stands between transactions: its connection goes back, unless something is left on
    /// it.
    pub(super) fn rest(&mut self) -> Result<(), Stop> {
        let pin = self.session.pinned();
        if self.handle.pin() != pin {
            self.handle.set_pin(pin);
        }
        match pin {
            // Before its server is asked what is set.
            _ if self.session.must_keep() && self.session.is_unfit() => Err(Stop::Unfit),
            None if self.session.must_be_asked() => Err(Stop::Examine),
            None => {
                self.examined = None;
                if self.shared.settings().pool.reset == PoolReset::Always {
                    return Err(Stop::Reset);
                }
                self.give_back();
                Ok(())
            }
            Some(pin) => {
                let due = self.session.take_doubt()
                    || self.examined.is_some_and(|when| when.elapsed() >= EXAMINE_PAUSE);
                if due && pin.can_be_examined() {
                    self.examined = Some(Instant::now());
                    return Err(Stop::Examine);
                }
                Ok(())
            }
        }
    }

    /// Whether others wait for a connection and the session has had its own for long.
    #[inline]
    pub(super) fn has_had_its_share(&self) -> bool {
        self.member.as_ref().is_some_and(|member| member.others_wait())
            && self.borrowed.is_some_and(|since| since.elapsed() > SHARE)
    }

    /// Gives the connection back, if the session stands between transactions, to the byte.
    pub fn give_back(&mut self) {
        let is_free = !self.session.must_keep();
        let link = self.link.take_if(|link| is_free && link.lease.is_some());
        let Some(link) = link else { return };
        match Returned::by(link, &mut self.session, &self.client_scanner) {
            Returned::Settled(settled) => {
                self.handle.set_server(&self.shared.nobody, None);
                hand_over(&self.shared, settled);
            }
            // Nothing pins it.
            Returned::Laden(laden) => drop(laden),
            Returned::Unsettled(link) => self.link = Some(link),
        }
    }

    /// Judges the connection of a client that has left.
    pub fn returned(&mut self, link: Box<Link>) -> Returned {
        Returned::by(link, &mut self.session, &self.client_scanner)
    }

    /// How much is missing of the long text that these bytes begin with.
    fn missing_of_long(&self, data: &[u8]) -> Option<usize> {
        let (&[tag, a, b, c, d], _) = data.split_first_chunk::<5>()?;
        let len = u32::from_be_bytes([a, b, c, d]);
        let is_long = data.len() >= MIN_LONG_BYTES && matches!(tag, b'Q' | b'P');
        if self.member.is_none() || !is_long || len > MAX_WHOLE_BYTES {
            return None;
        }
        (len as usize + 1).checked_sub(data.len()).filter(|missing| *missing > 0)
    }

    /// Whether these bytes are a part of a long text, for which no connection is borrowed yet.
    pub(super) fn is_part_of_long(&self, data: &[u8]) -> bool {
        self.missing_of_long(data).is_some()
    }

    /// Reads more of a long text, which is looked at when it is whole. `None`: there is none.
    pub(super) fn read_long(&mut self, cx: &mut Context<'_>) -> Option<Moved> {
        let missing = self.missing_of_long(&self.held)?;
        let had = self.held.len();
        self.held.resize(had + missing.min(SCRATCH_BYTES), 0);
        let free = self.held.get_mut(had..).unwrap_or_default();
        let read = poll_read(&mut self.client, cx, free);
        let n = match &read {
            Poll::Ready(Ok(n)) => *n,
            _ => 0,
        };
        self.held.truncate(had + n);
        Some(match read {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(0)) => return Some(self.client_ended(cx)),
            Poll::Ready(Err(_)) => Err(Stop::ClientGone),
            Poll::Ready(Ok(n)) => {
                self.last_heard = Instant::now();
                if n < missing {
                    return Some(Ok(true));
                }
                let held = self.held.split().freeze();
                self.take_from_client(&held, cx)
            }
        })
    }

    /// Whether an endless batch must be answered before more of it is forwarded.
    pub(super) fn must_flush(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.session.must_flush() {
            self.flushed = false;
            return false;
        }
        if let Some(link) = &mut self.link
            && !std::mem::replace(&mut self.flushed, true)
        {
            let mut flush = bytes::BytesMut::new();
            frontend::put_flush(&mut flush);
            // An error shows itself when the connection is read.
            discard::reader_finds_out(write(&mut link.stream, &mut link.to_server, &flush, cx));
        }
        true
    }
}

/// Gives a connection that is fit for the next client to the pool, as soon as no cancel request can
/// reach it any more that was meant for the last one.
pub fn hand_over(shared: &Arc<crate::shared::Shared>, settled: Settled) {
    let link = settled.link();
    let is_current = link.generation == shared.generation() || shared.is_current(link);
    if !is_current || shared.may_change(link) {
        return;
    }
    match link.target.clone().filter(|target| target.under_way.is_any()) {
        None => shared.lender.release(settled),
        Some(target) => {
            let shared = Arc::clone(shared);
            tokio::task::spawn_local(async move {
                if target.under_way.arrived().await {
                    shared.lender.release(settled);
                } else {
                    count(&shared.metrics.pool_doubtful);
                }
            });
        }
    }
}

fn notice(ahead: u32) -> ErrorFields {
    ErrorFields::new(
        Severity::Notice,
        SUCCESSFUL_COMPLETION,
        format!("all server connections are busy, {ahead} clients are in front of this one"),
    )
}

impl Pin {
    /// Whether a server can be asked for it.
    pub fn can_be_examined(self) -> bool {
        matches!(
            self,
            Self::Temporary
                | Self::Advisory
                | Self::HoldCursor
                | Self::Listen
                | Self::SqlPrepare
                | Self::Setting
                | Self::Opaque
        )
    }
}
