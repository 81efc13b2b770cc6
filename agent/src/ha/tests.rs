//! The table of the decision: one sentence per test, each stating only what differs from a base.
//!
//! `a` is this node; `b` and `c` are the others. Marks such as A1.1 are the scenarios of
//! docs/safety.md that a sentence belongs to.

mod deposing;
mod following;
mod leading;
mod making;
mod odd;
mod planned;
mod quorum;
mod racing;
mod serving;
mod synchronous;
mod unfenced;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{
    ClusterConfig, ClusterState, Epoch, Handover, HandoverPhase, HistoryEntry, Leader, LeaseId,
    Lsn, Member, Moment, Revision, Status, SyncState, Tags, Timeline, Unfenced,
};
use serde_json::json;

use super::*;

const SYSID: &str = "7000000000000000001";

/// The epoch of `a`'s leadership, wherever it has one.
const EPOCH: Epoch = Epoch { store: 1, revision: Revision(50) };

#[track_caller]
fn check(s: &Snapshot, action: Action, why: Why) {
    let decision = decide(s);
    assert_eq!((decision.action, decision.why), (action, why));
    assert!(decision.recheck <= Duration::from_secs(1), "sleeps for {:?}", decision.recheck);
    assert!(decision.recheck >= Duration::from_millis(20), "does not sleep");
    assert!(!why.as_str().is_empty());
}

/// The moment at which all sentences are spoken.
fn now() -> Moment {
    Moment::at_millis(1_000_000)
}

fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

fn tags(value: serde_json::Value) -> Tags {
    serde_json::from_value(value).unwrap()
}

fn config(value: serde_json::Value) -> ClusterConfig {
    let serde_json::Value::Object(map) = value else { panic!("an object") };
    ClusterConfig::from_json(map)
}

fn member(name: &str, role: &str) -> Member {
    let value = json!({
        "conn_url": format!("postgres://{name}:5432/postgres"),
        "api_url": format!("http://{name}:8008/patroni"),
        "state": "running", "role": role, "version": "4.1.5", "kornak": 1,
    });
    serde_json::from_value(value).unwrap()
}

fn address(name: &str) -> Option<(String, u16)> {
    Some((name.to_owned(), 5432))
}

/// Three members, `leader` leads, asynchronous, everything at position 1000 on timeline 3.
fn led_by(leader: Option<&str>) -> ClusterState {
    let role = |name| if leader == Some(name) { "primary" } else { "replica" };
    ClusterState {
        store: 1,
        revision: Revision(100),
        sync_revision: Revision(60),
        initialize: Some(SYSID.to_owned()),
        config: Some(config(json!({"ttl": 30}))),
        leader: leader.map(|name| Leader {
            name: name.to_owned(),
            lease: LeaseId(7),
            epoch: EPOCH,
            mod_revision: Revision(50),
        }),
        members: ["a", "b", "c"]
            .into_iter()
            .map(|name| (name.to_owned(), member(name, role(name))))
            .collect(),
        status: Some(Status { optime: Lsn(1000), ..Status::default() }),
        history: vec![HistoryEntry {
            timeline: Timeline(2),
            lsn: Lsn(500),
            reason: "no recovery target specified".to_owned(),
            timestamp: None,
            new_leader: None,
        }],
        ..ClusterState::default()
    }
}

/// `led_by` with a change.
fn with(mut cluster: ClusterState, change: impl FnOnce(&mut ClusterState)) -> Arc<ClusterState> {
    change(&mut cluster);
    Arc::new(cluster)
}

/// Synchronous mode: the store names this leader and these standbys.
fn synchronous(cluster: &mut ClusterState, leader: &str, standbys: &[&str]) {
    cluster.config = Some(config(json!({"ttl": 30, "synchronous_mode": true})));
    cluster.sync = Some(SyncState::new(leader, &names(standbys)));
    cluster.sync_revision = Revision(60);
}

fn control(was_primary: bool) -> DataDir {
    DataDir::Initialized(Control {
        system_identifier: SYSID.to_owned(),
        timeline: Timeline(3),
        clean: false,
        was_primary,
        standby_signal: !was_primary,
    })
}

fn standby_facts() -> StandbyFacts {
    StandbyFacts {
        timeline: Timeline(3),
        received: Lsn(1000),
        replayed: Lsn(990),
        wal_known: true,
        streaming: true,
        upstream: address("b"),
        not_streaming_since: None,
    }
}

fn primary_facts() -> PrimaryFacts {
    let row = |name: &str| StandbyRow {
        application_name: name.to_owned(),
        streaming: true,
        synchronous: false,
        flush: Lsn(1000),
        acknowledged: Lsn(1000),
        ..StandbyRow::default()
    };
    PrimaryFacts {
        timeline: Timeline(3),
        lsn: Lsn(1000),
        standbys: vec![row("b"), row("c")],
        sync_names_since: Some(Lsn(0)),
        ..PrimaryFacts::default()
    }
}

/// A standby of `b`, all well.
pub(super) fn standby() -> Snapshot {
    Snapshot {
        now: now(),
        observed_at: now(),
        me: "a".to_owned(),
        tags: Tags::default(),
        store: Store::Live,
        cluster: Arc::new(led_by(Some("b"))),
        data: control(false),
        server: Server::Standby(standby_facts()),
        lease: Lease::None,
        job: None,
        race: None,
        promise_until: None,
        confirmed: false,
        leaderless_since: None,
        race_not_before: None,
        lacks_watchdog: false,
        clones_alone: false,
        lacks_slots: false,
        failed_starts: 0,
        store_is_full: false,
        deposing: depose::Deposing::default(),
        stop_budget: seconds(1),
    }
}

/// A standby whose leader is gone; the others have answered that they have the same.
fn orphan() -> Snapshot {
    Snapshot {
        cluster: Arc::new(led_by(None)),
        race: Some(answers(&[("b", None), ("c", Some(peer(1000)))])),
        ..standby()
    }
}

/// A standby that has just won the leader key.
fn winner() -> Snapshot {
    Snapshot { cluster: Arc::new(led_by(Some("a"))), lease: mine(25), ..standby() }
}

/// A leader, all well.
fn primary() -> Snapshot {
    Snapshot {
        cluster: Arc::new(led_by(Some("a"))),
        data: control(true),
        server: Server::Primary(primary_facts()),
        lease: mine(25),
        ..standby()
    }
}

/// A leader whose server has crashed.
fn crashed_leader() -> Snapshot {
    Snapshot { server: Server::Stopped, ..primary() }
}

fn mine(seconds_left: u64) -> Lease {
    Lease::Mine { epoch: EPOCH, until: now() + seconds(seconds_left) }
}

fn peer(position: u64) -> Peer {
    Peer {
        position: Some(Lsn(position)),
        timeline: Timeline(3),
        identified: true,
        ..Peer::default()
    }
}

pub(super) fn answers(peers: &[(&str, Option<Peer>)]) -> Race {
    let peers: BTreeMap<String, Option<Peer>> =
        peers.iter().map(|(name, peer)| ((*name).to_owned(), peer.clone())).collect();
    Race { asked_at: now(), sync_revision: Revision(60), peers, stray: Stray::Unheard }
}

/// `b` hands over to `candidate`, having released the key at position 1000 unless changed.
pub(super) fn handover(candidate: &str, phase: HandoverPhase) -> Handover {
    let released = matches!(phase, HandoverPhase::Switch | HandoverPhase::Promote);
    Handover {
        v: 1,
        id: "h".to_owned(),
        attempt: 1,
        phase,
        group: None,
        leader: "b".to_owned(),
        candidate: Some(candidate.to_owned()),
        epoch: EPOCH,
        max_hold_ms: 1000,
        switch_hold_ms: 5000,
        wal_end: released.then_some(Lsn(1000)),
    }
}

/// The mark of a primary that maintenance mode has left without a guard.
fn unfenced(member: &str) -> Option<Unfenced> {
    let (member, sysid) = (member.to_owned(), SYSID.to_owned());
    Some(Unfenced { member, sysid, timeline: Timeline(3), conn_url: None })
}

fn rejoin(leader: Option<&str>) -> Action {
    Action::Rejoin { leader: leader.map(str::to_owned) }
}

const CLAIM: Action = Action::Claim { take_over: false };
const TAKE_OVER: Action = Action::Claim { take_over: true };
const STOP_NOW: Action = Action::Demote { immediate: true };
