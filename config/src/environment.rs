//! Patroni's environment variables, laid over the file.
//!
//! Only the variables of keys that mean something here are taken; the list is Patroni's
//! (its documentation, "Environment Configuration Settings").

use serde_json::Value;

use crate::error::Place;
use crate::yaml::{Tree, parse_value};

/// The whole configuration as YAML in one variable; used if no file is named.
pub(crate) const WHOLE: &str = "PATRONI_CONFIGURATION";

/// A section's part of the variables' names, its path in the file, and its keys; `true`: the value is
/// YAML (a list, a mapping), not a text.
type Row = (&'static str, &'static [&'static str], &'static [(&'static str, bool)]);

/// Variables `PATRONI_<SECTION>_<KEY>`.
const SECTIONS: &[Row] = &[
    ("", &[], &[("NAME", false), ("SCOPE", false), ("NAMESPACE", false)]),
    (
        "RESTAPI",
        &["restapi"],
        &[
            ("LISTEN", false),
            ("CONNECT_ADDRESS", false),
            ("CERTFILE", false),
            ("KEYFILE", false),
            ("KEYFILE_PASSWORD", false),
            ("CAFILE", false),
            ("VERIFY_CLIENT", false),
            ("ALLOWLIST", true),
            ("ALLOWLIST_INCLUDE_MEMBERS", true),
            ("HTTP_EXTRA_HEADERS", true),
            ("HTTPS_EXTRA_HEADERS", true),
        ],
    ),
    ("RESTAPI", &["restapi", "authentication"], &[("USERNAME", false), ("PASSWORD", false)]),
    (
        "CTL",
        &["ctl"],
        &[
            ("INSECURE", true),
            ("CACERT", false),
            ("CERTFILE", false),
            ("KEYFILE", false),
            ("KEYFILE_PASSWORD", false),
        ],
    ),
    ("CTL", &["ctl", "authentication"], &[("USERNAME", false), ("PASSWORD", false)]),
    ("ETCD3", &["etcd3"], ETCD),
    ("ETCD", &["etcd"], ETCD),
    ("CITUS", &["citus"], &[("GROUP", true), ("DATABASE", false)]),
    (
        "POSTGRESQL",
        &["postgresql"],
        &[
            ("LISTEN", false),
            ("CONNECT_ADDRESS", false),
            ("PROXY_ADDRESS", false),
            ("DATA_DIR", false),
            ("CONFIG_DIR", false),
            ("BIN_DIR", false),
            ("PGPASS", false),
        ],
    ),
    (
        "POSTGRESQL_BIN",
        &["postgresql", "bin_name"],
        &[
            ("PG_CTL", false),
            ("INITDB", false),
            ("PG_CONTROLDATA", false),
            ("PG_BASEBACKUP", false),
            ("POSTGRES", false),
            ("PG_ISREADY", false),
            ("PG_REWIND", false),
        ],
    ),
    ("SUPERUSER", &["postgresql", "authentication", "superuser"], CREDENTIALS),
    ("REPLICATION", &["postgresql", "authentication", "replication"], CREDENTIALS),
    ("REWIND", &["postgresql", "authentication", "rewind"], CREDENTIALS),
    ("LOG", &["log"], &[("TYPE", false), ("LEVEL", false), ("DIR", false)]),
];

const ETCD: &[(&str, bool)] = &[
    ("HOST", false),
    ("HOSTS", false),
    ("URL", false),
    ("PROTOCOL", false),
    ("SRV", false),
    ("USERNAME", false),
    ("PASSWORD", false),
    ("CACERT", false),
    ("CERT", false),
    ("KEY", false),
];

const CREDENTIALS: &[(&str, bool)] = &[
    ("USERNAME", false),
    ("PASSWORD", false),
    ("SSLMODE", false),
    ("SSLKEY", false),
    ("SSLPASSWORD", false),
    ("SSLCERT", false),
    ("SSLROOTCERT", false),
    ("SSLCRL", false),
    ("SSLCRLDIR", false),
    ("GSSENCMODE", false),
    ("CHANNEL_BINDING", false),
];

/// Sets in the tree what the variables say. Empty variables count as absent.
pub(crate) fn overlay(tree: &mut Tree, environment: &[(String, String)]) {
    for (section, path, keys) in SECTIONS {
        for (key, is_yaml) in *keys {
            let name = if section.is_empty() {
                format!("PATRONI_{key}")
            } else {
                format!("PATRONI_{section}_{key}")
            };
            let Some(text) = lookup(environment, &name) else { continue };
            let value = if *is_yaml { parse_value(text) } else { Value::from(text) };
            let key = key.to_ascii_lowercase();
            let path: Vec<&str> = path.iter().copied().chain([key.as_str()]).collect();
            tree.set(&path, value, Place { source: name, line: None });
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
            ("PATRONI_RESTAPI_ALLOWLIST", "[10.0.0.0/8]"),
            ("HOME", "/root"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        overlay(&mut tree, &environment);
        assert_eq!(
            Value::Object(tree.root).to_string(),
            r#"{"name":"b","restapi":{"listen":"x:1","allowlist":["10.0.0.0/8"],"authentication":{"username":"admin"}},"etcd3":{"hosts":"'a:1','b:2'"},"postgresql":{"bin_dir":"/usr/lib/postgresql/15/bin","bin_name":{"pg_ctl":"pg_ctl-15"},"authentication":{"superuser":{"password":"0123"}}}}"#
        );
        assert_eq!(tree.places["name"].to_string(), "PATRONI_NAME");
    }
}
