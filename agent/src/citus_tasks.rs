//! The tasks of a node of a Citus cluster, which carry out the decisions of [`crate::citus`].
//!
//! The coordinator's leader keeps `pg_dist_node` ([`keeper`], one task for each database) and publishes
//! whether it agrees with the store ([`registration`]). Every leader keeps the tables that are its own
//! ([`local`], [`pools`]). The leaders of the other groups announce changes of their primaries ([`notify`]).

pub(crate) mod database;
mod keeper;
mod local;
pub(crate) mod notify;
mod pools;
mod registration;

use std::sync::Arc;

use kornak_cluster::GroupId;
use tokio_util::sync::CancellationToken;

use crate::context::Context;

/// Does a node's part until `stop`; nothing on a node that belongs to no Citus cluster.
pub(crate) async fn run(ctx: Arc<Context>, stop: CancellationToken) {
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
