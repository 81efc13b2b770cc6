use kornak_cluster::Revision;

use super::*;

const OLD: Epoch = Epoch { store: 1, revision: Revision(10) };
const NEW: Epoch = Epoch { store: 1, revision: Revision(20) };

fn record(phase: HandoverPhase, attempt: u32) -> Handover {
    Handover {
        v: 1,
        id: "h".to_owned(),
        attempt,
        phase,
        group: None,
        leader: "a".to_owned(),
        candidate: Some("b".to_owned()),
        epoch: OLD,
        max_hold_ms: 1000,
        switch_hold_ms: 5000,
        wal_end: None,
    }
}

/// Facts of a proxy whose sessions are all outside, and whose leader `a` is proven.
fn facts(record: Option<&Handover>) -> Facts<'_> {
    Facts {
        record,
        inside: 0,
        serving: Some(OLD),
        proof: Proof(1),
        to_listen: 0,
        max_hold: Duration::from_secs(1),
    }
}

fn at(millis: u64) -> Moment {
    Moment::at_millis(millis)
}

fn attempt(number: u32) -> Attempt {
    Attempt { id: "h".to_owned(), number }
}

fn step(hold: &mut Hold, facts: &Facts<'_>, now: u64) -> Vec<Effect> {
    let mut effects = Vec::new();
    hold.on(facts, at(now), &mut effects);
    effects
}

fn opened(millis: u64) -> Vec<Effect> {
    vec![Effect::Open(Duration::from_millis(millis))]
}

#[test]
fn a_drain_closes_and_is_acknowledged_once_nobody_is_inside() {
    let mut hold = Hold::default();
    let drain = record(HandoverPhase::Drain, 1);
    let busy = Facts { inside: 2, ..facts(Some(&drain)) };
    assert_eq!(step(&mut hold, &busy, 0), [Effect::Close]);
    assert_eq!(step(&mut hold, &busy, 100), []);
    let quiet = facts(Some(&drain));
    assert_eq!(step(&mut hold, &quiet, 200), [Effect::Acknowledge(attempt(1))]);
    hold.acknowledged(&attempt(1));
    assert_eq!(step(&mut hold, &quiet, 300), []);
}

#[test]
fn a_drain_without_a_switch_ends_by_our_own_clock_and_does_not_close_again() {
    let mut hold = Hold::default();
    let drain = record(HandoverPhase::Drain, 1);
    step(&mut hold, &facts(Some(&drain)), 0);
    assert_eq!(hold.deadline(), Some(at(1300)));
    assert_eq!(step(&mut hold, &facts(Some(&drain)), 1300), opened(1300));
    assert_eq!(step(&mut hold, &facts(Some(&drain)), 1400), []);
    let again = record(HandoverPhase::Drain, 2);
    assert_eq!(step(&mut hold, &facts(Some(&again)), 5000), [Effect::Close]);
}

#[test]
fn this_proxys_own_limit_is_kept() {
    let mut hold = Hold::default();
    let drain = record(HandoverPhase::Drain, 1);
    let limited = Facts { max_hold: Duration::from_millis(200), ..facts(Some(&drain)) };
    step(&mut hold, &limited, 0);
    assert_eq!(hold.deadline(), Some(at(500)));
    assert_eq!(step(&mut hold, &limited, 10), [], "it does not promise what it will not keep");
}

#[test]
fn going_back_to_prepare_or_vanishing_opens() {
    for after in [Some(record(HandoverPhase::Prepare, 2)), None] {
        let mut hold = Hold::default();
        step(&mut hold, &facts(Some(&record(HandoverPhase::Drain, 1))), 0);
        assert_eq!(step(&mut hold, &facts(after.as_ref()), 400), opened(400));
        assert_eq!(*hold.state(), State::Open);
    }
}

#[test]
fn after_a_switch_only_a_new_proof_opens() {
    let mut hold = Hold::default();
    step(&mut hold, &facts(Some(&record(HandoverPhase::Drain, 1))), 0);
    let switch = record(HandoverPhase::Switch, 1);
    assert_eq!(step(&mut hold, &facts(Some(&switch)), 100), [Effect::Close]);
    let promote = record(HandoverPhase::Promote, 1);
    let waiting = Facts { serving: None, ..facts(Some(&promote)) };
    assert_eq!(step(&mut hold, &waiting, 200), []);
    let gone = Facts { serving: None, ..facts(None) };
    assert_eq!(step(&mut hold, &gone, 250), [], "the record is gone, nobody is proven yet");
    let proven = Facts { serving: Some(NEW), proof: Proof(2), ..facts(None) };
    assert_eq!(step(&mut hold, &proven, 300), opened(300));
}

#[test]
fn a_candidate_that_proves_itself_during_promote_opens_at_once() {
    let mut hold = Hold::default();
    step(&mut hold, &facts(Some(&record(HandoverPhase::Switch, 1))), 0);
    let promote = record(HandoverPhase::Promote, 1);
    let old_proof = facts(Some(&promote));
    assert_eq!(step(&mut hold, &old_proof, 50), [], "the old leader's proof does not count");
    let proven = Facts { serving: Some(NEW), proof: Proof(2), ..facts(Some(&promote)) };
    assert_eq!(step(&mut hold, &proven, 90), opened(90));
    assert_eq!(step(&mut hold, &proven, 95), []);
    assert_eq!(step(&mut hold, &Facts { record: None, ..proven }, 99), []);
    assert_eq!(*hold.state(), State::Open);
}

#[test]
fn the_old_leader_that_restarts_in_place_opens_too() {
    let mut hold = Hold::default();
    step(&mut hold, &facts(Some(&record(HandoverPhase::Switch, 1))), 0);
    let back = Facts { serving: Some(OLD), proof: Proof(2), ..facts(None) };
    assert_eq!(step(&mut hold, &back, 1500), opened(1500));
}

#[test]
fn a_switch_that_never_ends_releases_by_our_own_clock() {
    let mut hold = Hold::default();
    let switch = record(HandoverPhase::Switch, 1);
    let nobody = Facts { serving: None, ..facts(Some(&switch)) };
    step(&mut hold, &nobody, 0);
    assert_eq!(step(&mut hold, &nobody, 11_000), opened(11_000));
    assert_eq!(step(&mut hold, &nobody, 11_001), []);
}

#[test]
fn a_switch_after_our_own_release_closes_again() {
    let mut hold = Hold::default();
    step(&mut hold, &facts(Some(&record(HandoverPhase::Drain, 1))), 0);
    step(&mut hold, &facts(Some(&record(HandoverPhase::Drain, 1))), 1300);
    let switch = record(HandoverPhase::Switch, 1);
    assert_eq!(step(&mut hold, &facts(Some(&switch)), 1310), [Effect::Close]);
}

#[test]
fn a_record_that_we_do_not_understand_holds_nobody() {
    let mut hold = Hold::default();
    let unknown = Handover { v: 2, ..record(HandoverPhase::Drain, 1) };
    assert_eq!(step(&mut hold, &facts(Some(&unknown)), 0), []);
    let phase = record(HandoverPhase::Unknown, 1);
    assert_eq!(step(&mut hold, &facts(Some(&phase)), 0), []);
}

/// Brings a hold of a Citus group's switchover to `switch` at 100 ms.
fn switching_a_group() -> (Hold, Handover) {
    let record =
        Handover { group: Some(kornak_cluster::GroupId(1)), ..record(HandoverPhase::Switch, 1) };
    let mut hold = Hold::default();
    assert_eq!(step(&mut hold, &facts(Some(&record)), 100), [Effect::Close]);
    (hold, record)
}

#[test]
fn in_a_citus_cluster_a_proven_server_is_not_enough_until_the_coordinator_knows_it() {
    let (mut hold, switch) = switching_a_group();
    let promote = Handover { phase: HandoverPhase::Promote, ..switch.clone() };
    let proven = Facts { serving: Some(NEW), proof: Proof(2), ..facts(Some(&promote)) };
    assert_eq!(step(&mut hold, &proven, 300), []);
    let settle = Handover { phase: HandoverPhase::Settle, ..switch };
    let proven = Facts { record: Some(&settle), ..proven };
    let most = Effect::OpenMost(Duration::from_millis(300));
    assert_eq!(step(&mut hold, &proven, 400), [most]);
    assert_eq!(step(&mut hold, &proven, 450), []);
    let gone = Facts { record: None, ..proven };
    assert_eq!(step(&mut hold, &gone, 500), opened(400));
    assert_eq!(*hold.state(), State::Open);
}

#[test]
fn a_coordinator_that_never_knows_and_workers_that_never_hear_release_by_our_own_clock() {
    let (mut hold, switch) = switching_a_group();
    let promote = Handover { phase: HandoverPhase::Promote, ..switch.clone() };
    let proven = Facts { serving: Some(NEW), proof: Proof(2), ..facts(Some(&promote)) };
    assert_eq!(step(&mut hold, &proven, 11_100), opened(11_000));
    let (mut hold, switch) = switching_a_group();
    let settle = Handover { phase: HandoverPhase::Settle, ..switch };
    let proven = Facts { record: Some(&settle), ..proven };
    assert_eq!(step(&mut hold, &proven, 400).len(), 1);
    assert_eq!(step(&mut hold, &proven, 11_100), opened(11_000));
}

#[test]
fn who_listened_is_waited_for_and_not_for_long() {
    let switching = || {
        let mut hold = Hold::default();
        let switch = record(HandoverPhase::Switch, 1);
        assert_eq!(step(&mut hold, &facts(Some(&switch)), 0), [Effect::Close]);
        hold
    };
    let promote = record(HandoverPhase::Promote, 1);
    let waits =
        Facts { serving: Some(NEW), proof: Proof(2), to_listen: 3, ..facts(Some(&promote)) };
    let mut hold = switching();
    assert_eq!(step(&mut hold, &waits, 200), []);
    assert_eq!(hold.deadline(), Some(at(700)));
    assert_eq!(step(&mut hold, &Facts { to_listen: 0, ..waits }, 230), opened(230));
    let mut hold = switching();
    step(&mut hold, &waits, 200);
    // The record is gone; they still do not listen.
    let gone = Facts { record: None, ..waits };
    assert_eq!(step(&mut hold, &gone, 300), []);
    assert_eq!(step(&mut hold, &gone, 700), opened(700));
}
