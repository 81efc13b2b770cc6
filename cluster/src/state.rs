//! A group's keys as they were at one revision of the store.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::citus::CitusRegistration;
use crate::config::ClusterConfig;
use crate::epoch::Epoch;
use crate::handover::{Ack, Handover, ProxyRegistration, Unfenced};
use crate::known::{Doubt, SafetyKey};
use crate::lsn::{Lsn, Timeline};
use crate::member::Member;
use crate::numbers::{LeaseId, Revision};
use crate::pledge::{Leadership, Pledged};

/// The leader key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    pub name: String,
    /// The lease it hangs on.
    pub lease: LeaseId,
    pub epoch: Epoch,
    pub mod_revision: Revision,
}

/// Value of `status`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Status {
    /// The leader's last known LSN.
    #[serde(default)]
    pub optime: Lsn,
    /// Slots and how far each has confirmed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub slots: BTreeMap<String, Lsn>,
    /// Member slots that are kept although their member may be away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retain_slots: Vec<String>,
}

/// Value of `sync`: who may take over without losing an acknowledged commit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SyncState {
    #[serde(default)]
    pub leader: Option<String>,
    /// Votes needed in quorum mode; 0 in priority mode.
    #[serde(default)]
    pub quorum: u32,
    /// Comma separated, as Patroni writes it.
    #[serde(default)]
    pub sync_standby: Option<String>,
}

impl SyncState {
    /// State with these standbys.
    pub fn new(leader: &str, standbys: &[String]) -> Self {
        Self {
            leader: Some(leader.to_owned()),
            quorum: 0,
            sync_standby: (!standbys.is_empty()).then(|| standbys.join(",")),
        }
    }

    /// State of quorum mode: a candidate among these voters must have as much as `quorum` others of them.
    pub fn with_quorum(leader: &str, voters: &[String], quorum: u32) -> Self {
        Self { quorum, ..Self::new(leader, voters) }
    }

    /// The standbys' names.
    pub fn standbys(&self) -> Vec<String> {
        let list = self.sync_standby.as_deref().unwrap_or_default();
        list.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }

    /// Whether the member is the leader or a synchronous standby; names compare without case.
    pub fn matches(&self, name: &str) -> bool {
        self.leader.as_deref().is_some_and(|leader| leader.eq_ignore_ascii_case(name))
            || self.standbys().iter().any(|standby| standby.eq_ignore_ascii_case(name))
    }

    /// Whether synchronous mode has written nothing yet.
    pub fn is_empty(&self) -> bool {
        self.leader.is_none()
    }
}

/// Value of `failover`: a manual request. `{}` means none; the key is never deleted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FailoverRequest {
    /// Present: a switchover from this leader. Absent: a failover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// The candidate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// RFC 3339 with a zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduled_at: Option<String>,
}

impl FailoverRequest {
    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.leader.is_none() && self.member.is_none()
    }

    /// Reads JSON, or the legacy form `leader:candidate`.
    pub fn parse(text: &str) -> Self {
        if let Ok(request) = serde_json::from_str(text) {
            return request;
        }
        let (leader, member) = text.split_once(':').unwrap_or((text, ""));
        let name = |part: &str| (!part.trim().is_empty()).then(|| part.trim().to_owned());
        Self { leader: name(leader), member: name(member), scheduled_at: None }
    }
}

/// One row of `history`: `[timeline, switch lsn, reason, time, new leader]`, the last two of which
/// older rows may lack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    pub timeline: Timeline,
    pub lsn: Lsn,
    pub reason: String,
    pub timestamp: Option<String>,
    pub new_leader: Option<String>,
}

impl HistoryEntry {
    /// Reads the whole list; rows that make no sense are left out.
    pub fn parse_list(text: &str) -> Vec<Self> {
        let rows: Vec<Vec<Value>> = serde_json::from_str(text).unwrap_or_default();
        rows.iter().filter_map(|row| Self::from_row(row)).collect()
    }

    fn from_row(row: &[Value]) -> Option<Self> {
        Some(Self {
            timeline: Timeline(u32::try_from(row.first()?.as_u64()?).ok()?),
            lsn: Lsn(row.get(1)?.as_u64()?),
            reason: row.get(2).and_then(Value::as_str).unwrap_or_default().to_owned(),
            timestamp: row.get(3).and_then(Value::as_str).map(str::to_owned),
            new_leader: row.get(4).and_then(Value::as_str).map(str::to_owned),
        })
    }

    /// The row as Patroni writes it.
    pub fn to_row(&self) -> Value {
        let mut row =
            vec![self.timeline.0.into(), self.lsn.0.into(), Value::from(self.reason.as_str())];
        row.extend(self.timestamp.as_deref().map(Value::from));
        row.extend(self.new_leader.as_deref().map(Value::from));
        Value::Array(row)
    }

    /// The list as it is stored.
    pub fn print_list(list: &[Self]) -> String {
        Value::Array(list.iter().map(Self::to_row).collect()).to_string()
    }
}

/// Everything that the store says about one group, at one revision. A value that cannot be parsed
/// is absent here and named in `unreadable`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterState {
    /// The store's cluster id.
    pub store: u64,
    pub revision: Revision,
    /// System identifier; `Some("")` while someone bootstraps.
    pub initialize: Option<String>,
    /// Modification revision of `initialize`; 0 if absent.
    pub initialize_revision: Revision,
    pub config: Option<ClusterConfig>,
    /// Needed to change `config` by compare-and-swap; 0 if absent.
    pub config_revision: Revision,
    pub leader: Option<Leader>,
    pub members: BTreeMap<String, Member>,
    pub status: Option<Status>,
    pub sync: Option<SyncState>,
    /// Needed to change `sync` by compare-and-swap; 0 if absent.
    pub sync_revision: Revision,
    pub history: Vec<HistoryEntry>,
    pub failover: FailoverRequest,
    /// Modification revision of `failover`; 0 if absent.
    pub failover_revision: Revision,
    /// Member names and their REST URLs.
    pub failsafe: Option<BTreeMap<String, String>>,
    pub handover: Option<Handover>,
    /// Modification revision of `handover`; 0 if absent.
    pub handover_revision: Revision,
    pub acks: BTreeMap<String, Ack>,
    pub proxies: BTreeMap<String, ProxyRegistration>,
    /// Keys below `kornak/fence/`, by member.
    pub pledges: BTreeMap<String, Pledged>,
    pub unfenced: Option<Unfenced>,
    /// Modification revision of `unfenced`; 0 if absent.
    pub unfenced_revision: Revision,
    /// In a Citus cluster: whether its metadata agree with the store.
    pub citus: Option<CitusRegistration>,
    /// Keys whose value made no sense.
    pub unreadable: Vec<String>,
    /// Keys whose value here is not simply what the store says.
    pub doubts: BTreeMap<SafetyKey, Doubt>,
    /// In a store that was restored, where `sync` may be of the past: what was in force before. Whoever
    /// takes over has to be named by both.
    pub sync_before: Option<SyncState>,
    /// The member that held the leader key last, as far as is remembered.
    pub last_leader: Option<String>,
    /// How often the store's history has gone back since the agent began.
    pub rewound: u32,
}

impl ClusterState {
    /// The leader's own account of itself, if there is a leader and it has published one.
    pub fn leader_member(&self) -> Option<(&str, &Member)> {
        let leader = self.leader.as_ref()?;
        let member = self.members.get(&leader.name)?;
        Some((leader.name.as_str(), member))
    }

    /// The leadership in force: the leader's term, and the `sync` of it.
    pub fn leadership(&self) -> Option<Leadership> {
        let leader = self.leader.as_ref()?;
        Some(Leadership { epoch: leader.epoch, sync: self.sync_revision })
    }

    /// The timeline the cluster is on, from its history; 0 if nothing is known.
    pub fn timeline(&self) -> Timeline {
        match self.history.last() {
            Some(last) => Timeline(last.timeline.0.saturating_add(1)),
            None => Timeline(0),
        }
    }

    /// Whether nothing good is known of a key that the store does not show.
    pub fn is_unknown(&self, key: SafetyKey) -> bool {
        matches!(self.doubts.get(&key), Some(Doubt::Unreadable | Doubt::Unknown))
    }

    /// Whether a key's value is the last good one, for the store's is absent or makes no sense.
    pub fn is_kept(&self, key: SafetyKey) -> bool {
        self.doubts.get(&key) == Some(&Doubt::Kept)
    }

    /// Whether every member carries Kornak's mark, so that Kornak's own timings may be used.
    pub fn only_kornak(&self) -> bool {
        self.members.values().all(|member| member.kornak.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failover_requests_are_read_in_both_forms() {
        let both = FailoverRequest::parse(r#"{"leader":"a","member":"b"}"#);
        assert_eq!((both.leader.as_deref(), both.member.as_deref()), (Some("a"), Some("b")));
        let legacy = FailoverRequest::parse("a:b");
        assert_eq!(legacy, both);
        assert!(FailoverRequest::parse("{}").is_empty());
        assert!(FailoverRequest::parse("").is_empty());
    }

    #[test]
    fn history_rows_are_written_back_as_they_were() {
        let text = r#"[[1,67553520,"no recovery target specified","2026-11-22T22:05:55.870877+00:00","pg1"],[2,67755424,"no recovery target specified"]]"#;
        assert_eq!(HistoryEntry::print_list(&HistoryEntry::parse_list(text)), text);
        assert_eq!(HistoryEntry::parse_list("[]"), []);
    }

    #[test]
    fn sync_members_compare_without_case() {
        let sync: SyncState =
            serde_json::from_str(r#"{"leader":"pg2","quorum":0,"sync_standby":"pg0,PG1"}"#)
                .unwrap();
        assert!(sync.matches("PG2") && sync.matches("pg1") && !sync.matches("pg3"));
    }
}
