//! The proxy's picture of its cluster: followed in the store, or asked of the servers.
//!
//! Merging is pure and does not walk back by itself: a leadership that is older than the one known, or of
//! another store, is believed only after a linearizable read that was asked for later. Such a read cannot
//! show the past of the store it knew, so the store was restored or replaced (docs/safety.md A12); whether the
//! leader that it names may serve is the prover's question: writable, the same system identifier, no older
//! timeline.

pub mod by_asking;
mod by_rest;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kornak_cluster::topology::Group;
use kornak_cluster::{CitusRegistration, GroupId, Revision, Scope, Topology};
use kornak_config::proxy::StaticMember;
use kornak_dcs::keys::{self, Keys};
use kornak_dcs::{Dcs, DcsError, Follow, Reach, View};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::known;
use crate::shared::Shared;

/// Pause before a linearizable read that failed is made again.
const READ_PAUSE: Duration = Duration::from_millis(500);

/// The effect of a view of the store on the known topology.
#[derive(Debug, Clone, PartialEq)]
pub enum Merged {
    /// The new truth.
    Known(Arc<Topology>),
    /// The view comes from another store, or from the past: ask again, linearizably.
    Doubt,
}

/// Asks the servers of a list.
pub fn ask(shared: &Arc<Shared>, members: &[StaticMember], stop: &CancellationToken) {
    let (_, listed) = watch::channel(by_asking::listed(members));
    tokio::spawn(by_asking::run(Arc::clone(shared), listed, stop.clone()));
}

/// Asks the servers of a list that agents tell by their REST API.
pub fn ask_by_rest(shared: &Arc<Shared>, bases: &[String], stop: &CancellationToken) {
    let (found, listed) = watch::channel(Vec::new());
    let listing = stop.clone().run_until_cancelled_owned(by_rest::run(bases.to_vec(), found));
    tokio::spawn(listing);
    tokio::spawn(by_asking::run(Arc::clone(shared), listed, stop.clone()));
}

/// Everything a proxy needs of a view, without looking at what was known before.
pub fn read(scope: &Scope, view: &View) -> (Topology, Vec<String>) {
    let mut topology = Topology { revision: view.revision, ..Topology::default() };
    let mut unreadable = Vec::new();
    let found = keys::groups(scope, view);
    let is_citus = found.iter().any(Option::is_some);
    for group in found.into_iter().filter(|group| group.is_some() == is_citus) {
        let id = group.unwrap_or(GroupId::COORDINATOR);
        let scope = Scope { group, ..scope.clone() };
        let state = Keys::new(&scope).state(view);
        topology.groups.insert(id, Arc::new(Group::from_state(id, &state)));
        topology.handover = state.handover.clone().or(topology.handover);
        topology.handover_revision = state.handover_revision;
        let reachable = state.proxies.into_iter().filter_map(|(id, it)| Some((id, it.cancel?)));
        topology.proxies.extend(reachable);
        topology.registered = state.citus.as_ref().map(CitusRegistration::groups);
        topology.registration = state.citus;
        unreadable.extend(state.unreadable);
    }
    unreadable.sort();
    unreadable.dedup();
    (topology, unreadable)
}

/// Takes a newer reading in, unless a leadership in it is older than the one known. `certain`: it
/// was read linearizably, and asked for when `known` was known already.
pub fn merge(known: &Topology, mut new: Topology, certain: bool) -> Merged {
    for (id, group) in &new.groups {
        let Some(before) = known.groups.get(id) else { continue };
        let (Some((_, old_epoch)), Some((_, epoch))) = (&before.leader, &group.leader) else {
            continue;
        };
        match epoch.is_older_than(*old_epoch) {
            Some(false) => {}
            Some(true) | None if certain => {}
            Some(true) | None => return Merged::Doubt,
        }
    }
    for (id, group) in &mut new.groups {
        let before = known.groups.get(id).and_then(|group| group.system_identifier.as_ref());
        // A key that is gone, or makes no sense, says nothing.
        if let (None, Some(before)) = (&group.system_identifier, before) {
            Arc::make_mut(group).system_identifier = Some(before.clone());
        }
    }
    for (id, before) in &known.groups {
        // A group whose keys have all expired is still there.
        new.groups
            .entry(*id)
            .or_insert_with(|| Arc::new(Group { leader: None, ..Group::clone(before) }));
    }
    Merged::Known(Arc::new(new))
}

/// Serves from what was known before the start if the store does not answer. Answers whether it does.
async fn take_known(shared: &Arc<Shared>, follow: &mut Follow, stop: &CancellationToken) -> bool {
    let Some(path) = &shared.settings().state_file.clone() else { return false };
    let first = async {
        while follow.current().reach == Reach::Never {
            follow.changed().await;
        }
    };
    let waited = tokio::time::timeout(known::STORE_PATIENCE, first);
    match stop.run_until_cancelled(waited).await {
        Some(Err(_)) => known::take(shared, path, stop),
        Some(Ok(())) | None => false,
    }
}

/// Follows the store until told to stop.
pub async fn follow(shared: Arc<Shared>, store: Arc<dyn Dcs>, stop: CancellationToken) {
    let scope = shared.settings().scope.whole();
    let root = scope.root();
    let mut follow = store.follow(&root);
    let own_key = Keys::new(&scope).proxy(&shared.id);
    let record_key = Keys::new(&scope).handover();
    let mut named: Vec<String> = Vec::new();
    let mut seen = (0, Revision::NONE);
    let mut is_guessed = take_known(&shared, &mut follow, &stop).await;
    loop {
        let view = follow.current();
        if view.reach != Reach::Never {
            let (mut new, unreadable) = read(&scope, &view);
            shared.store_seen.store(true, Ordering::SeqCst);
            if std::mem::take(&mut is_guessed) {
                // Of what was known from before, the leaderships stay the bar for this reading; groups that are gone go.
                let mut kept = Topology::clone(&shared.topology());
                kept.groups.retain(|id, _| new.groups.contains_key(id));
                shared.set_topology(Arc::new(kept));
            }
            if unreadable.contains(&record_key) {
                // Not the end of a switchover: that is the record's absence.
                new.handover.clone_from(&shared.topology().handover);
            }
            let (store_id, revision) = std::mem::replace(&mut seen, (view.store, view.revision));
            if store_id != 0 && (store_id != view.store || view.revision < revision) {
                tracing::warn!(
                    store = view.store,
                    revision = view.revision.0,
                    "the store's history went back: it was restored, or is another one"
                );
                // The registration was written in another history.
                shared.registered_at.store(0, Ordering::Release);
            }
            for key in unreadable.iter().filter(|key| !named.contains(key)) {
                tracing::warn!(%key, "invalid value in the store ignored, the last good one stays");
            }
            named = unreadable;
            let lost = view.reach == Reach::Lost;
            // What is not seen is not gone.
            if !lost {
                let older = view.revision.0 < shared.registered_at.load(Ordering::Acquire);
                let registered = older || shared.lease().is_none() || view.get(&own_key).is_some();
                shared
                    .registration_seen
                    .send_if_modified(|seen| std::mem::replace(seen, registered) != registered);
            }
            shared.set_trouble("store", lost.then(|| "the store does not answer".to_owned()));
            match merge(&shared.topology(), new, false) {
                Merged::Known(topology) => shared.set_topology(topology),
                Merged::Doubt => {
                    if !ask_again(&shared, &store).await {
                        tokio::select! {
                            () = tokio::time::sleep(READ_PAUSE) => continue,
                            () = stop.cancelled() => return,
                        }
                    }
                }
            }
        }
        tokio::select! {
            () = follow.changed() => {}
            () = stop.cancelled() => return,
        }
    }
}

async fn ask_again(shared: &Shared, store: &Arc<dyn Dcs>) -> bool {
    tracing::debug!("older leadership or another store's seen, asking again");
    read_now(shared, store).await.is_ok()
}

/// Reads the store linearizably and takes in what it says.
pub async fn read_now(shared: &Shared, store: &Arc<dyn Dcs>) -> Result<(), DcsError> {
    let scope = shared.settings().scope.whole();
    loop {
        let before = shared.topology();
        let view = store.range(&scope.root()).await?;
        let (new, _) = read(&scope, &view);
        let Merged::Known(topology) = merge(&before, new, true) else { return Ok(()) };
        // What was learned meanwhile may be newer than this reading.
        if shared.replace_topology(&before, topology) {
            return Ok(());
        }
    }
}
