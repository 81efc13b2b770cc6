//! The leader's failsafe rounds: while the store does not prove the lease, every member is asked.

use std::collections::BTreeMap;
use std::sync::Arc;

use kornak_cluster::Lsn;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::context::Context;
use crate::failsafe::{ROUND_EVERY, ROUND_TIMEOUT, relied_on, whom_to_ask};
use crate::ha::{DataDir, Server};
use crate::lease::Held;
use crate::observe::Observation;
use crate::peers::FailsafeReply;
use crate::postgres::slot_name_of;

/// Asks once a second while the lease is held and not being proven, until `stop`.
pub async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let mut active = false;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = ctx.machine.sleep(ROUND_EVERY) => {}
        }
        let Some(held) = ctx.keeper.held() else {
            active = false;
            ctx.board.failsafe_active.store(false, std::sync::atomic::Ordering::Relaxed);
            continue;
        };
        let leads = serves_or_is_to(&ctx.observed());
        let unproven =
            ctx.machine.now().since(held.proven_at) > (held.ttl / 3).max(ROUND_EVERY * 2);
        if !leads || !unproven {
            if std::mem::replace(&mut active, false) {
                info!("lease is proven by the store again");
                ctx.board.failsafe_active.store(false, std::sync::atomic::Ordering::Relaxed);
            }
            continue;
        }
        let confirmed = round(&ctx, held).await;
        if confirmed && !std::mem::replace(&mut active, true) {
            warn!("store does not answer, every member confirms this leader");
        }
        ctx.board.failsafe_active.store(confirmed, std::sync::atomic::Ordering::Relaxed);
    }
}

/// A leader whose server has crashed starts it in place, and needs the members' word as long as that takes.
fn serves_or_is_to(seen: &Observation) -> bool {
    let was_primary = matches!(&seen.data, DataDir::Initialized(control) if control.was_primary);
    match seen.server {
        Server::Primary(_) => true,
        Server::Stopped | Server::Starting { .. } => was_primary,
        _ => false,
    }
}

/// How far the leader's slots are, which standbys read in the store otherwise. Empty if the server does not say.
async fn slots(ctx: &Context) -> BTreeMap<String, Lsn> {
    let Ok(Ok(found)) = ctx.machine.timeout(ROUND_EVERY, ctx.server.slots()).await else {
        return BTreeMap::new();
    };
    let own = match &ctx.observed().server {
        Server::Primary(facts) => Some((slot_name_of(&ctx.name), facts.lsn)),
        _ => None,
    };
    crate::ha::slots::positions(&found).chain(own).collect()
}

/// One round; true if all have accepted.
async fn round(ctx: &Context, Held { ttl, epoch, .. }: Held) -> bool {
    let began = ctx.machine.now();
    let cluster = ctx.cluster();
    let unproven = ctx.board.unproven_failsafe.lock().clone();
    let Some(list) = whom_to_ask(&ctx.name, &cluster, unproven.as_ref()) else { return false };
    let me = cluster.members.get(&ctx.name);
    let body = json!({
        "name": ctx.name,
        "conn_url": me.map(|member| member.conn_url.as_str()).unwrap_or_default(),
        "api_url": me.map(|member| member.api_url.as_str()).unwrap_or_default(),
        "slots": slots(ctx).await,
    });
    let promise_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
    let members = &cluster.members;
    let asked = list.iter().map(|(name, url)| {
        let mut body = body.clone();
        // Another member may have the address by now, and its word binds nobody but itself.
        body["kornak"] = json!({
            "promise_ms": promise_ms, "epoch": epoch, "scope": ctx.settings.scope.name, "member": name,
        });
        let tells = members.get(name).is_some_and(|member| member.kornak.is_some());
        async move {
            let base = url.strip_suffix("/patroni").unwrap_or(url);
            match ctx.peers.post_failsafe(base, &body, ROUND_TIMEOUT).await {
                Ok(FailsafeReply::Accepted { promised: None, .. }) if tells => {
                    warn!(node = %name, "server at a member's address makes no promise");
                    None
                }
                Ok(FailsafeReply::Accepted { promised, lsn }) => {
                    Some((promised, (slot_name_of(name), lsn)))
                }
                Ok(reply) => {
                    warn!(node = %name, reply = ?reply, "member does not confirm this leader");
                    None
                }
                Err(error) => {
                    warn!(node = %name, error = &error as &dyn std::error::Error,
                        "member could not be asked to confirm this leader");
                    None
                }
            }
        }
    });
    let answers: Option<Vec<_>> = futures_util::future::join_all(asked).await.into_iter().collect();
    let Some(answers) = answers else { return false };
    let (promised, positions): (Vec<_>, BTreeMap<_, _>) = answers.into_iter().unzip();
    // Slots of members that stream from another one follow what these say, as in the store otherwise.
    *ctx.board.told_slots.lock() = positions.into_iter().filter(|(_, lsn)| *lsn > Lsn(0)).collect();
    let config = cluster.config.clone().unwrap_or_default();
    let length = relied_on(ttl, config.ttl, &promised);
    // A leader that hears from its members no more retries for as long as it would ask the store.
    let length = length.min(config.loop_wait + config.retry_timeout * 2);
    let margin = ctx.settings.kornak.guard.margin;
    let until = kornak_dcs::lease::fence_at(began, length, margin);
    ctx.keeper.extend_by_failsafe(until).await;
    true
}
