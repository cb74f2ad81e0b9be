//! What an I/O costs the VMM on KVM: nothing. While a disk and a card are at work, no vCPU comes back to it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::operated::Operated;

use super::boot::{self, BOOT_LIMIT, STEP_LIMIT, figures};

/// How long nobody but the devices has anything to do.
const WATCHED: Duration = Duration::from_secs(4);
/// Without an exit for so long, the serial port has nothing more to say.
const SILENT: Duration = Duration::from_secs(2);
/// Requests and interrupts that must have been seen in that time; a fraction of what the slowest machine does.
const WORK_MIN: u64 = 50;

/// The counters of the first vCPU.
fn counters(machine: &Operated) -> Result<Map<String, Value>> {
    let all = machine.get("vm.counters")?;
    all["vcpu0"].as_object().cloned().with_context(|| format!("no vcpu0 among the counters {all}"))
}

fn number(counters: &Map<String, Value>, name: &str) -> Result<u64> {
    counters.get(name).and_then(Value::as_u64).with_context(|| format!("no counter {name}"))
}

/// The number that a command prints in the guest.
fn told(machine: &mut Operated, command: &str) -> Result<u64> {
    let text = machine.console.run(command, STEP_LIMIT)?;
    text.trim().parse().with_context(|| format!("`{command}` prints {text:?}, not a number"))
}

/// The counters, once the prompt's last letters are out and the serial port is silent: no exit for a while.
fn quiet(machine: &Operated) -> Result<Map<String, Value>> {
    let deadline = Instant::now() + STEP_LIMIT;
    let mut last = counters(machine)?;
    loop {
        std::thread::sleep(SILENT);
        let now = counters(machine)?;
        if number(&now, "exits")? == number(&last, "exits")? {
            return Ok(now);
        }
        ensure!(Instant::now() < deadline, "the guest leaves for registers all the time: {now:?}");
        last = now;
    }
}

/// Interrupts of virtio queues so far.
const INTERRUPTS: &str = "awk '/virtio/ { sum += $2 } END { print sum + 0 }' /proc/interrupts";
/// Reads that the disk has completed.
const READS: &str = "awk '{ print $1 }' /sys/block/vda/stat";
/// Packets that came in.
const PACKETS: &str = "cat /sys/class/net/eth0/statistics/rx_packets";

/// A load, and the returns of KVM_RUN in the middle of it.
pub(super) fn none_for_each_request() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let mut machine = Operated::spawn(&mut boot::command("6.1", 1, folder.path(), &[])?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    machine.console.run("ip addr add 192.168.77.2/24 dev eth0; ip link set eth0 up", STEP_LIMIT)?;
    machine.console.run(
        "while :; do dd if=/dev/vda of=/dev/null bs=4k count=256 iflag=direct 2>/dev/null; done & \
         ping -q -i 0.01 192.168.77.1 >/dev/null 2>&1 & sleep 2",
        STEP_LIMIT,
    )?;
    let before = [INTERRUPTS, READS, PACKETS].map(|command| told(&mut machine, command));
    let first = quiet(&machine)?;
    std::thread::sleep(WATCHED);
    let second = counters(&machine)?;
    let after = [INTERRUPTS, READS, PACKETS].map(|command| told(&mut machine, command));
    let [interrupts, reads, packets] = [0, 1, 2].map(|index| match (&before[index], &after[index]) {
        (Ok(before), Ok(after)) => after.saturating_sub(*before),
        _ => 0,
    });
    let grown = |name: &str| Ok::<u64, anyhow::Error>(number(&second, name)? - number(&first, name)?);
    let (returns, exits, doorbells) = (grown("returns")?, grown("exits")?, grown("doorbells")?);
    machine.put("vm.shutdown", None)?;
    machine.put("vmm.shutdown", None)?;
    let results = json!({ "watched_s": WATCHED.as_secs(), "interrupts": interrupts, "reads": reads, "packets": packets,
        "kvm_run_returns": returns, "of_that_exits": exits, "of_that_doorbells": doorbells });
    ensure!(interrupts >= WORK_MIN && reads >= WORK_MIN && packets >= WORK_MIN, "hardly any work was done: {results}");
    ensure!(exits == 0 && doorbells == 0, "the guest left for registers or doorbells: {results}");
    // The question itself gets the vCPU out once, perhaps twice.
    ensure!(returns <= 2, "KVM_RUN returned: {results}");
    Ok(figures(results))
}
