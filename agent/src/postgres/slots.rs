//! Replication slots (/docs/current/warm-standby.html#STREAMING-REPLICATION-SLOTS).

use kornak_cluster::Lsn;
use serde::Deserialize;

use super::sql::{Sql, SqlError, literal};

/// `pg_replication_slots`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Slot {
    pub name: String,
    /// `physical` or `logical`.
    pub kind: String,
    pub plugin: Option<String>,
    pub database: Option<String>,
    pub active: bool,
    pub temporary: bool,
    pub xmin: Option<String>,
    pub catalog_xmin: Option<String>,
    pub restart_lsn: Option<Lsn>,
    pub confirmed_flush_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
}

const LIST: &str = "
SELECT coalesce(json_agg(json_build_object('name', slot_name, 'kind', slot_type, 'plugin', plugin,
  'database', database, 'active', active, 'temporary', temporary, 'xmin', xmin::text,
  'catalog_xmin', catalog_xmin::text, 'restart_lsn', restart_lsn - '0/0',
  'confirmed_flush_lsn', confirmed_flush_lsn - '0/0', 'wal_status', wal_status)
  ORDER BY slot_name), '[]'::json)
FROM pg_replication_slots";

pub(super) async fn list(sql: &Sql) -> Result<Vec<Slot>, SqlError> {
    const OPERATION: &str = "list its slots";
    let text = sql.value(OPERATION, LIST).await?.unwrap_or_default();
    serde_json::from_str(&text).map_err(|_| SqlError::Answer { operation: OPERATION })
}

/// Keeps the log from now on. No error if there is such a slot.
pub(super) async fn create_physical(sql: &Sql, name: &str) -> Result<(), SqlError> {
    let statement = format!(
        "SELECT pg_create_physical_replication_slot({name}, true) \
         WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = {name})",
        name = literal(name)
    );
    match sql.query("create a slot", &statement).await {
        // 42710: somebody else was faster.
        Err(error) if error.code() != Some("42710") => Err(error),
        _ => Ok(()),
    }
}

/// False: the slot is in use. No error if there is no such slot.
pub(super) async fn drop(sql: &Sql, name: &str) -> Result<bool, SqlError> {
    let statement = format!(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {}",
        literal(name)
    );
    match sql.query("drop a slot", &statement).await {
        // 55006: active; 42704: gone already.
        Err(error) if error.code() == Some("55006") => Ok(false),
        Err(error) if error.code() != Some("42704") => Err(error),
        _ => Ok(true),
    }
}

/// Moves a slot forward; one that is there already or in use stays where it is. A slot that keeps
/// nothing yet begins to.
pub(super) async fn advance(sql: &Sql, name: &str, to: Lsn) -> Result<(), SqlError> {
    let statement = format!(
        "SELECT pg_replication_slot_advance(slot_name, {to}) FROM pg_replication_slots \
         WHERE slot_name = {name} AND NOT active AND restart_lsn < {to} \
           AND CASE WHEN pg_is_in_recovery() THEN {to} <= pg_last_wal_replay_lsn() ELSE true END",
        to = format_args!("'{to}'::pg_lsn"),
        name = literal(name)
    );
    match sql.query("advance a slot", &statement).await {
        Err(error) if error.code() != Some("55006") => Err(error),
        _ => Ok(()),
    }
}

/// Name of a member's slot, as Patroni makes it: lower case, `-` and `.` become `_`, other characters
/// `uNNNN`, 63 characters at most.
pub fn slot_name_of(member: &str) -> String {
    let mut name = String::new();
    for c in member.to_lowercase().chars() {
        match c {
            'a'..='z' | '0'..='9' | '_' => name.push(c),
            '-' | '.' => name.push('_'),
            c => name.push_str(&format!("u{:04}", u32::from(c))),
        }
    }
    name.truncate(63);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_members_slot_is_named_as_patroni_names_it() {
        for (member, slot) in [
            ("pg-1.example.com", "pg_1_example_com"),
            ("Node_A", "node_a"),
            ("a b", "au0032b"),
            ("\u{e9}", "u0233"),
        ] {
            assert_eq!(slot_name_of(member), slot);
        }
        assert_eq!(slot_name_of(&"x".repeat(80)).len(), 63);
    }
}
