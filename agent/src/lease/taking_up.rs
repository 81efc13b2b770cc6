//! Keeps a leadership over a restart of the agent, over an outage of the store, and over a release that
//! the store refused; and what gives a key back that nobody here may rest on.

use kornak_cluster::{Epoch, Moment};
use kornak_dcs::lease::leader_checks;
use kornak_dcs::{LeaseId, Op, Txn};
use std::time::Duration;
use tracing::{info, warn};

use super::{ClaimError, Held, Keeper};

impl Keeper {
    /// While the store is away: every member has confirmed this leader, so it may stay until then.
    ///
    /// Without the gate, which a renewal may hold for as long as the store does not answer. The guard is armed
    /// first; then the deadline of what is held *now* is moved, if that is the same leadership on the same lease.
    pub async fn extend_by_failsafe(&self, until: Moment) {
        let (held, generation) = self.shown();
        let Some(held) = held.filter(|held| until > held.until) else { return };
        if !self.is_unfenced()
            && let Err(error) = self.arm(until).await
        {
            warn!(
                error = &error as &dyn std::error::Error,
                "lease could not be extended by failsafe mode"
            );
            return;
        }
        self.inner.held.send_if_modified(|shown| match shown {
            Some(now)
                if now.lease == held.lease
                    && until > now.until
                    && self.generation() == generation =>
            {
                now.until = until;
                true
            }
            _ => false,
        });
    }

    /// Takes a leadership up again after a restart of the agent, if the key still hangs on the lease
    /// that this data directory remembers. Only for a server that is the primary, or was when it stopped.
    pub async fn take_up_again(&self, lease: LeaseId, epoch: Epoch) -> Result<(), ClaimError> {
        let _gate = self.inner.gate.lock().await;
        // It may have been given up, or taken up, since the look that led here.
        let (known, generation) = self.shown();
        if known.is_some() || self.inner.noted.lease() != Some(lease) {
            return Err(ClaimError::Lost);
        }
        let start = Moment::default();
        let held = Held { lease, ttl: Duration::ZERO, epoch, until: start, proven_at: start };
        self.prove(held, generation).await?;
        info!(epoch = epoch.revision.0, "leadership taken up again");
        Ok(())
    }

    /// Whether the lease is the one that this data directory remembers.
    pub fn remembers(&self, lease: LeaseId) -> bool {
        self.inner.noted.lease() == Some(lease)
    }

    /// Deletes a leader key in our name that this node may not rest on: its server is no primary, and the key
    /// is of an earlier life or of a restored store. Whoever is fit races for it then.
    pub async fn give_back(
        &self,
        lease: LeaseId,
        epoch: Epoch,
    ) -> Result<(), kornak_dcs::DcsError> {
        let _gate = self.inner.gate.lock().await;
        if self.held().is_some() || self.is_claiming() {
            return Ok(());
        }
        let key = self.inner.keys.leader();
        let mut txn = Txn::just(Op::delete(&key));
        txn.compare = leader_checks(&key, lease, epoch);
        if self.inner.store.txn(txn).await?.succeeded {
            warn!(
                epoch = epoch.revision.0,
                "leader key with our name released, because this server is no primary"
            );
            self.drop_lease(lease);
        }
        Ok(())
    }

    /// Another member leads: whatever lease is remembered is of the past.
    pub fn follows_another(&self) {
        if self.held().is_none() && !self.is_claiming() && self.inner.noted.lease().is_some() {
            self.inner.noted.forget();
        }
    }

    /// Notes `status` as it is in the store.
    pub fn wrote_status(&self, text: &str) {
        let mut status = self.inner.status.lock();
        if status.as_deref() != Some(text) {
            *status = Some(text.to_owned());
        }
    }

    /// Leaves the key to its lease, for the next agent to take up: nobody else could create one.
    pub async fn leave_to_next(&self, held: Held) {
        self.inner.noted.note(held.lease).done().await;
    }

    /// A release that was certainly not done is undone here as well. Behind the gate.
    pub(super) async fn take_back(&self, held: Held) {
        self.inner.noted.note(held.lease).done().await;
        if let Err(error) = self.prove(held, self.generation()).await {
            warn!(
                error = &error as &dyn std::error::Error,
                "leader key could not be released, it ends with its lease"
            );
        }
    }
}
