use std::collections::BTreeMap;

use kornak_cluster::{Epoch, LeaseId, RaftTerm, Revision, Timeline};
use kornak_dcs::KeyValue;

use super::by_asking::{Accepted, Finding, find};
use super::*;
use crate::cluster::probe::Facts;
use crate::cluster::standing::Instance;

fn view(store: u64, revision: Revision, keys: &[(&str, &str, u64)]) -> View {
    let keys = keys.iter().map(|(key, value, created)| {
        let found = KeyValue {
            key: (*key).to_owned(),
            value: (*value).to_owned(),
            create_revision: Revision(*created),
            mod_revision: Revision(*created),
            lease: LeaseId::NONE,
        };
        (found.key.clone(), found)
    });
    View { store, revision, raft_term: RaftTerm(1), reach: Reach::Live, keys: keys.collect() }
}

fn known(store: u64, leader: &str, created: u64) -> Topology {
    let scope = Scope::new("service", "demo", None);
    let view = view(store, Revision(created), &[("/service/demo/leader", leader, created)]);
    read(&scope, &view).0
}

fn leader(topology: &Topology) -> Option<(String, Epoch)> {
    topology.groups.get(&GroupId(0))?.leader.clone()
}

#[test]
fn an_older_leadership_is_doubted_until_the_store_confirms_that_its_history_went_back() {
    let now = known(1, "b", 20);
    assert_eq!(merge(&now, known(1, "a", 10), false), Merged::Doubt);
    let Merged::Known(merged) = merge(&now, known(1, "a", 10), true) else { panic!("doubt") };
    assert_eq!(leader(&merged).map(|l| l.0).as_deref(), Some("a"));
    let Merged::Known(merged) = merge(&now, known(1, "c", 30), false) else { panic!("doubt") };
    assert_eq!(leader(&merged).map(|l| l.0).as_deref(), Some("c"));
}

#[test]
fn another_store_is_believed_only_when_asked_linearizably() {
    let now = known(1, "b", 20);
    assert_eq!(merge(&now, known(2, "c", 3), false), Merged::Doubt);
    let Merged::Known(merged) = merge(&now, known(2, "c", 3), true) else { panic!("doubt") };
    assert_eq!(leader(&merged), Some(("c".to_owned(), Epoch { store: 2, revision: Revision(3) })));
}

#[test]
fn an_absent_leader_key_is_unknown_and_the_group_stays() {
    let scope = Scope::new("service", "demo", None);
    let (empty, _) = read(&scope, &view(1, Revision(30), &[]));
    let Merged::Known(merged) = merge(&known(1, "b", 20), empty, false) else { panic!("doubt") };
    assert_eq!(leader(&merged), None);
    assert!(merged.groups.contains_key(&GroupId(0)));
}

#[test]
fn the_groups_of_a_citus_cluster_are_told_apart() {
    let scope = Scope::new("service", "demo", None);
    let keys = [
        ("/service/demo/0/leader", "c1", 5),
        ("/service/demo/2/leader", "w2", 6),
        ("/service/demo/kornak/proxies/p", "{}", 7),
        ("/service/demo/2/members/w2", "nonsense", 8),
    ];
    let (topology, unreadable) = read(&scope, &view(1, Revision(9), &keys));
    let groups: Vec<u32> = topology.groups.keys().map(|group| group.0).collect();
    assert_eq!(groups, [0, 2]);
    assert!(unreadable.iter().any(|key| key.ends_with("members/w2")), "{unreadable:?}");
}

fn says(timeline: Option<u32>, identifier: &str) -> Facts {
    let instance = Instance {
        system_identifier: Some(identifier.to_owned()),
        timeline: timeline.map(Timeline),
        started: None,
    };
    Facts { in_recovery: timeline.is_none(), instance, lsn: None, prepared: [].into() }
}

fn accepted(name: &str, timeline: u32) -> Accepted {
    let timeline = Some(Timeline(timeline));
    Accepted { name: name.to_owned(), timeline, identifier: Some("7".to_owned()) }
}

fn found(said: &[(&str, Facts)], last: Option<&Accepted>) -> Finding {
    let said: BTreeMap<_, _> = said.iter().map(|(n, f)| ((*n).to_owned(), f.clone())).collect();
    find(&said, last)
}

#[test]
fn only_a_higher_timeline_of_the_same_cluster_takes_over() {
    let last = accepted("a", 3);
    let primary = |name: &str| Finding::Primary(name.to_owned());
    let standby = || says(None, "7");
    assert_eq!(found(&[("a", says(Some(3), "7")), ("b", standby())], None), primary("a"));
    assert_eq!(found(&[("b", says(Some(4), "7"))], Some(&last)), primary("b"));
    assert_eq!(found(&[("b", says(Some(3), "7"))], Some(&last)), Finding::Nobody, "same timeline");
    assert_eq!(found(&[("b", says(Some(9), "8"))], Some(&last)), Finding::Nobody, "other cluster");
    assert_eq!(found(&[("a", says(Some(3), "7"))], Some(&last)), primary("a"), "it is back");
    let split = [("a", says(Some(3), "7")), ("b", says(Some(4), "7"))];
    assert_eq!(found(&split, Some(&last)), primary("b"), "the old primary still writes");
    assert_eq!(found(&[("a", standby()), ("b", standby())], Some(&last)), Finding::Nobody);
}

#[test]
fn two_that_nothing_tells_apart_change_nothing() {
    let split = [("a", says(Some(3), "7")), ("b", says(Some(3), "7"))];
    let ambiguous = |finding| matches!(finding, Finding::Ambiguous(..));
    assert!(ambiguous(found(&split, None)));
    let both = [("b", says(Some(4), "7")), ("c", says(Some(4), "7"))];
    assert!(ambiguous(found(&both, Some(&accepted("a", 3)))));
}
