//! A data directory from nothing: a new cluster, or a copy.

use std::sync::Arc;

use kornak_cluster::{ClusterConfig, StandbyCluster};
use kornak_config::agent::BootstrapMethod;
use kornak_dcs::{Compare, Op, Txn};
use tracing::{info, warn};

use super::joining::{member_server, own_upstream, remote_server};
use super::{JobError, SCRIPT_LIMIT, START_LIMIT, STOP_LIMIT};
use crate::context::Context;
use crate::guard::Fencing;
use crate::ha::upstream::clone_sources;
use crate::handover::json;
use crate::postgres::{Parameters, StartAs, StopMode, parameter_text};

/// Creates the cluster: claims the key, so that nobody else does, then makes a data directory.
pub async fn bootstrap(ctx: Arc<Context>) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let first = || ClusterConfig::from_json(ctx.settings.bootstrap.dcs.clone());
    let first = cluster.config.clone().unwrap_or_else(first);
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
            let known = vec![Op::put(&initialize, &identifier), Op::put(ctx.keys.history(), "[]")];
            let key = ctx.keys.config();
            let mut then = known.clone();
            then.push(Op::put(&key, json(&first.raw)));
            // An operator may have configured it meanwhile.
            let absent = vec![Compare::absent(&key)];
            ctx.store.txn(Txn { compare: absent, then, otherwise: known }).await?;
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
    ctx.postgres.set_dynamic(config);
    match &config.standby_cluster {
        Some(section) => copy_remote(ctx, section).await?,
        None => make_primary(ctx).await?,
    }
    Ok(ctx.postgres.controldata().await?.system_identifier.to_string())
}

async fn make_primary(ctx: &Context) -> Result<(), JobError> {
    let bootstrap = &ctx.settings.bootstrap;
    let start_as = match &bootstrap.method {
        BootstrapMethod::Initdb => {
            ctx.postgres.initdb(&bootstrap.initdb, &bootstrap.pg_hba).await?;
            StartAs::Primary(Fencing::Armed)
        }
        BootstrapMethod::Custom(method) => {
            ctx.postgres.custom_bootstrap(method).await?;
            let given = parameters(&method.recovery_conf);
            match (given.is_empty(), method.keep_existing_recovery_conf) {
                (false, _) => StartAs::PointInTime(Fencing::Armed, Some(given)),
                (true, true) => StartAs::PointInTime(Fencing::Armed, None),
                (true, false) => StartAs::Primary(Fencing::Armed),
            }
        }
    };
    let recovers = matches!(start_as, StartAs::PointInTime(..));
    ctx.postgres.prepare_synchronous_standby_names(Some(""));
    ctx.postgres.start(&start_as).await?;
    if recovers {
        info!("recovering to the point in time that was asked for");
        ctx.postgres.wait_writable(SCRIPT_LIMIT).await?;
        info!("recovery has ended, the server is a primary");
    } else {
        ctx.postgres.wait_ready(START_LIMIT).await?;
    }
    ctx.postgres.create_roles().await?;
    for database in ctx.settings.citus.iter().flat_map(|citus| &citus.databases) {
        crate::citus::database::ensure(&ctx.postgres, database).await?;
    }
    if let Some(command) = &bootstrap.post_bootstrap {
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
    ctx.postgres.clone_by(methods, from, false).await?;
    ctx.postgres.prepare_synchronous_standby_names(Some(""));
    ctx.postgres.start(&StartAs::Standby(Some(upstream))).await?;
    ctx.postgres.wait_ready(START_LIMIT).await?;
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
            warn!(error = &error as &dyn std::error::Error, "copying from the leader instead");
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
    ctx.postgres.prepare_synchronous_standby_names(Some(""));
    ctx.postgres.start(&StartAs::Standby(upstream)).await?;
    Ok(())
}

/// Throws the data away and copies a member's server; an operator asked for it by name. `from_leader`:
/// by a base backup of the leader's, whatever the configured methods are.
pub async fn reinitialize(ctx: Arc<Context>, from_leader: bool) -> Result<(), JobError> {
    let cluster = ctx.cluster();
    let Some((leader, _)) = cluster.leader_member() else {
        return Err(JobError::NoMember { member: "the leader".to_owned() });
    };
    let leader = leader.to_owned();
    let upstream = member_server(&ctx, &cluster, &leader)?;
    ctx.stop_in_order(STOP_LIMIT).await?;
    if from_leader {
        let basebackup = ["basebackup".to_owned()];
        ctx.postgres.clone_by(Some(&basebackup), Some(&upstream), true).await?;
        return start_copy(&ctx).await;
    }
    ctx.postgres.remove_data()?;
    clone(ctx, leader).await
}

fn parameters(map: &serde_json::Map<String, serde_json::Value>) -> Parameters {
    map.iter().filter_map(|(name, value)| Some((name.clone(), parameter_text(value)?))).collect()
}
