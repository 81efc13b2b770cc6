//! `host:port` as PostgreSQL and Patroni write it.

use std::fmt;

/// One host (a name or an address, IPv6 without brackets) and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    pub host: String,
    pub port: u16,
}

impl HostPort {
    /// From its parts; brackets around an IPv6 address are dropped.
    pub fn new(host: &str, port: u16) -> Self {
        Self { host: host.trim_start_matches('[').trim_end_matches(']').to_owned(), port }
    }

    /// Reads `host:port`, `[v6]:port`, or a host alone if there is a `default_port`.
    pub fn parse(text: &str, default_port: Option<u16>) -> Option<Self> {
        let text = text.trim();
        let (host, port) = if let Some(v6) = text.strip_prefix('[') {
            let (host, tail) = v6.split_once(']')?;
            match tail.strip_prefix(':') {
                Some(port) => (host, port.parse().ok()?),
                None if tail.is_empty() => (host, default_port?),
                None => return None,
            }
        } else if text.matches(':').count() > 1 {
            // An IPv6 address without brackets. As in Patroni the last part is the port, if what is
            // before it is an address.
            let (host, port) = text.rsplit_once(':')?;
            let is_v6 = |text: &str| text.parse::<std::net::Ipv6Addr>().is_ok();
            match default_port {
                Some(default) if !is_v6(host) && is_v6(text) => (text, default),
                _ => (host, port.parse().ok()?),
            }
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, port.parse().ok()?),
                None => (text, default_port?),
            }
        };
        let sane = !host.is_empty() && !host.contains([' ', '/', '\'', '"']) && port != 0;
        sane.then(|| Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Where a server listens: one or more hosts (`*` means all) and one port, as `listen_addresses`
/// and `port` of PostgreSQL (/docs/current/runtime-config-connection.html).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// Never empty.
    pub hosts: Vec<String>,
    pub port: u16,
}

impl Listen {
    /// Reads `host[,host…]:port`; `*:port` and `:port` mean every address.
    pub fn parse(text: &str, default_port: Option<u16>) -> Option<Self> {
        let text = text.trim();
        let last = text.rsplit(',').next().unwrap_or(text).trim();
        let before = text.strip_suffix(last)?.trim_end_matches([',', ' ']);
        let last = match last.strip_prefix(':') {
            Some(port) if !port.contains(':') => HostPort::new("*", port.parse().ok()?),
            _ => HostPort::parse(last, default_port)?,
        };
        let mut hosts: Vec<String> = before
            .split(',')
            .map(|host| host.trim().trim_matches(['[', ']']).to_owned())
            .filter(|host| !host.is_empty())
            .collect();
        hosts.push(last.host);
        // A number alone is a port whose host was forgotten.
        let forgotten = hosts.iter().any(|host| host.bytes().all(|byte| byte.is_ascii_digit()));
        (last.port != 0 && !forgotten).then_some(Self { hosts, port: last.port })
    }

    /// Value for `listen_addresses`.
    pub fn addresses(&self) -> String {
        self.hosts.join(",")
    }

    /// Whether nobody but this machine can connect.
    pub fn is_local(&self) -> bool {
        self.hosts.iter().all(|host| is_loopback(host))
    }

    /// A host through which this machine reaches the server: the first that is not a wildcard,
    /// else `localhost`.
    pub fn local_host(&self) -> &str {
        let wildcard = |host: &&String| !matches!(host.as_str(), "*" | "0.0.0.0" | "::");
        self.hosts.iter().find(wildcard).map_or("localhost", String::as_str)
    }
}

/// Whether a host is this machine, whichever it is.
pub(crate) fn is_loopback(host: &str) -> bool {
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.addresses(), self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_patroni_reads_them() {
        for (text, default, expected) in [
            ("127.0.0.1:5432", None, Some(("127.0.0.1", 5432))),
            ("db", Some(5432), Some(("db", 5432))),
            ("db", None, None),
            ("[::1]:5432", None, Some(("::1", 5432))),
            ("[fe80::1]", Some(1), Some(("fe80::1", 1))),
            ("::1", Some(7), Some(("::1", 7))),
            ("fe80::1:8008", None, Some(("fe80::1", 8008))),
            ("db:0", None, None),
            ("db:99999", None, None),
            ("db:x", None, None),
            (":5432", None, None),
            ("", Some(5432), None),
            ("a b:1", None, None),
        ] {
            let expected = expected.map(|(host, port)| HostPort::new(host, port));
            assert_eq!(HostPort::parse(text, default), expected, "{text:?}");
        }
        assert_eq!(HostPort::new("::1", 5).to_string(), "[::1]:5");
    }

    #[test]
    fn a_server_may_listen_on_several_hosts() {
        for (text, hosts, port) in [
            ("127.0.0.1:5432", vec!["127.0.0.1"], 5432),
            ("127.0.0.1,10.0.0.1:5433", vec!["127.0.0.1", "10.0.0.1"], 5433),
            ("127.0.0.1, ::1:5433", vec!["127.0.0.1", "::1"], 5433),
            ("*:5432", vec!["*"], 5432),
            (":5432", vec!["*"], 5432),
            ("0.0.0.0", vec!["0.0.0.0"], 8008),
        ] {
            let listen = Listen::parse(text, Some(8008)).expect(text);
            assert_eq!(
                (listen.hosts, listen.port),
                (hosts.iter().map(|h| (*h).to_owned()).collect(), port)
            );
        }
        assert_eq!(Listen::parse("127.0.0.1:x", None), None);
        assert_eq!(Listen::parse("5432", Some(5432)), None);
        assert_eq!(Listen::parse("127.0.0.1,5433", Some(5432)), None);
        assert_eq!(Listen::parse("*:5432", None).unwrap().local_host(), "localhost");
    }
}
