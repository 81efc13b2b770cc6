use super::*;
use crate::epoch::Epoch;
use crate::lsn::Timeline;
use crate::numbers::{LeaseId, Revision};
use crate::state::Leader;

const ID: &str = "7000000000000000001";

/// A led, synchronous cluster at this revision.
fn good(revision: u64) -> ClusterState {
    let sync = SyncState::new("a", &["b".to_owned()]);
    ClusterState {
        store: 1,
        revision: Revision(revision),
        initialize: Some(ID.to_owned()),
        config: ClusterConfig::parse(r#"{"ttl":20,"synchronous_mode":true,"failsafe_mode":true}"#),
        config_revision: Revision(5),
        leader: Some(held_by("a")),
        sync: Some(sync),
        sync_revision: Revision(6),
        failsafe: Some([("a".to_owned(), String::new())].into()),
        ..ClusterState::default()
    }
}

fn held_by(name: &str) -> Leader {
    Leader {
        name: name.to_owned(),
        lease: LeaseId(7),
        epoch: Epoch { store: 1, revision: Revision(4) },
        mod_revision: Revision(4),
    }
}

fn filled(known: &mut Known, mut state: ClusterState) -> ClusterState {
    known.fill(&mut state, None);
    state
}

/// State of a store that has nothing but a leader.
fn bare(revision: u64) -> ClusterState {
    ClusterState {
        store: 1,
        revision: Revision(revision),
        leader: Some(held_by("a")),
        ..ClusterState::default()
    }
}

fn unreadable(revision: u64) -> ClusterState {
    let mut state = bare(revision);
    for key in [SafetyKey::Config, SafetyKey::Sync, SafetyKey::Failsafe, SafetyKey::Initialize] {
        state.doubts.insert(key, Doubt::Unreadable);
    }
    state.initialize = Some("nonsense".to_owned());
    state
}

#[test]
fn the_last_good_values_stay_in_force() {
    for odd in [bare(11), unreadable(11)] {
        let mut known = Known::default();
        let before = filled(&mut known, good(10));
        assert_eq!(before.doubts, BTreeMap::new());
        let now = filled(&mut known, odd);
        assert_eq!(
            (now.config, now.sync, now.failsafe, now.initialize),
            (before.config, before.sync, before.failsafe, before.initialize)
        );
        for key in [SafetyKey::Config, SafetyKey::Sync, SafetyKey::Failsafe, SafetyKey::Initialize]
        {
            assert_eq!(now.doubts.get(&key), Some(&Doubt::Kept), "{key}");
        }
        let again = filled(&mut known, good(12));
        assert_eq!(again.doubts, BTreeMap::new(), "and the store is believed again");
    }
}

#[test]
fn nothing_good_is_known_at_first() {
    let now = filled(&mut Known::default(), unreadable(3));
    for key in [SafetyKey::Config, SafetyKey::Sync, SafetyKey::Failsafe, SafetyKey::Initialize] {
        assert!(now.is_unknown(key), "{key}");
    }
    let new = filled(
        &mut Known::default(),
        ClusterState { revision: Revision(3), ..ClusterState::default() },
    );
    assert_eq!(new.doubts, BTreeMap::new(), "a cluster that does not exist yet is not in doubt");
    let mut synchronous = good(3);
    (synchronous.sync, synchronous.sync_revision, synchronous.failsafe) =
        (None, Revision::NONE, None);
    let now = filled(&mut Known::default(), synchronous);
    assert!(now.is_unknown(SafetyKey::Sync) && now.is_unknown(SafetyKey::Failsafe));
}

#[test]
fn a_mode_that_is_switched_on_begins_with_nobody_named() {
    let mut known = Known::default();
    let mut off = good(3);
    (off.sync, off.sync_revision, off.failsafe) = (None, Revision::NONE, None);
    let on = off.clone();
    off.config = ClusterConfig::parse("{}");
    filled(&mut known, off);
    let now = filled(&mut known, ClusterState { revision: Revision(4), ..on });
    assert_eq!(now.doubts, BTreeMap::new());
    assert_eq!((now.sync, now.failsafe), (None, None));
}

#[test]
fn before_anybody_has_led_nobody_is_asked_without_the_store() {
    let first = ClusterConfig::parse(r#"{"failsafe_mode":true}"#).unwrap();
    let empty = || ClusterState { store: 1, revision: Revision(3), ..ClusterState::default() };
    for identifiers in [[None, Some(ID)], [Some(ID), Some(ID)]] {
        let mut known = Known::default().beginning_with(first.clone());
        let states = identifiers.map(|identifier| {
            let mut state = empty();
            known.fill(&mut state, identifier);
            state
        });
        assert_eq!(states[1].config.as_ref(), Some(&first));
        assert_eq!(states[1].doubts, BTreeMap::new(), "{identifiers:?}");
    }
    let mut led = Known::default().beginning_with(first);
    let now = filled(&mut led, ClusterState { failsafe: None, ..good(3) });
    assert!(now.is_unknown(SafetyKey::Failsafe), "somebody leads, with a list that was lost");
}

#[test]
fn a_kept_configuration_is_of_its_cluster_alone() {
    let config = ClusterConfig::parse(r#"{"pause":true}"#).unwrap();
    let cached = || Known::with_cached(Some((ID.to_owned(), config.clone())));
    let mut state = bare(3);
    cached().fill(&mut state, Some(ID));
    assert_eq!(state.config.as_ref(), Some(&config));
    let mut other = ClusterState { initialize: Some("8".to_owned()), ..bare(3) };
    cached().fill(&mut other, Some("8"));
    assert_eq!(other.config, None);
    let mut nothing = ClusterState::default();
    cached().fill(&mut nothing, None);
    assert_eq!(nothing.config, None, "a new cluster begins with its own");
}

#[test]
fn single_values_that_make_no_sense_are_replaced_by_the_last_ones() {
    let mut known = Known::default();
    filled(&mut known, good(3));
    let odd = r#"{"ttl":"nan","loop_wait":7,"synchronous_mode":true}"#;
    let now = filled(&mut known, ClusterState { config: ClusterConfig::parse(odd), ..good(4) });
    let config = now.config.unwrap();
    assert_eq!((config.ttl.as_secs(), config.loop_wait.as_secs()), (20, 1));
    assert_eq!(ClusterConfig::parse(r#"{"synchronous_mode":"quorumm"}"#), None);
}

fn mark() -> Unfenced {
    Unfenced { member: "a".to_owned(), sysid: ID.to_owned(), timeline: Timeline(1), conn_url: None }
}

#[test]
fn a_mark_is_gone_only_if_its_owner_can_have_taken_it_back() {
    let paused = ClusterConfig::parse(r#"{"pause":true}"#);
    let with = |config: &Option<ClusterConfig>, leader: Option<&str>, marked: bool| ClusterState {
        config: config.clone(),
        leader: leader.map(held_by),
        unfenced: marked.then(mark),
        ..good(3)
    };
    let plain = ClusterConfig::parse("{}");
    for (config, leader, stays) in [
        (&paused, Some("a"), true),
        (&plain, Some("a"), false),
        (&plain, Some("b"), false),
        (&plain, None, true),
        (&paused, None, true),
    ] {
        let mut known = Known::default();
        filled(&mut known, with(&paused, Some("a"), true));
        let now = filled(&mut known, with(config, leader, false));
        assert_eq!(now.unfenced.is_some(), stays, "{leader:?}");
    }
    let mut known = Known::default();
    filled(&mut known, with(&paused, Some("a"), true));
    let mut now = with(&plain, None, false);
    now.doubts.insert(SafetyKey::Unfenced, Doubt::Unreadable);
    assert_eq!(filled(&mut known, now.clone()).unfenced, Some(mark()));
    assert!(filled(&mut Known::default(), now).is_unknown(SafetyKey::Unfenced));
}

#[test]
fn a_handover_record_that_makes_no_sense_is_no_end_of_a_handover() {
    let text = r#"{"v":1,"id":"x","attempt":1,"phase":"switch","leader":"a","candidate":"b","epoch":{"store":1,"revision":4},"max_hold_ms":1,"switch_hold_ms":1}"#;
    let record: Handover = serde_json::from_str(text).unwrap();
    let mut known = Known::default();
    filled(&mut known, ClusterState { handover: Some(record.clone()), ..good(3) });
    let mut odd = good(4);
    odd.doubts.insert(SafetyKey::Handover, Doubt::Unreadable);
    assert_eq!(filled(&mut known, odd.clone()).handover, Some(record));
    assert_eq!(filled(&mut known, good(5)).handover, None, "its lease has ended");
    assert_eq!(filled(&mut known, odd.clone()).handover, None);
    assert!(filled(&mut Known::default(), odd).is_unknown(SafetyKey::Handover));
}

#[test]
fn what_a_restored_store_says_of_synchronous_standbys_is_of_the_past() {
    let named = |revision, sync_revision, leader: &str, standby: &str| ClusterState {
        sync: Some(SyncState::new(leader, &[standby.to_owned()])),
        sync_revision: Revision(sync_revision),
        ..good(revision)
    };
    let mut known = Known::default();
    filled(&mut known, named(10, 6, "a", "b"));
    filled(&mut known, named(900, 880, "b", "c"));
    let past = filled(&mut known, named(12, 6, "a", "b"));
    assert_eq!(
        (past.rewound, past.sync.clone()),
        (1, Some(SyncState::new("b", &["c".to_owned()])))
    );
    assert!(past.is_kept(SafetyKey::Sync));
    let now = filled(&mut known, named(14, 13, "c", "b"));
    assert_eq!(now.sync, Some(SyncState::new("c", &["b".to_owned()])), "a leader has written it");
    assert!(!now.is_kept(SafetyKey::Sync) && now.sync_before.is_none());

    // Whoever has not seen that value before cannot tell: both count.
    let mut late = Known::default();
    filled(&mut late, named(900, 880, "b", "c"));
    let past = filled(&mut late, named(12, 6, "a", "b"));
    assert_eq!(past.sync, Some(SyncState::new("a", &["b".to_owned()])));
    assert_eq!(past.sync_before, Some(SyncState::new("b", &["c".to_owned()])));
}
