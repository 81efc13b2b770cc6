//! YAML as Patroni's parser understands it, with the line of every key.
//!
//! The text becomes a [`serde_json::Value`] (key order kept) and a table from a key's path to the
//! place where it was written, so that an error about a value found later still names its line.
//! Also here: merging of several sources, for a directory of files and for the environment.

mod scalar;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

use crate::error::{Place, Problem};

/// A tree of values and where each key was written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tree {
    pub(crate) root: Map<String, Value>,
    /// By path: `postgresql.listen`, `proxy.listeners[0].name`.
    pub(crate) places: BTreeMap<String, Place>,
}

impl Tree {
    /// Reads one document; nothing at all is an empty tree.
    pub(crate) fn parse(source: &str, text: &str) -> Result<Self, Problem> {
        let whole = |line: Option<u64>, message: String| Problem {
            place: Place { source: source.to_owned(), line },
            key: String::new(),
            message,
        };
        let node: Option<Node> =
            serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
                let line =
                    error.location().map(|location| location.line()).filter(|line| *line > 0);
                whole(line, format!("not valid YAML: {}", first_line(&error)))
            })?;
        let mut tree = Self::default();
        let node = node.unwrap_or(Node { line: 1, bytes: 0..0, kind: Kind::Leaf(Value::Null) });
        match tree.take((source, text), "", node) {
            Value::Object(root) => tree.root = root,
            Value::Null => {}
            other => {
                let message = format!("expected keys and values, found {}", describe(&other));
                return Err(whole(Some(1), message));
            }
        }
        Ok(tree)
    }

    /// `source` is a name and the text itself.
    fn take(&mut self, source: (&str, &str), path: &str, node: Node) -> Value {
        match node.kind {
            Kind::Leaf(value) => scalar::as_pyyaml_does(value, source.1, node.bytes),
            Kind::List(items) => {
                let items = items.into_iter().enumerate().map(|(index, item)| {
                    let path = format!("{path}[{index}]");
                    self.put(source, &path, item.line);
                    self.take(source, &path, item)
                });
                Value::Array(items.collect())
            }
            Kind::Map(entries) => {
                let entries = entries.into_iter().map(|(key, line, node)| {
                    let path = join(path, &key);
                    self.put(source, &path, line);
                    let value = self.take(source, &path, node);
                    (key, value)
                });
                Value::Object(entries.collect())
            }
        }
    }

    fn put(&mut self, (source, _): (&str, &str), path: &str, line: u64) {
        let place = Place { source: source.to_owned(), line: Some(line) };
        self.places.insert(path.to_owned(), place);
    }

    /// Lays `over` on top: sections are merged, everything else is replaced.
    pub(crate) fn merge(&mut self, over: Self) {
        merge_maps(&mut self.root, over.root);
        self.places.extend(over.places);
    }

    /// Sets one value given as a path, as an environment variable does.
    pub(crate) fn set(&mut self, path: &[&str], value: Value, place: Place) {
        let Some((last, sections)) = path.split_last() else { return };
        let mut map = &mut self.root;
        for section in sections {
            let slot = map.entry(*section).or_insert(Value::Null);
            if !slot.is_object() {
                *slot = Value::Object(Map::new());
            }
            let Value::Object(inner) = slot else { return };
            map = inner;
        }
        map.insert((*last).to_owned(), value);
        self.places.insert(path.join("."), place);
    }
}

/// One value that stands alone, as in an environment variable. Text that is no YAML is text.
pub(crate) fn parse_value(text: &str) -> Value {
    serde_saphyr::from_str_with_options::<Node>(text, options())
        .map_or_else(|_| Value::from(text), |node| Tree::default().take(("", text), "", node))
}

/// One value; text that is no YAML is refused.
pub(crate) fn parse_strictly(text: &str) -> Result<Value, Problem> {
    serde_saphyr::from_str_with_options::<Option<Node>>(text, options())
        .map(|node| node.map_or(Value::Null, |node| Tree::default().take(("", text), "", node)))
        .map_err(|error| Problem {
            place: Place { source: "YAML".to_owned(), line: error.location().map(|at| at.line()) },
            key: String::new(),
            message: first_line(&error),
        })
}

/// `a.b` from `a` and `b`.
pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// A value in a message: a short scalar itself, else its kind.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) if text.chars().count() <= 80 => format!("{text:?}"),
        Value::String(_) => "a long text".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "keys and values".to_owned(),
    }
}

fn merge_maps(under: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Object(old)), Value::Object(new)) => merge_maps(old, new),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// PyYAML's reading, as far as the parser can: the last of two equal keys wins. What a plain scalar
/// is, [`scalar`] says.
/// Snippets are off, for they could show a password.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        legacy_octal_numbers: true,
        with_snippet: false,
    }
}

fn first_line(error: &serde_saphyr::Error) -> String {
    error.without_snippet().to_string().lines().next().unwrap_or_default().to_owned()
}

struct Node {
    line: u64,
    /// Where a scalar's text was written, behind an alias where its anchor is.
    bytes: Range<usize>,
    kind: Kind,
}

enum Kind {
    Leaf(Value),
    List(Vec<Node>),
    Map(Vec<(String, u64, Node)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Kind>::deserialize(deserializer)?;
        let span = spanned.defined.span();
        let start = span.byte_offset().and_then(|start| usize::try_from(start).ok());
        let length = span.byte_len().and_then(|length| usize::try_from(length).ok());
        let start = start.unwrap_or_default();
        let bytes = start..start.saturating_add(length.unwrap_or_default());
        Ok(Self { line: spanned.referenced.line(), bytes, kind: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KindVisitor)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = Kind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Kind, E> {
        Ok(Kind::Leaf(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Kind, E> {
        Ok(Kind::Leaf(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Kind, E> {
        Ok(Kind::Leaf(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Kind, E> {
        Ok(Kind::Leaf(Number::from_f64(value).map_or(Value::Null, Value::Number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Kind, E> {
        Ok(Kind::Leaf(value.into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Kind, E> {
        Ok(Kind::Leaf(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Kind, E> {
        Ok(Kind::Leaf(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Kind, E> {
        Ok(Kind::Leaf(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Kind, D::Error> {
        Kind::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Kind, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Kind::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Kind, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let node = access.next_value()?;
            entries.push((key.value, key.referenced.line(), node));
        }
        Ok(Kind::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(text: &str) -> Tree {
        Tree::parse("f.yml", text).expect(text)
    }

    fn json(text: &str) -> String {
        Value::Object(tree(text).root).to_string()
    }

    #[test]
    fn values_are_what_pyyaml_makes_of_them() {
        for (yaml, expected) in [
            ("a: on", r#"{"a":true}"#),
            ("a: 'on'", r#"{"a":"on"}"#),
            ("a: No", r#"{"a":false}"#),
            ("a: 0600", r#"{"a":384}"#),
            ("a: 1_000", r#"{"a":1000}"#),
            ("a: -3", r#"{"a":-3}"#),
            ("a: y", r#"{"a":"y"}"#),
            ("a: N # no", r#"{"a":"N"}"#),
            ("a: tRUE", r#"{"a":"tRUE"}"#),
            ("a: 'y'\nb: \"1\"", r#"{"a":"y","b":"1"}"#),
            ("a: &x y\nb: *x", r#"{"a":"y","b":"y"}"#),
            ("a: &x 1e3\nb: *x", r#"{"a":"1e3","b":"1e3"}"#),
            (
                "ü: [y, on, 08, 0x1F, 0o17, +1, 1e+3, 1.5e+3]",
                r#"{"ü":["y",true,"08",31,"0o17",1,"1e+3",1500.0]}"#,
            ),
            ("a: {b: n, c: Off}", r#"{"a":{"b":"n","c":false}}"#),
            ("a: 12:30", r#"{"a":750}"#),
            ("a: 1.2.3", r#"{"a":"1.2.3"}"#),
            ("a: Null", r#"{"a":null}"#),
            ("a: !!str 12", r#"{"a":"12"}"#),
            ("a: |-\n  12", r#"{"a":"12"}"#),
            ("a: >-\n  on", r#"{"a":"on"}"#),
            ("a: two\n  words", r#"{"a":"two words"}"#),
            ("a: 1.5", r#"{"a":1.5}"#),
            ("a: ~", r#"{"a":null}"#),
            ("a:", r#"{"a":null}"#),
            ("a: 127.0.0.1:5432", r#"{"a":"127.0.0.1:5432"}"#),
            ("a: 1\na: 2", r#"{"a":2}"#),
            ("a: &x {b: 1}\nc:\n  <<: *x\n  d: 2", r#"{"a":{"b":1},"c":{"d":2,"b":1}}"#),
            ("z: 1\ny: 2\nx: [1, two, {k: v}]", r#"{"z":1,"y":2,"x":[1,"two",{"k":"v"}]}"#),
            ("1: one", r#"{"1":"one"}"#),
            ("", "{}"),
            ("# nothing", "{}"),
            ("---\na: 1", r#"{"a":1}"#),
        ] {
            let got: Value = serde_json::from_str(&json(yaml)).unwrap();
            assert_eq!(got, serde_json::from_str::<Value>(expected).unwrap(), "{yaml}");
        }
        assert_eq!(json("z: 1\na: 2"), r#"{"z":1,"a":2}"#, "the order is kept");
    }

    #[test]
    fn every_key_has_its_line() {
        let text = "# head\nscope: x\npostgresql:\n  # note\n  listen: a:1\n\n  auth: {user: u,\n    password: p}\nlist:\n  - name: one\n    port: 1\n  - name: two\n    port: 2\n";
        let places = tree(text).places;
        for (path, line) in [
            ("scope", 2),
            ("postgresql", 3),
            ("postgresql.listen", 5),
            ("postgresql.auth.user", 7),
            ("postgresql.auth.password", 8),
            ("list[1].port", 13),
            ("list[1]", 12),
        ] {
            assert_eq!(places.get(path).and_then(|place| place.line), Some(line), "{path}");
        }
    }

    #[test]
    fn what_is_no_yaml_is_refused_with_its_line() {
        for (text, line) in [("a: [1, 2\nb: 3\n", 2), ("a: 1\n b: {\n", 2), ("- a\n- b\n", 1)] {
            let problem = Tree::parse("f.yml", text).expect_err(text);
            assert_eq!(problem.place.source, "f.yml");
            assert!(problem.place.line.is_some_and(|found| found >= line), "{text}: {problem}");
        }
    }

    #[test]
    fn later_sources_win_and_sections_are_merged() {
        let mut under = tree("a: {b: 1, c: 2}\nd: [1]");
        under.merge(Tree::parse("g.yml", "\na: {c: 3}\nd: [2, 3]").unwrap());
        assert_eq!(
            Value::Object(under.root.clone()).to_string(),
            r#"{"a":{"b":1,"c":3},"d":[2,3]}"#
        );
        assert_eq!(under.places["a.c"].to_string(), "g.yml:2");
        let place = Place { source: "PATRONI_X".to_owned(), line: None };
        under.set(&["e", "f"], Value::from(1), place);
        assert_eq!(under.root["e"]["f"], 1);
    }
}
