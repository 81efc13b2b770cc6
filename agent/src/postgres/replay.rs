//! Replay that waits for greater parameters: since version 14 a standby whose primary was started with, say, more
//! `max_connections` stops replaying until it is started anew, and cannot be promoted before.

use tracing::info;

use super::controldata::ControlData;
use super::sql::SqlError;
use super::{ControlDataError, Postgres};

/// Why a standby that waits was not told to end.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("the server")]
    Sql(#[from] SqlError),
    #[error("the control file")]
    ControlData(#[from] ControlDataError),
}

/// In the order of [`needed`].
const RUNNING: &str = "SELECT current_setting('max_connections'), current_setting('max_worker_processes'), \
    current_setting('max_wal_senders'), current_setting('max_prepared_transactions'), \
    current_setting('max_locks_per_transaction')";

/// The settings that the primary runs with, by the log that was replayed last.
fn needed(control: &ControlData) -> [u32; 5] {
    [
        control.max_connections,
        control.max_worker_processes,
        control.max_wal_senders,
        control.max_prepared_transactions,
        control.max_locks_per_transaction,
    ]
}

fn is_too_small(running: &[Option<String>], needed: [u32; 5]) -> bool {
    let number = |value: &Option<String>| value.as_deref()?.parse::<u32>().ok();
    running.iter().zip(needed).any(|(value, least)| number(value).is_some_and(|has| has < least))
}

impl Postgres {
    /// Lets a standby end that has stopped replaying because its parameters are too small; the next start gives it
    /// what it needs. `Ok(false)`: somebody else has paused it, and may go on.
    pub async fn end_for_parameters(&self) -> Result<bool, ReplayError> {
        let needed = needed(&self.controldata().await?);
        let rows = self.sql().query("tell its parameters", RUNNING).await?;
        if !rows.first().is_some_and(|row| is_too_small(row, needed)) {
            return Ok(false);
        }
        info!("standby restarts with the primary's greater parameters");
        self.resume_replay().await?;
        Ok(true)
    }

    /// Ends a pause of replay.
    pub async fn resume_replay(&self) -> Result<(), SqlError> {
        self.sql().query("go on with recovery", "SELECT pg_wal_replay_resume()").await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_parameter_below_the_primarys_is_enough() {
        let row = |values: [&str; 5]| values.map(|value| Some(value.to_owned())).to_vec();
        let running = row(["60", "8", "10", "0", "64"]);
        assert!(is_too_small(&running, [100, 8, 10, 0, 64]));
        assert!(is_too_small(&running, [60, 8, 10, 0, 65]));
        assert!(!is_too_small(&running, [60, 8, 10, 0, 64]));
        assert!(!is_too_small(&running, [50, 8, 5, 0, 64]));
    }
}
