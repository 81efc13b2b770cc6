//! A data directory that is there, as a standby of whoever leads.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterConfig, ClusterState, StandbyCluster};
use tracing::{info, warn};

use super::{JobError, START_LIMIT, STOP_LIMIT};
use crate::context::Context;
use crate::ha::upstream::{Source, source};
use crate::postgres::{
    Authority, LocalEnd, Parameters, RewindError, RewindNeed, ServerProcess, StartAs, StopMode,
    Upstream, rewind_need,
};

/// A member's server, as one to connect to.
pub(super) fn member_server(
    ctx: &Context,
    cluster: &ClusterState,
    member: &str,
) -> Result<Upstream, JobError> {
    let address = cluster.members.get(member).and_then(kornak_cluster::Member::conn_address);
    let (host, port) = address.ok_or_else(|| JobError::NoMember { member: member.to_owned() })?;
    Ok(Upstream::new(host, port, ctx.slot_name(cluster)))
}

/// Where a standby cluster gets its log from.
pub(super) fn remote_server(ctx: &Context, section: &StandbyCluster) -> Upstream {
    let recovery: Parameters =
        section.recovery.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    match &section.remote {
        Some((host, port)) => {
            let slot = section.primary_slot_name.clone();
            // Under its bare name it would count there as the member of that name.
            let application = Some(format!("{}:{}", ctx.settings.scope.name, ctx.name));
            Upstream { recovery, application, ..Upstream::new(host, *port, slot) }
        }
        None => Upstream::archive(recovery),
    }
}

/// For an archive to take the last segment of a primary.
const ARCHIVE_LIMIT: Duration = Duration::from_secs(30);

/// For a leader to say where it stands, when nothing depends on it; and when the server has ended as it started, so
/// that what the leader says is all that helps.
const ASK_LIMIT: Duration = Duration::from_secs(1);
const ASK_LIMIT_ONCE_IT_FAILED: Duration = Duration::from_secs(10);

/// Starts in a row that came to nothing, after which the archive is thought to mislead the server.
const MISLED_AFTER: u32 = 2;

fn standby_cluster(cluster: &ClusterState) -> Option<&StandbyCluster> {
    cluster.config.as_ref()?.standby_cluster.as_ref()
}

/// The servers to which members of this cluster are rewound.
fn authority(cluster: &ClusterState) -> Authority {
    match standby_cluster(cluster) {
        Some(_) => Authority::Any,
        None => Authority::Primary,
    }
}

/// The server that a standby is told to replicate from; `None`: nobody leads.
fn upstream_of(
    ctx: &Context,
    cluster: &ClusterState,
    from: Option<&Source>,
) -> Result<Option<Upstream>, JobError> {
    Ok(match from {
        None => None,
        Some(Source::Member(member)) => Some(member_server(ctx, cluster, member)?),
        Some(Source::Remote) => standby_cluster(cluster).map(|section| remote_server(ctx, section)),
        Some(Source::Archive) => {
            let leads = cluster.leader.as_ref().is_none_or(|leader| leader.name == ctx.name);
            let remote = standby_cluster(cluster).filter(|_| leads);
            let remote = remote.map(|section| remote_server(ctx, section));
            Some(Upstream::archive(remote.map(|remote| remote.recovery).unwrap_or_default()))
        }
    })
}

/// The server that this node's standby replicates from now.
pub(super) fn own_upstream(
    ctx: &Context,
    cluster: &ClusterState,
) -> Result<Option<Upstream>, JobError> {
    if ctx.pledges.bind(cluster) {
        return Ok(None);
    }
    upstream_of(ctx, cluster, source(&ctx.name, &ctx.settings.tags, cluster).as_ref())
}

/// Brings the server back as a standby; of `leader` if there is one.
pub async fn rejoin(
    ctx: Arc<Context>,
    leader: Option<String>,
    failed_starts: u32,
) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let Some(leader) = leader else { return rejoin_without_leader(&ctx, &cluster).await };
    let running = matches!(ctx.server.process().await?, ServerProcess::Running { .. });
    if !running && is_standbys(&ctx).await {
        return restart_standby(&ctx, &cluster, &leader, failed_starts).await;
    }
    let upstream = own_upstream(&ctx, &cluster)?;
    let leaders = member_server(&ctx, &cluster, &leader)?;
    let authority = authority(&cluster);
    if running && !running_has_diverged(&ctx, &leaders, authority).await? {
        // The stream is broken for another reason; the server goes on trying.
        return Ok(());
    }
    ctx.stop_in_order(STOP_LIMIT).await?;
    ctx.guard.disarm().await?;
    let need = ctx.server.rewind_needed(&leaders, authority).await?;
    join(&ctx, &cluster, (&leader, &leaders), need, upstream, failed_starts).await
}

/// The server does not run, and compared with the leader it is so: mended if need be, then started.
async fn join(
    ctx: &Context,
    cluster: &ClusterState,
    (leader, leaders): (&str, &Upstream),
    need: RewindNeed,
    upstream: Option<Upstream>,
    failed_starts: u32,
) -> Result<(), JobError> {
    ctx.server.prepare_synchronous_standby_names("");
    if need == RewindNeed::No {
        return match upstream {
            Some(upstream) if failed_starts >= MISLED_AFTER => {
                start_without_archive(ctx, leaders, upstream).await
            }
            upstream => Ok(ctx.server.start(&StartAs::Standby(upstream)).await.map(drop)?),
        };
    }
    if need == RewindNeed::Undecided {
        info!(node = %leader, "leader is in recovery: no server is rewound to it before it is a primary");
        return Err(JobError::NotYet);
    }
    let still_settling = cluster
        .members
        .get(leader)
        .is_some_and(|member| member.checkpoint_after_promote == Some(false));
    if still_settling {
        // pg_rewind reads the new leader's control file, which a checkpoint must have brought up
        // to date first; the leader's key changes when it has.
        info!(node = %leader, "waiting for the new leader's checkpoint before rewinding");
        return Err(JobError::NotYet);
    }
    mend(ctx, cluster, leaders).await?;
    ctx.server.start(&StartAs::Standby(upstream)).await?;
    Ok(())
}

/// A promotion that was killed may have left a timeline in the archive that nobody is on. Servers beyond its
/// beginning look for the newest timeline as they start, find that one, and end. Once it runs a server is not misled.
async fn start_without_archive(
    ctx: &Context,
    leaders: &Upstream,
    upstream: Upstream,
) -> Result<(), JobError> {
    let leader = ctx.server.leader_position(leaders).await?;
    warn!(
        "server ended as it started, and its leader has what it needs: started without the archive"
    );
    ctx.postgres.forget_timelines_after(leader.timeline);
    let mut alone = upstream.clone();
    alone.recovery.insert("restore_command".to_owned(), String::new());
    ctx.server.start(&StartAs::Standby(Some(alone))).await?;
    ctx.server.wait_ready(START_LIMIT).await?;
    ctx.server.follow(Some(&upstream)).await?;
    Ok(())
}

/// The server was certainly a standby when it last ran.
async fn is_standbys(ctx: &Context) -> bool {
    ctx.server.controldata().await.is_ok_and(|control| control.state.is_recovery())
}

/// A standby that ended is started whether or not the leader can be asked: it is compared with it again
/// if no stream comes up.
async fn restart_standby(
    ctx: &Context,
    cluster: &ClusterState,
    leader: &str,
    failed_starts: u32,
) -> Result<(), JobError> {
    ctx.guard.disarm().await?;
    let limit = if failed_starts == 0 { ASK_LIMIT } else { ASK_LIMIT_ONCE_IT_FAILED };
    let unasked = |why: &(dyn std::error::Error + 'static)| {
        info!(node = %leader, error = why, "leader does not answer, server starts as the standby that it was");
    };
    let leaders = match member_server(ctx, cluster, leader) {
        Ok(leaders) => leaders,
        Err(error) => {
            unasked(&error);
            ctx.server.start(&StartAs::Standby(None)).await?;
            return Ok(());
        }
    };
    let asked =
        ctx.machine.timeout(limit, ctx.server.rewind_needed(&leaders, authority(cluster))).await;
    let (need, failed_starts) = match asked {
        Ok(Ok(RewindNeed::Undecided)) => {
            info!(node = %leader, "leader is in recovery, server starts as the standby that it was");
            ctx.server.start(&StartAs::Standby(None)).await?;
            return Ok(());
        }
        Ok(Ok(need)) => (need, failed_starts),
        Ok(Err(error @ (RewindError::Leader(_) | RewindError::History(_)))) => {
            unasked(&error);
            (RewindNeed::No, 0)
        }
        Ok(Err(error)) => return Err(error.into()),
        Err(late) => {
            unasked(&late);
            (RewindNeed::No, 0)
        }
    };
    let upstream = own_upstream(ctx, cluster).unwrap_or(None);
    join(ctx, cluster, (leader, &leaders), need, upstream, failed_starts).await
}

/// Nobody leads, or this node leads a standby cluster.
async fn rejoin_without_leader(ctx: &Context, cluster: &ClusterState) -> Result<(), JobError> {
    let upstream = own_upstream(ctx, cluster)?;
    ctx.guard.disarm().await?;
    ctx.server.prepare_synchronous_standby_names("");
    if let Some(remote) = upstream.as_ref().filter(|upstream| upstream.is_server()) {
        match ctx.server.rewind_needed(remote, Authority::Any).await {
            Ok(RewindNeed::No | RewindNeed::Undecided) => {}
            Ok(RewindNeed::Diverged) => mend(ctx, cluster, remote).await?,
            // It serves reads all the same, and follows once the other side is there.
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "primary that this standby cluster follows does not answer"
            ),
        }
    }
    ctx.server.start(&StartAs::Standby(upstream)).await?;
    Ok(())
}

/// A standby that runs and gets no stream: whether it has WAL beyond the leader's way.
async fn running_has_diverged(
    ctx: &Context,
    upstream: &Upstream,
    authority: Authority,
) -> Result<bool, JobError> {
    // The leader is asked later: what it is ahead then is no difference.
    let own = ctx.server.status().await?;
    let leader = ctx.server.leader_position(upstream).await?;
    if ctx.server.took_another_way(upstream, &leader, own.timeline).await? {
        return Ok(authority.diverged_from(&leader) == RewindNeed::Diverged);
    }
    let local = LocalEnd { timeline: own.timeline, lsn: own.position() };
    Ok(rewind_need(local, &leader, authority) == RewindNeed::Diverged)
}

/// The server has WAL that the leader never had: rewind, or copy anew if that was allowed.
async fn mend(ctx: &Context, cluster: &ClusterState, upstream: &Upstream) -> Result<(), JobError> {
    let settings = &ctx.settings.postgresql;
    let dynamic = cluster.config.as_ref();
    let rewind =
        settings.use_pg_rewind.unwrap_or_else(|| dynamic.is_some_and(ClusterConfig::use_pg_rewind));
    let allows = |own: bool, key: &str| own || dynamic.is_some_and(|config| config.allows(key));
    if rewind {
        info!("server has diverged from the leader, rewind begun");
        match ctx.server.rewind(upstream, authority(cluster)).await {
            Ok(()) => {
                info!("rewind completed");
                return Ok(());
            }
            // Time mends these: nothing was tried yet, and nothing is thrown away for them.
            Err(
                source @ (RewindError::NoCheckpoint(_)
                | RewindError::InRecovery
                | RewindError::Leader(_)
                | RewindError::Untouched(_)),
            ) => {
                return Err(source.into());
            }
            Err(source)
                if !allows(
                    settings.remove_data_directory_on_rewind_failure,
                    "remove_data_directory_on_rewind_failure",
                ) =>
            {
                return Err(JobError::Diverged { source });
            }
            Err(source) => {
                warn!(
                    error = &source as &dyn std::error::Error,
                    "rewind failed, a new copy is made"
                );
            }
        }
    } else if !allows(
        settings.remove_data_directory_on_diverged_timelines,
        "remove_data_directory_on_diverged_timelines",
    ) {
        return Err(JobError::DivergedForGood);
    }
    // What is there may be of use to a person, if no copy can be had.
    super::making::prove_copy_of(ctx, cluster, upstream, false).await?;
    ctx.postgres.clone_from(Some(upstream), true).await?;
    Ok(())
}

/// Replicates from there from now on.
pub async fn follow(ctx: Arc<Context>, from: Source) -> Result<(), JobError> {
    let upstream = upstream_of(&ctx, &ctx.cluster(), Some(&from))?;
    if let (Source::Member(member), Some(server)) = (&from, &upstream) {
        refuse_another_way(&ctx, member, server).await?;
    }
    match &from {
        Source::Member(node) => info!(node = %node, "standby follows the leader"),
        Source::Remote => info!("standby follows the primary of another cluster"),
        Source::Archive => info!("standby follows the archive alone"),
    }
    ctx.server.follow(upstream.as_ref()).await?;
    Ok(())
}

/// PostgreSQL would stream from a server that took the same timeline another way, and mix the two. A
/// server that cannot be asked yet is followed; the comparison comes when no stream does.
async fn refuse_another_way(
    ctx: &Context,
    member: &str,
    server: &Upstream,
) -> Result<(), JobError> {
    let Ok(position) = ctx.server.leader_position(server).await else { return Ok(()) };
    let own = ctx.server.status().await?.timeline;
    if ctx.server.took_another_way(server, &position, own).await.unwrap_or(false) {
        return Err(JobError::TimelineForked { member: member.to_owned(), timeline: own });
    }
    Ok(())
}

/// The primary of a cluster that becomes a standby cluster. The key is kept; a server that follows
/// needs no guard.
pub async fn demote_cluster(ctx: Arc<Context>) -> Result<(), JobError> {
    info!("primary stops because this cluster becomes a standby cluster");
    ctx.server.checkpoint().await?;
    let archive = ctx.postgres.archive_command().await.unwrap_or(None);
    let stopped = ctx.stop_in_order(ctx.stop_limit()).await;
    if let Err(error) = &stopped {
        warn!(error = error as &dyn std::error::Error, "server did not stop and is killed");
        ctx.server.stop(StopMode::Kill, STOP_LIMIT).await?;
    }
    if let (Some(command), Ok(_)) = (archive, stopped)
        && let Err(error) = ctx.postgres.archive_shutdown(&command, ARCHIVE_LIMIT).await
    {
        warn!(
            error = &error as &dyn std::error::Error,
            "last WAL segment was not archived: a cluster that follows by the archive alone and is promoted now diverges from this one"
        );
    }
    rejoin_without_leader(&ctx, &ctx.cluster()).await
}

/// Copies logical slots from the leader: a standby can have them only as files, so it is stopped for
/// that. It goes on as it was if anything fails before.
pub async fn copy_slots(ctx: Arc<Context>, names: Vec<String>) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let Some(leader) = cluster.leader.as_ref().filter(|leader| leader.name != ctx.name) else {
        return Ok(());
    };
    let server = member_server(&ctx, &cluster, &leader.name)?;
    let states = ctx.postgres.logical_slot_states(&server, &names).await?;
    if states.is_empty() {
        return Ok(());
    }
    info!(slots = ?states.keys().collect::<Vec<_>>(), "standby restarts to copy logical slots");
    let upstream = own_upstream(&ctx, &cluster)?;
    ctx.stop_in_order(STOP_LIMIT).await?;
    ctx.postgres.write_logical_slots(&states)?;
    ctx.server.start(&StartAs::Standby(upstream)).await?;
    ctx.board.slots_to_copy.lock().clear();
    Ok(())
}
