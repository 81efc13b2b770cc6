//! The REST client with which an agent talks to the other members: where do you stand (the race), may
//! I stay (failsafe mode), start a checkpoint (handover), do this for me (a forwarded request).
//!
//! One connection per question and no retries: an answer is worth something only now, and a
//! connection kept from before a member's death would say nothing about its life. Every call has
//! its own time limit, for a host that swallows packets is the normal case here.
//!
//! A member may be Patroni's, so answers are read tolerantly. Not here: what follows from an
//! answer ([`crate::ha`]); certificates ([`crate::tls`]).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kornak_cluster::{Lsn, Member, MemberRole, MemberState, Tags, Timeline, XLog};
use kornak_config::agent::{BasicAuth, CtlSettings};
use secrecy::ExposeSecret;
use serde_json::Value;

use crate::ha::Peer;
use crate::machine::Boxed;
use crate::tls::TlsError;

/// Longest answer that is read. A status is about one kilobyte; ten thousand replication rows fit.
const ANSWER_LIMIT: usize = 1 << 20;

/// Marks a request that another agent passed on, so that it is never passed on twice.
pub const FORWARDED: HeaderName = HeaderName::from_static("x-kornak-forwarded");

/// For how long a member promises to stay away, in milliseconds: header of its answer to `POST /failsafe`.
pub const PROMISED: HeaderName = HeaderName::from_static("x-kornak-promised-ms");

/// Why a member gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("not an address that can be asked: {0:?}")]
    Address(String),
    /// Nothing was sent.
    #[error("cannot connect")]
    Connect(#[source] hyper_util::client::legacy::Error),
    /// The connection broke; it is not known whether the request arrived.
    #[error("the connection broke")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No answer came in time; it is not known whether the request arrived.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    #[error("answered with status {0}")]
    Status(u16),
    #[error("the answer makes no sense")]
    Nonsense(#[source] serde_json::Error),
}

/// A member's account of itself: the part of `GET /patroni` that decisions rest on.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerStatus {
    /// `patroni.name`; who answers at an address need not be who was expected there.
    pub name: Option<String>,
    /// `patroni.scope`.
    pub scope: Option<String>,
    pub state: MemberState,
    pub role: MemberRole,
    pub xlog: XLog,
    pub timeline: Timeline,
    pub tags: Tags,
    pub system_identifier: Option<String>,
    pub server_version: Option<u32>,
    /// Seconds since 1970.
    pub dcs_last_seen: u64,
    /// The member's watchdog cannot stop it, so the member does not run for leader.
    pub watchdog_failed: bool,
    /// The member's last attempt to lead has failed a moment ago. Kornak's own key.
    pub stands_back: bool,
    /// A standby that replicates from nobody. Kornak's own key.
    pub detached: bool,
}

impl PeerStatus {
    /// Reads the JSON; what is missing or of another type counts as absent.
    pub fn from_json(json: &Value) -> Self {
        let word = |key| json.get(key).cloned().unwrap_or(Value::Null);
        let xlog = json.get("xlog");
        let flag = |key| json.get(key).and_then(Value::as_bool).unwrap_or(false);
        let lsn = |key| Some(Lsn(xlog?.get(key)?.as_u64()?));
        Self {
            name: json.pointer("/patroni/name").and_then(Value::as_str).map(str::to_owned),
            scope: json.pointer("/patroni/scope").and_then(Value::as_str).map(str::to_owned),
            state: serde_json::from_value(word("state")).unwrap_or(MemberState::Unknown),
            role: serde_json::from_value(word("role")).unwrap_or(MemberRole::Uninitialized),
            xlog: XLog {
                location: lsn("location"),
                received_location: lsn("received_location"),
                replayed_location: lsn("replayed_location"),
                replayed_timestamp: xlog
                    .and_then(|xlog| xlog.get("replayed_timestamp")?.as_str())
                    .map(str::to_owned),
                paused: xlog.and_then(|xlog| xlog.get("paused")?.as_bool()),
            },
            timeline: Timeline(u32_at(json, "timeline").unwrap_or_default()),
            tags: serde_json::from_value(word("tags")).unwrap_or_default(),
            system_identifier: json
                .get("database_system_identifier")
                .and_then(Value::as_str)
                .map(str::to_owned),
            server_version: u32_at(json, "server_version"),
            dcs_last_seen: json.get("dcs_last_seen").and_then(Value::as_u64).unwrap_or_default(),
            watchdog_failed: flag("watchdog_failed"),
            stands_back: flag("stands_back"),
            detached: flag("detached"),
        }
    }

    /// Whether the member runs as a primary, as far as it knows: it shows a write position, or says so. A Patroni
    /// that could not ask its server says `unknown` and keeps the role.
    pub fn is_primary(&self) -> bool {
        let alive = matches!(self.state, MemberState::Running | MemberState::Unknown);
        self.xlog.location.is_some() || (self.role == MemberRole::Primary && alive)
    }

    /// The furthest WAL of a server that runs; `None` if it does not run or did not say.
    pub fn position(&self) -> Option<Lsn> {
        let XLog { location, received_location, replayed_location, .. } = self.xlog;
        let furthest = location.max(received_location).max(replayed_location);
        furthest.filter(|lsn| self.state == MemberState::Running && *lsn > Lsn(0))
    }

    /// The part of the answer that counts if this member was asked. `None`: another one has
    /// answered.
    pub fn of(self, asked: &Asked<'_>) -> Option<Peer> {
        let expected = [
            (Some(asked.name), &self.name),
            (Some(asked.cluster.scope), &self.scope),
            (asked.cluster.system_identifier, &self.system_identifier),
        ];
        let differs = |(expected, said): &(Option<&str>, &Option<String>)| matches!((expected, said), (Some(expected), Some(said)) if expected != said);
        if expected.iter().any(differs) {
            return None;
        }
        let identified = expected
            .iter()
            .all(|(expected, said)| expected.is_some() && said.as_deref() == *expected);
        Some(Peer {
            primary: self.is_primary(),
            position: self.position(),
            timeline: self.timeline,
            identified,
            detached: self.detached,
            stands_back: self.watchdog_failed || self.stands_back,
            tags: self.tags,
        })
    }
}

/// Whose members are asked.
#[derive(Debug, Clone, Copy)]
pub struct Identity<'a> {
    pub scope: &'a str,
    /// `None`: this node has no data directory to read it from.
    pub system_identifier: Option<&'a str>,
}

/// The member that is asked.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub name: &'a str,
    pub cluster: Identity<'a>,
}

fn u32_at(json: &Value, key: &str) -> Option<u32> {
    u32::try_from(json.get(key)?.as_u64()?).ok()
}

/// A member's reply to a leader that asks to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailsafeReply {
    /// `lsn` is 0 if it did not say. `promised`: for how long it stays away, if it said (Patroni does not).
    Accepted { lsn: Lsn, promised: Option<Duration> },
    /// The status: 500 runs as a leader, 502 failsafe mode is off, 401 and 403 not allowed.
    Refused(u16),
}

/// A member's answer, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// The body as text; bytes that are not UTF-8 are replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Carries a request to a member, and the answer back.
pub trait Carrier: Send + Sync + fmt::Debug {
    /// Gives up after `timeout`.
    fn carry(&self, request: Request<Bytes>, timeout: Duration)
    -> Boxed<Result<Answer, PeerError>>;
}

/// The carrier of the product.
#[derive(Debug)]
struct Http(Client<HttpsConnector<HttpConnector>, Full<Bytes>>);

/// The client. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Peers {
    carrier: Arc<dyn Carrier>,
    authorization: Option<HeaderValue>,
}

impl Peers {
    /// `settings.authentication` is shown with every request that is not a GET.
    ///
    /// # Errors
    /// A certificate or key of `settings` cannot be used.
    pub fn new(settings: &CtlSettings) -> Result<Self, TlsError> {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        http.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(crate::tls::client_config(settings)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            .retry_canceled_requests(false)
            .build(connector);
        let authorization = settings.authentication.as_ref().and_then(basic_authorization);
        Ok(Self { carrier: Arc::new(Http(client)), authorization })
    }

    /// Over another carrier than HTTP.
    pub fn over(carrier: impl Carrier + 'static) -> Self {
        Self { carrier: Arc::new(carrier), authorization: None }
    }

    /// Asks a member where it stands. `api_url` as published, ending in `/patroni`.
    pub async fn get_status(
        &self,
        api_url: &str,
        timeout: Duration,
    ) -> Result<PeerStatus, PeerError> {
        let answer = self.send(Method::GET, api_url, None, timeout).await?;
        if answer.status != StatusCode::OK.as_u16() {
            return Err(PeerError::Status(answer.status));
        }
        let json = serde_json::from_slice(&answer.body).map_err(PeerError::Nonsense)?;
        Ok(PeerStatus::from_json(&json))
    }

    /// Asks a member's consent to stay leader without the store. `body` is
    /// `{"name", "conn_url", "api_url", "slots"}`.
    pub async fn post_failsafe(
        &self,
        api_base: &str,
        body: &Value,
        timeout: Duration,
    ) -> Result<FailsafeReply, PeerError> {
        let answer = self.post_json(&format!("{api_base}/failsafe"), body, timeout).await?;
        if answer.status != StatusCode::OK.as_u16() {
            return Ok(FailsafeReply::Refused(answer.status));
        }
        let number = |name: &str| answer.headers.get(name)?.to_str().ok()?.parse().ok();
        let promised = number(PROMISED.as_str()).map(Duration::from_millis);
        Ok(FailsafeReply::Accepted { lsn: Lsn(number("lsn").unwrap_or_default()), promised })
    }

    /// Asks a member for a checkpoint and waits until it is done.
    pub async fn post_checkpoint(
        &self,
        api_base: &str,
        timeout: Duration,
    ) -> Result<(), PeerError> {
        let url = format!("{api_base}/kornak/checkpoint");
        let answer = self.post_json(&url, &Value::Object(serde_json::Map::new()), timeout).await?;
        match answer.status {
            200 => Ok(()),
            status => Err(PeerError::Status(status)),
        }
    }

    /// Sends `json` and returns the answer, whatever its status.
    pub async fn post_json(
        &self,
        url: &str,
        json: &Value,
        timeout: Duration,
    ) -> Result<Answer, PeerError> {
        self.send(Method::POST, url, Some(json), timeout).await
    }

    /// Passes an operator's POST on to the member that can do it; marked with [`FORWARDED`].
    pub async fn forward(
        &self,
        url: &str,
        json: &Value,
        timeout: Duration,
    ) -> Result<Answer, PeerError> {
        let mut request = self.request(Method::POST, url, Some(json))?;
        request.headers_mut().insert(FORWARDED, HeaderValue::from_static("1"));
        self.exchange(request, timeout).await
    }

    /// Any request; `json` is its body. Returns the answer, whatever its status.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        json: Option<&Value>,
        timeout: Duration,
    ) -> Result<Answer, PeerError> {
        let request = self.request(method, url, json)?;
        self.exchange(request, timeout).await
    }

    /// Asks all members at once where they stand, by name; a member that does not answer within `timeout`, or at
    /// whose address another one answers, is `None`.
    pub async fn ask_all(
        &self,
        members: &BTreeMap<String, Member>,
        cluster: Identity<'_>,
        timeout: Duration,
    ) -> BTreeMap<String, Option<Peer>> {
        let questions = members.iter().map(|(name, member)| async move {
            let status = self.get_status(&member.api_url, timeout).await;
            let status = status.inspect_err(|error| {
                let error: &dyn std::error::Error = error;
                tracing::debug!(node = name, error, "member does not answer for its position");
            });
            let answer = status.ok().and_then(|status| {
                let said = status.name.clone();
                let peer = status.of(&Asked { name, cluster });
                if peer.is_none() {
                    tracing::warn!(
                        node = name,
                        answered = said,
                        api_url = member.api_url,
                        "answer ignored: another server answers at this member's address"
                    );
                }
                peer
            });
            (name.clone(), answer)
        });
        futures_util::future::join_all(questions).await.into_iter().collect()
    }

    fn request(
        &self,
        method: Method,
        url: &str,
        json: Option<&Value>,
    ) -> Result<Request<Bytes>, PeerError> {
        let uri: Uri = url.parse().map_err(|_| PeerError::Address(url.to_owned()))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.authority().is_none() {
            return Err(PeerError::Address(url.to_owned()));
        }
        let body = json.map(|json| Bytes::from(json.to_string())).unwrap_or_default();
        let mut request = Request::new(body);
        let headers = request.headers_mut();
        if json.is_some() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        if let (false, Some(value)) = (method == Method::GET, &self.authorization) {
            headers.insert(AUTHORIZATION, value.clone());
        }
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        Ok(request)
    }

    async fn exchange(
        &self,
        request: Request<Bytes>,
        timeout: Duration,
    ) -> Result<Answer, PeerError> {
        self.carrier.carry(request, timeout).await
    }
}

impl Carrier for Http {
    fn carry(
        &self,
        request: Request<Bytes>,
        timeout: Duration,
    ) -> Boxed<Result<Answer, PeerError>> {
        let asked = self.0.request(request.map(Full::new));
        let exchange = async move {
            let response = asked.await.map_err(|error| {
                if error.is_connect() {
                    PeerError::Connect(error)
                } else {
                    PeerError::Broken(error.into())
                }
            })?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_LIMIT).collect().await;
            let body = body.map_err(PeerError::Broken)?.to_bytes();
            Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
        };
        Box::pin(async move {
            match tokio::time::timeout(timeout, exchange).await {
                Ok(answer) => answer,
                Err(_) => Err(PeerError::Timeout(timeout)),
            }
        })
    }
}

/// The value of `Authorization` for basic authentication (RFC 7617), marked as sensitive.
pub(crate) fn basic_authorization(auth: &BasicAuth) -> Option<HeaderValue> {
    let pair = format!("{}:{}", auth.username, auth.password.expose_secret());
    let mut value = HeaderValue::from_str(&format!("Basic {}", BASE64.encode(pair))).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests;
