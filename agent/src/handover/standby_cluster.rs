//! The planned handover of a standby cluster's leadership. Nothing there is writable: no session is held
//! and no server stops.
//!
//! The leader names its candidate in the store's `failover` and lets the key go, in one transaction. The
//! candidate takes the key and turns to the remote primary; everybody else turns to the candidate. One
//! that has received more than the candidate waits until the candidate has it too, for both get the
//! same log.

use std::time::Duration;

use kornak_cluster::{FailoverRequest, Lsn};
use kornak_dcs::{Compare, Op, Txn};
use tracing::{info, warn};

use super::{HandoverError, choose, json};
use crate::context::Context;
use crate::ha::{Server, StandbyRow};
use crate::lease::ClaimError;
use crate::observe::standbys;

/// For the candidate to take the key: it asks the other members first.
const TAKE_LIMIT: Duration = Duration::from_secs(10);

/// Whether it is this kind of leadership that the node would hand over.
pub fn is_led(ctx: &Context) -> bool {
    let config = ctx.cluster().config;
    let is_one = config.is_some_and(|config| config.standby_cluster.is_some());
    is_one && matches!(ctx.observed().server, Server::Standby(_))
}

/// Hands the leadership over. Returns the new leader's name once it has taken the key.
pub async fn hand_over(ctx: &Context, asked: Option<&str>) -> Result<String, HandoverError> {
    let (_, name) = choose(ctx, asked, standing).await?;
    info!(candidate = %name, "handing the standby cluster over");
    let request = FailoverRequest {
        leader: Some(ctx.name.clone()),
        member: Some(name.clone()),
        scheduled_at: None,
    };
    let named = Op::put(ctx.keys.failover(), json(&request));
    match ctx.keeper.release(Vec::new(), vec![named]).await {
        Ok(true) => {}
        Ok(false) => return Err(HandoverError::Lease(ClaimError::Lost)),
        Err(error) => return Err(HandoverError::Store(error)),
    }
    if leads(ctx, &name).await {
        return Ok(name);
    }
    warn!(candidate = %name, "candidate did not take the leader key, any member may");
    let (key, revision) = (ctx.keys.failover(), ctx.cluster().failover_revision);
    let unchanged = Compare::Modified { key: key.clone(), revision };
    if let Err(error) = ctx.store.txn(Txn::just(Op::put(key, "{}")).when(unchanged)).await {
        warn!(
            error = &error as &dyn std::error::Error,
            "request in the store could not be cleared"
        );
    }
    Err(HandoverError::NotLed { candidate: name })
}

fn standing(ctx: &Context) -> Option<(Vec<StandbyRow>, Lsn)> {
    let observed = ctx.observed();
    let status = observed.status.as_ref().filter(|status| status.in_recovery)?;
    Some((standbys(status, false), status.position()))
}

/// Waits until somebody leads; whether it is the candidate.
async fn leads(ctx: &Context, candidate: &str) -> bool {
    let mut view = ctx.view.clone();
    let somebody = async {
        loop {
            view.borrow_and_update();
            let state = ctx.state();
            let leader = state.leader.clone().filter(|leader| leader.name != ctx.name);
            match leader {
                Some(leader) => return leader.name == candidate,
                None if view.changed().await.is_err() => return false,
                None => {}
            }
        }
    };
    ctx.machine.timeout(TAKE_LIMIT, somebody).await.unwrap_or(false)
}
