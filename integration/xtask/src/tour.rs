//! The tour: what a person does with machines that are more than a kernel and a disk. Two of them, with a Debian user
//! land each: an address by DHCP and a file from a server on the host's loopback by user-mode networking, a switch
//! between the two, a folder of the host, and all of it by the commands that a person would type.

use crate::console::Console;
use crate::demo::BOOT_LIMIT;
use crate::images::{self, Guest};
use crate::{packages, place, userland};
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_secs(60);
/// What is on the host's web server: enough for many segments.
const FILE_BYTES: usize = 4 << 20;
/// Debian's virtiofsd, of QEMU or of its own package.
const FOLDER_SERVERS: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/bin/virtiofsd"];

/// Part of the last line of `cargo xtask demo --check`.
#[derive(Debug, Default, Serialize)]
pub struct Tour {
    /// Everything below is as it must be.
    pub ok: bool,
    /// What DHCP gave the first guest.
    pub address: String,
    /// The file came over TCP from the host's loopback unharmed.
    pub fetched: bool,
    /// Round trip between the guests through the switch, in milliseconds.
    pub ping_ms: f64,
    /// What iperf3 says of the same way, in Mbit/s.
    pub iperf_mbits: f64,
    /// A file of the guest's is in the host's folder, and one of the host's in the guest.
    pub folder: bool,
    /// What bash and perl of the guest's user land answer.
    pub userland: bool,
    /// What `plug-soak` says of disks and cards that came and went under I/O.
    pub plugs: serde_json::Value,
    /// Exit statuses of both machines.
    pub exits: Vec<i32>,
}

/// A process that ends with its owner.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A web server that gives one file to whoever asks, on the loopback address.
fn serve(bytes: Vec<u8>) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.set_read_timeout(Some(STEP));
            let mut head = [0; 1024];
            if matches!(stream.read(&mut head), Ok(1..)) {
                let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
                let _ = stream.write_all(&bytes);
            }
        }
    });
    Ok(port)
}

/// Bytes that are not all the same, the same each time.
fn pattern() -> Vec<u8> {
    let mut state = 0x2545_f491_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()
    };
    (0..FILE_BYTES / 4).flat_map(|_| next()).collect()
}

fn md5(bytes: &[u8], folder: &Path) -> Result<String> {
    let path = folder.join("pattern");
    std::fs::write(&path, bytes)?;
    let output = Command::new("md5sum").arg(&path).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap_or_default().to_owned())
}

fn wait_for(path: &Path) -> Result<()> {
    let start = Instant::now();
    while !path.exists() {
        ensure!(start.elapsed() < STEP, "{} does not appear", path.display());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

struct Stage<'a> {
    guest: &'a Guest,
    folder: &'a Path,
    runtime: PathBuf,
}

impl Stage<'_> {
    /// `atoll` with this tour's own run-time folder.
    fn atoll(&self) -> Result<Command> {
        let mut command = Command::new(place::program("atoll")?);
        command.env("XDG_RUNTIME_DIR", &self.runtime);
        Ok(command)
    }

    fn switch(&self) -> Result<Owned> {
        let mut command = self.atoll()?;
        let switch = Owned(command.args(["switch", "tour"]).stdin(Stdio::null()).spawn()?);
        wait_for(&self.runtime.join("atoll/switches/tour.sock"))?;
        Ok(switch)
    }

    fn machine(&self, name: &str, more: &[String]) -> Result<Console> {
        let disk = self.folder.join(format!("{name}.ext4"));
        place::run(Command::new("cp").arg("--sparse=always").arg(userland::disk()?).arg(&disk))?;
        let mut command = self.atoll()?;
        command
            .args(["run", "--cpu", "auto", "--memory", "size=512M", "--serial", "tty", "--name", name])
            .args(["--cmdline", "console=ttyS0 quiet atoll.load=net,fs"])
            .arg("--kernel")
            .arg(&self.guest.vmlinux)
            .arg("--initramfs")
            .arg(&self.guest.initramfs)
            .arg("--disk")
            .arg(format!("path={}", disk.display()))
            .args(more);
        let mut console = Console::spawn(&mut command)?;
        console.prompt(BOOT_LIMIT)?;
        Ok(console)
    }
}

/// A virtiofsd that serves `shared` at `socket`.
fn folder_server(shared: &Path, socket: &Path) -> Result<Owned> {
    let exe = FOLDER_SERVERS.iter().find(|path| Path::new(path).is_file());
    let exe = exe.context("no virtiofsd: install qemu-system-common (Debian 12) or virtiofsd")?;
    let help = Command::new(exe).arg("--help").output()?;
    let modern = String::from_utf8_lossy(&help.stdout).contains("--shared-dir");
    let mut command = Command::new(exe);
    command.arg(format!("--socket-path={}", socket.display()));
    if modern {
        command.arg("--shared-dir").arg(shared).args(["--sandbox", "none"]);
    } else {
        command.arg("-f").arg("-o").arg(format!("source={}", shared.display()));
    }
    let log = std::fs::File::create(socket.with_extension("log"))?;
    let server = Owned(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?);
    wait_for(socket)?;
    Ok(server)
}

/// The number behind `key` in a text such as `rtt min/avg = 0.1/0.2`.
fn number_after(text: &str, key: &str) -> Option<f64> {
    let rest = text.get(text.find(key)? + key.len()..)?;
    let digits: String = rest
        .chars()
        .skip_while(|character| !character.is_ascii_digit())
        .take_while(|character| character.is_ascii_digit() || *character == '.')
        .collect();
    digits.parse().ok()
}

/// Disks and cards that come and go, by the soak's own program.
fn plug(count: u32) -> Result<serde_json::Value> {
    let mut command = Command::new(place::program("plug-soak")?);
    let output = command.args(["--count", &count.to_string()]).stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().context("plug-soak says nothing")?;
    ensure!(output.status.success(), "plug-soak ended with {}: {last}", output.status);
    Ok(serde_json::from_str(last)?)
}

/// What came of a step, under it.
fn told(what: &str) {
    eprintln!("      {what}");
}

/// Takes the tour, with programs that have been built.
///
/// # Errors
/// When a step fails; the error names it.
pub fn run(series: &str, plugs: u32) -> Result<Tour> {
    let guest = images::guest(series)?;
    packages::ensure_peers(&["passt"])?;
    let folder = tempfile::tempdir()?;
    let runtime = folder.path().join("run");
    std::fs::create_dir(&runtime)?;
    std::fs::set_permissions(&runtime, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    let stage = Stage { guest: &guest, folder: folder.path(), runtime };
    let mut tour = Tour::default();

    eprintln!("[1/6] a switch, a folder server, two machines");
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared)?;
    std::fs::write(shared.join("from-host"), "hello guest\n")?;
    let socket = folder.path().join("fs.sock");
    let _server = folder_server(&shared, &socket)?;
    let _switch = stage.switch()?;
    let fs = format!("tag=host,socket={}", socket.display());
    let option = |flag: &str, value: &str| [flag.to_owned(), value.to_owned()];
    let first = [option("--net", "user=on"), option("--net", "switch=tour"), option("--fs", &fs)].concat();
    let mut a = stage.machine("tour-a", &first)?;
    let mut b = stage.machine("tour-b", &option("--net", "switch=tour"))?;
    let answer = a.run("perl -e 'print 6*7' && bash -c 'echo ${BASH_VERSION%%.*}' && ls --version | head -1", STEP)?;
    tour.userland = answer.starts_with("425") && answer.contains("coreutils");

    told("Debian's bash, coreutils and perl run from a disk of their own");
    eprintln!("[2/6] an address by DHCP, a file from the host's loopback");
    a.run("ip link set eth0 up && udhcpc -i eth0 -n -q -t 10 2>&1", STEP)?;
    let addresses = a.run("ip -4 -o addr show dev eth0", STEP)?;
    tour.address = addresses.split_whitespace().nth(3).unwrap_or_default().to_owned();
    let route = a.run("ip -4 route show default", STEP)?;
    let gateway = route.split_whitespace().nth(2).context("DHCP gave no router")?.to_owned();
    let bytes = pattern();
    let expected = md5(&bytes, folder.path())?;
    let port = serve(bytes)?;
    let got = a.run(&format!("wget -q -O - http://{gateway}:{port}/file | md5sum"), STEP)?;
    tour.fetched = got.starts_with(&expected);
    told(&format!("{} by way of {gateway}, and the file is whole: {}", tour.address, tour.fetched));

    eprintln!("[3/6] ping and iperf3 between the two");
    a.run("ip addr add 10.9.0.1/24 dev eth1 && ip link set eth1 up", STEP)?;
    b.run("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && ip link set lo up", STEP)?;
    let ping = a.run("ping -c 5 -i 0.2 10.9.0.2", STEP)?;
    tour.ping_ms = number_after(&ping, "min/avg/max/mdev = ").context("ping tells no round trip")?;
    b.run("iperf3 -s -D -1 && sleep 1", STEP)?;
    let iperf = a.run("iperf3 -c 10.9.0.2 -t 3 -f m | grep receiver", STEP)?;
    tour.iperf_mbits = number_after(&iperf, "Bytes").context("iperf3 tells no rate")?;
    told(&format!("{} ms there and back at best, {} Mbit/s", tour.ping_ms, tour.iperf_mbits));

    eprintln!("[4/6] a folder of the host");
    a.run("mkdir -p /mnt/host && mount -t virtiofs host /mnt/host", STEP)?;
    let read = a.run("cat /mnt/host/from-host", STEP)?;
    a.run("echo hello host > /mnt/host/from-guest && sync", STEP)?;
    tour.folder = read == "hello guest" && std::fs::read_to_string(shared.join("from-guest"))? == "hello host\n";
    told(&format!("each reads what the other wrote: {}", tour.folder));

    eprintln!("[5/6] powering off");
    for mut console in [a, b] {
        console.run("mount -o remount,ro / || true", STEP)?;
        console.send("poweroff -f\n")?;
        let (status, errors) = console.wait(STEP)?;
        if !status.success() {
            eprintln!("{errors}");
        }
        tour.exits.push(status.code().unwrap_or(-1));
    }
    eprintln!("[6/6] a disk and a card in and out {plugs} times under I/O");
    tour.plugs = plug(plugs)?;
    told(&format!("names, descriptors, threads, processes and memory as before: {}", tour.plugs["outcome"]["ok"]));
    let sound = tour.userland && tour.fetched && tour.folder && tour.address.contains('/');
    tour.ok = sound && tour.iperf_mbits > 0.0 && tour.exits.iter().all(|status| *status == 0);
    if !tour.ok {
        bail!("the tour is not in order: {}", serde_json::to_string(&tour)?);
    }
    Ok(tour)
}

#[cfg(test)]
mod tests {
    use super::number_after;

    #[test]
    fn figures_are_found_in_what_tools_print() {
        let ping = "rtt min/avg/max/mdev = 0.321/0.456/0.6/0.1 ms";
        assert_eq!(number_after(ping, "min/avg/max/mdev = "), Some(0.321));
        let iperf = "[  5]   0.00-3.00   sec  96.1 MBytes   268 Mbits/sec                  receiver";
        assert_eq!(number_after(iperf, "Bytes"), Some(268.0));
    }
}
