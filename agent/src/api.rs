//! The agent's REST API: Patroni's, plus `/kornak/…`.
//!
//! Health checks and everything else that is read are answered from the newest [`NodeView`] in memory: no SQL, no
//! store, so a slow server cannot hang a health check, and a check costs microseconds. The exception is
//! `GET /patroni`, by which members compare how much they have when nobody leads: it waits for a look at the server
//! that began after the question (`api::look`). Everything that changes something becomes a [`Command`] for the driver; the API waits for its answer as long as it takes.
//!
//! Patroni's rules are no table of routes: the first path element and the method choose an endpoint, and any
//! other path is a health check that is recognised by substring (`api::endpoint`).
//!
//! Credentials and headers may change while the API runs ([`Api::reload`]).
//!
//! Not here: any decision, any knowledge of how a command is carried out.

mod access;
mod body;
mod citus;
mod endpoint;
pub(crate) mod health;
mod look;
mod manual;
mod metrics;
mod print;
mod room;
mod serve;
pub(crate) mod status;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Query, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, SERVER, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use kornak_cluster::{Epoch, GroupId, Lsn, Member};
use kornak_config::agent::{AgentSettings, BasicAuth, ServerTokens, VerifyClient};
use serde_json::{Map, Value};
use tokio::sync::oneshot;

use self::access::{Access, Denied};
use self::body::{object, optional_object};
use self::endpoint::{Change, Endpoint, Page};
use self::manual::Kind;
pub use self::serve::serve;
use crate::counters::Counters;
use crate::machine::Machine;
use crate::node::{
    Command, CommandError, Commands, ConfigureError, FailsafeAnswer, NodeView, NodeViews,
};
use crate::peers::{Answer, FORWARDED, Peers};
use crate::schedule::{RestartPlan, RestartRequest};
use crate::tls::RestTls;
use crate::units;

/// The longest a request waits for the driver's answer. A switchover may drain for a minute and
/// more; this limit is only for an agent that is broken.
const ANSWER_LIMIT: Duration = Duration::from_secs(600);

/// The longest a request waits for room in the driver's queue, and for an answer that needs no work.
const QUICK_LIMIT: Duration = Duration::from_secs(5);
/// Bound on the slots that a leader's failsafe request may name; no server has as many.
const MOST_SLOTS: usize = 1000;

/// The longest a candidate may take to say that it is there. Patroni's constant.
const PEER_LIMIT: Duration = Duration::from_secs(2);

/// The settings of the API; everything else comes from the [`NodeView`].
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// `Some`: https.
    pub tls: Option<Arc<RestTls>>,
    /// Requests that change something must come with a client certificate.
    pub require_certificate: bool,
    /// The value of the header `Server`.
    pub server: HeaderValue,
    /// Asked of requests that change something; `None`: nobody is asked.
    pub authentication: Option<BasicAuth>,
    /// Addresses, networks and host names that may change something; empty: all.
    pub allowlist: Vec<String>,
    /// Hosts of members' REST URLs may, too.
    pub allowlist_include_members: bool,
    /// Put on every answer.
    pub extra_headers: Vec<(HeaderName, HeaderValue)>,
    /// For questions to candidates, and for requests that the leader has to carry out.
    pub peers: Peers,
    pub restart_plan: RestartPlan,
    /// Of a node of a Citus cluster.
    pub citus: Option<Arc<crate::citus::Desk>>,
    pub counters: Arc<Counters>,
    /// The clock is the one of [`NodeView::cycle_at`].
    pub machine: Machine,
}

impl ApiSettings {
    /// As the agent's file says. A header that HTTP does not allow is left out.
    pub fn new(
        settings: &AgentSettings,
        peers: Peers,
        tls: Option<Arc<RestTls>>,
        machine: Machine,
    ) -> Self {
        let rest = &settings.restapi;
        let header = |(name, value): (&String, &String)| {
            let parsed = (name.parse().ok(), value.parse().ok());
            if let (Some(name), Some(value)) = parsed {
                return Some((name, value));
            }
            tracing::warn!(name, "extra header of the REST API is not a valid header");
            None
        };
        let https = rest.tls.iter().flat_map(|_| &rest.https_extra_headers);
        let headers = rest.http_extra_headers.iter().chain(https);
        let server = match rest.server_tokens {
            ServerTokens::Original => concat!("Kornak/", env!("CARGO_PKG_VERSION")).to_owned(),
            ServerTokens::ProductOnly => "Patroni".to_owned(),
            ServerTokens::Minimal => {
                format!("Patroni/{}", kornak_cluster::member::COMPATIBLE_PATRONI_VERSION)
            }
        };
        let verify = rest.tls.as_ref().map(|tls| tls.verify_client);
        Self {
            tls,
            require_certificate: !matches!(verify, None | Some(VerifyClient::None)),
            server: server.parse().unwrap_or(HeaderValue::from_static("Kornak")),
            authentication: rest.authentication.clone(),
            allowlist: rest.allowlist.clone(),
            allowlist_include_members: rest.allowlist_include_members,
            extra_headers: headers.filter_map(header).collect(),
            peers,
            restart_plan: RestartPlan::default(),
            citus: None,
            counters: Arc::default(),
            machine,
        }
    }
}

/// The state that all requests share.
#[derive(Debug)]
pub struct Api {
    views: NodeViews,
    commands: Commands,
    rules: ArcSwap<Rules>,
    tls: Option<Arc<RestTls>>,
    restart_plan: RestartPlan,
    citus: Option<Arc<crate::citus::Desk>>,
    counters: Arc<Counters>,
    machine: Machine,
    looks: look::Looks,
}

/// The part of the settings that a reload may change.
#[derive(Debug)]
struct Rules {
    access: Access,
    headers: Vec<(HeaderName, HeaderValue)>,
    peers: Peers,
}

impl Rules {
    fn new(settings: &ApiSettings) -> Self {
        let mut headers = settings.extra_headers.clone();
        if headers.iter().all(|(name, _)| name != SERVER) {
            headers.push((SERVER, settings.server.clone()));
        }
        Self { access: Access::new(settings), headers, peers: settings.peers.clone() }
    }
}

/// Where a request comes from; an extension of the request.
#[derive(Debug, Clone, Copy)]
struct Client {
    address: IpAddr,
    /// Whether it has shown a certificate that was found good.
    certified: bool,
}

impl Api {
    /// Over what the agent shows, and what it takes orders through.
    pub fn new(views: NodeViews, commands: Commands, settings: ApiSettings) -> Self {
        let rules = ArcSwap::from_pointee(Rules::new(&settings));
        let ApiSettings { tls, restart_plan, citus, counters, machine, .. } = settings;
        let looks = look::Looks::default();
        Self { views, commands, rules, tls, restart_plan, citus, counters, machine, looks }
    }

    /// Puts other rules in force for the requests that come from now on: passwords, lists, headers
    /// and the client's certificates.
    pub fn reload(&self, settings: &ApiSettings) {
        self.rules.store(Arc::new(Rules::new(settings)));
    }

    /// Answers a request that came by no connection: whoever brings it vouches for its sender's address.
    pub async fn answer(self: &Arc<Self>, request: Request<Bytes>) -> Answer {
        let (mut head, body) = request.into_parts();
        head.headers.insert(CONTENT_LENGTH, body.len().into());
        let request = Request::from_parts(head, Body::from(body));
        let (head, body) = dispatch(State(Arc::clone(self)), request).await.into_parts();
        // It is in memory already.
        let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
        Answer { status: head.status.as_u16(), headers: head.headers, body }
    }

    fn peers(&self) -> Peers {
        self.rules.load().peers.clone()
    }
}

fn router(api: Arc<Api>) -> Router {
    Router::new().fallback(dispatch).with_state(api)
}

async fn dispatch(State(api): State<Arc<Api>>, request: Request<Body>) -> Response {
    let view = Arc::clone(&api.views.borrow());
    let (head, body) = request.into_parts();
    let mut response = match Endpoint::of(&head.method, head.uri.path()) {
        Endpoint::Patroni => json(StatusCode::OK, api.status(&*api.look(view).await)),
        Endpoint::Page(page) => api.show(page, &view, &head),
        Endpoint::Check => api.health(&view, &head).0.into_response(),
        Endpoint::Change(change) => {
            api.change(change, &view, &head, body).await.unwrap_or_else(|refusal| refusal)
        }
        Endpoint::Unsupported => text(StatusCode::NOT_IMPLEMENTED, "unsupported method or path"),
    };
    for (name, value) in &api.rules.load().headers {
        response.headers_mut().insert(name.clone(), value.clone());
    }
    api.counters.answered(response.status().as_u16());
    tracing::debug!(
        method = %head.method,
        path = head.uri.path(),
        status = response.status().as_u16(),
        "request answered"
    );
    response
}

impl Api {
    fn show(&self, page: Page, view: &NodeView, head: &Parts) -> Response {
        let cluster = &view.cluster;
        match page {
            Page::Cluster => json(StatusCode::OK, status::cluster(&view.scope.name, cluster)),
            Page::History => json(StatusCode::OK, status::history(&cluster.history)),
            Page::Config => match &cluster.config {
                Some(config) => json(StatusCode::OK, config.raw.clone()),
                None => text(StatusCode::BAD_GATEWAY, "there is no configuration in the store"),
            },
            Page::Failsafe => match (&cluster.failsafe, &cluster.config) {
                (Some(members), Some(config)) if config.failsafe_mode => {
                    json(StatusCode::OK, serde_json::json!(members))
                }
                _ => text(StatusCode::BAD_GATEWAY, "failsafe mode is off"),
            },
            Page::Metrics => {
                let mut page = metrics::render(view, &self.counters, self.machine.now());
                page.extend(self.citus.as_deref().map(|desk| metrics::citus(view, desk)));
                let kind = HeaderValue::from_static("text/plain; version=0.0.4");
                ([(CONTENT_TYPE, kind)], page).into_response()
            }
            Page::Liveness => status_only(health::is_live(view, self.machine.now())),
            Page::Readiness => {
                status_only(health::is_ready(view, &query(head), self.machine.now()))
            }
            Page::Operator => json(StatusCode::OK, status::operator(view, self.machine.now())),
            Page::Health => {
                let (status, body) = self.health(view, head);
                json(status, body)
            }
        }
    }

    fn health(&self, view: &NodeView, head: &Parts) -> (StatusCode, Map<String, Value>) {
        let status = if health::is_healthy(view, head.uri.path(), &query(head), self.machine.now())
        {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        (status, self.status(view))
    }

    fn status(&self, view: &NodeView) -> Map<String, Value> {
        status::node(view, self.restart_plan.shown())
    }

    /// Everything that needs permission. An error is an answer, too.
    async fn change(
        &self,
        change: Change,
        view: &NodeView,
        head: &Parts,
        body: Body,
    ) -> Result<Response, Response> {
        let client = head.extensions.get::<Client>().copied();
        let members = (change != Change::Failsafe).then(|| self.member_hosts(view));
        let rules = self.rules.load_full();
        let allowed = rules.access.check(client, &head.headers, members).await;
        allowed.map_err(|denied| refuse(denied, client.map(|client| client.address)))?;
        let forwarded = head.headers.contains_key(FORWARDED);
        let machine = &self.machine;
        let response = match change {
            Change::PatchConfig => self.configure(object(machine, head, body).await?, false).await,
            Change::ReplaceConfig => self.configure(object(machine, head, body).await?, true).await,
            Change::Switchover => {
                let body = object(machine, head, body).await?;
                manual::run(self, view, Kind::Switchover, body, forwarded).await
            }
            Change::UnscheduleSwitchover => manual::unschedule(self, view).await,
            Change::Failover => {
                let body = object(machine, head, body).await?;
                manual::run(self, view, Kind::Failover, body, forwarded).await
            }
            Change::Restart => {
                self.restart(view, &optional_object(machine, head, body).await?).await
            }
            Change::UnscheduleRestart => self.unschedule_restart(),
            Change::Reload => {
                let reload = |answer| Command::Reload { answer };
                self.carry_out(reload, StatusCode::ACCEPTED, Some("reload scheduled")).await
            }
            Change::Reinitialize => {
                self.reinitialize(view, &optional_object(machine, head, body).await?).await
            }
            Change::Failsafe => self.failsafe(&object(machine, head, body).await?).await,
            Change::Sigterm => text(StatusCode::ACCEPTED, "shutdown scheduled"),
            Change::Citus => {
                let body = object(machine, head, body).await?;
                citus::told(self.citus.as_deref(), &body, machine.now()).await
            }
            Change::Checkpoint => {
                let checkpoint = |answer| Command::Checkpoint { answer };
                self.carry_out(checkpoint, StatusCode::OK, None).await
            }
        };
        Ok(response)
    }

    /// Where members speak from: on the coordinator of a Citus cluster those of all groups, for they
    /// tell it of their switchovers.
    fn member_hosts(&self, view: &NodeView) -> BTreeSet<String> {
        let own = view.cluster.members.values().filter_map(Member::api_address);
        let mut hosts: BTreeSet<String> = own.map(|(host, _)| host).collect();
        if let Some(desk) = &self.citus
            && view.scope.group == Some(GroupId::COORDINATOR)
        {
            hosts.extend(desk.hosts.borrow().iter().cloned());
        }
        hosts
    }

    async fn configure(&self, change: Map<String, Value>, replace: bool) -> Response {
        let command = |answer| Command::Configure { change, replace, answer };
        match self.ask(ANSWER_LIMIT, command).await {
            Ok(Ok(config)) => json(StatusCode::OK, config),
            Ok(Err(error)) => {
                let status = match error {
                    ConfigureError::Invalid(_) => StatusCode::BAD_REQUEST,
                    ConfigureError::Conflict => StatusCode::CONFLICT,
                    ConfigureError::Store(_) if replace => StatusCode::BAD_GATEWAY,
                    ConfigureError::Missing | ConfigureError::Store(_) => {
                        StatusCode::SERVICE_UNAVAILABLE
                    }
                };
                text(status, error.to_string())
            }
            Err(unanswered) => unanswered.response(),
        }
    }

    async fn restart(&self, view: &NodeView, body: &Map<String, Value>) -> Response {
        let paused = view.cluster.config.as_ref().is_some_and(|config| config.pause);
        if paused && body.contains_key("schedule") {
            let why = "Can't schedule restart in the paused state";
            return text(StatusCode::INTERNAL_SERVER_ERROR, why);
        }
        let request = match RestartRequest::read(body, jiff::Timestamp::now()) {
            Ok(request) => request,
            Err((status, why)) => return text(status, why),
        };
        if let Some(at) = request.at.clone() {
            return if self.restart_plan.add(at, request, view) {
                text(StatusCode::ACCEPTED, "Restart scheduled")
            } else {
                text(StatusCode::CONFLICT, "Another restart is already scheduled")
            };
        }
        if !request.applies_to(view) {
            let why = "restart conditions are not satisfied";
            return text(StatusCode::SERVICE_UNAVAILABLE, why);
        }
        let timeout = request.timeout;
        let restart = |answer| Command::Restart { timeout, answer };
        self.carry_out(restart, StatusCode::OK, None).await
    }

    fn unschedule_restart(&self) -> Response {
        if self.restart_plan.remove() {
            text(StatusCode::OK, "scheduled restart deleted")
        } else {
            text(StatusCode::NOT_FOUND, "no restarts are scheduled")
        }
    }

    async fn reinitialize(&self, view: &NodeView, body: &Map<String, Value>) -> Response {
        let unavailable = |why| text(StatusCode::SERVICE_UNAVAILABLE, why);
        match &view.cluster.leader {
            _ if view.holds_lock => unavailable("I am the leader, can not reinitialize"),
            None => unavailable("Cluster has no leader, can not reinitialize"),
            Some(_) => {
                let flag = |name| body.get(name).is_some_and(units::is_true);
                let (force, from_leader) = (flag("force"), flag("from_leader"));
                let command = |answer| Command::Reinitialize { force, from_leader, answer };
                self.carry_out(command, StatusCode::OK, None).await
            }
        }
    }

    async fn failsafe(&self, body: &Map<String, Value>) -> Response {
        let Some(leader) = body.get("name").and_then(Value::as_str) else {
            return text(StatusCode::BAD_REQUEST, "the leader's name is missing");
        };
        let leader = leader.to_owned();
        let view = self.views.borrow().clone();
        let ours = |key: &str| body.get("kornak").and_then(|ours| ours.get(key));
        let differs = |key, mine: &str| {
            ours(key).and_then(Value::as_str).is_some_and(|expected| expected != mine)
        };
        if differs("member", &view.name) || differs("scope", &view.scope.name) {
            return text(StatusCode::MISDIRECTED_REQUEST, "another member is asked");
        }
        let asked = ours("promise_ms").and_then(Value::as_u64).map(Duration::from_millis);
        let epoch =
            ours("epoch").and_then(|epoch| serde_json::from_value::<Epoch>(epoch.clone()).ok());
        let said = body.get("slots").and_then(Value::as_object).into_iter().flatten();
        let at = |(name, at): (&String, &Value)| Some((name.clone(), Lsn(at.as_u64()?)));
        let slots = said.take(MOST_SLOTS).filter_map(at).collect();
        let command = |answer| Command::Failsafe { leader, asked, epoch, slots, answer };
        match self.ask(QUICK_LIMIT, command).await {
            Ok(FailsafeAnswer::Accepted { lsn, promised }) => {
                let promised = u64::try_from(promised.as_millis()).unwrap_or(u64::MAX);
                let headers =
                    [(HeaderName::from_static("lsn"), lsn.0), (crate::peers::PROMISED, promised)];
                (headers.map(|(name, number)| (name, number.to_string())), "Accepted")
                    .into_response()
            }
            Ok(FailsafeAnswer::NotTheLeader) => {
                text(StatusCode::FORBIDDEN, "the store has named another leader")
            }
            Ok(FailsafeAnswer::Leading) => {
                text(StatusCode::INTERNAL_SERVER_ERROR, "Running as a leader")
            }
            Ok(FailsafeAnswer::Off) => text(StatusCode::BAD_GATEWAY, "failsafe mode is off"),
            Err(unanswered) => unanswered.response(),
        }
    }

    /// `said` replaces the driver's own words on success.
    async fn carry_out(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<String, CommandError>>) -> Command,
        success: StatusCode,
        said: Option<&str>,
    ) -> Response {
        match self.ask(ANSWER_LIMIT, command).await {
            Ok(Ok(done)) => text(success, said.map_or(done, str::to_owned)),
            Ok(Err(error)) => text(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
            Err(unanswered) => unanswered.response(),
        }
    }

    /// Hands a command to the driver and waits for its answer.
    async fn ask<T>(
        &self,
        limit: Duration,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Unanswered> {
        let (answer, answered) = oneshot::channel();
        let room = self.machine.timeout(QUICK_LIMIT, self.commands.reserve()).await;
        let room = room.map_err(|_| Unanswered::Busy)?.map_err(|_| Unanswered::Stopping)?;
        room.send(command(answer));
        match self.machine.timeout(limit, answered).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(Unanswered::Dropped),
            Err(_) => Err(Unanswered::Late),
        }
    }
}

/// Why a command came to nothing that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Unanswered {
    /// Was not handed over.
    #[error("the agent is busy with other requests")]
    Busy,
    /// Was not handed over.
    #[error("the agent is stopping")]
    Stopping,
    #[error("the agent gave the request up")]
    Dropped,
    #[error("the agent did not answer in time")]
    Late,
}

impl Unanswered {
    /// Whether the command may yet be carried out.
    fn may_happen(self) -> bool {
        matches!(self, Self::Dropped | Self::Late)
    }

    fn response(self) -> Response {
        text(StatusCode::SERVICE_UNAVAILABLE, self.to_string())
    }
}

fn refuse(denied: Denied, from: Option<IpAddr>) -> Response {
    tracing::warn!(?from, why = ?denied, "request refused");
    let realm = [(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"Patroni\""))];
    match denied {
        Denied::Address => text(StatusCode::FORBIDDEN, "Access is denied"),
        Denied::NoCertificate => text(StatusCode::FORBIDDEN, "client certificate required"),
        Denied::NoPassword => {
            (realm, text(StatusCode::UNAUTHORIZED, "no auth header received")).into_response()
        }
        Denied::WrongPassword => {
            (realm, text(StatusCode::UNAUTHORIZED, "not authenticated")).into_response()
        }
    }
}

fn query(head: &Parts) -> health::Query {
    Query::try_from_uri(&head.uri).map(|Query(pairs)| pairs).unwrap_or_default()
}

fn status_only(good: bool) -> Response {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }.into_response()
}

/// Patroni's type of a text, unless a browser could take a caller's words in it for a page.
fn text(status: StatusCode, body: impl Into<String>) -> Response {
    let body = body.into();
    let kind = if body.contains('<') { "text/plain; charset=utf-8" } else { "text/html" };
    (status, [(CONTENT_TYPE, HeaderValue::from_static(kind))], body).into_response()
}

fn json(status: StatusCode, body: impl Into<Value>) -> Response {
    let kind = HeaderValue::from_static("application/json");
    (status, [(CONTENT_TYPE, kind)], print::spaced(&body.into())).into_response()
}
