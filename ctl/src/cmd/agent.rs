//! `kornak agent FILE`.

use std::path::{Path, PathBuf};

use clap::Args;
use kornak_agent::{Home, Reloader};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::logging::Logs;
use crate::signals;

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Patroni's YAML, or a folder of such files; default: the variable PATRONI_CONFIGURATION.
    file: Option<PathBuf>,
}

impl AgentArgs {
    /// With this file.
    pub(super) fn of(file: Option<PathBuf>) -> Self {
        Self { file }
    }
}

/// Runs until SIGTERM or SIGINT, then hands over and stops the server. SIGHUP and `POST /reload` read
/// the file again.
///
/// # Errors
/// The file is wrong, or the agent cannot start.
pub fn run(args: &AgentArgs) -> anyhow::Result<()> {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    let loaded = kornak_config::load_agent(args.file.as_deref(), &environment)?;
    let settings = loaded.settings;
    let logs = crate::logging::start(&settings.log, None)?;
    for warning in &loaded.warnings {
        tracing::warn!(why = warning.as_str(), "configuration");
    }
    crate::store::install_tls();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async {
        let stop = signals::stop_token()?;
        let hangup = signal(SignalKind::hangup())?;
        let store = crate::store::connect(&settings.store)?;
        let running = kornak_agent::start(settings, store, Home::Own, stop).await?;
        signals::ready();
        let reloads = follow(args.file.clone(), environment, running.reloader, logs, hangup);
        let reloads = tokio::spawn(reloads);
        let ended = running.task.await;
        reloads.abort();
        match ended {
            Ok(ended) => Ok(ended?),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    });
    if let Err(error) = &ended {
        crate::logging::last_words(error);
    }
    ended
}

/// Reads the file again whenever somebody asks. Never returns.
async fn follow(
    file: Option<PathBuf>,
    environment: Vec<(String, String)>,
    reloader: Reloader,
    logs: Logs,
    mut hangup: Signal,
) {
    loop {
        tokio::select! {
            _ = hangup.recv() => {}
            () = reloader.wanted() => {}
        }
        signals::reloading(|| reload(file.as_deref(), &environment, &reloader, &logs));
    }
}

/// A file with a mistake in it changes nothing.
fn reload(file: Option<&Path>, environment: &[(String, String)], reloader: &Reloader, logs: &Logs) {
    let loaded = match kornak_config::load_agent(file, environment) {
        Ok(loaded) => loaded,
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "configuration is wrong, the old one stays in force"
            );
            return;
        }
    };
    for warning in &loaded.warnings {
        tracing::warn!(why = warning.as_str(), "configuration");
    }
    logs.reload(&loaded.settings.log);
    match reloader.reload(loaded.settings) {
        Ok(waiting) => {
            for key in waiting {
                tracing::warn!(key, "changed value needs a restart of the agent");
            }
            tracing::info!("configuration reloaded");
        }
        Err(error) => tracing::error!(
            error = &error as &dyn std::error::Error,
            "changed configuration refused, the old one stays in force"
        ),
    }
}
