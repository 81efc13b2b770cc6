//! The status page: what [`Status`] says, for people.

use kornak_cluster::GroupId;
use kornak_protocol::sqlstate::SqlState;

use super::{GateStatus, GroupStatus, PoolStatus, Status};

const HEAD: &str = "<!doctype html><meta charset=utf-8><meta http-equiv=refresh content=2>\
    <title>kornak proxy</title><style>body{font:15px system-ui;margin:2em}\
    td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}\
    .bad{color:#a00}</style>";

pub(super) fn of(status: &Status) -> String {
    let mut out = HEAD.to_owned();
    out += &format!(
        "<h1>{}</h1><p>proxy {} {}, ",
        html(&status.scope),
        html(&status.proxy),
        status.version
    );
    put_gate(&status.gate, &mut out);
    for (place, what) in &status.trouble {
        out += &format!("<p class=bad>{place}: {}</p>", html(what));
    }
    for (id, group) in &status.groups {
        if status.groups.len() > 1 || *id != GroupId::COORDINATOR.0 {
            out += &format!("<h2>group {id}</h2>");
        }
        put_group(group, &mut out);
    }
    out += &format!("<h2>{} sessions</h2><p>", status.sessions.total);
    for (state, n) in &status.sessions.by_state {
        out += &format!("{state}: {n} &nbsp; ");
    }
    for (reason, n) in &status.sessions.pinned {
        out += &format!("pinned by {reason}: {n} &nbsp; ");
    }
    for pool in &status.pools {
        put_pool(pool, &mut out);
    }
    for (code, n) in &status.errors {
        let known = SqlState::from_bytes(code.as_bytes()).is_some();
        out += &format!("errors {}: {n} &nbsp; ", if known { code } else { "?" });
    }
    out += "</p><p><a href=/metrics>metrics</a> <a href=/status>status</a></p>";
    out
}

fn put_gate(gate: &GateStatus, out: &mut String) {
    let handover = gate.handover.as_deref().map(|id| format!(" for {}", html(id)));
    *out += &format!("gate {}{}</p>", gate.phase.as_str(), handover.unwrap_or_default());
    for group in &gate.without_primary {
        *out += &format!("<p class=bad>group {group} has no primary, transactions wait</p>");
    }
    for group in &gate.without_standby {
        *out += &format!("<p class=bad>readers wait for a standby of group {group}</p>");
    }
    for group in &gate.reads_primaries_for {
        *out += &format!("<p>group {group} has no standby to read from, readers use primaries</p>");
    }
}

fn put_group(group: &GroupStatus, out: &mut String) {
    if let Some(why) = group.why {
        *out += &format!("<p class=bad>{why}</p>");
    }
    if group.unfinished > 0 {
        let count = group.unfinished;
        *out += &format!("<p class=bad>{count} distributed transactions are unfinished</p>");
    }
    *out += "<table><tr><th>node<th>address<th>role<th>running<th>lag<th>sessions</tr>";
    for node in &group.nodes {
        *out += &format!(
            "<tr><td>{}<td>{}:{}<td>{}<td>{}<td>{}<td>{}</tr>",
            html(&node.name),
            html(&node.host),
            node.port,
            node.role,
            node.running,
            node.lag_bytes.map_or("?".to_owned(), |lag| lag.to_string()),
            node.sessions
        );
    }
    *out += "</table>";
}

fn put_pool(pool: &PoolStatus, out: &mut String) {
    let of = match (&pool.user, &pool.database) {
        (Some(user), Some(database)) => format!(" of {} on {}", html(user), html(database)),
        _ => String::new(),
    };
    *out += &format!(
        "pool{of} through {}: {} clients, {} waiting, {} lent, {} idle &nbsp; ",
        html(&pool.listener),
        pool.clients,
        pool.waiting,
        pool.lent,
        pool.idle
    );
}

fn html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
