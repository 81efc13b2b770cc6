//! Where the logs go: standard error or a file, as text or JSON, one line per event.

use std::fs::OpenOptions;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use kornak_config::{LogFormat, LogLevel, LogSettings};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// Overrides the level, in the syntax of `tracing_subscriber`: `debug`, `kornak_agent=trace,info`.
pub const VARIABLE: &str = "KORNAK_LOG";

/// Libraries that talk at `info` and `debug` about what is no event of the cluster.
const QUIET: &[&str] = &["h2", "hyper", "hyper_util", "rustls", "tokio_postgres", "tonic", "tower"];

/// Starts logging. `file` wins over the settings' folder.
///
/// # Errors
/// The file cannot be written, or [`VARIABLE`] makes no sense.
pub fn start(settings: &LogSettings, file: Option<&Path>) -> anyhow::Result<()> {
    let filter = match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(&text).with_context(|| format!("{VARIABLE}: {text:?}"))?
        }
        _ => EnvFilter::new(directives(settings.level)),
    };
    let file = file.map(Path::to_owned);
    let file = file.or_else(|| settings.dir.as_ref().map(|dir| dir.join("kornak.log")));
    let (writer, colours) = match file {
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(&path);
            let file = file.with_context(|| format!("open the log {}", path.display()))?;
            (BoxMakeWriter::new(Arc::new(file)), false)
        }
        None => (BoxMakeWriter::new(std::io::stderr), std::io::stderr().is_terminal()),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(colours)
        .with_target(false);
    let started = match settings.format {
        LogFormat::Plain => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("start logging: {error}"))
}

fn directives(level: LogLevel) -> String {
    let level = match level {
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warning => "warn",
        LogLevel::Error | LogLevel::Critical => "error",
    };
    let quiet = QUIET.iter().map(|name| format!(",{name}=warn"));
    if level == "error" {
        level.to_owned()
    } else {
        quiet.fold(level.to_owned(), |all, one| all + &one)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_makes_a_filter() {
        for level in [LogLevel::Debug, LogLevel::Info, LogLevel::Warning, LogLevel::Critical] {
            assert!(EnvFilter::try_new(directives(level)).is_ok(), "{level:?}");
        }
    }
}
