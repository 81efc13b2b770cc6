//! Whole clusters in one process: do the six sentences hold, and would anybody notice if they did not?
//!
//! `KORNAK_WORLDS=n` lives through n worlds of each kind, from seed `KORNAK_FROM` on; `KORNAK_SEED=n` (with `KORNAK_KIND`) through
//! one, telling its story if a promise is broken in it (with `KORNAK_STORY` in any case, and with the mutation that is asked for). `KORNAK_MUTATION=name` looks at one mutation only. Seeds begin at 0
//! unless asked otherwise (`KORNAK_FROM=fresh` draws one, and prints it), so that a change is judged by the worlds that its predecessor was judged by.

#![expect(clippy::print_stdout, reason = "a run says how many worlds it has seen")]

use std::time::Duration;

use kornak_tests::sim::{self, Kind, Lived, Mutation, Report};

/// Worlds of each kind when nobody asks for more, if so many fit into [`LIMIT`].
const WORLDS: u64 = 260;

/// For the worlds of a kind when nobody asks for a number of them.
const LIMIT: Duration = Duration::from_secs(12);

/// Defences whose absence shows in one of ten worlds or more of this kind.
const OFTEN: [(Mutation, Kind); 13] = [
    (Mutation::ConfigGoneIsDefault, Kind::Settings),
    (Mutation::NobodyElseCanLead, Kind::Disks),
    (Mutation::LostLeaseRenewed, Kind::Outage),
    (Mutation::GuardNeverFires, Kind::Synchronous),
    (Mutation::GuardArmedTooLate, Kind::Churn),
    (Mutation::KeepaliveIsProof, Kind::Asynchronous),
    (Mutation::PostmasterGoneMeansStopped, Kind::Handover),
    (Mutation::CandidateIgnoresSync, Kind::Synchronous),
    (Mutation::QuorumIgnored, Kind::Quorum),
    (Mutation::DownCounts, Kind::Untrue),
    (Mutation::PromiseForgottenWhileLeaderShows, Kind::Failsafe),
    (Mutation::ProxyWalksBack, Kind::Handover),
    (Mutation::ProxySendsAgain, Kind::Asynchronous),
];

/// Defences whose absence shows in one of a hundred worlds or so.
const SELDOM: [(Mutation, Kind); 7] = [
    (Mutation::NamesBeforeStore, Kind::Synchronous),
    (Mutation::PromotionGoesOn, Kind::Untrue),
    (Mutation::GoesBackBlindly, Kind::Handover),
    (Mutation::RestartedCounts, Kind::Untrue),
    (Mutation::AnswersFromMemory, Kind::Untrue),
    (Mutation::NameNotChecked, Kind::Untrue),
    (Mutation::PromiseNotDurable, Kind::Failsafe),
];

/// Defences whose absence shows in one of some dozen worlds of these kinds, which live for long.
const SITUATIONS: [(Mutation, Kind); 3] = [
    (Mutation::GuardIsEdgeTriggered, Kind::Situations),
    (Mutation::ClaimOnOldSync, Kind::Situations),
    (Mutation::PauseIgnored, Kind::Settings),
];

/// Defences whose absence takes a hundred worlds or more to show, or was not found in so many: looked at if `KORNAK_WORLDS` asks
/// for it.
const RARELY: [(Mutation, Kind); 8] = [
    (Mutation::RewindsToAnybody, Kind::Churn),
    (Mutation::NamesSeemRead, Kind::Situations),
    (Mutation::StartsBesideItsStandbys, Kind::Situations),
    (Mutation::ConfiguredLease, Kind::Settings),
    (Mutation::PlansFromOldView, Kind::Churn),
    (Mutation::ClaimOnAnotherView, Kind::Situations),
    (Mutation::ListGrowsOverTheMembersHeads, Kind::Unseen),
    (Mutation::PromotedBesideItsStandbys, Kind::Unseen),
];

/// Defences whose absence shows in situations that are made for them.
const UNSEEN: [(Mutation, Kind); 4] = [
    (Mutation::FailsafeListIgnored, Kind::Unseen),
    (Mutation::OpenSyncWriteIgnored, Kind::Unseen),
    (Mutation::StandsAloneByAnOldView, Kind::Unseen),
    (Mutation::ReleasedLeaseTakenUpAgain, Kind::Unseen),
];

/// Defences of deposals whose absence shows in some dozen worlds.
const DEPOSALS: [(Mutation, Kind); 6] = [
    (Mutation::PledgesTooFew, Kind::Fence),
    (Mutation::PledgeNotDurable, Kind::Fence),
    (Mutation::PledgeBeforeTheStreamEnds, Kind::Fence),
    (Mutation::WithdrawalNotSent, Kind::Fence),
    (Mutation::DeposedByOldSync, Kind::Fence),
    (Mutation::FencedAcceptsFailsafe, Kind::Fence),
];

/// Defences of deposals that no world has shown yet.
const DEPOSALS_UNSEEN: [(Mutation, Kind); 6] = [
    (Mutation::PledgeOfAnOldPosition, Kind::Fence),
    (Mutation::PledgeOverWithdrawal, Kind::Fence),
    (Mutation::WithdrawalUnknownIsDone, Kind::Fence),
    (Mutation::DeposedByOldPledges, Kind::Fence),
    (Mutation::DeposedInMaintenance, Kind::Fence),
    (Mutation::DeposedDuringHandover, Kind::Fence),
];

/// Worlds for each of them.
const LOOKED_AT: u64 = 1000;

fn first_seed() -> u64 {
    match std::env::var("KORNAK_FROM") {
        Ok(text) if text == "fresh" => u64::from(rand::random::<u32>()),
        _ => sim::from_environment("KORNAK_FROM").unwrap_or(0),
    }
}

fn promises_hold(kind: Kind) {
    if let Some(seed) = sim::from_environment("KORNAK_SEED") {
        let asked = std::env::var("KORNAK_KIND").unwrap_or_default();
        if asked.is_empty() || asked.eq_ignore_ascii_case(&format!("{kind:?}")) {
            if std::env::var_os("KORNAK_STORY").is_some() {
                let asked = std::env::var("KORNAK_MUTATION").unwrap_or_default();
                let is_asked = |it: &Mutation| asked.eq_ignore_ascii_case(&format!("{it:?}"));
                let mutation = Mutation::ALL.into_iter().find(is_asked);
                println!("{}", sim::live(seed, kind, mutation, true).trace);
            }
            sim::tell(seed, kind);
        }
        return;
    }
    let asked = sim::from_environment("KORNAK_WORLDS");
    let limit = asked.map_or(LIMIT, |_| Duration::MAX);
    let from = first_seed();
    let seeds = from..from.saturating_add(asked.unwrap_or(WORLDS));
    let lived = sim::explore(kind, seeds, limit);
    println!("{kind:?}, from seed {from}: {lived:?}");
    let Lived { worlds, promotions, acknowledged, deposals } = lived;
    assert!(kind != Kind::Fence || 2 * deposals > worlds, "only {deposals} leaders were deposed");
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

#[test]
fn worlds_whose_store_was_away_have_a_leader_soon_after() {
    promises_hold(Kind::Outage);
}

#[test]
fn worlds_that_are_restarted_while_the_store_is_away_keep_their_promises() {
    promises_hold(Kind::Away);
}

#[test]
fn worlds_whose_settings_change_keep_their_promises() {
    promises_hold(Kind::Settings);
}

#[test]
fn worlds_whose_disks_fail_keep_their_promises() {
    promises_hold(Kind::Disks);
}

#[test]
fn worlds_of_rare_situations_keep_their_promises() {
    promises_hold(Kind::Situations);
}

#[test]
fn worlds_in_which_somebody_has_not_seen_what_another_one_did_keep_their_promises() {
    promises_hold(Kind::Unseen);
}

/// Worlds in which something was found that the first ones of their kinds do not show.
const FOUND: [(Kind, u64); 4] =
    [(Kind::Churn, 15), (Kind::Situations, 73), (Kind::Settings, 93), (Kind::Settings, 7041)];

#[test]
fn worlds_in_which_something_was_found_keep_their_promises() {
    for (kind, seed) in FOUND {
        sim::explore(kind, seed..seed + 1, Duration::MAX);
    }
}

#[test]
fn worlds_whose_lost_leaders_are_deposed_keep_their_promises() {
    promises_hold(Kind::Fence);
}

/// A checker that cannot fail shows nothing.
fn noticed(mutations: &[(Mutation, Kind)]) {
    let worlds = sim::from_environment("KORNAK_WORLDS").unwrap_or(LOOKED_AT);
    let mut unnoticed = Vec::new();
    let asked = std::env::var("KORNAK_MUTATION").unwrap_or_default();
    for (mutation, kind) in mutations.iter().copied() {
        if !asked.is_empty() && !asked.eq_ignore_ascii_case(&format!("{mutation:?}")) {
            continue;
        }
        match sim::caught(mutation, kind, 0..worlds) {
            Some((seed, broken)) => println!("{mutation:?}, {kind:?}, seed {seed}: {broken}"),
            None => unnoticed.push(mutation),
        }
    }
    assert!(unnoticed.is_empty(), "nobody noticed {unnoticed:?}");
}

#[test]
fn what_is_broken_on_purpose_is_noticed() {
    noticed(&OFTEN);
}

#[test]
fn what_is_broken_on_purpose_and_seldom_shows_is_noticed() {
    noticed(&SELDOM[..4]);
}

#[test]
fn what_is_broken_on_purpose_and_seldom_shows_is_noticed_too() {
    noticed(&SELDOM[4..]);
}

#[test]
fn what_is_broken_on_purpose_and_shows_in_a_situation_is_noticed() {
    noticed(&SITUATIONS);
}

#[test]
fn what_is_broken_on_purpose_and_shows_where_somebody_has_not_seen_it_is_noticed() {
    noticed(&UNSEEN);
}

#[test]
fn what_is_broken_on_purpose_in_a_deposal_is_noticed() {
    noticed(&DEPOSALS);
}

#[test]
fn what_is_broken_on_purpose_and_rarely_shows_is_noticed_if_asked_for() {
    if sim::from_environment("KORNAK_WORLDS").is_some() {
        noticed(&RARELY);
        noticed(&DEPOSALS_UNSEEN);
    }
}

/// Without the log: whether a thread's subscriber hears a line depends on other threads' first.
fn comparable(mut report: Report) -> Report {
    let logged =
        |line: &&str| [" INFO ", " WARN ", "ERROR "].iter().any(|level| line.contains(level));
    report.trace = report.trace.lines().filter(|line| !logged(line)).collect();
    report
}

#[test]
fn a_seed_means_the_same_world_every_time() {
    for seed in 0..5 {
        let (once, again) = (
            sim::live(seed, Kind::Handover, None, true),
            sim::live(seed, Kind::Handover, None, true),
        );
        assert_eq!(sim::live(seed, Kind::Handover, None, false).tally, once.tally);
        assert_eq!(comparable(once), comparable(again));
    }
}
