//! `log`: how much is written, where, and in which form.

use std::path::PathBuf;

use serde_json::{Map, Value};

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
pub enum LogType {
    #[default]
    Plain,
    Json,
}

/// A part of `log.format`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogField {
    /// Python's `%(levelname)s: %(message)s`.
    Text(String),
    /// In JSON: a field, and the key under which it is written.
    Named { field: String, key: String },
}

/// Patroni's `log`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    pub level: LogLevel,
    pub kind: LogType,
    /// `None`: Kornak's own form of a line; in JSON Patroni's three fields.
    pub format: Option<Vec<LogField>>,
    /// For `strftime`; `None`: `2026-11-22 22:05:55,870`.
    pub date_format: Option<String>,
    /// Put into every line of JSON.
    pub static_fields: Map<String, Value>,
    /// `None`: standard error.
    pub dir: Option<PathBuf>,
    /// Permissions of the files; `None`: the process's umask decides.
    pub mode: Option<u32>,
    /// Files kept besides the one that is written.
    pub file_num: u64,
    /// Bytes after which a new file is begun; 0: never.
    pub file_size: u64,
    /// Levels of parts of the program, by the name of its module.
    pub loggers: Vec<(String, LogLevel)>,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            level: LogLevel::default(),
            kind: LogType::default(),
            format: None,
            date_format: None,
            static_fields: Map::new(),
            dir: None,
            mode: None,
            file_num: 4,
            file_size: 25_000_000,
            loggers: Vec::new(),
        }
    }
}
