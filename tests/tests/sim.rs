//! Whole clusters in one process: do the six sentences hold, and would anybody notice if they did not?
//!
//! `KORNAK_WORLDS=n` lives through n worlds of each kind; `KORNAK_SEED=n` (with `KORNAK_KIND`) through
//! one, telling its story if a promise is broken in it.

use kornak_tests::sim::{self, Kind};

/// Worlds of each kind when nobody asks for more.
const WORLDS: u64 = 400;

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
