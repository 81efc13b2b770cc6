//! The operator's commands that are waited for: custom bootstrap, `post_bootstrap`, `pre_promote`,
//! `before_stop`.

use std::time::Duration;

use kornak_config::agent::CustomBootstrap;
use tracing::info;

use super::conf::value_text;
use super::files::ConfigureError;
use super::initdb::{BootstrapError, empty_dir};
use super::sql;
use super::tool::{self, ToolError, split_words};
use super::{DataDirState, Postgres, Unfinished};

/// A backup may be large.
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why a command of the operator's did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// A quote is not closed, or there is nothing in it.
    #[error("split the command {command:?} into words")]
    Words { command: String },
    #[error("run a command of the operator's")]
    Tool(#[from] ToolError),
    #[error("write the password file for it")]
    Configure(#[from] ConfigureError),
}

impl Postgres {
    /// Runs a command with arguments appended, as the OS user, and with a password file for
    /// [`Postgres::connection_url`] in its environment.
    pub async fn run_script(
        &self,
        command: &str,
        arguments: &[&str],
        limit: Duration,
    ) -> Result<(), ScriptError> {
        run(self.script(command)?, arguments, limit).await
    }

    /// The same for `post_bootstrap`: whatever it asks of the server takes its time, and waits for no
    /// standby, for there is none yet.
    pub async fn run_first_script(
        &self,
        command: &str,
        arguments: &[&str],
        limit: Duration,
    ) -> Result<(), ScriptError> {
        let mut script = self.script(command)?;
        script.env("PGOPTIONS", "-c synchronous_commit=local -c statement_timeout=0");
        run(script, arguments, limit).await
    }

    fn script(&self, command: &str) -> Result<tokio::process::Command, ScriptError> {
        let words = split_words(command).filter(|words| !words.is_empty());
        let words = words.ok_or_else(|| ScriptError::Words { command: command.to_owned() })?;
        let passfile = self.inner.write_passfile()?;
        let mut words = words.into_iter();
        let mut run = tool::command(words.next().unwrap_or_default(), self.os_user());
        run.args(words).env("PGPASSFILE", passfile);
        Ok(run)
    }

    /// Makes a data directory by the operator's own command. Start it afterwards: as
    /// [`PointInTime`](super::StartAs::PointInTime) if there is a `recovery_conf` or the command has
    /// left its own, else as a primary.
    pub async fn custom_bootstrap(&self, method: &CustomBootstrap) -> Result<(), BootstrapError> {
        let dir = self.data_dir().to_owned();
        let claim = self.inner.claim()?;
        self.prepare_empty_dir(&dir)?;
        self.inner.begin(Unfinished::Copy)?;
        let mut run = self.script(&method.command)?;
        if !method.no_params {
            run.arg(format!("--scope={}", self.inner.cluster_name));
            run.arg(format!("--datadir={}", dir.display()));
        }
        for (name, value) in &method.params {
            if let Some(value) = value_text(value) {
                run.arg(format!("--{name}={value}"));
            }
        }
        if let Err(error) = tool::run_claimed(&mut run, &claim, BOOTSTRAP_LIMIT).await {
            empty_dir(&dir);
            return Err(error.into());
        }
        self.inner.finish()?;
        match self.data_dir_state() {
            Ok(DataDirState::Cluster { .. }) => {
                info!(method = %method.name, "data directory made by a custom method");
                Ok(())
            }
            _ => Err(BootstrapError::NothingLeft { method: method.name.clone() }),
        }
    }

    /// How the operator's commands reach the server, as the superuser; the password is in a file.
    pub fn connection_url(&self) -> String {
        let settings = self.settings();
        let user = escaped(&settings.superuser.username);
        let host = sql::local_host(settings);
        let host = match host.starts_with('/') {
            true => escaped(&host),
            false if host.contains(':') => format!("[{host}]"),
            false => host,
        };
        format!("postgres://{user}@{host}:{}/{}", settings.listen.port, settings.database)
    }
}

async fn run(
    mut script: tokio::process::Command,
    arguments: &[&str],
    limit: Duration,
) -> Result<(), ScriptError> {
    Ok(tool::run(script.args(arguments), limit).await.map(drop)?)
}

/// As a part of an URL.
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let part = |byte: u8| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(part).collect()
}
