use std::collections::BTreeMap;

use kornak_cluster::topology::Group;
use kornak_cluster::{Epoch, NodeRole, Revision};
use kornak_config::Listen;

use super::*;
use crate::cluster::standing::{Instance, Serving};

fn node(name: &str, lag: Option<u64>) -> Node {
    Node {
        name: name.to_owned(),
        group: GroupId(0),
        host: "h".into(),
        port: 1,
        role: NodeRole::Standby,
        running: true,
        says_primary: false,
        lag_bytes: lag,
        noloadbalance: false,
        timeline: None,
        api_base: String::new(),
        kornak: false,
    }
}

/// A leads, b is near, c is far, d is stopped, e is not for readers.
fn cluster() -> (Topology, Standings) {
    let mut nodes = BTreeMap::new();
    for (name, lag) in
        [("a", Some(0)), ("b", Some(10)), ("c", Some(1000)), ("d", None), ("e", None)]
    {
        nodes.insert(name.to_owned(), node(name, lag));
    }
    nodes.get_mut("d").unwrap().running = false;
    nodes.get_mut("e").unwrap().noloadbalance = true;
    let epoch = Epoch { store: 1, revision: Revision(1) };
    let group = Group { leader: Some(("a".to_owned(), epoch)), nodes, system_identifier: None };
    let groups = [(GroupId(0), Arc::new(group))].into();
    let mut standings = Standings::default();
    let serving = Serving {
        node: Arc::new(node("a", None)),
        name: "a".into(),
        epoch,
        instance: Instance::default(),
        unfinished: [].into(),
    };
    standings.0.entry(GroupId(0)).or_default().prove(serving);
    (Topology { groups, ..Topology::default() }, standings)
}

fn listener(target: Target) -> ListenerSettings {
    ListenerSettings::new("l", Listen { hosts: vec!["h".to_owned()], port: 0 }, target)
}

fn names(found: Result<Vec<Candidate>, Why>) -> Result<Vec<String>, Why> {
    found.map(|found| found.into_iter().map(|one| one.name.to_string()).collect())
}

#[track_caller]
fn check(listener: &ListenerSettings, refused: &[&str], expected: &[&str]) {
    let (topology, standings) = cluster();
    let refused: Vec<Arc<str>> = refused.iter().map(|name| (*name).into()).collect();
    let found = names(candidates(listener, &topology, &standings, &refused));
    assert_eq!(found.unwrap_or_default(), expected);
}

#[test]
fn readers_go_to_running_standbys() {
    check(&listener(Target::Standbys), &[], &["b", "c"]);
    let near = ListenerSettings { max_lag_bytes: Some(100), ..listener(Target::Standbys) };
    check(&near, &[], &["b"]);
    check(&listener(Target::Any), &[], &["b", "c", "a"]);
}

#[test]
fn without_a_standby_readers_fall_back_if_they_may() {
    check(&listener(Target::Standbys), &["b", "c"], &["a"]);
    let proud = ListenerSettings { fallback_to_primary: false, ..listener(Target::Standbys) };
    check(&proud, &["b", "c"], &[]);
}

#[test]
fn writers_go_to_a_proven_leader_only() {
    check(&listener(Target::Primary), &[], &["a"]);
    let (topology, mut standings) = cluster();
    standings.0.get_mut(&GroupId(0)).unwrap().withdraw(Why::Silent, false);
    let found = names(candidates(&listener(Target::Primary), &topology, &standings, &[]));
    assert_eq!(found, Err(Why::Silent));
}

#[test]
fn a_leader_of_unknown_term_is_no_standby() {
    let (mut topology, standings) = cluster();
    let group = topology.groups.get_mut(&GroupId(0)).unwrap();
    *group = Arc::new(Group { leader: None, ..Group::clone(group) });
    let found = names(candidates(&listener(Target::Standbys), &topology, &standings, &[]));
    assert_eq!(found.unwrap(), ["b", "c"]);
}

#[test]
fn a_member_is_used_as_what_it_is() {
    let (topology, standings) = cluster();
    let of = |name: &str| {
        let listener = listener(Target::Member(name.to_owned()));
        candidates(&listener, &topology, &standings, &[]).unwrap().remove(0)
    };
    assert!(of("a").leading && !of("b").leading);
}

#[test]
fn the_least_busy_is_chosen_and_equal_ones_take_turns() {
    let (topology, standings) = cluster();
    let found = candidates(&listener(Target::Standbys), &topology, &standings, &[]).unwrap();
    let pick = |balance, sessions: &HashMap<Arc<str>, usize>, dice| {
        choose(&found, balance, sessions, dice).unwrap().name.to_string()
    };
    let busy = HashMap::from([("b".into(), 3), ("c".into(), 1)]);
    assert_eq!(pick(Balance::LeastSessions, &busy, 0), "c");
    let equal = HashMap::new();
    assert_eq!(pick(Balance::LeastSessions, &equal, 0), "b");
    assert_eq!(pick(Balance::LeastSessions, &equal, 1), "c");
    assert_eq!(pick(Balance::RoundRobin, &busy, 2), "b");
    assert!(choose(&[], Balance::Random, &equal, 5).is_none());
}

/// Groups 1 and 2 with a leader each, `w1` and `w2`, beside the coordinator.
fn workers() -> (Topology, Standings) {
    let (mut topology, mut standings) = cluster();
    for group in [1, 2] {
        let id = GroupId(group);
        let name = format!("w{group}");
        let leader = Node { group: id, ..node(&name, None) };
        let epoch = Epoch { store: 1, revision: Revision(1) };
        let known = Group {
            leader: Some((name.clone(), epoch)),
            nodes: [(name.clone(), leader.clone())].into(),
            system_identifier: None,
        };
        topology.groups.insert(id, Arc::new(known));
        let instance = Instance::default();
        let (node, name) = (Arc::new(leader), name.as_str().into());
        standings.0.entry(id).or_default().prove(Serving {
            node,
            name,
            epoch,
            instance,
            unfinished: [].into(),
        });
    }
    (topology, standings)
}

#[test]
fn clients_of_workers_go_to_groups_that_are_registered() {
    let (mut topology, standings) = workers();
    let listener = listener(Target::Workers);
    let found = |topology: &Topology| names(candidates(&listener, topology, &standings, &[]));
    assert_eq!(found(&topology), Ok(vec!["w1".to_owned(), "w2".to_owned()]), "nobody says");
    topology.registered = Some([GroupId(0), GroupId(2)].into());
    assert_eq!(found(&topology), Ok(vec!["w2".to_owned()]));
    topology.registered = Some([GroupId(0)].into());
    assert!(found(&topology).is_err());
}

#[test]
fn a_session_stays_on_its_group_as_long_as_that_is_a_worker() {
    let (mut topology, mut standings) = workers();
    let listener = listener(Target::Workers);
    let home = |topology: &Topology, standings: &Standings| {
        let mut found = candidates(&listener, topology, standings, &[]);
        let state = at_home(&mut found, GroupId(2), topology);
        (state, names(found).unwrap_or_default().join(" "))
    };
    assert_eq!(home(&topology, &standings), (AtHome::Yes, "w2".to_owned()));
    standings.0.entry(GroupId(2)).or_default().withdraw(Why::Silent, false);
    assert_eq!(home(&topology, &standings), (AtHome::Away, "w1".to_owned()));
    topology.registered = Some([GroupId(0), GroupId(1)].into());
    assert_eq!(home(&topology, &standings), (AtHome::Moved, "w1".to_owned()));
}

#[test]
fn a_password_is_proven_to_the_group_that_the_session_will_be_on() {
    let (topology, _) = workers();
    let by = |target: Target, worker: Option<u32>| {
        let worker = worker.map(GroupId);
        verified_by(&listener(target), &topology, worker).map(|group| group.0)
    };
    assert_eq!(by(Target::Workers, Some(2)), Some(2));
    assert_eq!(by(Target::Workers, None), None, "no worker is there");
    for target in [Target::Primary, Target::Standbys, Target::Any] {
        assert_eq!(by(target, None), Some(0), "whoever leads the others");
    }
    assert_eq!(by(Target::Member("w1".to_owned()), None), Some(1));
    assert_eq!(by(Target::Member("nobody".to_owned()), None), None);
}
