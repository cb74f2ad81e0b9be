//! `cargo xtask bench blk`: `atoll-blk` beside `qemu-storage-daemon`. Exits with 1 when a threshold is missed.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use atoll_integration::blk_bench::backend::Medium;
use atoll_integration::blk_bench::{Plan, run};
use clap::Parser;

/// Measures atoll-blk beside qemu-storage-daemon with one driver.
#[derive(Parser)]
struct Cli {
    /// Rounds of each load
    #[arg(long, default_value_t = 7)]
    rounds: u32,
    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 400)]
    measure_ms: u64,
    /// Media, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "null,tmpfs,direct")]
    media: Vec<Medium>,
    /// A folder on a disk whose file system knows O_DIRECT
    #[arg(long, default_value = ".")]
    folder: PathBuf,
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "a table for people and a line for programs")]
fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let plan = Plan { rounds: cli.rounds.max(1), measure_ms: cli.measure_ms, media: cli.media, folder: cli.folder };
    let report = run(&plan, |line| eprintln!("{line}"))?;
    print!("{}", report.table());
    println!("{}", report.json());
    Ok(if report.met() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
