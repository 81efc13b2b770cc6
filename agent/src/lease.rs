//! The leader key and the lease it hangs on: claimed, proven, moved and released here, and nowhere
//! else.
//!
//! A renewal that the store answers is not a proof of leadership (SAFETY scenarios A2): the key may
//! have been deleted while its lease lives. So each renewal is followed by a transaction that
//! compares the key's lease and creation with ours, in the same raft term; only then the deadline
//! moves, and it is counted from the moment the renewal was *sent*. The guard is told the new
//! deadline, and has acknowledged it, before anybody may rely on it.
//!
//! The keeper's task runs apart from the agent's loop, so a slow step never costs a renewal.
//! Not here: what a leader does, and when it should claim or release.

mod inheriting;
mod noted;
mod releasing;
mod taking_up;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kornak_cluster::{Epoch, Moment, RaftTerm, Revision};
use kornak_dcs::keys::Keys;
use kornak_dcs::lease::{Unproven, fence_at, leader_checks, prove};
use kornak_dcs::{Compare, Dcs, DcsError, LeaseId, Op, Txn};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::guard::{Guard, GuardError};
use crate::ha::Lease;
use crate::machine::Machine;

/// Renewals in a row, each with its own proof, before an election that does not end counts as a failure.
const PROOFS: usize = 3;

/// Between two tries while renewals fail.
const RETRY: Duration = Duration::from_millis(500);

/// Counts how often leadership was let go or lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Generation(u64);

/// A leadership that is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub lease: LeaseId,
    /// As granted by the store.
    pub ttl: Duration,
    pub epoch: Epoch,
    /// The server must not accept writes after this.
    pub until: Moment,
    /// When the last proven renewal was sent.
    pub proven_at: Moment,
}

/// The result of moving the key to another lease.
#[derive(Debug)]
enum Moved {
    Done,
    /// Certainly not: it hangs where it did.
    NotDone(DcsError),
    KeyGone,
    Unknown,
}

/// Why the leader key was not claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error("another node was faster, or what was compared has changed")]
    Lost,
    #[error("the guard could not be armed")]
    Guard(#[source] GuardError),
    #[error("claim the leader key")]
    Store(#[source] DcsError),
    #[error("the lease ran out before it could be used")]
    TooLate,
    #[error("the store elects its leader again and again, the lease could not be proven")]
    Unproven,
}

/// Holds the leader key, or not.
#[derive(Debug, Clone)]
pub struct Keeper {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    me: String,
    machine: Machine,
    store: Arc<dyn Dcs>,
    keys: Keys,
    guard: Arc<dyn Guard>,
    margin: Duration,
    /// Renewals are no further apart.
    renews_every: Option<Duration>,
    /// Remembers the lease over a restart of the agent.
    noted: noted::Noted,
    /// `status` as it was last written here: a release writes it once more, so that a store that takes no
    /// writes refuses the release, too.
    status: parking_lot::Mutex<Option<String>>,
    /// Serializes operations on the key.
    gate: Mutex<()>,
    /// Grows when leadership is let go or lost: what began before may not publish it again.
    generation: AtomicU64,
    held: watch::Sender<Option<Held>>,
    /// A claim whose outcome is not known yet.
    claiming: watch::Sender<bool>,
    /// Maintenance mode: the guard is not told deadlines. The store says so in `unfenced`.
    unfenced: AtomicBool,
    /// The last move of the key that may have been done: from this lease to that one. Who lets go meanwhile knows
    /// the first alone.
    moved: parking_lot::Mutex<Option<(LeaseId, LeaseId)>>,
    /// A lease granted ahead of a take-over, with the moment its grant was sent.
    ahead: Mutex<Option<Ahead>>,
}

#[derive(Debug, Clone, Copy)]
struct Ahead {
    lease: LeaseId,
    ttl: Duration,
    sent: Moment,
    raft_term: RaftTerm,
}

impl Keeper {
    /// `file` lies beside the data directory: only who has this data may take the lease up again.
    pub fn new(
        me: &str,
        machine: Machine,
        store: Arc<dyn Dcs>,
        keys: Keys,
        guard: Arc<dyn Guard>,
        margin: Duration,
        file: PathBuf,
    ) -> Self {
        let inner = Inner {
            me: me.to_owned(),
            store,
            keys,
            guard,
            margin,
            renews_every: None,
            noted: noted::Noted::new(file, machine.clone()),
            status: parking_lot::Mutex::default(),
            machine,
            gate: Mutex::new(()),
            generation: AtomicU64::new(0),
            held: watch::Sender::new(None),
            claiming: watch::Sender::new(false),
            unfenced: AtomicBool::new(false),
            moved: parking_lot::Mutex::default(),
            ahead: Mutex::new(None),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Renews at least so often. For a keeper that nobody has a copy of yet.
    #[must_use]
    pub fn renewing(mut self, every: Option<Duration>) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.renews_every = every;
        }
        self
    }

    /// The leadership that is held now.
    pub fn held(&self) -> Option<Held> {
        *self.inner.held.borrow()
    }

    /// As the decision sees it.
    pub fn fact(&self) -> Lease {
        match self.held() {
            Some(held) => Lease::Mine { epoch: held.epoch, until: held.until },
            None => Lease::None,
        }
    }

    /// Follows what is held.
    pub fn subscribe(&self) -> watch::Receiver<Option<Held>> {
        self.inner.held.subscribe()
    }

    /// Whether the guard is out of service for maintenance.
    pub fn is_unfenced(&self) -> bool {
        self.inner.unfenced.load(Ordering::Relaxed)
    }

    /// Takes the guard out of service. The store must name this member in `unfenced` before.
    pub async fn unfence(&self) -> Result<(), GuardError> {
        let _gate = self.inner.gate.lock().await;
        self.inner.guard.disarm().await?;
        // Not before: renewals arm a guard that may still be in service.
        self.inner.unfenced.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Puts the guard into service again; on success it is armed with a lease that was proven now.
    pub async fn fence(&self) -> Result<(), ClaimError> {
        self.inner.unfenced.store(false, Ordering::Relaxed);
        self.renew().await
    }

    /// Whether an attempt to create the key is open: then no other leader may be promised to stay.
    pub fn is_claiming(&self) -> bool {
        *self.inner.claiming.borrow()
    }

    /// Grants a lease that a later [`Keeper::claim`] uses, so that a take-over saves a round trip.
    pub async fn grant_ahead(&self, ttl: Duration) {
        let mut ahead = self.inner.ahead.lock().await;
        if ahead.is_some_and(|ahead| self.inner.machine.now().since(ahead.sent) < ahead.ttl / 3) {
            return;
        }
        let sent = self.inner.machine.now();
        let renewed = match *ahead {
            Some(old) => match self.inner.store.keep_alive(old.lease).await {
                Ok(renewed) => {
                    Ok(Ahead { sent, ttl: renewed.ttl, raft_term: renewed.raft_term, ..old })
                }
                Err(error) => Err(error),
            },
            None => self.grant(ttl).await,
        };
        match renewed {
            Ok(fresh) => *ahead = Some(fresh),
            Err(error) => {
                debug!(error = &error as &dyn std::error::Error, "no lease could be granted ahead");
                *ahead = None;
            }
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<Ahead, DcsError> {
        let sent = self.inner.machine.now();
        let granted = self.inner.store.grant(ttl).await?;
        Ok(Ahead { lease: granted.lease, ttl: granted.ttl, sent, raft_term: granted.raft_term })
    }

    /// Creates the leader key, together with `also` and only if `when` holds as well. On success the
    /// guard is armed. `own_leases` tells, given our lease, which further writes go along.
    pub async fn claim(
        &self,
        store_id: u64,
        ttl: Duration,
        when: Vec<Compare>,
        also: impl FnOnce(LeaseId) -> Vec<Op>,
    ) -> Result<Epoch, ClaimError> {
        let _gate = self.inner.gate.lock().await;
        self.inner.claiming.send_replace(true);
        let result = self.claim_gated(store_id, ttl, when, also).await;
        self.inner.claiming.send_replace(false);
        result
    }

    async fn claim_gated(
        &self,
        store_id: u64,
        ttl: Duration,
        when: Vec<Compare>,
        also: impl FnOnce(LeaseId) -> Vec<Op>,
    ) -> Result<Epoch, ClaimError> {
        let (_, generation) = self.shown();
        self.leave_nothing().await.map_err(ClaimError::Guard)?;
        let ahead = self.inner.ahead.lock().await.take();
        let usable = ahead.filter(|a| leaves_time(self.inner.machine.now().since(a.sent), a.ttl));
        let base = match usable {
            Some(ahead) => ahead,
            None => self.grant(ttl).await.map_err(ClaimError::Store)?,
        };
        let noting = self.inner.noted.note(base.lease);
        let key = self.inner.keys.leader();
        let mut txn =
            Txn::just(Op::put_leased(&key, &self.inner.me, base.lease)).when(Compare::absent(&key));
        txn.compare.extend(when);
        txn.then.extend(also(base.lease));
        let (revision, raft_term) = match self.inner.store.txn(txn).await {
            Ok(outcome) if outcome.succeeded => (outcome.revision, outcome.raft_term),
            Ok(_) => {
                self.drop_lease(base.lease);
                return Err(ClaimError::Lost);
            }
            Err(error) if error.outcome_is_unknown() => {
                self.find_out(base.lease).await.map_err(ClaimError::Store)?.ok_or_else(|| {
                    self.drop_lease(base.lease);
                    ClaimError::Lost
                })?
            }
            Err(error) => {
                self.drop_lease(base.lease);
                return Err(ClaimError::Store(error));
            }
        };
        noting.done().await;
        let epoch = Epoch { store: store_id, revision };
        let until = fence_at(base.sent, base.ttl, self.inner.margin);
        let held = Held { lease: base.lease, ttl: base.ttl, epoch, until, proven_at: base.sent };
        if raft_term == base.raft_term {
            self.arm_and_publish(held, generation).await?;
        } else {
            // Another raft leader may count the lease from its own election: prove it anew.
            self.prove(held, generation).await?;
        }
        if self.held().is_none() {
            return Err(ClaimError::TooLate);
        }
        info!(epoch = revision.0, "leader key claimed");
        Ok(epoch)
    }

    /// After a claim without an answer: reads who holds the key until the store says.
    async fn find_out(&self, lease: LeaseId) -> Result<Option<(Revision, RaftTerm)>, DcsError> {
        let key = self.inner.keys.leader();
        let view = self.inner.store.range(&key).await?;
        let found = view.get(&key).filter(|found| found.lease == lease);
        Ok(found.map(|found| (found.create_revision, view.raft_term)))
    }

    fn generation(&self) -> Generation {
        Generation(self.inner.generation.load(Ordering::SeqCst))
    }

    /// The leadership that is held, and its generation.
    fn shown(&self) -> (Option<Held>, Generation) {
        // Both change behind the lock of the one.
        let held = self.inner.held.borrow();
        (*held, self.generation())
    }

    /// Nothing is held from now on, and what began before does not bring it back.
    fn hold_nothing(&self) -> Option<Held> {
        let mut held = None;
        self.inner.held.send_modify(|shown| {
            self.inner.generation.fetch_add(1, Ordering::SeqCst);
            held = shown.take();
        });
        held
    }

    /// Arms the guard; one that has fired is put into service again, which it allows only with no
    /// process of the server left.
    async fn arm(&self, until: Moment) -> Result<(), GuardError> {
        match self.inner.guard.arm(until).await {
            // Any other failure is none of the fence's: a primary must not be without it in between.
            Err(GuardError::Refused { why, .. }) if why == crate::guard::HAS_FIRED => {
                self.inner.guard.disarm().await?;
                self.inner.guard.arm(until).await
            }
            answer => answer,
        }
    }

    async fn arm_and_publish(&self, held: Held, generation: Generation) -> Result<(), ClaimError> {
        if self.inner.machine.now() >= held.until {
            return Err(ClaimError::TooLate);
        }
        if !self.is_unfenced() {
            self.arm(held.until).await.map_err(ClaimError::Guard)?;
        }
        self.publish(held, generation)
    }

    /// `generation`: the one in which it was proven that this is held.
    fn publish(&self, held: Held, generation: Generation) -> Result<(), ClaimError> {
        let published = self.inner.held.send_if_modified(|shown| {
            let current = self.generation() == generation;
            if current {
                *shown = Some(held);
            }
            current
        });
        if published { Ok(()) } else { Err(ClaimError::Lost) }
    }

    /// Renewals until one of them is a proof: an election between a renewal and its proof asks for another.
    /// `generation`: the one in which `held` was seen; what was let go meanwhile is not proven any further.
    async fn prove(&self, held: Held, generation: Generation) -> Result<(), ClaimError> {
        for _ in 0..PROOFS {
            if self.generation() != generation {
                return Err(ClaimError::Lost);
            }
            match self.prove_once(held, generation).await {
                Err(ClaimError::Unproven) => {}
                answer => return answer,
            }
        }
        Err(ClaimError::Unproven)
    }

    async fn prove_once(&self, held: Held, generation: Generation) -> Result<(), ClaimError> {
        let sent = self.inner.machine.now();
        let renewed = match self.inner.store.keep_alive(held.lease).await {
            Ok(renewed) => renewed,
            Err(DcsError::LeaseLost) => return Err(self.lost("the lease has ended").await),
            Err(error) => return Err(ClaimError::Store(error)),
        };
        let key = self.inner.keys.leader();
        let compare = leader_checks(&key, held.lease, held.epoch);
        let checked = self.inner.store.txn(Txn { compare, ..Txn::default() }).await;
        let checked = checked.map_err(ClaimError::Store)?;
        match prove(sent, renewed, &checked, self.inner.margin, Some(held.until)) {
            Ok(until) => {
                let held = Held { ttl: renewed.ttl, until, proven_at: sent, ..held };
                self.arm_and_publish(held, generation).await
            }
            Err(Unproven::KeyLost) => Err(self.lost("the leader key is not ours").await),
            Err(Unproven::NoTime) => Err(self.lost("the lease has ended").await),
            Err(unproven @ Unproven::TermChanged { .. }) => {
                debug!(why = %unproven, "renewal did not prove the lease");
                Err(ClaimError::Unproven)
            }
        }
    }

    async fn lost(&self, why: &'static str) -> ClaimError {
        if self.hold_nothing().is_some() {
            warn!(why, "leadership lost");
        }
        self.leave_nothing_if_possible().await;
        ClaimError::Lost
    }

    /// Renews and proves once, now.
    pub async fn renew(&self) -> Result<(), ClaimError> {
        let _gate = self.inner.gate.lock().await;
        match self.shown() {
            (Some(held), generation) => self.prove(held, generation).await,
            (None, _) => Err(ClaimError::Lost),
        }
    }

    /// Moves the key to a lease of another length, without giving the leadership up: a short one
    /// before a planned stop, so that dying in the middle costs seconds; the regular one after it.
    pub async fn move_to(&self, ttl: Duration) -> Result<(), ClaimError> {
        let _gate = self.inner.gate.lock().await;
        let (Some(held), generation) = self.shown() else { return Err(ClaimError::Lost) };
        if held.ttl == ttl {
            return Ok(());
        }
        let base = self.grant(ttl).await.map_err(ClaimError::Store)?;
        let until = fence_at(base.sent, base.ttl, self.inner.margin);
        if until < held.until {
            // The guard must know the shorter deadline before the store does.
            self.arm(until).await.map_err(ClaimError::Guard)?;
        }
        let noting = self.inner.noted.note(base.lease);
        *self.inner.moved.lock() = Some((held.lease, base.lease));
        match self.move_key(held, base.lease, until.min(held.until)).await {
            Moved::Done => {
                noting.done().await;
                self.drop_lease(held.lease);
            }
            Moved::NotDone(error) => {
                self.inner.noted.note(held.lease).done().await;
                self.drop_lease(base.lease);
                self.arm_and_publish(held, generation).await?;
                return Err(ClaimError::Store(error));
            }
            Moved::KeyGone => {
                self.drop_lease(base.lease);
                return Err(self.lost("the leader key is not ours").await);
            }
            Moved::Unknown => {
                // The guard knows the nearer of both deadlines. Neither lease is ended before its time,
                // for the key may hang on either.
                self.inner.noted.forget();
                return Err(self.lost("it is not known on which lease the leader key hangs").await);
            }
        }
        let held = Held { lease: base.lease, ttl: base.ttl, until, proven_at: base.sent, ..held };
        self.arm_and_publish(held, generation).await
    }

    /// Hangs the key on another lease. Without an answer it is read and asked again until it is known or
    /// `deadline` is near: a read that does not show the move proves nothing, for the request may still
    /// be done; a second request that is done, or refused, does.
    async fn move_key(&self, held: Held, to: LeaseId, deadline: Moment) -> Moved {
        let key = self.inner.keys.leader();
        let mut txn = Txn::just(Op::put_leased(&key, &self.inner.me, to));
        txn.compare = leader_checks(&key, held.lease, held.epoch);
        let mut may_be_done = false;
        loop {
            let refused = match self.inner.store.txn(txn.clone()).await {
                Ok(outcome) if outcome.succeeded => return Moved::Done,
                Ok(_) if !may_be_done => return Moved::KeyGone,
                Ok(_) => true,
                Err(error) if !may_be_done && !error.outcome_is_unknown() => {
                    return Moved::NotDone(error);
                }
                Err(error) => {
                    debug!(
                        error = &error as &dyn std::error::Error,
                        "move of the leader key to another lease got no answer"
                    );
                    may_be_done = true;
                    false
                }
            };
            match self.find_out(to).await {
                Ok(Some(_)) => return Moved::Done,
                Ok(None) if refused => return Moved::KeyGone,
                Ok(None) | Err(_) => {}
            }
            if self.inner.machine.now() + RETRY >= deadline {
                return Moved::Unknown;
            }
            self.inner.machine.sleep(RETRY).await;
        }
    }

    /// Ends a lease. It is forgotten first: the revocation may be done seconds later, and must not end
    /// a leadership that was taken up again meanwhile.
    fn drop_lease(&self, lease: LeaseId) {
        if self.inner.noted.lease() == Some(lease) {
            self.inner.noted.forget();
        }
        let store = Arc::clone(&self.inner.store);
        // Nobody waits for it: a lease that is not revoked expires by itself.
        self.inner.machine.spawn(async move {
            if let Err(error) = store.revoke(lease).await {
                let error = &error as &dyn std::error::Error;
                debug!(error, %lease, "lease could not be revoked");
            }
        });
    }

    fn renewal_pause(&self, held: Held) -> Duration {
        let regular = renewed_every(held.ttl);
        let every = self.inner.renews_every.map_or(regular, |most| most.min(regular));
        every.saturating_sub(self.inner.machine.since(held.proven_at))
    }

    /// Renews for as long as something is held; runs until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let mut changes = self.subscribe();
        loop {
            let held = *changes.borrow_and_update();
            let pause = match held {
                None => {
                    tokio::select! {
                        biased;
                        () = stop.cancelled() => return,
                        _ = changes.changed() => continue,
                    }
                }
                Some(held) => self.renewal_pause(held),
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.inner.machine.sleep(pause) => {}
                changed = changes.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            }
            if let Err(error) = self.renew().await
                && !matches!(error, ClaimError::Lost)
            {
                warn!(error = &error as &dyn std::error::Error, "lease could not be renewed");
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = self.inner.machine.sleep(RETRY) => {}
                }
            }
        }
    }
}

/// A sixth of the lease, so that several renewals may fail before the deadline.
pub fn renewed_every(ttl: Duration) -> Duration {
    (ttl / 6).clamp(Duration::from_millis(300), Duration::from_secs(5))
}

/// Whether a lease that was granted ahead leaves time for a promotion: the guard stops a server before
/// the lease ends, by its margin and the time that a stop in order may take, and a new one is granted
/// within milliseconds.
fn leaves_time(age: Duration, ttl: Duration) -> bool {
    age < ttl / 5
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_was_granted_long_ago_is_not_promoted_on() {
        let ttl = Duration::from_secs(5);
        assert!(leaves_time(Duration::from_millis(400), ttl));
        assert!(!leaves_time(Duration::from_millis(2200), ttl), "the guard would fire at once");
    }
}
