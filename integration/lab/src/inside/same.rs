//! One description of a machine, in a file, on both CPUs: the same guest, the same checks, the same end.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::console::Console;
use xtask::{images, place};

use super::boot::{self, BOOT_LIMIT, CMDLINE, LAB, STEP_LIMIT, figures, milliseconds};
use crate::freight::guest_inside;

/// Longer than on KVM: here the software CPU runs on an emulated one.
const SOFT_FACTOR: u32 = 2;

/// The machine, as a user writes it down.
fn description(disk: &Path) -> String {
    let guest = guest_inside("6.1");
    let (kernel, initramfs) = (guest.vmlinux.display(), guest.initramfs.display());
    format!(
        "memory.size = \"512M\"\ncpus.boot = 1\nserial.mode = \"tty\"\n\n\
         [payload]\nkernel = \"{kernel}\"\ninitramfs = \"{initramfs}\"\ncmdline = \"{CMDLINE}\"\n\n\
         [[disks]]\npath = \"{}\"\n\n\
         [[net]]\ntap = \"tap0\"\nip = \"{LAB}\"\nmask = \"255.255.255.0\"\n",
        disk.display()
    )
}

/// What a guest says of the machine that it finds, but for what names the CPU's maker.
const SEEN: &str = "uname -r; cat /proc/cmdline; nproc; grep MemTotal /proc/meminfo; ls /sys/bus/pci/devices; \
                    ls /sys/bus/virtio/devices; cat /sys/bus/pci/devices/*/vendor /sys/bus/pci/devices/*/device; \
                    cat /sys/block/vda/size; cut -d ' ' -f 1 /proc/ioports";

/// Boots the file on one CPU, with all checks; gives what the guest has seen, and the time to the prompt.
fn on(cpu: &str, file: &Path, folder: &Path) -> Result<(String, u64)> {
    let factor = if cpu == "soft" { SOFT_FACTOR } else { 1 };
    let mut command = Command::new(place::program("atoll")?);
    command.args(["run", "--cpu", cpu, "--config"]).arg(file).env("ATOLL_LOG", "info");
    let mut console = Console::spawn(&mut command)?;
    console.prompt(factor * BOOT_LIMIT)?;
    let boot_ms = milliseconds(console.started().elapsed());
    let seen = console.run(SEEN, STEP_LIMIT)?;
    boot::check_cpus(&mut console, 1)?;
    let sum = boot::check_disk(&mut console)?;
    boot::check_net(&mut console, folder)?;
    console.run("mount -o remount,ro /", STEP_LIMIT)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP_LIMIT)?;
    ensure!(status.success(), "atoll ended with {status}: {errors}");
    boot::check_image(folder, &sum)?;
    Ok((seen, boot_ms))
}

/// The same file with `--cpu kvm` and `--cpu soft`, one after the other on the same disk.
pub(super) fn file() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("root.ext4");
    images::copy_sparsely(&guest_inside("6.1").disk, &disk).context("no room for a copy of the guest's disk")?;
    let file = folder.path().join("vm.toml");
    std::fs::write(&file, description(&disk))?;
    let (kvm, kvm_ms) = on("kvm", &file, folder.path())?;
    let (soft, soft_ms) = on("soft", &file, folder.path())?;
    ensure!(kvm == soft, "the guest sees another machine on KVM:\n{kvm}\nthan on the software CPU:\n{soft}");
    Ok(figures(json!({ "kvm_boot_ms": kvm_ms, "soft_boot_ms": soft_ms, "seen_lines": kvm.lines().count() })))
}
