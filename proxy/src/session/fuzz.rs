//! Fuzz entries of both directions of a session: any bytes from clients and servers, in any pieces,
//! and servers that go away at any moment.
//!
//! An entry takes any bytes and must return: a panic, an overflow or a broken promise is a defect.

mod departure;

use bytes::BytesMut;
use kornak_config::proxy::{FailoverSettings, KeepSessions, ListenPolicy};
use kornak_protocol::frame::{Direction, Flow, Scanner};
use kornak_protocol::limits::MAX_OWED;
use kornak_protocol::params::Parameters;

use super::pooled::Edits;
use super::{Aftermath, Answered, Heard, Session};
use crate::session::statements::{Prepared, Texts};
pub use departure::fuzz_departure;

/// An entry: its name and the function.
pub type Entry = (&'static str, fn(&[u8]));

/// All entries.
pub const ENTRIES: &[Entry] = &[
    ("session", fuzz_session),
    ("pooled_session", fuzz_pooled_session),
    ("departure", fuzz_departure),
];

/// Bound of what one message of a client or a server can make us say: an error of ours with its hint,
/// and a ReadyForQuery.
const MAX_ANSWER_BYTES: usize = 512;

/// A session with a server connection of its own.
pub fn fuzz_session(data: &[u8]) {
    play(data, false);
}

/// A session whose connections change hands.
pub fn fuzz_pooled_session(data: &[u8]) {
    play(data, true);
}

/// A conversation without sockets, as [`crate::clients::forward`] leads it.
struct Play {
    session: Session,
    is_pooled: bool,
    texts: Texts,
    held: BytesMut,
    from_client: Scanner,
    tail: BytesMut,
    from_server: Scanner,
    out: BytesMut,
}

/// The conversation is over.
struct Over;

/// A byte of settings, then steps: what happens, how many bytes belong to it, and those.
fn play(data: &[u8], is_pooled: bool) {
    let Some((settings, mut rest)) = data.split_first() else { return };
    let mut play = Play::new(*settings, is_pooled);
    while let Some(([step, len], after)) = rest.split_first_chunk::<2>() {
        let (bytes, next) = after.split_at(usize::from(*len).min(after.len()));
        rest = next;
        let done = match step % 8 {
            0..=2 => play.client(bytes),
            3..=5 => play.server(bytes),
            6 => play.lose(step & 8 != 0, step & 16 != 0),
            _ => play.change_hands(),
        };
        assert!(play.out.len() <= (data.len() + 1) * MAX_ANSWER_BYTES, "answers have a bound");
        assert!(play.session.owed() <= MAX_OWED + 256, "what is owed has a bound");
        if done.is_err() {
            return;
        }
    }
}

impl Play {
    fn new(settings: u8, is_pooled: bool) -> Self {
        let mut session = match is_pooled {
            true => Session::pooled(Parameters::default().into(), 2, Vec::new()),
            false => Session::new(Parameters::default()),
        };
        let keep_sessions = match settings & 3 {
            0 => KeepSessions::All,
            1 => KeepSessions::None,
            _ => KeepSessions::Clean,
        };
        let listen = if settings & 4 == 0 { ListenPolicy::Pin } else { ListenPolicy::Move };
        session.set_policy(FailoverSettings { keep_sessions, listen, ..Default::default() });
        let mut play = Self {
            session,
            is_pooled,
            texts: Texts::default(),
            held: BytesMut::new(),
            from_client: Scanner::new(Direction::Frontend),
            tail: BytesMut::new(),
            from_server: Scanner::new(Direction::Backend),
            out: BytesMut::new(),
        };
        play.attach();
        play
    }

    fn attach(&mut self) {
        if let Some(statements) = &mut self.session.journal.statements {
            statements.attach(Box::<Prepared>::default());
        }
    }

    fn client(&mut self, bytes: &[u8]) -> Result<(), Over> {
        self.held.extend_from_slice(bytes);
        loop {
            if self.held.is_empty() || self.session.must_wait() {
                return Ok(());
            }
            let data = self.held.split().freeze();
            let mut waits = false;
            let Self { session, from_client, texts, out, .. } = self;
            let was_open = session.is_open();
            let mut edits = Edits::default();
            let scanned = match (was_open, self.is_pooled) {
                (false, _) => from_client.scan(&data, |seen| match session.answer(&seen, out) {
                    Answered::Stay => Flow::Pass,
                    Answered::Open => Flow::StopAfter,
                }),
                (true, false) => from_client.scan(&data, |seen| {
                    session.forwarded(&seen);
                    Flow::Pass
                }),
                (true, true) => from_client.scan(&data, |seen| {
                    if session.must_wait_for_answers(&seen) {
                        waits = true;
                        return Flow::StopBefore;
                    }
                    session.forwarded_pooled(&seen, texts, &mut edits);
                    Flow::Pass
                }),
            };
            let at = scanned.map_err(|_| Over)?;
            let end = at - from_client.unshown();
            if !edits.is_empty() {
                let mut changed = BytesMut::new();
                edits.apply(data.get(..end).unwrap_or_default(), &mut changed);
                assert!(changed.len() <= 4 * data.len() + (64 << 10), "what is put in has a bound");
            }
            self.held.extend_from_slice(data.get(end..).unwrap_or_default());
            if self.held.is_empty() {
                return Ok(());
            }
            if at == data.len() {
                self.from_client = Scanner::new(Direction::Frontend);
                return Ok(());
            }
            if waits {
                return Ok(());
            }
        }
    }

    fn server(&mut self, bytes: &[u8]) -> Result<(), Over> {
        if !self.session.is_open() {
            return Ok(());
        }
        let mut data = self.tail.split();
        data.extend_from_slice(bytes);
        let Self { session, from_server, .. } = self;
        let (mut ended, mut garbage) = (false, false);
        let scanned = from_server.scan(&data, |seen| match session.received(&seen) {
            Ok(Heard::LastWords(_)) => {
                ended = true;
                Flow::StopBefore
            }
            Ok(_) => Flow::Pass,
            Err(_) => {
                garbage = true;
                Flow::StopBefore
            }
        });
        let at = scanned.map_err(|_| Over)?;
        if ended || garbage {
            return self.lose(true, false);
        }
        let end = at - from_server.unshown();
        if end < data.len() {
            self.tail.extend_from_slice(data.get(end..).unwrap_or_default());
            self.from_server = Scanner::new(Direction::Backend);
        }
        Ok(())
    }

    fn is_quiet(&self) -> bool {
        self.session.is_quiet()
            && self.from_client.at_boundary()
            && self.from_server.at_boundary()
            && self.tail.is_empty()
    }

    fn lose(&mut self, sudden: bool, forget: bool) -> Result<(), Over> {
        if !self.session.is_open() {
            return Ok(());
        }
        let (was_quiet, said) = (self.is_quiet(), self.out.len());
        let half_told = self.from_server.remaining() > 0;
        self.tail.clear();
        self.from_server = Scanner::new(Direction::Backend);
        if forget && self.session.is_harmless() && self.session.forget_harmless() {
            self.from_client = Scanner::new(Direction::Frontend);
            return Err(Over);
        }
        let aftermath = self.session.lose_server(half_told, sudden, &mut self.out);
        if aftermath != Aftermath::Lives {
            return Err(Over);
        }
        if was_quiet {
            assert_eq!(self.out.len(), said, "a session of which nothing is owed is told nothing");
        }
        // The rest of a message that was forwarded in part is dropped; fuzzing goes on behind it.
        self.from_client = Scanner::new(Direction::Frontend);
        self.held.clear();
        let mut replay = BytesMut::new();
        let owed = self.session.put_replay(&mut replay);
        assert!(owed > 0 || replay.is_empty(), "what is said to a server is answered");
        self.attach();
        Ok(())
    }

    /// Between transactions a pooled connection is given back and another one taken.
    fn change_hands(&mut self) -> Result<(), Over> {
        if !self.is_pooled || !self.is_quiet() || self.session.pinned().is_some() {
            return Ok(());
        }
        if let Some(statements) = &mut self.session.journal.statements {
            statements.detach();
        }
        self.session.detached();
        self.attach();
        self.session.moved(&Parameters::default(), &mut self.out);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_of_both_sides_is_played() {
        // A statement and its answer, then an unanswered one whose server is lost.
        let mut data = vec![2];
        let step = |data: &mut Vec<u8>, step: u8, bytes: &[u8]| {
            data.extend([step, bytes.len() as u8]);
            data.extend_from_slice(bytes);
        };
        step(&mut data, 0, b"Q\0\0\0\x0dselect 1\0");
        step(&mut data, 3, b"C\0\0\0\x0dSELECT 1\0Z\0\0\0\x05I");
        step(&mut data, 0, b"Q\0\0\0\x0dselect 1\0");
        step(&mut data, 14, b"");
        step(&mut data, 7, b"");
        for (_, entry) in ENTRIES {
            entry(&data);
            (0..data.len()).for_each(|end| entry(data.get(..end).unwrap_or_default()));
        }
    }
}
