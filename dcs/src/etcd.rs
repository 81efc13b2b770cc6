//! The store in etcd v3, over gRPC.
//!
//! One long-lived connection per endpoint. All requests go to one endpoint until it fails, then to
//! the next: a client library's balancing would ask the dead ones again and again. A request that may
//! be repeated is repeated within [`EtcdSettings::retry_timeout`]; a transaction that writes is
//! repeated only if it was provably not done (connection refused, member without a leader), for the
//! second run could meet what the first one wrote. Otherwise its outcome is [`DcsError::Unknown`].
//!
//! A member that takes requests and does not answer (stopped, or its disk hangs before the network
//! does) is found by asking it something that needs nobody's consent; see [`EtcdDcs`]' `txn`.
//!
//! Tasks of connections run on the tokio runtime that used them first, so one [`EtcdDcs`] belongs to
//! one runtime, and all its functions are called within it.
//!
//! Not here: waiting for a lease's deadline, deciding anything from a key.

mod convert;
mod endpoint;
mod feeder;
mod keeper;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{GetOptions, LeaseGrantOptions};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use crate::{
    Dcs, DcsError, DcsFuture, Follow, Granted, LeaseId, Remaining, Renewed, Txn, TxnOutcome, View,
};
use convert::Failure;
use endpoint::{Clients, Endpoint};
use keeper::Keepers;

/// How long a follow may be fed by nothing before it says [`crate::Reach::Lost`].
pub const SILENCE: Duration = Duration::from_secs(5);

/// How to reach etcd.
#[derive(Clone)]
pub struct EtcdSettings {
    /// `host:port`, at least one. A scheme in front is left out, for [`EtcdSettings::tls`] says it.
    pub endpoints: Vec<String>,
    /// Whether to speak TLS; the endpoints' host names are checked.
    pub tls: bool,
    /// etcd user and password.
    pub user: Option<(String, String)>,
    /// PEM file of the authorities to trust; the system's if `None`.
    pub ca_file: Option<PathBuf>,
    /// PEM files of our certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// How long a request is tried, over all endpoints (Patroni's `retry_timeout`).
    pub retry_timeout: Duration,
    /// How long one endpoint is waited for before a request that may be repeated goes to the next.
    /// Doubles with every round.
    pub attempt_timeout: Duration,
    /// Add the members that etcd names to the endpoints.
    pub discover: bool,
}

impl EtcdSettings {
    /// Plain connections without a user, and Patroni's default times.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            tls: false,
            user: None,
            ca_file: None,
            identity: None,
            retry_timeout: Duration::from_secs(10),
            attempt_timeout: Duration::from_secs(1),
            discover: false,
        }
    }
}

impl std::fmt::Debug for EtcdSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdSettings")
            .field("endpoints", &self.endpoints)
            .field("tls", &self.tls)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .field("ca_file", &self.ca_file)
            .field("identity", &self.identity)
            .field("retry_timeout", &self.retry_timeout)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("discover", &self.discover)
            .finish()
    }
}

/// etcd as the store. Clones share connections.
#[derive(Debug, Clone)]
pub struct EtcdDcs {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: EtcdSettings,
    endpoints: parking_lot::RwLock<Vec<Arc<Endpoint>>>,
    /// Index of the endpoint that requests go to, until it fails.
    current: AtomicUsize,
    keepers: Keepers,
}

/// Whether a request may be sent a second time when the first one's outcome is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Always,
    IfNotDone,
}

impl EtcdDcs {
    /// Connects to nothing yet.
    pub fn new(settings: EtcdSettings) -> Self {
        let endpoints = settings
            .endpoints
            .iter()
            .map(|address| Arc::new(Endpoint::new(address, settings.tls)))
            .collect();
        Self {
            shared: Arc::new(Shared {
                settings,
                endpoints: parking_lot::RwLock::new(endpoints),
                current: AtomicUsize::new(0),
                keepers: Keepers::default(),
            }),
        }
    }

    /// Reads certificates anew for connections made from now on (SIGHUP).
    pub async fn reload(&self) {
        for endpoint in self.shared.all() {
            endpoint.forget().await;
        }
    }

    /// Addresses of the endpoints in use, discovered ones last.
    pub fn endpoints(&self) -> Vec<String> {
        self.shared.all().iter().map(|endpoint| endpoint.address().to_owned()).collect()
    }
}

impl Shared {
    fn all(&self) -> Vec<Arc<Endpoint>> {
        self.endpoints.read().clone()
    }

    fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Sends requests elsewhere, unless somebody else has seen to that.
    fn leave(&self, at: usize) {
        let count = self.endpoints.read().len().max(1);
        let next = (at + 1) % count;
        let moved = self.current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
        if moved.is_ok() && count > 1 {
            debug!(from = at, to = next, "requests switched to the next etcd endpoint");
        }
    }

    /// One attempt at one endpoint, within `limit`.
    async fn attempt<T, F>(
        &self,
        at: usize,
        limit: Duration,
        call: impl FnOnce(Clients) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let endpoint = self.endpoints.read().get(at).cloned();
        let Some(endpoint) = endpoint else {
            return Err(Failure::NotDone("no endpoints are configured".to_owned()));
        };
        let failure = match timeout(limit, endpoint.clients(&self.settings)).await {
            Err(_) => Failure::NotDone("no connection in time".to_owned()),
            Ok(Err(failure)) => failure,
            Ok(Ok(clients)) => {
                let dead =
                    endpoint::stops_answering(clients.clone(), self.settings.attempt_timeout);
                let answer = tokio::select! {
                    answer = timeout(limit, call(clients)) => answer,
                    () = dead => return Err(Failure::Silent(format!("{endpoint}: no sign of life"))),
                };
                match answer {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(error)) => convert::failure(&error),
                    Err(_) => Failure::Silent("no answer in time".to_owned()),
                }
            }
        };
        if failure.asks_for_a_new_connection() || (self.settings.tls && failure.is_transient()) {
            endpoint.forget().await;
        }
        Err(failure.at(&endpoint))
    }

    /// Tries endpoint after endpoint, round after round, until `retry_timeout`.
    async fn run<T, F>(&self, repeat: Repeat, call: impl Fn(Clients) -> F) -> Result<T, DcsError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let deadline = Instant::now() + self.settings.retry_timeout;
        let mut uncertain = None;
        let mut tried = 0_usize;
        loop {
            let count = self.endpoints.read().len().max(1);
            let round = u32::try_from(tried / count).unwrap_or(u32::MAX);
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = match repeat {
                Repeat::IfNotDone => left,
                Repeat::Always => {
                    left.min(self.settings.attempt_timeout.saturating_mul(1 << round.min(6)))
                }
            };
            let at = self.current();
            let last = match self.attempt(at, limit, &call).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Definite(error)) => return Err(error),
                Err(Failure::Maybe(detail) | Failure::Silent(detail)) => {
                    self.leave(at);
                    if repeat == Repeat::IfNotDone {
                        return Err(DcsError::Unknown { detail });
                    }
                    uncertain = Some(detail.clone());
                    detail
                }
                Err(Failure::NotDone(detail) | Failure::Stale(detail)) => {
                    self.leave(at);
                    detail
                }
            };
            tried += 1;
            let pause = if tried.is_multiple_of(count) { backoff(round) } else { Duration::ZERO };
            if Instant::now() + pause >= deadline {
                return Err(match uncertain {
                    Some(detail) => DcsError::Unknown { detail },
                    None => DcsError::Unreachable { detail: last },
                });
            }
            sleep(pause).await;
        }
    }

    async fn range_at(clients: Clients, prefix: &str) -> Result<View, etcd_client::Error> {
        let mut kv = clients.kv;
        let mut answer = kv.get(prefix, Some(GetOptions::new().with_prefix())).await?;
        let found = answer.take_kvs();
        Ok(convert::view(answer.header(), found))
    }

    async fn range(&self, prefix: &str) -> Result<View, DcsError> {
        self.run(Repeat::Always, |clients| Self::range_at(clients, prefix)).await
    }

    async fn run_txn(&self, txn: &Txn) -> Result<TxnOutcome, DcsError> {
        let repeat = if txn.only_reads() { Repeat::Always } else { Repeat::IfNotDone };
        self.run(repeat, |clients| {
            let request = convert::request(txn);
            async move {
                let mut kv = clients.kv;
                Ok(convert::outcome(txn, &kv.txn(request).await?))
            }
        })
        .await
    }

    async fn grant(&self, ttl: Duration) -> Result<Granted, DcsError> {
        // etcd counts whole seconds. An attempt whose answer is lost leaves a lease that nobody
        // knows, and that ends by itself.
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds.max(1)).unwrap_or(i64::MAX);
        self.run(Repeat::Always, |clients| async move {
            let mut lease = clients.lease;
            let answer = lease.grant(seconds, Some(LeaseGrantOptions::new())).await?;
            Ok(convert::granted(&answer))
        })
        .await
    }

    async fn time_to_live(&self, lease: LeaseId) -> Result<Remaining, DcsError> {
        let answer = self.run(Repeat::Always, |clients| async move {
            let mut client = clients.lease;
            client.time_to_live(lease.0, None).await
        });
        convert::remaining(&answer.await?).ok_or(DcsError::LeaseLost)
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), DcsError> {
        self.keepers.forget(lease);
        let asked = AtomicUsize::new(0);
        let answer = self
            .run(Repeat::Always, |clients| {
                asked.fetch_add(1, Ordering::Relaxed);
                async move {
                    let mut client = clients.lease;
                    client.revoke(lease.0).await.map(drop)
                }
            })
            .await;
        match answer {
            // The attempt before this one has done it.
            Err(DcsError::LeaseLost) if asked.load(Ordering::Relaxed) > 1 => Ok(()),
            answer => answer,
        }
    }

    /// Adds the members that the endpoint names, if it answers.
    async fn discover(&self, at: usize) {
        let named = self
            .attempt(at, self.settings.attempt_timeout, |clients| async move {
                let mut cluster = clients.cluster;
                let answer = cluster.member_list().await?;
                let urls = answer.members().iter().flat_map(|member| member.client_urls().to_vec());
                Ok(urls.collect::<Vec<String>>())
            })
            .await;
        let named = match named {
            Ok(named) => named,
            Err(failure) => {
                debug!(?failure, "etcd does not name its members");
                return;
            }
        };
        let mut endpoints = self.endpoints.write();
        for url in named {
            let found = Endpoint::new(&url, self.settings.tls);
            if endpoints.iter().all(|known| known.address() != found.address()) {
                info!(server = %found, "etcd member list changed");
                endpoints.push(Arc::new(found));
            }
        }
    }
}

impl Dcs for EtcdDcs {
    fn range(&self, prefix: &str) -> DcsFuture<'_, View> {
        let prefix = prefix.to_owned();
        Box::pin(async move { self.shared.range(&prefix).await })
    }

    fn txn(&self, txn: Txn) -> DcsFuture<'_, TxnOutcome> {
        Box::pin(async move { self.shared.run_txn(&txn).await })
    }

    fn grant(&self, ttl: Duration) -> DcsFuture<'_, Granted> {
        Box::pin(self.shared.grant(ttl))
    }

    fn keep_alive(&self, lease: LeaseId) -> DcsFuture<'_, Renewed> {
        Box::pin(self.shared.keep_alive(lease))
    }

    fn time_to_live(&self, lease: LeaseId) -> DcsFuture<'_, Remaining> {
        Box::pin(self.shared.time_to_live(lease))
    }

    fn revoke(&self, lease: LeaseId) -> DcsFuture<'_, ()> {
        Box::pin(self.shared.revoke(lease))
    }

    fn follow(&self, prefix: &str) -> Follow {
        feeder::follow(Arc::clone(&self.shared), prefix)
    }
}

/// Between two rounds over all endpoints; jittered, so that a fleet does not come back in step.
fn backoff(round: u32) -> Duration {
    let most = 100_u64.saturating_mul(1 << round.min(4)).min(1000);
    Duration::from_millis(rand::random_range(most / 2..=most))
}
