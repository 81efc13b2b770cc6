//! `postgresql` of an agent's file.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::agent::connect_address;
use crate::address::{HostPort, Listen};
use crate::agent::{Callbacks, Credentials, InitdbOption, PostgresqlSettings, ReplicaMethod};
use crate::section::{Section, scalar_text};

const KNOWN: &[&str] = &[
    "listen",
    "connect_address",
    "proxy_address",
    "data_dir",
    "config_dir",
    "bin_dir",
    "bin_name",
    "pgpass",
    "database",
    "authentication",
    "parameters",
    "pg_hba",
    "pg_ident",
    "recovery_conf",
    "custom_conf",
    "callbacks",
    "pre_promote",
    "before_stop",
    "create_replica_methods",
    "create_replica_method",
    "basebackup",
    "use_unix_socket",
    "use_pg_rewind",
    "use_slots",
    "remove_data_directory_on_rewind_failure",
    "remove_data_directory_on_diverged_timelines",
];

/// Reads the section; `None` if something without a default is missing or wrong.
pub(super) fn postgresql(section: &Section<'_>) -> Option<PostgresqlSettings> {
    let methods = section
        .texts("create_replica_methods", ',')
        .or_else(|| section.texts("create_replica_method", ','))
        .filter(|names| !names.is_empty())
        .unwrap_or_else(|| vec!["basebackup".to_owned()]);
    // Other methods may be described as well.
    let described = section.entries().filter(|(_, value)| value.get("command").is_some());
    let described = described.map(|(name, _)| name.as_str());
    let known: Vec<&str> =
        KNOWN.iter().copied().chain(methods.iter().map(String::as_str)).chain(described).collect();
    section.tolerate(
        &known,
        &[
            ("krbsrvname", "the agent's connections use no Kerberos"),
            ("pg_ctl_timeout", "starting, stopping and promoting have limits of their own"),
            ("use_unix_socket_repl", "the agent makes no replication connection to its own server"),
            ("name", "the top level's name counts"),
            ("scope", "the top level's scope counts"),
        ],
    );

    let listen = section.parsed("listen", "host:port", |text| Listen::parse(text, Some(5432)));
    let listen = section.required("listen", "host:port", listen);
    let connect = listen.as_ref().and_then(|listen| connect_address(section, listen));
    let data_dir = section.required("data_dir", "the data directory", section.place("data_dir"));
    let authentication = section.section("authentication");
    authentication.tolerate(&["superuser", "replication", "rewind"], &[]);
    let superuser = credentials(&authentication.section("superuser"))
        .unwrap_or_else(|| Credentials::new("postgres", None));
    let replication_section = authentication.section("replication");
    let replication = replication_section.required(
        "username",
        "the role that standbys connect as",
        credentials(&replication_section),
    );
    let rewind = authentication.section("rewind");
    for role in [&replication_section, &rewind] {
        if role.has("sslpassword") {
            let why = "has no effect where libpq connects: give this role a key without a password";
            role.warn("sslpassword", why);
        }
    }
    let callbacks = section.section("callbacks");
    callbacks.tolerate(&["on_start", "on_stop", "on_restart", "on_reload", "on_role_change"], &[]);
    let proxy_address = section.parsed("proxy_address", "host:port", |text| {
        HostPort::parse(text, listen.as_ref().map(|listen| listen.port))
    });
    let data_dir = data_dir?;
    Some(PostgresqlSettings {
        listen: listen?,
        connect_address: connect?,
        proxy_address,
        config_dir: section.place("config_dir").unwrap_or_else(|| data_dir.clone()),
        data_dir,
        bin_dir: section.place("bin_dir"),
        bin_name: bin_name(&section.section("bin_name")),
        pgpass: section.place("pgpass"),
        database: section.text("database").unwrap_or_else(|| "postgres".to_owned()),
        superuser,
        replication: replication?,
        rewind: credentials(&rewind),
        parameters: parameters(&section.section("parameters")),
        pg_hba: section.texts("pg_hba", '\n'),
        pg_ident: section.texts("pg_ident", '\n'),
        recovery_conf: section.map("recovery_conf"),
        custom_conf: section.path("custom_conf"),
        callbacks: Callbacks {
            on_start: callbacks.text("on_start"),
            on_stop: callbacks.text("on_stop"),
            on_restart: callbacks.text("on_restart"),
            on_reload: callbacks.text("on_reload"),
            on_role_change: callbacks.text("on_role_change"),
        },
        pre_promote: section.text("pre_promote"),
        before_stop: section.text("before_stop"),
        create_replica_methods: methods
            .iter()
            .filter_map(|name| replica_method(section, name))
            .collect(),
        use_unix_socket: section.flag("use_unix_socket").unwrap_or(false),
        use_pg_rewind: section.flag("use_pg_rewind"),
        use_slots: section.flag("use_slots"),
        remove_data_directory_on_rewind_failure: section
            .flag("remove_data_directory_on_rewind_failure")
            .unwrap_or(false),
        remove_data_directory_on_diverged_timelines: section
            .flag("remove_data_directory_on_diverged_timelines")
            .unwrap_or(false),
    })
}

/// A role, if there is a section with a name in it.
fn credentials(section: &Section<'_>) -> Option<Credentials> {
    section.tolerate(
        &[
            "username",
            "password",
            "sslmode",
            "sslkey",
            "sslpassword",
            "sslcert",
            "sslrootcert",
            "sslcrl",
            "sslcrldir",
            "gssencmode",
            "channel_binding",
        ],
        &[("sslnegotiation", "TLS is negotiated by request")],
    );
    const MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
    let sslmode = section.parsed("sslmode", "one of libpq's modes, such as verify-ca", |text| {
        MODES.contains(&text).then(|| text.to_owned())
    });
    let username = section.text("username");
    if username.is_none() && section.has("password") {
        section.expected("username", "the role that the password belongs to");
    }
    Some(Credentials {
        username: username?,
        password: section.secret("password"),
        sslmode,
        sslkey: section.path("sslkey"),
        sslpassword: section.secret("sslpassword"),
        sslcert: section.path("sslcert"),
        sslrootcert: section.path("sslrootcert"),
        sslcrl: section.path("sslcrl"),
        sslcrldir: section.path("sslcrldir"),
        gssencmode: section.text("gssencmode"),
        channel_binding: section.text("channel_binding"),
    })
}

fn bin_name(section: &Section<'_>) -> BTreeMap<String, String> {
    let programs = [
        "pg_ctl",
        "initdb",
        "pg_controldata",
        "pg_basebackup",
        "postgres",
        "pg_isready",
        "pg_rewind",
    ];
    section.tolerate(&programs, &[]);
    let named = |name: &str| Some((name.to_owned(), section.text(name)?));
    programs.into_iter().filter_map(named).collect()
}

/// Parameters are scalars; null means absent.
fn parameters(section: &Section<'_>) -> Map<String, Value> {
    let mut parameters = Map::new();
    for (name, value) in section.entries() {
        match value {
            Value::Null => {}
            Value::Array(_) | Value::Object(_) => {
                section.expected(name, "a text, number or truth value");
            }
            value => drop(parameters.insert(name.clone(), value.clone())),
        }
    }
    parameters
}

fn replica_method(section: &Section<'_>, name: &str) -> Option<ReplicaMethod> {
    if name == "basebackup" {
        let refused = [
            "pgdata",
            "format",
            "wal-method",
            "xlog-method",
            "gzip",
            "version",
            "dbname",
            "host",
            "port",
            "username",
            "password",
        ];
        let mut options = options(section, "basebackup", &refused);
        options.retain(|option| {
            // What the client compresses is no data directory.
            let by_server = option.value.as_ref().is_some_and(|value| value.starts_with("server"));
            let fits = option.name != "compress" || by_server;
            if !fits {
                let why = "option compress is left out: the server may compress (server-gzip, …), \
                           not the client";
                section.warn("basebackup", why);
            }
            fits
        });
        return Some(ReplicaMethod::Basebackup { options });
    }
    let below = section.section(name);
    // As with Patroni, a method without a command, or without a section, is the name of a program.
    let command = below.text("command").unwrap_or_else(|| name.to_owned());
    const OURS: &[&str] =
        &["command", "no_leader", "no_params", "keep_data", "recovery_conf", "no_master"];
    let others = below.entries().filter(|(key, _)| !OURS.contains(&key.as_str()));
    Some(ReplicaMethod::Custom {
        name: name.to_owned(),
        command,
        no_leader: below.flag("no_leader").or_else(|| below.flag("no_master")).unwrap_or(false),
        no_params: below.flag("no_params").unwrap_or(false),
        keep_data: below.flag("keep_data").unwrap_or(false),
        params: others.map(|(key, value)| (key.clone(), value.clone())).collect(),
        recovery_conf: below.map("recovery_conf"),
    })
}

/// Options of a program, as a mapping or as a list of words and one-entry mappings. What Kornak
/// sets itself is left out with a warning.
pub(super) fn options(section: &Section<'_>, key: &str, refused: &[&str]) -> Vec<InitdbOption> {
    let mut found = Vec::new();
    match section.value(key) {
        None => {}
        Some(Value::Object(map)) => {
            for (name, value) in map {
                option(section, key, name, value, &mut found);
            }
        }
        Some(Value::Array(items)) => {
            for item in items {
                match item {
                    Value::String(name) => {
                        option(section, key, name, &Value::Bool(true), &mut found);
                    }
                    Value::Object(map) => {
                        for (name, value) in map {
                            option(section, key, name, value, &mut found);
                        }
                    }
                    _ => section.expected(key, "a list of options and option: value"),
                }
            }
        }
        Some(_) => section.expected(key, "a list of options and option: value"),
    }
    found.retain(|option| {
        let taken = refused.contains(&option.name.as_str());
        if taken {
            section.warn(
                key,
                &format!("option {} is set by the agent, yours is left out", option.name),
            );
        }
        !taken
    });
    found
}

fn option(
    section: &Section<'_>,
    key: &str,
    name: &str,
    value: &Value,
    found: &mut Vec<InitdbOption>,
) {
    let name = name.trim_start_matches('-').to_owned();
    match value {
        Value::Bool(false) => {}
        Value::Null | Value::Bool(true) => found.push(InitdbOption { name, value: None }),
        value => match scalar_text(value) {
            Some(text) => found.push(InitdbOption { name, value: Some(text) }),
            None => section.expected(key, "a list of options and option: value"),
        },
    }
}
