//! Without a store, in front of agents (Kornak's or Patroni's): their REST API tells who the members
//! are, as it tells HAProxy.
//!
//! A member's own word over REST is not a proof: Patroni answers `/primary` from memory, also
//! before a promotion has ended and after the server has died (docs/safety.md A12). So the API is asked for
//! the list of members and their tags, `GET /cluster`, and the servers for their roles, as with a
//! static list ([`super::by_asking`]). Only without `auth.user` the API's word has to do.
//!
//! Not here: TLS to the API, and its password, which reading does not need.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kornak_config::proxy::StaticMember;
use serde::Deserialize;
use tokio::sync::watch;

use super::by_asking::Listed;

/// Between two looks at the list: a member that joins is used, and one that left is not, a second later.
const EVERY: Duration = Duration::from_secs(1);

/// For one member's answer; the next one is asked after it.
const ANSWER_WAIT: Duration = Duration::from_secs(2);

/// Longest answer that is read: a member is about 300 bytes.
const ANSWER_LIMIT: usize = 1 << 20;

/// Why a member told nothing.
#[derive(Debug, thiserror::Error)]
enum ListError {
    #[error("no answer")]
    Silent,
    #[error("it answers with status {0}")]
    Status(u16),
    #[error("its answer makes no sense")]
    Nonsense(#[from] serde_json::Error),
    #[error("it knows no members")]
    Empty,
    #[error("it cannot be asked")]
    Request(#[from] Box<dyn std::error::Error + Send + Sync>),
}

/// `GET /cluster`, the part that is needed.
#[derive(Debug, Deserialize)]
struct Cluster {
    members: Vec<Row>,
}

#[derive(Debug, Deserialize)]
struct Row {
    name: String,
    host: Option<String>,
    port: Option<u16>,
    #[serde(default)]
    role: String,
    #[serde(default)]
    tags: serde_json::Value,
}

/// Keeps the list up to date, asking the members in turn until one answers.
pub(super) async fn run(bases: Vec<String>, found: watch::Sender<Vec<Listed>>) {
    let client: Client<HttpConnector, Empty<Bytes>> =
        Client::builder(TokioExecutor::new()).build_http();
    let mut first = 0;
    let mut complained = false;
    loop {
        let mut reasons = Vec::new();
        for n in 0..bases.len() {
            let Some(base) = bases.get((first + n) % bases.len()) else { continue };
            match list(&client, base).await {
                Ok(members) => {
                    first = (first + n) % bases.len();
                    found.send_if_modified(|old| {
                        let changed = *old != members;
                        *old = members;
                        changed
                    });
                    break;
                }
                Err(error) => reasons.push(format!("{base}: {error}")),
            }
        }
        let nobody = reasons.len() == bases.len();
        if nobody && !complained {
            tracing::warn!(why = %reasons.join("; "), "no member of `rest` lists the members, the known ones stay");
        }
        complained = nobody;
        tokio::time::sleep(EVERY).await;
    }
}

async fn list(
    client: &Client<HttpConnector, Empty<Bytes>>,
    base: &str,
) -> Result<Vec<Listed>, ListError> {
    let address = format!("{}/cluster", base.trim_end_matches('/'));
    let request = hyper::Request::get(address).body(Empty::new()).map_err(boxed)?;
    let asked = async {
        let answer = client.request(request).await.map_err(boxed)?;
        if !answer.status().is_success() {
            return Err(ListError::Status(answer.status().as_u16()));
        }
        let body = Limited::new(answer.into_body(), ANSWER_LIMIT).collect().await?;
        parse(&body.to_bytes())
    };
    tokio::time::timeout(ANSWER_WAIT, asked).await.map_err(|_| ListError::Silent)?
}

fn boxed(error: impl std::error::Error + Send + Sync + 'static) -> ListError {
    ListError::Request(Box::new(error))
}

fn parse(body: &[u8]) -> Result<Vec<Listed>, ListError> {
    let cluster: Cluster = serde_json::from_slice(body)?;
    let listed: Vec<Listed> = cluster
        .members
        .into_iter()
        .filter_map(|row| {
            let noloadbalance = row.tags.get("noloadbalance").and_then(serde_json::Value::as_bool);
            Some(Listed {
                leads: matches!(row.role.as_str(), "leader" | "master"),
                noloadbalance: noloadbalance.unwrap_or(false),
                member: StaticMember {
                    name: row.name,
                    host: row.host?,
                    port: row.port.unwrap_or(5432),
                },
            })
        })
        .collect();
    if listed.is_empty() { Err(ListError::Empty) } else { Ok(listed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patronis_list_is_read() {
        let body = br#"{"members":[
            {"name":"pg0","role":"leader","state":"running","api_url":"http://h:8008/patroni",
             "host":"10.0.0.1","port":5433,"timeline":5},
            {"name":"pg1","role":"replica","state":"streaming","host":"10.0.0.2","port":5432,
             "tags":{"noloadbalance":true},"lag":"unknown"},
            {"name":"pg2","role":"replica","state":"creating replica"}],
            "scope":"demo","pause":true}"#;
        let listed = parse(body).expect("it is Patroni's");
        let seen: Vec<_> = listed
            .iter()
            .map(|l| (l.member.name.as_str(), l.member.port, l.leads, l.noloadbalance))
            .collect();
        assert_eq!(seen, [("pg0", 5433, true, false), ("pg1", 5432, false, true)]);
        assert!(matches!(parse(br#"{"members":[]}"#), Err(ListError::Empty)));
        assert!(matches!(parse(b"<html>"), Err(ListError::Nonsense(_))));
    }
}
