//! Giving the leader key up.

use kornak_dcs::lease::leader_checks;
use kornak_dcs::{Compare, DcsError, Op, Txn};
use tracing::{Instrument, info};

use super::{Held, Keeper};

impl Keeper {
    /// Holds nothing from this moment on, before the store is told: nothing may be started or proven
    /// on the strength of a leadership that is being given away.
    pub fn let_go(&self) -> Option<Held> {
        let held = self.hold_nothing();
        if held.is_some() {
            self.inner.noted.forget();
        }
        held
    }

    /// Deletes the leader key if it is ours, together with `also` and only if `when` holds. Nothing
    /// is held afterwards, whatever the answer: an unknown outcome counts as released. `Ok(false)`
    /// means that the store refused. A caller that is broken off does not break the deletion off.
    pub async fn release(&self, when: Vec<Compare>, also: Vec<Op>) -> Result<bool, DcsError> {
        let Some(held) = self.let_go() else { return Ok(true) };
        let keeper = self.clone();
        let deleting = async move { keeper.release_held(held, when, also).await };
        let deleting = self.inner.machine.spawn(deleting.in_current_span());
        let unknown = || DcsError::Unknown { detail: "the agent ends".to_owned() };
        deleting.await.unwrap_or_else(|_| Err(unknown()))
    }

    /// The second half of [`Keeper::release`], for what [`Keeper::let_go`] returned.
    pub async fn release_held(
        &self,
        held: Held,
        when: Vec<Compare>,
        also: Vec<Op>,
    ) -> Result<bool, DcsError> {
        let _gate = self.inner.gate.lock().await;
        let moved = *self.inner.moved.lock();
        let moved = moved.filter(|(from, _)| *from == held.lease).map(|(_, to)| to);
        let released = self.delete_on(held, when.clone(), also.clone()).await?;
        match moved {
            Some(lease) if !released => self.delete_on(Held { lease, ..held }, when, also).await,
            _ => Ok(released),
        }
    }

    async fn delete_on(
        &self,
        held: Held,
        when: Vec<Compare>,
        also: Vec<Op>,
    ) -> Result<bool, DcsError> {
        let key = self.inner.keys.leader();
        let mut txn = Txn::just(Op::delete(&key));
        txn.compare = leader_checks(&key, held.lease, held.epoch);
        txn.compare.extend(when);
        let writes = also.iter().any(|op| matches!(op, Op::Put { .. }));
        let again = self.inner.status.lock().clone().filter(|_| !writes);
        txn.then.extend(again.map(|status| Op::put(self.inner.keys.status(), status)));
        txn.then.extend(also);
        let outcome = match self.inner.store.txn(txn).await {
            Ok(outcome) => outcome,
            Err(error @ DcsError::Full { .. }) => {
                // Nothing was done, and a key that is gone could not be created by anybody.
                self.take_back(held).await;
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        if outcome.succeeded {
            self.drop_lease(held.lease);
            info!("leader key released");
        }
        Ok(outcome.succeeded)
    }
}
