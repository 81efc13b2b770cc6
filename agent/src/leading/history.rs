//! The group's `history`: the way that its log took, a row for each promotion.

use kornak_cluster::{ClusterState, HistoryEntry, Revision, Timeline};
use kornak_dcs::{Op, Txn};

use super::{LeadError, while_leading};
use crate::context::Context;
use crate::ha::PrimaryFacts;
use crate::postgres::{HistoryLine, Upstream};

/// Compares the key with the server's own history once in each leadership on a timeline, and corrects
/// it. `done`: creation of the leader key, and timeline, for which that was done.
pub(super) async fn keep(
    ctx: &Context,
    facts: &PrimaryFacts,
    cluster: &ClusterState,
    done: &mut Option<(Revision, Timeline)>,
) -> Result<(), LeadError> {
    let Some(leader) = &cluster.leader else { return Ok(()) };
    let now = Some((leader.epoch.revision, facts.timeline));
    if *done == now {
        return Ok(());
    }
    let lines = if facts.timeline > Timeline(1) {
        let own = &ctx.settings.postgresql;
        let here = Upstream::new(own.connect_address.host.clone(), own.connect_address.port, None);
        ctx.server.leader_position(&here).await?.history
    } else {
        Vec::new()
    };
    let kept = cluster.config.as_ref().map_or(0, |config| config.max_timelines_history);
    let at = crate::clock::now_rfc3339();
    let list = rows(&lines, &cluster.history, facts.timeline, (&ctx.name, &at), kept);
    if list != cluster.history {
        let put = Txn::just(Op::put(ctx.keys.history(), HistoryEntry::print_list(&list)));
        ctx.store.txn(while_leading(ctx, put)).await?;
    }
    *done = now;
    Ok(())
}

/// The server's history with what the store knows of the same promotions. A promotion that it does not
/// know, onto the timeline of now, was this node's, at this time (`here`). `kept`: so many rows, the
/// newest; 0 keeps all.
fn rows(
    lines: &[HistoryLine],
    known: &[HistoryEntry],
    timeline: Timeline,
    here: (&str, &str),
    kept: usize,
) -> Vec<HistoryEntry> {
    let row = |line: &HistoryLine| {
        let same = |row: &&HistoryEntry| row.timeline == line.timeline && row.lsn == line.end;
        let newest = line.timeline.0.checked_add(1) == Some(timeline.0);
        let (new_leader, timestamp) = match known.iter().find(same) {
            Some(row) => (row.new_leader.clone(), row.timestamp.clone()),
            None if newest => (Some(here.0.to_owned()), Some(here.1.to_owned())),
            None => (None, None),
        };
        HistoryEntry {
            timeline: line.timeline,
            lsn: line.end,
            reason: line.reason.clone(),
            timestamp,
            new_leader,
        }
    };
    let skipped = if kept > 0 { lines.len().saturating_sub(kept) } else { 0 };
    lines.iter().skip(skipped).map(row).collect()
}

#[cfg(test)]
mod tests {
    use kornak_cluster::Lsn;

    use super::*;
    use crate::postgres::parse_history;

    const HISTORY: &str = "1\t0/3000000\tno recovery target specified\n\
                           2\t0/5000148\tbefore 2026-11-25 12:00:00+00\n\
                           3\t0/6000000\tno recovery target specified\n";

    fn known(timeline: u32, lsn: u64, leader: &str) -> HistoryEntry {
        HistoryEntry {
            timeline: Timeline(timeline),
            lsn: Lsn(lsn),
            reason: "no recovery target specified".to_owned(),
            timestamp: Some("then".to_owned()),
            new_leader: Some(leader.to_owned()),
        }
    }

    /// Timeline, time and new leader of each row.
    fn check(known: &[HistoryEntry], kept: usize, expected: &[(u32, &str, &str)]) {
        let lines = parse_history(HISTORY).expect("well formed");
        let rows = rows(&lines, known, Timeline(4), ("a", "now"), kept);
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let found: Vec<(u32, String, String)> = rows
            .iter()
            .map(|row| (row.timeline.0, text(&row.timestamp), text(&row.new_leader)))
            .collect();
        let found: Vec<(u32, &str, &str)> =
            found.iter().map(|(t, at, who)| (*t, at.as_str(), who.as_str())).collect();
        assert_eq!(found, expected);
        for row in &rows {
            let line = lines.iter().find(|line| line.timeline == row.timeline).expect("in it");
            assert_eq!((row.lsn, &row.reason), (line.end, &line.reason));
        }
    }

    #[test]
    fn a_promotion_that_the_store_does_not_know_was_this_nodes() {
        check(&[], 0, &[(1, "", ""), (2, "", ""), (3, "now", "a")]);
        let one = [known(1, 0x0300_0000, "b")];
        check(&one, 0, &[(1, "then", "b"), (2, "", ""), (3, "now", "a")]);
        let all = [known(2, 0x0500_0148, "b"), known(3, 0x0600_0000, "c")];
        check(&all, 0, &[(1, "", ""), (2, "then", "b"), (3, "then", "c")]);
    }

    #[test]
    fn a_promotion_of_another_way_is_not_taken_for_it() {
        check(&[known(3, 0x0600_0001, "c")], 0, &[(1, "", ""), (2, "", ""), (3, "now", "a")]);
    }

    #[test]
    fn the_newest_rows_are_kept() {
        check(&[known(2, 0x0500_0148, "b")], 2, &[(2, "then", "b"), (3, "now", "a")]);
        check(&[], 7, &[(1, "", ""), (2, "", ""), (3, "now", "a")]);
    }
}
