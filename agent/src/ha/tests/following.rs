//! Nodes that follow, come back, or have nothing yet.

use kornak_cluster::Revision;

use super::*;
use crate::ha::upstream::{Source, clone_sources};

#[test]
fn a_standby_of_the_leader_stays_as_it_is() {
    check(&standby(), Action::Wait, Why::AlreadyFollows);
    let lacking = Snapshot { lacks_slots: true, ..standby() };
    check(&lacking, Action::CopySlots, Why::SlotsMissing);
}

#[test]
fn a_standby_follows_a_new_leader() {
    let s = Snapshot { cluster: Arc::new(led_by(Some("c"))), ..standby() };
    check(&s, follow("c"), Why::UpstreamChanged);
}

fn follow(name: &str) -> Action {
    Action::Follow { upstream: Source::Member(name.to_owned()) }
}

/// `b` leads; this node's tags and a change of the cluster.
fn tagged(own: serde_json::Value, change: impl FnOnce(&mut ClusterState)) -> Snapshot {
    Snapshot { tags: tags(own), cluster: with(led_by(Some("b")), change), ..standby() }
}

#[test]
fn a_standby_that_cascades_follows_that_member_while_it_runs() {
    let from_c = || json!({"replicatefrom": "c"});
    check(&tagged(from_c(), |_| ()), follow("c"), Why::UpstreamChanged);
    let stopped = tagged(from_c(), |c| {
        c.members.get_mut("c").unwrap().state = kornak_cluster::MemberState::Stopped;
    });
    check(&stopped, Action::Wait, Why::AlreadyFollows);
    let gone = tagged(from_c(), |c| drop(c.members.remove("c")));
    check(&gone, Action::Wait, Why::AlreadyFollows);
    let itself = tagged(json!({"replicatefrom": "a"}), |_| ());
    check(&itself, Action::Wait, Why::AlreadyFollows);
}

#[test]
fn tags_that_lead_in_a_circle_lead_to_the_leader() {
    let circle = tagged(json!({"replicatefrom": "c"}), |c| {
        c.members.get_mut("c").unwrap().tags = tags(json!({"replicatefrom": "a"}));
    });
    check(&circle, Action::Wait, Why::AlreadyFollows);
}

#[test]
fn a_member_without_streaming_reads_the_archive_and_is_not_taken_for_broken() {
    let own = || json!({"nostream": true});
    let archive = Action::Follow { upstream: Source::Archive };
    check(&tagged(own(), |_| ()), archive, Why::UpstreamChanged);
    let facts = StandbyFacts {
        upstream: None,
        streaming: false,
        not_streaming_since: Some(now().minus(seconds(60))),
        ..standby_facts()
    };
    let s = Snapshot { server: Server::Standby(facts), ..tagged(own(), |_| ()) };
    check(&s, Action::Wait, Why::AlreadyFollows);
}

#[test]
fn a_copy_is_made_from_a_running_member_that_offers_itself() {
    let cluster = with(led_by(Some("b")), |c| {
        for name in ["a", "b", "c"] {
            c.members.get_mut(name).unwrap().tags = tags(json!({"clonefrom": true}));
        }
    });
    assert_eq!(clone_sources("a", &cluster), ["c"]);
    assert!(clone_sources("a", &led_by(Some("b"))).is_empty());
}

fn standby_cluster(cluster: &mut ClusterState) {
    cluster.config = Some(config(json!({"standby_cluster": {"host": "far", "port": 5432}})));
}

#[test]
fn the_leader_of_a_standby_cluster_follows_the_remote_primary_and_is_not_promoted() {
    let s = Snapshot { cluster: with(led_by(Some("a")), standby_cluster), ..winner() };
    let remote = Action::Follow { upstream: Source::Remote };
    check(&s, remote, Why::UpstreamChanged);
    let facts = StandbyFacts { upstream: address("far"), ..standby_facts() };
    check(&Snapshot { server: Server::Standby(facts), ..s }, Action::Lead, Why::StandbyCluster);
    let member = Snapshot { cluster: with(led_by(Some("b")), standby_cluster), ..standby() };
    check(&member, Action::Wait, Why::AlreadyFollows);
}

#[test]
fn a_cluster_becomes_a_standby_cluster_and_one_with_a_primary_again() {
    let s = Snapshot { cluster: with(led_by(Some("a")), standby_cluster), ..primary() };
    check(&s, Action::DemoteCluster, Why::StandbyCluster);
    let down = Snapshot { server: Server::Stopped, ..s };
    check(&down, rejoin(None), Why::StandbyCluster);
    let facts = StandbyFacts { upstream: address("far"), ..standby_facts() };
    check(&Snapshot { server: Server::Standby(facts), ..winner() }, Action::Promote, Why::WonLease);
}

#[test]
fn a_standby_waits_for_a_leader_that_has_not_said_where_it_is() {
    let cluster = with(led_by(Some("b")), |c| {
        c.members.remove("b");
    });
    check(&Snapshot { cluster, ..standby() }, Action::Wait, Why::WaitingForLeader);
}

#[test]
fn a_standby_whose_stream_does_not_come_up_is_looked_at_as_diverged() {
    let broken = |ago| {
        let facts = StandbyFacts {
            streaming: false,
            not_streaming_since: Some(now().minus(seconds(ago))),
            ..standby_facts()
        };
        Snapshot { server: Server::Standby(facts), ..standby() }
    };
    check(&broken(5), Action::Wait, Why::AlreadyFollows);
    check(&broken(6), rejoin(Some("b")), Why::ReplicationBroken);
    let promoting = with(led_by(Some("b")), |c| {
        c.members.insert("b".into(), member("b", "replica"));
    });
    let s = Snapshot { cluster: promoting, ..broken(6) };
    check(&s, Action::Wait, Why::AlreadyFollows);
    let paused = with(led_by(Some("b")), |c| c.config = Some(config(json!({"pause": true}))));
    check(&Snapshot { cluster: paused, ..broken(6) }, Action::Wait, Why::AlreadyFollows);
}

#[test]
fn a_standby_stays_as_it_is_without_the_store() {
    let s = Snapshot { store: Store::Lost { since: now() }, ..standby() };
    check(&s, Action::Wait, Why::StoreLost);
}

#[test]
fn nothing_is_decided_before_the_store_was_read() {
    check(&Snapshot { store: Store::Never, ..primary() }, Action::Wait, Why::StoreNeverRead);
    check(&Snapshot { store: Store::Never, ..standby() }, Action::Wait, Why::StoreNeverRead);
}

#[test]
fn a_server_that_is_down_comes_back_behind_the_leader() {
    for was_primary in [false, true] {
        let s = Snapshot { server: Server::Stopped, data: control(was_primary), ..standby() };
        check(&s, rejoin(Some("b")), Why::ServerDown);
    }
}

#[test]
fn a_server_that_is_down_comes_back_as_a_standby_when_nobody_leads() {
    let s = Snapshot { server: Server::Stopped, data: control(true), ..orphan() };
    check(&s, rejoin(None), Why::WaitingForLeader);
}

#[test]
fn without_the_store_a_server_comes_back_as_a_standby_unless_it_may_have_parted() {
    let lost = Store::Lost { since: now() };
    let s = Snapshot { server: Server::Stopped, store: lost, ..standby() };
    check(&s, rejoin(None), Why::ServerDown);
    let s = Snapshot { data: control(true), ..s };
    check(&s, Action::Wait, Why::StoreLost);
    for leader in [Some("a"), None] {
        // It may have led until the store was gone; readers have a use for it.
        check(
            &Snapshot { cluster: Arc::new(led_by(leader)), ..s.clone() },
            rejoin(None),
            Why::ServerDown,
        );
    }
}

#[test]
fn a_node_that_starts_or_is_silent_is_waited_for() {
    let s = Snapshot { server: Server::Starting { since: now() }, ..standby() };
    check(&s, Action::Wait, Why::ServerStarting);
    let s = Snapshot { server: Server::Silent { since: now() }, ..standby() };
    check(&s, Action::Wait, Why::ServerSilent);
}

#[test]
fn data_of_another_cluster_is_refused() {
    for cluster in [led_by(Some("b")), led_by(None), led_by(Some("a"))] {
        let cluster = with(cluster, |c| c.initialize = Some("42".into()));
        let s = Snapshot { cluster, ..standby() };
        check(&s, Action::Refuse, Why::WrongSystemIdentifier);
        let s = Snapshot { server: Server::Stopped, lease: mine(20), ..s };
        check(&s, Action::Release, Why::WrongSystemIdentifier);
    }
}

#[test]
fn a_directory_with_something_else_in_it_is_refused() {
    let data = DataDir::Foreign { reason: "no PG_VERSION".into() };
    let s = Snapshot { data, server: Server::Stopped, ..standby() };
    check(&s, Action::Refuse, Why::DataDirUnusable);
}

fn empty(cluster: Arc<ClusterState>) -> Snapshot {
    Snapshot { data: DataDir::Empty, server: Server::Stopped, cluster, ..standby() }
}

#[test]
fn an_empty_node_copies_the_leader_once_it_is_up() {
    let s = empty(Arc::new(led_by(Some("b"))));
    check(&s, Action::Clone { from: "b".into() }, Why::NothingHereYet);
    let cluster = with(led_by(Some("b")), |c| {
        c.members.insert("b".into(), member("b", "replica"));
    });
    check(&empty(cluster), Action::Wait, Why::WaitingForLeader);
}

#[test]
fn an_empty_node_creates_a_cluster_only_where_there_is_none() {
    let new = || ClusterState { store: 1, revision: Revision(1), ..ClusterState::default() };
    check(&empty(Arc::new(new())), Action::Bootstrap, Why::ClusterIsNew);
    let others = with(new(), |c| c.initialize = Some(String::new()));
    check(&empty(others), Action::Wait, Why::OtherBootstraps);
    check(&empty(Arc::new(led_by(None))), Action::Wait, Why::WaitingForLeader);
    let s = Snapshot { tags: tags(json!({"nofailover": true})), ..empty(Arc::new(new())) };
    check(&s, Action::Wait, Why::WaitingForLeader);
}

#[test]
fn an_empty_node_makes_its_copy_alone_if_a_method_can() {
    let s = Snapshot { clones_alone: true, ..empty(Arc::new(led_by(None))) };
    check(&s, Action::CloneWithoutLeader, Why::NothingHereYet);
}

#[test]
fn an_empty_node_waits_in_maintenance_mode_and_after_a_bootstrap_that_failed() {
    let paused = with(led_by(Some("b")), |c| c.config = Some(config(json!({"pause": true}))));
    check(&empty(paused), Action::Wait, Why::Paused);
    let new = Arc::new(ClusterState { store: 1, revision: Revision(1), ..ClusterState::default() });
    let s = Snapshot { race_not_before: Some(now() + seconds(5)), ..empty(new) };
    check(&s, Action::Wait, Why::LostRecently);
}

#[test]
fn an_empty_node_does_nothing_without_the_store() {
    let s = Snapshot { store: Store::Lost { since: now() }, ..empty(Arc::new(led_by(Some("b")))) };
    check(&s, Action::Wait, Why::StoreLost);
}

#[test]
fn data_is_ours_while_the_cluster_has_no_identity_yet() {
    for initialize in [None, Some(String::new())] {
        let cluster = with(led_by(Some("b")), |c| c.initialize = initialize);
        check(&Snapshot { cluster, ..standby() }, Action::Wait, Why::AlreadyFollows);
    }
}

#[test]
fn an_agent_that_begins_without_the_store_starts_a_standby_and_nothing_else() {
    let away = |ago| Store::Remembered { since: now().minus(seconds(ago)) };
    let down = Snapshot { server: Server::Stopped, store: away(10), ..standby() };
    check(&down, Action::Rejoin { leader: None }, Why::ServerDown);
    for waits in [
        Snapshot { store: away(1), ..down.clone() },
        Snapshot { data: control(true), ..down.clone() },
        Snapshot { data: DataDir::Empty, ..down.clone() },
        Snapshot {
            cluster: with(led_by(Some("b")), |it| it.initialize = Some("1".to_owned())),
            ..down.clone()
        },
        Snapshot {
            cluster: with(led_by(Some("b")), |it| {
                it.config = Some(config(json!({"pause": true})));
            }),
            ..down.clone()
        },
        Snapshot { store: away(10), ..standby() },
        // It may be ours by the word of an agent before, which the keeper takes over or not.
        Snapshot { store: away(10), lease: Lease::None, ..primary() },
        Snapshot { store: away(10), cluster: Arc::new(led_by(None)), ..standby() },
    ] {
        check(&waits, Action::Wait, Why::StoreNeverRead);
    }
    let inherited = Snapshot { store: away(1), confirmed: true, ..primary() };
    check(&inherited, Action::Lead, Why::Healthy);
    let over = Snapshot { lease: mine(0), confirmed: false, ..inherited };
    check(&over, Action::Demote { immediate: false }, Why::LeaseUnproven);
}
