//! Parameters with names of an application's own (`my.tenant`). No server lists them, so the names
//! have to be known to ask for their values.

use kornak_protocol::frontend::{self, Token, Tokens};

use super::context::matters;
use super::{Journal, Pin, text};

/// Names followed of one session.
const MAX_NAMES: usize = 64;

const FUNCTION: &[u8] = b"set_config";

/// A call of `set_config` in a text.
#[derive(Debug, PartialEq, Eq)]
struct Call<'a> {
    /// The call's first argument, if that is a plain literal.
    name: Option<&'a [u8]>,
    /// The call's third argument says that the setting is over with the transaction.
    is_local: bool,
}

/// The calls of `set_config` in a text.
fn set_by_function(sql: &[u8], mut found: impl FnMut(&Call<'_>)) {
    let lower = sql.to_ascii_lowercase();
    for at in memchr::memmem::find_iter(&lower, FUNCTION) {
        found(&call(sql.get(at + FUNCTION.len()..).unwrap_or_default()));
    }
}

fn call(rest: &[u8]) -> Call<'_> {
    let unknown = Call { name: None, is_local: false };
    let mut tokens = Tokens::new(rest);
    if tokens.next() != Some(Token::Other(b'(')) {
        return unknown;
    }
    let mut arguments: [Vec<Token<'_>>; 3] = Default::default();
    let (mut at, mut depth) = (0, 1u32);
    for token in tokens {
        match token {
            Token::Other(b'(') => depth += 1,
            Token::Other(b')') => depth -= 1,
            Token::Doubt => return unknown,
            _ => {}
        }
        match (token, depth) {
            (_, 0) => break,
            (Token::Other(b','), 1) => at += 1,
            _ => match arguments.get_mut(at) {
                Some(argument) => argument.push(token),
                None => return unknown,
            },
        }
    }
    let [name, _, third] = &arguments;
    let name = literal(name).and_then(|it| it.strip_prefix(b"'")?.strip_suffix(b"'"));
    let is_local = matches!(&third[..], [word] if word.is(b"true"));
    Call { name: name.filter(|name| name.iter().all(|byte| is_of_name(*byte))), is_local }
}

/// An argument that is a literal and nothing else.
fn literal<'a>(argument: &[Token<'a>]) -> Option<&'a [u8]> {
    let [Token::Literal(literal), cast @ ..] = argument else { return None };
    let is_text = matches!(cast, [Token::Other(b':'), Token::Other(b':'), it] if it.is(b"text"));
    (cast.is_empty() || is_text).then_some(literal)
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$')
}

/// Whether all that a suspicious text sets is over with its transaction: `set_config(…, …, true)`, and nothing
/// else that raised the suspicion.
pub(super) fn is_of_transaction(sql: &[u8]) -> bool {
    let (mut any, mut all) = (false, true);
    set_by_function(sql, |call| {
        any = true;
        all &= call.is_local;
    });
    if !any || !all {
        return false;
    }
    let mut rest = sql.to_vec();
    for at in memchr::memmem::find_iter(&sql.to_ascii_lowercase(), FUNCTION) {
        rest.get_mut(at..at + FUNCTION.len()).unwrap_or_default().fill(b'x');
    }
    !frontend::may_touch_session_state(&rest)
}

/// Whether a text may set, by function, what changes the meaning of later texts.
pub(super) fn reads_otherwise(sql: &[u8]) -> bool {
    let mut otherwise = false;
    set_by_function(sql, |call| {
        otherwise |= call.name.is_none_or(|name| matters(&name.to_ascii_lowercase()));
    });
    otherwise
}

/// The first argument of a function call message, if it is text.
pub(super) fn argument(body: &[u8]) -> Option<Vec<u8>> {
    let (_, rest) = body.split_first_chunk::<4>()?;
    let (formats, rest) = rest.split_first_chunk::<2>()?;
    let rest = rest.get(2 * usize::from(u16::from_be_bytes(*formats))..)?;
    let (_, rest) = rest.split_first_chunk::<2>()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let name = rest.get(..usize::try_from(u32::from_be_bytes(*len)).ok()?)?;
    name.iter().all(|byte| is_of_name(*byte)).then(|| name.to_ascii_lowercase())
}

impl Journal {
    /// Notes which parameters of its own a text sets by function.
    pub(super) fn note_custom(&mut self, sql: &[u8]) {
        let (names, mut unseen) = (&mut self.custom, false);
        set_by_function(sql, |call| match call.name {
            None => unseen = true,
            Some(name) if !name.contains(&b'.') => {}
            Some(name) => unseen |= !add(names, name),
        });
        self.unseen |= unseen;
    }

    /// Notes which parameters of its own a text sets by SET, wherever that stands in it. Answers whether
    /// there may be others.
    pub(super) fn note_sets(&mut self, sql: &[u8]) -> bool {
        let (names, mut unseen) = (&mut self.custom, false);
        text::sets(sql, |name| match name {
            None => unseen = true,
            Some(name) if !name.contains(&b'.') => {}
            Some(name) => unseen |= !add(names, &name),
        });
        unseen
    }

    /// Notes the settings in a text that is executed: DO.
    pub(super) fn note_executed(&mut self, sql: &[u8]) {
        if self.note_sets(sql) {
            self.pins.add(Pin::Opaque);
            self.unseen = true;
        }
    }

    /// Notes the name of a parameter that was set.
    pub(super) fn note_name(&mut self, name: &[u8]) {
        if name.contains(&b'.') && !add(&mut self.custom, name) {
            self.pins.add(Pin::Opaque);
            self.unseen = true;
        }
    }

    /// Names of parameters of its own that the session may have set.
    pub fn custom(&self) -> impl Iterator<Item = &[u8]> {
        let set = self.settings.iter().map(|(name, _)| &**name).filter(|it| it.contains(&b'.'));
        set.chain(self.custom.iter().map(|name| &**name))
    }
}

/// Answers false if there are too many.
fn add(names: &mut Vec<Box<[u8]>>, name: &[u8]) -> bool {
    let name = name.to_ascii_lowercase().into_boxed_slice();
    let fits = names.contains(&name) || names.len() < MAX_NAMES;
    if fits && !names.contains(&name) {
        names.push(name);
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_from_a_plain_literal_only() {
        let calls = |sql: &str| {
            let mut calls = Vec::new();
            set_by_function(sql.as_bytes(), |call| {
                let name = call.name.map(|name| String::from_utf8_lossy(name).into_owned());
                calls.push((name, call.is_local));
            });
            calls
        };
        let some = |name: &str, is_local| (Some(name.to_owned()), is_local);
        assert_eq!(calls("SELECT set_config('my.a', $1, true)"), [some("my.a", true)]);
        assert_eq!(calls("SELECT set_config('my.a', f(1, 2), $1)"), [some("my.a", false)]);
        assert_eq!(calls("SELECT set_config('my.a'::text, 'x', TRUE)"), [some("my.a", true)]);
        assert_eq!(
            calls("select pg_catalog.SET_CONFIG ( 'My.B' , 'x', false), set_config('c', '', true)"),
            [some("My.B", false), some("c", true)]
        );
        assert_eq!(calls("SELECT set_config /* */ ('a.b', 'x', false)"), [some("a.b", false)]);
        for sql in [
            "SELECT set_config($1, 'x', false)",
            "SELECT set_config('a.b' || 'c', 'x', false)",
            "SELECT set_config('a.b' 'c', 'x', false)",
            "SELECT set_config('a''b', 'x', false)",
            "SELECT set_config(E'a.b', 'x', false)",
            "SELECT \"set_config\"('a.b', 'x', false)",
        ] {
            assert_eq!(calls(sql), [(None, false)], "{sql}");
        }
    }

    #[test]
    fn what_ends_with_its_transaction_keeps_nothing() {
        for (sql, of_transaction) in [
            (
                "SELECT set_config('role', $1, true), set_config('request.jwt.claims', $2, true)",
                true,
            ),
            ("SELECT set_config('a.b', $1, false)", false),
            ("SELECT set_config('a.b', $1, $2)", false),
            ("SELECT set_config('a.b', $1, true), pg_advisory_lock(1)", false),
            ("SELECT pg_advisory_lock(1)", false),
        ] {
            assert_eq!(is_of_transaction(sql.as_bytes()), of_transaction, "{sql}");
        }
        assert!(reads_otherwise(b"SELECT set_config('search_path', $1, true)"));
        assert!(!reads_otherwise(b"SELECT set_config('a.b', $1, true)"));
    }

    #[test]
    fn the_name_in_a_function_call_is_found() {
        let body = b"\0\0\x08\x1e\0\x01\0\0\0\x03\0\0\0\x04My.a\0\0\0\x01x";
        assert_eq!(argument(body), Some(b"my.a".to_vec()));
        assert_eq!(argument(&body[..12]), None);
    }
}
