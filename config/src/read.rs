//! From a checked tree to settings: which keys there are, what each must look like, and what holds
//! where it is absent. One module per part of a file.

pub(crate) mod agent;
pub(crate) mod ctl;
pub(crate) mod postgresql;
pub(crate) mod proxy;
mod rules;
pub(crate) mod store;

use kornak_cluster::{GroupId, Scope};

use crate::log::{LogFormat, LogLevel, LogSettings};
use crate::section::Section;

/// Top-level keys of Patroni's file that concern Patroni's own process alone.
const PATRONIS_OWN: &[&str] = &["thread_pool_size", "thread_stack_size", "proxy", "ctl"];

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

fn log(root: &Section<'_>) -> LogSettings {
    let section = root.section("log");
    section.tolerate(
        &["type", "level", "dir"],
        &[
            "traceback_level",
            "format",
            "dateformat",
            "static_fields",
            "max_queue_size",
            "mode",
            "file_num",
            "file_size",
            "loggers",
            "deduplicate_heartbeat_logs",
        ],
    );
    let levels = [
        ("DEBUG", LogLevel::Debug),
        ("INFO", LogLevel::Info),
        ("WARNING", LogLevel::Warning),
        ("WARN", LogLevel::Warning),
        ("ERROR", LogLevel::Error),
        ("CRITICAL", LogLevel::Critical),
        ("FATAL", LogLevel::Critical),
        ("NOTSET", LogLevel::Debug),
    ];
    let formats = [("plain", LogFormat::Plain), ("json", LogFormat::Json)];
    LogSettings {
        level: section.word("level", &levels).unwrap_or_default(),
        format: section.word("type", &formats).unwrap_or_default(),
        dir: section.path("dir"),
    }
}
