//! Properties of a statement that its first words tell, always erring to the safe side.
//!
//! Not a parser of SQL: PostgreSQL changes its grammar each year and extensions hide anything in
//! a function. These scans answer three questions, and where the text leaves doubt the answer is
//! the one that promises less: "several statements", "may end the transaction", "may touch the
//! session". Client encodings in which a second byte may look like ASCII (SJIS, BIG5, GBK,
//! GB18030, JOHAB) never have a quote there, but may have a backslash: a backslash inside quotes
//! makes the text doubtful.

use crate::pipeline::Fate;

/// The first keyword of a statement, as far as it matters to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StatementKind {
    /// Blanks and comments only.
    Empty,
    /// `BEGIN`, `START`.
    Begin,
    /// `COMMIT`, `END`, also `COMMIT PREPARED`.
    Commit,
    /// `ROLLBACK`, `ABORT`, also `ROLLBACK PREPARED`.
    Rollback,
    /// `ROLLBACK [WORK | TRANSACTION] TO`.
    RollbackTo,
    /// `SAVEPOINT`.
    Savepoint,
    /// `RELEASE`.
    Release,
    /// `PREPARE name AS …`.
    Prepare,
    /// `PREPARE TRANSACTION`.
    PrepareTransaction,
    /// `EXECUTE`.
    Execute,
    /// `DEALLOCATE`.
    Deallocate,
    /// `CALL`.
    Call,
    /// `DO`.
    Do,
    /// `SET`, `SET SESSION`.
    Set,
    /// `SET LOCAL`, `SET TRANSACTION`, `SET CONSTRAINTS`: over with the transaction.
    SetLocal,
    /// `RESET`.
    Reset,
    /// `DISCARD`.
    Discard,
    /// `LISTEN`.
    Listen,
    /// `UNLISTEN`.
    Unlisten,
    /// `DECLARE`.
    Declare,
    /// `CLOSE`.
    Close,
    /// `COPY`.
    Copy,
    /// `CREATE TEMP …`, or a schema that is named `pg_temp`.
    CreateTemp,
    /// Another `CREATE`.
    Create,
    /// `LOAD`.
    Load,
    /// `LOCK`.
    Lock,
    /// `SHOW`.
    Show,
    /// `SELECT`, `VALUES`, `TABLE`, `WITH`, or a parenthesis: may be a write all the same.
    Select,
    /// `INSERT`, `UPDATE`, `DELETE`, `MERGE`.
    Write,
    /// Anything else.
    Other,
}

/// Kind of the first statement in `sql`.
pub fn statement_kind(sql: &[u8]) -> StatementKind {
    use StatementKind as K;
    let mut words = Words { rest: sql };
    let Some(first) = words.next() else {
        let (rest, _) = skip_blank(sql);
        return match rest.first() {
            None => K::Empty,
            Some(b';') if !is_more(rest) => K::Empty,
            Some(b'(') => K::Select,
            Some(_) => K::Other,
        };
    };
    let word = |w: &Option<&[u8]>, k: &str| w.is_some_and(|w| w.eq_ignore_ascii_case(k.as_bytes()));
    let is = |k: &str| first.eq_ignore_ascii_case(k.as_bytes());
    const PLAIN: &[(&str, StatementKind)] = &[
        ("select", K::Select),
        ("insert", K::Write),
        ("update", K::Write),
        ("delete", K::Write),
        ("begin", K::Begin),
        ("start", K::Begin),
        ("commit", K::Commit),
        ("end", K::Commit),
        ("with", K::Select),
        ("values", K::Select),
        ("table", K::Select),
        ("merge", K::Write),
        ("savepoint", K::Savepoint),
        ("release", K::Release),
        ("execute", K::Execute),
        ("deallocate", K::Deallocate),
        ("call", K::Call),
        ("do", K::Do),
        ("reset", K::Reset),
        ("discard", K::Discard),
        ("listen", K::Listen),
        ("unlisten", K::Unlisten),
        ("declare", K::Declare),
        ("close", K::Close),
        ("copy", K::Copy),
        ("load", K::Load),
        ("lock", K::Lock),
        ("show", K::Show),
    ];
    if let Some((_, kind)) = PLAIN.iter().find(|(name, _)| is(name)) {
        return *kind;
    }
    if is("rollback") || is("abort") {
        let mut next = words.next();
        if word(&next, "work") || word(&next, "transaction") {
            next = words.next();
        }
        return if word(&next, "to") { K::RollbackTo } else { K::Rollback };
    }
    if is("prepare") {
        // `PREPARE transaction AS …` is a statement of that name; the doubt goes to the safe side.
        return if word(&words.next(), "transaction") { K::PrepareTransaction } else { K::Prepare };
    }
    if is("set") {
        let next = words.next();
        let local = ["local", "transaction", "constraints"].iter().any(|w| word(&next, w));
        return if local { K::SetLocal } else { K::Set };
    }
    if is("create") {
        let temp = words.take(4).any(|w| {
            w.eq_ignore_ascii_case(b"temp")
                || w.eq_ignore_ascii_case(b"temporary")
                || w.eq_ignore_ascii_case(b"pg_temp")
        });
        return if temp { K::CreateTemp } else { K::Create };
    }
    K::Other
}

/// Whether `sql` is one statement for certain. Literals, quoted identifiers, dollar quotes and
/// comments are followed; a text with doubts (a backslash inside quotes, something unterminated)
/// is one statement only if no `;` is followed by anything.
pub fn is_single_statement(sql: &[u8]) -> bool {
    match top_level_semicolon(sql) {
        Lexed::None => true,
        Lexed::At(rest) => !is_more(rest),
        Lexed::Doubt => match memchr::memchr(b';', sql).and_then(|at| sql.get(at..)) {
            None => true,
            Some(rest) => rest.iter().all(|b| *b == b';' || b.is_ascii_whitespace()),
        },
    }
}

/// Whether executing `sql` may end the transaction it runs in: anything but a single statement
/// whose first keyword cannot (docs/safety.md A10).
pub fn may_end_transaction(sql: &[u8]) -> bool {
    use Fate::{Begins, Nothing, OfSession, Revives, Stays};
    !matches!(fate_of(sql), Stays | OfSession | Begins | Revives | Nothing)
}

/// Effect that `sql` can have on the transaction it runs in. `sql` must be whole; the fate of an
/// incomplete text is [`Fate::Unknown`].
pub fn fate_of(sql: &[u8]) -> Fate {
    use StatementKind as K;
    let kind = statement_kind(sql);
    if !is_single_statement(sql) {
        return Fate::Unknown;
    }
    match kind {
        K::Empty => Fate::Nothing,
        K::Begin => Fate::Begins,
        K::RollbackTo => Fate::Revives,
        K::Commit if is_plain_end(sql) => Fate::Commits,
        K::Rollback if is_plain_end(sql) => Fate::RollsBack,
        K::Commit | K::Rollback | K::PrepareTransaction | K::Call | K::Do => Fate::Unknown,
        K::Set
        | K::SetLocal
        | K::Reset
        | K::Show
        | K::Deallocate
        | K::Prepare
        | K::Discard
        | K::Listen
        | K::Unlisten
        | K::Close => Fate::OfSession,
        _ => Fate::Stays,
    }
}

/// `COMMIT`, `END`, `ROLLBACK`, `ABORT` with WORK or TRANSACTION and nothing else: no AND CHAIN,
/// no PREPARED.
fn is_plain_end(sql: &[u8]) -> bool {
    let mut words = Words { rest: sql };
    words.next();
    let mut ahead = Words { rest: words.rest };
    if ahead
        .next()
        .is_some_and(|w| w.eq_ignore_ascii_case(b"work") || w.eq_ignore_ascii_case(b"transaction"))
    {
        words = ahead;
    }
    !is_more(words.rest)
}

/// Whether `sql` may leave something in the session that its command tag does not show: advisory
/// locks, `set_config`, dblink connections, temporary relations, replication slots.
pub fn may_touch_session_state(sql: &[u8]) -> bool {
    const NAMES: &[&[u8]] = &[
        b"pg_advisory",
        b"pg_try_advisory",
        b"pg_temp",
        b"pg_replication_origin",
        b"pg_create_logical_replication_slot",
        b"pg_create_physical_replication_slot",
        b"set_config",
        b"dblink",
    ];
    /// Locks of these are over with the transaction.
    const OF_TRANSACTION: &[&[u8]] = &[b"pg_advisory_xact_lock", b"pg_try_advisory_xact_lock"];
    let writes = memchr::memmem::find(sql, b"pg_settings").is_some()
        && Words { rest: sql }.next().is_none_or(|word| !word.eq_ignore_ascii_case(b"select"));
    let mut inside_word = false;
    for (at, byte) in sql.iter().enumerate() {
        let starts = is_word(*byte) && !inside_word;
        inside_word = is_word(*byte);
        if !starts || !matches!(byte | 0x20, b'p' | b's' | b'd' | b't' | b'u') {
            continue;
        }
        let rest = sql.get(at..).unwrap_or_default();
        let begins = |name: &[u8]| {
            rest.get(..name.len()).is_some_and(|head| head.eq_ignore_ascii_case(name))
        };
        if NAMES.iter().any(|name| begins(name)) && !OF_TRANSACTION.iter().any(|name| begins(name))
        {
            return true;
        }
        // Its rule sets a parameter.
        if begins(b"pg_settings") && writes {
            return true;
        }
        // Escapes can spell any name.
        if begins(b"u&\"") {
            return true;
        }
        if begins(b"temp") {
            let word = rest.split(|b| !is_word(*b)).next().unwrap_or_default();
            let is_temp =
                word.eq_ignore_ascii_case(b"temp") || word.eq_ignore_ascii_case(b"temporary");
            let before = sql.get(..at).unwrap_or_default().trim_ascii_end();
            let last = before.rsplit(|b| !is_word(*b)).next().unwrap_or_default();
            // A comment in between ends with a slash or at a line's end; an alias does not.
            let makes = [&b"into"[..], b"create", b"local", b"global", b"replace"]
                .iter()
                .any(|w| last.eq_ignore_ascii_case(w));
            if is_temp && (makes || before.ends_with(b"*/")) {
                return true;
            }
        }
    }
    false
}

pub(super) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

/// Unquoted words from the front, comments skipped; ends at the first thing that is none.
struct Words<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (rest, _) = skip_blank(self.rest);
        let end = rest.iter().position(|b| !is_word(*b)).unwrap_or(rest.len());
        let (word, after) = rest.split_at_checked(end)?;
        if word.is_empty() || word.first().is_some_and(u8::is_ascii_digit) {
            return None;
        }
        self.rest = after;
        Some(word)
    }
}

/// Skips blanks and comments. The second value is false if a comment does not end.
pub(super) fn skip_blank(mut sql: &[u8]) -> (&[u8], bool) {
    loop {
        match sql {
            // Blanks of PostgreSQL's scanner: space, \t, \n, \r, \f, and \v since 16.
            [b' ' | b'\t' | b'\n' | b'\r' | 0x0c | 0x0b, rest @ ..] => sql = rest,
            [b'-', b'-', rest @ ..] => {
                let end = memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
                sql = rest.get(end..).unwrap_or_default();
            }
            [b'/', b'*', rest @ ..] => match skip_comment(rest) {
                Some(rest) => sql = rest,
                None => return (&[], false),
            },
            _ => return (sql, true),
        }
    }
}

/// Text behind a block comment whose opening was taken off; block comments nest.
fn skip_comment(mut sql: &[u8]) -> Option<&[u8]> {
    let mut depth = 1u32;
    loop {
        match sql {
            [b'/', b'*', rest @ ..] => {
                depth = depth.checked_add(1)?;
                sql = rest;
            }
            [b'*', b'/', rest @ ..] => {
                depth -= 1;
                sql = rest;
                if depth == 0 {
                    return Some(sql);
                }
            }
            [_, rest @ ..] => sql = rest,
            [] => return None,
        }
    }
}

/// Whether anything but blanks, comments and further semicolons follows.
pub(super) fn is_more(mut sql: &[u8]) -> bool {
    loop {
        let (rest, whole) = skip_blank(sql);
        match rest {
            [b';', rest @ ..] => sql = rest,
            [] => return !whole,
            _ => return true,
        }
    }
}

enum Lexed<'a> {
    /// There is none.
    None,
    /// The text from the first one on.
    At(&'a [u8]),
    /// The text cannot be followed for certain.
    Doubt,
}

/// Finds the first `;` outside of quotes and comments. A parenthesis does not matter: CREATE RULE
/// and the bodies of SQL-standard functions have semicolons inside, and count as several.
fn top_level_semicolon(mut sql: &[u8]) -> Lexed<'_> {
    let mut word = Word::None;
    loop {
        let [first, rest @ ..] = sql else { return Lexed::None };
        let before = word;
        word = match (before, first) {
            (Word::None, b) if b.is_ascii_digit() => Word::Number,
            (Word::None, b) if is_word(*b) => Word::Name,
            (_, b) if is_word(*b) => before,
            _ => Word::None,
        };
        sql = match (first, rest) {
            (b';', _) => return Lexed::At(sql),
            (quote @ (b'\'' | b'"'), rest) => {
                let Some(end) = memchr::memchr2(*quote, b'\\', rest) else { return Lexed::Doubt };
                if rest.get(end) == Some(&b'\\') {
                    return Lexed::Doubt;
                }
                rest.get(end + 1..).unwrap_or_default()
            }
            (b'-', [b'-', ..]) | (b'/', [b'*', ..]) => match skip_blank(sql) {
                (rest, true) => rest,
                _ => return Lexed::Doubt,
            },
            (b'$', rest) => match before {
                Word::None => match skip_dollar(rest) {
                    Ok(rest) => rest,
                    Err(()) => return Lexed::Doubt,
                },
                // Part of an identifier.
                Word::Name => {
                    word = Word::Name;
                    rest
                }
                // `1$$` and `$1$$` open a quote, `1a$$` does so in some versions.
                Word::Number => return Lexed::Doubt,
            },
            (_, rest) => rest,
        };
    }
}

/// Kind of word that the preceding byte belongs to.
#[derive(Clone, Copy)]
enum Word {
    None,
    Name,
    /// A number, or something that begins with a digit.
    Number,
}

/// Text behind a dollar-quoted literal whose first `$` was taken off; the text itself if it is no
/// literal (a parameter such as `$1`).
pub(super) fn skip_dollar(rest: &[u8]) -> Result<&[u8], ()> {
    let end = rest.iter().position(|b| !is_word(*b)).unwrap_or(rest.len());
    let is_tag = !rest.first().is_some_and(u8::is_ascii_digit);
    match (is_tag, rest.get(end)) {
        (true, Some(b'$')) => {
            let tag = rest.get(..=end).ok_or(())?;
            let body = rest.get(end + 1..).ok_or(())?;
            let needle = [b"$", tag].concat();
            let close = memchr::memmem::find(body, &needle).ok_or(())?;
            body.get(close + needle.len()..).ok_or(())
        }
        _ => Ok(rest),
    }
}

/// Fuzz entry: whatever the bytes, never panic, and two answers never contradict each other.
pub fn fuzz_sql(sql: &[u8]) {
    let kind = statement_kind(sql);
    let fate = fate_of(sql);
    if !is_single_statement(sql) {
        assert_eq!(fate, Fate::Unknown);
    }
    if kind == StatementKind::Empty {
        assert!(!may_end_transaction(sql) || !is_single_statement(sql));
    }
    let _ = may_touch_session_state(sql);
}
