//! A data directory as the copy of another member's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kornak_config::agent::{InitdbOption, ReplicaMethod};
use serde_json::{Map, Value};
use tracing::{info, warn};

use super::claim::Claim;
use super::conf::{conninfo_words, join_conninfo, value_text};
use super::files::ConfigureError;
use super::initdb::{BootstrapError, empty_dir};
use super::os::make_private_dir;
use super::tool::{self, ToolError, split_words};
use super::{DataDirState, Postgres, Unfinished, Upstream};

/// Nobody knows how large a database is; a copy that hangs must be seen by a person.
const COPY_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// It holds something that was not made here.
    #[error("{dir} is not empty: ask for a reinitialization by name to replace it")]
    NotEmpty { dir: PathBuf },
    #[error("prepare {path}")]
    Prepare {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("write the password file")]
    Configure(#[from] ConfigureError),
    #[error("copy the data directory")]
    Tool(#[from] ToolError),
    /// A custom method's command has a quote that is not closed.
    #[error("create_replica_methods: the command of {method} cannot be split into words")]
    Command { method: String },
    /// A custom method has ended well and left nothing.
    #[error("{method} has left no data directory behind")]
    NothingLeft { method: String },
    /// Only methods that need a running member are configured, and there is none.
    #[error("no method to create a replica without a leader")]
    NoMethod,
}

impl From<BootstrapError> for CloneError {
    fn from(error: BootstrapError) -> Self {
        match error {
            BootstrapError::NotEmpty { dir } => Self::NotEmpty { dir },
            BootstrapError::Prepare { path, source } => Self::Prepare { path, source },
            error => Self::Prepare { path: PathBuf::new(), source: io::Error::other(error) },
        }
    }
}

impl Postgres {
    /// Makes the data directory a copy of `source`'s by the configured methods, in their order; without
    /// a source only by those that need none. `remove`: replace what is there, whatever it is; nothing
    /// may run on it. A copy that fails leaves an empty directory.
    pub async fn clone_from(
        &self,
        source: Option<&Upstream>,
        remove: bool,
    ) -> Result<(), CloneError> {
        self.clone_by(None, source, remove).await
    }

    /// As [`Postgres::clone_from`], by the methods of these names instead of all in their order.
    pub async fn clone_by(
        &self,
        names: Option<&[String]>,
        source: Option<&Upstream>,
        remove: bool,
    ) -> Result<(), CloneError> {
        let claim = self.inner.claim_soon().await?;
        let configured = &self.settings().create_replica_methods;
        let plain = ReplicaMethod::Basebackup { options: Vec::new() };
        let methods: Vec<&ReplicaMethod> = match names {
            None => configured.iter().collect(),
            Some(names) => names
                .iter()
                .filter_map(|name| {
                    let known = configured.iter().find(|method| method.name() == name);
                    known.or((name == plain.name()).then_some(&plain))
                })
                .collect(),
        };
        if remove {
            self.remove_data()?;
        }
        let mut last = CloneError::NoMethod;
        for method in methods {
            let outcome = match (method, source) {
                (ReplicaMethod::Basebackup { options }, Some(source)) => {
                    self.basebackup(&claim, source, options).await
                }
                (ReplicaMethod::Custom { no_leader: true, .. }, _)
                | (ReplicaMethod::Custom { .. }, Some(_)) => {
                    self.custom_copy(&claim, method, source).await
                }
                _ => continue,
            };
            match outcome {
                Ok(()) => {
                    info!("data directory copied");
                    return Ok(());
                }
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "copying failed");
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn basebackup(
        &self,
        claim: &Claim,
        source: &Upstream,
        options: &[InitdbOption],
    ) -> Result<(), CloneError> {
        let dir = self.data_dir();
        self.prepare_empty_dir(dir)?;
        self.inner.begin(Unfinished::Copy)?;
        let passfile = self.inner.write_passfile()?;
        let replication = &self.settings().replication;
        let mut words = conninfo_words(replication, &passfile, &source.host, source.port);
        // Not the member's name: a copy under way must never pass for a synchronous standby.
        words.push(("application_name", format!("{} clone", super::sql::APPLICATION_PREFIX)));
        let given = |name: &str| options.iter().any(|option| option.name == name);
        let mut command = self.tool("pg_basebackup");
        command.arg("-D").arg(dir).arg("--no-password").arg("-d").arg(join_conninfo(&words));
        if !given("wal-method") {
            command.arg("--wal-method=stream");
        }
        if !given("checkpoint") {
            command.arg("--checkpoint=fast");
        }
        for option in options.iter().filter(|option| !is_ours(&option.name)) {
            command.arg(match &option.value {
                Some(value) => format!("--{}={value}", option.name),
                None => format!("--{}", option.name),
            });
        }
        let outcome = tool::run_claimed(&mut command, claim, COPY_LIMIT).await;
        if let Err(error) = outcome {
            empty_dir(dir);
            return Err(error.into());
        }
        Ok(self.inner.finish()?)
    }

    async fn custom_copy(
        &self,
        claim: &Claim,
        method: &ReplicaMethod,
        source: Option<&Upstream>,
    ) -> Result<(), CloneError> {
        let ReplicaMethod::Custom { name, command, no_params, keep_data, params, .. } = method
        else {
            return Err(CloneError::NoMethod);
        };
        let dir = self.data_dir();
        if !keep_data {
            self.prepare_empty_dir(dir)?;
            self.inner.begin(Unfinished::Copy)?;
        }
        let passfile = self.inner.write_passfile()?;
        let words = split_words(command).filter(|words| !words.is_empty());
        let mut words = words.ok_or_else(|| CloneError::Command { method: name.clone() })?;
        if !no_params {
            let connection = source.map_or_else(String::new, |source| {
                let replication = &self.settings().replication;
                join_conninfo(&conninfo_words(replication, &passfile, &source.host, source.port))
            });
            words.extend(self.method_arguments(params, &connection));
        }
        let mut words = words.into_iter();
        let mut run = tool::command(words.next().unwrap_or_default(), self.os_user());
        run.args(words).env("PGPASSFILE", passfile);
        if let Err(error) = tool::run_claimed(&mut run, claim, COPY_LIMIT).await {
            if !keep_data {
                empty_dir(dir);
            }
            return Err(error.into());
        }
        self.inner.finish()?;
        match self.data_dir_state() {
            Ok(DataDirState::Cluster { .. }) => Ok(()),
            _ => Err(CloneError::NothingLeft { method: name.clone() }),
        }
    }

    /// What a custom method is told, as by Patroni.
    fn method_arguments(&self, params: &Map<String, Value>, connection: &str) -> Vec<String> {
        let mut arguments = vec![
            format!("--scope={}", self.inner.cluster_name),
            "--role=replica".to_owned(),
            format!("--datadir={}", self.data_dir().display()),
            format!("--connstring={connection}"),
        ];
        arguments.extend(
            params.iter().filter_map(|(name, v)| Some(format!("--{name}={}", value_text(v)?))),
        );
        arguments
    }

    /// Removes the contents of the data directory, of its WAL directory and of its tablespaces, if
    /// those are links. Nothing may run on it; the caller has been told to by name.
    pub fn remove_data(&self) -> Result<(), CloneError> {
        let dir = self.data_dir();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CloneError::Prepare { path, source }
        };
        for link in links(dir) {
            if let Ok(target) = fs::canonicalize(&link) {
                remove_contents(&target).map_err(failed(&target))?;
            }
        }
        match remove_contents(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            outcome => outcome.map_err(failed(dir))?,
        }
        warn!("contents of the data directory removed");
        Ok(self.inner.finish()?)
    }

    /// Moves the data directory away, to `<data_dir>.failed`, for a person to look at; an older one
    /// there is replaced. Nothing may run on it.
    pub fn set_data_aside(&self) -> Result<PathBuf, CloneError> {
        let dir = self.data_dir();
        let mut aside = dir.as_os_str().to_owned();
        aside.push(".failed");
        let aside = PathBuf::from(aside);
        let failed = |source| CloneError::Prepare { path: aside.clone(), source };
        match fs::remove_dir_all(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        match fs::rename(dir, &aside) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        make_private_dir(dir, self.os_user()).map_err(failed)?;
        self.inner.finish()?;
        Ok(aside)
    }
}

/// Options of pg_basebackup that are not the operator's.
fn is_ours(name: &str) -> bool {
    matches!(name, "pgdata" | "format" | "write-recovery-conf" | "dbname" | "no-password")
}

/// `pg_wal` and the tablespaces, where they are symbolic links.
fn links(dir: &Path) -> Vec<PathBuf> {
    let mut candidates = vec![dir.join("pg_wal")];
    candidates.extend(
        fs::read_dir(dir.join("pg_tblspc")).into_iter().flatten().flatten().map(|e| e.path()),
    );
    candidates.retain(|path| path.is_symlink());
    candidates
}

fn remove_contents(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
