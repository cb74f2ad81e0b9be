//! `cargo xtask lab`: builds the lab's machine, runs scenarios in it, prints their reports, one JSON object a line.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for a person at a terminal")]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use atoll_lab::{freight, inside, outer};
use clap::Parser;

/// Runs scenarios in a machine with real hardware virtualisation, which is emulated.
#[derive(Parser)]
#[command(name = "lab")]
struct Arguments {
    /// Which scenarios: kvm or all.
    #[arg(default_value = "all")]
    what: String,
    /// Only these, by name.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Names the scenarios and runs none.
    #[arg(long)]
    list: bool,
    /// Shows the end of the lab's console in any case.
    #[arg(long)]
    console: bool,
}

/// How long the boot, or a scenario, may take; a machine may be slow, and busy with other things.
const SCENARIO_LIMIT: Duration = Duration::from_secs(600);

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let all = inside::names(&arguments.what)?;
    if arguments.list {
        all.iter().for_each(|name| println!("{name}"));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = arguments.only.iter().find(|name| !all.contains(&name.as_str())) {
        bail!("there is no scenario {unknown}: `lab {} --list` names them", arguments.what);
    }
    let chosen: Vec<String> =
        if arguments.only.is_empty() { all.iter().map(|name| (*name).to_owned()).collect() } else { arguments.only };
    let started = Instant::now();
    let folder = tempfile::Builder::new().prefix("atoll-lab").tempdir()?;
    let freight = freight::load(folder.path())?;
    eprintln!("lab: {} scenarios, loaded after {:.1} s", chosen.len(), started.elapsed().as_secs_f64());
    let outcome = outer::run(&freight, &chosen, folder.path(), SCENARIO_LIMIT, |report| {
        println!("{}", serde_json::to_string(report).unwrap_or_default());
    })?;
    let ok = outcome.fault.is_none() && outcome.reports.iter().all(|report| report.ok);
    if !ok || arguments.console {
        eprintln!("{}", outcome.console);
    }
    if let Some(fault) = &outcome.fault {
        eprintln!("lab: {fault}");
    }
    eprintln!("lab: {} in {:.0} s", if ok { "ok" } else { "NOT OK" }, started.elapsed().as_secs_f64());
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
