//! The same guest on QEMU and the same KVM, in turn with Atoll.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::console::Console;
use xtask::demo::{Demo, KernelForm};
use xtask::images::PROMPT;

use super::boot::{BOOT_LIMIT, figures, milliseconds};
use crate::freight::guest_inside;

const CMDLINE: &str = "console=ttyS0 no_timer_check reboot=t";
const ROUNDS: usize = 4;

/// Of exec to shell, to QEMU's smallest machine.
const EXEC_MAX: f64 = 1.0;
/// Of the kernel's first line to shell, to QEMU's usual machine.
const KERNEL_MAX: f64 = 1.1;

fn qemu(machine: &str) -> Command {
    let guest = guest_inside("6.1");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-L", "/tools/firmware", "-M", machine, "-accel", "kvm", "-cpu", "host", "-m", "512M"])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&guest.vmlinux)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .args(["-append", CMDLINE]);
    command
}

fn atoll() -> Result<Command> {
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "kvm".to_owned() };
    let mut command = demo.command(&guest_inside("6.1"))?;
    command.args(["--cmdline", CMDLINE]);
    Ok(command)
}

/// From exec to the prompt, and from the kernel's first line to it. The machine is then ended from outside: one without
/// ACPI cannot switch itself off.
fn timed_boot(command: &mut Command) -> Result<(Duration, Duration)> {
    let mut console = Console::spawn(command)?;
    console.prompt(BOOT_LIMIT)?;
    let prompt = console.arrival(PROMPT).context("the prompt has just been seen")?;
    let first = console.arrival("Linux version").context("the kernel printed no first line")?;
    Ok((prompt - console.started(), prompt - first))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Ours to theirs, to the thousandth.
fn ratio(ours: Duration, theirs: Duration) -> f64 {
    (ours.as_secs_f64() / theirs.as_secs_f64().max(0.001) * 1000.0).round() / 1000.0
}

/// Boots of one machine: from exec to the prompt, and from the kernel's first line to it.
type Boots = Vec<(Duration, Duration)>;

/// One measure of two machines that took turns.
struct Comparison {
    ours: Duration,
    theirs: Duration,
    ratio: f64,
    /// The lowest and the highest ratio of one round.
    spread: (f64, f64),
}

impl Comparison {
    fn new(ours: &Boots, theirs: &Boots, measure: impl Fn(&(Duration, Duration)) -> Duration) -> Self {
        let of = |boots: &Boots| -> Vec<Duration> { boots.iter().map(&measure).collect() };
        let (ours, theirs) = (of(ours), of(theirs));
        let rounds: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ratio(*ours, *theirs)).collect();
        let spread = rounds.iter().fold((f64::MAX, 0.0_f64), |(low, high), ratio| (low.min(*ratio), high.max(*ratio)));
        let (ours, theirs) = (median(ours), median(theirs));
        Self { ours, theirs, ratio: ratio(ours, theirs), spread }
    }
}

/// Rounds of three boots, one after the other; ratios of the medians, and of the rounds.
pub(super) fn boots() -> Result<Map<String, Value>> {
    let (mut ours, mut small, mut usual) = (Boots::new(), Boots::new(), Boots::new());
    // Files are read from the disk once, by whoever is first: not by us alone.
    timed_boot(&mut atoll()?)?;
    for _ in 0..ROUNDS {
        small.push(timed_boot(&mut qemu("microvm,acpi=off"))?);
        ours.push(timed_boot(&mut atoll()?)?);
        usual.push(timed_boot(&mut qemu("q35"))?);
    }
    let to_small = Comparison::new(&ours, &small, |(exec, _)| *exec);
    let to_usual = Comparison::new(&ours, &usual, |(_, kernel)| *kernel);
    let results = json!({
        "rounds": ROUNDS,
        "exec_to_shell_ms": milliseconds(to_small.ours), "qemu_microvm_ms": milliseconds(to_small.theirs),
        "ratio_to_microvm": to_small.ratio, "spread_to_microvm": to_small.spread,
        "first_line_to_shell_ms": milliseconds(to_usual.ours), "qemu_q35_ms": milliseconds(to_usual.theirs),
        "ratio_to_q35": to_usual.ratio, "spread_to_q35": to_usual.spread,
    });
    ensure!(to_small.ratio <= EXEC_MAX && to_usual.ratio <= KERNEL_MAX, "slower than may be: {results}");
    Ok(figures(results))
}
