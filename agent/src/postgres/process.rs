//! Starting, stopping, promoting and reconfiguring the server.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use kornak_cluster::{Moment, Timeline};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use super::conf::{self, Parameters};
use super::files::ConfigureError;
use super::guc::Kind;
use super::marker::Step;
use super::sql::{SqlError, literal};
use super::tool::ToolError;
use super::words::Begun;
use super::{Following, Postgres, Unfinished, Upstream};
use crate::guard::{
    Exit, Fencing, GuardClient, GuardError, ServerSignal, StartRequest, Watched, boottime_now,
};

/// Between two questions during a promotion: of the time that clients wait, it is the part we add.
const PROMOTION_LOOK: Duration = Duration::from_millis(5);
/// A promotion that is not over by then is asked for again: the startup process may sleep.
const PROMOTION_REMINDER: Duration = Duration::from_millis(100);
/// Between two looks at a server that starts or reads its configuration.
const LOOK: Duration = Duration::from_millis(20);
/// TLS handshakes that fail for longer than this with a server that starts fail for a reason that a person has to mend.
const HANDSHAKES_FAIL: Duration = Duration::from_secs(5);
/// Standbys are asked so often for what they have, [`LOOK`] between: walsenders read the configuration within
/// milliseconds, and a standby that is behind reports without being asked.
const ASKED_AT_MOST: u32 = 20;
/// The postmaster reads its files at once, backends between two commands.
const RELOAD_LIMIT: Duration = Duration::from_secs(3);
/// Between two lines about a recovery that takes long.
const RECOVERY_TOLD: Duration = Duration::from_secs(60);

/// The role that a server is started in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartAs {
    /// Writable at once, or when crash recovery is over.
    Primary(Fencing),
    /// Replicates, or waits for a primary.
    Standby(Option<Upstream>),
    /// Replays an archive up to a point and becomes a primary there. The parameters say from where
    /// and how far; `None`: whoever made the data directory has said so in it.
    PointInTime(Fencing, Option<Parameters>),
}

/// Why the server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("configure the server")]
    Configure(#[from] ConfigureError),
    #[error("start the server")]
    Guard(#[from] GuardError),
    /// A tool works on the data directory.
    #[error("see that nobody else works on the data directory")]
    Busy(#[from] ToolError),
    /// The data directory is neither the old nor the new one.
    #[error("a {0:?} of the data directory was not finished: reinitialize this member")]
    Unfinished(Unfinished),
    /// Not even its configuration is written there.
    #[error("{dir} holds no server that could be started")]
    NoData { dir: PathBuf },
    /// The server ended before it took connections.
    #[error("the server ended with {exit} as it started; its log, {log}, says: {said}")]
    Exited { exit: Exit, log: PathBuf, said: String },
    /// The server is still starting, perhaps replaying its log.
    #[error("the server does not yet take connections after {0:?}")]
    NotReady(Duration),
    /// Nobody may log in.
    #[error("ask the server whether it is ready")]
    Sql(#[source] SqlError),
}

/// A promotion that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promoted {
    /// From the request until the server was seen writable.
    pub elapsed: Duration,
    pub timeline: Timeline,
}

/// Why the server is not proven writable.
#[derive(Debug, thiserror::Error)]
pub enum PromoteError {
    /// Also: the deadline has come.
    #[error("promote the server")]
    Guard(#[from] GuardError),
    #[error("see whether the server is promoted")]
    Sql(#[from] SqlError),
    #[error("the server is still in recovery {0:?} after it was promoted")]
    StillInRecovery(Duration),
}

/// A parameter that needs a restart to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRestart {
    pub name: String,
    pub old: String,
    pub new: String,
}

/// The remains of a server on the data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerProcess {
    /// No process: proven.
    None,
    /// The postmaster runs.
    Running { pid: u32 },
    /// The postmaster is gone or not ours, and something of it is left.
    Remains { processes: u32 },
}

impl Postgres {
    /// Whether anything runs on the data directory, looked at now.
    pub async fn process(&self) -> Result<ServerProcess, GuardError> {
        let guard = self.guard().await?;
        let mut status = guard.status().await?;
        // An operator, or the system's own unit, has started one meanwhile.
        if status.postmaster.is_none()
            && status.left > 0
            && self.adopt(&guard).await.unwrap_or(false)
        {
            status = guard.status().await?;
        }
        Ok(match (status.postmaster, status.left) {
            (Some(pid), _) => ServerProcess::Running { pid },
            (None, 0) => ServerProcess::None,
            (None, processes) => ServerProcess::Remains { processes },
        })
    }

    /// Writes the configuration and starts the postmaster. Returns its pid as soon as it runs; it may
    /// have to recover before it takes connections: see [`Postgres::wait_ready`].
    ///
    /// A primary must have been armed for, unless [`Fencing::Unfenced`].
    pub async fn start(&self, start_as: &StartAs) -> Result<u32, StartError> {
        self.start_on(start_as, None).await
    }

    /// As [`Postgres::start`], of the first server of a cluster that is being made: nobody else may start it.
    pub async fn start_first(&self, start_as: &StartAs) -> Result<u32, StartError> {
        self.start_on(start_as, Some(Unfinished::Bootstrap)).await
    }

    async fn start_on(
        &self,
        start_as: &StartAs,
        expected: Option<Unfinished>,
    ) -> Result<u32, StartError> {
        let guard = self.guard().await?;
        let (standby, writable) = match start_as {
            StartAs::Primary(fencing) | StartAs::PointInTime(fencing, _) => (false, Some(*fencing)),
            StartAs::Standby(_) => (true, None),
        };
        // Held until the postmaster runs: then its own lock file keeps tools away.
        let claim = self.inner.claim()?;
        if self.unfinished() == Some(Unfinished::Rewind)
            && let Err(error) = self.take_over_rewind(&claim).await
        {
            let error = &error as &dyn std::error::Error;
            warn!(error, "rewind of an earlier agent could not be completed");
        }
        match self.unfinished() {
            unfinished if unfinished == expected => {}
            Some(unfinished) => return Err(StartError::Unfinished(unfinished)),
            None => return Err(StartError::NoData { dir: self.data_dir().to_owned() }),
        }
        if !self.holds_cluster() {
            return Err(StartError::NoData { dir: self.data_dir().to_owned() });
        }
        let args = {
            let _writing = self.inner.writing.lock().await;
            self.prepare_files(start_as)?;
            self.vet(standby).await;
            self.inner.write_configuration(standby)?;
            // Whoever replays a log needs room for what it was written with.
            let replays = standby || matches!(start_as, StartAs::PointInTime(..));
            self.command_line(replays).await
        };
        self.sql().forget().await;
        let log = self.log_file();
        let log_from = fs::metadata(&log).map_or(0, |log| log.len());
        let user = self.os_user();
        let mut env = BTreeMap::new();
        if let Some(user) = user {
            env.insert("HOME".to_owned(), user.home.display().to_string());
            env.insert("USER".to_owned(), user.name.clone());
        }
        let request = StartRequest {
            program: self.settings().program("postgres"),
            args,
            env,
            log,
            uid: user.map(|user| user.uid),
            gid: user.map(|user| user.gid),
            groups: user.map(|user| user.groups.clone()).unwrap_or_default(),
            writable,
        };
        *self.inner.begun.lock() = Begun { log_from, ..Begun::default() };
        let pid = guard.start(request).await?;
        self.inner.begun.lock().pid = Some(pid);
        info!(pid, standby, "server started");
        if expected.is_some() {
            self.step(&claim, Step::Started).await?;
        }
        Ok(pid)
    }

    fn prepare_files(&self, start_as: &StartAs) -> Result<(), ConfigureError> {
        let mut recovery = Parameters::new();
        match start_as {
            StartAs::Primary(_) => self.inner.set_signal_file(None)?,
            StartAs::Standby(upstream) => {
                self.inner.wanted.lock().upstream = Following::of(upstream.as_ref());
                self.inner.set_signal_file(Some("standby.signal"))?;
            }
            StartAs::PointInTime(_, None) => {}
            StartAs::PointInTime(_, Some(given)) => {
                recovery.insert("recovery_target_action".to_owned(), "promote".to_owned());
                recovery.extend(given.clone());
                self.inner.set_signal_file(Some("recovery.signal"))?;
            }
        }
        let mut wanted = self.inner.wanted.lock();
        wanted.recovery = recovery;
        wanted.keeps_recovery = matches!(start_as, StartAs::PointInTime(_, None));
        Ok(())
    }

    /// Arguments of the postmaster.
    async fn command_line(&self, replays: bool) -> Vec<String> {
        let settings = self.settings();
        let mut args = vec![
            "-D".to_owned(),
            settings.data_dir.display().to_string(),
            format!("--config_file={}", self.inner.main_conf().display()),
            format!("--listen_addresses={}", settings.listen.addresses()),
            format!("--port={}", settings.listen.port),
            format!("--cluster_name={}", self.inner.cluster_name),
        ];
        let controlled = self.controlled(replays).await;
        args.extend(controlled.iter().map(|(name, value)| format!("--{name}={value}")));
        args
    }

    /// Parameters of the command line; those of a server that replays a log are not below the ones it was written
    /// with.
    pub(super) async fn controlled(&self, replays: bool) -> Parameters {
        let primary = if replays { self.controldata().await.ok() } else { None };
        let dynamic = self.inner.wanted.lock().dynamic.clone();
        conf::controlled(&self.inner.accepted(dynamic), primary.as_ref())
    }

    /// Waits until the server takes connections, or has ended.
    pub async fn wait_ready(&self, limit: Duration) -> Result<(), StartError> {
        let watch = self.guard().await?.watch();
        let deadline = Instant::now() + limit;
        let mut failing_since = None;
        loop {
            if let Watched::Ending { exit, .. } | Watched::Gone { exit, .. } = *watch.borrow() {
                return Err(self.exited(exit));
            }
            match self.sql().value("answer", "SELECT 1").await {
                Ok(_) => return Ok(()),
                Err(error @ (SqlError::Login(_) | SqlError::Failed { .. })) => {
                    return Err(StartError::Sql(error));
                }
                // A handshake may fail once because the server is busy starting; a certificate stays wrong.
                Err(error @ (SqlError::Encryption(_) | SqlError::Certificates(_))) => {
                    let since = *failing_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > HANDSHAKES_FAIL || Instant::now() >= deadline {
                        return Err(StartError::Sql(error));
                    }
                    sleep(LOOK * 20).await;
                }
                Err(_) if Instant::now() >= deadline => return Err(StartError::NotReady(limit)),
                Err(_) => {
                    failing_since = None;
                    sleep(LOOK).await;
                }
            }
        }
    }

    /// Waits until a recovery to a point in time is over, or the server has ended: as long as it takes.
    pub async fn wait_writable(&self) -> Result<(), StartError> {
        let watch = self.guard().await?.watch();
        let mut told = Instant::now();
        loop {
            match *watch.borrow() {
                Watched::Ending { exit, .. } | Watched::Gone { exit, .. } => {
                    return Err(self.exited(exit));
                }
                Watched::Lost => return Err(StartError::Guard(GuardError::Lost)),
                Watched::Nothing | Watched::Running { .. } => {}
            }
            let answer = self.sql().value(
                "tell whether it recovers",
                "SELECT CASE WHEN pg_is_in_recovery() \
                 THEN coalesce(pg_last_wal_replay_lsn()::text, 'nothing') END",
            );
            match answer.await {
                Ok(None) => return Ok(()),
                Err(error @ SqlError::Login(_)) => return Err(StartError::Sql(error)),
                Ok(Some(replayed)) if told.elapsed() > RECOVERY_TOLD => {
                    told = Instant::now();
                    info!(replayed, "recovery to the requested point in time begun");
                }
                _ => {}
            }
            sleep(LOOK * 5).await;
        }
    }

    /// The recovery that was begun here goes on at the next start; false: it is over.
    pub fn is_recovering(&self) -> bool {
        ["recovery.signal", "standby.signal"].iter().any(|name| self.data_dir().join(name).exists())
    }

    /// Whether the server runs a `restore_command` before it is promoted, several times, and each may take seconds. To
    /// kill it then would leave a timeline in the archive that nobody follows.
    pub async fn asks_an_archive(&self) -> bool {
        let answer = self.sql().value("read a setting", "SHOW restore_command").await;
        !matches!(answer, Ok(Some(command)) if command.is_empty())
    }

    /// Ends recovery and waits until the server is writable. Refused by the guard when the deadline
    /// has come. When this fails otherwise, the promotion may still be under way.
    pub async fn promote(
        &self,
        fencing: Fencing,
        limit: Duration,
    ) -> Result<Promoted, PromoteError> {
        const OPERATION: &str = "tell whether it is in recovery";
        const QUESTION: &str = "SELECT pg_is_in_recovery()";
        let guard = self.guard().await?;
        // Opens the connection, if need be, before anybody waits.
        if self.sql().value(OPERATION, QUESTION).await?.as_deref() == Some("f") {
            return Ok(Promoted {
                elapsed: Duration::ZERO,
                timeline: self.status().await?.timeline,
            });
        }
        let begun = boottime_now();
        guard.promote(fencing).await?;
        let mut reminded = begun;
        loop {
            let answer = self.sql().value(OPERATION, QUESTION).await;
            let now = boottime_now();
            match answer {
                Ok(Some(value)) if value == "f" => {
                    let elapsed = now.since(begun);
                    let timeline = self.status().await?.timeline;
                    info!(elapsed_ms = elapsed.as_millis(), %timeline, "server promoted");
                    return Ok(Promoted { elapsed, timeline });
                }
                Err(error) if now.since(begun) >= limit => return Err(error.into()),
                Ok(_) if now.since(begun) >= limit => {
                    return Err(PromoteError::StillInRecovery(limit));
                }
                // Ended: it will not be promoted.
                Err(error @ SqlError::Refused) => return Err(error.into()),
                Ok(_) | Err(_) => {}
            }
            remind(&guard, &mut reminded, now).await?;
            sleep(PROMOTION_LOOK).await;
        }
    }

    /// Makes a running standby follow another server, without a restart.
    pub async fn follow(&self, upstream: Option<&Upstream>) -> Result<(), ConfigureError> {
        let _writing = self.inner.writing.lock().await;
        self.inner.wanted.lock().upstream = Following::of(upstream);
        self.inner.write_configuration(true)?;
        let written = fs::read_to_string(self.inner.main_conf()).unwrap_or_default();
        let written = conf::read_rendered(&written);
        self.guard().await?.signal(ServerSignal::Reload).await?;
        for parameter in ["primary_conninfo", "primary_slot_name"] {
            let value = written.get(parameter).map_or("", String::as_str);
            self.wait_in_force(parameter, value, RELOAD_LIMIT).await?;
        }
        Ok(())
    }

    /// Puts the wanted configuration in force and says what of it needs a restart.
    pub async fn reload(&self) -> Result<Vec<PendingRestart>, ConfigureError> {
        let before = self.loaded_at().await?;
        {
            let _writing = self.inner.writing.lock().await;
            self.vet(self.inner.has_standby_signal()).await;
            self.inner.write_configuration(self.inner.has_standby_signal())?;
            self.guard().await?.signal(ServerSignal::Reload).await?;
        }
        let deadline = Instant::now() + RELOAD_LIMIT;
        while self.loaded_at().await? == before && Instant::now() < deadline {
            sleep(LOOK).await;
        }
        self.pending_restart().await
    }

    async fn loaded_at(&self) -> Result<Option<String>, SqlError> {
        self.sql().value("tell when it was configured", "SELECT pg_conf_load_time()").await
    }

    /// Parameters that are in force otherwise than they were asked for. A standby that was started with its primary's
    /// larger values waits for a restart as well, as with Patroni.
    pub async fn pending_restart(&self) -> Result<Vec<PendingRestart>, ConfigureError> {
        const OPERATION: &str = "list its parameters";
        let controlled = self.controlled(false).await;
        let names: Vec<String> = controlled.keys().map(|name| literal(name)).collect();
        let statement = format!(
            "SELECT name, setting, pending_restart, vartype, unit FROM pg_settings \
             WHERE pending_restart OR name IN ({})",
            names.join(", ")
        );
        let rows = self.sql().query(OPERATION, &statement).await?;
        let file = fs::read_to_string(self.inner.main_conf()).unwrap_or_default();
        let file = conf::read_rendered(&file);
        let mut pending = Vec::new();
        for row in rows {
            let [Some(name), Some(old), Some(flag), Some(vartype), unit] = row.as_slice() else {
                continue;
            };
            let kind = Kind { vartype, unit: unit.as_deref() };
            let new = match controlled.get(name) {
                Some(new) if kind.same(old, new) => continue,
                Some(new) => new.clone(),
                None if flag == "t" => file.get(name).cloned().unwrap_or_default(),
                None => continue,
            };
            pending.push(PendingRestart { name: name.clone(), old: kind.shown(old), new });
        }
        Ok(pending)
    }

    /// Sets the standbys that must confirm a commit. Returns when the change is in force: commits that
    /// begin later obey it.
    pub async fn set_synchronous_standby_names(
        &self,
        names: &str,
        limit: Duration,
    ) -> Result<(), ConfigureError> {
        let _writing = self.inner.writing.lock().await;
        let changed = self.change_names(names, limit).await;
        *self.inner.names_changed_at.lock() = boottime_now();
        changed?;
        if !names.is_empty() {
            self.ask_for_acknowledgements().await?;
        }
        Ok(())
    }

    async fn change_names(&self, names: &str, limit: Duration) -> Result<(), ConfigureError> {
        self.inner.wanted.lock().synchronous_standby_names = Some(names.to_owned());
        self.inner.write_configuration(self.inner.has_standby_signal())?;
        self.guard().await?.signal(ServerSignal::Reload).await?;
        self.wait_in_force("synchronous_standby_names", names, limit).await
    }

    /// Lets commits go that wait for a standby which does not count any more, if those that do have them. The
    /// server looks only when a standby reports, and a standby that has all it was sent reports every ten seconds
    /// (`wal_receiver_status_interval`); so there is something to flush.
    async fn ask_for_acknowledgements(&self) -> Result<(), SqlError> {
        const OPERATION: &str = "let commits go that have been waiting";
        let began = self.sql().value(OPERATION, "SELECT clock_timestamp()").await?;
        let began = literal(&began.unwrap_or_default());
        // In a transaction of its own, for the end of one is flushed.
        let write = "SELECT pg_logical_emit_message(true, 'kornak', 'acknowledge') \
                     WHERE NOT pg_is_in_recovery()";
        let waiting = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' \
             AND query_start < {began}"
        );
        // More than once, for a walsender may take its report before the reload.
        for _ in 0..ASKED_AT_MOST {
            if self.sql().value(OPERATION, &waiting).await?.as_deref() == Some("0") {
                break;
            }
            self.sql().value(OPERATION, write).await?;
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// As `set_synchronous_standby_names`, for the next start: nothing runs yet.
    pub fn prepare_synchronous_standby_names(&self, names: &str) {
        self.inner.wanted.lock().synchronous_standby_names = Some(names.to_owned());
    }

    /// Waits until our own session, and so the postmaster before it, has read the files.
    async fn wait_in_force(
        &self,
        parameter: &'static str,
        value: &str,
        limit: Duration,
    ) -> Result<(), ConfigureError> {
        let statement = format!("SELECT current_setting({})", literal(parameter));
        let deadline = Instant::now() + limit;
        loop {
            let current = self.sql().value("tell a parameter", &statement).await?;
            if current.as_deref() == Some(value) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(ConfigureError::NotInForce { parameter });
            }
            sleep(PROMOTION_LOOK).await;
        }
    }
}

/// Wakes a startup process that sleeps.
async fn remind(guard: &GuardClient, reminded: &mut Moment, now: Moment) -> Result<(), GuardError> {
    if now.since(*reminded) < PROMOTION_REMINDER {
        return Ok(());
    }
    *reminded = now;
    match guard.signal(ServerSignal::Usr1).await {
        // No postmaster: the next question will tell.
        Err(GuardError::Refused { .. }) => Ok(()),
        outcome => outcome,
    }
}
