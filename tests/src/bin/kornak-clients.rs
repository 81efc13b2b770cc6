//! `kornak-clients`: client stacks through switchovers and a crash, and what they saw of it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kornak_tests::clients::{Row, Spec, Stack, Stage};

/// Clients of pgbench.
const CROWD: usize = 200;

/// Runs client stacks through both kinds of listeners while the primary moves and crashes.
#[derive(Debug, Parser)]
struct Arguments {
    /// Groups or stacks to run (default: all)
    only: Vec<String>,
    /// The programs' sources, with stacks.txt
    #[arg(long, default_value = "tests/clients")]
    sources: PathBuf,
    /// The folder that tests/clients/setup.sh has built
    #[arg(long, default_value = "target/clients")]
    built: PathBuf,
    /// Seconds between two events
    #[arg(long, default_value_t = 3.0)]
    pause: f64,
    /// Planned switchovers for each group
    #[arg(long, default_value_t = 3)]
    switchovers: usize,
    /// Kill nothing
    #[arg(long)]
    no_crash: bool,
    /// Instead of stacks: so many minutes of pgbench with 200 clients over a pool of 8
    #[arg(long)]
    crowd: Option<f64>,
    /// Leave the cluster's directory, with the programs' errors
    #[arg(long)]
    keep: bool,
    /// Say what each stack did and every error, also of good ones
    #[arg(long)]
    verbose: bool,
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the table is what it is for")]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let (sources, built) = (arguments.sources.canonicalize(), arguments.built.canonicalize());
    let spec = Spec {
        sources: sources.context("the programs' sources")?,
        built: built.context("the built programs: run tests/clients/setup.sh")?,
        pause: Duration::from_secs_f64(arguments.pause),
        switchovers: arguments.switchovers,
        crash: !arguments.no_crash,
    };
    if let Some(minutes) = arguments.crowd {
        let stage = Stage::start().await?;
        let length = Duration::from_secs_f64(minutes * 60.0);
        let (report, good) = stage.crowd(&spec, CROWD, length).await?;
        println!(
            "{report}{}",
            if good { "no answer was wrong" } else { "NOT EVERY ANSWER WAS RIGHT" }
        );
        if !arguments.keep {
            stage.end();
        }
        return Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let list = spec.sources.join("stacks.txt");
    let text = std::fs::read_to_string(&list).with_context(|| list.display().to_string())?;
    let mut groups: Vec<(String, Vec<Stack>)> = Vec::new();
    for stack in Stack::list(&text)? {
        let chosen = |it: &String| *it == stack.group || *it == stack.name;
        if !arguments.only.is_empty() && !arguments.only.iter().any(chosen) {
            continue;
        }
        match groups.iter_mut().find(|(group, _)| *group == stack.group) {
            Some((_, stacks)) => stacks.push(stack),
            None => groups.push((stack.group.clone(), vec![stack])),
        }
    }
    ensure!(!groups.is_empty(), "no such stack in {}", list.display());
    let mut skipped = Vec::new();
    groups.retain(|(group, _)| {
        let reason = std::fs::read_to_string(spec.built.join(format!("{group}.skipped")));
        skipped.extend(reason.iter().map(|it| format!("SKIPPED {group}: {}", it.trim())));
        reason.is_err()
    });
    let mut stage = Stage::start().await?;
    let mut good = true;
    println!("{}", Row::head());
    for (_, stacks) in &groups {
        for row in stage.play(stacks, &spec).await? {
            println!("{row}");
            if arguments.verbose || !row.is_good() {
                println!("{}", row.details());
            }
            good &= row.is_good();
        }
    }
    for line in skipped {
        println!("{line}");
    }
    if !arguments.keep {
        stage.end();
    }
    println!("{}", if good { "every stack went on" } else { "NOT EVERY STACK WENT ON" });
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
