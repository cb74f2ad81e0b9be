//! `cargo xtask soak plugs`: a disk and a card in and out of a running guest. One JSON line; exits with 1 when anything is
//! left behind.

use std::process::ExitCode;

use anyhow::Result;
use atoll_integration::plugs::{Plan, run};
use clap::Parser;

/// Plugs a disk and a network card in and out of a running guest.
#[derive(Parser)]
struct Cli {
    /// How often
    #[arg(long, default_value_t = 100)]
    count: u32,
    /// Kernel series: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: String,
    /// What the loads do follows from it
    #[arg(long, default_value_t = 0x5eed)]
    seed: u64,
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "progress for people and a line for programs")]
fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let plan = Plan { series: cli.kernel, count: cli.count.max(1), seed: cli.seed };
    let outcome = run(&plan, |done| {
        if done.is_multiple_of(10) {
            eprintln!("{done} of {}", plan.count);
        }
    })?;
    println!("{}", serde_json::json!({ "soak": "plugs", "outcome": outcome }));
    Ok(if outcome.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
