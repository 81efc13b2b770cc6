//! YAML as patronictl prints it, which is PyYAML's `safe_dump` with lines of 200: keys sorted,
//! lists not indented below their key, single quotes where quotes are needed. Scripts and eyes
//! compare such output, and no library writes it this way.
//!
//! Which texts need quotes follows YAML 1.1 (a plain `on` would be read back as true). Keys longer
//! than 128 characters, which PyYAML marks with `?`, are not provided for.

use serde_json::Value;

/// Longest line before a text is broken at a space.
const WIDTH: usize = 200;

/// Block style, without the last line end.
pub(super) fn block(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => mapping(value, 0, &mut out),
        Value::Array(items) if !items.is_empty() => sequence(items, 0, &mut out),
        Value::String(text) => out.push_str(&scalar_text(text, false, 0, 0)),
        other => out.push_str(&flow(other)),
    }
    out.trim_end_matches('\n').to_owned()
}

/// Flow style, `{a: 1, b: [x, y]}`.
pub(super) fn flow(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number_text(number),
        Value::String(text) => scalar_text(text, true, 0, 0),
        Value::Array(items) => {
            format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", "))
        }
        Value::Object(_) => {
            let entry = |(key, value): (&String, &Value)| {
                format!("{}: {}", scalar_text(key, true, 0, 0), flow(value))
            };
            let entries: Vec<String> = sorted(value).into_iter().map(entry).collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

fn sorted(value: &Value) -> Vec<(&String, &Value)> {
    let mut entries: Vec<_> = value.as_object().into_iter().flatten().collect();
    entries.sort_by_key(|(key, _)| *key);
    entries
}

fn mapping(value: &Value, indent: usize, out: &mut String) {
    for (index, (key, value)) in sorted(value).into_iter().enumerate() {
        if index > 0 {
            out.push_str(&" ".repeat(indent));
        }
        let key = scalar_text(key, false, indent, indent);
        out.push_str(&key);
        out.push(':');
        match value {
            Value::Object(map) if !map.is_empty() => {
                out.push('\n');
                out.push_str(&" ".repeat(indent + 2));
                mapping(value, indent + 2, out);
            }
            Value::Array(items) if !items.is_empty() => {
                out.push('\n');
                out.push_str(&" ".repeat(indent));
                sequence(items, indent, out);
            }
            Value::String(text) => {
                let column = indent + key.chars().count() + 2;
                out.push(' ');
                out.push_str(&scalar_text(text, false, indent + 2, column));
                out.push('\n');
            }
            other => {
                out.push(' ');
                out.push_str(&flow(other));
                out.push('\n');
            }
        }
    }
}

fn sequence(items: &[Value], indent: usize, out: &mut String) {
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push_str(&" ".repeat(indent));
        }
        out.push_str("- ");
        match item {
            Value::Object(map) if !map.is_empty() => mapping(item, indent + 2, out),
            Value::Array(items) if !items.is_empty() => sequence(items, indent + 2, out),
            Value::String(text) => {
                out.push_str(&scalar_text(text, false, indent + 2, indent + 2));
                out.push('\n');
            }
            other => {
                out.push_str(&flow(other));
                out.push('\n');
            }
        }
    }
}

/// As Python prints it.
fn number_text(number: &serde_json::Number) -> String {
    let text = number.to_string();
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let point = if mantissa.contains('.') { "" } else { ".0" };
            let sign = if exponent.starts_with(['+', '-']) { "" } else { "+" };
            format!("{mantissa}{point}e{sign}{exponent}")
        }
        None => text,
    }
}

fn scalar_text(text: &str, in_flow: bool, indent: usize, column: usize) -> String {
    if text.chars().any(is_special) || breaks_next_to_spaces(text) {
        return double_quoted(text);
    }
    let lines = text.contains('\n');
    if !lines && !needs_quotes(text, in_flow) {
        return folded(text, "", indent, column);
    }
    if lines && in_flow {
        return double_quoted(text);
    }
    folded(&text.replace('\'', "''"), "'", indent, column)
}

/// Breaks at single spaces once a line is full. A line end in the text becomes an empty line.
fn folded(text: &str, quote: &str, indent: usize, column: usize) -> String {
    let mut out = quote.to_owned();
    let mut column = column + quote.len();
    let margin = " ".repeat(indent);
    let characters: Vec<char> = text.chars().collect();
    for (index, letter) in characters.iter().enumerate() {
        let neighbour = |at: Option<usize>| at.and_then(|at| characters.get(at)).copied();
        let (before, after) = (neighbour(index.checked_sub(1)), neighbour(Some(index + 1)));
        let inside = before.is_some_and(|it| it != ' ') && after.is_some_and(|it| it != ' ');
        match letter {
            ' ' if column > WIDTH && inside => {
                out.push('\n');
                out.push_str(&margin);
                column = indent;
            }
            '\n' => {
                out.push_str(if before == Some('\n') { "\n" } else { "\n\n" });
                if after != Some('\n') {
                    out.push_str(&margin);
                }
                column = indent;
            }
            other => {
                out.push(*other);
                column += 1;
            }
        }
    }
    out.push_str(quote);
    out
}

fn double_quoted(text: &str) -> String {
    let mut out = "\"".to_owned();
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            '\0' => out.push_str("\\0"),
            '\x1b' => out.push_str("\\e"),
            other if is_special(other) => {
                let code = u32::from(other);
                out.push_str(&match code {
                    0..=0xff => format!("\\x{code:02X}"),
                    0x100..=0xffff => format!("\\u{code:04X}"),
                    _ => format!("\\U{code:08X}"),
                });
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

/// Whether a reader would not take the character as it stands.
fn is_special(letter: char) -> bool {
    let printable = letter == '\n'
        || (' '..='~').contains(&letter)
        || letter == '\u{85}'
        || ('\u{a0}'..='\u{d7ff}').contains(&letter)
        || ('\u{e000}'..='\u{fffd}').contains(&letter) && letter != '\u{feff}'
        || letter >= '\u{10000}';
    !printable
}

fn breaks_next_to_spaces(text: &str) -> bool {
    text.contains(" \n")
}

/// A plain text would be read as something else.
fn needs_quotes(text: &str, in_flow: bool) -> bool {
    let edges = text.is_empty() || text.starts_with(' ') || text.ends_with(' ');
    if edges || text.starts_with("---") || text.starts_with("...") {
        return true;
    }
    let follows =
        |at: usize| text.get(at..).is_none_or(|rest| rest.is_empty() || rest.starts_with(' '));
    let first = text.chars().next().unwrap_or(' ');
    let indicator = "#,[]{}&*!|>'\"%@`".contains(first)
        || matches!(first, '?' | ':') && (in_flow || follows(1))
        || first == '-' && follows(1);
    let inner = text.char_indices().skip(1).any(|(at, letter)| match letter {
        ',' | '?' | '[' | ']' | '{' | '}' => in_flow,
        ':' => in_flow || follows(at + 1),
        '#' => text.get(..at).is_some_and(|before| before.ends_with(' ')),
        _ => false,
    });
    indicator || inner || means_something(text)
}

/// YAML 1.1 gives these a type, which a plain text must not have.
fn means_something(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    let capitalised = text.chars().skip(1).all(|letter| letter.is_ascii_lowercase());
    let cased = text == lower || capitalised || text == text.to_ascii_uppercase();
    let words = ["yes", "no", "true", "false", "on", "off", "null"];
    let word = cased && words.contains(&lower.as_str());
    word || matches!(text, "=" | "<<" | "~")
        || is_number(text)
        || is_sexagesimal(text)
        || is_time(text)
}

/// An integer or a decimal fraction as PyYAML takes them: `0x1F`, `0600`, `1_000`, `1.5e+5`, `.inf`;
/// not `08` and not `1e5`.
fn is_number(text: &str) -> bool {
    let bare = text.strip_prefix(['+', '-']).unwrap_or(text);
    let all = |part: &str, allowed: fn(u8) -> bool| {
        !part.is_empty() && part.bytes().all(|it| it == b'_' || allowed(it))
    };
    let digits = |part: &str| all(part, |it| it.is_ascii_digit());
    if let Some(hexadecimal) = bare.strip_prefix("0x") {
        return all(hexadecimal, |it| it.is_ascii_hexdigit());
    }
    if let Some(binary) = bare.strip_prefix("0b") {
        return all(binary, |it| matches!(it, b'0' | b'1'));
    }
    if matches!(bare, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return true;
    }
    let Some((whole, fraction)) = bare.split_once('.') else {
        return match bare.strip_prefix('0') {
            Some("") => true,
            Some(octal) => all(octal, |it| (b'0'..=b'7').contains(&it)),
            None => !bare.starts_with('_') && digits(bare),
        };
    };
    let (fraction, exponent) = match fraction.split_once(['e', 'E']) {
        Some((fraction, exponent)) => (fraction, Some(exponent)),
        None => (fraction, None),
    };
    let exponent = exponent.is_none_or(|exponent| {
        exponent.strip_prefix(['+', '-']).is_some_and(|it| !it.contains('_') && digits(it))
    });
    let whole_is_good = if whole.is_empty() {
        !fraction.is_empty() && !fraction.starts_with('_') && bare.len() == text.len()
    } else {
        !whole.starts_with('_') && digits(whole)
    };
    whole_is_good && (fraction.is_empty() || digits(fraction)) && exponent
}

/// `12:30:45`, which is a number.
fn is_sexagesimal(text: &str) -> bool {
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits =
        |part: &str| !part.is_empty() && part.bytes().all(|it| it.is_ascii_digit() || it == b'_');
    let mut parts = text.split(':');
    let first =
        parts.next().is_some_and(|part| digits(part) && part.as_bytes().first() != Some(&b'_'));
    let rest: Vec<&str> = parts.collect();
    let Some((last, middle)) = rest.split_last() else { return false };
    let sixty = |part: &str| matches!(part.as_bytes(), [b'0'..=b'9'] | [b'0'..=b'5', b'0'..=b'9']);
    let (whole, fraction) = last.split_once('.').unwrap_or((last, ""));
    first
        && middle.iter().all(|part| sixty(part))
        && sixty(whole)
        && (fraction.is_empty() || digits(fraction))
}

/// `2026-11-22` and `2026-11-22T22:05:55.87+00:00`.
fn is_time(text: &str) -> bool {
    let number = |part: &str, lengths: std::ops::RangeInclusive<usize>| {
        lengths.contains(&part.len()) && part.bytes().all(|it| it.is_ascii_digit())
    };
    let date_end = text.find(['T', 't', ' ', '\t']).unwrap_or(text.len());
    let (date, rest) = text.split_at_checked(date_end).unwrap_or((text, ""));
    let date: Vec<&str> = date.split('-').collect();
    let [year, month, day] = date.as_slice() else { return false };
    if !number(year, 4..=4) || !number(month, 1..=2) || !number(day, 1..=2) {
        return false;
    }
    if rest.is_empty() {
        return month.len() == 2 && day.len() == 2;
    }
    let rest = rest.trim_start_matches(['T', 't', ' ', '\t']);
    let zone_at = rest.find(['Z', '+', '-', ' ']).unwrap_or(rest.len());
    let (clock, zone) = rest.split_at_checked(zone_at).unwrap_or((rest, ""));
    let (clock, _) = clock.split_once('.').unwrap_or((clock, ""));
    let clock: Vec<&str> = clock.split(':').collect();
    let [hour, minute, second] = clock.as_slice() else { return false };
    let zone = zone.trim_start();
    let zone_is_good = zone.is_empty()
        || zone == "Z"
        || zone.strip_prefix(['+', '-']).is_some_and(|zone| {
            let (hours, minutes) = zone.split_once(':').unwrap_or((zone, "00"));
            number(hours, 1..=2) && number(minutes, 2..=2)
        });
    number(hour, 1..=2) && number(minute, 2..=2) && number(second, 2..=2) && zone_is_good
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    // What PyYAML 6.0 printed for the same values.
    #[test]
    fn texts_have_the_quotes_that_pyyaml_gives_them() {
        for (text, expected) in [
            ("on", "'on'"),
            ("None", "None"),
            ("null", "'null'"),
            ("", "''"),
            ("16MB", "16MB"),
            ("0600", "'0600'"),
            ("08", "08"),
            ("1e5", "1e5"),
            ("1.5e+5", "'1.5e+5'"),
            ("1_000", "'1_000'"),
            ("0x1F", "'0x1F'"),
            ("12:30:45", "'12:30:45'"),
            ("127.0.0.1:5432", "127.0.0.1:5432"),
            ("0/4000060", "0/4000060"),
            ("2026-11-22", "'2026-11-22'"),
            ("2026-11-22T22:05:55.870877+00:00", "'2026-11-22T22:05:55.870877+00:00'"),
            ("2026-1-2", "2026-1-2"),
            ("host all all 127.0.0.1/32 md5", "host all all 127.0.0.1/32 md5"),
            ("%m [%p] %a ", "'%m [%p] %a '"),
            ("it's", "it's"),
            ("'quoted'", "'''quoted'''"),
            ("a: b", "'a: b'"),
            ("a:b", "a:b"),
            ("a #b", "'a #b'"),
            ("-", "'-'"),
            ("-a", "-a"),
            ("?a", "?a"),
            ("=", "'='"),
            ("tab\there", "\"tab\\there\""),
            ("größe", "größe"),
            ("two\nlines", "'two\n\n  lines'"),
        ] {
            let expected = format!("a: {expected}");
            assert_eq!(block(&json!({"a": text})), expected, "{text:?}");
        }
    }

    #[test]
    fn nesting_is_pyyamls() {
        let value = json!({"b": {"y": [1, {"k": null, "a": []}, [true, 1.5]], "x": {}}, "a": "t"});
        assert_eq!(
            block(&value),
            "a: t\nb:\n  x: {}\n  y:\n  - 1\n  - a: []\n    k: null\n  - - true\n    - 1.5"
        );
        assert_eq!(flow(&value), "{a: t, b: {x: {}, y: [1, {a: [], k: null}, [true, 1.5]]}}");
        assert_eq!(flow(&json!({"a": "x:y", "b": "on"})), "{a: 'x:y', b: 'on'}");
        assert_eq!(block(&json!([])), "[]");
    }

    #[test]
    fn a_long_text_is_broken_at_a_space() {
        let text = "word ".repeat(45).trim_end().to_owned();
        let found = block(&json!({"key": text}));
        let lines: Vec<&str> = found.lines().collect();
        assert_eq!(lines.len(), 2, "{found}");
        assert_eq!(lines[0].len(), 5 + 199, "{found}");
        assert!(lines[1].starts_with("  word"), "{found}");
    }
}
