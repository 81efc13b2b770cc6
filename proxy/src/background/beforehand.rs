//! A proxy's work while a switchover is prepared and clients work on: sessions are asked what they hold, a few at
//! a time, and those at work log in to the candidate, a few at a time as well ([`crate::shared::ahead`]). When that is
//! done, or takes too long, the leader hears of it, and drains then.
//!
//! Asking all sessions at once would hold each of them, and the drain with it, until all have been answered.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use kornak_cluster::{Ack, GroupId, Handover, HandoverPhase};
use kornak_dcs::keys::Keys;
use kornak_dcs::{Compare, Dcs, Op, Txn};

use crate::registry::{Flags, Handle};
use crate::shared::Shared;
use crate::waiting::gate::{Side, Ticket};

/// Sessions that ask their server at once: so many questions keep one core of it busy.
const AT_ONCE: usize = 8;

/// Between two looks who has asked; a question takes about as long.
const TURN: Duration = Duration::from_millis(2);

/// A session that has not asked by then is not waited for: its server hangs, and a drain would show it.
const LIMIT: Duration = Duration::from_secs(2);

/// Logins ahead are waited for so long, less than the leader waits for us.
const LOGINS_LIMIT: Duration = Duration::from_secs(3);

/// Asks those sessions that are on the leader, and tells it.
pub async fn prepare(shared: Arc<Shared>, store: Arc<dyn Dcs>, record: Handover) {
    let began = Instant::now();
    let mut ticket = Ticket::new(&shared.gate, 0);
    let side = match record.group {
        None | Some(GroupId::COORDINATOR) => Side::Leading,
        Some(_) => Side::Workers,
    };
    if !ticket.enter(side) {
        // A drain is under way already. Who is idle has nothing that was not asked for since it began to work, or is
        // not asked; who is busy asks when it has done.
        shared.registry.raise_on(&record.leader, Flags::EXAMINE);
        return;
    }
    let asked = ask_in_turn(&shared, &record.leader).await;
    // From here on the proxy may say that nobody is inside.
    drop(ticket);
    while shared.ahead.is_busy() && began.elapsed() < LOGINS_LIMIT && shared.asks.load(SeqCst) {
        tokio::time::sleep(TURN * 5).await;
    }
    tracing::info!(
        sessions = asked,
        elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        "sessions were asked what they hold"
    );
    if record.phase == HandoverPhase::Prepare {
        tell(&shared, &store, &record).await;
    }
}

/// Answers how many there were.
async fn ask_in_turn(shared: &Shared, leader: &str) -> usize {
    let mut waiting = shared.registry.on(leader);
    let sessions = waiting.len();
    let mut asking: Vec<(Arc<Handle>, Instant)> = Vec::with_capacity(AT_ONCE);
    while shared.asks.load(SeqCst) {
        asking.retain(|(handle, since)| {
            // One that nobody else holds belongs to a session that is over.
            handle.is_asked() && since.elapsed() < LIMIT && Arc::strong_count(handle) > 1
        });
        while asking.len() < AT_ONCE
            && let Some(handle) = waiting.pop()
        {
            handle.ask();
            asking.push((handle, Instant::now()));
        }
        if asking.is_empty() {
            break;
        }
        tokio::time::sleep(TURN).await;
    }
    sessions
}

/// Says that everything was done beforehand; a leader that does not hear it waits a little longer.
async fn tell(shared: &Shared, store: &Arc<dyn Dcs>, record: &Handover) {
    let keys = Keys::new(&shared.settings().scope.whole());
    let value = serde_json::to_string(&Ack { id: record.id.clone(), attempt: 0 });
    let lease = shared.lease();
    let revision = shared.topology().handover_revision;
    let put = Op::put_leased(keys.ack(&shared.id), value.unwrap_or_default(), lease);
    // Not once it drains: an acknowledgement of the drain may be there.
    let txn = Txn::just(put).when(Compare::Modified { key: keys.handover(), revision });
    let is_still = |now: &Handover| now.id == record.id && now.phase == HandoverPhase::Prepare;
    if !shared.topology().handover.as_ref().is_some_and(is_still) {
        return;
    }
    if let Err(error) = store.txn(txn).await {
        tracing::debug!(error = &error as &dyn std::error::Error, "the leader was not told");
    }
}
