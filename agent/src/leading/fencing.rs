//! When the guard is out of service, and what the store is told of it.
//!
//! In maintenance mode the store must not be needed, so a primary is taken out of the guard's hands; but
//! first the store says so (`unfenced`), and keeps saying it until the guard is back with a proven
//! lease or the server is no primary any more. Meanwhile no Kornak member is promoted by itself. The leader
//! of a standby cluster is not writable: there is nothing to guard, and nothing to say.

use kornak_cluster::{ClusterState, Unfenced};
use kornak_dcs::{Compare, Op, Txn};
use tracing::info;

use super::LeadError;
use crate::context::Context;
use crate::ha::{PrimaryFacts, Server};
use crate::handover::json;

/// On a leader whose server is a primary.
pub(super) async fn primary(
    ctx: &Context,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
) -> Result<(), LeadError> {
    let paused = cluster.config.as_ref().is_some_and(|config| config.pause);
    let marked = cluster.unfenced.as_ref().is_some_and(|mark| mark.member == ctx.name);
    let key = ctx.keys.unfenced();
    let Some(held) = ctx.keeper.held() else { return Ok(()) };
    let mine = Compare::Lease { key: ctx.keys.leader(), lease: held.lease };
    if paused && !(ctx.keeper.is_unfenced() && marked) {
        let mark = Unfenced {
            member: ctx.name.clone(),
            sysid: cluster.initialize.clone().unwrap_or_default(),
            timeline: facts.timeline,
        };
        let outcome = ctx.store.txn(Txn::just(Op::put(&key, json(&mark))).when(mine)).await?;
        if outcome.succeeded && !ctx.keeper.is_unfenced() {
            ctx.keeper.unfence().await?;
            info!(
                "maintenance mode: the guard is out of service, nobody is promoted automatically"
            );
        }
    } else if !paused && (marked || ctx.keeper.is_unfenced()) {
        ctx.keeper.fence().await?;
        ctx.store.txn(Txn::just(Op::delete(&key)).when(mine)).await?;
        info!("maintenance mode is over: the guard is back");
    }
    Ok(())
}

/// On the leader of a standby cluster.
pub(super) async fn standby_leader(ctx: &Context) -> Result<(), LeadError> {
    if !ctx.keeper.is_unfenced() {
        ctx.keeper.unfence().await?;
        info!("leading a standby cluster: nothing here is writable, the guard is not needed");
    }
    Ok(())
}

/// On every node: a mark of its own is taken back once its server is proven to be no primary.
pub(super) async fn not_primary(ctx: &Context, cluster: &ClusterState) -> Result<(), LeadError> {
    let marked = cluster.unfenced.as_ref().is_some_and(|mark| mark.member == ctx.name);
    let proven = matches!(ctx.observed().server, Server::Stopped | Server::Standby(_));
    if marked && proven && ctx.view.borrow().reach == kornak_dcs::Reach::Live {
        let key = ctx.keys.unfenced();
        ctx.store.txn(Txn::just(Op::delete(key))).await?;
        info!("the server that no guard watched is no primary any more");
    }
    Ok(())
}
