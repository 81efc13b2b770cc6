//! Rules of admission and limits of connections.

use super::*;
use crate::proxy::ProxyProtocol;
use crate::rules::{Database, Network, Rule};

/// The one rule of this kind, or what is said about it.
fn ruled(line: &str) -> Result<Rule, String> {
    let text = format!(
        "static: {{members: [{{name: a, host: db1}}]}}\nproxy: {{auth: {{rules: [{{method: relay, {line}}}]}}}}"
    );
    match load_proxy(Some(file(&text).path()), &[]) {
        Ok(loaded) => Ok(loaded.settings.auth.rules.rules[0].clone()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn names_in_rules_mean_what_they_mean_in_pg_hba_or_are_refused() {
    let named = |line: &str, name: &str| {
        let rule = ruled(line).expect(line);
        let users = rule.users.iter().any(|pattern| pattern.fits(name.as_bytes()));
        let databases = rule.databases.iter().any(|it| match it {
            Database::Named(pattern) => pattern.fits(name.as_bytes()),
            _ => false,
        });
        users || databases
    };
    for (line, name, expected) in [
        ("database: all", "x", true),
        ("database: '\"all\"'", "x", false),
        ("database: '\"all\"'", "all", true),
        ("database: ['\"all\"', b]", "b", true),
        ("database: ALL", "x", false),
        ("database: '\"samerole\"'", "samerole", true),
        ("database: '\"replication\", b'", "replication", true),
        ("database: replication", "replication", false),
        ("database: sameuser", "sameuser", false),
        ("user: sameuser", "sameuser", true),
        ("user: '\"+staff\"'", "+staff", true),
        ("user: '\"@names\"'", "@names", true),
        ("user: '\"a,b\", c'", "a,b", true),
        ("user: ['/^a{1,2}$']", "aa", true),
        ("user: '\"/^a{1,2}$\"'", "aa", true),
        ("user: '/^x.*y$'", "x\ny", true),
    ] {
        assert_eq!(named(line, name), expected, "{line}: {name:?}");
    }
    let odd = ruled("user: '/^a.$'").expect("a regex");
    assert!(odd.users[0].fits(b"a\xff"), "a byte that is no letter is some letter");
    assert!(matches!(ruled("database: sameuser").unwrap().databases[..], [Database::SameUser]));
    for (line, expected) in [
        ("database: samerole", "member of which role"),
        ("database: [samegroup, x]", "member of which role"),
        ("user: +staff", "member of which role"),
        ("database: '+staff'", "member of which role"),
        ("user: '@names.txt'", "have to be written here"),
        ("database: [x, '@dbs']", "have to be written here"),
        ("user: '\"a'", "closed again"),
        ("user: ['a,b']", "one name in each place"),
        ("user: \"'a'\"", "double"),
        ("user: [x, '/a\\b']", "means something else"),
        ("user: '/(a)\\1'", "regular expression"),
        ("database: '\"\"'", "an empty one"),
        (&format!("user: {}", "x".repeat(64)), "63 bytes"),
        ("address: samehost", "an address or a range"),
        ("address: db.example.com", "an address or a range"),
        ("type: local", "hostssl"),
    ] {
        let said = ruled(line).expect_err(line);
        assert!(said.contains(expected), "{line}: {said}");
    }
}

#[test]
fn limits_have_pgbouncers_names_as_well() {
    let head = "static: {members: [{name: a, host: db1}]}\n";
    let text = "proxy: {limits: {max_client_conn: 9, client_login_timeout: 3s, server_connect_timeout: 2, \
        max_user_client_connections: 4, max_db_connections: 0, idle_transaction_timeout: 1min, transaction_timeout: 0, query_wait_timeout: 4s}, \
        pool: {default_pool_size: 7, server_lifetime: 1h, server_idle_timeout: 0}, \
        log_connections: 1, application_name_add_host: on}";
    let settings = proxy(&format!("{head}{text}")).settings;
    let (limits, pool) = (&settings.limits, &settings.pool);
    assert_eq!((limits.max_clients, limits.superuser_reserved_connections), (9, 3));
    assert_eq!(limits.login_timeout, Duration::from_secs(3));
    assert_eq!(limits.connect_timeout, Duration::from_secs(2));
    assert_eq!((limits.max_user_client_connections, limits.max_db_connections), (Some(4), None));
    assert_eq!(limits.idle_transaction_timeout, Some(Duration::from_secs(60)));
    assert_eq!(limits.transaction_timeout, None);
    assert_eq!((pool.size, pool.wait_timeout), (7, Duration::from_secs(4)));
    assert_eq!(pool.idle_timeout, None);
    assert!(settings.log_connections && settings.application_name_add_host);
    assert!(!settings.log_disconnections);
}

#[test]
fn whose_word_a_listener_takes_for_an_address() {
    let head = "static: {members: [{name: a, host: db1}]}\n";
    let with = |value: &str| {
        let line = format!("{{listen: '127.0.0.1:1', target: any, proxy_protocol: {value}}}");
        let loaded = proxy(&format!("{head}proxy: {{listeners: [{line}]}}"));
        (loaded.settings.listeners[0].proxy_protocol.clone(), loaded.warnings.join("\n"))
    };
    assert_eq!(with("false").0, ProxyProtocol::Off);
    assert_eq!(with("'off'").0, ProxyProtocol::Off);
    let (claimed, warned) = with("true");
    assert_eq!(claimed, ProxyProtocol::Claimed);
    assert!(warned.contains("name the balancers"), "{warned}");
    let networks = |texts: &[&str]| {
        ProxyProtocol::From(texts.iter().map(|text| Network::parse(text).unwrap()).collect())
    };
    assert_eq!(with("[10.0.0.5, 'fd00::/8']").0, networks(&["10.0.0.5", "fd00::/8"]));
    assert_eq!(with("10.0.0.5").0, networks(&["10.0.0.5"]));
    assert!(with("10.0.0.5").1.is_empty());
}
