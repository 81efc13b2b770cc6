//! The leader key and its lease, by the rules of `kornak_agent::lease` and with the store's own
//! arithmetic: claimed, proven, moved, released.

use std::rc::Rc;
use std::time::Duration;

use kornak_cluster::{Epoch, Moment};
use kornak_dcs::lease::{Unproven, fence_at, leader_checks, prove as judge};
use kornak_dcs::{Compare, DcsError, LeaseId, Op, Txn};

use super::Agent;
use crate::sim::guard;
use crate::sim::scenario::Mutation;
use crate::sim::store;

/// What stopping may take.
pub const MARGIN: Duration = Duration::from_secs(2);

const RETRY: Duration = Duration::from_millis(500);

/// A leadership that is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub lease: LeaseId,
    pub ttl: Duration,
    pub epoch: Epoch,
    pub until: Moment,
    pub proven_at: Moment,
}

/// A lease that was granted and not used yet.
#[derive(Debug, Clone, Copy)]
pub struct Ahead {
    lease: LeaseId,
    ttl: Duration,
    sent: Moment,
    raft_term: u64,
}

/// Why the key is not ours.
#[derive(Debug)]
pub enum ClaimError {
    Lost,
    Guard,
    Store,
}

impl From<DcsError> for ClaimError {
    fn from(_: DcsError) -> Self {
        Self::Store
    }
}

/// The margin between the fence and the end of the lease.
pub fn margin(agent: &Agent) -> Duration {
    match agent.w.plan.mutation {
        Some(Mutation::KeepaliveIsProof) => Duration::ZERO,
        _ => MARGIN,
    }
}

async fn grant(agent: &Agent, ttl: Duration) -> Result<Ahead, DcsError> {
    let sent = agent.now();
    let granted = store::grant(&agent.w, agent.end(), ttl).await?;
    Ok(Ahead { lease: granted.lease, ttl: granted.ttl, sent, raft_term: granted.raft_term })
}

/// Grants a lease for a take-over that is likely.
pub async fn grant_ahead(agent: &Agent, ttl: Duration) {
    if let Ok(fresh) = grant(agent, ttl).await {
        agent.ahead.set(Some(fresh));
    }
}

/// Creates the leader key, together with `also` and only if `when` holds as well.
pub async fn claim(
    agent: &Rc<Agent>,
    ttl: Duration,
    when: Vec<Compare>,
    also: impl FnOnce(LeaseId) -> Vec<Op>,
) -> Result<Epoch, ClaimError> {
    let _passing = agent.gate.pass().await;
    agent.claiming.set(true);
    let result = claim_gated(agent, ttl, when, also).await;
    agent.claiming.set(false);
    result
}

async fn claim_gated(
    agent: &Rc<Agent>,
    ttl: Duration,
    when: Vec<Compare>,
    also: impl FnOnce(LeaseId) -> Vec<Op>,
) -> Result<Epoch, ClaimError> {
    let given_up = agent.given_up.get();
    let usable = agent.ahead.take().filter(|ahead| agent.now().since(ahead.sent) < ahead.ttl / 2);
    let base = match usable {
        Some(ahead) => ahead,
        None => grant(agent, ttl).await?,
    };
    agent.step().await;
    agent.machine().disk.borrow_mut().lease = Some(base.lease);
    agent.step().await;
    let key = agent.w.store.keys.leader();
    let mut txn =
        Txn::just(Op::put_leased(&key, agent.name(), base.lease)).when(Compare::absent(&key));
    txn.compare.extend(when);
    txn.then.extend(also(base.lease));
    let (revision, raft_term) = match store::txn(&agent.w, agent.end(), txn).await {
        Ok(outcome) if outcome.succeeded => (outcome.revision, outcome.raft_term),
        Ok(_) => {
            drop_lease(agent, base.lease);
            return Err(ClaimError::Lost);
        }
        Err(error) if error.outcome_is_unknown() => {
            let (state, term) = store::read(&agent.w, agent.end()).await?;
            match state.leader.as_ref().filter(|leader| leader.lease == base.lease) {
                Some(leader) => (leader.epoch.revision, term),
                None => {
                    drop_lease(agent, base.lease);
                    return Err(ClaimError::Lost);
                }
            }
        }
        Err(_) => {
            drop_lease(agent, base.lease);
            return Err(ClaimError::Store);
        }
    };
    let epoch = Epoch { store: agent.cluster().store, revision };
    let until = fence_at(base.sent, base.ttl, margin(agent));
    let held = Held { lease: base.lease, ttl: base.ttl, epoch, until, proven_at: base.sent };
    agent.say(format_args!("claims the key in epoch {revision}"));
    if raft_term == base.raft_term {
        arm_and_publish(agent, held, given_up).await?;
    } else {
        prove(agent, held).await?;
    }
    Ok(epoch)
}

async fn arm_and_publish(agent: &Rc<Agent>, held: Held, given_up: u64) -> Result<(), ClaimError> {
    if agent.now() >= held.until {
        return Err(ClaimError::Lost);
    }
    agent.step().await;
    if !guard::arm(&agent.w, agent.host, held.until) {
        // It has fired for an earlier deadline. If nothing is left, that is over.
        agent.step().await;
        let rearmed =
            guard::disarm(&agent.w, agent.host) && guard::arm(&agent.w, agent.host, held.until);
        if !rearmed {
            return Err(ClaimError::Guard);
        }
    }
    agent.step().await;
    if agent.given_up.get() != given_up {
        return Err(ClaimError::Lost);
    }
    let changed = agent.held.get().is_none_or(|old| old.epoch != held.epoch);
    agent.held.set(Some(held));
    if changed {
        agent.cycle.notify();
    }
    Ok(())
}

async fn prove(agent: &Rc<Agent>, held: Held) -> Result<(), ClaimError> {
    let given_up = agent.given_up.get();
    let sent = agent.now();
    let renewed = match store::keep_alive(&agent.w, agent.end(), held.lease).await {
        Ok(renewed) => renewed,
        Err(DcsError::LeaseLost) => return Err(lost(agent)),
        Err(error) => return Err(error.into()),
    };
    if agent.w.plan.mutation == Some(Mutation::KeepaliveIsProof) {
        let until = fence_at(sent, renewed.ttl, margin(agent)).max(held.until);
        return arm_and_publish(agent, Held { until, proven_at: sent, ..held }, given_up).await;
    }
    let checks = leader_checks(&agent.w.store.keys.leader(), held.lease, held.epoch);
    let txn = Txn { compare: checks, ..Txn::default() };
    let checked = store::txn(&agent.w, agent.end(), txn).await?;
    match judge(sent, renewed, &checked, margin(agent), Some(held.until)) {
        Ok(until) => {
            let held = Held { ttl: renewed.ttl, until, proven_at: sent, ..held };
            arm_and_publish(agent, held, given_up).await
        }
        Err(Unproven::KeyLost) => Err(lost(agent)),
        Err(Unproven::NoTime | Unproven::TermChanged { .. }) => Ok(()),
    }
}

fn lost(agent: &Agent) -> ClaimError {
    if agent.held.take().is_some() {
        agent.say(format_args!("leadership lost"));
        agent.cycle.notify();
    }
    ClaimError::Lost
}

/// Renews and proves once, now.
pub async fn renew(agent: &Rc<Agent>) -> Result<(), ClaimError> {
    let _passing = agent.gate.pass().await;
    match agent.held.get() {
        Some(held) => prove(agent, held).await,
        None => Err(ClaimError::Lost),
    }
}

/// Moves the key to a lease of another length.
pub async fn move_to(agent: &Rc<Agent>, ttl: Duration) -> Result<(), ClaimError> {
    let _passing = agent.gate.pass().await;
    let given_up = agent.given_up.get();
    let held = agent.held.get().ok_or(ClaimError::Lost)?;
    if held.ttl == ttl {
        return Ok(());
    }
    let base = grant(agent, ttl).await?;
    let until = fence_at(base.sent, base.ttl, margin(agent));
    agent.step().await;
    if until < held.until && !guard::arm(&agent.w, agent.host, until) {
        return Err(ClaimError::Guard);
    }
    agent.machine().disk.borrow_mut().lease = Some(base.lease);
    agent.step().await;
    match move_key(agent, held, base.lease, until.min(held.until)).await {
        Moved::Done => drop_lease(agent, held.lease),
        Moved::NotDone => {
            agent.machine().disk.borrow_mut().lease = Some(held.lease);
            drop_lease(agent, base.lease);
            arm_and_publish(agent, held, given_up).await?;
            return Err(ClaimError::Store);
        }
        Moved::KeyGone => {
            drop_lease(agent, base.lease);
            return Err(lost(agent));
        }
        Moved::Unknown => {
            // The guard knows the nearer of both deadlines, and will not hear of another. Neither lease
            // is ended before its time, for the key may hang on either.
            give_up(agent);
            agent.say(format_args!("does not know on which lease the key hangs"));
            return Err(ClaimError::Lost);
        }
    }
    let held = Held { lease: base.lease, ttl: base.ttl, until, proven_at: base.sent, ..held };
    arm_and_publish(agent, held, given_up).await
}

/// What became of a move of the key to another lease.
enum Moved {
    Done,
    NotDone,
    KeyGone,
    Unknown,
}

/// Hangs the key on another lease. Without an answer it is read and asked again until it is known or
/// `deadline` is near.
async fn move_key(agent: &Rc<Agent>, held: Held, to: LeaseId, deadline: Moment) -> Moved {
    let key = agent.w.store.keys.leader();
    let mut txn = Txn::just(Op::put_leased(&key, agent.name(), to));
    txn.compare = leader_checks(&key, held.lease, held.epoch);
    let mut may_be_done = false;
    loop {
        let refused = match store::txn(&agent.w, agent.end(), txn.clone()).await {
            Ok(outcome) if outcome.succeeded => return Moved::Done,
            Ok(_) if !may_be_done => return Moved::KeyGone,
            Ok(_) => true,
            Err(error) if !may_be_done && !error.outcome_is_unknown() => return Moved::NotDone,
            Err(_) => {
                may_be_done = true;
                false
            }
        };
        if let Ok((state, _)) = store::read(&agent.w, agent.end()).await {
            match &state.leader {
                Some(leader) if leader.lease == to => return Moved::Done,
                _ if refused => return Moved::KeyGone,
                _ => {}
            }
        }
        if agent.now() + RETRY >= deadline {
            return Moved::Unknown;
        }
        agent.sleep(RETRY).await;
    }
}

/// From now on nothing is held, whatever becomes of the key: told before the first wait of a release,
/// so that nothing that is decided meanwhile relies on it, and forgotten on disk before the request
/// leaves, for it may be done seconds later.
pub fn give_up(agent: &Agent) -> Option<Held> {
    match agent.w.plan.mutation {
        Some(Mutation::ReleaseWaitsItsTurn) => agent.held.get(),
        mutation => {
            agent.given_up.set(agent.given_up.get() + 1);
            if mutation != Some(Mutation::ReleasedLeaseTakenUpAgain) {
                agent.machine().disk.borrow_mut().lease = None;
            }
            agent.held.take()
        }
    }
}

/// Deletes the leader key if it is ours. An outcome that is unknown counts as released.
pub async fn release(
    agent: &Rc<Agent>,
    when: Vec<Compare>,
    also: Vec<Op>,
) -> Result<Option<u64>, DcsError> {
    let held = give_up(agent);
    release_given_up(agent, held, when, also).await
}

/// The rest of a release, after [`give_up`].
pub async fn release_given_up(
    agent: &Rc<Agent>,
    held: Option<Held>,
    when: Vec<Compare>,
    also: Vec<Op>,
) -> Result<Option<u64>, DcsError> {
    let Some(held) = held else { return Ok(None) };
    let _passing = agent.gate.pass().await;
    agent.held.take();
    agent.say(format_args!("releases the key"));
    agent.step().await;
    let key = agent.w.store.keys.leader();
    let mut txn = Txn::just(Op::delete(&key));
    txn.compare = leader_checks(&key, held.lease, held.epoch);
    txn.compare.extend(when);
    txn.then.extend(also);
    let outcome = store::txn(&agent.w, agent.end(), txn).await?;
    if outcome.succeeded {
        drop_lease(agent, held.lease);
        return Ok(Some(outcome.revision));
    }
    Ok(None)
}

/// While the store is away: every member has confirmed this leader.
pub async fn extend_by_failsafe(agent: &Rc<Agent>, until: Moment) {
    let Some(held) = agent.held.get() else { return };
    if until > held.until {
        arm_and_publish(agent, Held { until, ..held }, agent.given_up.get()).await.ok();
    }
}

/// After a restart: the key hangs on the lease that this disk remembers.
pub fn take_up_again_if_ours(agent: &Rc<Agent>) {
    if agent.held.get().is_some() || agent.running_job().is_some() {
        return;
    }
    let cluster = agent.cluster();
    let Some(leader) = cluster.leader.as_ref().filter(|leader| leader.name == agent.name()) else {
        return;
    };
    if agent.machine().disk.borrow().lease != Some(leader.lease) {
        return;
    }
    let (again, lease, epoch) = (Rc::clone(agent), leader.lease, leader.epoch);
    agent.errand(async move {
        let passing = again.gate.pass().await;
        // It may have been given up since the look.
        if again.held.get().is_some() || again.machine().disk.borrow().lease != Some(lease) {
            return;
        }
        let start = Moment::default();
        let held = Held { lease, ttl: Duration::ZERO, epoch, until: start, proven_at: start };
        if prove(&again, held).await.is_ok() && again.held.get().is_some() {
            again.say(format_args!("takes the leadership up again"));
        }
        drop(passing);
        again.sleep(RETRY).await;
    });
}

/// Ends a lease. It is forgotten first: the revocation may be done seconds later, and must not end a
/// leadership that was taken up again meanwhile.
fn drop_lease(agent: &Rc<Agent>, lease: LeaseId) {
    if agent.w.plan.mutation != Some(Mutation::ReleasedLeaseTakenUpAgain) {
        agent.machine().disk.borrow_mut().lease.take_if(|remembered| *remembered == lease);
    }
    let there = Rc::clone(agent);
    agent.w.exec.spawn(agent.process, async move {
        store::revoke(&there.w, there.end(), lease).await.ok();
    });
}

/// Renews for as long as something is held.
pub async fn run(agent: Rc<Agent>) {
    loop {
        let Some(held) = agent.held.get() else {
            let seen = agent.cycle.version();
            if agent.held.get().is_none() {
                agent.cycle.changed_since(seen).await;
            }
            continue;
        };
        let every = (held.ttl / 6).clamp(Duration::from_millis(300), Duration::from_secs(5));
        let pause = every.saturating_sub(agent.now().since(held.proven_at));
        agent.sleep(pause.max(Duration::from_millis(1))).await;
        match renew(&agent).await {
            Ok(()) => {}
            Err(ClaimError::Lost) => agent.sleep(Duration::from_millis(1)).await,
            Err(ClaimError::Guard | ClaimError::Store) => agent.sleep(RETRY).await,
        }
    }
}
