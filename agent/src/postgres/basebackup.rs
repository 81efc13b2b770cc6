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
use super::initdb::BootstrapError;
use super::marker::{Mark, NEW, Purpose, Step, Tablespace, Wal};
use super::os::{as_user_or_root, make_private_dir};
use super::sql::{self, ask};
use super::tool::{self, ToolError, split_words};
use super::{Postgres, Upstream, place};

/// Nobody knows how large a database is; a copy that hangs must be seen by a person.
const COPY_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// The directory holds something that was not made here.
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
    /// The tool would fail at the end.
    #[error(
        "{path} is in use by a server: map the tablespace elsewhere, choose another waldir, or empty it"
    )]
    InUse { path: PathBuf },
    /// Only methods that need a running member are configured, and there is none.
    #[error("no method to create a replica without a leader")]
    NoMethod,
}

impl From<BootstrapError> for CloneError {
    fn from(error: BootstrapError) -> Self {
        match error {
            BootstrapError::NotEmpty { dir } => Self::NotEmpty { dir },
            BootstrapError::Prepare { path, source } => Self::Prepare { path, source },
            BootstrapError::InUse { path } => Self::InUse { path },
            BootstrapError::Initdb(source) => Self::Tool(source),
            BootstrapError::Configure(source) => Self::Configure(source),
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
        self.copy(&claim, Purpose::Copy, names, source, remove).await
    }

    /// The first server of a standby cluster. It is not complete before [`Postgres::finish_first`].
    pub async fn copy_first(
        &self,
        names: Option<&[String]>,
        source: Option<&Upstream>,
    ) -> Result<(), CloneError> {
        let claim = self.inner.claim_soon().await?;
        self.copy(&claim, Purpose::Bootstrap, names, source, false).await
    }

    async fn copy(
        &self,
        claim: &Claim,
        purpose: Purpose,
        names: Option<&[String]>,
        source: Option<&Upstream>,
        mut remove: bool,
    ) -> Result<(), CloneError> {
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
        let mut last = CloneError::NoMethod;
        for method in methods {
            let keeps = matches!(method, ReplicaMethod::Custom { keep_data: true, .. });
            if std::mem::take(&mut remove) && !keeps {
                self.remove_claimed(claim).await?;
            }
            let outcome = match (method, source) {
                (ReplicaMethod::Basebackup { options }, Some(source)) => {
                    self.basebackup(claim, purpose, source, options).await
                }
                (ReplicaMethod::Custom { no_leader: true, .. }, _)
                | (ReplicaMethod::Custom { .. }, Some(_)) => {
                    self.custom_copy(claim, purpose, method, source).await
                }
                _ => continue,
            };
            match outcome {
                Ok(()) => {
                    info!("data directory copied");
                    return Ok(());
                }
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "copy of the data directory failed"
                    );
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn basebackup(
        &self,
        claim: &Claim,
        purpose: Purpose,
        source: &Upstream,
        options: &[InitdbOption],
    ) -> Result<(), CloneError> {
        let before = self.prepare_dir(claim).await?;
        let tablespaces = self.tablespaces(source, options).await;
        let mark = Mark {
            wal: wal_option(options).or(before.and_then(|mark| mark.wal)),
            tablespaces: tablespaces.iter().map(|(_, path)| own_tablespace(path)).collect(),
            ..Mark::new(purpose, Step::Making)
        };
        self.begin_making(claim, &mark).await?;
        let passfile = self.inner.write_passfile()?;
        let replication = &self.settings().replication;
        let mut words = conninfo_words(replication, &passfile, &source.host, source.port);
        // Not the member's name: a copy under way must never pass for a synchronous standby.
        words.push(("application_name", format!("{} clone", sql::APPLICATION_PREFIX)));
        let given = |name: &str| options.iter().any(|option| option.name == name);
        let mut command = self.tool("pg_basebackup");
        command.arg("-D").arg(self.data_dir().join(NEW));
        command.arg("--no-password").arg("-d").arg(join_conninfo(&words));
        if !given("wal-method") {
            command.arg("--wal-method=stream");
        }
        if !given("checkpoint") {
            command.arg("--checkpoint=fast");
        }
        for (location, path) in &tablespaces {
            let escaped = |path: &Path| path.display().to_string().replace('=', "\\=");
            let (from, to) = (escaped(location), escaped(&path.join(NEW)));
            command.arg(format!("--tablespace-mapping={from}={to}"));
        }
        if let Some(wal) = &mark.wal {
            command.arg(format!("--waldir={}", wal.path.join(NEW).display()));
        }
        for option in options.iter().filter(|option| !is_ours(&option.name)) {
            command.arg(match &option.value {
                Some(value) => format!("--{}={value}", option.name),
                None => format!("--{}", option.name),
            });
        }
        let outcome = tool::run_claimed(&mut command, claim, COPY_LIMIT).await;
        self.end_making(claim, mark, outcome).await?;
        if purpose == Purpose::Copy {
            self.finish(claim).await?;
        }
        Ok(())
    }

    /// The source's tablespaces, and where they go here. Those that a setting names are known even if the
    /// source cannot be asked.
    pub(super) async fn tablespaces(
        &self,
        source: &Upstream,
        options: &[InitdbOption],
    ) -> Vec<(PathBuf, PathBuf)> {
        let mut all: Vec<(PathBuf, PathBuf)> = options
            .iter()
            .filter(|option| option.name == "tablespace-mapping")
            .filter_map(|option| mapping(option.value.as_deref()?))
            .collect();
        let (settings, port) = (self.settings(), source.port);
        let login =
            sql::remote_login(&source.host, port, &settings.database, settings.rewind(), "copy");
        let asked = async {
            let client = login.connect().await?;
            let statement = "SELECT pg_tablespace_location(oid) FROM pg_tablespace \
                             WHERE pg_tablespace_location(oid) LIKE '/%'";
            ask(&client, "list its tablespaces", statement).await
        };
        match asked.await {
            Ok(rows) => {
                for location in rows.into_iter().filter_map(|row| row.into_iter().next().flatten())
                {
                    let location = PathBuf::from(location);
                    if all.iter().all(|(known, _)| *known != location) {
                        all.push((location.clone(), location));
                    }
                }
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                warn!(error, "source does not tell where its tablespaces are");
            }
        }
        all
    }

    async fn custom_copy(
        &self,
        claim: &Claim,
        purpose: Purpose,
        method: &ReplicaMethod,
        source: Option<&Upstream>,
    ) -> Result<(), CloneError> {
        let ReplicaMethod::Custom { name, command, no_params, keep_data, params, .. } = method
        else {
            return Err(CloneError::NoMethod);
        };
        self.prepare_for_command(claim, purpose, *keep_data).await?;
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
        let ran = self.run_filling(&mut run, claim, purpose, COPY_LIMIT).await;
        if let Err(error) = ran {
            if !keep_data {
                self.place(claim, place::clear).await.map_err(self.failed())?;
            }
            return Err(error.into());
        }
        if !self.holds_cluster() {
            self.place(claim, place::clear).await.map_err(self.failed())?;
            return Err(CloneError::NothingLeft { method: name.clone() });
        }
        self.inner.forget_notes().map_err(self.failed())?;
        match purpose {
            Purpose::Copy => self.finish(claim).await,
            Purpose::Bootstrap => self.step(claim, Step::Made).await,
        }
        .map_err(CloneError::from)
    }

    /// The arguments of a custom method, as with Patroni.
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

    /// Removes the contents of the data directory, and what is its own of its WAL directory and of its
    /// tablespaces. Nothing may run on it; the caller has been told to by name.
    pub async fn remove_data(&self) -> Result<(), CloneError> {
        let claim = self.inner.claim_soon().await?;
        self.remove_claimed(&claim).await
    }

    async fn remove_claimed(&self, claim: &Claim) -> Result<(), CloneError> {
        if self.data_dir().exists() {
            let removal = |dir: &Path| place::remove_all(dir, Purpose::Copy);
            self.place(claim, removal).await.map_err(self.failed())?;
            warn!("contents of the data directory removed");
        }
        self.inner.forget_notes().map_err(self.failed())
    }

    /// Moves what a bootstrap that failed has made to `<data_dir>.failed`, for a person to look at; an older
    /// one there is replaced. `None`: it had to be removed, for a mount point cannot be renamed; or nothing
    /// was made here. Nothing may run on it.
    pub async fn set_data_aside(&self) -> Result<Option<PathBuf>, CloneError> {
        let claim = self.inner.claim_soon().await?;
        let made = Mark::load(self.data_dir()).map_err(self.failed())?;
        if made.is_none_or(|mark| mark.purpose != Purpose::Bootstrap) {
            return Ok(None);
        }
        let (user, dir) = (self.os_user().cloned(), self.data_dir().to_owned());
        let renamed = tokio::task::spawn_blocking(move || {
            // A link stays where it is, and needs something to lead to.
            let linked = dir.is_symlink();
            let dir = fs::canonicalize(dir)?;
            let mut aside = dir.as_os_str().to_owned();
            aside.push(".failed");
            let aside = PathBuf::from(aside);
            as_user_or_root(&dir, user.as_ref(), |_| {
                place::remove_elsewhere(&dir)?;
                place::remove_tree(&aside)?;
                fs::rename(&dir, &aside)
            })?;
            if linked {
                make_private_dir(&dir, user.as_ref())?;
            }
            Ok::<_, io::Error>(aside)
        });
        match renamed.await.map_err(io::Error::other).and_then(|renamed| renamed) {
            Ok(aside) => Ok(Some(aside)),
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "data directory could not be moved aside and is removed"
                );
                self.place(&claim, place::clear).await.map_err(self.failed())?;
                Ok(None)
            }
        }
    }

    fn failed(&self) -> impl Fn(io::Error) -> CloneError {
        let path = self.data_dir().to_owned();
        move |source| CloneError::Prepare { path: path.clone(), source }
    }
}

fn own_tablespace(path: &Path) -> Tablespace {
    Tablespace { path: path.to_owned(), version: None }
}

/// `--waldir` of pg_basebackup and initdb.
pub(super) fn wal_option(options: &[InitdbOption]) -> Option<Wal> {
    let option = options.iter().find(|option| option.name == "waldir")?;
    let path = PathBuf::from(option.value.as_deref()?);
    Some(Wal { link: Some(path.clone()), path, found: false })
}

/// `OLD=NEW`, where `\=` is a part of a name.
fn mapping(text: &str) -> Option<(PathBuf, PathBuf)> {
    let mut halves = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.peek() == Some(&'=') => halves.last_mut()?.extend(chars.next()),
            '=' => halves.push(String::new()),
            c => halves.last_mut()?.push(c),
        }
    }
    let [old, new] = halves.as_slice() else { return None };
    Some((PathBuf::from(old), PathBuf::from(new)))
}

/// Options of pg_basebackup that are not the operator's, or that are said in another way.
fn is_ours(name: &str) -> bool {
    matches!(
        name,
        "pgdata"
            | "format"
            | "write-recovery-conf"
            | "dbname"
            | "no-password"
            | "waldir"
            | "tablespace-mapping"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_has_two_sides() {
        for (text, expected) in [
            ("/a=/b", Some(("/a", "/b"))),
            (r"/a\=x=/b", Some(("/a=x", "/b"))),
            ("/a", None),
            ("/a=/b=/c", None),
        ] {
            let expected = expected.map(|(a, b)| (PathBuf::from(a), PathBuf::from(b)));
            assert_eq!(mapping(text), expected, "{text}");
        }
    }
}
