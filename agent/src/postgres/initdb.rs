//! A new cluster: its data directory and its first roles.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kornak_config::agent::{Credentials, InitdbOption};
use postgres_protocol::password;
use secrecy::ExposeSecret;
use tokio_postgres::Client;
use tracing::info;

use super::basebackup::wal_option;
use super::claim::Claim;
use super::conf::{default_hba, render_lines, with_socket_lines};
use super::files::ConfigureError;
use super::marker::{MARK, Mark, NEW, PASSWORD, Purpose, Step};
use super::os::{make_parents, make_private_dir, write_file};
use super::script::ScriptError;
use super::sql::{SqlError, ask, identifier, literal};
use super::tool::{self, ToolError};
use super::{DataDirState, Postgres, place};

/// `initdb` writes some 40 MB.
const INITDB_LIMIT: Duration = Duration::from_secs(300);

/// Why there is no new cluster.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The directory is not ours to overwrite.
    #[error("{dir} is not empty: move its contents away to have a new cluster there")]
    NotEmpty { dir: PathBuf },
    #[error("prepare {path}")]
    Prepare {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("initialize the data directory")]
    Initdb(#[from] ToolError),
    /// A custom method's command could not be run as it is written.
    #[error("run the custom bootstrap")]
    Script(#[from] ScriptError),
    /// The tool would fail at the end.
    #[error(
        "{path} is in use by a server: map the tablespace elsewhere, choose another waldir, or empty it"
    )]
    InUse { path: PathBuf },
    /// A custom method has ended well and left nothing.
    #[error("the bootstrap method {method} has left no data directory behind")]
    NothingLeft { method: String },
    #[error("configure the new server")]
    Configure(#[from] ConfigureError),
    #[error("create the roles of the new cluster")]
    Roles(#[from] SqlError),
}

impl Postgres {
    /// Makes a data directory with `initdb`. What it made is removed if it fails. `hba`: rules for a
    /// node whose own file has none; without any, everybody needs a password.
    pub async fn initdb(
        &self,
        options: &[InitdbOption],
        hba: &[String],
    ) -> Result<(), BootstrapError> {
        let claim = self.inner.claim_soon().await?;
        self.prepare_dir(&claim).await?;
        let mark = Mark { wal: wal_option(options), ..Mark::new(Purpose::Bootstrap, Step::Making) };
        self.begin_making(&claim, &mark).await?;
        let superuser = &self.settings().superuser;
        let mut command = self.tool("initdb");
        command.arg("-D").arg(self.data_dir().join(NEW));
        command.arg("--username").arg(&superuser.username);
        if let Some(password) = &superuser.password {
            let path = self.data_dir().join(PASSWORD);
            let text = format!("{}\n", password.expose_secret());
            write_file(&path, &text, 0o600, self.os_user())
                .map_err(|source| BootstrapError::Prepare { path: path.clone(), source })?;
            command.arg("--pwfile").arg(&path);
            if !options.iter().any(|option| option.name.starts_with("auth")) {
                command.arg("--auth=scram-sha-256");
            }
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
        let outcome = tool::run_claimed(&mut command, &claim, INITDB_LIMIT).await;
        self.end_making(&claim, mark, outcome).await?;
        self.write_first_hba(hba)?;
        info!("data directory initialized");
        Ok(())
    }

    /// The directory exists, is empty, and belongs to the OS user; what an earlier attempt has left in it is
    /// removed. Returns that attempt's note, for where its log was.
    pub(super) async fn prepare_dir(&self, claim: &Claim) -> Result<Option<Mark>, BootstrapError> {
        let dir = self.data_dir().to_owned();
        let failed = |source| BootstrapError::Prepare { path: dir.clone(), source };
        self.place(claim, place::clear).await.map_err(failed)?;
        match self.data_dir_state().map_err(failed)? {
            DataDirState::Missing | DataDirState::Empty => {}
            _ => return Err(BootstrapError::NotEmpty { dir: dir.clone() }),
        }
        make_parents(&dir, self.os_user()).map_err(failed)?;
        make_private_dir(&dir, self.os_user()).map_err(failed)?;
        self.inner.forget_notes().map_err(failed)?;
        Mark::load(&dir).map_err(failed)
    }

    /// Notes what a tool makes before the tool makes it.
    pub(super) async fn begin_making(
        &self,
        claim: &Claim,
        mark: &Mark,
    ) -> Result<(), BootstrapError> {
        let dir = self.data_dir().to_owned();
        let failed = |source| BootstrapError::Prepare { path: dir.clone(), source };
        let version = self.program_version().await?.map(|version| version / 10_000);
        let noted = mark.clone();
        let begun = self
            .place(claim, move |dir| {
                if let Some(used) = place::in_use(&noted, version) {
                    return Ok(Err(used));
                }
                place::begin(dir, &noted).map(Ok)
            })
            .await
            .map_err(failed)?;
        match begun {
            Ok(true) => Ok(()),
            Ok(false) => Err(BootstrapError::NotEmpty { dir }),
            Err(path) => Err(BootstrapError::InUse { path }),
        }
    }

    /// Puts the result of the tool in its place, or removes it.
    pub(super) async fn end_making(
        &self,
        claim: &Claim,
        mark: Mark,
        outcome: Result<String, ToolError>,
    ) -> Result<(), BootstrapError> {
        let path = self.data_dir().to_owned();
        let failed = |source| BootstrapError::Prepare { path, source };
        if let Err(error) = outcome {
            self.place(claim, place::clear).await.map_err(failed)?;
            return Err(error.into());
        }
        let arrived = self.place(claim, move |dir| {
            place::remove_tree(&dir.join(PASSWORD))?;
            let mark = place::arrive(dir, mark)?;
            // A bootstrap is not complete with its files.
            let after = if mark.purpose == Purpose::Bootstrap { Step::Made } else { Step::Moving };
            Mark { step: after, names: Vec::new(), ..mark }.save(dir)
        });
        arrived.await.map_err(failed)
    }

    /// How far a bootstrap has come.
    pub(super) async fn step(&self, claim: &Claim, step: Step) -> Result<(), ToolError> {
        let stepped = self.place(claim, move |dir| match Mark::load(dir)? {
            Some(mark) => Mark { step, ..mark }.save(dir),
            None => Err(io::Error::from(io::ErrorKind::NotFound)),
        });
        let failed = |source| ToolError::Claim { path: self.data_dir().join(MARK), source };
        stepped.await.map_err(failed)
    }

    /// The data directory is complete.
    pub(super) async fn finish(&self, claim: &Claim) -> Result<(), ToolError> {
        let finished = self.place(claim, |dir| {
            place::sync_all(dir)?;
            Mark::remove(dir)
        });
        let failed = |source| ToolError::Claim { path: self.data_dir().join(MARK), source };
        finished.await.map_err(failed)
    }

    /// Removes what an earlier attempt at the first server has left, if it cannot go on. Nothing
    /// may run on it.
    pub async fn remove_first(&self) -> Result<(), BootstrapError> {
        let claim = self.inner.claim_soon().await?;
        let failed = |source| BootstrapError::Prepare { path: self.data_dir().to_owned(), source };
        self.place(&claim, place::clear).await.map_err(failed)
    }

    /// The server was started since its data directory was made.
    pub fn was_started(&self) -> bool {
        let mark = Mark::load(self.data_dir());
        mark.is_ok_and(|mark| mark.is_some_and(|mark| mark.step == Step::Started))
    }

    /// The first server of the cluster is being filled from now on; done again, it would be done twice.
    pub async fn begin_filling(&self) -> Result<(), ToolError> {
        // The server runs, and has its own lock.
        let claim = self.inner.claim_soon().await?;
        self.step(&claim, Step::Filling).await
    }

    /// The store knows the cluster: its first server is complete.
    pub async fn finish_first(&self) -> Result<(), ToolError> {
        let claim = self.inner.claim_soon().await?;
        self.finish(&claim).await
    }

    /// Whether the directory is the complete data directory of a server, whatever more is to be
    /// done with it.
    pub(super) fn holds_cluster(&self) -> bool {
        let dir = self.data_dir();
        dir.join("PG_VERSION").exists() && dir.join("global/pg_control").exists()
    }

    fn write_first_hba(&self, hba: &[String]) -> Result<(), BootstrapError> {
        let own = self.settings().pg_hba.as_ref().is_some_and(|lines| !lines.is_empty());
        let replication = &self.settings().replication;
        let lines = match hba {
            _ if own => return Ok(()),
            [] if replication.password.is_some() => default_hba(&replication.username),
            [] => return Ok(()),
            lines if self.settings().use_unix_socket => {
                let path = self.data_dir().join("pg_hba.conf");
                let initdbs = std::fs::read(&path)
                    .map_err(|source| BootstrapError::Prepare { path, source })?;
                with_socket_lines(lines, &String::from_utf8_lossy(&initdbs))
            }
            lines => lines.to_vec(),
        };
        let path = self.inner.config_file("pg_hba.conf");
        let mode = self.inner.mode_of(&path);
        write_file(&path, &render_lines(&lines), mode, self.os_user())
            .map_err(|source| BootstrapError::Prepare { path, source })
    }

    /// Creates the roles for replication and for pg_rewind, or gives them their passwords; and sets the
    /// superuser's, which another bootstrap than initdb may not have done. The server must be writable.
    pub async fn create_roles(&self) -> Result<(), SqlError> {
        let client = self.sql().connect_patiently().await?;
        // No password in any log: neither the server's nor an extension's.
        for statement in [
            "SET log_statement TO none",
            "SET log_min_duration_statement TO -1",
            "SET log_min_error_statement TO panic",
            "SET pg_stat_statements.track_utility TO off",
        ] {
            ask(&client, "keep passwords out of logs", statement).await?;
        }
        let settings = self.settings();
        let superuser = &settings.superuser;
        create_role(&client, superuser, "SUPERUSER").await?;
        if settings.replication.username != superuser.username {
            create_role(&client, &settings.replication, "REPLICATION").await?;
        }
        let rewind = settings.rewind();
        if rewind.username != superuser.username {
            if rewind.username != settings.replication.username {
                create_role(&client, rewind, "").await?;
            }
            // /docs/current/app-pgrewind.html#id-1.9.5.8.8
            for function in [
                "pg_ls_dir(text, boolean, boolean)",
                "pg_stat_file(text, boolean)",
                "pg_read_binary_file(text)",
                "pg_read_binary_file(text, bigint, bigint, boolean)",
            ] {
                let role = identifier(&rewind.username);
                let statement =
                    format!("GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {role}");
                ask(&client, "grant what pg_rewind needs", &statement).await?;
            }
        }
        Ok(())
    }
}

/// Options of initdb that are not the operator's.
fn is_ours(name: &str) -> bool {
    matches!(name, "pgdata" | "pwfile" | "pwprompt" | "username" | "version" | "help" | "waldir")
}

async fn create_role(client: &Client, role: &Credentials, rights: &str) -> Result<(), SqlError> {
    let exists = format!("SELECT 1 FROM pg_roles WHERE rolname = {}", literal(&role.username));
    let exists = !ask(client, "look for a role", &exists).await?.is_empty();
    let verb = if exists { "ALTER" } else { "CREATE" };
    let password = role.password.as_ref().map_or_else(String::new, |password| {
        let password = password.expose_secret();
        // A server hashes the bytes that it has made of a password in its own encoding, and clients send
        // other ones; a hash made here has no encoding.
        let hashed = (!password.is_ascii()).then(|| password::scram_sha_256(password.as_bytes()));
        format!("PASSWORD {}", literal(hashed.as_deref().unwrap_or(password)))
    });
    let name = identifier(&role.username);
    let statement = format!("{verb} ROLE {name} WITH LOGIN {rights} {password}");
    ask(client, "create a role", &statement).await.map(drop)
}
