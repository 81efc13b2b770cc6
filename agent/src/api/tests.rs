//! The API over fabricated views: nothing but the router runs.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use axum::http::HeaderMap;
use kornak_cluster::{
    ClusterConfig, ClusterState, Epoch, FailoverRequest, Leader, LeaseId, Lsn, Member, MemberRole,
    MemberState, Moment, Revision, Scope, Status, SyncState, Tags, Timeline, XLog,
};
use kornak_config::agent::CtlSettings;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::body::BODY_LIMIT;
use super::*;
use crate::ha::{Action, Why};
use crate::node::{COMMAND_QUEUE, ReplicationView};

mod changes;
mod forwarding;
mod odd;
mod reads;
mod serving;
mod tls;

fn member(role: &str, port: u16) -> Member {
    serde_json::from_value(json!({
        "conn_url": format!("postgres://127.0.0.1:{port}/postgres"),
        "api_url": "http://127.0.0.1:1/patroni", "state": "running", "role": role,
        "version": "4.1.5", "timeline": 5
    }))
    .unwrap()
}

/// Three members, led by `pg2`.
fn three() -> ClusterState {
    let leads = Leader {
        name: "pg2".to_owned(),
        lease: LeaseId(7),
        epoch: Epoch { store: 1, revision: Revision(10) },
        mod_revision: Revision(10),
    };
    let standby = |port, at| Member {
        xlog_location: Some(Lsn(at)),
        replay_lsn: Some(Lsn(at)),
        receive_lsn: Some(Lsn(at)),
        replication_state: Some("streaming".to_owned()),
        ..member("replica", port)
    };
    ClusterState {
        revision: Revision(99),
        config: ClusterConfig::parse(r#"{"ttl":30,"failsafe_mode":true}"#),
        leader: Some(leads),
        members: BTreeMap::from([
            ("pg0".to_owned(), standby(25430, 68_540_456)),
            ("pg1".to_owned(), standby(25431, 68_540_000)),
            ("pg2".to_owned(), member("primary", 25432)),
        ]),
        status: Some(Status { optime: Lsn(68_540_456), ..Status::default() }),
        failsafe: Some(BTreeMap::from([("pg0".to_owned(), "http://h:1/patroni".to_owned())])),
        ..ClusterState::default()
    }
}

/// `pg2` leads.
pub(crate) fn primary() -> NodeView {
    NodeView {
        name: "pg2".to_owned(),
        scope: Scope::new("service", "demo", None),
        tags: Tags::default(),
        state: MemberState::Running,
        role: MemberRole::Primary,
        leads: true,
        holds_lock: true,
        server_version: Some(150_020),
        postmaster_start_time: Some("2026-11-22 22:07:05.557757+00:00".to_owned()),
        timeline: Some(Timeline(5)),
        xlog: XLog { location: Some(Lsn(68_540_456)), ..XLog::default() },
        wal_known: true,
        replication_state: None,
        detached: false,
        latest_end_lsn: None,
        replication: vec![ReplicationView {
            usename: "replicator".to_owned(),
            application_name: "pg0".to_owned(),
            client_addr: Some("127.0.0.1".to_owned()),
            state: "streaming".to_owned(),
            sync_state: "quorum".to_owned(),
            sync_priority: 1,
        }],
        system_identifier: Some("7711116309192622882".to_owned()),
        dcs_last_seen: 1_795_385_397,
        dcs_reachable: true,
        failsafe_active: false,
        watchdog_failed: false,
        stands_back: false,
        pending_restart: None,
        scheduled_restart: None,
        cluster: Arc::new(three()),
        action: Action::Lead,
        why: Why::Healthy,
        // As new as any question.
        observed_at: Moment::at_millis(100_000),
        cycle_at: Moment::at_millis(99_000),
        lease_until: Some(Moment::at_millis(125_500)),
        cycles: 42,
    }
}

/// `pg0` follows, 192 bytes behind.
fn standby() -> NodeView {
    NodeView {
        name: "pg0".to_owned(),
        role: MemberRole::Replica,
        leads: false,
        holds_lock: false,
        xlog: XLog {
            location: None,
            received_location: Some(Lsn(68_540_456)),
            replayed_location: Some(Lsn(68_540_264)),
            replayed_timestamp: Some("2026-11-22 22:08:34.711125+00:00".to_owned()),
            paused: Some(false),
        },
        replication_state: Some("streaming".to_owned()),
        latest_end_lsn: Some(Lsn(68_540_456)),
        replication: Vec::new(),
        action: Action::Wait,
        why: Why::AlreadyFollows,
        lease_until: None,
        ..primary()
    }
}

fn tags(json: Value) -> Tags {
    serde_json::from_value(json).unwrap()
}

/// The view with another cluster around it.
fn within(view: NodeView, change: impl FnOnce(&mut ClusterState)) -> NodeView {
    let mut cluster = (*view.cluster).clone();
    change(&mut cluster);
    NodeView { cluster: Arc::new(cluster), ..view }
}

fn config(text: &str) -> Option<ClusterConfig> {
    Some(ClusterConfig::parse(text).unwrap())
}

fn settings() -> ApiSettings {
    ApiSettings {
        tls: None,
        require_certificate: false,
        server: HeaderValue::from_static("Kornak"),
        authentication: None,
        allowlist: Vec::new(),
        allowlist_include_members: false,
        extra_headers: Vec::new(),
        peers: peers(None),
        restart_plan: RestartPlan::default(),
        citus: None,
        counters: Arc::default(),
        machine: Machine::standing_at(Moment::at_millis(100_000)),
    }
}

fn peers(auth: Option<&BasicAuth>) -> Peers {
    let ctl = CtlSettings { authentication: auth.cloned(), ..CtlSettings::default() };
    Peers::new(&ctl).unwrap()
}

/// A node that shows `view` and does with commands what `driver` does.
struct Node {
    router: Router,
    _views: watch::Sender<Arc<NodeView>>,
}

fn node(view: NodeView, settings: ApiSettings, driver: impl Fn(Command) + Send + 'static) -> Node {
    let (views, seen) = watch::channel(Arc::new(view));
    let (commands, mut queue) = mpsc::channel(COMMAND_QUEUE);
    tokio::spawn(async move {
        while let Some(command) = queue.recv().await {
            driver(command);
        }
    });
    Node { router: router(Arc::new(Api::new(seen, commands, settings))), _views: views }
}

/// A node of which nothing may be asked.
fn quiet(view: NodeView) -> Node {
    node(view, settings(), |command| panic!("asked for {command:?}"))
}

struct Reply {
    status: u16,
    headers: HeaderMap,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

impl Node {
    async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = to_bytes(body, BODY_LIMIT).await.unwrap();
        Reply {
            status: head.status.as_u16(),
            body: match serde_json::from_slice::<Value>(&body) {
                // Without the spaces it is easier to compare.
                Ok(json) if head.headers[CONTENT_TYPE] == "application/json" => json.to_string(),
                _ => String::from_utf8(body.to_vec()).unwrap(),
            },
            headers: head.headers,
        }
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(request("GET", path, None)).await
    }

    async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(request("POST", path, Some(body.to_string()))).await
    }
}

fn request(method: &str, path: &str, body: Option<String>) -> Request<Body> {
    let request = Request::builder().method(method).uri(path);
    match body {
        Some(body) => request.header(CONTENT_LENGTH, body.len()).body(Body::from(body)).unwrap(),
        None => request.body(Body::empty()).unwrap(),
    }
}
