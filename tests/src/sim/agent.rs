//! The agents of a world: the shipped one, over the world's ports ([`super::ports`]).

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::Request;
use kornak_agent::api::Api;
use kornak_agent::lease::Keeper;
use kornak_agent::machine::Machine;
use kornak_agent::peers::Peers;
use kornak_agent::postgres::{Options, Postgres};
use kornak_agent::{Node, Ports, guard};
use kornak_cluster::{Moment, Scope};
use kornak_config::agent::AgentSettings;
use kornak_dcs::{Reach, View};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::exec::ProcessId;
use super::host::name_of;
use super::net::End;
use super::ports::{Carrier, Guard, Life, Local, Server, Store, pledge_file, promise_file};
use super::scenario::Mutation;
use super::world::{Stall, World};

/// A store that says nothing for so long is away.
const SILENCE: Duration = Duration::from_secs(3);

/// The cluster's name.
pub const SCOPE: &str = "world";

/// One life of an agent.
pub struct Agent {
    pub process: ProcessId,
    pub api: Arc<Api>,
    pub keeper: Keeper,
    /// The state that the store has shown to the agent.
    pub view: watch::Sender<Arc<View>>,
    heard: Cell<Moment>,
}

/// Settings in the file of each host's agent; files are read once for all worlds.
fn settings(index: usize) -> AgentSettings {
    thread_local! {
        static READ: std::cell::RefCell<BTreeMap<usize, AgentSettings>> = const {
            std::cell::RefCell::new(BTreeMap::new())
        };
    }
    let read = |index: usize| {
        let name = name_of(index);
        let text = format!(
            "{{scope: {SCOPE}, name: {name}, etcd3: {{hosts: ['store:1']}}, watchdog: {{mode: 'off'}}, \
             restapi: {{listen: '0.0.0.0:8008', connect_address: '{name}:8008'}}, \
             postgresql: {{listen: '0.0.0.0:5432', connect_address: '{name}:5432', data_dir: /nowhere, \
             authentication: {{superuser: {{username: s}}, replication: {{username: r}}}}}}}}"
        );
        let environment = [("PATRONI_CONFIGURATION".to_owned(), text)];
        let read = kornak_config::load_agent(None, &environment);
        let mut settings = read.expect("the text makes sense").settings;
        settings.scope = Scope::new("sim", SCOPE, None);
        // Nothing is ever run as anybody.
        "root".clone_into(&mut settings.kornak.os_user);
        settings
    };
    READ.with_borrow_mut(|known| known.entry(index).or_insert_with(|| read(index)).clone())
}

/// Starts the agent of a host that is up.
pub fn start(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    if !host.up.get() || host.agent.borrow().is_some() {
        return;
    }
    let process = w.exec.process();
    host.agent_process.set(process);
    if w.plan.mutation == Some(Mutation::PromiseNotDurable) {
        host.disk.borrow_mut().files.remove(&promise_file());
    }
    if w.plan.mutation == Some(Mutation::PledgeNotDurable) {
        host.disk.borrow_mut().files.remove(&pledge_file());
    }
    let mut settings = settings(index);
    settings.tags = w.plan.tags[index].clone();
    settings.kornak.failover.suspect_after = w.plan.suspect_after;
    if w.plan.mutation == Some(Mutation::KeepaliveIsProof) {
        settings.kornak.guard.margin = Duration::ZERO;
    }
    let (view, _) = watch::channel(Arc::new(View::empty()));
    let life = Life { host: index, process };
    let ports = Ports {
        machine: Machine::new(Local(life)),
        store: Arc::new(Store { life, view: view.subscribe() }),
        guard: Arc::new(Guard { life, watched: host.watched.subscribe() }),
        server: Arc::new(Server::new(life)),
        postgres: unused(&settings),
        peers: Peers::over(Carrier(life)),
        files: PathBuf::from("/files"),
        boot_id: format!("boot-{}", host.clock.borrow().boot),
    };
    let node = Node::new(&Arc::new(settings), ports);
    let agent = Rc::new(Agent {
        process,
        api: Arc::clone(node.api()),
        keeper: node.keeper().clone(),
        view,
        heard: Cell::new(Moment::default()),
    });
    host.agent.replace(Some(Rc::clone(&agent)));
    if host.frozen.get() {
        w.exec.freeze(process);
    }
    w.say(index, format_args!("agent starts"));
    let span = tracing::info_span!("", at = %host.name);
    w.exec.spawn(process, node.live(CancellationToken::new()).instrument(span));
    w.exec.spawn(process, listen(Rc::clone(w), agent));
    if w.plan.mutation == Some(Mutation::ListGrowsOverTheMembersHeads) {
        w.exec.spawn(process, super::ports::lets_the_list_grow(Rc::clone(w), life));
    }
    if w.plan.mutation == Some(Mutation::LostLeaseRenewed) {
        w.exec.spawn(process, super::ports::renews_what_is_lost(Rc::clone(w), life));
    }
}

/// A shipped server without a data directory: questions that the model does not know would go to it.
fn unused(settings: &AgentSettings) -> Postgres {
    let options = Options {
        name: settings.name.clone(),
        cluster_name: settings.scope.name.clone(),
        settings: settings.postgresql.clone(),
        citus: false,
        os_user: settings.kornak.os_user.clone(),
        guard: guard::GuardConfig::new(&settings.postgresql.data_dir),
        first_ttl: Duration::from_secs(30),
    };
    Postgres::new(options).expect("nothing is touched yet")
}

/// SIGKILL of the agent; guard and server go on.
pub fn kill(w: &Rc<World>, index: usize) {
    let host = &w.hosts[index];
    if let Some(agent) = host.agent.take() {
        w.say(index, format_args!("agent KILLED"));
        w.exec.kill(agent.process);
    }
}

/// The store's watch shows something, or a sign of life.
pub fn show(w: &Rc<World>, index: usize, shown: Arc<View>) {
    let Some(agent) = w.hosts[index].agent.borrow().clone() else { return };
    let there = Rc::clone(w);
    w.exec.spawn(agent.process, async move {
        agent.heard.set(there.exec.now());
        let known = Arc::clone(&agent.view.borrow());
        let stall = there.stalled.borrow().get(&End::Host(index)).copied();
        if stall == Some(Stall::Held) && known.reach == Reach::Live {
            return;
        }
        // Following begins with a linearizable reading, whichever member of the store is asked.
        let first = known.reach == Reach::Never;
        let shown = if first { there.store.shown().view } else { shown };
        let shown = super::ports::as_shown(&there, index, shown);
        if known.reach == Reach::Never || shown.revision > known.revision {
            agent.view.send_replace(shown);
        } else if known.reach == Reach::Lost {
            agent.view.send_replace(Arc::new(View { reach: Reach::Live, ..View::clone(&known) }));
        }
    });
}

/// Notices when the store falls silent.
async fn listen(w: Rc<World>, agent: Rc<Agent>) {
    loop {
        let heard = agent.heard.get();
        let silent = w.exec.now().since(heard);
        if silent < SILENCE {
            w.exec.sleep(SILENCE - silent).await;
            continue;
        }
        let known = Arc::clone(&agent.view.borrow());
        if known.reach == Reach::Live {
            agent.view.send_replace(Arc::new(View { reach: Reach::Lost, ..View::clone(&known) }));
        }
        w.exec.sleep(Duration::from_millis(100)).await;
    }
}

/// An operator asks the leader for a switchover.
pub fn switch_over(w: &Rc<World>, candidate: Option<&str>) {
    for host in &w.hosts {
        let Some(agent) = host.agent.borrow().clone() else { continue };
        if agent.keeper.held().is_none() {
            continue;
        }
        let body = json!({"leader": host.name, "candidate": candidate}).to_string();
        let request = Request::post("/switchover").body(Bytes::from(body));
        let Ok(request) = request else { return };
        let there = Rc::clone(w);
        let index = host.index;
        w.exec.spawn(agent.process, async move {
            let answer = agent.api.answer(request).await;
            there.say(index, format_args!("switchover: {}, {}", answer.status, answer.text()));
        });
        return;
    }
}
