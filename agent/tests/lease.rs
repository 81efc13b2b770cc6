//! The keeper of the leader key on a store that fails as it should not: what becomes of the leadership when
//! the key moves to another lease.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use kornak_agent::lease::{ClaimError, Keeper};
use kornak_agent::machine::Machine;
use kornak_cluster::Scope;
use kornak_dcs::keys::Keys;
use kornak_dcs::memory::{Lost, MemoryDcs};
use kornak_dcs::{
    Dcs, DcsError, DcsFuture, Follow, Granted, LeaseId, Op, Remaining, Renewed, Txn, TxnOutcome,
    View,
};
use parking_lot::Mutex;
use support::{Field, become_guard};

const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_secs(10);
const MARGIN: Duration = Duration::from_secs(2);

#[test]
fn guard_process() {
    become_guard();
}

/// Answers the next transactions that write the leader key with these errors, without doing them.
struct Failing {
    store: MemoryDcs,
    errors: Mutex<VecDeque<DcsError>>,
    /// Is done with the next transaction that writes the leader key.
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// Renewals that are followed by an election.
    elections: Mutex<usize>,
    /// Lets its leadership go after the next of these.
    lets_go: Mutex<Option<Keeper>>,
    /// A transaction is done a little later than it is asked for.
    takes_time: AtomicBool,
}

impl std::fmt::Debug for Failing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Failing")
    }
}

impl Dcs for Failing {
    fn range(&self, prefix: &str) -> DcsFuture<'_, View> {
        self.store.range(prefix)
    }

    fn txn(&self, txn: Txn) -> DcsFuture<'_, TxnOutcome> {
        let writes = txn.then.iter().any(|op| matches!(op, Op::Put { .. }));
        if let Some(event) = self.meanwhile.lock().take_if(|_| writes) {
            event();
        }
        let error = if writes { self.errors.lock().pop_front() } else { None };
        match error {
            Some(error) => Box::pin(async move { Err(error) }),
            None if self.takes_time.load(Ordering::Relaxed) => Box::pin(async move {
                tokio::task::yield_now().await;
                self.store.txn(txn).await
            }),
            None => self.store.txn(txn),
        }
    }

    fn grant(&self, ttl: Duration) -> DcsFuture<'_, Granted> {
        self.store.grant(ttl)
    }

    fn keep_alive(&self, lease: LeaseId) -> DcsFuture<'_, Renewed> {
        Box::pin(async move {
            let renewed = self.store.keep_alive(lease).await;
            let mut elections = self.elections.lock();
            if *elections > 0 {
                *elections -= 1;
                self.store.elect();
                if let Some(keeper) = self.lets_go.lock().take() {
                    keeper.let_go();
                }
            }
            renewed
        })
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

/// A keeper that holds the key on a long lease.
struct Leader {
    keeper: Keeper,
    store: Arc<Failing>,
    keys: Keys,
    _field: Field,
}

impl Leader {
    async fn new() -> Self {
        let mut field = Field::new();
        let node = field.node("a");
        let guard = node.postgres.guard().await.unwrap();
        let store = Arc::new(Failing {
            store: MemoryDcs::new(),
            errors: Mutex::default(),
            meanwhile: Mutex::default(),
            elections: Mutex::default(),
            lets_go: Mutex::default(),
            takes_time: AtomicBool::new(false),
        });
        let keys = Keys::new(&Scope::new("service", "demo", None));
        let file = field.path().join("lease");
        let dcs: Arc<dyn Dcs> = Arc::clone(&store) as Arc<dyn Dcs>;
        let keeper =
            Keeper::new("a", Machine::real(), dcs, keys.clone(), Arc::new(guard), MARGIN, file);
        keeper.claim(1, LONG, Vec::new(), |_| Vec::new()).await.unwrap();
        Self { keeper, store, keys, _field: field }
    }

    /// The lease that the key hangs on; 0: there is no key.
    async fn hangs_on(&self) -> LeaseId {
        let key = self.keys.leader();
        let view = self.store.range(&key).await.unwrap();
        view.get(&key).map_or(LeaseId(0), |found| found.lease)
    }

    /// The node leads, as it and the store say, and can prove it.
    async fn leads(&self, ttl: Duration) {
        self.keeper.renew().await.unwrap();
        let held = self.keeper.held().expect("it leads");
        assert_eq!((held.lease, held.ttl), (self.hangs_on().await, ttl));
    }
}

fn unknown() -> DcsError {
    DcsError::Unknown { detail: "no answer".to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_was_certainly_not_done_leaves_the_leadership_as_it_is() {
    let leader = Leader::new().await;
    let unreachable = || DcsError::Unreachable { detail: "nobody listens".to_owned() };
    let refused = || DcsError::Refused { detail: "too many requests".to_owned() };
    for error in [unreachable(), refused()] {
        leader.store.errors.lock().extend(std::iter::repeat_n(error, 3));
        let moved = leader.keeper.move_to(SHORT).await;
        assert!(matches!(moved, Err(ClaimError::Store(_))), "{moved:?}");
        leader.store.errors.lock().clear();
        leader.leads(LONG).await;
    }
    leader.keeper.move_to(SHORT).await.unwrap();
    leader.leads(SHORT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_without_an_answer_is_asked_for_until_it_is_known() {
    let leader = Leader::new().await;
    leader.store.errors.lock().extend(std::iter::repeat_with(unknown).take(5));
    leader.keeper.move_to(SHORT).await.unwrap();
    leader.leads(SHORT).await;

    // Done, and only the answer is lost.
    leader.store.store.lose_next_txn(Lost::Answer);
    leader.keeper.move_to(LONG).await.unwrap();
    leader.leads(LONG).await;

    // It lies somewhere and is done later: by then it may change nothing.
    leader.store.store.lose_next_txn(Lost::Late);
    leader.keeper.move_to(SHORT).await.unwrap();
    leader.store.store.deliver_late();
    leader.leads(SHORT).await;

    // Without an answer, and then certainly not done: the first may still be.
    leader.store.errors.lock().extend([unknown(), DcsError::LeaseLost]);
    leader.keeper.move_to(LONG).await.unwrap();
    leader.leads(LONG).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_known_in_time_is_no_leadership() {
    let leader = Leader::new().await;
    leader.store.errors.lock().extend(std::iter::repeat_with(unknown).take(1000));
    let moved = leader.keeper.move_to(MARGIN + Duration::from_secs(1)).await;
    assert!(matches!(moved, Err(ClaimError::Lost)), "{moved:?}");
    assert_eq!(leader.keeper.held(), None);
    // Either lease may be the one that the key hangs on, so neither was ended.
    assert!(!leader.hangs_on().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_lets_go_of_a_key_that_is_being_moved_releases_it_all_the_same() {
    let leader = Leader::new().await;
    let before = leader.keeper.held().unwrap();
    let keeper = leader.keeper.clone();
    *leader.store.meanwhile.lock() = Some(Box::new(move || {
        keeper.let_go();
    }));
    let moved = leader.keeper.move_to(SHORT).await;
    assert!(matches!(moved, Err(ClaimError::Lost)), "{moved:?}");
    assert_ne!(leader.hangs_on().await, before.lease, "it was moved");
    assert!(leader.keeper.release_held(before, Vec::new(), Vec::new()).await.unwrap());
    assert_eq!(leader.hangs_on().await, LeaseId(0), "nobody could lead before the lease has ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_gone_is_not_moved() {
    let leader = Leader::new().await;
    let gone = Txn::just(Op::delete(leader.keys.leader()));
    leader.store.txn(gone).await.unwrap();
    let moved = leader.keeper.move_to(SHORT).await;
    assert!(matches!(moved, Err(ClaimError::Lost)), "{moved:?}");
    assert_eq!((leader.keeper.held(), leader.hangs_on().await), (None, LeaseId::NONE));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_election_between_renewal_and_proof_proves_nothing() {
    let leader = Leader::new().await;
    let before = leader.keeper.held().unwrap();
    *leader.store.elections.lock() = 100;
    let renewed = leader.keeper.renew().await;
    assert!(matches!(renewed, Err(ClaimError::Unproven)), "{renewed:?}");
    assert_eq!(leader.keeper.held(), Some(before), "and ends nothing");
    *leader.store.elections.lock() = 1;
    leader.leads(LONG).await;
    assert!(leader.keeper.held().unwrap().proven_at > before.proven_at);
}

/// A leader whose server has just been stopped would start it again while its key is being deleted.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_is_repeated_does_not_bring_back_what_was_let_go() {
    let leader = Leader::new().await;
    *leader.store.elections.lock() = 1;
    *leader.store.lets_go.lock() = Some(leader.keeper.clone());
    let renewed = leader.keeper.renew().await;
    assert!(matches!(renewed, Err(ClaimError::Lost)), "{renewed:?}");
    assert_eq!(leader.keeper.held(), None);
}

#[tokio::test]
async fn a_step_that_is_broken_off_while_it_releases_has_released() {
    let leader = Leader::new().await;
    leader.store.takes_time.store(true, Ordering::Relaxed);
    let release = leader.keeper.release(Vec::new(), Vec::new());
    assert!(release.now_or_never().is_none(), "the store has not answered yet");
    let deadline = Instant::now() + Duration::from_secs(10);
    while leader.hangs_on().await != LeaseId::NONE {
        assert!(Instant::now() < deadline, "the key is still there, and nobody holds it");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_a_full_store_refuses_is_none() {
    let leader = Leader::new().await;
    leader.keeper.wrote_status("{}");
    leader.store.errors.lock().push_back(DcsError::Full { detail: "no space".to_owned() });
    let released = leader.keeper.release(Vec::new(), Vec::new()).await;
    assert!(matches!(released, Err(DcsError::Full { .. })), "{released:?}");
    leader.leads(LONG).await;
    assert!(leader.keeper.release(Vec::new(), Vec::new()).await.unwrap());
    assert_eq!((leader.keeper.held(), leader.hangs_on().await), (None, LeaseId::NONE));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_our_name_is_given_back_only_while_nothing_is_held() {
    let leader = Leader::new().await;
    let held = leader.keeper.held().unwrap();
    leader.keeper.follows_another();
    leader.keeper.give_back(held.lease, held.epoch).await.unwrap();
    leader.leads(LONG).await;
    assert!(leader.keeper.remembers(held.lease));

    leader.keeper.let_go();
    assert!(!leader.keeper.remembers(held.lease));
    let taken = leader.keeper.take_up_again(held.lease, held.epoch).await;
    assert!(matches!(taken, Err(ClaimError::Lost)), "{taken:?}");
    leader.keeper.give_back(held.lease, held.epoch).await.unwrap();
    assert_eq!(leader.hangs_on().await, LeaseId(0));
}
