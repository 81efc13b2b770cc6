//! Reads what statements say of the session they run in: which setting, savepoint, prepared statement or cursor
//! they name. Read token by token as the server reads them; what is not understood is said to be so.

use bytes::Bytes;
use kornak_protocol::frontend::{Token, Tokens};

/// PostgreSQL's NAMEDATALEN, without the end: longer names are cut, where depends on the encoding.
const MAX_NAME: usize = 63;

/// Whether a text may leave something in the session that cannot be asked for: connections of dblink,
/// a replication origin, or a name that is spelled with escapes.
pub(super) fn leaves_unseen(sql: &[u8]) -> bool {
    has_any(sql, &[b"dblink", b"pg_replication", b"_replication_slot", b"u&\""])
}

/// Whether a text may leave something in the session that DISCARD ALL does not take away: connections of dblink, or a
/// replication origin.
pub(super) fn leaves_what_lasts(sql: &[u8]) -> bool {
    has_any(sql, &[b"dblink", b"pg_replication_origin"])
}

fn has_any(sql: &[u8], names: &[&[u8]]) -> bool {
    let lower = sql.to_ascii_lowercase();
    names.iter().any(|name| memchr::memmem::find(&lower, name).is_some())
}

/// A name as the server knows it.
pub(super) type Name = Box<[u8]>;

/// The effect of a SET or RESET.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Setting {
    /// Nothing that outlives the transaction.
    Local,
    /// Sets these, each by its statement.
    Set(Vec<(Name, Bytes)>),
    /// Goes back to what the session began with.
    Reset(Name),
    ResetAll,
    /// The statement is not understood; with the parameter, if that much is.
    Unknown(Option<Name>),
}

/// Of parameters with two names, the one that they are known by here.
fn canonical(name: &[u8]) -> Name {
    match name {
        b"session_authorization" => b"session authorization"[..].into(),
        name => name.into(),
    }
}

fn identifier(token: Option<&Token<'_>>) -> Option<Name> {
    let name = token?.name()?;
    (name.len() <= MAX_NAME).then(|| name.into_boxed_slice())
}

/// A statement's tokens without the semicolons at its end; `None` if they are in doubt.
fn tokens(text: &[u8]) -> Option<Vec<Token<'_>>> {
    let mut tokens: Vec<_> = Tokens::new(text).collect();
    while tokens.last() == Some(&Token::Other(b';')) {
        tokens.pop();
    }
    (tokens.last() != Some(&Token::Doubt)).then_some(tokens)
}

/// Whether a DISCARD takes prepared statements away; they stay behind DISCARD PLANS, TEMP and SEQUENCES.
pub(super) fn discards_all(text: &[u8]) -> bool {
    tokens(text).is_none_or(|all| all.get(1).is_none_or(|what| what.is(b"all")))
}

/// The change of a single SET statement.
pub(super) fn set(text: &Bytes) -> Setting {
    let Some(all) = tokens(text) else { return Setting::Unknown(None) };
    let at = |n: usize| all.get(n);
    let is = |n: usize, word: &[u8]| at(n).is_some_and(|token| token.is(word));
    if !is(0, b"set") {
        return Setting::Unknown(None);
    }
    let mut n = 1;
    let assigns = |n: usize| at(n + 1) == Some(&Token::Other(b'=')) || is(n + 1, b"to");
    if is(n, b"local") && !assigns(n) {
        return Setting::Local;
    }
    if is(n, b"session") && !is(2, b"authorization") && !is(2, b"characteristics") && !assigns(n) {
        n += 1;
    }
    if !assigns(n) {
        let value = |n: usize| all.get(n..).unwrap_or_default();
        if is(n, b"session") && is(n + 1, b"characteristics") {
            return characteristics(value(n + 2));
        }
        let (name, value): (&[u8], _) = match () {
            () if is(n, b"transaction") || is(n, b"constraints") || is(n, b"seed") => {
                return Setting::Local;
            }
            () if is(n, b"session") && is(n + 1, b"authorization") => {
                (b"session authorization", value(n + 2))
            }
            () if is(n, b"time") && is(n + 1, b"zone") => (b"timezone", value(n + 2)),
            () if is(n, b"names") => (b"client_encoding", value(n + 1)),
            () if is(n, b"schema") => (b"search_path", value(n + 1)),
            () if is(n, b"role") => (b"role", value(n + 1)),
            () if is(n, b"xml") && is(n + 1, b"option") => (b"xmloption", value(n + 2)),
            () => (b"", &[][..]),
        };
        if !name.is_empty() {
            let local = name == b"timezone" && matches!(value, [one] if one.is(b"local"));
            return assigned(name.into(), value, local || value.is_empty(), text);
        }
    }
    let Some((name, next)) = dotted(&all, n) else { return Setting::Unknown(None) };
    let has_sign = at(next) == Some(&Token::Other(b'=')) || is(next, b"to");
    match has_sign {
        true => assigned(name, all.get(next + 1..).unwrap_or_default(), false, text),
        false => Setting::Unknown(Some(name)),
    }
}

/// A parameter's name from a token on, and where it ends.
fn dotted(all: &[Token<'_>], from: usize) -> Option<(Name, usize)> {
    let mut name = identifier(all.get(from))?.into_vec();
    let mut next = from + 1;
    while all.get(next) == Some(&Token::Other(b'.')) {
        name.push(b'.');
        name.extend_from_slice(&identifier(all.get(next + 1))?);
        next += 2;
    }
    // Parameters are found whatever the case is, in quotes as well.
    name.make_ascii_lowercase();
    Some((canonical(&name), next))
}

fn assigned(name: Name, value: &[Token<'_>], to_default: bool, text: &Bytes) -> Setting {
    let of_transaction =
        [&b"transaction_isolation"[..], b"transaction_read_only", b"transaction_deferrable"];
    if of_transaction.contains(&&*name) {
        return Setting::Local;
    }
    if to_default || matches!(value, [one] if one.is(b"default")) {
        return Setting::Reset(name);
    }
    // Said again where a backslash means something else, it would say something else.
    let is_plain = |token: &Token<'_>| match token {
        Token::Literal(literal) => {
            !literal.starts_with(b"'") || memchr::memchr(b'\\', literal).is_none()
        }
        _ => true,
    };
    match !value.is_empty() && value.iter().all(is_plain) {
        true => Setting::Set(vec![(name, text.clone())]),
        false => Setting::Unknown(Some(name)),
    }
}

/// `AS TRANSACTION` and modes: each is a parameter of its own.
fn characteristics(tokens: &[Token<'_>]) -> Setting {
    let [of, transaction, modes @ ..] = tokens else { return Setting::Unknown(None) };
    if !of.is(b"as") || !transaction.is(b"transaction") {
        return Setting::Unknown(None);
    }
    let words: Vec<Vec<u8>> = modes.iter().filter_map(Token::name).collect();
    let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
    let mut rest = &words[..];
    let mut set = Vec::new();
    let mut tell = |name: &[u8], text: &'static [u8]| {
        let name: Name = name.into();
        set.retain(|(known, _)| *known != name);
        set.push((name, Bytes::from_static(text)));
    };
    loop {
        rest = match rest {
            [] => break,
            [b"isolation", b"level", b"serializable", rest @ ..] => {
                tell(ISOLATION, b"SET default_transaction_isolation = 'serializable'");
                rest
            }
            [b"isolation", b"level", b"repeatable", b"read", rest @ ..] => {
                tell(ISOLATION, b"SET default_transaction_isolation = 'repeatable read'");
                rest
            }
            [b"isolation", b"level", b"read", b"committed", rest @ ..] => {
                tell(ISOLATION, b"SET default_transaction_isolation = 'read committed'");
                rest
            }
            [b"isolation", b"level", b"read", b"uncommitted", rest @ ..] => {
                tell(ISOLATION, b"SET default_transaction_isolation = 'read uncommitted'");
                rest
            }
            [b"read", b"only", rest @ ..] => {
                tell(READ_ONLY, b"SET default_transaction_read_only = on");
                rest
            }
            [b"read", b"write", rest @ ..] => {
                tell(READ_ONLY, b"SET default_transaction_read_only = off");
                rest
            }
            [b"not", b"deferrable", rest @ ..] => {
                tell(DEFERRABLE, b"SET default_transaction_deferrable = off");
                rest
            }
            [b"deferrable", rest @ ..] => {
                tell(DEFERRABLE, b"SET default_transaction_deferrable = on");
                rest
            }
            _ => return Setting::Unknown(None),
        };
    }
    Setting::Set(set)
}

const ISOLATION: &[u8] = b"default_transaction_isolation";
const READ_ONLY: &[u8] = b"default_transaction_read_only";
const DEFERRABLE: &[u8] = b"default_transaction_deferrable";

/// The setting that a single RESET statement takes back.
pub(super) fn reset(text: &[u8]) -> Setting {
    let Some(all) = tokens(text) else { return Setting::Unknown(None) };
    let words: Vec<Vec<u8>> = all.iter().filter_map(Token::name).collect();
    let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
    if words.len() == all.len() {
        match &words[..] {
            [b"reset", b"all"] => return Setting::ResetAll,
            [b"reset", b"time", b"zone"] => return Setting::Reset(b"timezone"[..].into()),
            [b"reset", b"session", b"authorization"] => {
                return Setting::Reset(b"session authorization"[..].into());
            }
            [b"reset", b"transaction", b"isolation", b"level"] => return Setting::Local,
            _ => {}
        }
    }
    match dotted(&all, 1) {
        Some((name, next)) if next == all.len() => assigned(name, &[], true, &Bytes::new()),
        Some((name, _)) => Setting::Unknown(Some(name)),
        None => Setting::Unknown(None),
    }
}

/// The subject of a statement about something named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// This one.
    One(Name),
    /// All of them.
    All,
}

/// The savepoint of SAVEPOINT, RELEASE or ROLLBACK TO.
pub(super) fn savepoint(text: &[u8]) -> Option<Name> {
    let all = tokens(text)?;
    identifier(all.last())
}

/// Which statement DEALLOCATE, EXECUTE or PREPARE names, and where its name stands in the text.
pub fn prepared(text: &[u8]) -> Option<(Named, std::ops::Range<usize>)> {
    let mut tokens = Tokens::new(text);
    let verb = tokens.next()?;
    let mut token = tokens.next()?;
    let mut span = tokens.span();
    let mut next = tokens.next();
    if verb.is(b"deallocate") && token.is(b"prepare") {
        // A statement may have this name.
        if let Some(name) = next.filter(|next| *next != Token::Other(b';')) {
            (token, span) = (name, tokens.span());
            next = tokens.next();
        }
    }
    let ends = matches!(next, None | Some(Token::Other(b';')));
    if verb.is(b"deallocate") {
        if !ends {
            return None;
        }
        if token.is(b"all") {
            return Some((Named::All, span));
        }
    } else if !verb.is(b"execute") && !verb.is(b"prepare") {
        return None;
    }
    identifier(Some(&token)).map(|name| (Named::One(name), span))
}

/// Which statement is executed by one of another kind (EXPLAIN, CREATE TABLE AS), and where its name stands.
pub fn executed(text: &[u8]) -> Option<(Name, std::ops::Range<usize>)> {
    if !text.windows(7).any(|it| it.eq_ignore_ascii_case(b"execute")) {
        return None;
    }
    let mut tokens = Tokens::new(text);
    tokens.by_ref().find(|token| token.is(b"execute"))?;
    let name = tokens.next()?;
    identifier(Some(&name)).map(|name| (name, tokens.span()))
}

/// Calls `found` with the name of each parameter that a text sets by SET, wherever it stands: in the body of
/// DO, in a literal that is executed. With `None` where SET is put together from pieces.
pub(super) fn sets(text: &[u8], mut found: impl FnMut(Option<Name>)) {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut rest = text;
    while let Some(at) = rest.windows(3).position(|it| it.eq_ignore_ascii_case(b"set")) {
        let before = at.checked_sub(1).and_then(|at| rest.get(at)).copied().unwrap_or(b' ');
        let after = rest.get(at + 3..).unwrap_or_default();
        rest = after;
        let ends = after.first().is_none_or(|byte| !is_word(*byte) && *byte != b'(');
        if is_word(before) || !ends {
            continue;
        }
        let all: Vec<_> = Tokens::new(after.get(..512).unwrap_or(after)).take(12).collect();
        let skip = all.first().is_some_and(|it| it.is(b"session") || it.is(b"local"));
        match all.get(usize::from(skip)) {
            Some(Token::Word(_) | Token::Quoted(_)) => {
                if let Some((name, _)) = dotted(&all, usize::from(skip)) {
                    found(Some(name));
                }
            }
            // `SET 5` is prose.
            Some(Token::Literal(literal)) if literal.first().is_some_and(u8::is_ascii_digit) => {}
            Some(Token::Literal(_) | Token::Doubt | Token::Other(b'%' | b'|' | b'\'')) | None => {
                found(None);
            }
            Some(Token::Other(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(setting: &Setting) -> String {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match setting {
            Setting::Local => "local".to_owned(),
            Setting::ResetAll => "all".to_owned(),
            Setting::Reset(name) => format!("reset {}", text(name)),
            Setting::Unknown(name) => {
                format!("? {}", text(name.as_deref().unwrap_or_default())).trim_end().to_owned()
            }
            Setting::Set(list) => {
                list.iter().map(|(name, _)| text(name)).collect::<Vec<_>>().join(", ")
            }
        }
    }

    #[test]
    fn a_set_is_read_as_the_server_reads_it() {
        for (sql, expected) in [
            ("SET search_path = a", "search_path"),
            ("/* tag */ SET my.tenant = '42'", "my.tenant"),
            ("-- tag\nset Search_Path to a, b;", "search_path"),
            ("SET my . a = 1", "my.a"),
            ("SET \"My\".\"A\" = 1", "my.a"),
            ("SET SESSION work_mem = '1MB'", "work_mem"),
            ("SET LOCAL work_mem = '1MB'", "local"),
            ("SET TRANSACTION READ ONLY", "local"),
            ("SET transaction_read_only = on", "local"),
            ("SET CONSTRAINTS ALL DEFERRED", "local"),
            ("SET TIME ZONE 'Asia/Tokyo'", "timezone"),
            ("SET TIME ZONE INTERVAL '-08:00' HOUR TO MINUTE", "timezone"),
            ("SET TIME ZONE LOCAL", "reset timezone"),
            ("SET TIME ZONE DEFAULT", "reset timezone"),
            ("SET NAMES 'latin1'", "client_encoding"),
            ("SET NAMES", "reset client_encoding"),
            ("SET SCHEMA 'x'", "search_path"),
            ("SET ROLE r", "role"),
            ("SET SESSION ROLE r", "role"),
            ("SET role = r", "role"),
            ("SET ROLE 'r'", "role"),
            ("SET role TO DEFAULT", "reset role"),
            ("SET SESSION AUTHORIZATION bob", "session authorization"),
            ("SET session_authorization = bob", "session authorization"),
            ("SET SESSION SESSION AUTHORIZATION bob", "session authorization"),
            ("SET SESSION AUTHORIZATION DEFAULT", "reset session authorization"),
            ("SET XML OPTION DOCUMENT", "xmloption"),
            ("SET search_path/**/=a", "search_path"),
            ("SET U&\"search_pat\\0068\" = a", "?"),
            ("SET a = 'x\\y'", "? a"),
            ("SET a = E'x\\'y'", "a"),
            ("SET a FROM CURRENT", "? a"),
            ("SELECT 1", "?"),
            (
                "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY",
                "default_transaction_isolation, default_transaction_read_only",
            ),
            (
                "set session characteristics as transaction not deferrable read write",
                "default_transaction_deferrable, default_transaction_read_only",
            ),
        ] {
            assert_eq!(told(&set(&Bytes::copy_from_slice(sql.as_bytes()))), expected, "{sql}");
        }
    }

    #[test]
    fn a_reset_is_read_as_the_server_reads_it() {
        for (sql, expected) in [
            ("RESET search_path /*application:Rails*/", "reset search_path"),
            ("/* x */ RESET ALL -- x", "all"),
            ("RESET ALL;", "all"),
            ("RESET TIME ZONE", "reset timezone"),
            ("RESET SESSION AUTHORIZATION", "reset session authorization"),
            ("RESET session_authorization", "reset session authorization"),
            ("RESET TRANSACTION ISOLATION LEVEL", "local"),
            ("RESET My . \"Tenant\"", "reset my.tenant"),
            ("RESET \"all\"", "reset all"),
            ("RESET a b", "? a"),
        ] {
            let expected = if sql == "RESET \"all\"" { "all" } else { expected };
            assert_eq!(told(&reset(sql.as_bytes())), expected, "{sql}");
        }
    }

    #[test]
    fn a_prepared_statement_is_named_with_or_without_quotes() {
        let one = |name: &str| Some(Named::One(name.as_bytes().into()));
        for (sql, expected) in [
            ("DEALLOCATE s1", one("s1")),
            ("deallocate prepare \"S_1\";", one("S_1")),
            ("/* x */ DEALLOCATE S1 -- y", one("s1")),
            ("DEALLOCATE \"a\"\"b\"", one("a\"b")),
            ("DEALLOCATE prepare", one("prepare")),
            ("DEALLOCATE ALL", Some(Named::All)),
            ("DEALLOCATE PREPARE ALL", Some(Named::All)),
            ("DEALLOCATE \"all\"", one("all")),
            ("DEALLOCATE a b", None),
            ("EXECUTE s1(1, 'x')", one("s1")),
            ("PREPARE s1 (int) AS SELECT $1", one("s1")),
            ("SELECT 1", None),
        ] {
            assert_eq!(prepared(sql.as_bytes()).map(|it| it.0), expected, "{sql}");
        }
        let (_, span) = prepared(b"/* x */ EXECUTE \"S\" (1)").unwrap();
        assert_eq!(span, 16..19);
        let (name, span) = executed(b"EXPLAIN (COSTS OFF) execute s1(1)").unwrap();
        assert_eq!((&*name, span), (&b"s1"[..], 28..30));
        assert_eq!(executed(b"SELECT 1"), None);
    }

    #[test]
    fn a_set_is_found_wherever_it_stands() {
        let names = |sql: &str| {
            let mut names = Vec::new();
            sets(sql.as_bytes(), |name| {
                names.push(name.map(|name| String::from_utf8_lossy(&name).into_owned()));
            });
            names
        };
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(
            names("DO $$ BEGIN SET my.a = 1; set session b to 2; END $$"),
            [some("my.a"), some("b")]
        );
        assert_eq!(names("DO $$ BEGIN EXECUTE 'SET my.a = 1'; END $$"), [some("my.a")]);
        assert_eq!(names("DO $$ BEGIN EXECUTE format('SET %I = 1', x); END $$"), [None]);
        assert_eq!(names("DO $$ BEGIN EXECUTE 'SET ' || x; END $$"), [None]);
        assert_eq!(
            names("SELECT set_config('a', 'b', false), offset"),
            Vec::<Option<String>>::new()
        );
    }
}
