//! A leader that is lost, and standbys that do not wait for its lease.

use kornak_cluster::{Leadership, Pledge, Pledged};

use super::*;
use crate::ha::depose::{Deposing, Given, Reason, Signs, claim, fenceable, standing};

const OF: Leadership = Leadership { epoch: EPOCH, sync: Revision(60) };

const SUSPECTED: Deposing = Deposing { on: true, suspected: Some(EPOCH), given: None };

fn given() -> Given {
    Given { leader: "b".to_owned(), of: OF }
}

fn bound() -> Deposing {
    Deposing { given: Some(given()), ..SUSPECTED }
}

/// `b` leads with Kornak's mark, these are its voters.
fn led(voters: &[&str], quorum: u32) -> ClusterState {
    let mut cluster = led_by(Some("b"));
    let mode = if quorum > 0 { json!("quorum") } else { json!(true) };
    cluster.config = Some(config(json!({"ttl": 30, "synchronous_mode": mode})));
    cluster.sync = Some(SyncState::with_quorum("b", &names(voters), quorum));
    cluster.members.values_mut().for_each(|member| member.fences = true);
    cluster
}

fn promise(position: u64, revision: u64) -> Pledged {
    let (timeline, position) = (Timeline(3), Lsn(position));
    let pledge = Pledge { v: 1, of: OF, timeline, position, withdrawn: false };
    Pledged { pledge: Some(pledge), revision: Revision(revision) }
}

fn promised(mut cluster: ClusterState, promises: &[(&str, Pledged)]) -> ClusterState {
    cluster.pledges = promises.iter().map(|(name, it)| ((*name).to_owned(), *it)).collect();
    cluster
}

fn detached() -> Server {
    let facts = StandbyFacts {
        upstream: None,
        streaming: false,
        not_streaming_since: Some(now()),
        ..standby_facts()
    };
    Server::Standby(facts)
}

#[test]
fn a_voter_whose_leader_is_lost_promises_to_acknowledge_nothing() {
    let lost = |cluster: ClusterState| Snapshot {
        cluster: Arc::new(cluster),
        deposing: SUSPECTED,
        ..standby()
    };
    check(&lost(led(&["a"], 0)), Action::Pledge(OF), Why::Deposal(Reason::LeaderLost));
    check(&lost(led(&["A", "c"], 1)), Action::Pledge(OF), Why::Deposal(Reason::LeaderLost));
    let off = Deposing { on: false, ..SUSPECTED };
    for (why, s) in [
        (
            "it lives",
            Snapshot {
                deposing: Deposing { on: true, ..Deposing::default() },
                ..lost(led(&["a"], 0))
            },
        ),
        ("switched off", Snapshot { deposing: off, ..lost(led(&["a"], 0)) }),
        ("not a voter", lost(led(&["c"], 0))),
        ("nobody is one", lost(led(&[], 0))),
    ] {
        assert_eq!(decide(&s).action, Action::Wait, "{why}");
    }
    let unread = StandbyFacts { wal_known: false, ..standby_facts() };
    let s = Snapshot { server: Server::Standby(unread), ..lost(led(&["a"], 0)) };
    check(&s, Action::Wait, Why::AlreadyFollows);
    let s = Snapshot { promise_until: Some(now() + seconds(1)), ..lost(led(&["a"], 0)) };
    check(&s, Action::Wait, Why::AlreadyFollows);
}

#[test]
fn what_has_to_be_so_for_a_leader_to_be_deposed() {
    assert_eq!(fenceable("a", &led(&["a"], 0)), Some(OF));
    type Change = fn(&mut ClusterState);
    let changes: [(&str, Change); 12] = [
        ("maintenance", |it| it.config.as_mut().unwrap().pause = true),
        ("asynchronous", |it| it.config = Some(config(json!({"ttl": 30})))),
        ("no configuration", |it| it.config = None),
        ("a handover", |it| it.handover_revision = Revision(9)),
        ("a primary without a guard", |it| it.unfenced_revision = Revision(9)),
        ("a key in doubt", |it| {
            it.doubts.insert(SafetyKey::Sync, kornak_cluster::Doubt::Kept);
        }),
        ("a store that was restored", |it| it.sync_before = Some(SyncState::default())),
        ("a Patroni member", |it| it.members.get_mut("c").unwrap().kornak = None),
        ("a leader that renews seldom", |it| it.members.get_mut("b").unwrap().fences = false),
        ("another leader's sync", |it| it.sync.as_mut().unwrap().leader = Some("c".to_owned())),
        ("no lease", |it| it.leader.as_mut().unwrap().lease = LeaseId::NONE),
        ("a quorum that cannot come together", |it| it.sync.as_mut().unwrap().quorum = 1),
    ];
    for (what, change) in changes {
        let mut cluster = led(&["a"], 0);
        change(&mut cluster);
        assert_eq!(fenceable("a", &cluster), None, "{what}");
    }
}

#[test]
fn a_fence_is_so_many_that_no_commit_gets_around_it() {
    let fence = |cluster: &ClusterState| standing(cluster, OF).map(|fence| fence.best);
    let best = |list: &[&str]| Some(names(list));
    let one = |voters: &[&str], quorum| promised(led(voters, quorum), &[("a", promise(1000, 70))]);
    assert_eq!(fence(&one(&["a"], 0)), best(&["a"]), "priority mode: each has everything");
    assert_eq!(
        fence(&one(&["a", "c"], 1)),
        None,
        "quorum mode: the other one may have acknowledged"
    );
    assert_eq!(fence(&one(&["c"], 0)), None, "others do not count");
    let two = |theirs| promised(led(&["a", "c"], 1), &[("a", promise(1000, 70)), ("c", theirs)]);
    assert_eq!(fence(&two(promise(1000, 71))), best(&["a", "c"]));
    assert_eq!(fence(&two(promise(1001, 71))), best(&["c"]));
    let changed = |change: fn(&mut Pledge)| {
        let mut pledged = promise(2000, 71);
        change(pledged.pledge.as_mut().unwrap());
        pledged
    };
    assert_eq!(fence(&two(changed(|it| it.timeline = Timeline(2)))), best(&["a"]));
    assert_eq!(fence(&two(changed(|it| it.withdrawn = true))), None);
    assert_eq!(fence(&two(changed(|it| it.of.sync = Revision(59)))), None);
    assert_eq!(fence(&two(changed(|it| it.of.epoch.revision = Revision(49)))), None);
    assert_eq!(fence(&two(Pledged { pledge: None, revision: Revision(71) })), None);
}

#[test]
fn the_best_of_the_fence_deposes_and_names_its_equals() {
    let both = |mine, theirs| {
        promised(led(&["a", "c"], 1), &[("a", promise(mine, 70)), ("c", promise(theirs, 71))])
    };
    let s = |cluster: ClusterState| Snapshot {
        cluster: Arc::new(cluster),
        deposing: bound(),
        server: detached(),
        ..standby()
    };
    check(&s(both(1000, 1000)), Action::Depose, Why::Deposal(Reason::FenceStands));
    let cluster = both(1000, 1000);
    let (leader, fence, sync) = claim("a", &cluster).unwrap();
    assert_eq!((leader.name.as_str(), sync), ("b", SyncState::new("a", &names(&["c"]))));
    assert_eq!(fence.counted, [("a".to_owned(), Revision(70)), ("c".to_owned(), Revision(71))]);
    assert_eq!(claim("a", &both(1001, 1000)).unwrap().2, SyncState::new("a", &[]));
    check(&s(both(1000, 1001)), Action::Wait, Why::Deposal(Reason::Pledged));
    let unfit = Snapshot { tags: tags(json!({"nofailover": true})), ..s(both(1000, 1000)) };
    check(&unfit, Action::Wait, Why::Deposal(Reason::Pledged));
    let alone = promised(led(&["a", "c"], 1), &[("a", promise(1000, 70))]);
    check(&s(alone), Action::Wait, Why::Deposal(Reason::Pledged));
}

#[test]
fn a_promise_binds_until_it_is_withdrawn_or_has_no_object() {
    let s = |cluster: ClusterState| Snapshot {
        cluster: Arc::new(cluster),
        deposing: bound(),
        server: detached(),
        ..standby()
    };
    let kept = || promised(led(&["a", "c"], 1), &[("a", promise(1000, 70))]);
    check(&s(led(&["a", "c"], 1)), Action::Pledge(OF), Why::Deposal(Reason::LeaderLost));
    let lives = Deposing { suspected: None, ..bound() };
    let alive = Snapshot { deposing: lives, ..s(kept()) };
    check(&alive, Action::EndPledge, Why::Deposal(Reason::LeaderLives));
    let off = Deposing { on: false, ..bound() };
    check(
        &Snapshot { deposing: off, ..s(kept()) },
        Action::EndPledge,
        Why::Deposal(Reason::LeaderLives),
    );
    type Change = fn(&mut ClusterState);
    let newer: [Change; 2] = [
        |it| it.leader.as_mut().unwrap().epoch.revision = Revision(80),
        |it| it.sync_revision = Revision(80),
    ];
    for change in newer {
        let mut cluster = kept();
        change(&mut cluster);
        assert!(!given().binds(&cluster));
        check(&s(cluster), Action::EndPledge, Why::Deposal(Reason::PledgeOver));
    }
    let older: [Change; 2] = [
        |it| it.leader.as_mut().unwrap().epoch.revision = Revision(40),
        |it| it.sync_revision = Revision(59),
    ];
    for change in older {
        let mut cluster = kept();
        change(&mut cluster);
        assert!(given().binds(&cluster));
        check(&s(cluster), Action::Wait, Why::Deposal(Reason::Pledged));
    }
    let mut restored = kept();
    restored.leader.as_mut().unwrap().epoch.store = 2;
    assert!(!given().binds(&restored), "nothing of the former store is done in another one");
    assert!(given().binds(&led_by(None)), "the old leader may still ask to stay");
    let down = Snapshot { server: Server::Stopped, ..s(kept()) };
    check(&down, rejoin(None), Why::Deposal(Reason::Pledged));
}

#[test]
fn every_sign_of_life_has_to_be_missing_for_long() {
    let (after, at) = (seconds(2), |ms| Moment::at_millis(1_000_000 + ms));
    let asked = |questions: &[(u64, bool, u64)], age_ms, now_ms| {
        let mut signs = Signs::of(EPOCH);
        for (when, answered, received) in questions {
            signs.asked(at(*when), *answered, Lsn(*received));
        }
        signs.renewed(Duration::from_millis(age_ms));
        signs.are_missing(at(now_ms), after)
    };
    let silent = [(0, false, 9), (500, false, 9)];
    assert!(asked(&silent, 2000, 1000));
    for (why, questions, age_ms, now_ms) in [
        ("it renews", &silent[..], 1999, 1000),
        ("it was not asked", &[], 9000, 9000),
        ("it was asked once", &silent[..1], 2000, 1000),
        ("not for long enough", &silent, 2000, 999),
        ("it answered meanwhile", &[(0, false, 9), (500, true, 9), (700, false, 9)], 2000, 1200),
        ("its log goes on", &[(0, false, 9), (500, false, 10), (700, false, 10)], 2000, 1200),
    ] {
        assert!(!asked(questions, age_ms, now_ms), "{why}");
    }
}
