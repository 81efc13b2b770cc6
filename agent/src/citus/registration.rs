//! Tells the store whether `pg_dist_node` agrees with it, and since when not: for `kornak list` and
//! the REST API of every node.

use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{CitusDatabase, CitusRegistration};
use kornak_dcs::{Compare, Op, Txn};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::desk::{Desk, Standing};
use crate::context::Context;
use crate::handover::json;

/// What changes within this time is told once: a switchover is three changes.
const GATHER: Duration = Duration::from_millis(200);

/// Pause after the store refused.
const PAUSE: Duration = Duration::from_secs(1);

/// Writes the key whenever the truth changes, while this node leads the coordinator.
pub(super) async fn run(ctx: Arc<Context>, desk: Arc<Desk>, stop: CancellationToken) {
    let mut standings = desk.standings.subscribe();
    let mut told: Option<CitusRegistration> = None;
    loop {
        let now = standings.borrow_and_update().clone();
        if now.is_empty() {
            told = None;
        } else if let Some(held) = ctx.keeper.held() {
            let before = told.clone().or_else(|| ctx.cluster().citus);
            let next = registration(&ctx.name, &now, before.as_ref(), &crate::clock::now_rfc3339());
            if told.as_ref() != Some(&next) {
                let put = Txn::just(Op::put(ctx.keys.citus(), json(&next)))
                    .when(Compare::Lease { key: ctx.keys.leader(), lease: held.lease });
                match ctx.store.txn(put).await {
                    Ok(outcome) if outcome.succeeded => told = Some(next),
                    // The key moves to another lease for a while.
                    Ok(_) => tokio::time::sleep(GATHER).await,
                    Err(error) => {
                        warn!(error = %error, "the store was not told how pg_dist_node stands");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
        let due = told.is_none() && !now.is_empty();
        tokio::select! {
            () = stop.cancelled() => return,
            changed = standings.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(PAUSE), if due => {}
        }
        tokio::time::sleep(GATHER).await;
    }
}

/// What is told now; a disagreement keeps the time at which it was first seen.
fn registration(
    member: &str,
    now: &std::collections::BTreeMap<String, Standing>,
    before: Option<&CitusRegistration>,
    time: &str,
) -> CitusRegistration {
    let databases = now.iter().map(|(name, standing)| {
        let since = before
            .and_then(|before| before.databases.get(name)?.since.clone())
            .unwrap_or_else(|| time.to_owned());
        let mut differences = standing.differences.clone();
        differences.extend(standing.trouble.clone());
        let database = CitusDatabase {
            agrees: standing.agrees(),
            synced: standing.synced,
            groups: standing.groups.clone(),
            since: (!standing.agrees()).then_some(since),
            differences,
        };
        (name.clone(), database)
    });
    CitusRegistration { member: member.to_owned(), databases: databases.collect() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_disagreement_keeps_its_beginning_and_an_agreement_has_none() {
        let wrong = Standing { differences: vec!["x".to_owned()], ..Standing::default() };
        let now = |standing: Standing| BTreeMap::from([("citus".to_owned(), standing)]);
        let first = registration("c", &now(wrong.clone()), None, "t1");
        assert_eq!(first.databases["citus"].since.as_deref(), Some("t1"));
        let other = Standing { differences: vec!["y".to_owned()], ..wrong };
        let second = registration("d", &now(other.clone()), Some(&first), "t2");
        assert_eq!(second.databases["citus"].since.as_deref(), Some("t1"));
        let right = registration("d", &now(Standing::default()), Some(&second), "t3");
        assert_eq!(
            (right.databases["citus"].since.clone(), right.databases["citus"].agrees),
            (None, true)
        );
        let again = registration("d", &now(other), Some(&right), "t4");
        assert_eq!(again.databases["citus"].since.as_deref(), Some("t4"));
    }
}
