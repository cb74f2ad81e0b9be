//! A switch under measurement: its process, and a guest on each of two ports.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use atoll_kit::driver::{Driver, Options};

/// Entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Bytes of guest memory.
const GUEST_BYTES: usize = 16 << 20;
/// VIRTIO_F_VERSION_1, MRG_RXBUF, EVENT_IDX and the vhost-user protocol's own: what both offer.
const FEATURES: u64 = 1 << 32 | 1 << 15 | 1 << 29 | 1 << 30;
/// How long a process may take to listen: testpmd sets up its memory first.
const START_MAX: Duration = Duration::from_secs(30);
const TESTPMD: &str = "dpdk-testpmd";

/// Which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// `atoll-net --switch`, as it ships.
    Atoll,
    /// dpdk-testpmd.
    Testpmd,
}

/// Whether testpmd is installed.
pub fn testpmd_is_there() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(TESTPMD).exists())
}

/// A running process and two guests on it. Dropping it kills it.
pub struct Pair {
    child: Child,
    /// The guest that sends.
    pub sender: Driver,
    /// The guest that receives.
    pub receiver: Driver,
    /// The receiver's buffers are available.
    pub primed: bool,
    _folder: tempfile::TempDir,
}

/// A process that is killed if what follows its start fails.
struct Started(Option<Child>);

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Pair {
    /// Starts it and connects both guests.
    pub fn start(who: Who) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (mut command, sockets) = match who {
            Who::Atoll => {
                let socket = folder.path().join("switch");
                let mut command = Command::new(program()?);
                command.arg("--socket").arg(&socket).args(["--switch", "--ports", "2"]);
                (command, [socket.clone(), socket])
            }
            Who::Testpmd => {
                let sockets = [folder.path().join("a"), folder.path().join("b")];
                (testpmd(folder.path(), &sockets), sockets)
            }
        };
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(if who == Who::Atoll { Stdio::inherit() } else { Stdio::null() })
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let mut started = Started(Some(child));
        let mut guests = Vec::new();
        for socket in &sockets {
            let child = started.0.as_mut().context("a process")?;
            let options = Options {
                queues: 2,
                size: QUEUE_SIZE,
                memory: GUEST_BYTES,
                without: !FEATURES,
                inflight: true,
                iommu: false,
            };
            guests.push(Driver::connected(options, connect(child, socket)?)?);
        }
        let (Some(receiver), Some(sender), Some(child)) = (guests.pop(), guests.pop(), started.0.take()) else {
            bail!("two guests");
        };
        Ok(Self { child, sender, receiver, primed: false, _folder: folder })
    }

    /// Stops the process, or lets it go on: one that polls would take a processor while the other is measured.
    pub fn pause(&self, on: bool) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let signal = if on { rustix::process::Signal::STOP } else { rustix::process::Signal::CONT };
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Processor time of all its threads so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        let mut clock = 0;
        let pid = self.child.id().cast_signed();
        #[allow(unsafe_code, reason = "the clock of another process has no safe wrapper")]
        // SAFETY: both calls fill one plain value each.
        let time = unsafe {
            let mut time: libc::timespec = std::mem::zeroed();
            if libc::clock_getcpuclockid(pid, &raw mut clock) != 0 || libc::clock_gettime(clock, &raw mut time) != 0 {
                bail!("process {pid} has no clock: has it ended?");
            }
            time
        };
        Ok(Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32))
    }

    /// Processor time over two idle seconds, in percent of one processor.
    pub fn idle_cpu_percent(&self) -> Result<f64> {
        std::thread::sleep(Duration::from_millis(200));
        let (before, start) = (self.cpu_time()?, Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        Ok((self.cpu_time()? - before).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.sender.disconnect();
        self.receiver.disconnect();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `atoll-net` of the same build.
fn program() -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let path = me.parent().context("a folder")?.join("atoll-net");
    if !path.exists() {
        bail!("{} is missing: build it with `cargo build --release -p atoll-net`", path.display());
    }
    Ok(path)
}

/// testpmd between two ports, one forwarding core, no huge pages.
fn testpmd(folder: &Path, sockets: &[PathBuf; 2]) -> Command {
    let mut command = Command::new(TESTPMD);
    command.args(["--no-huge", "--no-shconf", "-m", "256", "--no-pci", "--no-telemetry"]);
    // Two threads, one of which polls, on whichever processors the scheduler chooses, as for the other side.
    let last = std::thread::available_parallelism().map_or(0, |processors| processors.get() - 1);
    command.arg(format!("--lcores=0@(0-{last}),1@(0-{last})"));
    command.arg(format!("--file-prefix=atoll{}", std::process::id())).env("RUNTIME_DIRECTORY", folder);
    for (number, socket) in sockets.iter().enumerate() {
        command.arg(format!("--vdev=net_vhost{number},iface={},queues=1", socket.display()));
    }
    // `--interactive` keeps it running until its standard input ends.
    command.args(["--", "--interactive", "--forward-mode=io", "--auto-start", "--total-num-mbufs=16384"]);
    command
}

fn connect(child: &mut Child, socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + START_MAX;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > deadline => {
                return Err(e).with_context(|| format!("nobody listens on {}", socket.display()));
            }
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            bail!("the process ended at once: {status}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
