//! Nobody leads: who may, and who first.

use kornak_cluster::Revision;

use super::*;

#[test]
fn a_candidate_asks_before_it_claims() {
    let s = Snapshot { race: None, ..orphan() };
    check(&s, Action::AskPeers, Why::PeersUnknown);
}

#[test]
fn answers_go_stale() {
    let old = Race { asked_at: now().minus(Duration::from_millis(1501)), ..answers(&[]) };
    check(&Snapshot { race: Some(old), ..orphan() }, Action::AskPeers, Why::PeersUnknown);
    let fresh = Race { asked_at: now().minus(Duration::from_millis(1500)), ..answers(&[]) };
    check(&Snapshot { race: Some(fresh), ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn the_most_advanced_claims_and_silence_does_not_block() {
    check(&orphan(), CLAIM, Why::MostAdvanced);
    let race = Some(answers(&[("b", None), ("c", None)]));
    check(&Snapshot { race, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn who_has_less_leaves_the_key_to_its_peer() {
    let race = Some(answers(&[("c", Some(peer(1001)))]));
    let s = Snapshot { race, ..orphan() };
    check(&s, Action::Wait, Why::PeerAhead { position: Lsn(1001) });
}

#[test]
fn a_longer_log_on_an_older_timeline_is_not_more() {
    let mut old = peer(5000);
    old.timeline = Timeline(2);
    let race = Some(answers(&[("c", Some(old))]));
    check(&Snapshot { race, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_higher_priority_wins_among_equals_only() {
    let preferred =
        |position| Peer { tags: tags(json!({"failover_priority": 2})), ..peer(position) };
    let race = Some(answers(&[("c", Some(preferred(1000)))]));
    check(&Snapshot { race, ..orphan() }, Action::Wait, Why::PeerPreferred);
    let race = Some(answers(&[("c", Some(preferred(999)))]));
    check(&Snapshot { race, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_peer_that_may_not_lead_is_no_rival() {
    let tagged = Peer { tags: tags(json!({"nofailover": true})), ..peer(9999) };
    let failed = Peer { stands_back: true, ..peer(9999) };
    for peer in [tagged, failed] {
        let race = Some(answers(&[("c", Some(peer))]));
        check(&Snapshot { race, ..orphan() }, CLAIM, Why::MostAdvanced);
    }
}

#[test]
fn a_living_primary_is_not_raced_against() {
    let race = Some(answers(&[("c", Some(Peer { primary: true, ..peer(10) }))]));
    check(&Snapshot { race, ..orphan() }, Action::Wait, Why::OtherIsPrimary);
}

#[test]
fn a_member_tagged_nofailover_never_claims() {
    for value in [json!({"nofailover": true}), json!({"failover_priority": 0})] {
        let s = Snapshot { tags: tags(value), ..orphan() };
        check(&s, Action::Wait, Why::NoFailoverTag);
    }
}

#[test]
fn maintenance_mode_promotes_nobody_by_itself() {
    // A4
    let paused = |change: fn(&mut ClusterState)| {
        with(led_by(None), |c| {
            c.config = Some(config(json!({"pause": true})));
            change(c);
        })
    };
    let s = Snapshot { cluster: paused(|_| {}), ..orphan() };
    check(&s, Action::Wait, Why::Paused);
    let s = Snapshot { cluster: paused(|c| c.failover.member = Some("a".into())), ..orphan() };
    check(&s, CLAIM, Why::NamedCandidate);
}

#[test]
fn a_promise_to_a_leader_without_the_store_is_kept() {
    // A3.1
    let s = Snapshot { promise_until: Some(now() + Duration::from_millis(1)), ..orphan() };
    check(&s, Action::Wait, Why::PromisedFailsafe);
    check(&Snapshot { promise_until: Some(now()), ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_promise_binds_the_named_candidate_too() {
    let cluster = with(led_by(None), |c| c.failover.member = Some("a".into()));
    let s = Snapshot { cluster, promise_until: Some(now() + seconds(1)), ..orphan() };
    check(&s, Action::Wait, Why::PromisedFailsafe);
}

#[test]
fn who_would_not_be_asked_by_a_leader_without_the_store_does_not_race() {
    // A3.3: b asks the members of this list, is confirmed by all of them, and stays.
    let failsafe = |names: &[&str]| {
        with(led_by(None), |c| {
            c.config = Some(config(json!({"failsafe_mode": true})));
            c.failsafe = Some(
                names.iter().map(|name| ((*name).to_owned(), format!("http://{name}"))).collect(),
            );
        })
    };
    let s = Snapshot { cluster: failsafe(&["b", "c"]), ..orphan() };
    check(&s, Action::Wait, Why::NotInFailsafeList);
    check(&Snapshot { cluster: failsafe(&["a", "b", "c"]), ..orphan() }, CLAIM, Why::MostAdvanced);
    let forced = with((*failsafe(&["b", "c"])).clone(), |c| c.failover.member = Some("a".into()));
    check(&Snapshot { cluster: forced, ..orphan() }, CLAIM, Why::NamedCandidate);
    let off = with(led_by(None), |c| c.failsafe = Some(BTreeMap::new()));
    check(&Snapshot { cluster: off, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn who_may_not_race_is_no_rival_although_it_has_more_or_is_preferred() {
    // Simulation, asynchronous, seed 585: everybody waited for a preferred member that waited.
    let cluster = with(led_by(None), |c| {
        c.config = Some(config(json!({"failsafe_mode": true})));
        let list = ["a", "b"].map(|name| (name.to_owned(), format!("http://{name}")));
        c.failsafe = Some(BTreeMap::from(list));
    });
    let preferred = Peer { tags: tags(json!({"failover_priority": 2})), ..peer(1000) };
    for rival in [preferred, peer(2000)] {
        let race = Some(answers(&[("c", Some(rival))]));
        let s = Snapshot { cluster: Arc::clone(&cluster), race, ..orphan() };
        check(&s, CLAIM, Why::MostAdvanced);
    }
}

#[test]
fn who_failed_to_lead_lets_others_try() {
    // A6.3
    let s = Snapshot { race_not_before: Some(now() + seconds(1)), ..orphan() };
    check(&s, Action::Wait, Why::LostRecently);
    check(&Snapshot { race_not_before: Some(now()), ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_standby_too_far_behind_does_not_race() {
    let cluster = with(led_by(None), |c| {
        c.config = Some(config(json!({"maximum_lag_on_failover": 100})));
        c.status = Some(Status { optime: Lsn(1101), ..Status::default() });
    });
    let s = Snapshot { cluster, ..orphan() };
    check(&s, Action::Wait, Why::TooFarBehind { lag_bytes: 101 });
    let cluster = with(led_by(None), |c| {
        c.config = Some(config(json!({"maximum_lag_on_failover": 100})));
        c.status = Some(Status { optime: Lsn(1100), ..Status::default() });
    });
    check(&Snapshot { cluster, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn an_older_timeline_is_refused_where_the_operator_wants_it() {
    let facts = StandbyFacts { timeline: Timeline(2), ..standby_facts() };
    let s = Snapshot { server: Server::Standby(facts), race: Some(answers(&[])), ..orphan() };
    check(&s, CLAIM, Why::MostAdvanced);
    let cluster = with(led_by(None), |c| c.config = Some(config(json!({"check_timeline": true}))));
    check(&Snapshot { cluster, ..s }, Action::Wait, Why::TimelineBehind);
}

#[test]
fn the_position_is_the_further_of_received_and_replayed() {
    let facts = StandbyFacts { received: Lsn(0), replayed: Lsn(1000), ..standby_facts() };
    check(&Snapshot { server: Server::Standby(facts), ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn the_named_candidate_claims_although_a_peer_has_more() {
    let cluster = with(led_by(None), |c| c.failover.member = Some("a".into()));
    let race = Some(answers(&[("c", Some(peer(2000)))]));
    check(&Snapshot { cluster, race, ..orphan() }, CLAIM, Why::NamedCandidate);
}

#[test]
fn the_others_wait_for_a_named_candidate_that_answers() {
    let cluster = with(led_by(None), |c| c.failover.member = Some("c".into()));
    let s = Snapshot { cluster, ..orphan() };
    check(&s, Action::Wait, Why::OtherIsCandidate);
    let race = Some(answers(&[("c", None)]));
    check(&Snapshot { race, ..s }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_request_that_nobody_cleared_does_not_keep_the_cluster_without_a_leader() {
    // A6.5: a switchover to c was given up long ago; b dies, and c may not lead.
    let stale = |c: &mut ClusterState| {
        c.failover.leader = Some("b".into());
        c.failover.member = Some("c".into());
    };
    let cluster = with(led_by(None), |c| {
        stale(c);
        synchronous(c, "b", &["a"]);
    });
    check(&Snapshot { cluster, ..orphan() }, CLAIM, Why::MostAdvanced);
    let cluster = with(led_by(None), |c| {
        stale(c);
        c.config = Some(config(json!({"maximum_lag_on_failover": 100})));
    });
    let race = Some(answers(&[("c", Some(peer(899)))]));
    check(&Snapshot { cluster, race, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_request_for_later_names_nobody_yet() {
    let cluster = with(led_by(None), |c| {
        c.failover.member = Some("c".into());
        c.failover.scheduled_at = Some("2030-01-01T00:00:00+00:00".into());
    });
    check(&Snapshot { cluster, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_node_without_the_watchdog_that_it_requires_does_not_lead() {
    check(&Snapshot { lacks_watchdog: true, ..orphan() }, Action::Wait, Why::NoWatchdog);
}

/// An answer, or a look at this node's own server, from before the question says nothing of what was acknowledged in
/// between.
#[test]
fn only_what_was_looked_at_after_nobody_led_counts() {
    let before = now().minus(Duration::from_millis(1));
    check(&Snapshot { observed_at: before, ..orphan() }, Action::AskPeers, Why::PeersUnknown);
    let old = Race { sync_revision: Revision(59), ..answers(&[]) };
    check(&Snapshot { race: Some(old), ..orphan() }, Action::AskPeers, Why::PeersUnknown);
}

#[test]
fn a_standby_that_has_not_read_its_own_log_does_not_race() {
    let facts = StandbyFacts { wal_known: false, ..standby_facts() };
    let s = Snapshot { server: Server::Standby(facts), ..orphan() };
    check(&s, Action::Wait, Why::OwnWalUnread);
    // However far behind it seems: that is not known yet.
    let cluster = with(led_by(None), |c| c.status.as_mut().unwrap().optime = Lsn(u64::MAX));
    check(&Snapshot { cluster, ..s.clone() }, Action::Wait, Why::OwnWalUnread);
    let cluster = with(led_by(None), |c| c.failover.member = Some("a".into()));
    check(&Snapshot { cluster, ..s }, CLAIM, Why::NamedCandidate);
}

#[test]
fn a_member_without_a_position_is_no_rival() {
    let unknown = Peer { position: None, ..peer(0) };
    let race = Some(answers(&[("b", None), ("c", Some(unknown))]));
    check(&Snapshot { race, ..orphan() }, CLAIM, Why::MostAdvanced);
}

/// `a` is on timeline 3 at 1000.
#[test]
fn positions_are_compared_where_timelines_allow_it() {
    let ahead = |lsn| Why::PeerAhead { position: Lsn(lsn) };
    for (timeline, position, expected) in [
        (3, 1000, None),
        (3, 1001, Some(ahead(1001))),
        (4, 900, Some(ahead(900))),
        // Left on a way that nobody went on.
        (2, 1100, None),
        (2, 900, None),
        // Not told: the position alone.
        (0, 1001, Some(ahead(1001))),
        (0, 1000, None),
    ] {
        let other = Peer { timeline: Timeline(timeline), ..peer(position) };
        let race = Some(answers(&[("b", None), ("c", Some(other))]));
        let decision = decide(&Snapshot { race, ..orphan() });
        let refused = (decision.action != CLAIM).then_some(decision.why);
        assert_eq!(refused, expected, "timeline {timeline}, position {position}");
    }
}
