//! Disks whose backend does not come back, or comes back without knowing what it had begun.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_integration::peers::{self, Peer};
use atoll_integration::processes;
use rustix::process::Signal;
use serde_json::{Value, json};
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::images;
use xtask::operated::Operated;
use xtask::verify::{Load, install};

const STEP: Duration = Duration::from_secs(60);
/// How soon a guest hears that its disk is gone.
const EIO_MAX: Duration = Duration::from_secs(1);

/// A stock guest with a root disk of its own and the disks that `more` asks for.
fn boot(folder: &Path, with_verifier: bool, more: &[&str]) -> Result<Operated> {
    boot_series("6.1", folder, with_verifier, more)
}

fn boot_series(series: &str, folder: &Path, with_verifier: bool, more: &[&str]) -> Result<Operated> {
    let guest = images::guest(series)?;
    let root = images::copy_of_disk(&guest, folder)?;
    if with_verifier {
        install(&root)?;
    }
    let demo = Demo { series: series.to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.arg("--disk").arg(format!("path={}", root.display())).args(more);
    let mut vm = Operated::spawn(&mut command, folder)?;
    vm.console.prompt(BOOT_LIMIT)?;
    Ok(vm)
}

fn power_off(mut vm: Operated) -> Result<()> {
    vm.console.run("mount -o remount,ro /", STEP)?;
    vm.console.send("poweroff -f\n")?;
    let (status, errors) = vm.console.wait(STEP)?;
    ensure!(status.success(), "atoll ended with {status}: {errors}");
    Ok(())
}

/// What the API says of a device; nothing when it is not there.
fn device(vm: &Operated, id: &str) -> Result<Option<Value>> {
    let all = vm.get("devices")?;
    let all = all.as_array().with_context(|| format!("no list: {all}"))?;
    Ok(all.iter().find(|device| device["id"] == id).cloned())
}

fn await_device(vm: &Operated, id: &str, wanted: impl Fn(Option<&Value>) -> bool) -> Result<Instant> {
    let deadline = Instant::now() + STEP;
    loop {
        let device = device(vm, id)?;
        if wanted(device.as_ref()) {
            return Ok(Instant::now());
        }
        ensure!(Instant::now() < deadline, "it stays {device:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn state(wanted: &str) -> impl Fn(Option<&Value>) -> bool {
    move |device| device.is_some_and(|device| device["state"] == wanted)
}

/// Has the guest write to the second disk, whose backend stands, until requests wait in its ring.
fn write_in_vain(vm: &mut Operated) -> Result<()> {
    let words = "dd if=/dev/zero of=/dev/vdb bs=4k count=64 seek=1024 conv=fsync 2>/dev/null; echo wri\"\"tten=$?.\n";
    vm.console.send(words)?;
    let waits = |queue: &Value| queue["in_flight"].as_u64() > Some(0);
    let in_flight = |device: Option<&Value>| {
        device.and_then(|device| device["queues"].as_array()?.iter().find(|queue| waits(queue)).map(drop))
    };
    await_device(vm, "data", |device| in_flight(device).is_some()).map(drop)
}

const IMAGE: u64 = 16 << 20;

/// Has the disk `data` die while it has requests, with an image that has shrunk meanwhile. What was in flight fails, and what
/// is asked then; gives how long the former took.
fn quarantine(vm: &mut Operated, image: &File) -> Result<Duration> {
    let pid = device(vm, "data")?.and_then(|device| device["pid"].as_u64()).context("it has a process")?;
    let pid = u32::try_from(pid)?;
    // It stands with requests in its ring, and then it dies.
    processes::signal(pid, Signal::STOP)?;
    write_in_vain(vm)?;
    image.set_len(IMAGE / 2)?;
    processes::signal(pid, Signal::KILL)?;
    let since = await_device(vm, "data", state("quarantined"))?;
    vm.console.expect("written=1.", STEP).context("the writer hears of it")?;
    let heard = since.elapsed();
    vm.console.expect(images::PROMPT, STEP)?;
    read_in_vain(vm)?;
    Ok(heard)
}

/// The guest reads the second disk, and hears at once that it cannot.
fn read_in_vain(vm: &mut Operated) -> Result<()> {
    let asked = Instant::now();
    let read = vm.console.run("dd if=/dev/vdb of=/dev/null bs=4k count=1 skip=3000 2>&1; [ $? = 1 ]", STEP)?;
    ensure!(read.contains("Input/output error") || read.contains("I/O error"), "{read}");
    ensure!(asked.elapsed() < EIO_MAX, "a new request took {:?}", asked.elapsed());
    Ok(())
}

/// A disk whose image shrank has no backend that the guest could go on with, and its driver waited for ever: `dd` hung, the
/// disk could not be removed, a reboot hung in the guest. Now what is in flight and what comes later fails at once, a reboot
/// finds the disk as soon as it is well, and without one it can be pulled out.
#[test]
fn a_quarantined_disk_fails_reboots_and_goes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("data");
    let image = File::create(&path)?;
    image.set_len(IMAGE)?;
    let mut vm = boot(folder.path(), false, &["--disk", &format!("path={},id=data", path.display())])?;
    let heard = quarantine(&mut vm, &image)?;
    ensure!(heard < EIO_MAX, "the requests in flight took {heard:?}");

    image.set_len(IMAGE)?;
    vm.put("vm.reboot", None)?;
    vm.console.prompt(BOOT_LIMIT)?;
    await_device(&vm, "data", state("running"))?;
    vm.console.run("dd if=/dev/zero of=/dev/vdb bs=64k count=16 conv=fsync 2>&1", STEP)?;

    let heard = quarantine(&mut vm, &image)?;
    ensure!(heard < EIO_MAX, "the requests in flight took {heard:?}");
    vm.put("vm.remove-device", Some(&json!({ "id": "data" })))?;
    await_device(&vm, "data", |device| device.is_none())?;
    vm.console.run("[ ! -e /dev/vdb ]", STEP)?;
    power_off(vm)
}

/// The same behind the IOMMU, where who stands in reaches requests by the map and lets go of it as the guest takes it back.
#[test]
fn a_quarantined_disk_behind_the_iommu_fails_its_requests() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("data");
    let image = File::create(&path)?;
    image.set_len(IMAGE)?;
    let disk = format!("path={},id=data,iommu=on", path.display());
    let cmdline = "console=ttyS0 atoll.load=iommu iommu.strict=1";
    let mut vm = boot_series("6.12", folder.path(), false, &["--disk", &disk, "--cmdline", cmdline])?;
    vm.console.run("while ! [ -b /dev/vdb ]; do usleep 99999; done", STEP)?;
    let pid = device(&vm, "data")?.and_then(|device| device["pid"].as_u64()).context("it has a process")?;
    image.set_len(IMAGE / 2)?;
    processes::signal(u32::try_from(pid)?, Signal::KILL)?;
    await_device(&vm, "data", state("quarantined"))?;
    // Each of them is mapped, fails and is unmapped.
    (0..5).try_for_each(|_| read_in_vain(&mut vm))?;
    image.set_len(IMAGE)?;
    vm.put("vm.reboot", None)?;
    vm.console.prompt(BOOT_LIMIT)?;
    await_device(&vm, "data", state("running"))?;
    vm.console.run("while ! [ -b /dev/vdb ]; do usleep 99999; done", STEP)?;
    vm.console.run("dd if=/dev/zero of=/dev/vdb bs=64k count=16 conv=fsync 2>&1", STEP)?;
    power_off(vm)
}

/// Writes the guest's data to the second disk, a block at a time, and says so; the data is compared when all is over.
fn begin_writing(vm: &mut Operated) -> Result<()> {
    let write =
        "dd if=/tmp/data of=/dev/vdb bs=4k count=64 oflag=direct conv=fsync 2>/dev/null; echo wri\"\"tten=$?.\n";
    vm.console.send(write)
}

fn written(vm: &mut Operated, what: &str) -> Result<()> {
    vm.console.expect("written=0.", STEP).with_context(|| format!("{what}: the writer goes on"))?;
    vm.console.expect(images::PROMPT, STEP)?;
    vm.console.run("echo 3 > /proc/sys/vm/drop_caches; cmp -n 262144 /tmp/data /dev/vdb", STEP)?;
    Ok(())
}

/// Everything that `atoll fault` can do is done to a disk while a stock guest writes to it: the guest sees requests that
/// take longer, and nothing else. The disk beside it, whose owner wants it unplugged when it cannot be had again, is lost for good:
/// the guest lets it go.
#[test]
fn every_fault_is_survived_and_a_disk_that_was_given_up_leaves() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = |name: &str| -> Result<std::path::PathBuf> {
        let path = folder.path().join(name);
        File::create(&path)?.set_len(IMAGE)?;
        Ok(path)
    };
    let (data, spare) = (image("data")?, image("spare")?);
    let data = format!("path={},id=data,stall_timeout=2", data.display());
    let gone = format!("path={},id=spare,on_failure=unplug", spare.display());
    let mut vm = boot(folder.path(), false, &["--allow-faults", "--disk", &data, "--disk", &gone])?;
    vm.console.run("dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null", STEP)?;
    let lives = |vm: &Operated| -> Result<u64> {
        let report = device(vm, "data")?.context("it is there")?;
        report["generation"].as_u64().context("a generation")
    };
    // Of the seeds, 6 loses one signal and makes one late, so that what follows is the same in each run.
    for (fault, successors) in [
        ("delay", 0..=0),
        ("slow", 0..=0),
        // A process that stands for less than a stall's time goes on by itself; on a host that is slower, it is replaced.
        ("stop", 0..=1),
        ("kill", 1..=1),
        ("disconnect", 1..=1),
        ("garbage", 1..=1),
        // A ring that stands is kicked again before that counts as a stall; on a host that is slower, a successor takes its
        // request.
        ("drop-kick", 0..=1),
    ] {
        let before = lives(&vm)?;
        vm.put("vm.fault-device", Some(&json!({ "id": "data", "fault": fault, "seed": 6 })))?;
        begin_writing(&mut vm)?;
        written(&mut vm, fault)?;
        await_device(&vm, "data", state("running"))?;
        let after = lives(&vm)? - before;
        ensure!(successors.contains(&after), "{fault}: {after} successors");
    }
    // A call is lost: the request is done, and nobody has said so. The next recovery does.
    let before = lives(&vm)?;
    vm.put("vm.fault-device", Some(&json!({ "id": "data", "fault": "drop-call", "seed": 6 })))?;
    begin_writing(&mut vm)?;
    let idle = |device: Option<&Value>| {
        let queues = device.and_then(|device| device["queues"].as_array());
        queues.is_some_and(|queues| queues.iter().all(|queue| queue["in_flight"] == 0))
    };
    // Whether the request has come yet cannot be seen, so the connection is broken until the writer goes on.
    let mut recoveries = 0;
    while vm.console.expect("written=0.", Duration::from_secs(3)).is_err() {
        ensure!(recoveries < 10, "the writer never goes on");
        await_device(&vm, "data", idle)?;
        vm.put("vm.fault-device", Some(&json!({ "id": "data", "fault": "disconnect" })))?;
        recoveries += 1;
    }
    vm.console.expect(images::PROMPT, STEP)?;
    ensure!(recoveries > 0 && lives(&vm)? == before + recoveries, "{recoveries} recoveries");
    vm.console.run("echo 3 > /proc/sys/vm/drop_caches; cmp -n 262144 /tmp/data /dev/vdb", STEP)?;
    let log = vm.console.run("dmesg", STEP)?;
    ensure!(!log.contains("I/O error") && !log.contains("blocked for more"), "the guest noticed:\n{log}");

    vm.console.run("[ -e /dev/vdc ]", STEP)?;
    File::options().write(true).open(&spare)?.set_len(IMAGE / 2)?;
    vm.put("vm.fault-device", Some(&json!({ "id": "spare", "fault": "kill" })))?;
    await_device(&vm, "spare", |device| device.is_none()).context("the guest lets it go")?;
    vm.console.run("[ ! -e /dev/vdc ] && [ -e /dev/vdb ]", STEP)?;
    begin_writing(&mut vm)?;
    written(&mut vm, "beside an unplugged disk")?;
    power_off(vm)
}

/// Another storage daemon on the same image and socket, as soon as the last one has let go of the image.
fn restart(image: &Path, folder: &Path) -> Result<Peer> {
    let deadline = Instant::now() + STEP;
    loop {
        let _ = std::fs::remove_file(folder.join("qsd.sock"));
        match peers::storage_daemon(image, folder) {
            Ok(peer) => return Ok(peer),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn scratch(folder: &Path, bytes: u64) -> Result<std::path::PathBuf> {
    let path = folder.join("scratch");
    File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

/// A storage daemon keeps no record of what it has begun and completes in any order. Killed with requests in flight, those
/// fail, and no others: the disk goes on with the next daemon. The API says so before anything happens.
#[test]
fn a_daemon_without_a_record_costs_what_was_in_flight() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = scratch(folder.path(), IMAGE)?;
    let mut peer = peers::storage_daemon(&image, folder.path())?;
    let disk = format!("vhost_user=true,socket={},id=data", peer.socket.display());
    let mut vm = boot(folder.path(), false, &["--disk", &disk])?;
    let report = device(&vm, "data")?.context("it is there")?;
    ensure!(report["recovery"] == "idle-only", "{report}");
    for death in 0..3 {
        vm.console.run("dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null", STEP)?;
        // Idle: nobody notices.
        drop(peer);
        peer = restart(&image, folder.path())?;
        vm.console.run("dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync 2>/dev/null", STEP)?;
        vm.console.run("dmesg -c | grep 'I/O error' && false || true", STEP)?;
        processes::signal(peer.pid(), Signal::STOP)?;
        write_in_vain(&mut vm)?;
        drop(peer);
        peer = restart(&image, folder.path())?;
        vm.console.expect("written=1.", STEP).with_context(|| format!("death {death}: the writer hears of it"))?;
        vm.console.expect(images::PROMPT, STEP)?;
        let log = vm.console.run("dmesg -c", STEP)?;
        ensure!(log.contains("I/O error, dev vdb"), "{log}");
        ensure!(!log.contains("is not a head") && !log.contains("hung"), "{log}");
        // Everything else is as it was, and the disk lives on.
        vm.console.run("echo 3 > /proc/sys/vm/drop_caches; cmp -n 1048576 /tmp/data /dev/vdb", STEP)?;
        vm.console.run("dd if=/tmp/data of=/dev/vdb bs=64k seek=16 conv=fsync 2>/dev/null", STEP)?;
        let report = device(&vm, "data")?.context("it is there")?;
        ensure!(report["state"] == "running", "{report}");
    }
    power_off(vm)
}

/// Behind shadow rings the same daemon may be killed as often as one likes, under a load that is judged: nothing is lost,
/// nothing is completed twice, and the guest's log is clean.
#[test]
fn a_daemon_behind_shadow_rings_may_die() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = scratch(folder.path(), 4 << 20)?;
    let peer = peers::storage_daemon(&image, folder.path())?;
    let disk = format!("vhost_user=true,socket={},id=data,track=shadow", peer.socket.display());
    let mut vm = boot(folder.path(), true, &["--disk", &disk])?;
    let report = device(&vm, "data")?.context("it is there")?;
    ensure!(report["recovery"] == "full", "{report}");
    let (load, stop) = (Load::new(77, 12), AtomicBool::new(false));
    let (said, deaths) = std::thread::scope(|scope| {
        let killer = scope.spawn(|| -> Result<(u64, Peer)> {
            let (mut peer, mut deaths) = (peer, 0);
            while !stop.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(50 + 37 * (deaths % 8)));
                drop(peer);
                deaths += 1;
                peer = restart(&image, folder.path())?;
            }
            Ok((deaths, peer))
        });
        let said = vm.console.run(&load.command(0), 3 * STEP);
        stop.store(true, Ordering::Release);
        (said, killer.join())
    });
    let Ok(deaths) = deaths else { bail!("the killer panicked") };
    let (deaths, _peer) = deaths?;
    let log = vm.console.run("dmesg", STEP)?;
    let verdict = load.judge(&said?, &log, deaths);
    ensure!(verdict.ok, "{}", verdict.json());
    ensure!(deaths >= 10 && verdict.counts.reads > 50, "too little happened: {}", verdict.json());
    power_off(vm)
}
