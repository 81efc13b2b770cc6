//! `kornak-torture`: breaks a cluster for some minutes and checks what clients saw.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use kornak_tests::run::lan;
use kornak_tests::torture::{Mode, Mutation, Spec, run_here};

/// Breaks something in a cluster every few seconds and checks that no promise was broken. Needs root.
#[derive(Debug, Parser)]
struct Arguments {
    /// How long, in minutes
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Chooses the faults; a random one if not given
    #[arg(long)]
    seed: Option<u64>,
    /// Synchronous mode
    #[arg(long, value_enum, default_value_t = Mode::On)]
    mode: Mode,
    /// Does something wrong on purpose; the check has to find it
    #[arg(long, value_enum)]
    mutation: Option<Mutation>,
    /// Instead of faults by chance, kill the leader's postmaster so often, each time with another member's receiver
    /// stopped a moment before
    #[arg(long)]
    crashes: Option<usize>,
    /// Clients
    #[arg(long, default_value_t = 12)]
    clients: usize,
}

#[expect(clippy::print_stdout, reason = "the report is what it is for")]
fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if !lan::is_inside() {
        ensure!(lan::is_possible(), "network namespaces cannot be made here: run it as root");
        let words: Vec<String> = std::env::args().skip(1).collect();
        lan::run_inside(words.iter().map(String::as_str))?;
        return Ok(ExitCode::SUCCESS);
    }
    let seed = arguments.seed.unwrap_or_else(|| rand::random_range(0..1_000_000));
    let spec = Spec {
        length: Duration::from_secs_f64(arguments.minutes * 60.0),
        seed,
        mode: arguments.mode,
        mutation: arguments.mutation,
        clients: arguments.clients,
        crashes: arguments.crashes,
    };
    println!("seed {seed}, mode {:?}, mutation {:?}", spec.mode, spec.mutation);
    let report = run_here(&spec)?;
    println!("{report}");
    let good = report.is_good(spec.mode);
    let expected = good == spec.mutation.is_none();
    println!("{}", if good { "every promise was kept" } else { "A PROMISE WAS BROKEN" });
    Ok(if expected { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
