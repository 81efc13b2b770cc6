//! A small client for REST APIs: one request per connection, a limit on each.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// Long enough for a switchover, which answers when it is done.
const LIMIT: Duration = Duration::from_secs(90);

/// Where an API is.
#[derive(Debug, Clone)]
pub struct Rest {
    address: String,
}

/// The answer to a request.
#[derive(Debug, Clone)]
pub struct Answer {
    pub code: u16,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.text).with_context(|| format!("not JSON: {}", self.text))
    }
}

impl Rest {
    /// `address` is `host:port`.
    pub fn new(address: &str) -> Self {
        Self { address: address.to_owned() }
    }

    /// `http://host:port`.
    pub fn base(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The port alone.
    pub fn port(&self) -> &str {
        self.address.rsplit(':').next().unwrap_or_default()
    }

    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.send(Method::GET, path, String::new()).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send(Method::POST, path, body.to_string()).await
    }

    pub async fn patch(&self, path: &str, body: &Value) -> Result<Answer> {
        self.send(Method::PATCH, path, body.to_string()).await
    }

    /// The status code of a health check; an error if nobody answered.
    pub async fn code(&self, path: &str) -> Result<u16> {
        Ok(self.get(path).await?.code)
    }

    async fn send(&self, method: Method, path: &str, body: String) -> Result<Answer> {
        let uri: Uri = format!("http://{}{path}", self.address).parse().context("make the URL")?;
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header("content-type", "application/json")
            .header("connection", "close")
            .body(Full::new(Bytes::from(body)))
            .context("make the request")?;
        let client = Client::builder(TokioExecutor::new()).build_http();
        let exchange = async {
            let response = client.request(request).await?;
            let code = response.status().as_u16();
            let body = response.into_body().collect().await?.to_bytes();
            let text = String::from_utf8_lossy(&body).into_owned();
            Ok::<_, anyhow::Error>(Answer { code, text })
        };
        match tokio::time::timeout(LIMIT, exchange).await {
            Ok(answer) => answer.with_context(|| format!("ask {}{path}", self.address)),
            Err(_) => bail!("{}{path} did not answer within {LIMIT:?}", self.address),
        }
    }
}
