//! Where the cluster's shared state lives. Only data: `kornak-dcs` makes a client of it.

use secrecy::SecretString;
use std::path::{Path, PathBuf};

use crate::address::HostPort;

/// Which store to use.
#[derive(Debug, Clone)]
pub enum StoreSettings {
    /// etcd, API v3: Patroni's `etcd3` section (`etcd` is read as the same; Kornak speaks v3 only).
    Etcd3(Etcd3Settings),
    /// The store inside this process, for `kornak demo`. Cannot be written in a file.
    Memory,
}

/// How etcd is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scheme {
    #[default]
    Http,
    Https,
}

impl Scheme {
    /// `http` or `https`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// Patroni's `etcd3` section.
#[derive(Debug, Clone)]
pub struct Etcd3Settings {
    /// Never empty. Default port 2379.
    pub hosts: Vec<HostPort>,
    pub protocol: Scheme,
    pub username: Option<String>,
    pub password: Option<SecretString>,
    /// PEM files.
    pub cacert: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

impl StoreSettings {
    /// Makes relative file names of the store's settings start from `base`.
    #[must_use]
    pub fn relative_to(self, base: &Path) -> Self {
        let below = |path: PathBuf| base.join(path);
        match self {
            Self::Etcd3(etcd) => Self::Etcd3(Etcd3Settings {
                cacert: etcd.cacert.map(below),
                cert: etcd.cert.map(below),
                key: etcd.key.map(below),
                ..etcd
            }),
            Self::Memory => Self::Memory,
        }
    }
}

impl Etcd3Settings {
    /// Plain HTTP to these hosts.
    pub fn new(hosts: Vec<HostPort>) -> Self {
        Self {
            hosts,
            protocol: Scheme::Http,
            username: None,
            password: None,
            cacert: None,
            cert: None,
            key: None,
        }
    }

    /// `scheme://host:port` of each host.
    pub fn endpoints(&self) -> Vec<String> {
        self.hosts.iter().map(|host| format!("{}://{host}", self.protocol.as_str())).collect()
    }
}
