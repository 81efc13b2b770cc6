//! Logging in to the candidate of a planned switchover while it is still a standby.
//!
//! A connection lives through the promotion, so a session that is held needs no login when the gate
//! opens: it is the login of all sessions at once that would make up most of the wait. It is used
//! only if the candidate has then proven that it accepts writes.

use std::sync::Arc;

use kornak_cluster::{GroupId, HandoverPhase, Topology};
use kornak_config::proxy::{ListenerSettings, Target};

use super::{Identity, Opened, Way, dial};
use crate::backend::Address;
use crate::gate::Side;
use crate::route::Candidate;
use crate::shared::Shared;

/// Waits until the gate is open, or, if that is too late, a server has proven itself, and answers a
/// connection to the new leader if there was time to open one.
pub(super) async fn open(
    shared: &Shared,
    listener: &ListenerSettings,
    identity: &Identity,
    side: Side,
    way: Way,
) -> Option<Opened> {
    if !shared.gate.is_closed(side) || listener.target != Target::Primary {
        way_is_free(shared, side, way).await;
        return None;
    }
    let early = dial_candidate(shared, identity, side);
    tokio::pin!(early);
    let opened = tokio::select! {
        biased;
        opened = &mut early => {
            way_is_free(shared, side, way).await;
            opened?
        }
        () = way_is_free(shared, side, way) => {
            // If a login is under way it is nearly done, unless another server leads now.
            let mut standings = shared.standings.subscribe();
            tokio::select! {
                opened = &mut early => opened?,
                _ = standings.changed() => return None,
            }
        }
    };
    let standings = shared.standings();
    let serving = standings.serving(opened.candidate.group).ok()?;
    if serving.name != opened.candidate.name {
        return None;
    }
    let mut opened = Opened { term: standings.term(opened.candidate.group), ..opened };
    // It said "on" at login; the promotion is proven.
    if opened.connected.params.in_hot_standby().is_some() {
        let _ = opened.connected.params.set(b"in_hot_standby", b"off");
    }
    Some(opened)
}

async fn way_is_free(shared: &Shared, side: Side, way: Way) {
    match way {
        Way::Gate => shared.gate.open(side).await,
        // Whoever is opened ahead leads the coordinator's group; elsewhere `open` waits.
        Way::Early => {
            let mut standings = shared.standings.subscribe();
            // The sender lives as long as the proxy.
            let _ = standings.wait_for(|now| now.serving(GroupId::COORDINATOR).is_ok()).await;
        }
    }
}

async fn dial_candidate(shared: &Shared, identity: &Identity, side: Side) -> Option<Opened> {
    let mut topology = shared.topology.subscribe();
    let known = tokio::select! {
        biased;
        known = topology.wait_for(|cluster| candidate(cluster).is_some()) => candidate(&*known.ok()?)?,
        () = shared.gate.open(side) => return None,
    };
    let address = Address::from(&*known.node);
    match dial(shared, &known, &address, Some(identity), None).await {
        Ok(connected) => {
            let (term, generation, source) = (0, 0, None);
            Some(Opened { connected, candidate: known, address, side, term, generation, source })
        }
        Err(error) => {
            tracing::debug!(server = %known.name, error = &error as &dyn std::error::Error, "candidate cannot be used ahead");
            None
        }
    }
}

/// The candidate, once the old leader is certain to stop.
fn candidate(cluster: &Topology) -> Option<Candidate> {
    let record = cluster.handover.as_ref().filter(|record| record.is_understood())?;
    let certain = matches!(record.phase, HandoverPhase::Switch | HandoverPhase::Promote);
    let group = record.group.unwrap_or(GroupId::COORDINATOR);
    if !certain || group != GroupId::COORDINATOR {
        return None;
    }
    let node = cluster.groups.get(&group)?.nodes.get(record.candidate.as_ref()?)?;
    Some(Candidate {
        name: node.name.as_str().into(),
        node: Arc::new(node.clone()),
        group,
        leading: true,
    })
}
