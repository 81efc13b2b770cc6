//! Tells the store whether `pg_dist_node` agrees with it, and since when not: for `kornak list` and
//! the REST API of every node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kornak_cluster::{CitusDatabase, CitusRegistration, Moment};
use kornak_dcs::{Compare, Op, Txn};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::citus::desk::{Desk, Standing};
use crate::context::Context;
use crate::guard::boottime_now;
use kornak_dcs::json;

/// Changes within this time are told together, unless somebody waits for it: standbys that come and go
/// are several changes.
const GATHER: Duration = Duration::from_millis(200);

/// Writes the key whenever the truth changes, while this node leads the coordinator.
pub(super) async fn run(ctx: Arc<Context>, desk: Arc<Desk>, stop: CancellationToken) {
    let mut standings = desk.standings.subscribe();
    let mut told: Option<Told> = None;
    loop {
        let now = standings.borrow_and_update().clone();
        let awaited = told.as_ref().is_none_or(|told| is_awaited(&told.standings, &now));
        let early = told.as_ref().map_or(Duration::ZERO, |told| left(told.at, boottime_now()));
        if !awaited && !early.is_zero() {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = standings.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(early) => {}
            }
            continue;
        }
        if now.is_empty() {
            told = None;
        } else if let Some(held) = ctx.keeper.held() {
            let before = told.as_ref().map(|told| told.value.clone());
            let before = before.or_else(|| ctx.cluster().citus);
            let next = registration(&ctx.name, &now, before.as_ref(), &crate::clock::now_rfc3339());
            if told.as_ref().is_none_or(|told| told.value != next) {
                let put = Txn::just(Op::put(ctx.keys.citus(), json(&next)))
                    .when(Compare::Lease { key: ctx.keys.leader(), lease: held.lease });
                match ctx.store.txn(put).await {
                    Ok(outcome) if outcome.succeeded => {
                        let standings = now.clone();
                        told = Some(Told { value: next, standings, at: boottime_now() });
                    }
                    // The key moves to another lease for a while.
                    Ok(_) => told = None,
                    Err(error) => {
                        warn!(
                            error = &error as &dyn std::error::Error,
                            "state of pg_dist_node could not be published in the store"
                        );
                        told = None;
                    }
                }
            }
        }
        let due = told.is_none() && !now.is_empty();
        tokio::select! {
            () = stop.cancelled() => return,
            changed = standings.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(GATHER), if due => {}
        }
    }
}

/// The content that the store was told last.
struct Told {
    value: CitusRegistration,
    standings: Standings,
    at: Moment,
}

type Standings = BTreeMap<String, Standing>;

fn left(told: Moment, now: Moment) -> Duration {
    (told + GATHER).since(now)
}

fn is_awaited(told: &Standings, now: &Standings) -> bool {
    let mut standings = now.iter();
    standings.any(|(database, standing)| standing.is_awaited(told.get(database)))
}

/// The content for the store now; a disagreement keeps the time at which it was first seen.
fn registration(
    member: &str,
    now: &Standings,
    before: Option<&CitusRegistration>,
    time: &str,
) -> CitusRegistration {
    let databases = now.iter().map(|(name, standing)| {
        let before = before.and_then(|before| before.databases.get(name));
        let since =
            before.and_then(|before| before.since.clone()).unwrap_or_else(|| time.to_owned());
        // Rows that cannot be read are not gone: sessions on workers would lose their groups, readers
        // their standbys.
        let unseen = standing.trouble.is_some() && standing.primaries.is_empty();
        let (groups, secondaries) = match before.filter(|_| unseen) {
            Some(before) => (before.groups.clone(), before.secondaries.clone()),
            None => {
                let secondaries = (!unseen).then(|| standing.secondaries.clone());
                (standing.primaries.keys().copied().collect(), secondaries)
            }
        };
        let mut differences = standing.differences.clone();
        differences.extend(standing.trouble.clone());
        let database = CitusDatabase {
            agrees: standing.agrees(),
            synced: standing.synced,
            behind: standing.behind.clone(),
            groups,
            primaries: standing.primaries.clone(),
            secondaries,
            since: (!standing.agrees()).then_some(since),
            differences,
        };
        (name.clone(), database)
    });
    CitusRegistration { member: member.to_owned(), databases: databases.collect() }
}

#[cfg(test)]
mod tests {
    use kornak_cluster::GroupId;

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

    fn seen(primaries: &[(u32, &str)], behind: &[u32]) -> Standings {
        let standing = Standing {
            synced: behind.is_empty(),
            primaries: primaries.iter().map(|(g, at)| (GroupId(*g), (*at).to_owned())).collect(),
            behind: behind.iter().copied().map(GroupId).collect(),
            secondaries: [(GroupId(1), ["b:1".to_owned()].into())].into(),
            ..Standing::default()
        };
        BTreeMap::from([("citus".to_owned(), standing)])
    }

    #[test]
    fn rows_that_cannot_be_read_do_not_take_the_groups_away() {
        let told = registration("c", &seen(&[(0, "c:1"), (1, "a:1")], &[]), None, "t1");
        assert_eq!(told.groups(), [GroupId(0), GroupId(1)].into());
        let standbys = told.databases["citus"].secondaries.clone();
        assert_eq!(standbys, Some([(GroupId(1), ["b:1".to_owned()].into())].into()));
        let blind = Standing { trouble: Some("x".to_owned()), ..Standing::default() };
        let blind = BTreeMap::from([("citus".to_owned(), blind)]);
        let told = registration("d", &blind, Some(&told), "t2");
        assert_eq!(told.groups(), [GroupId(0), GroupId(1)].into());
        assert_eq!(told.databases["citus"].secondaries, standbys);
        assert!(told.databases["citus"].primaries.is_empty(), "but nobody knows where they are");
        let told = registration("d", &blind, None, "t2");
        assert_eq!(told.databases["citus"].secondaries, None, "never seen");
        let told = registration("d", &seen(&[(0, "d:1")], &[]), Some(&told), "t3");
        assert_eq!(told.groups(), [GroupId(0)].into());
    }

    #[test]
    fn a_new_primary_is_told_at_once_and_a_new_sentence_when_some_have_gathered() {
        let told = seen(&[(1, "a:1")], &[]);
        assert!(is_awaited(&told, &seen(&[(1, "b:1")], &[])));
        assert!(is_awaited(&told, &seen(&[(1, "a:1")], &[1])));
        assert!(is_awaited(&BTreeMap::new(), &told));
        let mut other = told.clone();
        other.get_mut("citus").unwrap().differences.push("x".to_owned());
        assert!(!is_awaited(&told, &other));
        let at = Moment::at_millis;
        assert_eq!(left(at(1000), at(1050)), Duration::from_millis(150));
        assert_eq!(left(at(1000), at(1200)), Duration::ZERO);
    }
}
