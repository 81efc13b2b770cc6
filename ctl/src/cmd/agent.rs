//! `kornak agent FILE`.

use std::path::PathBuf;

use clap::Args;

use crate::signals;

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Patroni's YAML, or a folder of such files; default: the variable PATRONI_CONFIGURATION.
    file: Option<PathBuf>,
}

/// Runs until SIGTERM or SIGINT, then hands over and stops the server.
///
/// # Errors
/// The file is wrong, or the agent cannot start.
pub fn run(args: &AgentArgs) -> anyhow::Result<()> {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    let loaded = kornak_config::load_agent(args.file.as_deref(), &environment)?;
    let settings = loaded.settings;
    crate::logging::start(&settings.log, None)?;
    for warning in &loaded.warnings {
        tracing::warn!(why = warning.as_str(), "configuration");
    }
    crate::store::install_tls();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = signals::stop_token()?;
        let store = crate::store::connect(&settings.store)?;
        super::watch_file(args.file.clone(), stop.clone())?;
        let running = kornak_agent::start(settings, store, None, stop).await?;
        signals::ready();
        match running.task.await {
            Ok(ended) => Ok(ended?),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    })
}
