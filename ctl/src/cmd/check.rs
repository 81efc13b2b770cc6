//! `kornak check FILE`.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use kornak_config::{Kind, Severity};

use crate::output::say;

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// An agent's or a proxy's file, or a folder of files.
    file: PathBuf,
}

/// Prints what is wrong.
///
/// # Errors
/// The agent or proxy would refuse the file.
pub fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let environment: Vec<(String, String)> = std::env::vars().collect();
    let findings = kornak_config::check(&args.file, &environment);
    for finding in &findings {
        say(&finding.to_string());
    }
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
    let file = args.file.display();
    match errors {
        0 => {
            let kind = match kornak_config::kind(&args.file)? {
                Kind::Agent => "an agent",
                Kind::Proxy => "a proxy",
            };
            say(&format!("{file}: good for {kind}"));
            Ok(())
        }
        1 => bail!("{file}: 1 mistake"),
        count => bail!("{file}: {count} mistakes"),
    }
}
