//! A host's files, which are kept: over a crash of any process, and (what was flushed) over the loss of power.

use std::collections::BTreeMap;
use std::path::PathBuf;

use kornak_cluster::Lsn;

/// Bytes of one record of the modelled WAL.
pub const RECORD_BYTES: u64 = 100;

/// Number of a record; never used twice, so that equal numbers at the end of two logs mean equal logs.
pub type Record = u64;

/// A server's write-ahead log with the timelines it went through.
#[derive(Debug, Clone, Default)]
pub struct Wal {
    records: Vec<Record>,
    flushed: usize,
    /// Timelines and the number of records before each.
    history: Vec<(u32, usize)>,
}

/// A host's disk.
#[derive(Debug, Clone)]
pub struct Disk {
    pub wal: Wal,
    /// `standby.signal`.
    pub standby_signal: bool,
    /// `primary_conninfo`: the host to replicate from.
    pub upstream: Option<usize>,
    /// `synchronous_standby_names`.
    pub sync_names: String,
    /// The answer of `pg_controldata`.
    pub clean: bool,
    pub was_primary: bool,
    /// pg_rewind was begun and has not ended; the server cannot start.
    pub torn: bool,
    /// The agent's small files.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Wal {
    /// A new cluster's log.
    pub fn new(first: Record) -> Self {
        Self { records: vec![first], flushed: 1, history: vec![(1, 0)] }
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether nothing was ever written.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Number of records that survive a loss of power.
    pub fn flushed(&self) -> usize {
        self.flushed
    }

    /// Position after the last record.
    pub fn end(&self) -> Lsn {
        lsn(self.records.len())
    }

    /// Position after the last flushed record.
    pub fn flush_lsn(&self) -> Lsn {
        lsn(self.flushed)
    }

    /// The timeline that is written or followed.
    pub fn timeline(&self) -> u32 {
        self.history.last().map_or(0, |(timeline, _)| *timeline)
    }

    /// Timelines and where they began.
    pub fn history(&self) -> &[(u32, usize)] {
        &self.history
    }

    /// Appends a record.
    pub fn append(&mut self, record: Record) {
        self.records.push(record);
    }

    /// All that was written is on disk.
    pub fn flush(&mut self) {
        self.flushed = self.records.len();
    }

    /// The host lost power.
    pub fn lose_unflushed(&mut self) {
        self.truncate(self.flushed);
    }

    /// A promotion.
    pub fn begin_timeline(&mut self, timeline: u32) {
        self.history.push((timeline, self.records.len()));
    }

    /// Whether a record is there.
    pub fn contains(&self, record: Record) -> bool {
        self.records.contains(&record)
    }

    /// All records.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The last record.
    pub fn last(&self) -> Option<Record> {
        self.records.last().copied()
    }

    /// The record at the end of the first `len`.
    pub fn last_of(&self, len: usize) -> Option<Record> {
        self.records.get(len.checked_sub(1)?).copied()
    }

    /// Where a timeline of this log ends; `None` if the log never was on it.
    fn end_of(&self, timeline: u32) -> Option<usize> {
        let at = self.history.iter().position(|(known, _)| *known == timeline)?;
        Some(self.history.get(at + 1).map_or(self.records.len(), |(_, begin)| *begin))
    }

    /// Whether this log may go on with `other`'s, as PostgreSQL judges it: by the number of the
    /// timeline and the position alone.
    pub fn may_follow(&self, other: &Self) -> bool {
        other.end_of(self.timeline()).is_some_and(|end| self.records.len() <= end)
    }

    /// Copies what `other` has flushed beyond this log. Returns how many records.
    pub fn receive(&mut self, other: &Self) -> usize {
        let from = self.records.len();
        let more = other.records.get(from..other.flushed).unwrap_or_default();
        self.records.extend_from_slice(more);
        let len = self.records.len();
        let known = self.timeline();
        let begun = other.history.iter().skip_while(|(timeline, _)| *timeline != known).skip(1);
        self.history.extend(begun.filter(|(_, begin)| *begin <= len));
        more.len()
    }

    /// pg_rewind: back to the last point common with `other`.
    pub fn rewind_to_common(&mut self, other: &Self) {
        let common =
            self.records.iter().zip(&other.records).take_while(|(mine, theirs)| mine == theirs);
        let common = common.count();
        self.truncate(common);
        self.history =
            other.history.iter().filter(|(_, begin)| *begin <= common).copied().collect();
        self.flushed = common;
    }

    fn truncate(&mut self, len: usize) {
        self.records.truncate(len);
        self.flushed = self.flushed.min(len);
        self.history.retain(|(_, begin)| *begin == 0 || *begin <= len);
    }
}

/// Position after so many records.
pub fn lsn(records: usize) -> Lsn {
    Lsn(records as u64 * RECORD_BYTES)
}
