//! A seeded simulation of whole clusters: the shipped agent (driver, lease keeper, jobs, handover, housekeeping,
//! failsafe rounds, REST API and its client), the guard's shipped fence and the proxy's shipped gate and hold, on the
//! store's twin in memory, among modelled servers, networks, clocks and sessions. [`ports`] is where they meet.
//!
//! A world is a function of a seed. After every event the six sentences of the design are looked at
//! ([`checker`]); a broken one is a number, and the number shows the same world again, with its story:
//!
//! ```text
//! KORNAK_SEED=42 KORNAK_KIND=strict cargo nextest run -p kornak-tests --test sim --no-capture
//! KORNAK_WORLDS=100000 cargo nextest run -p kornak-tests --test sim
//! ```
//!
//! docs/safety.md says what the model leaves out.

pub mod agent;
pub mod checker;
pub mod client;
pub mod clock;
pub mod disk;
pub mod exec;
pub mod faults;
pub mod host;
pub mod net;
pub mod ports;
pub mod postgres;
pub mod proxy;
pub mod rng;
pub mod scenario;
pub mod store;
pub mod trace;
pub mod world;

use std::time::{Duration, Instant};

pub use checker::Broken;
pub use scenario::{Kind, Mutation};
pub use world::{Report, live};

/// A number from the environment.
pub fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.trim().parse().ok()
}

/// Counts of what happened, so that a test can see that the worlds were not empty.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lived {
    pub worlds: u64,
    pub promotions: u64,
    /// Leaders whose lease was not waited for.
    pub deposals: u64,
    pub acknowledged: u64,
}

/// Lives through the worlds of these seeds, as many as fit into `limit`, and panics with the story of the first one in
/// which a promise was broken.
pub fn explore(kind: Kind, seeds: impl Iterator<Item = u64>, limit: Duration) -> Lived {
    let (began, mut lived) = (Instant::now(), Lived::default());
    for seed in seeds {
        if began.elapsed() > limit {
            break;
        }
        let report = live(seed, kind, None, false);
        if report.broken.is_some() {
            tell(seed, kind);
        }
        lived.worlds += 1;
        lived.promotions += u64::from(report.promotions);
        lived.deposals += u64::from(report.deposals);
        lived.acknowledged += report.acknowledged as u64;
    }
    lived
}

/// Lives through one world again and tells its story if a promise is broken in it.
#[expect(clippy::panic, reason = "this is what a failed test says")]
pub fn tell(seed: u64, kind: Kind) {
    let report = live(seed, kind, None, true);
    if let Some(broken) = report.broken {
        let word = format!("{kind:?}").to_lowercase();
        panic!(
            "{}\n{broken}\nseed {seed}; again with\n  KORNAK_SEED={seed} KORNAK_KIND={word} cargo \
             nextest run -p kornak-tests --test sim --no-capture",
            report.trace
        );
    }
}

/// The first of these seeds that shows that a promise was broken on purpose.
pub fn caught(
    mutation: Mutation,
    kind: Kind,
    mut seeds: impl Iterator<Item = u64>,
) -> Option<(u64, Broken)> {
    seeds.find_map(|seed| Some((seed, live(seed, kind, Some(mutation), false).broken?)))
}
