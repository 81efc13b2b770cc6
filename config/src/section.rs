//! Taking values out of the tree. Every accessor returns `None` for what is absent *or* wrong, and
//! records what is wrong; so one pass finds every mistake of a file, and settings are handed out
//! only if there was none.

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use serde_json::{Map, Value};

use crate::error::{ConfigError, Place, Problem};
use crate::units;
use crate::yaml::{Tree, describe, join};

/// A tree under inspection.
pub(crate) struct Document {
    tree: Tree,
    /// Place that errors about missing keys name.
    source: String,
    problems: RefCell<Vec<Problem>>,
    /// Keys that mean nothing to us.
    strangers: RefCell<Vec<String>>,
    warnings: RefCell<Vec<String>>,
}

impl Document {
    pub(crate) fn new(source: &str, tree: Tree) -> Self {
        Self {
            tree,
            source: source.to_owned(),
            problems: RefCell::default(),
            strangers: RefCell::default(),
            warnings: RefCell::default(),
        }
    }

    pub(crate) fn root(&self) -> Section<'_> {
        Section { document: self, path: String::new(), map: Some(&self.tree.root) }
    }

    /// Variables of Patroni's family that mean nothing here.
    pub(crate) fn strays(&self, names: Vec<String>) {
        let notes = names.into_iter().map(|name| format!("{name} (environment: unknown)"));
        self.strangers.borrow_mut().extend(notes);
    }

    fn place(&self, path: &str) -> Place {
        let mut path = path;
        loop {
            if let Some(place) = self.tree.places.get(path) {
                return place.clone();
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = path.get(..end).unwrap_or_default(),
                None => return Place { source: self.source.clone(), line: None },
            }
        }
    }

    /// Whether nothing wrong has been found so far.
    pub(crate) fn is_clean(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    /// Ends the inspection: the settings with the warnings, or everything that is wrong.
    pub(crate) fn finish<T>(self, settings: Option<T>) -> Result<(T, Vec<String>), ConfigError> {
        let mut problems = self.problems.into_inner();
        problems.sort_by(|a, b| a.place.cmp(&b.place));
        let mut warnings = self.warnings.into_inner();
        let strangers = self.strangers.into_inner();
        if !strangers.is_empty() {
            let source = &self.source;
            warnings.push(format!("{source}: keys without effect: {}", strangers.join(", ")));
        }
        match settings {
            Some(settings) if problems.is_empty() => Ok((settings, warnings)),
            _ => Err(ConfigError::Invalid(problems)),
        }
    }
}

/// One mapping of the document; an absent one behaves as an empty one.
#[derive(Clone)]
pub(crate) struct Section<'a> {
    document: &'a Document,
    path: String,
    map: Option<&'a Map<String, Value>>,
}

impl<'a> Section<'a> {
    /// The value, unless it is absent or null.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.map?.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// Records what is wrong with a key; of several reports the first is kept.
    pub(crate) fn problem(&self, key: &str, message: impl Into<String>) {
        let key = if key.is_empty() { self.path.clone() } else { join(&self.path, key) };
        let place = self.document.place(&key);
        let mut problems = self.document.problems.borrow_mut();
        if problems.iter().all(|known| known.key != key) {
            problems.push(Problem { place, key, message: message.into() });
        }
    }

    pub(crate) fn warn(&self, key: &str, message: &str) {
        let key = join(&self.path, key);
        let place = self.document.place(&key);
        self.document.warnings.borrow_mut().push(format!("{place}: {key}: {message}"));
    }

    /// Records that something else was expected, and what was found unless it is a secret.
    pub(crate) fn expected(&self, key: &str, expected: &str) {
        match self.value(key) {
            None => self.problem(key, format!("missing, expected {expected}")),
            Some(_) if key.contains("password") => {
                self.problem(key, format!("expected {expected}"));
            }
            Some(value) => {
                self.problem(key, format!("expected {expected}, found {}", describe(value)));
            }
        }
    }

    /// Hands `found` through; an absent value is a mistake, a wrong one has been recorded before.
    pub(crate) fn required<T>(&self, key: &str, expected: &str, found: Option<T>) -> Option<T> {
        if found.is_none() && !self.has(key) {
            self.expected(key, expected);
        }
        found
    }

    /// The section below a key; empty if absent or wrong.
    pub(crate) fn section(&self, key: &str) -> Section<'a> {
        let map = match self.value(key) {
            Some(Value::Object(map)) => Some(map),
            Some(_) => {
                self.expected(key, "keys and values");
                None
            }
            None => None,
        };
        Section { document: self.document, path: join(&self.path, key), map }
    }

    /// The sections of a list of mappings.
    pub(crate) fn sections(&self, key: &str, expected: &str) -> Option<Vec<Section<'a>>> {
        let Value::Array(items) = self.value(key)? else {
            self.expected(key, expected);
            return None;
        };
        let path = join(&self.path, key);
        let sections = items.iter().enumerate().map(|(index, item)| {
            let section = Section {
                document: self.document,
                path: format!("{path}[{index}]"),
                map: item.as_object(),
            };
            if section.map.is_none() {
                section.problem("", format!("expected keys and values, found {}", describe(item)));
            }
            section
        });
        Some(sections.collect())
    }

    /// The whole mapping below a key, as it is.
    pub(crate) fn map(&self, key: &str) -> Map<String, Value> {
        self.section(key).map.cloned().unwrap_or_default()
    }

    /// The entries of this section.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        self.map.into_iter().flatten()
    }

    /// A text; numbers and truth values count as what they look like.
    pub(crate) fn text(&self, key: &str) -> Option<String> {
        let found = scalar_text(self.value(key)?).filter(|text| !text.is_empty());
        if found.is_none() {
            self.expected(key, "a text");
        }
        found
    }

    /// A text that is never shown. A number with a fraction or an exponent must be quoted: YAML has
    /// already rewritten it.
    pub(crate) fn secret(&self, key: &str) -> Option<SecretString> {
        if self.value(key).is_some_and(Value::is_f64) {
            self.problem(key, "expected a text, put it in quotes");
            return None;
        }
        self.text(key).map(SecretString::from)
    }

    pub(crate) fn path(&self, key: &str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    /// A path that other programs are told, some of which run in other folders: absolute, from the folder that this
    /// process runs in, as Patroni reads it; and without a slash at its end, so that names can be appended.
    pub(crate) fn place(&self, key: &str) -> Option<PathBuf> {
        let path = self.path(key)?;
        match std::path::absolute(&path) {
            Ok(absolute) => Some(absolute.components().collect()),
            Err(error) => {
                self.expected(key, &format!("a path ({error})"));
                None
            }
        }
    }

    /// A truth value in any of the spellings that Patroni takes.
    pub(crate) fn flag(&self, key: &str) -> Option<bool> {
        let found = match self.value(key)? {
            Value::Bool(on) => Some(*on),
            Value::Number(number) => match number.as_i64() {
                Some(0) => Some(false),
                Some(1) => Some(true),
                _ => None,
            },
            Value::String(text) => match text.to_ascii_lowercase().as_str() {
                "true" | "on" | "yes" | "1" => Some(true),
                "false" | "off" | "no" | "0" => Some(false),
                _ => None,
            },
            _ => None,
        };
        if found.is_none() {
            self.expected(key, "true or false");
        }
        found
    }

    pub(crate) fn duration(&self, key: &str) -> Option<Duration> {
        let found = units::duration(self.value(key)?);
        if found.is_none() {
            self.expected(key, "a duration (seconds, or with ms, s, min, h, d)");
        }
        found
    }

    pub(crate) fn bytes(&self, key: &str) -> Option<u64> {
        let found = units::bytes(self.value(key)?);
        if found.is_none() {
            self.expected(key, "a size (bytes, or with kB, MB, GB)");
        }
        found
    }

    /// A whole number in this range.
    pub(crate) fn count(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Option<u64> {
        let number = match self.value(key)? {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        let found = number.filter(|number| range.contains(number));
        if found.is_none() {
            self.expected(key, &format!("a number from {} to {}", range.start(), range.end()));
        }
        found
    }

    /// A text that `parse` understands.
    pub(crate) fn parsed<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let found = scalar_text(self.value(key)?).and_then(|text| parse(&text));
        if found.is_none() {
            self.expected(key, expected);
        }
        found
    }

    /// One of a few words, in any case. YAML makes truth values of `on` and `off`; they count as
    /// those words.
    pub(crate) fn word<T: Copy>(&self, key: &str, words: &[(&str, T)]) -> Option<T> {
        let value = self.value(key)?;
        let spellings = match value {
            Value::Bool(true) => vec!["on".to_owned(), "true".to_owned()],
            Value::Bool(false) => vec!["off".to_owned(), "false".to_owned(), "disable".to_owned()],
            other => scalar_text(other).into_iter().collect(),
        };
        let matches = |word: &str| spellings.iter().any(|text| text.eq_ignore_ascii_case(word));
        let found = words.iter().find(|(word, _)| matches(word)).map(|(_, meaning)| *meaning);
        if found.is_none() {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.expected(key, &format!("one of {}", words.join(", ")));
        }
        found
    }

    /// A list of texts; a text alone is split at `separator`.
    pub(crate) fn texts(&self, key: &str, separator: char) -> Option<Vec<String>> {
        let found = match self.value(key)? {
            Value::Array(items) => items.iter().map(scalar_text).collect(),
            Value::String(text) => Some(
                text.split(separator)
                    .map(|part| part.trim().trim_matches(['\'', '"']).to_owned())
                    .filter(|part| !part.is_empty())
                    .collect(),
            ),
            _ => None,
        };
        if found.is_none() {
            self.expected(key, "a list of texts");
        }
        found
    }

    /// Names every key that is not `known`, all in one warning: the file is Patroni's, and another
    /// version of it may know more than we do. `void` keys are Patroni's without an effect here, each
    /// with the reason.
    pub(crate) fn tolerate(&self, known: &[&str], void: &[(&str, &str)]) {
        for (key, _) in self.entries() {
            if known.contains(&key.as_str()) {
                continue;
            }
            let path = join(&self.path, key);
            let place = self.document.place(&path);
            let why = void.iter().find(|(name, _)| name == key);
            let why = why.map_or("unknown", |(_, why)| *why);
            let note = match place.line {
                Some(line) => format!("{path} (line {line}: {why})"),
                None => format!("{path} ({why})"),
            };
            self.document.strangers.borrow_mut().push(note);
        }
    }

    /// Refuses every key that is not `known`: the section is ours alone.
    pub(crate) fn only(&self, known: &[&str]) {
        for (key, _) in self.entries() {
            if known.contains(&key.as_str()) {
                continue;
            }
            let message = match nearest(key, known) {
                Some(similar) => format!("unknown key, did you mean {similar}?"),
                None => format!("unknown key, expected one of {}", known.join(", ")),
            };
            self.problem(key, message);
        }
    }
}

/// Text of a scalar; `None` for lists and mappings.
pub(crate) fn scalar_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        _ => None,
    }
}

/// The known word that a typing mistake of at most two letters could have been meant for.
fn nearest<'w>(word: &str, known: &[&'w str]) -> Option<&'w str> {
    let scored = known.iter().map(|candidate| (distance(word, candidate), *candidate));
    let (distance, best) = scored.min_by_key(|(distance, _)| *distance)?;
    (distance <= 2 && distance < word.chars().count()).then_some(best)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut next = Vec::with_capacity(row.len());
        next.push(i + 1);
        for ((to, diagonal), above) in b.iter().zip(&row).zip(row.iter().skip(1)) {
            let left = next.last().copied().unwrap_or_default();
            let change = diagonal + usize::from(from != *to);
            next.push(change.min(above + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_mistakes_find_the_word_that_was_meant() {
        for (word, meant) in [
            ("lisetn", Some("listen")),
            ("listeners", Some("listeners")),
            ("limit", Some("limits")),
            ("banana", None),
            ("x", None),
        ] {
            assert_eq!(nearest(word, &["listen", "listeners", "limits", "tls"]), meant, "{word}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }
}
