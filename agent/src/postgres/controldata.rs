//! Reads the output of `pg_controldata` about a data directory (/docs/current/app-pgcontroldata.html).
//!
//! Not here: running it; see [`super::Postgres::controldata`].

use std::collections::HashMap;

use kornak_cluster::{Lsn, Timeline};

/// "Database cluster state".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlState {
    StartingUp,
    /// A primary that was stopped with a shutdown checkpoint.
    ShutDown,
    /// A standby that was stopped.
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    /// A standby; running, or it has crashed.
    InArchiveRecovery,
    /// A primary; running, or it has crashed.
    InProduction,
    Unrecognized,
}

impl ControlState {
    fn parse(text: &str) -> Self {
        match text {
            "starting up" => Self::StartingUp,
            "shut down" => Self::ShutDown,
            "shut down in recovery" => Self::ShutDownInRecovery,
            "shutting down" => Self::ShuttingDown,
            "in crash recovery" => Self::InCrashRecovery,
            "in archive recovery" => Self::InArchiveRecovery,
            "in production" => Self::InProduction,
            _ => Self::Unrecognized,
        }
    }

    /// A server that does not run has ended without a crash.
    pub fn is_clean(self) -> bool {
        matches!(self, Self::ShutDown | Self::ShutDownInRecovery)
    }

    /// Whether the server was certainly not writable when it last ran: the server writes `in production` before it
    /// takes its first commit (`StartupXLOG`).
    pub fn is_recovery(self) -> bool {
        matches!(self, Self::InArchiveRecovery | Self::ShutDownInRecovery)
    }

    /// Whether the server was writable when it last ran.
    pub fn was_primary(self) -> bool {
        matches!(
            self,
            Self::ShutDown | Self::ShuttingDown | Self::InCrashRecovery | Self::InProduction
        )
    }
}

/// The control file of a data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlData {
    pub system_identifier: u64,
    pub state: ControlState,
    /// Where the record of the latest checkpoint begins.
    pub checkpoint: Lsn,
    /// Where recovery would begin.
    pub redo: Lsn,
    pub timeline: Timeline,
    /// A standby is not consistent before this; zero if it was primary.
    pub minimum_recovery_end: Lsn,
    pub minimum_recovery_timeline: Timeline,
    pub wal_segment_bytes: u64,
    pub checksums: bool,
    pub wal_log_hints: bool,
    /// The primary's values, which a standby's must not be below.
    pub max_connections: u32,
    pub max_worker_processes: u32,
    pub max_wal_senders: u32,
    pub max_prepared_transactions: u32,
    pub max_locks_per_transaction: u32,
}

/// The output was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pg_controldata does not say {0:?} in a way that is understood")]
pub struct ParseControlDataError(pub &'static str);

impl ControlData {
    /// Reads the output of `pg_controldata` with `LC_ALL=C`, of PostgreSQL 12 or later.
    pub fn parse(text: &str) -> Result<Self, ParseControlDataError> {
        let fields: HashMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.trim(), value.trim()))
            .collect();
        let field =
            |name: &'static str| fields.get(name).copied().ok_or(ParseControlDataError(name));
        let lsn =
            |name: &'static str| field(name)?.parse().map_err(|_| ParseControlDataError(name));
        let number = |name: &'static str| {
            field(name)?.parse::<u64>().map_err(|_| ParseControlDataError(name))
        };
        let small = |name: &'static str| {
            field(name)?.parse::<u32>().map_err(|_| ParseControlDataError(name))
        };
        Ok(Self {
            system_identifier: number("Database system identifier")?,
            state: ControlState::parse(field("Database cluster state")?),
            checkpoint: lsn("Latest checkpoint location")?,
            redo: lsn("Latest checkpoint's REDO location")?,
            timeline: Timeline(small("Latest checkpoint's TimeLineID")?),
            minimum_recovery_end: lsn("Minimum recovery ending location")?,
            minimum_recovery_timeline: Timeline(small("Min recovery ending loc's timeline")?),
            wal_segment_bytes: number("Bytes per WAL segment")?,
            checksums: number("Data page checksum version")? > 0,
            wal_log_hints: field("wal_log_hints setting")? == "on",
            max_connections: small("max_connections setting")?,
            max_worker_processes: small("max_worker_processes setting")?,
            max_wal_senders: small("max_wal_senders setting")?,
            max_prepared_transactions: small("max_prepared_xacts setting")?,
            max_locks_per_transaction: small("max_locks_per_xact setting")?,
        })
    }

    /// Where the log of a cleanly stopped primary ends: just after its shutdown checkpoint.
    pub fn shutdown_end(&self) -> Option<Lsn> {
        (self.state == ControlState::ShutDown)
            .then(|| shutdown_checkpoint_end(self.checkpoint, self.wal_segment_bytes))
    }
}

const PAGE_BYTES: u64 = 8192;
/// `XLogPageHeaderData`, at the start of each page.
const PAGE_HEADER_BYTES: u64 = 24;
/// `XLogLongPageHeaderData`, at the start of each segment.
const SEGMENT_HEADER_BYTES: u64 = 40;
/// Record header 24, data header 2, `CheckPoint` 88 (PostgreSQL 12 to 18), aligned to 8.
const CHECKPOINT_RECORD_BYTES: u64 = 120;

/// Where a checkpoint record that begins at `location` ends (`src/include/access/xlogrecord.h`,
/// `xlog_internal.h`). A standby that has received this has all that a stopped primary wrote.
pub fn shutdown_checkpoint_end(location: Lsn, wal_segment_bytes: u64) -> Lsn {
    let room = PAGE_BYTES - location.0 % PAGE_BYTES;
    if CHECKPOINT_RECORD_BYTES <= room {
        return Lsn(location.0.saturating_add(CHECKPOINT_RECORD_BYTES));
    }
    let page = location.0.saturating_add(room);
    let new_segment = page.checked_rem(wal_segment_bytes) == Some(0);
    let header = if new_segment { SEGMENT_HEADER_BYTES } else { PAGE_HEADER_BYTES };
    Lsn(page.saturating_add(header + CHECKPOINT_RECORD_BYTES - room))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
pg_control version number:            1300
Catalog version number:               202209061
Database system identifier:           7301234567890123456
Database cluster state:               shut down
pg_control last modified:             Mon Nov 23 01:12:39 2026
Latest checkpoint location:           0/3000028
Latest checkpoint's REDO location:    0/3000028
Latest checkpoint's REDO WAL file:    000000020000000000000003
Latest checkpoint's TimeLineID:       2
Latest checkpoint's PrevTimeLineID:   2
Minimum recovery ending location:     0/0
Min recovery ending loc's timeline:   0
wal_level setting:                    replica
wal_log_hints setting:                on
max_connections setting:              100
max_worker_processes setting:         8
max_wal_senders setting:              10
max_prepared_xacts setting:           0
max_locks_per_xact setting:           64
track_commit_timestamp setting:       off
Database block size:                  8192
Bytes per WAL segment:                16777216
Data page checksum version:           0
";

    #[test]
    fn a_stopped_primary_is_understood() {
        let control = ControlData::parse(OUTPUT).expect("complete");
        assert_eq!(control.system_identifier, 7_301_234_567_890_123_456);
        assert_eq!(control.state, ControlState::ShutDown);
        assert_eq!(control.timeline, Timeline(2));
        assert_eq!(control.checkpoint, Lsn(0x0300_0028));
        assert!(control.wal_log_hints && !control.checksums);
        assert_eq!((control.max_connections, control.max_wal_senders), (100, 10));
        assert_eq!(control.shutdown_end(), Some(Lsn(0x0300_00A0)));
    }

    #[test]
    fn a_missing_line_is_named() {
        let text = OUTPUT.replace("Bytes per WAL segment", "Octets");
        assert_eq!(ControlData::parse(&text), Err(ParseControlDataError("Bytes per WAL segment")));
    }

    #[test]
    fn states_say_what_the_server_was() {
        for (text, clean, primary) in [
            ("shut down", true, true),
            ("shut down in recovery", true, false),
            ("in production", false, true),
            ("in archive recovery", false, false),
            ("in crash recovery", false, true),
            ("shutting down", false, true),
            ("starting up", false, false),
            ("hovering", false, false),
        ] {
            let state = ControlState::parse(text);
            assert_eq!((state.is_clean(), state.was_primary()), (clean, primary), "{text}");
        }
    }

    #[test]
    fn only_recovery_proves_that_nothing_was_written() {
        let never_writable = |text| ControlState::parse(text).is_recovery();
        assert!(never_writable("in archive recovery") && never_writable("shut down in recovery"));
        for text in ["in production", "shut down", "in crash recovery", "starting up", "hovering"] {
            assert!(!never_writable(text), "{text}");
        }
    }

    #[test]
    fn the_shutdown_checkpoint_may_cross_a_page_or_a_segment() {
        const SEGMENT: u64 = 16 << 20;
        for (location, end) in [
            (0x0300_0028, 0x0300_00A0),
            // It fills its page to the last byte.
            (0x0300_1F88, 0x0300_2000),
            // 112 bytes fit, 8 follow the next page's header.
            (0x0300_1F90, 0x0300_2000 + 24 + 8),
            (0x0300_1FF8, 0x0300_2000 + 24 + 112),
            (0x03FF_FFF8, 0x0400_0000 + 40 + 112),
        ] {
            assert_eq!(shutdown_checkpoint_end(Lsn(location), SEGMENT), Lsn(end), "{location:X}");
        }
    }
}
