//! patronictl's output: the bordered table with the title in its border, JSON, YAML and TSV. Pure.
//!
//! Scripts parse this, so columns, order, alignment and wording are Patroni 4.1's.

mod table;
#[cfg(test)]
mod tests;
mod tree;
mod yaml;

use clap::ValueEnum;
use kornak_cluster::{CitusDatabase, GroupId, HistoryEntry};
use serde::Serialize;
use serde_json::Value;

use crate::view::{ClusterView, GroupView, MemberView, Position};
pub use table::{Align, Table};

/// `-f`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    #[default]
    Pretty,
    Tsv,
    Json,
    Yaml,
    Yml,
    /// As pretty, and the members as a tree.
    #[value(skip)]
    Topology,
}

impl Format {
    fn is_for_people(self) -> bool {
        matches!(self, Self::Pretty | Self::Topology)
    }
}

/// Longest explanation of a pending restart that is shown in a table.
const LONGEST_REASON: usize = 50;

/// Default port of PostgreSQL: hosts are shown without it.
const USUAL_PORT: u16 = 5432;

/// The list of members, with what is planned below it. `group`: only this group was asked for.
pub fn members(cluster: &ClusterView, extended: bool, format: Format) -> String {
    let shown = Shown::new(cluster, extended);
    let single = cluster.citus && cluster.groups.len() == 1;
    let mut columns = vec!["Cluster"];
    if cluster.citus {
        columns.push("Group");
    }
    columns.extend(["Member", "Host", "Role", "State", "TL"]);
    columns.extend(["Receive LSN", "Receive Lag", "Replay LSN", "Replay Lag"]);
    columns.extend(shown.pending.then_some("Pending restart"));
    columns.extend(shown.reason.then_some("Pending restart reason"));
    columns.extend(shown.scheduled.then_some("Scheduled restart"));
    columns.extend(shown.tags.then_some("Tags"));

    let mut rows: Vec<Vec<Value>> = Vec::new();
    for group in &cluster.groups {
        let members = match format {
            Format::Topology => tree::sorted(&group.members),
            _ => group.members.clone(),
        };
        rows.extend(
            members.iter().map(|member| row(cluster, group, member, &shown, &columns, format)),
        );
    }
    match format {
        Format::Json => python_json(&Value::Array(objects(&columns, &rows, Empty::Dropped))),
        Format::Yaml | Format::Yml => {
            yaml(&Value::Array(objects(&columns, &rows, Empty::Dropped))) + "\n"
        }
        Format::Tsv => tsv(&columns, &rows, "\t"),
        Format::Pretty | Format::Topology => {
            let skip = if single { 2 } else { 1 };
            let mut table = Table::new(title(cluster));
            for column in columns.iter().skip(skip) {
                let right = matches!(*column, "Group" | "TL") || column.starts_with("Re");
                let name = if column.ends_with(" Lag") { "Lag" } else { column };
                table.column(name, if right { Align::Right } else { Align::Left });
            }
            for row in rows {
                table.row(row.iter().skip(skip).map(plain).collect());
            }
            let mut text = table.print();
            for group in &cluster.groups {
                let notes = service_info(group);
                if notes.is_empty() {
                    continue;
                }
                if let (true, false, Some(group)) = (cluster.citus, single, group.group) {
                    text.push_str(&format!("\nCitus group: {group}"));
                }
                text.push_str(&format!("\n {}", notes.join("\n ")));
            }
            for note in citus_notes(cluster) {
                text.push_str(&format!("\n Citus metadata: {note}"));
            }
            text
        }
    }
}

/// Which of the optional columns there are: those that somebody needs.
struct Shown {
    pending: bool,
    reason: bool,
    scheduled: bool,
    tags: bool,
    port: bool,
}

impl Shown {
    fn new(cluster: &ClusterView, extended: bool) -> Self {
        let all = || {
            let members = cluster.groups.iter().flat_map(|group| &group.members);
            members.filter(|member| !member.host.is_empty())
        };
        let any = |has: fn(&MemberView) -> bool| extended || all().any(has);
        let mut hosts: Vec<&str> = all().map(|member| member.host.as_str()).collect();
        let count = hosts.len();
        hosts.sort_unstable();
        hosts.dedup();
        let odd = all().any(|member| member.port.is_some_and(|port| port != USUAL_PORT));
        Self {
            pending: any(|member| member.pending_restart),
            reason: any(|member| !member.pending_restart_reason.is_empty()),
            scheduled: any(|member| member.scheduled_restart.is_some()),
            tags: any(|member| !member.tags.is_empty()),
            port: odd || hosts.len() < count,
        }
    }
}

fn row(
    cluster: &ClusterView,
    group: &GroupView,
    member: &MemberView,
    shown: &Shown,
    columns: &[&str],
    format: Format,
) -> Vec<Value> {
    let host = match member.port.filter(|_| shown.port && !member.host.is_empty()) {
        Some(port) => format!("{}:{port}", member.host),
        None => member.host.clone(),
    };
    let lsn = |position: &Option<Position>| position.as_ref().map_or("", |found| &found.lsn).into();
    let lag = |position: &Option<Position>| match position {
        None => Value::from(""),
        Some(Position { lag_bytes: None, .. }) => Value::from(""),
        Some(Position { lag_bytes: Some(bytes), .. }) => Value::from(megabytes(*bytes)),
    };
    let cell = |column: &&str| match *column {
        "Cluster" => Value::from(cluster.name.as_str()),
        "Group" => group.group.map_or(0, |group| group.0).into(),
        "Member" => member.name.as_str().into(),
        "Host" => host.as_str().into(),
        "Role" => title_case(&member.role).into(),
        "State" => member.state.as_str().into(),
        "TL" => member.timeline.map_or_else(|| "".into(), Value::from),
        "Receive LSN" => lsn(&member.receive),
        "Receive Lag" => lag(&member.receive),
        "Replay LSN" => lsn(&member.replay),
        "Replay Lag" => lag(&member.replay),
        "Pending restart" => if member.pending_restart { "*" } else { "" }.into(),
        "Pending restart reason" => reason(member, format).into(),
        "Scheduled restart" => member.scheduled_restart.as_deref().unwrap_or_default().into(),
        "Tags" => tags(member, format),
        _ => Value::from(""),
    };
    columns.iter().map(cell).collect()
}

/// Rounded as Python rounds: half to even.
fn megabytes(bytes: u64) -> u64 {
    (bytes as f64 / 1_048_576.0).round_ties_even() as u64
}

fn reason(member: &MemberView, format: Format) -> String {
    let line = |(name, old, new): &(String, String, String)| {
        let full = format!("{name}: {old}->{new}");
        if format.is_for_people() && full.chars().count() > LONGEST_REASON {
            format!("{name}: [hidden - too long]")
        } else {
            full
        }
    };
    member.pending_restart_reason.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn tags(member: &MemberView, format: Format) -> Value {
    let map = &member.tags.0;
    match format {
        _ if map.is_empty() => Value::from(""),
        Format::Json | Format::Yaml | Format::Yml => Value::Object(map.clone()),
        Format::Pretty => yaml(&Value::Object(map.clone())).into(),
        Format::Tsv | Format::Topology => yaml::flow(&Value::Object(map.clone())).into(),
    }
}

/// `sync_standby` → `Sync Standby`.
fn title_case(word: &str) -> String {
    let words = word.split('_').map(|part| {
        let mut letters = part.chars();
        letters.next().map_or_else(String::new, |first| {
            first.to_uppercase().collect::<String>() + letters.as_str()
        })
    });
    words.collect::<Vec<_>>().join(" ")
}

fn title(cluster: &ClusterView) -> String {
    let name = &cluster.name;
    let identity = |group: &GroupView| match group.initialize.as_deref() {
        None => "uninitialized".to_owned(),
        Some("") => "initializing".to_owned(),
        Some(identifier) => identifier.to_owned(),
    };
    match (cluster.citus, cluster.groups.as_slice()) {
        (false, [group, ..]) => format!(" Cluster: {name} ({}) ", identity(group)),
        (false, []) => format!(" Cluster: {name} (uninitialized) "),
        (true, [group]) => {
            let number = group.group.unwrap_or_default();
            format!(" Citus cluster: {name} (group: {number}, {}) ", identity(group))
        }
        (true, _) => format!(" Citus cluster: {name} "),
    }
}

/// Whether `pg_dist_node` is what the store says, one line for each database.
fn citus_notes(cluster: &ClusterView) -> Vec<String> {
    let Some(registration) = &cluster.registration else { return Vec::new() };
    let coordinator = cluster.groups.iter().find(|group| group.group == Some(GroupId::COORDINATOR));
    let leads =
        |group: &GroupView| group.leader().is_some_and(|leader| leader.name == registration.member);
    if coordinator.is_some_and(|group| !leads(group)) {
        return vec![format!(
            "unknown since {} leads the coordinator no more",
            registration.member
        )];
    }
    let note = |(name, database): (&String, &CitusDatabase)| match &database.since {
        _ if database.agrees && database.synced => format!("{name} agrees"),
        _ if database.agrees => format!("{name} agrees, not yet on every node"),
        since => {
            let since = since.as_deref().unwrap_or("an unknown time");
            format!("{name} has not agreed since {since}: {}", database.differences.join("; "))
        }
    };
    registration.databases.iter().map(note).collect()
}

fn service_info(group: &GroupView) -> Vec<String> {
    let mut notes = Vec::new();
    if group.pause {
        notes.push("Maintenance mode: on".to_owned());
    }
    if let Some(member) = &group.unfenced {
        notes.push(format!("Unfenced primary: {member} (no guard would stop it)"));
    }
    if let Some(scheduled) = &group.scheduled {
        let mut note = format!("Switchover scheduled at: {}", scheduled.at);
        for (word, name) in [("from", &scheduled.from), ("to", &scheduled.to)] {
            if let Some(name) = name {
                note.push_str(&format!("\n{word:>24}: {name}"));
            }
        }
        notes.push(note);
    }
    notes
}

/// The past timelines.
pub fn history(entries: &[HistoryEntry], format: Format) -> String {
    let columns = ["TL", "LSN", "Reason", "Timestamp", "New Leader"];
    let rows: Vec<Vec<Value>> = entries
        .iter()
        .map(|entry| {
            vec![
                entry.timeline.0.into(),
                entry.lsn.0.into(),
                entry.reason.as_str().into(),
                entry.timestamp.as_deref().unwrap_or_default().into(),
                entry.new_leader.as_deref().unwrap_or_default().into(),
            ]
        })
        .collect();
    let right = |column: &str| matches!(column, "TL" | "LSN");
    print(&columns, &rows, format, "\t", right)
}

/// Rows of a query. Without columns they are a time and a message.
pub fn rows(columns: &[String], rows: &[Vec<Value>], format: Format, delimiter: &str) -> String {
    let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
    match (columns.as_slice(), format) {
        ([], Format::Tsv) => tsv_rows(rows, delimiter),
        ([], _) => print(&["Time", "Message"], rows, format, delimiter, |_| false),
        (columns, _) => print(columns, rows, format, delimiter, |_| false),
    }
}

fn print(
    columns: &[&str],
    rows: &[Vec<Value>],
    format: Format,
    delimiter: &str,
    right: impl Fn(&str) -> bool,
) -> String {
    match format {
        Format::Json => python_json(&Value::Array(objects(columns, rows, Empty::Kept))),
        Format::Yaml | Format::Yml => {
            yaml(&Value::Array(objects(columns, rows, Empty::Kept))) + "\n"
        }
        Format::Tsv => tsv(columns, rows, delimiter),
        Format::Pretty | Format::Topology => {
            let mut table = Table::new(String::new());
            for column in columns {
                table.column(column, if right(column) { Align::Right } else { Align::Left });
            }
            for row in rows {
                table.row(row.iter().map(plain).collect());
            }
            table.print()
        }
    }
}

/// Treatment of empty values in JSON and YAML.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Empty {
    Kept,
    Dropped,
}

/// One object per row.
fn objects(columns: &[&str], rows: &[Vec<Value>], empty: Empty) -> Vec<Value> {
    let object = |row: &Vec<Value>| {
        let cells = columns.iter().zip(row);
        let cells = cells.filter(|(_, value)| empty == Empty::Kept || !plain(value).is_empty());
        Value::Object(cells.map(|(name, value)| ((*name).to_owned(), value.clone())).collect())
    };
    rows.iter().map(object).collect()
}

fn tsv(columns: &[&str], rows: &[Vec<Value>], delimiter: &str) -> String {
    let mut text = columns.join(delimiter);
    if !rows.is_empty() {
        text.push('\n');
        text.push_str(&tsv_rows(rows, delimiter));
    }
    text
}

fn tsv_rows(rows: &[Vec<Value>], delimiter: &str) -> String {
    let line = |row: &Vec<Value>| row.iter().map(plain).collect::<Vec<_>>().join(delimiter);
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A scalar without quotes, as Python prints it.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// YAML as PyYAML dumps it: block style, keys sorted. Without the last line end.
pub fn yaml(value: &Value) -> String {
    yaml::block(value)
}

/// JSON as Python's `dumps` writes it: with spaces after `,` and `:`, in ASCII.
fn python_json(value: &Value) -> String {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, Spaced);
    let text = match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => value.to_string(),
    };
    let mut ascii = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_ascii() {
            ascii.push(letter);
        } else {
            let mut units = [0; 2];
            for unit in letter.encode_utf16(&mut units) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
