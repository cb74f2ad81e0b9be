//! Disks: virtio-blk in front, `atoll-blk` or anybody's vhost-user backend behind.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::BLOCK;
use atoll_devices::virtio::input_config::Pages;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;
use thiserror::Error;

use super::chain::{self, ChainError, Link};
use super::limits::rate_arguments;
use super::{Host, Kind, KindError, queue_size};
use crate::backend::{ImageAccess, ImageError, ImageHandle, PassedFd};
use crate::config::{DiskConfig, ImageType};
use crate::vhost::class::{ConfigWish, DeviceClass};
use crate::vhost::error::{ConversationError, Step};
use crate::vhost::features::BLK_MQ;
use crate::vhost::patience::Patience;
use crate::vhost::session::Capabilities;
use crate::vhost::source::{BackendSource, Build, ExternalSocket, Fence, Incarnation, SourceError};
use crate::vhost::upgrade::Lone;
use crate::vhost::worker::ResizeError;

/// Bytes of a virtio sector (virtio 1.2, 5.2.4).
const SECTOR: u64 = 512;
/// The configuration space up to and with the write-zeroes fields (virtio 1.2, 5.2.4): what every backend has.
const CONFIG_LEN: u32 = 60;
const NUM_QUEUES_AT: usize = 34;
/// Descriptors of a queue: enough for 128 KiB requests of 4 KiB segments, many at a time; every backend can do it.
const QUEUE_SIZE: u16 = 256;
/// What serves it.
const PROGRAM: &str = "atoll-blk";
/// How every qcow2 image begins. Comparing it is all that this process knows of the format.
const QCOW2_MAGIC: [u8; 4] = [0x51, 0x46, 0x49, 0xfb];

/// Why a disk cannot be made.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The image is not there or cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its size cannot be read.
    #[error("the size of {} cannot be read: {source}", .path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: std::io::Error,
    },
    /// Not a whole number of sectors.
    #[error(
        "{} has {bytes} bytes, which are no whole number of 512-byte sectors: extend it with `truncate -s %512 {}`",
        .path.display(), .path.display()
    )]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Nothing in it.
    #[error("{} is empty: give it a size with `truncate -s 1G {}`", .path.display(), .path.display())]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Nothing in it, and a size alone would not do.
    #[error("{} is empty, and no qcow2 image: make one with `qemu-img create -f qcow2 {} 1G`", .path.display(), .path.display())]
    EmptyQcow2 {
        /// The image.
        path: PathBuf,
    },
    /// Nobody said what it is, and it may be either.
    #[error(
        "{} begins with a qcow2 header and the disk does not say what it is: give it image_type=qcow2, or image_type=raw \
         if a guest wrote that header onto its raw disk", .path.display()
    )]
    Ambiguous {
        /// The image.
        path: PathBuf,
    },
    /// What it stands on cannot be had.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// Neither an image nor a socket.
    #[error("the disk has no image: give path=FILE, or vhost_user=true,socket=PATH")]
    NoBacking,
}

/// Takes hold of an image and checks what can be checked without locking or parsing it.
pub(crate) fn open_image(
    path: &Path,
    access: ImageAccess,
    image_type: Option<ImageType>,
) -> Result<ImageHandle, DiskError> {
    let image = ImageHandle::open(path, access)?;
    let size = |source: rustix::io::Errno| DiskError::Size { path: path.to_owned(), source: source.into() };
    let file = image.reopen()?;
    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(size)?;
    let mut start = [0; QCOW2_MAGIC.len()];
    match bytes {
        0 if image_type == Some(ImageType::Qcow2) => return Err(DiskError::EmptyQcow2 { path: path.to_owned() }),
        0 => return Err(DiskError::Empty { path: path.to_owned() }),
        _ if image_type == Some(ImageType::Qcow2) => return Ok(image),
        // A guest may write such a header onto its raw disk: what a disk is, is never guessed from what is on it.
        _ if image_type.is_none() => {
            rustix::io::pread(&file, &mut start, 0).map_err(size)?;
        }
        _ => {}
    }
    match start {
        QCOW2_MAGIC => Err(DiskError::Ambiguous { path: path.to_owned() }),
        _ if bytes.is_multiple_of(SECTOR) => Ok(image),
        _ => Err(DiskError::OddSize { path: path.to_owned(), bytes }),
    }
}

/// A disk as it is configured.
pub(in crate::vhost) struct Disk(pub(in crate::vhost) DiskConfig);

impl Disk {
    fn queues(&self) -> u16 {
        self.0.num_queues.unwrap_or(1)
    }

    /// Tells this device's incarnations from all other users of the image, in this VM and in others.
    fn lock_byte() -> Option<u32> {
        let mut number = [0; 4];
        // Only readers share an image, so a rare collision costs a wait and nothing else.
        rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty()).ok()?;
        Some(u32::from_le_bytes(number))
    }

    fn is_qcow2(&self) -> bool {
        self.0.image_type == Some(ImageType::Qcow2)
    }

    fn arguments(&self, lock_byte: Option<u32>) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--num-queues".into(), self.queues().to_string().into()];
        // Always said, so that a successor serves what its predecessor served, whatever a guest has written.
        args.extend(["--image-type".into(), if self.is_qcow2() { "qcow2" } else { "raw" }.into()]);
        if self.0.readonly {
            args.push("--read-only".into());
        }
        if self.0.direct {
            args.push("--direct".into());
        }
        if let Some(serial) = &self.0.serial {
            args.extend(["--serial".into(), serial.into()]);
        }
        if let Some(limits) = &self.0.rate_limiter_config {
            args.extend(rate_arguments(limits));
        }
        if let Some(byte) = lock_byte {
            args.extend(["--lock-byte".into(), byte.to_string().into()]);
        }
        args
    }
}

impl Kind for Disk {
    fn shown(&self) -> String {
        let place = self.0.path.as_ref().or(self.0.vhost_socket.as_ref());
        place.map_or_else(|| "--disk".into(), |place| format!("--disk {}", place.display()))
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(DiskClass { queues: self.queues(), size: queue_size(self.0.queue_size, QUEUE_SIZE) })
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Block
    }
    fn own_queues(&self) -> Option<u16> {
        self.0.vhost_socket.is_none().then(|| self.queues())
    }
    fn source(&self, host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        if let Some(socket) = &self.0.vhost_socket {
            return Ok(Box::new(ExternalSocket::new(socket)));
        }
        let path = self.0.path.as_ref().ok_or(DiskError::NoBacking)?;
        let access = if self.0.readonly { ImageAccess::Read } else { ImageAccess::Write };
        let image = Arc::new(open_image(path, access, self.0.image_type)?);
        let links = if self.is_qcow2() {
            let links = chain::links(&host.name, &host.program(PROGRAM)?, &image, self.0.backing_files);
            Arc::new(links.map_err(DiskError::from)?)
        } else {
            Arc::default()
        };
        let opened = Arc::clone(&image);
        // Opened anew for each incarnation, so that a lock falls with it.
        let descriptors = {
            let links = Arc::clone(&links);
            move || {
                let mut fds = vec![PassedFd { flag: "--fd".into(), fd: opened.reopen()? }];
                for link in &*links {
                    fds.push(link.pass()?);
                }
                Ok(fds)
            }
        };
        let lock_byte = Self::lock_byte();
        let backends = host.process(PROGRAM, self.sidecar(), self.arguments(lock_byte), Box::new(descriptors))?;
        Ok(Box::new(ImageBackends { image, links, is_raw: !self.is_qcow2(), lock_byte, backends }))
    }
}

/// Backends of an image that is ours, so that its size can be changed.
struct ImageBackends {
    image: Arc<ImageHandle>,
    links: Arc<Vec<Link>>,
    is_raw: bool,
    lock_byte: Option<u32>,
    backends: Box<dyn BackendSource>,
}

/// Where the bytes begin by which `atoll-blk` tells its incarnations apart.
const LOCK_BYTES_AT: i64 = 1 << 40;

/// The byte that each incarnation locks: the kernel frees it with the last I/O of a process that is dead.
struct ImageFence {
    image: Arc<ImageHandle>,
    /// Reads of what an image stands on end in guest memory too.
    links: Arc<Vec<Link>>,
    lock_byte: Option<u32>,
}

impl Fence for ImageFence {
    fn is_quiet(&self) -> Option<bool> {
        let at = LOCK_BYTES_AT + i64::from(self.lock_byte?);
        let files = std::iter::once(self.image.as_ref()).chain(self.links.iter().map(Link::image));
        files.map(|file| file.is_locked_at(at)).try_fold(true, |quiet, locked| Some(quiet && !locked?))
    }
}

impl BackendSource for ImageBackends {
    fn connect(&mut self, generation: u64, patience: &mut Patience) -> Result<Incarnation, SourceError> {
        self.backends.connect(generation, patience)
    }
    fn connect_beside(
        &mut self,
        generation: u64,
        exe: Option<&Path>,
        patience: &mut Patience,
    ) -> Result<Incarnation, SourceError> {
        self.backends.connect_beside(generation, exe, patience)
    }
    fn build(&self) -> Result<Arc<Build>, Lone> {
        self.backends.build()
    }
    fn describe(&self) -> String {
        self.backends.describe()
    }
    fn fence(&self) -> Arc<dyn Fence> {
        let (image, links) = (Arc::clone(&self.image), Arc::clone(&self.links));
        Arc::new(ImageFence { image, links, lock_byte: self.lock_byte })
    }
    fn resize(&mut self, bytes: u64) -> Result<u64, ResizeError> {
        if self.is_raw { Ok(self.image.resize(bytes)?) } else { Err(ResizeError::Qcow2) }
    }
}

/// What makes a disk of a vhost-user device.
struct DiskClass {
    queues: u16,
    size: u16,
}

impl DeviceClass for DiskClass {
    fn device_type(&self) -> u16 {
        BLOCK
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::Needed(CONFIG_LEN)
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        let mut config = backend.config.clone();
        let told = if backend.features & BLK_MQ != 0 { num_queues(&config) } else { 1 };
        // A backend may announce more queues in one place than in the other; only what both say is there.
        let queues = self.queues.min(backend.queues.unwrap_or(1)).min(told);
        if queues == 0 {
            let what = "VIRTIO_BLK_F_MQ with no queue at all".into();
            return Err(ConversationError::Absurd { step: Step::GetConfig, what });
        }
        if let Some(field) = config.get_mut(NUM_QUEUES_AT..NUM_QUEUES_AT + 2) {
            field.copy_from_slice(&queues.to_le_bytes());
        }
        Ok(DeviceOffer {
            device_type: BLOCK,
            features: backend.features,
            queue_sizes: vec![self.size; usize::from(queues)],
            config,
            pages: Pages::default(),
        })
    }
}

fn num_queues(config: &[u8]) -> u16 {
    let field = config.get(NUM_QUEUES_AT..).and_then(|rest| rest.first_chunk::<2>());
    field.map_or(1, |bytes| u16::from_le_bytes(*bytes))
}
