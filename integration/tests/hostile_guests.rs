//! The worst that a guest can try stays inside: the VMM ends with a clear message or lives on.

use anyhow::Result;
use atoll_integration::guests::hostile;
use std::process::Command;
use std::time::Duration;
use xtask::console::Console;
use xtask::{images, place};

const LIMIT: Duration = Duration::from_secs(60);

struct Ended {
    console: String,
    errors: String,
    success: bool,
}

/// Runs a guest of our own with a disk, so that there is a PCI function to attack.
fn run(kernel: &[u8], marker: &str) -> Result<Ended> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("guest.elf");
    std::fs::write(&path, kernel)?;
    let disk = images::copy_of_disk(&images::guest("6.1")?, folder.path())?;
    let mut command = Command::new(place::program("atoll")?);
    command.args(["run", "--cpu", "soft", "--memory", "size=64M", "--serial", "tty", "--kernel"]).arg(&path);
    command.arg("--disk").arg(format!("path={}", disk.display()));
    let mut console = Console::spawn(&mut command)?;
    console.expect(marker, LIMIT)?;
    let console_text = console.transcript.clone();
    let (status, errors) = console.wait(LIMIT)?;
    Ok(Ended { console: console_text, errors, success: status.success() })
}

/// A guest without handlers faults three times over: the VMM says so, names where, and ends with an error.
#[test]
fn triple_fault_is_reported() -> Result<()> {
    let ended = run(&hostile::triple_fault()?, "about to fault")?;
    assert!(!ended.success, "{}", ended.errors);
    assert!(ended.errors.to_lowercase().contains("triple fault"), "{}", ended.errors);
    assert!(ended.errors.contains("rip"), "the message names no rip: {}", ended.errors);
    Ok(())
}

/// Code fetched where there is no RAM can only fault; without handlers that is a triple fault too.
#[test]
fn a_jump_into_nothing_is_contained() -> Result<()> {
    let ended = run(&hostile::jump_into_nothing()?, "about to jump")?;
    assert!(!ended.success, "{}", ended.errors);
    assert!(!ended.errors.contains("panicked"), "{}", ended.errors);
    Ok(())
}

/// Every byte of config space, every register behind a BAR, with every bit: the machine still powers off cleanly.
#[test]
fn scribbling_over_pci_is_contained() -> Result<()> {
    let ended = run(&hostile::scribble_over_pci()?, "survived")?;
    assert!(ended.success, "{}", ended.errors);
    assert!(!ended.errors.contains("panicked"), "{}", ended.errors);
    assert!(ended.console.contains("scribbling"), "{}", ended.console);
    Ok(())
}
