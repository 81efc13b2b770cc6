//! Whether all of the server goes by the `synchronous_standby_names` that are in force.
//!
//! Each process reads a changed configuration when it comes by, and two kinds of them decide what a commit waits for.
//! A walsender lets commits go by the names that it has read itself; the checkpointer is who says whether commits
//! wait for anybody at all. A walsender that was seen to wait for work after the change reads it before it does
//! anything else; one that has begun to send twice has come by the place where it reads it. The checkpointer was seen
//! idle, a while after the change.

use std::collections::BTreeMap;
use std::time::Duration;

use kornak_cluster::{Lsn, Moment};

/// The postmaster tells its processes one after the other; our own session is one of them.
const SPREAD: Duration = Duration::from_millis(10);

/// An idle checkpointer reads a changed configuration as soon as it gets a processor.
const CHECKPOINTER_READS: Duration = Duration::from_millis(100);

/// A walsender whose acknowledgements count by the names that it has read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walsender {
    pub pid: u32,
    pub sent: Lsn,
    /// The process waits for something to do.
    pub waits: bool,
}

/// The part of one look at the server that counts here.
#[derive(Debug, Clone)]
pub struct Sample<'a> {
    /// When the look began.
    pub at: Moment,
    pub names: &'a str,
    /// When the names were last changed by us.
    pub changed_at: Moment,
    /// Where the log ends.
    pub lsn: Lsn,
    pub walsenders: Vec<Walsender>,
    pub checkpointer_waits: bool,
}

/// How far the names in force have come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce {
    names: String,
    /// The first look that showed them.
    seen_at: Moment,
    /// Walsenders, by what they had sent and how often more was seen since.
    came_by: BTreeMap<u32, (Lsn, u32)>,
    commits_wait: bool,
    since: Option<Lsn>,
}

/// So often a walsender is seen to have sent more until it has come by for sure: it may have been sending when the
/// names changed.
const SENDS: u32 = 2;

impl InForce {
    /// One more look.
    pub fn next(before: Option<&Self>, look: &Sample<'_>) -> Self {
        let known = before.filter(|it| it.names == look.names && it.seen_at >= look.changed_at);
        let Some(known) = known else {
            // From some names to others commits have been waiting all along.
            let waited = before.is_some_and(|it| it.commits_wait && !it.names.is_empty());
            let commits_wait = look.names.is_empty() || waited;
            let came_by = BTreeMap::new();
            let first = Self {
                names: look.names.to_owned(),
                seen_at: look.at,
                came_by,
                commits_wait,
                since: None,
            };
            return first.with(look);
        };
        known.clone().with(look)
    }

    fn with(mut self, look: &Sample<'_>) -> Self {
        let after = look.at.since(self.seen_at);
        if after >= CHECKPOINTER_READS && look.checkpointer_waits {
            self.commits_wait = true;
        }
        let counts = after >= SPREAD;
        self.came_by = look
            .walsenders
            .iter()
            .map(|walsender| {
                let (sent, times) =
                    self.came_by.get(&walsender.pid).copied().unwrap_or((walsender.sent, 0));
                let times = match () {
                    () if !counts => 0,
                    () if walsender.waits => SENDS,
                    () if walsender.sent > sent => times + 1,
                    () => times,
                };
                (walsender.pid, (walsender.sent, times))
            })
            .collect();
        let all = self.commits_wait && self.came_by.values().all(|(_, times)| *times >= SENDS);
        if all && counts {
            self.since.get_or_insert(look.lsn);
        }
        self
    }

    /// Where the log ended when all of the server was first seen to go by them.
    pub fn since(&self) -> Option<Lsn> {
        self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = r#"1 ("b")"#;
    const TWO: &str = r#"2 ("b","c")"#;

    fn look<'a>(millis: u64, names: &'a str, walsenders: &[(u32, u64, bool)]) -> Sample<'a> {
        let row = |(pid, sent, waits): &(u32, u64, bool)| Walsender {
            pid: *pid,
            sent: Lsn(*sent),
            waits: *waits,
        };
        Sample {
            at: Moment::at_millis(millis),
            names,
            changed_at: Moment::default(),
            lsn: Lsn(millis),
            walsenders: walsenders.iter().map(row).collect(),
            checkpointer_waits: true,
        }
    }

    fn seen(looks: &[Sample<'_>]) -> Option<Lsn> {
        let mut known = None;
        for look in looks {
            known = Some(InForce::next(known.as_ref(), look));
        }
        known.unwrap().since()
    }

    #[test]
    fn a_walsender_that_waits_after_the_change_has_read_it() {
        let first = || look(1000, ONE, &[(7, 5, true)]);
        assert_eq!(seen(&[first()]), None, "it may not have been told yet");
        assert_eq!(seen(&[first(), look(1200, ONE, &[(7, 5, true)])]), Some(Lsn(1200)));
        assert_eq!(seen(&[first(), look(1200, ONE, &[(7, 5, false)])]), None);
        assert_eq!(seen(&[first(), look(1200, ONE, &[(7, 5, true), (8, 5, false)])]), None);
        // The position is that of the first look that showed it.
        let later = [first(), look(1200, ONE, &[(7, 5, true)]), look(1400, ONE, &[(7, 9, true)])];
        assert_eq!(seen(&later), Some(Lsn(1200)));
    }

    #[test]
    fn a_walsender_that_works_without_a_pause_has_come_by_when_it_has_sent_twice() {
        let busy = |millis, sent| look(millis, ONE, &[(7, sent, false)]);
        assert_eq!(seen(&[busy(1000, 5), busy(1200, 6)]), None);
        assert_eq!(seen(&[busy(1000, 5), busy(1200, 6), busy(1300, 6)]), None);
        assert_eq!(seen(&[busy(1000, 5), busy(1200, 6), busy(1300, 7)]), Some(Lsn(1300)));
    }

    #[test]
    fn other_names_and_names_that_were_set_again_begin_from_the_start() {
        let waits = |millis, names| look(millis, names, &[(7, 5, true)]);
        assert_eq!(seen(&[waits(1000, ONE), waits(1200, ONE), waits(1400, TWO)]), None);
        let again = Sample { changed_at: Moment::at_millis(1300), ..waits(1400, ONE) };
        assert_eq!(seen(&[waits(1000, ONE), waits(1200, ONE), again]), None);
    }

    /// The checkpointer writes a checkpoint that somebody asked for, in which it reads no
    /// configuration; until then no commit waits.
    #[test]
    fn commits_wait_for_nobody_before_the_checkpointer_says_so() {
        let busy = |millis, names| Sample { checkpointer_waits: false, ..look(millis, names, &[]) };
        assert_eq!(seen(&[busy(1000, ""), busy(1200, ONE), busy(1400, ONE)]), None);
        assert_eq!(seen(&[busy(1000, ""), look(1200, ONE, &[]), look(1250, ONE, &[])]), None);
        assert_eq!(
            seen(&[busy(1000, ""), look(1200, ONE, &[]), look(1300, ONE, &[])]),
            Some(Lsn(1300))
        );
        // From one list to another it has nothing to say.
        let other = [look(1000, ONE, &[]), look(1200, ONE, &[]), busy(1300, TWO), busy(1400, TWO)];
        assert_eq!(seen(&other), Some(Lsn(1400)));
        assert_eq!(seen(&[busy(1000, ""), busy(1200, "")]), Some(Lsn(1200)), "for nobody");
    }
}
