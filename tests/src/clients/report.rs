//! The verdict on one program.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use super::said::{Heard, Phase, Told};

/// Lines that are printed of many.
const SHOWN: usize = 6;

/// States that say that nothing was done.
const DENIED: [&str; 2] = ["40001", "57P03"];

/// One line of the table.
#[derive(Debug, Default)]
pub struct Row {
    pub name: String,
    pub pooled: bool,
    pub acknowledged: usize,
    /// Errors by SQLSTATE: without any event, in switchovers, in the crash, after it.
    pub errors: BTreeMap<&'static str, BTreeMap<String, usize>>,
    /// Workers that saw more than one error in the crash.
    pub more_than_one: usize,
    /// Acknowledged and not there.
    pub lost: usize,
    pub doubled: usize,
    /// Denied and there.
    pub denied: usize,
    /// Writes of unknown outcome (08007): there, not there.
    pub unknown: (usize, usize),
    pub gaps: (Duration, Duration),
    pub wrong: Vec<String>,
    pub strange: Vec<String>,
    pub shown: Vec<String>,
    pub ops: BTreeMap<String, u64>,
    /// The program did not end by itself.
    pub hung: bool,
    /// A switchover that was refused meanwhile.
    pub refused: Option<String>,
}

impl Row {
    pub fn of(name: &str, pooled: bool, heard: &Heard, there: &[i64]) -> Self {
        let mut counts: BTreeMap<i64, usize> = BTreeMap::new();
        for id in there {
            *counts.entry(*id).or_default() += 1;
        }
        let is_there = |id: &&i64| counts.contains_key(id);
        let acknowledged: BTreeSet<i64> = heard.acknowledged.iter().copied().collect();
        let mut row = Self {
            name: name.to_owned(),
            pooled,
            acknowledged: acknowledged.len(),
            lost: acknowledged.iter().filter(|it| !is_there(it)).count(),
            doubled: counts.values().filter(|it| **it > 1).count(),
            wrong: heard.wrong.clone(),
            strange: heard.strange.clone(),
            ops: heard.ops.clone(),
            ..Self::default()
        };
        let mut of_workers: BTreeMap<u64, usize> = BTreeMap::new();
        for told in &heard.errors {
            let state = if told.state.is_empty() { "none" } else { told.state.as_str() };
            let of_phase = row.errors.entry(phase_name(told.phase)).or_default();
            *of_phase.entry(state.to_owned()).or_default() += 1;
            if told.phase >= Phase::Crash {
                *of_workers.entry(told.worker).or_default() += 1;
            }
            let done = told.ids.iter().filter(is_there).count();
            if DENIED.contains(&state) {
                row.denied += done;
            } else {
                row.unknown.0 += done;
                row.unknown.1 += told.ids.len() - done;
            }
        }
        row.more_than_one = of_workers.values().filter(|it| **it > 1).count();
        row.shown = heard.errors.iter().map(show).collect();
        let gap = |phases: &[Phase]| {
            phases.iter().filter_map(|it| heard.gaps.get(it)).max().copied().unwrap_or_default()
        };
        row.gaps = (gap(&[Phase::Switchovers]), gap(&[Phase::Crash]));
        row
    }

    /// No error in switchovers, in the crash what was in flight, no row lost or twice there.
    pub fn is_good(&self) -> bool {
        let none = |phase: Phase| !self.errors.contains_key(phase_name(phase));
        self.acknowledged > 0
            && none(Phase::Steady)
            && none(Phase::Switchovers)
            && self.more_than_one == 0
            && self.lost + self.doubled + self.denied + self.wrong.len() + self.strange.len() == 0
            && !self.hung
            && self.refused.is_none()
    }

    /// The table's head.
    pub fn head() -> String {
        let errors = "errors: steady | switchovers | crash | after";
        format!(
            "{:<34} {:<6} {:>6} {:>4} {:>4} {:>5} {:>6} {:>9}  {errors}",
            "stack", "", "rows", "lost", "dbl", "08007", "wrong", "gaps s"
        )
    }

    /// Everything that was not as it should be.
    pub fn details(&self) -> String {
        let listener = if self.pooled { "pooled" } else { "plain" };
        let mut lines = Vec::new();
        let mut add = |kind: &str, all: &[String]| {
            for it in all.iter().take(SHOWN) {
                lines.push(format!("    {} {listener}: {kind}: {it}", self.name));
            }
        };
        add("error", &self.shown);
        add("wrong", &self.wrong);
        add("said", &self.strange);
        if self.hung {
            add("hung", &["did not end by itself".to_owned()]);
        }
        add("switchover", self.refused.as_slice());
        let ops: Vec<String> = self.ops.iter().map(|(op, count)| format!("{op} {count}")).collect();
        add("done", &[ops.join(", ")]);
        lines.join("\n")
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases = [Phase::Steady, Phase::Switchovers, Phase::Crash, Phase::After];
        let errors = phases.map(|phase| match self.errors.get(phase_name(phase)) {
            None => "0".to_owned(),
            Some(states) => {
                let states = states.iter().map(|(state, count)| format!("{state} x{count}"));
                states.collect::<Vec<_>>().join(", ")
            }
        });
        let gaps = format!("{:.1}/{:.1}", self.gaps.0.as_secs_f64(), self.gaps.1.as_secs_f64());
        write!(
            f,
            "{:<34} {:<6} {:>6} {:>4} {:>4} {:>5} {:>6} {gaps:>9}  {}{}{}",
            self.name,
            if self.pooled { "pooled" } else { "plain" },
            self.acknowledged,
            self.lost + self.denied,
            self.doubled,
            format!("{}/{}", self.unknown.0, self.unknown.1),
            self.wrong.len() + self.strange.len(),
            errors.join(" | "),
            if self.hung { "  HANGS" } else { "" },
            if self.is_good() { "" } else { "  NOT GOOD" },
        )
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Steady => "steady",
        Phase::Switchovers => "switchovers",
        Phase::Crash => "crash",
        Phase::After => "after",
    }
}

fn show(told: &Told) -> String {
    let (phase, state) = (phase_name(told.phase), &told.state);
    let ids: Vec<String> = told.ids.iter().map(ToString::to_string).collect();
    let (worker, op, ids) = (told.worker, &told.op, ids.join(","));
    format!("{phase}: worker {worker}, {op}: {state} [{ids}] {}", told.message)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU8;
    use std::time::Instant;

    use super::*;

    #[test]
    fn rows_are_compared_with_what_was_acknowledged() {
        let mut heard = Heard::new(&Arc::new(AtomicU8::new(2)));
        for line in ["0 a ok 1", "0 a ok 2", "0 a error 40001 3 x", "1 a error 08007 4,5 x"] {
            heard.line(line, Instant::now());
        }
        let row = Row::of("it", false, &heard, &[1, 1, 3, 4]);
        assert_eq!((row.acknowledged, row.lost, row.doubled, row.denied), (2, 1, 1, 1));
        assert_eq!(row.unknown, (1, 1));
        assert!(!row.is_good());
        let row = Row::of("it", false, &heard, &[1, 2, 4]);
        assert!(row.is_good(), "{row}");
        heard.line("1 a error 08007 6 x", Instant::now());
        assert!(!Row::of("it", false, &heard, &[1, 2]).is_good(), "two errors of one worker");
    }
}
