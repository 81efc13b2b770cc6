//! `kornak completions` and `kornak man`: for the shell, and for those who read manuals.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Patronictl};

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// For which shell.
    shell: Shell,
    /// For the name patronictl instead of kornak.
    #[arg(long)]
    patronictl: bool,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// The folder, such as /usr/local/share/man/man1.
    dir: PathBuf,
}

/// Prints the completions.
///
/// # Errors
/// None.
pub fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    let (mut command, name) = if args.patronictl {
        (Patronictl::command(), "patronictl")
    } else {
        (Cli::command(), "kornak")
    };
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, name, &mut text);
    crate::output::say(String::from_utf8_lossy(&text).trim_end());
    Ok(())
}

/// Writes a page for each command.
///
/// # Errors
/// The folder cannot be written.
pub fn man(args: &ManArgs) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), &args.dir))
        .with_context(|| format!("write the pages into {}", args.dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_command_lines_contradict_themselves_nowhere() {
        Cli::command().debug_assert();
        Patronictl::command().debug_assert();
    }

    #[test]
    fn every_verb_has_a_page_and_is_completed() {
        let dir = std::env::temp_dir().join(format!("kornak-man-{}", std::process::id()));
        man(&ManArgs { dir: dir.clone() }).expect("it can be written");
        let page = std::fs::read_to_string(dir.join("kornak-switchover.1")).expect("it is there");
        std::fs::remove_dir_all(&dir).expect("it is ours");
        assert!(page.contains("candidate"), "{page}");
        let mut text = Vec::new();
        clap_complete::generate(Shell::Bash, &mut Cli::command(), "kornak", &mut text);
        assert!(String::from_utf8_lossy(&text).contains("edit-config"));
    }
}
