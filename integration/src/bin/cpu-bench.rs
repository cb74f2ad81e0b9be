//! `cargo xtask bench cpu`: five loops natively, under QEMU TCG and on the software CPU. Prints a table, then one JSON
//! line; the exit status says whether the thresholds are met.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]

use anyhow::Context;
use atoll_integration::cpu_bench::loops::Loop;
use atoll_integration::cpu_bench::report::Report;
use clap::Parser;
use std::process::ExitCode;

/// Speed of the software CPU beside QEMU TCG and the bare processor.
#[derive(Parser)]
struct Arguments {
    /// Rounds, each of which runs everything once.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only this loop: crc, sieve, fib, matmul or wide.
    #[arg(long = "loop")]
    only: Option<String>,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let loops = match &arguments.only {
        None => Loop::ALL.to_vec(),
        Some(name) => vec![
            Loop::ALL
                .into_iter()
                .find(|which| which.name() == name)
                .with_context(|| format!("there is no loop '{name}': choose one of crc, sieve, fib, matmul, wide"))?,
        ],
    };
    let report = Report::measure(&loops, arguments.rounds, |what| eprintln!("{what}"))?;
    print!("{report}");
    println!("{}", serde_json::to_string(&report)?);
    Ok(if report.met() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
