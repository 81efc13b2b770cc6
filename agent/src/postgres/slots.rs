//! Replication slots (/docs/current/warm-standby.html#STREAMING-REPLICATION-SLOTS).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use kornak_cluster::Lsn;

use super::files::ConfigureError;
use super::os::{as_user, make_private_dir, write_file};
use super::place::remove_tree;
use super::sql::{Sql, SqlError, ask, literal};
use super::{Postgres, Upstream};
use crate::ha::slots::Found;

const LIST: &str = "
SELECT coalesce(json_agg(json_build_object('name', slot_name, 'physical', slot_type = 'physical',
  'plugin', plugin, 'database', database, 'active', active, 'temporary', temporary,
  'holds_xmin', coalesce(xmin::text, catalog_xmin::text) IS NOT NULL,
  'lost', coalesce(wal_status = 'lost', false),
  'failover', coalesce((to_jsonb(s)->>'failover')::bool OR (to_jsonb(s)->>'synced')::bool, false),
  'synced', coalesce((to_jsonb(s)->>'synced')::bool, false),
  'restart', restart_lsn - '0/0', 'confirmed', confirmed_flush_lsn - '0/0')
  ORDER BY slot_name), '[]'::json)
FROM pg_replication_slots AS s";

pub(super) async fn list(sql: &Sql) -> Result<Vec<Found>, SqlError> {
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

impl Postgres {
    /// Creates a logical slot on a primary; no error if there is one. It waits for transactions that
    /// run.
    pub async fn create_logical_slot(
        &self,
        name: &str,
        database: &str,
        plugin: &str,
    ) -> Result<(), SqlError> {
        let client = self.connect_local_to(database).await?;
        let statement = format!(
            "SELECT pg_create_logical_replication_slot({name}, {plugin}) \
             WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = {name})",
            name = literal(name),
            plugin = literal(plugin)
        );
        ask(&client, "create a logical slot", &statement).await.map(|_| ())
    }

    /// Moves a logical slot forward; it can only be done from its own database.
    pub async fn advance_logical_slot(
        &self,
        name: &str,
        database: &str,
        to: Lsn,
    ) -> Result<(), SqlError> {
        let client = self.connect_local_to(database).await?;
        let statement = format!(
            "SELECT pg_replication_slot_advance(slot_name, '{to}'::pg_lsn) FROM pg_replication_slots \
             WHERE slot_name = {} AND NOT active AND confirmed_flush_lsn < '{to}'::pg_lsn",
            literal(name)
        );
        match ask(&client, "advance a logical slot", &statement).await {
            Err(error) if error.code() != Some("55006") => Err(error),
            _ => Ok(()),
        }
    }

    async fn connect_local_to(&self, database: &str) -> Result<tokio_postgres::Client, SqlError> {
        self.local_login("slots").to(database).connect().await
    }

    /// State files of the leader's logical slots: the only form in which a standby of PostgreSQL before
    /// 17 can have them. Failover slots are PostgreSQL's own to copy.
    pub async fn logical_slot_states(
        &self,
        leader: &Upstream,
        names: &[String],
    ) -> Result<BTreeMap<String, Vec<u8>>, SqlError> {
        const OPERATION: &str = "read the state of its logical slots";
        let settings = self.settings();
        let client =
            self.connect_to(&leader.host, leader.port, &settings.database, "slots").await?;
        let names: Vec<String> = names.iter().map(|name| literal(name)).collect();
        let statement = format!(
            "SELECT slot_name, encode(pg_read_binary_file('pg_replslot/' || slot_name || '/state'), \
             'hex') FROM pg_replication_slots AS s WHERE NOT pg_is_in_recovery() \
             AND slot_type = 'logical' AND NOT temporary AND slot_name IN ({}) \
             AND NOT coalesce((to_jsonb(s)->>'failover')::bool, false)",
            names.join(", ")
        );
        let rows = ask(&client, OPERATION, &statement).await?;
        let state = |row: Vec<Option<String>>| {
            let mut columns = row.into_iter();
            let name = columns.next()??;
            Some((name, from_hex(&columns.next()??)?))
        };
        let states = rows.into_iter().map(state).collect::<Option<_>>();
        states.ok_or(SqlError::Answer { operation: OPERATION })
    }

    /// Puts such files in place. The server must not run.
    pub fn write_logical_slots(
        &self,
        states: &BTreeMap<String, Vec<u8>>,
    ) -> Result<(), ConfigureError> {
        let slots = self.data_dir().join("pg_replslot");
        for (name, state) in states {
            let path = slots.join(name);
            self.write_logical_slot(&path, state)
                .map_err(|source| ConfigureError::Write { path, source })?;
        }
        let synced = File::open(&slots).and_then(|dir| dir.sync_all());
        synced.map_err(|source| ConfigureError::Write { path: slots, source })
    }

    fn write_logical_slot(&self, path: &Path, state: &[u8]) -> io::Result<()> {
        as_user(self.os_user(), || {
            // PostgreSQL removes what is called so when it starts: a crash here leaves nothing behind.
            let new = path.with_extension("tmp");
            remove_tree(&new)?;
            remove_tree(path)?;
            make_private_dir(&new, None)?;
            write_file(&new.join("state"), state, 0o600, None)?;
            fs::rename(&new, path)
        })
    }
}

pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| u8::try_from(c.to_digit(16)?).ok()).collect();
    let pairs = digits?;
    pairs.chunks(2).map(|pair| Some((pair.first()? << 4) | pair.get(1)?)).collect()
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
    fn hexadecimal_digits_are_bytes() {
        assert_eq!(from_hex("00ff1a"), Some(vec![0, 255, 26]));
        assert_eq!(from_hex("0"), None);
        assert_eq!(from_hex("zz"), None);
    }

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
