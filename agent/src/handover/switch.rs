//! The switch of a handover: from a stopped server to a candidate that has the key, or to the way back. From
//! here on every way ends with a primary somewhere, unless the node leaves and somebody else may race.

use std::time::Duration;

use kornak_cluster::{ClusterState, FailoverRequest, Lsn};
use kornak_dcs::{Compare, Op, json};
use tracing::{info, warn};

use super::{
    HandoverError, Otherwise, Run, SHORT_LEASE, StuckError, TAKE_OVER_LIMIT,
    cluster_failover_cleared, millis, start_again, stop_cleanly,
};
use crate::postgres::{StartAs, StopMode, Stopped, Upstream};

impl Run<'_> {
    /// Stops the server, releases the key, and waits until the candidate has it.
    pub(super) async fn switch(&mut self, cluster: &ClusterState) -> Result<(), HandoverError> {
        let ctx = self.ctx;
        let began = ctx.machine.now();
        let limit = Duration::from_millis(self.record.switch_hold_ms);
        let candidate = self.record.candidate.clone().unwrap_or_default();
        if let Err(error) = ctx.server.terminate_walsenders_except(&[&candidate]).await {
            warn!(
                error = &error as &dyn std::error::Error,
                "connections of other standbys could not be ended, the stop may take longer"
            );
        }
        let Some((stopped, wal_end)) = stop_cleanly(ctx, limit).await else {
            return self.go_back(HandoverError::NotStopped).await;
        };
        info!(elapsed_ms = millis(ctx.machine.now().since(began)), lsn = %wal_end, "server stopped");
        if !self.release(cluster, wal_end).await? {
            return self.go_back(HandoverError::RecordChanged).await;
        }
        if let Err(error) = ctx.guard.disarm().await {
            // The server is stopped and the key is given away: nothing is left to guard.
            warn!(error = &error as &dyn std::error::Error, "guard could not be disarmed");
        }
        if !self.taken(&candidate).await {
            return self.go_back(HandoverError::NotTaken { candidate }).await;
        }
        info!(
            candidate = %candidate,
            elapsed_ms = millis(ctx.machine.now().since(began)),
            "leader key handed over"
        );
        let finishes = cluster.members.get(&candidate).is_some_and(|it| it.kornak.is_some());
        if !finishes {
            // Proxies prove the new leader when the record is gone; its lease would keep it for seconds.
            let (key, value) = (ctx.keys.handover(), json(&self.record));
            self.remove(Compare::Value { key, value }).await;
        }
        match stopped {
            Stopped::Gone => self.rejoin(cluster, &candidate).await,
            // Nobody waits for it: the next cycles let the archiver finish, and bring the server back.
            Stopped::Lingers if !is_paused(cluster) => {}
            Stopped::Lingers => match ctx.server.end_lingering().await {
                Ok(()) => self.rejoin(cluster, &candidate).await,
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "old server does not end");
                }
            },
        }
        Ok(())
    }

    async fn release(
        &mut self,
        cluster: &ClusterState,
        wal_end: Lsn,
    ) -> Result<bool, HandoverError> {
        let ctx = self.ctx;
        self.record.wal_end = Some(wal_end);
        let mut status = cluster.status.clone().unwrap_or_default();
        status.optime = wal_end;
        let mut also = vec![
            Op::put_leased(ctx.keys.handover(), json(&self.record), self.lease),
            Op::put(ctx.keys.status(), json(&status)),
        ];
        if cluster.unfenced.as_ref().is_some_and(|mark| mark.member == ctx.name) {
            // Maintenance mode: the server without a guard is stopped.
            also.push(Op::delete(ctx.keys.unfenced()));
        }
        if !cluster.only_kornak() {
            let request = FailoverRequest {
                leader: Some(ctx.name.clone()),
                member: self.record.candidate.clone(),
                scheduled_at: None,
            };
            also.push(Op::put(ctx.keys.failover(), json(&request)));
        }
        let unchanged = Compare::Modified { key: ctx.keys.handover(), revision: self.revision };
        match ctx.keeper.release(vec![unchanged], also).await {
            Ok(released) => Ok(released),
            // Counts as released: the wait for the candidate finds out.
            Err(error) if error.outcome_is_unknown() => Ok(true),
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "leader key could not be released");
                Ok(false)
            }
        }
    }

    async fn taken(&self, candidate: &str) -> bool {
        let mut view = self.ctx.view.clone();
        let leader = self.ctx.keys.leader();
        let wait = async {
            loop {
                let now = view.borrow_and_update().clone();
                if now.get(&leader).is_some_and(|key| key.value == candidate) {
                    return;
                }
                if view.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        self.ctx.machine.timeout(TAKE_OVER_LIMIT, wait).await.is_ok()
    }

    /// The old leader becomes a standby of the new one, while that one promotes.
    async fn rejoin(&self, cluster: &ClusterState, candidate: &str) {
        let member = cluster.members.get(candidate);
        let Some((host, port)) = member.and_then(kornak_cluster::Member::conn_address) else {
            return;
        };
        let upstream = Upstream::new(host, port, self.ctx.slot_name(cluster));
        self.ctx.server.prepare_synchronous_standby_names("");
        if let Err(error) = self.ctx.server.start(&StartAs::Standby(Some(upstream))).await {
            // The next cycle sees a stopped server and tries again.
            warn!(
                error = &error as &dyn std::error::Error,
                "server could not start as a standby yet"
            );
        }
    }

    /// The candidate does not have the key: take it again, and start in place.
    async fn go_back(&mut self, because: HandoverError) -> Result<(), HandoverError> {
        let ctx = self.ctx;
        if self.otherwise == Otherwise::StayDown {
            self.keep_alive.cancel();
            let (key, value) = (ctx.keys.handover(), json(&self.record));
            self.remove(Compare::Value { key, value }).await;
            return Err(because);
        }
        warn!(why = %because, "switchover failed, server is started in place");
        if ctx.keeper.held().is_none() {
            let cluster = ctx.cluster();
            // `sync` still names this node and its standbys; a candidate that took the key has
            // changed the record, and then there is no way back.
            let mut also = vec![Op::delete(ctx.keys.handover())];
            let as_released =
                Compare::Value { key: ctx.keys.handover(), value: json(&self.record) };
            also.extend(cluster_failover_cleared(ctx, &cluster));
            let claimed =
                ctx.keeper.claim(cluster.store, SHORT_LEASE, vec![as_released], |_| also).await;
            if let Err(error) = claimed {
                return Err(StuckError::from(error).into());
            }
        }
        if let Err(error) = ctx.server.stop(StopMode::Kill, Duration::from_secs(5)).await {
            return Err(StuckError::from(error).into());
        }
        let limit = ctx.cluster().config.unwrap_or_default().primary_start_timeout;
        let started = start_again(ctx, limit).await;
        self.abandon().await;
        started.and(Err(because))
    }
}

/// In maintenance mode no later cycle starts the server.
fn is_paused(cluster: &ClusterState) -> bool {
    cluster.config.as_ref().is_some_and(|config| config.pause)
}
