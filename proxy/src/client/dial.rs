//! One login at one server, in its turn.

use kornak_protocol::auth::LoginError;

use super::{Candidate, Identity, RETRY_PAUSE, secondary};
use crate::backend::{self, Account, Address, Connected, DialError};
use crate::metrics::count;
use crate::reading::Source;
use crate::shared::Shared;

/// Logs in, or only dials if there is no identity yet.
pub(super) async fn dial(
    shared: &Shared,
    candidate: &Candidate,
    address: &Address,
    identity: Option<&Identity>,
    source: Option<Source>,
) -> Result<Connected, DialError> {
    let queue = shared.queue_of(&candidate.name);
    // The queue is never closed.
    let _turn = queue.acquire().await;
    let limit = shared.settings.limits.connect_timeout;
    let tls = shared.prober.tls();
    let Some(identity) = identity else {
        let dialled = tokio::time::timeout(limit, backend::dial(address, tls)).await;
        return dialled.map_err(|_| DialError::Timeout)?.map(Connected::fresh);
    };
    if source == Some(Source::Standbys) {
        return secondary::connect(shared, address, identity, limit).await;
    }
    match backend::connect(address, tls, identity.account(), limit).await {
        // The password was set again since. Whoever has logged in with it after that has other keys.
        Err(DialError::Auth(LoginError::OtherVerifier)) => {
            let known = shared.verifiers.newest_keys(&identity.user);
            let Some(newest) = known.filter(|newest| *newest != identity.credentials) else {
                return Err(LoginError::OtherVerifier.into());
            };
            let account = Account { credentials: &newest, ..identity.account() };
            backend::connect(address, tls, account, limit).await
        }
        connected => connected,
    }
}

/// This host has not what a connection needs: that is noted, and passes.
pub(super) async fn pause_for_want(shared: &Shared, error: &DialError) {
    count(&shared.metrics.dial_failures);
    if shared.set_trouble("dial", Some(error.to_string())) {
        let error = error as &dyn std::error::Error;
        tracing::error!(error, "servers cannot be dialled for want of resources");
    }
    tokio::time::sleep(RETRY_PAUSE).await;
}
