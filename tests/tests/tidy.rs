//! What keeps the tree tidy: rules that a reader may rely on and a compiler does not check.
//!
//! A rule about something that does not exist yet is silent; one whose subject exists never passes
//! for want of anything to look at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// A crate, and all of our crates that it may use. Everything may be used by tests and benches.
const USES: &[(&str, &[&str])] = &[
    ("kornak-protocol", &[]),
    ("kornak-cluster", &[]),
    ("kornak-tls", &[]),
    ("kornak-dcs", &["kornak-cluster", "kornak-tls"]),
    ("kornak-config", &["kornak-cluster"]),
    ("kornak-agent", &["kornak-cluster", "kornak-config", "kornak-dcs", "kornak-tls"]),
    (
        "kornak-proxy",
        &["kornak-cluster", "kornak-config", "kornak-dcs", "kornak-protocol", "kornak-tls"],
    ),
    (
        "kornak-ctl",
        &["kornak-agent", "kornak-cluster", "kornak-config", "kornak-dcs", "kornak-proxy"],
    ),
];

/// Where nothing waits: no tokio in these files, nor in a folder of the same name. Each module whose
/// documentation says that the module is pure is here.
const PURE: &[&str] = &[
    "protocol/src",
    "cluster/src",
    "config/src",
    "tls/src/chain.rs",
    "tls/src/names.rs",
    "tls/src/signature.rs",
    "agent/src/api/health.rs",
    "agent/src/api/status.rs",
    "agent/src/citus/flight.rs",
    "agent/src/citus/plan.rs",
    "agent/src/citus/seen.rs",
    "agent/src/citus/settling.rs",
    "agent/src/ha",
    "agent/src/ha.rs",
    "proxy/src/admission/buckets.rs",
    "proxy/src/admission/rules.rs",
    "proxy/src/clients/serve/patience.rs",
    "proxy/src/cluster/route.rs",
    "proxy/src/cluster/standing.rs",
    "proxy/src/net/proxy_protocol.rs",
    "proxy/src/pool.rs",
    "proxy/src/pool/event.rs",
    "proxy/src/pool/room.rs",
    "proxy/src/pool/time.rs",
    "proxy/src/session",
    "proxy/src/session.rs",
    "proxy/src/waiting/hold.rs",
    "proxy/src/waiting/outage.rs",
    "proxy/src/waiting/read_source.rs",
    "ctl/src/render",
    "ctl/src/render.rs",
    "ctl/src/view.rs",
    "tests/src/torture/faults.rs",
    "tests/src/torture/history.rs",
];

/// A crate's modules, or groups of them, from the lowest up: each imports from those before it.
const LAYERS: &[(&str, &[&str])] = &[
    (
        "agent",
        &[
            "citus",
            "clock",
            "durable",
            "full",
            "guard",
            "ha",
            "tls",
            "units",
            "counters",
            "machine",
            "node",
            "postgres",
            "tries",
            "callbacks",
            "failsafe",
            "lease",
            "memory",
            "peers",
            "publish",
            "schedule",
            "server",
            "api",
            "name_clash",
            "observe",
            "watchdog",
            "context",
            "citus_tasks",
            "failsafe_rounds",
            "self_report",
            "slots",
            "starting",
            "watchdog_task",
            "handover",
            "leading",
            "jobs",
            "driver",
            "instance",
        ],
    ),
    (
        "proxy",
        &[
            "sabotage",
            "net",
            "cluster",
            "session",
            "waiting",
            "admission",
            "pool",
            "registry",
            "metrics",
            "shared",
            "clients",
            "background",
            "status",
            "error",
        ],
    ),
];

const LONGEST_FILE: usize = 600;

/// Crates whose doc comments stand alone: each names its subject.
const SELF_CONTAINED: &[&str] =
    &["protocol", "cluster", "dcs", "tls", "config", "ctl", "proxy", "agent"];

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
fn crates_depend_in_one_direction() {
    let dependencies = dependencies();
    for (name, allowed) in USES {
        let used = dependencies.get(*name).unwrap_or_else(|| panic!("no crate {name}"));
        let ours: Vec<_> = used.iter().filter(|it| it.starts_with("kornak-")).collect();
        let wrong: Vec<_> = ours.iter().filter(|it| !allowed.contains(&it.as_str())).collect();
        assert!(wrong.is_empty(), "{name} must not use {wrong:?}; see ARCHITECTURE.md");
    }
    let known: BTreeSet<&str> = USES.iter().map(|(name, _)| *name).collect();
    for name in dependencies.keys() {
        let extra = ["kornak-tests", "kornak-benches"].contains(&name.as_str());
        assert!(extra || known.contains(name.as_str()), "{name} has no rule in tests/tidy.rs");
    }
}

#[test]
fn crates_without_io_have_no_runtime() {
    let dependencies = dependencies();
    for name in ["kornak-protocol", "kornak-cluster", "kornak-config"] {
        let runtime = ["tokio", "tokio-util", "hyper", "axum", "futures-util"];
        let found: Vec<_> = runtime.iter().filter(|it| dependencies[name].contains(**it)).collect();
        assert!(found.is_empty(), "{name} uses {found:?}");
    }
}

#[test]
fn pure_modules_do_not_wait() {
    let mut seen = 0;
    let mut found = Vec::new();
    for place in PURE {
        let path = root().join(place);
        let files = if path.is_dir() { files_below(&path, &[".rs"]) } else { vec![path] };
        let is_tests = |file: &Path| file.ends_with("tests.rs") || short(file).contains("/tests/");
        for file in files.iter().filter(|file| file.exists() && !is_tests(file)) {
            seen += 1;
            let text = read(file);
            let product = text.lines().take_while(|line| *line != "mod tests {");
            for (number, line) in product.enumerate() {
                let code = code_of(line);
                if code.contains("tokio")
                    || code.contains("Instant::now")
                    || code.ends_with(".await")
                    || code.contains(".await;")
                    || code.contains(".await?")
                {
                    found.push(format!("{}:{}: {}", short(file), number + 1, line.trim()));
                }
            }
        }
    }
    assert!(seen > 30, "only {seen} pure files found; has a folder moved?");
    none(&found, "a pure module takes the time and the facts as arguments");
}

#[test]
fn a_module_that_says_it_is_pure_is_checked() {
    let says_so = |line: &str| {
        let Some(doc) = line.strip_prefix("//! ") else { return false };
        let text = doc.to_lowercase();
        doc.starts_with("Pure") || doc.contains(". Pure") || text.ends_with(" pure.")
    };
    let found: Vec<String> = rust_files()
        .iter()
        .filter(|file| read(file).lines().any(says_so))
        .map(|file| short(file))
        .filter(|file| !PURE.iter().any(|place| file.starts_with(place)))
        .collect();
    none(&found, "a module that says it is pure is in the list PURE of this file");
}

/// What a file names below its crate's root, one name for each place.
fn imports(text: &str) -> Vec<String> {
    let code: Vec<&str> = text.lines().map(code_of).collect();
    let code = code.join("\n");
    let name = |after: &str| {
        after.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect::<String>()
    };
    code.match_indices("crate::").map(|(at, word)| name(&code[at + word.len()..])).collect()
}

#[test]
fn no_import_points_upwards_between_groups_of_modules() {
    let mut found = Vec::new();
    for (krate, groups) in LAYERS {
        let src = root().join(krate).join("src");
        let place = |name: &str| groups.iter().position(|group| *group == name);
        for file in files_below(&src, &[".rs"]) {
            let path = file.strip_prefix(&src).expect("found below it");
            let first = path.iter().next().unwrap_or_default().to_string_lossy();
            let own = first.trim_end_matches(".rs");
            let is_tests = file.ends_with("tests.rs") || short(&file).contains("/tests/");
            if own == "lib" || is_tests {
                continue;
            }
            let Some(at) = place(own) else {
                found.push(format!("{}: no place for {own} in LAYERS", short(&file)));
                continue;
            };
            for used in imports(&read(&file)) {
                let is_module = place(&used).is_some();
                if used != own && is_module && place(&used) > Some(at) {
                    found.push(format!("{} uses {used}", short(&file)));
                }
            }
        }
    }
    none(&found, "modules import from groups below their own; see the crate's documentation");
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
        if file.ends_with("tests/tests/tidy.rs") {
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

#[test]
fn a_doc_comment_stands_alone() {
    let mut found = Vec::new();
    let mut seen = 0;
    for name in SELF_CONTAINED {
        for file in files_below(&root().join(name).join("src"), &[".rs"]) {
            let mut inside = false;
            for (number, line) in read(&file).lines().enumerate() {
                let text = line.trim();
                let doc = text.strip_prefix("/// ").or_else(|| text.strip_prefix("//! "));
                if let (false, Some(doc)) = (inside, doc) {
                    seen += 1;
                    if BANNED_OPENINGS.iter().any(|opening| doc.starts_with(opening)) {
                        found.push(format!("{}:{}: {text}", short(&file), number + 1));
                    }
                }
                inside = text.starts_with("//");
            }
        }
    }
    assert!(seen > 1000, "only {seen} doc comments found");
    none(&found, "a doc comment names its subject");
}
