//! A leader that is lost: what is promised, taken back and done about it.

use std::sync::Arc;

use kornak_cluster::{ClusterState, Leadership};
use tracing::warn;

use super::{Driver, Errand};
use crate::depose;
use crate::ha::depose::{Deposing, Given};

impl Driver {
    /// For the decision.
    pub(super) fn deposing(&self) -> Deposing {
        Deposing {
            on: !self.ctx.settings.kornak.failover.suspect_after.is_zero(),
            suspected: self.ctx.suspicion.of(),
            given: self.ctx.pledges.given(),
        }
    }

    fn is_free(&self) -> bool {
        self.errand.is_none() && self.job.is_none() && self.may_run_errand()
    }

    /// From the moment that it is on disk nothing else here makes the server stream from that leader.
    pub(super) fn pledge(&mut self, of: Leadership, cluster: &ClusterState) {
        let Some(leader) = cluster.leader.as_ref().filter(|_| self.is_free()) else { return };
        if let Err(error) = self.ctx.pledges.give(Given { leader: leader.name.clone(), of }) {
            warn!(
                error = &error as &dyn std::error::Error,
                "promise to leave a lost leader could not be written to disk and is not given"
            );
            return;
        }
        let ctx = Arc::clone(&self.ctx);
        self.run_errand(async move {
            Errand::Done("leave a lost leader", depose::pledge(ctx, of).await)
        });
    }

    pub(super) fn end_pledge(&mut self) {
        if self.is_free() {
            let ctx = Arc::clone(&self.ctx);
            self.run_errand(async move {
                Errand::Done("follow the leader again", depose::end_pledge(ctx).await)
            });
        }
    }

    pub(super) fn depose(&mut self, cluster: &Arc<ClusterState>) {
        if self.is_free() {
            let (ctx, cluster) = (Arc::clone(&self.ctx), Arc::clone(cluster));
            self.run_errand(async move {
                Errand::Done("depose a lost leader", depose::depose(ctx, cluster).await)
            });
        }
    }
}
