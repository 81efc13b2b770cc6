//! Numbers with units as PostgreSQL writes them (/docs/current/config-setting.html), which Patroni
//! accepts in `lag=` and in the time limit of a restart.

use serde_json::Value;

/// Bytes: `1048576`, `1024kB`, `10MB`. `None` if it is not such a number.
pub(crate) fn bytes(text: &str) -> Option<u64> {
    let (amount, unit) = split(text)?;
    let factor = match unit {
        "" | "B" => 1.0,
        "kB" => 1024.0,
        "MB" => 1024.0 * 1024.0,
        "GB" => 1024.0 * 1024.0 * 1024.0,
        "TB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    Some((amount * factor) as u64)
}

/// Seconds: `30`, `1500ms`, `5min`. `None` if it is not such a number.
pub(crate) fn seconds(text: &str) -> Option<f64> {
    let (amount, unit) = split(text)?;
    let factor = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return None,
    };
    Some(amount * factor)
}

/// Patroni's words for yes, in a string or not; anything else is no.
pub(crate) fn is_true(value: &Value) -> bool {
    let word = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    matches!(word.to_ascii_lowercase().as_str(), "on" | "true" | "yes" | "1")
}

fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (amount, unit) = text.split_at_checked(end)?;
    Some((amount.parse().ok()?, unit.trim()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sizes_and_times_have_postgresqls_units() {
        for (text, expected) in [
            ("16", Some(16)),
            ("10MB", Some(10 << 20)),
            (" 1 kB ", Some(1024)),
            ("0.5GB", Some(1 << 29)),
            ("10mb", None),
            ("", None),
            ("MB", None),
            ("-1", None),
        ] {
            assert_eq!(bytes(text), expected, "{text:?}");
        }
        assert_eq!(seconds("1500ms"), Some(1.5));
        assert_eq!(seconds("2min"), Some(120.0));
        assert_eq!(seconds("2 fortnights"), None);
    }

    #[test]
    fn yes_has_patronis_forms() {
        for (value, expected) in [
            (json!(true), true),
            (json!("True"), true),
            (json!("on"), true),
            (json!("YES"), true),
            (json!(1), true),
            (json!("1"), true),
            (json!(false), false),
            (json!("off"), false),
            (json!("maybe"), false),
            (json!(2), false),
            (json!(null), false),
            (json!({}), false),
        ] {
            assert_eq!(is_true(&value), expected, "{value}");
        }
    }
}
