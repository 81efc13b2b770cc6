//! `proxy.limits`, `proxy.pool` and `proxy.status`: bounds, patience, and who may look.
//!
//! Where PgBouncer has a setting, its name is taken too.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::agent::basic_auth;
use crate::address::Listen;
use crate::proxy::{LimitSettings, PoolReset, PoolSettings, StatusSettings, StatusTls};
use crate::section::Section;

/// The longest time that means anything: PostgreSQL counts milliseconds in 31 bits.
const LONGEST: Duration = Duration::from_millis(i32::MAX as u64);

/// A setting with a name of ours and one of PgBouncer's.
#[derive(Clone, Copy)]
struct Key<'k> {
    ours: &'k str,
    theirs: &'k str,
}

const fn key<'k>(ours: &'k str, theirs: &'k str) -> Key<'k> {
    Key { ours, theirs }
}

impl<'k> Key<'k> {
    /// The name that the file uses.
    fn used(self, section: &Section<'_>) -> &'k str {
        if self.ours != self.theirs && section.has(self.ours) && section.has(self.theirs) {
            let message = format!("expected either {} or {}", self.ours, self.theirs);
            section.problem(self.theirs, message);
        }
        if section.has(self.theirs) { self.theirs } else { self.ours }
    }
}

/// A time between 1 ms and 24 days.
fn time(section: &Section<'_>, key: Key<'_>) -> Option<Duration> {
    let name = key.used(section);
    let found = section.duration(name)?;
    if found.is_zero() || found > LONGEST {
        section.expected(name, "a time from 1 ms to 24 days");
    }
    Some(found)
}

/// A time of at most 24 days; 0 means never.
fn time_or_never(
    section: &Section<'_>,
    key: Key<'_>,
    default: Option<Duration>,
) -> Option<Duration> {
    let name = key.used(section);
    match section.duration(name) {
        None => default,
        Some(found) if found.is_zero() => None,
        Some(found) => {
            if found > LONGEST {
                section.expected(name, "a time of 24 days at most, or 0 for never");
            }
            Some(found)
        }
    }
}

fn number(section: &Section<'_>, key: Key<'_>, least: u64) -> Option<usize> {
    let found = section.count(key.used(section), least..=1_000_000)?;
    usize::try_from(found).ok()
}

/// A number of which 0 means that there is no bound.
fn bound(section: &Section<'_>, name: &str) -> Option<usize> {
    number(section, key(name, name), 0).filter(|number| *number > 0)
}

/// A number of server connections.
pub(super) fn servers(section: &Section<'_>, key: &str) -> Option<usize> {
    section.count(key, 1..=100_000).and_then(|count| usize::try_from(count).ok())
}

const MAX_CLIENTS: Key<'_> = key("max_clients", "max_client_conn");
const LOGIN_TIMEOUT: Key<'_> = key("login_timeout", "client_login_timeout");
const CONNECT_TIMEOUT: Key<'_> = key("connect_timeout", "server_connect_timeout");

pub(super) fn limits(section: &Section<'_>) -> LimitSettings {
    section.only(&[
        MAX_CLIENTS.ours,
        MAX_CLIENTS.theirs,
        "superuser_reserved_connections",
        "max_user_client_connections",
        "max_db_client_connections",
        "max_address_client_connections",
        "max_user_connections",
        "max_db_connections",
        "max_unauthenticated",
        "max_unauthenticated_per_address",
        "max_cancels_per_address",
        LOGIN_TIMEOUT.ours,
        LOGIN_TIMEOUT.theirs,
        "hold_timeout",
        "max_hold",
        CONNECT_TIMEOUT.ours,
        CONNECT_TIMEOUT.theirs,
        "max_held_bytes",
        "client_idle_timeout",
        "idle_transaction_timeout",
        "transaction_timeout",
        "shutdown_timeout",
        WAIT_TIMEOUT.theirs,
        IDLE_TIMEOUT.theirs,
        LIFETIME.theirs,
    ]);
    if section.has("max_held_bytes") {
        let why = "has no effect: what is kept of a held statement is one read, 64 KiB";
        section.warn("max_held_bytes", why);
    }
    let defaults = LimitSettings::default();
    let alone = |name: &'static str| key(name, name);
    let never = |name: &'static str| time_or_never(section, alone(name), None);
    let unauthenticated = number(section, alone("max_unauthenticated"), 1);
    let unauthenticated = unauthenticated.unwrap_or(defaults.max_unauthenticated);
    LimitSettings {
        max_clients: number(section, MAX_CLIENTS, 1).unwrap_or(defaults.max_clients),
        superuser_reserved_connections: number(section, alone("superuser_reserved_connections"), 0)
            .unwrap_or(defaults.superuser_reserved_connections),
        max_user_client_connections: bound(section, "max_user_client_connections"),
        max_db_client_connections: bound(section, "max_db_client_connections"),
        max_address_client_connections: bound(section, "max_address_client_connections"),
        max_user_connections: bound(section, "max_user_connections"),
        max_db_connections: bound(section, "max_db_connections"),
        max_unauthenticated: unauthenticated,
        max_unauthenticated_per_address: number(
            section,
            alone("max_unauthenticated_per_address"),
            1,
        )
        .unwrap_or(defaults.max_unauthenticated_per_address)
        .min(unauthenticated),
        max_cancels_per_address: number(section, alone("max_cancels_per_address"), 1)
            .unwrap_or(defaults.max_cancels_per_address),
        login_timeout: time(section, LOGIN_TIMEOUT).unwrap_or(defaults.login_timeout),
        hold_timeout: section.duration("hold_timeout").unwrap_or(defaults.hold_timeout),
        max_hold: section.duration("max_hold").unwrap_or(defaults.max_hold),
        connect_timeout: time(section, CONNECT_TIMEOUT).unwrap_or(defaults.connect_timeout),
        client_idle_timeout: never("client_idle_timeout"),
        idle_transaction_timeout: never("idle_transaction_timeout"),
        transaction_timeout: never("transaction_timeout"),
        shutdown_timeout: section.duration("shutdown_timeout").unwrap_or(defaults.shutdown_timeout),
    }
}

const SIZE: Key<'_> = key("size", "default_pool_size");
const WAIT_TIMEOUT: Key<'_> = key("wait_timeout", "query_wait_timeout");
const IDLE_TIMEOUT: Key<'_> = key("idle_timeout", "server_idle_timeout");
const LIFETIME: Key<'_> = key("lifetime", "server_lifetime");

/// `limits` may have those of PgBouncer's names that mean a pool.
pub(super) fn pool(section: &Section<'_>, limits: &Section<'_>) -> PoolSettings {
    let at = |key: Key<'_>| if limits.has(key.theirs) { limits } else { section };
    section.only(&[
        SIZE.ours,
        SIZE.theirs,
        "max_servers",
        WAIT_TIMEOUT.ours,
        WAIT_TIMEOUT.theirs,
        "wait_notice",
        IDLE_TIMEOUT.ours,
        IDLE_TIMEOUT.theirs,
        LIFETIME.ours,
        LIFETIME.theirs,
        "prepared_statements",
        "reset",
    ]);
    let defaults = PoolSettings::default();
    PoolSettings {
        size: servers(section, SIZE.used(section)).unwrap_or(defaults.size),
        max_servers: servers(section, "max_servers").unwrap_or(defaults.max_servers),
        wait_timeout: time(at(WAIT_TIMEOUT), WAIT_TIMEOUT).unwrap_or(defaults.wait_timeout),
        wait_notice: time_or_never(
            section,
            key("wait_notice", "wait_notice"),
            defaults.wait_notice,
        ),
        idle_timeout: time_or_never(at(IDLE_TIMEOUT), IDLE_TIMEOUT, defaults.idle_timeout),
        lifetime: time(at(LIFETIME), LIFETIME).unwrap_or(defaults.lifetime),
        prepared_statements: section
            .count("prepared_statements", 1..=10_000)
            .and_then(|count| usize::try_from(count).ok())
            .unwrap_or(defaults.prepared_statements),
        reset: section
            .word("reset", &[("known", PoolReset::Known), ("always", PoolReset::Always)])
            .unwrap_or_default(),
    }
}

pub(super) fn status(section: &Section<'_>, base: &Path) -> Option<StatusSettings> {
    if section.value("status") == Some(&Value::Bool(false)) {
        return None;
    }
    let below = section.section("status");
    below.only(&["listen", "authentication", "certfile", "keyfile"]);
    let defaults = StatusSettings::default();
    let listen = below.parsed("listen", "host:port", |text| Listen::parse(text, None));
    let listen = listen.unwrap_or(defaults.listen);
    let authentication = basic_auth(&below.section("authentication"));
    let certfile = below.path("certfile").map(|path| base.join(path));
    let keyfile = below.path("keyfile").map(|path| base.join(path));
    if keyfile.is_some() && certfile.is_none() {
        below.expected("certfile", "the certificate of the key");
    }
    let tls = certfile.map(|certfile| {
        let keyfile = keyfile.unwrap_or_else(|| certfile.clone());
        StatusTls { certfile, keyfile }
    });
    let is_local = |host: &String| {
        host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    };
    if authentication.is_none() && !listen.hosts.iter().all(is_local) {
        below.warn(
            "listen",
            "everybody who reaches it sees the cluster's members; authentication: {username, \
             password} asks for a password",
        );
    }
    if authentication.is_some() && tls.is_none() && !listen.hosts.iter().all(is_local) {
        below.warn("authentication", "the password comes in clear text; certfile encrypts it");
    }
    Some(StatusSettings { listen, authentication, tls })
}
