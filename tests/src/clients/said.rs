//! The output of programs, line by line.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// The events of the cluster meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Nothing.
    Steady,
    Switchovers,
    /// From the kill until every worker goes on.
    Crash,
    /// Nothing any more.
    After,
}

impl Phase {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Steady,
            1 => Self::Switchovers,
            2 => Self::Crash,
            _ => Self::After,
        }
    }
}

/// One unit of work that failed.
#[derive(Debug, Clone)]
pub struct Told {
    pub phase: Phase,
    pub worker: u64,
    pub op: String,
    /// Empty if the client had none.
    pub state: String,
    pub ids: Vec<i64>,
    pub message: String,
}

/// Everything that one program has said.
#[derive(Debug)]
pub struct Heard {
    phase: Arc<AtomicU8>,
    workers: BTreeMap<u64, Worker>,
    pub acknowledged: Vec<i64>,
    pub errors: Vec<Told>,
    pub wrong: Vec<String>,
    /// Lines that are not ours.
    pub strange: Vec<String>,
    /// Longest time without a success of one worker.
    pub gaps: BTreeMap<Phase, Duration>,
    /// Successes by kind of work.
    pub ops: BTreeMap<String, u64>,
}

#[derive(Debug)]
struct Worker {
    done: u64,
    last: Instant,
    from: Phase,
}

impl Heard {
    pub fn new(phase: &Arc<AtomicU8>) -> Self {
        Self {
            phase: Arc::clone(phase),
            workers: BTreeMap::new(),
            acknowledged: Vec::new(),
            errors: Vec::new(),
            wrong: Vec::new(),
            strange: Vec::new(),
            gaps: BTreeMap::new(),
            ops: BTreeMap::new(),
        }
    }

    /// Successes of each worker.
    pub fn done(&self) -> BTreeMap<u64, u64> {
        self.workers.iter().map(|(worker, it)| (*worker, it.done)).collect()
    }

    pub fn line(&mut self, line: &str, now: Instant) {
        if self.read(line, now).is_none() {
            self.strange.push(line.to_owned());
        }
    }

    fn read(&mut self, line: &str, now: Instant) -> Option<()> {
        let mut words = line.splitn(4, ' ');
        let worker: u64 = words.next()?.parse().ok()?;
        let op = words.next()?.to_owned();
        let phase = Phase::of(self.phase.load(Relaxed));
        match (words.next()?, words.next()) {
            ("ok", ids) => {
                self.acknowledged.extend(numbers(ids.unwrap_or("-"))?);
                *self.ops.entry(op).or_default() += 1;
                let known = Worker { done: 0, last: now, from: phase };
                let it = self.workers.entry(worker).or_insert(known);
                let gap = self.gaps.entry(phase.min(it.from)).or_default();
                *gap = (*gap).max(now - it.last);
                *it = Worker { done: it.done + 1, last: now, from: phase };
            }
            ("error", Some(rest)) => {
                let mut words = rest.splitn(3, ' ');
                let state = words.next()?.trim_matches('-').to_owned();
                let ids = numbers(words.next()?)?;
                let message = words.next().unwrap_or_default().to_owned();
                self.errors.push(Told { phase, worker, op, state, ids, message });
            }
            ("wrong", what) => {
                let what = format!("worker {worker}, {op}: {}", what.unwrap_or_default());
                self.wrong.push(what);
            }
            _ => return None,
        }
        Some(())
    }
}

fn numbers(text: &str) -> Option<Vec<i64>> {
    if text == "-" {
        return Some(Vec::new());
    }
    text.split(',').map(|it| it.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_what_is_none_is_kept() {
        let phase = Arc::new(AtomicU8::new(0));
        let mut heard = Heard::new(&phase);
        let now = Instant::now();
        heard.line("0 insert ok 1,2", now);
        phase.store(Phase::Crash as u8, Relaxed);
        heard.line("0 insert ok -", now + Duration::from_secs(1));
        heard.line("0 copy error 08007 3,4 some words", now);
        heard.line("0 read error - - no state", now);
        heard.line("0 read wrong 4 instead of 3", now);
        heard.line("Traceback", now);
        heard.line("0 insert ok x", now);
        assert_eq!(heard.acknowledged, [1, 2]);
        assert_eq!(heard.errors.len(), 2);
        assert_eq!(heard.errors[0].ids, [3, 4]);
        assert_eq!((heard.errors[0].state.as_str(), heard.errors[1].state.as_str()), ("08007", ""));
        assert_eq!(heard.errors[0].phase, Phase::Crash);
        assert_eq!((heard.wrong.len(), heard.strange.len()), (1, 2));
        assert_eq!(heard.gaps[&Phase::Steady], Duration::from_secs(1));
    }
}
