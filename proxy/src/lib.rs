//! The address that never moves: PostgreSQL sessions over a moving primary.
//!
//! # A session's life on one page
//!
//! [`clients::serve`] accepts a client on one of the proxy's threads. [`clients::login`] takes the client
//! from its first byte to its first ReadyForQuery: TLS, startup packet, the proof of its password (from
//! which the proxy learns the keys that log the client in at any server), a server. From then on
//! [`clients::forward`] moves whole buffers between the two sockets and shows message heads to
//! [`session`], which knows at every byte whether the session is between transactions, and what it
//! holds. Before a transaction starts, the session goes through the [`waiting::gate`]; on a listener with
//! `pool_mode: transaction` it borrows a server connection from its [`pool`] until the transaction ends.
//! When the server cannot be used, [`clients::client`] waits for another one, logs in, restores what the
//! session held and continues. When a server is lost, [`session`] says what is true of the requests in
//! flight.
//!
//! # Groups of modules
//!
//! Each group imports from the groups above it in this list only; a test checks that.
//!
//! | group | what it holds |
//! | --- | --- |
//! | [`net`] | streams, TLS, connections to servers |
//! | [`cluster`] | what is known of the servers, and which one a listener's clients get |
//! | [`session`] | the meaning of messages; pure |
//! | [`waiting`] | when clients wait: the gate and the decisions that close it |
//! | [`admission`] | who may come in |
//! | [`registry`], [`metrics`] | every session's handle, and counters |
//! | [`pool`] | server connections that clients share |
//! | [`shared`] | the state of one proxy, which the tasks below share |
//! | [`clients`] | the path of a client |
//! | [`background`] | following the store, proving primaries, obeying switchovers |
//! | [`status`] | the status page and `/metrics` |
//!
//! **Invariants.** A proxy holds no opinion about who should be primary. Nothing that may have been
//! executed is sent again. Connections of an earlier term are never used. Nobody is held by a drain
//! longer than the record allows, counted on our own clock.
//!
//! Not here: agents; the store is the only channel to them.

pub mod admission;
pub mod background;
pub mod clients;
pub mod cluster;
pub mod error;
pub mod metrics;
pub mod net;
pub mod pool;
pub mod registry;
pub mod sabotage;
pub mod session;
pub mod shared;
pub mod status;
pub mod waiting;

use std::net::SocketAddr;
use std::sync::Arc;

use kornak_config::ProxySettings;
use kornak_config::proxy::{ProxyTls, ServerSideTls, Source, StatusSettings};
use kornak_dcs::Dcs;
use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use background::{certificates, handover, known, prover, sampler, topology};
use clients::{cancel, serve};
use cluster::probe::Prober;
pub use error::{RunError, StartError};
use net::{descriptors, tls};
use pool::lender::Lender;
use pool::{Limits, Shares};
use shared::Shared;

/// A proxy that serves.
#[derive(Debug)]
pub struct Running {
    /// Name and address of each listener, in the order of the settings; ports are real ones.
    pub listeners: Vec<(String, SocketAddr)>,
    /// Address of the status page, `/metrics` and `/status`; `None` if it is off.
    pub status: Option<SocketAddr>,
    /// Ends after `stop` was cancelled and every session is over.
    pub join: JoinHandle<Result<(), RunError>>,
    /// Takes changed settings.
    pub reloader: Reloader,
}

/// Gives a running proxy its settings anew.
#[derive(Debug)]
pub struct Reloader {
    shared: Arc<Shared>,
    tls: watch::Sender<ProxyTls>,
}

impl Reloader {
    /// Takes what can change while sessions live, and reads the files of `tls` again even if the settings are
    /// the same. The answer names the keys that wait for a restart.
    pub fn reload(&self, settings: ProxySettings) -> Vec<String> {
        let shared = &self.shared;
        let (mut settings, waiting) = kornak_config::reload::proxy(&shared.settings(), settings);
        if let Some(lowered) = descriptors::fit(&mut settings) {
            tracing::warn!("too few file descriptors: {lowered}");
        }
        let limits = &settings.limits;
        let (user, database) = (limits.max_user_connections, limits.max_db_connections);
        shared.lender.set_limits(pool_limits(&settings), user, database);
        self.tls.send_replace(settings.tls.clone());
        shared.set_settings(settings);
        waiting
    }
}

/// Runs a proxy until `stop` is cancelled.
pub async fn run(
    settings: ProxySettings,
    store: Option<Arc<dyn Dcs>>,
    stop: CancellationToken,
) -> Result<(), RunError> {
    let running = start(settings, store, stop).await?;
    running.join.await.map_err(|_| RunError::ThreadEnded)?
}

/// The sockets of all listeners.
struct Sockets {
    /// Name and address of each listener.
    listeners: Vec<(String, SocketAddr)>,
    /// Each thread has a socket of its own for each listener.
    of_threads: Vec<Vec<serve::Bound>>,
}

fn bind(settings: &ProxySettings, threads: usize) -> Result<Sockets, StartError> {
    let mut listeners = Vec::new();
    let mut of_threads: Vec<Vec<serve::Bound>> = (0..threads).map(|_| Vec::new()).collect();
    for (listener, setting) in settings.listeners.iter().enumerate() {
        let bound = serve::bind(&setting.listen, threads);
        let (address, copies) = bound.map_err(|source| StartError::Listen {
            name: setting.name.clone(),
            listen: setting.listen.clone(),
            source,
        })?;
        listeners.push((setting.name.clone(), address));
        for (n, socket) in copies.into_iter().enumerate() {
            if let Some(thread) = of_threads.get_mut(n % threads) {
                thread.push(serve::Bound { listener, socket });
            }
        }
    }
    Ok(Sockets { listeners, of_threads })
}

/// Starts a proxy: when it returns, every address is bound. `store` is needed if the settings name
/// one. Must be called inside a tokio runtime, which carries the work beside the sessions.
pub async fn start(
    settings: ProxySettings,
    store: Option<Arc<dyn Dcs>>,
    stop: CancellationToken,
) -> Result<Running, StartError> {
    let mut settings = settings;
    if let Some(lowered) = descriptors::fit(&mut settings) {
        tracing::warn!("too few file descriptors: {lowered}");
    }
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = settings.threads.unwrap_or_else(cores).max(1);
    let server_tls = tls::ServerTls::new(&settings.tls.server)?;
    let client_tls = tls::ClientSide::new(&settings.tls.client)?;
    let Sockets { listeners, of_threads } = bind(&settings, threads)?;
    let page = match &settings.status {
        None => None,
        Some(status) => Some(status_ports(status)?),
    };
    let id = settings.name.clone().unwrap_or_else(own_name);
    let prober = Prober::new(&settings.auth, server_tls);
    let (lanes, orders): (Vec<_>, Vec<_>) = (0..threads).map(|_| unbounded_channel()).unzip();
    let limits = &settings.limits;
    let shares = Shares::new(limits.max_user_connections, limits.max_db_connections);
    let lender = Arc::new(Lender::new(lanes, pool_limits(&settings), shares));
    let reached_at = cancel::reached_at(&settings, &listeners);
    // Proxies have no certificates for each other: better encrypted than not.
    let peer_tls = tls::ServerTls::new(&ServerSideTls::default())?;
    let shared = Shared::new(settings, id, lender, prober, client_tls, peer_tls, reached_at);
    let shared = Arc::new(shared);
    learn(&shared, store, &stop)?;
    tokio::spawn(prover::run(Arc::clone(&shared), stop.clone()));
    let (tls, named) = watch::channel(shared.settings().tls.clone());
    tokio::spawn(certificates::follow(Arc::clone(&shared), named, stop.clone()));
    if shared.prober.can_ask() {
        tokio::spawn(sampler::run(Arc::clone(&shared), stop.clone()));
    }
    let status = page.as_ref().map(|(address, _)| *address);
    if let Some((_, ports)) = page {
        tokio::spawn(status::serve::serve(Arc::clone(&shared), ports, stop.clone()));
    }
    let mut finished = Vec::new();
    for (lane, (sockets, orders)) in of_threads.into_iter().zip(orders).enumerate() {
        let thread = serve::spawn_thread(lane, Arc::clone(&shared), sockets, orders, stop.clone());
        finished.push(thread.map_err(StartError::Thread)?);
    }
    tracing::info!(proxy = %shared.id, threads, "proxy started");
    let reloader = Reloader { shared, tls };
    let join = tokio::spawn(async move {
        let mut ended = Ok(());
        for thread in finished {
            if thread.await.is_err() {
                ended = Err(RunError::ThreadEnded);
            }
        }
        ended
    });
    Ok(Running { listeners, status, join, reloader })
}

fn status_ports(
    settings: &StatusSettings,
) -> Result<(SocketAddr, Vec<status::serve::Port>), StartError> {
    let listen = &settings.listen;
    let failed =
        |source| StartError::Listen { name: "status".to_owned(), listen: listen.clone(), source };
    let (address, bound) = serve::bind(listen, 1).map_err(failed)?;
    let sockets = status::serve::sockets(bound).map_err(failed)?;
    let ports =
        sockets.into_iter().map(|socket| status::serve::Port::new(socket, settings.tls.as_ref()));
    Ok((address, ports.collect::<Result<_, _>>()?))
}

fn learn(
    shared: &Arc<Shared>,
    store: Option<Arc<dyn Dcs>>,
    stop: &CancellationToken,
) -> Result<(), StartError> {
    let settings = Arc::clone(&shared.settings());
    match &settings.source {
        Source::Dcs(_) => {
            let store = store.ok_or(StartError::NoStore)?;
            let registering =
                handover::register(Arc::clone(shared), Arc::clone(&store), stop.clone());
            tokio::spawn(registering);
            let (context, from, until) = (Arc::clone(shared), Arc::clone(&store), stop.clone());
            keep_running("obey switchovers", stop, move || {
                handover::obey(Arc::clone(&context), Arc::clone(&from), until.clone())
            });
            if let Some(file) = settings.state_file.clone() {
                tokio::spawn(known::keep(Arc::clone(shared), file, stop.clone()));
            }
            let (context, until) = (Arc::clone(shared), stop.clone());
            keep_running("follow the store", stop, move || {
                topology::follow(Arc::clone(&context), Arc::clone(&store), until.clone())
            });
        }
        Source::Static { members } => topology::ask(shared, members, stop),
        Source::Rest { members } => topology::ask_by_rest(shared, members, stop),
    }
    Ok(())
}

/// Between the end of a task that must not end and its next run.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// Runs a task without which the proxy would go on with what it knew last; should it end by a fault of ours,
/// that is said and it runs again.
fn keep_running<F: Future<Output = ()> + Send + 'static>(
    task: &'static str,
    stop: &CancellationToken,
    make: impl Fn() -> F + Send + 'static,
) {
    let stop = stop.clone();
    tokio::spawn(async move {
        while let Err(error) = tokio::spawn(make()).await {
            tracing::error!(
                task,
                error = &error as &dyn std::error::Error,
                "task of the proxy ended unexpectedly and is restarted"
            );
            let pause = tokio::time::sleep(AGAIN);
            if stop.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    });
}

fn pool_limits(settings: &ProxySettings) -> impl Iterator<Item = Limits> {
    let (pool, hold_timeout) = (&settings.pool, settings.limits.hold_timeout);
    settings.listeners.iter().map(move |listener| Limits {
        pool_size: listener.pool_size.unwrap_or(pool.size),
        max_servers: listener.max_servers.unwrap_or(pool.max_servers),
        wait_timeout: pool.wait_timeout,
        hold_timeout,
        notice_after: pool.wait_notice,
        idle_timeout: pool.idle_timeout,
    })
}

/// Host name and process id, and a few random letters: several proxies may run in one process.
fn own_name() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{host}-{}-{:04x}", std::process::id(), rand::random::<u16>())
}
