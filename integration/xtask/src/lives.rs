//! `cargo xtask soak pauses` and `soak reboots`: a guest under load is stopped and let go, and started again, many times.
//!
//! The load is on a disk in memory, so that nothing but Atoll is slow: the guest writes a pattern, drops its caches, reads
//! it back and compares, over and over. A pause must be there within 50 ms, or the slowest request in flight; the guest's
//! clocks must be right after each; nothing in the guest's log may complain; and reboots leave the same descriptors,
//! threads and device processes, down to the process ids.

use crate::console::Console;
use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::images;
use crate::operated::{Belongings, Operated};
use crate::place;
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// One step in the guest's shell.
const STEP: Duration = Duration::from_secs(60);
/// How long the guest's processes may be late besides: what the machine may need to give us a processor.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// How far the guest's clock may move against the host's.
const CLOCK_DRIFT_MAX: Duration = Duration::from_millis(10);
/// How far it may be from the host's after a boot: Linux takes the date from the CMOS clock, which knows whole seconds, and
/// adds one half.
const CLOCK_ERROR_MAX: Duration = Duration::from_millis(600);
/// Between two looks at the guest's clock.
const CLOCK_EVERY: u32 = 10;
/// What the guest must not have said.
const COMPLAINTS: [&str; 7] =
    ["I/O error", "lockup", "rcu: INFO", "rcu_sched", "hung_task", "Clocksource", "clocksource: timekeeping watchdog"];
/// Bytes of the disk under load.
const DISK_BYTES: u64 = 64 << 20;

/// Keeps the guest writing, reading and comparing until `/run/stop` is there; rounds and mismatches are counted.
const LOAD: &str = "mkdir -p /run; mount -t tmpfs none /run; dd if=/dev/urandom of=/run/pattern bs=64k count=32 2>/dev/null; \
    (n=0; while [ ! -e /run/stop ]; do \
    dd if=/run/pattern of=/dev/vdb bs=64k count=32 conv=notrunc,fsync 2>/dev/null; echo 3 > /proc/sys/vm/drop_caches; \
    dd if=/dev/vdb of=/run/back bs=64k count=32 2>/dev/null; \
    cmp -s /run/pattern /run/back || echo bad >> /run/bad; n=$((n+1)); echo $n > /run/rounds; done; echo over > /run/over) \
    >/dev/null 2>&1 & true";

/// Keeps the network card sending.
const FRAMES: &str = "ifconfig eth0 10.9.0.1 netmask 255.255.255.0 up && busybox arp -s 10.9.0.2 02:00:00:00:00:02 && \
    for n in 1 2 3; do (ping -q -s 1400 -i 0.002 10.9.0.2 >/dev/null 2>&1 & echo $! >> /run/pings); done";

/// What came of pauses.
#[derive(Debug, Serialize)]
pub struct Pauses {
    /// Pauses.
    pub count: u32,
    /// The seed.
    pub seed: u64,
    /// From the request to the last device drained, as the VMM measured it.
    pub pause_us_p50: u64,
    /// The slowest.
    pub pause_us_max: u64,
    /// Until the vCPUs stood, at most.
    pub vcpus_us_max: u64,
    /// The slowest request in flight, as the device that waited for it measured it.
    pub slowest_drain_us: u64,
    /// The most that any pause took beyond its slowest request.
    pub beyond_drain_us_max: u64,
    /// As the client saw it, over the socket.
    pub answer_us_max: u64,
    /// How far the guest's clock had moved against the host's since before the first pause, at most.
    pub clock_drift_us_max: u64,
    /// Rounds of the load that were written, read and compared.
    pub rounds: u64,
    /// Frames that the network card has sent meanwhile.
    pub frames: u64,
    /// All of this is as it should be.
    pub ok: bool,
}

/// What came of reboots.
#[derive(Debug, Serialize)]
pub struct Reboots {
    /// Reboots by the guest itself.
    pub by_guest: u32,
    /// By the operator.
    pub by_operator: u32,
    /// What the VMM had before and after each.
    pub belongings: Belongings,
    /// How far the guest's clock was from the host's, at most.
    pub clock_error_us_max: u64,
    /// Rounds of the load over all lives.
    pub rounds: u64,
    /// Median time from a reset to the next prompt.
    pub prompt_ms_p50: u64,
}

/// A small generator (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}

/// A folder in memory, where there is one.
fn fast_folder() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    Ok(if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? })
}

/// A network backend of somebody else's, that takes every frame and gives none; killed when dropped.
struct Sink(Child);

impl Sink {
    fn start(socket: &Path) -> Result<Self> {
        let mut command = Command::new(place::program("atoll-net")?);
        let child = command.arg("--socket").arg(socket).arg("--none").stdin(Stdio::null()).spawn()?;
        let deadline = Instant::now() + STEP;
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "atoll-net makes no socket at {}", socket.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Self(child))
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot(folder: &Path, more: &[&str]) -> Result<Operated> {
    let guest = images::guest("6.1")?;
    let root = images::copy_of_disk(&guest, folder)?;
    let load = folder.join("load.img");
    std::fs::File::create(&load)?.set_len(DISK_BYTES)?;
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    for disk in [root, load] {
        command.arg("--disk").arg(format!("path={}", disk.display()));
    }
    command.args(more);
    let mut vm = Operated::spawn(&mut command, folder)?;
    vm.console.prompt(BOOT_LIMIT)?;
    Ok(vm)
}

fn start_load(console: &mut Console) -> Result<()> {
    console.run(LOAD, STEP)?;
    rounds_beyond(console, 0).map(drop)
}

/// Waits until the load has done more rounds than `before`.
fn rounds_beyond(console: &mut Console, before: u64) -> Result<u64> {
    let deadline = Instant::now() + STEP;
    loop {
        let rounds = console.run("cat /run/rounds 2>/dev/null || echo 0", STEP)?.trim().parse().unwrap_or(0);
        if rounds > before {
            return Ok(rounds);
        }
        ensure!(Instant::now() < deadline, "the load does not go on after round {before}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ends the load; its rounds.
fn end_load(console: &mut Console) -> Result<u64> {
    console.run("touch /run/stop; while [ ! -e /run/over ]; do usleep 10000; done", STEP)?;
    let rounds = console.run("cat /run/rounds", STEP)?.trim().parse()?;
    console.run("[ ! -e /run/bad ]", STEP).context("the guest read back something else than it had written")?;
    Ok(rounds)
}

/// Fails when the guest's log complains.
fn listen(console: &mut Console) -> Result<()> {
    let log = console.run("dmesg", STEP)?;
    match log.lines().find(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint))) {
        Some(line) => bail!("the guest complains: {line}"),
        None => Ok(()),
    }
}

/// Between which two values the guest's wall clock was ahead of the host's, in microseconds: one reading, in the time
/// that it takes to ask.
#[derive(Clone, Copy, Debug)]
struct Ahead {
    least: i64,
    most: i64,
}

impl Ahead {
    fn ask(console: &mut Console) -> Result<Self> {
        let now = || -> Result<i64> { Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?) };
        let before = now()?;
        // What `date` of busybox shows are whole seconds.
        let told = console.run("busybox adjtimex", STEP)?;
        let after = now()?;
        let field = |name: &str| -> Result<i64> {
            let value = told.lines().find_map(|line| line.trim().strip_prefix(name));
            Ok(value.with_context(|| format!("no {name} in '{told}'"))?.trim().parse()?)
        };
        let guest = field("time.tv_sec:")? * 1_000_000 + field("time.tv_usec:")?;
        Ok(Self { least: guest - after, most: guest - before })
    }
    /// The sharpest of a few readings.
    fn sharp(console: &mut Console) -> Result<Self> {
        let mut best = Self::ask(console)?;
        for _ in 0..8 {
            let next = Self::ask(console)?;
            if next.most - next.least < best.most - best.least {
                best = next;
            }
        }
        Ok(best)
    }
    /// By how much two readings must differ.
    fn apart(self, other: Self) -> Duration {
        let gap = (self.least - other.most).max(other.least - self.most).max(0);
        Duration::from_micros(gap.unsigned_abs())
    }
    /// By how much the guest's clock must be wrong.
    fn wrong(self) -> Duration {
        self.apart(Self { least: 0, most: 0 })
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Pauses and resumes a guest under load `count` times, at moments that `seed` says.
pub fn pauses(count: u32, seed: u64) -> Result<Pauses> {
    let folder = fast_folder()?;
    let socket = folder.path().join("net.sock");
    let _sink = Sink::start(&socket)?;
    let net = format!("vhost_user=true,socket={}", socket.display());
    let mut vm = boot(folder.path(), &["--net", &net, "--cmdline", "console=ttyS0 atoll.load=net"])?;
    let at_first = Ahead::sharp(&mut vm.console)?;
    ensure!(at_first.wrong() < CLOCK_ERROR_MAX, "the guest's clock starts {:?} off", at_first.wrong());
    start_load(&mut vm.console)?;
    vm.console.run(FRAMES, STEP)?;
    let mut dice = Dice(seed | 1);
    let mut took = Vec::new();
    let (mut vcpus, mut drain, mut beyond, mut answer, mut clock) = (0, 0, 0, Duration::ZERO, Duration::ZERO);
    for pause in 1..=count {
        std::thread::sleep(Duration::from_micros(dice.below(20_000)));
        let asked = Instant::now();
        vm.put("vm.pause", None)?;
        answer = answer.max(asked.elapsed());
        let last = vm.get("inspect/last_pause")?;
        let figure = |name: &str| last.get(name).and_then(Value::as_u64).with_context(|| format!("no {name}: {last}"));
        let (whole, slowest) = (figure("whole_us")?, figure("slowest_drain_us")?);
        vcpus = vcpus.max(figure("vcpus_us")?);
        drain = drain.max(slowest);
        beyond = beyond.max(whole.saturating_sub(slowest));
        took.push(whole);
        std::thread::sleep(Duration::from_micros(dice.below(10_000)));
        vm.put("vm.resume", None)?;
        if pause % CLOCK_EVERY == 0 {
            clock = clock.max(Ahead::ask(&mut vm.console)?.apart(at_first));
        }
    }
    let rounds = end_load(&mut vm.console)?;
    vm.console.run("kill $(cat /run/pings)", STEP)?;
    let frames = vm.console.run("cat /sys/class/net/eth0/statistics/tx_packets", STEP)?.trim().parse()?;
    clock = clock.max(Ahead::sharp(&mut vm.console)?.apart(at_first));
    listen(&mut vm.console)?;
    power_off(vm)?;
    took.sort_unstable();
    let limit = micros(PAUSE_MAX);
    Ok(Pauses {
        count,
        seed,
        pause_us_p50: took.get(took.len() / 2).copied().unwrap_or_default(),
        pause_us_max: took.last().copied().unwrap_or_default(),
        vcpus_us_max: vcpus,
        slowest_drain_us: drain,
        beyond_drain_us_max: beyond,
        answer_us_max: micros(answer),
        clock_drift_us_max: micros(clock),
        rounds,
        frames,
        ok: beyond < limit && clock < CLOCK_DRIFT_MAX,
    })
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

/// Starts a guest again `count` times in the middle of its load: by itself and by the operator in turn.
pub fn reboots(count: u32) -> Result<Reboots> {
    let folder = fast_folder()?;
    let mut vm = boot(folder.path(), &[])?;
    let belongings = Belongings::of(vm.console.pid())?;
    let mut clock = Duration::ZERO;
    let mut rounds = 0;
    let mut prompts = Vec::new();
    for reboot in 0..count {
        start_load(&mut vm.console)?;
        rounds += 1;
        let asked = Instant::now();
        if reboot % 2 == 0 {
            vm.console.send("reboot -f\n")?;
        } else {
            vm.put("vm.reboot", None)?;
        }
        vm.console.expect("Linux version", BOOT_LIMIT)?;
        vm.console.prompt(BOOT_LIMIT)?;
        prompts.push(u64::try_from(asked.elapsed().as_millis())?);
        settled(&vm, &belongings)?;
        clock = clock.max(Ahead::ask(&mut vm.console)?.wrong());
        ensure!(clock < CLOCK_ERROR_MAX, "the guest's clock is {clock:?} off after reboot {reboot}");
        listen(&mut vm.console)?;
    }
    start_load(&mut vm.console)?;
    rounds += end_load(&mut vm.console)?;
    power_off(vm)?;
    prompts.sort_unstable();
    Ok(Reboots {
        by_guest: count.div_ceil(2),
        by_operator: count / 2,
        belongings,
        clock_error_us_max: micros(clock),
        rounds,
        prompt_ms_p50: prompts.get(prompts.len() / 2).copied().unwrap_or_default(),
    })
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
