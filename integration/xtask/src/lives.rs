//! `cargo xtask soak pauses` and `soak reboots`: a guest under a judged load is stopped and let go, and started again, many
//! times.
//!
//! The load is on a disk in memory and on a switch, so that nothing but Atoll is slow ([`crate::laden`]). A pause must be
//! there within 50 ms, or the slowest request in flight; the guest's clocks must be right after each; the verifier and the
//! guest's log must have nothing to say; and reboots leave the same descriptors, threads and device processes, down to the
//! process ids.

use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::guest_clock::Ahead;
use crate::laden::{Judged, Laden, STEP, fast_folder};
use crate::operated::{Belongings, Operated};
use crate::{images, place};
use anyhow::{Context, Result, ensure};
use atoll_verify::dice::{Dice, mix};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// What a pause may take, unless a request in flight takes longer.
pub const PAUSE_US_MAX: u64 = 50_000;
/// How far the guest's clock may move against the host's.
pub const CLOCK_DRIFT_US_MAX: u64 = 10_000;
/// How far it may be from the host's after a boot: Linux takes the date from the CMOS clock, which knows whole seconds, and
/// adds one half.
const CLOCK_ERROR_MAX: Duration = Duration::from_millis(600);
/// Between two looks at the guest's clock.
const CLOCK_EVERY: u32 = 10;
/// How long a life of the guest lasts under load before it is started again, at most.
const LIFE_US: u64 = 400_000;

/// One pause, as the VMM measured it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Pause {
    /// From the request to the last interrupt delivered.
    pub whole_us: u64,
    /// The slowest request in flight, as its device's process measured it, within a quarter; 0 when there was none.
    pub slowest_request_us: u64,
    /// Until the vCPUs stood.
    pub vcpus_us: u64,
    /// From then until the last device had drained.
    pub drain_us: u64,
    /// From then until their interrupts had arrived.
    pub interrupts_us: u64,
    /// As the client saw it, over the socket.
    pub answer_us: u64,
}

impl Pause {
    /// Whether it was there in time: within the limit, or as soon as the slowest request in flight allowed.
    pub fn in_time(&self) -> bool {
        self.whole_us < PAUSE_US_MAX || self.whole_us <= self.slowest_request_us
    }
}

/// Both figures, for people.
impl std::fmt::Display for Pause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |us: u64| us as f64 / 1000.0;
        let Self { whole_us, slowest_request_us, vcpus_us, drain_us, interrupts_us, .. } = *self;
        write!(f, "paused after {:.1} ms, slowest request in flight {:.1} ms", ms(whole_us), ms(slowest_request_us))?;
        if !self.in_time() {
            let steps = (ms(vcpus_us), ms(drain_us), ms(interrupts_us));
            write!(f, "; late: vCPUs {:.1} ms, devices {:.1} ms, interrupts {:.1} ms", steps.0, steps.1, steps.2)?;
        }
        Ok(())
    }
}

/// What came of pauses of one machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pauses {
    /// Each of them.
    pub pauses: Vec<Pause>,
    /// How far the guest's clock had moved against the host's since before the first pause, at most.
    pub clock_drift_us_max: u64,
    /// What the verifier says.
    pub judged: Judged,
}

/// What came of reboots of one machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reboots {
    /// Reboots by the guest itself.
    pub by_guest: u32,
    /// By the operator.
    pub by_operator: u32,
    /// What the VMM had before and after each.
    pub belongings: Belongings,
    /// How far the guest's clock was from the host's, at most.
    pub clock_error_us_max: u64,
    /// From each reset to the next prompt.
    pub prompt_ms: Vec<u64>,
    /// What the verifier says of all lives together.
    pub judged: Judged,
}

fn boot(folder: &Path, more: &[&str]) -> Result<Operated> {
    let guest = images::guest("6.1")?;
    let root = images::copy_of_disk(&guest, folder)?;
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.arg("--disk").arg(format!("path={}", root.display())).args(more);
    let mut vm = Operated::spawn(&mut command, folder)?;
    vm.console.prompt(BOOT_LIMIT)?;
    Ok(vm)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Pauses and resumes a guest under load `count` times, at moments that `seed` says; each is told as it comes.
pub fn pauses(count: u32, seed: u64, told: impl Fn(u32, &Pause)) -> Result<Pauses> {
    let mut laden = Laden::boot(seed, count)?;
    let at_first = Ahead::sharp(laden.console())?;
    ensure!(at_first.wrong() < CLOCK_ERROR_MAX, "the guest's clock starts {:?} off", at_first.wrong());
    laden.begin()?;
    let mut dice = Dice::new(mix(seed, 0x70_6175_7365));
    let mut pauses = Vec::new();
    let mut clock = Duration::ZERO;
    for number in 1..=count {
        std::thread::sleep(Duration::from_micros(dice.below(20_000)));
        let asked = Instant::now();
        laden.vm.put("vm.pause", None)?;
        let answer_us = micros(asked.elapsed());
        let last = laden.vm.get("inspect/last_pause")?;
        let figure = |name: &str| last.get(name).and_then(Value::as_u64).with_context(|| format!("no {name}: {last}"));
        let pause = Pause {
            whole_us: figure("whole_us")?,
            slowest_request_us: last.get("slowest_request_us").and_then(Value::as_u64).unwrap_or(0),
            vcpus_us: figure("vcpus_us")?,
            drain_us: figure("slowest_drain_us")?,
            interrupts_us: figure("interrupts_us")?,
            answer_us,
        };
        told(number, &pause);
        pauses.push(pause);
        std::thread::sleep(Duration::from_micros(dice.below(10_000)));
        laden.vm.put("vm.resume", None)?;
        if number % CLOCK_EVERY == 0 {
            clock = clock.max(Ahead::ask(laden.console())?.apart(at_first));
        }
    }
    clock = clock.max(Ahead::sharp(laden.console())?.apart(at_first));
    let judged = laden.finish()?;
    Ok(Pauses { pauses, clock_drift_us_max: micros(clock), judged })
}

/// Waits until the VMM has no more than it had: what has just ended may be listed for a moment, then and now.
fn settled(vm: &Operated, expected: &Belongings) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let found = Belongings::of(vm.console.pid())?;
        let more = found.descriptors > expected.descriptors || found.threads > expected.threads;
        if !more && found.children == expected.children {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "after a reboot the VMM has {found:?}, before {expected:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn power_off(mut vm: Operated) -> Result<()> {
    vm.console.run("mount -o remount,ro /", STEP)?;
    vm.console.send("poweroff -f\n")?;
    let (status, errors) = vm.console.wait(STEP)?;
    ensure!(status.success(), "atoll ended with {status}: {errors}");
    Ok(())
}

/// Starts a guest again `count` times in the middle of its load, at moments that `seed` says: by itself and by the operator
/// in turn.
pub fn reboots(count: u32, seed: u64) -> Result<Reboots> {
    let mut laden = Laden::boot(seed, 0)?;
    let belongings = Belongings::of(laden.console().pid())?;
    let mut dice = Dice::new(mix(seed, 0x7265_626f_6f74));
    let mut clock = Duration::ZERO;
    let mut prompt_ms = Vec::new();
    for reboot in 0..count {
        laden.begin()?;
        std::thread::sleep(Duration::from_micros(dice.below(LIFE_US)));
        laden.listen()?;
        let by_guest = reboot % 2 == 0;
        if by_guest {
            laden.hush()?;
        }
        let asked = Instant::now();
        if by_guest {
            laden.console().send("reboot -f\n")?;
        } else {
            laden.vm.put("vm.reboot", None)?;
        }
        laden.reborn()?;
        prompt_ms.push(u64::try_from(asked.elapsed().as_millis())?);
        settled(&laden.vm, &belongings)?;
        clock = clock.max(Ahead::ask(laden.console())?.wrong());
        ensure!(clock < CLOCK_ERROR_MAX, "the guest's clock is {clock:?} off after reboot {reboot}");
    }
    laden.begin()?;
    std::thread::sleep(Duration::from_micros(LIFE_US));
    let judged = laden.finish()?;
    let by_guest = count.div_ceil(2);
    let clock_error_us_max = micros(clock);
    Ok(Reboots { by_guest, by_operator: count / 2, belongings, clock_error_us_max, prompt_ms, judged })
}

/// The power button, as a guest's ACPI driver sees it: counts presses that reached the guest, and lets it obey.
pub fn power_button() -> Result<()> {
    let folder = fast_folder()?;
    let mut vm = boot(folder.path(), &["--cmdline", "console=ttyS0 atoll.load=button"])?;
    let pressed = "/sys/firmware/acpi/interrupts/ff_pwr_btn";
    let before = vm.console.run(&format!("awk '{{print $1}}' {pressed}"), STEP)?;
    ensure!(before.trim() == "0", "the button has been pressed {before} times before anybody did");
    for _ in 0..2 {
        vm.put("vm.power-button", None)?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let wait =
        format!("for try in 1 2 3 4 5 6 7 8 9; do [ $(awk '{{print $1}}' {pressed}) = 2 ] && break; sleep 0.2; done");
    vm.console.run(&wait, STEP)?;
    let after = vm.console.run(&format!("awk '{{print $1}}' {pressed}"), STEP)?;
    ensure!(after.trim() == "2", "the guest has heard of {after} presses of 2");
    power_off(vm)
}

/// Makes, boots, pauses and forgets a machine with a disk `count` times in one VMM: nothing of any is left.
pub fn machines(count: u32) -> Result<Belongings> {
    let guest = images::guest("6.1")?;
    let folder = fast_folder()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let vm = Operated::spawn(Command::new(place::program("atoll")?).arg("run"), folder.path())?;
    let config = serde_json::json!({
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1 },
        "memory": { "size": 256 << 20 },
        "payload": { "kernel": guest.vmlinux, "initramfs": guest.initramfs, "cmdline": "console=ttyS0" },
        "disks": [{ "path": disk }],
        "serial": { "mode": "Null" },
        "platform": { "cpu": "soft" },
    });
    let once = |vm: &Operated| -> Result<()> {
        vm.put("vm.create", Some(&config))?;
        vm.put("vm.boot", None)?;
        let children = Belongings::of(vm.console.pid())?.children;
        ensure!(children.len() == 1, "a machine with one disk has the processes {children:?}");
        vm.put("vm.pause", None)?;
        vm.put("vm.delete", None).map(drop)
    };
    once(&vm)?;
    let belongings = Belongings::of(vm.console.pid())?;
    ensure!(belongings.children.is_empty(), "a machine that was deleted leaves {:?}", belongings.children);
    for _ in 1..count {
        once(&vm)?;
    }
    settled(&vm, &belongings)?;
    vm.put("vmm.shutdown", None)?;
    let (status, errors) = vm.console.wait(STEP)?;
    ensure!(status.success(), "atoll ended with {status}: {errors}");
    Ok(belongings)
}
