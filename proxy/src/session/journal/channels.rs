//! The channels that a session listens on, so that it can listen on them elsewhere.
//!
//! Names are read as the server reads them; whatever is not plainly `LISTEN name` is not understood,
//! and the session is pinned. What functions listened on is asked of the server ([`super::Examined`]).

use bytes::BytesMut;
use kornak_protocol::frontend::{self, Token, Tokens};

/// Channels followed of one session; a name is of 63 bytes at most.
const MAX_CHANNELS: usize = 256;

/// PostgreSQL's NAMEDATALEN, without the end: longer names are cut, where depends on the encoding.
const MAX_NAME: usize = 63;

/// The channel that a statement names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Named {
    One(Box<[u8]>),
    /// `UNLISTEN *`.
    All,
}

/// Reads `LISTEN name`, `UNLISTEN name` or `UNLISTEN *`.
pub(super) fn named(text: &[u8]) -> Option<Named> {
    let tokens: Vec<_> = Tokens::new(text).take(4).collect();
    let [verb, name, end @ ..] = &tokens[..] else { return None };
    if !verb.is(b"listen") && !verb.is(b"unlisten") || !matches!(end, [] | [Token::Other(b';')]) {
        return None;
    }
    if *name == Token::Other(b'*') {
        return Some(Named::All);
    }
    // Where a longer name is cut depends on the encoding, and how other letters are folded on more.
    let is_plain = match name {
        Token::Word(word) => word.is_ascii(),
        _ => true,
    };
    let name = name.name().filter(|name| is_plain && name.len() <= MAX_NAME)?;
    Some(Named::One(name.into_boxed_slice()))
}

/// A set of channels.
#[derive(Debug, Default)]
pub(super) struct Channels(Vec<Box<[u8]>>);

impl Channels {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Answers false if there are too many.
    pub(super) fn add(&mut self, name: Box<[u8]>) -> bool {
        if self.0.contains(&name) {
            return true;
        }
        let fits = self.0.len() < MAX_CHANNELS;
        if fits {
            self.0.push(name);
        }
        fits
    }

    pub(super) fn remove(&mut self, name: &[u8]) {
        self.0.retain(|known| **known != *name);
    }

    pub(super) fn clear(&mut self) {
        self.0 = Vec::new();
    }

    /// Takes over what a server says: a number, `\x02`, and so many names, separated by `\x01`.
    /// Answers false if that is not understood.
    pub(super) fn adopt(&mut self, list: &[u8]) -> bool {
        let Some(at) = memchr::memchr(2, list) else { return false };
        let (count, names) = list.split_at_checked(at).unwrap_or_default();
        let names = names.get(1..).unwrap_or_default();
        let names: Vec<_> =
            names.split(|byte| *byte == 1).filter(|name| !name.is_empty()).map(Box::from).collect();
        let expected = std::str::from_utf8(count).ok().and_then(|count| count.parse().ok());
        let understood = expected == Some(names.len()) && names.len() <= MAX_CHANNELS;
        if understood {
            self.0 = names;
        }
        understood
    }

    /// Appends the statements that listen again; answers how many.
    pub(super) fn put(&self, out: &mut BytesMut) -> usize {
        let mut owed = 0;
        for name in &self.0 {
            let mut text = b"LISTEN \"".to_vec();
            for byte in name {
                if *byte == b'"' {
                    text.push(b'"');
                }
                text.push(*byte);
            }
            text.push(b'"');
            if frontend::put_query(&text, out).is_ok() {
                owed += 1;
            }
        }
        owed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_the_server_reads_them() {
        for (text, name) in [
            ("LISTEN orders", Some("orders")),
            (" listen Orders_2 ; ", Some("orders_2")),
            ("LISTEN \"Or\"\"ders; x\"", Some("Or\"ders; x")),
            ("unlisten\"a\"", Some("a")),
            ("LISTEN a, b", None),
            ("LISTEN a; LISTEN b", None),
            ("LISTEN /* x */ a", Some("a")),
            ("/* x */ LISTEN a", Some("a")),
            ("LISTEN U&\"a\"", None),
            ("LISTEN \"a\" \"b\"", None),
            ("LISTEN \"\"", None),
            ("LISTEN é", None),
            ("LISTENa", None),
        ] {
            let read = name.map(|name| Named::One(name.as_bytes().into()));
            assert_eq!(named(text.as_bytes()), read, "{text}");
        }
        assert_eq!(named(b"UNLISTEN *"), Some(Named::All));
        assert_eq!(named(format!("LISTEN {}", "a".repeat(64)).as_bytes()), None, "would be cut");
    }

    #[test]
    fn what_is_listened_on_is_said_again_in_quotes() {
        let mut channels = Channels::default();
        assert!(channels.add(b"a"[..].into()) && channels.add(b"a"[..].into()));
        assert!(channels.add(b"B\"c"[..].into()));
        let mut out = BytesMut::new();
        assert_eq!(channels.put(&mut out), 2);
        let mut expected = BytesMut::new();
        frontend::put_query(b"LISTEN \"a\"", &mut expected).unwrap();
        frontend::put_query(b"LISTEN \"B\"\"c\"", &mut expected).unwrap();
        assert_eq!(out, expected);
    }

    #[test]
    fn a_list_that_does_not_add_up_is_not_taken_over() {
        let mut channels = Channels::default();
        assert!(channels.adopt(b"2\x02a\x01b") && channels.0.len() == 2);
        assert!(!channels.adopt(b"1\x02a\x01b"));
        assert!(!channels.adopt(b""));
        assert!(channels.adopt(b"0\x02") && channels.is_empty());
    }
}
