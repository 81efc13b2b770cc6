//! Cancel requests.

use kornak_protocol::startup::CancelRequest;

use crate::metrics::count;
use crate::shared::Shared;

/// Passes a cancel request on to the server of the session that it means, or to the session itself
/// if its query is held here.
pub async fn obey(shared: &Shared, request: &CancelRequest) {
    count(&shared.metrics.cancels);
    let Some(handle) = shared.registry.by_key(request.pid, &request.key) else { return };
    match handle.cancel_target() {
        Some(target) if handle.doing() != crate::registry::Doing::Held => {
            let limit = shared.settings.limits.connect_timeout;
            let tls = shared.prober.tls();
            let sent = crate::backend::cancel(&target.address, tls, &target.key);
            if let Ok(Err(error)) = tokio::time::timeout(limit, sent).await {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "cancel request not delivered"
                );
            }
        }
        _ => handle.raise(crate::registry::Flags::CANCEL),
    }
}
