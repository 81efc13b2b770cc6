//! The hands of [`crate::ha::depose`]: a promise in the store, its end, and the transaction that takes the
//! leader key from a leader that is lost.
//!
//! Each of the three is an errand of the driver, so that none runs beside another, or beside a change of the server that
//! this node's follows. Not here: who is suspected ([`suspicion`]).

pub mod suspicion;

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::member::KORNAK_RECORDS_VERSION;
use kornak_cluster::{ClusterState, Leadership, Lsn, Moment, Pledge, Revision, Timeline};
use kornak_dcs::fence;
use tracing::{info, warn};

use crate::context::Context;
use crate::ha::Server;
use crate::ha::depose;
use crate::jobs::JobError;
use crate::postgres::{ServerStatus, Startup};

/// For the stream to end that the server has been told to end.
const STREAM_ENDS: Duration = Duration::from_secs(5);

/// From one look at the server to the next.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// For a look at the server.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

/// The promise is on disk: ends the stream, and says so in the store.
pub(crate) async fn pledge(ctx: Arc<Context>, of: Leadership) -> Result<(), JobError> {
    info!(epoch = of.epoch.revision.0, "synchronous standby leaves a leader that seems lost");
    ctx.server.follow(None).await?;
    let (timeline, position) = end_of_log(&ctx).await?;
    let pledge = Pledge { v: KORNAK_RECORDS_VERSION, of, timeline, position, withdrawn: false };
    let seen = ctx.state().pledges.get(&ctx.name).map_or(Revision::NONE, |found| found.revision);
    let outcome = ctx.store.txn(fence::pledge(&ctx.keys, &ctx.name, seen, &pledge)).await?;
    if outcome.succeeded {
        info!(%position, %timeline, "nothing is acknowledged to it any more");
    }
    Ok(())
}

/// The end of what is flushed here, once nothing is received, or can be. A server that has started meanwhile may tell
/// less than it has, before it has read its own log.
async fn end_of_log(ctx: &Context) -> Result<(Timeline, Lsn), JobError> {
    let began = ctx.machine.now();
    let mut before: Option<Moment> = None;
    loop {
        ctx.fresh_look(LOOK_LIMIT).await;
        let seen = ctx.observed();
        match &seen.server {
            Server::Standby(facts)
                if facts.wal_known && seen.status.as_deref().is_some_and(receives_nothing) =>
            {
                // What one look shows was read in no certain order.
                if before.is_some_and(|before| before < seen.at) {
                    return Ok((facts.timeline, facts.position()));
                }
                before = Some(seen.at);
            }
            _ => before = None,
        }
        if ctx.machine.since(began) > STREAM_ENDS {
            return Err(JobError::StreamGoesOn);
        }
        ctx.machine.sleep(BETWEEN_LOOKS).await;
    }
}

/// Whether a server that was told to follow nobody does. That a configuration is in force for sessions does not mean
/// that the startup process, which may be waiting for a query that is in its way, has read it; and a walreceiver that
/// connects is not listed.
fn receives_nothing(status: &ServerStatus) -> bool {
    status.receiver.is_none()
        && status.primary_conninfo.is_empty()
        && status.startup.as_ref().is_some_and(Startup::pauses)
}

/// Takes the promise back, or forgets one that has no object any more.
pub(crate) async fn end_pledge(ctx: Arc<Context>) -> Result<(), JobError> {
    let Some(given) = ctx.pledges.given() else { return Ok(()) };
    if given.binds(&ctx.cluster()) {
        ctx.store.txn(fence::withdraw(&ctx.keys, &ctx.name, given.of)).await?;
        info!(leader = %given.leader, "leader is followed again");
    }
    ctx.pledges.forget();
    Ok(())
}

/// Takes the leader key from a leader that can acknowledge nothing any more, if `cluster` is what the store holds still.
pub(crate) async fn depose(ctx: Arc<Context>, cluster: Arc<ClusterState>) -> Result<(), JobError> {
    let Some((leader, fence, sync)) = depose::claim(&ctx.name, &cluster) else { return Ok(()) };
    let txn = fence::depose(&ctx.keys, leader, &cluster, &fence.counted, &sync);
    if ctx.store.txn(txn).await?.succeeded {
        warn!(
            node = %leader.name,
            standbys = ?fence.best,
            "leader deposed: its host seems lost, and its standbys acknowledge nothing to it any more"
        );
    }
    Ok(())
}
