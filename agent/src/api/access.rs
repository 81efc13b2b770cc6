//! Access to requests that change something: by address, then by certificate, then by password.
//!
//! GET requests are open, as Patroni's are. The order of the checks is Patroni's too: an address
//! that is not on the list learns nothing about passwords.

use std::collections::BTreeSet;
use std::net::IpAddr;

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use subtle::ConstantTimeEq;

use super::{ApiSettings, Client};
use crate::peers::basic_authorization;

/// The rules.
#[derive(Debug)]
pub(super) struct Access {
    /// The expected value of `Authorization`; `None`: no password is asked.
    authorization: Option<Vec<u8>>,
    allowed: Vec<Allowed>,
    include_members: bool,
    require_certificate: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Allowed {
    /// An address and how many of its leading bits count.
    Network(IpAddr, u8),
    /// Looked up anew for each request, for its address may change.
    Host(String),
}

/// Why a request was not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Denied {
    Address,
    NoCertificate,
    NoPassword,
    WrongPassword,
}

impl Access {
    pub(super) fn new(settings: &ApiSettings) -> Self {
        let authorization = settings.authentication.as_ref().map(|auth| {
            // A password that is no header value can match nothing: then nobody is let in.
            basic_authorization(auth).map_or_else(Vec::new, |value| value.as_bytes().to_vec())
        });
        Self {
            authorization,
            allowed: settings.allowlist.iter().map(|entry| Allowed::parse(entry)).collect(),
            include_members: settings.allowlist_include_members,
            require_certificate: settings.require_certificate,
        }
    }

    /// `members`: their hosts, if they are on the list at all for this request.
    pub(super) async fn check(
        &self,
        client: Option<Client>,
        headers: &HeaderMap,
        members: Option<BTreeSet<String>>,
    ) -> Result<(), Denied> {
        let members = members.filter(|_| self.include_members);
        let listed = !self.allowed.is_empty() || members.is_some();
        let from = client.map(|client| client.address);
        if listed && !self.is_allowed(from, members.unwrap_or_default()).await {
            return Err(Denied::Address);
        }
        if self.require_certificate && !client.is_some_and(|client| client.certified) {
            return Err(Denied::NoCertificate);
        }
        let Some(expected) = &self.authorization else { return Ok(()) };
        let given = headers.get(AUTHORIZATION).ok_or(Denied::NoPassword)?;
        if bool::from(given.as_bytes().ct_eq(expected)) && !expected.is_empty() {
            Ok(())
        } else {
            Err(Denied::WrongPassword)
        }
    }

    async fn is_allowed(&self, from: Option<IpAddr>, members: BTreeSet<String>) -> bool {
        let Some(from) = from.map(|address| address.to_canonical()) else { return false };
        for entry in &self.allowed {
            let matches = match entry {
                Allowed::Network(network, bits) => contains(*network, *bits, from),
                Allowed::Host(host) => host_is(host, from).await,
            };
            if matches {
                return true;
            }
        }
        for host in members {
            if host_is(&host, from).await {
                return true;
            }
        }
        false
    }
}

impl Allowed {
    fn parse(entry: &str) -> Self {
        let (address, bits) = entry.split_once('/').unwrap_or((entry, ""));
        let Ok(address) = address.parse::<IpAddr>() else {
            return Self::Host(entry.to_owned());
        };
        let width = if address.is_ipv4() { 32 } else { 128 };
        match bits {
            "" => Self::Network(address, width),
            bits => match bits.parse() {
                Ok(bits) if bits <= width => Self::Network(address, bits),
                _ => Self::Host(entry.to_owned()),
            },
        }
    }
}

fn contains(network: IpAddr, bits: u8, address: IpAddr) -> bool {
    let differ = |a: u128, b: u128, unused: u32| a.checked_shr(unused) != b.checked_shr(unused);
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let (network, address) = (u32::from(network).into(), u32::from(address).into());
            !differ(network, address, 32 - u32::from(bits.min(32)))
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            !differ(network.into(), address.into(), 128 - u32::from(bits.min(128)))
        }
        _ => false,
    }
}

async fn host_is(host: &str, address: IpAddr) -> bool {
    if let Ok(literal) = host.parse::<IpAddr>() {
        return literal.to_canonical() == address;
    }
    match tokio::net::lookup_host((host, 0)).await {
        Ok(mut found) => found.any(|found| found.ip().to_canonical() == address),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_addresses_networks_or_names() {
        for (entry, inside, outside) in [
            ("10.0.0.1", "10.0.0.1", "10.0.0.2"),
            ("10.1.0.0/16", "10.1.200.3", "10.2.0.1"),
            ("10.1.2.3/16", "10.1.200.3", "10.2.0.1"),
            ("fd00::/8", "fd12::1", "fe00::1"),
            ("::1/128", "::1", "::2"),
        ] {
            let Allowed::Network(network, bits) = Allowed::parse(entry) else {
                panic!("{entry} is a network")
            };
            assert!(contains(network, bits, inside.parse().unwrap()), "{entry} {inside}");
            assert!(!contains(network, bits, outside.parse().unwrap()), "{entry} {outside}");
        }
        let everybody = Allowed::parse("0.0.0.0/0");
        assert_eq!(everybody, Allowed::Network("0.0.0.0".parse().unwrap(), 0));
        assert!(contains("0.0.0.0".parse().unwrap(), 0, "1.2.3.4".parse().unwrap()));
        assert!(contains("::".parse().unwrap(), 0, "fd00::1".parse().unwrap()));
        assert!(!contains("0.0.0.0".parse().unwrap(), 0, "::1".parse().unwrap()));
        assert_eq!(Allowed::parse("db.example"), Allowed::Host("db.example".to_owned()));
        assert_eq!(Allowed::parse("10.0.0.0/40"), Allowed::Host("10.0.0.0/40".to_owned()));
    }
}
