//! The story of a world's last moments: kept in memory, printed when a promise is broken.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt::{Arguments, Write};

use kornak_cluster::Moment;
use tracing::Subscriber;

use super::world::current;

/// Lines kept; the cause of a broken promise lies seconds, not minutes, before it.
const KEPT: usize = 400;

/// The latest lines of a world's story.
#[derive(Debug, Default)]
pub struct Trace {
    lines: RefCell<VecDeque<(Moment, String)>>,
    on: bool,
}

impl Trace {
    /// Keeps lines only if `on`: a world that keeps its promises is run without, and run again with
    /// the same seed to tell its story.
    pub fn new(on: bool) -> Self {
        Self { lines: RefCell::default(), on }
    }

    /// Adds a line.
    pub fn line(&self, now: Moment, text: Arguments<'_>) {
        if !self.on {
            return;
        }
        let mut lines = self.lines.borrow_mut();
        if lines.len() >= KEPT {
            lines.pop_front();
        }
        lines.push_back((now, text.to_string()));
    }

    /// All that is kept.
    pub fn tell(&self) -> String {
        let mut text = String::new();
        for (at, line) in self.lines.borrow().iter() {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{:>10.3}  {line}", at.since_start().as_secs_f64());
        }
        text
    }
}

/// Adds the log messages of agents to the world's story.
pub fn subscriber() -> impl Subscriber + Send + Sync {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_writer(|| Log)
        .finish()
}

struct Log;

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let w = current();
        w.trace.line(w.exec.now(), format_args!("{}", text.trim_end()));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
