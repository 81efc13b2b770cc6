//! The mailbox of a client that waits for a server connection: a delivery wakes the client's task.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::Waker;

use parking_lot::Mutex;

use super::Expired;
use super::settled::Settled;
use crate::net::backend::DialError;

/// An item that is put into the mailbox of a waiting client.
#[derive(Debug)]
pub enum Delivery {
    /// A connection; it may have been registered on another thread.
    Server(Settled),
    /// The client has waited as long as it may.
    Expired(Expired),
    /// The login was refused.
    Failed(Arc<DialError>),
}

/// The mailbox of one client.
#[derive(Debug)]
pub struct Mailbox {
    delivery: Mutex<Option<Delivery>>,
    /// One more than the number of clients in front, if the client is to be told; 0: nothing to tell.
    notice: AtomicU32,
    /// The session has to see whether its client is still connected.
    look: AtomicBool,
    waker: Waker,
}

impl Mailbox {
    /// An empty mailbox; `waker` wakes the task of its session.
    pub fn new(waker: Waker) -> Self {
        Self {
            delivery: Mutex::new(None),
            notice: AtomicU32::new(0),
            look: AtomicBool::new(false),
            waker,
        }
    }

    /// Hands over a connection or a refusal, and wakes the client.
    pub fn deliver(&self, delivery: Delivery) {
        *self.delivery.lock() = Some(delivery);
        self.waker.wake_by_ref();
    }

    /// Takes what was delivered.
    pub fn take(&self) -> Option<Delivery> {
        self.delivery.lock().take()
    }

    /// Asks the session to see whether its client is still connected.
    pub fn look(&self) {
        self.look.store(true, Ordering::Release);
        self.waker.wake_by_ref();
    }

    /// Whether the session was asked to see whether its client is connected; resets the request.
    pub fn take_look(&self) -> bool {
        self.look.load(Ordering::Acquire) && self.look.swap(false, Ordering::AcqRel)
    }

    /// Has the client told that `ahead` clients are in front of it.
    pub fn notice(&self, ahead: usize) {
        self.notice.store(ahead as u32 + 1, Ordering::Release);
        self.waker.wake_by_ref();
    }

    /// The number of clients in front of this one, if the client was not told yet.
    pub fn take_notice(&self) -> Option<u32> {
        match self.notice.load(Ordering::Acquire) {
            0 => None,
            _ => self.notice.swap(0, Ordering::AcqRel).checked_sub(1),
        }
    }
}
