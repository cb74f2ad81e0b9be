//! The verifier in a guest: its program, linked statically, goes onto the root disk; the history comes back over the serial
//! port and is judged here.
//!
//! Networks are judged in the guests, each of which says what it has heard.
//!
//! [`install`] and [`Load`] are for any campaign that has a guest at a prompt: start [`Load::command`] in its shell, do to
//! the machine what the campaign is about, and hand what the console said, and the guest's kernel log, to [`Load::judge`].

use crate::console::Console;
use crate::demo::{BOOT_LIMIT, Demo, KernelForm};
use crate::{images, packages, place, processes};
use anyhow::{Context, Result, bail, ensure};
use atoll_verify::blk::{History, Judge, Verdict, Violation};
use atoll_verify::dice::{Dice, mix};
use atoll_verify::net::TalkVerdict;
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Where the program is in a guest.
pub const PROGRAM: &str = "/bin/atoll-verify";
/// What the kernel of a guest must not say: I/O that failed, rings that disagree, anything that hangs or breaks.
const COMPLAINTS: [&str; 13] = [
    "I/O error",
    // A command of an NVMe queue that was given up.
    " QID ",
    "is not a head",
    "id out of range",
    "blocked for more than",
    "BUG:",
    "WARNING:",
    "Oops",
    "Call Trace",
    "soft lockup",
    "rcu_sched",
    "EXT4-fs error",
    "needs_reset",
];
const STEP: Duration = Duration::from_secs(60);

/// Builds the guest's program, if its sources have changed.
pub fn program() -> Result<PathBuf> {
    place::run(
        Command::new(place::cargo())
            .args([
                "build",
                "--quiet",
                "--release",
                "--package",
                "atoll-verify",
                "--bin",
                "atoll-verify",
                "--target",
                TARGET,
            ])
            .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .current_dir(place::repository()),
    )?;
    let folder = place::release();
    let folder = folder.parent().context("a target folder")?;
    Ok(folder.join(TARGET).join("release/atoll-verify"))
}

/// Builds the program and puts it onto a root disk, as [`PROGRAM`].
pub fn install(disk: &Path) -> Result<()> {
    put(&program()?, disk)
}

/// Puts a program that has been built onto a root disk, as [`PROGRAM`].
pub fn put(program: &Path, disk: &Path) -> Result<()> {
    put_file(disk, program, PROGRAM)
}

/// Puts a file of the host onto a root disk, at this path there, for everybody to run.
pub fn put_file(disk: &Path, file: &Path, at: &str) -> Result<()> {
    // debugfs says nothing of a file that it cannot read.
    ensure!(file.is_file(), "{} is not there", file.display());
    let debugfs = place::on_path("debugfs").context("debugfs is missing: install e2fsprogs")?;
    for request in [format!("write {} {at}", file.display()), format!("sif {at} mode 0100755")] {
        let status = Command::new(&debugfs)
            .args(["-w", "-R", &request])
            .arg(disk)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if !status.success() {
            bail!("debugfs cannot do `{request}` on {}", disk.display());
        }
    }
    Ok(())
}

/// A load in a guest.
#[derive(Clone, Debug)]
pub struct Load {
    /// Everything follows from it.
    pub seed: u64,
    /// How long.
    pub seconds: u64,
    /// The guest's device, whose first sectors hold zeroes at first.
    pub device: String,
    /// Sectors in use.
    pub sectors: u64,
    /// Where the guest tells the history: a serial port, or a virtio console whose other end is a file.
    pub out: String,
}

impl Load {
    /// A load on a guest's second disk.
    pub fn new(seed: u64, seconds: u64) -> Self {
        Self { seed, seconds, device: "/dev/vdb".to_owned(), sectors: 2048, out: "/dev/ttyS0".to_owned() }
    }

    /// What to type; `epoch` is the number of restarts of the guest before. It ends with the load, or some moments after
    /// `stop=FILE` is there, if that is added.
    pub fn command(&self, epoch: u32) -> String {
        let Self { seed, seconds, device, sectors, out } = self;
        format!(
            "{PROGRAM} blk device={device} seed={seed} seconds={seconds} sectors={sectors} mix=full epoch={epoch} out={out}"
        )
    }

    /// Judges what was told on `out` since the (first) load began, and the guest's kernel log. `deaths` says that device
    /// processes were killed meanwhile.
    pub fn judge(&self, said: &str, log: &str, deaths: u64) -> Verdict {
        self.judge_history(&History::parse(said), log, deaths)
    }

    /// The same of a history that has been read.
    pub fn judge_history(&self, history: &History, log: &str, deaths: u64) -> Verdict {
        let mut judge = if deaths > 0 { Judge::under_deaths() } else { Judge::new() };
        for complaint in quoted_complaints(log) {
            judge.find(Violation::GuestLog, format!("the guest's log: {complaint}"));
        }
        let mut verdict = judge.verdict_on(history);
        verdict.counts.deaths += deaths;
        verdict
    }
}

/// Lines of a guest's kernel log that ought not to be there.
pub fn complaints(log: &str) -> impl Iterator<Item = &str> {
    log.lines().filter(|line| COMPLAINTS.iter().any(|word| line.contains(word)))
}

/// Each of them with what stands around it.
pub fn quoted_complaints(log: &str) -> Vec<String> {
    const BEFORE: usize = 6;
    const AFTER: usize = 14;
    let lines: Vec<&str> = log.lines().map(str::trim_end).collect();
    let found = lines.iter().enumerate().filter(|(_, line)| COMPLAINTS.iter().any(|word| line.contains(word)));
    let around = |at: usize| lines.get(at.saturating_sub(BEFORE)..lines.len().min(at + AFTER)).unwrap_or_default();
    found.map(|(at, _)| around(at).join(" | ")).collect()
}

/// Which guests a load runs in, and how their devices are given.
#[derive(Clone, Debug)]
pub struct Guests {
    /// Their kernel's series.
    pub series: String,
    /// Keys of each disk or card under load, as on the command line: `iommu=on`.
    pub keys: String,
    /// What their disks are.
    pub disks: Disks,
}

impl Default for Guests {
    fn default() -> Self {
        Self { series: "6.1".to_owned(), keys: String::new(), disks: Disks::Blk }
    }
}

impl Guests {
    /// Kernel 6.12 with its driver for the IOMMU, and devices with these keys.
    pub fn with(keys: &str) -> Self {
        Self { series: "6.12".to_owned(), keys: format!(",{keys}"), ..Self::default() }
    }

    /// The disk under load is an NVMe one.
    pub fn on_nvme() -> Self {
        Self { disks: Disks::Nvme, ..Self::default() }
    }

    /// A machine with such a kernel that loads these drivers.
    fn machine(&self, guest: &images::Guest, drivers: &str) -> Result<Command> {
        let demo = Demo { series: self.series.clone(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
        let mut command = demo.command(guest)?;
        // Left to itself, Linux gathers what it unmaps for 10 ms; if it powers off meanwhile, it waits for ever for an answer
        // of the IOMMU that it has just put out of use.
        let strict = if self.keys.contains("iommu=on") { " iommu.strict=1" } else { "" };
        command.arg("--cmdline").arg(format!("console=ttyS0 atoll.load={drivers}{strict}"));
        Ok(command)
    }
}

/// `cargo xtask verify blk --guest`: a guest with a disk of its own under load, its device processes killed meanwhile.
pub fn in_guest(guests: &Guests, seed: u64, seconds: u64, kill_every_ms: u64) -> Result<Verdict> {
    packages::ensure_peers(&["mkfs.ext4", "e2fsck"])?;
    place::build_programs()?;
    on_a_guest(guests, seed, seconds, kill_every_ms)
}

/// What a guest's disks are, and who serves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// virtio, `atoll-blk`.
    Blk,
    /// NVMe, `atoll-nvme`; the root is on virtio.
    Nvme,
}

impl Disks {
    fn option(self) -> &'static str {
        match self {
            Self::Blk => "--disk",
            Self::Nvme => "--nvme",
        }
    }
    fn program(self) -> &'static str {
        match self {
            Self::Blk => "atoll-blk",
            Self::Nvme => "atoll-nvme",
        }
    }
    /// The one under load, as the guest calls it.
    fn second(self) -> &'static str {
        match self {
            Self::Blk => "/dev/vdb",
            Self::Nvme => "/dev/nvme0n1",
        }
    }
}

/// A guest whose kernel mounts its root from its first NVMe disk by itself: the driver is in Debian's cloud kernels.
pub fn from_nvme(guest: &images::Guest) -> Result<Command> {
    let mut command = Command::new(place::program("atoll")?);
    command
        .args(["run", "--cpu", "soft", "--memory", "size=512M", "--serial", "tty", "--cmdline"])
        .arg("console=ttyS0 root=/dev/nvme0n1 rw rootwait init=/sbin/init")
        .arg("--kernel")
        .arg(&guest.vmlinux);
    Ok(command)
}

/// The same with programs that have been built.
pub fn on_a_guest(guests: &Guests, seed: u64, seconds: u64, kill_every_ms: u64) -> Result<Verdict> {
    let guest = images::guest(&guests.series)?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    install(&disk)?;
    let scratch = folder.path().join("scratch");
    std::fs::File::create(&scratch)?.set_len(4 << 20)?;
    let mut command = guests.machine(&guest, "iommu")?;
    // Linux numbers NVMe disks in the order in which their drivers get ready: there is one, so that its name is known.
    for (option, disk) in [("--disk", &disk), (guests.disks.option(), &scratch)] {
        command.arg(option).arg(format!("path={}{}", disk.display(), guests.keys));
    }
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    let load = Load { device: guests.disks.second().to_owned(), ..Load::new(seed, seconds) };
    let (vmm, stop) = (console.pid(), AtomicBool::new(false));
    let (said, deaths) = std::thread::scope(|scope| {
        let killer = scope.spawn(|| kill_now_and_then(guests.disks.program(), vmm, seed, kill_every_ms, &stop));
        let said = console.run(&load.command(0), Duration::from_secs(seconds) + 2 * STEP);
        stop.store(true, Ordering::Release);
        (said, killer.join().unwrap_or_default())
    });
    let log = console.run("dmesg", STEP)?;
    let verdict = load.judge(&said?, &log, deaths);
    console.run("mount -o remount,ro /", STEP)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    if !status.success() {
        bail!("atoll ended with {status}: {errors}");
    }
    Ok(verdict)
}

/// Kills one of the VMM's disk processes after another until `stop`; gives how many. 0 ms: none.
fn kill_now_and_then(program: &str, vmm: u32, seed: u64, every_ms: u64, stop: &AtomicBool) -> u64 {
    let mut dice = Dice::new(mix(seed, 0x6b69_6c6c));
    let mut killed = 0;
    while every_ms > 0 && !stop.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(dice.below(2 * every_ms)));
        let disks = processes::children_named(vmm, program);
        let victim = disks.get(dice.below(disks.len() as u64) as usize);
        if let Some(victim) = victim
            && !stop.load(Ordering::Acquire)
            && processes::signal(*victim, Signal::KILL).is_ok()
        {
            killed += 1;
        }
    }
    killed
}

/// `cargo xtask verify net --guest`: two guests talk over a switch.
pub fn between_guests(guests: &Guests, seed: u64, seconds: u64) -> Result<Vec<TalkVerdict>> {
    packages::ensure_peers(&["mkfs.ext4"])?;
    place::build_programs()?;
    on_two_guests(guests, seed, seconds)
}

/// A process that ends with us.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The same with programs that have been built.
pub fn on_two_guests(guests: &Guests, seed: u64, seconds: u64) -> Result<Vec<TalkVerdict>> {
    let guest = images::guest(&guests.series)?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    install(&disk)?;
    let socket = folder.path().join("switch.sock");
    let mut switch = Command::new(place::program("atoll-net")?);
    switch.arg("--socket").arg(&socket).args(["--switch", "--ports", "2"]).stdin(Stdio::null());
    let _switch = Ending(switch.spawn()?);
    let deadline = Instant::now() + STEP;
    while !socket.exists() {
        if Instant::now() > deadline {
            bail!("the switch does not listen");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let talk = |me: u8| -> Result<TalkVerdict> {
        let mine = folder.path().join(format!("root{me}.ext4"));
        place::run(Command::new("cp").arg("--sparse=always").arg(&disk).arg(&mine))?;
        let mut command = guests.machine(&guest, "iommu,net")?;
        command.arg("--disk").arg(format!("path={}", mine.display()));
        let card = format!("switch={},mac=52:54:00:00:00:0{me}{}", socket.display(), guests.keys);
        command.arg("--net").arg(card);
        let mut console = Console::spawn(&mut command)?;
        console.prompt(BOOT_LIMIT)?;
        console.run("ip link set eth0 up", STEP)?;
        let grace = BOOT_LIMIT.as_secs();
        let words = format!("{PROGRAM} net interface=eth0 seed={seed} seconds={seconds} me={me} grace={grace}");
        let said = console.run(&words, Duration::from_secs(seconds) + 3 * BOOT_LIMIT)?;
        let line = said.lines().find(|line| line.starts_with('{')).context("the guest gave no verdict")?;
        let mut verdict: TalkVerdict = serde_json::from_str(line)?;
        let log = console.run("dmesg", STEP)?;
        if let Some(complaint) = complaints(&log).next() {
            eprintln!("the log of guest {me}: {complaint}");
            verdict.ok = false;
        }
        if !verdict.ok {
            // Where a frame was last seen.
            let counted = console.run("cd /sys/class/net/eth0/statistics; grep . *; cd /", STEP)?;
            let counted: Vec<&str> = counted.lines().map(str::trim).filter(|line| !line.ends_with(":0")).collect();
            eprintln!("the card of guest {me}: {}", counted.join(", "));
        }
        console.run("mount -o remount,ro /", STEP)?;
        console.send("poweroff -f\n")?;
        let (status, errors) = console.wait(STEP)?;
        if !status.success() {
            bail!("atoll ended with {status}: {errors}");
        }
        Ok(verdict)
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| talk(1));
        let mine = talk(0);
        let other = other.join().map_err(|_| anyhow::anyhow!("the thread of guest 1 panicked"))?;
        Ok(vec![mine?, other?])
    })
}

/// The verifier on the host: a program of the integration room.
pub fn on_host(arguments: &[String]) -> Result<()> {
    place::build_programs()?;
    place::run(Command::new(place::program("verify")?).args(arguments))
}
