//! The work beside the sessions that pools need, on each thread: opening connections that were
//! ordered, ending idle ones whose server has closed them or leads no more, and the passing of time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::spawn_local;

use crate::clients::client::{Way, open};
use crate::clients::serve::patience;
use crate::pool::lender::{Lender, Order};
use crate::pool::link::Link;
use crate::shared::Shared;

/// How exactly waiting clients' times and idle connections' ages are kept.
const TICK: Duration = Duration::from_millis(250);

/// Keeps one thread's connections as long as the thread has sessions.
pub async fn run(lane: usize, shared: Arc<Shared>, mut orders: UnboundedReceiver<Order>) {
    let mut standings = shared.standings.subscribe();
    let mut topology = shared.topology.subscribe();
    let lender = Arc::clone(&shared.lender);
    let mut tick = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(order) => drop(spawn_local(carry_out(lane, Arc::clone(&shared), order))),
                None => return,
            },
            _ = tick.tick() => {
                if lane == 0 {
                    lender.tick();
                    // Sessions of before a reload have no clock of their own.
                    if patience::shortest(&shared.settings().limits).is_some() {
                        shared.registry.raise_time(Instant::now());
                    }
                }
                sift(lane, &shared, &lender);
            }
            // The senders live as long as the proxy.
            _ = standings.changed() => sift(lane, &shared, &lender),
            _ = topology.changed() => sift(lane, &shared, &lender),
        }
    }
}

fn sift(lane: usize, shared: &Shared, lender: &Lender) {
    lender
        .sift(lane, |link| shared.is_current(link) && !shared.may_change(link) && link.is_alive());
}

/// Connections that were opened together should not all end together.
fn spread(lifetime: Duration) -> Duration {
    lifetime.mul_f64(rand::random_range(0.8..=1.0))
}

async fn carry_out(lane: usize, shared: Arc<Shared>, order: Order) {
    let settings = Arc::clone(&shared.settings());
    let Some(listener) = settings.listeners.get(order.kind.listener) else { return };
    let identity = order.kind.identity();
    match open(&shared, listener, Some(&identity), None, Way::Gate).await {
        Ok(opened) => {
            let (link, params) = Link::new(opened, listener);
            let lifetime = spread(settings.pool.lifetime);
            shared.lender.opened(&order, lane, link, params, lifetime);
        }
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "server connection for a pool cannot be opened"
            );
            shared.lender.failed(&order, error);
        }
    }
}
