//! The task that tells the watchdog's device when the leader's lease was renewed.
//!
//! Not here: the device and when it is told what ([`crate::watchdog`]); it is switched on before a promotion.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::ha::Server;
use crate::watchdog::{EVERY, Word, word};

/// Tells the device what there is to tell until `stop`.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let mut held = ctx.keeper.subscribe();
    let mut told = None;
    loop {
        let proof = held.borrow_and_update().map(|held| held.until);
        let config = ctx.cluster().config.unwrap_or_default();
        let needed = !config.pause && config.standby_cluster.is_none();
        let server = ctx.observed().server.clone();
        let maybe_primary = !matches!(server, Server::Stopped | Server::Standby(_));
        match word(proof, told, ctx.machine.now(), needed, maybe_primary) {
            Word::Well => {
                told = proof;
                // A leader that has come back into service, or found its server running.
                if matches!(server, Server::Primary(_)) {
                    ctx.watchdog.activate(config.ttl);
                }
                ctx.watchdog.ping();
            }
            Word::Nothing => {}
            Word::Off => ctx.watchdog.disable(),
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => {
                // An agent that has stopped its server leaves no host behind that is about to be reset.
                if matches!(ctx.observed().server, Server::Stopped | Server::Standby(_)) {
                    ctx.watchdog.disable();
                }
                return;
            }
            _ = held.changed() => {}
            () = ctx.machine.sleep(EVERY) => {}
        }
    }
}
