//! `cargo xtask lab`: builds the lab's machines, runs scenarios in them, prints their reports, one JSON object a line.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for a person at a terminal")]

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use atoll_lab::freight::Freight;
use atoll_lab::outer::{Fault, Outcome};
use atoll_lab::{drivers, ending, freight, inside, outer, schedule};
use clap::Parser;

/// Runs scenarios in machines with real hardware virtualisation, which are emulated.
#[derive(Parser)]
#[command(name = "lab")]
struct Arguments {
    /// Which scenarios: kvm, vfio, all, or test: those of `cargo xtask test`.
    #[arg(default_value = "all")]
    what: String,
    /// Only these, by name.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Also those that are not part of the short set.
    #[arg(long)]
    all: bool,
    /// Names the scenarios and runs none.
    #[arg(long)]
    list: bool,
    /// Shows the end of each machine's console in any case.
    #[arg(long)]
    console: bool,
    /// Machines at the same time; one for each processor of the host, and not more than two, by default.
    #[arg(long, value_name = "N")]
    machines: Option<usize>,
}

/// How long the boot, or a scenario, may take; a machine may be slow, and busy with other things.
const SCENARIO_LIMIT: Duration = Duration::from_secs(900);

/// How often one lot of scenarios goes on in a new machine after the emulator has stood still. That is no fault of what is
/// tested here, whose worst is one process that waits; and it is said each time.
const MACHINES_MORE: usize = 2;

/// Runs scenarios in a machine with its folder in `folder`, and those that a machine that stands still has left in another.
fn one(freight: &Freight, names: &[String], folder: &Path) -> Result<Outcome> {
    let mut reports = Vec::new();
    let mut rest = names.to_vec();
    for more in (0..=MACHINES_MORE).rev() {
        std::fs::create_dir_all(folder).with_context(|| format!("no folder {}", folder.display()))?;
        let mut outcome = outer::run(freight, &rest, folder, SCENARIO_LIMIT, |report| {
            println!("{}", serde_json::to_string(report).unwrap_or_default());
        })?;
        rest.retain(|name| !outcome.reports.iter().any(|report| report.scenario == *name));
        reports.append(&mut outcome.reports);
        match &outcome.fault {
            Some(fault @ Fault::Still(_)) if more > 0 => {
                eprintln!("lab: {fault}; what is left runs in a new one: {}", rest.join(", "));
            }
            _ => return Ok(Outcome { reports, ..outcome }),
        }
    }
    anyhow::bail!("no machine was started")
}

/// Machines that run at the same time, each with its folder in `folder`; prints reports as they come.
fn run(freight: &Freight, machines: &[Vec<String>], folder: &Path) -> Result<Vec<Outcome>> {
    let one = |number: usize, names: &[String]| one(freight, names, &folder.join(format!("machine{number}")));
    std::thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> =
            machines.iter().enumerate().map(|(number, names)| scope.spawn(move || one(number, names))).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.map(|outcome| outcome.map_err(|_| anyhow::anyhow!("a machine's thread panicked"))?).collect()
    })
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let known = inside::scenarios(&arguments.what)?;
    let chosen = schedule::chosen(&known, &arguments.only, arguments.all || arguments.list)?;
    if arguments.list {
        chosen.iter().for_each(|scenario| println!("{} ({:?})", scenario.name, scenario.when));
        return Ok(ExitCode::SUCCESS);
    }
    ending::watch();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let plan = schedule::schedule(&chosen, arguments.machines.unwrap_or(processors.min(2)))?;
    let started = Instant::now();
    let folder = tempfile::Builder::new().prefix("atoll-lab").tempdir()?;
    let drivers = chosen.iter().any(|scenario| drivers::wanted(scenario.name));
    if !xtask::lab::goes_on(&arguments.what, freight::obtain(drivers))? {
        return Ok(ExitCode::SUCCESS);
    }
    let freight = freight::load(folder.path(), drivers)?;
    eprintln!("lab: {} scenarios, loaded after {:.1} s", chosen.len(), started.elapsed().as_secs_f64());
    let mut outcomes = run(&freight, &plan.together, folder.path())?;
    if !plan.alone.is_empty() {
        outcomes.extend(run(&freight, &[plan.alone], folder.path())?);
    }
    let mut ok = true;
    for outcome in &outcomes {
        let well = outcome.fault.is_none() && outcome.reports.iter().all(|report| report.ok);
        if !well || arguments.console {
            eprintln!("{}", outcome.console);
        }
        if let Some(fault) = &outcome.fault {
            eprintln!("lab: {fault}");
        }
        ok &= well;
    }
    eprintln!("lab: {} in {:.0} s", if ok { "ok" } else { "NOT OK" }, started.elapsed().as_secs_f64());
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
