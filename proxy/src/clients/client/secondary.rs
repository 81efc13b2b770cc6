//! Reading from the standbys of a whole Citus cluster: a session on a standby of the coordinator asks
//! the workers' standbys if it says so at login (`citus.use_secondary_nodes`), and the workers'
//! primaries otherwise.
//!
//! The parameter can be set at login only. A role needs a grant for it, which Kornak's agents give to
//! everybody; where they did not (a Patroni coordinator), the session reads from primaries.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use kornak_protocol::sqlstate::INSUFFICIENT_PRIVILEGE;

use crate::admission::identity::Identity;
use crate::net::backend::{self, Account, Address, Connected, DialError};
use crate::shared::Shared;

const PARAMETER: &[u8] = b"citus.use_secondary_nodes\0always\0";

/// Logs in with the parameter; without it if the role may not set it.
pub(super) async fn connect(
    shared: &Shared,
    address: &Address,
    identity: &Identity,
    limit: Duration,
) -> Result<Connected, DialError> {
    let tls = shared.prober.tls();
    let log_in = |startup: Bytes| async move {
        let account = Account { startup: &startup, ..identity.account() };
        backend::connect(address, tls, account, limit).await
    };
    match log_in(with_parameter(&identity.startup)).await {
        Err(DialError::Refused { sqlstate: INSUFFICIENT_PRIVILEGE, message, .. }) => {
            if shared.set_trouble("secondaries", Some(message.clone())) {
                tracing::warn!(
                    server = %address.host,
                    error = %message,
                    "readers stay on the workers' primaries: grant SET ON PARAMETER citus.use_secondary_nodes"
                );
            }
            log_in(identity.startup.clone()).await
        }
        other => other,
    }
}

/// The startup packet with the parameter behind the client's own, so that it wins.
fn with_parameter(startup: &Bytes) -> Bytes {
    let mut packet = BytesMut::with_capacity(startup.len() + PARAMETER.len());
    let (Some(params), Some(length)) = (
        startup.get(4..startup.len().saturating_sub(1)),
        u32::try_from(startup.len() + PARAMETER.len()).ok(),
    ) else {
        return startup.clone();
    };
    packet.put_u32(length);
    packet.extend_from_slice(params);
    packet.extend_from_slice(PARAMETER);
    packet.put_u8(0);
    packet.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parameter_is_behind_the_clients_own() {
        let packet = b"\0\0\0\x16\0\x03\0\0user\0app\0a\0bc\0\0";
        let patched = with_parameter(&Bytes::from_static(packet));
        let expected =
            b"\0\0\0\x38\0\x03\0\0user\0app\0a\0bc\0citus.use_secondary_nodes\0always\0\0";
        assert_eq!(patched.get(4..), expected.get(4..));
        assert_eq!(patched.get(..4), Some((patched.len() as u32).to_be_bytes().as_slice()));
    }
}
