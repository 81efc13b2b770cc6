//! The member key: this node's account of itself, kept in the store on a lease of its own.
//!
//! Apart from the leader key's lease, so that neither keeps the other alive. A key that vanishes
//! while its lease lives (an operator's `remove`) is written again.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{Member, Moment, Revision};
use kornak_dcs::keys::Keys;
use kornak_dcs::{Dcs, DcsError, LeaseId, Op, Txn, View};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::machine::Machine;

/// The account that is to be published; the driver replaces it after every look.
#[derive(Debug, Clone, PartialEq)]
pub struct Account {
    pub member: Member,
    /// Lifetime of the member key.
    pub ttl: Duration,
}

struct Publisher {
    machine: Machine,
    store: Arc<dyn Dcs>,
    key: String,
    lease: Option<LeaseId>,
    ttl: Duration,
    renewed_at: Moment,
    written: Option<String>,
    /// Revision of the last write.
    written_at: Revision,
    /// The store's id and revision as last seen.
    seen: (u64, Revision),
}

/// Keeps the member key equal to `account` until `stop`, then takes it away if `account` says that
/// the server is stopped.
pub async fn run(
    machine: Machine,
    store: Arc<dyn Dcs>,
    keys: Keys,
    name: String,
    mut account: watch::Receiver<Option<Account>>,
    mut view: watch::Receiver<Arc<View>>,
    stop: CancellationToken,
) {
    let mut publisher = Publisher {
        store,
        key: keys.member(&name),
        lease: None,
        ttl: Duration::ZERO,
        renewed_at: machine.now(),
        machine: machine.clone(),
        written: None,
        written_at: Revision::NONE,
        seen: (0, Revision::NONE),
    };
    let mut failing = false;
    loop {
        let wanted = account.borrow_and_update().clone();
        let mut pause = Duration::from_secs(5);
        if let Some(wanted) = wanted {
            pause = publisher.pause();
            let seen = Arc::clone(&view.borrow_and_update());
            match publisher.publish(&wanted, &seen).await {
                Ok(()) => failing = false,
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        warn!(
                            error = &error as &dyn std::error::Error,
                            "member key could not be written"
                        );
                    }
                    pause = Duration::from_millis(500);
                }
            }
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            changed = account.changed() => if changed.is_err() { break },
            changed = view.changed(), if !failing => if changed.is_err() { break },
            () = machine.sleep(pause) => {}
        }
        if failing {
            // A store that refuses is not asked in a tight loop.
            machine.sleep(Duration::from_millis(200)).await;
        }
    }
    let last = account.borrow().clone();
    publisher.last_word(last).await;
}

impl Publisher {
    fn pause(&self) -> Duration {
        (self.ttl / 4).clamp(Duration::from_millis(300), Duration::from_secs(5))
    }

    async fn publish(&mut self, wanted: &Account, view: &View) -> Result<(), DcsError> {
        if view.reach == kornak_dcs::Reach::Live {
            let (store, revision) = std::mem::replace(&mut self.seen, (view.store, view.revision));
            if store != 0 && (store != view.store || view.revision < revision) {
                // Restored: neither the lease nor what was written need be there.
                self.lease = None;
            }
        }
        if self.lease.is_none() || wanted.ttl != self.ttl {
            let granted = self.store.grant(wanted.ttl).await?;
            self.lease = Some(granted.lease);
            self.ttl = wanted.ttl;
            self.renewed_at = self.machine.now();
            self.written = None;
        }
        let Some(lease) = self.lease else { return Ok(()) };
        if self.machine.since(self.renewed_at) >= self.pause() {
            match self.store.keep_alive(lease).await {
                Ok(_) => self.renewed_at = self.machine.now(),
                Err(DcsError::LeaseLost) => {
                    debug!("member key's lease ended, a new one is granted");
                    self.lease = None;
                    return Err(DcsError::LeaseLost);
                }
                Err(error) => return Err(error),
            }
        }
        let text = serde_json::to_string(&wanted.member)
            .map_err(|error| DcsError::Refused { detail: error.to_string() })?;
        let seen = view.get(&self.key);
        let vanished = self.written.is_some()
            && view.reach == kornak_dcs::Reach::Live
            && view.revision >= self.written_at
            && seen.is_none_or(|seen| {
                // A write that the store did late may have put an older account over ours.
                seen.lease != lease || self.written.as_ref() != Some(&seen.value)
            });
        if self.written.as_deref() != Some(&text) || vanished {
            let put = Txn::just(Op::put_leased(&self.key, &text, lease));
            self.written_at = self.store.txn(put).await?.revision;
            self.written = Some(text);
        }
        Ok(())
    }

    /// The key is left to its lease, so that operators see a stopped member for a while.
    async fn last_word(&mut self, wanted: Option<Account>) {
        let Some(wanted) = wanted else { return };
        let (Some(lease), Ok(text)) = (self.lease, serde_json::to_string(&wanted.member)) else {
            return;
        };
        let put = self.store.txn(Txn::just(Op::put_leased(&self.key, text, lease)));
        // A store that is away must not hold the shutdown up.
        if let Ok(Err(error)) = self.machine.timeout(Duration::from_secs(2), put).await {
            let error = &error as &dyn std::error::Error;
            debug!(error, "member key could not be updated at the end of the agent");
        }
    }
}
