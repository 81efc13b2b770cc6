//! Keeps the facts about the server fresh: one look at a time, made when something may have changed
//! (the postmaster ended, a step finished, somebody asks) and at the latest after a second.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{Lsn, Moment};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::guard::{Guard, Watched};
use crate::ha::sync::{InForce, Sample, Walsender};
use crate::ha::{Control, DataDir, PrimaryFacts, Server, SlotUse, StandbyFacts, StandbyRow};
use crate::machine::{Machine, Task};
use crate::postgres::{
    DataDirState, ReplicationRow, ServerProcess, ServerStatus, SqlError, slot_name_of,
};
use crate::server::Server as LocalServer;

/// Between two looks when nothing happens.
const EVERY: Duration = Duration::from_secs(1);

/// Between two looks while something is coming up.
const EVERY_WHILE_CHANGING: Duration = Duration::from_millis(100);

/// A standby that takes longer to reach the end of its own log than this is not waited for: the end is read from its
/// files.
const READ_AFTER: Duration = Duration::from_millis(500);

/// The result of a look at the server.
#[derive(Debug, Clone)]
pub struct Observation {
    pub at: Moment,
    pub server: Server,
    pub data: DataDir,
    /// The whole answer of a server that runs.
    pub status: Option<Arc<ServerStatus>>,
    /// How far a standby has come since its start.
    recovery: Option<Recovery>,
    /// How far a primary's synchronous standbys have come into force.
    in_force: Option<InForce>,
}

/// A standby's way from its start to the end of its own log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Recovery {
    /// Process that replays, and when it began.
    startup: (u32, String),
    since: Moment,
    /// The standby has been at the end of its own log, so that nothing is on disk that it does not
    /// tell.
    at_the_end: bool,
    /// Where that end is, read from the files: a server that replays late tells it only much later.
    end: Option<Lsn>,
}

impl Recovery {
    /// Adds one more look. `None`: the process that replays does not show.
    fn next(before: Option<&Self>, status: &ServerStatus, now: Moment) -> Option<Self> {
        let startup = status.startup.as_ref()?;
        let id = (startup.pid, startup.began.clone());
        let known = before.filter(|known| known.startup == id);
        Some(Self {
            since: known.map_or(now, |known| known.since),
            at_the_end: known.is_some_and(|known| known.at_the_end)
                || status.has_streamed
                || startup.is_at_the_end(),
            end: known.and_then(|known| known.end),
            startup: id,
        })
    }

    fn is_over(&self) -> bool {
        self.at_the_end || self.end.is_some()
    }
}

impl Observation {
    /// Before the first look.
    pub fn none() -> Self {
        Self {
            at: Moment::default(),
            server: Server::Starting { since: Moment::default() },
            data: DataDir::Empty,
            status: None,
            recovery: None,
            in_force: None,
        }
    }
}

/// Looks until `stop`.
pub async fn run(
    machine: Machine,
    server: Arc<dyn LocalServer>,
    guard: Arc<dyn Guard>,
    look: Arc<Notify>,
    seen: watch::Sender<Arc<Observation>>,
    stop: CancellationToken,
) {
    let mut process = guard.watch();
    let mut disk = Disk::default();
    let mut reading: Option<Reading> = None;
    loop {
        process.borrow_and_update();
        let mut before = Observation::clone(&seen.borrow());
        if let Some(read) = reading.take_if(|reading| reading.end.is_finished()) {
            read.note(&mut before).await;
        }
        let now = observe(&machine, &server, &before, &mut disk).await;
        if reading.is_none() {
            reading = Reading::begin(&machine, &server, &now);
        }
        let pause = match &now.server {
            Server::Standby(facts) if !facts.wal_known => EVERY_WHILE_CHANGING,
            // Logging in takes its toll of a server that refuses it.
            Server::Standby(_) | Server::Primary(_) | Server::Closed { .. } => EVERY,
            Server::Stopped if before.server == Server::Stopped => EVERY,
            _ => EVERY_WHILE_CHANGING,
        };
        seen.send_replace(Arc::new(now));
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = look.notified() => {}
            changed = process.changed() => if changed.is_err() || *process.borrow() == Watched::Lost {
                // The agent starts anew; until then there is nothing to look through.
                stop.cancelled().await;
                return;
            },
            () = machine.sleep(pause) => {}
        }
    }
}

/// The end of a standby's own log, being read from its files.
struct Reading {
    startup: (u32, String),
    end: Task<std::io::Result<Option<Lsn>>>,
}

impl Reading {
    /// If the standby takes its time. Once for each start: the end is where it was.
    fn begin(
        machine: &Machine,
        postgres: &Arc<dyn LocalServer>,
        now: &Observation,
    ) -> Option<Self> {
        let Server::Standby(facts) = &now.server else { return None };
        let recovery = now.recovery.as_ref().filter(|recovery| !recovery.is_over())?;
        if now.at.since(recovery.since) < READ_AFTER {
            return None;
        }
        let (postgres, from) = (Arc::clone(postgres), facts.replayed);
        let end = machine.spawn(async move { postgres.wal_end(from).await });
        Some(Self { startup: recovery.startup.clone(), end })
    }

    async fn note(self, before: &mut Observation) {
        let Some(recovery) = before.recovery.as_mut().filter(|it| it.startup == self.startup)
        else {
            return;
        };
        match self.end.await {
            Ok(Ok(Some(end))) => {
                info!(%end, "end of the standby's log read from its files, because it replays late");
                recovery.end = Some(end);
            }
            Ok(Ok(None)) => debug!("standby's log is not where it replays"),
            Ok(Err(error)) => {
                warn!(error = &error as &dyn std::error::Error, "standby's log could not be read");
            }
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "reading the standby's log ended unexpectedly"
            ),
        }
    }
}

async fn observe(
    machine: &Machine,
    postgres: &Arc<dyn LocalServer>,
    before: &Observation,
    disk: &mut Disk,
) -> Observation {
    let at = machine.now();
    let (server, status) = look(postgres, before, at).await;
    let data = match (&server, &before.data) {
        // The control file of a running server tells nothing that the server does not.
        (Server::Standby(_) | Server::Primary(_), known @ DataDir::Initialized(_)) => known.clone(),
        _ => match (data_dir(machine, postgres, disk).await, &status) {
            // A server that answers has read it.
            (DataDir::Foreign { .. }, Some(status)) => told_by(status),
            (seen, _) => seen,
        },
    };
    let in_recovery = status.as_ref().filter(|status| status.in_recovery);
    let recovery = match in_recovery {
        Some(status) => Recovery::next(before.recovery.as_ref(), status, at),
        // A server that gives no answer is still the same one.
        None if matches!(server, Server::Silent { .. } | Server::Closed { .. }) => {
            before.recovery.clone()
        }
        None => None,
    };
    let in_force = match (&server, &status) {
        (Server::Primary(_), Some(status)) => {
            let look = sample(status, postgres.names_changed_at(), at);
            Some(InForce::next(before.in_force.as_ref(), &look))
        }
        (Server::Silent { .. } | Server::Closed { .. }, _) => before.in_force.clone(),
        _ => None,
    };
    let mut server = server;
    if let Server::Primary(facts) = &mut server {
        facts.sync_names_since = in_force.as_ref().and_then(InForce::since);
    }
    if let (Server::Standby(facts), Some(recovery)) = (&mut server, &recovery) {
        facts.wal_known = recovery.is_over();
        facts.received = facts.received.max(recovery.end.unwrap_or_default());
    }
    Observation { at, server, data, status, recovery, in_force }
}

/// Whether commits may be let go by this walsender. One without a priority goes by names that leave it out, and
/// does nothing for those who wait (`SyncRepReleaseWaiters`).
fn counts(row: &ReplicationRow) -> bool {
    row.sync_priority.is_some_and(|priority| priority > 0)
}

/// The part of a look at a primary that tells of the synchronous standbys in force.
fn sample(status: &ServerStatus, changed_at: Moment, at: Moment) -> Sample<'_> {
    let walsender = |row: &ReplicationRow| Walsender {
        pid: row.pid,
        sent: row.sent_lsn.unwrap_or_default(),
        waits: row.wait_event.as_deref() == Some("WalSenderMain"),
    };
    Sample {
        at,
        names: &status.synchronous_standby_names,
        changed_at,
        lsn: status.position(),
        walsenders: status.replication.iter().filter(|row| counts(row)).map(walsender).collect(),
        checkpointer_waits: matches!(
            status.checkpointer_wait.as_deref(),
            Some("CheckpointerMain" | "CheckpointWriteDelay")
        ),
    }
}

async fn look(
    postgres: &Arc<dyn LocalServer>,
    before: &Observation,
    now: Moment,
) -> (Server, Option<Arc<ServerStatus>>) {
    match postgres.process().await {
        Ok(ServerProcess::None) => (Server::Stopped, None),
        Ok(ServerProcess::Remains { .. }) => (Server::Leftovers, None),
        Ok(ServerProcess::Running { .. }) => match postgres.status().await {
            Ok(status) => {
                let waits_for_replay = postgres.commits_wait_for_replay();
                (facts(&status, before, waits_for_replay, now), Some(Arc::new(status)))
            }
            Err(SqlError::Refused | SqlError::StartingUp) => {
                (Server::Starting { since: since(&before.server, now) }, None)
            }
            Err(SqlError::ShuttingDown) => {
                (Server::Stopping { since: since(&before.server, now) }, None)
            }
            Err(error) if error.is_an_answer() => {
                if !matches!(before.server, Server::Closed { .. }) {
                    let error = &error as &dyn std::error::Error;
                    // Time does not mend it; it waits for a person.
                    warn!(error, "server refuses the agent's login");
                }
                (Server::Closed { since: since(&before.server, now) }, None)
            }
            Err(error) => {
                if !matches!(before.server, Server::Silent { .. }) {
                    let error = &error as &dyn std::error::Error;
                    debug!(error, "server gives no answer");
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
        Server::Starting { since }
        | Server::Silent { since }
        | Server::Stopping { since }
        | Server::Closed { since }
            if *since > Moment::default() =>
        {
            *since
        }
        _ => now,
    }
}

/// For a disk to say what lies in the data directory.
const DISK_LIMIT: Duration = Duration::from_secs(5);

/// A look at a disk that may hang. It has a thread of its own; while one hangs, no other is begun.
#[derive(Debug, Default)]
struct Disk(Option<Task<std::io::Result<DataDirState>>>);

impl Disk {
    /// `None`: it has not answered in time.
    async fn look(
        &mut self,
        machine: &Machine,
        postgres: &Arc<dyn LocalServer>,
    ) -> Option<std::io::Result<DataDirState>> {
        let begin = || {
            let postgres = Arc::clone(postgres);
            machine.spawn_blocking(move || postgres.data_dir_state())
        };
        let look = self.0.get_or_insert_with(begin);
        let outcome = machine.timeout(DISK_LIMIT, look).await.ok()?;
        self.0 = None;
        Some(outcome.unwrap_or_else(|panic| Err(std::io::Error::other(panic))))
    }
}

async fn data_dir(machine: &Machine, postgres: &Arc<dyn LocalServer>, disk: &mut Disk) -> DataDir {
    let unusable = |error: &dyn std::error::Error| DataDir::Foreign {
        reason: kornak_cluster::error_chain(error),
    };
    match disk.look(machine, postgres).await {
        None => DataDir::Foreign { reason: "the disk does not answer".to_owned() },
        Some(Ok(DataDirState::Missing | DataDirState::Empty)) => DataDir::Empty,
        Some(Ok(DataDirState::Foreign { why })) => DataDir::Foreign { reason: why },
        Some(Ok(state @ (DataDirState::Cluster { .. } | DataDirState::Begun))) => match postgres
            .controldata()
            .await
        {
            Ok(control) => {
                let control = Control {
                    timeline: control.timeline,
                    clean: control.state.is_clean(),
                    was_primary: control.state.was_primary(),
                    standby_signal: postgres.is_signalled_as_standby(),
                    system_identifier: control.system_identifier.to_string(),
                };
                match state {
                    DataDirState::Begun => DataDir::Begun { control, filling: !postgres.goes_on() },
                    _ => DataDir::Initialized(control),
                }
            }
            Err(error) => unusable(&error),
        },
        Some(Err(error)) => unusable(&error),
    }
}

fn told_by(status: &ServerStatus) -> DataDir {
    DataDir::Initialized(Control {
        system_identifier: status.system_identifier.clone(),
        timeline: status.timeline,
        clean: false,
        was_primary: !status.in_recovery,
        standby_signal: status.in_recovery,
    })
}

fn facts(
    status: &ServerStatus,
    before: &Observation,
    waits_for_replay: bool,
    now: Moment,
) -> Server {
    if status.in_recovery {
        let waited = match &before.server {
            Server::Standby(facts) => facts.not_streaming_since.unwrap_or(now),
            _ => now,
        };
        return Server::Standby(StandbyFacts {
            timeline: status.timeline,
            received: status.received_lsn.unwrap_or_default(),
            replayed: status.replayed_lsn.unwrap_or_default(),
            wal_known: false,
            streaming: status.is_streaming(),
            upstream: upstream(&status.primary_conninfo),
            not_streaming_since: (!status.is_streaming()).then_some(waited),
        });
    }
    let mut standbys = standbys(status, waits_for_replay);
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
        // Known when the looks before this one are considered.
        sync_names_since: None,
    })
}

/// The standbys that replicate from this server; one look alone does not tell which one is silent.
pub(crate) fn standbys(status: &ServerStatus, waits_for_replay: bool) -> Vec<StandbyRow> {
    let row = |row: &ReplicationRow| {
        let flush = row.flush_lsn.unwrap_or_default();
        let members = slot_name_of(&row.application_name);
        StandbyRow {
            application_name: row.application_name.clone(),
            streaming: row.state.as_deref() == Some("streaming"),
            synchronous: matches!(row.sync_state.as_deref(), Some("sync" | "quorum")),
            flush,
            acknowledged: if waits_for_replay { row.replay_lsn.unwrap_or_default() } else { flush },
            slot: match &row.slot {
                Some(slot) if *slot == members => SlotUse::Held,
                _ if status.slots.contains(&members) => SlotUse::NotHeld,
                _ => SlotUse::Absent,
            },
            silent: Duration::ZERO,
        }
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
    use super::{ReplicationRow, counts, upstream};

    #[test]
    fn a_walsender_without_a_place_among_its_names_counts_for_nothing() {
        let row = |priority| ReplicationRow {
            pid: 7,
            user: None,
            application_name: "b".to_owned(),
            client_addr: None,
            state: Some("streaming".to_owned()),
            sync_state: None,
            sync_priority: priority,
            sent_lsn: None,
            write_lsn: None,
            flush_lsn: None,
            replay_lsn: None,
            slot: None,
            wait_event: None,
        };
        for (priority, expected) in [(None, false), (Some(0), false), (Some(1), true)] {
            assert_eq!(counts(&row(priority)), expected, "{priority:?}");
        }
    }

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
