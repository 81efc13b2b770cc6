//! Messages in a stream of bytes: one tag, a length that counts itself, a body.
//!
//! Two readers for two needs. [`take_frame`] waits for whole messages and is for logins and for
//! connections of our own. [`Scanner`] is for the data path: it looks at heads only, never
//! holds a message, and does not mind where the chunks are cut, so that whole buffers can be
//! passed on as they came.
//!
//! Not here: what a message means ([`crate::frontend`], [`crate::backend`]), packets without a
//! tag ([`crate::startup`]).
//!
//! Format: `/docs/current/protocol-overview.html#PROTOCOL-MESSAGE-CONCEPTS`.

use bytes::{Buf, Bytes, BytesMut};

use crate::limits::{
    MAX_AUTH_MESSAGE_LEN, MAX_KEY_DATA_LEN, MAX_LARGE_MESSAGE_LEN, MAX_SMALL_BACKEND_LEN,
    MAX_SMALL_FRONTEND_LEN, PREFIX_NAMES_BYTES, PREFIX_TEXT_BYTES,
};
use crate::sqlstate::{PROTOCOL_VIOLATION, SqlState};

#[cfg(test)]
mod tests;

/// Bytes before a body: the tag and the length word.
pub const HEAD_BYTES: usize = 5;

/// Why a stream cannot be followed any further. No later byte can help; the connection must be
/// closed (a client is told 08P01 first).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length word is smaller than itself.
    #[error("message {} has the impossible length {len}", tag.escape_ascii())]
    BadLength {
        /// Type byte of the message.
        tag: u8,
        /// The length word as sent.
        len: u32,
    },
    /// The message is longer than its type may be.
    #[error("message {} has {len} bytes where at most {limit} are allowed", tag.escape_ascii())]
    TooLong {
        /// Type byte of the message.
        tag: u8,
        /// The length word as sent.
        len: u32,
        /// The largest length word that is taken.
        limit: u32,
    },
    /// No such message exists in this direction.
    #[error("unknown message type {}", tag.escape_ascii())]
    UnknownType {
        /// Type byte of the message.
        tag: u8,
    },
}

impl FrameError {
    /// SQLSTATE of the error that the client gets.
    pub fn sqlstate(self) -> SqlState {
        PROTOCOL_VIOLATION
    }
}

/// One whole message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Type byte.
    pub tag: u8,
    /// Bytes behind the length word.
    pub body: Bytes,
}

/// Takes one whole message from the front of `buf`.
///
/// `Ok(None)` means "read more". A body of more than `limit` bytes is refused as soon as its
/// head is here, so `buf` never has to hold more than `limit + 5` bytes.
pub fn take_frame(buf: &mut BytesMut, limit: usize) -> Result<Option<Frame>, FrameError> {
    let Some((&[tag, a, b, c, d], rest)) = buf.split_first_chunk::<HEAD_BYTES>() else {
        return Ok(None);
    };
    let len = u32::from_be_bytes([a, b, c, d]);
    let Some(body_len) = len.checked_sub(4) else {
        return Err(FrameError::BadLength { tag, len });
    };
    let body_len = body_len as usize;
    if body_len > limit {
        let limit = u32::try_from(limit.saturating_add(4)).unwrap_or(u32::MAX);
        return Err(FrameError::TooLong { tag, len, limit });
    }
    if rest.len() < body_len {
        return Ok(None);
    }
    buf.advance(HEAD_BYTES);
    Ok(Some(Frame { tag, body: buf.split_to(body_len).freeze() }))
}

/// The side that wrote the bytes of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// A client (or the proxy towards a server).
    Frontend,
    /// A server.
    Backend,
}

/// One message as the scanner sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen<'a> {
    /// Type byte.
    pub tag: u8,
    /// The length word: the body's bytes and four.
    pub len: u32,
    /// The body's first bytes: all of it for short messages that matter, at most
    /// [`PREFIX_TEXT_BYTES`] or [`PREFIX_NAMES_BYTES`] of longer ones, nothing of messages that
    /// only pass through (rows, COPY data). See [`Seen::is_whole`].
    pub body: &'a [u8],
    /// Where the message begins in the chunk; `None` if it began in an earlier one.
    pub start: Option<usize>,
    /// Where the message ends in the chunk (one past its last byte); `None` if it ends in a
    /// later one.
    pub end: Option<usize>,
}

impl Seen<'_> {
    /// Whether [`Seen::body`] is the whole body.
    pub fn is_whole(&self) -> bool {
        self.body.len() as u32 == self.len.wrapping_sub(4)
    }
}

/// Answer of the visitor to [`Scanner::scan`] about a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Pass,
    /// Leave this message where it is: the scan ends as if it had not been there. Its bytes must
    /// be fed again from its first one, those held back from earlier chunks included.
    StopBefore,
    /// Take this message and end the scan. The rest of its body, if any, need not be here.
    StopAfter,
}

/// Follows one direction of a connection by message heads. Never buffers a message; the only
/// bytes it keeps are those of a split head or of a split prefix, at most 16 KiB (or what
/// [`Scanner::show_whole`] says), and only until the message has been shown.
///
/// A message is shown once, as soon as its head and the wanted prefix of its body are here. The
/// caller that must decide *before* a message is passed on keeps the last
/// [`Scanner::unshown`] bytes of the chunk back until more has come.
#[derive(Debug)]
pub struct Scanner {
    rules: &'static [Rule; 256],
    /// Bytes of a message that was shown and that are still to come.
    left: u32,
    /// A head of which `have` bytes came in earlier chunks.
    head: [u8; HEAD_BYTES],
    have: u8,
    /// Prefix of a message whose head is complete and that was not shown yet.
    gathered: Vec<u8>,
    /// Texts up to this length are shown whole.
    whole: u32,
}

impl Scanner {
    /// A scanner at a message boundary.
    pub fn new(direction: Direction) -> Self {
        let rules = match direction {
            Direction::Frontend => &FRONTEND,
            Direction::Backend => &BACKEND,
        };
        Self { rules, left: 0, head: [0; HEAD_BYTES], have: 0, gathered: Vec::new(), whole: 0 }
    }

    /// From now on shows the whole body of a Query or Parse of at most so many bytes; of a longer one
    /// [`PREFIX_TEXT_BYTES`] as ever, and as much of messages with names. The caller has to keep as much of a
    /// message back.
    pub fn show_whole(&mut self, limit: u32) {
        self.whole = limit;
    }

    /// Forgets where the stream stands: the next byte begins a message.
    pub fn reset(&mut self) {
        self.left = 0;
        self.have = 0;
        self.gathered = Vec::new();
    }

    /// Whether the stream stands between two messages.
    pub fn at_boundary(&self) -> bool {
        self.left == 0 && self.have == 0
    }

    /// How many of the bytes scanned last belong to a message that was not shown yet; at most
    /// [`PREFIX_TEXT_BYTES`] and a head.
    pub fn unshown(&self) -> usize {
        usize::from(self.have) + self.gathered.len()
    }

    /// Bytes still to come of a message that was shown.
    pub fn remaining(&self) -> u32 {
        self.left
    }

    /// Follows `chunk` and shows every message whose head and wanted prefix are complete.
    ///
    /// Answers how many bytes of the chunk were followed: all of them, unless the visitor
    /// stopped the scan. After an error the scanner must not be used again.
    #[inline]
    pub fn scan(
        &mut self,
        chunk: &[u8],
        mut visit: impl FnMut(Seen<'_>) -> Flow,
    ) -> Result<usize, FrameError> {
        if chunk.is_empty() {
            return Ok(0);
        }
        let mut at = 0;
        if self.left > 0 {
            at = (self.left as usize).min(chunk.len());
            self.left -= at as u32;
        }
        if self.have > 0 {
            match self.resume(chunk, &mut visit)? {
                Resumed::At(next) => at = next,
                Resumed::Stop(next) => return Ok(next),
            }
        }
        loop {
            let rest = chunk.get(at..).unwrap_or_default();
            let Some((&[tag, a, b, c, d], body)) = rest.split_first_chunk::<HEAD_BYTES>() else {
                self.keep_head(rest);
                return Ok(chunk.len());
            };
            let len = u32::from_be_bytes([a, b, c, d]);
            let (body_len, wanted) = check(self.rules, tag, len, self.whole)?;
            let Some(prefix) = body.get(..wanted as usize) else {
                self.keep_head(rest);
                self.gathered.extend_from_slice(body);
                return Ok(chunk.len());
            };
            let end = at + HEAD_BYTES + body_len as usize;
            let inside = end <= chunk.len();
            let seen = Seen { tag, len, body: prefix, start: Some(at), end: inside.then_some(end) };
            match visit(seen) {
                Flow::Pass if inside => at = end,
                Flow::Pass => {
                    self.left = (end - chunk.len()) as u32;
                    return Ok(chunk.len());
                }
                Flow::StopBefore => return Ok(at),
                Flow::StopAfter => {
                    let next = end.min(chunk.len());
                    self.left = (end - next) as u32;
                    return Ok(next);
                }
            }
        }
    }

    /// Completes a head or prefix that was split between chunks.
    #[cold]
    fn resume(
        &mut self,
        chunk: &[u8],
        visit: &mut impl FnMut(Seen<'_>) -> Flow,
    ) -> Result<Resumed, FrameError> {
        let mut at = 0;
        let have = usize::from(self.have);
        if let Some(gap) = self.head.get_mut(have..) {
            let n = gap.len().min(chunk.len());
            for (to, from) in gap.iter_mut().zip(chunk) {
                *to = *from;
            }
            self.have += n as u8;
            at = n;
        }
        if usize::from(self.have) < HEAD_BYTES {
            return Ok(Resumed::Stop(at));
        }
        let [tag, a, b, c, d] = self.head;
        let len = u32::from_be_bytes([a, b, c, d]);
        let (body_len, wanted) = check(self.rules, tag, len, self.whole)?;
        let rest = chunk.get(at..).unwrap_or_default();
        let missing = (wanted as usize).saturating_sub(self.gathered.len());
        let more = rest.get(..missing).unwrap_or(rest);
        self.gathered.extend_from_slice(more);
        at += more.len();
        if more.len() < missing {
            return Ok(Resumed::Stop(at));
        }
        // Given back whole: an idle session holds no buffer.
        let prefix = std::mem::take(&mut self.gathered);
        self.have = 0;
        let end = at + body_len.saturating_sub(wanted) as usize;
        let inside = end <= chunk.len();
        let seen = Seen { tag, len, body: &prefix, start: None, end: inside.then_some(end) };
        let flow = visit(seen);
        if flow == Flow::StopBefore {
            return Ok(Resumed::Stop(0));
        }
        let next = end.min(chunk.len());
        self.left = (end - next) as u32;
        Ok(if flow == Flow::StopAfter { Resumed::Stop(next) } else { Resumed::At(next) })
    }

    /// Remembers the beginning of a message for the next chunk.
    fn keep_head(&mut self, rest: &[u8]) {
        for (to, from) in self.head.iter_mut().zip(rest) {
            *to = *from;
        }
        self.have = rest.len().min(HEAD_BYTES) as u8;
    }
}

enum Resumed {
    At(usize),
    Stop(usize),
}

/// Rule for one type byte in one direction.
#[derive(Debug, Clone, Copy)]
struct Rule {
    /// Smallest and largest length word. A largest of zero means that there is no such type.
    min: u32,
    max: u32,
    /// Bytes of the body that are shown.
    shown: u32,
}

/// Answers the length of the body and how much of it is to be shown.
#[inline]
fn check(rules: &[Rule; 256], tag: u8, len: u32, whole: u32) -> Result<(u32, u32), FrameError> {
    let rule = rules[usize::from(tag)];
    if len < rule.min || len > rule.max {
        return Err(refuse(rule, tag, len));
    }
    let body_len = len - 4;
    if body_len > rule.shown && body_len <= whole && matches!(tag, b'Q' | b'P') {
        return Ok((body_len, body_len));
    }
    // Who looks at whole texts replaces names, and has to see them.
    if body_len > rule.shown && whole > 0 && matches!(tag, b'B' | b'C' | b'D' | b'E') {
        return Ok((body_len, body_len.min(PREFIX_TEXT_BYTES)));
    }
    Ok((body_len, body_len.min(rule.shown)))
}

#[cold]
fn refuse(rule: Rule, tag: u8, len: u32) -> FrameError {
    match rule.max {
        0 => FrameError::UnknownType { tag },
        limit if len > limit => FrameError::TooLong { tag, len, limit },
        _ => FrameError::BadLength { tag, len },
    }
}

const UNKNOWN: Rule = Rule { min: u32::MAX, max: 0, shown: 0 };

const fn rule(min: u32, max: u32, shown: u32) -> Rule {
    Rule { min, max, shown }
}

/// Messages of clients after the login, where a password message is unknown, as it is to a server. Lengths are those of `SocketBackend` in `src/backend/tcop/postgres.c`.
static FRONTEND: [Rule; 256] = {
    const SMALL: u32 = MAX_SMALL_FRONTEND_LEN;
    const LARGE: u32 = MAX_LARGE_MESSAGE_LEN;
    let mut t = [UNKNOWN; 256];
    t[b'Q' as usize] = rule(4, LARGE, PREFIX_TEXT_BYTES);
    t[b'P' as usize] = rule(4, LARGE, PREFIX_TEXT_BYTES);
    t[b'B' as usize] = rule(4, LARGE, PREFIX_NAMES_BYTES);
    t[b'C' as usize] = rule(4, SMALL, PREFIX_NAMES_BYTES);
    t[b'D' as usize] = rule(4, SMALL, PREFIX_NAMES_BYTES);
    t[b'E' as usize] = rule(4, SMALL, PREFIX_NAMES_BYTES);
    t[b'F' as usize] = rule(4, LARGE, PREFIX_NAMES_BYTES);
    t[b'H' as usize] = rule(4, SMALL, 0);
    t[b'S' as usize] = rule(4, SMALL, 0);
    t[b'X' as usize] = rule(4, SMALL, 0);
    t[b'd' as usize] = rule(4, LARGE, 0);
    t[b'c' as usize] = rule(4, SMALL, 0);
    t[b'f' as usize] = rule(4, SMALL, 0);
    t
};

/// Messages of servers. Lengths are those of `pqParseInput3` in `src/interfaces/libpq/fe-protocol3.c`.
static BACKEND: [Rule; 256] = {
    const SMALL: u32 = MAX_SMALL_BACKEND_LEN;
    const LARGE: u32 = MAX_LARGE_MESSAGE_LEN;
    let mut t = [UNKNOWN; 256];
    t[b'D' as usize] = rule(6, LARGE, 0);
    t[b'd' as usize] = rule(4, LARGE, 0);
    t[b'T' as usize] = rule(6, LARGE, 0);
    t[b't' as usize] = rule(6, LARGE, 0);
    t[b'V' as usize] = rule(8, LARGE, 0);
    t[b'E' as usize] = rule(5, LARGE, PREFIX_TEXT_BYTES);
    t[b'N' as usize] = rule(5, LARGE, PREFIX_TEXT_BYTES);
    t[b'A' as usize] = rule(10, LARGE, PREFIX_TEXT_BYTES);
    t[b'C' as usize] = rule(5, SMALL, PREFIX_TEXT_BYTES);
    t[b'S' as usize] = rule(6, SMALL, PREFIX_TEXT_BYTES);
    t[b'Z' as usize] = rule(5, 5, 1);
    t[b'K' as usize] = rule(12, MAX_KEY_DATA_LEN, PREFIX_TEXT_BYTES);
    t[b'R' as usize] = rule(8, MAX_AUTH_MESSAGE_LEN, PREFIX_TEXT_BYTES);
    t[b'v' as usize] = rule(12, SMALL, PREFIX_TEXT_BYTES);
    t[b'G' as usize] = rule(7, SMALL, 0);
    t[b'H' as usize] = rule(7, SMALL, 0);
    t[b'W' as usize] = rule(7, SMALL, 0);
    t[b'1' as usize] = rule(4, 4, 0);
    t[b'2' as usize] = rule(4, 4, 0);
    t[b'3' as usize] = rule(4, 4, 0);
    t[b'c' as usize] = rule(4, 4, 0);
    t[b'I' as usize] = rule(4, 4, 0);
    t[b'n' as usize] = rule(4, 4, 0);
    t[b's' as usize] = rule(4, 4, 0);
    t
};

/// Fuzz entry: whatever the bytes and wherever they are cut, never panic, never report more
/// than was there. The first byte says how the rest is cut.
pub fn fuzz_scan(input: &[u8]) {
    let Some((&cut, stream)) = input.split_first() else { return };
    for direction in [Direction::Frontend, Direction::Backend] {
        let mut scanner = Scanner::new(direction);
        for chunk in stream.chunks(usize::from(cut) + 1) {
            let seen = scanner.scan(chunk, |seen| {
                assert!(seen.start.is_none_or(|at| at < chunk.len()));
                assert!(seen.end.is_none_or(|at| at <= chunk.len()));
                Flow::Pass
            });
            match seen {
                Ok(n) => assert_eq!(n, chunk.len()),
                Err(_) => break,
            }
            assert!(scanner.unshown() <= PREFIX_TEXT_BYTES as usize + HEAD_BYTES);
        }
    }
}

/// Fuzz entry: whatever the bytes, never panic and never take more than was there.
pub fn fuzz_take_frame(input: &[u8]) {
    let mut buf = BytesMut::from(input);
    while let Ok(Some(frame)) = take_frame(&mut buf, 4096) {
        assert!(frame.body.len() <= 4096);
    }
}
