//! The store says something odd: what is not known decides nothing.

use kornak_cluster::{Doubt, Revision, SafetyKey};

use super::*;

fn unknown(cluster: &mut ClusterState, key: SafetyKey) {
    cluster.doubts.insert(key, Doubt::Unknown);
}

fn without_config(leader: Option<&str>) -> Arc<ClusterState> {
    with(led_by(leader), |c| {
        c.config = None;
        unknown(c, SafetyKey::Config);
    })
}

#[test]
fn nobody_is_promoted_while_the_configuration_is_not_known() {
    let s = Snapshot { cluster: without_config(None), ..orphan() };
    check(&s, Action::Wait, Why::ConfigUnknown);
    let s = Snapshot { cluster: without_config(Some("a")), ..winner() };
    check(&s, Action::Release, Why::ConfigUnknown);
    let s = Snapshot { cluster: without_config(Some("a")), ..crashed_leader() };
    check(&s, Action::Release, Why::ConfigUnknown);
    // A store that has lost the key, and an agent that has kept nothing.
    let absent = with(led_by(None), |c| c.config = None);
    check(&Snapshot { cluster: absent, ..orphan() }, Action::Wait, Why::ConfigUnknown);
}

#[test]
fn a_primary_goes_on_while_the_configuration_is_not_known() {
    let s = Snapshot { cluster: without_config(Some("a")), ..primary() };
    check(&s, Action::Lead, Why::Healthy);
    let s = Snapshot { cluster: without_config(None), lease: Lease::None, ..primary() };
    check(&s, Action::Wait, Why::ConfigUnknown);
}

#[test]
fn a_primary_whose_cluster_has_no_configuration_yet_is_adopted() {
    let cluster = with(led_by(None), |c| (c.config, c.initialize) = (None, None));
    let race = Some(answers(&[]));
    let s = Snapshot { cluster, race, lease: Lease::None, ..primary() };
    check(&s, CLAIM, Why::MostAdvanced);
}

#[test]
fn in_synchronous_mode_nobody_races_before_it_is_known_who_may() {
    let cluster = with(led_by(None), |c| {
        synchronous(c, "b", &["a"]);
        (c.sync, c.sync_revision) = (None, Revision::NONE);
        unknown(c, SafetyKey::Sync);
    });
    let s = Snapshot { cluster: Arc::clone(&cluster), ..orphan() };
    check(&s, Action::Wait, Why::SyncUnknown);
    let race = Some(Race { sync_revision: Revision::NONE, ..answers(&[]) });
    let s = Snapshot { cluster, race, lease: Lease::None, ..primary() };
    check(&s, CLAIM, Why::MostAdvanced);
}

#[test]
fn who_takes_over_in_a_restored_store_is_named_by_its_past_and_by_what_was_in_force() {
    let restored = |past: &[&str], before: (&str, &[&str])| {
        let before = SyncState::new(before.0, &names(before.1));
        with(led_by(None), |c| {
            synchronous(c, "c", past);
            c.sync_before = Some(before);
        })
    };
    let s = Snapshot { cluster: restored(&["a"], ("b", &["c"])), ..orphan() };
    check(&s, Action::Wait, Why::NotSynchronous);
    let s = Snapshot { cluster: restored(&["b"], ("b", &["a"])), ..orphan() };
    check(&s, Action::Wait, Why::NotSynchronous);
    let s = Snapshot { cluster: restored(&["a"], ("b", &["a"])), ..orphan() };
    let race = Some(answers(&[("b", None)]));
    check(&Snapshot { race, ..s }, CLAIM, Why::MostAdvanced);
    // The primary that led until the store was restored has everything.
    let race = Some(answers(&[("b", Some(peer(1000)))]));
    let cluster = restored(&["b"], ("a", &["b"]));
    check(&Snapshot { cluster, race, lease: Lease::None, ..primary() }, CLAIM, Why::MostAdvanced);
}

#[test]
fn an_unknown_mark_list_or_record_forbids_the_race() {
    for (key, why) in [
        (SafetyKey::Unfenced, Why::UnfencedPrimary),
        (SafetyKey::Failsafe, Why::FailsafeUnknown),
        (SafetyKey::Handover, Why::HandoverUnknown),
    ] {
        let cluster = with(led_by(None), |c| {
            c.config = Some(config(json!({"failsafe_mode": true})));
            unknown(c, key);
        });
        check(&Snapshot { cluster, ..orphan() }, Action::Wait, why);
        let forced = with(led_by(None), |c| {
            c.config = Some(config(json!({"failsafe_mode": true})));
            c.failover.member = Some("a".into());
            unknown(c, key);
        });
        check(&Snapshot { cluster: forced, ..orphan() }, CLAIM, Why::NamedCandidate);
    }
}

#[test]
fn no_second_cluster_is_created_beside_members_with_data() {
    let empty = |change: fn(&mut ClusterState)| Snapshot {
        data: DataDir::Empty,
        server: Server::Stopped,
        cluster: with(led_by(None), |c| {
            (c.initialize, c.history) = (None, Vec::new());
            c.members.remove("a");
            for member in c.members.values_mut() {
                member.role = MemberRole::Uninitialized;
            }
            change(c);
        }),
        ..standby()
    };
    check(&empty(|_| {}), Action::Bootstrap, Why::ClusterIsNew);
    let demoted = empty(|c| {
        c.members.get_mut("b").unwrap().role = MemberRole::Demoted;
    });
    check(&demoted, Action::Wait, Why::MembersWithoutCluster);
    check(&empty(|c| c.history = led_by(None).history), Action::Wait, Why::MembersWithoutCluster);
    check(
        &empty(|c| {
            c.initialize = Some("nonsense".to_owned());
            unknown(c, SafetyKey::Initialize);
        }),
        Action::Wait,
        Why::InitializeUnknown,
    );
    check(
        &empty(|c| {
            c.config = None;
            unknown(c, SafetyKey::Config);
        }),
        Action::Wait,
        Why::ConfigUnknown,
    );
}

#[test]
fn a_key_that_could_not_be_claimed_again_is_not_given_up() {
    let cluster = || with(led_by(Some("a")), |c| synchronous(c, "a", &["b"]));
    let s = Snapshot { cluster: cluster(), ..crashed_leader() };
    check(&s, Action::Release, Why::StandbyHasEverything);
    let s = Snapshot { store_is_full: true, ..s };
    check(&s, Action::StartPrimary, Why::StoreFull);
    let paused = with(led_by(Some("a")), |c| c.config = Some(config(json!({"pause": true}))));
    let s = Snapshot { cluster: paused, store_is_full: true, ..crashed_leader() };
    check(&s, Action::Wait, Why::StoreFull);
}
