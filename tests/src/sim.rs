//! A seeded simulation of whole clusters: the real decision, the real order of synchronous standbys,
//! the real judgements of a handover and the real lease arithmetic, on the store's real twin in memory,
//! among modelled servers, guards, proxies, networks and clocks.
//!
//! A world is a function of a seed. After every event the six sentences of the design are looked at
//! ([`checker`]); a broken one is a number, and the number shows the same world again, with its story:
//!
//! ```text
//! KORNAK_SEED=42 KORNAK_KIND=strict cargo nextest run -p kornak-tests --test sim --no-capture
//! KORNAK_WORLDS=100000 cargo nextest run -p kornak-tests --test sim
//! ```
//!
//! What the model leaves out is said in docs/safety.md.

pub mod agent;
pub mod checker;
pub mod client;
pub mod clock;
pub mod disk;
pub mod exec;
pub mod faults;
pub mod guard;
pub mod host;
pub mod net;
pub mod postgres;
pub mod proxy;
pub mod rng;
pub mod scenario;
pub mod store;
pub mod trace;
pub mod world;

pub use checker::Broken;
pub use scenario::{Kind, Mutation};
pub use world::{Report, live};

/// A number from the environment.
pub fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.trim().parse().ok()
}

/// Lives through the worlds of these seeds, and panics with the story of the first one in which a
/// promise was broken. Answers how often something was promoted, and how many commits were
/// acknowledged, so that a test can see that the worlds were not empty.
pub fn explore(kind: Kind, seeds: impl Iterator<Item = u64>) -> (u64, u64) {
    let (mut promotions, mut acknowledged) = (0, 0);
    for seed in seeds {
        let report = live(seed, kind, None, false);
        if report.broken.is_some() {
            tell(seed, kind);
        }
        promotions += u64::from(report.promotions);
        acknowledged += report.acknowledged as u64;
    }
    (promotions, acknowledged)
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
