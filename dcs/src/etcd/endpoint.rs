//! One member of etcd: its address and the one connection to it.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ClusterClient, ConnectOptions, GetOptions, Identity, KvClient,
    LeaseClient, TlsOptions, WatchClient,
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

/// Where distributions keep the authorities that the system trusts.
const SYSTEM_AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

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
        let options = options(settings).await?;
        // Without a user this only builds the channel.
        let client = Client::connect([&self.url], Some(options))
            .await
            .map_err(|error| convert::failure(&error).before_sending())?;
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

async fn options(settings: &EtcdSettings) -> Result<ConnectOptions, Failure> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(settings.attempt_timeout)
        .with_timeout(settings.retry_timeout)
        .with_keep_alive(PROBE_EVERY, settings.attempt_timeout)
        .with_keep_alive_while_idle(true)
        .with_require_leader(true);
    if let Some((name, password)) = &settings.user {
        options = options.with_user(name, password).with_auto_token_refresh(true);
    }
    if settings.tls {
        options = options.with_tls(tls(settings).await?);
    }
    Ok(options)
}

async fn tls(settings: &EtcdSettings) -> Result<TlsOptions, Failure> {
    let authorities = match &settings.ca_file {
        Some(file) => read(file).await?,
        None => {
            let known = SYSTEM_AUTHORITIES.iter().map(Path::new).find(|path| path.exists());
            match known {
                Some(file) => read(file).await?,
                None => return Err(Failure::NotDone("no certificate authorities".to_owned())),
            }
        }
    };
    let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(authorities));
    if let Some((certificate, key)) = &settings.identity {
        tls = tls.identity(Identity::from_pem(read(certificate).await?, read(key).await?));
    }
    Ok(tls)
}

async fn read(file: &Path) -> Result<Vec<u8>, Failure> {
    tokio::fs::read(file)
        .await
        .map_err(|error| Failure::NotDone(format!("read {}: {error}", file.display())))
}
