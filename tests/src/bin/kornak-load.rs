//! `kornak-load CONNINFO`: the mixed load against any server or proxy, with its report.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use kornak_tests::load::{Load, LoadSpec};
use kornak_tests::run::postgres::connect;

/// Runs the mixed load, prints what the clients saw, and looks for every acknowledged row.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where to connect, as "host=127.0.0.1 port=5000 user=app password=…"
    conninfo: String,
    /// How long, in seconds; Ctrl-C ends it as well
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Milliseconds that each client thinks between two units
    #[arg(long, default_value_t = 10)]
    think_ms: u64,
    /// Exit with 0 although clients saw errors; a missing row is never allowed
    #[arg(long)]
    allow_errors: bool,
    /// Where to look for the rows afterwards, if not where they were written
    #[arg(long)]
    verify: Option<String>,
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the report is what it is for")]
async fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut spec = LoadSpec::mixed(&arguments.conninfo);
    spec.think = Duration::from_millis(arguments.think_ms);
    let load = Load::start(&spec).await?;
    tokio::select! {
        () = tokio::time::sleep(Duration::from_secs(arguments.seconds)) => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    let report = load.stop().await;
    println!("{report}");
    let place = arguments.verify.as_deref().unwrap_or(&arguments.conninfo);
    let client = connect(place).await.context("connect to look for the rows")?;
    let verdict = report.verify(&client).await?;
    println!("{verdict}");
    let errors = report.errors() + report.stale_reads();
    let fine = verdict.is_clean() && (errors == 0 || arguments.allow_errors);
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
