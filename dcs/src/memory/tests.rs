use super::*;
use crate::contract::{PROMISES, Pair};
use crate::{Compare, Op};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn the_twin_keeps_the_promises_of_a_store() {
    let dcs = MemoryDcs::new();
    let other = dcs.new_handle();
    let promises = PROMISES.iter().map(|(name, promise)| {
        let (one, other) = (dcs.new_handle(), other.new_handle());
        tokio::spawn(async move {
            let prefix = format!("/{name}/");
            promise(Pair { one: &one, other: &other, prefix: &prefix }).await;
        })
    });
    for promise in promises.collect::<Vec<_>>() {
        promise.await.expect("the promise was kept");
    }
}

#[tokio::test]
async fn a_manual_clock_ends_leases_at_their_very_end() {
    let dcs = MemoryDcs::manual();
    let lease = dcs.grant(SECOND * 5).await.expect("granted").lease;
    dcs.txn(Txn::just(Op::put_leased("/a", "", lease))).await.expect("done");
    let mut follow = dcs.follow("/");
    dcs.advance(SECOND * 5 - Duration::from_nanos(1));
    assert_eq!(follow.current().keys.len(), 1);
    assert_eq!(dcs.next_lease_end(), Some(Moment::at_millis(5000)));
    dcs.advance(Duration::from_nanos(1));
    assert_eq!(follow.current().keys.len(), 0);
    assert_eq!(dcs.next_lease_end(), None);
}

#[tokio::test]
async fn a_handle_that_is_cut_off_does_nothing_and_the_others_go_on() {
    let dcs = MemoryDcs::manual();
    let (cut, well) = (dcs.new_handle(), dcs.new_handle());
    let (mut its, mut theirs) = (cut.follow("/"), well.follow("/"));
    let mut later = {
        cut.same_handle().cut();
        cut.follow("/")
    };
    let answer = cut.txn(Txn::just(Op::put("/a", "1"))).await;
    assert!(matches!(answer, Err(DcsError::Unreachable { .. })), "{answer:?}");
    well.txn(Txn::just(Op::put("/b", "2"))).await.expect("done");
    assert_eq!((its.current().reach, its.current().keys.len()), (Reach::Lost, 0));
    assert_eq!(later.current().reach, Reach::Never);
    assert_eq!((theirs.current().reach, theirs.current().keys.len()), (Reach::Live, 1));
    cut.heal();
    for follow in [&mut its, &mut later] {
        assert_eq!((follow.current().reach, follow.current().keys.len()), (Reach::Live, 1));
    }
}

#[tokio::test]
async fn an_unknown_outcome_is_a_lost_request_or_a_lost_answer() {
    let dcs = MemoryDcs::manual();
    for (lost, done) in [(Lost::Request, false), (Lost::Answer, true)] {
        dcs.lose_next_txn(lost);
        let claim = Txn::just(Op::put("/leader", "a")).when(Compare::absent("/leader"));
        let answer = dcs.txn(claim).await;
        assert!(answer.is_err_and(|error| error.outcome_is_unknown()));
        let view = dcs.range("/").await.expect("the next request is answered");
        assert_eq!(!view.keys.is_empty(), done, "{lost:?}");
    }
}

#[tokio::test]
async fn a_late_transaction_is_done_after_what_came_later_unless_a_condition_prevents_it() {
    let dcs = MemoryDcs::manual();
    let well = dcs.new_handle();
    let written = well.txn(Txn::just(Op::put("/a", "old"))).await.expect("done").revision;
    let unchanged = Compare::Modified { key: "/a".into(), revision: written };
    for txn in [Txn::just(Op::put("/b", "late")), Txn::just(Op::put("/a", "late")).when(unchanged)]
    {
        dcs.lose_next_txn(Lost::Late);
        assert!(dcs.txn(txn).await.is_err_and(|error| error.outcome_is_unknown()));
    }
    well.txn(Txn::just(Op::put("/a", "new"))).await.expect("done");
    assert_eq!(well.range("/b").await.expect("read").keys.len(), 0, "it is not there yet");
    dcs.cut();
    assert_eq!(dcs.deliver_late().len(), 2);
    let view = well.range("/").await.expect("read");
    let values: Vec<&str> = view.keys.values().map(|found| found.value.as_str()).collect();
    assert_eq!(values, ["new", "late"]);
}

#[tokio::test]
async fn a_silent_watch_stays_live_and_shows_nothing_new() {
    let dcs = MemoryDcs::manual();
    let stalled = dcs.new_handle();
    let mut follow = stalled.follow("/");
    stalled.silence(true);
    dcs.txn(Txn::just(Op::put("/a", "1"))).await.expect("done");
    assert_eq!((follow.current().reach, follow.current().keys.len()), (Reach::Live, 0));
    assert_eq!(stalled.range("/").await.expect("read").keys.len(), 1);
    stalled.silence(false);
    assert_eq!(follow.current().keys.len(), 1);
}

#[tokio::test]
async fn a_deposed_leader_answers_renewals_that_renew_nothing() {
    let dcs = MemoryDcs::manual();
    let granted = dcs.grant(SECOND * 5).await.expect("granted");
    dcs.answer_from_deposed_leader(true);
    dcs.elect();
    dcs.advance(SECOND * 4);
    let renewed = dcs.keep_alive(granted.lease).await.expect("it is answered");
    assert_eq!(renewed.raft_term, granted.raft_term);
    let checked = dcs.txn(Txn::default()).await.expect("done");
    assert!(checked.raft_term > renewed.raft_term, "the check shows that terms differ");
    dcs.advance(SECOND);
    let renewed = dcs.keep_alive(granted.lease).await;
    assert!(matches!(renewed, Err(DcsError::LeaseLost)), "{renewed:?}");
}

#[tokio::test]
async fn an_election_starts_every_lease_anew() {
    let dcs = MemoryDcs::manual();
    let lease = dcs.grant(SECOND * 5).await.expect("granted").lease;
    dcs.advance(SECOND * 4);
    dcs.elect();
    dcs.advance(SECOND * 4);
    dcs.keep_alive(lease).await.expect("it lives");
}

#[tokio::test]
async fn dropped_follows_are_forgotten() {
    let dcs = MemoryDcs::manual();
    drop(dcs.follow("/"));
    dcs.txn(Txn::just(Op::put("/a", "1"))).await.expect("done");
    assert!(dcs.store.inner.lock().followers.is_empty());
}
