//! A stock kernel on KVM, with its disk and its card in processes of their own: to a shell, checks, and off again.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use xtask::console::Console;
use xtask::demo::{Demo, KernelForm, fsck, md5_in_image};
use xtask::images;

use crate::freight::guest_inside;

/// How long a boot may take in here. It only says when to give up: the slowest that has been seen took 86 s.
pub(super) const BOOT_LIMIT: Duration = Duration::from_secs(400);
/// How long anything else may take.
pub(super) const STEP_LIMIT: Duration = Duration::from_secs(300);

/// Keeps the guest's kernel from testing its ciphers for two thirds of its boot.
pub(super) const QUICK: &str = "cryptomgr.notests";
/// What the guest's kernel is told.
pub(super) const CMDLINE: &str = "console=ttyS0 no_timer_check cryptomgr.notests atoll.load=net";

/// Addresses on the wire between the guest and the lab.
pub(super) const LAB: &str = "192.168.77.1";
const GUEST: &str = "192.168.77.2";
/// Bytes that the guest fetches over its card.
const FETCHED: usize = 2 << 20;

/// A web server of busybox, which ends with its owner.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The figures of a JSON object.
pub(super) fn figures(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => Map::from_iter([("value".to_owned(), other)]),
    }
}

/// `atoll run` with the guest of a series, its disk (a copy in `folder`) and a card on a TAP interface.
pub(super) fn command(series: &'static str, vcpus: u32, folder: &Path, more: &[&str]) -> Result<Command> {
    let guest = guest_inside(series);
    let disk = folder.join("root.ext4");
    images::copy_sparsely(&guest.disk, &disk).context("no room for a copy of the guest's disk")?;
    let demo = Demo { series: series.to_owned(), form: KernelForm::Pvh, cpu: "kvm".to_owned() };
    let mut command = demo.command(&guest)?;
    command
        .args(["--cmdline", CMDLINE])
        .args(["--cpus", &format!("boot={vcpus}")])
        .args(["--net", &format!("tap=tap0,ip={LAB},mask=255.255.255.0")])
        .arg("--disk")
        .arg(format!("path={}", disk.display()))
        .args(more)
        .env("ATOLL_LOG", "info");
    Ok(command)
}

/// What the guest writes comes back after its cache was dropped; gives the sum.
pub(super) fn check_disk(console: &mut Console) -> Result<String> {
    let mounted = console.run("grep ' / ext4 ' /proc/mounts", STEP_LIMIT)?;
    ensure!(mounted.starts_with("/dev/vda") || mounted.starts_with("/dev/root"), "the root is not the disk: {mounted}");
    console.run("dd if=/dev/urandom of=/data bs=64k count=64 2>/dev/null && sync", STEP_LIMIT)?;
    let written = console.run("md5sum /data", STEP_LIMIT)?;
    console.run("echo 3 > /proc/sys/vm/drop_caches", STEP_LIMIT)?;
    let read = console.run("md5sum /data", STEP_LIMIT)?;
    let sum = written.split_whitespace().next().unwrap_or_default().to_owned();
    ensure!(sum.len() == 32 && written == read, "the disk gave back {read}, not {written}");
    Ok(sum)
}

/// The guest's card reaches the lab: pings, and a file from a web server, byte for byte.
pub(super) fn check_net(console: &mut Console, folder: &Path) -> Result<()> {
    let root = folder.join("www");
    std::fs::create_dir_all(&root)?;
    let bytes: Vec<u8> = (0..FETCHED).map(|at| (at * 31 + at / 251) as u8).collect();
    std::fs::write(root.join("file"), &bytes)?;
    let output = Command::new("md5sum").arg(root.join("file")).output()?;
    let sum = String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap_or_default().to_owned();
    let server = Command::new("httpd")
        .args(["-f", "-p", &format!("{LAB}:80"), "-h"])
        .arg(&root)
        .stdin(Stdio::null())
        .spawn()
        .context("busybox has no httpd")?;
    let _server = Server(server);
    console.run(&format!("ip addr add {GUEST}/24 dev eth0; ip link set eth0 up"), STEP_LIMIT)?;
    // The first may be lost while the interface comes up.
    console.run(&format!("for try in 1 2 3 4 5; do ping -q -c 1 -W 5 {LAB} && break; done"), STEP_LIMIT)?;
    console.run(&format!("ping -q -c 20 -i 0.05 {LAB}"), STEP_LIMIT)?;
    let fetched = console.run(&format!("wget -q -O - http://{LAB}/file | md5sum"), STEP_LIMIT)?;
    ensure!(fetched.starts_with(&sum), "the file came as {fetched}, not {sum}");
    Ok(())
}

/// All vCPUs are there and work.
pub(super) fn check_cpus(console: &mut Console, vcpus: u32) -> Result<()> {
    let online = console.run("cat /sys/devices/system/cpu/online", STEP_LIMIT)?;
    let expected = if vcpus == 1 { "0".to_owned() } else { format!("0-{}", vcpus - 1) };
    ensure!(online == expected, "processors {online} are online, not {expected}");
    let clock = console.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource", STEP_LIMIT)?;
    ensure!(clock == "kvm-clock" || clock == "tsc", "the guest's clock is {clock}");
    // Words of the kernel that must not come up.
    let bad = "BUG:|WARNING:|Oops|soft lockup|rcu.*stall|unchecked MSR|do_IRQ|spurious|APIC error|not responding";
    let said = console.run(&format!("dmesg | grep -E '{bad}' || true"), STEP_LIMIT)?;
    ensure!(said.is_empty(), "the kernel complains: {said}");
    Ok(())
}

/// The root disk is as the guest left it.
pub(super) fn check_image(folder: &Path, sum: &str) -> Result<()> {
    let disk = folder.join("root.ext4");
    let outside = md5_in_image(&disk, "/data", folder)?;
    ensure!(outside == sum, "the image holds {outside}, the guest wrote {sum}");
    fsck(&disk)
}

/// Boots, checks, powers off.
pub(super) fn boot(series: &'static str, vcpus: u32, more: &[&str]) -> Result<Map<String, Value>> {
    let folder = tempfile::tempdir()?;
    let mut console = Console::spawn(&mut command(series, vcpus, folder.path(), more)?)?;
    console.prompt(BOOT_LIMIT)?;
    let boot_ms = milliseconds(console.started().elapsed());
    let begin = Instant::now();
    let kernel = console.run("uname -r", STEP_LIMIT)?;
    check_cpus(&mut console, vcpus)?;
    let sum = check_disk(&mut console)?;
    check_net(&mut console, folder.path())?;
    console.run("mount -o remount,ro /", STEP_LIMIT)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP_LIMIT)?;
    ensure!(status.success(), "atoll ended with {status}: {errors}");
    check_image(folder.path(), &sum)?;
    Ok(figures(
        json!({ "kernel": kernel, "vcpus": vcpus, "boot_ms": boot_ms, "checks_ms": milliseconds(begin.elapsed()) }),
    ))
}
