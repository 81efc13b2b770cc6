//! The loop: look, decide, show, apply, wait. It has hands and no opinions: no `if` on a role or a
//! lease lives here that is not [`decide`]'s.
//!
//! A step that takes long is a job, one at a time; a step that asks somebody is an errand, one at a
//! time as well. Neither keeps the loop from looking.

mod collect;
mod commands;
mod deposing;
mod planned;
mod racing;

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterConfig, ClusterState, Revision};
use kornak_dcs::Reach;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info, warn};

use crate::callbacks;
use crate::context::Context;
use crate::guard::Watched;
use crate::ha::{
    Action, DataDir, Decision, Job, Lease, Race, Server, Snapshot, Store, Why, decide,
};
use crate::jobs::{self, JobError};
use crate::machine::Task;
use crate::node::{Command, NodeView};
use crate::publish::Account;
use crate::tries::Tries;
pub(crate) use planned::Asked;

/// For a look at what a step has changed.
const LOOK_LIMIT: Duration = Duration::from_secs(3);

/// A node whose attempt to lead failed leaves the race to others for so long.
const BACK_OFF: Duration = Duration::from_secs(5);

/// Upper bound of the time out of the race, which grows with each further failure from [`BACK_OFF`] on.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(60);

/// Between two words to the guard about a primary that somebody else has started.
const ADOPTED_EVERY: Duration = Duration::from_secs(1);

/// Between two comparisons of a standby without a stream with its leader.
const COMPARE_EVERY: Duration = Duration::from_secs(10);

/// The state of the loop between cycles: running steps and answers that came back, nothing that
/// the next agent after a crash would miss.
pub(crate) struct Driver {
    pub(crate) ctx: Arc<Context>,
    views: watch::Sender<Arc<NodeView>>,
    account: watch::Sender<Option<Account>>,
    job: Option<(Job, Task<Result<(), JobError>>)>,
    errand: Option<Task<Errand>>,
    race: Option<Race>,
    race_not_before: Option<kornak_cluster::Moment>,
    lost_since: Option<kornak_cluster::Moment>,
    leaderless_since: Option<kornak_cluster::Moment>,
    /// A leader key that hangs on no lease: its revision, and since when it was seen.
    foreign_key: Option<(Revision, kornak_cluster::Moment)>,
    dcs_last_seen: u64,
    told: Option<(Action, Why)>,
    /// Whether the log has said, since the last leader was gone, that the other members are asked.
    told_asking: bool,
    cycles: u64,
    config_applied: Option<ClusterConfig>,
    /// The state that the callbacks were last told.
    told_callbacks: Arc<parking_lot::Mutex<callbacks::Told>>,
    /// Steps that failed, and when they are tried again.
    tries: Tries,
    /// When the guard was last asked what the agent before has left.
    asked_for_bequest: Option<kornak_cluster::Moment>,
    /// As above, of what is asked of others.
    errands_not_before: Option<kornak_cluster::Moment>,
    /// Attempts to lead in a row that were given up.
    given_up: u32,
    /// When the guard was last told that a primary which somebody else started may stay.
    adopted_at: Option<kornak_cluster::Moment>,
    /// Start of the server that was last asked which parameters wait for a restart.
    asked_server: Option<String>,
    /// When a standby whose stream is broken was last compared with its leader.
    compared_at: Option<kornak_cluster::Moment>,
}

/// The result of an errand.
enum Errand {
    Race(Race),
    Claimed(Result<(), JobError>),
    Done(&'static str, Result<(), JobError>),
}

impl Driver {
    pub(crate) fn new(
        ctx: Arc<Context>,
        views: watch::Sender<Arc<NodeView>>,
        account: watch::Sender<Option<Account>>,
        told_callbacks: Arc<parking_lot::Mutex<callbacks::Told>>,
    ) -> Self {
        Self {
            ctx,
            views,
            account,
            job: None,
            errand: None,
            race: None,
            race_not_before: None,
            lost_since: None,
            leaderless_since: None,
            foreign_key: None,
            dcs_last_seen: 0,
            told: None,
            told_asking: false,
            cycles: 0,
            config_applied: None,
            compared_at: None,
            tries: Tries::default(),
            asked_for_bequest: None,
            errands_not_before: None,
            given_up: 0,
            adopted_at: None,
            asked_server: None,
            told_callbacks,
        }
    }

    /// Runs until `stop` (then hands over and stops the server) or until the guard is lost.
    pub(crate) async fn drive(
        mut self,
        commands: &mut mpsc::Receiver<Command>,
        stop: CancellationToken,
    ) -> End {
        let mut view = self.ctx.view.clone();
        let mut observed = self.ctx.observation.clone();
        let mut held = self.ctx.keeper.subscribe();
        let mut process = self.ctx.guard.watch();
        // Nothing may be decided about a data directory that has not been looked at.
        tokio::select! {
            biased;
            () = stop.cancelled() => return End::Stopped,
            _ = observed.wait_for(|seen| seen.at > kornak_cluster::Moment::default()) => {}
        }
        loop {
            view.borrow_and_update();
            observed.borrow_and_update();
            held.borrow_and_update();
            if *process.borrow_and_update() == Watched::Lost {
                self.abort();
                return End::GuardLost;
            }
            self.collect().await;
            self.finish_first().await;
            if self.ctx.signals.renew.is_cancelled() && self.job.is_none() && self.errand.is_none()
            {
                return End::Renewed;
            }
            self.take_up_again();
            self.inherit();
            self.hear_of_the_end().await;
            let snapshot = self.look();
            self.keep_adopted(&snapshot).await;
            self.drop_foreign_key(&snapshot);
            self.apply_config(&snapshot.cluster);
            self.ask_what_is_pending();
            self.call_back(&snapshot.server, snapshot.job);
            let decision = decide(&snapshot);
            self.tell(&decision, &snapshot);
            self.show(&decision, &snapshot);
            self.apply(&decision, &snapshot.cluster);
            let pause = self.requested(&snapshot, &decision);
            tokio::select! {
                biased;
                () = stop.cancelled() => return self.shut_down().await,
                Some(command) = commands.recv() => self.obey(command).await,
                _ = view.changed() => {}
                _ = observed.changed() => {}
                _ = held.changed() => {}
                _ = process.changed() => {}
                () = self.ctx.signals.renew.cancelled(), if !self.ctx.signals.renew.is_cancelled() => {}
                () = self.ctx.signals.cycle.notified() => {}
                () = self.ctx.machine.sleep(pause) => {}
            }
        }
    }

    /// Runs the callbacks for what has changed.
    fn call_back(&self, server: &Server, job: Option<Job>) {
        let leads = self.ctx.leads_standby_cluster();
        let changes = self.told_callbacks.lock().changes(server, job, leads);
        for (action, role) in changes {
            self.ctx.callbacks.call(action, role);
        }
    }

    fn look(&mut self) -> Snapshot {
        let now = self.ctx.machine.now();
        let view = Arc::clone(&self.ctx.view.borrow());
        let cluster = self.ctx.state();
        let store = match view.reach {
            Reach::Never if cluster.initialize.is_none() => Store::Never,
            Reach::Never => Store::Remembered { since: *self.lost_since.get_or_insert(now) },
            Reach::Live => {
                self.lost_since = None;
                self.dcs_last_seen = crate::clock::unix_seconds();
                Store::Live
            }
            Reach::Lost => Store::Lost { since: *self.lost_since.get_or_insert(now) },
        };
        if store == Store::Live {
            self.ctx.memory.keep_seen(&cluster, self.ctx.own_identifier().as_deref());
        }
        let creating = self.job.as_ref().is_some_and(|(job, _)| *job == Job::Bootstrap);
        self.ctx.board.creating.store(creating, std::sync::atomic::Ordering::Relaxed);
        if cluster.leader.is_some() {
            self.race = None;
        }
        let open = store == Store::Live
            && cluster.leader.is_none()
            && cluster.config.as_ref().is_some_and(|config| !config.pause);
        self.leaderless_since = open.then(|| self.leaderless_since.unwrap_or(now));
        let observation = self.ctx.observed();
        self.tries.saw(&observation.server, &cluster, now);
        Snapshot {
            now,
            observed_at: observation.at,
            me: self.ctx.name.clone(),
            tags: self.ctx.settings.tags.clone(),
            store,
            cluster,
            data: observation.data.clone(),
            server: observation.server.clone(),
            lease: self.ctx.keeper.fact(),
            job: self.job.as_ref().map(|(job, _)| *job),
            race: self.race.clone(),
            promise_until: self.ctx.promises.until(),
            confirmed: self.ctx.board.failsafe_active.load(std::sync::atomic::Ordering::Relaxed),
            leaderless_since: self.leaderless_since,
            race_not_before: self.race_not_before,
            lacks_slots: !self.ctx.board.slots_to_copy.lock().is_empty(),
            lacks_watchdog: !self.ctx.watchdog.is_able(),
            clones_alone: self.ctx.settings.postgresql.clones_alone(),
            failed_starts: self.tries.failures(),
            store_is_full: self.ctx.store_is_full(),
            deposing: self.deposing(),
            stop_budget: self.ctx.settings.kornak.guard.stop_budget,
        }
    }

    /// Puts a changed dynamic configuration into force.
    fn apply_config(&mut self, cluster: &ClusterState) {
        let Some(config) = &cluster.config else { return };
        self.ctx.memory.keep(cluster, self.ctx.own_identifier().as_deref());
        if self.config_applied.as_ref() == Some(config) {
            return;
        }
        let first = self.config_applied.replace(config.clone()).is_none();
        self.ctx.server.set_dynamic(config);
        let server = Arc::clone(&self.ctx.server);
        self.ctx.machine.spawn_blocking(move || server.show_dynamic());
        if first && !self.ctx.renewed {
            return;
        }
        info!("dynamic configuration changed");
        let ctx = Arc::clone(&self.ctx);
        self.ctx.machine.spawn(async move {
            if let Err(error) = ctx.reload().await {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "changed dynamic configuration could not be applied"
                );
            }
            ctx.signals.look.notify_one();
        });
    }

    /// A server that was started again waits for other parameters than before, or for none.
    fn ask_what_is_pending(&mut self) {
        let Some(status) = self.ctx.observed().status.clone() else { return };
        let started = Some(&status.postmaster_start_time);
        if self.config_applied.is_none() || self.asked_server.as_ref() == started {
            return;
        }
        self.asked_server = started.cloned();
        let ctx = Arc::clone(&self.ctx);
        self.ctx.machine.spawn(async move {
            match ctx.server.pending_restart().await {
                Ok(pending) => ctx.note_pending(pending),
                Err(error) => warn!(
                    error = &error as &dyn std::error::Error,
                    "parameters that wait for a restart could not be read"
                ),
            }
        });
    }

    fn tell(&mut self, decision: &Decision, snapshot: &Snapshot) {
        self.cycles += 1;
        self.ctx.counters.decided(decision);
        // In a race that nobody wins yet the members are asked again and again.
        let asks = decision.action == Action::AskPeers;
        self.told_asking &= snapshot.cluster.leader.is_none();
        if asks && std::mem::replace(&mut self.told_asking, true) {
            return;
        }
        let now = (decision.action.clone(), decision.why);
        let same = self.told.as_ref().is_some_and(|(action, why)| {
            *action == now.0 && std::mem::discriminant(why) == std::mem::discriminant(&now.1)
        });
        if same {
            return;
        }
        let leader = snapshot.cluster.leader.as_ref().map_or("none", |leader| leader.name.as_str());
        if decision.why == Why::DataDirUnusable
            && let DataDir::Foreign { reason } = &snapshot.data
        {
            error!(why = decision.why.as_str(), reason = %reason, "data directory needs an operator");
        }
        if decision.why == Why::WrongSystemIdentifier
            && let DataDir::Initialized(control) = &snapshot.data
        {
            error!(
                why = decision.why.as_str(),
                found = %control.system_identifier,
                expected = snapshot.cluster.initialize.as_deref().unwrap_or("none"),
                "data directory belongs to another cluster and is left alone: move it away or correct the scope"
            );
        }
        let lost = matches!((&decision.action, &snapshot.data), (Action::Wait, DataDir::Empty))
            && decision.why == Why::WaitingForLeader
            && snapshot.cluster.leader.is_none();
        if lost {
            warn!(
                why = decision.why.as_str(),
                "the store knows this cluster, the data directory here is empty and nobody leads: start a \
                 member that has the data, or have the cluster forgotten (kornak remove) to begin a new one"
            );
        } else if let Why::UnfencedUnheard { left } = decision.why {
            let node = snapshot.cluster.unfenced.as_ref().map(|mark| mark.member.as_str());
            warn!(
                node,
                left_ms = left.as_millis(),
                why = decision.why.as_str(),
                "no failover possible"
            );
        } else if decision.action != Action::Refuse {
            let action = &decision.action;
            info!(action = ?action, why = decision.why.as_str(), leader, "decided");
        }
        if let Some(text) = crate::ha::rival::in_patronis_words(snapshot, decision.why) {
            info!("{text}");
        }
        self.told = Some(now);
    }

    fn show(&self, decision: &Decision, snapshot: &Snapshot) {
        // What the instance before has shown holds until this one has proven the lease again; if it
        // cannot, what is shown ends with the lease by itself.
        let taking_up_again = self.ctx.renewed && decision.why == Why::LeaseBeingProven;
        if taking_up_again && self.views.borrow().leads {
            return;
        }
        let view = crate::self_report::view(&crate::self_report::Shown {
            ctx: &self.ctx,
            snapshot,
            decision,
            observation: &self.ctx.observed(),
            dcs_last_seen: self.dcs_last_seen,
            cycles: self.cycles,
        });
        let account = crate::self_report::member(&self.ctx, &view);
        self.views.send_replace(Arc::new(view));
        self.account.send_if_modified(|old| {
            let changed = old.as_ref() != Some(&account);
            if changed {
                *old = Some(account);
            }
            changed
        });
    }

    fn apply(&mut self, decision: &Decision, cluster: &Arc<ClusterState>) {
        let ctx = Arc::clone(&self.ctx);
        match decision.action.clone() {
            Action::CopySlots => {
                let missing = std::mem::take(&mut *self.ctx.board.slots_to_copy.lock());
                self.begin(Job::Restart, jobs::copy_slots(ctx, missing));
            }
            Action::Lead => self.given_up = 0,
            Action::Wait | Action::Refuse => {}
            Action::Look => self.ctx.signals.look.notify_one(),
            Action::Bootstrap => self.begin(Job::Bootstrap, jobs::bootstrap(ctx)),
            Action::Clone { from } => self.begin(Job::Clone, jobs::clone(ctx, from)),
            Action::Rejoin { leader } => {
                if self.may_rejoin(decision.why) {
                    let failed = self.tries.failures();
                    self.begin(Job::Rejoin, jobs::rejoin(ctx, leader, failed));
                }
            }
            Action::StartPrimary => self.begin(Job::StartPrimary, jobs::start_primary(ctx)),
            Action::Promote => self.begin(Job::Promote, jobs::promote(ctx)),
            Action::Demote { immediate } => {
                if self.job.as_ref().is_some_and(|(job, _)| *job != Job::Demote) {
                    self.abort();
                }
                let gives_up = ctx.keeper.held().is_some() && decision.why != Why::StillStopping;
                if gives_up && self.job.is_none() {
                    self.leave_to_others();
                }
                self.begin(Job::Demote, jobs::demote(ctx, immediate, decision.why));
            }
            Action::Pledge(of) => self.pledge(of, cluster),
            Action::EndPledge => self.end_pledge(),
            Action::Depose => self.depose(cluster),
            Action::AskPeers => self.ask_peers(),
            Action::Claim { take_over } => {
                let cluster = Arc::clone(cluster);
                self.run_errand(async move {
                    Errand::Claimed(jobs::claim(ctx, cluster, take_over).await)
                });
            }
            Action::Follow { upstream } if self.may_run_errand() => self.run_errand(async move {
                Errand::Done("follow the leader", jobs::follow(ctx, upstream).await)
            }),
            Action::Follow { .. } => {}
            Action::DemoteCluster => self.begin(Job::Demote, jobs::demote_cluster(ctx)),
            Action::CloneWithoutLeader => self.begin(Job::Clone, jobs::clone_without_leader(ctx)),
            Action::Release => {
                if self.errand.is_none()
                    && let Some(held) = ctx.keeper.let_go()
                {
                    self.leave_to_others();
                    self.run_errand(async move {
                        Errand::Done("release the leader key", jobs::release(ctx, held).await)
                    });
                }
            }
        }
    }

    /// This node has given the key up: others have the first go, for longer each time.
    fn leave_to_others(&mut self) {
        let pause = BACK_OFF * (1 << self.given_up.min(4));
        self.given_up = self.given_up.saturating_add(1);
        let not_before = Some(self.ctx.machine.now() + pause.min(LONGEST_BACK_OFF));
        self.race_not_before = self.race_not_before.max(not_before);
    }

    /// Says why a server has ended that nobody told to, and when it is started again.
    async fn hear_of_the_end(&mut self) {
        let Some(ended) = self.ctx.server.ended_by_itself().await else { return };
        let (exit, log, said) = (ended.exit, ended.log.display(), &ended.said);
        match self.tries.ended(self.ctx.machine.now()) {
            None => warn!(pid = ended.pid, %exit, %log, said, "server ended by itself"),
            Some(pause) => {
                warn!(
                    pid = ended.pid, %exit, %log, said, attempts = self.tries.failures(),
                    pause_ms = pause.as_millis(),
                    "server ended while it started, it is started again after a pause: fix the cause that its log gives"
                );
                self.wake_after(pause);
            }
        }
    }

    /// A primary that somebody else has started is stopped after a while. While the store shows the leader
    /// key under this node's name nobody else can take it, so it may wait for the key to be proven, or to
    /// end and be claimed.
    async fn keep_adopted(&mut self, s: &Snapshot) {
        if !self.ctx.server.has_adopted_a_primary() {
            return;
        }
        if s.lease != Lease::None || matches!(s.server, Server::Stopped | Server::Standby(_)) {
            return self.ctx.server.forget_adoption();
        }
        let ours = s.cluster.leader.as_ref().is_some_and(|leader| leader.name == s.me);
        let due = self.adopted_at.is_none_or(|at| s.now.since(at) >= ADOPTED_EVERY);
        if ours && due && s.store == Store::Live {
            self.adopted_at = Some(s.now);
            let ttl = s.cluster.config.clone().unwrap_or_default().ttl;
            if let Err(error) = self.ctx.guard.arm(s.now + ttl).await {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "guard could not extend the deadline of the adopted server"
                );
            }
        }
    }

    /// A stream that does not come up is compared with the leader again and again, at a pace that
    /// neither of the two servers notices.
    fn may_rejoin(&mut self, why: Why) -> bool {
        if why != Why::ReplicationBroken {
            return true;
        }
        let now = self.ctx.machine.now();
        let due = self.compared_at.is_none_or(|at| now.since(at) >= COMPARE_EVERY);
        if due && self.job.is_none() {
            self.compared_at = Some(now);
        }
        due
    }

    fn begin(
        &mut self,
        job: Job,
        work: impl Future<Output = Result<(), JobError>> + Send + 'static,
    ) {
        let can_wait = matches!(job, Job::Bootstrap | Job::Clone | Job::Rejoin | Job::StartPrimary);
        if self.job.is_some() || (can_wait && !self.tries.may(self.ctx.machine.now())) {
            return;
        }
        let handle = self.spawn_and_look(work);
        if job == Job::Bootstrap {
            self.ctx.board.creating.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        self.job = Some((job, handle));
    }

    fn run_errand(&mut self, work: impl Future<Output = Errand> + Send + 'static) {
        if self.errand.is_some() {
            return;
        }
        self.errand = Some(self.spawn_and_look(work));
    }

    /// Runs `work` in a task, and has the node looked at and decided about when it has ended.
    fn spawn_and_look<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let ctx = Arc::clone(&self.ctx);
        let work = async move {
            let result = work.await;
            ctx.signals.look.notify_one();
            ctx.signals.cycle.notify_one();
            result
        };
        self.ctx.machine.spawn(work.in_current_span())
    }

    pub(crate) fn abort(&mut self) {
        if let Some((_, handle)) = self.job.take() {
            handle.abort();
        }
    }

    async fn obey(&mut self, command: Command) {
        commands::obey(self, command).await;
    }

    pub(crate) fn busy_with(&self) -> Option<Job> {
        self.job.as_ref().map(|(job, _)| *job)
    }

    pub(crate) fn start_job(
        &mut self,
        job: Job,
        work: impl Future<Output = Result<(), JobError>> + Send + 'static,
    ) {
        self.tries.asked();
        self.begin(job, work);
    }
}

/// Why the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// As asked, and nothing runs any more.
    Stopped,
    /// As asked; in maintenance mode the server goes on without its agent.
    LeftRunning,
    /// The agent begins anew with other settings; the server goes on.
    Renewed,
    /// The guard is gone, and with it the server; everything starts anew.
    GuardLost,
}
