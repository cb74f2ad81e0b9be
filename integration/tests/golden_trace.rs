//! A deterministic run of a guest of our own is the same to the last register, on every machine, in every build.

use anyhow::{Context, Result};
use atoll_integration::guests::trace;
use std::process::Command;
use std::time::Duration;
use xtask::console::Console;
use xtask::place;

const LIMIT: Duration = Duration::from_secs(60);

/// Hash over (rip, registers) at each million instructions. It changes only with the CPU's visible behaviour, the
/// board's timers, or the guest: say which in the commit that changes it.
const GOLDEN: &str = "6b2cacc7550e5a59";

fn run() -> Result<(String, String)> {
    let folder = tempfile::tempdir()?;
    let kernel = folder.path().join("trace.elf");
    let report = folder.path().join("report.json");
    std::fs::write(&kernel, trace::guest()?)?;
    let mut command = Command::new(place::program("atoll")?);
    command.args(["run", "--cpu", "soft", "--deterministic", "--memory", "size=64M", "--serial", "tty"]);
    command.arg("--kernel").arg(&kernel).arg("--report").arg(&report);
    let mut console = Console::spawn(&mut command)?;
    console.expect("own guest\r\n", LIMIT).or_else(|_| console.expect("own guest\n", LIMIT))?;
    let checksum = console.expect("\n", LIMIT)?;
    let (status, errors) = console.wait(LIMIT)?;
    assert!(status.success(), "{status}: {errors}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&report)?)?;
    assert!(report["instructions"].as_u64().context("no instruction count")? > 5_000_000, "{report}");
    Ok((checksum.trim().to_owned(), report["trace_hash"].as_str().context("the report has no trace_hash")?.to_owned()))
}

#[test]
fn deterministic_runs_are_equal() -> Result<()> {
    let first = run()?;
    assert_eq!(first, run()?);
    assert_eq!(first.1, GOLDEN, "the visible behaviour of the deterministic machine has changed");
    Ok(())
}
