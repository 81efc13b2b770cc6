//! Nodes that hold the key, or a running primary.

use super::*;

#[test]
fn a_leader_with_a_proven_lease_leads() {
    check(&primary(), Action::Lead, Why::Healthy);
}

#[test]
fn a_leader_stops_its_server_a_stop_budget_before_the_lease_ends() {
    check(&Snapshot { lease: mine(2), ..primary() }, Action::Lead, Why::Healthy);
    let late = Snapshot { lease: mine(1), ..primary() };
    check(&late, Action::Demote { immediate: false }, Why::LeaseUnproven);
}

#[test]
fn a_leader_looks_again_before_its_lease_ends() {
    let s =
        Snapshot { lease: Lease::Mine { epoch: EPOCH, until: now() + seconds(1) }, ..primary() };
    let s = Snapshot { stop_budget: Duration::from_millis(700), ..s };
    assert_eq!(decide(&s).recheck, Duration::from_millis(300));
}

#[test]
fn a_primary_is_stopped_at_once_when_another_leads() {
    let s = Snapshot { lease: Lease::None, cluster: Arc::new(led_by(Some("b"))), ..primary() };
    check(&s, STOP_NOW, Why::OtherLeads);
}

#[test]
fn a_primary_whose_key_is_not_proven_leaves_its_end_to_the_guard() {
    check(&Snapshot { lease: Lease::None, ..primary() }, Action::Wait, Why::LeaseBeingProven);
    let lost = Store::Lost { since: now() };
    let s = Snapshot { lease: Lease::None, store: lost, ..primary() };
    check(&s, Action::Wait, Why::LeaseBeingProven);
}

#[test]
fn a_primary_without_a_leader_asks_and_takes_the_key_again() {
    let s = Snapshot { lease: Lease::None, cluster: Arc::new(led_by(None)), ..primary() };
    check(&s, Action::AskPeers, Why::PeersUnknown);
    let s = Snapshot { race: Some(answers(&[("b", Some(peer(1000)))])), ..s };
    check(&s, CLAIM, Why::MostAdvanced);
}

#[test]
fn a_primary_is_not_stopped_because_a_standby_heard_of_newer_commits_than_it_remembers() {
    let mut preferred = peer(1000);
    preferred.tags = tags(json!({"failover_priority": 9}));
    for standby in [peer(1700), preferred] {
        let race = Some(answers(&[("b", Some(standby))]));
        let cluster = Arc::new(led_by(None));
        check(
            &Snapshot { lease: Lease::None, cluster, race, ..primary() },
            CLAIM,
            Why::MostAdvanced,
        );
    }
}

#[test]
fn a_primary_without_a_leader_stops_if_the_cluster_has_moved_on() {
    let mut ahead = peer(10);
    ahead.timeline = Timeline(4);
    let race = Some(answers(&[("b", Some(ahead))]));
    let cluster = Arc::new(led_by(None));
    let s = Snapshot { lease: Lease::None, cluster, race, ..primary() };
    check(&s, STOP_NOW, Why::TimelineBehind);

    let old = PrimaryFacts { timeline: Timeline(2), ..primary_facts() };
    let s = Snapshot { server: Server::Primary(old), ..s };
    check(&s, STOP_NOW, Why::TimelineBehind);
}

#[test]
fn a_primary_that_promised_to_let_another_stay_stops() {
    let promise_until = Some(now() + seconds(1));
    let cluster = Arc::new(led_by(None));
    let s = Snapshot { lease: Lease::None, cluster, promise_until, ..primary() };
    check(&s, STOP_NOW, Why::PromisedFailsafe);
}

#[test]
fn a_winner_is_promoted() {
    check(&winner(), Action::Promote, Why::WonLease);
}

#[test]
fn a_winner_whose_promotion_was_forbidden_gives_the_key_up() {
    let not_before = Some(now() + seconds(30));
    let s = Snapshot { race_not_before: not_before, ..winner() };
    check(&s, Action::Release, Why::LostRecently);
    check(&Snapshot { race_not_before: Some(now()), ..winner() }, Action::Promote, Why::WonLease);
}

#[test]
fn a_winner_that_was_frozen_past_its_lease_is_not_promoted() {
    // A1.1: the lease was proven, then the agent slept.
    check(&Snapshot { lease: mine(1), ..winner() }, Action::Wait, Why::LeaseUnproven);
    check(&Snapshot { lease: mine(0), ..winner() }, Action::Wait, Why::LeaseUnproven);
    let lost = Store::Lost { since: now() };
    check(&Snapshot { store: lost, ..winner() }, Action::Wait, Why::LeaseUnproven);
}

#[test]
fn a_key_that_bears_our_name_is_no_leadership() {
    // A2.3, A2.5: an acquisition without an answer, or a twin with our name.
    check(&Snapshot { lease: Lease::None, ..winner() }, Action::Wait, Why::LeaseBeingProven);
    check(
        &Snapshot { lease: Lease::None, ..crashed_leader() },
        Action::Wait,
        Why::LeaseBeingProven,
    );
}

#[test]
fn a_claim_that_is_done_late_does_not_break_a_promise_given_since() {
    // A3.2: the claim got no answer, the node promised another leader to let it stay, then the
    // claim was done after all.
    let s = Snapshot { promise_until: Some(now() + seconds(5)), ..winner() };
    check(&s, Action::Release, Why::PromisedFailsafe);
}

#[test]
fn a_server_that_starts_is_stopped_when_the_lease_ends() {
    // A1.2: crash recovery may outlast the lease.
    let starting = Server::Starting { since: now() };
    let s = Snapshot { server: starting, ..primary() };
    check(&s, Action::Wait, Why::ServerStarting);
    check(&Snapshot { lease: mine(1), ..s }, STOP_NOW, Why::LeaseUnproven);
}

#[test]
fn a_silent_server_is_left_alone_until_the_lease_ends() {
    let silent = Server::Silent { since: now() };
    let s = Snapshot { server: silent, ..primary() };
    check(&s, Action::Wait, Why::ServerSilent);
    check(&Snapshot { lease: mine(1), ..s }, STOP_NOW, Why::LeaseUnproven);
}

#[test]
fn a_silent_server_that_was_primary_is_stopped_when_another_leads() {
    let cluster = Arc::new(led_by(Some("b")));
    let server = Server::Silent { since: now() };
    let s = Snapshot { server, cluster, lease: Lease::None, ..primary() };
    check(&s, STOP_NOW, Why::OtherLeads);
    check(&Snapshot { data: control(false), ..s }, Action::Wait, Why::ServerSilent);
}

#[test]
fn a_postmaster_that_is_gone_says_nothing_about_its_backends() {
    // A1.3: no start, no release, no measuring before every process is gone.
    check(&Snapshot { server: Server::Leftovers, ..primary() }, STOP_NOW, Why::ProcessesLeft);
    let s = Snapshot { server: Server::Leftovers, lease: Lease::None, ..primary() };
    check(&s, STOP_NOW, Why::ProcessesLeft);
}

#[test]
fn a_crashed_leader_starts_in_place() {
    check(&crashed_leader(), Action::StartPrimary, Why::KeyIsOursServerIsDown);
}

#[test]
fn a_crashed_leader_does_not_start_with_a_lease_that_ends() {
    check(&Snapshot { lease: mine(1), ..crashed_leader() }, Action::Wait, Why::LeaseUnproven);
}

#[test]
fn a_crashed_leader_without_the_store_starts_in_place_while_nobody_else_can_lead() {
    let lost = Store::Lost { since: now() };
    let s = Snapshot { store: lost, ..crashed_leader() };
    check(&s, Action::StartPrimary, Why::KeyIsOursServerIsDown);
    check(&Snapshot { lease: mine(1), ..s.clone() }, rejoin(None), Why::ServerDown);
    // What it shows in synchronous mode a failover would take back, and nobody can be told.
    let cluster = |standbys: &[&str]| with(led_by(Some("a")), |c| synchronous(c, "a", standbys));
    check(&Snapshot { cluster: cluster(&["b"]), ..s.clone() }, rejoin(None), Why::ServerDown);
    let alone = Snapshot { cluster: cluster(&[]), ..s.clone() };
    check(&alone, Action::StartPrimary, Why::KeyIsOursServerIsDown);
    let unknown = with(led_by(Some("a")), |c| {
        c.doubts.insert(SafetyKey::Config, kornak_cluster::Doubt::Unknown);
    });
    check(&Snapshot { cluster: unknown, ..s.clone() }, rejoin(None), Why::ServerDown);
    let standby_cluster = with(led_by(Some("a")), |c| {
        c.config = Some(config(json!({"standby_cluster": {"host": "far"}})));
    });
    check(&Snapshot { cluster: standby_cluster, ..s }, rejoin(None), Why::ServerDown);
}

#[test]
fn a_winner_that_stopped_before_it_was_promoted_comes_back_as_a_standby() {
    // Started in place it would write on its former leader's timeline.
    let s = Snapshot { server: Server::Stopped, ..winner() };
    check(&s, rejoin(None), Why::KeyIsOursServerIsDown);
}

#[test]
fn a_leader_without_data_gives_the_key_up() {
    let s = Snapshot { data: DataDir::Empty, server: Server::Stopped, ..primary() };
    check(&s, Action::Release, Why::NothingHereYet);
}

#[test]
fn a_step_under_way_is_left_alone() {
    for job in [Job::Bootstrap, Job::Rejoin, Job::Handover, Job::Demote, Job::Reinitialize] {
        check(&Snapshot { job: Some(job), ..primary() }, Action::Wait, Why::BusyWith(job));
        assert!(!job.as_str().is_empty());
    }
}

#[test]
fn a_step_under_way_does_not_keep_a_primary_past_its_lease() {
    let s = Snapshot { lease: mine(1), ..primary() };
    check(&Snapshot { job: Some(Job::Handover), ..s.clone() }, STOP_NOW, Why::LeaseUnproven);
    let demoting = Snapshot { job: Some(Job::Demote), ..s };
    check(&demoting, Action::Wait, Why::BusyWith(Job::Demote));
}

#[test]
fn a_server_on_its_way_to_be_primary_is_stopped_when_the_key_is_lost() {
    // Simulation, synchronous, seed 2337: the key was deleted during crash recovery.
    for job in [Job::StartPrimary, Job::Promote] {
        for server in
            [Server::Starting { since: now() }, Server::Standby(standby_facts()), primary().server]
        {
            let s = Snapshot { job: Some(job), server, lease: Lease::None, ..primary() };
            check(&s, STOP_NOW, Why::LeaseLost);
        }
        let s = Snapshot { job: Some(job), lease: Lease::None, ..crashed_leader() };
        check(&s, Action::Wait, Why::BusyWith(job));
    }
}

#[test]
fn maintenance_mode_stops_nothing_and_starts_nothing() {
    // A4: the guard is disarmed, the store is being worked on.
    let paused = with(led_by(Some("a")), |c| c.config = Some(config(json!({"pause": true}))));
    let s = Snapshot { cluster: paused, ..primary() };
    check(&s, Action::Lead, Why::Healthy);
    check(&Snapshot { lease: mine(0), ..s.clone() }, Action::Wait, Why::Paused);
    // An operator may name another leader meanwhile, who needs the key.
    check(&Snapshot { server: Server::Stopped, ..s.clone() }, Action::Release, Why::Paused);
    let late = Snapshot { lease: mine(0), server: Server::Silent { since: now() }, ..s.clone() };
    check(&late, Action::Wait, Why::ServerSilent);
    let late = Snapshot { lease: mine(0), server: Server::Starting { since: now() }, ..s.clone() };
    check(&late, Action::Wait, Why::ServerStarting);
    let late = Snapshot { lease: mine(0), job: Some(Job::Handover), ..s.clone() };
    check(&late, Action::Wait, Why::BusyWith(Job::Handover));
    check(&Snapshot { lease: Lease::None, ..s }, Action::Wait, Why::Paused);
}

#[test]
fn after_maintenance_of_the_store_the_primary_takes_its_key_again() {
    // A4: it is writable for ever otherwise, with nobody who could prove it.
    let paused = with(led_by(None), |c| {
        c.config = Some(config(json!({"pause": true})));
        c.unfenced = unfenced("a");
    });
    let race = Some(answers(&[("b", Some(peer(1000)))]));
    let s = Snapshot { cluster: paused, lease: Lease::None, race, ..primary() };
    check(&s, CLAIM, Why::MostAdvanced);
    let mut other = peer(2000);
    other.timeline = Timeline(4);
    let s = Snapshot { race: Some(answers(&[("b", Some(other))])), ..s };
    check(&s, Action::Wait, Why::TimelineBehind);
}

#[test]
fn in_maintenance_mode_a_second_primary_is_stopped_all_the_same() {
    let paused = with(led_by(Some("b")), |c| c.config = Some(config(json!({"pause": true}))));
    let s = Snapshot { cluster: paused, lease: Lease::None, ..primary() };
    check(&s, STOP_NOW, Why::OtherLeads);
}

#[test]
fn a_leader_without_time_for_crash_recovery_leaves_to_somebody_who_may_take_over() {
    let hasty = |change: fn(&mut ClusterState)| {
        let cluster = with(led_by(Some("a")), |c| {
            c.config = Some(config(json!({"primary_start_timeout": 0})));
            change(c);
        });
        Snapshot { cluster, ..crashed_leader() }
    };
    check(&hasty(|_| ()), Action::Release, Why::NoTimeToStart);
    let alone = hasty(|c| c.members.retain(|name, _| name == "a"));
    check(&alone, Action::StartPrimary, Why::KeyIsOursServerIsDown);
    let behind = hasty(|c| {
        c.status.as_mut().unwrap().optime = Lsn(8 << 20);
        for member in c.members.values_mut() {
            member.xlog_location = Some(Lsn(1000));
        }
    });
    check(&behind, Action::StartPrimary, Why::KeyIsOursServerIsDown);
}
