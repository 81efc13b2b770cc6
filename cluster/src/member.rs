//! A node's report about itself in the store, in Patroni's JSON.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::lsn::{Lsn, Timeline};

/// Version under which Kornak's nodes publish themselves. Patroni's nodes compare it (below 2.1.0
/// means another key layout, below 4.0.0 other words), so it says with which Patroni the formats
/// agree.
pub const COMPATIBLE_PATRONI_VERSION: &str = "4.1.5";

/// Whether and how the postgres of a member runs. Patroni's words, their order is the index of the
/// metric `patroni_postgres_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MemberState {
    #[serde(rename = "initializing new cluster")]
    Initializing,
    #[serde(rename = "initdb failed")]
    InitdbFailed,
    #[serde(rename = "running custom bootstrap script")]
    CustomBootstrap,
    #[serde(rename = "custom bootstrap failed")]
    CustomBootstrapFailed,
    #[serde(rename = "creating replica")]
    CreatingReplica,
    #[serde(rename = "running", alias = "streaming", alias = "in archive recovery")]
    Running,
    #[serde(rename = "starting")]
    Starting,
    #[serde(rename = "starting after custom bootstrap")]
    BootstrapStarting,
    #[serde(rename = "start failed")]
    StartFailed,
    #[serde(rename = "restarting")]
    Restarting,
    #[serde(rename = "restart failed")]
    RestartFailed,
    #[serde(rename = "stopping")]
    Stopping,
    #[serde(rename = "stopped")]
    Stopped,
    #[serde(rename = "stop failed")]
    StopFailed,
    #[serde(rename = "crashed")]
    Crashed,
    /// A word this version does not know.
    #[serde(untagged, skip_serializing, deserialize_with = "any_word")]
    Unknown,
}

fn any_word<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    String::deserialize(deserializer).map(|_| ())
}

impl MemberState {
    /// Patroni's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Initializing => "initializing new cluster",
            Self::InitdbFailed => "initdb failed",
            Self::CustomBootstrap => "running custom bootstrap script",
            Self::CustomBootstrapFailed => "custom bootstrap failed",
            Self::CreatingReplica => "creating replica",
            Self::Running => "running",
            Self::Starting => "starting",
            Self::BootstrapStarting => "starting after custom bootstrap",
            Self::StartFailed => "start failed",
            Self::Restarting => "restarting",
            Self::RestartFailed => "restart failed",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::StopFailed => "stop failed",
            Self::Crashed => "crashed",
            Self::Unknown => "unknown",
        }
    }

    /// Index in Patroni's metric `patroni_postgres_state`.
    pub fn metric_index(self) -> u8 {
        match self {
            Self::Initializing => 0,
            Self::InitdbFailed => 1,
            Self::CustomBootstrap => 2,
            Self::CustomBootstrapFailed => 3,
            Self::CreatingReplica => 4,
            Self::Running => 5,
            Self::Starting => 6,
            Self::BootstrapStarting => 7,
            Self::StartFailed => 8,
            Self::Restarting => 9,
            Self::RestartFailed => 10,
            Self::Stopping => 11,
            Self::Stopped => 12,
            Self::StopFailed => 13,
            Self::Crashed => 14,
            Self::Unknown => 15,
        }
    }
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Role of a member, in Patroni's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberRole {
    #[serde(alias = "master")]
    Primary,
    StandbyLeader,
    Replica,
    /// Was primary, has been stopped or is becoming a standby.
    Demoted,
    /// Is being promoted.
    Promoted,
    #[serde(other)]
    Uninitialized,
}

impl MemberRole {
    /// Patroni's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::StandbyLeader => "standby_leader",
            Self::Replica => "replica",
            Self::Demoted => "demoted",
            Self::Promoted => "promoted",
            Self::Uninitialized => "uninitialized",
        }
    }
}

impl fmt::Display for MemberRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Patroni's tags, with the types the YAML gave them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tags(pub Map<String, Value>);

impl Tags {
    fn truthy(&self, key: &str) -> bool {
        match self.0.get(key) {
            Some(Value::Bool(on)) => *on,
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(Value::String(text)) => {
                matches!(text.to_ascii_lowercase().as_str(), "true" | "on" | "yes" | "1")
            }
            _ => false,
        }
    }

    fn int(&self, key: &str) -> Option<i64> {
        match self.0.get(key) {
            Some(Value::Number(number)) => number.as_i64(),
            Some(Value::String(text)) => text.trim().parse().ok(),
            _ => None,
        }
    }

    /// Never becomes leader. An explicit `nofailover` wins over `failover_priority`.
    pub fn nofailover(&self) -> bool {
        if self.0.contains_key("nofailover") {
            return self.truthy("nofailover");
        }
        self.int("failover_priority").is_some_and(|priority| priority <= 0)
    }

    /// Higher wins among members with equal WAL; 0 means never. Default 1.
    pub fn failover_priority(&self) -> i64 {
        if self.nofailover() { 0 } else { self.int("failover_priority").unwrap_or(1).max(1) }
    }

    /// Not to be offered to readers.
    pub fn noloadbalance(&self) -> bool {
        self.truthy("noloadbalance")
    }

    /// Preferred source of base backups.
    pub fn clonefrom(&self) -> bool {
        self.truthy("clonefrom")
    }

    /// Never a synchronous standby. An explicit `nosync` wins over `sync_priority`.
    pub fn nosync(&self) -> bool {
        if self.0.contains_key("nosync") {
            return self.truthy("nosync");
        }
        self.int("sync_priority").is_some_and(|priority| priority <= 0)
    }

    /// Higher is preferred as synchronous standby. Default 1.
    pub fn sync_priority(&self) -> i64 {
        if self.nosync() { 0 } else { self.int("sync_priority").unwrap_or(1).max(1) }
    }

    /// Name of the member to cascade from.
    pub fn replicatefrom(&self) -> Option<&str> {
        self.0.get("replicatefrom").and_then(Value::as_str).filter(|name| !name.is_empty())
    }

    /// Gets its WAL from the archive only.
    pub fn nostream(&self) -> bool {
        self.truthy("nostream")
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A member's own account of itself: the value of `members/<name>`, in Patroni's format. A field that
/// has nothing to say is absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// `postgres://host:port/database`, without user and password.
    #[serde(default)]
    pub conn_url: String,
    /// `http(s)://host:port/patroni`.
    #[serde(default)]
    pub api_url: String,
    pub state: MemberState,
    pub role: MemberRole,
    #[serde(default)]
    pub version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_url: Option<String>,
    /// `Some(false)` from promotion until the checkpoint after it: nobody may rewind from here yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_after_promote: Option<bool>,
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
    #[serde(default, skip_serializing_if = "is_false")]
    pub pending_restart: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_restart_reason: Option<Value>,
    /// On a primary its current LSN, on a standby the further of received and replayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xlog_location: Option<Lsn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_lsn: Option<Lsn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive_lsn: Option<Lsn>,
    /// `streaming` or `in archive recovery`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication_state: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduled_restart: Option<Value>,
    /// The node has seen that the cluster is paused.
    #[serde(default, skip_serializing_if = "is_false")]
    pub pause: bool,
    /// Kornak's mark (Patroni ignores it): the protocol version of Kornak's own records this node
    /// speaks. A cluster whose members all carry it may use Kornak's shorter timings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kornak: Option<u32>,
    /// The node may be deposed by its standbys before its lease ends, renews it often for that, and does the
    /// same to others (Patroni ignores it).
    #[serde(default, skip_serializing_if = "is_false")]
    pub fences: bool,
    /// Where other nodes of a Citus cluster reach this server through a pool, `host=… port=…`
    /// (Patroni ignores it).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poolinfo: Option<String>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// Kornak's own records are of this version.
pub const KORNAK_RECORDS_VERSION: u32 = 1;

impl Member {
    /// Host and port of `conn_url`; brackets around an IPv6 address are removed. Port 5432 if the
    /// URL names none.
    pub fn conn_address(&self) -> Option<(String, u16)> {
        split_url(&self.conn_url, 5432)
    }

    /// Database of `conn_url`, `postgres` if it names none.
    pub fn conn_database(&self) -> &str {
        let path = self.conn_url.split_once("://").map_or("", |(_, rest)| rest);
        path.split_once('/').map_or("postgres", |(_, database)| database)
    }

    /// Host and port of `api_url`; port 8008 if the URL names none.
    pub fn api_address(&self) -> Option<(String, u16)> {
        split_url(&self.api_url, 8008)
    }

    /// `api_url` without the trailing `/patroni`.
    pub fn api_base(&self) -> &str {
        self.api_url.strip_suffix("/patroni").unwrap_or(&self.api_url)
    }
}

pub(crate) fn split_url(url: &str, default_port: u16) -> Option<(String, u16)> {
    let (_, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?']).next()?;
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    if let Some(v6) = authority.strip_prefix('[') {
        let (host, tail) = v6.split_once(']')?;
        let port = match tail.strip_prefix(':') {
            Some(port) => port.parse().ok()?,
            None => default_port,
        };
        return Some((host.to_owned(), port));
    }
    match authority.rsplit_once(':') {
        Some((host, port)) => Some((host.to_owned(), port.parse().ok()?)),
        None if authority.is_empty() => None,
        None => Some((authority.to_owned(), default_port)),
    }
}

/// `xlog` of a node's REST status: where its WAL stands.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct XLog {
    /// Only on a primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<Lsn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_location: Option<Lsn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replayed_location: Option<Lsn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replayed_timestamp: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patronis_members_are_read_and_written_back() {
        for text in [
            r#"{"conn_url":"postgres://127.0.0.1:25430/postgres","api_url":"http://127.0.0.1:28000/patroni","state":"running","role":"primary","version":"4.1.5","xlog_location":67108960,"timeline":1}"#,
            r#"{"conn_url":"postgres://h:1/postgres","api_url":"http://h:2/patroni","state":"running","role":"replica","version":"4.1.5","tags":{"foo":"1","nosync":true},"pending_restart":true,"pending_restart_reason":{"max_connections":{"old_value":"50","new_value":"60"}},"xlog_location":81019256,"replay_lsn":81019256,"receive_lsn":81019256,"replication_state":"streaming","timeline":20,"pause":true}"#,
        ] {
            let member: Member = serde_json::from_str(text).expect(text);
            assert_eq!(serde_json::to_string(&member).unwrap(), text);
        }
    }

    #[test]
    fn words_of_other_versions_do_not_make_a_member_unreadable() {
        let text = r#"{"conn_url":"","api_url":"","state":"dreaming","role":"master","x":[1]}"#;
        let member: Member = serde_json::from_str(text).unwrap();
        assert_eq!((member.state, member.role), (MemberState::Unknown, MemberRole::Primary));
        let text = r#"{"state":"stopped","role":"captain"}"#;
        let member: Member = serde_json::from_str(text).unwrap();
        assert_eq!((member.state, member.role), (MemberState::Stopped, MemberRole::Uninitialized));
    }

    #[test]
    fn addresses_are_found_in_urls() {
        for (url, address) in [
            ("postgres://10.0.0.1:5433/postgres", Some(("10.0.0.1".to_owned(), 5433))),
            ("postgres://u:p@db/postgres", Some(("db".to_owned(), 5432))),
            ("postgres://[::1]:6000/x", Some(("::1".to_owned(), 6000))),
            ("postgres://[::1]/x", Some(("::1".to_owned(), 5432))),
            ("postgres:///x", None),
            ("nonsense", None),
        ] {
            assert_eq!(split_url(url, 5432), address, "{url}");
        }
    }

    #[test]
    fn an_explicit_tag_wins_over_its_priority() {
        let tags = |text| serde_json::from_str::<Tags>(text).unwrap();
        assert!(tags(r#"{"failover_priority":0}"#).nofailover());
        assert!(!tags(r#"{"failover_priority":0,"nofailover":false}"#).nofailover());
        assert_eq!(tags(r#"{"failover_priority":"7"}"#).failover_priority(), 7);
        assert!(tags(r#"{"nosync":true,"sync_priority":9}"#).nosync());
        assert_eq!(tags("{}").sync_priority(), 1);
    }
}
