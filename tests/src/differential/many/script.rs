//! Scripts of one client among many: conversations that are made from a seed, and how it leaves.

use std::sync::LazyLock;

use bytes::{BufMut, BytesMut};
use kornak_protocol::frontend::{self, Target};

use super::super::conversation::{Conversation, Step, Wait, put_malformed, put_marker};
use super::words::{self, Speaker};
use crate::sim::rng::Rng;

/// How a client goes on after a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leave {
    /// The client stays.
    No,
    /// The client says good-bye and closes.
    Terminates,
    /// The client closes where its last step ends, at any byte.
    Closes,
}

/// One client's part of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub says: Conversation,
    pub leaves: Leave,
}

/// Makes one. `keeps`: what keeps its connection from others may stay to its next part.
pub(super) fn part(rng: &Rng, who: Speaker, keeps: bool) -> Part {
    let leaves = match rng.below(100) {
        0..=7 => Leave::Closes,
        8..=10 => Leave::Terminates,
        _ => Leave::No,
    };
    let who = Speaker { writes: leaves != Leave::Closes, ..who };
    let mut script = Script { rng, who, steps: Vec::new(), out: BytesMut::new() };
    if rng.chance(350) {
        // Before anything makes a difference that has the connection reset.
        script.query(&words::first(rng, who));
        script.step(Wait::Ready(1));
    }
    for _ in 0..1 + rng.below(3) {
        match rng.below(100) {
            0..=33 => script.simple(),
            34..=56 => script.extended(),
            57..=68 => script.reads_times(),
            69..=78 => script.transaction(),
            79..=86 => script.settings(),
            87..=92 => script.copies_in(),
            93..=95 => script.copies_out(),
            _ => script.calls_functions(),
        }
    }
    if leaves == Leave::Closes {
        match rng.chance(400) {
            true => script.leaves_in_a_copy(),
            false => script.cut(),
        }
    } else {
        script.settle(keeps);
    }
    if leaves == Leave::Terminates {
        frontend::put_terminate(&mut script.out);
        script.step(Wait::End);
    }
    let says = Conversation { steps: script.steps, ends: leaves != Leave::No };
    Part { says, leaves }
}

/// The name of a statement may be as long as its message.
static LONG_NAME: LazyLock<String> = LazyLock::new(|| "n".repeat(3000));

struct Script<'a> {
    rng: &'a Rng,
    who: Speaker,
    steps: Vec<Step>,
    out: BytesMut,
}

/// Texts are short and without NUL.
fn fits<E: std::fmt::Debug>(put: Result<(), E>) {
    put.expect("a statement of ours fits into a message");
}

impl Script<'_> {
    fn step(&mut self, wait: Wait) {
        let bytes = self.out.split().to_vec();
        let mut pieces = Vec::new();
        if self.rng.chance(60) && bytes.len() > 2 {
            pieces.push(1 + self.rng.below(bytes.len() - 1));
        }
        self.steps.push(Step { bytes, wait, cancels: false, pieces });
    }

    fn query(&mut self, text: &str) {
        fits(frontend::put_query(text.as_bytes(), &mut self.out));
    }

    /// Queries, now and then several at once.
    fn simple(&mut self) {
        let pipelined = if self.rng.chance(200) { 2 + self.rng.below(3) } else { 1 };
        for _ in 0..pipelined {
            let mut text = words::any(self.rng, self.who);
            if self.rng.chance(120) {
                text = format!("{text}; {}", words::any(self.rng, self.who));
            }
            match self.rng.chance(15) {
                true => put_malformed(self.rng, true, &mut self.out),
                false => self.query(&text),
            }
        }
        self.step(Wait::Ready(pipelined));
    }

    fn name(&self) -> &'static str {
        if self.rng.chance(20) {
            return &LONG_NAME;
        }
        ["", "", "s1", "s1", "s2", "s3"][self.rng.below(6)]
    }

    fn bind(&mut self, name: &str) {
        let mut body = BytesMut::new();
        body.put_u8(0);
        body.put_slice(name.as_bytes());
        body.put_u8(0);
        body.put_u16(0);
        match self.rng.chance(300) {
            true => {
                body.put_u16(1);
                body.put_i32(1);
                body.put_slice(b"7");
            }
            false => body.put_u16(0),
        }
        body.put_u16(0);
        self.message(b'B', &body);
    }

    fn message(&mut self, tag: u8, body: &[u8]) {
        self.out.put_u8(tag);
        self.out.put_u32(u32::try_from(body.len() + 4).unwrap_or(4));
        self.out.put_slice(body);
    }

    /// Prepares, executes, closes: each now and then without the others.
    fn messages(&mut self) {
        let name = self.name();
        if self.rng.chance(600) {
            if !name.is_empty() && self.rng.chance(500) {
                fits(frontend::put_close(Target::Statement(name.as_bytes()), &mut self.out));
            }
            let text = match self.rng.chance(700) {
                true => words::prepared(self.rng, self.who),
                false => words::any(self.rng, self.who),
            };
            if words::is_read_by_settings(&text) {
                return self.read_at_once(&text);
            }
            fits(frontend::put_parse(name.as_bytes(), text.as_bytes(), &[], &mut self.out));
        }
        if self.rng.chance(20) {
            put_malformed(self.rng, false, &mut self.out);
        }
        if self.rng.chance(200) {
            fits(frontend::put_describe(Target::Statement(name.as_bytes()), &mut self.out));
        }
        if self.rng.chance(900) {
            for _ in 0..1 + usize::from(self.rng.chance(150)) {
                self.bind(name);
                fits(frontend::put_execute(b"", 0, &mut self.out));
            }
        }
        if self.rng.chance(100) {
            fits(frontend::put_close(Target::Statement(name.as_bytes()), &mut self.out));
        }
        // The end of an empty statement must not look like a marker.
        fits(frontend::put_close(Target::Portal(b"none"), &mut self.out));
    }

    /// Prepares and executes a text whose literals are read under the time zone and date style of now: over a pool
    /// it may be read anew when these have changed (docs/pooling.md).
    fn read_at_once(&mut self, text: &str) {
        let name = b"w1";
        fits(frontend::put_close(Target::Statement(name), &mut self.out));
        fits(frontend::put_parse(name, text.as_bytes(), &[], &mut self.out));
        self.bind("w1");
        fits(frontend::put_execute(b"", 0, &mut self.out));
        fits(frontend::put_close(Target::Statement(name), &mut self.out));
        fits(frontend::put_close(Target::Portal(b"none"), &mut self.out));
    }

    fn extended(&mut self) {
        let batches = if self.rng.chance(300) { 2 + self.rng.below(3) } else { 1 };
        let mut ready = batches;
        for _ in 0..batches {
            for _ in 0..1 + self.rng.below(3) {
                self.messages();
            }
            frontend::put_sync(&mut self.out);
            if self.rng.chance(80) {
                let text = words::any(self.rng, self.who);
                self.query(&text);
                ready += 1;
            }
        }
        self.step(Wait::Ready(ready));
    }

    fn transaction(&mut self) {
        self.query("BEGIN");
        for _ in 0..2 + self.rng.below(4) {
            let text = match self.rng.chance(400) {
                true => words::transaction(self.rng).to_owned(),
                false => words::any(self.rng, self.who),
            };
            self.step(Wait::Ready(1));
            self.query(&text);
        }
        self.step(Wait::Ready(1));
        let end = ["COMMIT", "COMMIT", "ROLLBACK", "COMMIT AND CHAIN"][self.rng.below(4)];
        self.query(end);
        self.step(Wait::Ready(1));
    }

    /// A text that all prepare under settings of their own, and run again later: it is read as it was.
    fn reads_times(&mut self) {
        // Always the same for one client: over a pool the text may be read anew (docs/pooling.md).
        let zone = ["UTC", "Asia/Tokyo"][self.who.slot % 2];
        self.query(&format!("SET TimeZone = '{zone}'"));
        self.step(Wait::Ready(1));
        if self.rng.chance(400) {
            let text = b"SELECT count(*) FROM times WHERE at > '2024-01-01 03:00'";
            fits(frontend::put_close(Target::Statement(b"t1"), &mut self.out));
            fits(frontend::put_parse(b"t1", text, &[], &mut self.out));
        }
        fits(frontend::put_bind(b"", b"t1", &[], &mut self.out));
        fits(frontend::put_execute(b"", 0, &mut self.out));
        frontend::put_sync(&mut self.out);
        self.step(Wait::Ready(1));
    }

    /// Settings of a transaction, which count or do not, whichever way it ends.
    fn settings(&mut self) {
        let set = |rng: &Rng| words::sets_plainly(rng);
        let mut texts = vec!["BEGIN".to_owned()];
        if self.rng.chance(500) {
            texts.extend([set(self.rng), "SAVEPOINT a".to_owned(), set(self.rng)]);
            texts.push(
                ["ROLLBACK TO a", "ROLLBACK TO a", "RELEASE a"][self.rng.below(3)].to_owned(),
            );
        }
        if self.rng.chance(500) {
            texts.push(set(self.rng));
        }
        if self.rng.chance(100) {
            texts.push(words::fails(self.rng));
        }
        let ends =
            ["COMMIT", "ROLLBACK", "COMMIT AND CHAIN", "COMMIT AND CHAIN", "ROLLBACK AND CHAIN"];
        texts.push(ends[self.rng.below(5)].to_owned());
        if self.rng.chance(300) {
            texts.push(set(self.rng));
        }
        texts.push(["ROLLBACK", "ROLLBACK", "COMMIT"][self.rng.below(3)].to_owned());
        let pipelined = self.rng.chance(200);
        let count = texts.len();
        for text in texts {
            self.query(&text);
            if !pipelined {
                self.step(Wait::Ready(1));
            }
        }
        if pipelined {
            self.step(Wait::Ready(count));
        }
    }

    fn copies_in(&mut self) {
        let text = match self.who.writes {
            true => format!("COPY own{} (v) FROM STDIN", self.who.slot),
            false => "COPY nowhere FROM STDIN".to_owned(),
        };
        let extended = self.rng.chance(400);
        if extended {
            fits(frontend::put_parse(b"", text.as_bytes(), &[], &mut self.out));
            self.bind("");
            fits(frontend::put_execute(b"", 0, &mut self.out));
            frontend::put_flush(&mut self.out);
        } else {
            self.query(&text);
        }
        if self.rng.chance(600) {
            self.step(Wait::Tag(b"GE"));
        }
        for _ in 0..self.rng.below(4) {
            let line = ["line\n", "forbidden\n", "one\ttoo many\n", "x\ny\n"];
            let line = line[if self.rng.chance(800) { 0 } else { self.rng.below(4) }];
            self.message(b'd', line.as_bytes());
        }
        match self.rng.below(4) {
            0 => fits(frontend::put_copy_fail(b"no more", &mut self.out)),
            _ => frontend::put_copy_done(&mut self.out),
        }
        if extended {
            frontend::put_sync(&mut self.out);
        }
        self.step(Wait::Ready(1));
    }

    fn copies_out(&mut self) {
        let text = [
            "COPY (SELECT id, v FROM t ORDER BY id) TO STDOUT",
            "COPY (SELECT 1/(3-i) FROM generate_series(1, 5) i) TO STDOUT",
            "COPY (SELECT current_user, current_setting('work_mem')) TO STDOUT",
        ];
        self.query(text[self.rng.below(3)]);
        self.step(Wait::Ready(1));
    }

    /// `set_config`, `pg_advisory_lock`, `textlen`.
    fn calls_functions(&mut self) {
        let key = format!("{}", 1000 + self.who.session);
        let (oid, arguments): (u32, Vec<&str>) = match self.rng.below(4) {
            0 => (2078, vec!["my.tenant", "called", "false"]),
            1 => (2078, vec!["work_mem", "2MB", "f"]),
            2 => (2880, vec![&key]),
            _ => (1257, vec!["some text"]),
        };
        let mut body = BytesMut::new();
        body.put_u32(oid);
        body.put_u16(0);
        body.put_u16(u16::try_from(arguments.len()).unwrap_or(0));
        for argument in arguments {
            body.put_u32(u32::try_from(argument.len()).unwrap_or(0));
            body.put_slice(argument.as_bytes());
        }
        body.put_u16(0);
        self.message(b'F', &body);
        self.step(Wait::Ready(1));
    }

    /// Out of every COPY, batch and transaction; the session shows what it holds, and lets go of it.
    fn settle(&mut self, keeps: bool) {
        fits(frontend::put_copy_fail(b"over", &mut self.out));
        frontend::put_sync(&mut self.out);
        self.query("ROLLBACK");
        if self.rng.chance(400) {
            self.query(&words::look(self.who));
        }
        match (keeps && self.rng.chance(800), self.rng.chance(150)) {
            (true, _) => {}
            (false, true) => self.query("DISCARD ALL"),
            (false, false) => {
                // Who has set nothing gets a connection as it is.
                if self.rng.chance(300) {
                    self.query("RESET ALL");
                }
                for text in words::LET_GO {
                    self.query(text);
                }
            }
        }
        put_marker(&mut self.out);
        self.step(Wait::Marker);
    }

    /// Ends in the middle of data for a COPY that has failed, with the error or before it.
    fn leaves_in_a_copy(&mut self) {
        fits(frontend::put_copy_fail(b"over", &mut self.out));
        frontend::put_sync(&mut self.out);
        self.query("ROLLBACK");
        // Nothing else is left that would have the connection reset.
        self.query("DISCARD ALL");
        put_marker(&mut self.out);
        self.step(Wait::Marker);
        self.query("COPY nowhere FROM STDIN");
        self.message(b'd', &[b'x'; 300]);
        let cut = 1 + self.rng.below(290);
        let len = self.out.len();
        self.out.truncate(len - cut);
        let wait = if self.rng.chance(500) { Wait::Ready(1) } else { Wait::None };
        self.step(wait);
    }

    /// Ends at any byte of any step; nothing behind it is answered.
    fn cut(&mut self) {
        let last = self.rng.below(self.steps.len());
        self.steps.truncate(last + 1);
        if let Some(step) = self.steps.last_mut() {
            step.bytes.truncate(self.rng.below(step.bytes.len() + 1));
            step.pieces.clear();
            step.wait = Wait::None;
        }
    }
}
