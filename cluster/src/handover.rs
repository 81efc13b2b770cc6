//! Kornak's own records in the store, below `/<namespace>/<scope>/kornak/`.
//!
//! A planned switchover is one [`Handover`] record with a lease, one at a time per cluster.
//! Its phases are prepare, drain, switch and promote, and in a Citus cluster settle; without a record no switchover is under way.
//!
//! ```text
//! (none) ──► prepare ──► drain ──► switch ──► promote ──► (none)
//!               ▲          │          │         │ │          ▲
//!               └──────────┘          │         │ └► settle ─┘ (Citus)
//!                                     └─────────┴─► (none): the old leader starts in place
//! ```

use serde::{Deserialize, Serialize};

use crate::epoch::Epoch;
use crate::id::GroupId;
use crate::lsn::{Lsn, Timeline};

/// Phase of a planned switchover. A reader that does not know a phase neither holds clients nor acknowledges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandoverPhase {
    /// The candidate is checked, both sides checkpoint. Clients work on.
    Prepare,
    /// Proxies start no transaction on the affected sessions; running ones finish.
    Drain,
    /// Nothing runs. The leader stops its server and, with `wal_end` set, has released the key.
    Switch,
    /// The candidate owns the key and becomes writable.
    Promote,
    /// In a Citus cluster: the candidate is primary and the coordinator knows it. Other nodes hear of
    /// it in a moment; until then only their own clients wait.
    Settle,
    #[serde(other)]
    Unknown,
}

/// Value of `handover`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Version of the format, [`crate::member::KORNAK_RECORDS_VERSION`].
    pub v: u32,
    /// Names this handover; random.
    pub id: String,
    /// Counts the drains of this handover, from 1.
    pub attempt: u32,
    pub phase: HandoverPhase,
    /// The Citus group that switches, `None` in a plain cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
    pub leader: String,
    /// `None`: the leader's server restarts in place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<String>,
    /// The leadership that ends.
    pub epoch: Epoch,
    /// The longest a client may be held by one drain, milliseconds, counted by each on its own clock.
    pub max_hold_ms: u64,
    /// The longest the switch may take before the old leader starts in place, milliseconds.
    pub switch_hold_ms: u64,
    /// End of the shutdown checkpoint; set by the transaction that releases the leader key. The
    /// candidate takes over only if it has received this much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_end: Option<Lsn>,
}

impl Handover {
    /// Whether this program understands the record.
    pub fn is_understood(&self) -> bool {
        self.v == crate::member::KORNAK_RECORDS_VERSION && self.phase != HandoverPhase::Unknown
    }
}

/// Value of `handover/acks/<proxy id>`: none of the proxy's affected sessions is in a transaction,
/// and none will start one in this attempt. Attempt 0: while the handover is prepared, that the proxy has done
/// beforehand what it could, see [`ProxyRegistration::prepares`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    pub id: String,
    pub attempt: u32,
}

/// Value of `proxies/<proxy id>`, leased: a proxy that will obey handovers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyRegistration {
    /// Versions of the handover record it understands.
    pub speaks: Vec<u32>,
    /// Host name and process, for people.
    #[serde(default)]
    pub host: String,
    #[serde(default)]
    pub pid: u32,
    /// Address of its status page, `host:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// Address of a listener of it, `host:port`, where other proxies of the cluster pass cancel
    /// requests on to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<String>,
    /// The proxy says, with an acknowledgement of attempt 0, when it has asked its sessions what they hold and logged in
    /// to the candidate ahead: draining earlier would hold clients for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prepares: bool,
}

/// Value of `unfenced`, without a lease: this member runs as primary and no guard would stop it
/// (maintenance mode). While it exists no Kornak member is promoted automatically.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfenced {
    pub member: String,
    pub sysid: String,
    pub timeline: Timeline,
    /// Where that server is asked whether it still runs: the member's own key ends with its agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conn_url: Option<String>,
}

impl Unfenced {
    /// Host and port of `conn_url`.
    pub fn conn_address(&self) -> Option<(String, u16)> {
        crate::member::split_url(self.conn_url.as_deref()?, 5432)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_of_a_later_version_is_not_understood_but_readable() {
        let text = r#"{"v":1,"id":"a","attempt":1,"phase":"teleport","leader":"x","epoch":{"store":1,"revision":2},"max_hold_ms":1000,"switch_hold_ms":5000}"#;
        let record: Handover = serde_json::from_str(text).unwrap();
        assert_eq!(record.phase, HandoverPhase::Unknown);
        assert!(!record.is_understood());
    }
}
