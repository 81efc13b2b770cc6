//! Keeps the facts about the server fresh: one look at a time, made when something may have changed
//! (the postmaster ended, a step finished, somebody asks) and at the latest after a second.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::Moment;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::guard::{GuardClient, Watched, boottime_now};
use crate::ha::{Control, DataDir, PrimaryFacts, Server, StandbyFacts, StandbyRow};
use crate::postgres::{
    DataDirState, Postgres, ReplicationRow, ServerProcess, ServerStatus, SqlError,
};

/// Between two looks when nothing happens.
const EVERY: Duration = Duration::from_secs(1);

/// Between two looks while something is coming up.
const EVERY_WHILE_CHANGING: Duration = Duration::from_millis(100);

/// What a look at the server showed.
#[derive(Debug, Clone)]
pub struct Observation {
    pub at: Moment,
    pub server: Server,
    pub data: DataDir,
    /// The whole answer of a server that runs.
    pub status: Option<Arc<ServerStatus>>,
}

impl Observation {
    /// Before the first look.
    pub fn none() -> Self {
        Self {
            at: Moment::default(),
            server: Server::Starting { since: Moment::default() },
            data: DataDir::Empty,
            status: None,
        }
    }
}

/// Looks until `stop`.
pub async fn run(
    postgres: Postgres,
    guard: GuardClient,
    look: Arc<Notify>,
    seen: watch::Sender<Arc<Observation>>,
    stop: CancellationToken,
) {
    let mut process = guard.watch();
    loop {
        process.borrow_and_update();
        let before = Arc::clone(&seen.borrow());
        let now = observe(&postgres, &before).await;
        let pause = match now.server {
            Server::Standby(_) | Server::Primary(_) => EVERY,
            Server::Stopped if before.server == Server::Stopped => EVERY,
            _ => EVERY_WHILE_CHANGING,
        };
        seen.send_replace(Arc::new(now));
        tokio::select! {
            () = stop.cancelled() => return,
            () = look.notified() => {}
            changed = process.changed() => if changed.is_err() || *process.borrow() == Watched::Lost {
                // The agent starts anew; until then there is nothing to look through.
                stop.cancelled().await;
                return;
            },
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn observe(postgres: &Postgres, before: &Observation) -> Observation {
    let at = boottime_now();
    let (server, status) = look(postgres, before, at).await;
    let data = match (&server, &before.data) {
        // The control file of a running server tells nothing that the server does not.
        (Server::Standby(_) | Server::Primary(_), known @ DataDir::Initialized(_)) => known.clone(),
        _ => data_dir(postgres).await,
    };
    Observation { at, server, data, status }
}

async fn look(
    postgres: &Postgres,
    before: &Observation,
    now: Moment,
) -> (Server, Option<Arc<ServerStatus>>) {
    match postgres.process().await {
        Ok(ServerProcess::None) => (Server::Stopped, None),
        Ok(ServerProcess::Remains { .. }) => (Server::Leftovers, None),
        Ok(ServerProcess::Running { .. }) => match postgres.status().await {
            Ok(status) => (facts(&status, before, now), Some(Arc::new(status))),
            Err(SqlError::Refused | SqlError::StartingUp) => {
                (Server::Starting { since: since(&before.server, now) }, None)
            }
            Err(error) => {
                let told = matches!(before.server, Server::Silent { .. });
                let error_text = &error as &dyn std::error::Error;
                match &error {
                    // Time mends the others; this one waits for a person.
                    SqlError::Login(_) if !told => {
                        warn!(error = error_text, "the server does not let the agent in");
                    }
                    _ if !told => debug!(error = error_text, "the server gives no answer"),
                    _ => {}
                }
                (Server::Silent { since: since(&before.server, now) }, None)
            }
        },
        // The guard is lost; so is what it would have said.
        Err(_) => (Server::Silent { since: since(&before.server, now) }, None),
    }
}

fn since(before: &Server, now: Moment) -> Moment {
    match before {
        Server::Starting { since } | Server::Silent { since } if *since > Moment::default() => {
            *since
        }
        _ => now,
    }
}

async fn data_dir(postgres: &Postgres) -> DataDir {
    match postgres.data_dir_state() {
        Ok(DataDirState::Missing | DataDirState::Empty) => DataDir::Empty,
        Ok(DataDirState::Foreign) => DataDir::Foreign {
            reason: "it holds files, and no complete PostgreSQL cluster".to_owned(),
        },
        Ok(DataDirState::Cluster { .. }) => match postgres.controldata().await {
            Ok(control) => DataDir::Initialized(Control {
                timeline: control.timeline,
                clean: control.state.is_clean(),
                was_primary: control.state.was_primary(),
                system_identifier: control.system_identifier.to_string(),
            }),
            Err(error) => DataDir::Foreign { reason: error.to_string() },
        },
        Err(error) => DataDir::Foreign { reason: error.to_string() },
    }
}

fn facts(status: &ServerStatus, before: &Observation, now: Moment) -> Server {
    if status.in_recovery {
        let waited = match &before.server {
            Server::Standby(facts) => facts.not_streaming_since.unwrap_or(now),
            _ => now,
        };
        return Server::Standby(StandbyFacts {
            timeline: status.timeline,
            received: status.received_lsn.unwrap_or_default(),
            replayed: status.replayed_lsn.unwrap_or_default(),
            streaming: status.is_streaming(),
            upstream: upstream(&status.primary_conninfo),
            not_streaming_since: (!status.is_streaming()).then_some(waited),
        });
    }
    let sync_names_since = match &before.server {
        Server::Primary(facts) if facts.sync_names == status.synchronous_standby_names => {
            facts.sync_names_since
        }
        _ => status.position(),
    };
    let mut standbys = standbys(status);
    if let Server::Primary(known) = &before.server {
        let ago = now.since(before.at);
        for row in &mut standbys {
            row.silent = row.silence(known, ago);
        }
    }
    Server::Primary(PrimaryFacts {
        timeline: status.timeline,
        lsn: status.position(),
        standbys,
        sync_names: status.synchronous_standby_names.clone(),
        sync_names_since,
    })
}

/// Who replicates from this server; one look alone does not tell who is silent.
pub(crate) fn standbys(status: &ServerStatus) -> Vec<StandbyRow> {
    let row = |row: &ReplicationRow| StandbyRow {
        application_name: row.application_name.clone(),
        streaming: row.state.as_deref() == Some("streaming"),
        synchronous: matches!(row.sync_state.as_deref(), Some("sync" | "quorum")),
        flush: row.flush_lsn.unwrap_or_default(),
        silent: Duration::ZERO,
    };
    status.replication.iter().map(row).collect()
}

/// Host and port of a `primary_conninfo` that Kornak or Patroni wrote; `None` if it names no host.
fn upstream(conninfo: &str) -> Option<(String, u16)> {
    let word = |name: &str| {
        conninfo.split_whitespace().find_map(|word| {
            let value = word.strip_prefix(name)?.strip_prefix('=')?;
            Some(value.trim_matches('\'').to_owned())
        })
    };
    let host = word("host").filter(|host| !host.is_empty())?;
    let port = word("port").and_then(|port| port.parse().ok()).unwrap_or(5432);
    Some((host, port))
}

#[cfg(test)]
mod tests {
    use super::upstream;

    #[test]
    fn the_upstream_is_read_from_what_is_in_force() {
        for (conninfo, expected) in [
            ("host=127.0.0.1 port=5433 user=r", Some(("127.0.0.1".to_owned(), 5433))),
            ("user='r' host='db1' port='5432'", Some(("db1".to_owned(), 5432))),
            ("host=db1", Some(("db1".to_owned(), 5432))),
            ("", None),
            ("user=r application_name=host", None),
        ] {
            assert_eq!(upstream(conninfo), expected, "{conninfo}");
        }
    }
}
