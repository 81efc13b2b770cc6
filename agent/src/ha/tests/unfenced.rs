//! Maintenance mode has left `b`'s primary without a guard, and is over.

use super::*;

/// `a` races, `b` is marked; nobody has led for so long, and `b`'s server was asked.
fn race(waited: Duration, stray: Stray, change: fn(&mut ClusterState)) -> Snapshot {
    let cluster = with(led_by(None), |c| {
        c.unfenced = unfenced("b");
        change(c);
    });
    let race = Some(Race { stray, ..answers(&[("c", Some(peer(1000)))]) });
    Snapshot { cluster, race, leaderless_since: Some(now().minus(waited)), ..orphan() }
}

fn quorum(c: &mut ClusterState) {
    c.config = Some(config(json!({"ttl": 30, "synchronous_mode": "quorum"})));
    let mut sync = SyncState::new("b", &names(&["a", "c"]));
    sync.quorum = 1;
    c.sync = Some(sync);
}

#[test]
fn nobody_is_promoted_beside_a_primary_that_may_acknowledge() {
    // A4
    let waits = |waited, stray, left| {
        check(&race(waited, stray, |_| ()), Action::Wait, Why::UnfencedUnheard { left });
    };
    waits(seconds(0), Stray::Unheard, seconds(30));
    waits(seconds(29), Stray::Unheard, seconds(1));
    waits(seconds(1), Stray::Refused, seconds(1));
    let runs = race(seconds(3600), Stray::Runs, |_| ());
    check(&runs, Action::Wait, Why::UnfencedRuns);
    let own = with(led_by(None), |c| c.unfenced = unfenced("a"));
    check(&Snapshot { cluster: own, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_primary_without_a_guard_that_does_not_run_keeps_nobody_from_taking_over() {
    for (waited, stray) in [(30, Stray::Unheard), (2, Stray::Refused), (0, Stray::Standby)] {
        check(&race(seconds(waited), stray, |_| ()), CLAIM, Why::MostAdvanced);
    }
    let named = race(seconds(0), Stray::Runs, |c| c.failover.member = Some("a".into()));
    check(&named, CLAIM, Why::NamedCandidate);
}

#[test]
fn a_primary_whose_commits_wait_for_the_candidate_acknowledges_nothing_once_it_has_gone() {
    let only = race(seconds(0), Stray::Runs, |c| synchronous(c, "b", &["a"]));
    check(&only, CLAIM, Why::MostAdvanced);
    let alone = race(seconds(0), Stray::Runs, |c| synchronous(c, "b", &[]));
    check(&alone, Action::Wait, Why::NotSynchronous);
    let others = race(seconds(0), Stray::Runs, |c| synchronous(c, "c", &["a"]));
    check(&others, Action::Wait, Why::UnfencedRuns);
    let past = race(seconds(0), Stray::Runs, |c| {
        synchronous(c, "b", &["a"]);
        c.sync_before = c.sync.clone();
    });
    check(&past, Action::Wait, Why::UnfencedRuns);
}

#[test]
fn voters_leave_a_primary_without_a_guard_before_their_votes_count() {
    let leave = Action::Follow { upstream: Source::Archive };
    check(&race(seconds(0), Stray::Runs, quorum), leave, Why::LeavesUnfenced);
    let gone = |peer: Peer| {
        let s = race(seconds(0), Stray::Runs, quorum);
        let facts = StandbyFacts { upstream: None, ..standby_facts() };
        let answers = Race { stray: Stray::Runs, ..answers(&[("c", Some(peer))]) };
        Snapshot { server: Server::Standby(facts), race: Some(answers), ..s }
    };
    check(&gone(peer(1000)), Action::Wait, Why::UnfencedRuns);
    check(&gone(Peer { detached: true, ..peer(1000) }), CLAIM, Why::MostAdvanced);
    let ahead = Peer { detached: true, ..peer(1001) };
    check(&gone(ahead), Action::Wait, Why::UnfencedRuns);
}
