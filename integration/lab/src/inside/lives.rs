//! Pauses, resets and reboots of a guest with several vCPUs on KVM, under load.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::operated::Operated;

use super::boot::{self, BOOT_LIMIT, STEP_LIMIT, figures, milliseconds};

const PAUSES: u32 = 20;

/// Everything at once: each vCPU computes, the disk writes, the serial port has exits under way all the time.
const LOAD: &str = "for cpu in 0 1 2 3; do (while :; do :; done) & done; \
    (while :; do dd if=/dev/zero of=/load bs=64k count=8 conv=fsync 2>/dev/null; done) & \
    (while :; do echo > /dev/ttyS0; done) &\n";

/// The guest answers on its console, with all its processors.
fn alive(machine: &mut Operated, vcpus: u32) -> Result<()> {
    boot::check_cpus(&mut machine.console, vcpus)
}

/// Pauses under load: no vCPU executes while it stands, all go on after it, and the guest's kernel has nothing to say.
pub(super) fn pauses(vcpus: u32, more: &[&str]) -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let mut machine = Operated::spawn(&mut boot::command("6.1", vcpus, folder.path(), more)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    let sum = boot::check_disk(&mut machine.console)?;
    machine.console.run("sed -n 's/^btime //p' /proc/stat > /dev/shm/none 2>/dev/null; true", STEP_LIMIT)?;
    machine.console.send(LOAD)?;
    let mut longest = Duration::ZERO;
    for round in 0..PAUSES {
        let begin = Instant::now();
        machine.put("vm.pause", None).with_context(|| format!("pause {round}"))?;
        longest = longest.max(begin.elapsed());
        let returns = |machine: &Operated| -> Result<Vec<u64>> {
            let all = machine.get("vm.counters")?;
            (0..vcpus)
                .map(|vcpu| all[format!("vcpu{vcpu}")]["returns"].as_u64().context("no counter of returns"))
                .collect()
        };
        let first = returns(&machine)?;
        std::thread::sleep(Duration::from_millis(20));
        ensure!(first == returns(&machine)?, "a vCPU ran while the machine was paused");
        machine.put("vm.resume", None).with_context(|| format!("resume {round}"))?;
        std::thread::sleep(Duration::from_millis(30 * u64::from(round % 4)));
    }
    machine.console.send("\nkill $(jobs -p); wait\n")?;
    // Lines of the load's own are in between; the word is not theirs.
    machine.console.send("echo se\"\"ttled\n")?;
    machine.console.expect("settled", STEP_LIMIT)?;
    machine.console.prompt(STEP_LIMIT)?;
    alive(&mut machine, vcpus)?;
    let again = boot::check_disk(&mut machine.console)?;
    ensure!(again != sum, "two random files are the same");
    let results = json!({ "vcpus": vcpus, "pauses": PAUSES, "longest_pause_ms": milliseconds(longest) });
    end(machine)?;
    Ok(figures(results))
}

/// Presses the reset button, and has the guest reboot: each time all vCPUs come back from wait-for-SIPI.
pub(super) fn resets(vcpus: u32, more: &[&str]) -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let mut machine = Operated::spawn(&mut boot::command("6.1", vcpus, folder.path(), more)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    machine.console.send(LOAD)?;
    std::thread::sleep(Duration::from_millis(500));
    machine.put("vm.reboot", None).context("the reset button")?;
    machine.console.expect("Linux version", BOOT_LIMIT)?;
    machine.console.prompt(BOOT_LIMIT)?;
    alive(&mut machine, vcpus)?;
    machine.console.send("reboot -f\n")?;
    machine.console.expect("Linux version", BOOT_LIMIT)?;
    machine.console.prompt(BOOT_LIMIT)?;
    alive(&mut machine, vcpus)?;
    boot::check_disk(&mut machine.console)?;
    end(machine)?;
    Ok(figures(json!({ "vcpus": vcpus, "resets": 2 })))
}

fn end(mut machine: Operated) -> Result<()> {
    machine.console.run("mount -o remount,ro /", STEP_LIMIT)?;
    machine.console.send("poweroff -f\n")?;
    let (status, errors) = machine.console.wait(STEP_LIMIT)?;
    ensure!(status.success(), "atoll ended with {status}: {errors}");
    Ok(())
}
