//! Where the log in `pg_wal` ends: what a server has on disk, read from the files.
//!
//! A standby that starts replays what it finds before it asks for more, and until then it does not tell how much it
//! has: with a delay (`recovery_min_apply_delay`) that takes hours. What it had acknowledged before the start is in
//! these files all the same.
//!
//! The format (`xlog_internal.h`, `xlogrecord.h`) is the same in PostgreSQL 13 to 18: pages of 8 KiB with a header,
//! records aligned to 8 bytes that go on over pages. A record counts if its length, its link to the one before and
//! its checksum are right, which is what PostgreSQL itself goes by.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kornak_cluster::Lsn;

const PAGE: u64 = 8192;
const SHORT_HEADER: u64 = 24;
const LONG_HEADER: u64 = 40;
const RECORD_HEADER: usize = 24;
/// `XLogRecordMaxSize`.
const LONGEST_RECORD: usize = 1020 << 20;

const FIRST_IS_CONTINUED: u16 = 1;
const FIRST_IS_OVERWRITTEN: u16 = 8;

/// The end of the last complete record from `from` on, which is the end of a record or the beginning of the log's
/// use. `None`: there is no log at that position.
pub(super) fn wal_end(pg_wal: &Path, from: Lsn) -> io::Result<Option<Lsn>> {
    let Some(log) = Log::open(pg_wal)? else { return Ok(None) };
    let timelines: BTreeSet<u32> = log.segments.values().flatten().copied().collect();
    // The newest timeline's copy of a segment may have less of it than the one before, if it was being received.
    let ends = timelines.iter().map(|newest| Scan::new(&log, *newest).run(from.0));
    Ok(ends.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().max().map(Lsn))
}

/// The segments there are.
struct Log {
    dir: PathBuf,
    segment_size: u64,
    /// Timelines, by the segment's number.
    segments: BTreeMap<u64, BTreeSet<u32>>,
}

impl Log {
    fn open(dir: &Path) -> io::Result<Option<Self>> {
        let mut names = Vec::new();
        let mut segment_size = 0;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let Some(parts) = entry.file_name().to_str().and_then(parse) else { continue };
            segment_size = segment_size.max(entry.metadata()?.len());
            names.push(parts);
        }
        if !segment_size.is_power_of_two() || !((1 << 20)..=(1 << 30)).contains(&segment_size) {
            return Ok(None);
        }
        let mut segments: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
        for (timeline, high, low) in names {
            let number = u64::from(high) * ((1 << 32) / segment_size) + u64::from(low);
            segments.entry(number).or_default().insert(timeline);
        }
        Ok(Some(Self { dir: dir.to_owned(), segment_size, segments }))
    }

    fn path(&self, timeline: u32, number: u64) -> PathBuf {
        let each = (1 << 32) / self.segment_size;
        self.dir.join(format!("{timeline:08X}{:08X}{:08X}", number / each, number % each))
    }
}

/// Timeline and number of a segment from its name.
fn parse(name: &str) -> Option<(u32, u32, u32)> {
    let hex = |range| u32::from_str_radix(name.get(range)?, 16).ok();
    let plain = name.len() == 24 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    plain.then_some(())?;
    Some((hex(0..8)?, hex(8..16)?, hex(16..24)?))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// One walk through the log.
struct Scan<'a> {
    log: &'a Log,
    /// Segments of later timelines are left alone.
    newest: u32,
    /// The log does not go back to an earlier timeline.
    timeline: u32,
    open: Option<(u64, File)>,
    page: Vec<u8>,
    page_at: Option<u64>,
}

/// The result of reading one record.
enum Record {
    /// The record is complete, and the next one comes here.
    Complete {
        begin: u64,
        next: u64,
    },
    /// The record's rest was never written; the log goes on here.
    Aborted {
        next: u64,
    },
    End,
}

impl<'a> Scan<'a> {
    fn new(log: &'a Log, newest: u32) -> Self {
        Self { log, newest, timeline: 0, open: None, page: Vec::new(), page_at: None }
    }

    fn run(mut self, from: u64) -> io::Result<Option<u64>> {
        let mut at = from;
        let mut before = None;
        if self.load(at - at % PAGE)?.is_none() {
            // The log may end exactly where a page or a segment does.
            return Ok(from.is_multiple_of(PAGE).then_some(from));
        }
        loop {
            match self.record(at, before)? {
                Record::Complete { begin, next } => {
                    before = Some(begin);
                    at = next;
                }
                Record::Aborted { next } => {
                    before = None;
                    at = next;
                }
                Record::End => return Ok(Some(at)),
            }
        }
    }

    /// Makes the page at this address the current one; the flags and the rest length of its header. `None`: it does
    /// not hold this part of the log.
    fn load(&mut self, address: u64) -> io::Result<Option<(u16, usize)>> {
        let number = address / self.log.segment_size;
        if self.page_at != Some(address) {
            self.page_at = None;
            if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
                self.open = None;
                let timelines = self.log.segments.get(&number).cloned().unwrap_or_default();
                for timeline in timelines.range(self.timeline..=self.newest).rev() {
                    let file = File::open(self.log.path(*timeline, number))?;
                    if self.read(&file, address)? {
                        self.timeline = *timeline;
                        self.open = Some((number, file));
                        break;
                    }
                }
            } else if let Some((number, file)) = self.open.take() {
                let valid = self.read(&file, address)?;
                self.open = valid.then_some((number, file));
            }
            if self.open.is_none() {
                return Ok(None);
            }
            self.page_at = Some(address);
        }
        let rest = usize::try_from(u32_at(&self.page, 16)).unwrap_or(usize::MAX);
        Ok(Some((u16_at(&self.page, 2), rest)))
    }

    /// Whether the page there is of this part of the log, and not what a recycled segment held before.
    fn read(&mut self, file: &File, address: u64) -> io::Result<bool> {
        self.page.resize(PAGE as usize, 0);
        match file.read_exact_at(&mut self.page, address % self.log.segment_size) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            outcome => outcome?,
        }
        Ok(u16_at(&self.page, 0) >> 8 == 0xd1 && u64_at(&self.page, 8) == address)
    }

    fn header_size(&self, page: u64) -> u64 {
        if page.is_multiple_of(self.log.segment_size) { LONG_HEADER } else { SHORT_HEADER }
    }

    fn record(&mut self, at: u64, before: Option<u64>) -> io::Result<Record> {
        let mut page = at - at % PAGE;
        let Some((flags, _)) = self.load(page)? else { return Ok(Record::End) };
        let mut begin = at;
        if at == page {
            if flags & FIRST_IS_CONTINUED != 0 {
                return Ok(Record::End);
            }
            begin += self.header_size(page);
        }
        let length = u32_at(&self.page, (begin - page) as usize) as usize;
        if !(RECORD_HEADER..=LONGEST_RECORD).contains(&length) {
            return Ok(Record::End);
        }
        let mut bytes: Vec<u8> = Vec::new();
        let mut from = (begin - page) as usize;
        loop {
            let take = (length - bytes.len()).min(PAGE as usize - from);
            bytes.extend(self.page.get(from..from + take).unwrap_or_default());
            from += take;
            if bytes.len() >= RECORD_HEADER && !links(&bytes, begin, before) {
                return Ok(Record::End);
            }
            if bytes.len() >= length {
                break;
            }
            page += PAGE;
            let Some((flags, rest)) = self.load(page)? else { return Ok(Record::End) };
            from = self.header_size(page) as usize;
            if flags & FIRST_IS_OVERWRITTEN != 0 {
                return Ok(Record::Aborted { next: page + from as u64 });
            }
            if flags & FIRST_IS_CONTINUED == 0 || rest != length - bytes.len() {
                return Ok(Record::End);
            }
        }
        if checksum(&bytes) != u32_at(&bytes, 20) {
            return Ok(Record::End);
        }
        let mut next = (page + from as u64).next_multiple_of(8);
        // XLOG_SWITCH: the rest of the segment is not used.
        if bytes.get(17) == Some(&0) && bytes.get(16).is_some_and(|info| info & 0xf0 == 0x40) {
            next = next.next_multiple_of(self.log.segment_size);
        }
        Ok(Record::Complete { begin, next })
    }
}

/// Whether the record names the one before it.
fn links(bytes: &[u8], begin: u64, before: Option<u64>) -> bool {
    let named = u64_at(bytes, 8);
    before.map_or(named < begin, |before| named == before)
}

/// CRC-32C over the record's data, then its header up to the checksum.
fn checksum(bytes: &[u8]) -> u32 {
    let (header, data) = bytes.split_at(bytes.len().min(RECORD_HEADER));
    let header = header.get(..20).unwrap_or_default();
    !data
        .iter()
        .chain(header)
        .fold(u32::MAX, |crc, byte| TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8))
}

const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_known_by_their_names() {
        assert_eq!(parse("00000002000000010000000A"), Some((2, 1, 10)));
        for other in
            ["00000002.history", "00000002000000010000000A.partial", "00000002000000010000000a"]
        {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn the_checksum_is_crc_32c() {
        let mut record = vec![0; RECORD_HEADER];
        record.extend(b"123456789");
        let alone = checksum(&record);
        record[0] = 1;
        assert_ne!(checksum(&record), alone, "the header counts");
        record[20] = 9;
        let with_crc = checksum(&record);
        record[20] = 0;
        assert_eq!(checksum(&record), with_crc, "the checksum itself does not");
    }
}
