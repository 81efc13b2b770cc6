//! The series of `/metrics` that are computed from the status when a monitor asks, in Prometheus' text
//! format.
//!
//! Not here: what is counted as it happens ([`crate::metrics`]).

use std::fmt::Write;

use kornak_cluster::discard;

use super::{PoolStatus, Status};

/// A label's value.
fn escaped(of: &str) -> String {
    of.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A gauge of a pool: its name and where it stands.
type Series = (&'static str, fn(&PoolStatus) -> f64);

fn print_pools(pools: &[PoolStatus], out: &mut String) {
    let series: [Series; 5] = [
        ("kornak_proxy_pool_clients", |pool| pool.clients as f64),
        ("kornak_proxy_pool_waiting_clients", |pool| pool.waiting as f64),
        ("kornak_proxy_pool_longest_wait_seconds", |pool| pool.longest_wait_seconds),
        ("kornak_proxy_pool_lent_servers", |pool| pool.lent as f64),
        ("kornak_proxy_pool_idle_servers", |pool| pool.idle as f64),
    ];
    for (name, value) in series {
        discard::string_takes_all(writeln!(out, "# TYPE {name} gauge"));
        for pool in pools {
            let listener = escaped(&pool.listener);
            let names = match (&pool.user, &pool.database) {
                (Some(user), Some(database)) => {
                    format!(",user=\"{}\",database=\"{}\"", escaped(user), escaped(database))
                }
                _ => String::new(),
            };
            discard::string_takes_all(writeln!(
                out,
                "{name}{{listener=\"{listener}\"{names}}} {}",
                value(pool)
            ));
        }
    }
}

/// Appends the series that are counted when somebody looks.
pub(super) fn print_status(status: &Status, out: &mut String) {
    print_pools(&status.pools, out);
    let mut gauge = |name: &str, label: &str, values: &mut dyn Iterator<Item = (&str, f64)>| {
        discard::string_takes_all(writeln!(out, "# TYPE {name} gauge"));
        for (of, value) in values {
            let of = escaped(of);
            discard::string_takes_all(match label {
                "" => writeln!(out, "{name} {value}"),
                label => writeln!(out, "{name}{{{label}=\"{of}\"}} {value}"),
            });
        }
    };
    let sessions = &status.sessions;
    let mut states = sessions.by_state.iter().map(|(state, n)| (*state, *n as f64));
    gauge("kornak_proxy_sessions", "state", &mut states);
    let mut listeners = sessions.by_listener.iter().map(|(name, n)| (name.as_str(), *n as f64));
    gauge("kornak_proxy_listener_sessions", "listener", &mut listeners);
    let mut pinned = sessions.pinned.iter().map(|(reason, n)| (*reason, *n as f64));
    gauge("kornak_proxy_pinned_sessions", "reason", &mut pinned);
    let nodes = status.groups.values().flat_map(|group| &group.nodes);
    let mut by_node = nodes.map(|node| (node.name.as_str(), node.sessions as f64));
    gauge("kornak_proxy_node_sessions", "node", &mut by_node);
    let flag = |up: bool| f64::from(u8::from(up));
    let groups: Vec<(String, f64)> = status
        .groups
        .iter()
        .map(|(id, group)| (id.to_string(), flag(group.serving.is_some())))
        .collect();
    let mut primaries = groups.iter().map(|(id, up)| (id.as_str(), *up));
    gauge("kornak_proxy_group_has_primary", "group", &mut primaries);
    let one = |value: bool| std::iter::once(("", flag(value)));
    gauge("kornak_proxy_gate_closed", "", &mut one(status.gate.closed));
    let reads_primaries = !status.gate.reads_primaries_for.is_empty();
    gauge("kornak_proxy_readers_on_primaries", "", &mut one(reads_primaries));
    gauge("kornak_proxy_registered", "", &mut one(status.gate.registered));
    let troubles: f64 = status.trouble.len() as f64;
    gauge("kornak_proxy_troubles", "", &mut std::iter::once(("", troubles)));
    let mut version = std::iter::once((status.version, 1.0));
    gauge("kornak_proxy_info", "version", &mut version);
}
