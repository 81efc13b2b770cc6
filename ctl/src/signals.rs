//! Signals of the operating system, as a token that ends everything and a hook for SIGHUP.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cancelled by the first SIGTERM or SIGINT. More of them change nothing: an orderly end has time
/// limits of its own, and what it would leave behind otherwise is a running server.
///
/// # Errors
/// The handlers cannot be installed.
pub fn stop_token() -> std::io::Result<CancellationToken> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "stopping");
        token.cancel();
    });
    Ok(stop)
}

/// Calls `hook` for every SIGHUP until `stop`.
///
/// # Errors
/// The handler cannot be installed.
pub fn on_hangup(
    stop: CancellationToken,
    mut hook: impl FnMut() + Send + 'static,
) -> std::io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                received = hangup.recv() => match received {
                    Some(()) => hook(),
                    None => return,
                },
            }
        }
    });
    Ok(())
}

/// Tells systemd that the service is up; without systemd nothing happens.
pub fn ready() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(error = &error as &dyn std::error::Error, "systemd was not told");
    }
}
