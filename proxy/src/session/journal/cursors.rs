//! Cursors WITH HOLD, which outlive their transaction: the session is pinned while it has one.
//!
//! A cursor that was declared is certain once its transaction is committed, and gone if that is rolled
//! back; one that was closed stays closed, whatever becomes of the transaction.

/// Names kept of one session; a driver has one or two at a time.
const MAX_CURSORS: usize = 64;

type Name = Box<[u8]>;

/// The cursors that a session may have declared WITH HOLD.
#[derive(Debug, Default)]
pub(super) struct Cursors {
    /// Of transactions that are over.
    held: Vec<Name>,
    /// Of the transaction that is open.
    fresh: Vec<Name>,
    /// Declared before a ROLLBACK, which may have been one to a savepoint.
    doubtful: Vec<Name>,
    /// There may be one whose name is not known.
    unnamed: bool,
    /// A text of which a part is not known, or of several statements, may have declared one.
    may_hold: bool,
}

impl Cursors {
    /// Whether there may be one.
    pub(super) fn is_any(&self) -> bool {
        let known = [&self.held, &self.fresh, &self.doubtful];
        self.unnamed || known.into_iter().any(|names| !names.is_empty())
    }

    /// Whether there may be one that outlives the transaction that is open, if one is.
    pub(super) fn is_any_held(&self) -> bool {
        self.unnamed || !self.held.is_empty()
    }

    /// A text is sent that will not be at hand when its statements are answered.
    pub(super) fn unfollowed(&mut self, sql: &[u8], is_whole: bool) {
        self.may_hold = self.may_hold || !is_whole || mentions_hold(sql);
    }

    /// DECLARE was answered.
    pub(super) fn declared(&mut self, text: Option<&[u8]>) {
        let Some(text) = text else {
            self.unnamed |= self.may_hold;
            return;
        };
        match declaration(text) {
            Some(Declared { holds: false, .. }) => {}
            Some(Declared { name, .. }) if self.fresh.len() + self.held.len() < MAX_CURSORS => {
                self.fresh.push(name);
            }
            _ => self.unnamed = true,
        }
    }

    /// CLOSE of one cursor was answered.
    pub(super) fn closed(&mut self, text: Option<&[u8]>) {
        let Some(name) = text.and_then(closing) else {
            // Whichever it was: those that are left are taken for open.
            return;
        };
        for names in [&mut self.held, &mut self.fresh, &mut self.doubtful] {
            names.retain(|known| *known != name);
        }
    }

    /// The open transaction was committed.
    pub(super) fn committed(&mut self) {
        let Self { held, fresh, doubtful, .. } = self;
        held.append(doubtful);
        held.append(fresh);
    }

    /// ROLLBACK was answered, which may have gone to a savepoint only.
    pub(super) fn rolled_back(&mut self) {
        self.doubtful.append(&mut self.fresh);
    }

    /// The open transaction was rolled back as a whole.
    pub(super) fn dropped(&mut self) {
        self.fresh.clear();
        self.doubtful.clear();
    }

    /// ReadyForQuery. `failed`: an error was answered since the last one.
    pub(super) fn ready(&mut self, is_idle: bool, failed: bool) {
        if !is_idle {
            self.fresh.append(&mut self.doubtful);
            return;
        }
        self.doubtful.clear();
        if failed {
            self.fresh.clear();
        }
        self.committed();
    }

    /// The server has said whether there is one.
    pub(super) fn examined(&mut self, found: bool) {
        if !found {
            *self = Self::default();
        } else if !self.is_any() {
            self.unnamed = true;
        }
    }
}

/// Whether the word may be in the text; a comment or a literal counts as well.
fn mentions_hold(sql: &[u8]) -> bool {
    sql.windows(4).any(|four| four.eq_ignore_ascii_case(b"hold")) || sql.contains(&b'\\')
}

#[derive(Debug, PartialEq, Eq)]
struct Declared {
    name: Name,
    holds: bool,
}

/// The cursor that a single DECLARE makes; `None` if it cannot be told.
fn declaration(text: &[u8]) -> Option<Declared> {
    let mut tokens = Tokens { rest: text };
    if tokens.word()? != b"declare" {
        return None;
    }
    let name = tokens.name()?;
    let mut before = Vec::new();
    loop {
        let word = tokens.word()?;
        match word.as_slice() {
            // What follows is the query, whatever words it has.
            b"for" => return Some(Declared { name, holds: false }),
            b"hold" if before == b"with" => return Some(Declared { name, holds: true }),
            b"hold" if before == b"without" => return Some(Declared { name, holds: false }),
            b"binary" | b"asensitive" | b"insensitive" | b"no" | b"scroll" | b"cursor"
            | b"with" | b"without" => before = word,
            _ => return None,
        }
    }
}

/// The name that a single CLOSE has.
fn closing(text: &[u8]) -> Option<Name> {
    let mut tokens = Tokens { rest: text };
    if tokens.word()? != b"close" {
        return None;
    }
    tokens.name()
}

/// Words and quoted names from the front; blanks and comments are skipped.
struct Tokens<'a> {
    rest: &'a [u8],
}

impl Tokens<'_> {
    fn skip_blank(&mut self) -> Option<()> {
        loop {
            match self.rest {
                [byte, rest @ ..] if byte.is_ascii_whitespace() || *byte == 0x0b => {
                    self.rest = rest;
                }
                [b'-', b'-', rest @ ..] => {
                    let end = memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
                    self.rest = rest.get(end..)?;
                }
                [b'/', b'*', rest @ ..] => {
                    let end = memchr::memmem::find(rest, b"*/")?;
                    // One that has another inside is not followed.
                    if memchr::memmem::find(rest.get(..end)?, b"/*").is_some() {
                        return None;
                    }
                    self.rest = rest.get(end + 2..)?;
                }
                _ => return Some(()),
            }
        }
    }

    /// An unquoted word, in lower case.
    fn word(&mut self) -> Option<Vec<u8>> {
        self.skip_blank()?;
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$');
        let end = self.rest.iter().position(|byte| !is_word(byte)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at_checked(end).filter(|(word, _)| !word.is_empty())?;
        self.rest = rest;
        Some(word.to_ascii_lowercase())
    }

    /// A name as the server has it; none that it would cut, or that has other letters than ASCII's.
    fn name(&mut self) -> Option<Name> {
        self.skip_blank()?;
        let name = match self.rest {
            [b'"', rest @ ..] => {
                let mut rest = rest;
                let mut name = Vec::new();
                loop {
                    let at = memchr::memchr(b'"', rest)?;
                    name.extend_from_slice(rest.get(..at)?);
                    rest = rest.get(at + 1..)?;
                    match rest {
                        [b'"', after @ ..] => {
                            name.push(b'"');
                            rest = after;
                        }
                        _ => break,
                    }
                }
                self.rest = rest;
                name
            }
            [b'u' | b'U', b'&', ..] => return None,
            _ => self.word()?,
        };
        (name.is_ascii() && name.len() < 64).then(|| name.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_with_hold_outlives_its_transaction() {
        let query = "FOR SELECT 'with hold', hold FROM with_hold";
        for (head, holds) in [
            ("DECLARE c CURSOR", Some(false)),
            ("DECLARE c CURSOR WITHOUT HOLD", Some(false)),
            ("declare c cursor with hold", Some(true)),
            ("DECLARE c BINARY NO SCROLL CURSOR WITH HOLD", Some(true)),
            ("/* hold */ DECLARE /* with hold */ c -- with hold\n CURSOR", Some(false)),
            ("DECLARE \"c\" INSENSITIVE SCROLL CURSOR WITH/**/HOLD", Some(true)),
            ("DECLARE U&\"c\" CURSOR", None),
        ] {
            let found = declaration(format!("{head} {query}").as_bytes());
            assert_eq!(found.as_ref().map(|it| it.holds), holds, "{head}");
            assert!(found.is_none_or(|it| *it.name == *b"c"), "{head}");
        }
    }

    #[test]
    fn a_cursor_that_is_closed_or_rolled_back_is_gone() {
        let text = |sql: &'static str| Some(sql.as_bytes());
        let declare = text("DECLARE \"C\" CURSOR WITH HOLD FOR SELECT 1");
        let mut cursors = Cursors::default();
        cursors.declared(declare);
        cursors.ready(true, false);
        assert!(cursors.is_any());
        cursors.closed(text("CLOSE c"));
        assert!(cursors.is_any(), "another name");
        cursors.closed(text("CLOSE \"C\""));
        assert!(!cursors.is_any());
        // In a block.
        cursors.declared(declare);
        cursors.ready(false, false);
        assert!(cursors.is_any() && !cursors.is_any_held());
        cursors.rolled_back();
        cursors.ready(false, false);
        assert!(cursors.is_any(), "it may have been a savepoint");
        cursors.rolled_back();
        cursors.ready(true, false);
        assert!(!cursors.is_any());
        // COMMIT AND CHAIN, ROLLBACK.
        cursors.declared(declare);
        cursors.committed();
        cursors.rolled_back();
        cursors.ready(true, false);
        assert!(cursors.is_any());
        // One statement after an error in the same batch.
        let mut cursors = Cursors::default();
        cursors.declared(declare);
        cursors.ready(true, true);
        assert!(!cursors.is_any());
    }

    #[test]
    fn of_several_statements_one_may_hold_if_they_have_the_word() {
        let mut cursors = Cursors::default();
        cursors.unfollowed(b"BEGIN; DECLARE c CURSOR FOR SELECT 1", true);
        cursors.declared(None);
        assert!(!cursors.is_any());
        cursors.unfollowed(b"BEGIN; DECLARE c CURSOR with Hold FOR SELECT 1", true);
        cursors.declared(None);
        cursors.ready(true, false);
        assert!(cursors.is_any());
        cursors.closed(None);
        assert!(cursors.is_any());
        cursors.examined(false);
        assert!(!cursors.is_any());
    }
}
