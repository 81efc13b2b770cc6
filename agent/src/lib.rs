//! One agent runs on each database host. It keeps the local PostgreSQL server in the role that the
//! store gives it, and takes part in deciding who leads.
//!
//! A pure core decides ([`ha::decide`]), a thin shell acts (`driver`). Around the loop, each in a
//! task of its own so that none waits for another: the leader's lease ([`lease`]), the look at the
//! server ([`observe`]), the member key ([`publish`]), the leader's housekeeping ([`leading`]),
//! failsafe rounds ([`failsafe_rounds`]), the REST API ([`api`]). Beside it runs the [`guard`], a process that
//! outlives the agent and stops a primary whose lease is not proven.
//!
//! The page to read first is ARCHITECTURE.md, "A failover, told once".

pub mod api;
pub mod board;
pub mod callbacks;
pub mod citus;
mod citus_tasks;
pub mod clock;
pub mod context;
mod counters;
pub mod depose;
mod driver;
pub mod durable;
pub mod failsafe;
pub mod failsafe_rounds;
mod full;
pub mod guard;
pub mod ha;
pub mod handover;
mod instance;
pub mod jobs;
pub mod leading;
pub mod lease;
pub mod machine;
pub mod memory;
mod name_clash;
pub mod node;
pub mod observe;
pub mod peers;
pub mod pledges;
pub mod postgres;
pub mod publish;
pub mod schedule;
mod self_report;
pub mod server;
pub mod slots;
mod starting;
pub mod tls;
mod tries;
mod units;
pub mod watchdog;
mod watchdog_task;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use kornak_config::agent::AgentSettings;
use kornak_dcs::Dcs;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, warn};

use driver::End;
use instance::{Instance, Shown};
pub use instance::{Node, Ports};
use machine::Machine;
use node::{COMMAND_QUEUE, NodeViews};

/// Why an agent could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(
        "listen on {address} for the REST API; is another agent running? choose another restapi.listen"
    )]
    Listen {
        address: String,
        #[source]
        source: std::io::Error,
    },
    #[error("start the guard")]
    Guard(#[from] guard::GuardError),
    #[error("prepare to run the server")]
    Setup(#[from] postgres::SetupError),
    #[error("prepare TLS of the REST API, or of asking other members")]
    Tls(#[from] tls::TlsError),
    #[error(
        "Can't start; there is already a node named '{name}' running at {base}: stop it, or give \
         this one another name"
    )]
    Namesake { name: String, base: String },
    #[error("read the boot id of this host")]
    BootId(#[source] std::io::Error),
}

/// An agent that runs.
#[derive(Debug)]
pub struct Running {
    /// Where the REST API listens.
    pub api: SocketAddr,
    /// The node's knowledge of itself and its cluster.
    pub views: NodeViews,
    /// Takes other settings while it runs.
    pub reloader: Reloader,
    /// Ends when the agent has stopped.
    pub task: JoinHandle<Result<(), RunError>>,
}

/// Whose process the agent runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    /// The agent's own: the guard may end it when the agent is silent, and start it again.
    Own,
    /// Others live there too, so that nobody may end it.
    Shared,
}

/// Runs an agent until `stop`, then hands over, stops the server and returns.
///
/// # Errors
/// The REST address is taken, the guard does not start, or the data directory cannot be prepared.
pub async fn run(
    settings: AgentSettings,
    store: Arc<dyn Dcs>,
    stop: CancellationToken,
) -> Result<(), RunError> {
    let running = start(settings, store, Home::Shared, stop).await?;
    match running.task.await {
        Ok(ended) => ended,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Starts an agent.
///
/// # Errors
/// As [`run`].
pub async fn start(
    settings: AgentSettings,
    store: Arc<dyn Dcs>,
    home: Home,
    stop: CancellationToken,
) -> Result<Running, RunError> {
    let reread = Arc::<Notify>::default();
    let current = Arc::new(ArcSwap::from_pointee(settings));
    let settings = current.load_full();
    if home == Home::Own {
        guard::replace_started(&instance::guard_config(&settings).runtime_dir);
    }
    name_clash::refuse(&settings, &*store).await?;
    let (listener, api) = listen(&settings).await?;
    let (commands_in, mut commands) = mpsc::channel(COMMAND_QUEUE);
    let (store, all) = Shown::first(&Machine::real(), &settings, store, &reread);
    let make = {
        let current = Arc::clone(&current);
        let all = all.clone();
        async move |renew: CancellationToken, renewed| {
            let shown = Shown { renew, renewed, ..all.clone() };
            Instance::new(&current.load_full(), &store, home, shown).await
        }
    };
    let renew = Arc::new(parking_lot::Mutex::new(CancellationToken::new()));
    let first_renewal = renew.lock().clone();
    let first = make(first_renewal, false).await?;
    let (views_in, views) = watch::channel(Arc::new(first.first_view()));
    let api_stop = CancellationToken::new();
    let peers = first.ctx.peers.clone();
    let shown = (all.counters, all.restart_plan, all.citus);
    let (rest, rest_tls) = rest_api(&settings, peers, (views.clone(), commands_in), shown)?;
    let served = api::serve(listener, Arc::clone(&rest), api_stop.clone());
    let reloader = Reloader {
        current: Arc::clone(&current),
        rest,
        rest_tls,
        reread,
        renew: Arc::clone(&renew),
    };
    let span = tracing::info_span!("node", node = %settings.name);
    tokio::spawn(served.instrument(span.clone()));
    let task = tokio::spawn(
        async move {
            let mut instance = first;
            // The server goes on when the agent begins anew: its callbacks have heard of it.
            let told = Arc::default();
            loop {
                let guard = instance.guard;
                let end = instance.live(views_in.clone(), &mut commands, &stop, &told).await;
                let before = Arc::clone(&instance.ctx.settings);
                // The guard serves one agent at a time.
                drop(instance);
                match end {
                    End::Stopped => {
                        api_stop.cancel();
                        wait_for_end(guard).await;
                        return Ok(());
                    }
                    End::LeftRunning => {
                        api_stop.cancel();
                        return Ok(());
                    }
                    End::Renewed => {
                        info!("agent restarts with the changed settings, the server continues");
                    }
                    End::GuardLost => {
                        warn!("agent restarts: the guard is gone and the server with it");
                    }
                }
                let renewed = end == End::Renewed;
                // In force before the settings are read, so that no change of them is missed.
                let token = CancellationToken::new();
                *renew.lock() = token.clone();
                instance = match make(token.clone(), renewed).await {
                    Err(error) if renewed => {
                        error!(
                            error = &error as &dyn std::error::Error,
                            "changed settings cannot be used, the old ones stay in force"
                        );
                        current.store(before);
                        make(token, renewed).await?
                    }
                    made => made?,
                };
            }
        }
        .instrument(span),
    );
    Ok(Running { api, views, reloader, task })
}

async fn listen(settings: &AgentSettings) -> Result<(TcpListener, SocketAddr), RunError> {
    let address = settings.restapi.listen.to_string();
    let failed = |source| RunError::Listen { address: address.clone(), source };
    let port = settings.restapi.listen.port;
    let host = settings.restapi.listen.hosts.first().map_or("*", String::as_str);
    let listener = match host {
        // Of both kinds, where this host has IPv6.
        "*" => {
            let (v6, v4) = (Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into());
            TcpListener::bind(&[SocketAddr::new(v6, port), SocketAddr::new(v4, port)][..]).await
        }
        host => TcpListener::bind((host, port)).await,
    };
    let listener = listener.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Patroni's default, and fine where nobody else reaches the port.
fn warn_if_open(settings: &AgentSettings) {
    use kornak_config::agent::VerifyClient;
    let rest = &settings.restapi;
    let verified = rest.tls.as_ref().is_some_and(|tls| tls.verify_client != VerifyClient::None);
    let listed = !rest.allowlist.is_empty() || rest.allowlist_include_members;
    if rest.authentication.is_none() && !listed && !verified {
        warn!(
            listen = %rest.listen,
            "the REST API is open: whoever reaches it may change the configuration, switch over and \
             reinitialize; set restapi.authentication, restapi.allowlist or restapi.verify_client"
        );
    }
}

/// The REST API as the settings have it, and its certificates.
fn rest_api(
    settings: &AgentSettings,
    peers: peers::Peers,
    (views, commands): (NodeViews, node::Commands),
    (counters, restart_plan, citus): (
        Arc<counters::Counters>,
        schedule::RestartPlan,
        Option<Arc<citus::Desk>>,
    ),
) -> Result<(Arc<api::Api>, Option<Arc<tls::RestTls>>), tls::TlsError> {
    warn_if_open(settings);
    let rest_tls = settings.restapi.tls.as_ref().map(tls::RestTls::new).transpose()?.map(Arc::new);
    let made = api::ApiSettings::new(settings, peers, rest_tls.clone(), Machine::real());
    let settings = api::ApiSettings { counters, restart_plan, citus, ..made };
    Ok((Arc::new(api::Api::new(views, commands, settings)), rest_tls))
}

/// Puts other settings in force while the agent runs.
#[derive(Debug, Clone)]
pub struct Reloader {
    current: Arc<ArcSwap<AgentSettings>>,
    rest: Arc<api::Api>,
    rest_tls: Option<Arc<tls::RestTls>>,
    reread: Arc<Notify>,
    /// Of the instance that runs.
    renew: Arc<parking_lot::Mutex<CancellationToken>>,
}

impl Reloader {
    /// Returns when somebody has asked, by `POST /reload`, for the file to be read again.
    pub async fn wanted(&self) {
        self.reread.notified().await;
    }

    /// Takes what can change without a restart; the answer names the keys that cannot.
    ///
    /// # Errors
    /// A certificate cannot be used: then nothing changes.
    pub fn reload(&self, new: AgentSettings) -> Result<Vec<&'static str>, tls::TlsError> {
        let old = self.current.load_full();
        let (merged, waiting) = kornak_config::reload::agent(&old, new);
        let peers = peers::Peers::new(&merged.ctl)?;
        if let (Some(tls), Some(settings)) = (&self.rest_tls, &merged.restapi.tls) {
            tls.reload(settings)?;
        }
        let settings =
            api::ApiSettings::new(&merged, peers, self.rest_tls.clone(), Machine::real());
        self.rest.reload(&settings);
        // Files of certificates may have changed where the settings have not.
        if merged.ctl.certfile.is_some() || !kornak_config::reload::is_same(&old, &merged) {
            self.current.store(Arc::new(merged));
            self.renew.lock().cancel();
        }
        Ok(waiting)
    }
}

/// A guard without a server and without an agent is of no use; this bridges the restart of an agent.
const GUARD_LINGER: Duration = Duration::from_millis(300);

/// For the store to hear that this node leaves. What it has not heard by then ends with its lease.
pub(crate) const FAREWELL: Duration = Duration::from_secs(3);

/// After a requested stop, waits until the guard has exited too.
async fn wait_for_end(process: u32) {
    let proc = PathBuf::from(format!("/proc/{process}"));
    let gone = async {
        while proc.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(GUARD_LINGER + Duration::from_secs(5), gone).await.is_err() {
        warn!(guard = process, "guard still runs, it ends when its server does");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_address_is_listened_on_under_patronis_names_for_it() {
        for text in ["'*:8008'", "':8008'"] {
            let text = format!(
                "scope: demo\nname: a\nrestapi: {{listen: {text}, connect_address: '127.0.0.1:8008'}}\n\
                 etcd3: {{hosts: ['x:1']}}\npostgresql:\n  listen: 127.0.0.1:1\n  data_dir: /nowhere\n  \
                 authentication: {{replication: {{username: r}}}}\n"
            );
            let environment = [("PATRONI_CONFIGURATION".to_owned(), text)];
            let mut settings = kornak_config::load_agent(None, &environment).unwrap().settings;
            settings.restapi.listen.port = 0;
            let (_listener, bound) = listen(&settings).await.unwrap();
            assert!(bound.ip().is_unspecified(), "{bound}");
            tokio::net::TcpStream::connect(("127.0.0.1", bound.port())).await.unwrap();
        }
    }
}
