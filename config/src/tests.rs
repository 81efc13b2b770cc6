//! Whole files: what they become, and what is said about wrong ones.

use std::time::Duration;

use kornak_cluster::GroupId;
use secrecy::ExposeSecret;
use serde_json::json;

use super::*;
use crate::agent::{InitdbOption, ReplicaMethod, WatchdogMode};
use crate::proxy::{
    FailoverSettings, KeepSessions, ListenPolicy, Reruns, Source, Target, UnknownOutcome,
};
use crate::rules::Method;

mod admission;
mod places;
mod spellings;

const AGENT: &str = "\
scope: demo
name: pg0
restapi:
  listen: 127.0.0.1:8008
etcd3:
  hosts: [10.0.0.1:2379, 10.0.0.2]
bootstrap:
  dcs:
    ttl: 20
  initdb:
    - encoding: UTF8
    - data-checksums
postgresql:
  listen: 127.0.0.1,10.0.0.5:5433
  connect_address: 10.0.0.5
  data_dir: /data/pg0
  authentication:
    superuser: {username: postgres, password: s3cret-super}
    replication: {username: replicator, password: 12345}
";

const PROXY: &str = "\
scope: demo
etcd3: {hosts: 'a:1,b:2'}
proxy:
  auth: {user: kornak, password: s3cret-proxy}
";

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".yml").tempfile().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn environment(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn agent(text: &str) -> Loaded<AgentSettings> {
    load_agent(Some(file(text).path()), &[]).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

fn proxy(text: &str) -> Loaded<ProxySettings> {
    load_proxy(Some(file(text).path()), &[]).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// Messages about a file, with its name taken out.
fn said(text: &str) -> String {
    let file = file(text);
    let lines = check(file.path(), &[]);
    let lines: Vec<String> = lines.iter().map(Finding::to_string).collect();
    lines.join("\n").replace(&file.path().display().to_string(), "f.yml")
}

/// `base` with one line exchanged.
fn changed(base: &str, from: &str, to: &str) -> String {
    assert!(base.contains(from), "{from:?} is not in the base");
    base.replacen(from, to, 1)
}

#[test]
fn a_small_file_of_patronis_is_complete() {
    let Loaded { settings, warnings } = agent(AGENT);
    assert_eq!(warnings, Vec::<String>::new());
    assert_eq!(settings.scope.base(), "/service/demo/");
    assert_eq!(settings.name, "pg0");
    let StoreSettings::Etcd3(etcd) = &settings.store else { panic!("not etcd") };
    assert_eq!(etcd.endpoints(), ["http://10.0.0.1:2379", "http://10.0.0.2:2379"]);
    assert_eq!(settings.restapi.base_url(), "http://127.0.0.1:8008");
    assert_eq!(json!(settings.bootstrap.dcs), json!({"ttl": 20, "failsafe_mode": true}));
    let option = |name: &str, value: Option<&str>| InitdbOption {
        name: name.to_owned(),
        value: value.map(str::to_owned),
    };
    assert_eq!(
        settings.bootstrap.initdb,
        [option("encoding", Some("UTF8")), option("data-checksums", None)]
    );
    let postgresql = &settings.postgresql;
    assert_eq!(postgresql.listen.addresses(), "127.0.0.1,10.0.0.5");
    assert_eq!(postgresql.connect_address.to_string(), "10.0.0.5:5433");
    assert_eq!(postgresql.config_dir, Path::new("/data/pg0"));
    assert_eq!(postgresql.create_replica_methods, [ReplicaMethod::Basebackup { options: vec![] }]);
    let password = postgresql.replication.password.as_ref().unwrap();
    assert_eq!(password.expose_secret(), "12345");
    assert_eq!(postgresql.rewind().username, "postgres");
    assert_eq!(settings.kornak, agent::KornakSettings::default());
    assert_eq!(settings.watchdog.mode, WatchdogMode::Automatic);
}

#[test]
fn the_rest_of_an_agents_file_is_read() {
    let text = changed(
        AGENT,
        "scope: demo\n",
        "scope: demo
namespace: /prod/
citus: {group: 2, databases: [app, b]}
watchdog: {mode: off}
tags: {nofailover: no, failover_priority: -3, nosync: on, clonefrom: no, nostream: no, zone: a, rack: {row: [1, b]}}
log: {level: debug, type: json}
kornak:
  os_user: pg
  guard: {stop_budget: 500ms, agent_timeout: 0}
  failover: {suspect_after: 2s}
  handover: {max_hold: 2}
",
    );
    let text = changed(
        &text,
        "  data_dir: /data/pg0\n",
        "  data_dir: /data/pg0
  bin_dir: /usr/lib/postgresql/15/bin
  bin_name: {postgres: postgres-15}
  parameters: {max_connections: 50, wal_level: logical, fsync: on}
  pg_hba: ['local all all trust', host all all all scram-sha-256]
  callbacks: {on_role_change: /bin/true}
  create_replica_methods: [wal_g, basebackup]
  wal_g: {command: /bin/clone, no_leader: 1, threads: 4}
  basebackup: [max-rate: 100M, verbose]
  use_pg_rewind: true
",
    );
    let Loaded { settings, warnings } = agent(&text);
    let conflict = "Conflicting configuration between nofailover: False and failover_priority: -3. \
                    Defaulting to nofailover: False";
    assert!(matches!(&*warnings, [only] if only.ends_with(conflict)), "{warnings:?}");
    let tags = r#"{"nofailover":false,"failover_priority":-3,"nosync":true,"zone":"a","rack":{"row":[1,"b"]}}"#;
    assert_eq!(
        serde_json::to_string(&settings.tags).unwrap(),
        tags,
        "what says nothing is left out"
    );
    assert_eq!(settings.scope.base(), "/prod/demo/2/");
    assert_eq!(settings.scope.group, Some(GroupId(2)));
    assert_eq!(
        settings.citus.map(|citus| citus.databases),
        Some(vec!["app".to_owned(), "b".to_owned()])
    );
    assert_eq!(settings.watchdog.mode, WatchdogMode::Off);
    assert_eq!(settings.tags.failover_priority(), 1);
    assert_eq!((settings.log.level, settings.log.kind), (LogLevel::Debug, LogType::Json));
    assert_eq!(settings.kornak.os_user, "pg");
    assert_eq!(settings.kornak.guard.stop_budget, Duration::from_millis(500));
    assert_eq!(settings.kornak.guard.margin, Duration::from_secs(2));
    assert_eq!(settings.kornak.guard.agent_timeout, Duration::ZERO);
    assert_eq!(settings.kornak.failover.suspect_after, Duration::from_secs(2));
    assert_eq!(settings.kornak.handover.max_hold, Duration::from_secs(2));
    let postgresql = &settings.postgresql;
    assert_eq!(postgresql.program("postgres"), Path::new("/usr/lib/postgresql/15/bin/postgres-15"));
    assert_eq!(
        json!(postgresql.parameters),
        json!({"max_connections": 50, "wal_level": "logical", "fsync": true})
    );
    assert_eq!(postgresql.pg_hba.as_ref().map(Vec::len), Some(2));
    assert_eq!(postgresql.use_pg_rewind, Some(true));
    let ReplicaMethod::Custom { name, command, no_leader, params, .. } =
        &postgresql.create_replica_methods[0]
    else {
        panic!("not custom")
    };
    assert_eq!((name.as_str(), command.as_str(), *no_leader), ("wal_g", "/bin/clone", true));
    assert_eq!(json!(params), json!({"threads": 4}));
}

#[test]
fn an_agents_mistakes_are_named_with_line_key_and_expectation() {
    for (from, to, expected) in [
        (
            "  listen: 127.0.0.1,10.0.0.5:5433",
            "  listen: 5433x:y",
            "error: f.yml:14: postgresql.listen: expected host:port, found \"5433x:y\"",
        ),
        ("name: pg0\n", "", "error: f.yml: name: missing, expected the member's name"),
        (
            "  listen: 127.0.0.1:8008",
            "  listen: 0.0.0.0:8008",
            "error: f.yml:3: restapi.connect_address: missing, expected host:port, because listen names no address of its own",
        ),
        (
            "etcd3:\n  hosts: [10.0.0.1:2379, 10.0.0.2]\n",
            "consul: {host: x}\n",
            "error: f.yml:5: consul: this store is not supported, expected etcd3",
        ),
        (
            "[10.0.0.1:2379, 10.0.0.2]",
            "[10.0.0.1:port]",
            "error: f.yml:6: etcd3.hosts: expected host:port, found \"10.0.0.1:port\"",
        ),
        (
            "scope: demo\n",
            "scope: demo\nkornak:\n  gaurd: {}\n",
            "error: f.yml:3: kornak.gaurd: unknown key, did you mean guard?",
        ),
        (
            "scope: demo\n",
            "scope: demo\nkornak:\n  guard:\n    margin: soon\n",
            "error: f.yml:4: kornak.guard.margin: expected a duration (seconds, or with ms, s, min, h, d), found \"soon\"",
        ),
        (
            "    replication: {username: replicator, password: 12345}\n",
            "    replication: {password: [a]}\n",
            "error: f.yml:19: postgresql.authentication.replication.username: missing, expected the role that the password belongs to",
        ),
        ("bootstrap:", "bootstrap: [", "error: f.yml:9: not valid YAML"),
        (
            "scope: demo",
            "scope: a/b",
            "error: f.yml:1: scope: expected a cluster name without slashes, found \"a/b\"",
        ),
        (
            "scope: demo\n",
            "scope: demo\nwatchdog: {mode: maybe}\n",
            "error: f.yml:2: watchdog.mode: expected one of off, automatic, auto, required, found \"maybe\"",
        ),
        (
            "scope: demo\n",
            "scope: demo\ncitus: {group: 1}\n",
            "error: f.yml:2: citus.database: missing, expected the database of the Citus extension",
        ),
        (
            "scope: demo\n",
            "scope: demo\ncitus: {group: coordinator, database: app}\n",
            "error: f.yml:2: citus.group: expected a number from 0 to 2147483647, found",
        ),
        (
            "scope: demo\n",
            "scope: demo\ncitus: {group: 0, database: a, databases: [a]}\n",
            "error: f.yml:2: citus.databases: expected either database or databases",
        ),
        (
            "scope: demo\n",
            "scope: demo\ncitus: {group: 0, databases: [a, a]}\n",
            "error: f.yml:2: citus.databases: expected each name once, found \"a\" twice",
        ),
        (
            "scope: demo\n",
            "scope: demo\nkornak: {citus: {poolinfo: dbname=x}}\n",
            "error: f.yml:2: kornak.citus.poolinfo: expected host=… port=… of the pool",
        ),
    ] {
        let text = changed(AGENT, from, to);
        let found = said(&text);
        assert!(found.starts_with(expected), "expected {expected}\nfound    {found}");
    }
}

#[test]
fn what_others_could_not_use_is_refused_or_named() {
    for (from, to, expected) in [
        ("name: pg0", "name: Köln", "name: expected a member name of at most 63 printable ASCII"),
        ("name: pg0", &format!("name: {}", "n".repeat(64)), "name: expected a member name"),
        (
            "listen: 127.0.0.1:8008",
            "listen: '127.0.0.1,10.0.0.5:8008'",
            "restapi.listen: expected one",
        ),
        (
            "listen: 127.0.0.1,10.0.0.5:5433",
            "listen: 5432",
            "postgresql.listen: expected host:port",
        ),
    ] {
        let text = said(&changed(AGENT, from, to));
        assert!(text.contains(expected), "{to}: {text}");
    }
    for listen in ["'*:8008'", "':8008'"] {
        let text = changed(
            AGENT,
            "listen: 127.0.0.1:8008",
            &format!("listen: {listen}\n  connect_address: 10.0.0.5"),
        );
        assert_eq!(agent(&text).settings.restapi.listen.hosts, ["*"]);
    }
    let local = changed(AGENT, "127.0.0.1,10.0.0.5:5433", "localhost:5433");
    let [warning] = &agent(&local).warnings[..] else { panic!("{:?}", agent(&local).warnings) };
    assert!(warning.contains("this host alone"), "{warning}");
}

#[test]
fn all_mistakes_are_reported_at_once_in_the_order_of_lines() {
    let text = changed(AGENT, "name: pg0", "name: a,b");
    let text = changed(&text, "  data_dir: /data/pg0\n", "");
    let found = said(&text);
    let keys: Vec<&str> = found.lines().filter_map(|line| line.split(": ").nth(2)).collect();
    assert_eq!(keys, ["name", "postgresql.data_dir"], "{found}");
}

#[test]
fn methods_that_are_not_chosen_may_be_described() {
    let text = changed(
        AGENT,
        "bootstrap:\n",
        "bootstrap:\n  from_backup: {command: /bin/restore}\n  sparkle: {x: 1}\n",
    );
    let text = changed(&text, "  data_dir:", "  barman: {command: /bin/copy}\n  data_dir:");
    let [warning] = &agent(&text).warnings[..] else { panic!("{:?}", agent(&text).warnings) };
    assert!(warning.contains("bootstrap.sparkle"), "{warning}");
    assert!(!warning.contains("from_backup") && !warning.contains("barman"), "{warning}");
}

#[test]
fn unknown_keys_of_patronis_are_one_warning() {
    let text = changed(AGENT, "name: pg0", "name: pg0\nfancy: 1\nthread_pool_size: 9");
    let text = changed(&text, "  data_dir:", "  sparkle: 1\n  data_dir:");
    assert_eq!(
        said(&text),
        "warning: f.yml: keys without effect: fancy (line 3: unknown), thread_pool_size (line 4: members are asked without threads), postgresql.sparkle (line 18: unknown)"
    );
}

#[test]
fn the_environment_wins_over_the_file_and_is_named_in_errors() {
    let file = file(AGENT);
    let load = |pairs: &[(&str, &str)]| load_agent(Some(file.path()), &environment(pairs));
    let settings = load(&[("PATRONI_NAME", "pg7"), ("PATRONI_ETCD3_HOSTS", "'x:1','y:2'")]);
    let settings = settings.unwrap().settings;
    assert_eq!(settings.name, "pg7");
    let StoreSettings::Etcd3(etcd) = &settings.store else { panic!("not etcd") };
    assert_eq!(etcd.endpoints(), ["http://x:1", "http://y:2"]);
    let error = load(&[("PATRONI_POSTGRESQL_LISTEN", "here")]).unwrap().settings;
    assert_eq!(error.postgresql.listen.to_string(), "here:5432");
    let error = load(&[("PATRONI_RESTAPI_LISTEN", "x:y")]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "PATRONI_RESTAPI_LISTEN: restapi.listen: expected host:port, found \"x:y\""
    );
}

#[test]
fn the_whole_file_may_be_a_variable_or_a_folder() {
    let variables = environment(&[("PATRONI_CONFIGURATION", AGENT)]);
    assert_eq!(load_agent(None, &variables).unwrap().settings.name, "pg0");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("10-base.yml"), AGENT).unwrap();
    std::fs::write(folder.path().join("20-node.yaml"), "name: pg5\nrestapi: {listen: 'h:1'}")
        .unwrap();
    std::fs::write(folder.path().join("30-note.txt"), "name: no").unwrap();
    let settings = load_agent(Some(folder.path()), &[]).unwrap().settings;
    assert_eq!((settings.name.as_str(), settings.restapi.listen.port), ("pg5", 1));
    let error = load_agent(Some(&folder.path().join("absent.yml")), &[]).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
}

#[test]
fn secrets_are_never_printed() {
    let mut shown = format!("{:?}{:?}", agent(AGENT), proxy(PROXY));
    for text in [
        changed(AGENT, "s3cret-super", "[s3cret-super]"),
        changed(AGENT, "s3cret-super}", "s3cret-super, s3cret: {a: }"),
        changed(AGENT, "password: s3cret-super}", "password: \"s3cret-super"),
        changed(AGENT, "password: s3cret-super", "password: {s3cret-super: 1}"),
        changed(PROXY, "s3cret-proxy", "[s3cret-proxy, 1]"),
        changed(PROXY, "password: s3cret-proxy", "password: s3cret-proxy: x"),
    ] {
        shown += &said(&text);
    }
    assert!(!shown.contains("s3cret-"), "{shown}");
}

#[test]
fn a_proxys_file_needs_little() {
    let settings = proxy(PROXY).settings;
    let names: Vec<(&str, u16, Target)> = settings
        .listeners
        .iter()
        .map(|listener| (listener.name.as_str(), listener.listen.port, listener.target.clone()))
        .collect();
    assert_eq!(
        names,
        [
            ("primary", 5000, Target::Primary),
            ("workers", 5001, Target::Workers),
            ("standbys", 5002, Target::Standbys)
        ]
    );
    assert_eq!(settings.auth.rules.rules[0].method, Method::Scram);
    let status = settings.status.expect("on by default");
    assert_eq!((status.listen.hosts[0].as_str(), status.listen.port), ("127.0.0.1", 7000));
    assert_eq!(settings.limits.hold_timeout, Duration::from_secs(15));
    let relay = proxy("static: {members: [{name: a, host: db1}]}").settings;
    assert_eq!(relay.auth.rules.rules[0].method, Method::Relay);
    let Source::Static { members } = relay.source else { panic!("not static") };
    assert_eq!((members[0].host.as_str(), members[0].port), ("db1", 5432));
    let rest = proxy("scope: x\nproxy: {status: false}\nrest: {members: ['http://h']}").settings;
    assert!(rest.status.is_none());
    let Source::Rest { members } = rest.source else { panic!("not rest") };
    assert_eq!(members, ["http://h:8008"]);
}

#[test]
fn what_a_failover_does_to_sessions_is_read_with_safe_defaults() {
    let head = "static: {members: [{name: a, host: db1}]}\n";
    let plain = proxy(head).settings;
    assert_eq!(plain.failover, FailoverSettings::default());
    assert_eq!(plain.failover.keep_sessions, KeepSessions::Clean);
    assert!(plain.listeners.iter().all(|it| !it.retry_reads), "each may lead to a primary");
    let text = "proxy: {failover: {keep_sessions: none, unknown_outcome: close, listen: move, reruns: reads}, listeners: \
        [{listen: 'h:1', target: standbys, fallback_to_primary: false}]}";
    let set = proxy(&format!("{head}{text}")).settings;
    assert_eq!(set.failover.keep_sessions, KeepSessions::None);
    assert_eq!(set.failover.unknown_outcome, UnknownOutcome::Close);
    assert_eq!(set.failover.listen, ListenPolicy::Move);
    assert_eq!(set.failover.reruns, Reruns::Reads);
    assert!(set.listeners[0].retry_reads, "never a primary");
}

#[test]
fn a_proxys_mistakes_are_named() {
    for (proxy, expected) in [
        (
            "{lisetners: []}",
            "error: f.yml:3: proxy.lisetners: unknown key, did you mean listeners?",
        ),
        (
            "{auth: {method: scram}}",
            "error: f.yml:3: proxy.auth.user: missing, expected the role that looks passwords up",
        ),
        (
            "{listeners: [{listen: 'x:1', target: moon}]}",
            "error: f.yml:3: proxy.listeners[0].target: expected one of primary, coordinator, workers, standbys, any, or member: <name>, found \"moon\"",
        ),
        (
            "{listeners: [{listen: 'x:1', target: workers, pool_mode: transaction}]}",
            "error: f.yml:3: proxy.listeners[0].pool_mode: expected session for the target workers, whose sessions stay on one group",
        ),
        (
            "{listeners: [{name: a, listen: '0.0.0.0:1', target: any}, {name: b, listen: 'h:1', target: any}]}",
            "error: f.yml:3: proxy.listeners[1].listen: expected another address, \"a\" listens there",
        ),
        (
            "{listeners: [1]}",
            "error: f.yml:3: proxy.listeners[0]: expected keys and values, found 1",
        ),
        (
            "{limits: {max_clients: 0}}",
            "error: f.yml:3: proxy.limits.max_clients: expected a number from 1 to 1000000, found 0",
        ),
        (
            "{limits: {max_clients: 1, max_client_conn: 2}}",
            "error: f.yml:3: proxy.limits.max_client_conn: expected either max_clients or max_client_conn",
        ),
        (
            "{limits: {login_timeout: 0}}",
            "error: f.yml:3: proxy.limits.login_timeout: expected a time from 1 ms to 24 days, found 0",
        ),
        (
            "{auth: {require_auth: kerberos}}",
            "error: f.yml:3: proxy.auth.require_auth: expected some of password, md5, scram-sha-256, none",
        ),
        (
            "{listeners: [{listen: 'x:1', target: any, proxy_protocol: [10.0.0.5, moon]}]}",
            "error: f.yml:3: proxy.listeners[0].proxy_protocol: expected true, false, or the addresses",
        ),
        (
            "{static: {members: []}}",
            "error: f.yml:3: proxy.static: expected only one of etcd3, static and rest",
        ),
        (
            "{tls: {client: {cert: a.pem}}}",
            "error: f.yml:3: proxy.tls.client.cert: expected both cert and key, found one of them",
        ),
        (
            "{auth: {user: a, password_file: /nonexistent/x}}",
            "error: f.yml:3: proxy.auth.password_file: expected a readable file",
        ),
        (
            "{auth: {rules: [{method: scram}]}}",
            "error: f.yml:3: proxy.auth.user: missing, expected the role that looks passwords up",
        ),
        (
            "{auth: {rules: [{method: relay, address: 10.0.0.1/8}]}}",
            "error: f.yml:3: proxy.auth.rules[0].address: expected an address or a range like 10.0.0.0/8, found \"10.0.0.1/8\"",
        ),
        (
            "{auth: {rules: [{method: relay, listener: moon}]}}",
            "error: f.yml:3: proxy.auth.rules[0].listener: expected the name of a listener, found \"moon\"",
        ),
        (
            "{auth: {rules: [{method: cert, map: m}]}}",
            "error: f.yml:3: proxy.auth.rules[0].type: missing, expected hostssl: certificates are shown under TLS only",
        ),
        (
            "{auth: {rules: [{method: relay, user: /(}]}}",
            "error: f.yml:3: proxy.auth.rules[0].user: expected a regular expression",
        ),
    ] {
        let found = said(&format!("scope: demo\netcd3: {{hosts: ['a:1']}}\nproxy: {proxy}\n"));
        assert!(found.starts_with(expected), "expected {expected}\nfound    {found}");
    }
}

#[test]
fn a_password_may_live_in_a_file_beside_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("pass"), "hidden\n").unwrap();
    let path = folder.path().join("proxy.yml");
    std::fs::write(&path, PROXY.replace("password: s3cret-proxy", "password_file: pass")).unwrap();
    let settings = load_proxy(Some(&path), &[]).unwrap().settings;
    assert_eq!(settings.auth.password.unwrap().expose_secret(), "hidden");
}

#[test]
fn operators_verbs_read_any_of_the_files() {
    let operator = |text: &str| load_operator(Some(file(text).path()), &[]).unwrap();
    let settings =
        operator("etcd3: {host: e}\nrestapi: {authentication: {username: u, password: p}}");
    assert_eq!(settings.scope, None);
    assert_eq!(settings.ctl.authentication.unwrap().username, "u");
    assert_eq!(settings.store.unwrap().endpoints(), ["http://e:2379"]);
    assert_eq!(operator(AGENT).scope.as_deref(), Some("demo"));
    for (verify, ctl, readable, shown) in [
        ("optional", "", true, Some("own.crt")),
        ("required", "", true, Some("own.crt")),
        ("optional", "", false, None),
        ("none", "", true, None),
        ("optional", "ctl: {certfile: other.crt}", true, Some("other.crt")),
    ] {
        let text = format!(
            "restapi: {{certfile: own.crt, keyfile: own.key, cafile: ca, verify_client: {verify}}}\n{ctl}"
        );
        let settings = operator(&text).with_own_certificate(|key| {
            assert_eq!(key, Path::new("own.key"));
            readable
        });
        let found = settings.ctl.certfile;
        assert_eq!(found, shown.map(PathBuf::from), "{verify} {ctl} {readable}");
    }
    assert_eq!(operator(PROXY).store.unwrap().hosts.len(), 2);
    assert!(operator("").store.is_none());
}

#[test]
fn what_a_copy_may_be_told() {
    for (options, expected, warned) in [
        ("{compress: server-zstd, max-rate: 10M}", &["compress", "max-rate"][..], 0),
        ("[compress: gzip, verbose]", &["verbose"], 1),
        ("[compress, checkpoint: fast]", &["checkpoint"], 1),
        ("{pgdata: /x, waldir: /wal}", &["waldir"], 1),
    ] {
        let loaded = agent(&format!("{AGENT}  basebackup: {options}\n"));
        let [ReplicaMethod::Basebackup { options: found }] =
            loaded.settings.postgresql.create_replica_methods.as_slice()
        else {
            panic!("{:?}", loaded.settings.postgresql.create_replica_methods)
        };
        let found: Vec<&str> = found.iter().map(|option| option.name.as_str()).collect();
        assert_eq!(found, expected, "{options}");
        assert_eq!(loaded.warnings.len(), warned, "{options}: {:?}", loaded.warnings);
    }
}

#[test]
fn what_names_a_store_that_is_not_used_is_told() {
    let with = |store: &str| {
        let text = changed(AGENT, "etcd3:\n  hosts: [10.0.0.1:2379, 10.0.0.2]\n", store);
        agent(&text).warnings.join("\n")
    };
    for (store, expected) in [
        ("etcd3: {host: 'a:1'}\n", &[][..]),
        ("etcd3: {host: 'a:1', srv: b}\n", &["etcd3.srv: has no effect, the hosts are named"]),
        ("etcd: {host: 'a:1'}\n", &["etcd: is read as etcd3", "API v2"]),
        (
            "etcd3: {host: 'a:1'}\netcd: {host: 'b:1'}\nconsul: {host: 'c:1'}\n",
            &["etcd: has no effect, etcd3 is used", "consul: has no effect, etcd3 is used"],
        ),
    ] {
        let said = with(store);
        assert_eq!(said.is_empty(), expected.is_empty(), "{store}: {said}");
        for part in expected {
            assert!(said.contains(part), "{store}: {said}");
        }
    }
}
