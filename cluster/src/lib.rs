//! The words that every part of Kornak shares: names, log positions, terms of leadership, and the
//! JSON that Patroni and Kornak keep in the store.
//!
//! Agents and proxies never call each other's code; they meet in these types, through the store.
//! Parsing is tolerant (unknown fields are kept out of the way, missing ones have defaults), because
//! another implementation may have written the value; printing is compact, as Patroni prints.
//!
//! Not here: where the values are stored (`kornak-dcs`), what is decided from them
//! (`kornak-agent`, `kornak-proxy`), any clock, any socket.

pub mod citus;
pub mod config;
pub mod discard;
pub mod epoch;
pub mod error_chain;
pub mod handover;
pub mod id;
pub mod known;
pub mod lsn;
pub mod member;
pub mod moment;
pub mod numbers;
pub mod pledge;
pub mod slots;
pub mod state;
pub mod topology;

pub use citus::{CitusDatabase, CitusRegistration};
pub use config::{ClusterConfig, StandbyCluster, SyncMode};
pub use epoch::Epoch;
pub use error_chain::error_chain;
pub use handover::{Ack, Handover, HandoverPhase, ProxyRegistration, Unfenced};
pub use id::{GroupId, Scope};
pub use known::{Doubt, Known, SafetyKey};
pub use lsn::{Lsn, Timeline};
pub use member::{Member, MemberRole, MemberState, Tags, XLog};
pub use moment::Moment;
pub use numbers::{LeaseId, RaftTerm, Revision};
pub use pledge::{Leadership, Pledge, Pledged};
pub use state::{ClusterState, FailoverRequest, HistoryEntry, Leader, Status, SyncState};
pub use topology::{Node, NodeRole, Topology};
