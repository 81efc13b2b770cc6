//! The state of the local server, in one question.

use kornak_cluster::{Lsn, Timeline};
use serde::Deserialize;

use super::sql::{Sql, SqlError};

/// A server that answers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ServerStatus {
    /// A standby, or a server that has not finished its recovery.
    pub in_recovery: bool,
    /// Of a primary the one it writes; of a standby the one it receives or has replayed.
    pub timeline: Timeline,
    /// `server_version_num`.
    pub version: u32,
    pub system_identifier: String,
    /// `YYYY-MM-DD HH:MM:SS.ffffff+ZZ:ZZ`.
    pub postmaster_start_time: String,
    /// Primary: the end of the log that is written; `None` on a standby.
    pub write_lsn: Option<Lsn>,
    /// Primary: the end of the log that is on disk.
    pub flush_lsn: Option<Lsn>,
    /// Primary: where the next record will be.
    pub insert_lsn: Option<Lsn>,
    /// Standby: on disk, by streaming. Not below what has been replayed.
    pub received_lsn: Option<Lsn>,
    pub replayed_lsn: Option<Lsn>,
    /// When the last replayed transaction was committed, as `postmaster_start_time`.
    pub replay_timestamp: Option<String>,
    pub replay_paused: bool,
    /// Standby: a stream was asked for since the server's start, which happens when its own log has been read to the
    /// end.
    #[serde(default)]
    pub has_streamed: bool,
    /// Standby: the process that reads the log.
    #[serde(default)]
    pub startup: Option<Startup>,
    /// Standby: state of the WAL receiver; `None`: there is none.
    pub receiver: Option<Receiver>,
    /// Walsenders of this server.
    pub replication: Vec<ReplicationRow>,
    /// Physical slots of this server.
    #[serde(default)]
    pub slots: Vec<String>,
    /// The event that the checkpointer waits for; `None`: it works.
    #[serde(default)]
    pub checkpointer_wait: Option<String>,
    /// In effect, not only in a file.
    pub synchronous_standby_names: String,
    pub primary_conninfo: String,
    pub primary_slot_name: String,
    /// Timeline of the last checkpoint: below `timeline` until the first one after a promotion.
    pub checkpoint_timeline: Timeline,
}

impl ServerStatus {
    /// The log that this server has: written by a primary, received or replayed by a standby.
    pub fn position(&self) -> Lsn {
        if self.in_recovery {
            self.received_lsn.max(self.replayed_lsn).unwrap_or_default()
        } else {
            self.flush_lsn.unwrap_or_default()
        }
    }

    /// The standby receives a stream.
    pub fn is_streaming(&self) -> bool {
        self.receiver.as_ref().is_some_and(|receiver| receiver.status == "streaming")
    }
}

/// The startup process, which replays the log.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Startup {
    pub pid: u32,
    /// When it began; it begins again after a crash of another process of the server.
    pub began: String,
    pub wait_event: Option<String>,
}

impl Startup {
    /// Whether the standby waits for log that is neither here nor in the archive
    /// (/docs/current/monitoring-stats.html#WAIT-EVENT-TABLE).
    pub fn is_at_the_end(&self) -> bool {
        matches!(
            self.wait_event.as_deref(),
            Some("RecoveryWalStream" | "RecoveryRetrieveRetryInterval")
        )
    }

    /// Whether it is between two attempts to get log. It has ended its walreceiver before, and whatever it is told now it
    /// reads before it asks for the next one (`WaitForWALToBecomeAvailable` in PostgreSQL's xlogrecovery.c).
    pub fn pauses(&self) -> bool {
        self.wait_event.as_deref() == Some("RecoveryRetrieveRetryInterval")
    }
}

/// `pg_stat_wal_receiver` (/docs/current/monitoring-stats.html#MONITORING-PG-STAT-WAL-RECEIVER-VIEW).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Receiver {
    pub status: String,
    pub sender_host: Option<String>,
    pub sender_port: Option<u16>,
    pub slot_name: Option<String>,
    pub received_timeline: Option<Timeline>,
    pub written_lsn: Option<Lsn>,
    pub flushed_lsn: Option<Lsn>,
}

/// `pg_stat_replication` (/docs/current/monitoring-stats.html#MONITORING-PG-STAT-REPLICATION-VIEW).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ReplicationRow {
    pub pid: u32,
    pub user: Option<String>,
    pub application_name: String,
    pub client_addr: Option<String>,
    pub state: Option<String>,
    pub sync_state: Option<String>,
    pub sync_priority: Option<u32>,
    pub sent_lsn: Option<Lsn>,
    pub write_lsn: Option<Lsn>,
    pub flush_lsn: Option<Lsn>,
    pub replay_lsn: Option<Lsn>,
    /// The physical slot that it uses.
    #[serde(default)]
    pub slot: Option<String>,
    /// The event that the walsender waits for; `None`: it works.
    #[serde(default)]
    pub wait_event: Option<String>,
}

/// The timeline of a standby without a WAL receiver is that of its newest segment: the control file learns of a
/// timeline that was followed only with the next restartpoint. That is the timeline of IDENTIFY_SYSTEM, or one that
/// the standby has begun to receive.
///
/// Whether it is in recovery is asked once, for the answer may change between two questions; what can
/// only be asked of one kind is asked of the other never.
const STATUS: &str = "
SELECT json_build_object(
 'in_recovery', s.r,
 'timeline', CASE WHEN s.r THEN greatest(w.received_tli, (pg_control_recovery()).min_recovery_end_timeline,
      c.timeline_id, (SELECT max(('x' || substr(f, 1, 8))::bit(32)::int) FROM pg_ls_dir('pg_wal') AS f
       WHERE w.received_tli IS NULL AND f ~ '^[0-9A-F]{24}$'))
    ELSE ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END,
 'version', current_setting('server_version_num')::int,
 'system_identifier', (pg_control_system()).system_identifier::text,
 'postmaster_start_time', to_char(pg_postmaster_start_time(), 'YYYY-MM-DD HH24:MI:SS.USTZH:TZM'),
 'write_lsn', CASE WHEN NOT s.r THEN pg_current_wal_lsn() - '0/0' END,
 'flush_lsn', CASE WHEN NOT s.r THEN pg_current_wal_flush_lsn() - '0/0' END,
 'insert_lsn', CASE WHEN NOT s.r THEN pg_current_wal_insert_lsn() - '0/0' END,
 'received_lsn', CASE WHEN s.r THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0' END,
 'replayed_lsn', CASE WHEN s.r THEN pg_last_wal_replay_lsn() - '0/0' END,
 'replay_timestamp', to_char(pg_last_xact_replay_timestamp(), 'YYYY-MM-DD HH24:MI:SS.USTZH:TZM'),
 'replay_paused', CASE WHEN s.r THEN pg_is_wal_replay_paused() ELSE false END,
 'has_streamed', s.r AND pg_last_wal_receive_lsn() IS NOT NULL,
 'startup', CASE WHEN s.r THEN (SELECT json_build_object('pid', pid, 'began', backend_start::text,
    'wait_event', wait_event) FROM pg_stat_activity WHERE backend_type = 'startup' LIMIT 1) END,
 'receiver', CASE WHEN w.pid IS NOT NULL THEN json_build_object('status', w.status,
    'sender_host', w.sender_host, 'sender_port', w.sender_port, 'slot_name', w.slot_name,
    'received_timeline', w.received_tli, 'written_lsn', w.written_lsn - '0/0',
    'flushed_lsn', w.flushed_lsn - '0/0') END,
 'replication', coalesce((SELECT json_agg(json_build_object('pid', pid, 'user', usename,
    'application_name', application_name, 'client_addr', host(client_addr), 'state', state,
    'sync_state', sync_state, 'sync_priority', sync_priority, 'sent_lsn', sent_lsn - '0/0',
    'write_lsn', write_lsn - '0/0', 'flush_lsn', flush_lsn - '0/0', 'replay_lsn', replay_lsn - '0/0',
    'slot', slot_name, 'wait_event', wait_event) ORDER BY application_name)
   FROM pg_stat_replication
   LEFT JOIN (SELECT slot_name, active_pid FROM pg_replication_slots WHERE slot_type = 'physical') AS t
    ON active_pid = pid
   LEFT JOIN (SELECT pid AS worker, wait_event FROM pg_stat_activity WHERE backend_type = 'walsender') AS a
    ON worker = pid), '[]'::json),
 'slots', coalesce((SELECT json_agg(slot_name) FROM pg_replication_slots WHERE slot_type = 'physical'),
   '[]'::json),
 'checkpointer_wait', (SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'checkpointer' LIMIT 1),
 'synchronous_standby_names', current_setting('synchronous_standby_names'),
 'primary_conninfo', current_setting('primary_conninfo'),
 'primary_slot_name', current_setting('primary_slot_name'),
 'checkpoint_timeline', c.timeline_id)
FROM (SELECT pg_is_in_recovery() AS r OFFSET 0) AS s
CROSS JOIN pg_control_checkpoint() AS c
LEFT JOIN pg_stat_wal_receiver AS w ON true";

/// Asks for everything at once: one round trip. PostgreSQL 13 or later.
pub(super) async fn status(sql: &Sql) -> Result<ServerStatus, SqlError> {
    const OPERATION: &str = "tell its status";
    let outcome = sql.value(OPERATION, STATUS).await;
    let text = match outcome {
        // 55000: it was promoted in the middle of the answer.
        Err(error) if error.code() == Some("55000") => sql.value(OPERATION, STATUS).await?,
        outcome => outcome?,
    };
    parse(&text.unwrap_or_default()).ok_or(SqlError::Answer { operation: OPERATION })
}

fn parse(text: &str) -> Option<ServerStatus> {
    serde_json::from_str(text).ok()
}

/// The sessions in the server, for code that wants to stop it without hurting anybody.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Activity {
    /// Client backends that are not idle, ours left out.
    pub busy: Vec<Backend>,
    /// Transactions that are prepared for a commit in two phases.
    pub prepared_transactions: u32,
}

impl Activity {
    /// Age of the oldest transaction in milliseconds; 0 if there is none.
    pub fn oldest_transaction_ms(&self) -> u64 {
        self.busy.iter().filter_map(|backend| backend.transaction_ms).max().unwrap_or_default()
    }
}

/// One client backend that does something.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Backend {
    pub pid: u32,
    pub database: Option<String>,
    pub user: Option<String>,
    pub application_name: String,
    /// `active`, `idle in transaction` and so on.
    pub state: String,
    /// Age of its transaction; `None`: it is in none.
    pub transaction_ms: Option<u64>,
    /// COPY, VACUUM, building an index: not to be expected to end soon.
    pub works_long: bool,
}

const ACTIVITY: &str = r"
SELECT json_build_object(
 'busy', coalesce((SELECT json_agg(json_build_object('pid', pid, 'database', datname, 'user', usename,
    'application_name', application_name, 'state', coalesce(state, 'unknown'),
    'transaction_ms', greatest(0, extract(epoch FROM clock_timestamp() - xact_start) * 1000)::bigint,
    'works_long', coalesce(state = 'active' AND query ~*
       '^\s*(copy|vacuum|analyze|cluster|reindex|create\s+(unique\s+)?index|refresh|alter\s+table)\M', false))
    ORDER BY xact_start)
   FROM pg_stat_activity
   WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
     AND state IS DISTINCT FROM 'idle' AND (state IS NOT NULL OR xact_start IS NOT NULL)
     AND application_name NOT LIKE 'Kornak %'), '[]'::json),
 'prepared_transactions', (SELECT count(*) FROM pg_prepared_xacts))";

/// Client backends that are in a transaction or about to be in one.
pub(super) async fn activity(sql: &Sql) -> Result<Activity, SqlError> {
    const OPERATION: &str = "tell who works";
    let text = sql.value(OPERATION, ACTIVITY).await?.unwrap_or_default();
    serde_json::from_str(&text).map_err(|_| SqlError::Answer { operation: OPERATION })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standbys_answer_is_understood() {
        let text = r#"{"in_recovery" : true, "timeline" : 2, "version" : 150020,
          "system_identifier" : "7301234567890123456",
          "postmaster_start_time" : "2026-11-23 01:12:39.000001+00:00", "write_lsn" : null,
          "flush_lsn" : null, "insert_lsn" : null, "received_lsn" : 50331808, "replayed_lsn" : 50331648,
          "replay_timestamp" : null, "replay_paused" : false, "receiver" : {"status" : "streaming",
          "sender_host" : "127.0.0.1", "sender_port" : 5432, "slot_name" : "b",
          "received_timeline" : 2, "written_lsn" : 50331808, "flushed_lsn" : 50331808},
          "replication" : [], "synchronous_standby_names" : "", "primary_conninfo" : "host=a",
          "primary_slot_name" : "b", "checkpoint_timeline" : 1}"#;
        let status = parse(text).expect("complete");
        assert_eq!(status.position(), Lsn(50_331_808));
        assert!(status.is_streaming());
        assert!(parse("").is_none());
    }
}
