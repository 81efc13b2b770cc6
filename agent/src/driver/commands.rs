//! Carries out, or refuses, the requests of operators and other members that come through the REST
//! API.

use std::sync::Arc;

use kornak_cluster::config::{MAXIMUM_TTL, merge_patch, problems, ttl_beyond_the_ceiling, unread};
use kornak_cluster::{Epoch, FailoverRequest, Moment, discard};
use kornak_dcs::{Compare, Op, Reach, Txn, json};
use serde_json::{Map, Value};
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::context::Context;
use crate::driver::{Asked, Driver};
use crate::failsafe::{is_from_leader, promise_length};
use crate::ha::{DataDir, Job, Server};
use crate::handover::{HandoverError, Stragglers};
use crate::jobs::{self, JobError};
use crate::machine::Machine;
use crate::node::{Command, CommandError, CommandResult, ConfigureError, FailsafeAnswer};
use crate::observe::Observation;
use crate::postgres::StartError;

/// Carries one command out. Anything that takes time goes on by itself; its answer follows.
pub(crate) async fn obey(driver: &mut Driver, command: Command) {
    let ctx = Arc::clone(&driver.ctx);
    let machine = ctx.machine.clone();
    match command {
        Command::Switchover { candidate, answer } => {
            let limit = ctx.settings.kornak.handover.drain_timeout;
            driver.hand_over(candidate, limit, Stragglers::Abort, Asked::Rest(answer));
        }
        Command::Failover { candidate, answer } => failover(driver, candidate, answer),
        Command::Restart { timeout, answer } => {
            let work = jobs::restart(Arc::clone(&ctx), timeout);
            as_job(driver, Job::Restart, work, "restarted successfully", restart_failure, answer);
        }
        Command::Reload { answer } => {
            ctx.signals.reread.notify_one();
            spawn_answer(&machine, answer, async move {
                let runs = matches!(ctx.observed().server, Server::Primary(_) | Server::Standby(_));
                match ctx.reload().await {
                    // A server that is down reads it with its next start.
                    Err(error) if runs => {
                        Err(CommandError::Failed(kornak_cluster::error_chain(&error)))
                    }
                    Ok(()) | Err(_) => Ok("reload scheduled".to_owned()),
                }
            });
        }
        Command::Reinitialize { force, from_leader, answer } => {
            reinitialize(driver, force, from_leader, answer);
        }
        Command::Configure { change, replace, answer } => {
            machine.spawn(async move {
                // Who asked may have gone.
                discard::receiver_may_be_gone(answer.send(configure(&ctx, change, replace).await));
            });
        }
        Command::Schedule { request, answer } => {
            spawn_answer(&machine, answer, async move {
                let request = request.unwrap_or_default();
                let put = Op::put(ctx.keys.failover(), json(&request));
                let written = ctx.store.txn(Txn::just(put)).await;
                written
                    .map_err(|error| CommandError::Failed(kornak_cluster::error_chain(&error)))?;
                Ok("scheduled".to_owned())
            });
        }
        Command::Failsafe { leader, asked, epoch, slots, answer } => {
            let said = failsafe(&ctx, &leader, epoch, asked);
            if matches!(said, FailsafeAnswer::Accepted { .. }) {
                *ctx.board.told_slots.lock() = slots;
            }
            discard::receiver_may_be_gone(answer.send(said));
        }
        Command::Look => ctx.signals.look.notify_one(),
        Command::Checkpoint { answer } => {
            let epoch_ttl = crate::handover::SHORT_LEASE;
            spawn_answer(&machine, answer, async move {
                // Asked by a leader that is about to hand over to this node.
                ctx.keeper.grant_ahead(epoch_ttl).await;
                checkpoint(&ctx).await?;
                Ok("checkpoint done".to_owned())
            });
        }
    }
}

/// Between two checkpoints that are asked for by REST: one that has just begun is good for both.
const CHECKPOINT_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// One at a time, however many ask.
async fn checkpoint(ctx: &Context) -> Result<(), CommandError> {
    let mut last = ctx.board.asked_checkpoint.lock().await;
    let now = ctx.machine.now();
    if last.is_some_and(|began| now.since(began) < CHECKPOINT_PAUSE) {
        return Ok(());
    }
    let done = ctx.server.checkpoint().await;
    done.map_err(|error| CommandError::Failed(kornak_cluster::error_chain(&error)))?;
    *last = Some(now);
    Ok(())
}

fn spawn_answer(
    machine: &Machine,
    answer: oneshot::Sender<CommandResult>,
    work: impl Future<Output = CommandResult> + Send + 'static,
) {
    machine.spawn(async move {
        discard::receiver_may_be_gone(answer.send(work.await));
    });
}

/// Runs a job and answers when it has ended.
fn as_job(
    driver: &mut Driver,
    job: Job,
    work: impl Future<Output = Result<(), JobError>> + Send + 'static,
    done: &'static str,
    failure: impl Fn(&JobError) -> String + Send + 'static,
    answer: oneshot::Sender<CommandResult>,
) {
    if let Some(busy) = driver.busy_with() {
        let text = format!("{} already in progress", busy.as_str());
        discard::receiver_may_be_gone(answer.send(Err(CommandError::NotPossible(text))));
        return;
    }
    driver.start_job(job, async move {
        let result = work.await;
        let said = match &result {
            Ok(()) => Ok(done.to_owned()),
            Err(error) => Err(CommandError::Failed(failure(error))),
        };
        discard::receiver_may_be_gone(answer.send(said));
        result
    });
}

/// In Patroni's words where it has them; the log says more.
fn restart_failure(error: &JobError) -> String {
    match error {
        JobError::Start(StartError::NotReady(_))
        | JobError::Restart(HandoverError::Starting(_)) => "postgres is still starting".to_owned(),
        JobError::Restart(error) => error.to_string(),
        _ => "restart failed".to_owned(),
    }
}

/// With a leader it is a handover that ends what does not end by itself; without one, the request is
/// written and the candidate reads it.
fn failover(driver: &mut Driver, candidate: String, answer: oneshot::Sender<CommandResult>) {
    let ctx = Arc::clone(&driver.ctx);
    let machine = ctx.machine.clone();
    if ctx.keeper.held().is_some() {
        let limit = ctx.settings.kornak.handover.drain_timeout;
        driver.hand_over(Some(candidate), limit, Stragglers::Terminate, Asked::Rest(answer));
        return;
    }
    spawn_answer(&machine, answer, async move {
        let cluster = ctx.cluster();
        if !cluster.members.contains_key(&candidate) {
            return Err(CommandError::NotPossible("candidate does not exists".to_owned()));
        }
        let request = FailoverRequest { member: Some(candidate.clone()), ..Default::default() };
        let put = Op::put(ctx.keys.failover(), json(&request));
        let written = ctx.store.txn(Txn::just(put)).await;
        written.map_err(|_| {
            CommandError::Failed("failed to write failover key into DCS".to_owned())
        })?;
        wait_for_leader(&ctx, &candidate).await
    });
}

async fn wait_for_leader(ctx: &Context, candidate: &str) -> CommandResult {
    let mut view = ctx.view.clone();
    let leader = ctx.keys.leader();
    let limit = std::time::Duration::from_secs(20);
    let named = async {
        loop {
            let now = Arc::clone(&view.borrow_and_update());
            if let Some(found) = now.get(&leader) {
                return found.value.clone();
            }
            if view.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    match ctx.machine.timeout(limit, named).await {
        Ok(new) if new == candidate => Ok(format!("Successfully failed over to \"{new}\"")),
        Ok(new) => Ok(format!("Failed over to \"{new}\" instead of \"{candidate}\"")),
        Err(_) => Err(CommandError::Failed("Failover failed".to_owned())),
    }
}

/// `force` takes the place of whatever else is under way: a copy that hangs, a rewind that fails again
/// and again. `from_leader` copies from nobody but the leader.
fn reinitialize(
    driver: &mut Driver,
    force: bool,
    from_leader: bool,
    answer: oneshot::Sender<CommandResult>,
) {
    let ctx = Arc::clone(&driver.ctx);
    let refused = if ctx.keeper.held().is_some() {
        Some("I am the leader, can not reinitialize".to_owned())
    } else if ctx.cluster().leader.is_none() {
        Some("Cluster has no leader, can not reinitialize".to_owned())
    } else if ctx.pledges.bind(&ctx.cluster()) {
        Some("the leader seems lost, and this node may have to take over".to_owned())
    } else {
        let busy = driver.busy_with().filter(|_| !force);
        busy.map(|busy| format!("{} already in progress", busy.as_str()))
    };
    if let Some(text) = refused {
        discard::receiver_may_be_gone(answer.send(Err(CommandError::NotPossible(text))));
        return;
    }
    if let Some(busy) = driver.busy_with() {
        warn!(job = busy.as_str(), "running step given up for the requested reinitialization");
        driver.abort();
    }
    driver.start_job(Job::Reinitialize, async move {
        // What is there may be the only second copy.
        if let Err(error) = jobs::prove_copy(&ctx, from_leader).await {
            let text = format!("can not reinitialize: {}", kornak_cluster::error_chain(&error));
            discard::receiver_may_be_gone(answer.send(Err(CommandError::Failed(text))));
            return Err(error);
        }
        info!(from_leader, "reinitialization begun");
        discard::receiver_may_be_gone(answer.send(Ok("reinitialize started".to_owned())));
        ctx.postgres.give_up_rewind();
        jobs::reinitialize(ctx, from_leader).await
    });
}

async fn configure(
    ctx: &Context,
    change: Map<String, Value>,
    replace: bool,
) -> Result<Map<String, Value>, ConfigureError> {
    if let Some(problem) = problems(&change).first() {
        return Err(ConfigureError::Invalid(problem.to_string()));
    }
    for key in unread(&change) {
        warn!(
            key,
            "a key of the dynamic configuration that nobody reads is stored: is it misspelled?"
        );
    }
    if let Some(ttl) = ttl_beyond_the_ceiling(&change) {
        warn!(
            ttl,
            in_force_s = MAXIMUM_TTL.as_secs(),
            "ttl is longer than Kornak takes: nobody could lead for so long after a leader was lost"
        );
    }
    let cluster = ctx.cluster();
    let wanted = if replace {
        change
    } else {
        let mut merged = cluster.config.ok_or(ConfigureError::Missing)?.raw;
        merge_patch(&mut merged, &change);
        merged
    };
    let key = ctx.keys.config();
    let mut txn = Txn::just(Op::put(&key, json(&wanted)));
    if !replace {
        txn = txn.when(Compare::Modified { key, revision: cluster.config_revision });
    }
    match ctx.store.txn(txn).await {
        Ok(outcome) if outcome.succeeded => Ok(wanted),
        Ok(_) => Err(ConfigureError::Conflict),
        Err(error) => Err(ConfigureError::Store(kornak_cluster::error_chain(&error))),
    }
}

/// Nobody has looked yet, or a server that was a primary runs and does not say what it is now.
fn may_be_primary(seen: &Observation) -> bool {
    match &seen.server {
        _ if seen.at == Moment::default() => true,
        Server::Primary(_) => true,
        Server::Standby(_) | Server::Stopped | Server::Leftovers => false,
        Server::Starting { .. }
        | Server::Silent { .. }
        | Server::Closed { .. }
        | Server::Stopping { .. } => {
            matches!(&seen.data, DataDir::Initialized(control) if control.is_primarys())
        }
    }
}

/// Whether this node stays out of the way of a leader that has lost the store, and that asks for so long.
fn failsafe(
    ctx: &Context,
    leader: &str,
    epoch: Option<Epoch>,
    asked: Option<std::time::Duration>,
) -> FailsafeAnswer {
    let seen_by_us = ctx.view.borrow().reach != Reach::Never;
    let cluster = ctx.state();
    // A promise binds this node alone: where the mode is not known, it is given.
    if cluster.config.as_ref().is_some_and(|config| !config.failsafe_mode) {
        return FailsafeAnswer::Off;
    }
    let promised = ctx.promises.leader();
    if !is_from_leader(leader, epoch, &cluster, seen_by_us, promised.as_deref()) {
        warn!(
            node = leader,
            "failsafe request refused: the sender is not the leader that the store named"
        );
        return FailsafeAnswer::NotTheLeader;
    }
    if ctx.pledges.are_to(leader, &cluster) {
        warn!(
            node = leader,
            "failsafe request refused: nothing is acknowledged to a leader that seemed lost"
        );
        return FailsafeAnswer::NotTheLeader;
    }
    let seen = ctx.observed();
    if ctx.keeper.is_claiming() || ctx.keeper.held().is_some() || may_be_primary(&seen) {
        return FailsafeAnswer::Leading;
    }
    let server = seen.server.clone();
    let lsn = match server {
        Server::Standby(facts) => facts.position(),
        _ => kornak_cluster::Lsn(0),
    };
    let ttl = cluster.config.as_ref().map(|config| config.ttl).unwrap_or_default();
    let promised = promise_length(ttl, asked);
    match ctx.promises.give(leader, ctx.machine.now(), promised) {
        Ok(()) => FailsafeAnswer::Accepted { lsn, promised },
        Err(error) => {
            warn!(
                error = &error as &dyn std::error::Error,
                "failsafe promise could not be written to disk and is not given"
            );
            FailsafeAnswer::Leading
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ha::Control;

    #[test]
    fn a_server_that_says_nothing_may_be_a_primary() {
        let since = Moment::at_millis(1);
        let data = |standby_signal| {
            DataDir::Initialized(Control {
                system_identifier: "7".to_owned(),
                timeline: kornak_cluster::Timeline(1),
                clean: false,
                was_primary: true,
                standby_signal,
            })
        };
        let seen = |server: Server, standby_signal| {
            let mut seen = Observation::none();
            (seen.at, seen.server, seen.data) = (since, server, data(standby_signal));
            seen
        };
        assert!(may_be_primary(&Observation::none()), "nobody has looked");
        assert!(may_be_primary(&seen(Server::Silent { since }, false)));
        assert!(may_be_primary(&seen(Server::Closed { since }, false)));
        assert!(!may_be_primary(&seen(Server::Silent { since }, true)));
        assert!(!may_be_primary(&seen(Server::Stopped, false)));
    }

    #[test]
    fn a_restart_that_goes_on_is_said_in_patronis_words() {
        let limit = Duration::from_secs(1);
        for (error, expected) in [
            (JobError::Start(StartError::NotReady(limit)), "postgres is still starting"),
            (JobError::Restart(HandoverError::Starting(limit)), "postgres is still starting"),
            (JobError::NoWatchdog, "restart failed"),
        ] {
            assert_eq!(restart_failure(&error), expected);
        }
        let refused = HandoverError::NeverDrained(limit);
        assert!(restart_failure(&JobError::Restart(refused)).contains("transactions"));
    }
}
