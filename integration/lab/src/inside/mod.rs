//! What runs in the lab: scenarios by name, one after the other, each ending in a report whatever happens.

mod boot;
mod exits;
mod lives;
mod yardstick;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use crate::report::Report;

/// The line for reports: the outer machine's second serial port.
const REPORTS: &str = "/dev/ttyS1";

/// A scenario: its figures, or why it is not well.
type Scenario = fn() -> Result<Map<String, Value>>;

/// The arrangement with an I/O APIC of ours.
const SPLIT: &[&str] = &["--kvm", "irqchip=split"];

/// All of them that `cargo xtask lab kvm` runs.
const KVM: &[(&str, Scenario)] = &[
    ("boot-6.1", || boot::boot("6.1", 1, &[])),
    ("boot-6.12", || boot::boot("6.12", 1, &[])),
    ("boot-6.1-2", || boot::boot("6.1", 2, &[])),
    ("boot-6.1-4", || boot::boot("6.1", 4, &[])),
    ("boot-6.12-2", || boot::boot("6.12", 2, &[])),
    ("boot-6.12-4", || boot::boot("6.12", 4, &[])),
    ("exits", exits::none_for_each_request),
    ("pauses", || lives::pauses(2, &[])),
    ("resets", || lives::resets(2, &[])),
    ("split-6.1", || boot::boot("6.1", 2, SPLIT)),
    ("split-6.12", || boot::boot("6.12", 1, SPLIT)),
    ("split-pauses", || lives::pauses(2, SPLIT)),
    ("split-resets", || lives::resets(2, SPLIT)),
    ("yardstick", yardstick::boots),
];

/// Names of the scenarios of `what`.
///
/// # Errors
/// When there is no such group.
pub fn names(what: &str) -> Result<Vec<&'static str>> {
    match what {
        "kvm" | "all" => Ok(KVM.iter().map(|(name, _)| *name).collect()),
        other => bail!("there are no scenarios {other}: choose kvm or all"),
    }
}

/// Runs scenarios by name and writes a report of each.
///
/// # Errors
/// When reports cannot be written.
pub fn run(names: &[String]) -> Result<()> {
    let mut line = OpenOptions::new().write(true).open(REPORTS).with_context(|| format!("no {REPORTS}"))?;
    for name in names {
        let begin = Instant::now();
        let result = match KVM.iter().find(|(known, _)| known == name) {
            Some((_, scenario)) => {
                eprintln!("lab: {name}");
                scenario()
            }
            None => bail!("there is no scenario {name}"),
        };
        let report = Report::of(name, begin.elapsed(), result);
        writeln!(line, "{}", serde_json::to_string(&report)?)?;
        line.flush()?;
    }
    Ok(())
}
