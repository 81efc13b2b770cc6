//! Which crates and modules may use which, and which of them wait for nothing.

use std::collections::BTreeSet;
use std::path::Path;

use super::{code_of, dependencies, files_below, none, read, root, rust_files, short};

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
    "proxy/src/waiting/holding.rs",
    "proxy/src/waiting/outage.rs",
    "proxy/src/waiting/read_source.rs",
    "ctl/src/render",
    "ctl/src/render.rs",
    "ctl/src/view.rs",
    "tests/src/torture/faults.rs",
    "tests/src/torture/history.rs",
];

/// A crate's modules, or groups of them, from the lowest up: each imports from those before it.
pub(super) const LAYERS: &[(&str, &[&str])] = &[
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
            "board",
            "pledges",
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
            "depose",
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
        assert!(
            extra || known.contains(name.as_str()),
            "{name} has no rule in tests/tidy/modules.rs"
        );
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

/// The names below the crate's root that a file uses, one for each place.
fn imports(text: &str) -> Vec<String> {
    let code: Vec<&str> = text.lines().map(code_of).collect();
    let code = code.join("\n");
    let name = |after: &str| {
        after.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect::<String>()
    };
    code.match_indices("crate::").map(|(at, word)| name(&code[at + word.len()..])).collect()
}

/// The imports that point at a module in a higher place of LAYERS.
pub(super) fn upward_imports() -> Vec<String> {
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
    found
}

#[test]
fn no_import_points_upwards_between_groups_of_modules() {
    let rule = "modules import from groups below their own; see the crate's documentation";
    none(&upward_imports(), rule);
}
