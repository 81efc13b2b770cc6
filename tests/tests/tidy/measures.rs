//! The measures of the review of the code (docs/measures.md), printed and bounded.

use std::path::PathBuf;

use super::{code_of, dependencies, files_below, language, modules, none, read, root, short};

const CRATES: [&str; 8] = ["agent", "cluster", "config", "ctl", "dcs", "protocol", "proxy", "tls"];

/// The files of the product, without tests.
fn product() -> Vec<PathBuf> {
    let all = CRATES.iter().flat_map(|name| files_below(&root().join(name).join("src"), &[".rs"]));
    all.filter(|file| !file.ends_with("tests.rs") && !short(file).contains("/tests/")).collect()
}

/// The lengths of the functions of a file, from `fn` to the closing brace; inline tests excluded.
fn function_lengths(text: &str) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().take_while(|line| *line != "mod tests {").collect();
    let is_function = |line: &str| {
        let code = line.trim_start();
        let words = ["pub ", "pub(crate) ", "pub(super) ", "async ", "const ", "unsafe "];
        let code = words.iter().fold(code, |code, word| code.strip_prefix(word).unwrap_or(code));
        code.starts_with("fn ")
    };
    let mut lengths = Vec::new();
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| is_function(line)) {
        let indent = line.len() - line.trim_start().len();
        let end = format!("{}}}", " ".repeat(indent));
        let head = lines[at..].iter().find(|line| line.ends_with('{') || line.ends_with(';'));
        if head.is_none_or(|line| line.ends_with(';')) {
            // A trait's method without a body.
            continue;
        }
        let length = lines[at..].iter().position(|line| *line == end);
        lengths.extend(length.map(|length| length + 1));
    }
    lengths
}

/// Statements that drop a value without a name for the reason (`kornak_cluster::discard` has the names);
/// fuzzers, which look only whether anything panics, and inline tests excluded.
fn unnamed_discards() -> Vec<String> {
    let mut found = Vec::new();
    for file in product().iter().filter(|file| !short(file).contains("fuzz")) {
        let text = read(file);
        let lines = text.lines().take_while(|line| !is_test_code(line));
        for (at, line) in lines.enumerate() {
            if code_of(line).contains(concat!("let", " _ =")) {
                found.push(format!("{}:{}", short(file), at + 1));
            }
        }
    }
    found
}

/// Whether inline tests, or a fuzzer's entry points, begin here: they stand at the end of a file.
fn is_test_code(line: &str) -> bool {
    line == "mod tests {" || line.starts_with("pub fn fuzz_")
}

#[test]
fn each_discarded_result_says_why() {
    none(
        &unnamed_discards(),
        "handle the error, log it, or name the reason (kornak_cluster::discard)",
    );
}

/// Dependencies of our crates that no file of theirs names.
fn unused_dependencies() -> Vec<String> {
    let mut unused = Vec::new();
    for (name, used) in dependencies() {
        let short_name = name.trim_start_matches("kornak-");
        if !CRATES.contains(&short_name) {
            continue;
        }
        let files = files_below(&root().join(short_name), &[".rs"]);
        let text: String = files.iter().map(|file| read(file)).collect();
        for dependency in used {
            // This package's library has another name.
            let ident = match dependency.as_str() {
                "md-5" => "md5".to_owned(),
                other => other.replace('-', "_"),
            };
            if !text.contains(&format!("{ident}::")) && !text.contains(&format!("use {ident};")) {
                unused.push(format!("{name}: {dependency}"));
            }
        }
    }
    unused
}

#[test]
fn each_dependency_is_used() {
    none(&unused_dependencies(), "no file of the crate names the dependency");
}

#[test]
fn the_measures_of_the_review_hold() {
    let files = product();
    let mut lines: Vec<usize> = files.iter().map(|file| read(file).lines().count()).collect();
    lines.sort_unstable();
    let mut functions: Vec<usize> =
        files.iter().flat_map(|file| function_lengths(&read(file))).collect();
    functions.sort_unstable();
    let at = |sorted: &[usize], percent: usize| sorted[(sorted.len() - 1) * percent / 100];
    let over = |bound: usize| functions.iter().filter(|length| **length > bound).count();
    let upward = modules::upward_imports().len();
    let (banned, comments) = language::openings();
    println!(
        "files: {}, lines median {}, p90 {}, longest {}",
        lines.len(),
        at(&lines, 50),
        at(&lines, 90),
        at(&lines, 100)
    );
    println!(
        "functions: {}, lines median {}, p99 {}, longest {}",
        functions.len(),
        at(&functions, 50),
        at(&functions, 99),
        at(&functions, 100)
    );
    println!("functions over 70 lines: {}, over 100: {}", over(70), over(100));
    println!("upward imports between modules of agent and proxy: {upward}");
    println!("doc comments with a banned opening: {} of {comments}", banned.len());
    println!("results discarded without a reason: {}", unnamed_discards().len());
    println!("dependencies that are not used: {}", unused_dependencies().len());
    assert!(functions.len() > 2000, "only {} functions found", functions.len());
    assert!(over(100) == 0 && over(70) <= 12, "{} functions over 70 lines", over(70));
}
