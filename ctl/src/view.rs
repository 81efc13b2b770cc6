//! A cluster as the operator's verbs see it, wherever it was read.
//!
//! The words and fields are those of `GET /cluster` (COMPAT: one account for REST and the command
//! line), so a state read from the store and one read by REST look alike. Pure.

use kornak_cluster::{
    CitusRegistration, ClusterState, GroupId, HistoryEntry, Lsn, Member, Revision, SyncMode, Tags,
};
use serde_json::{Map, Value};

/// All groups that were asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterView {
    pub name: String,
    /// Whether it is a Citus cluster, whose groups have numbers.
    pub citus: bool,
    /// In the order of their numbers.
    pub groups: Vec<GroupView>,
    /// Whether the Citus metadata agree with the store; `None`: nobody says.
    pub registration: Option<CitusRegistration>,
}

/// One HA group.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GroupView {
    pub group: Option<GroupId>,
    /// System identifier, `Some("")` while someone bootstraps.
    pub initialize: Option<String>,
    /// By name.
    pub members: Vec<MemberView>,
    pub pause: bool,
    pub scheduled: Option<Scheduled>,
    pub standby_cluster: bool,
    pub synchronous: bool,
    /// Somebody has led in synchronous mode, and the store says who was synchronous then, if anybody.
    pub sync_known: bool,
    /// The member whose primary no guard would stop: maintenance mode took its guard out of service.
    pub unfenced: Option<String>,
    /// The dynamic configuration; `None` if there is none, or it could not be read.
    pub config: Option<Map<String, Value>>,
    /// For a change of `config` by compare-and-swap; 0 if it came by REST.
    pub config_revision: Revision,
}

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MemberView {
    pub name: String,
    /// `leader`, `standby_leader`, `sync_standby`, `quorum_standby`, `replica`.
    pub role: String,
    pub state: String,
    /// REST base, `http://host:port`.
    pub api: String,
    /// Without a host a member is listed, but counts for no column.
    pub host: String,
    pub port: Option<u16>,
    pub timeline: Option<u64>,
    /// `None` on a leader.
    pub receive: Option<Position>,
    pub replay: Option<Position>,
    pub tags: Tags,
    pub pending_restart: bool,
    /// Parameter, old and new value.
    pub pending_restart_reason: Vec<(String, String, String)>,
    pub scheduled_restart: Option<String>,
}

/// Where a standby's WAL stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// `X/Y`, or `unknown`.
    pub lsn: String,
    /// Bytes behind the leader; `None` if unknown.
    pub lag_bytes: Option<u64>,
}

/// A switchover that is to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduled {
    pub at: String,
    pub from: Option<String>,
    pub to: Option<String>,
}

impl MemberView {
    pub fn is_leader(&self) -> bool {
        matches!(self.role.as_str(), "leader" | "standby_leader")
    }

    fn is_synchronous(&self) -> bool {
        matches!(self.role.as_str(), "sync_standby" | "quorum_standby")
    }
}

impl GroupView {
    pub fn leader(&self) -> Option<&MemberView> {
        self.members.iter().find(|member| member.is_leader())
    }

    pub fn member(&self, name: &str) -> Option<&MemberView> {
        self.members.iter().find(|member| member.name == name)
    }

    /// Names of the members that may be asked to take over.
    pub fn candidates(&self) -> Vec<&str> {
        let may = |member: &&MemberView| !member.is_leader() && !member.tags.nofailover();
        self.members.iter().filter(may).map(|member| member.name.as_str()).collect()
    }

    /// In synchronous mode: whether a failover to this member could lose what was acknowledged.
    pub fn is_unsafe_target(&self, name: &str) -> bool {
        self.synchronous
            && self.sync_known
            && !self.member(name).is_some_and(MemberView::is_synchronous)
    }

    /// Reads a group's keys.
    pub fn from_state(group: Option<GroupId>, state: &ClusterState) -> Self {
        let config = state.config.as_ref();
        let request = &state.failover;
        let members = state.members.iter();
        Self {
            group,
            initialize: state.initialize.clone(),
            members: members.map(|(name, member)| member_from_state(state, name, member)).collect(),
            pause: config.is_some_and(|config| config.pause),
            scheduled: request.scheduled_at.as_ref().map(|at| Scheduled {
                at: at.clone(),
                from: request.leader.clone(),
                to: request.member.clone(),
            }),
            standby_cluster: is_standby_cluster(state),
            unfenced: state.unfenced.as_ref().map(|unfenced| unfenced.member.clone()),
            synchronous: config.is_some_and(|config| config.sync_mode() != SyncMode::Off),
            sync_known: state.sync.as_ref().is_some_and(|sync| sync.leader.is_some()),
            config: config.map(|config| config.raw.clone()),
            config_revision: state.config_revision,
        }
    }

    /// Reads `GET /cluster`, and what else is known by REST.
    pub fn from_rest(
        cluster: &Value,
        initialize: Option<String>,
        config: Option<Map<String, Value>>,
    ) -> Self {
        let rows = cluster.get("members").and_then(Value::as_array);
        let mut members: Vec<MemberView> =
            rows.into_iter().flatten().map(member_from_row).collect();
        members.sort_by(|a, b| a.name.cmp(&b.name));
        let scheduled = cluster.get("scheduled_switchover").and_then(|scheduled| {
            let text = |key| scheduled.get(key).and_then(Value::as_str).map(str::to_owned);
            Some(Scheduled { at: text("at")?, from: text("from"), to: text("to") })
        });
        let parsed = config.clone().map(kornak_cluster::ClusterConfig::from_json);
        Self {
            group: None,
            initialize,
            pause: cluster.get("pause").and_then(Value::as_bool).unwrap_or(false),
            scheduled,
            standby_cluster: members.iter().any(|member| member.role == "standby_leader"),
            unfenced: cluster.get("unfenced").and_then(Value::as_str).map(str::to_owned),
            synchronous: parsed.is_some_and(|config| config.sync_mode() != SyncMode::Off),
            // Not told by REST: in synchronous mode there is somebody, or there was.
            sync_known: true,
            members,
            config,
            config_revision: Revision::NONE,
        }
    }
}

/// The section counts if it says where the remote primary's WAL is.
fn is_standby_cluster(state: &ClusterState) -> bool {
    let config = state.config.as_ref();
    let section = config.and_then(|config| config.raw.get("standby_cluster"));
    ["host", "port", "restore_command"].iter().any(|key| {
        section.and_then(|section| section.get(key)).is_some_and(|value| !value.is_null())
    })
}

fn member_from_state(state: &ClusterState, name: &str, member: &Member) -> MemberView {
    let leads = state.leader.as_ref().is_some_and(|leader| leader.name == name);
    let mode =
        state.config.as_ref().map_or(SyncMode::Off, kornak_cluster::ClusterConfig::sync_mode);
    let in_sync = state.sync.as_ref().is_some_and(|sync| sync.matches(name));
    let role = match (leads, mode, in_sync) {
        (true, ..) if is_standby_cluster(state) => "standby_leader",
        (true, ..) => "leader",
        (false, SyncMode::On, true) => "sync_standby",
        (false, SyncMode::Quorum, true) => "quorum_standby",
        _ => "replica",
    };
    let streams = member.replication_state.as_deref().filter(|_| role != "leader");
    let end = state.status.as_ref().map(|status| status.optime);
    let position = |lsn: Option<Lsn>| {
        (!leads).then(|| Position {
            lsn: lsn.map_or_else(|| "unknown".to_owned(), |lsn| lsn.to_string()),
            lag_bytes: end.zip(lsn).map(|(end, lsn)| end.bytes_ahead_of(lsn)),
        })
    };
    let (receive, replay) = told(
        position(member.receive_lsn),
        position(member.replay_lsn),
        position(member.xlog_location),
        streams == Some("streaming"),
    );
    MemberView {
        name: name.to_owned(),
        role: role.to_owned(),
        state: streams.unwrap_or(member.state.as_str()).to_owned(),
        api: member.api_base().to_owned(),
        host: member.conn_address().map(|(host, _)| host).unwrap_or_default(),
        port: member.conn_address().map(|(_, port)| port),
        timeline: member.timeline.map(|timeline| u64::from(timeline.0)),
        receive,
        replay,
        tags: member.tags.clone(),
        pending_restart: member.pending_restart,
        pending_restart_reason: reasons(member.pending_restart_reason.as_ref()),
        scheduled_restart: member.scheduled_restart.as_ref().and_then(scheduled_restart),
    }
}

/// Received and replayed. A Patroni before 4.1 tells one position, which is either.
fn told(
    receive: Option<Position>,
    replay: Option<Position>,
    one: Option<Position>,
    streams: bool,
) -> (Option<Position>, Option<Position>) {
    let unknown = |at: &Option<Position>| at.as_ref().is_some_and(|at| at.lsn == "unknown");
    let known = one.is_some() && !unknown(&one);
    match (known && unknown(&receive) && unknown(&replay), streams) {
        (true, true) => (one, replay),
        (true, false) => (receive, one),
        (false, _) => (receive, replay),
    }
}

fn member_from_row(row: &Value) -> MemberView {
    let text = |key: &str| row.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let position = |lsn: &str, lag: &str| {
        row.get(lsn).map(|lsn| Position {
            lsn: lsn.as_str().unwrap_or("unknown").to_owned(),
            lag_bytes: row.get(lag).and_then(Value::as_u64),
        })
    };
    let api_url = text("api_url");
    let (receive, replay) = told(
        position("receive_lsn", "receive_lag"),
        position("replay_lsn", "replay_lag"),
        position("lsn", "lag"),
        text("state") == "streaming",
    );
    MemberView {
        name: text("name"),
        role: text("role"),
        state: text("state"),
        api: api_url.strip_suffix("/patroni").unwrap_or(&api_url).to_owned(),
        host: text("host"),
        port: row.get("port").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok()),
        timeline: row.get("timeline").and_then(Value::as_u64),
        receive,
        replay,
        tags: Tags(row.get("tags").and_then(Value::as_object).cloned().unwrap_or_default()),
        pending_restart: row.get("pending_restart").and_then(Value::as_bool).unwrap_or(false),
        pending_restart_reason: reasons(row.get("pending_restart_reason")),
        scheduled_restart: row.get("scheduled_restart").and_then(scheduled_restart),
    }
}

fn reasons(value: Option<&Value>) -> Vec<(String, String, String)> {
    let text = |change: &Value, key: &str| match change.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    };
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    entries
        .map(|(name, change)| (name.clone(), text(change, "old_value"), text(change, "new_value")))
        .collect()
}

fn scheduled_restart(value: &Value) -> Option<String> {
    let at = value.get("schedule")?.as_str()?;
    match value.get("postgres_version").and_then(Value::as_str) {
        Some(version) => Some(format!("{at} if version < {version}")),
        None => Some(at.to_owned()),
    }
}

/// Rows of `GET /history`.
pub fn history_from_rest(text: &str) -> Vec<HistoryEntry> {
    HistoryEntry::parse_list(text)
}

#[cfg(test)]
mod tests {
    use kornak_cluster::{ClusterConfig, LeaseId};

    use super::*;

    fn state() -> ClusterState {
        let member = |text: &str| serde_json::from_str::<Member>(text).expect(text);
        let mut state = ClusterState {
            config: ClusterConfig::parse(r#"{"synchronous_mode":"quorum","pause":true}"#),
            sync: serde_json::from_str(r#"{"leader":"a","quorum":1,"sync_standby":"B"}"#).ok(),
            status: serde_json::from_str(r#"{"optime":67508248}"#).ok(),
            leader: Some(kornak_cluster::Leader {
                name: "a".to_owned(),
                lease: LeaseId(1),
                epoch: kornak_cluster::Epoch { store: 1, revision: Revision(1) },
                mod_revision: Revision(1),
            }),
            ..ClusterState::default()
        };
        for (name, text) in [
            (
                "a",
                r#"{"conn_url":"postgres://h1:5432/postgres","api_url":"http://h1:8008/patroni","state":"running","role":"primary","timeline":3}"#,
            ),
            (
                "b",
                r#"{"conn_url":"postgres://h2:5432/postgres","api_url":"http://h2:8008/patroni","state":"running","role":"replica","replication_state":"streaming","receive_lsn":67508248,"replay_lsn":66459672,"timeline":3,"tags":{"nofailover":true}}"#,
            ),
            (
                "c",
                r#"{"conn_url":"postgres://h3:5432/postgres","api_url":"http://h3:8008/patroni","state":"stopped","role":"replica","pending_restart":true,"pending_restart_reason":{"x":{"old_value":"1","new_value":null}},"scheduled_restart":{"schedule":"2099-01-01T00:00:00+00:00","postgres_version":"15.4"}}"#,
            ),
        ] {
            state.members.insert(name.to_owned(), member(text));
        }
        state
    }

    #[test]
    fn the_store_and_rest_tell_the_same() {
        let by_store = GroupView::from_state(None, &state());
        let rest = serde_json::json!({"members": [
            {"name":"c","role":"replica","state":"stopped","api_url":"http://h3:8008/patroni","host":"h3","port":5432,"pending_restart":true,"pending_restart_reason":{"x":{"old_value":"1","new_value":null}},"scheduled_restart":{"schedule":"2099-01-01T00:00:00+00:00","postgres_version":"15.4"},"receive_lag":"unknown","receive_lsn":"unknown","replay_lag":"unknown","replay_lsn":"unknown","lag":"unknown","lsn":"unknown"},
            {"name":"a","role":"leader","state":"running","api_url":"http://h1:8008/patroni","host":"h1","port":5432,"timeline":3},
            {"name":"b","role":"quorum_standby","state":"streaming","api_url":"http://h2:8008/patroni","host":"h2","port":5432,"timeline":3,"tags":{"nofailover":true},"receive_lag":0,"receive_lsn":"0/4061818","replay_lag":1048576,"replay_lsn":"0/3F61818","lag":0,"lsn":"0/4061818"}],
            "pause": true, "scope": "demo"});
        let config = state().config.map(|config| config.raw);
        assert_eq!(GroupView::from_rest(&rest, None, config), by_store);
        assert_eq!(by_store.candidates(), ["c"]);
        assert!(by_store.is_unsafe_target("c") && !by_store.is_unsafe_target("b"));
    }

    #[test]
    fn the_one_position_of_an_old_patroni_is_received_or_replayed() {
        for (streams, expected) in [
            (r#","replication_state":"streaming""#, ("0/4061818", "unknown")),
            (r#","replication_state":"in archive recovery""#, ("unknown", "0/4061818")),
            ("", ("unknown", "0/4061818")),
        ] {
            let text = format!(
                r#"{{"conn_url":"postgres://h:1/postgres","api_url":"http://h:2/patroni","state":"running","role":"replica","xlog_location":67508248{streams}}}"#
            );
            let mut state = state();
            state.members.insert("b".to_owned(), serde_json::from_str(&text).expect("a member"));
            let group = GroupView::from_state(None, &state);
            let member = group.member("b").expect("it is there");
            let lsn =
                |at: &Option<Position>| at.as_ref().map(|at| at.lsn.clone()).unwrap_or_default();
            let found = (lsn(&member.receive), lsn(&member.replay));
            assert_eq!((found.0.as_str(), found.1.as_str()), expected, "{streams}");
        }
    }

    #[test]
    fn a_failover_in_synchronous_mode_asks_whoever_may_lack_commits() {
        for (sync, name, unsafe_target) in [
            (r#"{"leader":"a","quorum":1,"sync_standby":"B"}"#, "b", false),
            (r#"{"leader":"a","quorum":1,"sync_standby":"B"}"#, "c", true),
            (r#"{"leader":"a","sync_standby":null}"#, "b", true),
            (r#"{"leader":null,"sync_standby":null}"#, "b", false),
        ] {
            let state = ClusterState { sync: serde_json::from_str(sync).ok(), ..state() };
            let group = GroupView::from_state(None, &state);
            assert_eq!(group.is_unsafe_target(name), unsafe_target, "{name} {sync}");
        }
    }
}
