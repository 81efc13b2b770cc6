use std::sync::Arc;

use kornak_cluster::topology::Group;
use kornak_cluster::{CitusDatabase, CitusRegistration, Epoch, Node, Revision};

use super::*;

const PATIENCE: Duration = Duration::from_secs(5);

/// The coordinator on `c`, a worker group of `a` and `b`, another of `x` and `y`; the first leads.
struct World {
    cluster: Topology,
    readings: Readings,
}

/// How a node is, by its own account.
#[derive(Clone, Copy, PartialEq)]
enum Is {
    Primary,
    Standby,
    Starting,
}

const FIRST: [(u32, &[&str]); 3] = [(0, &["d"]), (1, &["b"]), (2, &["y"])];

impl World {
    fn new() -> Self {
        let cluster = Topology::default();
        let mut world = Self { cluster, readings: Readings::default() };
        for (group, leader, standby) in [(0, "c", "d"), (1, "a", "b"), (2, "x", "y")] {
            world.group(group, leader, &[(leader, Is::Primary), (standby, Is::Standby)]);
        }
        world.says("c", &[&FIRST]);
        assert_eq!(world.look(0), []);
        world
    }

    fn group(&mut self, group: u32, leader: &str, nodes: &[(&str, Is)]) {
        let node = |(name, is): &(&str, Is)| {
            let node = Node {
                name: (*name).to_owned(),
                group: GroupId(group),
                host: (*name).into(),
                port: 5432,
                role: if *name == leader { NodeRole::Primary } else { NodeRole::Standby },
                running: *is != Is::Starting,
                says_primary: *is == Is::Primary,
                lag_bytes: None,
                noloadbalance: false,
                timeline: None,
                api_base: String::new(),
                kornak: true,
            };
            ((*name).to_owned(), node)
        };
        let group_of = Group {
            leader: Some((leader.to_owned(), Epoch { store: 1, revision: Revision(1) })),
            nodes: nodes.iter().map(node).collect(),
            system_identifier: None,
        };
        self.cluster.groups.insert(GroupId(group), Arc::new(group_of));
    }

    /// Where the coordinator's leader says that standbys are, in each database.
    fn says(&mut self, member: &str, databases: &[&[(u32, &[&str])]]) {
        let database = |(n, rows): (usize, &&[(u32, &[&str])])| {
            let at = |name: &&str| format!("{name}:5432");
            let secondaries = rows.iter().filter(|(_, names)| !names.is_empty());
            let secondaries = secondaries
                .map(|(group, names)| (GroupId(*group), names.iter().map(at).collect()))
                .collect();
            let database = CitusDatabase {
                agrees: true,
                groups: rows.iter().map(|(group, _)| GroupId(*group)).collect(),
                secondaries: Some(secondaries),
                ..CitusDatabase::default()
            };
            (format!("db{n}"), database)
        };
        let databases = databases.iter().enumerate().map(database).collect();
        self.cluster.registration =
            Some(CitusRegistration { member: member.to_owned(), databases });
    }

    fn look(&mut self, millis: u64) -> Vec<Event> {
        let (mut events, mut again) = (Vec::new(), Vec::new());
        let now = Moment::at_millis(millis);
        self.readings.on(&self.cluster, PATIENCE, now, &mut events);
        let before = self.readings.clone();
        self.readings.on(&self.cluster, PATIENCE, now, &mut again);
        assert_eq!((again, &before), (Vec::new(), &self.readings), "asking twice changes nothing");
        events
    }

    /// Whom readers ask; `None`: they wait.
    fn source(&self) -> Option<Source> {
        let waits = self.readings.closed(Sides::NONE) == Sides::FOLLOWING;
        (!waits).then(|| self.readings.source())
    }
}

fn began(group: u32) -> Event {
    Event::Began { group: GroupId(group) }
}

fn ended(group: u32, millis: u64) -> Event {
    Event::Ended { group: GroupId(group), held: Duration::from_millis(millis) }
}

fn primaries(group: u32) -> Event {
    Event::Primaries { group: GroupId(group) }
}

fn standbys(group: u32) -> Event {
    Event::Standbys { group: GroupId(group) }
}

#[test]
fn readers_wait_from_the_change_of_a_leader_until_the_former_one_follows() {
    let mut world = World::new();
    assert_eq!(world.source(), Some(Source::Standbys));
    world.group(1, "b", &[("a", Is::Starting), ("b", Is::Standby)]);
    assert_eq!(world.look(100), [began(1)], "whatever the rows say");
    world.group(1, "b", &[("a", Is::Starting), ("b", Is::Primary)]);
    world.says("c", &[&[(0, &["d"]), (1, &["a"]), (2, &["y"])]]);
    assert_eq!((world.look(300), world.source()), (vec![], None));
    world.group(1, "b", &[("a", Is::Standby), ("b", Is::Primary)]);
    assert_eq!((world.look(900), world.source()), (vec![ended(1, 800)], Some(Source::Standbys)));
    assert_eq!(world.readings.deadline(), None);
}

#[test]
fn a_former_primary_that_has_not_heard_of_it_is_no_standby() {
    let mut world = World::new();
    world.group(1, "b", &[("a", Is::Primary), ("b", Is::Primary)]);
    world.says("c", &[&[(0, &["d"]), (1, &["a"]), (2, &["y"])]]);
    assert_eq!(world.look(0), [began(1)]);
}

#[test]
fn who_does_not_come_back_in_time_is_not_waited_for() {
    let mut world = World::new();
    world.group(2, "x", &[("x", Is::Primary), ("y", Is::Starting)]);
    assert_eq!(world.look(0), [began(2)]);
    assert_eq!(world.readings.deadline(), Some(Moment::at_millis(5_000)));
    assert_eq!(world.look(4_999), []);
    assert_eq!(world.look(5_000), [primaries(2)]);
    assert_eq!((world.source(), world.readings.deadline()), (Some(Source::Primaries), None));
    world.group(2, "x", &[("x", Is::Primary), ("y", Is::Standby)]);
    assert_eq!((world.look(60_000), world.source()), (vec![standbys(2)], Some(Source::Standbys)));
}

#[test]
fn a_group_whose_last_row_is_gone_is_read_from_its_primary_at_once() {
    let mut world = World::new();
    world.group(1, "a", &[("a", Is::Primary)]);
    assert_eq!(world.look(0), [began(1)]);
    world.says("c", &[&[(0, &["d"]), (1, &[]), (2, &["y"])]]);
    assert_eq!((world.look(100), world.source()), (vec![primaries(1)], Some(Source::Primaries)));
}

#[test]
fn a_group_that_never_had_a_standby_is_read_from_its_primary() {
    let mut world = World::new();
    world.group(3, "n", &[("n", Is::Primary)]);
    assert_eq!(world.look(0), [], "not registered yet, nobody reads it");
    world.says("c", &[&[(0, &["d"]), (1, &["b"]), (2, &["y"]), (3, &[])]]);
    assert_eq!((world.look(0), world.source()), (vec![primaries(3)], Some(Source::Primaries)));
    world.says("c", &[&FIRST]);
    assert_eq!((world.look(0), world.source()), (vec![standbys(3)], Some(Source::Standbys)));
}

#[test]
fn every_row_counts_for_citus_reads_from_any() {
    let mut world = World::new();
    world.group(1, "a", &[("a", Is::Primary), ("b", Is::Standby), ("e", Is::Starting)]);
    assert_eq!(world.look(0), [], "a server without a row is nobody's");
    world.says("c", &[&[(0, &["d"]), (1, &["b", "e"]), (2, &["y"])]]);
    assert_eq!(world.look(0), [began(1)]);
}

#[test]
fn every_database_counts() {
    let mut world = World::new();
    world.says("c", &[&FIRST, &[(0, &["d"]), (1, &[]), (2, &["y"])]]);
    assert_eq!(world.look(0), [primaries(1)]);
}

#[test]
fn the_coordinators_own_standbys_are_read_where_the_session_is() {
    let mut world = World::new();
    world.group(0, "d", &[("c", Is::Starting), ("d", Is::Primary)]);
    assert_eq!(world.look(0), []);
    world.says("d", &[&[(0, &[]), (1, &["b"]), (2, &["y"])]]);
    assert_eq!(world.look(0), [primaries(0)], "but Citus wants a row");
}

#[test]
fn who_reads_from_primaries_waits_for_them_too() {
    let mut world = World::new();
    assert_eq!(world.readings.closed(Sides::REACHING), Sides::NONE);
    world.says("c", &[&[(0, &["d"]), (1, &[]), (2, &["y"])]]);
    world.look(0);
    assert_eq!(world.readings.closed(Sides::REACHING), Sides::FOLLOWING);
    assert_eq!(world.readings.closed(Sides::WORKERS), Sides::NONE, "the coordinator knows it");
}

#[test]
fn where_nobody_says_what_the_rows_are_nobody_waits() {
    let mut world = World::new();
    world.group(1, "b", &[("a", Is::Starting), ("b", Is::Primary)]);
    assert_eq!(world.look(0), [began(1)]);
    // Patroni's node leads the coordinator now.
    let mut group = Group::clone(&world.cluster.groups[&GroupId(0)]);
    group.leader = Some(("d".to_owned(), Epoch { store: 1, revision: Revision(2) }));
    group.nodes.entry("d".to_owned()).and_modify(|node| node.kornak = false);
    world.cluster.groups.insert(GroupId(0), Arc::new(group));
    assert_eq!((world.look(100), world.source()), (vec![ended(1, 100)], Some(Source::Standbys)));
    world.cluster.registration = None;
    assert_eq!((world.look(200), world.source()), (vec![], Some(Source::Standbys)));
}

#[test]
fn a_plain_cluster_has_nothing_to_wait_for() {
    let mut world = World::new();
    world.cluster = Topology::default();
    world.group(0, "d", &[("c", Is::Starting), ("d", Is::Primary)]);
    assert_eq!((world.look(0), world.source()), (vec![], Some(Source::Standbys)));
}
