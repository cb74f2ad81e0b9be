//! Devices that are neither disks nor network cards, in a stock guest: a shared folder, entropy of two kinds, a console.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use atoll_integration::{peers, processes};
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::images;

const STEP: Duration = Duration::from_secs(30);

/// The guest mounts a folder of the host that a foreign virtiofsd serves, reads what the host wrote and writes what the host
/// reads. It has entropy from a process of Atoll's, and from a backend that was started by hand and is known by its device
/// type only; the first one's process is killed, and it has entropy all the same. What it prints on the console comes out of
/// a socket, what goes in there is read from the console, also after that process was killed.
#[test]
fn folder_entropy_and_console() -> Result<()> {
    let guest = images::guest("6.12")?;
    let folder = tempfile::tempdir()?;
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared)?;
    std::fs::write(shared.join("from-host"), "good morning\n")?;
    let virtiofsd = peers::virtiofsd(&shared, folder.path())?;
    let rng = peers::atoll_rng(folder.path())?;
    let console = folder.path().join("console.sock");
    let demo = Demo { series: "6.12".into(), form: KernelForm::Pvh, cpu: "soft".into() };
    let mut command = demo.command(&guest)?;
    command.args(["--cmdline", "console=ttyS0 atoll.load=fs,rng,console", "--rng", "src=/dev/urandom"]);
    command.arg("--fs").arg(format!("tag=work,socket={}", virtiofsd.socket.display()));
    command.arg("--console").arg(format!("socket={}", console.display()));
    let generic = format!("device_type=4,socket={},queue_sizes=[64]", rng.socket.display());
    command.arg("--generic-vhost-user").arg(generic);
    let mut vm = Console::spawn(&mut command)?;
    vm.prompt(BOOT_LIMIT)?;

    vm.run("mkdir /mnt/host && mount -t virtiofs work /mnt/host", STEP)?;
    ensure!(vm.run("cat /mnt/host/from-host", STEP)? == "good morning");
    vm.run("dd if=/dev/urandom of=/mnt/host/from-guest bs=64k count=32 2>/dev/null && sync", STEP)?;
    let sum = vm.run("md5sum /mnt/host/from-guest", STEP)?;
    let outside = std::process::Command::new("md5sum").arg(shared.join("from-guest")).output()?;
    let outside = String::from_utf8(outside.stdout)?;
    ensure!(sum.get(..32).is_some() && sum.get(..32) == outside.get(..32), "{sum} inside, {outside} outside");
    vm.run("umount /mnt/host", STEP)?;

    // The serial line has eighty columns, and what is longer is edited on more than one.
    vm.run("R=/sys/class/misc/hw_random", STEP)?;
    let sources = vm.run("cat $R/rng_available", STEP)?;
    ensure!(sources.starts_with("virtio_rng.0 virtio_rng.1"), "{sources}");
    vm.run("draw() { head -c 16384 /dev/hwrng | md5sum; }", STEP)?;
    let draw = |vm: &mut Console, source: &str| -> Result<String> {
        vm.run(&format!("echo {source} > $R/rng_current"), STEP)?;
        vm.run("draw", STEP)
    };
    let mut drawn = vec![draw(&mut vm, "virtio_rng.0")?, draw(&mut vm, "virtio_rng.1")?];
    let process = processes::child_named(vm.pid(), "atoll-rng", STEP)?;
    processes::signal(process, Signal::KILL)?;
    for _ in 0..2 {
        drawn.push(draw(&mut vm, "virtio_rng.0")?);
    }
    drawn.sort();
    drawn.dedup();
    ensure!(drawn.len() == 4, "{drawn:?}");

    vm.run("say() { while ! [ -e /h$1 ]; do echo line $1; usleep 99999; done; }", STEP)?;
    vm.run("hear() { stty raw -echo; head -n 1 > /g$1; }", STEP)?;
    vm.run("await() { while ! [ -s /g$1 ]; do usleep 99999; done; cat /g$1; }", STEP)?;
    let talk = |vm: &mut Console, round: usize| -> Result<()> {
        let host = UnixStream::connect(&console).context("the console's socket")?;
        host.set_read_timeout(Some(STEP))?;
        let mut lines = BufReader::new(host.try_clone()?);
        // Whoever prints before the client was noticed is not heard. A job of the shell's own would interrupt it at its end, in
        // the middle of a line that it echoes.
        vm.run(&format!("(say {round} > /dev/hvc0 &)"), STEP)?;
        let mut heard = Vec::new();
        // The first one may be the end of a line.
        while heard.len() < 3 {
            let mut line = String::new();
            lines.read_line(&mut line)?;
            heard.push(line.trim().to_owned());
        }
        ensure!(heard[1..] == [format!("line {round}"), format!("line {round}")], "{heard:?}");
        vm.run(&format!("touch /h{round}; (hear {round} < /dev/hvc0 &)"), STEP)?;
        vm.run("usleep 300000", STEP)?;
        (&host).write_all(b"typed on the host\n")?;
        let got = vm.run(&format!("await {round}"), STEP)?;
        ensure!(got == "typed on the host", "{got:?}");
        Ok(())
    };
    talk(&mut vm, 0)?;
    let process = processes::child_named(vm.pid(), "atoll-console", STEP)?;
    processes::signal(process, Signal::KILL)?;
    processes::wait_gone(process, STEP)?;
    talk(&mut vm, 1)?;
    ensure!(std::fs::metadata(&console).is_ok(), "the socket outlives the process");

    vm.run("dmesg | grep -E 'virtio|fuse:|hvc|hung|BUG:' > /log; true", STEP)?;
    let complaints = vm.run("grep -E 'rror|ail|hung|BUG:' /log; true", STEP)?;
    ensure!(complaints.is_empty(), "{complaints}");
    vm.send("poweroff -f\n")?;
    let (status, errors) = vm.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    ensure!(!console.exists(), "the socket's name goes with the machine");
    Ok(())
}
