//! Parameters with names of an application's own (`my.tenant`). No server lists them, so the names
//! have to be known to ask for their values.

use super::Journal;

/// Names followed of one session.
const MAX_NAMES: usize = 64;

const FUNCTION: &[u8] = b"set_config";

/// Calls `found` with the first argument of every call of `set_config` in a text; with `None` if that
/// is not a plain literal.
fn set_by_function(sql: &[u8], mut found: impl FnMut(Option<&[u8]>)) {
    let lower = sql.to_ascii_lowercase();
    for at in memchr::memmem::find_iter(&lower, FUNCTION) {
        let rest = sql.get(at + FUNCTION.len()..).unwrap_or_default().trim_ascii_start();
        let literal = rest.strip_prefix(b"(").map(<[u8]>::trim_ascii_start);
        let name = literal.and_then(|it| it.strip_prefix(b"'")).and_then(|it| {
            let end = it.iter().position(|byte| !is_of_name(*byte))?;
            let (name, rest) = it.split_at_checked(end)?;
            rest.strip_prefix(b"'")?;
            // Literals that follow each other are one.
            rest.get(1..)?.trim_ascii_start().starts_with(b",").then_some(name)
        });
        found(name);
    }
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$')
}

impl Journal {
    /// Notes which parameters of its own a text sets by function.
    pub(super) fn note_custom(&mut self, sql: &[u8]) {
        let (names, mut unseen) = (&mut self.custom, false);
        set_by_function(sql, |name| match name {
            None => unseen = true,
            Some(name) if !name.contains(&b'.') => {}
            Some(name) => unseen |= !add(names, name),
        });
        self.unseen |= unseen;
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
        let names = |sql: &str| {
            let mut names = Vec::new();
            set_by_function(sql.as_bytes(), |name| {
                names.push(name.map(|name| String::from_utf8_lossy(name).into_owned()));
            });
            names
        };
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(names("SELECT set_config('my.a', $1, true)"), [some("my.a")]);
        assert_eq!(
            names("select pg_catalog.SET_CONFIG ( 'My.B' , 'x', false), set_config('c', '', true)"),
            [some("My.B"), some("c")]
        );
        for sql in [
            "SELECT set_config($1, 'x', false)",
            "SELECT set_config('a.b' || 'c', 'x', false)",
            "SELECT set_config('a.b' 'c', 'x', false)",
            "SELECT set_config('a''b', 'x', false)",
            "SELECT set_config(E'a.b', 'x', false)",
            "SELECT set_config /* */ ('a.b', 'x', false)",
            "SELECT \"set_config\"('a.b', 'x', false)",
        ] {
            assert_eq!(names(sql), [None], "{sql}");
        }
    }
}
