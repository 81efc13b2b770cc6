//! Logging in to the candidate of a planned switchover while it is still a standby.
//!
//! A connection lives through the promotion, so a session that is held needs no login when the gate
//! opens: it is the login of all sessions at once that would make up most of the wait. It is used
//! only if the candidate has then proven that it accepts writes.
//!
//! Sessions that are at work log in while the switchover is prepared and nobody is held: later their
//! logins would take time from the stop and the promotion. The others do when they are held.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use kornak_cluster::{GroupId, HandoverPhase, Topology, discard};
use kornak_config::proxy::{ListenerSettings, Target};
use tokio_util::task::AbortOnDropHandle;

use super::dial::dial;
use super::{Client, Way};
use crate::admission::identity::Identity;
use crate::cluster::route::Candidate;
use crate::cluster::standing::{Generation, Term};
use crate::net::backend::Address;
use crate::pool::link::Opened;
use crate::shared::Shared;
use crate::shared::ahead::Begun;
use crate::waiting::gate::Side;

/// A session whose client has spoken within this time is at work: it will speak again, and then not wait.
const AT_WORK: Duration = Duration::from_secs(10);

/// Sessions that log in while a switchover is prepared. A login takes a candidate 4 to 8 ms of one core.
const MOST: usize = 2048;

impl Client {
    /// Begins to log in to the candidate, if a switchover is prepared and the client is at work.
    pub(super) fn log_in_ahead(&self) {
        let shared = &self.talk.shared;
        let at_work = self.talk.last_heard.elapsed() < AT_WORK;
        if !at_work || self.listener.target != Target::Primary || self.talk.member.is_some() {
            return;
        }
        let Some(known) = prepared(&shared.topology.borrow()) else { return };
        let session = self.talk.handle.id;
        let mut begun = shared.ahead.begun();
        let again = begun.get(&session).is_some_and(|it| it.candidate.name == known.name);
        if begun.len() >= MOST || again {
            return;
        }
        let candidate = known.clone();
        let turns = shared.ahead.turns();
        let (shared, identity) = (Arc::clone(shared), Arc::clone(&self.identity));
        let login = tokio::task::spawn_local(async move {
            // Never closed.
            let _turn = turns.acquire().await;
            let address = Address::from(&*known.node);
            dial(&shared, &known, &address, Some(&identity), None).await
        });
        let login = AbortOnDropHandle::new(login);
        begun.insert(session, Begun { candidate, login, when: Instant::now() });
    }
}

/// A login that was begun while the switchover was prepared, and is of use now that the server leads.
async fn ready(shared: &Shared, session: u64, side: Side) -> Option<Opened> {
    let serving = {
        let standings = shared.standings.borrow();
        Arc::clone(&standings.serving(GroupId::COORDINATOR).ok()?.name)
    };
    let Begun { candidate, login, .. } = shared.ahead.take(session, &serving)?;
    let mut connected = login.await.ok()?.ok()?;
    if !connected.stream.is_alive(&mut connected.rest) {
        return None;
    }
    let address = Address::from(&*candidate.node);
    let (term, generation, source) = (Term::NONE, Generation::NONE, None);
    Some(Opened { connected, candidate, address, side, term, generation, source })
}

impl Client {
    /// Makes the unnamed statement again on a new server, which may refuse it: it may have become invalid.
    /// Answers false if the server broke.
    pub(super) async fn restore_unnamed(&self, opened: &mut Opened) -> bool {
        let mut parse = BytesMut::new();
        if !self.talk.session.put_unnamed(&mut parse) {
            return true;
        }
        let limit = self.talk.shared.settings().limits.connect_timeout;
        let replayed = tokio::time::timeout(limit, opened.connected.replay(&parse, 1)).await;
        matches!(replayed, Ok(Ok(_)))
    }
}

/// Waits until the gate is open, or, if that is too late, a server has proven itself, and answers a
/// connection to the new leader if there was time to open one.
pub(super) async fn open(
    shared: &Shared,
    listener: &ListenerSettings,
    identity: &Identity,
    session: u64,
    side: Side,
    way: Way,
) -> Option<Opened> {
    if listener.target != Target::Primary {
        way_is_free(shared, side, way).await;
        return None;
    }
    if !shared.gate.is_closed(side) {
        let opened = ready(shared, session, side).await?;
        return in_force(shared, opened);
    }
    let early = dial_candidate(shared, identity, session, side);
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
    in_force(shared, opened)
}

/// The connection, if its server is the one that serves now.
fn in_force(shared: &Shared, opened: Opened) -> Option<Opened> {
    let standings = shared.standings();
    let serving = standings.serving(opened.candidate.group).ok()?;
    if serving.name != opened.candidate.name {
        return None;
    }
    let mut opened = Opened { term: standings.term(opened.candidate.group), ..opened };
    // It said "on" at login; the promotion is proven.
    if opened.connected.params.in_hot_standby().is_some() {
        discard::parameter_is_within_bound(opened.connected.params.set(b"in_hot_standby", b"off"));
    }
    Some(opened)
}

async fn way_is_free(shared: &Shared, side: Side, way: Way) {
    match way {
        Way::Gate => shared.gate.wait_open(side).await,
        // Whoever is opened ahead leads the coordinator's group; elsewhere `open` waits.
        Way::Early => {
            let mut standings = shared.standings.subscribe();
            // The sender lives as long as the proxy.
            discard::sender_outlives_waiters(
                standings.wait_for(|now| now.serving(GroupId::COORDINATOR).is_ok()).await,
            );
        }
    }
}

async fn dial_candidate(
    shared: &Shared,
    identity: &Identity,
    session: u64,
    side: Side,
) -> Option<Opened> {
    let mut topology = shared.topology.subscribe();
    let known = tokio::select! {
        biased;
        known = topology.wait_for(|cluster| certain(cluster).is_some()) => certain(&*known.ok()?)?,
        () = shared.gate.wait_open(side) => return None,
    };
    let address = Address::from(&*known.node);
    let begun = match shared.ahead.take(session, &known.name) {
        Some(begun) => begun.login.await.ok().and_then(Result::ok),
        None => None,
    };
    let alive = begun.and_then(|mut connected| {
        connected.stream.is_alive(&mut connected.rest).then_some(connected)
    });
    let connected = match alive {
        Some(connected) => Ok(connected),
        None => dial(shared, &known, &address, Some(identity), None).await,
    };
    match connected {
        Ok(connected) => {
            let (term, generation, source) = (Term::NONE, Generation::NONE, None);
            Some(Opened { connected, candidate: known, address, side, term, generation, source })
        }
        Err(error) => {
            tracing::debug!(server = %known.name, error = &error as &dyn std::error::Error, "login to the candidate ahead of its promotion failed");
            None
        }
    }
}

/// The candidate, once the old leader is certain to stop.
fn certain(cluster: &Topology) -> Option<Candidate> {
    candidate(cluster, &[HandoverPhase::Switch, HandoverPhase::Promote])
}

/// The candidate while the switchover is prepared.
fn prepared(cluster: &Topology) -> Option<Candidate> {
    candidate(cluster, &[HandoverPhase::Prepare])
}

fn candidate(cluster: &Topology, phases: &[HandoverPhase]) -> Option<Candidate> {
    let record = cluster.handover.as_ref().filter(|record| record.is_understood())?;
    let group = record.group.unwrap_or(GroupId::COORDINATOR);
    if !phases.contains(&record.phase) || group != GroupId::COORDINATOR {
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
