//! What runs in the lab: scenarios by name, one after the other, each ending in a report whatever happens.

mod behind;
mod boot;
mod exits;
mod function;
mod instructions;
mod kills;
mod lives;
mod lost;
mod passed;
mod refused;
mod same;
mod tiny;
mod yardstick;

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use self::passed::Setting;
use crate::report::{PULSE, Report};

/// The line for reports: the outer machine's second serial port.
const REPORTS: &str = "/dev/ttyS1";

/// How often the machine says that it runs.
const PULSE_INTERVAL: Duration = Duration::from_secs(1);

/// When a scenario runs without being named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// In `cargo xtask test` too, and so in the short set.
    Tested,
    /// Always: it is part of the short set.
    Always,
    /// With `--all`: it takes long, or shows what another one shows.
    Thorough,
    /// With `--all`, and no other machine beside its own: it measures.
    Alone,
}

/// A scenario.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// When it runs.
    pub when: When,
    /// About how long it takes on an idle host; machines are loaded evenly by this.
    pub seconds: u32,
    /// Its figures, or why it is not well.
    run: fn() -> Result<Map<String, Value>>,
}

const fn scenario(name: &'static str, when: When, seconds: u32, run: fn() -> Result<Map<String, Value>>) -> Scenario {
    Scenario { name, when, seconds, run }
}

/// The arrangement with an I/O APIC of ours.
const SPLIT: &[&str] = &["--kvm", "irqchip=split"];

/// Those of `cargo xtask lab kvm`.
const KVM: &[Scenario] = &[
    scenario("boot-6.1", When::Tested, 12, || boot::boot("6.1", 1, &[])),
    scenario("boot-6.1-2", When::Thorough, 16, || boot::boot("6.1", 2, &[])),
    scenario("boot-6.1-4", When::Tested, 18, || boot::boot("6.1", 4, &[])),
    scenario("boot-6.12", When::Thorough, 14, || boot::boot("6.12", 1, &[])),
    scenario("boot-6.12-2", When::Tested, 18, || boot::boot("6.12", 2, &[])),
    scenario("boot-6.12-4", When::Thorough, 20, || boot::boot("6.12", 4, &[])),
    scenario("exits", When::Tested, 20, exits::none_for_each_request),
    scenario("pauses", When::Tested, 15, || lives::pauses(2, &[])),
    scenario("resets", When::Tested, 35, || lives::resets(2, &[])),
    scenario("split-6.1", When::Always, 16, || boot::boot("6.1", 2, SPLIT)),
    scenario("split-6.12", When::Thorough, 16, || boot::boot("6.12", 1, SPLIT)),
    scenario("split-pauses", When::Thorough, 20, || lives::pauses(2, SPLIT)),
    scenario("split-resets", When::Always, 40, || lives::resets(2, SPLIT)),
    scenario("tiny-guests", When::Tested, 10, tiny::guests),
    scenario("kills", When::Thorough, 40, kills::of_devices),
    scenario("same-file", When::Always, 60, same::file),
    scenario("yardstick", When::Alone, 150, yardstick::boots),
];

/// Those of `cargo xtask lab vfio`.
const VFIO: &[Scenario] = &[
    scenario("vfio-nvme", When::Tested, 40, || passed::drive(Setting::PLAIN)),
    scenario("vfio-nvme-iommu", When::Always, 40, || passed::drive(Setting::BEHIND)),
    scenario("vfio-nvme-rounds", When::Always, 60, passed::rounds),
    scenario("vfio-nvme-vf", When::Always, 30, passed::virtual_function),
    scenario("vfio-pin", When::Always, 30, || passed::pin(Setting::PLAIN)),
    scenario("vfio-card", When::Always, 40, passed::card),
    scenario("vfio-faults", When::Always, 30, behind::refused_access),
    scenario("vfio-descriptor", When::Always, 45, refused::descriptor),
    scenario("vfio-mistakes", When::Always, 40, refused::mistakes),
    scenario("vfio-readme", When::Always, 20, instructions::of_the_readme),
    scenario("vfio-pulled-out", When::Always, 60, lost::pulled_out),
    scenario("vfio-storm", When::Always, 55, lost::storm),
    scenario("vfio-nvme-split", When::Thorough, 40, || passed::drive(Setting::SPLIT)),
    scenario("vfio-pin-soft", When::Thorough, 90, || passed::pin(Setting::SOFT)),
    scenario("vfio-nvme-soft", When::Thorough, 120, || passed::drive(Setting::SOFT)),
];

/// The scenarios of `what`.
///
/// # Errors
/// When there is no such group.
pub fn scenarios(what: &str) -> Result<Vec<Scenario>> {
    match what {
        "kvm" => Ok(KVM.to_vec()),
        "vfio" => Ok(VFIO.to_vec()),
        "all" => Ok([KVM, VFIO].concat()),
        "test" => Ok([KVM, VFIO].concat().into_iter().filter(|scenario| scenario.when == When::Tested).collect()),
        other => bail!("there are no scenarios {other}: choose kvm, vfio, all or test"),
    }
}

/// Says that the machine runs, for as long as this process does. A line is one write, and two writes to a terminal do not mix.
fn keep_saying(mut line: File) {
    std::thread::spawn(move || {
        while line.write_all(PULSE.as_bytes()).is_ok() {
            std::thread::sleep(PULSE_INTERVAL);
        }
    });
}

/// Runs scenarios by name and writes a report of each.
///
/// # Errors
/// When reports cannot be written.
pub fn run(names: &[String]) -> Result<()> {
    let mut line = OpenOptions::new().write(true).open(REPORTS).with_context(|| format!("no {REPORTS}"))?;
    keep_saying(line.try_clone()?);
    let known = scenarios("all")?;
    for name in names {
        let begin = Instant::now();
        let scenario = known.iter().find(|known| known.name == name);
        let scenario = scenario.with_context(|| format!("there is no scenario {name}"))?;
        eprintln!("lab: {name}");
        let result = (scenario.run)();
        if result.is_err()
            && let Err(error) = function::give_all_back()
        {
            eprintln!("lab: {name} has left a device with VFIO: {error:#}");
        }
        let report = Report::of(name, begin.elapsed(), result);
        line.write_all(format!("{}\n", serde_json::to_string(&report)?).as_bytes())?;
        line.flush()?;
    }
    Ok(())
}
