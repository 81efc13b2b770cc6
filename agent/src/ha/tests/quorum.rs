//! Quorum mode: the steps between two lists, who may take over, and both together against a model of
//! acknowledged commits.

use std::collections::BTreeSet;

use super::*;
use crate::ha::sync::{SyncStep, plan};

fn settings(mode: &str, count: u32) -> serde_json::Value {
    let mode: serde_json::Value = if mode == "on" { json!(true) } else { json!(mode) };
    json!({"synchronous_mode": mode, "synchronous_node_count": count})
}

/// The answer of `plan`: the store names `stored` with a quorum, commits wait for `waited`, and the standbys
/// `streaming` are connected (in capitals: with everything).
fn step(stored: (&[&str], u32), waited: &str, streaming: &[&str], count: u32) -> SyncStep {
    let cluster = with(led_by(Some("a")), |c| {
        c.config = Some(config(settings("quorum", count)));
        c.sync = Some(SyncState::with_quorum("a", &names(stored.0), stored.1));
        c.members.insert("d".into(), member("d", "replica"));
    });
    let row = |name: &&str| {
        let ready = name.chars().all(char::is_uppercase);
        StandbyRow {
            application_name: name.to_lowercase(),
            streaming: true,
            synchronous: ready,
            flush: if ready { Lsn(1000) } else { Lsn(900) },
            acknowledged: if ready { Lsn(1000) } else { Lsn(900) },
            ..StandbyRow::default()
        }
    };
    let facts = PrimaryFacts {
        standbys: streaming.iter().map(row).collect(),
        sync_names: waited.to_owned(),
        sync_names_since: Some(Lsn(950)),
        ..primary_facts()
    };
    plan("a", &cluster, &facts)
}

fn publish(voters: &[&str], quorum: u32) -> SyncStep {
    SyncStep::Publish(SyncState::with_quorum("a", &names(voters), quorum))
}

fn wait_for(text: &str) -> SyncStep {
    SyncStep::SetNames(text.to_owned())
}

const ONE_OF_TWO: &str = r#"ANY 1 ("b","c")"#;

#[test]
fn the_first_two_standbys_are_waited_for_before_they_may_vote() {
    assert_eq!(step((&[], 0), "", &["b", "c"], 1), wait_for(ONE_OF_TWO));
    assert_eq!(step((&[], 0), ONE_OF_TWO, &["b", "c"], 1), SyncStep::Settled);
    // One that has everything is in every group of two.
    assert_eq!(step((&[], 0), ONE_OF_TWO, &["B", "c"], 1), publish(&["b", "c"], 1));
    assert_eq!(step((&["b", "c"], 1), ONE_OF_TWO, &["B", "C"], 1), SyncStep::Settled);
}

#[test]
fn commits_wait_for_a_newcomer_as_well_until_the_store_knows_it() {
    let both = r#"ANY 2 ("b","c")"#;
    assert_eq!(step((&["b"], 0), r#"ANY 1 ("b")"#, &["B", "c"], 1), wait_for(both));
    assert_eq!(step((&["b"], 0), both, &["B", "c"], 1), publish(&["b", "c"], 1));
    assert_eq!(step((&["b", "c"], 1), both, &["B", "c"], 1), wait_for(ONE_OF_TWO));
}

#[test]
fn a_standby_that_was_lost_is_let_go_once_the_others_have_everything() {
    let stored: (&[&str], u32) = (&["b", "c"], 1);
    let one = r#"ANY 1 ("c")"#;
    assert_eq!(step(stored, ONE_OF_TWO, &["c"], 1), wait_for(one));
    assert_eq!(step(stored, one, &["c"], 1), SyncStep::Settled);
    assert_eq!(step(stored, one, &["C"], 1), publish(&["c"], 0));
    assert_eq!(step((&["c"], 0), one, &["C"], 1), SyncStep::Settled);
    // Then somebody else is taken in.
    assert_eq!(step(stored, ONE_OF_TWO, &["c", "d"], 1), wait_for(one));
}

#[test]
fn fewer_or_more_of_them_are_waited_for() {
    let two = r#"ANY 2 ("b","c")"#;
    let stored: (&[&str], u32) = (&["b", "c"], 1);
    assert_eq!(step(stored, ONE_OF_TWO, &["B", "C"], 2), wait_for(two));
    assert_eq!(step(stored, two, &["B", "C"], 2), publish(&["b", "c"], 0));
    assert_eq!(step((&["b", "c"], 0), two, &["B", "C"], 1), publish(&["b", "c"], 1));
}

#[test]
fn priority_mode_becomes_quorum_mode_by_the_same_rules() {
    let two = r#"2 ("b","c")"#;
    assert_eq!(step((&["b", "c"], 0), two, &["B", "C"], 1), publish(&["b", "c"], 1));
    assert_eq!(step((&["b", "c"], 1), two, &["B", "C"], 1), wait_for(ONE_OF_TWO));
    // The words change although they mean the same.
    assert_eq!(step((&["b"], 0), r#"1 ("b")"#, &["B"], 1), wait_for(r#"ANY 1 ("b")"#));
}

#[test]
fn a_synchronous_standby_that_lags_too_much_is_let_go() {
    let cluster = with(led_by(Some("a")), |c| {
        synchronous(c, "a", &["b"]);
        c.config = Some(config(json!({"synchronous_mode": true, "maximum_lag_on_syncnode": 100})));
    });
    let mut facts = PrimaryFacts { sync_names: r#"1 ("b")"#.into(), ..primary_facts() };
    assert_eq!(plan("a", &cluster, &facts), SyncStep::Settled);
    facts.standbys[0].acknowledged = Lsn(899);
    assert_eq!(plan("a", &cluster, &facts), publish(&[], 0), "whatever it has flushed");
}

// Who may take over.

fn orphan_of(voters: &[&str], quorum: u32, peers: &[(&str, Option<Peer>)]) -> Snapshot {
    let cluster = with(led_by(None), |c| {
        c.config = Some(config(settings("quorum", 1)));
        c.sync = Some(SyncState::with_quorum("b", &names(voters), quorum));
        c.sync_revision = Revision(60);
    });
    Snapshot { cluster, race: Some(answers(peers)), ..orphan() }
}

#[test]
fn a_candidate_needs_the_votes_of_a_quorum() {
    let missing = Why::QuorumMissing { votes: 0, needed: 1 };
    let s = orphan_of(&["a", "c"], 1, &[("b", None), ("c", Some(peer(1000)))]);
    check(&s, CLAIM, Why::MostAdvanced);
    let s = orphan_of(&["a", "c"], 1, &[("b", None), ("c", None)]);
    check(&s, Action::Wait, missing);
    // Somebody who is no voter has none.
    let s = orphan_of(&["a", "x"], 1, &[("b", None), ("c", Some(peer(900)))]);
    check(&s, Action::Wait, missing);
    let s = orphan_of(&["a", "c"], 1, &[("b", None), ("c", Some(peer(1100)))]);
    check(&s, Action::Wait, Why::PeerAhead { position: Lsn(1100) });
}

/// A vote is proof that a voter has no more; what proves nothing is no vote.
#[test]
fn only_a_voter_that_says_where_it_stands_now_is_a_vote() {
    let missing = Why::QuorumMissing { votes: 0, needed: 1 };
    let vote = |peer: Peer| {
        let s = orphan_of(&["a", "c"], 1, &[("b", None), ("c", Some(peer))]);
        let decision = decide(&s);
        assert!(decision.action == CLAIM || decision.why == missing, "{decision:?}");
        decision.action == CLAIM
    };
    assert!(vote(peer(1000)));
    assert!(!vote(Peer { position: None, ..peer(0) }), "its server is down, starting or silent");
    assert!(!vote(Peer { identified: false, ..peer(900) }), "who answered is not known");
    assert!(vote(Peer { timeline: Timeline(2), ..peer(900) }));
    // It may have followed to a later timeline and not know it, or have gone another way.
    assert!(!vote(Peer { timeline: Timeline(2), ..peer(1100) }));
    assert!(vote(Peer { timeline: Timeline(0), ..peer(900) }), "the position alone");
}

#[test]
fn an_operator_may_name_a_candidate_without_the_votes_but_a_switchover_may_not() {
    let s = orphan_of(&["a", "c"], 1, &[("b", None), ("c", None)]);
    let named = |leader: Option<&str>| {
        with((*s.cluster).clone(), |c| {
            c.failover.member = Some("a".into());
            c.failover.leader = leader.map(str::to_owned);
        })
    };
    let forced = Snapshot { cluster: named(None), ..s.clone() };
    check(&forced, CLAIM, Why::NamedCandidate);
    let switched = Snapshot { cluster: named(Some("b")), ..s.clone() };
    check(&switched, Action::Wait, Why::QuorumMissing { votes: 0, needed: 1 });
}

#[test]
fn a_crashed_leader_leaves_only_to_so_many_that_one_has_everything() {
    let cluster = |voters: &[&str]| {
        with(led_by(Some("a")), |c| {
            c.config = Some(config(settings("quorum", 1)));
            c.sync = Some(SyncState::with_quorum("a", &names(voters), 1));
            c.members.get_mut("c").unwrap().state = kornak_cluster::MemberState::Stopped;
            c.members.insert("d".into(), member("d", "replica"));
        })
    };
    let s = Snapshot { cluster: cluster(&["b", "c"]), ..crashed_leader() };
    check(&s, Action::StartPrimary, Why::KeyIsOursServerIsDown);
    let s = Snapshot { cluster: cluster(&["b", "d"]), ..crashed_leader() };
    check(&s, Action::Release, Why::StandbyHasEverything);
}

// The two lists against a model of acknowledged commits.

/// A primary with four standbys, its names in force, and the store.
struct Model {
    seed: u64,
    lsn: u64,
    /// By standby: what it has flushed, and whether it streams.
    standbys: Vec<(u64, bool)>,
    names: String,
    /// The names that some process of the server still goes by, if not all go by `names`.
    older: Vec<String>,
    names_since: u64,
    sync: SyncState,
    mode: &'static str,
    count: u32,
    acknowledged: u64,
}

const STANDBYS: [&str; 4] = ["b", "c", "d", "e"];

impl Model {
    fn new(seed: u64) -> Self {
        Self {
            seed: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            lsn: 1000,
            standbys: vec![(1000, true); 4],
            names: String::new(),
            older: Vec::new(),
            names_since: 1000,
            sync: SyncState::new("a", &[]),
            mode: "quorum",
            count: 1,
            acknowledged: 1000,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.seed >> 33) % bound
    }

    /// Every process of the server goes by the names now, and that was seen.
    fn all_have_read(&mut self) {
        self.older.clear();
        self.names_since = self.lsn;
    }

    /// Something happens outside of the two lists.
    fn happen(&mut self) {
        let who = usize::try_from(self.below(4)).unwrap();
        match self.below(10) {
            0..=2 => self.lsn += 1 + self.below(50),
            3 | 4 if self.standbys[who].1 => {
                let room = self.lsn - self.standbys[who].0;
                self.standbys[who].0 += self.below(room + 1);
            }
            5 => self.standbys[who].1 = !self.standbys[who].1,
            8 | 9 => self.all_have_read(),
            6 => self.count = 1 + u32::try_from(self.below(3)).unwrap(),
            7 if self.below(6) == 0 => {
                self.mode = if self.mode == "on" { "quorum" } else { "on" };
            }
            _ => {}
        }
        self.acknowledge();
    }

    /// Commits are acknowledged as far as the names in force allow.
    fn acknowledge(&mut self) {
        for names in self.older.clone().iter().chain([&self.names.clone()]) {
            self.acknowledge_by(names);
        }
    }

    fn acknowledge_by(&mut self, names: &str) {
        let listed: Vec<u64> = (0..4)
            .filter(|index| names.contains(&format!("\"{}\"", STANDBYS[*index])))
            .map(|index| self.standbys[index].0)
            .collect();
        let words = names.trim_start_matches("ANY ");
        let waits = words.split(' ').next().and_then(|word| word.parse::<usize>().ok());
        let reached = match waits {
            None | Some(0) => self.lsn,
            Some(waits) => {
                let mut listed = listed;
                listed.sort_unstable_by(|a, b| b.cmp(a));
                listed.get(waits - 1).copied().unwrap_or(0)
            }
        };
        self.acknowledged = self.acknowledged.max(reached.min(self.lsn));
    }

    fn plan(&mut self) {
        let cluster = with(led_by(Some("a")), |c| {
            c.config = Some(config(settings(self.mode, self.count)));
            c.sync = Some(self.sync.clone());
            for name in STANDBYS {
                c.members.insert(name.to_owned(), member(name, "replica"));
            }
        });
        let rows = (0..4).filter(|index| self.standbys[*index].1).map(|index| StandbyRow {
            application_name: STANDBYS[index].to_owned(),
            streaming: true,
            synchronous: self.names.contains(STANDBYS[index]),
            flush: Lsn(self.standbys[index].0),
            acknowledged: Lsn(self.standbys[index].0),
            ..StandbyRow::default()
        });
        let facts = PrimaryFacts {
            lsn: Lsn(self.lsn),
            standbys: rows.collect(),
            sync_names: self.names.clone(),
            sync_names_since: self.older.is_empty().then_some(Lsn(self.names_since)),
            ..primary_facts()
        };
        match plan("a", &cluster, &facts) {
            SyncStep::Settled | SyncStep::Await => {}
            SyncStep::Publish(sync) => self.sync = sync,
            SyncStep::SetNames(names) => {
                let before = std::mem::replace(&mut self.names, names);
                self.older.push(before);
            }
        }
        self.acknowledge();
    }

    /// Checks that each member that could win by the store's word has every acknowledged commit.
    fn check(&self) {
        let voters = self.sync.standbys();
        let group = self.sync.quorum as usize + 1;
        let flushed = |name: &String| {
            STANDBYS.iter().position(|known| known == name).map_or(0, |at| self.standbys[at].0)
        };
        for chosen in 0..1_u32 << voters.len() {
            if chosen.count_ones() as usize != group {
                continue;
            }
            let members = voters.iter().enumerate().filter(|(bit, _)| chosen & (1 << bit) != 0);
            let best = members.map(|(_, name)| flushed(name)).max().unwrap_or(0);
            assert!(
                best >= self.acknowledged,
                "{voters:?} quorum {} names {:?}: {best} of {}",
                self.sync.quorum,
                self.names,
                self.acknowledged
            );
        }
    }
}

#[test]
fn no_group_that_may_take_over_lacks_an_acknowledged_commit() {
    let mut seen = BTreeSet::new();
    for seed in 0..50 {
        let mut model = Model::new(seed);
        for _ in 0..200 {
            model.happen();
            model.check();
            if model.below(3) > 0 {
                model.plan();
                model.check();
            }
            seen.insert((model.sync.standbys().len(), model.sync.quorum));
        }
    }
    // The walk comes by many states, or it shows nothing.
    assert!(seen.len() > 8, "{seen:?}");
}

#[test]
fn standbys_that_keep_up_end_as_voters_in_few_steps() {
    for (mode, count, voters, quorum) in
        [("quorum", 1, 4, 3), ("quorum", 2, 4, 2), ("on", 2, 2, 0), ("on", 1, 1, 0)]
    {
        let mut model = Model::new(1);
        (model.mode, model.count) = (mode, count);
        for _ in 0..8 {
            model.plan();
            model.all_have_read();
            for standby in &mut model.standbys {
                standby.0 = model.lsn;
            }
        }
        let sync = &model.sync;
        assert_eq!((sync.standbys().len(), sync.quorum), (voters, quorum), "{mode} {count}");
    }
}
