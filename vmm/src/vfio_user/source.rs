//! Where servers come from: a process of ours for an NVMe disk, started with the record of its predecessor; or somebody else's
//! socket.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use atoll_protocol::DeviceId;
use atoll_protocol::sidecar::DeviceClass;
use rustix::fs::{MemfdFlags, SealFlags};

use super::doorbells::Mapping;
use crate::backend::{ImageAccess, ImageHandle, PassedFd, Spawner};
use crate::config::NvmeConfig;
use crate::vhost::{BackendSource, Build, Fence, Incarnation, Lone, Patience, SourceError, SpawnedBackend, open_image};

/// What serves an NVMe disk.
pub(super) const PROGRAM: &str = "atoll-nvme";
/// What it says that it serves: the class of its function.
const CLASS: u32 = 0x0001_0802;
/// Bytes of a record: more than a process of ours needs, and nothing where it writes nothing.
const RECORD_LEN: u64 = 1 << 20;
/// In a record: how many commands were completed, how many are under way, the doorbells as they were rung and as they
/// were seen.
const COMPLETED_AT: usize = 8;
const UNDER_WAY_AT: usize = 16;
const RUNG_AT: usize = 0x1000;
const SEEN_AT: usize = 0x2000;
const DOORBELLS_LEN: usize = 0x1000;
/// Where the bytes begin by which incarnations are told apart, as for every image.
const LOCK_BYTES_AT: i64 = 1 << 40;

/// What outlives the processes of a device.
#[derive(Debug)]
pub(super) struct Record {
    file: OwnedFd,
    map: Mapping,
}

/// How far a device is, as its record says. It is written by the device's own process: whatever it says, nothing but that
/// device depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) completed: u64,
    pub(super) waiting: bool,
}

impl Record {
    pub(super) fn new() -> io::Result<Self> {
        let file = rustix::fs::memfd_create("atoll-record", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, RECORD_LEN)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let map = Mapping::new(&file).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, map })
    }

    pub(super) fn progress(&self) -> Progress {
        let long = |at| self.map.long(at).map_or(0, |word| word.load(Ordering::Relaxed));
        let word = |at| self.map.word(at).map_or(0, |word| word.load(Ordering::Acquire));
        let unseen = (0..DOORBELLS_LEN).step_by(4).any(|at| word(RUNG_AT + at) != word(SEEN_AT + at));
        Progress { completed: long(COMPLETED_AT), waiting: unseen || long(UNDER_WAY_AT) > 0 }
    }

    fn pass(&self) -> io::Result<PassedFd> {
        Ok(PassedFd { flag: "--record-fd".into(), fd: self.file.try_clone()? })
    }
}

/// What the processes of an NVMe disk are started with.
pub(super) struct NvmeHost {
    pub(super) name: String,
    pub(super) number: DeviceId,
    pub(super) spawner: Spawner,
    pub(super) exe: std::path::PathBuf,
}

/// Processes of ours for one image.
pub(super) struct NvmeServers {
    image: Arc<ImageHandle>,
    lock_byte: u32,
    servers: SpawnedBackend,
}

impl NvmeServers {
    /// Takes hold of the image, and checks what can be checked without locking it.
    ///
    /// # Errors
    /// When it cannot be a disk.
    pub(super) fn new(
        config: &NvmeConfig,
        host: NvmeHost,
        record: &Arc<Record>,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let access = if config.readonly { ImageAccess::Read } else { ImageAccess::Write };
        let image = Arc::new(open_image(&config.path, access, config.image_type)?);
        let mut number = [0; 4];
        rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty())?;
        let lock_byte = u32::from_le_bytes(number);
        let mut args: Vec<OsString> = vec!["--lock-byte".into(), lock_byte.to_string().into()];
        args.extend(["--num-queues".into(), config.queues().to_string().into()]);
        args.extend(["--serial".into(), config.serial.clone().unwrap_or_else(|| serial(&host.name)).into()]);
        if config.readonly {
            args.push("--read-only".into());
        }
        let (opened, record) = (Arc::clone(&image), Arc::clone(record));
        // Opened anew for each incarnation, so that a lock falls with it.
        let descriptors = move || Ok(vec![PassedFd { flag: "--fd".into(), fd: opened.reopen()? }, record.pass()?]);
        let servers = SpawnedBackend {
            name: host.name,
            device: host.number,
            class: DeviceClass::Other(CLASS),
            build: Build::new(host.exe),
            lone: None,
            args,
            descriptors: Box::new(descriptors),
            meter: None,
            spawner: host.spawner,
        };
        Ok(Self { image, lock_byte, servers })
    }
}

/// The serial number of a disk whose user has said none: its name, as far as a serial number can be that.
fn serial(name: &str) -> String {
    let text: String = name.chars().filter(char::is_ascii_graphic).take(20).collect();
    if text.is_empty() { "atoll".into() } else { text }
}

struct ImageFence {
    image: Arc<ImageHandle>,
    at: i64,
}

impl Fence for ImageFence {
    fn is_quiet(&self) -> Option<bool> {
        self.image.is_locked_at(self.at).map(|locked| !locked)
    }
}

impl BackendSource for NvmeServers {
    fn connect(&mut self, generation: u64, patience: &mut Patience) -> Result<Incarnation, SourceError> {
        self.servers.connect(generation, patience)
    }
    fn build(&self) -> Result<Arc<Build>, Lone> {
        self.servers.build()
    }
    fn describe(&self) -> String {
        self.servers.describe()
    }
    fn fence(&self) -> Arc<dyn Fence> {
        Arc::new(ImageFence { image: Arc::clone(&self.image), at: LOCK_BYTES_AT + i64::from(self.lock_byte) })
    }
}
