//! The first server of a cluster, half made by an agent that has died.

use kornak_cluster::Revision;

use super::*;

fn begun(filling: bool) -> DataDir {
    let DataDir::Initialized(control) = control(false) else { panic!("initialized") };
    DataDir::Begun { control, filling }
}

/// Nothing in the store but what a bootstrap has put there.
fn making(leader: Option<&str>, initialize: Option<&str>) -> Arc<ClusterState> {
    let initialize = initialize.map(str::to_owned);
    with(led_by(leader), |cluster| {
        *cluster = ClusterState {
            initialize,
            leader: cluster.leader.clone(),
            store: 1,
            revision: Revision(100),
            ..ClusterState::default()
        };
    })
}

/// A recovery to a point in time that is consistent looks like a standby.
#[test]
fn a_half_made_server_never_races_and_is_never_promoted() {
    for server in [Server::Stopped, Server::Standby(standby_facts())] {
        for filling in [false, true] {
            let s = Snapshot { data: begun(filling), server: server.clone(), ..standby() };
            let held =
                Snapshot { cluster: making(Some("a"), Some("")), lease: mine(25), ..s.clone() };
            check(&held, Action::Bootstrap, Why::ClusterIsNew);
            let nobody = Snapshot { cluster: making(None, None), ..s.clone() };
            check(&nobody, Action::Bootstrap, Why::ClusterIsNew);
            let unproven = Snapshot { cluster: making(Some("a"), Some("")), ..s.clone() };
            check(&unproven, Action::Wait, Why::LeaseBeingProven);
            let away = Snapshot { store: Store::Lost { since: now() }, ..held };
            check(&away, Action::Wait, Why::StoreLost);
        }
    }
}

#[test]
fn whoever_was_faster_has_the_cluster_and_what_is_half_made_here_makes_way() {
    let s = Snapshot { data: begun(false), server: Server::Stopped, ..standby() };
    let other = Snapshot { cluster: making(Some("b"), Some("")), ..s.clone() };
    check(&other, Action::Wait, Why::WaitingForLeader);
    let runs = Snapshot { server: Server::Standby(standby_facts()), ..other };
    check(&runs, STOP_NOW, Why::OtherBootstraps);
    // The same backup, restored by another node.
    let made = Snapshot { cluster: Arc::new(led_by(Some("b"))), ..s };
    let copy = Action::Clone { from: "b".to_owned() };
    check(&made, copy, Why::NothingHereYet);
}

#[test]
fn a_cluster_that_the_store_knows_is_complete_whatever_the_note_says() {
    let s = Snapshot { data: begun(true), ..primary() };
    check(&s, Action::Lead, Why::Healthy);
    let stopped = Snapshot { data: begun(true), server: Server::Stopped, ..standby() };
    check(&stopped, rejoin(Some("b")), Why::ServerDown);
}

#[test]
fn a_recovery_whose_lease_runs_out_is_stopped() {
    let s = Snapshot { data: begun(false), lease: mine(1), ..standby() };
    let s = Snapshot { cluster: making(Some("a"), Some("")), ..s };
    check(&s, STOP_NOW, Why::LeaseUnproven);
}
