//! Parameters that the Citus extension needs (Patroni's choices, so that either can go on with the
//! other's data directory).

use super::conf::Parameters;

/// Other nodes hear of a changed `pg_dist_node` by the extension's maintenance daemon; when it meets a
/// lock it tries again after this long. PostgreSQL sessions on workers wait for it after a switchover.
const SYNC_RETRY: &str = "100ms";

/// How nodes reach each other if nobody says it: Citus's own default.
const NODE_CONNINFO: &str = "sslmode=require";

/// A host without power answers nobody, and TCP waits for it: for a quarter of an hour if something is to be
/// sent again, else for two hours and longer. A statement that waits for such a worker ends after eleven
/// seconds.
const CLIENT_KEEPALIVES: [(&str, &str); 4] = [
    ("keepalives_idle", "5"),
    ("keepalives_interval", "2"),
    ("keepalives_count", "3"),
    ("tcp_user_timeout", "10000"),
];

/// Keepalives of servers, for sessions that a coordinator without power has left on a worker, with
/// the locks that they hold: 25 seconds. A standby that is cut off for so long connects again;
/// without it `wal_sender_timeout` asks that of it after a minute.
const SERVER_KEEPALIVES: [(&str, &str); 4] = [
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "25000"),
];

/// Changes the store's parameters where they are shared by all members, and returns those that win over
/// the node's own.
pub(super) fn adjust(
    dynamic: &mut Parameters,
    local: &Parameters,
    local_hostname: &str,
) -> Parameters {
    let number = |parameters: &Parameters, name: &str| {
        parameters.get(name).and_then(|value| value.parse::<u32>().ok())
    };
    if number(dynamic, "max_prepared_transactions").unwrap_or_default() == 0 {
        // As many as there can be clients, each with a second one that is being recovered.
        let twice = number(dynamic, "max_connections").unwrap_or(100).saturating_mul(2);
        dynamic.insert("max_prepared_transactions".to_owned(), twice.to_string());
    }
    // Shards are moved by logical replication.
    dynamic.insert("wal_level".to_owned(), "logical".to_owned());
    let given = |name: &str| local.get(name).or_else(|| dynamic.get(name));
    let libraries = given("shared_preload_libraries").cloned().unwrap_or_default();
    let others = libraries.split(',').map(str::trim).filter(|name| !matches!(*name, "" | "citus"));
    let libraries: Vec<&str> = std::iter::once("citus").chain(others).collect();
    let mut overrides = Parameters::from([
        ("shared_preload_libraries".to_owned(), libraries.join(",")),
        ("citus.local_hostname".to_owned(), local_hostname.to_owned()),
    ]);
    const CONNINFO: &str = "citus.node_conninfo";
    let conninfo = given(CONNINFO).map_or(NODE_CONNINFO, String::as_str);
    overrides.insert(CONNINFO.to_owned(), with_keepalives(conninfo));
    let unless_given = [("citus.metadata_sync_retry_interval", SYNC_RETRY)];
    for (name, value) in unless_given.into_iter().chain(SERVER_KEEPALIVES) {
        if given(name).is_none() {
            overrides.insert(name.to_owned(), value.to_owned());
        }
    }
    overrides
}

/// The connection string with those of [`CLIENT_KEEPALIVES`] that it does not say itself. Whoever says
/// anything of keepalives has thought about them.
fn with_keepalives(conninfo: &str) -> String {
    let says = |name: &str| {
        conninfo.split_whitespace().any(|word| word.split('=').next().is_some_and(|it| it == name))
    };
    let mut text = conninfo.to_owned();
    if !says("keepalives") {
        for (name, value) in CLIENT_KEEPALIVES.iter().filter(|(name, _)| !says(name)) {
            text.push_str(&format!(" {name}={value}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(list: &[(&str, &str)]) -> Parameters {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn check(dynamic: &[(&str, &str)], local: &[(&str, &str)], expected: [&str; 3]) {
        let mut dynamic = map(dynamic);
        let overrides = adjust(&mut dynamic, &map(local), "/tmp");
        let found = [
            dynamic["max_prepared_transactions"].as_str(),
            overrides["shared_preload_libraries"].as_str(),
            overrides.get("citus.metadata_sync_retry_interval").map_or("", String::as_str),
        ];
        assert_eq!(found, expected);
        assert_eq!(dynamic["wal_level"], "logical");
        assert_eq!(overrides["citus.local_hostname"], "/tmp");
    }

    #[test]
    fn a_silent_node_is_noticed_unless_somebody_has_said_when() {
        let ours =
            "keepalives_idle=5 keepalives_interval=2 keepalives_count=3 tcp_user_timeout=10000";
        let conninfo = |given: &[(&str, &str)]| {
            let overrides = adjust(&mut map(&[]), &map(given), "/tmp");
            overrides["citus.node_conninfo"].clone()
        };
        let said = |text: &'static str| conninfo(&[("citus.node_conninfo", text)]);
        assert_eq!(conninfo(&[]), format!("sslmode=require {ours}"));
        assert_eq!(said("sslmode=prefer"), format!("sslmode=prefer {ours}"));
        assert_eq!(said("keepalives=0"), "keepalives=0");
        let rest = ours.replace("keepalives_idle=5 ", "");
        assert_eq!(said("keepalives_idle=60"), format!("keepalives_idle=60 {rest}"));
        let overrides = adjust(&mut map(&[("tcp_keepalives_idle", "60")]), &map(&[]), "/tmp");
        assert!(!overrides.contains_key("tcp_keepalives_idle"));
        assert_eq!(overrides["tcp_keepalives_count"], "3");
    }

    #[test]
    fn citus_is_loaded_first_and_has_room_for_its_transactions() {
        check(&[], &[], ["200", "citus", "100ms"]);
        check(
            &[("max_connections", "300"), ("max_prepared_transactions", "0")],
            &[("shared_preload_libraries", "pg_stat_statements, citus ,auto_explain")],
            ["600", "citus,pg_stat_statements,auto_explain", "100ms"],
        );
        check(
            &[
                ("max_prepared_transactions", "10"),
                ("shared_preload_libraries", "x"),
                ("citus.metadata_sync_retry_interval", "1s"),
                ("wal_level", "replica"),
            ],
            &[],
            ["10", "citus,x", ""],
        );
    }
}
