//! The proof that a server connection may change hands.
//!
//! Anything that a client has left unfinished must not become a part of what the next one says: of a message
//! that was forwarded in part, the server still waits for the rest. So pools take and give
//! [`Settled`] connections only, and only this module makes one.

use kornak_protocol::frame::Scanner;
use kornak_protocol::params::Parameters;

use super::lender::Lease;
use super::link::Link;
use crate::sabotage::{self, Sabotage};
use crate::session::Session;
use crate::session::pooled::ConnectionState;

/// A server connection that stands between two messages in both directions, on which no transaction is
/// open and nothing owed, and whose [`Lease`] says what is set on it.
#[derive(Debug)]
pub struct Settled(Box<Link>);

/// A connection as in [`Settled`], but the session has left something on it that only DISCARD ALL
/// takes away.
#[derive(Debug)]
pub struct Laden(Box<Link>);

/// A connection that a session gives up.
#[derive(Debug)]
pub enum Returned {
    /// Fit for the next client.
    Settled(Settled),
    /// Fit when it was cleared.
    Laden(Laden),
    /// Of no use to anybody else.
    Unsettled(Box<Link>),
}

impl Settled {
    /// A connection that has just logged in.
    pub(super) fn fresh(mut link: Box<Link>, lease: Lease) -> Self {
        link.lease = Some(Box::new(lease));
        Self(link)
    }

    /// The connection.
    pub fn link(&self) -> &Link {
        &self.0
    }

    /// For who looks after it while it rests, or moves it between threads.
    pub(super) fn link_mut(&mut self) -> &mut Link {
        &mut self.0
    }

    /// To be cleared all the same, by the settings.
    pub fn into_laden(self) -> Laden {
        Laden(self.0)
    }

    /// For the client that uses it from now on.
    pub fn into_link(self) -> Box<Link> {
        self.0
    }
}

impl Laden {
    /// To say DISCARD ALL on it.
    pub fn link_mut(&mut self) -> &mut Link {
        &mut self.0
    }

    /// The parameters that its server has reported.
    pub fn reported(&self) -> Parameters {
        let lease = self.0.lease.as_ref();
        lease.map(|lease| Parameters::clone(&lease.state.params)).unwrap_or_default()
    }

    /// DISCARD ALL was answered, with so many errors; the server reports these parameters now.
    pub fn discarded(self, failed: usize, reported: Parameters) -> Option<Settled> {
        self.cleared(failed, reported, ConnectionState::discarded)
    }

    /// Notes that RESET and the like were answered: as `discarded`, and prepared
    /// statements stay.
    pub fn was_reset(self, failed: usize, reported: Parameters) -> Option<Settled> {
        self.cleared(failed, reported, ConnectionState::was_reset)
    }

    fn cleared(
        self,
        failed: usize,
        reported: Parameters,
        note: impl FnOnce(&mut ConnectionState),
    ) -> Option<Settled> {
        let mut link = self.0;
        let stands_still = link.stands_still();
        let lease = link.lease.as_mut().filter(|_| failed == 0 && stands_still)?;
        lease.state.params = reported.into();
        note(&mut lease.state);
        Some(Settled(link))
    }
}

impl Returned {
    /// Judges the connection of a session that gives it up; `from_client` has followed what was
    /// forwarded. The session is detached from it, unless it is of no use.
    pub fn by(mut link: Box<Link>, session: &mut Session, from_client: &Scanner) -> Self {
        let stands_still = session.is_quiet()
            && (from_client.at_boundary() || sabotage::is(Sabotage::Boundary))
            && link.stands_still();
        let (pinned, leaves) = (session.pinned(), session.must_keep());
        let may_clear = pinned.is_none() || session.may_be_discarded();
        match &mut link.lease {
            Some(lease) if stands_still && may_clear => session.detach(&mut lease.state),
            _ => return Self::Unsettled(link),
        }
        match leaves {
            false => Self::Settled(Settled(link)),
            true => Self::Laden(Laden(link)),
        }
    }
}
