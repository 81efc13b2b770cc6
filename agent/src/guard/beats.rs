//! The agent's heartbeats to its guard.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::client::{GuardClient, GuardError};

/// Between two heartbeats: several go into the shortest timeout that makes sense.
const EVERY: Duration = Duration::from_millis(250);

/// Beats until `over`. `leads`: the lease is proven and the server is a primary, as this process knows it. With `stop`
/// somebody has asked this agent to end: the guard starts no other then.
pub(crate) async fn beat(
    guard: GuardClient,
    timeout: Duration,
    leads: impl Fn() -> bool + Send,
    stop: CancellationToken,
    over: CancellationToken,
) {
    match guard.watch_agent(timeout).await {
        Ok(()) => {}
        Err(GuardError::Refused { why, .. }) => {
            info!(why, "the guard does not watch over this agent");
            return;
        }
        Err(error) => {
            warn!(
                error = &error as &dyn std::error::Error,
                "the guard does not watch over this agent"
            );
            return;
        }
    }
    if timeout.is_zero() {
        return;
    }
    loop {
        tokio::select! {
            () = over.cancelled() => return,
            () = stop.cancelled() => {
                if let Err(error) = guard.leave().await {
                    debug!(error = &error as &dyn std::error::Error, "the guard is gone first");
                }
                return;
            }
            () = tokio::time::sleep(EVERY) => {}
        }
        // One that is lost is noticed by everybody else.
        if guard.beat(leads()).await.is_err() && guard.is_lost() {
            return;
        }
    }
}
