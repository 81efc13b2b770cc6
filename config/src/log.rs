//! `log`: how much is written and in which form.

use std::path::PathBuf;

/// Python's level names, as Patroni takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    Debug,
    #[default]
    Info,
    Warning,
    Error,
    Critical,
}

/// One line per event as text, or as a JSON object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    #[default]
    Plain,
    Json,
}

/// The parts of Patroni's `log` that have a meaning here. Rotation is left to journald or
/// logrotate: `dir` names a folder for `kornak.log`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogSettings {
    pub level: LogLevel,
    pub format: LogFormat,
    /// `None`: standard error.
    pub dir: Option<PathBuf>,
}
