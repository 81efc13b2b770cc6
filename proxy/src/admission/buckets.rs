//! So many in a second, for each address. Pure.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Instant;

/// Addresses remembered; those that have not asked for a second are forgotten first.
const MAX_ADDRESSES: usize = 4096;

/// The remaining allowance of each address.
#[derive(Debug, Default)]
pub struct Buckets(HashMap<IpAddr, (Instant, f64)>);

impl Buckets {
    /// Takes one of the `rate` that an address has in a second; `false` if there is none left.
    pub fn take(&mut self, address: IpAddr, rate: usize, now: Instant) -> bool {
        let rate = rate as f64;
        if self.0.len() >= MAX_ADDRESSES && !self.0.contains_key(&address) {
            self.0.retain(|_, (last, _)| now.saturating_duration_since(*last).as_secs() < 1);
            if self.0.len() >= MAX_ADDRESSES {
                return false;
            }
        }
        let (last, left) = self.0.entry(address).or_insert((now, rate));
        let gained = now.saturating_duration_since(*last).as_secs_f64() * rate;
        *left = (*left + gained).min(rate);
        *last = now;
        let may = *left >= 1.0;
        if may {
            *left -= 1.0;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_address_has_its_own_and_it_fills_again() {
        let zero = Instant::now();
        let at = |millis: u64| zero + Duration::from_millis(millis);
        let mut buckets = Buckets::default();
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut taken = |address, now| (0..100).filter(|_| buckets.take(address, 5, now)).count();
        assert_eq!(taken(a, at(0)), 5);
        assert_eq!(taken(a, at(0)), 0);
        assert_eq!(taken(b, at(0)), 5);
        assert_eq!(taken(a, at(401)), 2);
        assert_eq!(taken(a, at(9_000)), 5);
        let mut buckets = Buckets::default();
        let all = (0..10_000u32).filter(|n| buckets.take(IpAddr::from(n.to_be_bytes()), 5, at(0)));
        assert_eq!(all.count(), MAX_ADDRESSES);
        assert!(buckets.take(b, 5, at(2_000)), "room is made by those who ask no more");
    }
}
