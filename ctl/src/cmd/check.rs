//! `kornak check FILE`.

mod host;

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use kornak_config::{Finding, Kind, Severity};

use crate::output::say;

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// An agent's or a proxy's file, or a folder of files.
    file: PathBuf,
}

impl CheckArgs {
    /// With this file.
    pub(super) fn of(file: PathBuf) -> Self {
        Self { file }
    }
}

/// Prints what is wrong. A folder's files are one configuration, unless they are for different programs.
///
/// # Errors
/// The agent or proxy would refuse the file.
pub fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    let apart = of_different_programs(&args.file);
    let files = if apart.is_empty() { vec![args.file.clone()] } else { apart };
    let mut mistakes = 0;
    for file in files {
        let mut findings = kornak_config::check(&file, &environment);
        findings.extend(host::findings(&file, &environment));
        for finding in &findings {
            say(&finding.to_string());
        }
        let is_error = |finding: &&Finding| finding.severity == Severity::Error;
        let errors = findings.iter().filter(is_error).count();
        if errors == 0 {
            let kind = match kornak_config::kind(&file)? {
                Kind::Agent => "an agent",
                Kind::Proxy => "a proxy",
            };
            say(&format!("{}: good for {kind}", file.display()));
        }
        mistakes += errors;
    }
    let file = args.file.display();
    match mistakes {
        0 => Ok(()),
        1 => bail!("{file}: 1 mistake"),
        count => bail!("{file}: {count} mistakes"),
    }
}

/// The files of a folder that holds an agent's and a proxy's; what is neither is left out.
fn of_different_programs(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let yaml = |path: &PathBuf| path.extension().is_some_and(|end| end == "yml" || end == "yaml");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(yaml).collect();
    files.sort();
    let whole = |wanted: Kind| {
        let fits = |file: &&PathBuf| {
            kornak_config::kind(file).is_ok_and(|kind| kind == wanted)
                && std::fs::read_to_string(file)
                    .is_ok_and(|text| text.lines().any(|line| line.starts_with("scope:")))
        };
        files.iter().filter(fits).cloned().collect::<Vec<_>>()
    };
    let (agents, proxies) = (whole(Kind::Agent), whole(Kind::Proxy));
    match agents.is_empty() || proxies.is_empty() {
        true => Vec::new(),
        false => agents.into_iter().chain(proxies).collect(),
    }
}
