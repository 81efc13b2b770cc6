//! Planned handovers: the candidate's side, the bystanders', and the judgements of the leader.

use kornak_cluster::{Ack, ProxyRegistration};

use super::*;
use crate::ha::switchover::{
    Busy, Gate, Refusal, candidate, gate, have_prepared, may_drain, pause_after,
};

fn switching(record: Handover) -> Snapshot {
    let cluster = with(led_by(None), |c| c.handover = Some(record));
    Snapshot { cluster, race: None, ..standby() }
}

#[test]
fn the_candidate_takes_the_released_key_without_asking() {
    check(&switching(handover("a", HandoverPhase::Switch)), TAKE_OVER, Why::NamedCandidate);
}

#[test]
fn the_candidate_needs_the_shutdown_checkpoint() {
    let mut record = handover("a", HandoverPhase::Switch);
    record.wal_end = Some(Lsn(1001));
    let needed = Lsn(1001);
    check(&switching(record), Action::Look, Why::CandidateLacksWal { needed });
}

#[test]
fn the_candidate_does_not_take_a_key_that_was_not_released_but_lost() {
    let mut record = handover("a", HandoverPhase::Switch);
    record.wal_end = None;
    check(&switching(record), Action::Wait, Why::OtherIsCandidate);
}

#[test]
fn bystanders_leave_the_key_to_the_candidate() {
    for phase in [HandoverPhase::Switch, HandoverPhase::Promote] {
        check(&switching(handover("c", phase)), Action::Wait, Why::OtherIsCandidate);
    }
}

#[test]
fn before_the_switch_a_record_changes_nothing_in_a_race() {
    for phase in [HandoverPhase::Prepare, HandoverPhase::Drain] {
        check(&switching(handover("c", phase)), Action::AskPeers, Why::PeersUnknown);
        check(&switching(handover("a", phase)), Action::AskPeers, Why::PeersUnknown);
    }
}

#[test]
fn a_record_of_a_later_version_is_not_obeyed() {
    let mut record = handover("c", HandoverPhase::Switch);
    record.v = 2;
    check(&switching(record), Action::AskPeers, Why::PeersUnknown);
    check(&switching(handover("c", HandoverPhase::Unknown)), Action::AskPeers, Why::PeersUnknown);
}

#[test]
fn the_old_leader_may_come_back_in_place() {
    // A6: whoever of the two creates the key first has everything.
    let mut record = handover("c", HandoverPhase::Switch);
    record.leader = "a".into();
    let s = Snapshot { race: orphan().race, ..switching(record) };
    check(&s, CLAIM, Why::MostAdvanced);
}

#[test]
fn the_candidate_is_bound_by_its_tag_its_failure_and_an_unfenced_primary_only() {
    let s = switching(handover("a", HandoverPhase::Switch));
    let tagged = Snapshot { tags: tags(json!({"nofailover": true})), ..s.clone() };
    check(&tagged, Action::Wait, Why::NoFailoverTag);
    // A6.3
    let failed = Snapshot { race_not_before: Some(now() + seconds(1)), ..s.clone() };
    check(&failed, Action::Wait, Why::LostRecently);
    let cluster = with((*s.cluster).clone(), |c| {
        c.config = Some(config(json!({"pause": true})));
    });
    check(&Snapshot { cluster, ..s.clone() }, TAKE_OVER, Why::NamedCandidate);
    let cluster = with((*s.cluster).clone(), |c| {
        c.unfenced = unfenced("b");
    });
    check(&Snapshot { cluster, ..s }, Action::Wait, Why::UnfencedPrimary);
}

#[test]
fn a_promise_to_the_leader_that_releases_the_key_is_served() {
    // The store was away for a moment, and a switchover follows.
    let promise_until = Some(now() + seconds(10));
    let s = Snapshot { promise_until, ..switching(handover("a", HandoverPhase::Switch)) };
    check(&s, TAKE_OVER, Why::NamedCandidate);
    let cluster = with(led_by(Some("a")), |c| {
        c.handover = Some(handover("a", HandoverPhase::Promote));
    });
    let won = Snapshot { cluster, promise_until, ..winner() };
    check(&won, Action::Promote, Why::WonLease);
    let mut unreleased = handover("a", HandoverPhase::Drain);
    unreleased.wal_end = None;
    let s = Snapshot { promise_until, race: orphan().race, ..switching(unreleased) };
    check(&s, Action::Wait, Why::PromisedFailsafe);
}

#[test]
fn a_leader_that_hands_over_is_busy_and_not_restarted_in_between() {
    let s = Snapshot { job: Some(Job::Handover), server: Server::Stopped, ..primary() };
    check(&s, Action::Wait, Why::BusyWith(Job::Handover));
}

#[test]
fn an_agent_that_finds_itself_the_holder_of_the_key_finishes_what_was_begun() {
    // A6: the agent was restarted after the stop and before the release.
    let cluster = with(led_by(Some("a")), |c| synchronous(c, "a", &["b"]));
    let s = Snapshot { cluster, ..crashed_leader() };
    check(&s, Action::Release, Why::StandbyHasEverything);
    check(&crashed_leader(), Action::StartPrimary, Why::KeyIsOursServerIsDown);
}

// The leader's judgements.

#[test]
fn the_closest_standby_is_chosen_and_priority_breaks_ties() {
    let cluster = led_by(Some("a"));
    let facts = primary_facts();
    let choose = |cluster: &ClusterState, facts: &PrimaryFacts, asked: Option<&str>| {
        candidate("a", cluster, &facts.standbys, facts.lsn, asked)
    };
    assert_eq!(choose(&cluster, &facts, None), Ok("b".into()));
    let mut behind = facts.clone();
    behind.standbys[0].flush = Lsn(999);
    assert_eq!(choose(&cluster, &behind, None), Ok("c".into()));
    let preferred = with(cluster.clone(), |c| {
        c.members.get_mut("c").unwrap().tags = tags(json!({"failover_priority": 5}));
    });
    assert_eq!(choose(&preferred, &facts, None), Ok("c".into()));
    assert_eq!(choose(&cluster, &behind, Some("b")), Ok("b".into()));
}

#[test]
fn a_candidate_that_cannot_take_over_is_refused_with_its_reason() {
    let refusal = |change: fn(&mut ClusterState, &mut PrimaryFacts), asked: Option<&str>| {
        let (mut cluster, mut facts) = (led_by(Some("a")), primary_facts());
        change(&mut cluster, &mut facts);
        candidate("a", &cluster, &facts.standbys, facts.lsn, asked).unwrap_err()
    };
    let name = || "b".to_owned();
    assert_eq!(refusal(|_, _| {}, Some("a")), Refusal::Unknown);
    assert_eq!(refusal(|_, _| {}, Some("x")), Refusal::Unknown);
    assert_eq!(refusal(|c, _| c.members.retain(|name, _| name == "a"), None), Refusal::Alone);
    assert_eq!(refusal(|_, f| f.standbys.clear(), None), Refusal::NoneFit);
    assert_eq!(
        refusal(|_, f| f.standbys[0].streaming = false, Some("b")),
        Refusal::NotStreaming { name: name() }
    );
    assert_eq!(refusal(|c, _| synchronous(c, "a", &["c"]), Some("b")), Refusal::NotSynchronous);
    assert_eq!(
        refusal(
            |c, _| c.members.get_mut("b").unwrap().tags = tags(json!({"nofailover": true})),
            Some("b")
        ),
        Refusal::NoFailover { name: name() }
    );
    assert_eq!(
        refusal(
            |c, f| {
                c.config = Some(config(json!({"maximum_lag_on_failover": 10})));
                f.standbys[0].flush = Lsn(989);
            },
            Some("b")
        ),
        Refusal::Behind { name: name(), lag_bytes: 11 }
    );
}

#[test]
fn nobody_is_held_for_a_transaction_that_will_not_end_in_time() {
    // A14
    let hold = seconds(1);
    assert!(may_drain(Busy::default(), hold));
    let busy = |millis| Busy { backends: 1, oldest: Duration::from_millis(millis) };
    assert!(may_drain(busy(499), hold));
    assert!(!may_drain(busy(500), hold));
    let pauses: Duration = (1..=3).map(pause_after).sum();
    assert!(pauses >= seconds(20), "three attempts, then a long pause");
}

fn proxies(speaks: &[(&str, &[u32])]) -> BTreeMap<String, ProxyRegistration> {
    speaks
        .iter()
        .map(|(name, speaks)| {
            let registration = ProxyRegistration {
                speaks: speaks.to_vec(),
                host: String::new(),
                pid: 0,
                status: None,
                cancel: None,
                prepares: false,
            };
            ((*name).to_owned(), registration)
        })
        .collect()
}

#[test]
fn proxies_that_prepare_are_waited_for_before_the_drain() {
    let mut proxies = proxies(&[("p", &[1]), ("old", &[1]), ("later", &[7])]);
    for name in ["p", "later"] {
        proxies.get_mut(name).expect("it is there").prepares = true;
    }
    let mut acks = BTreeMap::new();
    assert!(!have_prepared("h", &proxies, &acks));
    acks.insert("p".to_owned(), Ack { id: "g".into(), attempt: 0 });
    assert!(!have_prepared("h", &proxies, &acks), "that was another handover");
    acks.insert("p".to_owned(), Ack { id: "h".into(), attempt: 0 });
    assert!(have_prepared("h", &proxies, &acks));
    proxies.clear();
    assert!(have_prepared("h", &proxies, &acks));
}

#[test]
fn the_gate_opens_for_acknowledgements_of_this_attempt_and_an_idle_server() {
    // A5.2, A5.4, A5.5
    let attempt = ("h", 2);
    let ack = |id: &str, attempt| Ack { id: id.into(), attempt };
    let judge = |acks: &[(&str, Ack)], backends, after_millis| {
        let acks = acks.iter().map(|(name, ack)| ((*name).to_owned(), ack.clone())).collect();
        let busy = Busy { backends, oldest: Duration::ZERO };
        let proxies = proxies(&[("p", &[1]), ("q", &[1]), ("later", &[7])]);
        let at = now() + Duration::from_millis(after_millis);
        gate(at, now(), seconds(1), attempt, &proxies, &acks, busy)
    };
    let all = [("p", ack("h", 2)), ("q", ack("h", 2))];
    assert_eq!(judge(&all, 0, 100), Gate::Open);
    assert_eq!(judge(&all[..1], 0, 100), Gate::Waiting);
    assert_eq!(judge(&[("p", ack("h", 1)), ("q", ack("h", 2))], 0, 100), Gate::Waiting);
    assert_eq!(judge(&[("p", ack("g", 2)), ("q", ack("h", 2))], 0, 100), Gate::Waiting);
    assert_eq!(judge(&all, 1, 100), Gate::Waiting);
    assert_eq!(judge(&all, 0, 949), Gate::Open);
    assert_eq!(judge(&all, 0, 950), Gate::TimeUp);
}
