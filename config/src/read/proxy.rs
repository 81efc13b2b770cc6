//! A proxy's file: the head of an agent's, and `proxy:`.

use std::path::{Path, PathBuf};

use kornak_cluster::Scope;
use secrecy::SecretString;
use serde_json::Value;

use super::limits::servers;
use super::store::strip_scheme;
use crate::address::{HostPort, Listen};
use crate::proxy::{
    AuthMethod, AuthSettings, Balance, ClientTls, FailoverSettings, KeepSessions, ListenPolicy,
    ListenerSettings, PoolMode, ProxyProtocol, ProxySettings, ProxyTls, RequireAuth, Reruns,
    ServerSideTls, Source, SslMode, StaticMember, Target, UnknownOutcome,
};
use crate::rules::{ClientCert, Method, Network};
use crate::section::{Section, scalar_text};

/// Sections at the top of the file, those of an agent's file among them.
const TOP: &[&str] = &[
    "scope",
    "namespace",
    "proxy",
    "static",
    "rest",
    "log",
    "name",
    "citus",
    "restapi",
    "ctl",
    "bootstrap",
    "postgresql",
    "watchdog",
    "tags",
    "kornak",
];

/// Reads everything. `base` is the folder that relative files start from.
pub(crate) fn proxy(root: &Section<'_>, base: &Path) -> Option<ProxySettings> {
    let known: Vec<&str> = TOP.iter().chain(super::store::SECTIONS).copied().collect();
    root.tolerate(&known, super::PATRONIS_OWN);
    let section = root.section("proxy");
    section.only(&[
        "name",
        "connect_address",
        "listeners",
        "status",
        "auth",
        "tls",
        "limits",
        "failover",
        "pool",
        "log_connections",
        "log_disconnections",
        "application_name_add_host",
        "state_file",
        "threads",
        "static",
        "rest",
    ]);
    let source = source(root, &section, base);
    let scope = match &source {
        Some(Source::Static { .. } | Source::Rest { .. }) if !root.has("scope") => {
            Some(Scope::new(super::DEFAULT_NAMESPACE, "static", None))
        }
        _ => super::scope(root, None),
    };
    let listeners = listeners(&section);
    let names: Vec<String> = listeners.iter().map(|listener| listener.name.clone()).collect();
    let tls = tls(&section.section("tls"), base);
    let settings = ProxySettings {
        name: section.parsed("name", "a name without slashes", |text| {
            (!text.is_empty() && !text.contains('/')).then(|| text.to_owned())
        }),
        connect_address: section
            .parsed("connect_address", "host:port", |text| HostPort::parse(text, None)),
        listeners,
        status: super::limits::status(&section, base),
        auth: auth(&section.section("auth"), base, &names, &tls.client),
        tls,
        limits: super::limits::limits(&section.section("limits")),
        failover: failover(&section.section("failover")),
        pool: super::limits::pool(&section.section("pool"), &section.section("limits")),
        log_connections: section.flag("log_connections").unwrap_or(false),
        log_disconnections: section.flag("log_disconnections").unwrap_or(false),
        application_name_add_host: section.flag("application_name_add_host").unwrap_or(false),
        state_file: section.path("state_file"),
        threads: section.count("threads", 1..=1024).and_then(|count| usize::try_from(count).ok()),
        log: super::log(root),
        scope: scope?,
        source: source?,
    };
    Some(settings)
}

/// One of a store, `static` and `rest`; the latter two at the top or below `proxy`.
fn source(root: &Section<'_>, proxy: &Section<'_>, base: &Path) -> Option<Source> {
    let find = |key: &str| [root, proxy].into_iter().find(|section| section.has(key)).cloned();
    let (fixed, rest) = (find("static"), find("rest"));
    let dcs = super::store::SECTIONS.iter().find(|key| root.has(key));
    let named =
        usize::from(fixed.is_some()) + usize::from(rest.is_some()) + usize::from(dcs.is_some());
    if named > 1 {
        let (section, key) = match (&fixed, &rest) {
            (Some(section), _) => (section, "static"),
            (None, Some(section)) => (section, "rest"),
            (None, None) => (root, "etcd3"),
        };
        section.problem(key, "expected only one of etcd3, static and rest");
        return None;
    }
    if let Some(section) = fixed {
        let below = section.section("static");
        below.only(&["members"]);
        let members = static_members(&below);
        return Some(Source::Static { members }).filter(|_| below.has("members"));
    }
    if let Some(section) = rest {
        let below = section.section("rest");
        below.only(&["members"]);
        return rest_members(&below).map(|members| Source::Rest { members });
    }
    super::store::store(root).map(|store| Source::Dcs(store.relative_to(base)))
}

fn static_members(section: &Section<'_>) -> Vec<StaticMember> {
    let expected = "a list of {name, host, port}";
    let Some(items) = section.sections("members", expected) else {
        section.required::<()>("members", expected, None);
        return Vec::new();
    };
    if items.is_empty() {
        section.problem("members", "expected at least one member");
    }
    let mut members: Vec<StaticMember> = Vec::with_capacity(items.len());
    for item in items {
        item.only(&["name", "host", "port"]);
        let name = item.required("name", "the member's name", item.text("name"));
        let host = item.required("host", "a host name or address", item.text("host"));
        let port = item.count("port", 1..=65535).unwrap_or(5432);
        let port = u16::try_from(port).unwrap_or(5432);
        let (Some(name), Some(host)) = (name, host) else { continue };
        if members.iter().any(|member| member.name == name) {
            item.problem("name", format!("expected another name, {name:?} is taken"));
        }
        members.push(StaticMember { name, host: HostPort::new(&host, port).host, port });
    }
    members
}

fn rest_members(section: &Section<'_>) -> Option<Vec<String>> {
    let expected = "a list of http://host:port";
    let texts = section.required("members", expected, section.texts("members", ','))?;
    let mut members = Vec::with_capacity(texts.len());
    for text in &texts {
        let (scheme, bare) = strip_scheme(text);
        match (scheme, HostPort::parse(bare, Some(8008))) {
            (Some(scheme), Some(host)) => members.push(format!("{}://{host}", scheme.as_str())),
            _ => section.problem("members", format!("expected http://host:port, found {text:?}")),
        }
    }
    if texts.is_empty() {
        section.problem("members", "expected at least one member");
    }
    Some(members)
}

fn listeners(section: &Section<'_>) -> Vec<ListenerSettings> {
    let Some(items) = section.sections("listeners", "a list of {name, listen, target}") else {
        return ProxySettings::default_listeners();
    };
    if items.is_empty() {
        section.problem("listeners", "expected at least one listener");
    }
    let mut listeners: Vec<ListenerSettings> = Vec::with_capacity(items.len());
    for item in items {
        let Some(listener) = listener(&item) else { continue };
        if listeners.iter().any(|other| other.name == listener.name) {
            item.problem("name", format!("expected another name, {:?} is taken", listener.name));
        }
        let clash = listeners.iter().find(|other| {
            other.listen.port == listener.listen.port
                && other.listen.hosts.iter().any(|host| overlaps(host, &listener.listen.hosts))
        });
        if let Some(other) = clash {
            let message = format!("expected another address, {:?} listens there", other.name);
            item.problem("listen", message);
        }
        listeners.push(listener);
    }
    listeners
}

fn overlaps(host: &str, hosts: &[String]) -> bool {
    let wildcard = |host: &str| matches!(host, "*" | "0.0.0.0" | "::");
    wildcard(host) || hosts.iter().any(|other| other == host || wildcard(other))
}

fn listener(item: &Section<'_>) -> Option<ListenerSettings> {
    item.only(&[
        "name",
        "listen",
        "target",
        "member",
        "balance",
        "fallback_to_primary",
        "max_lag",
        "proxy_protocol",
        "retry_reads",
        "pool_mode",
        "pool_size",
        "max_servers",
    ]);
    let listen = item.parsed("listen", "host:port", |text| Listen::parse(text, None));
    let listen = item.required("listen", "host:port", listen);
    let expected = "one of primary, coordinator, workers, standbys, any, or member: <name>";
    let target = match item.text("member") {
        Some(_) if item.has("target") => {
            item.problem("member", "expected either target or member");
            None
        }
        Some(name) => Some(Target::Member(name)),
        None => item.parsed("target", expected, |text| match text {
            "primary" | "coordinator" => Some(Target::Primary),
            "workers" => Some(Target::Workers),
            "standbys" | "replicas" => Some(Target::Standbys),
            "any" => Some(Target::Any),
            _ => None,
        }),
    };
    let missing = target.is_none() && !item.has("member");
    let target = if missing { item.required("target", expected, target) } else { target };
    let name = item.text("name").or_else(|| listen.as_ref().map(Listen::to_string));
    let balances = [
        ("least_sessions", Balance::LeastSessions),
        ("round_robin", Balance::RoundRobin),
        ("random", Balance::Random),
    ];
    let modes = [("session", PoolMode::Session), ("transaction", PoolMode::Transaction)];
    let defaults = ListenerSettings::new(&name?, listen?, target?);
    let fallback = item.flag("fallback_to_primary").unwrap_or(defaults.fallback_to_primary);
    let never_leads = defaults.target == Target::Standbys && !fallback;
    let pool_mode = item.word("pool_mode", &modes).unwrap_or(defaults.pool_mode);
    if pool_mode == PoolMode::Transaction && defaults.target == Target::Workers {
        // A client's proof of its password is for one group's verifier, and the session stays there.
        item.problem(
            "pool_mode",
            "expected session for the target workers, whose sessions stay on one group",
        );
    }
    Some(ListenerSettings {
        balance: item.word("balance", &balances).unwrap_or(defaults.balance),
        fallback_to_primary: fallback,
        max_lag_bytes: item.bytes("max_lag"),
        proxy_protocol: proxy_protocol(item),
        retry_reads: item.flag("retry_reads").unwrap_or(never_leads),
        pool_mode,
        pool_size: servers(item, "pool_size"),
        max_servers: servers(item, "max_servers"),
        ..defaults
    })
}

/// `true`, `false`, or the balancers' addresses.
fn proxy_protocol(item: &Section<'_>) -> ProxyProtocol {
    let key = "proxy_protocol";
    let texts: Vec<String> = match item.value(key) {
        None | Some(Value::Bool(false)) => return ProxyProtocol::Off,
        Some(Value::Array(items)) => items.iter().filter_map(scalar_text).collect(),
        Some(other) => scalar_text(other).into_iter().collect(),
    };
    let texts: Vec<&str> = texts.iter().flat_map(|text| text.split(',')).map(str::trim).collect();
    if let [word] = texts.as_slice()
        && !word.contains(['.', ':'])
    {
        if item.flag(key) == Some(true) {
            item.warn(
                key,
                "anybody who reaches this port may claim any address, so a rule with addresses lets \
                 in who fits by both addresses only; name the balancers: [10.0.0.5, 10.0.1.0/24]",
            );
            return ProxyProtocol::Claimed;
        }
        return ProxyProtocol::Off;
    }
    let networks: Vec<Network> = texts.iter().filter_map(|text| Network::parse(text)).collect();
    if networks.is_empty() || networks.len() < texts.len() {
        item.expected(key, "true, false, or the addresses and ranges of balancers");
    }
    ProxyProtocol::From(networks)
}

/// As libpq's: the methods that are allowed, or, each behind an exclamation mark, those that are not.
fn require_auth(section: &Section<'_>) -> RequireAuth {
    let key = "require_auth";
    let Some(words) = section.texts(key, ',') else { return RequireAuth::default() };
    let negative = words.iter().all(|word| word.starts_with('!'));
    let default = RequireAuth::default();
    let none = RequireAuth { password: false, md5: false, scram: false, none: false };
    let mut found = if negative { default } else { none };
    for word in &words {
        match word.trim_start_matches('!') {
            "password" => found.password = !negative,
            "md5" => found.md5 = !negative,
            "scram-sha-256" => found.scram = !negative,
            "none" => found.none = !negative,
            _ => section.expected(key, "some of password, md5, scram-sha-256, none"),
        }
    }
    let mixed = !negative && words.iter().any(|word| word.starts_with('!'));
    if mixed || words.is_empty() || found == none {
        section.expected(key, "methods that are allowed, or, each behind a !, those that are not");
    }
    found
}

fn auth(section: &Section<'_>, base: &Path, listeners: &[String], tls: &ClientTls) -> AuthSettings {
    let known = [
        "method",
        "user",
        "password",
        "password_file",
        "database",
        "query",
        "require_auth",
        "rules",
        "maps",
    ];
    section.only(&known);
    let methods = [
        ("scram", AuthMethod::Scram),
        ("md5", AuthMethod::Md5),
        ("relay", AuthMethod::Relay),
        ("trust", AuthMethod::Trust),
    ];
    let user = section.text("user");
    let default = if user.is_some() { AuthMethod::Scram } else { AuthMethod::Relay };
    let method = section.word("method", &methods).unwrap_or(default);
    let rules = super::rules::rules(section, method.into(), listeners);
    if user.is_none() && rules.rules.iter().any(|rule| rule.method.needs_lookup()) {
        section.expected("user", "the role that looks passwords up");
    }
    let certificates = rules.rules.iter().any(|rule| {
        matches!(rule.method, Method::Cert { .. }) || rule.clientcert != ClientCert::NotNeeded
    });
    if certificates && tls.ca.is_none() {
        let message = "expected tls.client.ca as well, the authority of clients' certificates";
        section.problem("rules", message);
    }
    if section.has("password") && section.has("password_file") {
        section.problem("password_file", "expected either password or password_file");
    }
    let password = section.secret("password").or_else(|| password_file(section, base));
    let relay = AuthSettings::relay();
    AuthSettings {
        user,
        password,
        database: section.text("database").unwrap_or(relay.database),
        query: section
            .parsed("query", "a query with $1 in it", |text| {
                text.contains("$1").then(|| text.to_owned())
            })
            .unwrap_or(relay.query),
        require_auth: require_auth(section),
        rules,
    }
}

/// The first line of the file.
fn password_file(section: &Section<'_>, base: &Path) -> Option<SecretString> {
    let path = section.path("password_file")?;
    match std::fs::read_to_string(base.join(&path)) {
        Ok(text) => Some(SecretString::from(text.lines().next().unwrap_or_default())),
        Err(error) => {
            let path = path.display();
            section.problem("password_file", format!("expected a readable file, {path}: {error}"));
            None
        }
    }
}

fn tls(section: &Section<'_>, base: &Path) -> ProxyTls {
    let file = |side: &Section<'_>, key: &str| side.path(key).map(|path| base.join(path));
    section.only(&["client", "server"]);
    let (client, server) = (section.section("client"), section.section("server"));
    client.only(&["cert", "key", "ca", "crl", "required"]);
    server.only(&["sslmode", "ca", "crl", "cert", "key"]);
    for side in [&client, &server].into_iter().filter(|side| side.has("crl") && !side.has("ca")) {
        side.expected("ca", "the authorities that the revocation list is of");
    }
    both(&client);
    both(&server);
    let modes = [
        ("disable", SslMode::Disable),
        ("allow", SslMode::Allow),
        ("prefer", SslMode::Prefer),
        ("require", SslMode::Require),
        ("verify-ca", SslMode::VerifyCa),
        ("verify-full", SslMode::VerifyFull),
    ];
    let sslmode = server.word("sslmode", &modes).unwrap_or_default();
    if matches!(sslmode, SslMode::VerifyCa | SslMode::VerifyFull) && !server.has("ca") {
        server.expected("ca", "the authority that server certificates are checked against");
    }
    let required = client.flag("required").unwrap_or(false);
    if client.has("ca") && !client.has("cert") {
        client.expected("cert", "a certificate: clients show theirs only under TLS");
    }
    if required && !client.has("cert") {
        client.expected("cert", "a certificate, because TLS is required");
    }
    ProxyTls {
        client: ClientTls {
            cert: file(&client, "cert"),
            key: file(&client, "key"),
            ca: file(&client, "ca"),
            crl: file(&client, "crl"),
            required,
        },
        server: ServerSideTls {
            sslmode,
            ca: file(&server, "ca"),
            crl: file(&server, "crl"),
            cert: file(&server, "cert"),
            key: file(&server, "key"),
        },
    }
}

/// A certificate without its key is of no use.
fn both(section: &Section<'_>) -> Option<(PathBuf, PathBuf)> {
    if section.has("cert") != section.has("key") {
        section.problem("cert", "expected both cert and key, found one of them");
    }
    None
}

fn failover(section: &Section<'_>) -> FailoverSettings {
    section.only(&["keep_sessions", "unknown_outcome", "listen", "reruns"]);
    let keep =
        [("clean", KeepSessions::Clean), ("all", KeepSessions::All), ("none", KeepSessions::None)];
    let outcome = [("error", UnknownOutcome::Error), ("close", UnknownOutcome::Close)];
    let listen = [("pin", ListenPolicy::Pin), ("move", ListenPolicy::Move)];
    let reruns = [("none", Reruns::None), ("reads", Reruns::Reads)];
    FailoverSettings {
        keep_sessions: section.word("keep_sessions", &keep).unwrap_or_default(),
        unknown_outcome: section.word("unknown_outcome", &outcome).unwrap_or_default(),
        listen: section.word("listen", &listen).unwrap_or_default(),
        reruns: section.word("reruns", &reruns).unwrap_or_default(),
    }
}
