//! One login at one server, in its turn.

use kornak_protocol::auth::Credentials;

use super::{Candidate, RETRY_PAUSE, nearby, secondary};
use crate::admission::identity::Identity;
use crate::metrics::count;
use crate::net::backend::{self, Account, Address, Connected, DialError};
use crate::shared::Shared;
use crate::waiting::read_source::Source;

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
    let limit = shared.settings().limits.connect_timeout;
    let tls = shared.prober.tls();
    let Some(identity) = identity else {
        let dialled = tokio::time::timeout(limit, backend::dial(address, tls)).await;
        return dialled.map_err(|_| DialError::Timeout)?.map(Connected::fresh);
    };
    if source == Some(Source::Standbys) {
        return secondary::connect(shared, address, identity, limit).await;
    }
    let refused = match backend::connect(address, tls, identity.account(), limit).await {
        Err(error) if error.is_about_password() => error,
        connected => return connected,
    };
    // The password was set again since. Whoever has logged in with it after that has other keys.
    let known = shared.verifiers.newest_keys(&identity.user);
    if let Some(newest) = known.filter(|newest| *newest != identity.credentials) {
        let account = Account { credentials: &newest, ..identity.account() };
        match backend::connect(address, tls, account, limit).await {
            Err(error) if error.is_about_password() => {}
            connected => return connected,
        }
    }
    // A login has to prove itself by the password of now; a session has done so by that of its time.
    let goes_on = identity.was_taken && identity.credentials != Credentials::None;
    let account = identity.account();
    match goes_on {
        true => nearby::connect(shared, address, account, limit).await.ok_or(refused),
        false => Err(refused),
    }
}

/// This host has not what a connection needs: that is noted, and passes.
pub(super) async fn pause_for_want(shared: &Shared, error: &DialError) {
    count(&shared.metrics.dial_failures);
    if shared.set_trouble("dial", Some(error.to_string())) {
        let error = error as &dyn std::error::Error;
        tracing::error!(error, "servers cannot be connected to: this host lacks resources");
    }
    tokio::time::sleep(RETRY_PAUSE).await;
}
