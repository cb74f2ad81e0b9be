//! `atoll-nvme` behind QEMU's vfio-user client.

use crate::console::Console;
use crate::qemu::Qemu;
use crate::{images, place};

use super::{BOOT_LIMIT, Device, STEP_LIMIT, machine};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Blocks of 64 KiB that the guest writes and reads.
const BLOCKS: usize = 64;
const BLOCK: usize = 64 << 10;

fn sum(bytes: &Path) -> Result<String> {
    let line = format!("head -c {} {} | md5sum", BLOCKS * BLOCK, bytes.display());
    let output = Command::new("/bin/sh").args(["-c", &line]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap_or_default().to_owned())
}

/// `atoll-nvme` is the disk of a stock guest on QEMU, whose `vfio-user-pci` is the client: data both ways, interrupts counted,
/// the driver started anew. One line of JSON.
///
/// # Errors
/// When it is not so, or QEMU cannot be had.
pub fn run() -> Result<()> {
    let qemu = Qemu::newest()?;
    place::build_programs()?;
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let (socket, disk): (PathBuf, PathBuf) = (folder.path().join("nvme.sock"), folder.path().join("disk"));
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    let _device = Device::start("atoll-nvme", &socket, &["--path", disk.to_str().context("a path")?])?;
    let begin = Instant::now();
    let client = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": { "type": "unix", "path": socket },
    });
    let mut command = machine(&qemu);
    command
        .args(["-append", "console=ttyS0 panic=-1 quiet", "-device", &client.to_string()])
        .arg("-kernel")
        .arg(&guest.bzimage)
        .arg("-initrd")
        .arg(&guest.initramfs);
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    let boot = begin.elapsed();
    console.run("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done", STEP_LIMIT)?;
    let write = format!("dd if=/dev/urandom of=/dev/nvme0n1 bs=64k count={BLOCKS} 2>/dev/null && sync");
    console.run(&write, STEP_LIMIT)?;
    let read =
        format!("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/nvme0n1 bs=64k count={BLOCKS} 2>/dev/null | md5sum");
    let seen = console.run(&read, STEP_LIMIT)?;
    let seen = seen.split_whitespace().next().unwrap_or_default();
    let there = sum(&disk)?;
    ensure!(seen == there, "the guest reads {seen}, in the image is {there}");
    // The driver lets go of it and takes it again: a reset of the controller, and queues anew.
    console
        .run("cd /sys/bus/pci/drivers/nvme && D=$(echo 0000:*) && echo $D > unbind && echo $D > bind", STEP_LIMIT)?;
    console.run("until [ -b /dev/nvme0n1 ]; do sleep 0.1; done", STEP_LIMIT)?;
    let again = console.run(&read, STEP_LIMIT)?;
    ensure!(again.starts_with(&there), "taken again, the guest reads {again}, in the image is {there}");
    let counted = console.run("awk '/nvme/ { sum += $2 } END { print sum + 0 }' /proc/interrupts", STEP_LIMIT)?;
    let counted: u64 = counted.parse().context("a count of interrupts")?;
    ensure!(counted > 10, "{counted} interrupts were counted");
    let bad = console.run("dmesg | grep -E 'nvme.*(timeout|abort|error)|I/O error' || true", STEP_LIMIT)?;
    ensure!(bad.is_empty(), "the guest's kernel complains: {bad}");
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP_LIMIT)?;
    ensure!(status.success(), "QEMU ended with {status}: {errors}");
    let report = serde_json::json!({
        "interop": "nvme", "ok": true, "client": format!("QEMU {} vfio-user-pci", qemu.version()?),
        "boot_ms": boot.as_millis() as u64, "bytes": BLOCKS * BLOCK, "interrupts": counted,
    });
    println!("{report}");
    Ok(())
}
