//! One event is one line, whatever is in it.
//!
//! Names of roles, words of servers and of other programs come from outside, and whoever reads a log
//! line by line must not be told things by them: what ends a line, moves the cursor or turns the
//! direction of writing is written as an escape. It is done here, once, for every event of every part
//! of the program.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};

use kornak_cluster::discard;
use tracing_subscriber::fmt::MakeWriter;

/// Makes writers that do so.
#[derive(Debug)]
pub(super) struct OneLine<M> {
    pub(super) inner: M,
    /// The formatter colours lines; it has escaped the values itself.
    pub(super) colours: bool,
}

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for OneLine<M> {
    type Writer = Escaping<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Escaping { inner: self.inner.make_writer(), colours: self.colours }
    }
}

/// Writes one event in each write.
#[derive(Debug)]
pub(super) struct Escaping<W> {
    inner: W,
    colours: bool,
}

impl<W: Write> Write for Escaping<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        self.inner.write_all(one_line(&text, self.colours).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Whether a letter does something to what is around it.
fn acts(letter: char, colours: bool) -> bool {
    match letter {
        '\t' => false,
        '\x1b' => !colours,
        // Line and paragraph separators; what turns the direction of writing, or hides.
        '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' => true,
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        letter => letter.is_control(),
    }
}

fn one_line(event: &str, colours: bool) -> Cow<'_, str> {
    let (line, end) = match event.strip_suffix('\n') {
        Some(line) => (line, "\n"),
        None => (event, ""),
    };
    if !line.contains(|letter| acts(letter, colours)) {
        return Cow::Borrowed(event);
    }
    let mut out = String::with_capacity(event.len() + 16);
    for letter in line.chars() {
        discard::string_takes_all(match letter {
            '\n' => out.write_str("\\n"),
            '\r' => out.write_str("\\r"),
            // As in JSON, since the line may be an object.
            letter if acts(letter, colours) => write!(out, "\\u{:04x}", u32::from(letter)),
            letter => out.write_char(letter),
        });
    }
    out.push_str(end);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_an_event_ends_its_line_or_changes_how_it_is_read() {
        for (event, expected) in [
            ("a b\n", "a b\n"),
            ("role=x\n2026 INFO forged\n", "role=x\\n2026 INFO forged\n"),
            ("a\r\nb\n", "a\\r\\nb\n"),
            ("a\tb\n", "a\tb\n"),
            ("a\u{b}\u{c}\u{1c}\u{85}b\n", "a\\u000b\\u000c\\u001c\\u0085b\n"),
            ("a\u{2028}b\u{202e}c\n", "a\\u2028b\\u202ec\n"),
            ("\x1b[2Jé\n", "\\u001b[2Jé\n"),
            ("\n\n", "\\n\n"),
            ("no end", "no end"),
        ] {
            assert_eq!(one_line(event, false), expected, "{event:?}");
        }
        assert_eq!(one_line("\x1b[2mx\x1b[0m\ny\n", true), "\x1b[2mx\x1b[0m\\ny\n");
        let mut written = Vec::new();
        let mut writer = Escaping { inner: &mut written, colours: false };
        writer.write_all(b"x\ny\n").unwrap();
        assert_eq!(written, b"x\\ny\n");
    }
}
