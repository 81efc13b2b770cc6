//! Documentation and log messages: what they cite exists, and each stands alone.

use std::path::{Path, PathBuf};

use super::{files_below, none, read, root, short};

/// Crates and other folders whose doc comments and log messages stand alone: each names its subject.
const SELF_CONTAINED: &[&str] = &[
    "agent/src",
    "benches",
    "cluster/src",
    "config/src",
    "ctl/src",
    "dcs/src",
    "protocol/src",
    "proxy",
    "tests",
    "tls/src",
];

/// Openings that point at another line, or hide who or what is meant.
const BANNED_OPENINGS: &[&str] = &[
    "It ",
    "They ",
    "Those ",
    "These ",
    "The same",
    "Who ",
    "Whoever ",
    "What ",
    "Its ",
    "Their ",
    "So long",
    "For these",
];

/// A document that a line names, and what follows the name.
fn cited(line: &str) -> Vec<(&str, &str)> {
    let in_name = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    line.match_indices(".md")
        .filter_map(|(at, end)| {
            let name = &line[..at + end.len()];
            let start = name.rfind(|c: char| !in_name(c)).map_or(0, |before| before + 1);
            let rest = &line[at + end.len()..];
            let whole = !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
            let ours = !line[..start].ends_with(':') && name.len() > start + end.len();
            (whole && ours).then(|| (&name[start..], rest))
        })
        .collect()
}

/// The documents that a name may mean: beside the file that cites it, from the root, or in `docs/`.
fn document(name: &str, citing: &Path) -> Option<PathBuf> {
    let beside = citing.parent().map(|dir| dir.join(name));
    let places = [beside, Some(root().join(name)), Some(root().join("docs").join(name))];
    places.into_iter().flatten().find(|path| path.exists())
}

/// The part of a document that a citation names: `docs/safety.md A12`, or a heading as in
/// `docs/protocol.md, *Settings*`.
fn part(after: &str) -> Option<String> {
    if let Some(number) = after.strip_prefix(" A") {
        let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
        return (!digits.is_empty()).then(|| format!("A{digits}"));
    }
    let quoted = after.strip_prefix(", ")?;
    let quote = quoted.chars().next().filter(|it| ['*', '"'].contains(it))?;
    quoted[1..].split_once(quote).map(|(heading, _)| heading.to_owned())
}

#[test]
fn each_document_that_is_cited_exists_and_has_the_part_that_is_named() {
    let ends = [".rs", ".md", ".toml", ".yml", ".sh", ".service", "Makefile"];
    let mut found = Vec::new();
    let mut seen = 0;
    // Suites of drivers are other projects' trees, with documents of their own.
    let files = files_below(&root(), &ends);
    for file in files.iter().filter(|file| !short(file).starts_with("tests/drivers/")) {
        if file.ends_with("tests/tests/tidy/language.rs") {
            continue;
        }
        for (number, line) in read(file).lines().enumerate() {
            for (name, after) in cited(line) {
                seen += 1;
                let place = format!("{}:{}", short(file), number + 1);
                let Some(path) = document(name, file) else {
                    found.push(format!("{place}: {name}"));
                    continue;
                };
                let Some(part) = part(after) else { continue };
                let has = read(&path).lines().any(|line| {
                    let heading = line.starts_with('#') && line.contains(&part);
                    heading || line.starts_with(&format!("| {part}"))
                });
                if !has {
                    found.push(format!("{place}: {name} has no {part}"));
                }
            }
        }
    }
    assert!(seen > 60, "only {seen} citations found");
    none(&found, "a document that is cited exists, and so does the part that is named");
}

/// The messages of a file's log lines, with the line on which each macro begins.
fn log_messages(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for level in ["debug!(", "info!(", "warn!(", "error!("] {
        for (at, _) in text.match_indices(level) {
            let begin = at + level.len();
            let (mut depth, mut quoted, mut escaped) = (1, false, false);
            let (mut last, mut current) = (String::new(), String::new());
            for c in text[begin..].chars() {
                match c {
                    _ if escaped => escaped = false,
                    '\\' if quoted => escaped = true,
                    '"' => {
                        if quoted {
                            last = std::mem::take(&mut current);
                        }
                        quoted = !quoted;
                    }
                    c if quoted => current.push(c),
                    '(' => depth += 1,
                    ')' => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
            found.push((text[..at].lines().count(), last));
        }
    }
    found
}

#[test]
fn a_log_message_names_its_subject() {
    let mut found = Vec::new();
    let mut seen = 0;
    for name in SELF_CONTAINED {
        for file in files_below(&root().join(name), &[".rs"]) {
            for (line, message) in log_messages(&read(&file)) {
                seen += 1;
                let message = message.to_lowercase();
                let points = |opening: &&str| message.starts_with(&opening.to_lowercase());
                if BANNED_OPENINGS.iter().any(points) {
                    found.push(format!("{}:{line}: {message}", short(&file)));
                }
            }
        }
    }
    assert!(seen > 200, "only {seen} log messages found");
    none(&found, "a log message says what happened to what");
}

/// Doc comments that begin with a banned opening, and the number of all doc comments.
pub(super) fn openings() -> (Vec<String>, usize) {
    let mut found = Vec::new();
    let mut seen = 0;
    for name in SELF_CONTAINED {
        let all = files_below(&root().join(name), &[".rs"]);
        for file in &all {
            let mut inside = false;
            for (number, line) in read(file).lines().enumerate() {
                let text = line.trim();
                let doc = text.strip_prefix("/// ").or_else(|| text.strip_prefix("//! "));
                if let (false, Some(doc)) = (inside, doc) {
                    seen += 1;
                    if BANNED_OPENINGS.iter().any(|opening| doc.starts_with(opening)) {
                        found.push(format!("{}:{}: {text}", short(file), number + 1));
                    }
                }
                // A paragraph, and what follows a heading, is read on its own as well.
                let is_break =
                    matches!(text, "///" | "//!") || doc.is_some_and(|doc| doc.starts_with("# "));
                inside = text.starts_with("//") && !is_break;
            }
        }
    }
    (found, seen)
}

#[test]
fn a_doc_comment_stands_alone() {
    let (found, seen) = openings();
    assert!(seen > 1000, "only {seen} doc comments found");
    none(&found, "a doc comment names its subject");
}
