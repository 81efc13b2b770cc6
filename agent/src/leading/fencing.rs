//! When the guard is out of service, and what the store is told of it.
//!
//! In maintenance mode the store must not be needed, so a primary is taken out of the guard's hands; but
//! first the store says so (`unfenced`), and keeps saying it until the guard is back with a proven
//! lease or the server is no primary any more. Meanwhile no Kornak member is promoted by itself. The leader
//! of a standby cluster is not writable: there is nothing to guard, and nothing to say.

use kornak_cluster::{ClusterState, SafetyKey, Unfenced};
use kornak_dcs::{Compare, Op, Txn};
use tracing::{info, warn};

use super::LeadError;
use crate::context::Context;
use crate::ha::{PrimaryFacts, Server};
use kornak_dcs::json;

/// On a leader whose server is a primary.
pub(super) async fn primary(
    ctx: &Context,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
) -> Result<(), LeadError> {
    // Whether maintenance mode is on is not known: all stays as it is.
    let Some(config) = &cluster.config else { return Ok(()) };
    let paused = config.pause;
    let own = cluster.unfenced.as_ref().filter(|mark| mark.member == ctx.name);
    let marked = own.is_some() && !cluster.doubts.contains_key(&SafetyKey::Unfenced);
    let key = ctx.keys.unfenced();
    let Some(held) = ctx.keeper.held() else { return Ok(()) };
    let mine = Compare::Lease { key: ctx.keys.leader(), lease: held.lease };
    if paused && !(ctx.keeper.is_unfenced() && marked) {
        let mark = Unfenced {
            member: ctx.name.clone(),
            sysid: cluster.initialize.clone().unwrap_or_default(),
            timeline: facts.timeline,
            conn_url: Some(crate::self_report::conn_url(&ctx.settings)),
        };
        let outcome = ctx.store.txn(Txn::just(Op::put(&key, json(&mark))).when(mine)).await?;
        if outcome.succeeded && !ctx.keeper.is_unfenced() {
            ctx.keeper.unfence().await?;
            info!(
                "maintenance mode: the guard is out of service, nobody is promoted automatically"
            );
        }
    } else if !paused && (own.is_some() || ctx.keeper.is_unfenced() || is_nobodys(cluster)) {
        ctx.keeper.fence().await?;
        // Not another member's that was written meanwhile.
        let seen = Compare::Modified { key: key.clone(), revision: cluster.unfenced_revision };
        ctx.store.txn(Txn::just(Op::delete(&key)).when(mine).when(seen)).await?;
        info!("maintenance mode is over: the guard is back");
    } else if let Some(mark) = cluster.unfenced.as_ref().filter(|_| own.is_none())
        && facts.timeline > mark.timeline
        && !cluster.doubts.contains_key(&SafetyKey::Unfenced)
    {
        // This node was promoted beside it, so it keeps nobody from anything any more.
        let seen = Compare::Modified { key: key.clone(), revision: cluster.unfenced_revision };
        ctx.store.txn(Txn::just(Op::delete(&key)).when(mine).when(seen)).await?;
        warn!(node = %mark.member, "led past a server that no guard watched; if it runs, it is no member");
    }
    Ok(())
}

/// A mark that makes no sense, where there was none before.
fn is_nobodys(cluster: &ClusterState) -> bool {
    cluster.is_kept(SafetyKey::Unfenced) && cluster.unfenced.is_none()
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
    let Some(mark) = cluster.unfenced.as_ref().filter(|mark| mark.member == ctx.name) else {
        return Ok(());
    };
    let there = !cluster.doubts.contains_key(&SafetyKey::Unfenced);
    let proven = matches!(ctx.observed().server, Server::Stopped | Server::Standby(_));
    if there && proven && ctx.view.borrow().reach == kornak_dcs::Reach::Live {
        let key = ctx.keys.unfenced();
        let own = Compare::Value { key: key.clone(), value: json(mark) };
        ctx.store.txn(Txn::just(Op::delete(key)).when(own)).await?;
        info!("the server that no guard watched is no primary any more");
    }
    Ok(())
}
