//! Obeying planned handovers: registers this proxy, closes and opens the gate as [`crate::waiting::hold`]
//! says, acknowledges. The gate is closed for a group without a primary as well ([`crate::waiting::outage`]).
//!
//! A proxy is registered before it opens its first server connection, and reads the record after
//! that: a leader that has listed the proxies either sees us, or we see its record (docs/safety.md A5).

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use kornak_cluster::member::KORNAK_RECORDS_VERSION;
use kornak_cluster::{
    Ack, GroupId, Handover, HandoverPhase, Moment, ProxyRegistration, Revision, Topology, discard,
};
use kornak_dcs::keys::Keys;
use kornak_dcs::{Compare, Dcs, DcsError, LeaseId, Op, Txn};
use tokio_util::sync::CancellationToken;

use crate::background::{beforehand, topology};
use crate::cluster::standing::Standings;
use crate::shared::{Holding, Phase, Shared};
use crate::waiting::gate::Sides;
use crate::waiting::hold::{Attempt, Effect, Facts, Hold, State};
use crate::waiting::outage::{self, Outages};
use crate::waiting::read_source::{self, Readings};

/// Lease of the registration: a proxy that is frozen or cut off blocks handovers no longer than this.
const LEASE: Duration = Duration::from_secs(10);

/// Pause after the store refused or did not answer.
const PAUSE: Duration = Duration::from_millis(500);

/// How long sessions on standbys wait for another group's standby, before they read from its primary:
/// a former primary that was stopped in order follows within two seconds, one that crashed takes three.
const STANDBY_PATIENCE: Duration = Duration::from_secs(5);

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

/// Obeys the record until told to stop.
pub async fn obey(shared: Arc<Shared>, store: Arc<dyn Dcs>, stop: CancellationToken) {
    let clock = Instant::now();
    let now = || Moment::new(clock.elapsed());
    let mut hold = Hold::default();
    let mut outages = Outages::default();
    let mut readings = Readings::default();
    // What the gate is closed for by the record.
    let mut held = Sides::NONE;
    let mut topology = shared.topology.subscribe();
    let mut standings = shared.standings.subscribe();
    // Of the handover that is under way, or was the last.
    let mut former = String::new();
    let mut group = GroupId::COORDINATOR;
    loop {
        let listens_again = shared.listens_again.notified();
        let cluster = Arc::clone(&topology.borrow_and_update());
        let known = Arc::clone(&standings.borrow_and_update());
        let record = cluster.handover.as_ref();
        if let Some(record) = record {
            group = record.group.unwrap_or(GroupId::COORDINATOR);
            former.clone_from(&record.leader);
        }
        ask(&shared, &store, record);
        match record.map(|record| record.phase) {
            None if shared.ahead.over() => {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move { shared.ahead.drop_unused().await });
            }
            None => {}
            Some(HandoverPhase::Switch | HandoverPhase::Promote) => shared.ahead.hurry(),
            Some(_) => {}
        }
        let sides = if cluster.groups.len() > 1 { Sides::ALL } else { Sides::LEADING };
        let facts = Facts {
            record,
            inside: shared.gate.inside(sides),
            serving: known.serving(group).ok().map(|serving| serving.epoch),
            proof: known.proof(group),
            to_listen: match hold.state() {
                State::Switching { .. } => shared.registry.to_listen(&former, known.term(group)),
                _ => 0,
            },
            max_hold: shared.settings().limits.max_hold,
        };
        let asked = record.map_or(Duration::ZERO, |r| Duration::from_millis(r.max_hold_ms));
        let short = (asked > facts.max_hold).then(|| {
            format!("limits.max_hold is shorter than the {asked:?} that handovers ask for")
        });
        shared.set_trouble("max_hold", short);
        let mut effects = Vec::new();
        hold.on(&facts, now(), &mut effects);
        let closed_now = effects.contains(&Effect::Close);
        let wanted = apply(&shared, effects, sides, &mut held);
        attend(&shared, &mut outages, &cluster, &known, now());
        look_for_standbys(&shared, &mut readings, &cluster, now());
        let away = outages.closed();
        let closed = held.union(away).union(readings.closed(away));
        let opens = shared.gate.closed() != closed;
        shared.gate.close(closed);
        if opens {
            shared.registry.wake_all();
        }
        let mut retry_ack = false;
        if let Some(attempt) = wanted {
            let revision = cluster.handover_revision;
            retry_ack = !acknowledge(&shared, &store, &mut hold, &attempt, revision).await;
        }
        show(&shared, &hold, &outages, &readings);
        if closed_now {
            tracing::info!(
                phase = shared.holding.borrow().phase.as_str(),
                inside = shared.gate.inside(sides),
                "gate closed"
            );
            // Look again: nobody may have been inside.
            continue;
        }
        let waiting = matches!(hold.state(), State::Draining { acknowledged: false, .. });
        let deadlines = [hold.deadline(), outages.deadline(), readings.deadline()];
        let deadline = deadlines.into_iter().flatten().min().map(|at| at.since(now()));
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

/// Notes what the record has closed; what is to be acknowledged comes back.
fn apply(shared: &Shared, effects: Vec<Effect>, sides: Sides, held: &mut Sides) -> Option<Attempt> {
    let mut wanted = None;
    for effect in effects {
        match effect {
            Effect::Close => *held = sides,
            Effect::Open(time) => {
                *held = Sides::NONE;
                shared.metrics.gate.record(time);
                tracing::info!(elapsed_ms = time.as_millis() as u64, "gate opened");
            }
            Effect::OpenMost(time) => {
                *held = Sides::WORKERS;
                let elapsed_ms = time.as_millis() as u64;
                tracing::info!(elapsed_ms, "gate opened, but for workers");
            }
            Effect::Acknowledge(attempt) => wanted = Some(attempt),
        }
    }
    wanted
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

/// Looks after the groups of a Citus cluster that have no primary.
fn attend(
    shared: &Shared,
    outages: &mut Outages,
    cluster: &Topology,
    standings: &Standings,
    now: Moment,
) {
    // A little less than a unit's own patience: whoever waits for another group goes on, and is not
    // refused.
    let patience = shared.settings().limits.hold_timeout.mul_f32(0.95);
    let mut events = Vec::new();
    outages.on(&outage::Facts { cluster, standings, patience }, now, &mut events);
    for event in events {
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
}

/// Looks whether sessions on standbys of a Citus cluster can be answered by standbys.
fn look_for_standbys(shared: &Shared, readings: &mut Readings, cluster: &Topology, now: Moment) {
    let patience = STANDBY_PATIENCE.min(shared.settings().limits.hold_timeout.mul_f32(0.95));
    let mut events = Vec::new();
    readings.on(cluster, patience, now, &mut events);
    // Before the gate: who waited must not begin on the connection it had.
    shared.set_source(readings.source());
    for event in events {
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
}

async fn acknowledge(
    shared: &Shared,
    store: &Arc<dyn Dcs>,
    hold: &mut Hold,
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
        Ok(Ok(outcome)) => {
            // If the record has changed meanwhile, the next view says what is wanted now.
            if outcome.succeeded {
                hold.acknowledged(attempt);
            }
            outcome.succeeded
        }
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

fn show(shared: &Shared, hold: &Hold, outages: &Outages, readings: &Readings) {
    let (phase, attempt, acknowledged) = match hold.state() {
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
