//! A new cluster: its data directory and its first roles.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kornak_config::agent::{Credentials, InitdbOption};
use postgres_protocol::password;
use secrecy::ExposeSecret;
use tokio_postgres::Client;
use tracing::info;

use super::conf::{self, render_lines};
use super::files::{ConfigureError, beside};
use super::os::{make_private_dir, write_file};
use super::script::ScriptError;
use super::sql::{SqlError, ask, identifier, literal};
use super::tool::{self, ToolError};
use super::{DataDirState, Postgres, Unfinished};

/// `initdb` writes some 40 MB.
const INITDB_LIMIT: Duration = Duration::from_secs(300);

/// Why there is no new cluster.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// It is not ours to overwrite.
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
        let dir = self.data_dir().to_owned();
        let claim = self.inner.claim()?;
        self.prepare_empty_dir(&dir)?;
        self.inner.begin(Unfinished::Copy)?;
        let superuser = &self.settings().superuser;
        let mut command = self.tool("initdb");
        command.arg("-D").arg(&dir).arg("--username").arg(&superuser.username);
        let pwfile = match &superuser.password {
            Some(password) => {
                let path = beside(self.settings(), "pwfile");
                let text = format!("{}\n", password.expose_secret());
                write_file(&path, &text, 0o600, self.os_user())
                    .map_err(|source| BootstrapError::Prepare { path: path.clone(), source })?;
                command.arg("--pwfile").arg(&path);
                if !options.iter().any(|option| option.name.starts_with("auth")) {
                    command.arg("--auth=scram-sha-256");
                }
                Some(path)
            }
            None => None,
        };
        for option in options.iter().filter(|option| !is_ours(&option.name)) {
            command.arg(match &option.value {
                Some(value) => format!("--{}={value}", option.name),
                None => format!("--{}", option.name),
            });
        }
        let outcome = tool::run_claimed(&mut command, &claim, INITDB_LIMIT).await;
        if let Some(path) = pwfile {
            let _ = fs::remove_file(path);
        }
        if let Err(error) = outcome {
            empty_dir(&dir);
            return Err(error.into());
        }
        self.write_first_hba(hba)?;
        self.inner.finish()?;
        info!("data directory initialized");
        Ok(())
    }

    /// The directory exists, is empty, and belongs to the OS user. What an earlier copy left in it is
    /// removed.
    pub(super) fn prepare_empty_dir(&self, dir: &Path) -> Result<(), BootstrapError> {
        let failed = |source| BootstrapError::Prepare { path: dir.to_owned(), source };
        match self.data_dir_state().map_err(failed)? {
            DataDirState::Missing => {}
            DataDirState::Empty => empty_dir(dir),
            DataDirState::Cluster { .. } | DataDirState::Foreign => {
                return Err(BootstrapError::NotEmpty { dir: dir.to_owned() });
            }
        }
        if let Some(parent) = dir.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(failed)?;
        }
        make_private_dir(dir, self.os_user()).map_err(failed)
    }

    fn write_first_hba(&self, hba: &[String]) -> Result<(), BootstrapError> {
        let own = self.settings().pg_hba.as_ref().is_some_and(|lines| !lines.is_empty());
        let replication = &self.settings().replication;
        let lines = match hba {
            _ if own => return Ok(()),
            [] if replication.password.is_some() => conf::default_hba(&replication.username),
            [] => return Ok(()),
            lines => lines.to_vec(),
        };
        let path = self.inner.config_file("pg_hba.conf");
        write_file(&path, &render_lines(&lines), 0o600, self.os_user())
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
    matches!(name, "pgdata" | "pwfile" | "pwprompt" | "username" | "version" | "help")
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

/// Removes what is in a directory that was empty before.
pub(super) fn empty_dir(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name() == "lost+found" {
            continue;
        }
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // What stays is seen by the next attempt, which then refuses.
        let _ =
            if is_dir { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
    }
}
