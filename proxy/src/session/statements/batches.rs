//! Which batch a change is of, and whether it came true: batches are told apart by how many ends of batches
//! were forwarded before.

use super::{Ahead, Change, SWALLOW, Statements};

impl Statements {
    /// A simple query is forwarded: it drops the unnamed statement, unless it is skipped.
    pub fn query(&mut self) {
        let there = std::mem::take(&mut self.unnamed_there);
        let before = self.unnamed.take();
        let is_pending = |ahead: &Ahead| matches!(ahead.change, Change::Unnamed { .. });
        if before.is_some() || there || self.ahead.iter().any(is_pending) {
            self.mark(SWALLOW, Change::Unnamed { before, there, by_query: true });
        }
    }

    /// The server executes a simple query; `owed`: so many ReadyForQuery are to come, its own included.
    pub fn query_ran(&mut self, owed: usize) {
        if self.ahead.is_empty() {
            return;
        }
        let batch = self.batch.wrapping_sub(owed as u32);
        let is_its = |ahead: &Ahead| {
            ahead.batch == batch && matches!(ahead.change, Change::Unnamed { by_query: true, .. })
        };
        if let Some(at) = self.ahead.iter().position(is_its) {
            self.ahead.remove(at);
        }
    }

    /// Notes that the end of a batch was forwarded, which owes a ReadyForQuery: what follows is of the next one.
    pub fn end_batch(&mut self) {
        self.batch = self.batch.wrapping_add(1);
        self.preparing = None;
    }

    /// Makes what was put in front of a Query a batch of its own. What else was noted is of the Query.
    pub fn split_batch(&mut self) {
        let first = self.batch;
        self.end_batch();
        for ahead in &mut self.ahead {
            if ahead.batch == first && !Self::is_silent(ahead.mark) {
                ahead.batch = self.batch;
            }
        }
        for batch in [&mut self.dropping, &mut self.sql_batch].into_iter().flatten() {
            *batch = if *batch == first { self.batch } else { *batch };
        }
    }

    /// A ReadyForQuery came, and so many are owed: what earlier batches did not confirm was not done. Several
    /// end at once where the server has skipped a Query.
    pub fn ready(&mut self, owed: usize) {
        self.ended = self.batch.wrapping_sub(owed as u32);
        self.undo_until(self.ended);
        if self.dropping.is_some_and(|batch| is_past(batch, self.ended)) {
            self.dropped_all();
        }
        self.sql_batch = self.sql_batch.filter(|batch| !is_past(*batch, self.ended));
        if self.ahead.is_empty() && self.named.capacity() > 0 {
            self.named = Vec::new();
        }
    }

    /// Whether what a name means hangs on a batch before this one that is not answered yet: the message
    /// must not be forwarded before.
    pub fn must_wait(&self, tag: u8, name: &[u8]) -> bool {
        let concerns = |ahead: &&Ahead| match &ahead.change {
            Change::Name { name: theirs, .. } => **theirs == *name,
            Change::Unnamed { .. } => name.is_empty(),
            _ => false,
        };
        let last = self.ahead.iter().rev().find(concerns);
        let replaces = tag == b'C' || tag == b'P' && name.is_empty();
        !replaces && last.is_some_and(|ahead| ahead.batch != self.batch)
    }

    /// Whether an earlier batch that is not answered yet drops all, or makes or drops statements by SQL.
    pub fn is_dropping_before(&self) -> bool {
        [self.dropping, self.sql_batch].into_iter().flatten().any(|batch| batch != self.batch)
    }

    /// SQL is forwarded that makes or drops a statement under a name of its own.
    pub fn named_by_sql(&mut self) {
        self.sql_batch = Some(self.batch);
        self.preparing = None;
    }

    /// Whether a statement was made since the last call under the client's own name on the server.
    pub fn take_raw(&mut self) -> bool {
        std::mem::take(&mut self.raw)
    }

    /// Whether what any name means hangs on an earlier batch: a text must not be forwarded before that
    /// may name a statement.
    pub fn is_uncertain(&self) -> bool {
        let hangs = |ahead: &Ahead| {
            ahead.batch != self.batch && matches!(ahead.change, Change::Name { .. })
        };
        self.is_dropping_before() || self.ahead.iter().any(hangs)
    }
}

/// Whether one batch is before another; half of the circle is the past.
pub(super) fn is_past(batch: u32, than: u32) -> bool {
    batch.wrapping_sub(than) > u32::MAX / 2
}
