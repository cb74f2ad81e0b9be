//! Devices that go while a guest has them, and one that interrupts without an end: the VMM does not hang, the host has what is
//! its own, and the operator is told.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use xtask::operated::Operated;

use super::boot::{BOOT_LIMIT, STEP_LIMIT, figures, milliseconds};
use super::function::{Function, shell};
use super::passed::{Setting, await_disk, command, end, gone};
use crate::freight::guest_inside;
use crate::hardware::PLAIN_DRIVE;

/// The VMM waits so long for a guest to let a device go that the host wants back.
const LET_GO: Duration = Duration::from_secs(20);
/// How long a storm is watched.
const STORM: Duration = Duration::from_secs(4);

/// A line of shell that runs by itself, and is ended with its owner.
struct Beside(Child);

impl Beside {
    fn start(line: &str) -> Result<Self> {
        Ok(Self(Command::new("/bin/sh").args(["-c", line]).stdin(Stdio::null()).spawn()?))
    }

    /// Waits for its end.
    fn ended(&mut self) -> Result<()> {
        let deadline = Instant::now() + STEP_LIMIT;
        loop {
            if let Some(status) = self.0.try_wait()? {
                ensure!(status.success(), "the host's own part ended with {status}");
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the host waits for its device still");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Pulls the function out of the lab's bus.
fn pull(function: &Function) -> Result<Beside> {
    Beside::start(&format!("echo 1 > {}/remove", function.folder().display()))
}

/// Has the lab look for it again, and its driver take it.
fn found_again(function: &Function) -> Result<()> {
    ensure!(!function.folder().exists(), "the function is still there");
    shell("echo 1 > /sys/bus/pci/rescan")?;
    function.disk().map(drop)
}

/// What the machine says of its device.
fn told(machine: &Operated) -> Result<Value> {
    let devices = machine.get("inspect/devices")?;
    Ok(devices["passed"].clone())
}

/// A drive that is pulled out: of a guest that lets it go, and of a machine that stands, which has it taken away. The guest
/// goes on, adding what is not there is refused, and what has come back can be plugged in.
pub(super) fn pulled_out() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::drive(PLAIN_DRIVE)?;
    function.bind()?;
    let guest = guest_inside(Setting::PLAIN.series);
    let mut machine = Operated::spawn(&mut command(Setting::PLAIN, &guest, &function)?, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    await_disk(&mut machine)?;
    machine.console.run(
        "(while :; do dd if=/dev/nvme0n1 of=/dev/null bs=64k count=64 iflag=direct; done) >/dev/null 2>&1 & true",
        STEP_LIMIT,
    )?;
    let begin = Instant::now();
    pull(&function)?.ended()?;
    let let_go = begin.elapsed();
    gone(&machine)?;
    machine.console.run("true", STEP_LIMIT)?;
    let again = json!({ "id": "passed", "path": function.folder() });
    let error = match machine.put("vm.add-device", Some(&again)) {
        Ok(_) => bail!("a device that is not there was plugged in"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(error.contains("no PCI function") && error.contains("atoll vfio check"), "{error}");
    found_again(&function)?;
    function.bind()?;
    machine.put("vm.add-device", Some(&again))?;
    await_disk(&mut machine)?;

    // Nobody in the guest can answer.
    machine.put("vm.pause", None)?;
    let begin = Instant::now();
    pull(&function)?.ended().context("of a machine that stands")?;
    let taken = begin.elapsed();
    ensure!(taken >= LET_GO, "it was taken away after {taken:?}, without the guest's time to let it go");
    let about = told(&machine)?;
    let reason = about["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("the host want"), "the operator is not told: {about}");
    machine.put("vm.resume", None)?;
    // Its registers read as ones now, and the guest's driver gives it up.
    gone(&machine)?;
    machine.console.run("[ ! -e /dev/nvme0n1 ]", STEP_LIMIT)?;
    end(machine)?;
    found_again(&function)?;
    Ok(figures(json!({ "let_go_ms": milliseconds(let_go), "taken_away_ms": milliseconds(taken) })))
}

/// Interrupts by pins of PCI devices that the guest's kernel has counted.
fn counted(machine: &mut Operated) -> Result<u64> {
    let sum = "awk '/IO-APIC/ && !/ttyS0|rtc0|acpi/ { sum += $2 } END { print sum + 0 }' /proc/interrupts";
    machine.console.run(sum, STEP_LIMIT)?.parse().context("a count of interrupts")
}

/// Lowers the teaching device's pin, which no reset does.
fn lower(function: &Function) -> Result<()> {
    let folder = function.folder();
    let folder = folder.display();
    let line = format!(
        "echo 1 > {folder}/enable; B=$(sed -n '1s/ .*//p' {folder}/resource); busybox devmem $((B + 0x64)) 32 0xffffffff && \
         [ $(busybox devmem $((B + 0x24))) = 0x00000000 ]; RC=$?; echo 0 > {folder}/enable; exit $RC"
    );
    shell(&line).map(drop)
}

/// A pin that nobody lowers, on a line that another device's driver listens to: the guest is interrupted without an end, which its
/// counters show. (The host is not: VFIO sees that the pin is still high and asks KVM again, by a kernel worker.) The lab's own
/// work goes on, the operator is answered, and the lab has its device back.
pub(super) fn storm() -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let function = Function::of_id(0x1234, 0x11e8)?;
    function.bind()?;
    let guest = guest_inside(Setting::PLAIN.series);
    // Without messages each disk listens to one of the four lines; and the kernel does not give a line up by itself.
    let setting = Setting { words: "pci=nomsi noirqdebug", ..Setting::PLAIN };
    let mut command = command(setting, &guest, &function)?;
    for disk in 0..4 {
        let image = folder.path().join(format!("disk{disk}"));
        std::fs::File::create(&image)?.set_len(1 << 20)?;
        command.arg("--disk").arg(format!("path={}", image.display()));
    }
    let mut machine = Operated::spawn(&mut command, folder.path())?;
    machine.console.prompt(BOOT_LIMIT)?;
    let run = "cd /sys/bus/pci/devices && for D in *; do grep -q 0x11e8 $D/device && break; done; echo 1 > $D/enable; \
               B=$(sed -n '1s/ .*//p' $D/resource); busybox devmem $B";
    let identity = machine.console.run(run, STEP_LIMIT)?;
    ensure!(identity.eq_ignore_ascii_case("0x010000ed"), "the device says {identity}");
    machine.console.run("busybox devmem $((B + 0x60)) 32 1", STEP_LIMIT)?;
    let first = counted(&mut machine)?;
    let begin = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut asked = 0;
    while begin.elapsed() < STORM {
        let question = Instant::now();
        shell("true")?;
        machine.get("vm.info")?;
        slowest = slowest.max(question.elapsed());
        asked += 1;
    }
    let interrupts = counted(&mut machine)? - first;
    let per_second = interrupts as f64 / begin.elapsed().as_secs_f64();
    ensure!(asked > 0, "the operator was not asked");
    ensure!(interrupts > 100, "there is no storm: {interrupts} interrupts in {STORM:?}");
    let begin = Instant::now();
    let unbind = format!("echo {} > /sys/bus/pci/drivers/vfio-pci/unbind", function.bdf);
    Beside::start(&unbind)?.ended()?;
    let taken = begin.elapsed();
    gone(&machine)?;
    let last = counted(&mut machine)?;
    std::thread::sleep(Duration::from_millis(500));
    let more = counted(&mut machine)? - last;
    ensure!(more < 100, "the device is gone, and {more} interrupts came since");
    end(machine)?;
    shell(&format!("echo {} > /sys/bus/pci/drivers/vfio-pci/bind", function.bdf))?;
    function.unbind()?;
    lower(&function)?;
    Ok(figures(json!({
        "interrupts_per_s": per_second.round(),
        "asked": asked,
        "slowest_answer_ms": milliseconds(slowest),
        "taken_away_ms": milliseconds(taken),
    })))
}
