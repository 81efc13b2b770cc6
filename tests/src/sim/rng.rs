//! Random choices that mean the same for ever: a seed found today must show the same world after any
//! upgrade, so this does not depend on a crate's algorithm.

use std::cell::Cell;
use std::time::Duration;

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
#[derive(Debug)]
pub struct Rng(Cell<u64>);

impl Rng {
    /// A generator whose choices depend on `seed` alone.
    pub fn new(seed: u64) -> Self {
        Self(Cell::new(seed ^ 0x6b6f_726e_616b_0001))
    }

    /// Any number.
    pub fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 if `end` is 0.
    pub fn below(&self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.next() % end as u64) as usize }
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&self, per_mille: u64) -> bool {
        self.next() % 1000 < per_mille
    }

    /// A time between two, in microseconds' steps.
    pub fn between(&self, low: Duration, high: Duration) -> Duration {
        let low = u64::try_from(low.as_micros()).unwrap_or(u64::MAX);
        let high = u64::try_from(high.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(low + self.next() % (high.saturating_sub(low) + 1))
    }

    /// A time between two numbers of milliseconds.
    pub fn millis(&self, low: u64, high: u64) -> Duration {
        self.between(Duration::from_millis(low), Duration::from_millis(high))
    }

    /// One of the list.
    pub fn pick<'a, T>(&self, list: &'a [T]) -> Option<&'a T> {
        list.get(self.below(list.len()))
    }
}
