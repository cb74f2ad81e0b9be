//! PCI functions of the lab in the hands of a guest: NVMe drives, a network card, a device that interrupts by its pin.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use xtask::demo::{Demo, KernelForm};
use xtask::images::Guest;
use xtask::operated::Operated;

use super::behind;
use super::boot::{BOOT_LIMIT, STEP_LIMIT, figures, milliseconds};
use super::function::{Function, shell, sum_of};
use crate::drivers;
use crate::freight::guest_inside;
use crate::hardware::{PLAIN_DRIVE, SHARED_DRIVE};

/// Rounds of hot-unplug and plug.
const ROUNDS: u32 = 20;
/// Blocks of 64 KiB that are written and read, each time.
pub(super) const BLOCKS: u32 = 16;
/// Where the guest's begin; the lab's are before them.
pub(super) const GUESTS: u32 = 64;

/// A machine for one function.
#[derive(Clone, Copy)]
pub(super) struct Setting {
    /// The guest's kernel series.
    pub(super) series: &'static str,
    /// `kvm` or `soft`.
    pub(super) cpu: &'static str,
    /// More keys of `--device`.
    pub(super) keys: &'static str,
    /// More arguments.
    pub(super) more: &'static [&'static str],
    /// More of the kernel's command line.
    pub(super) words: &'static str,
}

impl Setting {
    /// Debian's kernel on KVM.
    pub(super) const PLAIN: Self = Self { series: "6.1", cpu: "kvm", keys: "", more: &[], words: "" };
    /// Behind the virtual IOMMU, for which 6.12 has a driver.
    pub(super) const BEHIND: Self =
        Self { series: "6.12", keys: ",iommu=on", words: "atoll.load=iommu iommu.strict=1", ..Self::PLAIN };
    /// On the software CPU.
    pub(super) const SOFT: Self = Self { cpu: "soft", ..Self::PLAIN };
    /// With an I/O APIC of Atoll's.
    pub(super) const SPLIT: Self = Self { more: &["--kvm", "irqchip=split"], ..Self::PLAIN };
}

/// The guest with drivers behind its initramfs, made in `folder`; with the full kernel, where `full`.
pub(super) fn guest_with_drivers(series: &'static str, folder: &Path, full: bool) -> Result<Guest> {
    let mut guest = guest_inside(series);
    let carried = Path::new("/atoll").join(drivers::FOLDER);
    let mut bytes = std::fs::read(&guest.initramfs)?;
    // Archives begin at multiples of four; zeros between them mean nothing.
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes.extend(std::fs::read(carried.join(drivers::ARCHIVE))?);
    guest.initramfs = folder.join("initramfs");
    std::fs::write(&guest.initramfs, bytes)?;
    if full {
        guest.bzimage = carried.join(drivers::KERNEL);
    }
    Ok(guest)
}

/// `atoll run` with a guest that stays in its initramfs, and one function.
pub(super) fn command(setting: Setting, guest: &Guest, function: &Function) -> Result<Command> {
    command_with(setting, guest, &format!("path={},id=passed{}", function.folder().display(), setting.keys))
}

/// The same with these keys of `--device`.
pub(super) fn command_with(setting: Setting, guest: &Guest, device: &str) -> Result<Command> {
    let is_carried = guest.bzimage.ends_with(drivers::KERNEL);
    let form = if is_carried { KernelForm::Bzimage } else { KernelForm::Pvh };
    let Setting { series, cpu, more, words, .. } = setting;
    let demo = Demo { series: series.to_owned(), form, cpu: cpu.to_owned() };
    let mut command = demo.command(guest)?;
    command
        .args(["--cmdline", &format!("console=ttyS0 no_timer_check quiet {words}")])
        .args(more)
        .arg("--device")
        .arg(device)
        .env("ATOLL_LOG", "info");
    Ok(command)
}

/// Switches the machine off and waits for its end.
pub(super) fn end(mut machine: Operated) -> Result<()> {
    machine.console.send("poweroff -f\n")?;
    let (status, errors) = machine.console.wait(STEP_LIMIT)?;
    ensure!(status.success(), "atoll ended with {status}: {errors}");
    Ok(())
}

/// The guest's disk is there.
pub(super) fn await_disk(machine: &mut Operated) -> Result<()> {
    machine.console.run(
        "for try in $(seq 2000); do [ -b /dev/nvme0n1 ] && break; sleep 0.1; done; [ -b /dev/nvme0n1 ]",
        STEP_LIMIT,
    )?;
    Ok(())
}

/// The sum of blocks of the guest's disk.
pub(super) fn guest_sum(machine: &mut Operated, from: u32) -> Result<String> {
    let read = format!("dd if=/dev/nvme0n1 bs=64k skip={from} count={BLOCKS} 2>/dev/null | md5sum");
    machine.console.run("echo 3 > /proc/sys/vm/drop_caches", STEP_LIMIT)?;
    let sum = machine.console.run(&read, STEP_LIMIT)?;
    Ok(sum.split_whitespace().next().unwrap_or_default().to_owned())
}

/// The guest fills blocks with random bytes; their sum.
pub(super) fn guest_writes(machine: &mut Operated, from: u32) -> Result<String> {
    let write = format!("dd if=/dev/urandom of=/dev/nvme0n1 bs=64k seek={from} count={BLOCKS} 2>/dev/null && sync");
    machine.console.run(&write, STEP_LIMIT)?;
    guest_sum(machine, from)
}

/// How many interrupts lines of /proc/interrupts with this word have counted.
pub(super) fn interrupts(machine: &mut Operated, word: &str) -> Result<u64> {
    let counted = format!("awk '/{word}/ {{ sum += $2 }} END {{ print sum + 0 }}' /proc/interrupts");
    machine.console.run(&counted, STEP_LIMIT)?.parse().context("a count of interrupts")
}

/// The kernel has nothing to complain of.
pub(super) fn calm(machine: &mut Operated) -> Result<()> {
    let bad =
        "BUG:|WARNING:|Oops|soft lockup|nobody cared|not responding|timeout, (aborting|completion)|DMAR|I/O error";
    let said = machine.console.run(&format!("dmesg | grep -E '{bad}' || true"), STEP_LIMIT)?;
    ensure!(said.is_empty(), "the guest's kernel complains: {said}");
    Ok(())
}

/// The lab fills blocks of its disk; their sum.
pub(super) fn lab_writes(disk: &Path) -> Result<String> {
    let at = disk.display();
    shell(&format!("dd if=/dev/urandom of={at} bs=64k count={BLOCKS} 2>/dev/null && sync"))?;
    sum_of(disk, 0, BLOCKS)
}

/// A drive in a guest and back: data both ways, interrupts, a reboot.
pub(super) fn drive(setting: Setting) -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::drive(PLAIN_DRIVE)?;
    let of_lab = lab_writes(&function.disk()?)?;
    function.bind()?;
    function.check()?;
    let guest = guest_inside(setting.series);
    let mut machine = Operated::spawn(&mut command(setting, &guest, &function)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    let boot_ms = milliseconds(machine.console.started().elapsed());
    if !setting.words.is_empty() {
        let kind = machine.console.run("cat /sys/kernel/iommu_groups/*/type", STEP_LIMIT)?;
        ensure!(kind.starts_with("DMA"), "the guest's driver of the IOMMU has not taken the drive: {kind}");
    }
    await_disk(&mut machine)?;
    let seen = guest_sum(&mut machine, 0)?;
    ensure!(seen == of_lab, "the guest reads {seen}, the lab wrote {of_lab}");
    let of_guest = guest_writes(&mut machine, GUESTS)?;
    let before = interrupts(&mut machine, "nvme")?;
    let begin = Instant::now();
    guest_sum(&mut machine, GUESTS)?;
    let read_ms = milliseconds(begin.elapsed());
    let counted = interrupts(&mut machine, "nvme")? - before;
    ensure!(counted > 0, "no interrupt of the drive was counted");
    calm(&mut machine)?;
    if !setting.keys.is_empty() {
        behind::comes_again(&mut machine, &function, &of_guest)?;
    }
    machine.console.send("reboot -f\n")?;
    machine.console.prompt(BOOT_LIMIT)?;
    await_disk(&mut machine)?;
    let again = guest_sum(&mut machine, GUESTS)?;
    ensure!(again == of_guest, "after a reboot the guest reads {again}, it wrote {of_guest}");
    calm(&mut machine)?;
    end(machine)?;
    function.unbind()?;
    let outside = sum_of(&function.disk()?, GUESTS, BLOCKS)?;
    ensure!(outside == of_guest, "the lab reads {outside}, the guest wrote {of_guest}");
    Ok(figures(json!({ "cpu": setting.cpu, "boot_ms": boot_ms, "interrupts": counted, "read_ms": read_ms })))
}

/// A drive goes and comes twenty times; then the VMM is killed, and the lab has its drive back.
pub(super) fn rounds() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::drive(PLAIN_DRIVE)?;
    function.bind()?;
    let guest = guest_inside(Setting::PLAIN.series);
    let mut machine = Operated::spawn(&mut command(Setting::PLAIN, &guest, &function)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    await_disk(&mut machine)?;
    let sum = guest_writes(&mut machine, GUESTS)?;
    let mut longest = Duration::ZERO;
    for round in 0..ROUNDS {
        let begin = Instant::now();
        machine.put("vm.remove-device", Some(&json!({ "id": "passed" })))?;
        gone(&machine).with_context(|| format!("round {round}"))?;
        let there = machine.console.run("[ -b /dev/nvme0n1 ] && echo there || echo gone", STEP_LIMIT)?;
        ensure!(there == "gone", "round {round}: the guest still has a disk");
        machine.put("vm.add-device", Some(&json!({ "id": "passed", "path": function.folder() })))?;
        await_disk(&mut machine).with_context(|| format!("round {round}"))?;
        let seen = guest_sum(&mut machine, GUESTS)?;
        ensure!(seen == sum, "round {round}: the guest reads {seen}, it wrote {sum}");
        longest = longest.max(begin.elapsed());
    }
    calm(&mut machine)?;
    // Killed in the middle of what it does.
    machine
        .console
        .send("while :; do dd if=/dev/nvme0n1 of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null; done\n")?;
    std::thread::sleep(Duration::from_millis(500));
    drop(machine);
    function.unbind()?;
    let outside = sum_of(&function.disk()?, GUESTS, BLOCKS)?;
    ensure!(outside == sum, "the lab reads {outside}, the guest wrote {sum}");
    Ok(figures(json!({ "rounds": ROUNDS, "longest_round_ms": milliseconds(longest), "killed": true })))
}

/// The device is no longer the machine's.
pub(super) fn gone(machine: &Operated) -> Result<()> {
    let deadline = Instant::now() + STEP_LIMIT;
    loop {
        let info = machine.get("vm.info")?;
        if info["config"]["devices"].as_array().is_none_or(Vec::is_empty) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the device has not gone: {}", info["config"]["devices"]);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Interrupts of the teaching device that the guest asks for.
const RAISED: u32 = 10;

/// A device that interrupts by its pin: raised, told, acknowledged, and allowed again.
pub(super) fn pin(setting: Setting) -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::of_id(0x1234, 0x11e8)?;
    function.bind()?;
    let setting = Setting { words: "atoll.load=pin", ..setting };
    let guest = guest_with_drivers(setting.series, folder.path(), false)?;
    let mut machine = Operated::spawn(&mut command(setting, &guest, &function)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    let mut run = |line: &str| machine.console.run(line, STEP_LIMIT);
    run("echo 1234 11e8 > /sys/bus/pci/drivers/uio_pci_generic/new_id && exec 3<>/dev/uio0")?;
    run("cd /sys/bus/pci/drivers/uio_pci_generic/0000:*/ && B=$(sed -n '1s/ .*//p' resource)")?;
    let identity = run("busybox devmem $B")?;
    ensure!(identity.eq_ignore_ascii_case("0x010000ed"), "the device says {identity}");
    for round in 0..RAISED {
        run("busybox devmem $((B + 0x60)) 32 1")?;
        // Its driver silences the pin, and counts.
        let count = run("timeout 120 dd bs=4 count=1 <&3 2>/dev/null | od -An -tu4")?;
        ensure!(count.trim() == (round + 1).to_string(), "round {round}: the driver has counted {count:?}");
        let status = run("busybox devmem $((B + 0x24))")?;
        ensure!(status == "0x00000001", "round {round}: the interrupt's status is {status}");
        run("busybox devmem $((B + 0x64)) 32 1 && printf '\\000' | dd of=config bs=1 seek=5 conv=notrunc 2>/dev/null")?;
    }
    let counted = interrupts(&mut machine, "uio_pci_generic")?;
    ensure!(counted >= u64::from(RAISED), "{counted} interrupts were counted");
    calm(&mut machine)?;
    end(machine)?;
    function.unbind()?;
    Ok(figures(json!({ "cpu": setting.cpu, "interrupts": counted })))
}

/// Ways in which the card's driver lets it interrupt (MSI-X, the pin), what the kernel calls them, and how many lines it has. The
/// driver's test of MSI fails on QEMU 7.2's card outside of any passthrough, too; the teaching device has MSI that works.
const WAYS: [(u32, &str, usize); 2] = [(2, "MSI", 3), (0, "IO-APIC", 1)];

/// A network card with the driver of Debian's full kernel: pings through it, by MSI-X and by its pin.
pub(super) fn card() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::of_id(0x8086, 0x10d3)?;
    function.bind()?;
    let guest = guest_with_drivers(Setting::PLAIN.series, folder.path(), true)?;
    let mut machine = Operated::spawn(&mut command(Setting::PLAIN, &guest, &function)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    let mut counted = Map::new();
    for (mode, kind, lines) in WAYS {
        let load = format!("insmod /modules/card/0.ko IntMode={mode}");
        machine.console.run(&load, STEP_LIMIT).with_context(|| load.clone())?;
        let up = "ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && for try in $(seq 30); do \
                  ping -q -c 1 -W 2 10.0.2.2 >/dev/null && break; done; ping -q -c 20 -i 0.1 10.0.2.2";
        let said = machine.console.run(up, STEP_LIMIT)?;
        ensure!(said.contains("20 packets received"), "pings through the card by {kind}: {said}");
        let said = machine.console.run("grep eth0 /proc/interrupts", STEP_LIMIT)?;
        if said.lines().count() != lines || !said.lines().all(|line| line.contains(kind)) {
            let driver = machine.console.run("dmesg | grep e1000e | tail", STEP_LIMIT);
            bail!("the card was to interrupt by {kind}, on {lines} lines: {said}; its driver: {driver:?}");
        }
        let times = interrupts(&mut machine, "eth0")?;
        ensure!(times > 20, "the card has interrupted {times} times by {kind}");
        counted.insert(format!("interrupts_mode_{mode}"), times.into());
        calm(&mut machine)?;
        machine.console.run("busybox rmmod e1000e", STEP_LIMIT)?;
    }
    end(machine)?;
    function.unbind()?;
    Ok(counted)
}

/// A virtual function of a drive, made by the lab, in the guest.
pub(super) fn virtual_function() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let physical = Function::drive(SHARED_DRIVE)?;
    let of_lab = lab_writes(&physical.disk()?)?;
    let function = physical.make_virtual()?;
    function.bind()?;
    let guest = guest_inside(Setting::PLAIN.series);
    let mut machine = Operated::spawn(&mut command(Setting::PLAIN, &guest, &function)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    await_disk(&mut machine)?;
    let seen = guest_sum(&mut machine, 0)?;
    ensure!(seen == of_lab, "the guest reads {seen}, the lab wrote {of_lab}");
    let of_guest = guest_writes(&mut machine, GUESTS)?;
    let counted = interrupts(&mut machine, "nvme")?;
    ensure!(counted > 0, "no interrupt of the virtual function was counted");
    calm(&mut machine)?;
    // Through the physical function, which the lab has all the while.
    let outside = sum_of(&physical.disk()?, GUESTS, BLOCKS)?;
    ensure!(outside == of_guest, "the lab reads {outside}, the guest wrote {of_guest}");
    end(machine)?;
    function.unbind()?;
    physical.drop_virtual()?;
    Ok(figures(json!({ "interrupts": counted, "function": function.bdf })))
}
