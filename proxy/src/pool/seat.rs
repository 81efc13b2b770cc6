//! Where a client waits for a server connection: what is brought to it, and who brings it wakes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

use super::Expired;
use super::settled::Settled;
use crate::backend::DialError;
use crate::registry::Handle;

/// What a client that waits gets.
#[derive(Debug)]
pub enum Delivery {
    /// A connection; it may have been registered on another thread.
    Server(Settled),
    /// Its time is up.
    Expired(Expired),
    /// The login was refused.
    Failed(Arc<DialError>),
}

/// One client's seat.
#[derive(Debug)]
pub struct Seat {
    delivery: Mutex<Option<Delivery>>,
    /// How many are in front of it and one more, if it is to be told; 0: nothing is to be told.
    notice: AtomicU32,
    /// It is to see whether its client is still there.
    look: AtomicBool,
    handle: Arc<Handle>,
}

impl Seat {
    /// Of the session with this handle, whose task is woken.
    pub fn new(handle: Arc<Handle>) -> Self {
        Self {
            delivery: Mutex::new(None),
            notice: AtomicU32::new(0),
            look: AtomicBool::new(false),
            handle,
        }
    }

    /// Brings it.
    pub fn deliver(&self, delivery: Delivery) {
        *self.delivery.lock() = Some(delivery);
        self.handle.wake();
    }

    /// Takes what was brought.
    pub fn take(&self) -> Option<Delivery> {
        self.delivery.lock().take()
    }

    /// It is to see whether its client is still there.
    pub fn look(&self) {
        self.look.store(true, Ordering::Release);
        self.handle.wake();
    }

    /// Whether it is to.
    pub fn take_look(&self) -> bool {
        self.look.load(Ordering::Acquire) && self.look.swap(false, Ordering::AcqRel)
    }

    /// It is to be told that so many are in front of it.
    pub fn notice(&self, ahead: usize) {
        self.notice.store(ahead as u32 + 1, Ordering::Release);
        self.handle.wake();
    }

    /// How many are in front of it, if it was not told yet.
    pub fn take_notice(&self) -> Option<u32> {
        match self.notice.load(Ordering::Acquire) {
            0 => None,
            _ => self.notice.swap(0, Ordering::AcqRel).checked_sub(1),
        }
    }
}
