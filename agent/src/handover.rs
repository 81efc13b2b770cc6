//! The planned handover on the old leader's side: prepare, drain, switch, and the way back.
//!
//! One function that lasts as long as the handover, because its steps are milliseconds apart. All
//! that outlives it is in the store: the record with its lease, and the leader key. Whoever dies in
//! the middle leaves a record that ends by itself; what the others then do is `ha::candidate`'s.
//!
//! Time is counted from before each write; a step that comes too late is not taken. See
//! `kornak_cluster::handover` for the phases and SAFETY scenarios A5, A6, A8, A14.

mod error;
pub mod standby_cluster;
mod switch;

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{
    ClusterState, Handover, HandoverPhase, Lsn, Moment, ProxyRegistration, Revision,
};
use kornak_dcs::{Compare, LeaseId, Op, Txn, json};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info, warn};

pub use error::{HandoverError, StuckError};

use crate::citus_tasks::notify::Paused;
use crate::context::Context;
use crate::ha::switchover::{self, Busy, Gate, Refusal};
use crate::ha::{PrimaryFacts, Server, StandbyRow};
use crate::lease::ClaimError;
use crate::postgres::{StartError, StopError, StopMode, Stopped};

/// Lease of the record, and of the leader key from `prepare` on: dying in a handover costs this
/// much, not a whole ttl. etcd's leases cannot be relied on to be much shorter.
pub const SHORT_LEASE: Duration = Duration::from_secs(5);

/// For the checkpoint on both sides; it is written while clients work.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(300);

/// For proxies to ask sessions what they hold, and to log in ahead; they take three seconds for the latter.
const PROXIES_PREPARE: Duration = Duration::from_secs(5);

/// For the candidate to take the released key.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(1);

/// For the candidate to become writable, after which it gives up by itself. One that asks an archive first has longer.
pub const PROMOTE_LIMIT: Duration = Duration::from_secs(5);

/// For a look at the server that was asked for.
const LOOK_LIMIT: Duration = Duration::from_secs(2);

/// A standby is armed within two seconds of streaming.
const PATIENCE: Duration = Duration::from_secs(3);

/// A candidate that has not been streaming for so long is not waited for.
const GONE_FOR: Duration = Duration::from_secs(10);

/// While a drain runs, the server is asked this often who still works.
const POLL: Duration = Duration::from_millis(3);

/// The treatment of transactions that outlast every drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stragglers {
    /// Give the handover up.
    Abort,
    /// End them.
    Terminate,
}

/// The future of a server that has stopped when the candidate does not take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Otherwise {
    /// The server starts again where it is.
    StartInPlace,
    /// The server stays down, for its node is leaving: any member that can may race for the key.
    StayDown,
}

struct Run<'a> {
    ctx: &'a Context,
    otherwise: Otherwise,
    record: Handover,
    lease: LeaseId,
    revision: Revision,
    keep_alive: CancellationToken,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.keep_alive.cancel();
    }
}

/// Hands the leadership over. Returns the new leader's name once it has taken the key.
pub async fn hand_over(
    ctx: &Context,
    asked: Option<&str>,
    drain_timeout: Duration,
    stragglers: Stragglers,
    otherwise: Otherwise,
) -> Result<String, HandoverError> {
    let held = ctx.keeper.held().ok_or(Refusal::NotLeader)?;
    let (cluster, candidate) = choose(ctx, asked, of_primary).await?;
    let mut run = begin(ctx, Some(&candidate), held.epoch).await?;
    run.otherwise = otherwise;
    info!(candidate = %candidate, "switchover begun");
    run.until_drained(&cluster, drain_timeout, stragglers).await?;
    run.switch(&cluster).await?;
    Ok(candidate)
}

/// Chooses the candidate from a look that is made for it. A standby that runs and is not armed yet is
/// waited for a little: what an operator has just seen as streaming should not be refused.
async fn choose(
    ctx: &Context,
    asked: Option<&str>,
    standing: impl Fn(&Context) -> Option<(Vec<StandbyRow>, Lsn)>,
) -> Result<(ClusterState, String), HandoverError> {
    let began = ctx.machine.now();
    loop {
        let looked = ctx.machine.now();
        let mut observed = ctx.observation.clone();
        ctx.signals.look.notify_one();
        let fresh = observed.wait_for(|seen| seen.at >= looked);
        if ctx.machine.timeout(LOOK_LIMIT, fresh).await.is_err() {
            warn!("server gives no fresh answer about its standbys");
        }
        let cluster = ctx.cluster();
        let (rows, lsn) = standing(ctx).ok_or(Refusal::NotLeader)?;
        let refusal = match switchover::candidate(&ctx.name, &cluster, &rows, lsn, asked) {
            Ok(candidate) => return Ok((cluster, candidate)),
            Err(refusal) => refusal,
        };
        let may_pass = matches!(
            refusal,
            Refusal::NotSynchronous
                | Refusal::NoneFit
                | Refusal::NotStreaming { .. }
                // Also of one that streams for a moment only and has not said yet how far it is.
                | Refusal::Behind { .. }
        );
        let others_run = cluster.members.iter().any(|(name, member)| {
            *name != ctx.name && member.state == kornak_cluster::MemberState::Running
        });
        if !may_pass || !others_run || ctx.machine.now().since(began) >= PATIENCE {
            return Err(refusal.into());
        }
        ctx.machine.sleep(PATIENCE / 15).await;
    }
}

/// Restarts the leader's server where it is, with clients held as in a handover. `limit`: for it to take
/// connections again.
pub async fn restart_in_place(
    ctx: &Context,
    drain_timeout: Duration,
    limit: Duration,
) -> Result<(), HandoverError> {
    let held = ctx.keeper.held().ok_or(Refusal::NotLeader)?;
    let mut run = begin(ctx, None, held.epoch).await?;
    info!("restart begun");
    run.until_drained(&ctx.cluster(), drain_timeout, Stragglers::Terminate).await?;
    let stuck = |error: StopError| HandoverError::Stuck(error.into());
    match stop_cleanly(ctx, Duration::from_millis(run.record.switch_hold_ms)).await {
        Some((Stopped::Gone, _)) => {}
        // It archives the rest as soon as it is up again.
        Some((Stopped::Lingers, _)) => ctx.server.end_lingering().await.map_err(stuck)?,
        None => {
            ctx.server.stop(StopMode::Kill, Duration::from_secs(5)).await.map_err(stuck)?;
        }
    }
    let started = start_again(ctx, limit).await;
    run.abandon().await;
    started
}

fn of_primary(ctx: &Context) -> Option<(Vec<StandbyRow>, Lsn)> {
    primary_facts(ctx).map(|facts| (facts.standbys, facts.lsn))
}

fn primary_facts(ctx: &Context) -> Option<PrimaryFacts> {
    match &ctx.observed().server {
        Server::Primary(facts) => Some(facts.clone()),
        _ => None,
    }
}

/// Creates the record on a lease that is kept alive while this handover runs.
async fn begin<'a>(
    ctx: &'a Context,
    candidate: Option<&str>,
    epoch: kornak_cluster::Epoch,
) -> Result<Run<'a>, HandoverError> {
    let granted = ctx.store.grant(SHORT_LEASE).await.map_err(HandoverError::Store)?;
    let settings = &ctx.settings.kornak.handover;
    let record = Handover {
        v: kornak_cluster::member::KORNAK_RECORDS_VERSION,
        id: format!("{:016x}", ctx.machine.random()),
        attempt: 1,
        phase: HandoverPhase::Prepare,
        group: ctx.settings.scope.group,
        leader: ctx.name.clone(),
        candidate: candidate.map(str::to_owned),
        epoch,
        max_hold_ms: millis(settings.max_hold),
        switch_hold_ms: millis(settings.switch_hold),
        wal_end: None,
    };
    let key = ctx.keys.handover();
    let txn = Txn::just(Op::put_leased(&key, json(&record), granted.lease))
        .when(Compare::absent(&key))
        .and(Op::DeletePrefix { prefix: ctx.keys.acks() });
    let outcome = ctx.store.txn(txn).await.map_err(HandoverError::Store)?;
    if !outcome.succeeded {
        return Err(Refusal::Busy.into());
    }
    let keep_alive = keep_alive(ctx, granted.lease);
    let otherwise = Otherwise::StartInPlace;
    Ok(Run { ctx, otherwise, record, lease: granted.lease, revision: outcome.revision, keep_alive })
}

/// Renews the lease of a record until the token is cancelled.
pub fn keep_alive(ctx: &Context, lease: LeaseId) -> CancellationToken {
    let token = CancellationToken::new();
    let (store, stop) = (Arc::clone(&ctx.store), token.clone());
    let machine = ctx.machine.clone();
    let renewals = async move {
        let every = SHORT_LEASE / 5;
        while machine.timeout(every, stop.cancelled()).await.is_err() {
            if let Err(error) = store.keep_alive(lease).await {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "lease of the handover record could not be renewed"
                );
            }
        }
    };
    ctx.machine.spawn(renewals.in_current_span());
    token
}

/// Breaks steps off of which nothing can come any more: they wait for others for minutes, and a leader whose server is
/// down has something better to do meanwhile.
async fn unless_hopeless(
    ctx: &Context,
    candidate: Option<&str>,
    steps: impl Future<Output = Result<(), HandoverError>>,
) -> Result<(), HandoverError> {
    tokio::select! {
        biased;
        done = steps => done,
        why = hopeless(ctx, candidate) => Err(why),
    }
}

/// Waits until the leader's server has ended, or its candidate is gone.
async fn hopeless(ctx: &Context, candidate: Option<&str>) -> HandoverError {
    let mut observed = ctx.observation.clone();
    let mut gone_since = None;
    loop {
        let seen = Arc::clone(&observed.borrow_and_update());
        match &seen.server {
            Server::Stopped | Server::Leftovers => return HandoverError::Ended,
            Server::Primary(facts) => {
                let cluster = ctx.cluster();
                let judged = candidate.map(|name| {
                    let rows = &facts.standbys;
                    switchover::candidate(&ctx.name, &cluster, rows, facts.lsn, Some(name))
                });
                match judged {
                    Some(Err(gone @ (Refusal::Unknown | Refusal::NotStreaming { .. }))) => {
                        let since = *gone_since.get_or_insert(seen.at);
                        if seen.at.since(since) >= GONE_FOR {
                            return gone.into();
                        }
                    }
                    _ => gone_since = None,
                }
            }
            _ => {}
        }
        if observed.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Run<'_> {
    /// From the record to the moment in which nothing runs; or back, as if nothing had been.
    async fn until_drained(
        &mut self,
        cluster: &ClusterState,
        limit: Duration,
        stragglers: Stragglers,
    ) -> Result<(), HandoverError> {
        let steps = async {
            self.prepare(cluster).await?;
            let (ctx, candidate) = (self.ctx, self.record.candidate.clone());
            let steps = async {
                self.proxies_prepare().await;
                self.drain(limit, stragglers).await
            };
            unless_hopeless(ctx, candidate.as_deref(), steps).await
        };
        let drained = steps.await;
        if drained.is_err() {
            self.abandon().await;
        }
        drained
    }

    /// Checkpoints on both sides and a short lease, while clients work on.
    async fn prepare(&mut self, cluster: &ClusterState) -> Result<(), HandoverError> {
        let ctx = self.ctx;
        let candidate = self.record.candidate.as_deref().unwrap_or_default();
        let there = async {
            if let Some(member) = cluster.members.get(candidate)
                && let Err(error) =
                    ctx.peers.post_checkpoint(member.api_base(), CHECKPOINT_LIMIT).await
            {
                // A Patroni candidate does not know the request; its promotion takes longer.
                warn!(
                    error = &error as &dyn std::error::Error,
                    candidate, "candidate made no checkpoint"
                );
            }
        };
        let checkpoints = async {
            let (here, ()) = tokio::join!(ctx.server.checkpoint(), there);
            here.map_err(HandoverError::Checkpoint)?;
            // Not in `switch`: nobody should be held for a script.
            ctx.before_stop().await;
            Ok(())
        };
        unless_hopeless(ctx, self.record.candidate.as_deref(), checkpoints).await?;
        // Not broken off: the key may hang on either lease meanwhile.
        ctx.keeper.move_to(SHORT_LEASE).await.map_err(HandoverError::Lease)
    }

    /// Waits, while everybody works on, until the proxies have done what would hold clients in a drain.
    async fn proxies_prepare(&self) {
        let ctx = self.ctx;
        let mut view = ctx.view.clone();
        let all = async {
            loop {
                view.borrow_and_update();
                let state = ctx.state();
                let told = switchover::have_prepared(&self.record.id, &state.proxies, &state.acks);
                if told || view.changed().await.is_err() {
                    return;
                }
            }
        };
        if ctx.machine.timeout(PROXIES_PREPARE, all).await.is_err() {
            info!("proxy has not acknowledged the preparation, the drain may take longer");
        }
    }

    /// Tries to find a moment in which nothing runs, holding nobody longer than `max_hold` at once.
    async fn drain(
        &mut self,
        limit: Duration,
        stragglers: Stragglers,
    ) -> Result<(), HandoverError> {
        let began = self.ctx.machine.now();
        let max_hold = Duration::from_millis(self.record.max_hold_ms);
        loop {
            let busy = self.wait_for_short_transactions(began, limit, max_hold).await;
            let out_of_time = self.ctx.machine.now().since(began) >= limit;
            if out_of_time && stragglers == Stragglers::Abort {
                return Err(HandoverError::NeverDrained(limit));
            }
            if out_of_time && busy.backends > 0 {
                warn!(backends = busy.backends, "ending transactions that outlast every drain");
                self.ctx.server.terminate_busy().await.map_err(HandoverError::Stragglers)?;
            }
            self.ctx.keeper.renew().await.map_err(HandoverError::Lease)?;
            if self.try_drain(max_hold).await? {
                return Ok(());
            }
            let pause = switchover::pause_after(self.record.attempt);
            info!(
                attempt = self.record.attempt,
                "drain timed out, clients resume; it is tried again"
            );
            crate::citus_tasks::notify::unblock_writes(self.ctx).await;
            self.record.attempt += 1;
            self.record.phase = HandoverPhase::Prepare;
            self.write(Vec::new(), Vec::new()).await?;
            self.ctx.machine.sleep(pause).await;
        }
    }

    async fn wait_for_short_transactions(
        &self,
        began: Moment,
        limit: Duration,
        max_hold: Duration,
    ) -> Busy {
        loop {
            let busy = crate::citus_tasks::notify::busy_anywhere(self.ctx).await;
            if switchover::may_drain(busy, max_hold) || self.ctx.machine.now().since(began) >= limit
            {
                return busy;
            }
            self.ctx.machine.sleep(max_hold / 10).await;
        }
    }

    /// One drain. `Ok(true)`: the record says `switch` and nothing runs.
    async fn try_drain(&mut self, max_hold: Duration) -> Result<bool, HandoverError> {
        let ctx = self.ctx;
        let listing = ctx.store.range(&ctx.keys.proxies()).await.map_err(HandoverError::Store)?;
        let proxies = registrations(&listing, &ctx.keys.proxies());
        let began = ctx.machine.now();
        self.record.phase = HandoverPhase::Drain;
        self.write(Vec::new(), Vec::new()).await?;
        let mut view = ctx.view.clone();
        loop {
            view.borrow_and_update();
            let state = ctx.state();
            let busy = ctx.busy().await;
            let attempt = (self.record.id.as_str(), self.record.attempt);
            match switchover::gate(
                ctx.machine.now(),
                began,
                max_hold,
                attempt,
                &proxies,
                &state.acks,
                busy,
            ) {
                Gate::Open => break,
                Gate::TimeUp => return Ok(false),
                Gate::Waiting => {}
            }
            tokio::select! {
                biased;
                _ = view.changed() => {}
                () = ctx.machine.sleep(POLL) => {}
            }
        }
        self.judge_again()?;
        let Some(held) = ctx.keeper.held() else {
            return Err(HandoverError::Lease(ClaimError::Lost));
        };
        if ctx.machine.now().since(held.proven_at) > held.ttl / 2 {
            return Ok(false);
        }
        let left = (began + max_hold).since(ctx.machine.now());
        if crate::citus_tasks::notify::block_writes(ctx, self.revision, left).await == Paused::No {
            return Ok(false);
        }
        self.record.phase = HandoverPhase::Switch;
        let newcomers =
            Compare::NoneCreatedAfter { prefix: ctx.keys.proxies(), revision: listing.revision };
        let mine = Compare::Lease { key: ctx.keys.leader(), lease: held.lease };
        match self.write(vec![mine, newcomers], Vec::new()).await {
            Ok(()) => {}
            Err(HandoverError::RecordChanged) => {
                // A proxy has come since the listing, or the record is not ours any more; the
                // next write tells which.
                self.record.phase = HandoverPhase::Drain;
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        if ctx.machine.now().since(began) >= max_hold {
            // The answer came too late: the proxies have let their clients go.
            return Ok(false);
        }
        Ok(true)
    }

    /// Checks the candidate again: a standby that was fit when the handover began may have lost its
    /// stream since.
    fn judge_again(&self) -> Result<(), HandoverError> {
        let Some(candidate) = self.record.candidate.as_deref() else { return Ok(()) };
        let ctx = self.ctx;
        let facts = primary_facts(ctx).ok_or(Refusal::NotLeader)?;
        switchover::candidate(
            &ctx.name,
            &ctx.cluster(),
            &facts.standbys,
            facts.lsn,
            Some(candidate),
        )?;
        Ok(())
    }

    /// Removes the record and takes the regular lease again.
    async fn abandon(&mut self) {
        let ctx = self.ctx;
        self.keep_alive.cancel();
        let key = ctx.keys.handover();
        self.remove(Compare::Modified { key, revision: self.revision }).await;
        crate::citus_tasks::notify::unblock_writes(ctx).await;
        let ttl = ctx.cluster().config.clone().unwrap_or_default().ttl;
        if let Err(error) = ctx.keeper.move_to(ttl).await {
            warn!(
                error = &error as &dyn std::error::Error,
                "lease of the configured length could not be taken"
            );
        }
    }

    async fn remove(&self, when: Compare) {
        let keys = &self.ctx.keys;
        let txn = Txn::just(Op::delete(keys.handover()))
            .when(when)
            .and(Op::DeletePrefix { prefix: keys.acks() });
        if let Err(error) = self.ctx.store.txn(txn).await {
            warn!(
                error = &error as &dyn std::error::Error,
                "handover record could not be removed, it ends with its lease"
            );
        }
    }

    /// Writes the record if nobody else has.
    async fn write(&mut self, mut when: Vec<Compare>, also: Vec<Op>) -> Result<(), HandoverError> {
        let key = self.ctx.keys.handover();
        when.push(Compare::Modified { key: key.clone(), revision: self.revision });
        let mut then = vec![Op::put_leased(&key, json(&self.record), self.lease)];
        then.extend(also);
        let txn = Txn { compare: when, then, otherwise: Vec::new() };
        let outcome = self.ctx.store.txn(txn).await.map_err(HandoverError::Store)?;
        if !outcome.succeeded {
            return Err(HandoverError::RecordChanged);
        }
        self.revision = outcome.revision;
        Ok(())
    }
}

/// Stops the server and reads where its log ends; `None` if it did not stop in time, or not cleanly.
async fn stop_cleanly(ctx: &Context, limit: Duration) -> Option<(Stopped, Lsn)> {
    let stopped = match ctx.server.stop_writing(limit).await {
        Ok(stopped) => stopped,
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "server did not stop in time");
            return None;
        }
    };
    match ctx.server.controldata().await {
        Ok(control) => {
            let end = control.shutdown_end();
            if end.is_none() {
                warn!(state = ?control.state, "server did not stop cleanly");
            }
            Some((stopped, end?))
        }
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "control file could not be read");
            None
        }
    }
}

/// Starts the server in place; the next cycle repeats what fails here.
async fn start_again(ctx: &Context, limit: Duration) -> Result<(), HandoverError> {
    crate::starting::stand_alone(ctx).await.map_err(StuckError::from)?;
    crate::starting::start_in_place(ctx, limit).await.map_err(|error| match error {
        StartError::NotReady(limit) => HandoverError::Starting(limit),
        error => StuckError::from(error).into(),
    })
}

/// Clears a manual request that has been carried out or given up; the key is never deleted.
pub fn cluster_failover_cleared(ctx: &Context, cluster: &ClusterState) -> Vec<Op> {
    if cluster.failover.is_empty() { Vec::new() } else { vec![Op::put(ctx.keys.failover(), "{}")] }
}

fn registrations(
    view: &kornak_dcs::View,
    prefix: &str,
) -> std::collections::BTreeMap<String, ProxyRegistration> {
    view.below(prefix)
        .filter_map(|(id, found)| Some((id.to_owned(), serde_json::from_str(&found.value).ok()?)))
        .collect()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
