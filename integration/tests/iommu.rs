//! Devices behind the machine's virtual IOMMU, under stock kernels: one with a driver for it, and one without.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_integration::{peers, processes};
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::verify::{self, Guests};
use xtask::{images, place};

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

/// A verified load on disks behind it, whose processes are killed meanwhile: nothing is lost.
#[test]
fn a_load_behind_the_iommu_outlives_its_processes() -> Result<()> {
    let verdict = verify::on_a_guest(&Guests::with("iommu=on"), 41, 3, 500)?;
    ensure!(verdict.ok, "{}", verdict.json());
    ensure!(verdict.counts.reads > 20 && verdict.counts.deaths > 1, "too little happened: {}", verdict.json());
    Ok(())
}

/// Two guests, each with a card behind its IOMMU, hear all that the other says.
#[test]
fn cards_behind_the_iommu() -> Result<()> {
    let verdicts = verify::on_two_guests(&Guests::with("iommu=on"), 42, 2)?;
    let json = serde_json::to_string(&verdicts)?;
    ensure!(verdicts.iter().all(|verdict| verdict.ok && verdict.heard.frames > 20), "{json}");
    Ok(())
}

/// Entropy of a process of the machine's and of one behind a socket, both behind the IOMMU; then a disk is plugged in and is
/// behind it too: the guest has been told of its slot from the beginning. A foreign server of folders that knows no such
/// addresses is refused with the name of what it lacks.
#[test]
fn entropy_behind_the_iommu_and_a_disk_that_comes_later() -> Result<()> {
    let guest = images::guest("6.12")?;
    let folder = tempfile::tempdir()?;
    let rng = peers::atoll_rng(folder.path())?;
    let api = folder.path().join("api.sock");
    let demo = Demo { series: "6.12".into(), form: KernelForm::Pvh, cpu: "soft".into() };
    let mut command = demo.command(&guest)?;
    command.args(["--cmdline", "console=ttyS0 atoll.load=iommu,rng", "--rng", "src=/dev/urandom,iommu=on"]);
    let generic = format!("device_type=4,socket={},queue_sizes=[64],iommu=on", rng.socket.display());
    command.arg("--generic-vhost-user").arg(generic).arg("--api-socket").arg(&api);
    let mut vm = Console::spawn(&mut command)?;
    vm.prompt(BOOT_LIMIT)?;
    vm.run("R=/sys/class/misc/hw_random", STEP)?;
    let mut drawn = Vec::new();
    for source in ["virtio_rng.0", "virtio_rng.1", "virtio_rng.0"] {
        vm.run(&format!("echo {source} > $R/rng_current"), STEP)?;
        drawn.push(vm.run("head -c 16384 /dev/hwrng | md5sum", STEP)?);
    }
    drawn.sort();
    drawn.dedup();
    ensure!(drawn.len() == 3 && drawn.iter().all(|sum| sum.ends_with("-")), "{drawn:?}");

    let image = folder.path().join("data.img");
    std::fs::write(&image, vec![0x5a; BYTES])?;
    let plug = |keys: &str| {
        std::process::Command::new(place::program("atoll")?)
            .args(["add-disk".as_ref(), api.as_os_str(), keys.as_ref()])
            .output()
            .context("atoll add-disk")
    };
    let added = plug(&format!("path={},iommu=on,id=later", image.display()))?;
    ensure!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    vm.run("while ! [ -b /dev/vda ]; do usleep 99999; done", STEP)?;
    let sum = vm.run("md5sum /dev/vda", STEP)?;
    let outside = std::process::Command::new("md5sum").arg(&image).output()?;
    ensure!(sum.get(..32) == String::from_utf8_lossy(&outside.stdout).get(..32), "{sum}");
    let groups = vm.run("ls -d /sys/kernel/iommu_groups/*/devices/* | wc -l", STEP)?;
    ensure!(groups == "3", "{groups} devices behind the IOMMU");

    let other = folder.path().join("other.img");
    std::fs::write(&other, vec![0; BYTES])?;
    let foreign = peers::storage_daemon(&other, folder.path())?;
    let refused = plug(&format!("vhost_user=on,socket={},iommu=on", foreign.socket.display()))?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("VIRTIO_F_ACCESS_PLATFORM"), "{said}");
    Ok(())
}
