//! The text of PostgreSQL's configuration files. Patroni's way, so that either can go on with
//! the other's data directory:
//!
//! `postgresql.conf` is generated; it includes `postgresql.base.conf`, which is the original. What
//! primary and standbys must agree on is given on the command line, where no file and no `ALTER SYSTEM`
//! can change it; so are port and addresses, so that a server started by hand is not found by clients.
//!
//! Not here: writing files; see `files`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use kornak_cluster::discard;
use kornak_config::agent::{Credentials, PostgresqlSettings};
use serde_json::{Map, Value};

use super::Upstream;
use super::controldata::ControlData;

/// Name of the generated file, and of the original.
pub(super) const MAIN_CONF: &str = "postgresql.conf";
pub(super) const BASE_CONF: &str = "postgresql.base.conf";

/// Parameter names and their values as text. Names are in lower case.
pub type Parameters = BTreeMap<String, String>;

/// Parameters that all members must agree on: from the store alone, passed on the command line.
/// Name, default, smallest value (for numbers).
const CONTROLLED: [(&str, &str, u32); 10] = [
    ("max_connections", "100", 25),
    ("max_locks_per_transaction", "64", 32),
    ("max_worker_processes", "8", 2),
    ("max_prepared_transactions", "0", 0),
    ("wal_level", "replica", 0),
    ("track_commit_timestamp", "off", 0),
    ("max_wal_senders", "10", 3),
    ("max_replication_slots", "10", 4),
    ("wal_log_hints", "on", 0),
    ("hot_standby", "on", 0),
];

/// Set by us and nobody else. A file that promotes the server that sees it would be a second way to
/// lead, and another data directory than `data_dir` would be nobody's that guards it.
const OURS: [&str; 9] = [
    "data_directory",
    "promote_trigger_file",
    "listen_addresses",
    "port",
    "cluster_name",
    "primary_conninfo",
    "primary_slot_name",
    "recovery_target_timeline",
    "config_file",
];

/// Parameters of recovery, which must not stand in `postgresql.auto.conf`: there they would win.
const RECOVERY: [&str; 16] = [
    "archive_cleanup_command",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restore_command",
    "trigger_file",
];

/// Parameters that name the end of a recovery; empty, they name none.
const ENDS: [&str; 6] = [
    "promote_trigger_file",
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
];

/// Text of a parameter's value. `None` for null and for what is no value.
pub fn value_text(value: &Value) -> Option<String> {
    match value {
        Value::Bool(true) => Some("on".to_owned()),
        Value::Bool(false) => Some("off".to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text.clone()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A name that may stand in the file and on the command line.
fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$'))
}

/// Parameters of a YAML or JSON map, under the names that they have from PostgreSQL 13 on; those that
/// are no parameters are left out.
pub(super) fn parameters(map: Option<&Map<String, Value>>) -> Parameters {
    let named = map.into_iter().flatten().filter(|(name, _)| is_name(name));
    let named =
        named.filter_map(|(name, value)| Some((name.to_ascii_lowercase(), value_text(value)?)));
    let mut parameters: Parameters = named.collect();
    // Segments of the usual 16 MB, as Patroni counts them.
    if let Some(segments) = parameters.remove("wal_keep_segments")
        && let Ok(segments) = segments.parse::<u64>()
    {
        let size = format!("{}MB", segments.saturating_mul(16));
        parameters.entry("wal_keep_size".to_owned()).or_insert(size);
    }
    if let Some(file) = parameters.remove("trigger_file") {
        parameters.entry("promote_trigger_file".to_owned()).or_insert(file);
    }
    if let Some(pause) = parameters.remove("pause_at_recovery_target") {
        let pauses = matches!(pause.to_ascii_lowercase().as_str(), "on" | "true" | "yes" | "1");
        let action = if pauses { "pause" } else { "promote" };
        parameters.entry("recovery_target_action".to_owned()).or_insert(action.to_owned());
    }
    parameters
}

/// Whether it is set by us and nobody else.
pub(super) fn is_ours(name: &str) -> bool {
    OURS.contains(&name)
}

/// The parameters on the command line: from the store's parameters, and for a standby not below what the
/// primary had (`control`), for else it would refuse to start
/// (/docs/current/hot-standby.html#HOT-STANDBY-ADMIN).
pub(super) fn controlled(dynamic: &Parameters, primary: Option<&ControlData>) -> Parameters {
    let mut chosen = Parameters::new();
    for (name, default, least) in CONTROLLED {
        let given = dynamic.get(name).map_or(default, String::as_str);
        let value = match name {
            "wal_level" if matches!(given, "replica" | "logical") => given.to_owned(),
            "wal_level" | "wal_log_hints" | "hot_standby" => default.to_owned(),
            "track_commit_timestamp" => given.to_owned(),
            _ => match given.parse::<u32>() {
                Ok(number) => number.max(least).to_string(),
                Err(_) => default.to_owned(),
            },
        };
        chosen.insert(name.to_owned(), value);
    }
    if let Some(primary) = primary {
        for (name, least) in [
            ("max_connections", primary.max_connections),
            ("max_worker_processes", primary.max_worker_processes),
            ("max_wal_senders", primary.max_wal_senders),
            ("max_prepared_transactions", primary.max_prepared_transactions),
            ("max_locks_per_transaction", primary.max_locks_per_transaction),
        ] {
            if let Some(value) = chosen.get_mut(name)
                && value.parse::<u32>().is_ok_and(|number| number < least)
            {
                *value = least.to_string();
            }
        }
    }
    chosen
}

/// The parameters in the generated file besides recovery: the store's parameters, then the local ones, then
/// `overrides`; without those that are controlled or ours.
pub(super) fn filed(
    dynamic: &Parameters,
    local: &Parameters,
    overrides: &Parameters,
) -> Parameters {
    let mut filed = Parameters::from([
        ("wal_keep_size".to_owned(), "128MB".to_owned()),
        // A standby that has lost its primary looks for the next one soon, and a promotion never
        // has to sit out the 5 s that are PostgreSQL's default.
        ("wal_retrieve_retry_interval".to_owned(), "500ms".to_owned()),
    ]);
    filed.extend(dynamic.clone());
    let shared = |name: &str| CONTROLLED.iter().any(|(controlled, ..)| *controlled == name);
    // The amount of log kept is the store's alone as well.
    filed.extend(local.clone().into_iter().filter(|(name, _)| name != "wal_keep_size"));
    filed.extend(overrides.clone());
    // A server recovers to a point in time when it is made so, and never because a file says it.
    let ends_recovery = |name: &str| name.starts_with("recovery_target");
    filed.retain(|name, _| !shared(name) && !is_ours(name) && !ends_recovery(name));
    filed
}

/// Undoes the lines of an included original that would end a standby's recovery: a standby follows for ever.
pub(super) fn endless(original: &str) -> Parameters {
    let name_of = |line: &str| {
        let line = line.trim_start();
        let end = line.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(line.len());
        line[..end].to_ascii_lowercase()
    };
    let ends = |name: &String| ENDS.contains(&name.as_str());
    original.lines().map(name_of).filter(ends).map(|name| (name, String::new())).collect()
}

/// Quotes a value for a configuration file (/docs/current/config-setting.html). Line ends, which
/// could begin another parameter, become blanks.
pub(super) fn quote(value: &str) -> String {
    let value = value.replace(['\n', '\r', '\0'], " ");
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// The generated `postgresql.conf`.
pub(super) fn render(base: Option<&Path>, parameters: &Parameters) -> String {
    let mut text = String::from(
        "# Written by Kornak: changes are lost. Use `kornak edit-config`, or postgresql.parameters\n\
         # of the node's own file.\n",
    );
    if let Some(base) = base {
        discard::string_takes_all(writeln!(
            text,
            "include {}\n",
            quote(&base.display().to_string())
        ));
    }
    for (name, value) in parameters {
        discard::string_takes_all(writeln!(text, "{name} = {}", quote(value)));
    }
    text
}

/// Reads back what [`render`] wrote; other lines are skipped.
pub(super) fn read_rendered(text: &str) -> Parameters {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(" = '")?;
            let value = value.strip_suffix('\'')?;
            is_name(name).then(|| (name.to_owned(), value.replace("''", "'").replace("\\\\", "\\")))
        })
        .collect()
}

/// `postgresql.auto.conf` without parameters of recovery, without `synchronous_standby_names` if they are ours, and
/// without lines that would keep the server from starting. `None`: there are none.
pub(super) fn clean_auto_conf(text: &str, names_are_ours: bool) -> Option<String> {
    let is_kept = |line: &&str| {
        let name = line.trim_start().split(['=', ' ', '\t']).next().unwrap_or_default();
        let is_recovery = RECOVERY.iter().any(|recovery| recovery.eq_ignore_ascii_case(name));
        let is_sync = names_are_ours && name.eq_ignore_ascii_case("synchronous_standby_names");
        !is_recovery && !is_sync && is_line(line)
    };
    let kept: String = text.split_inclusive('\n').filter(is_kept).collect();
    (kept.len() != text.len()).then_some(kept)
}

/// Whether the server's parser takes this line of a configuration file.
fn is_line(line: &str) -> bool {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return true;
    }
    let end = line.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    let rest = rest.trim_start();
    let value = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let parts = name.split('.').all(is_name);
    let after = match value.strip_prefix('\'') {
        Some(quoted) => after_quote(quoted),
        None => {
            let plain = |c: char| c.is_alphanumeric() || "_.+-:/".contains(c);
            let end = value.find(|c: char| !plain(c)).unwrap_or(value.len());
            (end > 0).then(|| &value[end..])
        }
    };
    parts
        && after.is_some_and(|after| matches!(after.trim_start().chars().next(), None | Some('#')))
}

/// The text behind a quoted value.
fn after_quote(quoted: &str) -> Option<&str> {
    let mut chars = quoted.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '\'' if chars.peek().is_some_and(|(_, next)| *next == '\'') => {
                chars.next();
            }
            '\'' => return Some(&quoted[at + 1..]),
            '\0' => return None,
            _ => {}
        }
    }
    None
}

/// Parameters of a standby: whom it follows, and `recovery_conf` of the operator. Recovery always
/// follows the newest timeline.
pub(super) fn recovery(
    settings: &PostgresqlSettings,
    dynamic: &Parameters,
    member: &str,
    passfile: &Path,
    upstream: Option<&Upstream>,
) -> Parameters {
    let mut recovery = dynamic.clone();
    recovery.extend(parameters(Some(&settings.recovery_conf)));
    recovery.extend(upstream.map(|upstream| upstream.recovery.clone()).unwrap_or_default());
    // A standby follows for ever: an end of recovery would make it a primary of its own.
    recovery
        .retain(|name, _| !OURS.contains(&name.as_str()) && !name.starts_with("recovery_target"));
    recovery.insert("recovery_target_timeline".to_owned(), "latest".to_owned());
    let server = upstream.filter(|upstream| upstream.is_server());
    let conninfo = server.map_or_else(String::new, |upstream| {
        primary_conninfo(&settings.replication, member, passfile, upstream, &settings.database)
    });
    recovery.insert("primary_conninfo".to_owned(), conninfo);
    let slot = upstream.and_then(|upstream| upstream.slot.clone()).unwrap_or_default();
    recovery.insert("primary_slot_name".to_owned(), slot);
    recovery
}

/// `primary_conninfo` of a standby (/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS). The
/// password stays in the password file. The database counts from PostgreSQL 17 on, where
/// `sync_replication_slots` connects to it.
pub(super) fn primary_conninfo(
    credentials: &Credentials,
    member: &str,
    passfile: &Path,
    upstream: &Upstream,
    database: &str,
) -> String {
    let mut words = conninfo_words(credentials, passfile, &upstream.host, upstream.port);
    words.push(("dbname", database.to_owned()));
    let application = upstream.application.as_deref().unwrap_or(member);
    words.push(("application_name", application.to_owned()));
    join_conninfo(&words)
}

/// How to reach a server as a role: words of a connection string, without a password.
pub(super) fn conninfo_words(
    credentials: &Credentials,
    passfile: &Path,
    host: &str,
    port: u16,
) -> Vec<(&'static str, String)> {
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|p| p.display().to_string());
    let optional = [
        ("passfile", credentials.password.as_ref().map(|_| passfile.display().to_string())),
        ("sslmode", Some(credentials.sslmode.clone().unwrap_or_else(|| "prefer".to_owned()))),
        ("sslcert", path(&credentials.sslcert)),
        ("sslkey", path(&credentials.sslkey)),
        ("sslrootcert", path(&credentials.sslrootcert)),
        ("sslcrl", path(&credentials.sslcrl)),
        ("sslcrldir", path(&credentials.sslcrldir)),
        ("gssencmode", credentials.gssencmode.clone()),
        ("channel_binding", credentials.channel_binding.clone()),
    ];
    let mut words = vec![
        ("user", credentials.username.clone()),
        ("host", host.to_owned()),
        ("port", port.to_string()),
    ];
    words.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    words
}

/// Words as one connection string, each value quoted if it must be.
pub fn join_conninfo(words: &[(&str, String)]) -> String {
    let quoted = |value: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:,*".contains(c);
        if !value.is_empty() && value.chars().all(plain) {
            value.to_owned()
        } else {
            format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
        }
    };
    let words: Vec<String> =
        words.iter().map(|(name, value)| format!("{name}={}", quoted(value))).collect();
    words.join(" ")
}

/// A password file (/docs/current/libpq-pgpass.html) that knows each role on every server: members
/// of a cluster share their passwords.
pub(super) fn passfile(logins: &[(&str, &str)]) -> String {
    let escape = |text: &str| text.replace('\\', "\\\\").replace(':', "\\:").replace('\n', "");
    let mut text = String::new();
    for (user, password) in logins {
        discard::string_takes_all(writeln!(text, "*:*:*:{}:{}", escape(user), escape(password)));
    }
    text
}

/// `pg_hba.conf` or `pg_ident.conf` from its lines.
pub(super) fn render_lines(lines: &[String]) -> String {
    let mut text = String::from("# Written by Kornak: changes are lost.\n");
    for line in lines {
        discard::string_takes_all(writeln!(text, "{}", line.replace(['\n', '\r'], " ")));
    }
    text
}

/// Rules for a new cluster, with the lines for Unix sockets from `initdbs`, the text that initdb wrote, before them if they have none of
/// their own: an agent that asks its server on the socket (`use_unix_socket`) has to be let in.
pub(super) fn with_socket_lines(lines: &[String], initdbs: &str) -> Vec<String> {
    let is_for_sockets = |line: &str| line.split_whitespace().next() == Some("local");
    let mut all = Vec::new();
    if !lines.iter().any(|line| is_for_sockets(line)) {
        all.extend(initdbs.lines().filter(|line| is_for_sockets(line)).map(str::to_owned));
    }
    all.extend_from_slice(lines);
    all
}

/// Rules for a new cluster whose operator gave none: passwords everywhere, for everybody.
pub(super) fn default_hba(replication_user: &str) -> Vec<String> {
    let user = format!("\"{}\"", replication_user.replace('"', "\"\""));
    vec![
        "local all all scram-sha-256".to_owned(),
        "host all all all scram-sha-256".to_owned(),
        format!("local replication {user} scram-sha-256"),
        format!("host replication {user} all scram-sha-256"),
    ]
}

#[cfg(test)]
mod tests;
