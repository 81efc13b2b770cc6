//! From a checked tree to settings: which keys there are, what each must look like, and what holds
//! where it is absent. One module per part of a file.

pub(crate) mod agent;
mod citus;
pub(crate) mod ctl;
mod limits;
pub(crate) mod postgresql;
pub(crate) mod proxy;
mod rules;
pub(crate) mod store;

use kornak_cluster::{GroupId, Scope};

use crate::log::{LogField, LogLevel, LogSettings, LogType};
use crate::section::Section;

/// Top-level keys of Patroni's file that concern Patroni's own process alone.
const PATRONIS_OWN: &[(&str, &str)] = &[
    ("thread_pool_size", "members are asked without threads"),
    ("thread_stack_size", "members are asked without threads"),
];

/// Sections of a file that serves agent, proxy and command together.
const OF_OTHERS: &[&str] = &["proxy", "ctl"];

/// Patroni's default namespace.
const DEFAULT_NAMESPACE: &str = "service";

/// `scope`, `namespace` and the Citus group.
fn scope(root: &Section<'_>, group: Option<GroupId>) -> Option<Scope> {
    let name = root.parsed("scope", "a cluster name without slashes", |text| {
        let sane = !text.is_empty() && !text.contains(['/', '\0', '\n']);
        sane.then(|| text.to_owned())
    });
    let name = root.required("scope", "the cluster's name", name)?;
    let namespace = root.text("namespace").unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
    Some(Scope::new(&namespace, &name, group))
}

/// Python's names of levels.
const LEVELS: &[(&str, LogLevel)] = &[
    ("DEBUG", LogLevel::Debug),
    ("INFO", LogLevel::Info),
    ("WARNING", LogLevel::Warning),
    ("WARN", LogLevel::Warning),
    ("ERROR", LogLevel::Error),
    ("CRITICAL", LogLevel::Critical),
    ("FATAL", LogLevel::Critical),
    ("NOTSET", LogLevel::Debug),
];

fn log(root: &Section<'_>) -> LogSettings {
    let section = root.section("log");
    section.tolerate(
        &[
            "type",
            "level",
            "format",
            "dateformat",
            "static_fields",
            "dir",
            "mode",
            "file_num",
            "file_size",
            "loggers",
        ],
        &[
            ("traceback_level", "errors are logged with their causes, without tracebacks"),
            ("max_queue_size", "lines are written at once, without a queue"),
            ("deduplicate_heartbeat_logs", "a decision is logged when it changes"),
        ],
    );
    let types = [("plain", LogType::Plain), ("json", LogType::Json)];
    let kind = section.word("type", &types).unwrap_or_default();
    let defaults = LogSettings::default();
    let number = |key, default: u64| section.count(key, 0..=u64::from(u32::MAX)).unwrap_or(default);
    let mode = section.parsed("mode", "the permissions of files, such as 0644", |text| {
        // YAML has read an octal number; in quotes it is one still.
        let quoted = section.value("mode").is_some_and(serde_json::Value::is_string);
        let radix = if quoted { 8 } else { 10 };
        u32::from_str_radix(text.trim_start_matches("0o"), radix).ok().filter(|mode| *mode <= 0o777)
    });
    LogSettings {
        level: section.word("level", LEVELS).unwrap_or_default(),
        kind,
        format: log_format(&section),
        date_format: section.text("dateformat"),
        static_fields: section.map("static_fields"),
        dir: section.path("dir"),
        mode,
        file_num: number("file_num", defaults.file_num),
        file_size: number("file_size", defaults.file_size),
        loggers: loggers(&section.section("loggers")),
    }
}

/// A text in Python's `%` form; in JSON also a list of fields, each as it is or renamed.
fn log_format(section: &Section<'_>) -> Option<Vec<LogField>> {
    match section.value("format")? {
        serde_json::Value::String(text) => Some(vec![LogField::Text(text.clone())]),
        serde_json::Value::Array(items) => {
            let mut fields = Vec::new();
            for item in items {
                match item {
                    serde_json::Value::String(name) => {
                        fields.push(LogField::Named { field: name.clone(), key: name.clone() });
                    }
                    serde_json::Value::Object(renamed) => {
                        fields.extend(renamed.iter().filter_map(|(field, key)| {
                            let key = key.as_str()?.to_owned();
                            Some(LogField::Named { field: field.clone(), key })
                        }));
                    }
                    _ => section.expected("format", "names of fields, or field: name"),
                }
            }
            Some(fields)
        }
        _ => {
            section.expected("format", "a text, or with type json a list of fields");
            None
        }
    }
}

/// Levels of parts of the program; Patroni's own parts do not exist here.
fn loggers(section: &Section<'_>) -> Vec<(String, LogLevel)> {
    let mut found = Vec::new();
    for (name, _) in section.entries() {
        let level = section.word(name, LEVELS);
        if name.starts_with("kornak") {
            found.extend(level.map(|level| (name.clone(), level)));
        } else {
            section.warn(name, "has no effect, it is a part of Patroni; Kornak's are kornak_agent, kornak_dcs, kornak_proxy");
        }
    }
    found
}
