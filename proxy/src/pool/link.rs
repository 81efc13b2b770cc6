//! A server connection as the data path has it.

use std::sync::Arc;

use bytes::BytesMut;
use kornak_cluster::GroupId;
use kornak_config::proxy::{ListenerSettings, Target};
use kornak_protocol::frame::{Direction, Scanner};
use kornak_protocol::params::Parameters;

use super::lender::Lease;
use crate::cluster::route::Candidate;
use crate::cluster::standing::{Generation, Term};
use crate::net::backend::{Address, Connected};
use crate::net::cancel_target::CancelTarget;
use crate::net::stream::Stream;
use crate::sabotage::{self, Sabotage};
use crate::waiting::gate::Side;
use crate::waiting::read_source::Source;

/// A server connection for a session, not yet linked.
#[derive(Debug)]
pub struct Opened {
    pub connected: Connected,
    pub candidate: Candidate,
    pub address: Address,
    /// Which side of the gate a session on it is on.
    pub side: Side,
    pub term: Term,
    pub generation: Generation,
    /// On a standby of a Citus cluster's coordinator: whom it asks for what other groups hold.
    pub source: Option<Source>,
}

/// A server connection of a session.
#[derive(Debug)]
pub struct Link {
    pub stream: Stream,
    pub scanner: Scanner,
    /// Bytes from the server that were not passed on yet: the beginning of a message.
    pub tail: Vec<u8>,
    /// Bytes for the server that it did not take yet.
    pub to_server: BytesMut,
    pub node: Arc<str>,
    pub address: Address,
    pub group: GroupId,
    pub leading: bool,
    /// Which side of the gate a session on it is on.
    pub side: Side,
    /// Of a leader: the term it was opened in.
    pub term: Term,
    /// [`crate::shared::Shared::generation`] when it was last found usable.
    pub generation: Generation,
    /// A statement whose answer has not begun may run again elsewhere.
    pub rereads: bool,
    /// A leader that stands in for a standby.
    pub stands_in: bool,
    /// A standby of a Citus cluster's coordinator: whom it asks for what other groups hold.
    pub source: Option<Source>,
    pub target: Option<Arc<CancelTarget>>,
    /// Of a connection that changes hands.
    pub lease: Option<Box<Lease>>,
}

impl Link {
    /// A connection that has logged in, and what it reported.
    pub fn new(opened: Opened, listener: &ListenerSettings) -> (Box<Self>, Parameters) {
        let Opened { connected, candidate, address, side, term, generation, source } = opened;
        let target = connected.key.map(|key| Arc::new(CancelTarget::new(address.clone(), key)));
        let link = Self {
            stream: connected.stream,
            scanner: Scanner::new(Direction::Backend),
            tail: connected.rest.to_vec(),
            to_server: BytesMut::new(),
            node: candidate.name,
            address,
            group: candidate.group,
            leading: candidate.leading,
            side,
            term,
            generation,
            rereads: !candidate.leading && listener.retry_reads,
            stands_in: candidate.leading && matches!(listener.target, Target::Standbys),
            source,
            target,
            lease: None,
        };
        (Box::new(link), connected.params)
    }

    /// Whether both directions stand between two messages, and everything that was forwarded was taken.
    pub fn stands_still(&self) -> bool {
        self.scanner.at_boundary() && self.tail.is_empty() && self.to_server.is_empty()
    }

    /// Whether the server has neither closed an idle connection nor announced its end. What else it has
    /// said is for the next client.
    pub fn is_alive(&mut self) -> bool {
        self.stream.is_alive(&mut self.tail) || sabotage::is(Sabotage::Dead)
    }
}
