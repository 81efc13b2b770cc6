//! `kornak proxy FILE`.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use kornak_config::proxy::Source;

use crate::signals;

#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// The proxy's YAML.
    file: PathBuf,
}

/// Runs until SIGTERM or SIGINT, then lets running transactions finish.
///
/// # Errors
/// The file is wrong, or the proxy cannot start.
pub fn run(args: &ProxyArgs) -> anyhow::Result<()> {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    let loaded = kornak_config::load_proxy(Some(&args.file), &environment)?;
    let mut settings = loaded.settings;
    if settings.state_file.is_none() {
        settings.state_file = default_state_file(&args.file, &settings.scope.name);
    }
    let logs = crate::logging::start(&settings.log, None)?;
    for warning in &loaded.warnings {
        tracing::warn!(why = warning.as_str(), "configuration");
    }
    crate::store::install_tls();
    kornak_proxy::net::descriptors::raise();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = signals::stop_token()?;
        let store = match &settings.source {
            Source::Dcs(store) => Some(crate::store::connect(store)?),
            Source::Static { .. } | Source::Rest { .. } => None,
        };
        let running = kornak_proxy::start(settings, store, stop.clone()).await?;
        let (file, reloader) = (args.file.clone(), running.reloader);
        signals::on_hangup(stop, move || signals::reloading(|| reload(&file, &reloader, &logs)))?;
        signals::ready();
        running.join.await??;
        Ok(())
    })
}

/// In the service's own folder, or beside the configuration file, unless that is where only configuration belongs.
fn default_state_file(file: &Path, scope: &str) -> Option<PathBuf> {
    if let Some(folders) = std::env::var_os("STATE_DIRECTORY") {
        // systemd separates them so.
        let first = folders.as_encoded_bytes().split(|byte| *byte == b':').next()?;
        let folder = Path::new(std::ffi::OsStr::from_bytes(first));
        return Some(folder.join(format!("{scope}.known.json")));
    }
    let file = std::path::absolute(file).ok()?;
    (!file.starts_with("/etc")).then(|| file.with_extension("known.json"))
}

/// Answers SIGHUP: takes what can change while sessions live. A wrong file changes nothing.
fn reload(file: &Path, reloader: &kornak_proxy::Reloader, logs: &crate::logging::Logs) {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    match kornak_config::load_proxy(Some(file), &environment) {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                tracing::warn!(why = warning.as_str(), "configuration");
            }
            logs.reload(&loaded.settings.log);
            for key in reloader.reload(loaded.settings) {
                tracing::warn!(key, "changed value needs a restart of the proxy");
            }
            tracing::info!("configuration reloaded");
        }
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "configuration is wrong, the old one stays in force");
        }
    }
}
