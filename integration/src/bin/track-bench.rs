//! `cargo xtask bench track` and `cargo xtask bench isolation`: what `track=shadow` and `isolation=copy` cost for each batch of
//! requests.

use std::time::Duration;

use anyhow::Result;
use atoll_integration::track_bench::{self, Between};
use clap::Parser;

/// Measures a disk with rings or requests that the VMM copies beside one without.
#[derive(Parser)]
struct Cli {
    /// Rounds of each side
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 300)]
    measure_ms: u64,
    /// Requests are copied, not rings alone.
    #[arg(long)]
    copies: bool,
}

#[allow(clippy::print_stdout, reason = "a table for people and a line for programs")]
fn main() -> Result<()> {
    let Cli { rounds, measure_ms, copies } = Cli::parse();
    let between = if copies { Between::Copies } else { Between::Shadow };
    let report = track_bench::run(between, rounds, Duration::from_millis(measure_ms))?;
    print!("{}", report.table());
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}
