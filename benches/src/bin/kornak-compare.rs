//! `kornak-compare`: pgbench direct, through HAProxy, PgBouncer and Kornak, side by side.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use kornak_benches::idle;
use kornak_benches::rows::ROWS;
use kornak_benches::table::Table;
use kornak_benches::ways::Stage;

/// Starts PostgreSQL, HAProxy, PgBouncer (session and transaction) and `kornak proxy`, and prints
/// what pgbench measures through each. Rounds are interleaved; the table holds medians.
#[derive(Debug, Parser)]
struct Arguments {
    /// Rounds over all rows and ways
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Only rows whose name contains this; `idle`: only the memory of idle sessions
    #[arg(long, default_value = "")]
    only: String,
}

#[tokio::main]
#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the table is what it is for")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let rows: Vec<_> = ROWS.into_iter().filter(|row| row.name.contains(&arguments.only)).collect();
    let mut stage = Stage::start().await?;
    let ways = stage.ways().to_vec();
    let mut table =
        Table::new(ways.iter().map(|way| way.name).collect(), rows.iter().map(|row| row.name));
    let length = Duration::from_secs(arguments.seconds);
    let began = Instant::now();
    for round in 1..=arguments.rounds {
        for (row_index, row) in rows.iter().enumerate() {
            // Each round begins with another way, so that none is always first.
            for step in 0..ways.len() {
                let way_index = (step + round as usize + row_index) % ways.len();
                let Some(way) = ways.get(way_index) else { continue };
                if let Some(tps) = row.measure(way, length, stage.scratch()).await? {
                    table.add(row_index, way_index, tps);
                }
            }
        }
        eprintln!("round {round} of {} after {:.0?}", arguments.rounds, began.elapsed());
    }
    println!("{}", table.render());
    if "idle".contains(&arguments.only) {
        println!("{}", idle::table(&ways).await?);
    }
    stage.passed();
    Ok(())
}
