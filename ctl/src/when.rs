//! Times as patronictl prints and takes them.

use jiff::civil::{DateTime, Time};
use jiff::fmt::temporal::Pieces;
use jiff::tz::TimeZone;
use jiff::{Span, Zoned};

/// The text was no time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "Unable to parse scheduled timestamp ({0}). It should be in an unambiguous format (e.g. ISO 8601)"
)]
pub struct ParseWhenError(String);

/// `2026-11-22 22:05:56.16729`: local time, five digits of a second.
pub fn stamp(now: &Zoned) -> String {
    let fraction = now.subsec_nanosecond() / 10_000;
    format!("{}.{fraction:05}", short_stamp(now))
}

/// `2026-11-22 22:05:56`
pub fn short_stamp(now: &Zoned) -> String {
    now.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// An example for a prompt: an hour from now.
pub fn example(now: &Zoned) -> String {
    let later = now.checked_add(Span::new().hours(1)).unwrap_or_else(|_| now.clone());
    later.strftime("%Y-%m-%dT%H:%M").to_string()
}

/// `now` is `None`; anything else a date and time (or a time of today), in local time unless it
/// names an offset. The answer is ISO 8601 with an offset.
pub fn parse(text: &str, now: &Zoned) -> Result<Option<String>, ParseWhenError> {
    let text = text.trim();
    if text.eq_ignore_ascii_case("now") || text.is_empty() {
        return Ok(None);
    }
    let error = || ParseWhenError(text.to_owned());
    let (at, zone) = match Pieces::parse(text) {
        Ok(pieces) => {
            let at = DateTime::from_parts(pieces.date(), pieces.time().unwrap_or(Time::midnight()));
            let offset = pieces.to_numeric_offset();
            (at, offset.map_or_else(|| now.time_zone().clone(), TimeZone::fixed))
        }
        Err(_) => {
            let time: Time = text.parse().map_err(|_| error())?;
            (DateTime::from_parts(now.date(), time), now.time_zone().clone())
        }
    };
    let zoned = at.to_zoned(zone).map_err(|_| error())?;
    Ok(Some(zoned.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Zoned {
        "2026-11-22T22:05:56.167290123+01:00[+01:00]".parse().expect("a time")
    }

    #[test]
    fn times_are_printed_as_patronictl_prints_them() {
        assert_eq!(stamp(&now()), "2026-11-22 22:05:56.16729");
        assert_eq!(example(&now()), "2026-11-22T23:05");
    }

    #[test]
    fn scheduled_times_are_taken_in_the_usual_forms() {
        for (text, expected) in [
            ("now", Ok(None)),
            ("2027-01-01T10:00", Ok(Some("2027-01-01T10:00:00+01:00"))),
            ("2027-01-01 10:00:30", Ok(Some("2027-01-01T10:00:30+01:00"))),
            ("2027-01-01T10:00:00+03:00", Ok(Some("2027-01-01T10:00:00+03:00"))),
            ("2027-01-01T10:00:00Z", Ok(Some("2027-01-01T10:00:00+00:00"))),
            ("23:30", Ok(Some("2026-11-22T23:30:00+01:00"))),
            ("tomorrow", Err(())),
            ("2027-13-01", Err(())),
        ] {
            let found = parse(text, &now()).map_err(|_| ());
            assert_eq!(found, expected.map(|at| at.map(str::to_owned)), "{text}");
        }
    }
}
