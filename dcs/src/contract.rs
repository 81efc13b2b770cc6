//! The promises of a store, as functions over any [`Dcs`].
//!
//! Each takes two handles on one store, as two processes would have them, and a prefix of its own to
//! work below, and panics with a sentence when the store breaks its word: its callers are tests. The
//! twin in memory and etcd are held to the same list, so what a simulation shows holds for both.
//!
//! Not here: faults. What happens to a store that is cut off differs by the store.
#![expect(clippy::panic, reason = "a broken promise is reported to tests alone")]

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterState, Pledge, Scope, SyncState};
use tokio::time::{Instant, timeout};

use crate::keys::Keys;
use crate::{
    Compare, Dcs, DcsError, Follow, KeyValue, LeaseId, Op, Reach, Revision, Txn, TxnOutcome, View,
    fence, json,
};

/// How long a promise may take that has no time of its own.
const PROMPT: Duration = Duration::from_secs(5);

/// The shortest lease that etcd grants with the elections of its default configuration.
const SHORT_LEASE: Duration = Duration::from_secs(2);

/// One promise.
pub type Promise = for<'a> fn(Pair<'a>) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Two handles on one store and a prefix that nobody else uses.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    pub one: &'a dyn Dcs,
    pub other: &'a dyn Dcs,
    pub prefix: &'a str,
}

macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        /// All promises, with their names.
        pub const PROMISES: &[(&str, Promise)] =
            &[$((stringify!($name), |pair| Box::pin($name(pair)))),*];
    };
}

promises![
    creating_an_absent_key_has_one_winner,
    a_write_on_an_old_revision_is_refused,
    a_failed_condition_runs_the_other_branch_and_nothing_else,
    a_value_is_compared_only_if_the_key_exists,
    a_lease_is_compared_only_if_the_key_exists,
    no_key_created_after_a_revision_covers_the_whole_prefix,
    gets_in_a_transaction_are_in_order_and_see_what_it_wrote,
    all_writes_of_a_transaction_have_one_revision,
    one_key_is_not_written_twice_in_a_transaction,
    deleting_a_prefix_spares_its_neighbours,
    a_range_shows_its_prefix_and_nothing_else,
    a_key_created_again_has_a_new_create_revision,
    an_ended_lease_takes_its_keys_along,
    a_renewed_lease_keeps_its_keys,
    revoking_a_lease_deletes_its_keys,
    a_write_on_an_ended_lease_does_nothing,
    a_key_can_change_its_lease,
    a_follow_shows_what_was_there_before,
    a_follow_shows_own_and_others_writes_in_order,
    a_follow_shows_a_transaction_whole,
    a_follow_knows_nothing_outside_its_prefix,
    a_view_names_its_store_and_grows_in_revision,
    a_lease_tells_when_it_was_renewed_last,
    a_leader_is_deposed_by_promises_that_hold,
    a_promise_is_to_the_leadership_in_force,
    a_promise_that_comes_late_does_not_undo_its_withdrawal,
];

impl Pair<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    async fn put(&self, name: &str, value: &str) -> TxnOutcome {
        txn(self.one, Txn::just(Op::put(self.key(name), value))).await
    }

    async fn get(&self, name: &str) -> Option<KeyValue> {
        let key = self.key(name);
        let outcome = txn(self.other, Txn::just(Op::get(key))).await;
        outcome.gets.into_iter().next().expect("one get, one answer")
    }

    async fn must_get(&self, name: &str) -> KeyValue {
        self.get(name).await.unwrap_or_else(|| panic!("{name} ought to exist"))
    }

    async fn grant(&self, ttl: Duration) -> LeaseId {
        let granted = self.one.grant(ttl).await.expect("a lease is granted");
        assert!(granted.ttl >= ttl, "asked for {ttl:?}, granted {:?}", granted.ttl);
        assert!(!granted.lease.is_none(), "a granted lease has a number");
        granted.lease
    }

    async fn put_leased(&self, name: &str, lease: LeaseId) -> TxnOutcome {
        txn(self.one, Txn::just(Op::put_leased(self.key(name), "leased", lease))).await
    }

    async fn holds(&self, compare: Compare) -> bool {
        txn(self.other, Txn::default().when(compare)).await.succeeded
    }
}

async fn txn(dcs: &dyn Dcs, txn: Txn) -> TxnOutcome {
    dcs.txn(txn).await.expect("the transaction is run")
}

/// Waits until a follow is [`Reach::Live`] and `wanted` of what it shows.
///
/// # Panics
/// When `limit` has passed.
pub async fn shows(
    follow: &mut Follow,
    limit: Duration,
    what: &str,
    wanted: impl Fn(&View) -> bool,
) -> Arc<View> {
    let start = Instant::now();
    loop {
        let view = follow.current();
        if view.reach == Reach::Live && wanted(&view) {
            return view;
        }
        let left = limit.saturating_sub(start.elapsed());
        if timeout(left, follow.changed()).await.is_err() {
            panic!("not within {limit:?}: {what}; shown: {view:#?}");
        }
    }
}

async fn creating_an_absent_key_has_one_winner(pair: Pair<'_>) {
    let claim = |value| {
        Txn::just(Op::put(pair.key("leader"), value))
            .when(Compare::absent(pair.key("leader")))
            .or_else(Op::get(pair.key("leader")))
    };
    let (one, other) =
        futures_util::future::join(pair.one.txn(claim("one")), pair.other.txn(claim("other")))
            .await;
    let (one, other) = (one.expect("it is run"), other.expect("it is run"));
    assert!(one.succeeded != other.succeeded, "{one:?} and {other:?}");
    let (winner, loser) = if one.succeeded { ("one", other) } else { ("other", one) };
    let found = pair.must_get("leader").await;
    assert_eq!(found.value, winner);
    assert_eq!(loser.gets, [Some(found)], "the loser is told who won");
}

async fn a_write_on_an_old_revision_is_refused(pair: Pair<'_>) {
    let first = pair.put("config", "a").await.revision;
    let write = |value, revision| {
        Txn::just(Op::put(pair.key("config"), value))
            .when(Compare::Modified { key: pair.key("config"), revision })
    };
    let second = txn(pair.other, write("b", first)).await;
    assert!(second.succeeded);
    assert!(second.revision > first);
    let late = txn(pair.one, write("c", first)).await;
    assert!(!late.succeeded);
    let found = pair.must_get("config").await;
    assert_eq!((found.value.as_str(), found.mod_revision), ("b", second.revision));
    assert_eq!(found.create_revision, first);
}

async fn a_failed_condition_runs_the_other_branch_and_nothing_else(pair: Pair<'_>) {
    pair.put("a", "1").await;
    let request = Txn::just(Op::put(pair.key("then"), ""))
        .when(Compare::Value { key: pair.key("a"), value: "1".into() })
        .when(Compare::absent(pair.key("a")))
        .or_else(Op::put(pair.key("otherwise"), ""));
    assert!(!txn(pair.one, request).await.succeeded, "one of two conditions does not hold");
    assert_eq!(pair.get("then").await, None);
    pair.must_get("otherwise").await;
}

async fn a_value_is_compared_only_if_the_key_exists(pair: Pair<'_>) {
    let is = |value: &str| Compare::Value { key: pair.key("a"), value: value.into() };
    assert!(!pair.holds(is("")).await, "a missing key has no value, not an empty one");
    pair.put("a", "").await;
    assert!(pair.holds(is("")).await);
    assert!(!pair.holds(is("x")).await);
}

async fn a_lease_is_compared_only_if_the_key_exists(pair: Pair<'_>) {
    let lease = pair.grant(PROMPT).await;
    let is = |lease| Compare::Lease { key: pair.key("a"), lease };
    assert!(!pair.holds(is(LeaseId::NONE)).await, "a missing key has no lease, not even none");
    assert!(!pair.holds(is(lease)).await);
    pair.put_leased("a", lease).await;
    assert!(pair.holds(is(lease)).await);
    assert!(!pair.holds(is(LeaseId::NONE)).await);
    assert!(!pair.holds(is(LeaseId(lease.0 + 1))).await);
    pair.put("a", "without").await;
    assert!(pair.holds(is(LeaseId::NONE)).await, "a write without a lease takes the lease away");
    pair.one.revoke(lease).await.expect("it is ours");
    pair.must_get("a").await;
}

async fn no_key_created_after_a_revision_covers_the_whole_prefix(pair: Pair<'_>) {
    let none_after = |revision| Compare::NoneCreatedAfter { prefix: pair.key("p/"), revision };
    assert!(pair.holds(none_after(Revision::NONE)).await, "an empty prefix has no new keys");
    let first = pair.put("p/1", "").await.revision;
    let second = pair.put("p/2", "").await.revision;
    assert!(pair.holds(none_after(second)).await);
    assert!(!pair.holds(none_after(first)).await);
    pair.put("p/1", "again").await;
    pair.put("p.beside", "").await;
    assert!(pair.holds(none_after(second)).await, "a change creates nothing");
    txn(pair.one, Txn::just(Op::delete(pair.key("p/2")))).await;
    assert!(pair.holds(none_after(first)).await, "what is gone does not count");
}

async fn gets_in_a_transaction_are_in_order_and_see_what_it_wrote(pair: Pair<'_>) {
    pair.put("a", "1").await;
    let request = Txn::just(Op::get(pair.key("b")))
        .and(Op::put(pair.key("b"), "2"))
        .and(Op::get(pair.key("a")))
        .and(Op::get(pair.key("b")));
    let gets = txn(pair.one, request).await.gets;
    let values: Vec<Option<&str>> =
        gets.iter().map(|found| found.as_ref().map(|found| found.value.as_str())).collect();
    assert_eq!(values, [None, Some("1"), Some("2")]);
}

async fn all_writes_of_a_transaction_have_one_revision(pair: Pair<'_>) {
    let request = Txn::just(Op::put(pair.key("a"), "")).and(Op::put(pair.key("b"), ""));
    let revision = txn(pair.one, request).await.revision;
    let (a, b) = (pair.must_get("a").await, pair.must_get("b").await);
    assert_eq!((a.mod_revision, b.mod_revision), (revision, revision));
}

async fn one_key_is_not_written_twice_in_a_transaction(pair: Pair<'_>) {
    for second in [
        Op::put(pair.key("a"), "2"),
        Op::delete(pair.key("a")),
        Op::DeletePrefix { prefix: pair.prefix.to_owned() },
    ] {
        let request = Txn::just(Op::put(pair.key("a"), "1")).and(second.clone());
        let answer = pair.one.txn(request).await;
        assert!(matches!(answer, Err(DcsError::Refused { .. })), "{second:?}: {answer:?}");
    }
    assert_eq!(pair.get("a").await, None);
}

async fn deleting_a_prefix_spares_its_neighbours(pair: Pair<'_>) {
    for name in ["p", "p/", "p/1", "p/1/2", "p0", "q"] {
        pair.put(name, "").await;
    }
    txn(pair.other, Txn::just(Op::DeletePrefix { prefix: pair.key("p/") })).await;
    let view = pair.one.range(pair.prefix).await.expect("it is read");
    let left: Vec<&str> = view.below(pair.prefix).map(|(name, _)| name).collect();
    assert_eq!(left, ["p", "p0", "q"]);
}

async fn a_range_shows_its_prefix_and_nothing_else(pair: Pair<'_>) {
    pair.put("p/1", "eins").await;
    pair.put("p/2", "zwei, größer").await;
    let last = pair.put("q", "").await.revision;
    let view = pair.other.range(&pair.key("p/")).await.expect("it is read");
    assert_eq!(view.reach, Reach::Live);
    assert!(view.revision >= last, "it is as new as the last write");
    let found: Vec<(&str, &str)> =
        view.below(pair.prefix).map(|(name, found)| (name, found.value.as_str())).collect();
    assert_eq!(found, [("p/1", "eins"), ("p/2", "zwei, größer")]);
}

async fn a_key_created_again_has_a_new_create_revision(pair: Pair<'_>) {
    let first = pair.put("leader", "a").await.revision;
    txn(pair.one, Txn::just(Op::delete(pair.key("leader")))).await;
    let second = pair.put("leader", "a").await.revision;
    assert!(second > first);
    assert_eq!(pair.must_get("leader").await.create_revision, second);
    assert!(!pair.holds(Compare::Created { key: pair.key("leader"), revision: first }).await);
    assert!(pair.holds(Compare::Created { key: pair.key("leader"), revision: second }).await);
}

async fn an_ended_lease_takes_its_keys_along(pair: Pair<'_>) {
    let mut follow = pair.other.follow(pair.prefix);
    let start = Instant::now();
    let granted = pair.one.grant(SHORT_LEASE).await.expect("a lease is granted");
    pair.put_leased("a", granted.lease).await;
    pair.put_leased("b", granted.lease).await;
    pair.put("c", "stays").await;
    shows(&mut follow, PROMPT, "three keys", |view| view.keys.len() == 3).await;
    let late = granted.ttl + PROMPT;
    let view = shows(&mut follow, late, "one key", |view| view.keys.len() == 1).await;
    assert!(view.get(&pair.key("c")).is_some());
    assert!(start.elapsed() >= granted.ttl, "a lease lives as long as was granted");
    let renewal = pair.one.keep_alive(granted.lease).await;
    assert!(matches!(renewal, Err(DcsError::LeaseLost)), "{renewal:?}");
    let end = pair.one.revoke(granted.lease).await;
    assert!(matches!(end, Err(DcsError::LeaseLost)), "{end:?}");
}

async fn a_renewed_lease_keeps_its_keys(pair: Pair<'_>) {
    let granted = pair.one.grant(SHORT_LEASE).await.expect("a lease is granted");
    pair.put_leased("a", granted.lease).await;
    let mut follow = pair.other.follow(pair.prefix);
    shows(&mut follow, PROMPT, "the key", |view| view.keys.len() == 1).await;
    let start = Instant::now();
    while start.elapsed() < granted.ttl * 2 {
        let renewed = pair.one.keep_alive(granted.lease).await.expect("it lives");
        assert_eq!(renewed.ttl, granted.ttl);
        assert!(renewed.raft_term >= granted.raft_term);
        // Whatever changes now would be the end of the key.
        let changed = timeout(granted.ttl / 4, follow.changed()).await;
        let seen = follow.current();
        assert!(changed.is_err() || seen.keys.len() == 1, "{seen:?}");
    }
    pair.must_get("a").await;
    pair.one.revoke(granted.lease).await.expect("it lives");
}

async fn revoking_a_lease_deletes_its_keys(pair: Pair<'_>) {
    let mut follow = pair.other.follow(pair.prefix);
    let lease = pair.grant(PROMPT).await;
    pair.put_leased("a", lease).await;
    shows(&mut follow, PROMPT, "the key", |view| view.keys.len() == 1).await;
    pair.one.keep_alive(lease).await.expect("it lives");
    pair.other.revoke(lease).await.expect("anyone may end it");
    assert_eq!(pair.get("a").await, None);
    shows(&mut follow, PROMPT, "no key", |view| view.keys.is_empty()).await;
    let renewal = pair.one.keep_alive(lease).await;
    assert!(matches!(renewal, Err(DcsError::LeaseLost)), "{renewal:?}");
}

async fn a_write_on_an_ended_lease_does_nothing(pair: Pair<'_>) {
    let lease = pair.grant(PROMPT).await;
    pair.one.revoke(lease).await.expect("it lives");
    let request =
        Txn::just(Op::put(pair.key("a"), "")).and(Op::put_leased(pair.key("b"), "", lease));
    let answer = pair.one.txn(request).await;
    assert!(matches!(answer, Err(DcsError::LeaseLost)), "{answer:?}");
    assert_eq!(pair.get("a").await, None);
}

async fn a_key_can_change_its_lease(pair: Pair<'_>) {
    let (long, short) = (pair.grant(PROMPT * 2).await, pair.grant(PROMPT).await);
    pair.put_leased("leader", long).await;
    let created = pair.must_get("leader").await.create_revision;
    pair.put_leased("leader", short).await;
    let moved = pair.must_get("leader").await;
    assert_eq!((moved.lease, moved.create_revision), (short, created));
    pair.one.revoke(long).await.expect("it lives");
    pair.must_get("leader").await;
    pair.one.revoke(short).await.expect("it lives");
    assert_eq!(pair.get("leader").await, None);
}

async fn a_follow_shows_what_was_there_before(pair: Pair<'_>) {
    let revision = pair.put("a", "1").await.revision;
    let mut follow = pair.other.follow(pair.prefix);
    let view = shows(&mut follow, PROMPT, "the key", |view| view.keys.len() == 1).await;
    assert!(view.revision >= revision);
    assert_eq!(view.get(&pair.key("a")), Some(&pair.must_get("a").await));
}

async fn a_follow_shows_own_and_others_writes_in_order(pair: Pair<'_>) {
    let mut follow = pair.one.follow(pair.prefix);
    let watcher = async {
        let mut last = 0;
        loop {
            let view = follow.current();
            let count: u64 = view
                .get(&pair.key("count"))
                .map_or(0, |found| found.value.parse().expect("only numbers are written"));
            assert!(count >= last, "{count} was shown after {last}");
            last = count;
            if count == 40 {
                return view;
            }
            timeout(PROMPT, follow.changed()).await.expect("more is written");
        }
    };
    let writer = async {
        for count in 1..=40 {
            let dcs = if count % 2 == 0 { pair.one } else { pair.other };
            txn(dcs, Txn::just(Op::put(pair.key("count"), count.to_string()))).await;
        }
    };
    let (view, ()) = futures_util::future::join(watcher, writer).await;
    let read = pair.other.range(pair.prefix).await.expect("it is read");
    assert_eq!(view.keys, read.keys);
    assert_eq!(view.store, read.store);
}

async fn a_follow_shows_a_transaction_whole(pair: Pair<'_>) {
    let mut follow = pair.other.follow(pair.prefix);
    let writer = async {
        for count in 1..=20 {
            let value = format!("{count:02}");
            let request = Txn::just(Op::put(pair.key("a"), &value))
                .and(Op::put(pair.key("b"), &value))
                .and(if count % 2 == 0 {
                    Op::delete(pair.key("c"))
                } else {
                    Op::put(pair.key("c"), &value)
                });
            txn(pair.one, request).await;
        }
    };
    let watcher = async {
        loop {
            let view = follow.current();
            let value = |name| view.get(&pair.key(name)).map(|found| found.value.as_str());
            assert_eq!(value("a"), value("b"), "half of a transaction was shown");
            let even = value("a").is_none_or(|count| count.ends_with(['0', '2', '4', '6', '8']));
            assert_eq!(value("c"), if even { None } else { value("a") });
            if value("a") == Some("20") {
                return;
            }
            timeout(PROMPT, follow.changed()).await.expect("more is written");
        }
    };
    futures_util::future::join(watcher, writer).await;
}

async fn a_follow_knows_nothing_outside_its_prefix(pair: Pair<'_>) {
    let mut follow = pair.other.follow(&pair.key("p/"));
    pair.put("q", "").await;
    pair.put("p/1", "").await;
    let view = shows(&mut follow, PROMPT, "the key", |view| !view.keys.is_empty()).await;
    let names: Vec<&str> = view.below(pair.prefix).map(|(name, _)| name).collect();
    assert_eq!(names, ["p/1"]);
}

async fn a_view_names_its_store_and_grows_in_revision(pair: Pair<'_>) {
    let before = pair.one.range(pair.prefix).await.expect("it is read");
    assert_ne!(before.store, 0);
    let mut follow = pair.other.follow(pair.prefix);
    shows(&mut follow, PROMPT, "a first view", |_| true).await;
    let written = pair.put("a", "1").await;
    let after = shows(&mut follow, PROMPT, "the key", |view| !view.keys.is_empty()).await;
    assert_eq!(after.store, before.store);
    assert!(after.revision > before.revision);
    assert!(after.revision >= written.revision);
    assert!(after.raft_term >= before.raft_term);
}

async fn a_lease_tells_when_it_was_renewed_last(pair: Pair<'_>) {
    let granted = pair.one.grant(SHORT_LEASE * 2).await.expect("a lease is granted");
    let told = pair.other.time_to_live(granted.lease).await.expect("it lives");
    assert_eq!(told.granted, granted.ttl);
    assert!(told.left <= granted.ttl && told.age_at_least() <= Duration::from_secs(1), "{told:?}");
    let start = Instant::now();
    let old = loop {
        let told = pair.other.time_to_live(granted.lease).await.expect("it lives");
        if told.age_at_least() >= Duration::from_secs(1) {
            break told;
        }
        assert!(start.elapsed() < PROMPT, "it grows no older: {told:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(start.elapsed() + Duration::from_millis(100) > Duration::from_secs(1), "{old:?}");
    pair.one.keep_alive(granted.lease).await.expect("it lives");
    let told = pair.other.time_to_live(granted.lease).await.expect("it lives");
    assert!(told.left > old.left && told.age_at_least() < Duration::from_secs(1), "{told:?}");
    pair.one.revoke(granted.lease).await.expect("it lives");
    let gone = pair.other.time_to_live(granted.lease).await;
    assert!(matches!(gone, Err(DcsError::LeaseLost)), "{gone:?}");
}

/// A cluster that `a` leads, and whose commits wait for `b` and `c`.
struct Led {
    keys: Keys,
    lease: LeaseId,
}

impl Led {
    async fn begin(pair: Pair<'_>) -> Self {
        let keys = Keys::new(&Scope::new("", pair.prefix.trim_matches('/'), None));
        assert_eq!(keys.root(), pair.prefix, "the prefix is a cluster's");
        let lease = pair.grant(PROMPT * 2).await;
        let sync = SyncState::with_quorum("a", &["b".to_owned(), "c".to_owned()], 1);
        let first = Txn::just(Op::put_leased(keys.leader(), "a", lease))
            .and(Op::put(keys.sync(), json(&sync)))
            .and(Op::put(keys.config(), "{}"));
        assert!(txn(pair.one, first).await.succeeded);
        Self { keys, lease }
    }

    async fn state(&self, pair: Pair<'_>) -> ClusterState {
        self.keys.state(&pair.other.range(self.keys.root()).await.expect("it is read"))
    }

    async fn pledge(&self, pair: Pair<'_>, member: &str, cluster: &ClusterState) -> bool {
        txn(pair.one, self.to_pledge(member, cluster)).await.succeeded
    }

    fn to_pledge(&self, member: &str, cluster: &ClusterState) -> Txn {
        let of = cluster.leadership().expect("somebody leads");
        let (timeline, position) = (kornak_cluster::Timeline(1), kornak_cluster::Lsn(1000));
        let pledge = Pledge { v: 1, of, timeline, position, withdrawn: false };
        let seen = cluster.pledges.get(member).map_or(Revision::NONE, |found| found.revision);
        fence::pledge(&self.keys, member, seen, &pledge)
    }

    fn to_depose(&self, cluster: &ClusterState) -> Txn {
        let leader = cluster.leader.as_ref().expect("somebody leads");
        let counted: Vec<(String, Revision)> = cluster
            .pledges
            .iter()
            .map(|(member, pledged)| (member.clone(), pledged.revision))
            .collect();
        assert_eq!(counted.len(), 2, "both have promised");
        let sync = SyncState::new("b", &["c".to_owned()]);
        fence::depose(&self.keys, leader, cluster, &counted, &sync)
    }
}

async fn a_leader_is_deposed_by_promises_that_hold(pair: Pair<'_>) {
    let led = Led::begin(pair).await;
    let before = led.state(pair).await;
    assert!(led.pledge(pair, "b", &before).await && led.pledge(pair, "c", &before).await);
    let request = led.to_depose(&led.state(pair).await);
    // Whatever it compares has changed for a moment.
    let keys = &led.keys;
    let sync = json(&before.sync);
    for (key, value) in [
        (keys.handover(), "{}"),
        (keys.unfenced(), "{}"),
        (keys.config(), "{\"pause\":true}"),
        (keys.sync(), sync.as_str()),
    ] {
        let known = txn(pair.one, Txn::just(Op::get(&key))).await.gets;
        txn(pair.one, Txn::just(Op::put(&key, value))).await;
        assert!(!txn(pair.other, request.clone()).await.succeeded, "{key} has changed");
        if known == [None] {
            txn(pair.one, Txn::just(Op::delete(&key))).await;
        }
    }
    let now = led.state(pair).await;
    for member in ["b", "c"] {
        assert!(led.pledge(pair, member, &now).await, "to the same leader and the new sync");
    }
    let request = led.to_depose(&led.state(pair).await);
    assert!(txn(pair.other, request.clone()).await.succeeded);
    let after = led.state(pair).await;
    assert_eq!((after.leader, after.sync), (None, Some(SyncState::new("b", &["c".to_owned()]))));
    assert!(!txn(pair.one, request).await.succeeded, "it is done once");
}

async fn a_promise_is_to_the_leadership_in_force(pair: Pair<'_>) {
    let led = Led::begin(pair).await;
    let before = led.state(pair).await;
    let again = Txn::just(Op::put(led.keys.sync(), json(&before.sync)));
    assert!(txn(pair.one, again).await.succeeded);
    assert!(!led.pledge(pair, "b", &before).await, "sync was written since");
    let now = led.state(pair).await;
    assert!(led.pledge(pair, "b", &now).await && led.pledge(pair, "c", &now).await);
    let request = led.to_depose(&led.state(pair).await);
    let lead_anew = [
        Txn::just(Op::delete(led.keys.leader())),
        Txn::just(Op::put_leased(led.keys.leader(), "a", led.lease)),
    ];
    for request in lead_anew {
        txn(pair.one, request).await;
    }
    assert!(!led.pledge(pair, "b", &now).await, "somebody leads anew");
    assert!(!txn(pair.other, request).await.succeeded, "under the same name and lease");
}

async fn a_promise_that_comes_late_does_not_undo_its_withdrawal(pair: Pair<'_>) {
    let led = Led::begin(pair).await;
    let first = led.state(pair).await;
    let late = led.to_pledge("b", &first);
    let of = first.leadership().expect("somebody leads");
    assert!(txn(pair.one, fence::withdraw(&led.keys, "b", of)).await.succeeded);
    assert!(!txn(pair.other, late).await.succeeded, "it was on its way");
    let known = led.state(pair).await;
    assert!(led.pledge(pair, "b", &known).await && led.pledge(pair, "c", &known).await);
    let request = led.to_depose(&led.state(pair).await);
    assert!(txn(pair.one, fence::withdraw(&led.keys, "c", of)).await.succeeded);
    assert!(!txn(pair.other, request).await.succeeded, "one of them may follow again");
    let holds = |state: &ClusterState, member| state.pledges[member].to(of).is_some();
    let now = led.state(pair).await;
    assert!(holds(&now, "b") && !holds(&now, "c"));
}
