//! The members' replication slots: each standby has one on the leader, and none is left behind on a
//! server that leads no more, where it would keep WAL for ever.
//!
//! Slots that no member ever had are not touched: somebody else owns them.

use std::collections::BTreeMap;
use std::time::Duration;

use kornak_cluster::ClusterState;
use tokio::time::Instant;
use tracing::info;

use crate::context::Context;
use crate::postgres::{Slot, SqlError, slot_name_of};

/// Since when the slot of a member that has vanished is kept.
pub type GoneSince = BTreeMap<String, Instant>;

/// What a leader has to change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    pub create: Vec<String>,
    pub drop: Vec<String>,
}

/// Compares the slots that are there with those that members need. `known` are slots that the store
/// knows as members'.
pub fn plan(
    wanted: &[String],
    known: &[String],
    existing: &[Slot],
    ttl: Duration,
    now: Instant,
    gone_since: &mut GoneSince,
) -> Plan {
    let create = wanted
        .iter()
        .filter(|name| !existing.iter().any(|slot| slot.name == **name))
        .cloned()
        .collect();
    gone_since.retain(|name, _| !wanted.contains(name));
    let gone = existing
        .iter()
        .filter(|slot| slot.kind == "physical" && !slot.active && !slot.temporary)
        .filter(|slot| known.contains(&slot.name) && !wanted.contains(&slot.name));
    let drop = gone
        .filter(|slot| {
            let since = *gone_since.entry(slot.name.clone()).or_insert(now);
            now.duration_since(since) >= ttl
        })
        .map(|slot| slot.name.clone())
        .collect();
    Plan { create, drop }
}

/// On a leader: each of `wanted` has a slot; the slot of a member that vanished is kept for `ttl`.
pub async fn keep(
    ctx: &Context,
    cluster: &ClusterState,
    wanted: &[String],
    ttl: Duration,
    gone_since: &mut GoneSince,
) -> Result<Vec<Slot>, SqlError> {
    let existing = ctx.postgres.slots().await?;
    let known = cluster.status.as_ref().map(|status| status.retain_slots.clone());
    let known = known.unwrap_or_default();
    let Plan { create, drop } = plan(wanted, &known, &existing, ttl, Instant::now(), gone_since);
    for name in &create {
        ctx.postgres.create_physical_slot(name).await?;
        info!(slot = %name, "slot created");
    }
    for name in &drop {
        if ctx.postgres.drop_slot(name).await? {
            info!(slot = %name, "slot of a member that has gone was dropped");
        }
    }
    Ok(existing)
}

/// On a standby: slots of members that were left from its time as leader are dropped.
pub async fn clear(ctx: &Context, cluster: &ClusterState) -> Result<(), SqlError> {
    let members: Vec<String> = cluster.members.keys().map(|name| slot_name_of(name)).collect();
    let cascades = |name: &String| {
        cluster.members.iter().any(|(member, facts)| {
            slot_name_of(member) == *name && facts.tags.replicatefrom() == Some(ctx.name.as_str())
        })
    };
    for slot in ctx.postgres.slots().await? {
        let ours = slot.kind == "physical" && !slot.active && members.contains(&slot.name);
        if ours && !cascades(&slot.name) && ctx.postgres.drop_slot(&slot.name).await? {
            info!(slot = %slot.name, "slot from this server's time as leader dropped");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(name: &str, active: bool) -> Slot {
        Slot {
            name: name.into(),
            kind: "physical".into(),
            plugin: None,
            database: None,
            active,
            temporary: false,
            xmin: None,
            catalog_xmin: None,
            restart_lsn: None,
            confirmed_flush_lsn: None,
            wal_status: None,
        }
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_vanished_member_keeps_its_slot_for_a_while_and_strangers_for_ever() {
        let mut gone = GoneSince::new();
        let start = Instant::now();
        let ttl = Duration::from_secs(60);
        let existing = [slot("b", true), slot("c", false), slot("backup", false)];
        let mut at = |seconds, wanted: &[&str]| {
            let now = start + Duration::from_secs(seconds);
            plan(&names(wanted), &names(&["b", "c"]), &existing, ttl, now, &mut gone)
        };
        assert_eq!(at(0, &["b", "d"]).create, names(&["d"]));
        assert_eq!(at(59, &["b"]), Plan::default());
        assert_eq!(at(60, &["b"]).drop, names(&["c"]));
        assert_eq!(at(61, &["b", "c"]), Plan::default(), "it has come back");
        assert_eq!(at(120, &["b"]), Plan::default(), "and gone again: the time counts anew");
    }
}
