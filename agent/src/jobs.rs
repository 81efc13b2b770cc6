//! The steps that take longer than a cycle: each a function that does one thing from wherever the
//! node stands, and that may be killed at any point and run again.
//!
//! Not here: which step is taken, and when; that is [`crate::ha`]'s.

mod joining;
mod making;
mod settle;
mod stray;

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterState, HandoverPhase, SyncMode, SyncState};
use kornak_dcs::{Compare, DcsError, Op, Txn};
use tracing::{Instrument, info, warn};

use crate::citus_tasks::notify;
use crate::context::Context;
use crate::guard::Fencing;
use crate::ha::{Server, Why};
use crate::handover::{self, HandoverError, PROMOTE_LIMIT, SHORT_LEASE};
use crate::lease::{ClaimError, Held, Keeper};
use crate::machine::Machine;
use crate::postgres::{
    BootstrapError, CallbackAction, CloneError, ConfigureError, ControlDataError, PromoteError,
    RewindError, ScriptError, SourceError, SqlError, StartAs, StartError, StopError, StopMode,
    ToolError,
};
use crate::starting::{StandAloneError, stand_alone, start_in_place};
use kornak_dcs::json;

/// How long a server may take to stop in an orderly way before it is killed.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(60);

/// For a server to end that was told to end at once: it kills what is left of itself after 5 s.
const IMMEDIATE_LIMIT: Duration = Duration::from_secs(7);

/// For the kernel to end what was killed, before the key of a dead server is left to its lease.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// The key of a server that does not serve is deleted even if the store hesitates.
const RELEASES: u32 = 3;
const RELEASE_PAUSE: Duration = Duration::from_millis(500);

/// How long a new or restarted server may take to come up.
const START_LIMIT: Duration = Duration::from_secs(300);

/// For a changed `synchronous_standby_names` to be in force before a promotion.
const NAMES_LIMIT: Duration = Duration::from_secs(3);

/// A script that fills a new cluster may take its time.
const SCRIPT_LIMIT: Duration = Duration::from_secs(3600);

pub use joining::{copy_slots, demote_cluster, follow, rejoin};
pub use making::{bootstrap, clone, clone_without_leader, prove_copy, reinitialize};
pub use stray::look_at_stray;

/// Why a step failed; the next cycle decides anew from what is then observed.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("create the cluster")]
    Bootstrap(#[from] BootstrapError),
    #[error("copy the leader's server")]
    Clone(#[from] CloneError),
    #[error("configure the server")]
    Configure(#[from] ConfigureError),
    #[error("look at the data directory")]
    ControlData(#[from] ControlDataError),
    #[error("run a script of the operator's")]
    Script(#[from] ScriptError),
    #[error("restart")]
    Restart(#[from] HandoverError),
    #[error("promote")]
    Promote(#[from] PromoteError),
    #[error("compare with the leader")]
    Rewind(#[from] RewindError),
    #[error("start")]
    Start(#[from] StartError),
    #[error("stop")]
    Stop(#[from] StopError),
    #[error("ask the server")]
    Sql(#[from] SqlError),
    #[error("the leader key could not be claimed")]
    Claim(#[from] ClaimError),
    #[error("the store refused")]
    Store(#[from] DcsError),
    #[error("the configuration in the store makes no sense, and no good one is known")]
    ConfigUnknown,
    #[error("name no synchronous standbys")]
    StandAlone(#[from] StandAloneError),
    #[error("the watchdog that is required could not be switched on")]
    NoWatchdog,
    #[error("timeline {timeline} of {member} diverged from ours")]
    TimelineForked { member: String, timeline: kornak_cluster::Timeline },
    #[error("the stream from a leader that seems lost does not end")]
    StreamGoesOn,
    #[error("no copy of the leader's server can be made")]
    Source(#[from] SourceError),
    #[error("note how far the new cluster has come")]
    Note(#[from] ToolError),
    #[error("the copy has ended after it was started: see {log}")]
    EndedAgain { log: std::path::PathBuf },
    #[error("{member} is not known in the store")]
    NoMember { member: String },
    /// No failure: a moment later it will do.
    #[error("waiting for the new leader's checkpoint")]
    NotYet,
    #[error("the guard")]
    Guard(#[from] crate::guard::GuardError),
    #[error(
        "the data directory has diverged from the leader and pg_rewind failed; reinitialize this \
         member, or set postgresql.remove_data_directory_on_rewind_failure"
    )]
    Diverged {
        #[source]
        source: RewindError,
    },
    #[error(
        "the data directory has diverged from the leader and use_pg_rewind is off; reinitialize \
         this member, or set postgresql.remove_data_directory_on_diverged_timelines"
    )]
    DivergedForGood,
}

/// The leader's server is down and nobody else can do better: start it where it is. The keeper has
/// armed the guard.
pub async fn start_primary(ctx: Arc<Context>) -> Result<(), JobError> {
    let limit = ctx.cluster().config.clone().unwrap_or_default().primary_start_timeout;
    stand_alone(&ctx).await?;
    info!("starting the leader's server in place");
    let mut started = start_in_place(&ctx, limit).await;
    while matches!(started, Err(StartError::NotReady(_)))
        && !crate::ha::candidate::somebody_may_take_over(&ctx.name, &ctx.cluster())
    {
        // Giving the key up would help nobody: recovery goes on.
        started = ctx.server.wait_ready(limit.max(Duration::from_secs(1))).await;
    }
    let Err(error) = started else { return Ok(()) };
    if matches!(error, StartError::Sql(_)) || matches!(ctx.observed().server, Server::Closed { .. })
    {
        // It is up, for everybody but the agent.
        warn!(error = &error as &dyn std::error::Error, "server refuses the agent's login");
        return Ok(());
    }
    warn!(error = &error as &dyn std::error::Error, "leader's server does not start");
    ctx.server.stop(StopMode::Kill, STOP_LIMIT).await?;
    if let Some(held) = ctx.keeper.let_go() {
        ctx.callbacks.call(CallbackAction::RoleChange, crate::callbacks::DEMOTED);
        delete_key(&ctx, held, Vec::new()).await?;
    }
    ctx.guard.disarm().await?;
    Err(error.into())
}

/// Deletes the leader key, which is not renewed any more. [`crate::lease`] says so once it is done. A step that is
/// broken off here has let the key go already, so the key is deleted whatever becomes of the step.
async fn delete_key(ctx: &Context, held: Held, also: Vec<Op>) -> Result<(), JobError> {
    let (keeper, machine) = (ctx.keeper.clone(), ctx.machine.clone());
    let deleting = async move { delete_let_go(&keeper, &machine, held, also).await };
    ctx.machine.spawn(deleting.in_current_span()).await.unwrap_or(Ok(()))
}

async fn delete_let_go(
    keeper: &Keeper,
    machine: &Machine,
    held: Held,
    also: Vec<Op>,
) -> Result<(), JobError> {
    for left in (0..RELEASES).rev() {
        match keeper.release_held(held, Vec::new(), also.clone()).await {
            Ok(true) => break,
            Ok(false) => {
                info!("leader key was not ours any more");
                break;
            }
            // The keeper has taken the leadership back, and the server may serve by it already.
            Err(error @ DcsError::Full { .. }) => return Err(error.into()),
            Err(error) if left == 0 => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "leader key could not be deleted, it ends with its lease"
                );
                return Err(error.into());
            }
            Err(_) => machine.sleep(RELEASE_PAUSE).await,
        }
    }
    Ok(())
}

/// The key is ours and proven: make the server primary.
pub async fn promote(ctx: Arc<Context>) -> Result<(), JobError> {
    let began = ctx.machine.now();
    let planned = planned_for(&ctx);
    let limit = match planned && !ctx.server.asks_an_archive().await {
        true => PROMOTE_LIMIT,
        false => Duration::from_secs(60),
    };
    if let Some(command) = &ctx.settings.postgresql.pre_promote
        && let Err(error) = ctx.postgres.run_script(command, &[], limit).await
    {
        warn!(error = &error as &dyn std::error::Error, "pre_promote forbids the promotion");
        return Err(error.into());
    }
    // A key that was taken up again after a restart was not claimed, and others may still be named.
    stand_alone(&ctx).await?;
    let config = ctx.cluster().config.ok_or(JobError::ConfigUnknown)?;
    if !config.pause && !ctx.watchdog.activate(config.ttl) {
        return Err(JobError::NoWatchdog);
    }
    if ctx.keeper.is_unfenced() {
        // It has led a standby cluster, where there was nothing to guard.
        ctx.keeper.fence().await?;
    } else if !planned {
        // The guard may have been disarmed since the claim, by a start as a standby.
        ctx.keeper.renew().await?;
    }
    if config.sync_mode() != SyncMode::Off && config.synchronous_mode_strict {
        // No commit before a standby is there to wait for.
        let names = crate::ha::sync::names_at_promotion(&config);
        ctx.server.set_synchronous_standby_names(&names, NAMES_LIMIT).await?;
    }
    info!(planned, "promotion begun");
    match ctx.server.promote(Fencing::Armed, limit).await {
        Ok(promoted) => {
            info!(timeline = %promoted.timeline, elapsed_ms = elapsed_ms(&ctx, began), "promotion completed");
            ctx.signals.look.notify_one();
            finish_handover(&ctx, planned).await;
            Ok(())
        }
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "promotion failed");
            give_up(&ctx, planned).await?;
            Err(error.into())
        }
    }
}

fn planned_for(ctx: &Context) -> bool {
    ctx.cluster().handover.is_some_and(|record| {
        record.phase == HandoverPhase::Promote && record.candidate.as_deref() == Some(&ctx.name)
    })
}

async fn finish_handover(ctx: &Arc<Context>, planned: bool) {
    if !planned {
        let ctx = Arc::clone(ctx);
        // Nobody is held for it.
        let machine = ctx.machine.clone();
        machine.spawn(async move { notify::unblock_writes(&ctx).await });
        return;
    }
    let cluster = ctx.cluster();
    let revision = match (&ctx.settings.citus, cluster.handover.clone()) {
        (Some(_), Some(record)) => settle::until_registered(ctx, &cluster, record).await,
        _ => cluster.handover_revision,
    };
    let key = ctx.keys.handover();
    let mut txn = Txn::just(Op::delete(&key))
        .when(Compare::Modified { key, revision })
        .and(Op::DeletePrefix { prefix: ctx.keys.acks() });
    txn.then.extend(handover::cluster_failover_cleared(ctx, &cluster));
    if let Err(error) = ctx.store.txn(txn).await {
        warn!(
            error = &error as &dyn std::error::Error,
            "handover record could not be removed, it ends with its lease"
        );
    }
    take_regular_lease(ctx, &cluster).await;
}

async fn take_regular_lease(ctx: &Context, cluster: &ClusterState) {
    let ttl = cluster.config.clone().unwrap_or_default().ttl;
    if let Err(error) = ctx.keeper.move_to(ttl).await {
        warn!(
            error = &error as &dyn std::error::Error,
            "lease of the configured length could not be taken"
        );
    }
}

/// The server could not be made writable: nobody may think that it was, then somebody else may try.
async fn give_up(ctx: &Context, planned: bool) -> Result<(), JobError> {
    ctx.server.stop(StopMode::Kill, STOP_LIMIT).await?;
    let also = left_by_candidate(ctx, planned).await;
    if let Some(held) = ctx.keeper.let_go() {
        delete_key(ctx, held, also).await?;
    }
    ctx.guard.disarm().await?;
    Ok(())
}

/// The changes that a candidate that gives up writes with the release, so that the old leader can
/// continue.
async fn left_by_candidate(ctx: &Context, planned: bool) -> Vec<Op> {
    let cluster = ctx.cluster();
    let Some(record) = cluster.handover.as_ref().filter(|_| planned) else { return Vec::new() };
    let mut also = vec![Op::delete(ctx.keys.handover())];
    let synchronous =
        cluster.config.as_ref().is_some_and(|config| config.sync_mode() != SyncMode::Off);
    // Once the control file says so, the server may have taken a commit that nobody else has.
    let never_writable =
        ctx.server.controldata().await.is_ok_and(|control| control.state.is_recovery());
    if synchronous && never_writable {
        let sync = SyncState::new(&record.leader, std::slice::from_ref(&ctx.name));
        also.push(Op::put(ctx.keys.sync(), json(&sync)));
    }
    also
}

/// Stops the server and every process of it, and gives up the key if it is held.
pub async fn demote(ctx: Arc<Context>, immediate: bool, why: Why) -> Result<(), JobError> {
    if why == Why::StillStopping {
        return end_what_lingers(&ctx).await;
    }
    warn!(why = why.as_str(), immediate, "stopping the server");
    let deaf = matches!(ctx.observed().server, Server::Silent { .. });
    let (mode, limit) = match (deaf, immediate) {
        // A postmaster that hangs hears no request.
        (true, true) => (StopMode::Kill, KILL_LIMIT),
        (false, true) => (StopMode::Immediate, IMMEDIATE_LIMIT),
        (_, false) => (StopMode::Fast, ctx.settings.kornak.guard.stop_budget),
    };
    if let Err(error) = ctx.server.stop(mode, limit).await {
        warn!(error = &error as &dyn std::error::Error, "server did not stop and is killed");
        if let Err(error) = ctx.server.stop(StopMode::Kill, KILL_LIMIT).await {
            // On a disk that hangs a killed process ends when the disk answers. It runs no further, and the
            // guard goes on killing; the key may end.
            if matches!(error, StopError::StillRunning(_)) && ctx.keeper.let_go().is_some() {
                warn!("killed processes do not end: the leader key is left to its lease");
            }
            return Err(error.into());
        }
    }
    ctx.guard.disarm().await?;
    if let Some(held) = ctx.keeper.let_go() {
        // Unproven: the store may well be away, and must not hold the rest up.
        let machine = ctx.machine.clone();
        machine.spawn(async move { delete_key(&ctx, held, Vec::new()).await });
    }
    Ok(())
}

/// The server has shut down, as its control file proves; the archiver may still be at work.
async fn end_what_lingers(ctx: &Context) -> Result<(), JobError> {
    let config = ctx.cluster().config.unwrap_or_default();
    if config.sync_mode() != SyncMode::Off && config.synchronous_mode_strict {
        // Commits on the new primary may wait for this node to follow.
        ctx.server.end_lingering().await?;
    } else {
        ctx.server.end_in_time().await?;
    }
    if ctx.keeper.held().is_none() {
        ctx.guard.disarm().await?;
    }
    Ok(())
}

/// Creates the leader key for this node, if `cluster` is what the store holds still: that is what was decided on.
/// Another one may have led and acknowledged since.
pub async fn claim(
    ctx: Arc<Context>,
    cluster: Arc<ClusterState>,
    take_over: bool,
) -> Result<(), JobError> {
    let config = cluster.config.clone().unwrap_or_default();
    if ctx.keeper.is_unfenced() {
        // Of an earlier leadership in maintenance mode; nothing is held, so nothing is renewed.
        if let Err(error) = ctx.keeper.fence().await {
            let error = &error as &dyn std::error::Error;
            tracing::debug!(error, "no lease to renew after maintenance mode");
        }
    }
    let mut when = Vec::new();
    let mut also = Vec::new();
    if config.sync_mode() != SyncMode::Off {
        // From now on nobody else has what this node will accept.
        when.push(Compare::Modified { key: ctx.keys.sync(), revision: cluster.sync_revision });
    }
    // A primary that takes its own key again has been waiting for the same standbys all along.
    let goes_on = matches!(ctx.observed().server, Server::Primary(_))
        && cluster.sync.as_ref().and_then(|sync| sync.leader.as_deref()) == Some(&ctx.name);
    if config.sync_mode() != SyncMode::Off {
        // Written in any case: what members have answered before this leadership counts for nothing after it, which
        // they see by the key's revision.
        let sync = match &cluster.sync {
            Some(sync) if goes_on => sync.clone(),
            _ => SyncState::new(&ctx.name, &[]),
        };
        also.push(Op::put(ctx.keys.sync(), json(&sync)));
    }
    let writes_sync = !also.is_empty();
    let record = cluster.handover.clone().filter(|_| take_over);
    let ttl = if take_over { SHORT_LEASE } else { config.ttl };
    if record.is_some() {
        let key = ctx.keys.handover();
        when.push(Compare::Modified { key, revision: cluster.handover_revision });
    }
    let key = ctx.keys.handover();
    let epoch = ctx
        .keeper
        .claim(cluster.store, ttl, when, |lease| {
            let promote = record.map(|record| {
                let record = kornak_cluster::Handover { phase: HandoverPhase::Promote, ..record };
                Op::put_leased(key, json(&record), lease)
            });
            also.into_iter().chain(promote).collect()
        })
        .await?;
    if writes_sync {
        ctx.board.sync_writes.lock().claimed(epoch.revision);
    }
    Ok(())
}

/// Gives the key up with a server that is no primary.
pub async fn release(ctx: Arc<Context>, held: Held) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let mut also = left_by_candidate(&ctx, planned_for(&ctx)).await;
    also.extend(handover::cluster_failover_cleared(&ctx, &cluster));
    delete_key(&ctx, held, also).await?;
    ctx.guard.disarm().await?;
    Ok(())
}

/// Stops and starts the server in its role. `limit`: for it to take connections.
pub async fn restart(ctx: Arc<Context>, limit: Option<Duration>) -> Result<(), JobError> {
    let patience = ctx.cluster().config.unwrap_or_default().primary_start_timeout;
    let limit = limit.unwrap_or(patience);
    let leads = matches!(ctx.observed().server, Server::Primary(_));
    if ctx.keeper.held().is_some() && leads {
        let drain_timeout = ctx.settings.kornak.handover.drain_timeout;
        handover::restart_in_place(&ctx, drain_timeout, limit).await?;
    } else {
        ctx.stop_in_order(STOP_LIMIT).await?;
        let upstream = joining::own_upstream(&ctx, &ctx.cluster())?;
        ctx.server.start(&StartAs::Standby(upstream)).await?;
        ctx.server.wait_ready(limit).await?;
    }
    ctx.board.pending_restart.lock().take();
    Ok(())
}

fn elapsed_ms(ctx: &Context, began: kornak_cluster::Moment) -> u64 {
    u64::try_from(ctx.machine.now().since(began).as_millis()).unwrap_or(u64::MAX)
}
