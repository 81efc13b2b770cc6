//! Parameters that the Citus extension needs (Patroni's choices, so that either can go on with the
//! other's data directory).

use super::conf::Parameters;

/// Other nodes hear of a changed `pg_dist_node` by the extension's maintenance daemon; when it meets a
/// lock it tries again after this long. PostgreSQL sessions on workers wait for it after a switchover.
const SYNC_RETRY: &str = "100ms";

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
    const RETRY: &str = "citus.metadata_sync_retry_interval";
    if given(RETRY).is_none() {
        overrides.insert(RETRY.to_owned(), SYNC_RETRY.to_owned());
    }
    overrides
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
