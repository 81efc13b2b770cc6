//! Synchronous mode: who may take over, and in which order the two lists change (A13).

use super::*;
use crate::ha::sync::{SyncStep, plan};

fn orphan_of(leader: &str, standbys: &[&str]) -> Snapshot {
    let cluster = with(led_by(None), |c| synchronous(c, leader, standbys));
    Snapshot { cluster, ..orphan() }
}

#[test]
fn only_a_member_that_the_store_names_may_take_over() {
    check(&orphan_of("b", &["a"]), CLAIM, Why::MostAdvanced);
    check(&orphan_of("b", &["c"]), Action::Wait, Why::NotSynchronous);
    check(&orphan_of("b", &[]), Action::Wait, Why::NotSynchronous);
    check(&orphan_of("a", &[]), CLAIM, Why::MostAdvanced);
    check(&orphan_of("B", &["A"]), CLAIM, Why::MostAdvanced);
}

#[test]
fn a_member_that_may_not_take_over_is_no_rival_although_it_has_more() {
    let race = Some(answers(&[("c", Some(peer(3000)))]));
    let s = Snapshot { race, ..orphan_of("b", &["a"]) };
    check(&s, CLAIM, Why::MostAdvanced);
    let race = Some(answers(&[("b", Some(peer(3000)))]));
    let s = Snapshot { race, ..orphan_of("b", &["a"]) };
    check(&s, Action::Wait, Why::PeerAhead { position: Lsn(3000) });
}

#[test]
fn an_operator_may_name_a_member_that_lacks_commits_but_a_switchover_may_not() {
    let cluster = with((*orphan_of("b", &["c"]).cluster).clone(), |c| {
        c.failover.member = Some("a".into());
    });
    let s = Snapshot { cluster, ..orphan() };
    check(&s, CLAIM, Why::NamedCandidate);
    let cluster = with((*s.cluster).clone(), |c| c.failover.leader = Some("b".into()));
    check(&Snapshot { cluster, ..s }, Action::Wait, Why::NotSynchronous);
}

#[test]
fn before_synchronous_mode_has_named_anybody_the_race_is_open() {
    let cluster = with(led_by(None), |c| {
        c.config = Some(config(json!({"synchronous_mode": true})));
        c.sync = Some(SyncState::default());
    });
    check(&Snapshot { cluster, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_list_left_over_from_synchronous_mode_binds_nobody() {
    let cluster = with(led_by(None), |c| c.sync = Some(SyncState::new("b", &names(&["c"]))));
    check(&Snapshot { cluster, ..orphan() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_winner_is_promoted_once_the_store_names_it() {
    // Commits acknowledged before that would be lost by a failover to an old standby.
    let named = |leader| {
        let cluster = with(led_by(Some("a")), |c| synchronous(c, leader, &[]));
        Snapshot { cluster, ..winner() }
    };
    check(&named("a"), Action::Promote, Why::WonLease);
    check(&named("b"), Action::Release, Why::SyncNotOurs);
    // The leader of a standby cluster that is to be a primary: it has the key, and nobody is named.
    let unnamed = |change: fn(&mut ClusterState)| {
        let cluster = with(led_by(Some("a")), |c| {
            c.config = Some(config(json!({"synchronous_mode": true})));
            change(c);
        });
        Snapshot { cluster, ..winner() }
    };
    check(&unnamed(|_| {}), Action::Promote, Why::WonLease);
    check(&unnamed(|c| c.sync = Some(SyncState::default())), Action::Promote, Why::WonLease);
    let unknown = unnamed(|c| {
        c.doubts.insert(SafetyKey::Sync, kornak_cluster::Doubt::Unknown);
    });
    check(&unknown, Action::Release, Why::SyncNotOurs);
    let old = with(led_by(None), |c| synchronous(c, "b", &["a"]));
    check(&Snapshot { cluster: old, ..winner() }, Action::Wait, Why::ViewBehindLease);
}

#[test]
fn a_crashed_leader_leaves_to_a_standby_that_has_everything() {
    let cluster = |standbys: &[&str]| with(led_by(Some("a")), |c| synchronous(c, "a", standbys));
    let s = Snapshot { cluster: cluster(&["b"]), ..crashed_leader() };
    check(&s, Action::Release, Why::StandbyHasEverything);
    let s = Snapshot { cluster: cluster(&[]), ..crashed_leader() };
    check(&s, Action::StartPrimary, Why::KeyIsOursServerIsDown);
}

#[test]
fn a_crashed_leader_starts_in_place_if_that_standby_cannot_take_over() {
    let cluster = |change: fn(&mut ClusterState)| {
        with(led_by(Some("a")), |c| {
            synchronous(c, "a", &["b"]);
            change(c);
        })
    };
    for change in [
        (|c| drop(c.members.remove("b"))) as fn(&mut ClusterState),
        |c| c.members.get_mut("b").unwrap().state = kornak_cluster::MemberState::Stopped,
        |c| c.members.get_mut("b").unwrap().tags = tags(json!({"nofailover": true})),
        |c| c.sync.as_mut().unwrap().leader = Some("c".into()),
        |c| c.config = Some(config(json!({}))),
    ] {
        let s = Snapshot { cluster: cluster(change), ..crashed_leader() };
        check(&s, Action::StartPrimary, Why::KeyIsOursServerIsDown);
    }
}

// The order of the two lists.

/// The answer of `plan` for a leader `a`: the store names `stored`, commits wait for `waited`, and the
/// standbys `streaming` are connected (in capitals: and synchronous, with everything).
fn step(
    stored: Option<&[&str]>,
    waited: &str,
    streaming: &[&str],
    change: serde_json::Value,
) -> SyncStep {
    let mut settings = json!({"synchronous_mode": true});
    let serde_json::Value::Object(change) = change else { panic!("an object") };
    settings.as_object_mut().unwrap().extend(change);
    let cluster = with(led_by(Some("a")), |c| {
        c.config = Some(config(settings));
        c.sync = stored.map(|standbys| SyncState::new("a", &names(standbys)));
    });
    let row = |name: &&str| {
        let ready = name.chars().all(char::is_uppercase);
        StandbyRow {
            application_name: (*name).to_owned(),
            streaming: true,
            synchronous: ready,
            flush: if ready { Lsn(1000) } else { Lsn(900) },
            acknowledged: if ready { Lsn(1000) } else { Lsn(900) },
            ..StandbyRow::default()
        }
    };
    let facts = PrimaryFacts {
        standbys: streaming.iter().map(row).collect(),
        sync_names: waited.to_owned(),
        sync_names_since: Some(Lsn(950)),
        ..primary_facts()
    };
    plan("a", &cluster, &facts)
}

fn publish(standbys: &[&str]) -> SyncStep {
    SyncStep::Publish(SyncState::new("a", &names(standbys)))
}

fn wait_for(text: &str) -> SyncStep {
    SyncStep::SetNames(text.to_owned())
}

#[test]
fn a_standby_is_waited_for_before_the_store_names_it() {
    assert_eq!(step(None, "", &["b"], json!({})), publish(&[]));
    assert_eq!(step(Some(&[]), "", &["b"], json!({})), wait_for(r#"1 ("b")"#));
    assert_eq!(step(Some(&[]), r#"1 ("b")"#, &["b"], json!({})), SyncStep::Settled);
    assert_eq!(step(Some(&[]), r#"1 ("b")"#, &["B"], json!({})), publish(&["b"]));
    assert_eq!(step(Some(&["b"]), r#"1 ("b")"#, &["B"], json!({})), SyncStep::Settled);
}

#[test]
fn a_standby_leaves_the_store_before_commits_stop_waiting_for_it() {
    assert_eq!(step(Some(&["b"]), r#"1 ("b")"#, &[], json!({})), publish(&[]));
    assert_eq!(step(Some(&[]), r#"1 ("b")"#, &[], json!({})), wait_for(""));
    assert_eq!(step(Some(&["b"]), r#"1 ("b")"#, &["c"], json!({})), publish(&[]));
    assert_eq!(step(Some(&[]), r#"1 ("b")"#, &["c"], json!({})), wait_for(r#"1 ("c")"#));
}

#[test]
fn in_strict_mode_commits_wait_for_anybody_rather_than_for_nobody() {
    let strict = || json!({"synchronous_mode_strict": true});
    assert_eq!(step(Some(&[]), "", &[], strict()), wait_for("*"));
    assert_eq!(step(Some(&["b"]), r#"1 ("b")"#, &[], strict()), publish(&[]));
    assert_eq!(step(Some(&[]), "*", &["b"], strict()), wait_for(r#"1 ("b")"#));
    assert_eq!(step(Some(&[]), "*", &[], strict()), SyncStep::Settled);
}

#[test]
fn a_new_leader_first_says_that_nobody_else_has_its_commits() {
    let cluster = with(led_by(Some("a")), |c| synchronous(c, "b", &["a", "c"]));
    assert_eq!(plan("a", &cluster, &primary_facts()), publish(&[]));
}

#[test]
fn two_are_waited_for_both_when_two_are_asked_for() {
    let two = || json!({"synchronous_node_count": 2});
    let both = r#"2 ("b","c")"#;
    assert_eq!(step(Some(&["b"]), r#"1 ("b")"#, &["B", "c"], two()), wait_for(both));
    assert_eq!(step(Some(&["b"]), both, &["B", "c"], two()), SyncStep::Settled);
    assert_eq!(step(Some(&["b"]), both, &["B", "C"], two()), publish(&["b", "c"]));
    assert_eq!(step(Some(&["b", "c"]), both, &["B"], two()), publish(&["b"]));
}

#[test]
fn who_is_synchronous_stays_so_as_long_as_it_streams_and_nobody_has_a_higher_priority() {
    let cluster = |stored: &[&str], own: u32, others: u32| {
        with(led_by(Some("a")), |c| {
            synchronous(c, "a", stored);
            c.members.get_mut("b").unwrap().tags = tags(json!({"sync_priority": own}));
            c.members.get_mut("c").unwrap().tags = tags(json!({"sync_priority": others}));
        })
    };
    assert_eq!(plan("a", &cluster(&[], 1, 5), &primary_facts()), wait_for(r#"1 ("c")"#));
    let named = PrimaryFacts { sync_names: r#"1 ("b")"#.into(), ..primary_facts() };
    let further = |by: u64| {
        let mut facts = named.clone();
        facts.standbys[1].flush = Lsn(facts.standbys[0].flush.0 + by);
        facts
    };
    assert_eq!(plan("a", &cluster(&["b"], 5, 5), &further(1)), SyncStep::Settled);
    assert_eq!(plan("a", &cluster(&["b"], 6, 5), &further(1)), SyncStep::Settled);
    assert_eq!(plan("a", &cluster(&["b"], 1, 5), &named), publish(&[]));
}

#[test]
fn a_silent_standby_makes_way_for_one_that_answers() {
    let cluster = with(led_by(Some("a")), |c| synchronous(c, "a", &["b"]));
    let after = |b: u64, c: u64| {
        let mut facts = PrimaryFacts { sync_names: r#"1 ("b")"#.into(), ..primary_facts() };
        facts.standbys[0].silent = Duration::from_secs(b);
        facts.standbys[1].silent = Duration::from_secs(c);
        plan("a", &cluster, &facts)
    };
    assert_eq!(after(4, 0), SyncStep::Settled);
    assert_eq!(after(5, 0), publish(&[]));
    // The primary's own network may be what is gone.
    assert_eq!(after(9, 9), SyncStep::Settled);
}

#[test]
fn a_standby_is_silent_while_it_owes_an_acknowledgement() {
    let before = |flush: u64, silent: u64| {
        let mut facts = PrimaryFacts { lsn: Lsn(1000), ..primary_facts() };
        facts.standbys[0].acknowledged = Lsn(flush);
        facts.standbys[0].silent = Duration::from_secs(silent);
        facts
    };
    let silence = |flush: u64, before: &PrimaryFacts| {
        let row = StandbyRow {
            application_name: "b".to_owned(),
            acknowledged: Lsn(flush),
            ..StandbyRow::default()
        };
        row.silence(before, Duration::from_secs(1)).as_secs()
    };
    assert_eq!(silence(900, &before(900, 3)), 4);
    assert_eq!(silence(901, &before(900, 3)), 0, "it has flushed something");
    assert_eq!(silence(1000, &before(1000, 3)), 0, "nothing was left to flush");
    assert_eq!(silence(900, &PrimaryFacts::default()), 0, "it has just come");
}

/// PostgreSQL knows synchronous standbys by name alone: another cluster's server of the same name would acknowledge
/// what no member has.
#[test]
fn a_walsender_that_may_be_somebody_elses_does_not_count() {
    let cluster = with(led_by(Some("a")), |c| {
        synchronous(c, "a", &[]);
        c.config = Some(config(json!({"synchronous_mode": true, "synchronous_node_count": 3})));
    });
    let with_b = |slot, twice: bool| {
        let mut facts = primary_facts();
        facts.standbys[0].slot = slot;
        if twice {
            facts
                .standbys
                .push(StandbyRow { flush: Lsn(10), ..primary_facts().standbys[0].clone() });
        }
        plan("a", &cluster, &facts)
    };
    let (both, only_c) = (wait_for(r#"2 ("b","c")"#), wait_for(r#"1 ("c")"#));
    assert_eq!(with_b(SlotUse::Held, false), both);
    assert_eq!(with_b(SlotUse::Absent, false), both, "slots are off, or not there yet");
    assert_eq!(with_b(SlotUse::NotHeld, false), only_c, "the member's slot lies idle");
    assert_eq!(with_b(SlotUse::Held, true), only_c, "either may acknowledge");
    // One that counted makes way as soon as there is a doubt.
    let cluster = with(led_by(Some("a")), |c| synchronous(c, "a", &["b"]));
    let mut facts = PrimaryFacts { sync_names: r#"1 ("b")"#.into(), ..primary_facts() };
    facts.standbys[0].slot = SlotUse::NotHeld;
    assert_eq!(plan("a", &cluster, &facts), publish(&[]));
    let off = json!({"synchronous_mode": true, "postgresql": {"use_slots": false}});
    let cluster = with((*cluster).clone(), |c| c.config = Some(config(off)));
    assert_eq!(
        plan("a", &cluster, &facts),
        SyncStep::Settled,
        "slots say nothing where they are off"
    );
}

/// Until every process of the server goes by the names, older ones may still let commits go.
#[test]
fn nobody_is_named_before_all_of_the_server_goes_by_the_names() {
    let cluster = |stored: &[&str]| with(led_by(Some("a")), |c| synchronous(c, "a", stored));
    let mut facts = PrimaryFacts { sync_names: r#"1 ("b")"#.into(), ..primary_facts() };
    facts.standbys[0].synchronous = true;
    assert_eq!(plan("a", &cluster(&[]), &facts), publish(&["b"]));
    facts.sync_names_since = None;
    assert_eq!(plan("a", &cluster(&[]), &facts), SyncStep::Await);
    assert_eq!(plan("a", &cluster(&["b"]), &facts), SyncStep::Settled);
    // Nobody at all may be named at any time.
    facts.standbys.remove(0);
    assert_eq!(plan("a", &cluster(&["b"]), &facts), publish(&[]));
}

#[test]
fn who_may_not_be_synchronous_is_not_chosen() {
    for value in
        [json!({"nosync": true}), json!({"sync_priority": 0}), json!({"replicatefrom": "c"})]
    {
        let cluster = with(led_by(Some("a")), |c| {
            synchronous(c, "a", &[]);
            c.members.get_mut("b").unwrap().tags = tags(value);
        });
        assert_eq!(plan("a", &cluster, &primary_facts()), wait_for(r#"1 ("c")"#));
    }
    // Neither is a stream of somebody who is no member.
    assert_eq!(step(Some(&[]), "", &["pg_receivewal"], json!({})), SyncStep::Settled);
}

#[test]
fn a_standby_that_may_not_take_over_is_chosen_last() {
    let cluster = with(led_by(Some("a")), |c| {
        synchronous(c, "a", &[]);
        let barred = json!({"nofailover": true, "sync_priority": 9});
        c.members.get_mut("b").unwrap().tags = tags(barred);
    });
    assert_eq!(plan("a", &cluster, &primary_facts()), wait_for(r#"1 ("c")"#));
}

#[test]
fn switching_the_mode_off_empties_the_store_first() {
    let off = || json!({"synchronous_mode": false});
    let emptied = SyncStep::Publish(SyncState::default());
    assert_eq!(step(Some(&["b"]), r#"1 ("b")"#, &["B"], off()), emptied);
    let cluster = with(led_by(Some("a")), |c| c.sync = Some(SyncState::default()));
    let names = |text: &str| PrimaryFacts { sync_names: text.into(), ..primary_facts() };
    assert_eq!(plan("a", &cluster, &names(r#"1 ("b")"#)), wait_for(""));
    assert_eq!(plan("a", &cluster, &names("*")), wait_for(""));
    assert_eq!(plan("a", &cluster, &names("")), SyncStep::Settled);
    assert_eq!(plan("a", &cluster, &names("ANY 1 (x)")), SyncStep::Settled, "a user's own");
}

/// Whatever order standbys come and go in, the store never names one that commits do not wait for.
#[test]
fn the_store_never_names_a_standby_that_is_not_waited_for() {
    let streams: [&[&str]; 7] = [&[], &["b"], &["B"], &["c"], &["C"], &["B", "c"], &["b", "C"]];
    for strict in [false, true] {
        for count in [1, 2] {
            for path in 0..streams.len().pow(3) {
                let mut stored: Vec<String> = Vec::new();
                let mut waited = if strict { "*" } else { "" }.to_owned();
                let mut rest = path;
                for _ in 0..3 {
                    let streaming = streams[rest % streams.len()];
                    rest /= streams.len();
                    let list: Vec<&str> = stored.iter().map(String::as_str).collect();
                    let settings =
                        json!({"synchronous_mode_strict": strict, "synchronous_node_count": count});
                    match step(Some(&list), &waited, streaming, settings) {
                        SyncStep::Publish(state) => stored = state.standbys(),
                        SyncStep::SetNames(names) => waited = names,
                        SyncStep::Settled | SyncStep::Await => {}
                    }
                    for name in &stored {
                        assert!(waited.contains(&format!("\"{name}\"")), "{stored:?} {waited}");
                    }
                }
            }
        }
    }
}
