//! Carries out what [`crate::ha::slots`] plans, on leaders and on standbys.

use std::collections::BTreeMap;

use kornak_cluster::{ClusterState, Lsn};
use tracing::{info, warn};

use crate::context::Context;
use crate::ha::Server;
use crate::ha::slots::{Found, GoneSince, Here, Plan, plan, wanted};
use crate::postgres::{SqlError, slot_name_of};

/// From this version on (16) standbys decode changes.
const DECODING_STANDBYS: u32 = 160_000;

/// Makes the slots of this node what they should be. Returns those that there were.
pub async fn keep(
    ctx: &Context,
    cluster: &ClusterState,
    leads: bool,
    gone_since: &mut GoneSince,
) -> Result<Vec<Found>, SqlError> {
    // Without a configuration it is not known which slots are wanted.
    let Some(config) = cluster.config.clone() else { return ctx.server.slots().await };
    if !ctx.settings.postgresql.use_slots.unwrap_or_else(|| config.use_slots()) {
        return Ok(Vec::new());
    }
    let found = ctx.server.slots().await?;
    let observed = ctx.observed();
    let replayed = match &observed.server {
        Server::Standby(facts) => Some(facts.replayed),
        _ => None,
    };
    let version = observed.status.as_deref().map_or(0, |status| status.version);
    // The leader of a standby cluster is a standby, too.
    let decodes = replayed.is_none() || version == 0 || version >= DECODING_STANDBYS;
    let other_leads = cluster.leader.as_ref().is_some_and(|leader| leader.name != ctx.name);
    let follows = !leads && other_leads && replayed.is_some();
    let here =
        Here { name: &ctx.name, tags: &ctx.settings.tags, leads, decodes, follows, replayed };
    let wanted = wanted(here, cluster, slot_name_of);
    warn_of_shared_names(ctx, cluster);
    let retained = cluster.status.as_ref().map(|status| status.retain_slots.clone());
    let retained = retained.unwrap_or_default();
    let mut plan = plan(here, &config, &wanted, &found, &retained, ctx.machine.now(), gone_since);
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
    *ctx.board.slots_to_copy.lock() = plan.copy_logical;
    Ok(found)
}

/// Moves slots to where others have told that they are, while the store is away: a standby's by the leader's, a
/// leader's by its members. Nothing is created or dropped then.
pub async fn advance_as_told(
    ctx: &Context,
    cluster: &ClusterState,
    told: BTreeMap<String, Lsn>,
) -> Result<(), SqlError> {
    let mut cluster = cluster.clone();
    let Some(config) = cluster.config.clone().filter(|_| !told.is_empty()) else { return Ok(()) };
    cluster.status.get_or_insert_default().slots = told;
    let found = ctx.server.slots().await?;
    let replayed = match &ctx.observed().server {
        Server::Standby(facts) => Some(facts.replayed),
        _ => None,
    };
    let tags = &ctx.settings.tags;
    let here =
        Here { name: &ctx.name, tags, leads: false, decodes: true, follows: false, replayed };
    let wanted = wanted(here, &cluster, slot_name_of);
    let mut nothing_gone = GoneSince::default();
    let whole = plan(here, &config, &wanted, &found, &[], ctx.machine.now(), &mut nothing_gone);
    carry_out(ctx, &Plan { advance: whole.advance, ..Plan::default() }, &found).await
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
        if ctx.board.shared_slot.lock().replace(text.clone()).as_ref() != Some(&text) {
            warn!(slot, members, "members share a replication slot name: rename one of them");
        }
    }
}

async fn carry_out(ctx: &Context, plan: &Plan, found: &[Found]) -> Result<(), SqlError> {
    for name in &plan.drop {
        if ctx.server.drop_slot(name).await? {
            info!(slot = %name, "slot that nobody needs was dropped");
        }
    }
    for name in &plan.create_physical {
        ctx.server.create_physical_slot(name).await?;
        info!(slot = %name, "slot created");
    }
    for (name, database, plugin) in &plan.create_logical {
        match ctx.server.create_logical_slot(name, database, plugin).await {
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
        Some(database) => ctx.server.advance_logical_slot(name, &database, to).await,
        None => ctx.server.advance_slot(name, to).await,
    }
}

/// Once for each slot and reason.
fn complain(ctx: &Context, slot: &str, error: &SqlError, what: &'static str) {
    let text = format!("{slot}: {error}");
    if ctx.board.slot_complaint.lock().replace(text.clone()).as_ref() != Some(&text) {
        warn!(slot, error = error as &dyn std::error::Error, "{what}");
    }
}
