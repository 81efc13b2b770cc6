use std::sync::Arc;

use kornak_cluster::topology::Group;
use kornak_cluster::{
    CitusDatabase, CitusRegistration, Epoch, Handover, Node, NodeRole, Revision, Timeline,
};

use super::*;
use crate::cluster::standing::{Instance, Serving, Standing};

const PATIENCE: Duration = Duration::from_secs(10);

/// A cluster of a coordinator on `c` and workers on `a` and `b`, and who has proven what.
struct World {
    cluster: Topology,
    standings: Standings,
    outages: Outages,
}

fn node(group: u32, name: &str) -> Node {
    Node {
        name: name.to_owned(),
        group: GroupId(group),
        host: name.into(),
        port: 5432,
        role: NodeRole::Primary,
        running: true,
        says_primary: true,
        lag_bytes: None,
        noloadbalance: false,
        timeline: None,
        api_base: String::new(),
        kornak: true,
    }
}

fn serving(group: u32, name: &str) -> Serving {
    let instance = Instance { timeline: Some(Timeline(1)), ..Instance::default() };
    let epoch = Epoch { store: 1, revision: Revision(1) };
    let unfinished = BTreeSet::new();
    Serving { node: Arc::new(node(group, name)), name: name.into(), epoch, instance, unfinished }
}

fn at(primaries: &[(u32, &str)], behind: &[u32]) -> CitusDatabase {
    CitusDatabase {
        agrees: true,
        synced: behind.is_empty(),
        behind: behind.iter().copied().map(GroupId).collect(),
        groups: primaries.iter().map(|(group, _)| GroupId(*group)).collect(),
        primaries: primaries
            .iter()
            .map(|(group, name)| (GroupId(*group), format!("{name}:5432")))
            .collect(),
        ..CitusDatabase::default()
    }
}

const ALL: [(u32, &str); 3] = [(0, "c"), (1, "a"), (2, "b")];

impl World {
    fn new() -> Self {
        let mut world = Self {
            cluster: Topology::default(),
            standings: Standings::default(),
            outages: Outages::default(),
        };
        for (group, name) in ALL {
            world.leads(group, name);
            world.serves(group, name);
        }
        world.says("c", &[at(&ALL, &[])]);
        assert_eq!(world.look(0), []);
        world
    }

    /// The leader key of a group.
    fn leads(&mut self, group: u32, name: &str) {
        let epoch = Epoch { store: 1, revision: Revision(1) };
        let group_of = Group {
            leader: Some((name.to_owned(), epoch)),
            nodes: [(name.to_owned(), node(group, name))].into(),
            system_identifier: None,
        };
        self.cluster.groups.insert(GroupId(group), Arc::new(group_of));
    }

    fn serves(&mut self, group: u32, name: &str) {
        self.standing(group).prove(serving(group, name));
    }

    fn is_lost(&mut self, group: u32) {
        self.standing(group).withdraw(Why::Silent, false);
    }

    fn standing(&mut self, group: u32) -> &mut Standing {
        self.standings.0.entry(GroupId(group)).or_default()
    }

    /// Takes what the coordinator's leader has published, one for each database.
    fn says(&mut self, member: &str, databases: &[CitusDatabase]) {
        let databases = databases.iter().cloned().enumerate();
        let registration = CitusRegistration {
            member: member.to_owned(),
            databases: databases.map(|(n, it)| (format!("db{n}"), it)).collect(),
        };
        self.cluster.registered = Some(registration.groups());
        self.cluster.registration = Some(registration);
    }

    fn phase(&mut self, phase: Option<HandoverPhase>, group: u32) {
        self.cluster.handover = phase.map(|phase| Handover {
            v: 1,
            id: "h".to_owned(),
            attempt: 1,
            phase,
            group: Some(GroupId(group)),
            leader: "a".to_owned(),
            candidate: Some("x".to_owned()),
            epoch: Epoch { store: 1, revision: Revision(1) },
            max_hold_ms: 1000,
            switch_hold_ms: 5000,
            wal_end: None,
        });
    }

    fn look(&mut self, millis: u64) -> Vec<Event> {
        let facts =
            Facts { cluster: &self.cluster, standings: &self.standings, patience: PATIENCE };
        let mut events = Vec::new();
        self.outages.on(&facts, Moment::at_millis(millis), &mut events);
        let before = self.outages.clone();
        let mut again = Vec::new();
        self.outages.on(&facts, Moment::at_millis(millis), &mut again);
        assert_eq!((again, &before), (Vec::new(), &self.outages), "asking twice changes nothing");
        events
    }

    fn closed(&self) -> Sides {
        self.outages.closed()
    }
}

fn began(group: u32, why: Why) -> Event {
    Event::Began { group: GroupId(group), why }
}

fn ended(group: u32, millis: u64) -> Event {
    Event::Ended { group: GroupId(group), held: Duration::from_millis(millis) }
}

#[test]
fn everybody_who_may_reach_a_lost_worker_waits_until_every_node_has_its_successor() {
    let mut world = World::new();
    assert_eq!(world.closed(), Sides::NONE);
    world.is_lost(1);
    assert_eq!(world.look(100), [began(1, Why::Silent)]);
    assert_eq!(world.closed(), Sides::REACHING);
    world.leads(1, "x");
    world.serves(1, "x");
    assert_eq!(world.look(400), [], "it accepts writes, and the coordinator has the old address");
    world.says("c", &[at(&[(0, "c"), (1, "x"), (2, "b")], &[1, 2])]);
    let held = Duration::from_millis(400);
    assert_eq!(world.look(500), [Event::Spreads { group: GroupId(1), held }]);
    assert_eq!(world.closed(), Sides::WORKERS);
    world.says("c", &[at(&[(0, "c"), (1, "x"), (2, "b")], &[])]);
    assert_eq!(world.look(600), [ended(1, 500)]);
    assert_eq!((world.closed(), world.outages.deadline()), (Sides::NONE, None));
}

#[test]
fn sessions_on_standbys_go_on() {
    let mut world = World::new();
    world.is_lost(0);
    world.look(0);
    assert!(!world.closed().contains(crate::waiting::gate::Side::Following));
}

#[test]
fn what_its_predecessor_has_left_prepared_is_waited_for() {
    let mut world = World::new();
    world.is_lost(1);
    world.look(0);
    world.leads(1, "x");
    let left = Serving { unfinished: ["citus_0_1".to_owned()].into(), ..serving(1, "x") };
    world.standing(1).prove(left.clone());
    world.says("c", &[at(&[(0, "c"), (1, "x"), (2, "b")], &[])]);
    assert_eq!(world.look(300), []);
    assert_eq!(world.closed(), Sides::REACHING, "who asks for what was committed would not see it");
    world.standing(1).withdraw(Why::Silent, false);
    world.standing(1).prove(left);
    assert_eq!(world.look(310), [], "the same run, and the same is left");
    world.serves(1, "x");
    assert_eq!(world.look(350), [ended(1, 350)]);
}

#[test]
fn nobody_waits_for_what_nobody_ends() {
    let mut world = World::new();
    let soon = |world: &World, name: &str| is_soon_ended(&world.cluster, name);
    assert!(soon(&world, "citus_0_12_34_5") && soon(&world, "citus_2_1_1_1"));
    assert!(!soon(&world, "citus_7_1_1_1"), "no such group");
    assert!(!soon(&world, "mine") && !soon(&world, "citus_x_1"));
    let patroni = Node { kornak: false, ..node(0, "c") };
    let mut group = Group::clone(&world.cluster.groups[&GroupId(0)]);
    group.nodes.insert("c".to_owned(), patroni);
    world.cluster.groups.insert(GroupId(0), Arc::new(group.clone()));
    assert!(!soon(&world, "citus_0_12_34_5"), "Patroni leads there");
    group.leader = None;
    world.cluster.groups.insert(GroupId(0), Arc::new(group));
    assert!(soon(&world, "citus_0_12_34_5"), "somebody will");
}

#[test]
fn what_is_prepared_in_peace_holds_nobody() {
    let mut world = World::new();
    let busy = Serving { unfinished: ["citus_0_1".to_owned()].into(), ..serving(2, "b") };
    world.standing(2).withdraw(Why::Unproven, true);
    world.standing(2).prove(busy);
    world.phase(Some(HandoverPhase::Settle), 2);
    assert_eq!(world.look(0), []);
    world.phase(None, 2);
    assert_eq!(world.look(100), []);
}

#[test]
fn a_server_that_restarts_in_place_is_still_registered() {
    let mut world = World::new();
    world.is_lost(2);
    world.look(0);
    world.serves(2, "b");
    assert_eq!(world.look(50), [ended(2, 50)]);
}

#[test]
fn a_connection_that_breaks_to_a_server_that_is_there_is_no_failover() {
    let mut world = World::new();
    world.says("c", &[at(&ALL, &[2])]);
    world.is_lost(1);
    assert_eq!(world.look(0), [began(1, Why::Silent)]);
    world.serves(1, "a");
    assert_eq!(world.look(5), [ended(1, 5)], "whatever the other nodes have not heard of");
}

#[test]
fn every_database_has_to_know_the_new_primary() {
    let mut world = World::new();
    let moved = [(0, "c"), (1, "x"), (2, "b")];
    world.says("c", &[at(&ALL, &[]), at(&ALL, &[])]);
    world.is_lost(1);
    world.look(0);
    world.leads(1, "x");
    world.serves(1, "x");
    world.says("c", &[at(&moved, &[]), at(&ALL, &[])]);
    assert_eq!(world.look(100), []);
    world.says("c", &[at(&moved, &[]), at(&moved, &[])]);
    assert_eq!(world.look(200), [ended(1, 200)]);
}

#[test]
fn a_group_that_stays_away_does_not_keep_the_others_from_working() {
    let mut world = World::new();
    world.is_lost(1);
    world.look(0);
    assert_eq!(world.outages.deadline(), Some(Moment::at_millis(10_000)));
    let given_up = Event::GivenUp { group: GroupId(1), held: PATIENCE };
    assert_eq!(world.look(10_000), [given_up]);
    assert_eq!((world.closed(), world.outages.deadline()), (Sides::NONE, None));
    assert_eq!(world.outages.groups().count(), 0);
    assert_eq!(world.look(60_000), [], "nor a second time");

    // Another group's failover is held as ever, and does not wait for nodes that are away.
    world.is_lost(2);
    assert_eq!(world.look(70_000), [began(2, Why::Silent)]);
    world.leads(2, "y");
    world.serves(2, "y");
    world.says("c", &[at(&[(0, "c"), (1, "a"), (2, "y")], &[1])]);
    assert_eq!(world.look(70_300), [ended(2, 300)]);

    // It comes back, and its next loss is a new one.
    world.serves(1, "a");
    world.says("c", &[at(&[(0, "c"), (1, "a"), (2, "y")], &[])]);
    assert_eq!(world.look(80_000), []);
    world.is_lost(1);
    assert_eq!(world.look(90_000), [began(1, Why::Silent)]);
}

#[test]
fn metadata_that_nobody_can_change_release_by_our_own_clock_too() {
    let mut world = World::new();
    world.is_lost(1);
    world.look(0);
    world.leads(1, "x");
    world.serves(1, "x");
    assert_eq!(world.look(9_000), []);
    let given_up = Event::GivenUp { group: GroupId(1), held: PATIENCE };
    assert_eq!(world.look(10_000), [given_up]);
}

#[test]
fn a_primary_that_is_lost_again_is_waited_for_again() {
    let mut world = World::new();
    world.is_lost(1);
    world.look(0);
    world.leads(1, "x");
    world.serves(1, "x");
    world.says("c", &[at(&[(0, "c"), (1, "x"), (2, "b")], &[2])]);
    world.look(300);
    world.is_lost(1);
    assert_eq!(world.look(400), [began(1, Why::Silent)]);
    assert_eq!(world.closed(), Sides::REACHING);
    assert_eq!(world.outages.deadline(), Some(Moment::at_millis(10_400)));
}

#[test]
fn a_successor_that_was_proven_before_we_looked_is_a_stranger_to_the_rows() {
    let mut world = World::new();
    world.leads(1, "x");
    world.serves(1, "x");
    assert_eq!(world.look(0), [began(1, Why::Unproven)]);
    world.says("c", &[at(&[(0, "c"), (1, "x"), (2, "b")], &[])]);
    assert_eq!(world.look(100), [ended(1, 100)]);
}

#[test]
fn metadata_that_differ_in_peace_hold_nobody() {
    let mut world = World::new();
    world.says("c", &[at(&[(0, "c"), (1, "elsewhere"), (2, "b")], &[1, 2])]);
    assert_eq!(world.look(0), []);
}

#[test]
fn a_coordinator_that_is_lost_speaks_again_through_its_successor() {
    let mut world = World::new();
    world.is_lost(0);
    assert_eq!(world.look(0), [began(0, Why::Silent)]);
    assert_eq!(world.closed(), Sides::REACHING);
    world.leads(0, "d");
    world.serves(0, "d");
    let moved = [(0, "d"), (1, "a"), (2, "b")];
    world.says("c", &[at(&moved, &[])]);
    assert_eq!(world.look(200), [], "what its predecessor has said is old");
    world.says("d", &[at(&moved, &[])]);
    assert_eq!(world.look(300), [ended(0, 300)]);
}

#[test]
fn patronis_coordinator_says_nothing_and_is_not_waited_for() {
    let mut world = World::new();
    let leader = ("p".to_owned(), Epoch { store: 1, revision: Revision(1) });
    let patroni = Node { kornak: false, ..node(0, "p") };
    let group = Group {
        leader: Some(leader),
        nodes: [("p".to_owned(), patroni)].into(),
        system_identifier: None,
    };
    world.cluster.groups.insert(GroupId(0), Arc::new(group));
    world.serves(0, "p");
    assert_eq!(world.look(0), []);
    world.is_lost(1);
    world.look(100);
    world.serves(1, "x");
    assert_eq!(world.look(200), [ended(1, 100)]);
    // The same where no Kornak has ever led the coordinator.
    world.cluster.registration = None;
    world.cluster.registered = None;
    world.is_lost(2);
    assert_eq!(world.look(300), [began(2, Why::Silent)]);
    world.serves(2, "y");
    assert_eq!(world.look(400), [ended(2, 100)]);
}

#[test]
fn a_planned_switchover_is_not_an_outage() {
    let mut world = World::new();
    world.phase(Some(HandoverPhase::Switch), 1);
    world.standing(1).withdraw(Why::Handover, true);
    assert_eq!(world.look(0), []);
    world.phase(Some(HandoverPhase::Settle), 1);
    world.leads(1, "x");
    world.serves(1, "x");
    assert_eq!(world.look(100), []);
    // The record goes when the coordinator knows it; what it publishes comes a moment later.
    world.phase(None, 1);
    assert_eq!(world.look(200), []);
    // Another group's record excuses nobody, and nor does one that stops nothing yet.
    world.phase(Some(HandoverPhase::Switch), 2);
    world.is_lost(1);
    assert_eq!(world.look(300), [began(1, Why::Silent)]);
    world.phase(Some(HandoverPhase::Drain), 0);
    world.is_lost(0);
    assert_eq!(world.look(400), [began(0, Why::Silent)]);
}

#[test]
fn a_switchover_whose_record_is_gone_and_that_nobody_won_is_an_outage() {
    let mut world = World::new();
    world.phase(Some(HandoverPhase::Promote), 1);
    world.standing(1).withdraw(Why::Handover, true);
    world.look(0);
    world.phase(None, 1);
    assert_eq!(world.look(100), [began(1, Why::Handover)]);
}

#[test]
fn a_candidate_that_keeps_no_record_is_waited_for_until_it_is_registered() {
    let mut world = World::new();
    world.phase(Some(HandoverPhase::Switch), 1);
    world.standing(1).withdraw(Why::Handover, true);
    assert_eq!(world.look(0), []);
    // Patroni's: the former leader removes the record as soon as the key is taken.
    world.phase(None, 1);
    world.leads(1, "x");
    assert_eq!(world.look(100), [began(1, Why::Handover)]);
    world.serves(1, "x");
    assert_eq!(world.look(200), []);
    assert_eq!(world.closed(), Sides::REACHING);
    world.says("c", &[at(&[(0, "c"), (1, "x"), (2, "b")], &[])]);
    assert_eq!(world.look(300), [ended(1, 200)]);
}

#[test]
fn groups_that_are_not_registered_concern_nobody() {
    let mut world = World::new();
    world.leads(3, "new");
    world.standing(3).withdraw(Why::NoLeader, false);
    assert_eq!(world.look(0), [], "it is being made");
    world.is_lost(2);
    assert_eq!(world.look(100), [began(2, Why::Silent)]);
    world.says("c", &[at(&[(0, "c"), (1, "a")], &[])]);
    let gone = Event::Gone { group: GroupId(2), held: Duration::from_millis(100) };
    assert_eq!(world.look(200), [gone], "it was removed");
}

#[test]
fn a_group_that_was_shut_down_has_nobody_to_wait_for() {
    let mut world = World::new();
    world.is_lost(2);
    let group = Group { leader: None, ..Group::clone(&world.cluster.groups[&GroupId(2)]) };
    world.cluster.groups.insert(GroupId(2), Arc::new(group));
    assert_eq!(world.look(0), [began(2, Why::Silent)], "a member is left, it may come back");
    world.cluster.groups.insert(GroupId(2), Arc::default());
    let gone = Event::Gone { group: GroupId(2), held: Duration::from_millis(50) };
    assert_eq!(world.look(50), [gone]);
    world.leads(2, "b");
    world.serves(2, "b");
    assert_eq!(world.look(60_000), [], "started again");
}

#[test]
fn a_plain_cluster_has_no_outages() {
    let mut world = World::new();
    world.cluster = Topology::default();
    world.leads(0, "c");
    world.is_lost(0);
    assert_eq!(world.look(0), []);
    assert_eq!(world.closed(), Sides::NONE);
}
