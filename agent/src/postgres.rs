//! The hands on the local PostgreSQL server: one module for each of its tools.
//!
//! Everything here does what it is told, and says in a typed error what came in between; nothing here
//! knows who ought to be primary. Each operation may be repeated: done twice is the same as done once.
//! The postmaster is started, signalled and promoted through the [guard](crate::guard) alone, so that
//! none of it can happen after the deadline.
//!
//! `process` starts, stops, promotes and reconfigures; `sql` and `status` ask; `controldata` reads what
//! a stopped server left; `initdb`, `basebackup` and `rewind` make a data directory what it should be;
//! `conf` is the text of the configuration, `files` its place on disk.
//!
//! PostgreSQL 13 or later: before that a standby could not change its primary without a restart.

mod archive;
mod basebackup;
mod callbacks;
mod citus;
mod claim;
mod conf;
mod controldata;
mod encryption;
mod files;
mod guc;
mod initdb;
mod log;
mod marker;
mod os;
mod place;
mod process;
mod replay;
mod rewind;
mod rewinding;
mod script;
mod slots;
mod source;
mod sql;
mod status;
mod stop;
mod tool;
mod vetting;
mod wal_end;
mod words;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kornak_cluster::slots::{PermanentSlot, SlotKind};
use kornak_cluster::{ClusterConfig, Lsn, Moment};
use kornak_config::agent::PostgresqlSettings;
use parking_lot::Mutex;
use tokio_postgres::Client;

use crate::guard::{GuardClient, GuardConfig, GuardError, boottime_now};
use crate::ha::slots::Found;

pub use basebackup::CloneError;
pub use callbacks::{CallbackAction, Callbacks};
pub use claim::Unfinished;
pub use conf::{Parameters, join_conninfo, value_text as parameter_text};
pub use controldata::{ControlData, ControlState, ParseControlDataError, shutdown_checkpoint_end};
pub use files::ConfigureError;
pub(crate) use files::DYNAMIC;
pub use initdb::BootstrapError;
pub use os::OsUser;
pub use process::{PendingRestart, PromoteError, Promoted, ServerProcess, StartAs, StartError};
pub use replay::ReplayError;
pub use rewind::{
    Authority, HistoryLine, LeaderPosition, LocalEnd, RewindError, RewindNeed, parse_history,
    rewind_need,
};
pub use script::ScriptError;
pub use slots::slot_name_of;
pub use source::SourceError;
pub use sql::{APPLICATION_PREFIX, Login, Sql, SqlError, TextRow, ask, identifier, literal};
pub use status::{Activity, Backend, Receiver, ReplicationRow, ServerStatus, Startup};
pub use stop::{StopError, StopMode, Stopped};
pub use tool::{Told, ToolError, split_words};
pub use vetting::refused_parameters;
pub use words::Ended;

/// `pg_controldata` reads one page.
const CONTROLDATA_LIMIT: Duration = Duration::from_secs(10);

/// A server to replicate from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    pub host: String,
    pub port: u16,
    /// Our slot there; `None`: without one.
    pub slot: Option<String>,
    /// Parameters of recovery that go with it; they win over `recovery_conf`.
    pub recovery: Parameters,
    /// The name of our replication there; `None`: the member's, by which a cluster knows its own standbys.
    pub application: Option<String>,
}

impl Upstream {
    /// Another member.
    pub fn new(host: impl Into<String>, port: u16, slot: Option<String>) -> Self {
        Self { host: host.into(), port, slot, recovery: Parameters::new(), application: None }
    }

    /// Nobody: the log comes from an archive.
    pub fn archive(recovery: Parameters) -> Self {
        Self { host: String::new(), port: 0, slot: None, recovery, application: None }
    }

    /// Whether there is a server to connect to.
    pub fn is_server(&self) -> bool {
        !self.host.is_empty()
    }
}

/// The facts about the server that are known before anything runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// The member's name: `application_name` of its replication.
    pub name: String,
    /// Patroni's `scope`: `cluster_name`.
    pub cluster_name: String,
    pub settings: PostgresqlSettings,
    /// A node of a Citus cluster.
    pub citus: bool,
    /// OS user for PostgreSQL's programs if we are root.
    pub os_user: String,
    pub guard: GuardConfig,
    /// How long a primary that somebody else has started may run before the store has been heard.
    pub first_ttl: Duration,
}

/// The state of a data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataDirState {
    Missing,
    /// Also: what was begun here and not finished, and can only be begun anew.
    Empty,
    /// The first server of a cluster, which is being made or was when an agent died.
    Begun,
    /// A cluster of this major version.
    Cluster {
        version: u32,
    },
    /// The directory holds something that is no cluster, or may be an incomplete one: never
    /// touched.
    Foreign {
        why: String,
    },
}

/// The OS user is unknown.
#[derive(Debug, thiserror::Error)]
#[error("find the account {name} that servers run as: create it or set kornak.os_user")]
pub struct SetupError {
    pub name: String,
    #[source]
    pub source: io::Error,
}

/// `pg_controldata` failed or was not understood.
#[derive(Debug, thiserror::Error)]
pub enum ControlDataError {
    #[error("read the control file")]
    Tool(#[from] ToolError),
    #[error("read the control file")]
    Parse(#[from] ParseControlDataError),
}

/// The local server. Clones share it.
#[derive(Debug, Clone)]
pub struct Postgres {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    cluster_name: String,
    settings: PostgresqlSettings,
    citus: bool,
    user: Option<OsUser>,
    guard_config: GuardConfig,
    guard: tokio::sync::Mutex<Option<GuardClient>>,
    heartbeat: Sql,
    /// The configuration that the store and the caller want.
    wanted: Mutex<Wanted>,
    /// One writer of configuration files at a time.
    writing: tokio::sync::Mutex<()>,
    verdicts: Mutex<vetting::Verdicts>,
    /// When `synchronous_standby_names` was last changed by us.
    names_changed_at: Mutex<Moment>,
    /// pg_rewind, from where it cannot be stopped without harm.
    rewinding_task: Mutex<Option<tokio::task::AbortHandle>>,
    begun: Mutex<words::Begun>,
    first_ttl: Duration,
    /// A primary that somebody else has started runs, and no lease has been proven for it yet.
    adopted: AtomicBool,
}

/// The part of the configuration that changes.
#[derive(Debug, Clone, Default)]
struct Wanted {
    /// The store's configuration as it stands there.
    raw: String,
    /// `postgresql.parameters` of the store.
    dynamic: Parameters,
    dynamic_hba: Option<Vec<String>>,
    dynamic_ident: Option<Vec<String>>,
    /// `postgresql.recovery_conf` of the store; the node's own wins.
    dynamic_recovery: Parameters,
    /// Logical slots are kept on standbys, which must keep the primary from vacuuming what they need.
    feedback: bool,
    /// Win over everything else that stands in the file.
    overrides: Parameters,
    /// `None`: not decided since this process began; the file keeps what it says.
    synchronous_standby_names: Option<String>,
    upstream: Following,
    /// Where a recovery to a point in time ends and what it reads; empty but for such a start.
    recovery: Parameters,
    /// The program that made the data directory has left such parameters in `postgresql.auto.conf`.
    keeps_recovery: bool,
}

/// The server that a standby's files name as its primary.
#[derive(Debug, Clone, Default)]
enum Following {
    /// Not decided since this process began; the file keeps what it says.
    #[default]
    Undecided,
    /// A standby without a primary.
    Nobody,
    Server(Upstream),
}

impl Following {
    fn of(upstream: Option<&Upstream>) -> Self {
        upstream.map_or(Self::Nobody, |upstream| Self::Server(upstream.clone()))
    }

    fn server(&self) -> Option<&Upstream> {
        match self {
            Self::Undecided | Self::Nobody => None,
            Self::Server(upstream) => Some(upstream),
        }
    }
}

impl Postgres {
    /// Touches nothing yet.
    pub fn new(options: Options) -> Result<Self, SetupError> {
        let Options { name, cluster_name, settings, citus, os_user, guard, first_ttl } = options;
        let user = OsUser::to_become(&os_user)
            .map_err(|source| SetupError { name: os_user.clone(), source })?;
        let heartbeat = Sql::new(&settings, "heartbeat");
        let inner = Inner {
            name,
            cluster_name,
            settings,
            citus,
            user,
            guard_config: guard,
            guard: tokio::sync::Mutex::new(None),
            heartbeat,
            wanted: Mutex::default(),
            writing: tokio::sync::Mutex::new(()),
            verdicts: Mutex::default(),
            names_changed_at: Mutex::default(),
            rewinding_task: Mutex::default(),
            begun: Mutex::default(),
            first_ttl,
            adopted: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The settings of the node's own file.
    pub fn settings(&self) -> &PostgresqlSettings {
        &self.inner.settings
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.inner.settings.data_dir
    }

    /// Whom PostgreSQL's programs run as; `None`: as ourselves.
    pub fn os_user(&self) -> Option<&OsUser> {
        self.inner.user.as_ref()
    }

    /// The guard of the data directory. Connects or starts it when there is no connection; a server
    /// that runs without a guard is adopted.
    pub async fn guard(&self) -> Result<GuardClient, GuardError> {
        let mut current = self.inner.guard.lock().await;
        if let Some(guard) = current.as_ref().filter(|guard| !guard.is_lost()) {
            return Ok(guard.clone());
        }
        let dir = &self.inner.guard_config.runtime_dir;
        let failed = |source| GuardError::RuntimeDir { dir: dir.clone(), source };
        self.inner.prepare_place().map_err(failed)?;
        let guard = GuardClient::connect_or_start(&self.inner.guard_config).await?;
        let status = guard.status().await?;
        if status.postmaster.is_none()
            && status.left > 0
            && let Err(error) = self.adopt(&guard).await
        {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "running server could not be adopted");
        }
        *current = Some(guard.clone());
        Ok(guard)
    }

    /// Holds a server that somebody else has started. If it is a primary, the guard stops it unless a lease
    /// is proven in time: whoever started it has asked nobody. False: none is named in its lock file.
    pub(super) async fn adopt(&self, guard: &GuardClient) -> Result<bool, GuardError> {
        let Some(pid) = self.pid_in_lock_file() else { return Ok(false) };
        // It may be a file of a server that is long gone; then the guard refuses.
        guard.adopt(pid).await?;
        let primary = !self.is_signalled_as_standby();
        tracing::info!(pid, primary, "adopted a server that ran without a guard");
        if primary {
            self.inner.adopted.store(true, Ordering::Relaxed);
            guard.arm(boottime_now() + self.inner.first_ttl).await?;
        }
        Ok(true)
    }

    /// A primary that somebody else has started waits for its lease to be proven.
    pub fn has_adopted_a_primary(&self) -> bool {
        self.inner.adopted.load(Ordering::Relaxed)
    }

    /// Forgets the adopted server: its lease is proven, or the server is gone.
    pub fn forget_adoption(&self) {
        self.inner.adopted.store(false, Ordering::Relaxed);
    }

    /// First line of `postmaster.pid`.
    fn pid_in_lock_file(&self) -> Option<u32> {
        let text = fs::read_to_string(self.data_dir().join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse().ok()
    }

    /// Whether the server is, or will start as, a standby.
    pub fn is_signalled_as_standby(&self) -> bool {
        self.inner.has_standby_signal()
    }

    /// The control data: of a stopped server, its state; of a running one, its last checkpoint.
    pub async fn controldata(&self) -> Result<ControlData, ControlDataError> {
        let mut command = self.tool("pg_controldata");
        command.arg("-D").arg(self.data_dir());
        Ok(ControlData::parse(&tool::run(&mut command, CONTROLDATA_LIMIT).await?)?)
    }

    /// The server of `postgres --version`, as `server_version_num`: 150020.
    pub async fn program_version(&self) -> Result<Option<u32>, ToolError> {
        let mut command = self.tool("postgres");
        let text = tool::run(command.arg("--version"), CONTROLDATA_LIMIT).await?;
        Ok(parse_version(&text))
    }

    /// One question, one answer: see [`ServerStatus`].
    pub async fn status(&self) -> Result<ServerStatus, SqlError> {
        status::status(&self.inner.heartbeat).await
    }

    /// The end of the log that lies in `pg_wal`, as far as it is complete from `from` on, which is the end of a record.
    /// `None`: there is no log at that position. Not for a server that writes or receives.
    pub async fn wal_end(&self, from: Lsn) -> io::Result<Option<Lsn>> {
        let dir = self.data_dir().join("pg_wal");
        let read = tokio::task::spawn_blocking(move || wal_end::wal_end(&dir, from));
        read.await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// The sessions that work in the server.
    pub async fn activity(&self) -> Result<Activity, SqlError> {
        status::activity(&self.inner.heartbeat).await
    }

    /// The lasting superuser connection, for questions of others' making.
    pub fn sql(&self) -> &Sql {
        &self.inner.heartbeat
    }

    /// Writes a checkpoint, however long it takes.
    pub async fn checkpoint(&self) -> Result<(), SqlError> {
        let client = self.inner.heartbeat.connect_patiently().await?;
        ask(&client, "write a checkpoint", "CHECKPOINT").await.map(drop)
    }

    /// Ends walsenders, but for those of `keep`, so that a shutdown need not wait for them. Returns how
    /// many.
    pub async fn terminate_walsenders_except(&self, keep: &[&str]) -> Result<u32, SqlError> {
        let keep: Vec<String> = keep.iter().map(|name| literal(name)).collect();
        let statement = format!(
            "SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_replication \
             WHERE application_name <> ALL (ARRAY[{}]::text[]) OFFSET 0) AS ended",
            keep.join(", ")
        );
        let count = self.inner.heartbeat.value("end walsenders", &statement).await?;
        Ok(count.and_then(|count| count.parse().ok()).unwrap_or_default())
    }

    /// Ends client backends that are in a transaction, but ours. Returns how many.
    pub async fn terminate_busy(&self) -> Result<u32, SqlError> {
        let count = self
            .inner
            .heartbeat
            .value(
                "end transactions",
                "SELECT count(*) FROM (SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() \
                 AND state IS DISTINCT FROM 'idle' AND application_name NOT LIKE 'Kornak %' \
                 OFFSET 0) AS ended",
            )
            .await?;
        Ok(count.and_then(|count| count.parse().ok()).unwrap_or_default())
    }

    /// All slots.
    pub async fn slots(&self) -> Result<Vec<Found>, SqlError> {
        slots::list(&self.inner.heartbeat).await
    }

    /// Creates a physical slot that keeps the log from now on; no error if there is one.
    pub async fn create_physical_slot(&self, name: &str) -> Result<(), SqlError> {
        slots::create_physical(&self.inner.heartbeat, name).await
    }

    /// False: the slot is in use. No error if there is none.
    pub async fn drop_slot(&self, name: &str) -> Result<bool, SqlError> {
        slots::drop(&self.inner.heartbeat, name).await
    }

    /// Moves a slot forward to `to`, unless it is in use or there already.
    pub async fn advance_slot(&self, name: &str, to: Lsn) -> Result<(), SqlError> {
        slots::advance(&self.inner.heartbeat, name, to).await
    }

    /// Logs in to another member's server as the superuser, with a name that begins with
    /// [`APPLICATION_PREFIX`].
    pub async fn connect_to(
        &self,
        host: &str,
        port: u16,
        database: &str,
        application: &str,
    ) -> Result<Client, SqlError> {
        let superuser = &self.inner.settings.superuser;
        sql::remote_login(host, port, database, superuser, application).connect().await
    }

    /// Asks any server whether it is in recovery, and for its system identifier.
    pub async fn recovery_of(
        &self,
        host: &str,
        port: u16,
    ) -> Result<(Option<bool>, Option<String>), SqlError> {
        let database = &self.inner.settings.database;
        let client = self.connect_to(host, port, database, "look").await?;
        let statement = "SELECT pg_is_in_recovery(), system_identifier FROM pg_control_system()";
        let rows = ask(&client, "say whether it is a primary", statement).await?;
        let mut row = rows.into_iter().next().unwrap_or_default().into_iter();
        let in_recovery = row.next().flatten().map(|recovers| recovers == "t");
        Ok((in_recovery, row.next().flatten()))
    }

    /// Logs in to a database of the local server as the superuser, for what may take as long as it
    /// wants.
    pub async fn connect_to_database(
        &self,
        database: &str,
        application: &str,
    ) -> Result<Client, SqlError> {
        let settings = &self.inner.settings;
        let login = sql::local_login(settings, &settings.superuser, application);
        login.to(database).patiently().connect().await
    }

    /// How to log in to the local server as the superuser.
    pub fn local_login(&self, application: &str) -> Login {
        let settings = &self.inner.settings;
        sql::local_login(settings, &settings.superuser, application)
    }

    /// The store's configuration, in force at the next [`Postgres::start`], [`Postgres::follow`] or
    /// [`Postgres::reload`].
    pub fn set_dynamic(&self, config: &ClusterConfig) {
        let lines = |name: &str| {
            let value = config.postgresql()?.get(name)?.as_array()?;
            Some(value.iter().filter_map(|line| line.as_str().map(str::to_owned)).collect())
        };
        let mut wanted = self.inner.wanted.lock();
        wanted.raw = serde_json::Value::Object(config.raw.clone()).to_string();
        wanted.dynamic = conf::parameters(config.parameters());
        if self.inner.citus {
            let settings = &self.inner.settings;
            let local = conf::parameters(Some(&settings.parameters));
            let here = sql::local_host(settings);
            wanted.overrides = citus::adjust(&mut wanted.dynamic, &local, &here);
        }
        let recovery = config.postgresql().and_then(|section| section.get("recovery_conf"));
        wanted.dynamic_recovery = conf::parameters(recovery.and_then(|map| map.as_object()));
        let logical = |slot: &PermanentSlot| slot.kind != SlotKind::Physical;
        wanted.feedback = config.permanent_slots().iter().any(logical);
        wanted.dynamic_hba = lines("pg_hba");
        wanted.dynamic_ident = lines("pg_ident");
    }

    /// Puts the store's configuration into the data directory, if there is one. Blocks.
    pub fn show_dynamic(&self) {
        let _writing = self.inner.writing.blocking_lock();
        let raw = self.inner.wanted.lock().raw.clone();
        if self.holds_cluster() {
            self.inner.show_dynamic(&raw);
        }
    }

    /// When [`Postgres::set_synchronous_standby_names`] last ended, whatever came of it: a look that began before may
    /// show names that are not in force any more.
    pub fn names_changed_at(&self) -> Moment {
        *self.inner.names_changed_at.lock()
    }

    /// Whether commits wait until standbys have replayed them (`synchronous_commit`).
    pub fn commits_wait_for_replay(&self) -> bool {
        let local = conf::parameters(Some(&self.inner.settings.parameters));
        let wanted = self.inner.wanted.lock();
        let filed = conf::filed(&wanted.dynamic, &local, &wanted.overrides);
        filed
            .get("synchronous_commit")
            .is_some_and(|mode| mode.eq_ignore_ascii_case("remote_apply"))
    }

    /// One of PostgreSQL's programs, to be run as the OS user.
    fn tool(&self, name: &str) -> tokio::process::Command {
        tool::command(self.inner.settings.program(name), self.inner.user.as_ref())
    }
}

/// `postgres (PostgreSQL) 15.20 (Debian …)`.
fn parse_version(text: &str) -> Option<u32> {
    let number = text.split_whitespace().nth(2)?;
    let digits = |part: &str| {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part.get(..end)?.parse::<u32>().ok()
    };
    let (major, minor) = number.split_once('.').unwrap_or((number, "0"));
    Some(digits(major)? * 10_000 + digits(minor).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn the_programs_version_is_a_number() {
        for (text, version) in [
            ("postgres (PostgreSQL) 15.20 (Debian 15.20-1)", Some(150_020)),
            ("postgres (PostgreSQL) 19devel", Some(190_000)),
            ("postgres", None),
        ] {
            assert_eq!(parse_version(text), version);
        }
    }
}
