//! A disk behind the machine's virtual IOMMU, under stock kernels: one with a driver for it, and one without.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_integration::processes;
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::images;

const STEP: Duration = Duration::from_secs(60);
const BYTES: usize = 4 << 20;

/// A guest with a data disk behind the IOMMU, and that disk's md5 sum.
fn boot(series: &str, folder: &Path) -> Result<(Console, String)> {
    let guest = images::guest(series)?;
    let image = folder.join("data.img");
    let data: Vec<u8> = (0..BYTES).map(|at| (at / 512 * 7 + at % 251) as u8).collect();
    std::fs::write(&image, data)?;
    let sum = std::process::Command::new("md5sum").arg(&image).output()?;
    let sum = String::from_utf8(sum.stdout)?.get(..32).context("a sum")?.to_owned();
    let demo = Demo { series: series.into(), form: KernelForm::Pvh, cpu: "soft".into() };
    let mut command = demo.command(&guest)?;
    command.args(["--cmdline", "console=ttyS0 atoll.load=iommu"]);
    command.arg("--disk").arg(format!("path={},iommu=on", image.display()));
    let mut vm = Console::spawn(&mut command)?;
    vm.prompt(BOOT_LIMIT)?;
    // The initramfs tries to mount it, and goes on without.
    vm.run("while ! [ -b /dev/vda ]; do usleep 99999; done", STEP)?;
    // The serial line has eighty columns, and what is longer is edited on more than one.
    vm.run("drop() { sync; echo 3 > /proc/sys/vm/drop_caches; }", STEP)?;
    vm.run("differ() { drop; head -c 1048576 /dev/vda | cmp - /new; }", STEP)?;
    Ok((vm, sum))
}

/// Reads the disk, writes it and reads it again; the sums agree.
fn use_disk(vm: &mut Console, sum: &str) -> Result<()> {
    vm.run("drop", STEP)?;
    let read = vm.run("md5sum /dev/vda", STEP)?;
    ensure!(read.starts_with(sum), "{read} inside, {sum} outside");
    vm.run("head -c 1048576 /dev/urandom > /new", STEP)?;
    vm.run("dd if=/new of=/dev/vda bs=64k 2>/dev/null", STEP)?;
    let same = vm.run("differ && echo same", STEP)?;
    ensure!(same == "same", "{same}");
    Ok(())
}

/// Linux 6.12 finds the IOMMU by the VIOT and puts the disk into a domain of its own; the disk works, also after its process
/// was killed: the next one is told where the guest's addresses lead.
#[test]
fn a_disk_behind_the_iommu_of_a_guest_that_drives_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut vm, sum) = boot("6.12", folder.path())?;
    let groups = vm.run("ls /sys/kernel/iommu_groups/*/devices", STEP)?;
    ensure!(groups.contains("0000:00:"), "{groups}");
    let kind = vm.run("cat /sys/kernel/iommu_groups/0/type", STEP)?;
    ensure!(kind.starts_with("DMA"), "{kind}");
    use_disk(&mut vm, &sum)?;
    let process = processes::child_named(vm.pid(), "atoll-blk", STEP)?;
    processes::signal(process, Signal::KILL)?;
    let after = vm.run("differ && echo same", STEP)?;
    ensure!(after == "same", "{after}");
    Ok(())
}

/// Linux 6.1 as Debian builds it has no driver for it: the disk uses guest-physical addresses and works.
#[test]
fn a_guest_without_a_driver_goes_past_the_iommu() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut vm, sum) = boot("6.1", folder.path())?;
    use_disk(&mut vm, &sum)
}
