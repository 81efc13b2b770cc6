//! Wall-clock time, for people: stamps in `history` and answers. Nothing is decided from it.

/// Now, as `2026-11-22T22:05:55.870877+00:00`.
pub fn now_rfc3339() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00").to_string()
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or(0)
}
