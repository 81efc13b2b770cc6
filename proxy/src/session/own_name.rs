//! `application_name` of a session whose server connections change hands. Those log in without one, and each client's
//! own is set behind it. So a RESET takes a connection back to the server's name, where a client with a connection of
//! its own is back at the name that it gave at its login: that is what it is told, and the connection is told it
//! again before anything else.

use std::sync::Arc;

use bytes::Bytes;
use kornak_cluster::discard;
use kornak_protocol::backend;
use kornak_protocol::params::Parameters;

use super::{Heard, Session};

const NAME: &str = "application_name";

/// The names of one session's application.
#[derive(Debug, Default)]
pub(super) struct OwnName {
    /// The one that the client gave at its login; `None` if it gave none.
    own: Option<Box<[u8]>>,
    /// The one that the connection has after a RESET.
    server: Bytes,
    /// The server has reported its own, and the client was not told.
    is_concealed: bool,
}

impl OwnName {
    /// The names of a session whose client was told `params` at its login; `has_one`: the client gave a name itself.
    pub(super) fn told(params: &Parameters, has_one: bool) -> Self {
        let own = params.get(NAME).filter(|_| has_one).map(Into::into);
        Self { own, ..Self::default() }
    }

    /// The session takes a connection of which this is the server's name.
    pub(super) fn attach(&mut self, server: &Bytes) {
        if self.server != *server {
            self.server = server.clone();
        }
        self.is_concealed = false;
    }

    /// The connection was told the client's own name again.
    pub(super) fn restored(&mut self) {
        self.is_concealed = false;
    }
}

/// The name that a server reports after a RESET, if it has reported these parameters at the login of a connection.
pub(super) fn of_server(params: &Parameters) -> Bytes {
    params.get(NAME).map(Bytes::copy_from_slice).unwrap_or_default()
}

impl Session {
    /// The server reports a parameter. `None`: the client is told as it is.
    #[cold]
    pub(super) fn name_reported(&mut self, name: &[u8], value: &[u8]) -> Option<Heard> {
        let own = self.name.own.as_deref().filter(|_| name == NAME.as_bytes())?;
        let was_concealed = self.name.is_concealed;
        let knows = |value: &[u8]| self.told.get(NAME) == Some(value);
        self.name.is_concealed =
            value != own && value == self.name.server && self.journal.was_reset(name);
        let value = if self.name.is_concealed { own } else { value };
        if knows(value) && (self.name.is_concealed || was_concealed) {
            return Some(Heard::Swallow);
        }
        if !self.name.is_concealed {
            return None;
        }
        self.edited.clear();
        // It is a part of what the client was told at its login.
        discard::message_fits(backend::put_parameter_status(
            NAME.as_bytes(),
            value,
            &mut self.edited,
        ));
        discard::parameter_is_within_bound(
            Arc::make_mut(&mut self.told).set(NAME.as_bytes(), value),
        );
        Some(Heard::Edited)
    }

    /// The parameters that the connection has reported.
    pub(super) fn reported(&self) -> Arc<Parameters> {
        let mut reported = Arc::clone(&self.told);
        if self.name.is_concealed {
            discard::parameter_is_within_bound(
                Arc::make_mut(&mut reported).set(NAME.as_bytes(), &self.name.server),
            );
        }
        reported
    }
}
