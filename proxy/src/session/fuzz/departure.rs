//! A client leaves at any byte of any conversation: whenever its connection would be given to the next
//! one, a server that has read all of it must stand between two messages, idle.
//!
//! The server is a model of how PostgreSQL reads its input (`PostgresMain`, `CopyGetData`), apart from
//! ours, so that both would have to be wrong in the same way.

use bytes::{BufMut, BytesMut};
use kornak_protocol::frame::{Direction, Flow, Scanner, take_frame};
use kornak_protocol::frontend::{self, Target};
use kornak_protocol::params::Parameters;
use kornak_protocol::txn::TransactionStatus::{Failed, Idle, InBlock};
use kornak_protocol::{backend, txn};

use crate::session::answers::Verdict;
use crate::session::pooled::Edits;
use crate::session::statements::{NOBODY, Prepared, Texts};
use crate::session::{Heard, Session};

/// Messages as drivers send them, for bytes that stand for a whole message.
const MESSAGES: &[&[u8]] = &[
    b"Q\0\0\0\x0dSELECT 1\0",
    b"Q\0\0\0\x0aBEGIN\0",
    b"Q\0\0\0\x0bCOMMIT\0",
    b"P\0\0\0\x11a\0SELECT 1\0\0\0",
    b"P\0\0\0\x10\0SELECT 1\0\0\0",
    b"B\0\0\0\x0d\0a\0\0\0\0\0\0\0",
    b"B\0\0\0\x0c\0\0\0\0\0\0\0\0",
    b"D\0\0\0\x07Sa\0",
    b"D\0\0\0\x06P\0",
    b"E\0\0\0\x09\0\0\0\0\0",
    b"C\0\0\0\x07Sa\0",
    b"S\0\0\0\x04",
    b"H\0\0\0\x04",
    b"d\0\0\0\x081\n2\n",
    b"c\0\0\0\x04",
    b"f\0\0\0\x07no\0",
    b"F\0\0\0\x0e\0\0\0\x01\0\0\0\0\0\0",
    b"X\0\0\0\x04",
    // Only the beginning of one.
    b"d\0\0\0\x40AAAA",
    b"f\0\0\0\x20no",
    b"Q\0\0\x01\0SELECT",
];

/// Any bytes as a conversation.
pub fn fuzz_departure(data: &[u8]) {
    let Some((settings, mut rest)) = data.split_first() else { return };
    let mut play = Play::new(settings & 1 == 1);
    while let Some(([step, with], after)) = rest.split_first_chunk::<2>() {
        rest = after;
        let done = match step % 8 {
            0..=2 => {
                let message = MESSAGES.get(usize::from(*with) % MESSAGES.len());
                play.client(message.copied().unwrap_or_default())
            }
            3 => {
                let (bytes, next) = rest.split_at(usize::from(*with & 31).min(rest.len()));
                rest = next;
                play.client(bytes)
            }
            4 | 5 => {
                play.server.read(*with);
                Ok(())
            }
            6 => play.deliver(usize::from(*with)),
            _ => play.deliver(usize::MAX),
        };
        if done.is_err() {
            return;
        }
        play.check();
    }
}

/// The connection is closed.
struct Over;

/// A pooled session and its server, as [`crate::clients::forward`] has them.
struct Play {
    session: Session,
    is_pooled: bool,
    texts: Texts,
    held: BytesMut,
    /// Of a message that is left out.
    skip: u32,
    from_client: Scanner,
    from_server: Scanner,
    tail: BytesMut,
    server: Server,
}

impl Play {
    fn new(is_pooled: bool) -> Self {
        let mut session = match is_pooled {
            true => Session::pooled(Parameters::default().into(), 2, Vec::new()),
            false => Session::new(Parameters::default()),
        };
        if let Some(statements) = &mut session.journal.statements {
            statements.attach(Box::<Prepared>::default());
        }
        Self {
            session,
            is_pooled,
            texts: Texts::default(),
            held: BytesMut::new(),
            skip: 0,
            from_client: Scanner::new(Direction::Frontend),
            from_server: Scanner::new(Direction::Backend),
            tail: BytesMut::new(),
            server: Server::default(),
        }
    }

    fn client(&mut self, bytes: &[u8]) -> Result<(), Over> {
        self.held.extend_from_slice(bytes);
        loop {
            let skip = self.held.len().min(self.skip as usize);
            let _ = self.held.split_to(skip);
            self.skip -= skip as u32;
            let is_quiet = self.session.is_quiet() && self.from_client.at_boundary();
            if is_quiet && self.ignore()? {
                continue;
            }
            if self.held.is_empty() || self.session.must_wait() || self.session.must_flush() {
                return Ok(());
            }
            let data = self.held.split().freeze();
            let (mut stopped, mut left) = (false, false);
            let mut edits = Edits::default();
            let Self { session, from_client, texts, is_pooled, .. } = self;
            let scanned = from_client.scan(&data, |seen| {
                left = seen.tag == b'X';
                stopped = left || session.ignores(&seen) || session.must_settle();
                if !stopped && *is_pooled {
                    stopped = session.must_wait_for_answers(&seen);
                }
                if stopped {
                    return Flow::StopBefore;
                }
                match *is_pooled {
                    true => session.forwarded_pooled(&seen, texts, &mut edits),
                    false => session.forwarded(&seen),
                };
                Flow::Pass
            });
            let at = scanned.map_err(|_| Over)?;
            let end = at - self.from_client.unshown();
            edits.apply(data.get(..end).unwrap_or_default(), &mut self.server.input);
            if left {
                return Err(Over);
            }
            self.held.extend_from_slice(data.get(end..).unwrap_or_default());
            if !stopped {
                if !self.held.is_empty() {
                    self.from_client = Scanner::new(Direction::Frontend);
                }
                return Ok(());
            }
            if end == 0 && !self.session.is_quiet() {
                return Ok(());
            }
        }
    }

    /// Drops what an idle server would ignore; answers whether there was something of it.
    fn ignore(&mut self) -> Result<bool, Over> {
        let ignored = |tag: u8| matches!(tag, b'd' | b'c' | b'f' | b'H');
        if !self.held.first().is_some_and(|tag| ignored(*tag)) {
            return Ok(false);
        }
        let mut scanner = Scanner::new(Direction::Frontend);
        let scanned = scanner.scan(&self.held, |seen| match ignored(seen.tag) {
            true => Flow::StopAfter,
            false => Flow::StopBefore,
        });
        let at = scanned.map_err(|_| Over)?;
        if scanner.unshown() > 0 || at == 0 {
            return Ok(false);
        }
        self.skip = scanner.remaining();
        let _ = self.held.split_to(at);
        Ok(true)
    }

    /// So many bytes of what the server has said arrive.
    fn deliver(&mut self, most: usize) -> Result<(), Over> {
        let n = self.server.out.len().min(most);
        let mut data = self.tail.split();
        data.extend_from_slice(&self.server.out.split_to(n));
        let mut over = false;
        let Self { session, from_server, .. } = self;
        let scanned = from_server.scan(&data, |seen| match session.received(&seen) {
            Ok(Heard::LastWords(_)) | Err(_) => {
                over = true;
                Flow::StopBefore
            }
            Ok(_) => Flow::Pass,
        });
        let at = scanned.map_err(|_| Over)?;
        if over {
            return Err(Over);
        }
        let end = at - from_server.unshown();
        if end < data.len() {
            self.tail.extend_from_slice(data.get(end..).unwrap_or_default());
            self.from_server = Scanner::new(Direction::Backend);
        }
        if self.session.is_doubtful() && self.from_client.at_boundary() {
            // A constant name always fits.
            let _ = frontend::put_close(Target::Statement(NOBODY), &mut self.server.input);
            frontend::put_sync(&mut self.server.input);
            self.session.marked();
        }
        self.client(b"")
    }

    /// If the client left now and its connection were given on, the next one would be understood.
    fn check(&mut self) {
        let stands_still = self.session.is_quiet()
            && self.from_client.at_boundary()
            && self.from_server.at_boundary()
            && self.tail.is_empty();
        if !stands_still {
            return;
        }
        let server = &mut self.server;
        assert!(server.out.is_empty(), "an answer is on its way");
        // What it has not read yet must be such that it ignores it.
        while let Ok(Some(frame)) = take_frame(&mut server.input, 1 << 30) {
            assert!(matches!(frame.tag, b'd' | b'c' | b'f' | b'H'), "a request is on its way");
        }
        assert!(server.input.is_empty(), "the server waits for the rest of a message");
        assert!(server.is_idle(), "the server is in the middle of something");
    }
}

/// How PostgreSQL reads.
#[derive(Default)]
struct Server {
    input: BytesMut,
    out: BytesMut,
    ignoring: bool,
    /// A COPY is read; of the extended protocol if true.
    copying: Option<bool>,
    unsynced: bool,
    in_block: bool,
    failed: bool,
}

impl Server {
    fn is_idle(&self) -> bool {
        !self.ignoring && self.copying.is_none() && !self.unsynced && !self.in_block
    }

    fn status(&self) -> txn::TransactionStatus {
        match (self.in_block, self.failed) {
            (false, _) => Idle,
            (true, false) => InBlock,
            (true, true) => Failed,
        }
    }

    fn ready(&mut self) {
        backend::put_ready_for_query(self.status(), &mut self.out);
    }

    fn fail(&mut self) {
        self.failed = true;
        Verdict::Dead.put(&mut self.out);
    }

    fn say(&mut self, tag: u8, body: &[u8]) {
        self.out.put_u8(tag);
        self.out.put_u32(body.len() as u32 + 4);
        self.out.put_slice(body);
    }

    fn done(&mut self) {
        self.say(b'C', b"SELECT 1\0");
    }

    /// Reads one message, if a whole one is there. `outcome`: 0 it fails, 1 it copies in, 2 out.
    fn read(&mut self, outcome: u8) {
        let Ok(Some(frame)) = take_frame(&mut self.input, 1 << 30) else { return };
        let outcome = outcome % 6;
        if let Some(extended) = self.copying {
            return self.read_copy(frame.tag, outcome, extended);
        }
        if self.ignoring && frame.tag != b'S' {
            return;
        }
        match frame.tag {
            b'Q' | b'F' => {
                self.unsynced = false;
                self.query(frame.tag, &frame.body, outcome);
            }
            b'S' => {
                (self.unsynced, self.ignoring) = (false, false);
                self.ready();
            }
            b'P' | b'B' | b'D' | b'C' | b'E' => {
                self.unsynced = true;
                self.extended(frame.tag, &frame.body, outcome);
            }
            _ => {}
        }
    }

    fn read_copy(&mut self, tag: u8, outcome: u8, extended: bool) {
        match tag {
            b'H' | b'S' => return,
            b'd' if outcome != 0 => return,
            b'c' if outcome != 0 => self.done(),
            _ => {
                self.fail();
                self.ignoring = extended;
            }
        }
        self.copying = None;
        if !extended {
            self.ready();
        }
    }

    fn query(&mut self, tag: u8, body: &[u8], outcome: u8) {
        match (tag, outcome) {
            (_, 0) => self.fail(),
            (b'F', _) => self.say(b'V', &[0; 4]),
            (_, 1) => {
                self.say(b'G', &[0; 3]);
                self.copying = Some(false);
                return;
            }
            (_, 2) => {
                self.say(b'H', &[0; 3]);
                self.say(b'd', b"1\n");
                self.say(b'c', b"");
                self.done();
            }
            _ if body.starts_with(b"BEGIN") => {
                (self.in_block, self.failed) = (true, false);
                self.done();
            }
            _ if body.starts_with(b"COMMIT") => {
                self.in_block = false;
                self.done();
            }
            _ => self.done(),
        }
        self.ready();
    }

    fn extended(&mut self, tag: u8, body: &[u8], outcome: u8) {
        // Closing what is not there never fails.
        if outcome == 0 && tag != b'C' {
            self.fail();
            self.ignoring = true;
            return;
        }
        match tag {
            b'P' => self.say(b'1', b""),
            b'B' => self.say(b'2', b""),
            b'C' => self.say(b'3', b""),
            b'D' => {
                if body.first() == Some(&b'S') {
                    self.say(b't', &[0; 2]);
                }
                self.say(b'n', b"");
            }
            _ if outcome == 1 => {
                self.say(b'G', &[0; 3]);
                self.copying = Some(true);
            }
            _ if outcome == 2 => self.say(b's', b""),
            _ => self.done(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_has_left_unfinished_reaches_nobody() {
        let mut state = 7u64;
        let mut roll = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        };
        for _ in 0..20_000 {
            let data: Vec<u8> = (0..usize::from(roll()) * 2).map(|_| roll()).collect();
            fuzz_departure(&data);
        }
    }
}
