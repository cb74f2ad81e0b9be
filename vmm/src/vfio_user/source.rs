//! Where servers come from: a process of ours for an NVMe disk, started with the record of its predecessor; or somebody else's
//! socket.

use std::ffi::OsString;
use std::sync::Arc;

use atoll_protocol::DeviceId;
use atoll_protocol::sidecar::DeviceClass;

use super::record::Record;
use crate::backend::{ImageAccess, ImageHandle, PassedFd, Spawner};
use crate::config::NvmeConfig;
use crate::vhost::{BackendSource, Build, Fence, Incarnation, Lone, Patience, SourceError, SpawnedBackend, open_image};

/// What serves an NVMe disk.
pub(super) const PROGRAM: &str = "atoll-nvme";
/// What it says that it serves: the class of its function.
const CLASS: u32 = 0x0001_0802;
/// Where the bytes begin by which incarnations are told apart, as for every image.
const LOCK_BYTES_AT: i64 = 1 << 40;

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
