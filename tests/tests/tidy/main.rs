//! Rules that a reader may rely on and a compiler does not check.
//!
//! A rule about something that does not exist yet is silent; one whose subject exists never passes
//! for want of anything to look at.

mod language;
mod measures;
mod modules;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const LONGEST_FILE: usize = 600;

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the package lies in the workspace").to_owned()
}

fn read(path: &Path) -> String {
    let text = fs::read_to_string(path);
    assert!(text.is_ok(), "read {}: {text:?}", path.display());
    text.unwrap_or_default()
}

/// Every file below `dir` that ends in one of these, without target directories and hidden ones.
fn files_below(dir: &Path, ends: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if name != "target" && !name.starts_with('.') {
                    todo.push(path);
                }
            } else if ends.iter().any(|end| name.ends_with(end)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn rust_files() -> Vec<PathBuf> {
    let files = files_below(&root(), &[".rs"]);
    assert!(files.len() > 50, "only {} Rust files below {}", files.len(), root().display());
    files
}

fn short(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// Fails with all that was found, one a line.
fn none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n  {}", found.join("\n  "));
}

/// The text without `//` comments; a URL's slashes end it early, which no rule here minds.
fn code_of(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

/// Our crates and their dependencies apart from those of tests.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("documented by cargo");
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_owned();
    packages
        .iter()
        .map(|package| {
            let all = package["dependencies"].as_array().expect("documented by cargo");
            let used = all.iter().filter(|it| it["kind"].as_str() != Some("dev")).map(name);
            (name(package), used.collect())
        })
        .collect()
}

#[test]
fn files_are_short_enough_to_be_read_to_the_end() {
    let long: Vec<String> = rust_files()
        .iter()
        .map(|file| (file, read(file).lines().count()))
        .filter(|(_, lines)| *lines > LONGEST_FILE)
        .map(|(file, lines)| format!("{}: {lines} lines", short(file)))
        .collect();
    none(&long, "no file is longer than 600 lines; split it by phase");
}

#[test]
fn nothing_is_left_for_later() {
    // Written in two parts, so that this file does not find itself.
    let words =
        [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:"), concat!("#[ig", "nore")];
    let mut found = Vec::new();
    let ends = [".rs", ".md", ".toml", ".sh", ".yml", ".service"];
    for file in files_below(&root(), &ends) {
        for (number, line) in read(&file).lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                found.push(format!("{}:{}: {}", short(&file), number + 1, line.trim()));
            }
        }
    }
    none(&found, "what is to be done later belongs in an issue, and no test is switched off");
}

#[test]
fn each_dependency_says_what_it_is_for() {
    let manifest = read(&root().join("Cargo.toml"));
    let lines: Vec<&str> = manifest
        .lines()
        .skip_while(|line| *line != "[workspace.dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.is_empty() && !line.starts_with('#') && !line.starts_with("kornak-"))
        .collect();
    assert!(lines.len() > 30, "only {} dependencies found", lines.len());
    let silent: Vec<String> = lines
        .iter()
        .filter(|line| line.split_once(" # ").is_none_or(|(_, why)| why.trim().len() < 4))
        .map(ToString::to_string)
        .collect();
    none(&silent, "a dependency's line ends in a comment that says what it is for");
}

/// Every word of a text that can be the name of a metric of ours. Crates are called alike, but
/// theirs are shorter or lead to something in them.
fn metric_names(text: &str) -> BTreeSet<String> {
    let word_character = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut names = BTreeSet::new();
    for prefix in ["kornak_agent_", "kornak_proxy_", "patroni_"] {
        for (start, _) in text.match_indices(prefix) {
            let name: String = text[start..].chars().take_while(|c| word_character(*c)).collect();
            let whole = !text[..start].ends_with(word_character);
            if whole && name.len() > prefix.len() && !name.ends_with('_') {
                names.insert(name);
            }
        }
    }
    names
}

#[test]
fn each_metric_is_documented_and_each_documented_metric_exists() {
    let page = root().join("docs/metrics.md");
    if !page.exists() {
        return;
    }
    let mut names = BTreeSet::new();
    for crate_dir in ["agent", "proxy"] {
        let all = files_below(&root().join(crate_dir).join("src"), &[".rs"]);
        let files: Vec<_> = all
            .iter()
            .filter(|file| short(file).contains("metrics") && !short(file).contains("tests"))
            .collect();
        assert!(!files.is_empty(), "{crate_dir} has no metrics.rs");
        for file in files {
            names.extend(metric_names(&read(file)));
        }
    }
    assert!(names.len() > 10, "only {} metrics found in the code", names.len());
    let documented = metric_names(&read(&page));
    let missing: Vec<_> = names.difference(&documented).cloned().collect();
    none(&missing, "docs/metrics.md does not name");
    let gone: Vec<_> = documented.difference(&names).cloned().collect();
    none(&gone, "docs/metrics.md names what does not exist");
    let alerts = metric_names(&read(&root().join("deploy/prometheus/alerts.yml")));
    assert!(!alerts.is_empty(), "the alerts use no metric");
    let unknown: Vec<_> = alerts.difference(&names).cloned().collect();
    none(&unknown, "deploy/prometheus/alerts.yml asks for what does not exist");
}

#[test]
fn each_example_configuration_is_accepted() {
    let files = files_below(&root().join("deploy"), &[".yml", ".yaml"]);
    let ours: Vec<_> = files.iter().filter(|file| read(file).starts_with("# kornak ")).collect();
    assert!(ours.len() >= 2, "deploy/ holds an agent's and a proxy's example, found {ours:?}");
    for file in ours {
        let output = kornak_tests::run::kornak::with_file("check", file).output().expect("it runs");
        assert!(
            output.status.success(),
            "kornak check {}: {}{}",
            short(file),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn unsafe_code_is_where_it_says_so_and_nowhere_else() {
    let mut found = Vec::new();
    for file in rust_files() {
        let text = read(&file);
        let uses = text.lines().any(|line| {
            let code = code_of(line);
            code.contains(concat!("un", "safe {")) || code.contains(concat!("un", "safe fn"))
        });
        if uses && !text.contains(concat!("expect(un", "safe_code, reason")) {
            found.push(short(&file));
        }
    }
    none(&found, "a module that needs unsafe code expects it with a reason");
}

/// The keys that a reader accepts: what stands in quotes in its lists of known keys and in its pairs
/// of names.
fn keys_read_by(file: &str) -> BTreeSet<String> {
    let text = read(&root().join(file));
    let lists = text.split("only(&[").skip(1).filter_map(|after| after.split_once("])"));
    let pairs = text.split("= key(").skip(1).filter_map(|after| after.split_once(')'));
    let is_key = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    lists
        .chain(pairs)
        .flat_map(|(inside, _)| inside.split('"').skip(1).step_by(2))
        .filter(is_key)
        .map(str::to_owned)
        .collect()
}

#[test]
fn each_key_of_a_proxys_file_is_documented() {
    let page = read(&root().join("docs/configuration.md"));
    let words: BTreeSet<&str> =
        page.split(|c: char| !(c.is_ascii_lowercase() || c == '_')).collect();
    let keys: BTreeSet<String> = ["proxy", "limits"]
        .iter()
        .flat_map(|reader| keys_read_by(&format!("config/src/read/{reader}.rs")))
        .collect();
    assert!(keys.len() > 60, "only {} keys found", keys.len());
    // What has no effect any more needs no description.
    let missing: Vec<String> = keys
        .into_iter()
        .filter(|key| key != "max_held_bytes" && !words.contains(key.as_str()))
        .collect();
    none(&missing, "docs/configuration.md does not name");
}
