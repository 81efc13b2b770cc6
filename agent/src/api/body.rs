//! The bodies of requests: JSON objects of bounded length that arrive in time.

use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::header::CONTENT_LENGTH;
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode};
use axum::response::Response;
use serde_json::{Map, Value};

use super::text;
use crate::machine::Machine;

/// The longest body: a dynamic configuration is some kilobytes.
pub(super) const BODY_LIMIT: usize = 1 << 20;

/// The longest a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(10);

/// The body as a JSON object that says something. The error is an answer.
pub(super) async fn object(
    machine: &Machine,
    head: &Parts,
    body: Body,
) -> Result<Map<String, Value>, Response> {
    let found = any_object(machine, head, body).await?;
    if found.is_empty() {
        return Err(text(StatusCode::BAD_REQUEST, "the body is an empty JSON object"));
    }
    Ok(found)
}

async fn any_object(
    machine: &Machine,
    head: &Parts,
    body: Body,
) -> Result<Map<String, Value>, Response> {
    if !head.headers.contains_key(CONTENT_LENGTH) {
        return Err(text(StatusCode::LENGTH_REQUIRED, "Content-Length is missing"));
    }
    let bytes = machine.timeout(BODY_TIME, to_bytes(body, BODY_LIMIT)).await;
    let bytes = bytes
        .map_err(|_| text(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time"))?
        .map_err(|_| text(StatusCode::PAYLOAD_TOO_LARGE, "the body cannot be read"))?;
    let not_an_object = || text(StatusCode::BAD_REQUEST, "the body must be a JSON object");
    serde_json::from_slice(&bytes).map_err(|_| not_an_object())
}

pub(super) async fn optional_object(
    machine: &Machine,
    head: &Parts,
    body: Body,
) -> Result<Map<String, Value>, Response> {
    match head.headers.get(CONTENT_LENGTH).map(HeaderValue::as_bytes) {
        None | Some(b"0") => Ok(Map::new()),
        Some(_) => any_object(machine, head, body).await,
    }
}
