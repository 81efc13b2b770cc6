//! A server connection as the target of cancel requests, and the requests on their way to it.
//!
//! Not here: the delivery of a request ([`crate::clients::cancel`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kornak_protocol::backend::BackendKey;
use tokio::sync::Notify;

use super::backend::Address;

/// Where a session's query can be cancelled.
#[derive(Debug)]
pub struct CancelTarget {
    pub address: Address,
    pub key: BackendKey,
    /// Cancel requests on their way to it.
    pub under_way: UnderWay,
}

impl CancelTarget {
    /// A target with no cancel request on its way.
    pub fn new(address: Address, key: BackendKey) -> Self {
        Self { address, key, under_way: UnderWay::default() }
    }

    /// Notes that a cancel request is on its way; dropping the answer notes that it has ended.
    pub fn begin(target: &Arc<Self>) -> Cancelling {
        target.under_way.count.fetch_add(1, Ordering::AcqRel);
        Cancelling { target: Arc::clone(target), delivered: false }
    }
}

/// Cancel requests on their way to a server connection: it must not change hands before they have
/// arrived, or they would cancel somebody else's query.
#[derive(Debug, Default)]
pub struct UnderWay {
    count: AtomicUsize,
    /// One of them may have been lost on the way and come at any time.
    doubtful: AtomicBool,
    none: Notify,
}

impl UnderWay {
    /// Whether there is one.
    pub fn is_any(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// Waits until all have arrived. Answers whether that is certain.
    pub async fn arrived(&self) -> bool {
        loop {
            let none = self.none.notified();
            if !self.is_any() {
                return !self.doubtful.load(Ordering::Acquire);
            }
            none.await;
        }
    }
}

/// A cancel request that is being delivered.
#[derive(Debug)]
pub struct Cancelling {
    pub target: Arc<CancelTarget>,
    /// The server has taken it.
    pub delivered: bool,
}

impl Drop for Cancelling {
    fn drop(&mut self) {
        let under_way = &self.target.under_way;
        if !self.delivered {
            under_way.doubtful.store(true, Ordering::Release);
        }
        under_way.count.fetch_sub(1, Ordering::AcqRel);
        under_way.none.notify_waiters();
    }
}
