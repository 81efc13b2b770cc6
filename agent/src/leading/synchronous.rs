//! Carries out the steps of [`crate::ha::sync`], one at a time, each planned from what is known to be
//! no older than the last.

use std::time::Duration;

use kornak_cluster::{ClusterState, Moment, SafetyKey, SyncState};
use kornak_dcs::{Compare, Op, Txn};
use tracing::{info, warn};

use super::{LeadError, while_leading};
use crate::context::Context;
use crate::ha::PrimaryFacts;
use crate::ha::sync::{SyncStep, plan};
use kornak_dcs::json;

/// For a changed `synchronous_standby_names` to be in force.
const IN_FORCE_LIMIT: Duration = Duration::from_secs(5);

/// One step. `Ok(false)`: another one is to be planned soon.
pub(super) async fn adjust(
    ctx: &Context,
    looked_at: Moment,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
) -> Result<bool, LeadError> {
    let writes = *ctx.board.sync_writes.lock();
    // Neither from a view of the store that is older than our last write, nor from a look at the server that is older
    // than our last change of it.
    if writes.are_newer_than(cluster) || looked_at < ctx.server.names_changed_at() {
        return Ok(false);
    }
    let mut step = plan(&ctx.name, cluster, facts);
    if let Some(sync) = to_be_written_again(&ctx.name, cluster) {
        step = SyncStep::Publish(sync);
    }
    if writes.may_be_open() && matches!(step, SyncStep::SetNames(_)) && cluster.sync.is_some() {
        // The open write could name a standby for whom commits would stop waiting now. A write that
        // succeeds changes the revision that it compares, so it will not be done any more.
        step = SyncStep::Publish(cluster.sync.clone().unwrap_or_default());
    }
    match step {
        SyncStep::Settled => Ok(true),
        SyncStep::Await => Ok(false),
        SyncStep::Publish(sync) => publish(ctx, cluster, &sync).await.map(|()| false),
        SyncStep::SetNames(names) => {
            if names.contains('*') {
                warn!(
                    "no standby can be synchronous, writes wait until a synchronous standby comes"
                );
            }
            info!(names = %names, "synchronous_standby_names changed");
            ctx.server.set_synchronous_standby_names(&names, IN_FORCE_LIMIT).await?;
            Ok(false)
        }
    }
}

/// The state in force, if it is not what the store says: the key is missing, makes no sense, or is
/// of the past.
fn to_be_written_again(me: &str, cluster: &ClusterState) -> Option<SyncState> {
    cluster.config.as_ref()?;
    let odd = cluster.is_kept(SafetyKey::Sync) || cluster.sync_before.is_some();
    cluster.sync.clone().filter(|sync| odd && sync.leader.as_deref() == Some(me))
}

async fn publish(ctx: &Context, cluster: &ClusterState, sync: &SyncState) -> Result<(), LeadError> {
    if cluster.sync.as_ref() != Some(sync) {
        let standbys = sync.sync_standby.as_deref().unwrap_or("none");
        info!(standbys, quorum = sync.quorum, "synchronous standbys published");
    }
    let key = ctx.keys.sync();
    let txn = Txn::just(Op::put(&key, json(sync)))
        .when(Compare::Modified { key, revision: cluster.sync_revision });
    let before = ctx.board.sync_writes.lock().begin();
    let result = ctx.store.txn(while_leading(ctx, txn)).await;
    ctx.board.sync_writes.lock().end(before, &result);
    result?;
    Ok(())
}
