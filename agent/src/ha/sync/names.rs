//! The words of `synchronous_standby_names`, as Kornak and Patroni write them
//! (/docs/current/runtime-config-replication.html#GUC-SYNCHRONOUS-STANDBY-NAMES).

use std::fmt;

use kornak_cluster::SyncMode;

/// For whom commits wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// For so many of them.
    pub waits: usize,
    pub standbys: Vec<String>,
    /// `ANY` instead of the first in order.
    any: bool,
    /// `*`: whoever comes. The standbys are empty then.
    anybody: bool,
}

impl Names {
    /// The names of these standbys; in strict mode an empty list becomes `*`.
    pub fn of(standbys: &[String], waits: usize, mode: SyncMode, strict: bool) -> Self {
        Self {
            waits,
            standbys: standbys.to_vec(),
            any: mode == SyncMode::Quorum,
            anybody: standbys.is_empty() && strict,
        }
    }

    /// Reads what is in force. `None`: words that neither program writes.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (any, rest) = match text.split_at_checked(4) {
            Some((word, rest)) if word.eq_ignore_ascii_case("ANY ") => (true, rest.trim()),
            _ => (false, text),
        };
        let none = Self { waits: 0, standbys: Vec::new(), any, anybody: false };
        match rest {
            "" if !any => return Some(none),
            "*" if !any => return Some(Self { anybody: true, ..none }),
            _ => {}
        }
        let (number, list) = rest.split_once('(')?;
        let waits: usize = number.trim().parse().ok()?;
        let list = list.strip_suffix(')')?.trim();
        if list == "*" {
            return Some(Self { anybody: true, ..none });
        }
        let standbys: Option<Vec<String>> = split(list)?.iter().map(|word| unquote(word)).collect();
        let standbys = standbys?;
        // Of fewer than it asks for, commits wait for all (and go on waiting).
        let waits = waits.min(standbys.len());
        // In order, commits wait for the first of the list: as safe as all of it, and no more.
        let (waits, standbys) = if any || waits == standbys.len() {
            (waits, standbys)
        } else {
            return None;
        };
        Some(Self { waits, standbys, any, anybody: false })
    }

    /// Whether the words are synchronous mode's, and not a user's who sees to it himself.
    pub fn are_ours(text: &str) -> bool {
        let quoted = text.contains('"') || text.contains('*');
        quoted && Self::parse(text).is_some()
    }
}

/// Parts at commas outside of quotes.
fn split(list: &str) -> Option<Vec<String>> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in list.chars() {
        match c {
            ',' if !quoted => words.push(String::new()),
            c => {
                quoted ^= c == '"';
                words.last_mut()?.push(c);
            }
        }
    }
    (!quoted).then_some(words)
}

fn unquote(word: &str) -> Option<String> {
    let word = word.trim();
    match word.strip_prefix('"') {
        Some(rest) => Some(rest.strip_suffix('"')?.replace("\"\"", "\"")),
        None => (!word.is_empty() && !word.contains('"')).then(|| word.to_owned()),
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = if self.anybody {
            "*".to_owned()
        } else {
            let quoted =
                self.standbys.iter().map(|name| format!("\"{}\"", name.replace('"', "\"\"")));
            quoted.collect::<Vec<_>>().join(",")
        };
        match (self.anybody, self.any, self.standbys.is_empty()) {
            (false, _, true) => Ok(()),
            (true, false, _) => f.write_str("*"),
            (true, true, _) => write!(f, "ANY 1 ({list})"),
            (false, true, false) => write!(f, "ANY {} ({list})", self.waits),
            (false, false, false) => write!(f, "{} ({list})", self.waits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for (text, waits, standbys) in [
            ("", 0, &[][..]),
            ("*", 0, &[]),
            ("ANY 1 (*)", 0, &[]),
            (r#"1 ("b")"#, 1, &["b"]),
            (r#"2 ("we""ird","b,c")"#, 2, &["we\"ird", "b,c"]),
            (r#"ANY 1 ("b","c")"#, 1, &["b", "c"]),
        ] {
            let names = Names::parse(text).expect(text);
            assert_eq!((names.waits, names.standbys.as_slice()), (waits, &own(standbys)[..]));
            assert_eq!(names.to_string(), text);
        }
    }

    #[test]
    fn somebody_elses_words_are_left_alone() {
        for text in ["FIRST 1 (a, b)", "a, b", "ANY 1 (x)", "1 (b, c)"] {
            assert!(!Names::are_ours(text), "{text}");
        }
        assert_eq!(Names::parse("1 (b, c)"), None, "only the first of them is waited for");
    }

    fn own(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }
}
