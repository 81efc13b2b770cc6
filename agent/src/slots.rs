//! Carries out what [`crate::ha::slots`] plans, on leaders and on standbys.

use std::collections::BTreeMap;

use kornak_cluster::{ClusterState, Lsn};
use tracing::{info, warn};

use crate::context::Context;
use crate::guard::boottime_now;
use crate::ha::Server;
use crate::ha::slots::{Found, GoneSince, Here, Plan, plan, wanted};
use crate::postgres::{SqlError, slot_name_of};

/// Makes the slots of this node what they should be. Returns those that there were.
pub async fn keep(
    ctx: &Context,
    cluster: &ClusterState,
    leads: bool,
    gone_since: &mut GoneSince,
) -> Result<Vec<Found>, SqlError> {
    // Without a configuration it is not known which slots are wanted.
    let Some(config) = cluster.config.clone() else { return ctx.postgres.slots().await };
    if !ctx.settings.postgresql.use_slots.unwrap_or_else(|| config.use_slots()) {
        return Ok(Vec::new());
    }
    let found = ctx.postgres.slots().await?;
    let replayed = match &ctx.observed().server {
        Server::Standby(facts) => Some(facts.replayed),
        _ => None,
    };
    let here = Here { name: &ctx.name, tags: &ctx.settings.tags, leads, replayed };
    let wanted = wanted(here, cluster, slot_name_of);
    warn_of_shared_names(ctx, cluster);
    let retained = cluster.status.as_ref().map(|status| status.retain_slots.clone());
    let retained = retained.unwrap_or_default();
    let mut plan = plan(here, &config, &wanted, &found, &retained, boottime_now(), gone_since);
    if config.pause {
        plan.drop.clear();
    }
    for slot in &plan.unknown_logical {
        warn!(
            slot,
            kept = ?config.member_slots_ttl,
            "logical slot that nobody has asked for: it is dropped after this time unless it is used; name it \
             in slots or ignore_slots of the dynamic configuration to keep it"
        );
    }
    carry_out(ctx, &plan, &found).await?;
    *ctx.slots_to_copy.lock() = plan.copy_logical;
    Ok(found)
}

/// Of members whose names differ only in what a slot's name cannot say, one never streams.
fn warn_of_shared_names(ctx: &Context, cluster: &ClusterState) {
    let mut names: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for name in cluster.members.keys() {
        names.entry(slot_name_of(name)).or_default().push(name);
    }
    for (slot, members) in names.iter().filter(|(_, members)| members.len() > 1) {
        let members = members.join(", ");
        let text = format!("{slot}: {members}");
        if ctx.shared_slot.lock().replace(text.clone()).as_ref() != Some(&text) {
            warn!(slot, members, "members share a replication slot name: rename one of them");
        }
    }
}

async fn carry_out(ctx: &Context, plan: &Plan, found: &[Found]) -> Result<(), SqlError> {
    for name in &plan.drop {
        if ctx.postgres.drop_slot(name).await? {
            info!(slot = %name, "slot that nobody needs was dropped");
        }
    }
    for name in &plan.create_physical {
        ctx.postgres.create_physical_slot(name).await?;
        info!(slot = %name, "slot created");
    }
    for (name, database, plugin) in &plan.create_logical {
        match ctx.postgres.create_logical_slot(name, database, plugin).await {
            Ok(()) => info!(slot = %name, database = %database, "logical slot created"),
            // The database may come later; the other slots must not wait for it.
            Err(error) => complain(ctx, name, &error, "logical slot could not be created"),
        }
    }
    for (name, to) in &plan.advance {
        if let Err(error) = advance(ctx, found, name, *to).await {
            complain(ctx, name, &error, "slot could not be moved forward");
        }
    }
    Ok(())
}

async fn advance(ctx: &Context, found: &[Found], name: &str, to: Lsn) -> Result<(), SqlError> {
    let database = found.iter().find(|slot| slot.name == name).and_then(|it| it.database.clone());
    match database {
        Some(database) => ctx.postgres.advance_logical_slot(name, &database, to).await,
        None => ctx.postgres.advance_slot(name, to).await,
    }
}

/// Once for each slot and reason.
fn complain(ctx: &Context, slot: &str, error: &SqlError, what: &'static str) {
    let text = format!("{slot}: {error}");
    if ctx.slot_complaint.lock().replace(text.clone()).as_ref() != Some(&text) {
        warn!(slot, error = error as &dyn std::error::Error, "{what}");
    }
}
