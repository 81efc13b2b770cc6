//! Looks for signs of life of the leader, on a standby that may have to depose it.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{ClusterState, Epoch, Lsn, Member};
use kornak_dcs::Reach;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::context::Context;
use crate::ha::Server;
use crate::ha::depose::{Signs, fenceable};
use crate::peers::PeerError;
use crate::postgres::SqlError;

/// Looks until `stop`.
pub async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let after = ctx.settings.kornak.failover.suspect_after;
    if after.is_zero() {
        return;
    }
    let mut signs: Option<Signs> = None;
    loop {
        let overdue = signs.is_some_and(|signs| signs.is_overdue());
        let pause = if overdue { after / 20 } else { after / 8 };
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = ctx.machine.sleep(pause) => {}
        }
        let cluster = ctx.state();
        let lost = match of_leader(&ctx, &cluster) {
            None => {
                signs = None;
                None
            }
            Some((epoch, name, member)) => {
                let known = signs.filter(|signs| signs.epoch() == epoch);
                let signs = signs.insert(known.unwrap_or_else(|| Signs::of(epoch)));
                let asked = look(&ctx, &cluster, member, signs, after).await;
                (asked && signs.are_missing(ctx.machine.now(), after)).then_some((epoch, name))
            }
        };
        let name = lost.map(|(_, name)| name);
        if ctx.suspicion.set(lost, ctx.machine.now()) {
            match name {
                Some(node) => warn!(
                    node,
                    "leader shows no sign of life: it renews no lease, and neither agent nor server answers"
                ),
                None => info!("no leader is suspected any more"),
            }
            ctx.signals.cycle.notify_one();
        }
    }
}

/// The leader, if this node may have to depose it.
fn of_leader<'a>(ctx: &Context, cluster: &'a ClusterState) -> Option<(Epoch, &'a str, &'a Member)> {
    if ctx.view.borrow().reach != Reach::Live || ctx.promises.in_force(ctx.machine.now()) {
        return None;
    }
    let of = fenceable(&ctx.name, cluster)?;
    let (name, member) = cluster.leader_member()?;
    Some((of.epoch, name, member))
}

/// A server that cannot serve yet, or any more, is none that is lost.
fn is_its_answer(error: &SqlError) -> bool {
    error.is_an_answer() || matches!(error, SqlError::StartingUp | SqlError::ShuttingDown)
}

/// Asks for each sign; where the lease is renewed the others are not needed. False: nothing may be concluded.
async fn look(
    ctx: &Context,
    cluster: &ClusterState,
    leader: &Member,
    signs: &mut Signs,
    after: Duration,
) -> bool {
    let limit = after / 4;
    let Some(lease) = cluster.leader.as_ref().map(|leader| leader.lease) else { return false };
    let renewed = || async {
        let asked = ctx.machine.timeout(limit, ctx.store.time_to_live(lease)).await;
        asked.ok().and_then(Result::ok)
    };
    match renewed().await {
        Some(told) if told.age_at_most() < after => {
            signs.forget();
            return true;
        }
        Some(_) => {}
        None => {
            signs.forget();
            return false;
        }
    }
    let at = ctx.machine.now();
    let rest = ctx.peers.get_status(&leader.api_url, limit);
    let server = async {
        let Some((host, port)) = leader.conn_address() else { return false };
        let asked = ctx.machine.timeout(limit, ctx.server.recovery_of(&host, port)).await;
        asked.is_ok_and(|answer| answer.map_or_else(|error| is_its_answer(&error), |_| true))
    };
    let (rest, server) = tokio::join!(rest, server);
    ctx.fresh_look(limit).await;
    let received = match &ctx.observed().server {
        Server::Standby(facts) => facts.received,
        _ => Lsn(0),
    };
    let answers = match rest {
        Ok(_) | Err(PeerError::Status(_) | PeerError::Nonsense(_)) => true,
        Err(_) => false,
    };
    signs.asked(at, answers || server, received);
    match renewed().await {
        Some(told) => {
            signs.renewed(told.age_at_least());
            true
        }
        None => {
            signs.forget();
            false
        }
    }
}
