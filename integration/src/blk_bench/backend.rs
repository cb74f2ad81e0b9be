//! A back end under measurement: its process, its image, and the driver connected to it.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cpu_clock::processor_time;
use anyhow::{Context, Result, bail};
use atoll_kit::driver::{Driver, Options};

/// Bytes of an image.
pub const IMAGE_BYTES: u64 = 256 << 20;
/// Bytes of guest memory.
const GUEST_BYTES: usize = 64 << 20;

/// Which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// atoll-blk, as it ships.
    Atoll,
    /// qemu-storage-daemon.
    Qemu,
}

/// What the disk lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// Nothing: the cost of the virtqueue alone.
    Null,
    /// A file in memory.
    Tmpfs,
    /// A file on a disk, past the page cache.
    Direct,
}

impl std::fmt::Display for Medium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Null => "null",
            Self::Tmpfs => "tmpfs",
            Self::Direct => "direct",
        })
    }
}

impl std::str::FromStr for Medium {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "null" => Ok(Self::Null),
            "tmpfs" => Ok(Self::Tmpfs),
            "direct" => Ok(Self::Direct),
            _ => bail!("{text} is no medium; choose from null, tmpfs, direct"),
        }
    }
}

/// A running back end. Dropping it kills it and removes its image.
pub struct Backend {
    child: Child,
    /// Drives it.
    pub driver: Driver,
    _folder: tempfile::TempDir,
}

impl Backend {
    /// Starts a back end and connects to it.
    pub fn start(who: Who, medium: Medium, disk: &Path) -> Result<Self> {
        let root = if medium == Medium::Tmpfs { Path::new("/dev/shm") } else { disk };
        let folder = tempfile::tempdir_in(root).with_context(|| format!("a folder in {}", root.display()))?;
        let (socket, image) = (folder.path().join("s"), folder.path().join("image"));
        if medium != Medium::Null {
            fill(&image)?;
        }
        let mut command = match who {
            Who::Atoll => atoll(medium, &socket, &image)?,
            Who::Qemu => qemu(medium, &socket, &image),
        };
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {:?}: is it installed?", command.get_program()))?;
        let stream = match connect(&mut child, &socket) {
            Ok(stream) => stream,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e);
            }
        };
        let options = Options { memory: GUEST_BYTES, ..Options::default() };
        match Driver::connected(options, stream) {
            Ok(driver) => Ok(Self { child, driver, _folder: folder }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processor time of all its threads so far, those that have ended included.
    pub fn cpu_time(&self) -> Result<Duration> {
        processor_time(self.child.id())
    }

    /// Its share of memory without that of the guest, in KiB.
    pub fn pss_without_guest_kib(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        let mut guest = false;
        let mut total = 0;
        for line in text.lines() {
            if line.split_whitespace().next().is_some_and(|word| word.contains('-') && !word.ends_with(':')) {
                guest = line.contains("/memfd:guest");
            } else if let Some(rest) = line.strip_prefix("Pss:")
                && !guest
            {
                total += rest.split_whitespace().next().context("a number")?.parse::<u64>()?;
            }
        }
        Ok(total)
    }

    /// Processor time over three idle seconds, in percent of one processor.
    pub fn idle_cpu_percent(&self) -> Result<f64> {
        std::thread::sleep(Duration::from_millis(200));
        let (before, start) = (self.cpu_time()?, Instant::now());
        std::thread::sleep(Duration::from_secs(3));
        Ok((self.cpu_time()? - before).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.driver.disconnect();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn atoll(medium: Medium, socket: &Path, image: &Path) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.arg("--socket").arg(socket);
    match medium {
        Medium::Null => command.args(["--null", "256M"]),
        Medium::Tmpfs => command.arg("--path").arg(image),
        Medium::Direct => command.arg("--path").arg(image).arg("--direct"),
    };
    Ok(command)
}

/// `atoll-blk` of the same build.
fn program() -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let path = me.parent().context("a folder")?.join("atoll-blk");
    if !path.exists() {
        bail!("{} is missing: build it with `cargo build --release -p atoll-blk`", path.display());
    }
    Ok(path)
}

fn qemu(medium: Medium, socket: &Path, image: &Path) -> Command {
    let image = image.display();
    let node = match medium {
        Medium::Null => format!("null-co,node-name=d,size={IMAGE_BYTES},read-zeroes=off"),
        Medium::Tmpfs => format!("file,node-name=d,filename={image},aio=io_uring"),
        Medium::Direct => format!("file,node-name=d,filename={image},aio=io_uring,cache.direct=on"),
    };
    let mut command = Command::new("qemu-storage-daemon");
    // An I/O thread, as its manual recommends: it polls adaptively, the main loop does not.
    command.args(["--object", "iothread,id=t", "--blockdev", &node, "--export"]).arg(format!(
        "type=vhost-user-blk,id=e,node-name=d,writable=on,iothread=t,addr.type=unix,addr.path={}",
        socket.display()
    ));
    command
}

fn connect(child: &mut Child, socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(e) if Instant::now() > deadline => {
                return Err(e).with_context(|| format!("nobody listens on {}", socket.display()));
            }
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            bail!("the back end ended at once: {status}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An image whose blocks are all allocated.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let mut block = vec![0_u8; 1 << 20];
    for n in 0..IMAGE_BYTES >> 20 {
        block.iter_mut().zip(n..).for_each(|(byte, at)| *byte = (at * 31 % 251) as u8);
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}
