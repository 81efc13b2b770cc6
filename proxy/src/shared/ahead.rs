//! Logins to the candidate of a planned switchover that sessions begin while the switchover is prepared.
//!
//! Not here: when a session begins one and uses it ([`crate::clients::client`]).

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio_util::task::AbortOnDropHandle;

use crate::net::backend::{Connected, DialError};

/// A login under way; dropping it ends the login.
pub type Login = AbortOnDropHandle<Result<Connected, DialError>>;

/// The candidate's name, and the login to it.
type Begun = (Arc<str>, Login);

/// Logins to the candidate that were begun while a switchover was prepared, by session.
#[derive(Debug, Default)]
pub struct Ahead(Mutex<HashMap<u64, Begun>>);

impl Ahead {
    /// Drops every login: the switchover is over, one way or the other.
    pub fn clear(&self) {
        self.0.lock().clear();
    }

    /// The logins that were begun, to add one.
    pub fn begun(&self) -> MutexGuard<'_, HashMap<u64, Begun>> {
        self.0.lock()
    }

    /// Takes a session's login to this server, if the session has begun one.
    pub fn take(&self, session: u64, server: &str) -> Option<Login> {
        let (name, login) = self.0.lock().remove(&session)?;
        (*name == *server).then_some(login)
    }
}
