//! A data directory from nothing: a new cluster, or a copy.

use std::sync::Arc;

use kornak_cluster::{ClusterConfig, ClusterState, StandbyCluster, SyncMode, SyncState};
use kornak_config::agent::BootstrapMethod;
use kornak_dcs::{Compare, Op, Txn};
use tracing::{info, warn};

use super::joining::{member_server, own_upstream, remote_server};
use super::{JobError, SCRIPT_LIMIT, START_LIMIT, STOP_LIMIT};
use crate::context::Context;
use crate::guard::Fencing;
use crate::ha::upstream::clone_sources;
use crate::postgres::{Parameters, ServerProcess, StartAs, StopMode, Upstream, parameter_text};
use kornak_dcs::json;

/// Creates the cluster: claims the key, so that nobody else does, then makes a data directory.
pub async fn bootstrap(ctx: Arc<Context>) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let first = || ClusterConfig::from_json(ctx.settings.bootstrap.dcs.clone());
    let first = cluster.config.clone().unwrap_or_else(first);
    let initialize = ctx.keys.initialize();
    if ctx.keeper.held().is_none() {
        let claim = ctx.keeper.claim(
            cluster.store,
            first.ttl,
            vec![Compare::absent(&initialize)],
            // On the leader's lease: if this node dies now, another one may begin.
            |lease| vec![Op::put_leased(&initialize, "", lease)],
        );
        claim.await?;
    }
    info!("creating a new cluster");
    let made = make_cluster(&ctx, &first).await;
    match made {
        Ok(identifier) => {
            let mut known =
                vec![Op::put(&initialize, &identifier), Op::put(ctx.keys.history(), "[]")];
            if first.sync_mode() != SyncMode::Off {
                // A cluster whose key `sync` is missing has lost it; this one has no synchronous standby yet.
                known.push(Op::put(ctx.keys.sync(), json(&SyncState::new(&ctx.name, &[]))));
            }
            let key = ctx.keys.config();
            let mut then = known.clone();
            then.push(Op::put(&key, json(&first.raw)));
            // An operator may have configured it meanwhile.
            let absent = vec![Compare::absent(&key)];
            ctx.store.txn(Txn { compare: absent, then, otherwise: known }).await?;
            info!(system_identifier = %identifier, "cluster created");
            ctx.postgres.finish_first().await?;
            Ok(())
        }
        // What is there is not to blame: whoever leads next goes on with it.
        Err(error) if ctx.keeper.held().is_none() && ctx.server.goes_on() => {
            ctx.server.stop(StopMode::Kill, STOP_LIMIT).await?;
            Err(error)
        }
        Err(error) => {
            ctx.server.stop(StopMode::Kill, STOP_LIMIT).await?;
            match ctx.postgres.set_data_aside().await {
                Ok(Some(aside)) => {
                    warn!(dir = %aside.display(), "bootstrap failed, data directory moved aside");
                }
                Ok(None) => {}
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    warn!(error, "bootstrap failed, data directory could not be moved aside");
                }
            }
            ctx.keeper.release(Vec::new(), vec![Op::delete(&initialize)]).await?;
            ctx.guard.disarm().await?;
            Err(error)
        }
    }
}

async fn make_cluster(ctx: &Context, config: &ClusterConfig) -> Result<String, JobError> {
    ctx.server.set_dynamic(config);
    match &config.standby_cluster {
        Some(section) => copy_remote(ctx, section).await?,
        None => make_primary(ctx).await?,
    }
    Ok(ctx.server.controldata().await?.system_identifier.to_string())
}

/// The data directory, unless an earlier agent has made it, and what to start it as.
async fn make_files(ctx: &Context) -> Result<StartAs, JobError> {
    let bootstrap = &ctx.settings.bootstrap;
    let goes_on = ctx.server.goes_on();
    if !goes_on {
        // An earlier agent's server may run on what is to go.
        ctx.server.stop(StopMode::Kill, STOP_LIMIT).await?;
        ctx.postgres.remove_first().await?;
    }
    let primary = StartAs::Primary(Fencing::Armed);
    let BootstrapMethod::Custom(method) = &bootstrap.method else {
        if !goes_on {
            ctx.postgres.initdb(&bootstrap.initdb, &bootstrap.pg_hba).await?;
        }
        return Ok(primary);
    };
    if !goes_on {
        ctx.postgres.custom_bootstrap(method).await?;
    } else if ctx.postgres.was_started() && !ctx.postgres.is_recovering() {
        return Ok(primary);
    }
    let given = parameters(&method.recovery_conf);
    Ok(match (given.is_empty(), method.keep_existing_recovery_conf) {
        (false, _) => StartAs::PointInTime(Fencing::Armed, Some(given)),
        (true, true) => StartAs::PointInTime(Fencing::Armed, None),
        (true, false) => primary,
    })
}

async fn make_primary(ctx: &Context) -> Result<(), JobError> {
    let start_as = make_files(ctx).await?;
    let recovers = matches!(start_as, StartAs::PointInTime(..));
    ctx.server.prepare_synchronous_standby_names("");
    if let ServerProcess::Running { .. } = ctx.server.process().await? {
        info!("recovery continues");
    } else {
        ctx.postgres.start_first(&start_as).await?;
    }
    if recovers {
        info!("recovery to the requested point in time begun");
        ctx.postgres.wait_writable().await?;
        info!("recovery has ended, the server is a primary");
    } else {
        ctx.server.wait_ready(START_LIMIT).await?;
    }
    ctx.postgres.begin_filling().await?;
    ctx.postgres.create_roles().await?;
    for database in ctx.settings.citus.iter().flat_map(|citus| &citus.databases) {
        crate::citus_tasks::database::ensure(&ctx.postgres, database).await?;
    }
    if let Some(command) = &ctx.settings.bootstrap.post_bootstrap {
        let url = ctx.postgres.connection_url();
        ctx.postgres.run_first_script(command, &[&url], SCRIPT_LIMIT).await?;
    }
    Ok(())
}

/// The first member of a standby cluster is a copy of the primary elsewhere.
async fn copy_remote(ctx: &Context, section: &StandbyCluster) -> Result<(), JobError> {
    info!("copying the primary of another cluster");
    // Nothing here will be writable.
    ctx.keeper.unfence().await?;
    let upstream = remote_server(ctx, section);
    let methods = Some(section.create_replica_methods.as_slice()).filter(|it| !it.is_empty());
    let from = Some(&upstream).filter(|upstream| upstream.is_server());
    if !ctx.server.goes_on() {
        ctx.server.stop(StopMode::Kill, STOP_LIMIT).await?;
        ctx.postgres.remove_first().await?;
        ctx.postgres.copy_first(methods, from).await?;
    }
    ctx.server.prepare_synchronous_standby_names("");
    if let ServerProcess::None = ctx.server.process().await? {
        ctx.postgres.start_first(&StartAs::Standby(Some(upstream))).await?;
    }
    ctx.server.wait_ready(START_LIMIT).await?;
    ctx.postgres.begin_filling().await?;
    Ok(())
}

/// Copies a member's server: one that offers itself, or the leader's.
pub async fn clone(ctx: Arc<Context>, leader: String) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let offers = clone_sources(&ctx.name, &cluster);
    let chosen = offers.get(rand::random_range(0..offers.len().max(1)));
    let from = chosen.unwrap_or(&leader);
    info!(node = %from, "copying a member's server");
    let copied = ctx.postgres.clone_from(Some(&member_server(&ctx, &cluster, from)?), false).await;
    match copied {
        Err(error) if *from != leader => {
            warn!(
                error = &error as &dyn std::error::Error,
                "copy from the leader instead of the member"
            );
            ctx.postgres.clone_from(Some(&member_server(&ctx, &cluster, &leader)?), false).await?;
        }
        copied => copied?,
    }
    start_copy(&ctx).await
}

/// Copies by those methods that need no running member.
pub async fn clone_without_leader(ctx: Arc<Context>) -> Result<(), JobError> {
    info!("making a copy by a method that needs no leader");
    ctx.postgres.clone_from(None, false).await?;
    start_copy(&ctx).await
}

async fn start_copy(ctx: &Context) -> Result<(), JobError> {
    // Who leads may have changed during a long copy.
    let upstream = own_upstream(ctx, &ctx.cluster())?;
    ctx.server.prepare_synchronous_standby_names("");
    ctx.server.start(&StartAs::Standby(upstream)).await?;
    Ok(())
}

/// Throws the data away and copies a member's server; an operator asked for it by name. `from_leader`:
/// by a base backup of the leader's, whatever the configured methods are. It is done when the copy has been
/// proven to be possible, and over when the member replicates again.
pub async fn reinitialize(ctx: Arc<Context>, from_leader: bool) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let leader = leader_name(&cluster)?;
    let upstream = member_server(&ctx, &cluster, &leader)?;
    ctx.stop_in_order(STOP_LIMIT).await?;
    if from_leader {
        let basebackup = ["basebackup".to_owned()];
        ctx.postgres.clone_by(Some(&basebackup), Some(&upstream), true).await?;
        start_copy(&ctx).await?;
    } else if ctx.settings.postgresql.keeps_data() {
        ctx.postgres.clone_from(Some(&upstream), true).await?;
        start_copy(&ctx).await?;
    } else {
        ctx.postgres.remove_data().await?;
        clone(Arc::clone(&ctx), leader).await?;
    }
    until_it_replicates(&ctx).await
}

fn leader_name(cluster: &ClusterState) -> Result<String, JobError> {
    let leader = cluster.leader_member().map(|(leader, _)| leader.to_owned());
    leader.ok_or_else(|| JobError::NoMember { member: "the leader".to_owned() })
}

/// Shows that a copy of the leader's server could be made now, before anything is removed for it.
pub async fn prove_copy(ctx: &Context, from_leader: bool) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let leader = member_server(ctx, &cluster, &leader_name(&cluster)?)?;
    prove_copy_of(ctx, &cluster, &leader, from_leader).await
}

/// Like [`prove_copy`], of a server that need not be a member's.
pub(super) async fn prove_copy_of(
    ctx: &Context,
    cluster: &ClusterState,
    leader: &Upstream,
    from_leader: bool,
) -> Result<(), JobError> {
    let methods = &ctx.settings.postgresql.create_replica_methods;
    let first = methods.first().map_or("basebackup", |method| method.name());
    let by_backup = from_leader || first == "basebackup";
    let identifier = cluster.initialize.as_deref().filter(|known| !known.is_empty());
    Ok(ctx.postgres.prove_source(leader, identifier, by_backup).await?)
}

/// A copy that was started catches up, which may take long; a server that ends does not.
async fn until_it_replicates(ctx: &Context) -> Result<(), JobError> {
    loop {
        match ctx.server.status().await {
            Ok(status) if !status.in_recovery || status.is_streaming() => break,
            _ => {}
        }
        if ctx.server.process().await? == ServerProcess::None {
            return Err(JobError::EndedAgain { log: ctx.postgres.log_file() });
        }
        let cluster = ctx.cluster();
        let alone = own_upstream(ctx, &cluster)?.is_none_or(|upstream| !upstream.is_server());
        if alone {
            // Nobody to stream from.
            break;
        }
        ctx.machine.sleep(std::time::Duration::from_millis(200)).await;
    }
    info!("reinitialization completed, this member replicates again");
    Ok(())
}

fn parameters(map: &serde_json::Map<String, serde_json::Value>) -> Parameters {
    map.iter().filter_map(|(name, value)| Some((name.clone(), parameter_text(value)?))).collect()
}
