//! The last part of a switchover in a Citus cluster: clients go on when the coordinator knows its new primary, and
//! those of other nodes when these do.
//!
//! That takes as long as other nodes take. Until then the record holds clients, and has to end should this node
//! die, so it hangs on a short lease. The leader key does not: with its regular lease a machine that is busy keeps
//! its primary.

use kornak_cluster::{ClusterState, Handover, HandoverPhase, Revision};
use kornak_dcs::{Compare, DcsError, LeaseId, Op, Txn, json};
use tracing::warn;

use super::take_regular_lease;
use crate::citus_tasks::notify::{self, Known};
use crate::context::Context;
use crate::handover::{SHORT_LEASE, keep_alive};

/// Where the record is.
#[derive(Debug, Clone, Copy)]
struct Place {
    revision: Revision,
    lease: LeaseId,
    /// The lease is not the leader key's.
    own: bool,
}

/// Waits until this primary is known, within limits. The revision of the record afterwards.
pub(super) async fn until_registered(
    ctx: &Context,
    cluster: &ClusterState,
    record: Handover,
) -> Revision {
    let (place, registered) =
        tokio::join!(move_record(ctx, cluster, &record), notify::unblock_writes(ctx));
    let renewals = place.own.then(|| keep_alive(ctx, place.lease).drop_guard());
    if !registered {
        notify::until_known(ctx, Known::Coordinator).await;
    }
    let record = Handover { phase: HandoverPhase::Settle, ..record };
    let revision = match put(ctx, &record, place.lease, place.revision).await {
        Ok(Some(revision)) => revision,
        Ok(None) | Err(_) => place.revision,
    };
    notify::until_known(ctx, Known::Everywhere).await;
    drop(renewals);
    revision
}

/// Takes the record to a lease of its own, then the leader key to its regular one. If the former fails, the two
/// go on with the lease of the take-over.
async fn move_record(ctx: &Context, cluster: &ClusterState, record: &Handover) -> Place {
    let revision = cluster.handover_revision;
    let stays = Place {
        revision,
        lease: ctx.keeper.held().map_or(LeaseId::NONE, |held| held.lease),
        own: false,
    };
    let moved = async {
        let granted = ctx.store.grant(SHORT_LEASE).await?;
        let put = put(ctx, record, granted.lease, revision).await?;
        Ok::<_, DcsError>(put.map(|revision| Place { revision, lease: granted.lease, own: true }))
    };
    match moved.await {
        Ok(Some(place)) => {
            take_regular_lease(ctx, cluster).await;
            place
        }
        Ok(None) => stays,
        Err(error) => {
            warn!(
                error = &error as &dyn std::error::Error,
                "handover record stays on the leader key's lease"
            );
            stays
        }
    }
}

/// Writes the record if nobody else has; `None`: somebody has.
async fn put(
    ctx: &Context,
    record: &Handover,
    lease: LeaseId,
    revision: Revision,
) -> Result<Option<Revision>, DcsError> {
    let key = ctx.keys.handover();
    let txn = Txn::just(Op::put_leased(&key, json(record), lease))
        .when(Compare::Modified { key, revision });
    let outcome = ctx.store.txn(txn).await?;
    Ok(outcome.succeeded.then_some(outcome.revision))
}
