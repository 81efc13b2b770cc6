//! Signals of the operating system, as a token that ends everything and a hook for SIGHUP.

use sd_notify::NotifyState;
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
        tell(&[NotifyState::Stopping]);
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

/// Tells systemd that the service is up.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// Tells systemd that files are read again, reads them, and tells it that they have been: what
/// `systemctl reload` waits for in a unit of the type `notify-reload`.
pub fn reloading(read: impl FnOnce()) {
    let now = NotifyState::monotonic_usec_now();
    let states: Vec<NotifyState<'_>> =
        [NotifyState::Reloading].into_iter().chain(now.ok()).collect();
    tell(&states);
    read();
    ready();
}

/// Without systemd nothing happens.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(error = &error as &dyn std::error::Error, "systemd was not told");
    }
}
