//! Sockets between a guest and programs of the host, served by Atoll itself, with a Debian user land's perl in the guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_integration::processes;
use rustix::process::Signal;
use xtask::console::Console;
use xtask::demo::{BOOT_LIMIT, Demo, KernelForm};
use xtask::{images, place, userland};

const STEP: Duration = Duration::from_secs(60);
const BYTES: usize = 4 << 20;
/// AF_VSOCK as perl is told of it: a stream socket, and an address of a port and a context id.
const TOOLS: &str = r#"cat > /tmp/v.pl <<'END'
my ($what, $port) = @ARGV;
sub address { pack("SSLLx4", 40, 0, $_[0], $_[1]) }
socket(S, 40, 1, 0) or die "socket: $!\n";
if ($what eq "echo") {
    bind(S, address($port, 0xffffffff)) or die "bind: $!\n";
    listen(S, 8) or die "listen: $!\n";
    while (accept(C, S)) {
        while (sysread(C, $b, 65536)) { for ($o = 0; $o < length $b;) { $o += syswrite(C, $b, length($b) - $o, $o) or last } }
        close C;
    }
}
connect(S, address($port, 2)) or die "connect: $!\n";
if ($what eq "send") { while (sysread(STDIN, $b, 65536)) { for ($o = 0; $o < length $b;) { $o += syswrite(S, $b, length($b) - $o, $o) or die "write: $!\n" } } exit }
syswrite(STDOUT, "connected\n");
defined(sysread(S, $b, 100)) or die "read: $!\n";
print $b;
END"#;

/// A client of the host's at a port of the guest.
fn client(socket: &Path, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(STEP))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        ensure!(stream.read(&mut byte)? == 1, "the connection to port {port} ended after {line:?}");
        line.extend(byte);
    }
    ensure!(line.starts_with(b"OK "), "{line:?}");
    Ok(stream)
}

/// What is sent comes back.
fn echo(socket: &Path) -> Result<()> {
    let deadline = Instant::now() + STEP;
    // The guest's program may not listen yet.
    let mut stream = loop {
        match client(socket, 1234) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    let pattern: Vec<u8> =
        (0..BYTES as u32 / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let mut writer = stream.try_clone()?;
    let sent = pattern.clone();
    let writing = std::thread::spawn(move || -> std::io::Result<()> {
        writer.write_all(&sent)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back)?;
    writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    ensure!(back == pattern, "{} bytes of {} came back", back.len(), pattern.len());
    Ok(())
}

/// A program of the host reaches one of the guest and the other way round, megabytes both ways. When the backend is killed
/// the connections are reset and nothing else: both ways work again.
#[test]
fn sockets_both_ways_outlive_their_backend() -> Result<()> {
    let guest = images::guest("6.1")?;
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("debian.ext4");
    place::run(Command::new("cp").arg("--sparse=always").arg(userland::disk()?).arg(&disk))?;
    let socket = folder.path().join("v");
    let host = UnixListener::bind(folder.path().join("v_52"))?;
    let quiet = UnixListener::bind(folder.path().join("v_53"))?;
    let demo = Demo { series: "6.1".to_owned(), form: KernelForm::Pvh, cpu: "soft".to_owned() };
    let mut command = demo.command(&guest)?;
    command.arg("--disk").arg(format!("path={}", disk.display()));
    command.args(["--cmdline", "console=ttyS0 quiet cryptomgr.notests atoll.load=vsock"]);
    command.arg("--vsock").arg(format!("cid=3,socket={}", socket.display()));
    let mut vm = Console::spawn(&mut command)?;
    vm.prompt(BOOT_LIMIT)?;
    vm.send(TOOLS)?;
    vm.send("\n")?;
    vm.run("[ -s /tmp/v.pl ]; dd if=/dev/urandom of=/tmp/d bs=64k count=64 2>/dev/null", STEP)?;
    vm.run("(perl /tmp/v.pl echo 1234 >/tmp/e 2>&1 &)", STEP)?;

    for round in 0..2 {
        echo(&socket).with_context(|| format!("round {round}"))?;
        let receiving = {
            let host = host.try_clone()?;
            let path = folder.path().join("received");
            std::thread::spawn(move || -> Result<()> {
                let (mut stream, _) = host.accept()?;
                stream.set_read_timeout(Some(STEP))?;
                std::io::copy(&mut stream, &mut std::fs::File::create(path)?)?;
                Ok(())
            })
        };
        vm.run("perl /tmp/v.pl send 52 < /tmp/d", STEP)?;
        receiving.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        let inside = vm.run("md5sum < /tmp/d", STEP)?;
        let outside = Command::new("md5sum").stdin(std::fs::File::open(folder.path().join("received"))?).output()?;
        ensure!(inside.get(..32) == String::from_utf8_lossy(&outside.stdout).get(..32), "round {round}: {inside}");
        ensure!(vm.run("perl /tmp/v.pl send 54 < /dev/null", STEP).is_err(), "nobody listens at port 54");
        if round == 0 {
            vm.run("{ perl /tmp/v.pl read 53 >/tmp/r 2>&1; echo over >> /tmp/r; } & true", STEP)?;
            let (mut open, _) = quiet.accept()?;
            open.set_read_timeout(Some(STEP))?;
            // Accepted here is not yet connected there: a backend that dies in between breaks the guest's connect instead.
            vm.run("while ! grep -q connected /tmp/r; do sleep 0.1; done", STEP)?;
            let backend = processes::child_named(vm.pid(), "atoll-vsock", STEP)?;
            processes::signal(backend, Signal::KILL)?;
            ensure!(open.read(&mut [0; 8]).unwrap_or(0) == 0, "the host's end ends");
            let said = vm.run("while ! grep -q over /tmp/r; do sleep 0.1; done; cat /tmp/r", STEP)?;
            ensure!(said.contains("read: Connection reset by peer"), "{said}");
        }
    }
    let log = vm.run("dmesg | grep -E 'BUG:|WARNING:|vsock' | grep -iE 'BUG|WARNING|fail|error' || true", STEP)?;
    ensure!(log.is_empty(), "{log}");
    vm.run("mount -o remount,ro /", STEP)?;
    vm.send("poweroff -f\n")?;
    let (status, errors) = vm.wait(STEP)?;
    ensure!(status.success(), "{status}: {errors}");
    ensure!(!socket.exists(), "the socket goes with the machine");
    Ok(())
}
