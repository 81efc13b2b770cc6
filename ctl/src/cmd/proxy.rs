//! `kornak proxy FILE`.

use std::path::PathBuf;

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
    let settings = loaded.settings;
    crate::logging::start(&settings.log, None)?;
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
        signals::on_hangup(stop, move || signals::reloading(|| reload(&file, &reloader)))?;
        signals::ready();
        running.join.await??;
        Ok(())
    })
}

/// Answers SIGHUP: takes what can change while sessions live. A wrong file changes nothing.
fn reload(file: &std::path::Path, reloader: &kornak_proxy::Reloader) {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    match kornak_config::load_proxy(Some(file), &environment) {
        Ok(loaded) => {
            for warning in &loaded.warnings {
                tracing::warn!(why = warning.as_str(), "configuration");
            }
            reloader.reload(&loaded.settings);
            tracing::info!(
                "configuration was read again: rules and certificates are in force now, \
                 the rest takes effect with the next start"
            );
        }
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "configuration is wrong, the old one stays in force");
        }
    }
}
