//! The last word of a primary to its archive.
//!
//! A server that archives closes a segment before its shutdown checkpoint, and that record alone begins the
//! next one, which nobody archives. Who lives on the archive would take the log over without the record and, once
//! promoted, have left its former primary behind with something that nobody else has.

use std::fs;
use std::path::Path;
use std::time::Duration;

use kornak_cluster::{Lsn, Timeline};
use tracing::{info, warn};

use super::os;
use super::tool::{self, ToolError};
use super::{ControlDataError, Postgres, SqlError};

/// Why the archive was not given the last segment.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("look at the data directory")]
    Look(#[from] ControlDataError),
    #[error("the control file does not say where its last checkpoint is")]
    NoSegment,
    #[error("run archive_command")]
    Tool(#[from] ToolError),
}

impl Postgres {
    /// The command by which the server that runs archives. `None`: it does not, or not by a command.
    pub async fn archive_command(&self) -> Result<Option<String>, SqlError> {
        let question = "SELECT nullif(current_setting('archive_command'), '') \
             WHERE current_setting('archive_mode') <> 'off' \
             AND coalesce(current_setting('archive_library', true), '') = ''";
        self.sql().value("read how it archives", question).await
    }

    /// Removes what was restored of the histories of later timelines than the leader's, which does not run there.
    /// A file that cannot be removed keeps the server from starting, and the server's log says so.
    pub fn forget_timelines_after(&self, leaders: Timeline) {
        let Ok(entries) = fs::read_dir(self.data_dir().join("pg_wal")) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let timeline = name.to_str().and_then(|name| name.strip_suffix(".history"));
            let timeline = timeline.and_then(|number| u32::from_str_radix(number, 16).ok());
            if timeline.is_some_and(|timeline| timeline > leaders.0) {
                if let Err(error) = os::remove_file(&entry.path(), self.os_user()) {
                    let error = &error as &dyn std::error::Error;
                    warn!(error, file = ?name, "history of a timeline could not be removed");
                    continue;
                }
                warn!(file = ?name, "history of a timeline that nobody is on removed");
            }
        }
    }

    /// Archives the segment in which the shutdown checkpoint of a server lies that does not run any more.
    pub async fn archive_shutdown(
        &self,
        template: &str,
        limit: Duration,
    ) -> Result<(), ArchiveError> {
        let control = self.controldata().await?;
        let place = wal_file(control.timeline, control.checkpoint, control.wal_segment_bytes);
        let (segment, _) = place.ok_or(ArchiveError::NoSegment)?;
        let dir = self.data_dir();
        let mut shell = tool::command("/bin/sh", self.os_user());
        shell.arg("-c").arg(filled_in(template, &segment)).current_dir(dir);
        tool::run(&mut shell, limit).await?;
        info!(segment, "WAL segment of the shutdown checkpoint archived");
        Ok(())
    }
}

/// Name of the file that holds a position, and the offset in it.
pub(super) fn wal_file(timeline: Timeline, lsn: Lsn, segment_bytes: u64) -> Option<(String, u64)> {
    let segment = lsn.0.checked_div(segment_bytes)?;
    let per_log = 0x1_0000_0000_u64.checked_div(segment_bytes)?;
    let (high, low) = (segment.checked_div(per_log)?, segment.checked_rem(per_log)?);
    let offset = lsn.0.checked_rem(segment_bytes)?;
    Some((format!("{:08X}{high:08X}{low:08X}", timeline.0), offset))
}

/// The command as the server would run it (`src/backend/archive/shell_archive.c`): `%p`, `%f` and
/// `%%`, anything else as it is.
fn filled_in(template: &str, segment: &str) -> String {
    let path = Path::new("pg_wal").join(segment);
    let mut command = String::new();
    let mut rest = template.chars();
    while let Some(c) = rest.next() {
        let next = rest.as_str().chars().next();
        match (c, next) {
            ('%', Some('p')) => command.push_str(&path.to_string_lossy()),
            ('%', Some('f')) => command.push_str(segment),
            ('%', Some('%')) => command.push('%'),
            _ => {
                command.push(c);
                continue;
            }
        }
        rest.next();
    }
    command
}

#[cfg(test)]
mod tests {
    use super::filled_in;

    #[test]
    fn an_archive_command_is_filled_in_as_the_server_does() {
        let table = [
            ("cp %p /a/%f", "cp pg_wal/S /a/S"),
            ("date +%%s; cp %p%f", "date +%s; cp pg_wal/SS"),
            ("echo %r %", "echo %r %"),
            ("ö%%%p", "ö%pg_wal/S"),
        ];
        for (template, command) in table {
            assert_eq!(filled_in(template, "S"), command, "{template}");
        }
    }
}
