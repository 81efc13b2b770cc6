//! Asks every server, again and again, whether it accepts writes: the judge of "never two".
//!
//! An answer proves something about one instant between the question and the answer. A server that
//! said yes twice in a row was writable from the first *answer* to the second *question* at least,
//! and two servers whose proven spans overlap were writable at the same time. So the judge never
//! accuses wrongly, and misses only overlaps shorter than its period.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::postgres::connect;

/// Between two questions to one server.
const PERIOD: Duration = Duration::from_millis(50);

/// For one question; a server that takes longer has not said yes.
const PATIENCE: Duration = Duration::from_millis(500);

/// A time in which a server was certainly writable, since the watch began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub node: String,
    pub from: Duration,
    pub to: Duration,
}

/// Two servers writable at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap(pub Span, pub Span);

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(a, b) = self;
        let long = a.to.min(b.to).saturating_sub(a.from.max(b.from));
        write!(
            f,
            "{} was writable {:.2?}..{:.2?} and {} {:.2?}..{:.2?}: {long:?} together",
            a.node, a.from, a.to, b.node, b.from, b.to
        )
    }
}

/// The result of a watch.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub spans: Vec<Span>,
    /// Questions asked of each server.
    pub asked: usize,
}

impl Verdict {
    /// # Panics
    /// When two were writable at once, or hardly anything was asked.
    pub fn assert_never_two(&self) {
        assert!(self.asked > 50, "only {} questions", self.asked);
        let overlaps: Vec<String> = self.overlaps().iter().map(ToString::to_string).collect();
        assert!(overlaps.is_empty(), "two writable primaries: {overlaps:?}");
    }

    /// Every pair of spans of two nodes that share an instant.
    pub fn overlaps(&self) -> Vec<Overlap> {
        let mut found = Vec::new();
        for (index, a) in self.spans.iter().enumerate() {
            for b in &self.spans[index + 1..] {
                if a.node != b.node && a.from < b.to && b.from < a.to {
                    found.push(Overlap(a.clone(), b.clone()));
                }
            }
        }
        found
    }
}

/// A running watch.
#[derive(Debug)]
pub struct WriteWatch {
    stop: CancellationToken,
    tasks: JoinSet<(Vec<Span>, usize)>,
    writable: Arc<Mutex<Vec<String>>>,
}

impl WriteWatch {
    /// Watches these servers, given by name and login.
    pub fn start(servers: Vec<(String, String)>) -> Self {
        let stop = CancellationToken::new();
        let writable = Arc::new(Mutex::new(Vec::new()));
        let began = Instant::now();
        let mut tasks = JoinSet::new();
        for (node, conninfo) in servers {
            let watcher = Watcher {
                node,
                conninfo,
                began,
                stop: stop.clone(),
                writable: Arc::clone(&writable),
            };
            tasks.spawn(watcher.run());
        }
        Self { stop, tasks, writable }
    }

    /// The servers that were writable when asked last.
    pub fn writable(&self) -> Vec<String> {
        self.writable.lock().clone()
    }

    /// Ends it.
    pub async fn finish(mut self) -> Verdict {
        self.stop.cancel();
        let mut verdict = Verdict { spans: Vec::new(), asked: usize::MAX };
        while let Some(ended) = self.tasks.join_next().await {
            let (spans, asked) = ended.expect("a watcher does not panic");
            verdict.spans.extend(spans);
            verdict.asked = verdict.asked.min(asked);
        }
        verdict.spans.sort_by_key(|span| span.from);
        verdict
    }
}

struct Watcher {
    node: String,
    conninfo: String,
    began: Instant,
    stop: CancellationToken,
    writable: Arc<Mutex<Vec<String>>>,
}

impl Watcher {
    async fn run(self) -> (Vec<Span>, usize) {
        let mut spans: Vec<Span> = Vec::new();
        let mut open = false;
        let mut asked = 0;
        let mut client = None;
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return (spans, asked),
                _ = ticks.tick() => {}
            }
            let sent = self.began.elapsed();
            let yes = matches!(
                tokio::time::timeout(PATIENCE, ask(&mut client, &self.conninfo)).await,
                Ok(Some(true))
            );
            let received = self.began.elapsed();
            asked += 1;
            match (yes, open) {
                (true, true) => {
                    if let Some(span) = spans.last_mut() {
                        span.to = sent;
                    }
                }
                (true, false) => {
                    spans.push(Span { node: self.node.clone(), from: received, to: received });
                    self.writable.lock().push(self.node.clone());
                }
                (false, _) => {
                    client = None;
                    self.writable.lock().retain(|node| *node != self.node);
                }
            }
            open = yes;
        }
    }
}

/// `None`: nobody answered.
async fn ask(client: &mut Option<tokio_postgres::Client>, conninfo: &str) -> Option<bool> {
    if client.is_none() {
        *client = connect(conninfo).await.ok();
    }
    let question = "SELECT NOT pg_is_in_recovery()";
    let rows = client.as_ref()?.query(question, &[]).await.ok()?;
    Some(rows.first()?.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(node: &str, from: u64, to: u64) -> Span {
        Span { node: node.to_owned(), from: Duration::from_secs(from), to: Duration::from_secs(to) }
    }

    fn overlaps(spans: Vec<Span>) -> usize {
        Verdict { spans, asked: 1 }.overlaps().len()
    }

    #[test]
    fn a_change_of_leader_is_no_overlap() {
        assert_eq!(overlaps(vec![span("a", 0, 5), span("b", 5, 9), span("a", 9, 12)]), 0);
    }

    #[test]
    fn an_instant_shared_by_two_nodes_is_one() {
        assert_eq!(overlaps(vec![span("a", 0, 5), span("b", 4, 9), span("b", 10, 11)]), 1);
    }
}
