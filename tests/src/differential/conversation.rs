//! Conversations made from a seed: what a client sends, and for what it waits in between.

use std::fmt;

use bytes::{BufMut, BytesMut};
use kornak_protocol::frame::take_frame;
use kornak_protocol::frontend::{self, Target};

use super::statements as sql;
use crate::sim::rng::Rng;

/// The event that a client waits for after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Nothing: the next step is sent at once.
    None,
    /// So many ReadyForQuery since the last wait.
    Ready(usize),
    /// A message with one of these tags; or an error that was answered before, behind which a server
    /// answers nothing up to the next Sync.
    Tag(&'static [u8]),
    /// The answer to `put_marker`.
    Marker,
    /// The other side closes.
    End,
}

/// Something that a client does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub bytes: Vec<u8>,
    pub wait: Wait,
    /// Asks for a cancel, again and again, until the wait is over.
    pub cancels: bool,
    /// Sizes of the pieces in which the bytes are written; the rest in one.
    pub pieces: Vec<usize>,
}

/// Steps that leave a session as they found it (outside of transactions, nothing owed), unless they
/// end it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Conversation {
    pub steps: Vec<Step>,
    /// The last step ends the session.
    pub ends: bool,
}

/// Makes a conversation. `may_end` allows one that ends its session.
pub(super) fn make(rng: &Rng, may_end: bool) -> Conversation {
    let mut talk = Maker { rng, steps: Vec::new(), out: BytesMut::new() };
    match rng.below(100) {
        0..=19 => talk.simple(),
        20..=44 => talk.extended(),
        45..=52 => talk.flushed(),
        53..=59 => talk.suspended(),
        60..=67 => talk.copies_in(),
        68..=72 => talk.copies_out(),
        73..=75 => talk.calls_functions(),
        76..=81 => talk.transaction(),
        82 => talk.cancelled(),
        _ => talk.anything(),
    }
    let ends = may_end && rng.chance(6);
    if ends {
        talk.end();
    } else {
        talk.settle();
    }
    Conversation { steps: talk.steps, ends }
}

struct Maker<'a> {
    rng: &'a Rng,
    steps: Vec<Step>,
    out: BytesMut,
}

/// Names are short texts without NUL, so that they always fit.
fn fits<E: fmt::Debug>(put: Result<(), E>) {
    put.expect("a statement of ours fits into a message");
}

/// Messages of a batch that no server can read: each is an error, and what follows is skipped.
const MALFORMED: [(u8, &[u8]); 18] = [
    (b'P', b""),
    (b'P', b"s1\0SELECT 1"),
    (b'P', b"s1\0SELECT 1\0"),
    (b'P', b"s1\0SELECT 1\0\0\x01\0\0"),
    (b'P', b"\0SELECT 1\0\0\0x"),
    (b'B', b""),
    (b'B', b"\0s1"),
    (b'B', b"\0s1\0"),
    (b'B', b"\0s1\0\0\0\0\0\0\0x"),
    (b'D', b""),
    (b'D', b"Ss1\0x"),
    (b'D', b"Xs1\0"),
    (b'C', b"Ss1"),
    (b'C', b"s1\0"),
    (b'E', b""),
    (b'E', b"\0\0\0"),
    (b'E', b"\0\0\0\0\0x"),
    (b'H', b"x"),
];

/// Messages that end a batch and that no server can read: each is an error and a ReadyForQuery.
const MALFORMED_ENDS: [(u8, &[u8]); 4] =
    [(b'Q', b""), (b'Q', b"SELECT 1"), (b'Q', b"SELECT 1\0SELECT 2\0"), (b'S', b"x")];

/// Writes a message that no server can read.
pub(super) fn put_malformed(rng: &Rng, ends: bool, out: &mut BytesMut) {
    let all: &[(u8, &[u8])] = if ends { &MALFORMED_ENDS } else { &MALFORMED };
    let (tag, body) = all[rng.below(all.len())];
    out.put_u8(tag);
    out.put_u32(u32::try_from(body.len() + 4).unwrap_or(4));
    out.put_slice(body);
}

impl Maker<'_> {
    /// Makes a step of everything that was written since the last one.
    fn step(&mut self, wait: Wait) {
        let bytes = self.out.split().to_vec();
        let mut pieces = Vec::new();
        if self.rng.chance(150) {
            let mut left = bytes.len();
            while left > 1 && pieces.len() < 6 {
                let most = if self.rng.chance(500) { left } else { left.min(7) };
                let piece = 1 + self.rng.below(most - 1);
                pieces.push(piece);
                left -= piece;
            }
        }
        self.steps.push(Step { bytes, wait, cancels: false, pieces });
    }

    fn query(&mut self, text: &str) {
        fits(frontend::put_query(text.as_bytes(), &mut self.out));
    }

    /// One to three statements in one message.
    fn some_statements(&mut self) {
        let count = if self.rng.chance(250) { 2 + self.rng.below(2) } else { 1 };
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(match self.rng.chance(150) {
                true => sql::transaction(self.rng),
                false => sql::any(self.rng),
            });
        }
        self.query(&all.join("; "));
    }

    fn simple(&mut self) {
        for _ in 0..1 + self.rng.below(2) {
            let pipelined = if self.rng.chance(300) { 1 + self.rng.below(5) } else { 1 };
            for _ in 0..pipelined {
                match self.rng.chance(20) {
                    true => put_malformed(self.rng, true, &mut self.out),
                    false => self.some_statements(),
                }
            }
            self.step(Wait::Ready(pipelined));
        }
    }

    fn name(&self) -> &'static str {
        ["", "", "s1", "s2", "a statement's name"][self.rng.below(5)]
    }

    fn portal(&self) -> &'static str {
        ["", "", "", "p1", "p2"][self.rng.below(5)]
    }

    fn parse(&mut self, name: &str) {
        let with_parameter = self.rng.chance(300);
        let text = match (with_parameter, self.rng.below(10)) {
            (true, n) => ["SELECT $1::integer + 1", "SELECT v FROM t WHERE id = $1::integer"]
                [n % 2]
                .to_owned(),
            (false, 0..=6) => sql::any(self.rng),
            (false, 7) => sql::transaction(self.rng),
            (false, 8) => String::new(),
            (false, _) => "SELECT 1; SELECT 2".to_owned(),
        };
        fits(frontend::put_parse(name.as_bytes(), text.as_bytes(), &[], &mut self.out));
    }

    fn bind(&mut self, portal: &str, name: &str) {
        let body = |out: &mut BytesMut, rng: &Rng| {
            out.put_slice(portal.as_bytes());
            out.put_u8(0);
            out.put_slice(name.as_bytes());
            out.put_u8(0);
            // Formats of the parameters, the parameters, formats of the results.
            out.put_u16(0);
            if rng.chance(350) {
                out.put_u16(1);
                match rng.below(4) {
                    0 => out.put_i32(-1),
                    n => {
                        let text = ["", "7", "12", "x"][n];
                        out.put_i32(i32::try_from(text.len()).unwrap_or(0));
                        out.put_slice(text.as_bytes());
                    }
                }
            } else {
                out.put_u16(0);
            }
            if rng.chance(300) {
                out.put_u16(1);
                out.put_u16(1);
            } else {
                out.put_u16(0);
            }
        };
        self.message(b'B', body);
    }

    fn message(&mut self, tag: u8, body: impl FnOnce(&mut BytesMut, &Rng)) {
        let mut inner = BytesMut::new();
        body(&mut inner, self.rng);
        self.out.put_u8(tag);
        self.out.put_u32(u32::try_from(inner.len() + 4).unwrap_or(4));
        self.out.put_slice(&inner);
    }

    fn execute(&mut self, portal: &str, rows: usize) {
        let rows = u32::try_from(rows).unwrap_or(0);
        fits(frontend::put_execute(portal.as_bytes(), rows, &mut self.out));
    }

    fn describe(&mut self) {
        let target = match self.rng.chance(500) {
            true => Target::Statement(self.name().as_bytes()),
            false => Target::Portal(self.portal().as_bytes()),
        };
        fits(frontend::put_describe(target, &mut self.out));
    }

    fn close(&mut self) {
        let target = match self.rng.chance(500) {
            true => Target::Statement(self.name().as_bytes()),
            false => Target::Portal(self.portal().as_bytes()),
        };
        fits(frontend::put_close(target, &mut self.out));
    }

    /// Parse, Bind, Execute, with things left out, doubled or not there.
    fn extended_messages(&mut self) {
        let (name, portal) = (self.name(), self.portal());
        if self.rng.chance(850) {
            self.parse(name);
        }
        if self.rng.chance(25) {
            put_malformed(self.rng, false, &mut self.out);
        }
        if self.rng.chance(200) {
            self.describe();
        }
        if self.rng.chance(900) {
            self.bind(portal, name);
        }
        if self.rng.chance(300) {
            fits(frontend::put_describe(Target::Portal(portal.as_bytes()), &mut self.out));
        }
        if self.rng.chance(900) {
            let rows = if self.rng.chance(250) { self.rng.below(5) } else { 0 };
            self.execute(portal, rows);
        }
        if self.rng.chance(120) {
            self.close();
        }
        if self.rng.chance(80) {
            frontend::put_flush(&mut self.out);
        }
        // The end of an empty statement must not look like a marker.
        let empty = Target::Portal(b"none");
        fits(frontend::put_close(empty, &mut self.out));
    }

    fn extended(&mut self) {
        for _ in 0..1 + self.rng.below(2) {
            let batches = if self.rng.chance(300) { 2 + self.rng.below(4) } else { 1 };
            let mut ready = 0;
            for _ in 0..batches {
                for _ in 0..1 + self.rng.below(3) {
                    self.extended_messages();
                }
                frontend::put_sync(&mut self.out);
                ready += 1;
                if self.rng.chance(60) {
                    self.some_statements();
                    ready += 1;
                }
            }
            self.step(Wait::Ready(ready));
        }
    }

    /// As drivers do that ask for a description first: Flush, and the Sync comes later.
    fn flushed(&mut self) {
        let name = self.name();
        self.parse(name);
        fits(frontend::put_describe(Target::Statement(name.as_bytes()), &mut self.out));
        frontend::put_flush(&mut self.out);
        self.step(Wait::Tag(b"TnE"));
        self.bind("", name);
        frontend::put_flush(&mut self.out);
        if self.rng.chance(500) {
            self.step(Wait::None);
        }
        self.execute("", 0);
        fits(frontend::put_close(Target::Portal(b"none"), &mut self.out));
        frontend::put_flush(&mut self.out);
        self.step(Wait::None);
        if self.rng.chance(300) {
            self.extended_messages();
        }
        frontend::put_sync(&mut self.out);
        self.step(Wait::Ready(1));
    }

    /// A portal read in parts.
    fn suspended(&mut self) {
        self.query("BEGIN");
        self.step(Wait::Ready(1));
        let text = "SELECT id, v FROM t ORDER BY id";
        fits(frontend::put_parse(b"", text.as_bytes(), &[], &mut self.out));
        let portal = self.portal();
        self.bind(portal, "");
        for _ in 0..1 + self.rng.below(4) {
            let rows = 1 + self.rng.below(8);
            self.execute(portal, rows);
            match self.rng.below(3) {
                0 => {
                    frontend::put_flush(&mut self.out);
                    self.step(Wait::Tag(b"sCE"));
                }
                1 => {
                    frontend::put_sync(&mut self.out);
                    self.step(Wait::Ready(1));
                }
                _ => {}
            }
        }
        frontend::put_sync(&mut self.out);
        let end = ["COMMIT", "ROLLBACK"][self.rng.below(2)];
        self.query(end);
        self.step(Wait::Ready(2));
    }

    fn copy_data(&mut self) {
        for _ in 0..self.rng.below(6) {
            let mut lines = String::new();
            for _ in 0..1 + self.rng.below(4) {
                lines += &sql::copy_line(self.rng);
            }
            self.message(b'd', |out, _| out.put_slice(lines.as_bytes()));
            if self.rng.chance(50) {
                frontend::put_flush(&mut self.out);
            }
        }
    }

    fn copy_end(&mut self) {
        match self.rng.below(4) {
            0 => fits(frontend::put_copy_fail(b"no more", &mut self.out)),
            _ => frontend::put_copy_done(&mut self.out),
        }
    }

    fn copies_in(&mut self) {
        let text = sql::copy(self.rng, true);
        let is_simple = self.rng.chance(500);
        let waits = self.rng.chance(500);
        if is_simple {
            self.query(&text);
        } else {
            fits(frontend::put_parse(b"", text.as_bytes(), &[], &mut self.out));
            self.bind("", "");
            self.execute("", 0);
            if waits {
                frontend::put_flush(&mut self.out);
            }
        }
        if waits {
            self.step(Wait::Tag(b"GE"));
        }
        self.copy_data();
        if !is_simple && self.rng.chance(150) {
            // Ignored by a server that copies.
            frontend::put_sync(&mut self.out);
        }
        self.copy_end();
        if !is_simple {
            frontend::put_sync(&mut self.out);
        }
        self.step(Wait::Ready(1));
    }

    fn copies_out(&mut self) {
        let text = sql::copy(self.rng, false);
        if self.rng.chance(500) {
            self.query(&text);
        } else {
            fits(frontend::put_parse(b"", text.as_bytes(), &[], &mut self.out));
            self.bind("", "");
            self.execute("", 0);
            frontend::put_sync(&mut self.out);
        }
        self.step(Wait::Ready(1));
    }

    /// `int4pl`, `textlen`, and functions that do not exist.
    fn calls_functions(&mut self) {
        for _ in 0..1 + self.rng.below(3) {
            self.message(b'F', |out, rng| {
                let (oid, arguments): (u32, &[&[u8]]) = match rng.below(4) {
                    0 => (177, &[b"3", b"4"]),
                    1 => (1257, &[b"some text"]),
                    2 => (177, &[b"3", b"none"]),
                    _ => (1, &[]),
                };
                out.put_u32(oid);
                out.put_u16(0);
                out.put_u16(u16::try_from(arguments.len()).unwrap_or(0));
                for argument in arguments {
                    out.put_u32(u32::try_from(argument.len()).unwrap_or(0));
                    out.put_slice(argument);
                }
                out.put_u16(0);
            });
            self.step(Wait::Ready(1));
        }
    }

    fn transaction(&mut self) {
        for _ in 0..3 + self.rng.below(4) {
            let text = match self.rng.chance(600) {
                true => sql::transaction(self.rng),
                false => sql::any(self.rng),
            };
            if self.rng.chance(500) {
                self.query(&text);
            } else {
                let name = self.name();
                fits(frontend::put_parse(name.as_bytes(), text.as_bytes(), &[], &mut self.out));
                self.bind("", name);
                self.execute("", 0);
                frontend::put_sync(&mut self.out);
            }
            self.step(Wait::Ready(1));
        }
    }

    /// The notice says that the statement runs: an earlier cancel would hit something else.
    fn cancelled(&mut self) {
        if self.rng.chance(500) {
            self.query("BEGIN");
            self.step(Wait::Ready(1));
        }
        let text = "DO $$ BEGIN RAISE WARNING 'runs'; PERFORM pg_sleep(20); END $$";
        if self.rng.chance(500) {
            let more = ["", "; SELECT 2"][self.rng.below(2)];
            self.query(&format!("{text}{more}"));
        } else {
            fits(frontend::put_parse(b"", text.as_bytes(), &[], &mut self.out));
            fits(frontend::put_bind(b"", b"", &[], &mut self.out));
            self.execute("", 0);
            frontend::put_sync(&mut self.out);
        }
        self.step(Wait::Tag(b"NE"));
        self.step(Wait::Ready(1));
        if let Some(last) = self.steps.last_mut() {
            last.cancels = true;
        }
    }

    /// Messages of every kind in any order: what a server makes of them is its business, and to be
    /// the same.
    fn anything(&mut self) {
        for _ in 0..1 + self.rng.below(9) {
            match self.rng.below(22) {
                0..=2 => self.some_statements(),
                3..=6 => self.extended_messages(),
                7..=9 => frontend::put_sync(&mut self.out),
                10 => frontend::put_flush(&mut self.out),
                11 | 12 => self.any_copy_in(),
                13 => self.copy_data(),
                14 => self.copy_end(),
                15 => self.describe(),
                16 => self.close(),
                17 => {
                    let text = sql::transaction(self.rng);
                    self.query(&text);
                }
                18 => {
                    let text = sql::copy(self.rng, false);
                    self.query(&text);
                }
                19 => self.message(b'F', |out, _| {
                    out.put_u32(1257);
                    out.put_slice(&[0, 0, 0, 1, 0, 0, 0, 2, b'a', b'b', 0, 0]);
                }),
                _ => {
                    if self.rng.chance(500) {
                        self.step(Wait::None);
                    }
                }
            }
        }
        self.step(Wait::None);
    }

    /// A server ends a session that sends anything else in the middle of its COPY, so that seldom
    /// happens.
    fn any_copy_in(&mut self) {
        let text = sql::copy(self.rng, true);
        if self.rng.chance(500) {
            self.query(&text);
        } else {
            fits(frontend::put_parse(b"", text.as_bytes(), &[], &mut self.out));
            self.bind("", "");
            self.execute("", 0);
        }
        if self.rng.chance(950) {
            self.copy_data();
            if self.rng.chance(300) {
                frontend::put_sync(&mut self.out);
            }
            self.copy_end();
        }
    }

    /// Out of every COPY, batch and transaction, and a mark behind the answers.
    fn settle(&mut self) {
        fits(frontend::put_copy_fail(b"over", &mut self.out));
        frontend::put_sync(&mut self.out);
        self.query("ROLLBACK");
        if self.rng.chance(100) {
            self.query("DISCARD ALL");
        }
        put_marker(&mut self.out);
        self.step(Wait::Marker);
    }

    fn end(&mut self) {
        fits(frontend::put_copy_fail(b"over", &mut self.out));
        frontend::put_sync(&mut self.out);
        match self.rng.below(4) {
            0 => self.query("ROLLBACK; RESET ROLE; SELECT pg_terminate_backend(pg_backend_pid())"),
            1 => self.message(b'p', |out, _| out.put_slice(b"too late\0")),
            _ => frontend::put_terminate(&mut self.out),
        }
        self.step(Wait::End);
    }
}

/// An empty simple query, whose answer is told apart from all others: EmptyQueryResponse with
/// ReadyForQuery right behind it.
pub(super) fn put_marker(out: &mut BytesMut) {
    fits(frontend::put_query(b"", out));
}

impl fmt::Display for Conversation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            let mut bytes = BytesMut::from(step.bytes.as_slice());
            while let Ok(Some(frame)) = take_frame(&mut bytes, 1 << 24) {
                let mut body = frame.body.escape_ascii().to_string();
                body.truncate(200);
                writeln!(f, "    {} {body}", char::from(frame.tag))?;
            }
            let cancels = if step.cancels { ", cancels" } else { "" };
            let pieces = if step.pieces.is_empty() { "" } else { ", in pieces" };
            writeln!(f, "  -- waits for {:?}{cancels}{pieces}", step.wait)?;
        }
        Ok(())
    }
}
