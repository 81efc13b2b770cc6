//! Watches over the primaries of a Citus cluster: one idle connection to each, kept for its end.
//!
//! A session on the coordinator has no connection to a worker of which it could notice that it is gone,
//! and Citus's errors come too late: each is a failed transaction. The kernel closes the connections of
//! a killed server at once; of a server that is cut off nothing comes, so it is asked every second.
//!
//! A connection that ends is a reason to look, never a verdict: [`crate::background::prover`] judges.
//!
//! Not in a plain cluster, whose sessions notice by themselves.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{GroupId, discard};
use tokio_util::sync::CancellationToken;

use crate::cluster::standing::{Proof, Serving, Term, Why};
use crate::net::backend::{Address, Connected, DialError};
use crate::net::stream::read_more;
use crate::shared::Shared;

/// Between two questions to a server that says nothing.
const EVERY: Duration = Duration::from_secs(1);

/// A server that has not answered for so long is looked at over another connection.
const SILENCE: Duration = Duration::from_secs(1);

/// For logging in.
const LOGIN_LIMIT: Duration = Duration::from_secs(5);

/// Pause before another connection is tried.
const PAUSE: Duration = Duration::from_millis(200);

/// The end of a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Noticed {
    /// The connection has ended.
    Broke,
    /// The server said something of itself, or nothing for too long.
    Odd,
    /// Another run of a server serves, or nobody does.
    Replaced,
}

/// Watches a group's primary, whoever it is, until told to stop.
pub async fn keep(shared: Arc<Shared>, group: GroupId, stop: CancellationToken) {
    stop.run_until_cancelled(watch_over(&shared, group)).await;
}

async fn watch_over(shared: &Shared, group: GroupId) {
    loop {
        let (serving, term, proof) = primary(shared, group).await;
        let watched = tokio::select! {
            watched = watch(shared, &serving) => watched,
            () = replaced(shared, group, term) => Ok(Noticed::Replaced),
        };
        match watched {
            Ok(Noticed::Replaced) => continue,
            Ok(Noticed::Broke) => {
                tracing::debug!(node = %serving.name, group = group.0, "connection to a primary broke");
                let unchanged = |standing: &crate::cluster::standing::Standing| {
                    standing.term == term && standing.proof == proof
                };
                // Whoever begins now waits for the look: it takes a moment and costs nobody an error.
                shared.change_standing(group, |s| {
                    if unchanged(s) {
                        s.withdraw(Why::Silent, false);
                    }
                });
                shared.doubt(group, proof);
            }
            Ok(Noticed::Odd) => shared.doubt(group, proof),
            // A server that is full, or does not like our login, is not away.
            Err(error) if !error.is_about_server() => tokio::time::sleep(EVERY).await,
            Err(_) => shared.doubt(group, proof),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits until somebody serves the group of a Citus cluster.
async fn primary(shared: &Shared, group: GroupId) -> (Arc<Serving>, Term, Proof) {
    let mut topology = shared.topology.subscribe();
    let mut standings = shared.standings.subscribe();
    loop {
        let is_citus = topology.borrow_and_update().groups.len() > 1;
        {
            let known = standings.borrow_and_update();
            if let (true, Ok(serving)) = (is_citus, known.serving(group)) {
                return (Arc::clone(serving), known.term(group), known.proof(group));
            }
        }
        // The senders live as long as the proxy.
        tokio::select! {
            _ = topology.changed() => {}
            _ = standings.changed() => {}
        }
    }
}

/// Waits until that primary's term is over, or its proof is withdrawn.
async fn replaced(shared: &Shared, group: GroupId, term: Term) {
    let mut standings = shared.standings.subscribe();
    // The sender lives as long as the proxy.
    discard::sender_outlives_waiters(
        standings.wait_for(|now| now.term(group) != term || now.serving(group).is_err()).await,
    );
}

async fn watch(shared: &Shared, serving: &Serving) -> Result<Noticed, DialError> {
    let at = Address::from(&*serving.node);
    if !shared.prober.can_ask() {
        // Nobody to log in as: whether it listens has to do.
        loop {
            tokio::time::sleep(EVERY).await;
            shared.prober.knock(&at, SILENCE).await?;
        }
    }
    let mut connected = shared.prober.connect(&at, LOGIN_LIMIT).await?;
    loop {
        tokio::select! {
            noticed = heard(&mut connected) => return Ok(noticed),
            () = tokio::time::sleep(EVERY) => {}
        }
        match tokio::time::timeout(SILENCE, connected.query("SELECT 1", &[])).await {
            Ok(Ok(_)) => {}
            Ok(Err(DialError::Io(_))) => return Ok(Noticed::Broke),
            Ok(Err(_)) | Err(_) => return Ok(Noticed::Odd),
        }
    }
}

/// Waits until the server says something that it was not asked.
async fn heard(connected: &mut Connected) -> Noticed {
    match read_more(&mut connected.stream, &mut connected.rest).await {
        Ok(()) => Noticed::Odd,
        Err(_) => Noticed::Broke,
    }
}
