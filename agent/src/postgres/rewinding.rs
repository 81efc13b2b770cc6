//! The surroundings of pg_rewind: whether it runs, its end by force, and the log that its result needs.

use tracing::{debug, info};

use super::sql::{self, SqlError, ask};
use super::{Postgres, Upstream};

impl Postgres {
    /// pg_rewind is at work and must not be disturbed.
    pub fn is_rewinding(&self) -> bool {
        self.inner.rewinding_task.lock().as_ref().is_some_and(|task| !task.is_finished())
    }

    /// Ends pg_rewind, for whoever replaces the data directory.
    pub fn give_up_rewind(&self) {
        if let Some(task) = self.inner.rewinding_task.lock().take() {
            task.abort();
        }
    }

    /// Lets the leader write its log up to where pg_rewind has seen the end. pg_rewind demands the log up to the
    /// leader's *insert* position before the server counts as consistent. On a leader where nobody writes, a part of
    /// that may stay in memory, and right after a change of the WAL segment it is the header of a page that does not
    /// exist yet: the server would let nobody in before somebody writes something. A transaction id that is taken
    /// makes the leader's WAL writer do it; nothing else changes.
    pub(super) async fn have_log_written(&self, leader: &Upstream) {
        match self.take_transaction_id(leader).await {
            Ok(()) => debug!("leader was asked to write its log to the end"),
            // The server becomes consistent with the next transaction of anybody.
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                info!(error, "leader could not be asked to write its log to the end");
            }
        }
    }

    async fn take_transaction_id(&self, leader: &Upstream) -> Result<(), SqlError> {
        let settings = self.settings();
        let (host, port, database) = (&leader.host, leader.port, &settings.database);
        let login = sql::remote_login(host, port, database, settings.rewind(), "rewind");
        let client = login.connect().await?;
        let statement = "SELECT CASE WHEN NOT pg_is_in_recovery() THEN txid_current() END";
        ask(&client, "take a transaction id", statement).await.map(drop)
    }
}
