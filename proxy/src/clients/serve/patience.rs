//! How long a client may say nothing, leave its transaction lying, or keep one open. Pure.

use std::time::{Duration, Instant};

use kornak_config::proxy::LimitSettings;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::sqlstate::{
    IDLE_IN_TRANSACTION_SESSION_TIMEOUT, IDLE_SESSION_TIMEOUT, TRANSACTION_TIMEOUT,
};

/// The activity of a session, as its client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// Between transactions, and it is the client's turn.
    Idle,
    /// In a transaction, and it is the client's turn.
    IdleInTransaction,
    /// The client waits for an answer.
    Answering,
    /// The client's request is held back.
    Held,
}

/// Since when.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub doing: Doing,
    /// The client or its server has said something.
    pub last_said: Instant,
    /// The time at which the session's transaction began.
    pub began: Instant,
}

/// The action that follows from a client's times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing before then.
    LookAt(Instant),
    Ends(Why),
}

/// Which bound is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Idle,
    IdleInTransaction,
    Transaction,
}

impl Why {
    /// The error for the client.
    pub fn fields(self) -> ErrorFields {
        let (sqlstate, setting) = match self {
            Self::Idle => (IDLE_SESSION_TIMEOUT, "client_idle_timeout"),
            Self::IdleInTransaction => {
                (IDLE_IN_TRANSACTION_SESSION_TIMEOUT, "idle_transaction_timeout")
            }
            Self::Transaction => (TRANSACTION_TIMEOUT, "transaction_timeout"),
        };
        ErrorFields::fatal(sqlstate, format!("terminating connection due to {setting}"))
    }
}

/// The shortest of the bounds that are set: nothing that begins now can reach one sooner.
pub fn shortest(limits: &LimitSettings) -> Option<Duration> {
    let all =
        [limits.client_idle_timeout, limits.idle_transaction_timeout, limits.transaction_timeout];
    all.into_iter().flatten().min()
}

/// Whether a bound is reached, or when to look again.
pub fn look(limits: &LimitSettings, times: &Times, now: Instant) -> Verdict {
    let idle = (limits.client_idle_timeout, times.last_said, Why::Idle);
    let lying = (limits.idle_transaction_timeout, times.last_said, Why::IdleInTransaction);
    let long = (limits.transaction_timeout, times.began, Why::Transaction);
    let bounds = match times.doing {
        Doing::Idle => vec![idle],
        Doing::IdleInTransaction => vec![long, lying],
        Doing::Answering => vec![long],
        Doing::Held => Vec::new(),
    };
    let mut next = now + shortest(limits).unwrap_or(Duration::from_secs(3600));
    for (limit, since, why) in bounds {
        let Some(limit) = limit else { continue };
        let end = since + limit;
        if now >= end {
            return Verdict::Ends(why);
        }
        next = next.min(end);
    }
    Verdict::LookAt(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_counts_for_what_it_is_about() {
        let zero = Instant::now();
        let at = |seconds: u64| zero + Duration::from_secs(seconds);
        let limits = LimitSettings {
            client_idle_timeout: Some(Duration::from_secs(10)),
            idle_transaction_timeout: Some(Duration::from_secs(5)),
            transaction_timeout: Some(Duration::from_secs(20)),
            ..LimitSettings::default()
        };
        // What it does, last said, began, now: what follows.
        for (doing, last_said, began, now, expected) in [
            (Doing::Idle, 100, 50, 109, Verdict::LookAt(at(110))),
            (Doing::Idle, 100, 50, 110, Verdict::Ends(Why::Idle)),
            (Doing::Idle, 108, 1, 109, Verdict::LookAt(at(114))),
            (Doing::IdleInTransaction, 100, 95, 104, Verdict::LookAt(at(105))),
            (Doing::IdleInTransaction, 100, 95, 105, Verdict::Ends(Why::IdleInTransaction)),
            (Doing::IdleInTransaction, 114, 95, 115, Verdict::Ends(Why::Transaction)),
            (Doing::Answering, 1, 95, 114, Verdict::LookAt(at(115))),
            (Doing::Answering, 1, 95, 115, Verdict::Ends(Why::Transaction)),
            (Doing::Held, 1, 1, 500, Verdict::LookAt(at(505))),
        ] {
            let times = Times { doing, last_said: at(last_said), began: at(began) };
            assert_eq!(look(&limits, &times, at(now)), expected, "{doing:?} at {now}");
        }
        let none = LimitSettings::default();
        assert_eq!(shortest(&none), None);
        let times = Times { doing: Doing::Idle, last_said: zero, began: zero };
        assert!(matches!(look(&none, &times, at(9_999)), Verdict::LookAt(_)));
        let codes = [Why::Idle, Why::IdleInTransaction, Why::Transaction].map(|why| {
            let mut out = bytes::BytesMut::new();
            why.fields().put(&mut out);
            String::from_utf8_lossy(&out).into_owned()
        });
        assert!(codes[0].contains("57P05") && codes[1].contains("25P03"), "{codes:?}");
        assert!(codes[2].contains("25P04"), "{codes:?}");
    }
}
