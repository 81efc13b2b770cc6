//! Carries out the steps of [`crate::ha::sync`], one at a time, each planned from what is known to be
//! no older than the last.

use std::time::Duration;

use kornak_cluster::{ClusterState, SyncState};
use kornak_dcs::{Compare, Op, Txn};
use tracing::{info, warn};

use super::{LeadError, while_leading};
use crate::context::Context;
use crate::ha::PrimaryFacts;
use crate::ha::sync::{SyncStep, plan};
use crate::handover::json;

/// For a changed `synchronous_standby_names` to be in force.
const IN_FORCE_LIMIT: Duration = Duration::from_secs(5);

/// What is known of our own writes of `sync`.
#[derive(Debug)]
pub(super) struct Writes {
    /// One without an answer, or one of an earlier life of this agent, may yet be done by the store.
    open: bool,
    /// What is read is older than our last write until it shows this revision.
    shown_from: u64,
}

impl Default for Writes {
    fn default() -> Self {
        Self { open: true, shown_from: 0 }
    }
}

/// One step. `Ok(false)`: another one is to be planned soon.
pub(super) async fn adjust(
    ctx: &Context,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
    writes: &mut Writes,
) -> Result<bool, LeadError> {
    if cluster.revision < writes.shown_from {
        return Ok(false);
    }
    let mut step = plan(&ctx.name, cluster, facts);
    if writes.open && matches!(step, SyncStep::SetNames(_)) && cluster.sync.is_some() {
        // The open write could name a standby for whom commits would stop waiting now. A write that
        // succeeds changes the revision that it compares, so it will not be done any more.
        step = SyncStep::Publish(cluster.sync.clone().unwrap_or_default());
    }
    match step {
        SyncStep::Settled => Ok(true),
        SyncStep::Publish(sync) => publish(ctx, cluster, &sync, writes).await.map(|()| false),
        SyncStep::SetNames(names) => {
            if names.contains('*') {
                warn!(
                    "no standby can be synchronous: writes wait until a synchronous standby comes"
                );
            }
            info!(names = %names, "commits wait for");
            ctx.postgres.set_synchronous_standby_names(Some(&names), IN_FORCE_LIMIT).await?;
            Ok(false)
        }
    }
}

async fn publish(
    ctx: &Context,
    cluster: &ClusterState,
    sync: &SyncState,
    writes: &mut Writes,
) -> Result<(), LeadError> {
    if cluster.sync.as_ref() != Some(sync) {
        let standbys = sync.sync_standby.as_deref().unwrap_or("none");
        info!(standbys, quorum = sync.quorum, "synchronous standbys");
    }
    let key = ctx.keys.sync();
    let txn = Txn::just(Op::put(&key, json(sync)))
        .when(Compare::Modified { key, revision: cluster.sync_revision });
    match ctx.store.txn(while_leading(ctx, txn)).await {
        Ok(outcome) => {
            writes.open &= !outcome.succeeded;
            writes.shown_from = outcome.revision;
            Ok(())
        }
        Err(error) => {
            writes.open |= error.outcome_is_unknown();
            Err(error.into())
        }
    }
}
