use super::*;
use kornak_cluster::{LeaseId, Member, Revision};
use serde_json::{Value, json};

fn cluster(config: Value, tags: &[(&str, Value)]) -> ClusterState {
    let Value::Object(config) = config else { panic!("an object") };
    let mut state = ClusterState {
        config: Some(ClusterConfig::from_json(config)),
        leader: Some(kornak_cluster::Leader {
            name: "a".into(),
            lease: LeaseId(1),
            epoch: kornak_cluster::Epoch { store: 1, revision: Revision(2) },
            mod_revision: Revision(2),
        }),
        status: serde_json::from_value(json!({
            "optime": 900,
            "slots": {"a": 900, "b": 800, "c": 700, "old": 600, "keep": 500, "cdc": 400},
            "retain_slots": ["a", "b", "c", "old"],
        }))
        .ok(),
        ..ClusterState::default()
    };
    for name in ["a", "b", "c"] {
        let tags = tags.iter().find(|(it, _)| *it == name).map_or(json!({}), |it| it.1.clone());
        let member =
            json!({"state": "running", "role": "replica", "xlog_location": 850, "tags": tags});
        let member: Member = serde_json::from_value(member).unwrap();
        state.members.insert(name.into(), member);
    }
    state
}

fn here<'a>(name: &'a str, tags: &'a Tags) -> Here<'a> {
    let leads = name == "a";
    Here {
        name,
        tags,
        leads,
        decodes: leads,
        follows: !leads,
        replayed: (!leads).then_some(Lsn(890)),
    }
}

/// Names of the slots that a node has to have, and where they are moved to.
#[track_caller]
fn check(name: &str, cluster: &ClusterState, expected: &[(&str, Option<u64>)]) {
    let tags = cluster.members[name].tags.clone();
    let found = wanted(here(name, &tags), cluster, str::to_owned);
    let found: Vec<_> =
        found.iter().map(|(name, wish)| (name.as_str(), wish.to.map(|to| to.0))).collect();
    assert_eq!(found, expected, "{name}");
}

#[test]
fn a_leader_has_a_slot_for_each_other_member() {
    check("a", &cluster(json!({}), &[]), &[("b", None), ("c", None)]);
    let nostream = cluster(json!({}), &[("c", json!({"nostream": true}))]);
    check("a", &nostream, &[("b", None)]);
}

#[test]
fn a_standby_keeps_them_where_the_leader_says_they_are() {
    let all = [("a", Some(900)), ("c", Some(700)), ("old", Some(600))];
    check("b", &cluster(json!({}), &[]), &all);
    check("b", &cluster(json!({"member_slots_ttl": 0}), &[]), &[]);
    check("b", &cluster(json!({}), &[("b", json!({"nofailover": true}))]), &[]);
}

#[test]
fn a_member_that_cascades_uses_its_slot_at_its_upstream_and_keeps_one_at_the_leader() {
    let cascade = cluster(json!({}), &[("c", json!({"replicatefrom": "b"}))]);
    check("a", &cascade, &[("b", None), ("c", Some(850))]);
    check("b", &cascade, &[("a", Some(900)), ("c", None), ("old", Some(600))]);
}

#[test]
fn permanent_slots_are_kept_everywhere() {
    let config = json!({"member_slots_ttl": 0, "slots": {
        "keep": {"type": "physical"}, "b": 0, "far": {"type": "physical", "cluster_type": "standby"},
        "cdc": {"type": "logical", "database": "app", "plugin": "x"}}});
    check(
        "a",
        &cluster(config.clone(), &[]),
        &[("b", None), ("c", None), ("cdc", None), ("keep", None)],
    );
    check("b", &cluster(config.clone(), &[]), &[("cdc", Some(400)), ("keep", Some(500))]);
    let cascade = [("b", json!({"replicatefrom": "c"})), ("c", json!({"nostream": true}))];
    check("b", &cluster(config.clone(), &cascade), &[("keep", Some(500))]);
    check("c", &cluster(config, &cascade), &[("b", Some(800)), ("keep", Some(500))]);
}

#[test]
fn a_permanent_slot_of_a_members_name_moves_with_that_member_on_the_leader() {
    let config = json!({"slots": {"c": 0}});
    let cascade = cluster(config, &[("c", json!({"replicatefrom": "b"}))]);
    check("a", &cascade, &[("b", None), ("c", Some(850))]);
    check("b", &cascade, &[("a", Some(900)), ("c", Some(700)), ("old", Some(600))]);
}

#[test]
fn a_logical_slot_left_over_on_a_standby_that_cannot_decode_is_dropped_at_once() {
    let found = [slot("a", 890), slot("c", 700), slot("old", 600), logical("left", 20)];
    let plan = planned("b", json!({}), &found);
    assert_eq!((plan.drop, plan.unknown_logical), (names(&["left"]), vec![]));
}

fn slot(name: &str, position: u64) -> Found {
    Found { name: name.into(), physical: true, restart: Some(Lsn(position)), ..Found::default() }
}

fn logical(name: &str, position: u64) -> Found {
    Found {
        physical: false,
        database: Some("app".into()),
        plugin: Some("x".into()),
        confirmed: Some(Lsn(position)),
        ..slot(name, position - 10)
    }
}

fn planned(name: &str, config: Value, found: &[Found]) -> Plan {
    let cluster = cluster(config, &[]);
    let tags = Tags::default();
    let here = here(name, &tags);
    let retained = ["b".to_owned(), "c".to_owned(), "gone".to_owned()];
    let wanted = wanted(here, &cluster, str::to_owned);
    let config = cluster.config.clone().unwrap();
    let now = Moment::at_millis(1000);
    plan(here, &config, &wanted, found, &retained, now, &mut GoneSince::default())
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn what_is_missing_is_created_and_what_is_behind_is_moved() {
    let plan = planned("b", json!({}), &[slot("a", 850), slot("c", 650)]);
    assert_eq!(plan.create_physical, names(&["old"]));
    // Not beyond what was replayed here.
    assert_eq!(plan.advance, [("a".to_owned(), Lsn(890)), ("c".to_owned(), Lsn(700))]);
    assert!(plan.drop.is_empty());
}

#[test]
fn a_slot_that_is_in_use_is_left_alone() {
    let plan = planned("b", json!({}), &[Found { active: true, ..slot("c", 1) }]);
    assert_eq!((plan.advance, plan.drop), (vec![], vec![]));
}

#[test]
fn slots_that_nobody_needs_are_dropped_but_for_those_to_be_ignored() {
    let ignore = json!({"ignore_slots": [{"name": "backup"}, {"type": "logical"}]});
    let found = [slot("b", 900), slot("c", 900), slot("backup", 1), logical("stranger", 20)];
    let plan = planned("a", json!({}), &found);
    assert_eq!(plan.drop, names(&["backup"]));
    assert_eq!(
        plan.unknown_logical,
        names(&["stranger"]),
        "somebody's place in a stream of changes"
    );
    let at_once = planned("a", json!({"member_slots_ttl": 0}), &found);
    assert_eq!(at_once.drop, names(&["backup", "stranger"]));
    assert!(planned("a", ignore, &found).drop.is_empty());
    let found = [
        Found { temporary: true, ..slot("t", 1) },
        Found { failover: true, ..logical("f", 20) },
        logical("citus_shard_move_slot_1_2_3", 20),
    ];
    assert!(planned("a", json!({}), &found).drop.is_empty());
}

#[test]
fn the_slot_of_a_member_that_has_vanished_is_kept_for_a_while() {
    let cluster = cluster(json!({"member_slots_ttl": 60}), &[]);
    let tags = Tags::default();
    let here = here("a", &tags);
    let wanted = wanted(here, &cluster, str::to_owned);
    let config = cluster.config.clone().unwrap();
    let mut gone = GoneSince::default();
    let found = [slot("b", 900), slot("c", 900), slot("gone", 100)];
    let mut at = |seconds: u64| {
        let now = Moment::at_millis(seconds * 1000);
        let retained = ["gone".to_owned()];
        plan(here, &config, &wanted, &found, &retained, now, &mut gone).drop
    };
    assert!(at(10).is_empty() && at(69).is_empty());
    assert_eq!(at(70), names(&["gone"]));
}

#[test]
fn a_logical_slot_that_nobody_has_asked_for_is_kept_for_a_while_and_one_taken_off_the_list_is_not()
{
    let with = |slots: Value| cluster(json!({"member_slots_ttl": 60, "slots": slots}), &[]);
    let listed = json!({"cdc": {"type": "logical", "database": "app", "plugin": "x"}});
    let tags = Tags::default();
    let here = here("a", &tags);
    let mut gone = GoneSince::default();
    let found = [slot("b", 900), slot("c", 900), logical("cdc", 20), logical("dbz", 20)];
    let mut at = |seconds: u64, slots: &Value| {
        let cluster = with(slots.clone());
        let wanted = wanted(here, &cluster, str::to_owned);
        let now = Moment::at_millis(seconds * 1000);
        let config = cluster.config.clone().unwrap();
        let plan = plan(here, &config, &wanted, &found, &[], now, &mut gone);
        (plan.drop, plan.unknown_logical)
    };
    assert_eq!(at(10, &listed), (vec![], names(&["dbz"])));
    assert_eq!(at(11, &json!({"cdc": {"type": "logical"}})), (vec![], vec![]), "half a word");
    assert_eq!(at(12, &json!({})), (names(&["cdc"]), vec![]), "said once");
    assert_eq!(at(70, &listed), (names(&["dbz"]), vec![]));
}

#[test]
fn a_copy_that_lost_its_log_is_made_again_while_the_leaders_is_fine() {
    let config =
        || json!({"slots": {"cdc": {"type": "logical", "database": "app", "plugin": "x"}}});
    let lost = || [Found { lost: true, ..logical("cdc", 390) }];
    let plan = planned("b", config(), &lost());
    assert_eq!((plan.drop, plan.copy_logical), (names(&["cdc"]), names(&["cdc"])));
    assert!(planned("a", config(), &lost()).drop.is_empty(), "the leader's is somebody's place");
}

#[test]
fn a_slot_that_holds_vacuum_back_or_lost_its_log_is_made_anew() {
    for broken in
        [Found { lost: true, ..slot("c", 700) }, Found { holds_xmin: true, ..slot("c", 700) }]
    {
        let plan = planned("b", json!({}), &[broken]);
        assert_eq!(plan.drop, names(&["c"]));
        assert!(plan.create_physical.contains(&"c".to_owned()));
    }
}

#[test]
fn a_logical_slot_is_created_by_the_leader_and_copied_by_the_others() {
    let config =
        || json!({"slots": {"cdc": {"type": "logical", "database": "app", "plugin": "x"}}});
    let leaders = planned("a", config(), &[]).create_logical;
    assert_eq!(leaders, [("cdc".to_owned(), "app".to_owned(), "x".to_owned())]);
    assert_eq!(planned("b", config(), &[]).copy_logical, names(&["cdc"]));
    assert_eq!(
        planned("b", config(), &[logical("cdc", 390)]).advance,
        [("cdc".to_owned(), Lsn(400))]
    );
    // PostgreSQL 17 moves it itself.
    let failover = Found { failover: true, synced: true, ..logical("cdc", 390) };
    assert!(planned("b", config(), &[failover]).advance.is_empty());
    let other = Found { plugin: Some("y".into()), ..logical("cdc", 390) };
    assert_eq!(planned("b", config(), &[other]).drop, names(&["cdc"]));
}

#[test]
fn a_failover_slot_of_a_former_primary_makes_room_for_the_new_primarys() {
    let old = Found { failover: true, ..logical("fo", 390) };
    let synced = Found { synced: true, ..old.clone() };
    let active = Found { active: true, ..old.clone() };
    let drop = |node, found: &Found| planned(node, json!({}), std::slice::from_ref(found)).drop;
    assert_eq!(drop("b", &old), names(&["fo"]));
    for (node, kept) in [("a", &old), ("b", &synced), ("b", &active)] {
        assert!(drop(node, kept).is_empty(), "{node} {kept:?}");
    }
    // Nobody else leads yet: it may be the only one that knows where its user is.
    let (tags, cluster) = (Tags::default(), cluster(json!({}), &[]));
    let alone = Here { follows: false, ..here("b", &tags) };
    let config = cluster.config.unwrap();
    let now = Moment::at_millis(1000);
    let plan = plan(alone, &config, &BTreeMap::new(), &[old], &[], now, &mut GoneSince::default());
    assert!(plan.drop.is_empty());
}
