//! Handovers that somebody planned: by REST, in the store, or by stopping the agent.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kornak_cluster::{Revision, discard, error_chain};
use kornak_dcs::{Compare, Op, Reach, Txn};
use tracing::{error, info, warn};

use super::{BACK_OFF, Driver, End};
use crate::FAREWELL;
use crate::context::Context;
use crate::ha::request::{Due, due};
use crate::ha::{Action, Decision, Job, Lease, Server, Snapshot, Why};
use crate::handover::{self, Otherwise, Stragglers, standby_cluster};
use crate::node::{CommandError, CommandResult};
use crate::postgres::StopMode;

/// A handover at shutdown must not take longer than init systems wait.
const SHUTDOWN_DRAIN: Duration = Duration::from_secs(10);

/// Between two looks at a rewind whose end is waited for.
const REWIND_LOOK: Duration = Duration::from_millis(50);

/// For removing what a copy has left; the next start goes on with it.
const CLEAR_LIMIT: Duration = Duration::from_secs(5);

/// The leader's housekeeping takes the guard out of service within a round of maintenance mode.
const UNFENCE_LIMIT: Duration = Duration::from_secs(3);

/// Where a handover was asked for, and so who is told what came of it.
pub(crate) enum Asked {
    /// By the agent itself, which is to stop.
    Here,
    Rest(tokio::sync::oneshot::Sender<CommandResult>),
    /// The store's `failover` of this revision; it is cleared if nothing came of it. (If something
    /// did, the new leader clears it.)
    Store {
        revision: Revision,
    },
}

impl Driver {
    /// Carries out what the store asks for, if this node leads. Returns how long the loop may sleep.
    pub(super) fn requested(&mut self, snapshot: &Snapshot, decision: &Decision) -> Duration {
        let cluster = &snapshot.cluster;
        if decision.action != Action::Lead || self.job.is_some() {
            return decision.recheck;
        }
        let config = cluster.config.clone().unwrap_or_default();
        let me = &self.ctx.name;
        let revision = cluster.failover_revision;
        match due(&cluster.failover, me, config.pause, config.loop_wait, Timestamp::now()) {
            Due::Nothing => {}
            Due::In(left) => return decision.recheck.min(left),
            Due::Now { candidate, forced } => {
                info!(
                    candidate,
                    scheduled = cluster.failover.scheduled_at,
                    "carrying out the switchover requested in the store"
                );
                let limit = self.ctx.settings.kornak.handover.drain_timeout;
                let stragglers = if forced { Stragglers::Terminate } else { Stragglers::Abort };
                self.hand_over(candidate, limit, stragglers, Asked::Store { revision });
            }
            Due::Done => {
                info!(candidate = me, "request in the store was carried out");
                self.clear_request(revision);
            }
            Due::Drop(why) => {
                warn!(why = %why, "request in the store was not carried out");
                self.clear_request(revision);
            }
        }
        decision.recheck
    }

    fn clear_request(&mut self, revision: Revision) {
        let ctx = Arc::clone(&self.ctx);
        self.run_errand(async move {
            clear(&ctx, revision).await;
            super::Errand::Done("clear the request", Ok(()))
        });
    }

    /// Starts a planned handover as a job.
    pub(crate) fn hand_over(
        &mut self,
        candidate: Option<String>,
        limit: Duration,
        stragglers: Stragglers,
        asked: Asked,
    ) {
        if self.job.is_some() || !matches!(self.ctx.keeper.fact(), Lease::Mine { .. }) {
            let text = match &self.job {
                Some((job, _)) => format!("{} already in progress", job.as_str()),
                None => "this node does not lead".to_owned(),
            };
            if let Asked::Rest(answer) = asked {
                // Who asked may have gone; there is nobody else to tell.
                discard::receiver_may_be_gone(answer.send(Err(CommandError::NotPossible(text))));
            }
            return;
        }
        let ctx = Arc::clone(&self.ctx);
        self.begin(Job::Handover, async move {
            let candidate = candidate.as_deref();
            let otherwise = match asked {
                Asked::Here => Otherwise::StayDown,
                Asked::Rest(_) | Asked::Store { .. } => Otherwise::StartInPlace,
            };
            let result = if standby_cluster::is_led(&ctx) {
                standby_cluster::hand_over(&ctx, candidate).await
            } else {
                handover::hand_over(&ctx, candidate, limit, stragglers, otherwise).await
            };
            let said = match &result {
                Ok(new) => Ok(format!("Successfully switched over to \"{new}\"")),
                Err(handover::HandoverError::Refused(refusal)) => {
                    Err(CommandError::NotPossible(refusal.to_string()))
                }
                Err(error) => Err(CommandError::Failed(error_chain(error))),
            };
            match &result {
                Ok(new) => info!(leader = %new, "switchover completed"),
                Err(error) => {
                    warn!(error = error as &dyn std::error::Error, "switchover not carried out");
                }
            }
            match asked {
                Asked::Here => {}
                Asked::Rest(answer) => drop(answer.send(said)),
                Asked::Store { revision } if said.is_err() => clear(&ctx, revision).await,
                Asked::Store { .. } => {}
            }
            Ok(())
        });
    }

    /// In maintenance mode nothing is stopped by itself; but a primary only stays if no guard would
    /// stop it when nobody proves its lease any more.
    async fn may_leave_running(&self) -> bool {
        let paused = || self.ctx.cluster().config.is_some_and(|config| config.pause);
        match self.ctx.observed().server {
            Server::Standby(_) => paused(),
            Server::Primary(_) => {
                let began = self.ctx.machine.now();
                while paused()
                    && !self.ctx.keeper.is_unfenced()
                    && self.ctx.machine.since(began) < UNFENCE_LIMIT
                {
                    self.ctx.machine.sleep(UNFENCE_LIMIT / 30).await;
                }
                paused() && self.ctx.keeper.is_unfenced()
            }
            _ => false,
        }
    }

    /// Without it nobody can be handed anything, and each try would take `retry_timeout`.
    async fn store_answers(&self) -> bool {
        let asked = self.ctx.store.range(&self.ctx.keys.leader());
        matches!(self.ctx.machine.timeout(FAREWELL, asked).await, Ok(Ok(_)))
    }

    /// Removes what a copy that was broken off has left: it is of no use. What stays is known for
    /// what it is.
    async fn clear_up(&self) {
        let cleared = self.ctx.postgres.clear_leftovers();
        match self.ctx.machine.timeout(CLEAR_LIMIT, cleared).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(error)) => warn!(
                error = &error as &dyn std::error::Error,
                "unfinished work in the data directory is left for the next start"
            ),
        }
    }

    /// Hands over if this node leads and somebody can take over, then stops the server.
    pub(super) async fn shut_down(mut self) -> End {
        self.wait_for_rewind().await;
        if let Some((job, _)) = self.job.as_ref().filter(|(job, _)| *job != Job::Handover) {
            let makes = matches!(job, Job::Bootstrap | Job::Clone | Job::Reinitialize);
            self.abort();
            if makes {
                self.clear_up().await;
            }
        }
        if self.job.is_none() && self.may_leave_running().await {
            info!("agent stops in maintenance mode, its server and the leader key are left alone");
            return End::LeftRunning;
        }
        let leads = matches!(self.ctx.observed().server, Server::Primary(_));
        if self.ctx.keeper.held().is_some() && leads && self.job.is_none() {
            if self.store_answers().await {
                info!("handing over before stopping");
                self.hand_over(None, SHUTDOWN_DRAIN, Stragglers::Terminate, Asked::Here);
            } else {
                warn!("stopping without a handover: the store does not answer");
            }
        }
        self.wait_for_handover().await;
        let stopped = self.ctx.stop_in_order(self.ctx.stop_limit()).await;
        if let Err(error) = stopped {
            warn!(error = &error as &dyn std::error::Error, "server did not stop and is killed");
            let killed = self.ctx.server.stop(StopMode::Kill, Duration::from_secs(10)).await;
            if let Err(error) = killed {
                error!(error = &error as &dyn std::error::Error, "server could not be stopped");
                return End::Stopped;
            }
        }
        self.give_key_back().await;
        self.ctx.fresh_look(super::LOOK_LIMIT).await;
        let snapshot = self.look();
        let decision = Decision { action: Action::Wait, why: Why::ServerDown, recheck: BACK_OFF };
        self.show(&decision, &snapshot);
        self.call_back(&snapshot.server, Some(Job::Demote));
        info!("agent stopped");
        End::Stopped
    }

    async fn wait_for_rewind(&self) {
        if self.ctx.server.is_rewinding() {
            info!(
                "waiting for pg_rewind, because an interrupted one leaves the data directory unusable"
            );
            while self.ctx.server.is_rewinding() {
                self.ctx.machine.sleep(REWIND_LOOK).await;
            }
        }
    }

    /// Waits for the end of the handover that is under way, if there is one, and breaks it off when it takes
    /// too long or the store is gone.
    async fn wait_for_handover(&mut self) {
        let Some((_, handle)) = self.job.take() else { return };
        let limit = SHUTDOWN_DRAIN + Duration::from_secs(15);
        let running = handle.abort_handle();
        let mut view = self.ctx.view.clone();
        tokio::select! {
            biased;
            // It has said itself what came of it.
            _ = handle => {}
            () = self.ctx.machine.sleep(limit) => {
                warn!("stopping without a handover: it took too long");
            }
            Ok(_) = view.wait_for(|view| view.reach == Reach::Lost) => {
                warn!("stopping without a handover: the store is gone");
            }
        }
        running.abort();
    }

    /// Gives the leader key back, if it is held. The server has stopped.
    async fn give_key_back(&self) {
        let held = self.ctx.keeper.let_go();
        // Nothing runs that it would have to stop, and the store may take longer than the lease lasts.
        if let Err(error) = self.ctx.guard.disarm().await {
            warn!(error = &error as &dyn std::error::Error, "guard could not be disarmed");
        }
        if let Some(held) = held.filter(|_| self.ctx.store_is_full()) {
            warn!(
                "the store takes no writes: the leader key is left to its lease and to the next agent"
            );
            self.ctx.keeper.leave_to_next(held).await;
        } else if let Some(held) = held {
            let released = self.ctx.keeper.release_held(held, Vec::new(), Vec::new());
            if !matches!(self.ctx.machine.timeout(FAREWELL, released).await, Ok(Ok(_))) {
                warn!("the leader key is left to its lease");
            }
        }
    }
}

async fn clear(ctx: &Context, revision: Revision) {
    let key = ctx.keys.failover();
    let unchanged = Compare::Modified { key: key.clone(), revision };
    // Never deleted: Patroni clears it by an empty object.
    if let Err(error) = ctx.store.txn(Txn::just(Op::put(key, "{}")).when(unchanged)).await {
        warn!(
            error = &error as &dyn std::error::Error,
            "request in the store could not be cleared"
        );
    }
}
