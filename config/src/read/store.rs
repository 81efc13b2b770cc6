//! The store's section.

use crate::address::HostPort;
use crate::section::Section;
use crate::store::{Etcd3Settings, Scheme, StoreSettings};

/// Stores that Patroni knows and Kornak does not yet.
const OTHERS: &[&str] = &["consul", "zookeeper", "exhibitor", "kubernetes", "raft"];

/// Keys of every store, for the check of the top level.
pub(crate) const SECTIONS: &[&str] =
    &["etcd3", "etcd", "consul", "zookeeper", "exhibitor", "kubernetes", "raft"];

const DEFAULT_PORT: u16 = 2379;

/// The store that the file names; an error is recorded if it names none.
pub(crate) fn store(root: &Section<'_>) -> Option<StoreSettings> {
    match optional(root) {
        StoreSection::Valid(settings) => return Some(StoreSettings::Etcd3(settings)),
        StoreSection::Invalid => return None,
        StoreSection::Absent => {}
    }
    match OTHERS.iter().find(|name| root.has(name)) {
        Some(name) => root.problem(name, "this store is not supported, expected etcd3"),
        None => root.expected("etcd3", "the store's section, such as etcd3: {hosts: [a:2379]}"),
    }
    None
}

/// The section of etcd in a file that may lack one.
pub(crate) enum StoreSection {
    Absent,
    /// The errors are recorded.
    Invalid,
    Valid(Etcd3Settings),
}

impl StoreSection {
    pub(crate) fn valid(self) -> Option<Etcd3Settings> {
        match self {
            Self::Absent | Self::Invalid => None,
            Self::Valid(settings) => Some(settings),
        }
    }
}

/// Reads the section of etcd, if there is one.
pub(crate) fn optional(root: &Section<'_>) -> StoreSection {
    let Some(key) = ["etcd3", "etcd"].into_iter().find(|key| root.has(key)) else {
        return StoreSection::Absent;
    };
    for other in SECTIONS.iter().filter(|other| **other != key && root.has(other)) {
        root.warn(other, &format!("has no effect, {key} is used"));
    }
    if key == "etcd" {
        let why = "is read as etcd3; a Patroni with this section uses the API v2 of etcd, and its \
                   cluster cannot be seen from here";
        root.warn(key, why);
    }
    etcd3(&root.section(key)).map_or(StoreSection::Invalid, StoreSection::Valid)
}

fn etcd3(section: &Section<'_>) -> Option<Etcd3Settings> {
    section.tolerate(
        &[
            "host", "hosts", "url", "proxy", "protocol", "username", "password", "cacert", "cert",
            "key", "srv",
        ],
        &[
            ("srv_suffix", "discovery by DNS is not supported"),
            ("use_proxies", "hosts are asked as they are listed"),
        ],
    );
    if section.has("srv") && ["hosts", "host", "url"].iter().any(|key| section.has(key)) {
        section.warn("srv", "has no effect, the hosts are named");
    }
    let schemes = [("http", Scheme::Http), ("https", Scheme::Https)];
    let mut protocol = section.word("protocol", &schemes).unwrap_or_default();
    let host = |text: &str| HostPort::parse(text, Some(DEFAULT_PORT));
    // Patroni's `proxy` is an address of etcd's own gRPC proxy, and goes before the others.
    let address = ["proxy", "url"].into_iter().find(|key| section.has(key));
    let hosts = if let (None | Some("url"), Some(texts)) = (address, section.texts("hosts", ',')) {
        let mut hosts = Vec::with_capacity(texts.len());
        for text in texts {
            let (scheme, bare) = strip_scheme(&text);
            protocol = scheme.unwrap_or(protocol);
            match host(bare) {
                Some(found) => hosts.push(found),
                None => section.problem("hosts", format!("expected host:port, found {text:?}")),
            }
        }
        if hosts.is_empty() {
            section.expected("hosts", "a list of host:port");
        }
        hosts
    } else if section.has("host") && address != Some("proxy") {
        section.parsed("host", "host:port", host).into_iter().collect()
    } else if let Some(key) = address {
        let url = section.parsed(key, "http(s)://host:port", |text| {
            let (scheme, bare) = strip_scheme(text);
            Some((scheme?, host(bare)?))
        });
        protocol = url.as_ref().map_or(protocol, |(scheme, _)| *scheme);
        url.map(|(_, host)| host).into_iter().collect()
    } else {
        if section.has("srv") {
            section.problem("srv", "discovery by DNS is not supported, expected hosts");
        } else if !section.has("hosts") {
            section.expected("hosts", "a list of host:port");
        }
        Vec::new()
    };
    if section.has("cert") != section.has("key") {
        section.problem("cert", "expected both cert and key, found one of them");
    }
    if !section.has("username") && section.has("password") {
        section.expected("username", "the user that the password belongs to");
    }
    (!hosts.is_empty()).then(|| Etcd3Settings {
        hosts,
        protocol,
        username: section.text("username"),
        password: section.secret("password"),
        cacert: section.path("cacert"),
        cert: section.path("cert"),
        key: section.path("key"),
    })
}

/// The scheme in front of an address, if there is one, and the address without a path.
pub(crate) fn strip_scheme(text: &str) -> (Option<Scheme>, &str) {
    let (scheme, rest) = match text.split_once("://") {
        Some(("http", rest)) => (Some(Scheme::Http), rest),
        Some(("https", rest)) => (Some(Scheme::Https), rest),
        _ => (None, text),
    };
    (scheme, rest.trim_end_matches('/'))
}
