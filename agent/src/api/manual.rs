//! An operator asks for a switchover or a failover: reading the request, refusing what cannot be,
//! finding the node that can do it. Texts and codes are Patroni's
//! (its documentation, *REST API*, switchover and failover endpoints), for patronictl and scripts show
//! and compare them.
//!
//! The reading and refusing is pure. The leader carries a request out, so a request that reaches
//! another node is passed on to the leader's REST API and its answer returned: no waiting until the
//! leader notices a key in the store.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::Response;
use jiff::{Timestamp, Zoned};
use kornak_cluster::{ClusterState, FailoverRequest, SyncMode};
use serde_json::{Map, Value};

use super::{ANSWER_LIMIT, Api, PEER_LIMIT, text};
use crate::ha::Peer;
use crate::node::{Command, CommandError, CommandResult, NodeView};
use crate::peers::{Identity, PeerError};
use crate::schedule::{self, Refusal, print_time};

/// How long a success may take to show in this node's own view of the cluster, which follows the store
/// by some milliseconds.
const SHOW_LIMIT: Duration = Duration::from_millis(500);

/// Which of the two is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Switchover,
    Failover,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Failover => "failover",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Switchover => "Switchover",
            Self::Failover => "Failover",
        }
    }
}

/// A request that makes sense in itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// Always present in a switchover.
    pub(super) leader: Option<String>,
    /// Always present in a failover.
    pub(super) candidate: Option<String>,
    pub(super) at: Option<Zoned>,
}

/// Reads a request. A failover that names a leader is a switchover.
pub(super) fn read(
    kind: Kind,
    body: &Map<String, Value>,
    paused: bool,
    now: Timestamp,
) -> Result<Request, Refusal> {
    let word = |key| body.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let bad = |text: &str| Err((StatusCode::BAD_REQUEST, text.to_owned()));
    let leader = word("leader");
    let candidate = word("candidate").or_else(|| word("member"));
    if kind == Kind::Failover && candidate.is_none() {
        return bad("Failover could be performed only to a specific candidate");
    }
    if kind == Kind::Switchover && leader.is_none() {
        return bad("Switchover could be performed only from a specific leader");
    }
    let at = match word("scheduled_at") {
        None => None,
        Some(_) if kind == Kind::Failover => return bad("Failover can't be scheduled"),
        Some(_) if paused => return bad("Can't schedule switchover in the paused state"),
        Some(text) => Some(schedule::parse_time(text, now, kind.word())?),
    };
    if paused && candidate.is_none() {
        return bad("Switchover is possible only to a specific candidate in a paused state");
    }
    if leader.is_some() && leader == candidate {
        return bad("Switchover target and source are the same");
    }
    let kind = if leader.is_some() { Kind::Switchover } else { kind };
    Ok(Request {
        kind,
        leader: leader.map(str::to_owned),
        candidate: candidate.map(str::to_owned),
        at,
    })
}

/// Names of the members that could take over, going by the store. The text is for a 412.
pub(super) fn eligible(request: &Request, cluster: &ClusterState) -> Result<Vec<String>, String> {
    let current = cluster.leader.as_ref().map(|leader| leader.name.as_str());
    if request.leader.is_some() && request.leader.as_deref() != current {
        return Err("leader name does not match".to_owned());
    }
    let priority_sync =
        cluster.config.as_ref().is_some_and(|config| config.sync_mode() == SyncMode::On);
    let is_sync = |name: &str| cluster.sync.as_ref().is_some_and(|sync| sync.matches(name));
    let word = request.kind.word();
    if let Some(candidate) = &request.candidate {
        if request.kind == Kind::Switchover && priority_sync && !is_sync(candidate) {
            return Err("candidate name does not match with sync_standby".to_owned());
        }
        if !cluster.members.contains_key(candidate) {
            return Err("candidate does not exists".to_owned());
        }
        return Ok(vec![candidate.clone()]);
    }
    let others = cluster.members.keys().filter(|name| Some(name.as_str()) != current);
    let names: Vec<String> =
        others.filter(|name| !priority_sync || is_sync(name)).cloned().collect();
    match (names.is_empty(), priority_sync) {
        (false, _) => Ok(names),
        (true, true) => Err(format!("{word} is not possible: can not find sync_standby")),
        (true, false) => {
            Err(format!("{word} is not possible: cluster does not have members except leader"))
        }
    }
}

/// Whether any of those who were asked answered and may lead.
pub(super) fn somebody_fits(answers: &BTreeMap<String, Option<Peer>>) -> bool {
    answers.values().flatten().any(|peer| !peer.tags.nofailover())
}

/// Carries a request out, here or at the leader. The answer comes when it has come to an end.
pub(super) async fn run(
    api: &Api,
    view: &NodeView,
    kind: Kind,
    body: Map<String, Value>,
    forwarded: bool,
) -> Response {
    let cluster = &view.cluster;
    let paused = cluster.config.as_ref().is_some_and(|config| config.pause);
    let request = match read(kind, &body, paused, Timestamp::now()) {
        Ok(request) => request,
        Err((status, why)) => return text(status, why),
    };
    let kind = request.kind;
    let Request { leader, candidate, at, .. } = &request;
    tracing::info!(action = kind.word(), leader, candidate, scheduled = ?at, "switchover or failover requested by REST");
    let leads = cluster.leader.as_ref().is_some_and(|leader| leader.name == view.name);
    if leads && !view.dcs_reachable {
        // Who is synchronous is not known for sure, and nobody could take the leader key.
        let why = format!("{} is not possible: the store does not answer", kind.word());
        return text(StatusCode::PRECONDITION_FAILED, why);
    }
    if let Some(at) = at {
        let request = FailoverRequest {
            leader: leader.clone(),
            member: candidate.clone(),
            scheduled_at: Some(print_time(at)),
        };
        return schedule(api, request).await;
    }
    let candidates = match eligible(&request, cluster) {
        Ok(candidates) => candidates,
        Err(why) => return text(StatusCode::PRECONDITION_FAILED, why),
    };
    if let Some(leader) = cluster.leader.as_ref()
        && leader.name != view.name
    {
        if forwarded {
            let why = format!("{} failed: the leader has just changed", kind.title());
            return text(StatusCode::SERVICE_UNAVAILABLE, why);
        }
        if let Some(response) = forward(api, view, &leader.name, kind, &Value::Object(body)).await {
            return response;
        }
    }
    if !somebody_can(api, view, &candidates).await {
        let why = format!("{} is not possible: no good candidates have been found", kind.word());
        return text(StatusCode::PRECONDITION_FAILED, why);
    }
    let former = cluster.leader.as_ref().map(|leader| leader.name.clone());
    here(api, request, former.as_deref()).await
}

/// Lets the driver carry the request out; `former` is the leader so far.
async fn here(api: &Api, request: Request, former: Option<&str>) -> Response {
    let kind = request.kind;
    let result = match (kind, request.candidate) {
        (Kind::Failover, Some(candidate)) => {
            api.ask(ANSWER_LIMIT, |answer| Command::Failover { candidate, answer }).await
        }
        (_, candidate) => {
            api.ask(ANSWER_LIMIT, |answer| Command::Switchover { candidate, answer }).await
        }
    };
    match result {
        Ok(result) => {
            if result.is_ok() {
                another_leader_shows(api, former).await;
            }
            report(kind, result)
        }
        Err(unanswered) if unanswered.may_happen() => {
            text(StatusCode::SERVICE_UNAVAILABLE, format!("{} status unknown", kind.title()))
        }
        Err(unanswered) => unanswered.response(),
    }
}

/// Waits until this API shows the new leader: whoever reads of the success may look at once.
async fn another_leader_shows(api: &Api, former: Option<&str>) {
    let mut views = api.views.clone();
    let shows = views.wait_for(|view| {
        view.cluster.leader.as_ref().is_some_and(|leader| Some(leader.name.as_str()) != former)
    });
    // The success is one whether it shows by then or not.
    drop(api.machine.timeout(SHOW_LIMIT, shows).await);
}

/// `DELETE /switchover`.
pub(super) async fn unschedule(api: &Api, view: &NodeView) -> Response {
    if view.cluster.failover.scheduled_at.is_none() {
        return text(StatusCode::NOT_FOUND, "no switchover is scheduled");
    }
    match api.ask(ANSWER_LIMIT, |answer| Command::Schedule { request: None, answer }).await {
        Ok(Ok(_)) => text(StatusCode::OK, "scheduled switchover deleted"),
        Ok(Err(error)) => text(StatusCode::CONFLICT, error.to_string()),
        Err(unanswered) => unanswered.response(),
    }
}

async fn schedule(api: &Api, request: FailoverRequest) -> Response {
    let request = Some(request);
    match api.ask(ANSWER_LIMIT, |answer| Command::Schedule { request, answer }).await {
        Ok(Ok(_)) => text(StatusCode::ACCEPTED, "Switchover scheduled"),
        Ok(Err(error)) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "switchover could not be scheduled"
            );
            text(StatusCode::SERVICE_UNAVAILABLE, "failed to write failover key into DCS")
        }
        Err(unanswered) => unanswered.response(),
    }
}

/// Asks the candidates whether they are there. This node need not ask itself.
async fn somebody_can(api: &Api, view: &NodeView, candidates: &[String]) -> bool {
    if candidates.contains(&view.name) && !view.tags.nofailover() {
        return true;
    }
    let others = candidates.iter().filter(|name| **name != view.name);
    let members = others
        .filter_map(|name| Some((name.clone(), view.cluster.members.get(name)?.clone())))
        .collect();
    let cluster =
        Identity { scope: &view.scope.name, system_identifier: view.system_identifier.as_deref() };
    somebody_fits(&api.peers().ask_all(&members, cluster, PEER_LIMIT).await)
}

/// `None`: the leader cannot be reached, and for a failover that is no obstacle.
async fn forward(
    api: &Api,
    view: &NodeView,
    leader: &str,
    kind: Kind,
    body: &Value,
) -> Option<Response> {
    let member = view.cluster.members.get(leader);
    let base = member.map(kornak_cluster::Member::api_base).unwrap_or_default();
    let answer = api.peers().forward(&format!("{base}/{}", kind.word()), body, ANSWER_LIMIT).await;
    match answer {
        Ok(answer) => {
            let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::BAD_GATEWAY);
            Some(text(status, answer.text()))
        }
        Err(error @ (PeerError::Connect(_) | PeerError::Address(_))) => {
            tracing::warn!(
                node = leader,
                error = &error as &dyn std::error::Error,
                "leader could not be asked"
            );
            let why = format!("{} failed: the leader's REST API cannot be reached", kind.title());
            (kind == Kind::Switchover).then(|| text(StatusCode::SERVICE_UNAVAILABLE, why))
        }
        Err(error) => {
            tracing::warn!(
                node = leader,
                error = &error as &dyn std::error::Error,
                "leader did not answer whether the request was carried out"
            );
            let why = format!("{} status unknown", kind.title());
            Some(text(StatusCode::SERVICE_UNAVAILABLE, why))
        }
    }
}

fn report(kind: Kind, result: CommandResult) -> Response {
    match result {
        // To a healthy leader it is the same work, but what was asked for is what is reported.
        Ok(done) if kind == Kind::Failover => {
            text(StatusCode::OK, done.replace("switched over", "failed over"))
        }
        Ok(done) => text(StatusCode::OK, done),
        Err(CommandError::NotPossible(why)) => text(StatusCode::PRECONDITION_FAILED, why),
        Err(CommandError::Failed(why)) if why.is_empty() => {
            text(StatusCode::SERVICE_UNAVAILABLE, format!("{} failed", kind.title()))
        }
        Err(CommandError::Failed(why)) => {
            text(StatusCode::SERVICE_UNAVAILABLE, format!("{} failed: {why}", kind.title()))
        }
    }
}
