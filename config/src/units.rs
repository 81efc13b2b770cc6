//! Durations and sizes with the units that PostgreSQL takes
//! (/docs/current/config-setting.html#CONFIG-SETTING-NAMES-VALUES).

use std::time::Duration;

use serde_json::Value;

/// A number of seconds, or a number with `ms`, `s`, `min`, `h` or `d`. Not negative, at most 100
/// years: more is a mistake, and sums of it could overflow.
pub(crate) fn duration(value: &Value) -> Option<Duration> {
    let (amount, unit) = amount_and_unit(value)?;
    let seconds = match unit.as_str() {
        "" | "s" | "sec" => amount,
        "ms" => amount / 1000.0,
        "min" | "m" => amount * 60.0,
        "h" => amount * 3600.0,
        "d" => amount * 86400.0,
        _ => return None,
    };
    const LONGEST_S: f64 = 100.0 * 365.0 * 86400.0;
    (0.0..=LONGEST_S).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

/// A number of bytes, or a number with `B`, `kB`, `MB`, `GB` or `TB` (powers of 1024).
pub(crate) fn bytes(value: &Value) -> Option<u64> {
    let (amount, unit) = amount_and_unit(value)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1_u64,
        "kb" => 1 << 10,
        "mb" => 1 << 20,
        "gb" => 1 << 30,
        "tb" => 1 << 40,
        _ => return None,
    };
    let bytes = amount * factor as f64;
    (0.0..1e18).contains(&bytes).then_some(bytes as u64)
}

fn amount_and_unit(value: &Value) -> Option<(f64, String)> {
    match value {
        Value::Number(number) => Some((number.as_f64()?, String::new())),
        Value::String(text) => {
            let text = text.trim();
            let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
            let (digits, unit) = text.split_at(split);
            Some((digits.trim().parse().ok()?, unit.trim().to_owned()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_take_postgresqls_units() {
        for (value, millis) in [
            (Value::from(5), Some(5000)),
            (Value::from(0.25), Some(250)),
            (Value::from("250ms"), Some(250)),
            (Value::from("2 min"), Some(120_000)),
            (Value::from("1h"), Some(3_600_000)),
            (Value::from("7"), Some(7000)),
            (Value::from(-1), None),
            (Value::from("soon"), None),
            (Value::from("1 parsec"), None),
            (Value::from(1e30), None),
            (Value::from(true), None),
        ] {
            assert_eq!(duration(&value), millis.map(Duration::from_millis), "{value}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (value, expected) in [
            (Value::from(10), Some(10)),
            (Value::from("10MB"), Some(10 << 20)),
            (Value::from("1 kB"), Some(1024)),
            (Value::from("-1"), None),
            (Value::from("1 mile"), None),
        ] {
            assert_eq!(bytes(&value), expected, "{value}");
        }
    }
}
