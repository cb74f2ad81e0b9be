//! `cargo xtask bench memory`: what a running VM costs besides the guest's own RAM, as proportional set size.

use crate::console::Console;
use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::{images, packages, place, processes};
use anyhow::{Context, Result};
use serde::Serialize;
use std::time::Duration;

/// Guest RAM's mapping bears this name in every process.
const GUEST_RAM: &str = "memfd:atoll-ram";
/// Ceilings in MiB.
const CORE_MAX: f64 = 12.0;
const BLK_MAX: f64 = 6.0;
const STEP: Duration = Duration::from_secs(30);

#[derive(Serialize)]
struct Line {
    bench: &'static str,
    /// `atoll` without guest RAM and without the software CPU's caches.
    core_mib: f64,
    /// The software CPU's TLBs, decoded blocks and native thunks.
    cpu_caches_mib: f64,
    /// `atoll-blk` without guest RAM.
    blk_mib: f64,
    ok: bool,
}

/// Boots to the prompt, writes to the disk, then looks.
pub fn run() -> Result<bool> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    let guest = images::guest("6.1")?;
    place::build_programs()?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let report = folder.path().join("report.json");
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.arg("--disk").arg(format!("path={}", disk.display())).arg("--report").arg(&report);
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    console.run("dd if=/dev/zero of=/data bs=64k count=64 2>/dev/null && sync", STEP)?;
    let core = processes::pss_kib(console.pid(), &[GUEST_RAM])?;
    let blk = processes::pss_kib(processes::child_named(console.pid(), "atoll-blk", STEP)?, &[GUEST_RAM])?;
    console.run("mount -o remount,ro /", STEP)?;
    console.send("poweroff -f\n")?;
    console.wait(STEP)?;
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&report).context("atoll wrote no --report")?)?;
    let caches = report["cache_bytes"].as_u64().context("the report tells no cache_bytes")? / 1024;
    let mib = |kib: u64| (kib as f64 / 1024.0 * 100.0).round() / 100.0;
    let line = Line {
        bench: "memory",
        core_mib: mib(core.saturating_sub(caches)),
        cpu_caches_mib: mib(caches),
        blk_mib: mib(blk),
        ok: mib(core.saturating_sub(caches)) <= CORE_MAX && mib(blk) <= BLK_MAX,
    };
    println!("{}", serde_json::to_string(&line)?);
    Ok(line.ok)
}
