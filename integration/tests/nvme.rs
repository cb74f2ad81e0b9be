//! NVMe disks in processes of their own, on a stock guest.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_integration::peers::Peer;
use atoll_integration::processes;
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::BOOT_LIMIT;
use xtask::verify::{Guests, from_nvme, on_a_guest};
use xtask::{images, place};

const STEP: Duration = Duration::from_secs(60);

/// The root disk is an NVMe one. Its process is killed while the guest writes, stands still while it writes, and the guest's
/// checksums still hold; another server's disk, plugged in by its socket, is there too.
#[test]
fn a_guest_lives_on_an_nvme_disk() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let (socket, second) = (folder.path().join("nvme.sock"), folder.path().join("second.img"));
    std::fs::File::create(&second)?.set_len(8 << 20)?;
    let mut server = Command::new(place::program("atoll-nvme")?);
    server.arg("--socket").arg(&socket).arg("--path").arg(&second).args(["--serial", "second"]);
    let server = Peer::start(&mut server, &socket)?;
    let (mut command, api) = (from_nvme(&guest)?, folder.path().join("api.sock"));
    command.arg("--nvme").arg(format!("path={},stall_timeout=2,id=root", disk.display())).arg("--api-socket").arg(&api);
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    let own = |console: &Console| processes::child_named(console.pid(), "atoll-nvme", STEP);
    for (round, signal) in [Signal::KILL, Signal::KILL, Signal::STOP].into_iter().enumerate() {
        let victim = own(&console)?;
        console.send(&format!(
            "dd if=/dev/urandom of=/kill{round} bs=64k count=64 conv=fsync; md5sum /kill{round} > /sum{round}; sync; echo wri\"\"tten{round}\n"
        ))?;
        std::thread::sleep(Duration::from_millis(120));
        processes::signal(victim, signal)?;
        console.expect(&format!("written{round}"), STEP)?;
        console.expect(images::PROMPT, STEP)?;
        ensure!(own(&console)? != victim, "it is another process");
        console.run("echo 3 > /proc/sys/vm/drop_caches", STEP)?;
        let sums = console.run(&format!("md5sum -c /sum{round}"), STEP)?;
        ensure!(sums.contains("OK"), "{sums}");
    }
    let figures = inspect(&api, "figures/root")?;
    let done: u64 = figures["completed"].as_object().context("queues")?.values().filter_map(|n| n.as_u64()).sum();
    ensure!(figures["counted"] == "rings" && done > 100, "{figures}");
    let device = inspect(&api, "devices/root")?;
    let queues = device["queues"].as_array().map_or(0, Vec::len);
    ensure!(device["recovery"] == "full" && device["generation"] == 4 && queues > 1, "{device}");
    // Plugged in while it runs: two that are there from the start may be numbered either way.
    let keys = format!("socket={},id=second", socket.display());
    let mut plug = Command::new(place::program("atoll")?);
    place::run(plug.args(["add-user-device".as_ref(), api.as_os_str(), keys.as_ref()]))?;
    let there = "while ! [ -b /dev/nvme1n1 ]; do sleep 0.1; done; blockdev --getsize64 /dev/nvme1n1";
    let told = console.run(there, STEP)?;
    ensure!(told.contains("8388608"), "{told}");
    console.run("echo over there | dd of=/dev/nvme1n1 bs=512 conv=sync,fsync", STEP)?;
    let log = console.run("dmesg", STEP)?;
    let complaints = xtask::verify::quoted_complaints(&log);
    ensure!(complaints.is_empty(), "the guest noticed: {complaints:?}");
    console.run("mount -o remount,ro /", STEP)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    drop(server);
    ensure!(begins_with(&second, b"over there")?, "the other server's image has what was written");
    xtask::demo::fsck(&disk)
}

/// A part of what the machine tells of itself.
fn inspect(api: &Path, part: &str) -> Result<serde_json::Value> {
    let told = Command::new(place::program("atoll")?).arg("inspect").arg(api).arg(part).output()?;
    ensure!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    Ok(serde_json::from_slice(&told.stdout)?)
}

/// Somebody else's server is killed under the guest's writing, and another one is started. What the first knew is lost; the
/// guest's driver finds a controller that says "fatal" at its first timeout, resets it and writes again, where it had
/// aborted and waited as long a second time.
#[test]
fn a_foreign_disk_comes_back_anew() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let disk = images::copy_of_disk(&guest, folder.path())?;
    let (socket, second) = (folder.path().join("nvme.sock"), folder.path().join("second.img"));
    std::fs::File::create(&second)?.set_len(8 << 20)?;
    let serve = || -> Result<Peer> {
        let mut server = Command::new(place::program("atoll-nvme")?);
        server.arg("--socket").arg(&socket).arg("--path").arg(&second).args(["--serial", "second"]);
        Peer::start(&mut server, &socket)
    };
    let server = serve()?;
    let (mut command, api) = (from_nvme(&guest)?, folder.path().join("api.sock"));
    command.arg("--nvme").arg(format!("path={}", disk.display())).arg("--api-socket").arg(&api);
    let mut console = Console::spawn(&mut command)?;
    console.prompt(BOOT_LIMIT)?;
    // For disks that come from now on; of itself it is 30.
    console.run("echo 8 > /sys/module/nvme_core/parameters/io_timeout", STEP)?;
    let keys = format!("socket={},id=second", socket.display());
    let mut plug = Command::new(place::program("atoll")?);
    place::run(plug.args(["add-user-device".as_ref(), api.as_os_str(), keys.as_ref()]))?;
    console.run("while ! [ -b /dev/nvme1n1 ]; do sleep 0.1; done; sleep 0.5", STEP)?;
    drop(server);
    // The next one is to make it anew.
    let _ = std::fs::remove_file(&socket);
    console.send("echo over again | dd of=/dev/nvme1n1 bs=512 conv=sync,fsync; echo wri\"\"tten\n")?;
    std::thread::sleep(Duration::from_millis(500));
    let _server = serve()?;
    console.expect("written", STEP)?;
    console.expect(images::PROMPT, STEP)?;
    let log = console.run("dmesg | grep -i nvme", STEP)?;
    ensure!(log.contains("controller is down; will reset: CSTS=0x2"), "{log}");
    ensure!(!log.contains("aborting"), "it has not waited twice: {log}");
    ensure!(begins_with(&second, b"over again")?, "what was lost was written again");
    let device = inspect(&api, "devices/second")?;
    ensure!(device["recovery"] == "none" && device["restarts"] == 1, "{device}");
    console.run("mount -o remount,ro /", STEP)?;
    console.send("poweroff -f\n")?;
    let (status, errors) = console.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    Ok(())
}

fn begins_with(path: &Path, text: &[u8]) -> Result<bool> {
    Ok(std::fs::read(path).context("the image is there")?.starts_with(text))
}

/// The verifier of disks in a guest, its NVMe disks killed now and then.
#[test]
fn a_guest_finds_nothing_wrong_with_its_nvme_disks() -> Result<()> {
    let verdict = on_a_guest(&Guests::on_nvme(), 23, 4, 400)?;
    ensure!(verdict.ok && verdict.counts.deaths > 0 && verdict.counts.reads > 0, "{}", verdict.json());
    Ok(())
}
