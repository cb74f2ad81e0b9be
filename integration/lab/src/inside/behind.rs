//! Devices of the lab behind the guest's IOMMU: what the guest maps for them is mapped in the lab's, and nothing else is reached.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::operated::Operated;

use super::boot::{BOOT_LIMIT, STEP_LIMIT, figures};
use super::function::{Function, shell};
use super::passed::{GUESTS, Setting, await_disk, calm, command, end, gone, guest_sum, guest_with_drivers};
use crate::drivers;

/// What has happened to the device's addresses.
fn counted(machine: &Operated) -> Result<(u64, u64)> {
    let figures = machine.get("inspect/figures/passed/iommu")?;
    let number = |name: &str| figures[name].as_u64().with_context(|| format!("no {name} among {figures}"));
    Ok((number("map")?, number("unmap")?))
}

/// A drive is at work, and its mappings come and go with its requests; then it goes and comes, with a guest's driver that
/// attaches it anew.
pub(super) fn comes_again(machine: &mut Operated, function: &Function, sum: &str) -> Result<()> {
    let (maps, unmaps) = counted(machine)?;
    ensure!(maps > 16 && unmaps > 16, "{maps} mappings and {unmaps} unmappings were counted");
    machine.put("vm.remove-device", Some(&json!({ "id": "passed" })))?;
    gone(machine)?;
    machine.put("vm.add-device", Some(&json!({ "id": "passed", "path": function.folder(), "iommu": true })))?;
    await_disk(machine)?;
    let kind = machine.console.run("cat /sys/class/nvme/nvme*/device/iommu_group/type", STEP_LIMIT)?;
    ensure!(kind.starts_with("DMA"), "plugged in, the drive is not behind the IOMMU: {kind}");
    let seen = guest_sum(machine, GUESTS)?;
    ensure!(seen == sum, "plugged in again, the guest reads {seen}, it wrote {sum}");
    let (maps, unmaps) = counted(machine)?;
    ensure!(maps > 16 && unmaps > 16, "plugged in again: {maps} mappings and {unmaps} unmappings were counted");
    Ok(())
}

/// The lab's kernel has told so many faults of its IOMMU.
fn faults(function: &Function) -> Result<usize> {
    let place = function.bdf.strip_prefix("0000:").unwrap_or(&function.bdf);
    let said = shell("dmesg")?;
    Ok(said.lines().filter(|line| line.contains("DMAR") && line.contains("fault addr") && line.contains(place)).count())
}

/// A program in the guest maps memory for the teaching device, takes it back, and has the device copy from and to what it may not
/// reach: nothing is touched, and the lab's IOMMU tells of it. And it has the device interrupt by MSI.
pub(super) fn refused_access() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::of_id(0x1234, 0x11e8)?;
    function.bind()?;
    let setting = Setting { words: "atoll.load=iommu,vfio iommu.strict=1", ..Setting::BEHIND };
    let guest = guest_with_drivers(drivers::BEHIND_SERIES, folder.path(), false)?;
    let mut machine = Operated::spawn(&mut command(setting, &guest, &function)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    let before = (faults(&function)?, counted(&machine)?);
    // Nothing here remaps interrupts for the guest.
    machine.console.run("echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", STEP_LIMIT)?;
    machine
        .console
        .run("cd /sys/bus/pci/devices && for D in *; do grep -q 0x11e8 $D/device && break; done; cd /", STEP_LIMIT)?;
    let said = machine.console.run("/verify edu device=$D 2>&1", STEP_LIMIT)?;
    let line = said.lines().find(|line| line.starts_with('{')).with_context(|| said.clone())?;
    let verdict: Value = serde_json::from_str(line)?;
    ensure!(verdict["ok"] == true && verdict["faults"] == 4 && verdict["messages"] == 10, "{line}");
    let after = counted(&machine)?;
    let (maps, unmaps) = (after.0 - before.1.0, after.1 - before.1.1);
    ensure!(maps >= 6 && unmaps >= 4, "{maps} mappings and {unmaps} unmappings were counted");
    let deadline = Instant::now() + STEP_LIMIT;
    let told = loop {
        let told = faults(&function)? - before.0;
        if told > 0 {
            break told;
        }
        ensure!(Instant::now() < deadline, "the lab's IOMMU tells of no fault");
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    calm(&mut machine)?;
    end(machine)?;
    function.unbind()?;
    Ok(figures(json!({
        "maps": maps,
        "unmaps": unmaps,
        "faults_of_the_lab": told,
        "messages": verdict["messages"],
    })))
}
