//! The operator's commands that are waited for: custom bootstrap, `post_bootstrap`, `pre_promote`,
//! `before_stop`.

use std::io;
use std::path::Path;
use std::time::Duration;

use kornak_config::agent::CustomBootstrap;
use tracing::info;

use super::claim::Claim;
use super::conf::value_text;
use super::files::ConfigureError;
use super::initdb::BootstrapError;
use super::marker::{MARK, Mark, Purpose, Step};
use super::os::{make_parents, make_private_dir, may_write};
use super::tool::{self, ToolError, split_words};
use super::{DataDirState, Postgres, place, sql};

/// A backup may be large.
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Between looks at whether a command has begun to fill the data directory: soon, and not without end.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LONGEST_LOOK: Duration = Duration::from_millis(20);
/// Once it has; some replace it as a whole.
const LAST_LOOK: Duration = Duration::from_secs(1);

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

    /// Runs the `post_bootstrap` script: whatever it asks of the server takes its time, and waits for no
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
        let claim = self.inner.claim_soon().await?;
        let path = self.data_dir().to_owned();
        let failed = |source| BootstrapError::Prepare { path: path.clone(), source };
        self.prepare_for_command(&claim, Purpose::Bootstrap, false).await?;
        let mut run = self.script(&method.command)?;
        if !method.no_params {
            run.arg(format!("--scope={}", self.inner.cluster_name));
            run.arg(format!("--datadir={}", path.display()));
        }
        for (name, value) in &method.params {
            if let Some(value) = value_text(value) {
                run.arg(format!("--{name}={value}"));
            }
        }
        let ran = self.run_filling(&mut run, &claim, Purpose::Bootstrap, BOOTSTRAP_LIMIT).await;
        if let Err(error) = ran {
            self.place(&claim, place::clear).await.map_err(failed)?;
            return Err(error.into());
        }
        if !self.holds_cluster() {
            self.place(&claim, place::clear).await.map_err(failed)?;
            return Err(BootstrapError::NothingLeft { method: method.name.clone() });
        }
        self.place(&claim, place::sync_all).await.map_err(failed)?;
        self.step(&claim, Step::Made).await?;
        info!(method = %method.name, "data directory made by a custom method");
        Ok(())
    }

    /// The directory is as a command of the operator's expects it: not there, if that command can make it;
    /// else empty. `keep`: with what is in it.
    pub(super) async fn prepare_for_command(
        &self,
        claim: &Claim,
        purpose: Purpose,
        keep: bool,
    ) -> Result<(), BootstrapError> {
        let (dir, user) = (self.data_dir(), self.os_user());
        let failed = |source| BootstrapError::Prepare { path: dir.to_owned(), source };
        if keep && dir.exists() && !place::is_untouched(dir).map_err(failed)? {
            let kept = move |dir: &Path| Mark::new(purpose, Step::Command).save(dir);
            return self.place(claim, kept).await.map_err(failed);
        }
        self.place(claim, place::clear).await.map_err(failed)?;
        // A note of where the log was before; the command knows for itself, and wants it empty.
        self.place(claim, place::forget).await.map_err(failed)?;
        match self.data_dir_state().map_err(failed)? {
            DataDirState::Missing | DataDirState::Empty => {}
            _ => return Err(BootstrapError::NotEmpty { dir: dir.to_owned() }),
        }
        make_parents(dir, user).map_err(failed)?;
        let able = dir.parent().is_some_and(|parent| may_write(parent, user));
        if dir.exists() || !able {
            make_private_dir(dir, user).map_err(failed)?;
        }
        self.inner.forget_notes().map_err(failed)
    }

    /// Runs a command of the operator's that fills the data directory itself, and may expect it to be empty or
    /// not to be there. So the note comes into it as soon as there is anything else.
    pub(super) async fn run_filling(
        &self,
        run: &mut tokio::process::Command,
        claim: &Claim,
        purpose: Purpose,
        limit: Duration,
    ) -> Result<(), ToolError> {
        let failed = |source| ToolError::Claim { path: self.data_dir().join(MARK), source };
        self.inner.note_command().map_err(failed)?;
        let mark =
            Mark { with_dir: !self.data_dir().exists(), ..Mark::new(purpose, Step::Command) };
        let outcome = {
            let mut running = std::pin::pin!(tool::run_claimed(run, claim, limit));
            let mut pause = FIRST_LOOK;
            loop {
                tokio::select! {
                    outcome = &mut running => break outcome,
                    () = tokio::time::sleep(pause) => {}
                }
                // The command may be replacing the directory: there is a next time.
                let marked = self.mark_filled(claim, &mark).await.unwrap_or(false);
                pause = if marked { LAST_LOOK } else { (pause * 2).min(LONGEST_LOOK) };
            }
        };
        self.mark_filled(claim, &mark).await.map_err(failed)?;
        self.inner.forget_command().map_err(failed)?;
        if outcome.is_ok() && self.data_dir().exists() {
            make_private_dir(self.data_dir(), self.os_user()).map_err(failed)?;
        }
        outcome.map(drop)
    }

    /// True: there is something in the directory, and the note with it.
    async fn mark_filled(&self, claim: &Claim, mark: &Mark) -> io::Result<bool> {
        if place::is_untouched(self.data_dir())? {
            return Ok(false);
        }
        if Mark::load(self.data_dir())?.is_none() {
            let mark = mark.clone();
            self.place(claim, move |dir| mark.save(dir)).await?;
        }
        self.inner.forget_command()?;
        Ok(true)
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
