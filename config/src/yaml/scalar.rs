//! Plain scalars of YAML 1.1 as PyYAML's resolver, and so Patroni, reads them. It is neither the
//! standard's 1.1 (`y` and `n` are words here) nor its 1.2 (`on` is true, `1e3` is a word).

use std::ops::Range;

use serde_json::{Number, Value};

/// `value` is what the parser made of the text at `bytes`, of which only a plain scalar is its own value.
pub(super) fn as_pyyaml_does(value: Value, text: &str, bytes: Range<usize>) -> Value {
    let (Some(before), Some(written)) = (text.get(..bytes.start), text.get(bytes)) else {
        return value;
    };
    let last = before.trim_end().rsplit(char::is_whitespace).next().unwrap_or_default();
    // With a tag in front somebody has said what it is, and a block is a text.
    let said = last.trim_start_matches(['[', '{', ',']).starts_with(['!', '|', '>']);
    let plain = !said
        && match &value {
            Value::String(text) => text == written,
            _ => !written.starts_with(['*', '\'', '"', '|', '>']),
        };
    if plain { resolved(written).unwrap_or_else(|| Value::from(written)) } else { value }
}

fn resolved(text: &str) -> Option<Value> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Some(Value::Null),
        "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            return Some(Value::Bool(true));
        }
        "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Some(Value::Bool(false));
        }
        _ => {}
    }
    let (minus, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if !digits.starts_with(|first: char| first.is_ascii_digit() || first == '.') {
        return None;
    }
    whole(digits, minus).or_else(|| fraction(digits, minus))
}

fn whole(digits: &str, minus: bool) -> Option<Value> {
    let all = |text: &str, fits: fn(char) -> bool| {
        !text.is_empty() && text.chars().all(|it| it == '_' || fits(it))
    };
    let (text, radix) = if let Some(bits) = digits.strip_prefix("0b") {
        (bits, all(bits, |it| matches!(it, '0' | '1')).then_some(2)?)
    } else if let Some(hex) = digits.strip_prefix("0x") {
        (hex, all(hex, |it| it.is_ascii_hexdigit()).then_some(16)?)
    } else if digits == "0" {
        (digits, 10)
    } else if let Some(octal) = digits.strip_prefix('0') {
        (octal, all(octal, |it| it.is_digit(8)).then_some(8)?)
    } else if digits.contains(':') {
        return sixty(digits, minus);
    } else {
        (digits, all(digits, |it| it.is_ascii_digit()).then_some(10)?)
    };
    let value = i64::from_str_radix(&text.replace('_', ""), radix).ok()?;
    Some(Value::from(if minus { -value } else { value }))
}

/// `190:20:30`: hours, minutes and seconds.
fn sixty(digits: &str, minus: bool) -> Option<Value> {
    let mut parts = digits.split(':');
    let mut value: i64 = parts.next()?.replace('_', "").parse().ok()?;
    for part in parts {
        let fits = matches!(part.len(), 1 | 2) && part.bytes().all(|it| it.is_ascii_digit());
        let part: i64 = part.parse().ok().filter(|part| fits && *part < 60)?;
        value = value.checked_mul(60)?.checked_add(part)?;
    }
    Some(Value::from(if minus { -value } else { value }))
}

/// A point is needed, and an exponent needs its sign.
fn fraction(digits: &str, minus: bool) -> Option<Value> {
    let (before, after) = digits.split_once('.')?;
    let (after, exponent) = match after.split_once(['e', 'E']) {
        Some((after, exponent)) => (after, Some(exponent)),
        None => (after, None),
    };
    let digits_only = |text: &str| text.bytes().all(|it| it.is_ascii_digit() || it == b'_');
    let signed = exponent.is_none_or(|text| {
        let power = text.strip_prefix(['+', '-']).unwrap_or_default();
        !power.is_empty() && power.bytes().all(|it| it.is_ascii_digit())
    });
    let some = !before.is_empty() || after.starts_with(|first: char| first.is_ascii_digit());
    if !(digits_only(before) && digits_only(after) && signed && some) {
        return None;
    }
    let number: f64 = digits.replace('_', "").parse().ok()?;
    Number::from_f64(if minus { -number } else { number }).map(Value::Number)
}
