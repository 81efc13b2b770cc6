//! Whether a dynamic configuration makes sense, key by key: before it is stored, and when it is read.
//!
//! Keys that nobody here knows are the business of others. What Patroni reads is accepted: text for numbers,
//! `on` and `off`, `null` for what is absent.

use std::fmt;

use serde_json::{Map, Value};

use super::{MAXIMUM_TTL, number, seconds_with_unit};

/// The three names of the operator's slots.
pub(super) const SLOTS: [&str; 3] = ["slots", "permanent_slots", "permanent_replication_slots"];

/// A value that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The keys that lead to it.
    pub path: Vec<String>,
    pub expected: &'static str,
    /// A mode of the cluster, or the life of a slot, depends on it: no default may take its place.
    pub decides: bool,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}", self.path.join("."), self.expected)
    }
}

impl std::error::Error for Problem {}

#[derive(Clone, Copy)]
enum Kind {
    Seconds,
    /// Seconds, or a number with a unit.
    Span,
    Number,
    Switch,
    Mode,
    Section,
    List,
    StandbyCluster,
}

impl Kind {
    fn expected(self) -> &'static str {
        match self {
            Self::Seconds => "a number of seconds",
            Self::Span => "a number of seconds, or a time such as 30min",
            Self::Number => "a number",
            Self::Switch => "true or false",
            Self::Mode => "true, false or quorum",
            Self::Section => "keys and values",
            Self::List => "a list",
            Self::StandbyCluster => {
                "host, port and restore_command of the primary elsewhere, as text or number"
            }
        }
    }

    fn admits(self, value: &Value) -> bool {
        match self {
            _ if value.is_null() => true,
            Self::Seconds | Self::Number => number(value).is_some(),
            Self::Span => seconds_with_unit(value).is_some(),
            Self::Switch => is_switch(value),
            Self::Mode => {
                is_switch(value)
                    || value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("quorum"))
            }
            Self::Section => value.is_object(),
            Self::List => value.is_array(),
            Self::StandbyCluster => value.as_object().is_some_and(is_source),
        }
    }
}

const TOP: [(&str, Kind, bool); 23] = [
    ("ttl", Kind::Seconds, false),
    ("loop_wait", Kind::Seconds, false),
    ("retry_timeout", Kind::Seconds, false),
    ("primary_start_timeout", Kind::Seconds, false),
    ("master_start_timeout", Kind::Seconds, false),
    ("primary_stop_timeout", Kind::Seconds, false),
    ("master_stop_timeout", Kind::Seconds, false),
    ("member_slots_ttl", Kind::Span, false),
    ("maximum_lag_on_failover", Kind::Number, false),
    ("maximum_lag_on_syncnode", Kind::Number, false),
    ("max_timelines_history", Kind::Number, false),
    ("synchronous_node_count", Kind::Number, false),
    ("check_timeline", Kind::Switch, false),
    ("postgresql", Kind::Section, false),
    ("pause", Kind::Switch, true),
    ("failsafe_mode", Kind::Switch, true),
    ("synchronous_mode", Kind::Mode, true),
    ("synchronous_mode_strict", Kind::Switch, true),
    ("standby_cluster", Kind::StandbyCluster, true),
    ("slots", Kind::Section, true),
    ("permanent_slots", Kind::Section, true),
    ("permanent_replication_slots", Kind::Section, true),
    ("ignore_slots", Kind::List, true),
];

const POSTGRESQL: [(&str, Kind); 7] = [
    ("parameters", Kind::Section),
    ("use_slots", Kind::Switch),
    ("use_pg_rewind", Kind::Switch),
    ("remove_data_directory_on_rewind_failure", Kind::Switch),
    ("remove_data_directory_on_diverged_timelines", Kind::Switch),
    ("pg_hba", Kind::List),
    ("pg_ident", Kind::List),
];

/// Values that make no sense in a configuration, or in a change of one.
pub fn problems(raw: &Map<String, Value>) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut note = |path: &[&str], kind: Kind, decides| {
        let path = path.iter().map(|key| (*key).to_owned()).collect();
        found.push(Problem { path, expected: kind.expected(), decides });
    };
    for (key, kind, decides) in TOP {
        if raw.get(key).is_some_and(|value| !kind.admits(value)) {
            note(&[key], kind, decides);
        }
    }
    let Some(section) = raw.get("postgresql").and_then(Value::as_object) else { return found };
    for (key, kind) in POSTGRESQL {
        if section.get(key).is_some_and(|value| !kind.admits(value)) {
            // Without slots the members' would be dropped.
            note(&["postgresql", key], kind, key == "use_slots");
        }
    }
    let parameters = section.get("parameters").and_then(Value::as_object);
    for (name, value) in parameters.into_iter().flatten() {
        if value.is_object() || value.is_array() {
            found.push(Problem {
                path: vec!["postgresql".to_owned(), "parameters".to_owned(), name.clone()],
                expected: "text, a number, true or false",
                decides: false,
            });
        }
    }
    found
}

/// A `ttl` that is not taken as it is, because it is beyond [`MAXIMUM_TTL`].
pub fn ttl_beyond_the_ceiling(raw: &Map<String, Value>) -> Option<f64> {
    raw.get("ttl").and_then(number).filter(|ttl| *ttl > MAXIMUM_TTL.as_secs_f64())
}

/// Keys that neither Kornak nor Patroni reads; a misspelled one is stored, and nothing comes of it.
pub fn unread(raw: &Map<String, Value>) -> Vec<&str> {
    let known = |key: &str| TOP.iter().any(|(name, _, _)| *name == key);
    raw.iter()
        .filter(|(key, value)| !known(key) && !value.is_null())
        .map(|(key, _)| key.as_str())
        .collect()
}

/// Takes the value at `path` from another configuration; removes it if that has none.
pub(super) fn replace(raw: &mut Map<String, Value>, path: &[String], from: &Map<String, Value>) {
    match path {
        [] => {}
        [key] => {
            if let Some(value) = from.get(key) {
                raw.insert(key.clone(), value.clone());
            } else {
                raw.shift_remove(key);
            }
        }
        [key, rest @ ..] => {
            let empty = Map::new();
            let from = from.get(key).and_then(Value::as_object).unwrap_or(&empty);
            if let Some(inner) = raw.get_mut(key).and_then(Value::as_object_mut) {
                replace(inner, rest, from);
            }
        }
    }
}

fn is_switch(value: &Value) -> bool {
    match value {
        Value::Bool(_) | Value::Number(_) => true,
        Value::String(text) => {
            let word = text.to_ascii_lowercase();
            matches!(word.as_str(), "true" | "on" | "yes" | "1" | "false" | "off" | "no" | "0")
        }
        _ => false,
    }
}

/// Whether what is there of a standby cluster's source can be read.
fn is_source(section: &Map<String, Value>) -> bool {
    section.iter().all(|(key, value)| match key.as_str() {
        "host" | "restore_command" => value.is_null() || value.is_string() || value.is_number(),
        "port" => match value {
            Value::Null => true,
            Value::Number(port) => port.as_u64().is_some_and(|port| u16::try_from(port).is_ok()),
            Value::String(port) => port.is_empty() || port.trim().parse::<u16>().is_ok(),
            _ => false,
        },
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nobody_reads_is_named() {
        let config = json!({"ttl": 20, "loop_wiat": 5, "gone": null, "postgresql": {"x": 1}});
        assert_eq!(unread(config.as_object().unwrap()), ["loop_wiat"]);
    }

    #[test]
    fn a_lease_of_years_is_noticed() {
        for (ttl, noticed) in
            [(json!(3600), None), (json!("86400"), Some(86400.0)), (json!("x"), None)]
        {
            let config = json!({ "ttl": ttl });
            assert_eq!(ttl_beyond_the_ceiling(config.as_object().unwrap()), noticed, "{config}");
        }
    }

    fn wrong(config: &Value) -> Vec<String> {
        problems(config.as_object().unwrap()).iter().map(|it| it.path.join(".")).collect()
    }

    #[test]
    fn what_patroni_reads_makes_sense() {
        let config = json!({
            "ttl": "30", "loop_wait": 10.5, "retry_timeout": -1, "maximum_lag_on_syncnode": -1,
            "member_slots_ttl": "30min", "synchronous_mode": "Quorum", "pause": null, "failsafe_mode": "on",
            "synchronous_mode_strict": 0, "standby_cluster": {"host": "h", "port": "5432", "x": []},
            "slots": {"a": 1, "b": {"type": "logical"}}, "ignore_slots": [], "tags": {"anything": [1]},
            "postgresql": {"use_slots": true, "parameters": {"a": 1, "b": "x", "c": true, "d": null},
                           "pg_hba": ["local all all trust"], "bin_name": {}}
        });
        assert_eq!(wrong(&config), [""; 0]);
        assert_eq!(wrong(&json!({"standby_cluster": {}, "postgresql": null})), [""; 0]);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (config, key) in [
            (json!({"ttl": "nan"}), "ttl"),
            (json!({"retry_timeout": "inf"}), "retry_timeout"),
            (json!({"loop_wait": {"a": 1}}), "loop_wait"),
            (json!({"ttl": true}), "ttl"),
            (json!({"member_slots_ttl": "-nan"}), "member_slots_ttl"),
            (json!({"synchronous_mode": "quorumm"}), "synchronous_mode"),
            (json!({"pause": "maybe"}), "pause"),
            (json!({"standby_cluster": "h"}), "standby_cluster"),
            (json!({"standby_cluster": {"host": ["h"]}}), "standby_cluster"),
            (json!({"standby_cluster": {"port": 70000}}), "standby_cluster"),
            (json!({"slots": []}), "slots"),
            (json!({"postgresql": 5}), "postgresql"),
            (json!({"postgresql": {"parameters": []}}), "postgresql.parameters"),
            (json!({"postgresql": {"parameters": {"a": {}}}}), "postgresql.parameters.a"),
        ] {
            assert_eq!(wrong(&config), [key], "{config}");
        }
    }
}
