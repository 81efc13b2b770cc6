//! The chores of a leader, one thing at a time and apart from the driver:
//! synchronous standbys, `status`, `history`, `failsafe`, the members' slots, the checkpoint after a
//! promotion. Each is compared with what is there, so that doing it twice does nothing.

mod fencing;
mod history;
mod synchronous;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kornak_cluster::{
    ClusterState, HandoverPhase, LeaseId, Lsn, Moment, Revision, SafetyKey, Status, Timeline,
};
use kornak_dcs::{Compare, DcsError, Op, Txn};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, warn};

use crate::context::Context;
use crate::guard::GuardError;
use crate::ha::slots::{Found, GoneSince};
use crate::ha::{DataDir, PrimaryFacts, Server, StandbyFacts};
use crate::lease::ClaimError;
use crate::machine::Task;
use crate::postgres::{
    ConfigureError, ControlDataError, ReplayError, RewindError, ServerStatus, SqlError,
    slot_name_of,
};
use kornak_dcs::json;

/// Between two rounds when nothing changes.
const EVERY: Duration = Duration::from_secs(1);

/// Between two rounds while synchronous standbys are being changed.
const EVERY_WHILE_CHANGING: Duration = Duration::from_millis(150);

/// Between two looks of a standby at its slots, at most.
const SLOTS_EVERY: Duration = Duration::from_secs(10);

/// Without a stream for so long, a standby whose replay somebody has paused goes on.
const LOST_AFTER: Duration = Duration::from_secs(5);

/// Before a lease of another length is asked for again that could not be had.
const LEASE_PAUSE: Duration = Duration::from_secs(10);

/// Why a round was not finished; the next one begins anew.
#[derive(Debug, thiserror::Error)]
enum LeadError {
    #[error("the store")]
    Store(#[from] DcsError),
    #[error("the server")]
    Sql(#[from] SqlError),
    #[error("the server's configuration")]
    Configure(#[from] ConfigureError),
    #[error("the control file")]
    ControlData(#[from] ControlDataError),
    #[error("take the guard out of service")]
    Guard(#[from] GuardError),
    #[error("leave the leadership to the next agent")]
    Leave(#[source] GuardError),
    #[error("put the guard into service")]
    Fence(#[from] ClaimError),
    #[error("move the leader key to a lease of {0:?}")]
    Lease(Duration, #[source] ClaimError),
    #[error("the leader's timelines")]
    Rewind(#[from] RewindError),
}

/// The chores that are done and need no repetition.
#[derive(Debug, Default)]
struct Done {
    /// Leadership and timeline for which the history was compared.
    history: Option<(Revision, Timeline)>,
    /// Leadership (its key's creation) after which the checkpoint was begun.
    checkpointed: Option<Revision>,
    /// The last restartpoint that a standby cluster's leader asked for, and when.
    restartpoint: Option<(Moment, Task<()>)>,
    /// `status` changes with every commit, and is written once in [`EVERY`].
    status_at: Option<Moment>,
    gone_since: GoneSince,
    /// When a standby last looked at its slots.
    slots_at: Option<Moment>,
    /// The length of lease that was asked for last, and when.
    lease: Option<(Duration, Moment)>,
    /// When the guard was last told what the next agent needs, and what that was.
    left: Left,
}

/// Works for as long as the node leads, until `stop`.
pub async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let mut observed = ctx.observation.clone();
    let mut view = ctx.view.clone();
    let mut done = Done::default();
    let mut complained: Option<String> = None;
    loop {
        observed.borrow_and_update();
        view.borrow_and_update();
        let began = ctx.machine.now();
        let mut pause = EVERY;
        if let Some((looked_at, facts, cluster)) = leads(&ctx) {
            match round(&ctx, looked_at, &facts, &cluster, &mut done).await {
                Ok(settled) => {
                    complained = None;
                    if !settled {
                        pause = EVERY_WHILE_CHANGING;
                        ctx.signals.look.notify_one();
                    }
                }
                Err(error) => {
                    let text = error.to_string();
                    if complained.as_ref() != Some(&text) {
                        warn!(
                            error = &error as &dyn std::error::Error,
                            "leader's housekeeping failed"
                        );
                        complained = Some(text);
                    }
                }
            }
        }
        if let Some((facts, cluster)) = leads_standby_cluster(&ctx)
            && let Err(error) = standby_round(&ctx, &facts, &cluster, &mut done).await
        {
            debug!(error = &error as &dyn std::error::Error, "leader's housekeeping failed");
        }
        if let Err(error) = follows(&ctx, &mut done).await {
            debug!(
                error = &error as &dyn std::error::Error,
                "replication slots could not be updated"
            );
        }
        if let Err(error) = replay(&ctx).await {
            debug!(error = &error as &dyn std::error::Error, "replay may wait for parameters");
        }
        let floor = Duration::from_millis(50).saturating_sub(ctx.machine.since(began));
        ctx.machine.sleep(floor).await;
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = observed.changed() => {}
            _ = view.changed() => {}
            () = ctx.machine.sleep(pause) => {}
        }
    }
}

/// A standby that waits for greater parameters cannot be promoted, and replays nothing; one that somebody has paused
/// looks for no new stream where its leader has changed.
async fn replay(ctx: &Context) -> Result<(), ReplayError> {
    let waits = |status: &ServerStatus| status.in_recovery && status.replay_paused;
    let cluster = ctx.cluster();
    let maintained = cluster.config.is_none_or(|config| config.pause);
    let observed = ctx.observed();
    if maintained || !observed.status.as_deref().is_some_and(waits) {
        return Ok(());
    }
    let Server::Standby(facts) = &observed.server else { return Ok(()) };
    let lost = facts.not_streaming_since.is_some_and(|since| observed.at.since(since) > LOST_AFTER);
    let led = cluster.leader.as_ref().is_some_and(|leader| leader.name != ctx.name);
    if !ctx.server.end_for_parameters().await? && lost && led {
        warn!("paused replay resumed: without it this standby cannot follow the leader");
        ctx.server.resume_replay().await?;
    }
    Ok(())
}

/// The primary that this node leads, and when the look at its server began.
fn leads(ctx: &Context) -> Option<(Moment, PrimaryFacts, ClusterState)> {
    let held = ctx.keeper.held().filter(|held| ctx.machine.now() < held.until)?;
    let observed = ctx.observed();
    let Server::Primary(facts) = observed.server.clone() else { return None };
    // Before the state, which is what an agent before has noted as long as the store has shown nothing.
    let live = ctx.view.borrow().reach == kornak_dcs::Reach::Live;
    let cluster = ctx.cluster();
    let handing_over = cluster
        .handover
        .as_ref()
        .is_some_and(|record| record.leader == ctx.name && record.phase != HandoverPhase::Prepare);
    if handing_over {
        return None;
    }
    let seen = cluster.leader.as_ref().is_some_and(|leader| leader.epoch == held.epoch);
    (seen && live).then_some((observed.at, facts, cluster))
}

/// The leader of a standby cluster: it holds the key and replicates from elsewhere.
fn leads_standby_cluster(ctx: &Context) -> Option<(StandbyFacts, ClusterState)> {
    ctx.keeper.held()?;
    let Server::Standby(facts) = ctx.observed().server.clone() else { return None };
    let live = ctx.view.borrow().reach == kornak_dcs::Reach::Live;
    let cluster = ctx.cluster();
    let is_one = cluster.config.as_ref().is_some_and(|config| config.standby_cluster.is_some());
    (is_one && live).then_some((facts, cluster))
}

async fn standby_round(
    ctx: &Arc<Context>,
    facts: &StandbyFacts,
    cluster: &ClusterState,
    done: &mut Done,
) -> Result<(), LeadError> {
    fencing::standby_leader(ctx).await?;
    lease(ctx, cluster, &mut done.lease).await?;
    restartpoint(ctx, &mut done.restartpoint);
    identity(ctx, cluster).await?;
    failsafe(ctx, cluster, &mut done.left).await?;
    if done.status_at.is_none_or(|at| ctx.machine.since(at) >= EVERY) {
        let existing = crate::slots::keep(ctx, cluster, true, &mut done.gone_since).await?;
        status(ctx, facts.position(), cluster, &existing).await?;
        done.status_at = Some(ctx.machine.now());
    }
    Ok(())
}

/// A standby keeps the slots that it would need as the leader.
async fn follows(ctx: &Context, done: &mut Done) -> Result<(), LeadError> {
    let live = ctx.view.borrow().reach == kornak_dcs::Reach::Live;
    let cluster = ctx.cluster();
    fencing::not_primary(ctx, &cluster).await?;
    let every = cluster.config.as_ref().map_or(SLOTS_EVERY, |config| config.loop_wait);
    let every = every.min(SLOTS_EVERY);
    let due = done.slots_at.is_none_or(|at| ctx.machine.since(at) >= every);
    let led = cluster.leader.as_ref().is_some_and(|leader| leader.name != ctx.name);
    let stands_by = matches!(ctx.observed().server, Server::Standby(_)) && due;
    let is_confirmed = due
        && matches!(ctx.observed().server, Server::Primary(_))
        && ctx.board.failsafe_active.load(Ordering::Relaxed);
    let promised = stands_by && ctx.promises.in_force(ctx.machine.now());
    if !live && (promised || is_confirmed) {
        done.slots_at = Some(ctx.machine.now());
        let told = ctx.board.told_slots.lock().clone();
        crate::slots::advance_as_told(ctx, &cluster, told).await?;
    }
    if stands_by && live && led {
        done.slots_at = Some(ctx.machine.now());
        crate::slots::keep(ctx, &cluster, false, &mut done.gone_since).await?;
        if !ctx.board.slots_to_copy.lock().is_empty() {
            ctx.signals.cycle.notify_one();
        }
    }
    Ok(())
}

/// One round. `Ok(false)`: there is more to do soon.
async fn round(
    ctx: &Arc<Context>,
    looked_at: Moment,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
    done: &mut Done,
) -> Result<bool, LeadError> {
    fencing::primary(ctx, facts, cluster).await?;
    lease(ctx, cluster, &mut done.lease).await?;
    let settled = synchronous::adjust(ctx, looked_at, facts, cluster).await?;
    let existing = crate::slots::keep(ctx, cluster, true, &mut done.gone_since).await?;
    identity(ctx, cluster).await?;
    record(ctx, cluster).await?;
    history::keep(ctx, facts, cluster, &mut done.history).await?;
    failsafe(ctx, cluster, &mut done.left).await?;
    if done.status_at.is_none_or(|at| ctx.machine.since(at) >= EVERY) {
        status(ctx, facts.lsn, cluster, &existing).await?;
        done.status_at = Some(ctx.machine.now());
    }
    checkpoint(ctx, cluster, &mut done.checkpointed);
    Ok(settled)
}

/// The leader key hangs on a lease of the configured length: `ttl` may have been changed, or a handover
/// was taken back that could not return to it.
async fn lease(
    ctx: &Context,
    cluster: &ClusterState,
    asked: &mut Option<(Duration, Moment)>,
) -> Result<(), LeadError> {
    let Some(ttl) = cluster.config.as_ref().map(|config| config.ttl) else { return Ok(()) };
    let is_right = ctx.keeper.held().is_none_or(|held| held.ttl == ttl);
    let again = asked.is_none_or(|(last, at)| last != ttl || ctx.machine.since(at) >= LEASE_PAUSE);
    if keeps_its_lease(&ctx.name, cluster) || is_right || !again {
        return Ok(());
    }
    *asked = Some((ttl, ctx.machine.now()));
    ctx.keeper.move_to(ttl).await.map_err(|error| LeadError::Lease(ttl, error))?;
    tracing::info!(?ttl, "the leader key is on a lease of the configured length");
    Ok(())
}

/// The lease of a leader that hands over, or has taken over, is short on purpose until that is done; and
/// the record hangs on it: proxies would take its end for the end of the handover.
fn keeps_its_lease(me: &str, cluster: &ClusterState) -> bool {
    let record = cluster.handover.as_ref();
    record.is_some_and(|it| it.leader == me || it.candidate.as_deref() == Some(me))
}

/// A cluster that was adopted has no `initialize` or `config` yet; one whose store was lost gets back what
/// was in force.
async fn identity(ctx: &Context, cluster: &ClusterState) -> Result<(), LeadError> {
    let known = cluster.initialize.as_deref().is_some_and(|identifier| !identifier.is_empty());
    let odd = cluster.is_kept(SafetyKey::Initialize) || cluster.is_unknown(SafetyKey::Initialize);
    // A cluster that is being made has its identifier when it is complete.
    let complete = matches!(ctx.observed().data, DataDir::Initialized(_));
    if (!known || odd) && complete && !ctx.board.creating.load(Ordering::Relaxed) {
        let identifier = ctx.server.controldata().await?.system_identifier.to_string();
        if !known || cluster.initialize.as_ref() == Some(&identifier) {
            let key = ctx.keys.initialize();
            let revision = cluster.initialize_revision;
            let put = Txn::just(Op::put(&key, identifier));
            let put = put.when(Compare::Modified { key, revision });
            ctx.store.txn(while_leading(ctx, put)).await?;
            tracing::info!("cluster marked as initialized in the store");
        }
    }
    if cluster.config_revision.is_none() {
        let key = ctx.keys.config();
        let kept = cluster.config.as_ref().map(|config| json(&config.raw));
        let text = kept.unwrap_or_else(|| json(&ctx.settings.bootstrap.dcs));
        let put = Txn::just(Op::put(&key, text)).when(Compare::absent(&key));
        if ctx.store.txn(put).await?.succeeded && cluster.is_kept(SafetyKey::Config) {
            warn!("configuration missing in the store, written back as it was in force");
        }
    }
    Ok(())
}

/// A handover record that makes no sense belongs to nobody, may hang on no lease, and would forbid every
/// switchover.
async fn record(ctx: &Context, cluster: &ClusterState) -> Result<(), LeadError> {
    if cluster.doubts.contains_key(&SafetyKey::Handover) && cluster.handover.is_none() {
        let (key, revision) = (ctx.keys.handover(), cluster.handover_revision);
        let delete = Txn::just(Op::delete(&key)).when(Compare::Modified { key, revision });
        ctx.store.txn(while_leading(ctx, delete)).await?;
        warn!("invalid handover record deleted");
    }
    Ok(())
}

/// A write that the store does late, after its answer was lost, must not outlive the leadership.
fn while_leading(ctx: &Context, txn: Txn) -> Txn {
    let lease = ctx.keeper.held().map_or(LeaseId::NONE, |held| held.lease);
    txn.when(Compare::Lease { key: ctx.keys.leader(), lease })
}

/// See [`Done::left`].
type Left = Option<(Moment, BTreeMap<String, String>)>;

async fn failsafe(ctx: &Context, cluster: &ClusterState, left: &mut Left) -> Result<(), LeadError> {
    let on = cluster.config.as_ref().is_some_and(|config| config.failsafe_mode);
    let mut wanted: BTreeMap<String, String> = cluster
        .members
        .iter()
        .map(|(name, member)| (name.clone(), member.api_url.clone()))
        .collect();
    // Who is not named does not race, and the leader's own member key may be late.
    wanted
        .entry(ctx.name.clone())
        .or_insert_with(|| format!("{}/patroni", ctx.settings.restapi.base_url()));
    let rests_on_members = ctx.board.failsafe_active.load(Ordering::Relaxed);
    let odd = cluster.doubts.contains_key(&SafetyKey::Failsafe);
    let unproven = ctx.board.unproven_failsafe.lock().clone();
    let differs = odd || unproven.is_some() || cluster.failsafe.as_ref() != Some(&wanted);
    // The list that the store may have: whoever leads without it has to ask all of these.
    let mut asked = cluster.failsafe.clone().unwrap_or_default();
    asked.extend(unproven.unwrap_or_default());
    if on && !rests_on_members && differs && !wanted.is_empty() {
        asked.extend(wanted.clone());
        *ctx.board.unproven_failsafe.lock() = Some(asked.clone());
        leave(ctx, asked, left).await?;
        let put = Txn::just(Op::put(ctx.keys.failsafe(), json(&wanted)));
        if !ctx.store.txn(while_leading(ctx, put)).await?.succeeded {
            // The key is being moved to another lease, or lost.
            return Ok(());
        }
        *ctx.board.unproven_failsafe.lock() = None;
        return leave(ctx, wanted, left).await;
    }
    leave(ctx, if on { asked } else { BTreeMap::new() }, left).await
}

/// Tells the guard, before the store is told and once in a while, whom an agent has to ask that begins without the store.
async fn leave(
    ctx: &Context,
    asked: BTreeMap<String, String>,
    left: &mut Left,
) -> Result<(), LeadError> {
    let known = left.as_ref().filter(|(at, _)| ctx.machine.since(*at) < EVERY);
    if known.is_some_and(|(_, known)| *known == asked) {
        return Ok(());
    }
    let told = match asked.is_empty() {
        true => ctx.keeper.leave_nothing().await,
        false => ctx.keeper.leave(&asked).await,
    };
    told.map_err(LeadError::Leave)?;
    *left = Some((ctx.machine.now(), asked));
    Ok(())
}

async fn status(
    ctx: &Context,
    lsn: Lsn,
    cluster: &ClusterState,
    existing: &[Found],
) -> Result<(), LeadError> {
    if cluster.handover.is_some() {
        // The release writes the final one.
        return Ok(());
    }
    let own = slot_name_of(&ctx.name);
    let mut slots: BTreeMap<String, Lsn> = crate::ha::slots::positions(existing).collect();
    slots.insert(own, lsn);
    let before = cluster.status.as_ref().map(|status| status.retain_slots.clone());
    let mut retain_slots: Vec<String> =
        cluster.members.keys().map(|name| slot_name_of(name)).collect();
    // A member that has vanished is remembered for as long as its slot is there.
    retain_slots.extend(
        before
            .unwrap_or_default()
            .into_iter()
            .filter(|name| existing.iter().any(|slot| slot.name == *name)),
    );
    // The operator's are kept without that.
    let config = cluster.config.as_ref();
    let permanent = config.map(kornak_cluster::ClusterConfig::permanent_slots).unwrap_or_default();
    retain_slots.retain(|name| permanent.iter().all(|slot| slot.name != *name));
    retain_slots.sort_unstable();
    retain_slots.dedup();
    let wanted = Status { optime: lsn, slots, retain_slots };
    let text = json(&wanted);
    // A store that was full is written to, to find out whether there is room again.
    if cluster.status.as_ref() != Some(&wanted) || ctx.store_is_full() {
        let put = Txn::just(Op::put(ctx.keys.status(), &text));
        ctx.store.txn(while_leading(ctx, put)).await?;
    }
    ctx.keeper.wrote_status(&text);
    Ok(())
}

/// Once for each leadership, in the background: until it is done nobody can be rewound from here.
fn checkpoint(ctx: &Arc<Context>, cluster: &ClusterState, done: &mut Option<Revision>) {
    let Some(leader) = &cluster.leader else { return };
    if *done == Some(leader.epoch.revision) {
        return;
    }
    *done = Some(leader.epoch.revision);
    ctx.board.checkpoint_pending.store(true, Ordering::Relaxed);
    let (ctx, machine) = (Arc::clone(ctx), ctx.machine.clone());
    let work = async move {
        if let Err(error) = ctx.server.checkpoint().await {
            warn!(
                error = &error as &dyn std::error::Error,
                "checkpoint after the promotion failed"
            );
        }
        ctx.board.checkpoint_pending.store(false, Ordering::Relaxed);
        ctx.signals.cycle.notify_one();
    };
    machine.spawn(work.in_current_span());
}

/// The leader of a standby cluster that has come onto another timeline, by a rewind or because its
/// primary was promoted: its members can be rewound from here once its control file says so. A
/// restartpoint may come to nothing as long as no checkpoint of that timeline is replayed, so it is
/// asked for again.
fn restartpoint(ctx: &Arc<Context>, asked: &mut Option<(Moment, Task<()>)>) {
    let observed = ctx.observed();
    let Some(status) = &observed.status else { return };
    let behind = status.checkpoint_timeline < status.timeline;
    if ctx.board.checkpoint_pending.swap(behind, Ordering::Relaxed) != behind {
        ctx.signals.cycle.notify_one();
    }
    let under_way =
        |(at, work): &(Moment, Task<()>)| ctx.machine.since(*at) < EVERY || !work.is_finished();
    if !behind || asked.as_ref().is_some_and(under_way) {
        return;
    }
    let (ctx, machine) = (Arc::clone(ctx), ctx.machine.clone());
    let work = async move {
        if let Err(error) = ctx.server.checkpoint().await {
            debug!(
                error = &error as &dyn std::error::Error,
                "restartpoint on the new timeline failed"
            );
        }
        ctx.signals.look.notify_one();
    };
    *asked = Some((machine.now(), machine.spawn(work.in_current_span())));
}

#[cfg(test)]
mod tests {
    use kornak_cluster::{Epoch, Handover};

    use super::*;

    #[test]
    fn neither_side_of_a_handover_changes_its_lease_before_the_record_is_gone() {
        let mut cluster = ClusterState::default();
        assert!(!keeps_its_lease("a", &cluster));
        for phase in [HandoverPhase::Prepare, HandoverPhase::Promote, HandoverPhase::Settle] {
            cluster.handover = Some(Handover {
                v: 1,
                id: "x".to_owned(),
                attempt: 1,
                phase,
                group: None,
                leader: "a".to_owned(),
                candidate: Some("b".to_owned()),
                epoch: Epoch { store: 1, revision: Revision(1) },
                max_hold_ms: 1000,
                switch_hold_ms: 5000,
                wal_end: None,
            });
            for (name, keeps) in [("a", true), ("b", true), ("c", false)] {
                assert_eq!(keeps_its_lease(name, &cluster), keeps, "{name} in {phase:?}");
            }
        }
    }
}
