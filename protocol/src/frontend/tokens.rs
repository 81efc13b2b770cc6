//! The tokens of a text, as PostgreSQL's scanner cuts them, as far as they matter to a session.
//!
//! Whether a backslash in a plain literal is an escape is a setting (`standard_conforming_strings`) that a
//! text does not show: a literal that ends in the same place either way is followed, another is a doubt.

use std::ops::Range;

use super::StatementKind;
use super::sql::{is_more, is_word, skip_blank, skip_dollar, statement_kind};

/// One token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    /// A word without quotes: a keyword or an identifier.
    Word(&'a [u8]),
    /// Text between the quotes of an identifier; doubled quotes are still doubled.
    Quoted(&'a [u8]),
    /// A literal of any kind, as it is written, or a number.
    Literal(&'a [u8]),
    /// Any other character.
    Other(u8),
    /// The text cannot be followed for certain from here on.
    Doubt,
}

impl Token<'_> {
    /// Whether this is an unquoted word, in whatever case.
    pub fn is(&self, word: &[u8]) -> bool {
        matches!(self, Self::Word(own) if own.eq_ignore_ascii_case(word))
    }

    /// The name that an identifier stands for: folded to lower case, or without its quotes.
    pub fn name(&self) -> Option<Vec<u8>> {
        match self {
            Self::Word(word) => Some(word.to_ascii_lowercase()),
            Self::Quoted([]) => None,
            Self::Quoted(inner) => {
                let mut name = Vec::with_capacity(inner.len());
                let mut bytes = inner.iter();
                while let Some(byte) = bytes.next() {
                    name.push(*byte);
                    if *byte == b'"' {
                        bytes.next();
                    }
                }
                Some(name)
            }
            Self::Literal(_) | Self::Other(_) | Self::Doubt => None,
        }
    }
}

/// Cuts a text into tokens; blanks and comments are skipped. Nothing follows [`Token::Doubt`].
#[derive(Debug, Clone)]
pub struct Tokens<'a> {
    sql: &'a [u8],
    rest: &'a [u8],
    begin: usize,
}

impl<'a> Tokens<'a> {
    /// From the beginning of a text.
    pub fn new(sql: &'a [u8]) -> Self {
        Self { sql, rest: sql, begin: 0 }
    }

    /// Text behind the last token.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Where the last token begins and ends in the text.
    pub fn span(&self) -> Range<usize> {
        self.begin..self.sql.len() - self.rest.len()
    }

    fn doubt(&mut self) -> Token<'a> {
        self.rest = &[];
        Token::Doubt
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (token, rest) = self.rest.split_at_checked(len).unwrap_or((self.rest, &[]));
        self.rest = rest;
        token
    }

    fn word(&mut self) -> Token<'a> {
        let goes_on = |byte: &u8| is_word(*byte) || *byte == b'$';
        let end = self.rest.iter().position(|byte| !goes_on(byte)).unwrap_or(self.rest.len());
        let (word, after) = self.rest.split_at_checked(end).unwrap_or_default();
        match (word, after) {
            (b"e" | b"E", [b'\'', ..]) => self.literal(1, true),
            (b"b" | b"B" | b"x" | b"X" | b"n" | b"N", [b'\'', ..]) => self.literal(1, false),
            (b"u" | b"U", [b'&', b'\'', ..]) => self.literal(2, false),
            // Escapes can spell any name.
            (b"u" | b"U", [b'&', b'"', ..]) => self.doubt(),
            _ => Token::Word(self.take(end)),
        }
    }

    /// A literal whose quote stands behind a prefix of this length.
    fn literal(&mut self, prefix: usize, escapes: bool) -> Token<'a> {
        let body = self.rest.get(prefix + 1..).unwrap_or_default();
        let end = match escapes {
            true => literal_end(body, true),
            false => {
                let plain = literal_end(body, false);
                let has_escapes = plain
                    .and_then(|end| body.get(..end))
                    .is_some_and(|body| memchr::memchr(b'\\', body).is_some());
                match has_escapes && literal_end(body, true) != plain {
                    true => None,
                    false => plain,
                }
            }
        };
        match end {
            Some(end) => Token::Literal(self.take(prefix + 1 + end)),
            None => self.doubt(),
        }
    }

    fn quoted(&mut self) -> Token<'a> {
        let body = self.rest.get(1..).unwrap_or_default();
        let mut end = 0;
        loop {
            let Some(at) = body.get(end..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest))
            else {
                return self.doubt();
            };
            end += at + 1;
            match (body.get(end - 1), body.get(end)) {
                // In some encodings it is the second byte of a character.
                (Some(b'\\'), _) => return self.doubt(),
                (_, Some(b'"')) => end += 1,
                _ => break,
            }
        }
        let token = self.take(end + 1);
        Token::Quoted(token.get(1..end).unwrap_or_default())
    }

    fn number(&mut self) -> Token<'a> {
        let goes_on = |byte: &u8| is_word(*byte) || *byte == b'.';
        let end = self.rest.iter().position(|byte| !goes_on(byte)).unwrap_or(self.rest.len());
        // `1$$` opens a quote, `1a$$` does so in some versions.
        if self.rest.get(end) == Some(&b'$') {
            return self.doubt();
        }
        Token::Literal(self.take(end))
    }
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        let (rest, whole) = skip_blank(self.rest);
        if !whole {
            return Some(self.doubt());
        }
        self.rest = rest;
        self.begin = self.sql.len() - rest.len();
        Some(match *rest.first()? {
            b'\'' => self.literal(0, false),
            b'"' => self.quoted(),
            b'$' => match skip_dollar(rest.get(1..).unwrap_or_default()) {
                Ok(after) if rest.len() - after.len() > 1 => {
                    Token::Literal(self.take(rest.len() - after.len()))
                }
                Ok(_) => {
                    self.take(1);
                    Token::Other(b'$')
                }
                Err(()) => self.doubt(),
            },
            byte if byte.is_ascii_digit() => self.number(),
            byte if is_word(byte) => self.word(),
            byte => {
                self.take(1);
                Token::Other(byte)
            }
        })
    }
}

/// Where a literal ends whose opening quote was taken off: one past its closing quote.
fn literal_end(body: &[u8], escapes: bool) -> Option<usize> {
    let mut at = 0;
    loop {
        at += memchr::memchr2(b'\'', b'\\', body.get(at..)?)?;
        match (body.get(at)?, body.get(at + 1)) {
            (b'\\', _) if escapes => at += 2,
            (b'\'', Some(b'\'')) => at += 2,
            (b'\'', _) => return Some(at + 1),
            _ => at += 1,
        }
    }
}

/// Where the statements of a text stand, each without the semicolon behind it; a server answers each that is
/// not empty. `None` if the text cannot be taken apart for certain.
pub fn statements(sql: &[u8]) -> Option<Vec<Range<usize>>> {
    let mut list = Vec::new();
    let mut begin = 0;
    let mut tokens = Tokens::new(sql);
    while let Some(token) = tokens.next() {
        match token {
            Token::Doubt => return None,
            Token::Other(b';') => {
                let span = tokens.span();
                list.push(begin..span.start);
                begin = span.end;
            }
            _ => {}
        }
    }
    list.push(begin..sql.len());
    let text = |range: &Range<usize>| sql.get(range.clone()).unwrap_or_default();
    list.retain(|range| is_more(text(range)));
    for range in &mut list {
        range.start = range.end - text(range).trim_ascii_start().len();
    }
    // Bodies with semicolons of their own.
    let has_body = |range: &Range<usize>| {
        let kind = statement_kind(text(range));
        matches!(kind, StatementKind::Create | StatementKind::CreateTemp)
            && Tokens::new(text(range)).any(|token| token.is(b"atomic") || token.is(b"rule"))
    };
    (list.len() < 2 || !list.iter().any(has_body)).then_some(list)
}
