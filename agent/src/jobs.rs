//! The steps that take longer than a cycle: each a function that does one thing from wherever the
//! node stands, and that may be killed at any point and run again.
//!
//! Not here: which step is taken, and when; that is [`crate::ha`]'s.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterConfig, ClusterState, HandoverPhase, SyncMode, SyncState};
use kornak_config::agent::BootstrapMethod;
use kornak_dcs::lease::leader_checks;
use kornak_dcs::{Compare, Op, Txn};
use tracing::{info, warn};

use crate::context::Context;
use crate::guard::{Fencing, boottime_now};
use crate::ha::{Server, Why};
use crate::handover::{self, HandoverError, PROMOTE_LIMIT, SHORT_LEASE, json};
use crate::lease::{ClaimError, Held};
use crate::postgres::{
    BootstrapError, CloneError, ConfigureError, ControlDataError, LocalEnd, PromoteError,
    RewindError, RewindNeed, ScriptError, ServerProcess, SqlError, StartAs, StartError, StopError,
    StopMode, Upstream, rewind_need,
};

/// How long a server may take to stop in an orderly way before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How long a new or restarted server may take to come up.
const START_LIMIT: Duration = Duration::from_secs(300);

/// A script that fills a new cluster may take its time.
const SCRIPT_LIMIT: Duration = Duration::from_secs(3600);

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
    Store(#[from] kornak_dcs::DcsError),
    #[error("the synchronous standbys in the store have changed meanwhile")]
    SyncChanged,
    #[error("{member} is not known in the store")]
    NoMember { member: String },
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

/// Creates the cluster: claims the key, so that nobody else does, then makes a data directory.
pub async fn bootstrap(ctx: Arc<Context>) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let first = ClusterConfig::from_json(ctx.settings.bootstrap.dcs.clone());
    let initialize = ctx.keys.initialize();
    let claim = ctx.keeper.claim(
        cluster.store,
        first.ttl,
        vec![Compare::absent(&initialize)],
        // On the leader's lease: if this node dies now, another one may begin.
        |lease| vec![Op::put_leased(&initialize, "", lease)],
    );
    claim.await?;
    info!("creating a new cluster");
    let made = make_cluster(&ctx, &first).await;
    match made {
        Ok(identifier) => {
            let config = json(&first.raw);
            let mut txn =
                Txn::just(Op::put(&initialize, &identifier)).and(Op::put(ctx.keys.history(), "[]"));
            if cluster.config.is_none() {
                txn = txn.and(Op::put(ctx.keys.config(), config));
            }
            ctx.store.txn(txn).await?;
            info!(system_identifier = %identifier, "cluster created");
            Ok(())
        }
        Err(error) => {
            ctx.postgres.stop(StopMode::Kill, STOP_LIMIT).await?;
            match ctx.postgres.set_data_aside() {
                Ok(aside) => warn!(dir = %aside.display(), "what was made is set aside"),
                Err(error) => warn!(error = %error, "what was made could not be set aside"),
            }
            ctx.keeper.release(Vec::new(), vec![Op::delete(&initialize)]).await?;
            ctx.guard.disarm().await?;
            Err(error)
        }
    }
}

async fn make_cluster(ctx: &Context, config: &ClusterConfig) -> Result<String, JobError> {
    let bootstrap = &ctx.settings.bootstrap;
    ctx.postgres.set_dynamic(config);
    match &bootstrap.method {
        BootstrapMethod::Initdb => {
            ctx.postgres.initdb(&bootstrap.initdb, &bootstrap.pg_hba).await?;
        }
        BootstrapMethod::Custom(method) => ctx.postgres.custom_bootstrap(method).await?,
    }
    ctx.postgres.prepare_synchronous_standby_names(Some(""));
    ctx.postgres.start(&StartAs::Primary(Fencing::Armed)).await?;
    ctx.postgres.wait_ready(START_LIMIT).await?;
    ctx.postgres.create_roles().await?;
    if let Some(command) = &bootstrap.post_bootstrap {
        let url = ctx.postgres.connection_url();
        ctx.postgres.run_script(command, &[&url], SCRIPT_LIMIT).await?;
    }
    Ok(ctx.postgres.controldata().await?.system_identifier.to_string())
}

/// Copies the leader's server.
pub async fn clone(ctx: Arc<Context>, from: String) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let upstream = upstream_of(&ctx, &cluster, &from)?;
    info!(node = %from, "copying the leader's server");
    ctx.postgres.clone_from(Some(&upstream), false).await?;
    ctx.postgres.prepare_synchronous_standby_names(Some(""));
    ctx.postgres.start(&StartAs::Standby(Some(upstream))).await?;
    Ok(())
}

fn upstream_of(ctx: &Context, cluster: &ClusterState, member: &str) -> Result<Upstream, JobError> {
    let address = cluster.members.get(member).and_then(kornak_cluster::Member::conn_address);
    let (host, port) = address.ok_or_else(|| JobError::NoMember { member: member.to_owned() })?;
    Ok(Upstream { host, port, slot: ctx.slot_name(cluster) })
}

/// Brings the server back as a standby; of `leader` if there is one.
pub async fn rejoin(ctx: Arc<Context>, leader: Option<String>) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let Some(leader) = leader else {
        ctx.guard.disarm().await?;
        ctx.postgres.prepare_synchronous_standby_names(Some(""));
        ctx.postgres.start(&StartAs::Standby(None)).await?;
        return Ok(());
    };
    let upstream = upstream_of(&ctx, &cluster, &leader)?;
    if let ServerProcess::Running { .. } = ctx.postgres.process().await?
        && !running_has_diverged(&ctx, &upstream).await?
    {
        // The stream is broken for another reason; the server goes on trying.
        return Ok(());
    }
    ctx.postgres.stop(StopMode::Fast, STOP_LIMIT).await?;
    ctx.guard.disarm().await?;
    let need = ctx.postgres.rewind_needed(&upstream).await?;
    ctx.postgres.prepare_synchronous_standby_names(Some(""));
    if need == RewindNeed::No {
        ctx.postgres.start(&StartAs::Standby(Some(upstream))).await?;
        return Ok(());
    }
    let still_settling = cluster
        .members
        .get(&leader)
        .is_some_and(|member| member.checkpoint_after_promote == Some(false));
    if still_settling {
        // pg_rewind reads the new leader's control file, which a checkpoint must have brought up
        // to date first; the leader's key changes when it has.
        info!(node = %leader, "waiting for the new leader's checkpoint before rewinding");
        return Ok(());
    }
    mend(&ctx, &cluster, &upstream).await?;
    ctx.postgres.start(&StartAs::Standby(Some(upstream))).await?;
    Ok(())
}

/// A standby that runs and gets no stream: whether it has WAL beyond the leader's way.
async fn running_has_diverged(ctx: &Context, upstream: &Upstream) -> Result<bool, JobError> {
    let leader = ctx.postgres.leader_position(upstream).await?;
    let own = ctx.postgres.status().await?;
    let local = LocalEnd { timeline: own.timeline, lsn: own.position() };
    Ok(rewind_need(local, &leader) == RewindNeed::Diverged)
}

/// The server has WAL that the leader never had: rewind, or copy anew if that was allowed.
async fn mend(ctx: &Context, cluster: &ClusterState, upstream: &Upstream) -> Result<(), JobError> {
    let settings = &ctx.settings.postgresql;
    let rewind = settings
        .use_pg_rewind
        .unwrap_or_else(|| cluster.config.as_ref().is_some_and(ClusterConfig::use_pg_rewind));
    if rewind {
        info!("this server has diverged, rewinding it");
        match ctx.postgres.rewind(upstream).await {
            Ok(()) => {
                info!("rewound");
                return Ok(());
            }
            Err(source) if !settings.remove_data_directory_on_rewind_failure => {
                return Err(JobError::Diverged { source });
            }
            Err(source) => {
                warn!(error = &source as &dyn std::error::Error, "rewind failed, copying anew");
            }
        }
    } else if !settings.remove_data_directory_on_diverged_timelines {
        return Err(JobError::DivergedForGood);
    }
    ctx.postgres.clone_from(Some(upstream), true).await?;
    Ok(())
}

/// The leader's server is down and nobody else can do better: start it where it is. The keeper has
/// armed the guard.
pub async fn start_primary(ctx: Arc<Context>) -> Result<(), JobError> {
    let limit = ctx.cluster().config.clone().unwrap_or_default().primary_start_timeout;
    stand_alone(&ctx).await?;
    info!("starting the leader's server in place");
    let Err(error) = start_in_place(&ctx, limit).await else { return Ok(()) };
    warn!(
        error = &error as &dyn std::error::Error,
        "the leader's server does not start, giving the key up"
    );
    ctx.postgres.stop(StopMode::Kill, STOP_LIMIT).await?;
    ctx.keeper.release(Vec::new(), Vec::new()).await?;
    ctx.guard.disarm().await?;
    Ok(())
}

/// Starts the server as primary, after [`stand_alone`], and waits until it takes connections.
pub async fn start_in_place(ctx: &Context, limit: Duration) -> Result<(), StartError> {
    ctx.postgres.start(&StartAs::Primary(Fencing::Armed)).await?;
    ctx.postgres.wait_ready(limit).await
}

/// A server that starts again shows commits that no standby may have and nobody was told of. A
/// failover would take back what somebody has read, so the standbys are named again only when they
/// have all of it (SAFETY scenario A13).
pub async fn stand_alone(ctx: &Context) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let synchronous =
        cluster.config.as_ref().is_some_and(|config| config.synchronous_mode != SyncMode::Off);
    let named = cluster.sync.as_ref().is_some_and(|sync| !sync.standbys().is_empty());
    if !synchronous || !named {
        return Ok(());
    }
    let held = ctx.keeper.held().ok_or(ClaimError::Lost)?;
    let (leader, key) = (ctx.keys.leader(), ctx.keys.sync());
    let mut txn = Txn::just(Op::put(&key, json(&SyncState::new(&ctx.name, &[]))));
    txn.compare = leader_checks(&leader, held.lease, held.epoch);
    txn.compare.push(Compare::Modified { key, revision: cluster.sync_revision });
    if ctx.store.txn(txn).await?.succeeded { Ok(()) } else { Err(JobError::SyncChanged) }
}

/// The key is ours and proven: make the server primary.
pub async fn promote(ctx: Arc<Context>) -> Result<(), JobError> {
    let began = boottime_now();
    let planned = planned_for(&ctx);
    let limit = if planned { PROMOTE_LIMIT } else { Duration::from_secs(60) };
    if let Some(command) = &ctx.settings.postgresql.pre_promote {
        let arguments = ["primary", &ctx.settings.scope.name];
        if let Err(error) = ctx.postgres.run_script(command, &arguments, limit).await {
            warn!(error = &error as &dyn std::error::Error, "pre_promote forbids the promotion");
            give_up(&ctx, planned).await?;
            return Err(error.into());
        }
    }
    if !planned {
        // The guard may have been disarmed since the claim, by a start as a standby.
        ctx.keeper.renew().await?;
    }
    info!(planned, "promoting");
    match ctx.postgres.promote(Fencing::Armed, limit).await {
        Ok(promoted) => {
            info!(timeline = %promoted.timeline, elapsed_ms = elapsed_ms(began), "promoted");
            ctx.look.notify_one();
            finish_handover(&ctx, planned).await;
            Ok(())
        }
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "promotion failed, giving the key up");
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

async fn finish_handover(ctx: &Context, planned: bool) {
    if !planned {
        return;
    }
    let cluster = ctx.cluster();
    let key = ctx.keys.handover();
    let mut txn = Txn::just(Op::delete(&key))
        .when(Compare::Modified { key, revision: cluster.handover_revision })
        .and(Op::DeletePrefix { prefix: ctx.keys.acks() });
    txn.then.extend(handover::cluster_failover_cleared(ctx, &cluster));
    if let Err(error) = ctx.store.txn(txn).await {
        warn!(error = %error, "the handover record is left to its lease");
    }
    let ttl = cluster.config.clone().unwrap_or_default().ttl;
    if let Err(error) = ctx.keeper.move_to(ttl).await {
        warn!(error = &error as &dyn std::error::Error, "the regular lease could not be taken");
    }
}

/// The server could not be made writable: nobody may think that it was, then somebody else may try.
async fn give_up(ctx: &Context, planned: bool) -> Result<(), JobError> {
    ctx.postgres.stop(StopMode::Kill, STOP_LIMIT).await?;
    let cluster = ctx.cluster();
    let mut also = Vec::new();
    if planned {
        also.push(Op::delete(ctx.keys.handover()));
    }
    let record = cluster.handover.as_ref().filter(|_| planned);
    let synchronous =
        cluster.config.as_ref().is_some_and(|config| config.synchronous_mode != SyncMode::Off);
    // Once the control file says so, the server may have taken a commit that nobody else has.
    let never_writable =
        ctx.postgres.controldata().await.is_ok_and(|control| control.state.is_recovery());
    if let (Some(record), true) = (record, synchronous && never_writable) {
        let sync = SyncState::new(&record.leader, std::slice::from_ref(&ctx.name));
        also.push(Op::put(ctx.keys.sync(), json(&sync)));
    }
    ctx.keeper.release(Vec::new(), also).await?;
    ctx.guard.disarm().await?;
    Ok(())
}

/// Stops the server and every process of it.
pub async fn demote(ctx: Arc<Context>, immediate: bool, why: Why) -> Result<(), JobError> {
    warn!(why = why.as_str(), immediate, "stopping the server");
    let (mode, limit) = if immediate {
        (StopMode::Immediate, STOP_LIMIT)
    } else {
        (StopMode::Fast, ctx.settings.kornak.guard.stop_budget)
    };
    if let Err(error) = ctx.postgres.stop(mode, limit).await {
        warn!(error = %error, "the server is killed");
        ctx.postgres.stop(StopMode::Kill, STOP_LIMIT).await?;
    }
    ctx.guard.disarm().await?;
    if let Some(held) = ctx.keeper.let_go() {
        // Unproven: the store may well be away, and must not hold the rest up.
        let keeper = ctx.keeper.clone();
        tokio::spawn(async move { keeper.release_held(held, Vec::new(), Vec::new()).await });
    }
    Ok(())
}

/// Creates the leader key for this node.
pub async fn claim(ctx: Arc<Context>, take_over: bool) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let config = cluster.config.clone().unwrap_or_default();
    let mut when = Vec::new();
    let mut also = Vec::new();
    if config.synchronous_mode != SyncMode::Off {
        // From now on nobody else has what this node will accept.
        when.push(Compare::Modified { key: ctx.keys.sync(), revision: cluster.sync_revision });
    }
    // A primary that takes its own key again has been waiting for the same standbys all along.
    let goes_on = matches!(ctx.observed().server, Server::Primary(_))
        && cluster.sync.as_ref().and_then(|sync| sync.leader.as_deref()) == Some(&ctx.name);
    if config.synchronous_mode != SyncMode::Off && !goes_on {
        also.push(Op::put(ctx.keys.sync(), json(&SyncState::new(&ctx.name, &[]))));
    }
    let record = cluster.handover.clone().filter(|_| take_over);
    let ttl = if take_over { SHORT_LEASE } else { config.ttl };
    if record.is_some() {
        let key = ctx.keys.handover();
        when.push(Compare::Modified { key, revision: cluster.handover_revision });
    }
    let key = ctx.keys.handover();
    ctx.keeper
        .claim(cluster.store, ttl, when, |lease| {
            let promote = record.map(|record| {
                let record = kornak_cluster::Handover { phase: HandoverPhase::Promote, ..record };
                Op::put_leased(key, json(&record), lease)
            });
            also.into_iter().chain(promote).collect()
        })
        .await?;
    Ok(())
}

/// Gives the key up with a server that is down.
pub async fn release(ctx: Arc<Context>, held: Held) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let also = handover::cluster_failover_cleared(&ctx, &cluster);
    ctx.keeper.release_held(held, Vec::new(), also).await?;
    ctx.guard.disarm().await?;
    Ok(())
}

/// Replicates from another member from now on.
pub async fn follow(ctx: Arc<Context>, leader: String) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let upstream = upstream_of(&ctx, &cluster, &leader)?;
    info!(node = %leader, "following");
    ctx.postgres.follow(Some(&upstream)).await?;
    Ok(())
}

/// Stops and starts the server in its role.
pub async fn restart(ctx: Arc<Context>) -> Result<(), JobError> {
    if ctx.keeper.held().is_some() {
        let limit = ctx.settings.kornak.handover.drain_timeout;
        handover::restart_in_place(&ctx, limit).await?;
    } else {
        ctx.postgres.stop(StopMode::Fast, STOP_LIMIT).await?;
        let cluster = ctx.cluster();
        let leader = cluster.leader.as_ref().filter(|leader| leader.name != ctx.name);
        let upstream =
            leader.map(|leader| upstream_of(&ctx, &cluster, &leader.name)).transpose()?;
        ctx.postgres.start(&StartAs::Standby(upstream)).await?;
        ctx.postgres.wait_ready(START_LIMIT).await?;
    }
    ctx.pending_restart.lock().take();
    Ok(())
}

/// Throws the data away and copies the leader's server; an operator asked for it by name.
pub async fn reinitialize(ctx: Arc<Context>) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let Some((leader, _)) = cluster.leader_member() else {
        return Err(JobError::NoMember { member: "the leader".to_owned() });
    };
    let leader = leader.to_owned();
    ctx.postgres.stop(StopMode::Fast, STOP_LIMIT).await?;
    let upstream = upstream_of(&ctx, &cluster, &leader)?;
    ctx.postgres.clone_from(Some(&upstream), true).await?;
    ctx.postgres.start(&StartAs::Standby(Some(upstream))).await?;
    Ok(())
}

fn elapsed_ms(began: kornak_cluster::Moment) -> u64 {
    u64::try_from(boottime_now().since(began).as_millis()).unwrap_or(u64::MAX)
}
