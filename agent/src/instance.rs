//! One life of an agent: its parts made from ports, and run side by side.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::join_all;
use kornak_cluster::ClusterConfig;
use kornak_config::agent::AgentSettings;
use kornak_dcs::Dcs;
use kornak_dcs::keys::Keys;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, warn};

use crate::board::{Board, Signals};
use crate::context::Context;
use crate::depose::suspicion;
use crate::driver::{Driver, End};
use crate::failsafe::Promises;
use crate::guard::{Guard, GuardClient, GuardConfig};
use crate::lease::Keeper;
use crate::machine::{Boxed, Machine, Task};
use crate::node::{COMMAND_QUEUE, Command, NodeView};
use crate::observe::Observation;
use crate::peers::Peers;
use crate::pledges::{self, Pledges, Suspicion};
use crate::postgres::{Options, Postgres};
use crate::server::Server;
use crate::{
    FAREWELL, GUARD_LINGER, Home, RunError, api, callbacks, citus, citus_tasks, counters,
    failsafe_rounds, full, guard, ha, leading, memory, observe, postgres, publish, schedule,
    self_report, watchdog, watchdog_task,
};

/// The state that an instance shares with those before and after it.
#[derive(Clone)]
pub(crate) struct Shown {
    /// Ends the instance when the settings have changed.
    pub(crate) renew: CancellationToken,
    pub(crate) counters: Arc<counters::Counters>,
    pub(crate) restart_plan: schedule::RestartPlan,
    pub(crate) citus: Option<Arc<citus::Desk>>,
    pub(crate) reread: Arc<Notify>,
    pub(crate) memory: Arc<memory::Memory>,
    pub(crate) full: Arc<std::sync::atomic::AtomicBool>,
    pub(crate) renewed: bool,
}

impl Shown {
    /// For the first instance; with the store as all of them see it.
    pub(crate) fn first(
        machine: &Machine,
        settings: &AgentSettings,
        store: Arc<dyn Dcs>,
        reread: &Arc<Notify>,
    ) -> (Arc<dyn Dcs>, Self) {
        let (store, full) = full::Noticing::over(store);
        let data_dir = &settings.postgresql.data_dir;
        let runtime_dir = GuardConfig::new(data_dir).runtime_dir;
        let shown = data_dir.join(postgres::DYNAMIC);
        let first = ClusterConfig::from_json(settings.bootstrap.dcs.clone());
        let file = runtime_dir.join("dynamic.json");
        let memory = memory::Memory::load(machine.clone(), file, &shown, first);
        let citus = settings.citus.as_ref();
        let shown = Self {
            renew: CancellationToken::new(),
            counters: Arc::default(),
            restart_plan: schedule::RestartPlan::default(),
            citus: citus.map(|citus| Arc::new(citus::Desk::new(&citus.databases))),
            reread: Arc::clone(reread),
            memory: Arc::new(memory),
            full,
            renewed: false,
        };
        (store, shown)
    }
}

/// The machine, guard, server and store that an agent works with. The simulation has its own.
#[derive(Debug)]
pub struct Ports {
    pub machine: Machine,
    pub store: Arc<dyn Dcs>,
    pub guard: Arc<dyn Guard>,
    pub server: Arc<dyn Server>,
    /// For what is not asked of `server`.
    pub postgres: Postgres,
    pub peers: Peers,
    /// Where the small files lie that outlive the agent.
    pub files: PathBuf,
    /// Names the boot of this host.
    pub boot_id: String,
}

/// An agent of one life over any ports, with its REST API but without a listener for it.
pub struct Node {
    instance: Instance,
    api: Arc<api::Api>,
    views: watch::Sender<Arc<NodeView>>,
    commands: mpsc::Receiver<Command>,
}

impl Node {
    /// Nothing runs yet.
    pub fn new(settings: &Arc<AgentSettings>, ports: Ports) -> Self {
        let machine = ports.machine.clone();
        let peers = ports.peers.clone();
        let store = Arc::clone(&ports.store);
        let (store, shown) = Shown::first(&machine, settings, store, &Arc::default());
        let rest = api::ApiSettings::new(settings, peers, None, machine);
        let instance = Instance::over(settings, Ports { store, ..ports }, shown);
        let (views, shown) = watch::channel(Arc::new(instance.first_view()));
        let (orders, commands) = mpsc::channel(COMMAND_QUEUE);
        Self { instance, api: Arc::new(api::Api::new(shown, orders, rest)), views, commands }
    }

    /// The API that answers the other members.
    pub fn api(&self) -> &Arc<api::Api> {
        &self.api
    }

    /// The keeper of the leader key.
    pub fn keeper(&self) -> &Keeper {
        &self.instance.ctx.keeper
    }

    /// Lives until `stop`, or until the guard is lost.
    pub async fn live(mut self, stop: CancellationToken) {
        let told = Arc::default();
        self.instance.live(self.views, &mut self.commands, &stop, &told).await;
    }
}

/// Which guard the settings mean.
pub(crate) fn guard_config(settings: &AgentSettings) -> GuardConfig {
    let mut config = GuardConfig::new(&settings.postgresql.data_dir);
    config.stop_budget = settings.kornak.guard.stop_budget;
    config.linger = GUARD_LINGER;
    if let Some(dir) = &settings.kornak.state_dir {
        config.runtime_dir = dir.join("guard");
    }
    config
}

/// Tells the guard that this agent lives, for as long as nobody has asked it to end.
fn beats(
    ctx: &Arc<Context>,
    guard: GuardClient,
    stop: CancellationToken,
    over: CancellationToken,
) -> impl Future<Output = ()> + Send + use<> {
    let (keeper, observed) = (ctx.keeper.clone(), ctx.observation.clone());
    let leads = move || {
        keeper.held().is_some() && matches!(observed.borrow().server, ha::Server::Primary(_))
    };
    guard::beat(guard, ctx.settings.kornak.guard.agent_timeout, leads, stop, over)
}

/// One life of an agent: from finding its guard to losing it, or to other settings.
pub(crate) struct Instance {
    pub(crate) ctx: Arc<Context>,
    /// Process id of the guard.
    pub(crate) guard: u32,
    /// The guard, if it is to hear that this process lives.
    beats_to: Option<GuardClient>,
    observation: watch::Sender<Arc<Observation>>,
    /// Feeds `ctx.view`.
    _follow: kornak_dcs::Follow,
}

impl Instance {
    /// On this machine.
    pub(crate) async fn new(
        settings: &Arc<AgentSettings>,
        store: &Arc<dyn Dcs>,
        home: Home,
        shown: Shown,
    ) -> Result<Self, RunError> {
        let config = guard_config(settings);
        let postgres = Postgres::new(Options {
            name: settings.name.clone(),
            cluster_name: settings.scope.name.clone(),
            settings: settings.postgresql.clone(),
            citus: settings.citus.is_some(),
            os_user: settings.kornak.os_user.clone(),
            guard: config.clone(),
            first_ttl: ClusterConfig::from_json(settings.bootstrap.dcs.clone()).ttl,
        })?;
        let guard = postgres.guard().await?;
        let guard_pid = guard.pid();
        let beats_to = (home == Home::Own).then(|| guard.clone());
        postgres.settle().await;
        if guard.locked_kib() == Some(0) {
            warn!(
                "the guard's memory could not be locked: a disk that hangs might keep it from \
                 stopping the server; raise the limit (LimitMEMLOCK=infinity in the unit)"
            );
        }
        let boot_id =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(RunError::BootId)?;
        let ports = Ports {
            machine: Machine::real(),
            store: Arc::clone(store),
            guard: Arc::new(guard),
            server: Arc::new(postgres.clone()),
            postgres,
            peers: Peers::new(&settings.ctl)?,
            files: config.runtime_dir,
            boot_id: boot_id.trim().to_owned(),
        };
        let mut instance = Self::over(settings, ports, shown);
        instance.guard = guard_pid;
        instance.beats_to = beats_to;
        info!(guard = guard_pid, "agent started");
        Ok(instance)
    }

    /// Over any ports.
    fn over(settings: &Arc<AgentSettings>, ports: Ports, shown: Shown) -> Self {
        let Shown { renew, counters, restart_plan, citus, reread, memory, full, renewed } = shown;
        let Ports { machine, store, guard, server, postgres, peers, files, boot_id } = ports;
        let callbacks = postgres::Callbacks::new(
            settings.postgresql.callbacks.clone(),
            &settings.scope.name,
            postgres.os_user().cloned(),
        );
        let keys = Keys::new(&settings.scope);
        let follow = store.follow(keys.root());
        let keeper = Keeper::new(
            &settings.name,
            machine.clone(),
            Arc::clone(&store),
            keys.clone(),
            Arc::clone(&guard),
            settings.kornak.guard.margin,
            files.join("leader-lease"),
        );
        let keeper = keeper.renewing(pledges::renews_every(settings.kornak.failover.suspect_after));
        let promises =
            Promises::load(machine.clone(), files.join("promise"), boot_id, machine.now());
        let pledges = Pledges::load(machine.clone(), files.join("fence"));
        let (observation, observed) = watch::channel(Arc::new(Observation::none()));
        let ctx = Arc::new(Context {
            name: settings.name.clone(),
            machine,
            settings: Arc::clone(settings),
            store,
            keys,
            view: follow.subscribe(),
            server,
            postgres,
            guard,
            keeper,
            peers,
            promises,
            pledges,
            suspicion: Suspicion::default(),
            observation: observed,
            memory,
            callbacks,
            counters,
            restart_plan,
            watchdog: watchdog::Watchdog::new(settings.watchdog.clone()),
            citus,
            board: Board { full, ..Board::default() },
            signals: Signals { reread, renew, ..Signals::default() },
            renewed,
        });
        Self { ctx, guard: 0, beats_to: None, observation, _follow: follow }
    }

    /// The view that is shown before the first cycle.
    pub(crate) fn first_view(&self) -> NodeView {
        self_report::before_first_cycle(&self.ctx)
    }

    pub(crate) async fn live(
        &self,
        views: watch::Sender<Arc<NodeView>>,
        commands: &mut mpsc::Receiver<Command>,
        stop: &CancellationToken,
        told: &Arc<parking_lot::Mutex<callbacks::Told>>,
    ) -> End {
        let ctx = &self.ctx;
        let (account_in, account) = watch::channel(None);
        let over = CancellationToken::new();
        let keeper = ctx.keeper.clone();
        let keeper_over = over.clone();
        let span = tracing::Span::current();
        let mut tasks: Vec<Task<()>> = Vec::new();
        let mut run = |work: Boxed<()>| {
            tasks.push(ctx.machine.spawn(work.instrument(span.clone())));
        };
        run(Box::pin(async move { keeper.run(keeper_over).await }));
        if let Some(guard) = &self.beats_to {
            run(Box::pin(beats(ctx, guard.clone(), stop.clone(), over.clone())));
        }
        run(Box::pin(observe::run(
            ctx.machine.clone(),
            Arc::clone(&ctx.server),
            Arc::clone(&ctx.guard),
            Arc::clone(&ctx.signals.look),
            self.observation.clone(),
            over.clone(),
        )));
        run(Box::pin(publish::run(
            ctx.machine.clone(),
            Arc::clone(&ctx.store),
            ctx.keys.clone(),
            ctx.name.clone(),
            account,
            ctx.view.clone(),
            over.clone(),
        )));
        let (server, bounded) = (Arc::clone(&ctx.server), over.clone());
        run(Box::pin(async move { server.keep_log_bounded(bounded).await }));
        run(Box::pin(watchdog_task::run(Arc::clone(ctx), over.clone())));
        run(Box::pin(leading::run(Arc::clone(ctx), over.clone())));
        run(Box::pin(failsafe_rounds::run(Arc::clone(ctx), over.clone())));
        run(Box::pin(suspicion::run(Arc::clone(ctx), over.clone())));
        run(Box::pin(citus_tasks::run(Arc::clone(ctx), over.clone())));
        let driver = Driver::new(Arc::clone(ctx), views, account_in, Arc::clone(told));
        let end = driver.drive(commands, stop.clone()).await;
        over.cancel();
        if end != End::Stopped {
            join_all(tasks).await;
        } else if ctx.machine.timeout(FAREWELL, join_all(&mut tasks)).await.is_err() {
            tasks.iter().for_each(Task::abort);
            warn!("store does not answer, this node's keys end with their leases");
        }
        end
    }
}
