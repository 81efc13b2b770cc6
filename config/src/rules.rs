//! Rules of admission: `pg_hba.conf` and `pg_ident.conf` of a proxy.
//!
//! The first rule that fits a login decides; if none fits it is refused. Which rule fits is decided
//! in the proxy; here is what a rule can say.

use std::collections::BTreeMap;
use std::net::IpAddr;

use regex::{Regex, RegexBuilder};

use crate::proxy::AuthMethod;

/// All rules of a proxy.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// In their order.
    pub rules: Vec<Rule>,
    /// By name.
    pub maps: BTreeMap<String, Vec<MapLine>>,
}

/// One rule. An empty list fits everything.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Names of listeners.
    pub listeners: Vec<String>,
    pub connection: Connection,
    pub users: Vec<Pattern>,
    pub databases: Vec<Database>,
    pub addresses: Vec<Network>,
    pub method: Method,
    pub clientcert: ClientCert,
}

/// Kinds of connections, in `pg_hba.conf`'s words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Connection {
    /// `host`: with and without TLS.
    #[default]
    Host,
    /// `hostssl`.
    HostSsl,
    /// `hostnossl`.
    HostNoSsl,
}

/// Treatment of a login that a rule fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Method {
    /// Asks nothing.
    Trust,
    /// Refuses.
    Reject,
    /// SCRAM-SHA-256; roles with an md5 hash cannot log in.
    Scram,
    /// SCRAM-SHA-256 or md5, whatever the role's stored password is for.
    Md5,
    /// The client's certificate, whose name must be the role's or lead to it by a map.
    Cert { map: Option<String>, name: CertificateName },
    /// The server decides, through the proxy.
    Relay,
}

impl Method {
    /// Whether the proxy looks up what the servers have stored of a password.
    pub fn needs_lookup(&self) -> bool {
        matches!(self, Self::Scram | Self::Md5)
    }
}

/// Which name of a certificate counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CertificateName {
    #[default]
    CommonName,
    /// As RFC 2253 writes it.
    DistinguishedName,
}

/// Whether a method that is not `cert` asks for a certificate as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientCert {
    #[default]
    NotNeeded,
    /// Of one of the authorities.
    VerifyCa,
    /// And with the role's name.
    VerifyFull,
}

/// A name, or a regular expression behind a slash.
#[derive(Debug, Clone)]
pub enum Pattern {
    All,
    Name(String),
    Regex(Regex),
}

impl Pattern {
    /// Reads `all`, `/regular expression` or a name.
    ///
    /// # Errors
    /// The mistake in the regular expression.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            text => Self::name(text),
        }
    }

    /// Reads `/regular expression` or a name; no name means more than itself.
    ///
    /// # Errors
    /// The mistake in the regular expression.
    pub fn name(text: &str) -> Result<Self, String> {
        match text.strip_prefix('/') {
            Some(regex) => expression(regex).map(Self::Regex),
            None => Ok(Self::Name(text.to_owned())),
        }
    }

    /// Whether it fits. A byte that is no letter of UTF-8 is a letter that no expression names.
    pub fn fits(&self, name: &[u8]) -> bool {
        match self {
            Self::All => true,
            Self::Name(own) => own.as_bytes() == name,
            Self::Regex(regex) => regex.is_match(&String::from_utf8_lossy(name)),
        }
    }
}

/// A regular expression that means what it means to PostgreSQL, or an error: a dot is any letter, and
/// escapes that the two read differently are refused.
fn expression(text: &str) -> Result<Regex, String> {
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        if letter == '\\'
            && let Some(escaped @ ('b' | 'B' | '<' | '>')) = letters.next()
        {
            return Err(format!("\\{escaped} means something else in PostgreSQL"));
        }
    }
    let mut builder = RegexBuilder::new(text);
    builder.dot_matches_new_line(true).build().map_err(|error| error.to_string())
}

/// Which databases a rule is for.
#[derive(Debug, Clone)]
pub enum Database {
    /// By name.
    Named(Pattern),
    /// The one that is called as the role.
    SameUser,
    /// Physical replication, which has none.
    Replication,
}

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    /// Leading bits that count.
    bits: u32,
}

impl Network {
    /// Reads `10.0.0.0/8`, `::1/128`, or an address alone. Bits behind the prefix must be zero, or
    /// the range is not what its author thinks.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address.parse().ok()?, Some(bits.parse().ok()?)),
            None => (text.parse().ok()?, None),
        };
        let width = match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        let bits = bits.unwrap_or(width);
        let network = Self { address, bits };
        (bits <= width && network.masked(address) == network.value(address)).then_some(network)
    }

    /// Whether an address lies in it. Addresses of the two kinds never meet.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4()
            && self.masked(address) == self.masked(self.address)
    }

    /// As the upper bits of 128.
    fn value(&self, address: IpAddr) -> u128 {
        match address {
            IpAddr::V4(ip) => u128::from(u32::from(ip)) << 96,
            IpAddr::V6(ip) => u128::from(ip),
        }
    }

    fn masked(&self, address: IpAddr) -> u128 {
        self.value(address) & u128::MAX.checked_shl(128 - self.bits).unwrap_or(0)
    }
}

/// A line of a map: whose certificate may log in as which role.
#[derive(Debug, Clone)]
pub struct MapLine {
    pub certificate: Pattern,
    /// A role, in which `\1` stands for what the first parentheses of the pattern matched.
    pub role: String,
}

impl MapLine {
    /// Whether a certificate of this name may log in as `role`.
    pub fn allows(&self, certificate: &str, role: &[u8]) -> bool {
        if !self.certificate.fits(certificate.as_bytes()) {
            return false;
        }
        let Pattern::Regex(regex) = &self.certificate else {
            return self.role.as_bytes() == role;
        };
        let found = regex.captures(certificate).and_then(|found| found.get(1));
        match found {
            Some(part) => self.role.replacen("\\1", part.as_str(), 1).as_bytes() == role,
            None => !self.role.contains("\\1") && self.role.as_bytes() == role,
        }
    }
}

impl Rule {
    /// For every login.
    pub fn everybody(method: Method) -> Self {
        Self {
            listeners: Vec::new(),
            connection: Connection::Host,
            users: Vec::new(),
            databases: Vec::new(),
            addresses: Vec::new(),
            method,
            clientcert: ClientCert::NotNeeded,
        }
    }
}

impl From<AuthMethod> for Method {
    fn from(method: AuthMethod) -> Self {
        match method {
            AuthMethod::Scram => Self::Scram,
            AuthMethod::Md5 => Self::Md5,
            AuthMethod::Relay => Self::Relay,
            AuthMethod::Trust => Self::Trust,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_hold_what_they_say() {
        let check = |network: &str, address: &str, expected: bool| {
            let found = Network::parse(network).unwrap().contains(address.parse().unwrap());
            assert_eq!(found, expected, "{address} in {network}");
        };
        check("10.0.0.0/8", "10.255.1.2", true);
        check("10.0.0.0/8", "11.0.0.0", false);
        check("0.0.0.0/0", "192.168.1.1", true);
        check("0.0.0.0/0", "::1", false);
        check("::/0", "::1", true);
        check("192.168.1.7", "192.168.1.7", true);
        check("192.168.1.7", "192.168.1.6", false);
        check("fe80::/10", "febf::1", true);
        for wrong in ["10.0.0.1/8", "10.0.0.0/33", "::/129", "db.example", "10.0.0.0/x"] {
            assert_eq!(Network::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_map_line_leads_from_a_certificate_to_a_role() {
        let check = |pattern: &str, role: &str, certificate: &str, asked: &str, expected: bool| {
            let certificate_pattern = Pattern::parse(pattern).unwrap();
            let line = MapLine { certificate: certificate_pattern, role: role.to_owned() };
            let found = line.allows(certificate, asked.as_bytes());
            assert_eq!(found, expected, "{pattern} {role}: {certificate} as {asked}");
        };
        check("Joe Smith", "joe", "Joe Smith", "joe", true);
        check("Joe Smith", "joe", "Joe Smith", "ann", false);
        check("Joe Smith", "joe", "Ann", "joe", false);
        check(r"/^(.*)@example\.com$", r"\1", "joe@example.com", "joe", true);
        check(r"/^(.*)@example\.com$", r"\1", "joe@example.org", "joe", false);
        check(r"/^(.*)@example\.com$", r"app_\1", "joe@example.com", "app_joe", true);
        check(r"/@example\.com$", "guest", "joe@example.com", "guest", true);
        check(r"/@example\.com$", r"\1", "joe@example.com", r"\1", false);
    }
}
