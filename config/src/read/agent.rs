//! An agent's file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use kornak_cluster::Tags;
use serde_json::{Map, Value};

use super::postgresql::{options, postgresql};
use crate::address::{HostPort, Listen, is_loopback};
use crate::agent::{
    AgentSettings, BasicAuth, BootstrapMethod, BootstrapSettings, CtlSettings, CustomBootstrap,
    FailoverSettings, GuardSettings, HandoverSettings, KornakSettings, PostgresqlSettings,
    RestSettings, ServerTls, ServerTokens, VerifyClient, WatchdogDriver, WatchdogMode,
    WatchdogSettings,
};
use crate::section::{Section, scalar_text};

/// Reads everything; `None` if something without a default is missing or wrong.
pub(crate) fn agent(root: &Section<'_>) -> Option<AgentSettings> {
    let known = [
        "scope",
        "namespace",
        "name",
        "citus",
        "restapi",
        "ctl",
        "bootstrap",
        "postgresql",
        "watchdog",
        "tags",
        "log",
        "kornak",
    ];
    let known: Vec<&str> = known.iter().chain(super::store::SECTIONS).copied().collect();
    let known: Vec<&str> = known.into_iter().chain(super::OF_OTHERS.iter().copied()).collect();
    root.tolerate(&known, super::PATRONIS_OWN);

    // Servers know standbys by application_name, which is cut after 63 bytes and loses other letters.
    let expected =
        "a member name of at most 63 printable ASCII characters, without slashes and commas";
    let name = root.parsed("name", expected, |text| {
        let fits =
            (1..=63).contains(&text.len()) && text.bytes().all(|it| matches!(it, b' '..=b'~'));
        (fits && !text.contains(['/', ','])).then(|| text.to_owned())
    });
    let name = root.required("name", "the member's name", name);
    let citus = super::citus::citus(root);
    let group = citus.as_ref().map(|(group, _)| *group);
    let scope = super::scope(root, group);
    let store = super::store::store(root);
    let restapi = restapi(&root.section("restapi"));
    let postgresql = postgresql(&root.section("postgresql"));
    let kornak = kornak(&root.section("kornak"));
    let postgresql = postgresql.map(|settings| {
        let beside = kornak.state_dir.as_ref().map(|dir| dir.join("pgpass"));
        let pgpass = settings.pgpass.clone().or(beside);
        PostgresqlSettings { pgpass, ..settings }
    });
    let settings = AgentSettings {
        ctl: agents_ctl(&root.section("ctl"), restapi.as_ref()),
        bootstrap: bootstrap(&root.section("bootstrap"), citus.is_some()),
        watchdog: watchdog(&root.section("watchdog")),
        tags: tags(&root.section("tags")),
        log: super::log(root),
        kornak,
        scope: scope?,
        citus: citus.map(|(_, settings)| settings),
        name: name?,
        store: store?,
        restapi: restapi?,
        postgresql: postgresql?,
    };
    Some(settings)
}

fn restapi(section: &Section<'_>) -> Option<RestSettings> {
    const DEFAULT_PORT: u16 = 8008;
    section.tolerate(
        &[
            "listen",
            "connect_address",
            "authentication",
            "certfile",
            "keyfile",
            "keyfile_password",
            "cafile",
            "verify_client",
            "allowlist",
            "allowlist_include_members",
            "http_extra_headers",
            "https_extra_headers",
            "server_tokens",
        ],
        &[
            ("ciphers", "rustls offers no weak ciphers to choose from"),
            ("request_queue_size", "no request waits for another"),
            ("thread_pool_size", "requests need no threads"),
        ],
    );
    let listen =
        section.parsed("listen", "host:port", |text| Listen::parse(text, Some(DEFAULT_PORT)));
    let listen = section.required("listen", "host:port", listen)?;
    if listen.hosts.len() > 1 {
        section.expected("listen", "one host:port, such as *:8008 for every address");
    }
    let connect_address = connect_address(section, &listen);
    let tls = served_with(section);
    let verify_client = verify_client(section);
    if verify_client != VerifyClient::None && !section.has("cafile") {
        section.expected("cafile", "the authority that client certificates are checked against");
    }
    let tokens = [
        ("original", ServerTokens::Original),
        ("minimal", ServerTokens::Minimal),
        ("productonly", ServerTokens::ProductOnly),
    ];
    Some(RestSettings {
        listen,
        connect_address: connect_address?,
        authentication: basic_auth(&section.section("authentication")),
        tls,
        allowlist: section.texts("allowlist", ',').unwrap_or_default(),
        allowlist_include_members: section.flag("allowlist_include_members").unwrap_or(false),
        http_extra_headers: headers(section, "http_extra_headers"),
        https_extra_headers: headers(section, "https_extra_headers"),
        server_tokens: section.word("server_tokens", &tokens).unwrap_or_default(),
    })
}

/// Address that others use: `connect_address`, or the listening address if there is exactly one.
pub(super) fn connect_address(section: &Section<'_>, listen: &Listen) -> Option<HostPort> {
    if section.has("connect_address") {
        let told = section.parsed("connect_address", "host:port", |text| {
            HostPort::parse(text, Some(listen.port))
        })?;
        if listen.is_local() && !is_loopback(&told.host) {
            let why = "other nodes are told to connect here, and listen takes connections of this host alone";
            section.warn("connect_address", why);
        }
        return Some(told);
    }
    let host = listen.local_host();
    if listen.hosts.iter().any(|own| own == host) {
        return Some(HostPort::new(host, listen.port));
    }
    section.expected("connect_address", "host:port, because listen names no address of its own");
    None
}

/// User and password, if there is a section.
pub(super) fn basic_auth(section: &Section<'_>) -> Option<BasicAuth> {
    section.tolerate(&["username", "password"], &[]);
    let (username, password) = (section.text("username"), section.secret("password"));
    if username.is_some() != password.is_some() {
        section.problem("", "expected both username and password, found one of them");
    }
    Some(BasicAuth { username: username?, password: password? })
}

fn headers(section: &Section<'_>, key: &str) -> BTreeMap<String, String> {
    let below = section.section(key);
    let mut headers = BTreeMap::new();
    for (name, value) in below.entries() {
        match scalar_text(value) {
            Some(text) => drop(headers.insert(name.clone(), text)),
            None => below.expected(name, "a text"),
        }
    }
    headers
}

fn verify_client(section: &Section<'_>) -> VerifyClient {
    let words = [
        ("none", VerifyClient::None),
        ("optional", VerifyClient::Optional),
        ("required", VerifyClient::Required),
    ];
    section.word("verify_client", &words).unwrap_or_default()
}

/// The certificate of the section `restapi`.
pub(super) fn served_with(section: &Section<'_>) -> Option<ServerTls> {
    section.path("certfile").map(|certfile| ServerTls {
        certfile,
        keyfile: section.path("keyfile"),
        keyfile_password: section.secret("keyfile_password"),
        cafile: section.path("cafile"),
        verify_client: verify_client(section),
    })
}

/// The client side of REST; without an own user that of the server side is used, as Patroni does.
pub(super) fn ctl(section: &Section<'_>, fallback: Option<BasicAuth>) -> CtlSettings {
    section.tolerate(
        &["authentication", "insecure", "cacert", "certfile", "keyfile", "keyfile_password"],
        &[],
    );
    CtlSettings {
        authentication: basic_auth(&section.section("authentication")).or(fallback),
        insecure: section.flag("insecure").unwrap_or(false),
        cacert: section.path("cacert"),
        certfile: section.path("certfile"),
        keyfile: section.path("keyfile"),
        keyfile_password: section.secret("keyfile_password"),
    }
}

/// Keys of a custom method that are not arguments of its command.
const BOOTSTRAP_KEYS: [&str; 6] =
    ["command", "no_params", "keep_existing_recovery_conf", "recovery_conf", "scope", "datadir"];

/// An agent asks others with what it serves with, where `ctl` says nothing else.
fn agents_ctl(section: &Section<'_>, restapi: Option<&RestSettings>) -> CtlSettings {
    let mut ctl = ctl(section, restapi.and_then(|rest| rest.authentication.clone()));
    if let Some(tls) = restapi.and_then(|rest| rest.tls.as_ref()) {
        ctl.cacert = ctl.cacert.or_else(|| tls.cafile.clone());
        // Only where clients are asked for certificates; ours is for servers otherwise.
        if ctl.certfile.is_none() && tls.verify_client != VerifyClient::None {
            ctl.certfile = Some(tls.certfile.clone());
            ctl.keyfile = tls.keyfile.clone();
            ctl.keyfile_password = tls.keyfile_password.clone();
        }
    }
    ctl
}

fn bootstrap(section: &Section<'_>, citus: bool) -> BootstrapSettings {
    let method_name = section.text("method").unwrap_or_else(|| "initdb".to_owned());
    let known =
        ["dcs", "method", "initdb", "pg_hba", "post_bootstrap", "post_init", method_name.as_str()];
    // Other methods may be described as well.
    let methods = section.entries().filter(|(_, value)| value.get("command").is_some());
    let methods = methods.map(|(name, _)| name.as_str());
    let known: Vec<&str> = known.into_iter().chain(["users"]).chain(methods).collect();
    section.tolerate(&known, &[]);
    if section.has("users") {
        section.warn("users", "has no effect (as in Patroni since 4.0), use post_bootstrap");
    }
    let method = if method_name == "initdb" {
        BootstrapMethod::Initdb
    } else {
        let below = section.section(&method_name);
        let command = below.text("command");
        below.required("command", "the command that fills the data directory", command).map_or(
            BootstrapMethod::Initdb,
            |command| {
                BootstrapMethod::Custom(CustomBootstrap {
                    name: method_name.clone(),
                    command,
                    no_params: below.flag("no_params").unwrap_or(false),
                    keep_existing_recovery_conf: below
                        .flag("keep_existing_recovery_conf")
                        .unwrap_or(false),
                    recovery_conf: below.map("recovery_conf"),
                    params: below
                        .entries()
                        .filter(|(key, _)| !BOOTSTRAP_KEYS.contains(&key.as_str()))
                        .map(|(key, value)| (key.clone(), value.clone()))
                        .collect(),
                })
            },
        )
    };
    BootstrapSettings {
        dcs: initial_config(section, citus),
        method,
        initdb: options(section, "initdb", &["pgdata", "nosync", "pwfile", "sync-only", "version"]),
        pg_hba: section.texts("pg_hba", '\n').unwrap_or_default(),
        post_bootstrap: section.text("post_bootstrap").or_else(|| section.text("post_init")),
    }
}

/// `bootstrap.dcs`, with failsafe mode on unless the file says otherwise; in a Citus cluster
/// synchronous mode `quorum` as well, as in Patroni: an acknowledged row that one group has lost is
/// half of a distributed transaction.
fn initial_config(section: &Section<'_>, citus: bool) -> Map<String, Value> {
    let mut dcs = section.map("dcs");
    if citus && !dcs.contains_key("synchronous_mode") {
        dcs.insert("synchronous_mode".to_owned(), Value::from("quorum"));
    }
    if dcs.get("failsafe_mode").is_none_or(Value::is_null) {
        dcs.insert("failsafe_mode".to_owned(), Value::Bool(true));
    }
    let below = section.section("dcs");
    for key in ["ttl", "loop_wait", "retry_timeout"] {
        if below.value(key).and_then(Value::as_f64).is_none() && below.has(key) {
            below.duration(key);
        }
    }
    dcs
}

fn watchdog(section: &Section<'_>) -> WatchdogSettings {
    section.tolerate(&["mode", "device", "safety_margin", "driver"], &[]);
    let drivers = [("default", WatchdogDriver::Kernel), ("testing", WatchdogDriver::Testing)];
    let modes = [
        ("off", WatchdogMode::Off),
        ("automatic", WatchdogMode::Automatic),
        ("auto", WatchdogMode::Automatic),
        ("required", WatchdogMode::Required),
    ];
    let half = section.value("safety_margin").and_then(Value::as_i64) == Some(-1);
    let default = Duration::from_secs(5);
    WatchdogSettings {
        mode: section.word("mode", &modes).unwrap_or_default(),
        device: section.path("device").unwrap_or_else(|| PathBuf::from("/dev/watchdog")),
        driver: section.word("driver", &drivers).unwrap_or_default(),
        safety_margin: (!half).then(|| section.duration("safety_margin").unwrap_or(default)),
    }
}

/// Reads the tags. A tag that is off is left out, as Patroni's members leave it out, unless it wins over
/// a priority.
fn tags(section: &Section<'_>) -> Tags {
    let mut tags = Map::new();
    for (key, value) in section.entries() {
        match value {
            Value::Null => {}
            value => drop(tags.insert(key.clone(), value.clone())),
        }
    }
    for key in ["noloadbalance", "clonefrom", "nostream"] {
        if section.flag(key) == Some(false) {
            tags.shift_remove(key);
        }
    }
    for (key, priority_key) in [("nofailover", "failover_priority"), ("nosync", "sync_priority")] {
        let number = |text: &str| text.trim().parse::<i64>().ok();
        let priority = section.parsed(priority_key, "a whole number", number);
        match (section.flag(key), priority) {
            (Some(never), Some(priority)) if never == (priority > 0) => {
                let never = if never { "True" } else { "False" };
                // Patroni's words: alerts look for them.
                section.warn(
                    key,
                    &format!(
                        "Conflicting configuration between {key}: {never} and {priority_key}: \
                         {priority}. Defaulting to {key}: {never}"
                    ),
                );
            }
            (Some(false), None) => drop(tags.shift_remove(key)),
            _ => {}
        }
    }
    Tags(tags)
}

/// The section that is Kornak's alone: an unknown key is a mistake.
fn kornak(section: &Section<'_>) -> KornakSettings {
    section.only(&["os_user", "state_dir", "guard", "failover", "handover", "citus"]);
    let defaults = KornakSettings::default();
    let guard = section.section("guard");
    guard.only(&["enabled", "stop_budget", "margin", "agent_timeout"]);
    let failover = section.section("failover");
    failover.only(&["suspect_after"]);
    let handover = section.section("handover");
    handover.only(&["max_hold", "switch_hold", "drain_timeout"]);
    KornakSettings {
        citus: super::citus::kornak_citus(&section.section("citus")),
        os_user: section.text("os_user").unwrap_or(defaults.os_user),
        state_dir: section.place("state_dir"),
        guard: GuardSettings {
            enabled: guard.flag("enabled").unwrap_or(defaults.guard.enabled),
            stop_budget: guard.duration("stop_budget").unwrap_or(defaults.guard.stop_budget),
            margin: guard.duration("margin").unwrap_or(defaults.guard.margin),
            agent_timeout: guard.duration("agent_timeout").unwrap_or(defaults.guard.agent_timeout),
        },
        failover: FailoverSettings {
            suspect_after: failover.duration("suspect_after").unwrap_or_default(),
        },
        handover: HandoverSettings {
            max_hold: handover.duration("max_hold").unwrap_or(defaults.handover.max_hold),
            switch_hold: handover.duration("switch_hold").unwrap_or(defaults.handover.switch_hold),
            drain_timeout: handover
                .duration("drain_timeout")
                .unwrap_or(defaults.handover.drain_timeout),
        },
    }
}
