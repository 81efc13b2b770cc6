//! Obeying planned handovers: registers this proxy, closes and opens the gate as [`crate::waiting::holding`]
//! says, acknowledges.
//!
//! A proxy is registered before it opens its first server connection, and reads the record after
//! that: a leader that has listed the proxies either sees us, or we see its record (docs/safety.md A5).

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use kornak_cluster::member::KORNAK_RECORDS_VERSION;
use kornak_cluster::{
    Ack, Handover, HandoverPhase, Moment, ProxyRegistration, Revision, Topology, discard,
};
use kornak_dcs::keys::Keys;
use kornak_dcs::{Compare, Dcs, DcsError, LeaseId, Op, Txn};
use tokio_util::sync::CancellationToken;

use crate::background::{beforehand, topology};
use crate::cluster::standing::Standings;
use crate::shared::{Holding, Phase, Shared};
use crate::waiting::hold::{Attempt, State};
use crate::waiting::holding::{self, Decision, Event, Facts, Waits};
use crate::waiting::{outage, read_source};

/// Lease of the registration: a proxy that is frozen or cut off blocks handovers no longer than this.
const LEASE: Duration = Duration::from_secs(10);

/// Pause after the store refused or did not answer.
const PAUSE: Duration = Duration::from_millis(500);

/// How long the first registration may fail before this proxy serves without one: the leader looks
/// at its own sessions as well.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often sessions with cursors WITH HOLD see whether these are still to be waited for.
const CURSOR_PAUSE: Duration = Duration::from_millis(250);

/// Pause before an acknowledgement that was not written is tried again.
const ACK_PAUSE: Duration = Duration::from_millis(20);

/// Keeps this proxy registered until told to stop.
pub async fn register(shared: Arc<Shared>, store: Arc<dyn Dcs>, stop: CancellationToken) {
    let began = Instant::now();
    let mut lease = LeaseId::NONE;
    loop {
        let pause = match step(&shared, &store, &mut lease).await {
            Ok(pause) => {
                shared.set_trouble("registration", None);
                shared.registered.send_replace(true);
                pause
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "proxy cannot be registered"
                );
                shared.set_trouble("registration", Some(error.to_string()));
                if matches!(error, DcsError::LeaseLost) {
                    lease = LeaseId::NONE;
                }
                let refused = matches!(
                    error,
                    DcsError::Denied { .. } | DcsError::Refused { .. } | DcsError::Full { .. }
                );
                if refused || began.elapsed() > PATIENCE {
                    shared.registered.send_replace(true);
                }
                PAUSE
            }
        };
        let mut seen = shared.registration_seen.subscribe();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // The key is gone although its lease may live: somebody removed it.
            _ = seen.wait_for(|seen| !seen), if pause > PAUSE => {
                shared.registration_seen.send_replace(true);
                shared.lease.store(0, std::sync::atomic::Ordering::Release);
            }
            () = stop.cancelled() => break,
        }
    }
    if !lease.is_none() {
        // A lease that is not revoked ends by itself.
        discard::goes_on_either_way(tokio::time::timeout(PAUSE, store.revoke(lease)).await);
    }
}

/// Renews the lease, or registers anew if there is none.
async fn step(
    shared: &Shared,
    store: &Arc<dyn Dcs>,
    lease: &mut LeaseId,
) -> Result<Duration, DcsError> {
    use std::sync::atomic::Ordering::{Acquire, Release};
    if !lease.is_none() {
        let ttl = store.keep_alive(*lease).await?.ttl;
        if shared.lease.load(Acquire) != 0 {
            return Ok(ttl / 3);
        }
    }
    if lease.is_none() {
        *lease = store.grant(LEASE).await?.lease;
    }
    let keys = Keys::new(&shared.settings().scope.whole());
    let registration = ProxyRegistration {
        speaks: vec![KORNAK_RECORDS_VERSION],
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        pid: std::process::id(),
        status: shared.settings().status.as_ref().map(|status| status.listen.to_string()),
        cancel: shared.reached_at.clone(),
        prepares: true,
    };
    // A registration is plain data; it always has a JSON form.
    let value = serde_json::to_string(&registration).unwrap_or_default();
    let put = Txn::just(Op::put_leased(keys.proxy(&shared.id), value, *lease));
    let revision = store.txn(put).await?.revision;
    shared.registered_at.store(revision.0, Release);
    let first = !*shared.registered.borrow();
    if first {
        topology::read_now(shared, store).await?;
    }
    shared.lease.store(lease.0, Release);
    tracing::info!(proxy = %shared.id, "proxy registered");
    Ok(LEASE / 3)
}

/// Has sessions wait, and go on, as [`crate::waiting::holding`] says, until told to stop.
pub async fn obey(shared: Arc<Shared>, store: Arc<dyn Dcs>, stop: CancellationToken) {
    let clock = Instant::now();
    let now = || Moment::new(clock.elapsed());
    let mut waits = Waits::default();
    let mut topology = shared.topology.subscribe();
    let mut standings = shared.standings.subscribe();
    loop {
        let listens_again = shared.listens_again.notified();
        let cluster = Arc::clone(&topology.borrow_and_update());
        let known = Arc::clone(&standings.borrow_and_update());
        prepare(&shared, &store, cluster.handover.as_ref());
        let facts = facts(&shared, &waits, &cluster, &known);
        let mut events = Vec::new();
        let decision = waits.on(&facts, now(), &mut events);
        events.into_iter().for_each(|event| tell(&shared, event));
        close(&shared, &decision);
        let mut retry_ack = false;
        if let Some(attempt) = &decision.acknowledge {
            let revision = cluster.handover_revision;
            let written = acknowledge(&shared, &store, attempt, revision).await;
            if written {
                waits.acknowledged(attempt);
            }
            retry_ack = !written;
        }
        show(&shared, &waits);
        let sides = holding::affected(&cluster);
        if decision.look_again {
            tracing::info!(
                phase = shared.holding.borrow().phase.as_str(),
                inside = shared.gate.inside(sides),
                "gate closed"
            );
            // Nobody may have been inside.
            continue;
        }
        let waiting = waits.is_draining();
        let deadline = decision.deadline.map(|at| at.since(now()));
        tokio::select! {
            changed = topology.changed() => if changed.is_err() { return },
            _ = standings.changed() => {}
            () = listens_again => {}
            () = shared.gate.wait_empty(sides), if waiting && !retry_ack => {}
            () = tokio::time::sleep(ACK_PAUSE), if retry_ack => {}
            () = tokio::time::sleep(CURSOR_PAUSE), if waiting => shared.registry.recheck_cursors(),
            () = tokio::time::sleep(deadline.unwrap_or_default()), if deadline.is_some() => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Has sessions log in to the candidate while the handover is prepared, and forgets those logins after it.
fn prepare(shared: &Arc<Shared>, store: &Arc<dyn Dcs>, record: Option<&Handover>) {
    ask(shared, store, record);
    match record.map(|record| record.phase) {
        None if shared.ahead.over() => {
            let shared = Arc::clone(shared);
            tokio::spawn(async move { shared.ahead.drop_unused().await });
        }
        Some(HandoverPhase::Switch | HandoverPhase::Promote) => shared.ahead.hurry(),
        None | Some(_) => {}
    }
}

fn facts<'a>(
    shared: &Shared,
    waits: &Waits,
    cluster: &'a Topology,
    standings: &'a Standings,
) -> Facts<'a> {
    let settings = shared.settings();
    let (max_hold, hold_timeout) = (settings.limits.max_hold, settings.limits.hold_timeout);
    let record = cluster.handover.as_ref();
    let asked = record.map_or(Duration::ZERO, |r| Duration::from_millis(r.max_hold_ms));
    let short = (asked > max_hold)
        .then(|| format!("limits.max_hold is shorter than the {asked:?} that handovers ask for"));
    shared.set_trouble("max_hold", short);
    let to_listen = waits
        .former_leader(cluster)
        .map_or(0, |(former, group)| shared.registry.to_listen(former, standings.term(group)));
    let inside = shared.gate.inside(holding::affected(cluster));
    Facts { cluster, standings, inside, to_listen, max_hold, hold_timeout }
}

fn close(shared: &Shared, decision: &Decision) {
    // Before the gate: who waited must not begin on the connection it had.
    shared.set_source(decision.source);
    let changes = shared.gate.closed() != decision.closed;
    shared.gate.close(decision.closed);
    if changes {
        shared.registry.wake_all();
    }
}

/// While a handover is prepared, sessions on the leader ask it what they hold: what functions did
/// shows in no text, and what pins a session may be over
/// (docs/protocol.md, *What a session holds*).
fn ask(shared: &Arc<Shared>, store: &Arc<dyn Dcs>, record: Option<&Handover>) {
    let asking = record
        .filter(|record| record.is_understood())
        .filter(|it| matches!(it.phase, HandoverPhase::Prepare | HandoverPhase::Drain));
    let asked = shared.asks.swap(asking.is_some(), SeqCst);
    if let Some(record) = asking.filter(|_| !asked) {
        tokio::spawn(beforehand::prepare(Arc::clone(shared), Arc::clone(store), record.clone()));
    }
}

/// Tells the log and the metrics of a change.
fn tell(shared: &Shared, event: Event) {
    let elapsed_ms = |held: Duration| held.as_millis() as u64;
    match event {
        Event::Opened { held } => {
            shared.metrics.gate.record(held);
            tracing::info!(elapsed_ms = elapsed_ms(held), "gate opened");
        }
        Event::OnlyWorkersWait { held } => {
            tracing::info!(elapsed_ms = elapsed_ms(held), "gate opened, but for workers");
        }
        Event::Outage(event) => tell_of_outage(shared, event),
        Event::Reading(event) => tell_of_reading(event),
    }
}

fn tell_of_outage(shared: &Shared, event: outage::Event) {
    let elapsed_ms = |held: Duration| held.as_millis() as u64;
    match event {
        outage::Event::Began { group, why } => {
            tracing::warn!(
                group = group.0,
                why = why.as_str(),
                "group has no primary, new transactions of the whole cluster wait"
            );
        }
        outage::Event::Spreads { group, held } => {
            tracing::info!(
                group = group.0,
                elapsed_ms = elapsed_ms(held),
                "coordinator knows the group's primary, its sessions continue"
            );
        }
        outage::Event::Ended { group, held } => {
            shared.metrics.outage.record(held);
            tracing::info!(
                group = group.0,
                elapsed_ms = elapsed_ms(held),
                "every node knows the group's primary, all sessions continue"
            );
        }
        outage::Event::Gone { group, held } => {
            shared.metrics.outage.record(held);
            tracing::info!(
                group = group.0,
                elapsed_ms = elapsed_ms(held),
                "group was removed or shut down, all sessions continue"
            );
        }
        outage::Event::GivenUp { group, held } => {
            shared.metrics.outage.record(held);
            tracing::error!(
                group = group.0,
                elapsed_ms = elapsed_ms(held),
                "group has no registered primary within the limit, transactions continue without it"
            );
        }
    }
}

fn tell_of_reading(event: read_source::Event) {
    match event {
        read_source::Event::Began { group } => tracing::info!(
            group = group.0,
            "registered standby does not run, new transactions of sessions on standbys wait"
        ),
        read_source::Event::Ended { group, held } => tracing::info!(
            group = group.0,
            elapsed_ms = held.as_millis() as u64,
            "group's standbys run, sessions on standbys continue"
        ),
        read_source::Event::Primaries { group } => tracing::info!(
            group = group.0,
            "registered standby still does not run, sessions on standbys read from primaries"
        ),
        read_source::Event::Standbys { group } => {
            tracing::info!(group = group.0, "group can be read from standbys again");
        }
    }
}

/// Writes the acknowledgement; false: it is not written.
async fn acknowledge(
    shared: &Shared,
    store: &Arc<dyn Dcs>,
    attempt: &Attempt,
    revision: Revision,
) -> bool {
    let keys = Keys::new(&shared.settings().scope.whole());
    let ack = Ack { id: attempt.id.clone(), attempt: attempt.number };
    let value = serde_json::to_string(&ack).unwrap_or_default();
    let lease = shared.lease();
    let txn = Txn::just(Op::put_leased(keys.ack(&shared.id), value, lease))
        .when(Compare::Modified { key: keys.handover(), revision });
    let written = tokio::time::timeout(PAUSE, store.txn(txn)).await;
    match written {
        // If the record has changed meanwhile, the next view says what is wanted now.
        Ok(Ok(outcome)) => outcome.succeeded,
        Ok(Err(error)) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "acknowledgement could not be written"
            );
            false
        }
        Err(_) => false,
    }
}

fn show(shared: &Shared, waits: &Waits) {
    let (outages, readings) = (waits.outages(), waits.readings());
    let (phase, attempt, acknowledged) = match waits.handover() {
        State::Open if !outages.closed().is_empty() => (Phase::Failover, None, false),
        State::Open if readings.waiting().next().is_some() => (Phase::Reading, None, false),
        State::Open => (Phase::Open, None, false),
        State::Draining { attempt, acknowledged, .. } => {
            (Phase::Draining, Some(attempt), *acknowledged)
        }
        State::Released { attempt, .. } => (Phase::Released, Some(attempt), false),
        State::Switching { attempt, .. } => (Phase::Switching, Some(attempt), true),
        State::Settling { attempt, .. } => (Phase::Settling, Some(attempt), true),
    };
    let holding = Holding {
        phase,
        handover: attempt.map(|attempt| attempt.id.clone()),
        attempt: attempt.map_or(0, |attempt| attempt.number),
        acknowledged,
        without_primary: outages.groups().map(|group| group.0).collect(),
        without_standby: readings.waiting().map(|group| group.0).collect(),
        reads_primaries_for: readings.without_standby().map(|group| group.0).collect(),
    };
    shared.holding.send_if_modified(|known| {
        let changed = *known != holding;
        *known = holding;
        changed
    });
}
