//! The questions of a race: how far the members are.

use std::sync::Arc;
use std::time::Duration;

use super::{Driver, Errand};
use crate::ha::{DataDir, Race};
use crate::jobs;
use crate::peers::Identity;

/// For the members to answer in a race.
pub(super) const PEER_TIMEOUT: Duration = Duration::from_millis(1000);

impl Driver {
    /// Asks the members how far they are, and looks at what this node itself has.
    pub(super) fn ask_peers(&mut self) {
        let ctx = Arc::clone(&self.ctx);
        self.run_errand(async move {
            let cluster = ctx.cluster();
            let sync_revision = cluster.sync_revision;
            let mut members = cluster.members.clone();
            members.remove(&ctx.name);
            // Its silence, which is known, would cost a second.
            let silent = ctx.suspicion.silent(ctx.machine.now());
            members.retain(|name, _| silent.as_ref() != Some(name));
            let data = ctx.observed().data.clone();
            let system_identifier = match &data {
                DataDir::Initialized(control) => Some(control.system_identifier.as_str()),
                DataDir::Empty | DataDir::Begun { .. } | DataDir::Foreign { .. } => None,
            };
            let identity = Identity { scope: &ctx.settings.scope.name, system_identifier };
            let asked_at = ctx.machine.now();
            // What this node itself has is looked at after the question as well.
            let (peers, stray, ()) = tokio::join!(
                ctx.peers.ask_all(&members, identity, PEER_TIMEOUT),
                jobs::look_at_stray(&ctx, &cluster, PEER_TIMEOUT),
                ctx.fresh_look(PEER_TIMEOUT)
            );
            Errand::Race(Race { asked_at, sync_revision, peers, stray })
        });
    }
}
