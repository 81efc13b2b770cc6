//! Where the logs go and what a line looks like: standard error or files, Kornak's own form,
//! Patroni's, or JSON; one line per event.
//!
//! Patroni's form is Python's: `log.format` says where the time, the level and the message stand, and
//! people's log parsers rely on it. The level and the levels of modules can be changed while the
//! process runs ([`Logs::reload`]).

mod format;
mod oneline;
mod rotate;

use std::io::IsTerminal;
use std::path::Path;

use anyhow::Context;
use kornak_cluster::discard;
use kornak_config::{LogLevel, LogSettings, LogType};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::Handle;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

use format::PythonFormat;
use oneline::OneLine;
use rotate::RotatingFile;

/// Overrides the level, in the syntax of `tracing_subscriber`: `debug`, `kornak_agent=trace,info`.
pub const VARIABLE: &str = "KORNAK_LOG";

/// Libraries that talk at `info` and `debug` about what is no event of the cluster.
const QUIET: &[&str] =
    &["h2", "hyper", "hyper_util", "hyper_rustls", "rustls", "tokio_postgres", "tonic", "tower"];

/// Name of the file in `log.dir`, which is where people look for it.
const FILE: &str = "patroni.log";

/// Where the event comes from with which a program ends: Python's level CRITICAL.
const LAST_WORDS: &str = "kornak_ctl::last_words";

/// Says why the agent ends, for those who read its log and not what it writes to the terminal.
pub fn last_words(error: &anyhow::Error) {
    let error: &(dyn std::error::Error + 'static) = error.as_ref();
    tracing::error!(target: LAST_WORDS, error, "agent ends");
}

/// A logger at work.
#[derive(Debug, Clone)]
pub struct Logs {
    filter: Handle<EnvFilter, Registry>,
}

impl Logs {
    /// Puts other levels in force. Where and in which form lines are written stays.
    pub fn reload(&self, settings: &LogSettings) {
        match filter(settings) {
            Ok(filter) => {
                // Fails only if the logger is gone, and then nobody could be told.
                discard::nowhere_to_report(self.filter.reload(filter));
            }
            Err(error) => tracing::warn!(error = %format!("{error:#}"), "levels stay as they are"),
        }
    }
}

/// Starts logging. `file` wins over the settings' folder.
///
/// # Errors
/// The file cannot be written, or [`VARIABLE`] makes no sense.
pub fn start(settings: &LogSettings, file: Option<&Path>) -> anyhow::Result<Logs> {
    let (filter, handle) = tracing_subscriber::reload::Layer::new(filter(settings)?);
    let file = file.map(Path::to_owned);
    let file = file.or_else(|| settings.dir.as_ref().map(|dir| dir.join(FILE)));
    let (writer, colours) = match file {
        Some(path) => {
            let file = RotatingFile::open(&path, settings)
                .with_context(|| format!("open the log {}", path.display()))?;
            (BoxMakeWriter::new(file), false)
        }
        None => (BoxMakeWriter::new(std::io::stderr), std::io::stderr().is_terminal()),
    };
    let writer = OneLine { inner: writer, colours };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    let lines = match (settings.kind, &settings.format) {
        (LogType::Plain, None) => lines.with_target(false).boxed(),
        _ => lines.with_ansi(false).event_format(PythonFormat::new(settings)).boxed(),
    };
    let started = tracing_subscriber::registry().with(filter).with(lines).try_init();
    started.map_err(|error| anyhow::anyhow!("start logging: {error}"))?;
    Ok(Logs { filter: handle })
}

fn filter(settings: &LogSettings) -> anyhow::Result<EnvFilter> {
    match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(&text).with_context(|| format!("{VARIABLE}: {text:?}"))
        }
        _ => Ok(EnvFilter::new(directives(settings))),
    }
}

fn word(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Debug => "debug",
        LogLevel::Info => "info",
        LogLevel::Warning => "warn",
        LogLevel::Error | LogLevel::Critical => "error",
    }
}

fn directives(settings: &LogSettings) -> String {
    let level = word(settings.level);
    let quiet = QUIET.iter().filter(|_| level != "error").map(|name| format!("{name}=warn"));
    let named = settings
        .loggers
        .iter()
        .map(|(name, level)| format!("{}={}", name.replace('.', "::"), word(*level)));
    std::iter::once(level.to_owned()).chain(quiet).chain(named).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_makes_a_filter() {
        for level in [LogLevel::Debug, LogLevel::Info, LogLevel::Warning, LogLevel::Critical] {
            let loggers = vec![("kornak_agent.api".to_owned(), LogLevel::Debug)];
            let settings = LogSettings { level, loggers, ..LogSettings::default() };
            let directives = directives(&settings);
            assert!(directives.ends_with("kornak_agent::api=debug"), "{directives}");
            assert!(EnvFilter::try_new(&directives).is_ok(), "{directives}");
        }
    }
}
