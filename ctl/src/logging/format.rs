//! Lines as Python's `logging` writes them, after `log.format`: text with `%(asctime)s` and the like
//! in it, or a JSON object of such fields.
//!
//! Fields that an event carries besides its message follow the message as `key=value` in text, and stand
//! under keys of their own in JSON.

use std::fmt::{self, Write as _};

use jiff::Zoned;
use kornak_cluster::discard;
use kornak_config::{LogField, LogSettings, LogType};
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{DefaultFields, FormatEvent, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Patroni's default format.
const USUAL: [&str; 3] = ["asctime", "levelname", "message"];

/// A line's form.
#[derive(Debug)]
pub(super) struct PythonFormat {
    kind: LogType,
    fields: Vec<LogField>,
    date_format: Option<String>,
    static_fields: Map<String, Value>,
}

impl PythonFormat {
    pub(super) fn new(settings: &LogSettings) -> Self {
        let usual = USUAL.map(|name| LogField::Named { field: name.into(), key: name.into() });
        let fields = match (&settings.format, settings.kind) {
            // In JSON a text names the fields that are wanted.
            (Some(fields), LogType::Json) => fields.iter().flat_map(named).collect(),
            (Some(fields), LogType::Plain) => fields.clone(),
            (None, _) => usual.to_vec(),
        };
        Self {
            kind: settings.kind,
            fields,
            date_format: settings.date_format.clone(),
            static_fields: settings.static_fields.clone(),
        }
    }

    fn time(&self, now: &Zoned) -> String {
        match &self.date_format {
            Some(format) => now.strftime(format).to_string(),
            None => {
                let millis = now.millisecond();
                format!("{},{millis:03}", now.strftime("%Y-%m-%d %H:%M:%S"))
            }
        }
    }

    /// One of Python's attributes of a record.
    fn attribute(&self, name: &str, record: &Record<'_>) -> Value {
        match name {
            "asctime" => self.time(&record.now).into(),
            "created" => (record.now.timestamp().as_microsecond() as f64 / 1e6).into(),
            "msecs" => record.now.millisecond().into(),
            "levelname" => record.level.name().into(),
            "levelno" => record.level.number().into(),
            "message" | "msg" => record.message.clone().into(),
            "name" | "module" => record.module.into(),
            "process" => std::process::id().into(),
            "processName" => "MainProcess".into(),
            "thread" => 0.into(),
            "threadName" => std::thread::current().name().unwrap_or("MainThread").to_owned().into(),
            "filename" | "pathname" => record.file.into(),
            "lineno" => record.line.into(),
            "funcName" => Value::from(""),
            _ => Value::Null,
        }
    }

    fn text(&self, record: &Record<'_>) -> String {
        let mut line = String::new();
        for field in &self.fields {
            match field {
                LogField::Text(format) => self.fill(format, record, &mut line),
                LogField::Named { field, .. } => {
                    if !line.is_empty() {
                        line.push(' ');
                    }
                    line.push_str(&plain(&self.attribute(field, record)));
                }
            }
        }
        line
    }

    /// `%(name)s`, with flags and width as in `%(levelname)-8s`; `%%` is a percent sign.
    fn fill(&self, format: &str, record: &Record<'_>, line: &mut String) {
        let mut rest = format;
        while let Some(start) = rest.find('%') {
            line.push_str(rest.get(..start).unwrap_or_default());
            rest = rest.get(start + 1..).unwrap_or_default();
            if let Some(after) = rest.strip_prefix('%') {
                line.push('%');
                rest = after;
                continue;
            }
            let parsed = rest.strip_prefix('(').and_then(|inner| {
                let (name, after) = inner.split_once(')')?;
                let end = after.find(|letter: char| letter.is_ascii_alphabetic())?;
                let (flags, after) = after.split_at_checked(end)?;
                Some((name, flags, after.get(1..)?))
            });
            let Some((name, flags, after)) = parsed else {
                line.push('%');
                continue;
            };
            let text = plain(&self.attribute(name, record));
            let width = flags.trim_start_matches('-').split('.').next().unwrap_or_default();
            let width = width.parse().unwrap_or(0);
            discard::string_takes_all(if flags.starts_with('-') {
                write!(line, "{text:<width$}")
            } else {
                write!(line, "{text:>width$}")
            });
            rest = after;
        }
        line.push_str(rest);
    }

    fn json(&self, record: &Record<'_>, extra: Map<String, Value>) -> String {
        let mut out = Map::new();
        for field in &self.fields {
            if let LogField::Named { field, key } = field {
                out.insert(key.clone(), self.attribute(field, record));
            }
        }
        for (key, value) in extra {
            out.entry(key).or_insert(value);
        }
        out.extend(self.static_fields.clone());
        Value::Object(out).to_string()
    }
}

/// The fields that a text names, for JSON.
fn named(field: &LogField) -> Vec<LogField> {
    let LogField::Text(text) = field else { return vec![field.clone()] };
    let names = text.split("%(").skip(1).filter_map(|part| part.split_once(')'));
    names
        .map(|(name, _)| LogField::Named { field: name.to_owned(), key: name.to_owned() })
        .collect()
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Python's levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PythonLevel {
    Debug,
    Info,
    Warning,
    Error,
    /// The program ends with what is said.
    Critical,
}

impl PythonLevel {
    fn of(level: Level, target: &str) -> Self {
        match level {
            Level::ERROR if target == super::LAST_WORDS => Self::Critical,
            Level::ERROR => Self::Error,
            Level::WARN => Self::Warning,
            Level::INFO => Self::Info,
            Level::DEBUG | Level::TRACE => Self::Debug,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warning => "WARNING",
            Self::Error => "ERROR",
            Self::Critical => "CRITICAL",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Debug => 10,
            Self::Info => 20,
            Self::Warning => 30,
            Self::Error => 40,
            Self::Critical => 50,
        }
    }
}

struct Record<'a> {
    now: Zoned,
    level: PythonLevel,
    message: String,
    module: &'a str,
    file: Option<&'a str>,
    line: Option<u32>,
}

/// The message, and everything else.
#[derive(Default)]
struct Parts {
    message: String,
    rest: Map<String, Value>,
}

impl Visit for Parts {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.rest.insert(field.name().to_owned(), text.into());
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.rest.insert(field.name().to_owned(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.rest.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.rest.insert(field.name().to_owned(), value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.rest.insert(field.name().to_owned(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.rest.insert(field.name().to_owned(), value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut cause = value.source();
        while let Some(next) = cause {
            text = format!("{text}: {next}");
            cause = next.source();
        }
        self.rest.insert(field.name().to_owned(), text.into());
    }
}

impl<S> FormatEvent<S, DefaultFields> for PythonFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    DefaultFields: for<'a> FormatFields<'a>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, DefaultFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut parts = Parts::default();
        event.record(&mut parts);
        let metadata = event.metadata();
        let mut record = Record {
            now: Zoned::now(),
            level: PythonLevel::of(*metadata.level(), metadata.target()),
            message: parts.message,
            module: metadata.target(),
            file: metadata.file(),
            line: metadata.line(),
        };
        if self.kind == LogType::Json {
            return writeln!(writer, "{}", self.json(&record, parts.rest));
        }
        for (key, value) in &parts.rest {
            let text = match value {
                Value::String(text) if text.contains(' ') => format!("{text:?}"),
                other => plain(other),
            };
            record.message.push_str(&format!(" {key}={text}"));
        }
        for span in context.event_scope().into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<FormattedFields<DefaultFields>>()
                && !fields.fields.is_empty()
            {
                record.message.push_str(&format!(" {}", fields.fields));
            }
        }
        writeln!(writer, "{}", self.text(&record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record<'static> {
        Record {
            now: "2026-11-22T22:05:56.167290123+00:00[UTC]".parse().expect("a time"),
            level: PythonLevel::Warning,
            message: "server stopped mode=Fast".to_owned(),
            module: "kornak_agent::jobs",
            file: Some("jobs.rs"),
            line: Some(7),
        }
    }

    #[test]
    fn the_level_stands_where_the_format_says() {
        for (format, date, expected) in [
            (
                "%(asctime)s %(levelname)s: %(message)s",
                None,
                "2026-11-22 22:05:56,167 WARNING: server stopped mode=Fast",
            ),
            (
                "[%(levelname)-8s] %(asctime)s %(name)s:%(lineno)d 100%% %(message)s",
                Some("%d/%b/%Y %H:%M"),
                "[WARNING ] 22/Nov/2026 22:05 kornak_agent::jobs:7 100% server stopped mode=Fast",
            ),
            ("%(levelno)5d|% %(message", None, "   30|% %(message"),
        ] {
            let settings = LogSettings {
                format: Some(vec![LogField::Text(format.to_owned())]),
                date_format: date.map(str::to_owned),
                ..LogSettings::default()
            };
            assert_eq!(PythonFormat::new(&settings).text(&record()), expected, "{format}");
        }
    }

    #[test]
    fn what_a_program_ends_with_is_critical() {
        use crate::logging::LAST_WORDS;
        for (level, target, name, number) in [
            (Level::ERROR, LAST_WORDS, "CRITICAL", 50),
            (Level::ERROR, "kornak_agent", "ERROR", 40),
            (Level::INFO, LAST_WORDS, "INFO", 20),
        ] {
            let level = PythonLevel::of(level, target);
            assert_eq!((level.name(), level.number()), (name, number), "{target}");
        }
    }

    #[test]
    fn json_has_the_wanted_keys_and_the_fixed_ones() {
        let mut settings = LogSettings { kind: LogType::Json, ..LogSettings::default() };
        settings.static_fields.insert("app".to_owned(), "patroni".into());
        let extra = Map::from_iter([("mode".to_owned(), Value::from("Fast"))]);
        let found = PythonFormat::new(&settings).json(&record(), extra.clone());
        assert_eq!(
            found,
            r#"{"asctime":"2026-11-22 22:05:56,167","levelname":"WARNING","message":"server stopped mode=Fast","mode":"Fast","app":"patroni"}"#
        );
        let renamed =
            |field: &str, key: &str| LogField::Named { field: field.into(), key: key.into() };
        settings.format = Some(vec![renamed("message", "message"), renamed("levelname", "level")]);
        let found = PythonFormat::new(&settings).json(&record(), extra);
        assert_eq!(
            found,
            r#"{"message":"server stopped mode=Fast","level":"WARNING","mode":"Fast","app":"patroni"}"#
        );
    }
}
