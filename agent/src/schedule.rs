//! Times that an operator sets, and the restart that waits for its time.
//!
//! A scheduled restart belongs to one node and does not outlive its agent, as with Patroni. It is
//! dropped if the server has been restarted meanwhile: its reason has gone then.

use std::time::Duration;

use axum::http::StatusCode;
use jiff::civil::DateTime;
use jiff::fmt::temporal::Pieces;
use jiff::tz::{Offset, TimeZone};
use jiff::{Timestamp, Zoned};
use kornak_cluster::{MemberRole, discard};
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::node::NodeView;
use crate::units;

/// The longest sleep before the wall clock is read again, for it may be set.
const CLOCK_CHECK: Duration = Duration::from_secs(30);

/// Why a request is refused: a status and a sentence.
pub(crate) type Refusal = (StatusCode, String);

/// Reads a time in the future, with its zone: RFC 3339, or with a space for the T.
pub(crate) fn parse_time(text: &str, now: Timestamp, action: &str) -> Result<Zoned, Refusal> {
    let text = text.trim();
    if let Ok(at) = text.parse::<Timestamp>() {
        return if at > now {
            let offset = Pieces::parse(text).ok().and_then(|pieces| pieces.to_numeric_offset());
            Ok(at.to_zoned(TimeZone::fixed(offset.unwrap_or(Offset::UTC))))
        } else {
            let why = format!("Cannot schedule {action} in the past");
            Err((StatusCode::UNPROCESSABLE_ENTITY, why))
        };
    }
    if text.parse::<DateTime>().is_ok() {
        let why = format!("Timezone information is mandatory for the scheduled {action}");
        return Err((StatusCode::BAD_REQUEST, why));
    }
    let why = "Unable to parse scheduled timestamp. It should be in an unambiguous format, e.g. \
               ISO 8601";
    Err((StatusCode::UNPROCESSABLE_ENTITY, why.to_owned()))
}

/// As Patroni prints it, with the offset it was given with: `2027-01-01T00:00:00+00:00`.
pub(crate) fn print_time(at: &Zoned) -> String {
    let whole = at.subsec_nanosecond() == 0;
    let form = if whole { "%Y-%m-%dT%H:%M:%S%:z" } else { "%Y-%m-%dT%H:%M:%S%.6f%:z" };
    at.strftime(form).to_string()
}

/// Body of `POST /restart`.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct RestartRequest {
    pub(crate) at: Option<Zoned>,
    pub(crate) timeout: Option<Duration>,
    role: Option<MemberRole>,
    /// Only if the server is older than this, as in `server_version_num`.
    older_than: Option<u32>,
    only_if_pending: bool,
    /// The filters as they were given.
    filters: Map<String, Value>,
}

impl RestartRequest {
    /// Reads the body; the text of a refusal names the field.
    pub(crate) fn read(body: &Map<String, Value>, now: Timestamp) -> Result<Self, Refusal> {
        let bad = |text: String| (StatusCode::BAD_REQUEST, text);
        let mut request = Self::default();
        for (key, value) in body {
            match key.as_str() {
                "schedule" => {
                    let text = value.as_str().unwrap_or_default();
                    request.at = Some(parse_time(text, now, "restart")?);
                    continue;
                }
                "role" => {
                    let role = match value.as_str() {
                        Some("primary" | "master") => MemberRole::Primary,
                        Some("standby_leader") => MemberRole::StandbyLeader,
                        Some("replica") => MemberRole::Replica,
                        _ => {
                            let why = "PostgreSQL role should be either primary, standby_leader, \
                                       or replica";
                            return Err(bad(why.to_owned()));
                        }
                    };
                    request.role = Some(role);
                }
                "postgres_version" => {
                    let text = value.as_str().unwrap_or_default();
                    request.older_than = Some(version_number(text).map_err(bad)?);
                }
                "timeout" => {
                    let seconds = match value {
                        Value::String(text) => units::seconds(text),
                        value => value.as_f64(),
                    };
                    let seconds = seconds.map(f64::round).filter(|it| *it > 0.0 && *it < 1e9);
                    let why = "Timeout should be a positive number of seconds";
                    let seconds = seconds.ok_or_else(|| bad(why.into()))? as u64;
                    request.timeout = Some(Duration::from_secs(seconds));
                    request.filters.insert(key.clone(), seconds.into());
                    continue;
                }
                "restart_pending" => {
                    request.only_if_pending = units::is_true(value);
                }
                other => {
                    let why = format!("Unknown filter for the scheduled restart: {other}");
                    return Err(bad(why));
                }
            }
            request.filters.insert(key.clone(), value.clone());
        }
        Ok(request)
    }

    /// Whether the node is one that was meant.
    pub(crate) fn applies_to(&self, view: &NodeView) -> bool {
        let role = self.role.is_none_or(|role| role == view.role);
        let pending = !self.only_if_pending || view.pending_restart.is_some();
        let version = match (self.older_than, view.server_version) {
            (Some(limit), Some(version)) => version < limit,
            (Some(_), None) => false,
            (None, _) => true,
        };
        role && pending && version
    }
}

/// `15.4` as 150004, `9.6.24` as 90624.
///
/// # Errors
/// The text is no version; the error is Patroni's sentence.
pub fn version_number(text: &str) -> Result<u32, String> {
    let parts: Option<Vec<u32>> =
        text.split('.').map(|part| part.trim().parse().ok().filter(|part| *part < 1000)).collect();
    let parts = parts.ok_or_else(|| format!("Invalid PostgreSQL version: {text}"))?;
    match *parts.as_slice() {
        [major, minor] if major >= 10 => Ok(major * 10000 + minor),
        [major, middle, minor] => Ok(major * 10000 + middle * 100 + minor),
        _ => Err(format!("Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: {text}")),
    }
}

/// A restart that waits for its time.
#[derive(Debug, Clone, PartialEq)]
struct Planned {
    at: Zoned,
    request: RestartRequest,
    /// Of the server that was running when it was asked for.
    postmaster_start_time: Option<String>,
}

/// The one restart a node may have ahead of it. Cheap to clone; all clones are the same plan. The
/// API keeps and carries it out, the agent publishes [`RestartPlan::published`] in its member key.
#[derive(Debug, Clone, Default)]
pub struct RestartPlan {
    planned: watch::Sender<Option<Planned>>,
}

impl RestartPlan {
    /// As the member key shows it.
    pub fn published(&self) -> Option<Value> {
        self.planned.borrow().as_ref().map(|planned| planned.json(true))
    }

    /// As the REST status shows it.
    pub(crate) fn shown(&self) -> Option<Value> {
        self.planned.borrow().as_ref().map(|planned| planned.json(false))
    }

    /// False if there is one already.
    pub(crate) fn add(&self, at: Zoned, request: RestartRequest, view: &NodeView) -> bool {
        let postmaster_start_time = view.postmaster_start_time.clone();
        self.planned.send_if_modified(|planned| {
            let free = planned.is_none();
            if free {
                *planned = Some(Planned { at, request, postmaster_start_time });
            }
            free
        })
    }

    /// False if there is none.
    pub(crate) fn remove(&self) -> bool {
        self.planned.send_if_modified(|planned| planned.take().is_some())
    }

    /// Waits for the planned restart's time, whatever is planned meanwhile, and takes it out.
    /// Returns it if it still makes sense then.
    pub(crate) async fn due(&self, views: &crate::node::NodeViews) -> RestartRequest {
        let mut changes = self.planned.subscribe();
        loop {
            let at = changes.borrow_and_update().as_ref().map(|planned| planned.at.timestamp());
            let pause = match at {
                None => {
                    // Never an error: this plan itself holds the sender.
                    discard::sender_outlives_waiters(changes.changed().await);
                    continue;
                }
                Some(at) => Duration::try_from(at.duration_since(Timestamp::now())),
            };
            // A negative span of time is no Duration: it is due.
            let Some(pause) = pause.ok().filter(|pause| !pause.is_zero()) else {
                if let Some(request) = self.take(&views.borrow()) {
                    return request;
                }
                continue;
            };
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep(pause.min(CLOCK_CHECK)) => {}
            }
        }
    }

    fn take(&self, view: &NodeView) -> Option<RestartRequest> {
        let planned = self.planned.send_replace(None)?;
        if planned.postmaster_start_time != view.postmaster_start_time {
            tracing::info!("scheduled restart dropped, the server was restarted meanwhile");
            return None;
        }
        if !planned.request.applies_to(view) {
            tracing::info!("scheduled restart dropped, its conditions are not satisfied");
            return None;
        }
        Some(planned.request)
    }
}

impl Planned {
    fn json(&self, with_start_time: bool) -> Value {
        let mut out = Map::new();
        out.insert("schedule".to_owned(), print_time(&self.at).into());
        out.extend(self.request.filters.clone());
        if let (true, Some(start)) = (with_start_time, &self.postmaster_start_time) {
            out.insert("postmaster_start_time".to_owned(), start.as_str().into());
        }
        Value::Object(out)
    }
}
