//! Whole clusters in one process: do the six sentences hold, and would anybody notice if they did not?
//!
//! `KORNAK_WORLDS=n` lives through n worlds of each kind; `KORNAK_SEED=n` (with `KORNAK_KIND`) through
//! one, telling its story if a promise is broken in it. `KORNAK_MUTATION=name` looks at one mutation only.

use kornak_tests::sim::{self, Kind, Mutation};

/// Worlds of each kind when nobody asks for more.
const WORLDS: u64 = 260;

/// Each defence, where its absence shows, and from which seed on to look. A rare one begins shortly
/// before a seed that shows it; if a change of the model moves that, `KORNAK_WORLDS=5000` looks at so
/// many worlds for each and prints what it finds.
const MUTATIONS: [(Mutation, Kind, u64); 28] = [
    (Mutation::GuardNeverFires, Kind::Synchronous, 0),
    (Mutation::GuardIsEdgeTriggered, Kind::Handover, 160),
    (Mutation::GuardArmedTooLate, Kind::Churn, 85),
    (Mutation::KeepaliveIsProof, Kind::Asynchronous, 0),
    (Mutation::PostmasterGoneMeansStopped, Kind::Handover, 0),
    (Mutation::CandidateIgnoresSync, Kind::Synchronous, 0),
    (Mutation::ClaimOnAnotherView, Kind::Churn, 2110),
    (Mutation::QuorumIgnored, Kind::Quorum, 0),
    (Mutation::AnswersFromMemory, Kind::Untrue, 80),
    (Mutation::DownCounts, Kind::Untrue, 0),
    (Mutation::NameNotChecked, Kind::Untrue, 0),
    (Mutation::RestartedCounts, Kind::Untrue, 0),
    (Mutation::ClaimOnOldSync, Kind::Churn, 190),
    (Mutation::NamesBeforeStore, Kind::Synchronous, 80),
    (Mutation::OpenSyncWriteIgnored, Kind::Churn, 1125),
    (Mutation::PlansFromOldView, Kind::Churn, 110),
    (Mutation::StartsBesideItsStandbys, Kind::Churn, 330),
    (Mutation::StandsAloneByAnOldView, Kind::Handover, 1695),
    (Mutation::PromotedBesideItsStandbys, Kind::Churn, 330),
    (Mutation::PromiseNotDurable, Kind::Failsafe, 0),
    (Mutation::PromiseForgottenWhileLeaderShows, Kind::Failsafe, 0),
    (Mutation::FailsafeListIgnored, Kind::Failsafe, 125),
    (Mutation::ListGrowsOverTheMembersHeads, Kind::Failsafe, 11100),
    (Mutation::ReleasedLeaseTakenUpAgain, Kind::Churn, 5880),
    (Mutation::ReleaseWaitsItsTurn, Kind::Churn, 460),
    (Mutation::GoesBackBlindly, Kind::Handover, 0),
    (Mutation::ProxyWalksBack, Kind::Handover, 0),
    (Mutation::ProxySendsAgain, Kind::Asynchronous, 0),
];

/// Worlds for each of them.
const LOOKED_AT: u64 = 40;

fn promises_hold(kind: Kind) {
    if let Some(seed) = sim::from_environment("KORNAK_SEED") {
        let asked = std::env::var("KORNAK_KIND").unwrap_or_default();
        if asked.is_empty() || asked.eq_ignore_ascii_case(&format!("{kind:?}")) {
            sim::tell(seed, kind);
        }
        return;
    }
    let worlds = sim::from_environment("KORNAK_WORLDS").unwrap_or(WORLDS);
    let (promotions, acknowledged) = sim::explore(kind, 0..worlds);
    assert!(promotions > worlds, "only {promotions} promotions: the worlds were too quiet");
    assert!(acknowledged > 10 * worlds, "only {acknowledged} commits");
}

#[test]
fn asynchronous_worlds_keep_their_promises() {
    promises_hold(Kind::Asynchronous);
}

#[test]
fn synchronous_worlds_keep_their_promises() {
    promises_hold(Kind::Synchronous);
}

#[test]
fn strict_worlds_keep_their_promises() {
    promises_hold(Kind::Strict);
}

#[test]
fn worlds_without_a_store_keep_their_promises() {
    promises_hold(Kind::Failsafe);
}

#[test]
fn worlds_full_of_switchovers_keep_their_promises() {
    promises_hold(Kind::Handover);
}

#[test]
fn worlds_whose_standbys_come_and_go_keep_their_promises() {
    promises_hold(Kind::Churn);
}

#[test]
fn worlds_in_quorum_mode_keep_their_promises() {
    promises_hold(Kind::Quorum);
}

#[test]
fn worlds_whose_answers_are_not_true_keep_their_promises() {
    promises_hold(Kind::Untrue);
}

/// A checker that cannot fail shows nothing.
#[test]
fn what_is_broken_on_purpose_is_noticed() {
    let worlds = sim::from_environment("KORNAK_WORLDS");
    let mut unnoticed = Vec::new();
    let asked = std::env::var("KORNAK_MUTATION").unwrap_or_default();
    for (mutation, kind, from) in MUTATIONS {
        if !asked.is_empty() && !asked.eq_ignore_ascii_case(&format!("{mutation:?}")) {
            continue;
        }
        let seeds = worlds.map_or(from..from + LOOKED_AT, |worlds| 0..worlds);
        match sim::caught(mutation, kind, seeds) {
            Some((seed, broken)) => println!("{mutation:?}, {kind:?}, seed {seed}: {broken}"),
            None => unnoticed.push(mutation),
        }
    }
    assert!(unnoticed.is_empty(), "nobody noticed {unnoticed:?}");
}

#[test]
fn a_seed_means_the_same_world_every_time() {
    for seed in 0..5 {
        let (once, again) = (
            sim::live(seed, Kind::Handover, None, true),
            sim::live(seed, Kind::Handover, None, true),
        );
        assert_eq!(once, again);
        assert_eq!(sim::live(seed, Kind::Handover, None, false).tally, once.tally);
    }
}
