//! `cargo xtask bench bus`: an exit to a device and back, beside what a hand-over costs at least. Exits with 1 when a
//! threshold is missed.

use std::process::ExitCode;

use anyhow::Result;
use atoll_integration::bus_bench::{Plan, echo, run};
use clap::Parser;

/// Measures accesses that are answered now, later and elsewhere
#[derive(Parser)]
struct Cli {
    /// Rounds; each measures everything once
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Round trips of each measurement
    #[arg(long, default_value_t = 3000)]
    trips: u32,
    /// Answer on eventfds: the other process of a floor
    #[arg(long, num_args = 2, hide = true)]
    echo: Option<Vec<i32>>,
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "a table for people and a line for programs")]
fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    if let Some([there, back]) = cli.echo.as_deref() {
        echo(*there, *back)?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = run(&Plan { rounds: cli.rounds.max(1), trips: cli.trips.max(10) }, |line| eprintln!("{line}"))?;
    print!("{}", report.table());
    println!("{}", report.json());
    Ok(if report.met() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
