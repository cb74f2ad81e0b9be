//! The main job: Debian's kernel to a shell whose root is a disk that another process serves.

use crate::console::Console;
use crate::images::{self, Guest};
use crate::{packages, place, tied};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Which form of the kernel is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KernelForm {
    /// The ELF kernel, by its PVH entry.
    Pvh,
    /// The bzImage as packaged, by the 64-bit boot protocol.
    Bzimage,
}

/// What to boot, and on what.
#[derive(Clone, Debug)]
pub struct Demo {
    /// Kernel series: "6.1" or "6.12".
    pub series: String,
    /// How it is entered.
    pub form: KernelForm,
    /// `--cpu` of `atoll run`.
    pub cpu: String,
}

/// Last line of `cargo xtask demo --check`.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// Everything below is as it must be.
    pub ok: bool,
    /// CPU that ran the guest.
    pub cpu: String,
    /// `uname -r` in the guest.
    pub kernel: String,
    /// From exec of `atoll` to the shell's first prompt.
    pub boot_ms: u64,
    /// Guest instructions retired, all vCPUs; zero where the hardware counts none for us.
    pub instructions: u64,
    /// Millions of them a second of vCPU time.
    pub mips: f64,
    /// The file written in the guest has the same MD5 there, there again after dropping caches, and in the image.
    pub disk_md5_match: bool,
    /// Exit status of `atoll`.
    pub exit: i32,
}

/// What `atoll run --report` writes.
#[derive(Debug, serde::Deserialize)]
pub struct Report {
    /// "kvm" or "soft".
    pub cpu: String,
    /// Guest instructions retired.
    #[serde(default)]
    pub instructions: u64,
    /// vCPU thread time spent in the guest, in nanoseconds.
    #[serde(default)]
    pub run_ns: u64,
}

/// How long a boot may take before it counts as hung. Generous: the machine may be busy.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// Fetches, builds, makes images; progress goes to stderr.
pub fn prepare(series: &str) -> Result<Guest> {
    eprintln!("[1/3] guest: Debian's {series} cloud kernel, busybox, an initramfs and an ext4 root disk");
    packages::ensure_peers(&["mkfs.ext4", "e2fsck"])?;
    let guest = images::guest(series)?;
    eprintln!("[2/3] building atoll and its device processes");
    place::build_programs()?;
    Ok(guest)
}

impl Demo {
    /// `atoll run` with this guest; the caller adds disks and the serial port.
    pub fn command(&self, guest: &Guest) -> Result<Command> {
        let mut command = Command::new(place::program("atoll")?);
        let kernel = match self.form {
            KernelForm::Pvh => &guest.vmlinux,
            KernelForm::Bzimage => &guest.bzimage,
        };
        command
            .args(["run", "--cpu", &self.cpu, "--memory", "size=512M", "--serial", "tty", "--cmdline", "console=ttyS0"])
            .arg("--kernel")
            .arg(kernel)
            .arg("--initramfs")
            .arg(&guest.initramfs);
        Ok(command)
    }

    /// Hands the terminal to the guest's shell.
    pub fn interactive(&self) -> Result<()> {
        let guest = prepare(&self.series)?;
        let folder = tempfile::tempdir()?;
        let disk = images::copy_of_disk(&guest, folder.path())?;
        eprintln!("[3/3] booting; `poweroff -f` ends the guest, Ctrl-A x ends it at once");
        let mut command = self.command(&guest)?;
        command.arg("--disk").arg(format!("path={}", disk.display()));
        let status = tied::to_this_thread(&mut command).status()?;
        if !status.success() {
            bail!("atoll ended with {status}");
        }
        Ok(())
    }

    /// The same unattended, judged.
    pub fn check(&self) -> Result<Outcome> {
        let guest = prepare(&self.series)?;
        eprintln!("[3/3] booting, writing, reading back, powering off");
        let folder = tempfile::tempdir()?;
        let disk = images::copy_of_disk(&guest, folder.path())?;
        self.check_on(&guest, &disk, folder.path())
    }

    /// The unattended run on a given disk.
    pub fn check_on(&self, guest: &Guest, disk: &Path, folder: &Path) -> Result<Outcome> {
        let report = folder.join("report.json");
        let mut command = self.command(guest)?;
        command.arg("--disk").arg(format!("path={}", disk.display())).arg("--report").arg(&report);
        let mut console = Console::spawn(&mut command)?;
        let boot = console.started();
        console.prompt(BOOT_LIMIT)?;
        let boot_ms = u64::try_from(boot.elapsed().as_millis())?;
        let kernel = console.run("uname -r", STEP_LIMIT)?;
        let mounted = console.run("grep ' / ext4 ' /proc/mounts", STEP_LIMIT)?;
        if !mounted.starts_with("/dev/vda") && !mounted.starts_with("/dev/root") {
            bail!("the guest's root is not the disk: {mounted}");
        }
        console.run("dd if=/dev/urandom of=/data bs=64k count=64 2>/dev/null && sync", STEP_LIMIT)?;
        let written = console.run("md5sum /data", STEP_LIMIT)?;
        console.run("echo 3 > /proc/sys/vm/drop_caches", STEP_LIMIT)?;
        let read = console.run("md5sum /data", STEP_LIMIT)?;
        console.run("mount -o remount,ro /", STEP_LIMIT)?;
        console.send("poweroff -f\n")?;
        let (status, errors) = console.wait(STEP_LIMIT)?;
        if !status.success() {
            eprintln!("{errors}");
        }
        let outside = md5_in_image(disk, "/data", folder)?;
        fsck(disk)?;
        let sum = written.split_whitespace().next().unwrap_or_default();
        let disk_md5_match = sum.len() == 32 && written == read && sum == outside;
        let report: Report = serde_json::from_slice(&std::fs::read(&report).context("atoll wrote no --report")?)?;
        let exit = status.code().unwrap_or(-1);
        let mips = report.instructions as f64 * 1e3 / report.run_ns.max(1) as f64;
        Ok(Outcome {
            ok: exit == 0 && disk_md5_match,
            cpu: report.cpu,
            kernel,
            boot_ms,
            instructions: report.instructions,
            mips: (mips * 10.0).round() / 10.0,
            disk_md5_match,
            exit,
        })
    }
}

/// MD5 of a file inside an ext4 image, read from outside.
pub fn md5_in_image(disk: &Path, file: &str, folder: &Path) -> Result<String> {
    let copy: PathBuf = folder.join("from-image");
    let debugfs = place::on_path("debugfs").context("debugfs is missing: install e2fsprogs")?;
    place::run(
        Command::new(debugfs).arg("-R").arg(format!("dump {file} {}", copy.display())).arg(disk).stderr(Stdio::null()),
    )?;
    let output = Command::new("md5sum").arg(&copy).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

/// A forced, read-only check of an ext4 image.
pub fn fsck(disk: &Path) -> Result<()> {
    let fsck = place::on_path("e2fsck").context("e2fsck is missing: install e2fsprogs")?;
    let output = Command::new(fsck).arg("-fn").arg(disk).output()?;
    if !output.status.success() {
        bail!("e2fsck finds fault with {}:\n{}", disk.display(), String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

/// Boots to the prompt and off again; gives (exec to prompt, kernel's first line to prompt).
pub fn timed_boot(command: &mut Command) -> Result<(Duration, Duration)> {
    let mut console = Console::spawn(command)?;
    console.prompt(BOOT_LIMIT)?;
    let prompt: Instant = console.arrival(images::PROMPT).context("the prompt has just been seen")?;
    let first = console.arrival("Linux version").context("the kernel printed no first line")?;
    let times = (prompt - console.started(), prompt - first);
    console.send("poweroff -f\n")?;
    console.wait(STEP_LIMIT)?;
    Ok(times)
}
