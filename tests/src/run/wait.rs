//! Waiting for a level, with a limit.

use std::future::Future;
use std::time::{Duration, Instant};

/// Whether bounds are what the documentation promises, without room for a machine that is shared.
pub fn strict_timing() -> bool {
    std::env::var_os("KORNAK_STRICT_TIMING").is_some_and(|value| value == "1")
}

/// How often a level is looked at. Short, for tests measure with it.
const STEP: Duration = Duration::from_millis(20);

/// Asks `probe` until it answers `Ok`. Its `Err` says what it saw instead.
///
/// # Panics
/// When `limit` has passed; the message ends in what was seen last.
pub async fn until<T, P, F>(limit: Duration, what: &str, mut probe: P) -> T
where
    P: FnMut() -> F,
    F: Future<Output = Result<T, String>>,
{
    let start = Instant::now();
    let mut last = "nothing yet".to_owned();
    while start.elapsed() < limit {
        let left = limit.saturating_sub(start.elapsed());
        match tokio::time::timeout(left, probe()).await {
            Ok(Ok(value)) => return value,
            Ok(Err(seen)) => last = seen,
            Err(_) => last = format!("{last} (and a probe that did not answer)"),
        }
        tokio::time::sleep(STEP.min(limit)).await;
    }
    panic!("not within {limit:?}: {what}; last seen: {last}")
}

/// [`until`] for a plain condition that has nothing to say.
pub async fn until_true<P, F>(limit: Duration, what: &str, mut probe: P)
where
    P: FnMut() -> F,
    F: Future<Output = bool>,
{
    until(limit, what, || {
        let answer = probe();
        async move { if answer.await { Ok(()) } else { Err("not so".to_owned()) } }
    })
    .await;
}
