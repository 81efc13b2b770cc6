use std::collections::BTreeSet;
use std::sync::Arc;

use kornak_cluster::topology::Group;
use kornak_cluster::{
    CitusDatabase, CitusRegistration, Epoch, Handover, HandoverPhase, Node, NodeRole, Revision,
    Timeline,
};

use super::*;
use crate::cluster::standing::{Instance, Serving};

const EPOCH: Epoch = Epoch { store: 1, revision: Revision(1) };

fn node(group: u32, name: &str, role: NodeRole) -> Node {
    Node {
        name: name.to_owned(),
        group: GroupId(group),
        host: name.into(),
        port: 5432,
        role,
        running: true,
        says_primary: role == NodeRole::Primary,
        lag_bytes: None,
        noloadbalance: false,
        timeline: None,
        api_base: String::new(),
        kornak: true,
    }
}

/// The cluster that a test changes step by step.
struct World {
    cluster: Topology,
    standings: Standings,
    waits: Waits,
}

impl World {
    /// Each group has a primary that is proven and registered, and a standby that runs.
    fn new(groups: u32) -> Self {
        let mut world = Self {
            cluster: Topology::default(),
            standings: Standings::default(),
            waits: Waits::default(),
        };
        let mut database = CitusDatabase { agrees: true, synced: true, ..CitusDatabase::default() };
        let mut rows = std::collections::BTreeMap::new();
        for group in 0..groups {
            let (leader, standby) = (format!("p{group}"), format!("s{group}"));
            let nodes = [
                (leader.clone(), node(group, &leader, NodeRole::Primary)),
                (standby.clone(), node(group, &standby, NodeRole::Standby)),
            ];
            let of = Group {
                leader: Some((leader.clone(), EPOCH)),
                nodes: nodes.into(),
                system_identifier: None,
            };
            world.cluster.groups.insert(GroupId(group), Arc::new(of));
            world.serves(group);
            database.groups.insert(GroupId(group));
            database.primaries.insert(GroupId(group), format!("{leader}:5432"));
            rows.insert(GroupId(group), BTreeSet::from([format!("{standby}:5432")]));
        }
        database.secondaries = Some(rows);
        if groups > 1 {
            world.register(database);
        }
        assert_eq!(world.decide(0, 0), Decision::default(), "all is well");
        world
    }

    fn register(&mut self, database: CitusDatabase) {
        let databases = [("app".to_owned(), database)].into();
        let registration = CitusRegistration { member: "p0".to_owned(), databases };
        self.cluster.registered = Some(registration.groups());
        self.cluster.registration = Some(registration);
    }

    fn serves(&mut self, group: u32) {
        let name = format!("p{group}");
        let serving = Serving {
            node: Arc::new(node(group, &name, NodeRole::Primary)),
            name: name.as_str().into(),
            epoch: EPOCH,
            instance: Instance { timeline: Some(Timeline(1)), ..Instance::default() },
            unfinished: BTreeSet::new(),
        };
        self.standings.0.entry(GroupId(group)).or_default().prove(serving);
    }

    fn lost(&mut self, group: u32) {
        let standing = self.standings.0.entry(GroupId(group)).or_default();
        standing.withdraw(crate::cluster::standing::Why::Silent, false);
    }

    fn handover(&mut self, phase: HandoverPhase, group: Option<u32>) {
        self.cluster.handover = Some(Handover {
            v: 1,
            id: "h".to_owned(),
            attempt: 1,
            phase,
            group: group.map(GroupId),
            leader: format!("p{}", group.unwrap_or_default()),
            candidate: Some("b".to_owned()),
            epoch: EPOCH,
            max_hold_ms: 1000,
            switch_hold_ms: 5000,
            wal_end: None,
        });
    }

    fn decide(&mut self, inside: usize, now: u64) -> Decision {
        let facts = Facts {
            cluster: &self.cluster,
            standings: &self.standings,
            inside,
            to_listen: 0,
            max_hold: Duration::from_secs(1),
            hold_timeout: Duration::from_secs(30),
        };
        self.waits.on(&facts, Moment::at_millis(now), &mut Vec::new())
    }
}

/// One thing that keeps sessions waiting.
#[derive(Debug, Clone, Copy)]
enum Is {
    /// A drain of a group's leader.
    Drained(Option<u32>),
    /// A group's primary is lost.
    Lost(u32),
    /// A group's standby does not run.
    Resting(u32),
}

impl World {
    fn make(&mut self, is: Is) {
        match is {
            Is::Drained(group) => self.handover(HandoverPhase::Drain, group),
            Is::Lost(group) => self.lost(group),
            Is::Resting(group) => {
                let mut of = Group::clone(&self.cluster.groups[&GroupId(group)]);
                let standby = format!("s{group}");
                of.nodes.get_mut(&standby).unwrap().running = false;
                self.cluster.groups.insert(GroupId(group), Arc::new(of));
            }
        }
    }
}

/// A sentence, the number of groups, what has happened to them, who waits, and until when in milliseconds.
type Row<'a> = (&'a str, u32, &'a [Is], Sides, Option<u64>);

#[test]
fn the_sides_that_wait_are_those_of_every_reason_together() {
    use Is::{Drained, Lost, Resting};
    let rows: &[Row<'_>] = &[
        ("a drain of a plain cluster", 1, &[Drained(None)], Sides::LEADING, Some(1_300)),
        ("a plain cluster without a primary holds nobody here", 1, &[Lost(0)], Sides::NONE, None),
        ("a Citus drain holds everybody", 3, &[Drained(Some(1))], Sides::ALL, Some(1_300)),
        ("a group without a primary", 3, &[Lost(1)], Sides::REACHING, Some(28_500)),
        ("a standby that does not run", 3, &[Resting(2)], Sides::FOLLOWING, Some(5_000)),
        ("both of them", 3, &[Lost(1), Resting(2)], Sides::ALL, Some(5_000)),
        ("all three", 3, &[Drained(Some(2)), Lost(1), Resting(1)], Sides::ALL, Some(1_300)),
    ];
    for (sentence, groups, things, closed, deadline) in rows {
        let mut world = World::new(*groups);
        things.iter().for_each(|is| world.make(*is));
        let decision = world.decide(1, 0);
        let drained = things.iter().any(|is| matches!(is, Drained(_)));
        assert_eq!(decision.closed, *closed, "{sentence}");
        assert_eq!(decision.deadline, deadline.map(Moment::at_millis), "{sentence}");
        assert_eq!((decision.look_again, decision.acknowledge), (drained, None), "{sentence}");
        let again = world.decide(1, 0);
        assert_eq!((again.closed, again.look_again), (*closed, false), "{sentence}: asked twice");
        let asked = world.decide(0, 0).acknowledge.map(|attempt| attempt.number);
        assert_eq!(asked, drained.then_some(1), "{sentence}: nobody is inside");
    }
}

#[test]
fn what_one_reason_lets_go_another_still_holds() {
    let mut world = World::new(3);
    world.make(Is::Drained(Some(2)));
    world.make(Is::Lost(1));
    assert_eq!(world.decide(0, 0).closed, Sides::ALL);
    world.cluster.handover = None;
    assert_eq!(world.decide(0, 100).closed, Sides::REACHING, "the drain was given up");
    world.serves(1);
    assert_eq!(world.decide(0, 200).closed, Sides::NONE, "the primary is back");
}

#[test]
fn readers_of_primaries_wait_while_a_group_has_none() {
    let mut world = World::new(3);
    world.make(Is::Resting(2));
    assert_eq!(world.decide(0, 0).source, Source::Standbys);
    let after = world.decide(0, 5_000);
    assert_eq!((after.source, after.closed), (Source::Primaries, Sides::NONE));
    world.make(Is::Lost(1));
    assert_eq!(world.decide(0, 5_100).closed, Sides::ALL);
}

#[test]
fn listeners_of_the_former_leader_count_only_while_sessions_wait_for_the_next() {
    let mut world = World::new(1);
    world.handover(HandoverPhase::Drain, None);
    world.decide(0, 0);
    assert_eq!(world.waits.former_leader(&world.cluster), None);
    world.handover(HandoverPhase::Switch, None);
    world.decide(0, 100);
    let former = world.waits.former_leader(&world.cluster);
    assert_eq!(former, Some(("p0", GroupId::COORDINATOR)));
}
