//! When the leader carries out what the store's `failover` asks for: at once, at its time, or never.
//!
//! Kornak's own REST API hands an immediate request to the leader directly; in the store lie those
//! with a time, those of a Patroni member, and those that were made while nobody led.

use std::time::Duration;

use jiff::Timestamp;
use kornak_cluster::FailoverRequest;

/// A leader that was busy, or has just begun to lead, still carries out what is late by so much.
const LEAST_GRACE: Duration = Duration::from_secs(10);

/// The action of the leader on a request, now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// There is none, or maintenance mode keeps it waiting.
    Nothing,
    /// The request's time comes after this long.
    In(Duration),
    /// Hand over now.
    Now {
        candidate: Option<String>,
        /// A failover was asked for: what does not end by itself is ended.
        forced: bool,
    },
    /// The candidate leads, and clears it.
    Done,
    /// The request cannot be carried out and is cleared.
    Drop(Stale),
}

/// Why a request is cleared without having been carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Stale {
    #[error("it names another leader than this node")]
    OtherLeader,
    #[error("its time has passed while nobody could carry it out")]
    TooLate,
    #[error("its time cannot be read")]
    NoTime,
    #[error("in maintenance mode a candidate must be named")]
    NeedsCandidate,
}

/// Judges a request for the leader `me`. `now` is the wall clock's, for people set the time by it.
pub fn due(
    request: &FailoverRequest,
    me: &str,
    paused: bool,
    loop_wait: Duration,
    now: Timestamp,
) -> Due {
    if request.is_empty() {
        return Due::Nothing;
    }
    if let Some(at) = &request.scheduled_at {
        if paused {
            return Due::Nothing;
        }
        let Ok(at) = at.trim().parse::<Timestamp>() else { return Due::Drop(Stale::NoTime) };
        // Negative: its time has come; then the other way round.
        match Duration::try_from(at.duration_since(now)) {
            Ok(left) if !left.is_zero() => return Due::In(left),
            _ => {}
        }
        let late = Duration::try_from(now.duration_since(at)).unwrap_or_default();
        if late > (loop_wait * 3 / 2).max(LEAST_GRACE) {
            return Due::Drop(Stale::TooLate);
        }
    }
    if request.member.as_deref() == Some(me) {
        return Due::Done;
    }
    if request.leader.as_deref().is_some_and(|leader| leader != me) {
        return Due::Drop(Stale::OtherLeader);
    }
    if paused && request.member.is_none() {
        return Due::Drop(Stale::NeedsCandidate);
    }
    Due::Now { candidate: request.member.clone(), forced: request.leader.is_none() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(request: &str, paused: bool, expected: &Due) {
        let now = "2026-11-25T12:00:00Z".parse().unwrap();
        let request = FailoverRequest::parse(request);
        assert_eq!(due(&request, "a", paused, Duration::from_secs(10), now), *expected);
    }

    fn to(candidate: Option<&str>) -> Due {
        Due::Now { candidate: candidate.map(str::to_owned), forced: false }
    }

    #[test]
    fn a_request_without_a_time_is_carried_out_at_once() {
        check("{}", false, &Due::Nothing);
        check(r#"{"leader":"a","member":"b"}"#, false, &to(Some("b")));
        check(r#"{"leader":"a"}"#, false, &to(None));
        let forced = Due::Now { candidate: Some("b".into()), forced: true };
        check(r#"{"member":"b"}"#, false, &forced);
    }

    #[test]
    fn a_request_with_a_time_waits_for_it_and_is_dropped_when_it_is_long_past() {
        let at = |time: &str| format!(r#"{{"leader":"a","member":"b","scheduled_at":"{time}"}}"#);
        check(&at("2026-11-25T12:00:07+00:00"), false, &Due::In(Duration::from_secs(7)));
        check(&at("2026-11-25T14:00:00+02:00"), false, &to(Some("b")));
        check(&at("2026-11-25T11:59:45Z"), false, &to(Some("b")));
        check(&at("2026-11-25T11:59:44Z"), false, &Due::Drop(Stale::TooLate));
        check(&at("tomorrow"), false, &Due::Drop(Stale::NoTime));
        check(&at("2026-11-25T12:00:00Z"), true, &Due::Nothing);
    }

    #[test]
    fn what_the_candidate_has_done_is_cleared() {
        check(r#"{"member":"a"}"#, false, &Due::Done);
        check(r#"{"leader":"b","member":"a"}"#, false, &Due::Done);
    }

    #[test]
    fn what_makes_no_sense_any_more_is_cleared() {
        check(r#"{"leader":"b","member":"c"}"#, false, &Due::Drop(Stale::OtherLeader));
        check(r#"{"leader":"a"}"#, true, &Due::Drop(Stale::NeedsCandidate));
        check(r#"{"leader":"a","member":"b"}"#, true, &to(Some("b")));
    }
}
