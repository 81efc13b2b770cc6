//! Borrowing a server connection when the client begins to speak, and giving it back when its
//! transaction is over. Without waiting: all of it happens within a poll.

use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, Instant};

use kornak_protocol::error::{ErrorFields, Severity};
use kornak_protocol::frontend;
use kornak_protocol::sqlstate::SUCCESSFUL_COMPLETION;

use super::io::write;
use super::{Conversation, Denied, Link, Stop};
use crate::metrics::count;
use crate::pool::Expired;
use crate::pool::keeper::is_silent;
use crate::pool::seat::Delivery;
use crate::registry::Doing;
use crate::session::journal::Pin;

/// A pinned session is asked again after this long whether it still holds what pinned it; sooner if
/// it did something about it.
const EXAMINE_PAUSE: Duration = Duration::from_secs(1);

impl Conversation {
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
                Some(link) if !is_silent(&link.stream) => drop(link),
                Some(link) => return self.take_link(link).map(|()| true),
                None => {
                    self.handle.set_doing(Doing::Held);
                    return Ok(false);
                }
            }
        }
    }

    /// Looks whether something was brought.
    #[cold]
    pub(super) fn look_at_seat(&mut self) -> Result<(), Stop> {
        let Some(member) = &mut self.member else { return Ok(()) };
        if let Some(ahead) = member.take_notice() {
            notice(ahead).put(&mut self.to_client);
        }
        let Some(delivery) = member.delivery() else { return Ok(()) };
        self.shared.metrics.pool_wait.record(member.since.elapsed());
        match delivery {
            // Dropped, the request asks again.
            Delivery::Server(link) if !is_silent(&link.stream) => Ok(()),
            Delivery::Server(link) => self.take_link(link),
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
            Some(lease) => self.session.attach(lease, &mut self.to_client),
            None => true,
        };
        self.link = Some(link);
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
            None => {
                self.examined = None;
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

    /// Gives the connection back. It must be between transactions, to the byte.
    pub fn give_back(&mut self) {
        let Some(mut link) = self.link.take() else { return };
        let Some(lease) = &mut link.lease else {
            self.link = Some(link);
            return;
        };
        self.session.detach(lease);
        self.handle.set_server(&self.shared.nobody, None);
        hand_over(&self.shared, link);
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
            let _ = write(&mut link.stream, &mut link.to_server, &flush, cx);
        }
        true
    }
}

/// Gives a connection that is fit for the next client to the pool, as soon as no cancel request can
/// reach it any more that was meant for the last one.
pub fn hand_over(shared: &Arc<crate::shared::Shared>, link: Box<Link>) {
    let is_current = link.generation == shared.generation() || link.is_current(shared);
    if !link.to_server.is_empty() || !is_current || link.may_change(shared) {
        return;
    }
    match link.target.clone().filter(|target| target.under_way.is_any()) {
        None => shared.lender.release(link),
        Some(target) => {
            let shared = Arc::clone(shared);
            tokio::task::spawn_local(async move {
                if target.under_way.arrived().await {
                    shared.lender.release(link);
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
