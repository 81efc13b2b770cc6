//! As whom a session logs in at a server.

use bytes::Bytes;
use kornak_protocol::auth::Credentials;

use crate::net::backend::Account;

/// The data with which a session logs in again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub user: Bytes,
    /// The startup packet for servers.
    pub startup: Bytes,
    pub credentials: Credentials,
    /// A server has taken these credentials: what logs in is a session that goes on, or its pool.
    pub was_taken: bool,
}

impl Identity {
    /// For a login at a server.
    pub fn account(&self) -> Account<'_> {
        Account {
            startup: &self.startup,
            user: &self.user,
            credentials: &self.credentials,
            own: None,
        }
    }
}
