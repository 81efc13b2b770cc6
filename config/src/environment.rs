//! Patroni's environment variables, laid over the file.
//!
//! The list is Patroni's (its documentation, "Environment Configuration Settings"). A variable of that
//! family that is not on it is handed back, for the operator has set it for a reason.

use serde_json::Value;

use crate::error::Place;
use crate::yaml::{Tree, parse_value};

/// The whole configuration as YAML in one variable; used if no file is named.
pub(crate) const WHOLE: &str = "PATRONI_CONFIGURATION";

/// Form of a variable's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    /// One YAML value.
    Yaml,
    /// A YAML list, whose brackets may be left out.
    List,
    /// A YAML mapping, whose braces may be left out.
    Mapping,
    /// `log.format`: a text with `%(…)` in it, else a list.
    Format,
}

use Form::{Format, List, Mapping, Text, Yaml};

/// A section's part of the variables' names, its path in the file, and its keys.
type Row = (&'static str, &'static [&'static str], &'static [(&'static str, Form)]);

/// Variables `PATRONI_<SECTION>_<KEY>`.
const SECTIONS: &[Row] = &[
    (
        "",
        &[],
        &[
            ("NAME", Text),
            ("SCOPE", Text),
            ("NAMESPACE", Text),
            ("THREAD_POOL_SIZE", Yaml),
            ("THREAD_STACK_SIZE", Text),
        ],
    ),
    (
        "RESTAPI",
        &["restapi"],
        &[
            ("LISTEN", Text),
            ("CONNECT_ADDRESS", Text),
            ("CERTFILE", Text),
            ("KEYFILE", Text),
            ("KEYFILE_PASSWORD", Text),
            ("CAFILE", Text),
            ("VERIFY_CLIENT", Text),
            ("ALLOWLIST", List),
            ("ALLOWLIST_INCLUDE_MEMBERS", Yaml),
            ("HTTP_EXTRA_HEADERS", Mapping),
            ("HTTPS_EXTRA_HEADERS", Mapping),
            ("CIPHERS", Text),
            ("REQUEST_QUEUE_SIZE", Yaml),
            ("SERVER_TOKENS", Text),
        ],
    ),
    ("RESTAPI", &["restapi", "authentication"], &[("USERNAME", Text), ("PASSWORD", Text)]),
    (
        "CTL",
        &["ctl"],
        &[
            ("INSECURE", Yaml),
            ("CACERT", Text),
            ("CERTFILE", Text),
            ("KEYFILE", Text),
            ("KEYFILE_PASSWORD", Text),
        ],
    ),
    ("CTL", &["ctl", "authentication"], &[("USERNAME", Text), ("PASSWORD", Text)]),
    ("ETCD3", &["etcd3"], ETCD),
    ("ETCD", &["etcd"], ETCD),
    ("CITUS", &["citus"], &[("GROUP", Yaml), ("DATABASE", Text), ("DATABASES", Yaml)]),
    (
        "POSTGRESQL",
        &["postgresql"],
        &[
            ("LISTEN", Text),
            ("CONNECT_ADDRESS", Text),
            ("PROXY_ADDRESS", Text),
            ("DATA_DIR", Text),
            ("CONFIG_DIR", Text),
            ("BIN_DIR", Text),
            ("PGPASS", Text),
        ],
    ),
    (
        "POSTGRESQL_BIN",
        &["postgresql", "bin_name"],
        &[
            ("PG_CTL", Text),
            ("INITDB", Text),
            ("PG_CONTROLDATA", Text),
            ("PG_BASEBACKUP", Text),
            ("POSTGRES", Text),
            ("PG_ISREADY", Text),
            ("PG_REWIND", Text),
        ],
    ),
    ("SUPERUSER", &["postgresql", "authentication", "superuser"], CREDENTIALS),
    ("REPLICATION", &["postgresql", "authentication", "replication"], CREDENTIALS),
    ("REWIND", &["postgresql", "authentication", "rewind"], CREDENTIALS),
    (
        "LOG",
        &["log"],
        &[
            ("TYPE", Text),
            ("LEVEL", Text),
            ("TRACEBACK_LEVEL", Text),
            ("FORMAT", Format),
            ("DATEFORMAT", Text),
            ("STATIC_FIELDS", Mapping),
            ("MAX_QUEUE_SIZE", Yaml),
            ("DIR", Text),
            ("MODE", Yaml),
            ("FILE_SIZE", Yaml),
            ("FILE_NUM", Yaml),
            ("LOGGERS", Mapping),
            ("DEDUPLICATE_HEARTBEAT_LOGS", Yaml),
        ],
    ),
];

/// Names that Patroni has given up, and those that took their place.
const OLD_NAMES: &[(&str, &str)] = &[
    ("PATRONI_LOGLEVEL", "PATRONI_LOG_LEVEL"),
    ("PATRONI_LOGFORMAT", "PATRONI_LOG_FORMAT"),
    ("PATRONI_LOG_DATEFMT", "PATRONI_LOG_DATEFORMAT"),
];

const ETCD: &[(&str, Form)] = &[
    ("HOST", Text),
    ("HOSTS", Text),
    ("URL", Text),
    ("PROTOCOL", Text),
    ("SRV", Text),
    ("SRV_SUFFIX", Text),
    ("USE_PROXIES", Yaml),
    ("PROXY", Text),
    ("USERNAME", Text),
    ("PASSWORD", Text),
    ("CACERT", Text),
    ("CERT", Text),
    ("KEY", Text),
];

const CREDENTIALS: &[(&str, Form)] = &[
    ("USERNAME", Text),
    ("PASSWORD", Text),
    ("SSLMODE", Text),
    ("SSLKEY", Text),
    ("SSLPASSWORD", Text),
    ("SSLCERT", Text),
    ("SSLROOTCERT", Text),
    ("SSLCRL", Text),
    ("SSLCRLDIR", Text),
    ("SSLNEGOTIATION", Text),
    ("GSSENCMODE", Text),
    ("CHANNEL_BINDING", Text),
];

/// Sets in the tree what the variables say; those of Patroni's family that say nothing are the
/// answer. Empty variables count as absent.
pub(crate) fn overlay(tree: &mut Tree, environment: &[(String, String)]) -> Vec<String> {
    let mut known = vec![WHOLE.to_owned()];
    for (section, path, keys) in SECTIONS {
        for (key, form) in *keys {
            let name = if section.is_empty() {
                format!("PATRONI_{key}")
            } else {
                format!("PATRONI_{section}_{key}")
            };
            let old = OLD_NAMES.iter().find(|(_, new)| *new == name).map(|(old, _)| *old);
            known.extend(old.map(str::to_owned));
            let text = lookup(environment, &name).or_else(|| lookup(environment, old?));
            if let Some(text) = text {
                let value = form.read(text);
                let key = key.to_ascii_lowercase();
                let path: Vec<&str> = path.iter().copied().chain([key.as_str()]).collect();
                tree.set(&path, value, Place { source: name.clone(), line: None });
            }
            known.push(name);
        }
    }
    let strays = environment.iter().filter(|(name, value)| {
        name.starts_with("PATRONI_") && !value.is_empty() && !known.contains(name)
    });
    strays.map(|(name, _)| name.clone()).collect()
}

impl Form {
    fn read(self, text: &str) -> Value {
        let bare = text.trim();
        match self {
            Self::Text => Value::from(text),
            Self::Yaml => parse_value(text),
            Self::List if bare.starts_with('-') || bare.contains('[') => parse_value(text),
            Self::List => parse_value(&format!("[{text}]")),
            Self::Mapping if bare.starts_with('{') => parse_value(text),
            Self::Mapping => parse_value(&format!("{{{text}}}")),
            Self::Format if text.contains("%(") => Value::from(text),
            Self::Format => Self::List.read(text),
        }
    }
}

/// A variable's value, unless it is absent or empty.
pub(crate) fn lookup<'e>(environment: &'e [(String, String)], name: &str) -> Option<&'e str> {
    let (_, value) = environment.iter().find(|(key, _)| key == name)?;
    (!value.is_empty()).then_some(value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_win_over_the_file() {
        let mut tree = Tree::parse("f.yml", "name: a\nrestapi: {listen: 'x:1'}").unwrap();
        let environment: Vec<(String, String)> = [
            ("PATRONI_NAME", "b"),
            ("PATRONI_SCOPE", ""),
            ("PATRONI_RESTAPI_USERNAME", "admin"),
            ("PATRONI_POSTGRESQL_BIN_PG_CTL", "pg_ctl-15"),
            ("PATRONI_POSTGRESQL_BIN_DIR", "/usr/lib/postgresql/15/bin"),
            ("PATRONI_SUPERUSER_PASSWORD", "0123"),
            ("PATRONI_ETCD3_HOSTS", "'a:1','b:2'"),
            ("PATRONI_RESTAPI_ALLOWLIST", "10.0.0.0/8"),
            ("PATRONI_RESTAPI_HTTP_EXTRA_HEADERS", "X-One: a"),
            ("PATRONI_LOGLEVEL", "DEBUG"),
            ("PATRONI_LOG_FORMAT", "%(message)s"),
            ("PATRONI_KUBERNETES_LABELS", "{}"),
            ("HOME", "/root"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        assert_eq!(overlay(&mut tree, &environment), ["PATRONI_KUBERNETES_LABELS"]);
        assert_eq!(
            Value::Object(tree.root).to_string(),
            r#"{"name":"b","restapi":{"listen":"x:1","allowlist":["10.0.0.0/8"],"http_extra_headers":{"X-One":"a"},"authentication":{"username":"admin"}},"etcd3":{"hosts":"'a:1','b:2'"},"postgresql":{"bin_dir":"/usr/lib/postgresql/15/bin","bin_name":{"pg_ctl":"pg_ctl-15"},"authentication":{"superuser":{"password":"0123"}}},"log":{"level":"DEBUG","format":"%(message)s"}}"#
        );
        assert_eq!(tree.places["name"].to_string(), "PATRONI_NAME");
    }
}
