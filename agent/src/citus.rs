//! Citus: a cluster of groups, each a small cluster of its own; group 0 is the coordinator.
//!
//! Agents of all groups follow the whole cluster in the store. The leader of the coordinator's group
//! keeps `pg_dist_node` what the store says ([`plan`], ordered by [`flight`], carried out by `keeper`,
//! one task for each database). The leaders of the other groups tell it when they are about to stop and
//! when they are there ([`notify`]), in Patroni's words, so that either may be Patroni's; what they do
//! not say, or what gets lost, the store says a moment later. Every leader keeps the tables that are its
//! own and ends what failovers have left prepared (`local`, for how long: [`settling`]; `pools`), and the
//! coordinator's publishes whether rows and store agree ([`Desk`]).
//!
//! Not here: how proxies hold the whole cluster's sessions while one group switches
//! (`kornak_cluster::handover`), and the parameters that the extension needs (`postgres::citus`).

pub mod database;
pub mod desk;
pub mod flight;
mod keeper;
mod local;
pub mod notify;
pub mod plan;
mod pools;
mod registration;
pub mod seen;
pub mod settling;

use std::sync::Arc;

use kornak_cluster::GroupId;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
pub use desk::Desk;

/// Does a node's part until `stop`; nothing on a node that belongs to no Citus cluster.
pub async fn run(ctx: Arc<Context>, stop: CancellationToken) {
    let (Some(settings), Some(desk)) = (ctx.settings.citus.clone(), ctx.citus.clone()) else {
        return;
    };
    let mut tasks = tokio::task::JoinSet::new();
    let span = tracing::Span::current();
    let spawn = |tasks: &mut tokio::task::JoinSet<()>, task: _| {
        tasks.spawn(tracing::Instrument::instrument(task, span.clone()));
    };
    spawn(
        &mut tasks,
        boxed(local::run(
            Arc::clone(&ctx),
            Arc::clone(&desk),
            settings.databases.clone(),
            stop.clone(),
        )),
    );
    let pools = pools::run(Arc::clone(&ctx), settings.databases.clone(), stop.clone());
    spawn(&mut tasks, boxed(pools));
    if ctx.settings.scope.group == Some(GroupId::COORDINATOR) {
        for database in &settings.databases {
            let keeper = keeper::Keeper::new(&ctx, &desk, database);
            spawn(&mut tasks, boxed(keeper.run(stop.clone())));
        }
        spawn(&mut tasks, boxed(registration::run(ctx, desk, stop)));
    }
    while tasks.join_next().await.is_some() {}
}

type Task = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

fn boxed(task: impl Future<Output = ()> + Send + 'static) -> Task {
    Box::pin(task)
}
