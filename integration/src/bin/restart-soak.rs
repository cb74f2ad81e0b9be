//! `cargo xtask soak restarts`: an idle disk's process is killed again and again. One JSON line; exits with 1 when anything is
//! left behind.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use atoll_integration::restarts::run;
use clap::Parser;
use xtask::place;

/// Kills the process of an idle disk.
#[derive(Parser)]
struct Cli {
    /// How often
    #[arg(long, default_value_t = 50)]
    count: u64,
    /// How long the last one is left alone
    #[arg(long, default_value_t = 0)]
    idle_seconds: u64,
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "progress for people and a line for programs")]
fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let idle = Duration::from_secs(cli.idle_seconds);
    let outcome = run(&place::release(), cli.count.max(1), idle, |done| {
        if done.is_multiple_of(100) {
            eprintln!("{done} of {}", cli.count);
        }
    })?;
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(if outcome.leaked == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
