//! Whether a server can follow a leader as it is: where its own log ends, compared with the way that the leader's took.

use kornak_cluster::{Lsn, Timeline};

use super::super::controldata::{ControlData, ControlState};

/// One line of a timeline's history: when an older timeline was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryLine {
    pub timeline: Timeline,
    /// The next timeline begins here.
    pub end: Lsn,
    /// Why it was left, as PostgreSQL or the operator's recovery target says.
    pub reason: String,
}

/// Reads `N.history` (`src/backend/access/transam/timeline.c`): timeline, tab, position, tab, reason.
/// `None`: a line that is neither that nor a comment.
pub fn parse_history(text: &str) -> Option<Vec<HistoryLine>> {
    let lines =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (timeline, rest) = line.split_once(char::is_whitespace)?;
            let rest = rest.trim_start();
            let (end, reason) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            Some(HistoryLine {
                timeline: Timeline(timeline.parse().ok()?),
                end: end.parse().ok()?,
                reason: reason.trim_start().to_owned(),
            })
        })
        .collect()
}

/// Where the local log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalEnd {
    pub timeline: Timeline,
    pub lsn: Lsn,
}

impl LocalEnd {
    /// From the control file of a server that does not run. `None`: it has crashed as a primary, and
    /// only its recovery will tell.
    pub fn of(control: &ControlData) -> Option<Self> {
        match control.state {
            ControlState::ShutDown => {
                Some(Self { timeline: control.timeline, lsn: control.shutdown_end()? })
            }
            // A standby that was stopped, or has crashed: it will be consistent from here on.
            ControlState::ShutDownInRecovery | ControlState::InArchiveRecovery => Some(Self {
                timeline: control.minimum_recovery_timeline.max(control.timeline),
                lsn: control.minimum_recovery_end.max(control.checkpoint),
            }),
            _ => None,
        }
    }
}

/// A leader's answer about its log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderPosition {
    pub timeline: Timeline,
    /// Empty on timeline 1.
    pub history: Vec<HistoryLine>,
    /// Timeline of its last checkpoint.
    pub checkpoint_timeline: Timeline,
    /// How far its log was flushed when it was asked; `None`: it is itself a standby.
    pub flushed: Option<Lsn>,
    pub system_identifier: u64,
}

/// Whether a member can follow the leader as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RewindNeed {
    /// All that it has, the leader has as well.
    No,
    /// The server has something that the leader has not.
    Diverged,
    /// As above, but the other one has no say now: it leads no more, or not yet.
    Undecided,
}

/// Whose log counts where two have diverged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authority {
    /// A primary's alone. Who is in recovery may have been the leader when the store was read, follow another one
    /// by now, and lack what that one has acknowledged since.
    Primary,
    /// Any server's: members of a standby cluster write nothing of their own.
    Any,
}

impl Authority {
    /// Whether the log of a server counts that has answered this.
    pub(super) fn has(self, leader: &LeaderPosition) -> bool {
        self == Self::Any || leader.flushed.is_some()
    }

    /// The need of a server that differs from that one.
    pub fn diverged_from(self, leader: &LeaderPosition) -> RewindNeed {
        if self.has(leader) { RewindNeed::Diverged } else { RewindNeed::Undecided }
    }
}

/// Compares where the local log ends with the way that the leader's log took, which was asked for later: a
/// standby is sent what is flushed and no more.
pub fn rewind_need(local: LocalEnd, leader: &LeaderPosition, authority: Authority) -> RewindNeed {
    if local.timeline == leader.timeline {
        let ahead = leader.flushed.is_some_and(|flushed| local.lsn > flushed);
        return if ahead { RewindNeed::Diverged } else { RewindNeed::No };
    }
    let left = leader.history.iter().find(|line| line.timeline == local.timeline);
    match left {
        Some(line) if local.lsn <= line.end => RewindNeed::No,
        // Beyond the fork, on a way that the leader never took, or ahead of it.
        _ => authority.diverged_from(leader),
    }
}

/// How the way of a server on `timeline` compares with the leader's, up to the point where that
/// timeline began: two promotions that did not know of each other take the same number.
pub(super) fn same_way(
    timeline: Timeline,
    parents: &[HistoryLine],
    leader: &LeaderPosition,
) -> bool {
    let theirs = leader.history.iter().filter(|line| line.timeline < timeline);
    let is_on_it =
        timeline == leader.timeline || leader.history.iter().any(|line| line.timeline == timeline);
    !is_on_it || theirs.eq(parents.iter())
}

#[cfg(test)]
mod tests {
    use super::super::super::archive::wal_file;
    use super::*;

    const HISTORY: &str = "# comment\n1\t0/3000000\tno recovery target specified\n\n\
                           2\t0/5000148\tno recovery target specified\n";

    fn leader() -> LeaderPosition {
        let history = parse_history(HISTORY).expect("well formed");
        LeaderPosition {
            timeline: Timeline(3),
            history,
            checkpoint_timeline: Timeline(3),
            flushed: Some(Lsn(0x0900_0000)),
            system_identifier: 7,
        }
    }

    #[test]
    fn a_history_file_is_understood() {
        let history = leader().history;
        let second = HistoryLine {
            timeline: Timeline(2),
            end: Lsn(0x0500_0148),
            reason: "no recovery target specified".to_owned(),
        };
        assert_eq!(history[1], second);
        assert_eq!(parse_history("1\tx\ty"), None);
        assert_eq!(parse_history(""), Some(vec![]));
        let bare = parse_history("1 0/10").expect("without a reason");
        assert_eq!((bare[0].end, bare[0].reason.as_str()), (Lsn(0x10), ""));
    }

    #[test]
    fn equal_numbers_of_timelines_are_not_trusted() {
        let way = |timeline: u32, ends: &[(u32, u64)]| {
            let parents: Vec<HistoryLine> = ends
                .iter()
                .map(|(timeline, end)| HistoryLine {
                    timeline: Timeline(*timeline),
                    end: Lsn(*end),
                    reason: "no recovery target specified".to_owned(),
                })
                .collect();
            same_way(Timeline(timeline), &parents, &leader())
        };
        assert!(way(3, &[(1, 0x0300_0000), (2, 0x0500_0148)]));
        assert!(!way(3, &[(1, 0x0300_0000), (2, 0x0500_0140)]), "it left timeline 2 elsewhere");
        assert!(!way(3, &[(1, 0x0300_0000)]));
        assert!(way(2, &[(1, 0x0300_0000)]));
        assert!(!way(2, &[(1, 0x0400_0000)]));
        assert!(way(7, &[(1, 0x0300_0000)]), "the leader never was there: that is told elsewhere");
    }

    #[test]
    fn a_position_is_found_in_its_file() {
        let file = wal_file(Timeline(2), Lsn(0x1_0500_0148), 16 << 20);
        assert_eq!(file, Some(("000000020000000100000005".to_owned(), 0x148)));
    }

    #[test]
    fn only_who_has_more_than_the_leader_needs_a_rewind() {
        for (timeline, lsn, need) in [
            (3, 0x0900_0000, RewindNeed::No),
            (3, 0x0900_0001, RewindNeed::Diverged),
            (2, 0x0500_0148, RewindNeed::No),
            (2, 0x0500_0149, RewindNeed::Diverged),
            (1, 0x0300_0000, RewindNeed::No),
            (1, 0x0400_0000, RewindNeed::Diverged),
            (4, 0x0000_0001, RewindNeed::Diverged),
        ] {
            let local = LocalEnd { timeline: Timeline(timeline), lsn: Lsn(lsn) };
            assert_eq!(rewind_need(local, &leader(), Authority::Primary), need, "{local:?}");
        }
    }

    #[test]
    fn nobody_is_rewound_to_a_server_in_recovery_but_in_a_standby_cluster() {
        let standby = LeaderPosition { flushed: None, ..leader() };
        for (timeline, lsn, need) in [
            // All of it is there as well: nothing is lost by following.
            (2, 0x0500_0148, RewindNeed::No),
            (3, 0x0900_0001, RewindNeed::No),
            (2, 0x0500_0149, RewindNeed::Undecided),
            (4, 0x0000_0001, RewindNeed::Undecided),
        ] {
            let local = LocalEnd { timeline: Timeline(timeline), lsn: Lsn(lsn) };
            assert_eq!(rewind_need(local, &standby, Authority::Primary), need, "{local:?}");
            let anyhow = if need == RewindNeed::Undecided { RewindNeed::Diverged } else { need };
            assert_eq!(rewind_need(local, &standby, Authority::Any), anyhow, "{local:?}");
        }
    }
}
