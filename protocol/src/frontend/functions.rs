//! Which functions a text calls, as far as it can be told without a catalog.
//!
//! A function of an application may set parameters, lock, listen or make tables in its session, and no
//! command tag shows it. PostgreSQL's own functions are known: the list beside this file has those that are
//! immutable or stable in PostgreSQL 15 and can be called by name, the volatile ones that leave nothing in a
//! session, a few of PostgreSQL's extensions, and the words of the grammar that stand before a parenthesis.

use std::collections::HashSet;
use std::sync::LazyLock;

use super::tokens::{Token, Tokens};

static KNOWN: LazyLock<HashSet<&'static [u8]>> =
    LazyLock::new(|| include_str!("functions.txt").split_whitespace().map(str::as_bytes).collect());

/// The longest name on the list.
const MAX_KNOWN: usize = 64;

/// Families of names whose members leave nothing in a session, as far as
/// [`super::may_touch_session_state`] does not say otherwise.
const FAMILIES: [&[u8]; 3] = [b"pg_", b"st_", b"has_"];

/// Words behind which a name with a parenthesis is a table with its columns, not a call.
const TABLES: [&[u8]; 9] =
    [b"into", b"table", b"copy", b"references", b"update", b"exists", b"with", b"recursive", b"as"];

/// Whether a text calls a function that may be of an application's own making. A text that cannot be
/// followed for certain is taken to do so.
pub fn calls_unknown(sql: &[u8]) -> bool {
    // Most texts have no call at all.
    if memchr::memchr(b'(', sql).is_none() {
        return false;
    }
    // The word that begins the name before the parenthesis, and the one before that.
    let (mut name, mut before): (Option<Name<'_>>, &[u8]) = (None, b"");
    let mut last: &[u8] = b"";
    let mut joined = false;
    for token in Tokens::new(sql) {
        match token {
            Token::Word(word) | Token::Quoted(word) => {
                let plain = matches!(token, Token::Word(_));
                match (&mut name, joined) {
                    (Some(name), true) => {
                        name.schema = Some(name.last);
                        (name.last, name.plain) = (word, plain);
                    }
                    _ => {
                        before = std::mem::replace(&mut last, word);
                        name = Some(Name { schema: None, last: word, plain });
                    }
                }
                joined = false;
            }
            Token::Other(b'.') => joined = name.is_some(),
            Token::Other(b'(') => {
                if let Some(name) = name.take()
                    && !name.is_known(before)
                {
                    return true;
                }
                last = b"";
                joined = false;
            }
            Token::Doubt => return true,
            _ => {
                name = None;
                last = b"";
                joined = false;
            }
        }
    }
    false
}

struct Name<'a> {
    schema: Option<&'a [u8]>,
    last: &'a [u8],
    plain: bool,
}

impl Name<'_> {
    fn is_known(&self, before: &[u8]) -> bool {
        if TABLES.iter().any(|word| before.eq_ignore_ascii_case(word)) {
            return true;
        }
        if self.schema.is_some_and(|schema| !schema.eq_ignore_ascii_case(b"pg_catalog")) {
            return false;
        }
        let mut folded = [0u8; MAX_KNOWN];
        let Some(folded) = folded.get_mut(..self.last.len()) else { return false };
        folded.copy_from_slice(self.last);
        if self.plain {
            folded.make_ascii_lowercase();
        }
        let folded = &*folded;
        FAMILIES.iter().any(|family| folded.starts_with(family)) || KNOWN.contains(folded)
    }
}
