//! Who follows, comes back, or has nothing yet.

use super::*;

#[test]
fn a_standby_of_the_leader_stays_as_it_is() {
    check(&standby(), Action::Wait, Why::AlreadyFollows);
}

#[test]
fn a_standby_follows_a_new_leader() {
    let s = Snapshot { cluster: Arc::new(led_by(Some("c"))), ..standby() };
    check(&s, Action::Follow { leader: "c".into() }, Why::UpstreamChanged);
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
fn without_the_store_a_standby_comes_back_and_a_former_primary_does_not() {
    let lost = Store::Lost { since: now() };
    let s = Snapshot { server: Server::Stopped, store: lost, ..standby() };
    check(&s, rejoin(None), Why::ServerDown);
    check(&Snapshot { data: control(true), ..s }, Action::Wait, Why::StoreLost);
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
        check(&s, Action::Refuse, Why::WrongSystemIdentifier);
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
    let new = || ClusterState { store: 1, revision: 1, ..ClusterState::default() };
    check(&empty(Arc::new(new())), Action::Bootstrap, Why::ClusterIsNew);
    let others = with(new(), |c| c.initialize = Some(String::new()));
    check(&empty(others), Action::Wait, Why::OtherBootstraps);
    check(&empty(Arc::new(led_by(None))), Action::Wait, Why::WaitingForLeader);
    let s = Snapshot { tags: tags(json!({"nofailover": true})), ..empty(Arc::new(new())) };
    check(&s, Action::Wait, Why::WaitingForLeader);
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
