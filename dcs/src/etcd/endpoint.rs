//! One member of etcd: its address and the one connection to it.

mod encrypted;

use std::fmt;
use std::time::Duration;

use etcd_client::{
    Client, ClusterClient, ConnectOptions, GetOptions, KvClient, LeaseClient, WatchClient,
};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::EtcdSettings;
use super::convert::{self, Failure};

/// Answers larger than this are refused; etcd's own default limit of a request is 1.5 MiB, and a
/// cluster's keys are some KiB.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// How often an idle connection is probed. etcd ends connections that ask more often than every
/// 5 s (`--grpc-keepalive-min-time`).
const PROBE_EVERY: Duration = Duration::from_millis(5500);

/// An address, and the connection once there is one.
#[derive(Debug)]
pub(super) struct Endpoint {
    address: String,
    url: String,
    clients: Mutex<Option<Clients>>,
}

/// The services behind one connection. Cloning is cheap.
#[derive(Clone)]
pub(super) struct Clients {
    pub(super) kv: KvClient,
    pub(super) lease: LeaseClient,
    pub(super) watch: WatchClient,
    pub(super) cluster: ClusterClient,
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clients")
    }
}

impl Endpoint {
    pub(super) fn new(address: &str, tls: bool) -> Self {
        let address = address.rsplit("://").next().unwrap_or(address).trim_end_matches('/');
        let scheme = if tls { "https" } else { "http" };
        Self {
            address: address.to_owned(),
            url: format!("{scheme}://{address}"),
            clients: Mutex::default(),
        }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The connection; the first call makes it, and logs in if there is a user.
    pub(super) async fn clients(&self, settings: &EtcdSettings) -> Result<Clients, Failure> {
        let mut slot = self.clients.lock().await;
        if let Some(clients) = slot.as_ref() {
            return Ok(clients.clone());
        }
        let options = Some(options(settings));
        // Without a user this only builds the channel.
        let client = if settings.tls {
            let channel = encrypted::channel(&self.url, settings).await?;
            Client::from_channel(channel, options).await
        } else {
            Client::connect([&self.url], options).await
        };
        let client = client.map_err(|error| convert::failure(&error).before_sending())?;
        let clients = Clients {
            kv: client.kv_client().max_decoding_message_size(MAX_ANSWER_BYTES),
            lease: client.lease_client(),
            watch: client.watch_client().max_decoding_message_size(MAX_ANSWER_BYTES),
            cluster: client.cluster_client(),
        };
        Ok(slot.insert(clients).clone())
    }

    /// Makes a new connection next time. What runs on the old one goes on.
    pub(super) async fn forget(&self) {
        self.clients.lock().await.take();
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

/// Pends until the member has not answered for `patience`, twice. What is asked needs neither the
/// other members nor the disk, and may be refused: any answer is a sign of life.
pub(super) async fn stops_answering(clients: Clients, patience: Duration) {
    let mut kv = clients.kv;
    loop {
        sleep(patience).await;
        let question = GetOptions::new().with_serializable().with_count_only();
        if timeout(patience, kv.get("/", Some(question))).await.is_err() {
            return;
        }
    }
}

fn options(settings: &EtcdSettings) -> ConnectOptions {
    let options = ConnectOptions::new()
        .with_connect_timeout(settings.attempt_timeout)
        .with_timeout(settings.retry_timeout)
        .with_keep_alive(PROBE_EVERY, settings.attempt_timeout)
        .with_keep_alive_while_idle(true)
        .with_require_leader(true);
    match &settings.user {
        Some((name, password)) => options.with_user(name, password).with_auto_token_refresh(true),
        None => options,
    }
}
