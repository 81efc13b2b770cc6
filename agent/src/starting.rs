//! Starting the leader's server in place: for a job, and for a handover that is given up.
//!
//! Not here: when ([`crate::ha`]).

use std::time::Duration;

use kornak_cluster::{SyncMode, SyncState};
use kornak_dcs::lease::leader_checks;
use kornak_dcs::{Compare, DcsError, Op, Txn, json};
use tracing::warn;

use crate::context::Context;
use crate::guard::Fencing;
use crate::lease::ClaimError;
use crate::postgres::{StartAs, StartError};

/// Why the store still names synchronous standbys.
#[derive(Debug, thiserror::Error)]
pub enum StandAloneError {
    #[error("the leader key was lost")]
    Lease(#[from] ClaimError),
    #[error("the synchronous standbys in the store have changed meanwhile")]
    SyncChanged,
    #[error("the store refused")]
    Store(#[from] DcsError),
}

/// Starts the server as primary, after [`stand_alone`], and waits until it takes connections.
pub(crate) async fn start_in_place(ctx: &Context, limit: Duration) -> Result<(), StartError> {
    ctx.server.start(&StartAs::Primary(Fencing::Armed)).await?;
    ctx.server.wait_ready(limit).await
}

/// Names no synchronous standbys in the store before the leader's server starts in place.
///
/// A server that starts again shows commits that no standby may have and nobody was told of. A
/// failover would take back what somebody has read, so the standbys are named again only when they
/// have all of it (docs/safety.md A13). What is read of the store may be older than what we have written:
/// then nobody knows whom it names.
pub(crate) async fn stand_alone(ctx: &Context) -> Result<(), StandAloneError> {
    let cluster = ctx.cluster();
    let synchronous =
        cluster.config.as_ref().is_some_and(|config| config.sync_mode() != SyncMode::Off);
    let alone = cluster.sync.as_ref().is_some_and(|sync| {
        sync.standbys().is_empty() && sync.leader.as_deref() == Some(ctx.name.as_str())
    });
    if !synchronous || (alone && ctx.board.sync_writes.lock().are_shown_by(&cluster)) {
        return Ok(());
    }
    let held = ctx.keeper.held().ok_or(ClaimError::Lost)?;
    let (leader, key) = (ctx.keys.leader(), ctx.keys.sync());
    let mut txn = Txn::just(Op::put(&key, json(&SyncState::new(&ctx.name, &[]))));
    txn.compare = leader_checks(&leader, held.lease, held.epoch);
    txn.compare.push(Compare::Modified { key, revision: cluster.sync_revision });
    let before = ctx.board.sync_writes.lock().begin();
    let result = ctx.store.txn(txn).await;
    ctx.board.sync_writes.lock().end(before, &result);
    match result {
        Ok(outcome) if outcome.succeeded => Ok(()),
        Ok(_) => Err(StandAloneError::SyncChanged),
        Err(DcsError::Full { .. }) => {
            // Nobody can claim the key as long as that lasts, so nobody takes back what will be read here.
            warn!("synchronous standbys stay named because the store takes no writes");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}
