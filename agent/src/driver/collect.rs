//! Takes the results of jobs and errands into the loop.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterConfig, ClusterState, Leader, Timeline};
use kornak_dcs::{Compare, Op, Reach, Txn};
use tracing::{error, info, warn};

use super::{BACK_OFF, Driver, Errand, LOOK_LIMIT};
use crate::context::Context;
use crate::ha::{DataDir, Job, Server, Snapshot, Store};
use crate::jobs::{JobError, STOP_LIMIT};
use crate::lease::ClaimError;
use crate::peers::Identity;
use crate::postgres::StopMode;

/// Between two tries of an errand that failed, or of a step that could not be taken yet.
const PAUSE: Duration = Duration::from_secs(1);

impl Driver {
    /// Takes in what jobs and errands have brought back.
    pub(super) async fn collect(&mut self) {
        if let Some((job, handle)) = self.job.take_if(|(_, handle)| handle.is_finished()) {
            match handle.await {
                Ok(Ok(())) if job == Job::Restart => self.told_callbacks.lock().restarted(),
                Ok(Ok(())) => {}
                // Nothing has failed here: this node may soon be the candidate of a handover.
                Ok(Err(JobError::Claim(ClaimError::Lost))) if job == Job::Bootstrap => {
                    info!(job = job.as_str(), "leader key was claimed by another node");
                }
                Ok(Err(JobError::NotYet)) => {
                    self.tries.wait(self.ctx.machine.now(), PAUSE);
                    self.wake_after(PAUSE);
                }
                Ok(Err(error)) => {
                    self.ctx.counters.step_failed(job);
                    if job == Job::StartPrimary && matches!(error, JobError::Start(_)) {
                        self.told_callbacks.lock().demoted();
                    }
                    if matches!(job, Job::Promote | Job::Bootstrap | Job::StartPrimary) {
                        self.race_not_before = Some(self.ctx.machine.now() + self.back_off(&error));
                    }
                    let pause = self.tries.failed(self.ctx.machine.now());
                    warn!(
                        job = job.as_str(),
                        error = &error as &dyn std::error::Error,
                        attempts = self.tries.failures(),
                        pause_ms = pause.as_millis(),
                        "step failed"
                    );
                    self.wake_after(pause);
                }
                Err(error) => error!(
                    job = job.as_str(),
                    error = &error as &dyn std::error::Error,
                    "step ended unexpectedly"
                ),
            }
            self.told = None;
            // What the job has changed must be seen before anything is decided from it.
            self.ctx.fresh_look(LOOK_LIMIT).await;
        }
        if let Some(handle) = self.errand.take_if(|handle| handle.is_finished()) {
            match handle.await {
                Ok(Errand::Race(race)) => self.race = Some(race),
                Ok(Errand::Claimed(result)) => self.claimed(result),
                Ok(Errand::Done(_, Err(JobError::TimelineForked { member, timeline }))) => {
                    warn!(node = %member, %timeline, "timeline of this server diverged from the leader's");
                    let ctx = Arc::clone(&self.ctx);
                    self.begin(Job::Rejoin, crate::jobs::rejoin(ctx, Some(member), 0));
                }
                Ok(Errand::Done(what, Err(error))) => {
                    warn!(what, error = &error as &dyn std::error::Error, "step failed");
                    self.errands_not_before = Some(self.ctx.machine.now() + PAUSE);
                    self.wake_after(PAUSE);
                }
                Ok(Errand::Done(_, Ok(()))) => self.ctx.fresh_look(LOOK_LIMIT).await,
                Err(error) => {
                    error!(error = &error as &dyn std::error::Error, "step ended unexpectedly");
                }
            }
        }
    }

    /// No member writes a leader key without a lease, so it would never end. Whoever led before has lost the key by
    /// it, and proves nothing any more: after `ttl` it is deleted.
    pub(super) fn drop_foreign_key(&mut self, s: &Snapshot) {
        let config = s.cluster.config.as_ref();
        let maintained = config.is_some_and(|config| config.pause);
        let leader = s.cluster.leader.as_ref().filter(|leader| leader.lease.is_none());
        let Some(leader) = leader.filter(|_| s.store == Store::Live && !maintained) else {
            self.foreign_key = None;
            return;
        };
        let revision = leader.mod_revision;
        let seen = self.foreign_key.filter(|(known, _)| *known == revision);
        let (_, since) = *self.foreign_key.insert(seen.unwrap_or((revision, s.now)));
        let ttl = config.map_or(ClusterConfig::default().ttl, |config| config.ttl);
        if s.now.since(since) < ttl || self.errand.is_some() || !self.may_run_errand() {
            return;
        }
        warn!(name = %leader.name, "leader key without a lease found and deleted");
        let ctx = Arc::clone(&self.ctx);
        self.run_errand(async move {
            let key = ctx.keys.leader();
            let unchanged = Compare::Modified { key: key.clone(), revision };
            let deleted = ctx.store.txn(Txn::just(Op::delete(key)).when(unchanged)).await;
            Errand::Done(
                "delete a leader key without a lease",
                deleted.map(drop).map_err(JobError::Store),
            )
        });
    }

    /// How long the race is left to others. What the operator's `pre_promote` has refused it would most
    /// likely refuse again.
    fn back_off(&self, error: &JobError) -> Duration {
        match error {
            JobError::Script(_) => self.ctx.cluster().config.unwrap_or_default().ttl,
            _ => BACK_OFF,
        }
    }

    fn claimed(&mut self, result: Result<(), JobError>) {
        match result {
            Ok(()) => {}
            Err(JobError::Claim(ClaimError::Lost)) => {
                info!("leader key was claimed by another node");
            }
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "leader key could not be claimed");
                self.race_not_before = Some(self.ctx.machine.now() + Duration::from_secs(1));
            }
        }
    }

    /// Wakes the driver after `pause`, so that a step that failed is decided on again.
    pub(super) fn wake_after(&self, pause: Duration) {
        let ctx = Arc::clone(&self.ctx);
        self.ctx.machine.spawn(async move {
            ctx.machine.sleep(pause).await;
            ctx.signals.cycle.notify_one();
        });
    }

    /// The store knows the cluster that was made here, and the agent that made it died before it could note so.
    pub(super) async fn finish_first(&mut self) {
        let observation = self.ctx.observed();
        let DataDir::Begun { control, filling: true } = &observation.data else {
            return;
        };
        let known = self.ctx.cluster().initialize;
        if self.job.is_some() || known.as_deref() != Some(control.system_identifier.as_str()) {
            return;
        }
        match self.ctx.postgres.finish_first().await {
            Ok(()) => info!("cluster that was created here is in the store"),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                warn!(error, "completion of the data directory could not be noted");
            }
        }
        self.ctx.fresh_look(LOOK_LIMIT).await;
    }

    pub(super) fn may_run_errand(&self) -> bool {
        self.errands_not_before.is_none_or(|moment| self.ctx.machine.now() >= moment)
    }

    /// After a restart of the agent: the key bears our name, and its lease is noted on our disk. Only the
    /// data directory's primary goes on with it; for a standby it may be the key of a past that was
    /// restored with the store, and it has to win a race as any other.
    pub(super) fn take_up_again(&mut self) {
        let live = self.ctx.view.borrow().reach == Reach::Live;
        if self.ctx.keeper.held().is_some()
            || self.job.is_some()
            || self.errand.is_some()
            || !live
            || !self.may_run_errand()
        {
            return;
        }
        let cluster = self.ctx.state();
        let Some(leader) = cluster.leader.clone() else { return };
        if leader.name != self.ctx.name {
            self.ctx.keeper.follows_another();
            return;
        }
        let observed = self.ctx.observed();
        let is_standby_cluster =
            cluster.config.as_ref().is_some_and(|config| config.standby_cluster.is_some());
        let stopped = match (&observed.server, &observed.data) {
            // The first server of a cluster is being made here, by the holder of the key.
            (Server::Primary(_), _) | (_, DataDir::Begun { .. }) => None,
            (Server::Standby(_), _) if is_standby_cluster => None,
            (Server::Standby(_), _) | (_, DataDir::Empty) => {
                return self.give_back(&cluster, &leader);
            }
            (_, DataDir::Initialized(control)) if control.was_primary || is_standby_cluster => {
                Some(control.timeline)
            }
            (Server::Stopped, DataDir::Initialized(_)) => return self.give_back(&cluster, &leader),
            _ => return,
        };
        let ctx = Arc::clone(&self.ctx);
        self.run_errand(async move {
            if let Some(timeline) = stopped.filter(|_| !is_standby_cluster)
                && somebody_went_on(&ctx, &cluster, timeline).await
            {
                warn!("leader key has our name, but another member has been promoted since");
                let given = ctx.keeper.give_back(leader.lease, leader.epoch).await;
                return Errand::Done("give the leader key back", given.map_err(JobError::Store));
            }
            let taken = ctx.keeper.take_up_again(leader.lease, leader.epoch).await;
            match taken {
                // Not ours: it expires, and is raced for as any other.
                Err(ClaimError::Lost) => {
                    ctx.machine.sleep(Duration::from_millis(500)).await;
                    Errand::Done("take the leadership up again", Ok(()))
                }
                taken => {
                    Errand::Done("take the leadership up again", taken.map_err(JobError::Claim))
                }
            }
        });
    }

    /// After a restart of the agent while the store is away: the guard has what the agent before has left with a
    /// primary whose lease was proven, and the members are asked to let it stay.
    pub(super) fn inherit(&mut self) {
        let away = self.ctx.view.borrow().reach == Reach::Never;
        let now = self.ctx.machine.now();
        let due = self.asked_for_bequest.is_none_or(|at| now.since(at) >= PAUSE);
        if !away || !due || self.job.is_some() || self.errand.is_some() {
            return;
        }
        let cluster = self.ctx.state();
        let on = cluster.config.as_ref().is_some_and(|it| it.failsafe_mode && !it.pause);
        let leads = matches!(self.ctx.observed().server, Server::Primary(_));
        if !on || !leads || self.ctx.keeper.held().is_some() {
            return;
        }
        self.asked_for_bequest = Some(now);
        let ctx = Arc::clone(&self.ctx);
        self.run_errand(async move {
            let inherited = ctx.keeper.inherit(&ctx.board.unproven_failsafe).await;
            let inherited = inherited.map_err(JobError::Claim);
            Errand::Done("take over the leadership of the agent before", inherited)
        });
    }

    /// A key in our name is deleted if it is surely of an earlier life of this node: its lease is noted here,
    /// or it came back with the store's past. Any other ends with its lease.
    fn give_back(&mut self, cluster: &ClusterState, leader: &Leader) {
        if !self.ctx.keeper.remembers(leader.lease) && cluster.rewound == 0 {
            return;
        }
        let (ctx, leader) = (Arc::clone(&self.ctx), leader.clone());
        // An agent that died in a promotion has asked for it, and a server that replays late ends recovery much later:
        // it must not do so once the key is another's.
        let asked = matches!(ctx.observed().server, Server::Standby(_))
            && ctx.keeper.remembers(leader.lease);
        self.run_errand(async move {
            if asked && let Err(error) = ctx.server.stop(StopMode::Kill, STOP_LIMIT).await {
                return Errand::Done("stop a server that may be promoted", Err(error.into()));
            }
            let given = ctx.keeper.give_back(leader.lease, leader.epoch).await;
            // What is deleted has to be seen before it is done once more.
            ctx.machine.sleep(Duration::from_millis(100)).await;
            Errand::Done("give the leader key back", given.map_err(JobError::Store))
        });
    }
}

/// Whether a member answers that is a primary, or on a later timeline than a server that was the leader's
/// when it stopped: then the store's word is of the past.
async fn somebody_went_on(ctx: &Context, cluster: &ClusterState, timeline: Timeline) -> bool {
    let mut members = cluster.members.clone();
    members.remove(&ctx.name);
    let system_identifier = ctx.own_identifier();
    let scope = &ctx.settings.scope.name;
    let identity = Identity { scope, system_identifier: system_identifier.as_deref() };
    let answers = ctx.peers.ask_all(&members, identity, super::racing::PEER_TIMEOUT).await;
    answers.values().flatten().any(|peer| peer.primary || peer.timeline > timeline)
}
