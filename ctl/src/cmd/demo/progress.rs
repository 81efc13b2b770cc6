//! Progress of the demo: one line per node and change.

use std::collections::BTreeSet;
use std::time::Duration;

use kornak_agent::Running;
use kornak_agent::node::NodeView;
use kornak_cluster::MemberRole;
use tokio_util::sync::CancellationToken;

use super::layout::Layout;

/// How the start ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Ready,
    Interrupted,
    TooSlow,
}

fn line(view: &NodeView) -> String {
    let what = match view.role {
        MemberRole::Primary if view.leads => "leads",
        MemberRole::Replica => match view.replication_state.as_deref() {
            Some("streaming") => "standby, streaming",
            _ => "standby",
        },
        _ => view.state.as_str(),
    };
    let timeline = view.timeline.map(|timeline| format!(", timeline {timeline}"));
    format!("  {:<8} {what}{}", view.name, timeline.unwrap_or_default())
}

/// Every group has a leader, every other node streams, and the coordinator has registered all.
fn ready(nodes: &[Running], layout: &Layout) -> bool {
    let views: Vec<_> = nodes.iter().map(|node| node.views.borrow()).collect();
    let groups: BTreeSet<Option<u32>> = layout.nodes.iter().map(|node| node.group).collect();
    let leaders = views.iter().filter(|view| view.leads).count();
    let up = |view: &NodeView| view.leads || view.replication_state.as_deref() == Some("streaming");
    let registered = |view: &NodeView| {
        view.cluster.citus.as_ref().is_some_and(|citus| {
            let agree = citus.databases.values().all(|database| database.agrees && database.synced);
            agree && citus.groups().len() == groups.len()
        })
    };
    leaders == groups.len()
        && views.iter().all(|view| up(view))
        && (!layout.is_citus() || views.iter().any(|view| registered(view)))
}

/// Prints what changes until all nodes are up.
pub(super) async fn until_ready(
    nodes: &[Running],
    layout: &Layout,
    limit: Duration,
    stop: &CancellationToken,
) -> Start {
    let told = tell(nodes, stop, |nodes| ready(nodes, layout));
    match tokio::time::timeout(limit, told).await {
        Ok(true) => Start::Ready,
        Ok(false) => Start::Interrupted,
        Err(_) => Start::TooSlow,
    }
}

/// Prints what changes until `stop`.
pub(super) async fn tell_changes(nodes: &[Running], stop: &CancellationToken) {
    tell(nodes, stop, |_| false).await;
}

/// Prints a line for each change until `done` (true) or `stop` (false).
async fn tell(
    nodes: &[Running],
    stop: &CancellationToken,
    done: impl Fn(&[Running]) -> bool,
) -> bool {
    let mut views: Vec<_> = nodes.iter().map(|node| node.views.clone()).collect();
    let mut last: Vec<String> = nodes.iter().map(|node| line(&node.views.borrow())).collect();
    loop {
        for (view, last) in views.iter_mut().zip(&mut last) {
            let now = line(&view.borrow_and_update());
            if now != *last {
                println!("{now}");
                *last = now;
            }
        }
        if done(nodes) {
            return true;
        }
        let any =
            futures_util::future::select_all(views.iter_mut().map(|view| Box::pin(view.changed())));
        tokio::select! {
            () = stop.cancelled() => return false,
            (changed, _, _) = any => if changed.is_err() { return false },
        }
    }
}
