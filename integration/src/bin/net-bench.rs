//! `cargo xtask bench net`: the switch of `atoll-net` beside DPDK's testpmd. Exits with 1 when a limit is missed.

use std::process::ExitCode;

use anyhow::Result;
use atoll_integration::net_bench::{Plan, run};
use clap::Parser;

/// Measures frames per second through two ports of atoll-net beside dpdk-testpmd, with one driver.
#[derive(Parser)]
struct Cli {
    /// Rounds of each load
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 500)]
    measure_ms: u64,
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "a table for people and a line for programs")]
fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let plan = Plan { rounds: cli.rounds.max(1), measure_ms: cli.measure_ms };
    let report = run(&plan, |line| eprintln!("{line}"))?;
    print!("{}", report.table());
    println!("{}", report.json());
    Ok(if report.met() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
