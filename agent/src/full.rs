//! Notices that the store takes no writes any more (etcd's alarm NOSPACE): a leader key that is deleted then
//! cannot be created again by anybody.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kornak_dcs::{
    Dcs, DcsError, DcsFuture, Follow, Granted, LeaseId, Op, Remaining, Renewed, Txn, TxnOutcome,
    View,
};
use tracing::{error, info};

/// A store that remembers whether its last write was refused for lack of space.
#[derive(Debug)]
pub(crate) struct Noticing {
    store: Arc<dyn Dcs>,
    full: Arc<AtomicBool>,
}

impl Noticing {
    /// Over a store. The flag is true while it is known to be full.
    pub(crate) fn over(store: Arc<dyn Dcs>) -> (Arc<dyn Dcs>, Arc<AtomicBool>) {
        let full = Arc::<AtomicBool>::default();
        (Arc::new(Self { store, full: Arc::clone(&full) }), full)
    }

    fn note(&self, failure: Option<&DcsError>) {
        match failure {
            Some(failure @ DcsError::Full { .. }) => {
                if !self.full.swap(true, Ordering::Relaxed) {
                    error!(
                        error = failure as &dyn std::error::Error,
                        "store is full, no failover is possible until there is room: the leader keeps its key"
                    );
                }
            }
            None => {
                if self.full.swap(false, Ordering::Relaxed) {
                    info!("store takes writes again");
                }
            }
            Some(_) => {}
        }
    }
}

fn writes(txn: &Txn, outcome: &TxnOutcome) -> bool {
    let done = if outcome.succeeded { &txn.then } else { &txn.otherwise };
    done.iter().any(|op| matches!(op, Op::Put { .. }))
}

impl Dcs for Noticing {
    fn range(&self, prefix: &str) -> DcsFuture<'_, View> {
        self.store.range(prefix)
    }

    fn txn(&self, txn: Txn) -> DcsFuture<'_, TxnOutcome> {
        Box::pin(async move {
            let result = self.store.txn(txn.clone()).await;
            match &result {
                Ok(outcome) if !writes(&txn, outcome) => {}
                result => self.note(result.as_ref().err()),
            }
            result
        })
    }

    fn grant(&self, ttl: Duration) -> DcsFuture<'_, Granted> {
        Box::pin(async move {
            let result = self.store.grant(ttl).await;
            self.note(result.as_ref().err());
            result
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> DcsFuture<'_, Renewed> {
        self.store.keep_alive(lease)
    }

    fn time_to_live(&self, lease: LeaseId) -> DcsFuture<'_, Remaining> {
        self.store.time_to_live(lease)
    }

    fn revoke(&self, lease: LeaseId) -> DcsFuture<'_, ()> {
        self.store.revoke(lease)
    }

    fn follow(&self, prefix: &str) -> Follow {
        self.store.follow(prefix)
    }
}
