//! Disks: virtio-blk in front, `atoll-blk` or anybody's vhost-user backend behind.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Instant;

use atoll_devices::pci::SharedFunction;
use atoll_devices::virtio::pci::{VirtioPci, VirtioPciParts};
use atoll_devices::virtio::{DeviceOffer, NotifyPlacement};
use atoll_protocol::DeviceId;
use atoll_protocol::sidecar::DeviceClass as Class;
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::call::Transport;
use super::device::{DeviceClass, DeviceParts, Limits, VhostDevice};
use super::disk_config::{Backing, DiskConfig};
use super::error::{ConversationError, Step};
use super::features::BLK_MQ;
use super::session::Capabilities;
use super::source::{BackendSource, ExternalSocket};
use super::spawned::SpawnedBackend;
use crate::backend::{ImageAccess, ImageError, ImageHandle, Spawner, beside_this_binary};
use crate::cpu::Space;
use crate::doorbell::{Doorbell, DoorbellTable};
use crate::machine::{Board, BuildError, BuiltDevice, DeviceBuilder, DeviceLife, LifeError};

/// Bytes of a virtio sector (virtio 1.2, 5.2.4).
const SECTOR: u64 = 512;
/// The configuration space up to and with the write-zeroes fields (virtio 1.2, 5.2.4): what every backend has.
const CONFIG_LEN: u32 = 60;
const NUM_QUEUES_AT: usize = 34;
/// Descriptors of a queue: enough for 128 KiB requests of 4 KiB segments, many at a time; every backend can do it.
const QUEUE_SIZE: u16 = 256;

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
    /// The kernel does not say which binary is running, so its neighbour cannot be found.
    #[error("cannot find atoll-blk: {0}; mount /proc")]
    Binary(#[source] std::io::Error),
}

/// Takes hold of an image and checks what can be checked without locking or parsing it.
fn open_image(path: &Path, access: ImageAccess) -> Result<ImageHandle, DiskError> {
    let image = ImageHandle::open(path, access)?;
    let size = |source: rustix::io::Errno| DiskError::Size { path: path.to_owned(), source: source.into() };
    let file = image.reopen()?;
    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(size)?;
    match bytes {
        0 => Err(DiskError::Empty { path: path.to_owned() }),
        _ if bytes.is_multiple_of(SECTOR) => Ok(image),
        _ => Err(DiskError::OddSize { path: path.to_owned(), bytes }),
    }
}

/// What makes a disk of a vhost-user device.
struct Disk {
    queues: u16,
}

impl DeviceClass for Disk {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }
    fn config_len(&self) -> u32 {
        CONFIG_LEN
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        let mut config = backend.config.clone();
        let told = if backend.features & BLK_MQ != 0 { num_queues(&config) } else { 1 };
        // A backend may announce more queues in one place than in the other; only what both say is there.
        let queues = self.queues.min(backend.queues).min(told);
        if queues == 0 {
            let what = "VIRTIO_BLK_F_MQ with no queue at all".into();
            return Err(ConversationError::Absurd { step: Step::GetConfig, what });
        }
        if let Some(field) = config.get_mut(NUM_QUEUES_AT..NUM_QUEUES_AT + 2) {
            field.copy_from_slice(&queues.to_le_bytes());
        }
        Ok(DeviceOffer {
            device_type: self.device_type(),
            features: backend.features,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queues)],
            config,
        })
    }
}

fn num_queues(config: &[u8]) -> u16 {
    let field = config.get(NUM_QUEUES_AT..).and_then(|rest| rest.first_chunk::<2>());
    field.map_or(1, |bytes| u16::from_le_bytes(*bytes))
}

/// Makes one disk.
pub struct DiskBuilder {
    config: DiskConfig,
    index: u32,
    spawner: Spawner,
}

impl DiskBuilder {
    /// The disk number `index` of a machine, whose backend process `spawner` starts if it is ours to start.
    pub fn new(config: DiskConfig, index: u32, spawner: Spawner) -> Self {
        Self { config, index, spawner }
    }

    fn source(&self) -> Result<Box<dyn BackendSource>, DiskError> {
        match &self.config.backing {
            Backing::Socket(path) => Ok(Box::new(ExternalSocket::new(path))),
            Backing::Image(path) => {
                let access = if self.config.readonly { ImageAccess::Read } else { ImageAccess::Write };
                let image = open_image(path, access)?;
                let exe = match &self.config.binary {
                    Some(exe) => exe.clone(),
                    None => beside_this_binary("atoll-blk").map_err(DiskError::Binary)?,
                };
                Ok(Box::new(SpawnedBackend {
                    name: self.name(),
                    device: DeviceId(self.index),
                    class: Class::Block,
                    exe,
                    args: self.arguments(),
                    image: Some(image),
                    meter: None,
                    spawner: self.spawner.clone(),
                }))
            }
        }
    }

    fn arguments(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--num-queues".into(), self.config.num_queues.to_string().into()];
        if self.config.readonly {
            args.push("--read-only".into());
        }
        if self.config.direct {
            args.push("--direct".into());
        }
        if let Some(serial) = &self.config.serial {
            args.extend(["--serial".into(), serial.into()]);
        }
        // Tells this device's incarnations from all other users of the image, in this VM and in others.
        let mut number = [0; 4];
        if rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty()).is_ok() {
            // Only readers share an image, so a rare collision costs a wait and nothing else.
            args.extend(["--lock-byte".into(), u32::from_le_bytes(number).to_string().into()]);
        }
        args
    }
}

impl DeviceBuilder for DiskBuilder {
    fn name(&self) -> String {
        format!("disk{}", self.index)
    }

    fn build(self: Box<Self>, board: &mut Board) -> Result<BuiltDevice, BuildError> {
        let name = self.name();
        let shown = match &self.config.backing {
            Backing::Image(path) | Backing::Socket(path) => format!("--disk {}", path.display()),
        };
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| BuildError::new(shown.clone(), source);
        let parts = DeviceParts {
            name: name.clone(),
            class: Box::new(Disk { queues: self.config.num_queues }),
            source: self.source().map_err(|error| failed(error.into()))?,
            memory: board.memory().clone(),
            relay: Arc::clone(board.relay()),
            limits: Limits::default(),
        };
        let connected = VhostDevice::connect(parts).map_err(|error| failed(error.into()))?;
        let offer = connected.offer().clone();
        let vectors = board.vectors(offer.vectors()).map_err(|error| failed(error.into()))?;
        let face = Arc::new(PciFace::default());
        let (device, frontend) =
            connected.attach(Arc::clone(&vectors), Arc::clone(&face) as _).map_err(|error| failed(error.into()))?;
        let bars = board.bar_mapping();
        let (intx, intx_line) = board.next_pin();
        let doorbells = Placements {
            table: Arc::clone(board.doorbells()),
            bells: frontend.doorbells().iter().map(|bell| (Arc::clone(bell), None)).collect(),
        };
        let function = VirtioPci::new(VirtioPciParts {
            offer,
            frontend: Box::new(frontend),
            mapping: Arc::clone(&bars) as _,
            doorbells: Box::new(doorbells),
            routes: vectors,
            intx,
            intx_pin: 1,
            intx_line,
        })
        .map_err(|error| failed(error.into()))?;
        let function = Arc::new(Mutex::new(function));
        // The only one who sets it.
        let _ = face.function.set(Arc::downgrade(&function));
        let shared: SharedFunction = function;
        let place = board.add_pci(shared, &bars).map_err(|error| failed(error.into()))?;
        Ok(BuiltDevice { name, place: Some(place), life: Box::new(DiskLife(device)) })
    }
}

/// The transport, as the device's thread reaches it. Its lock is held by vCPUs in the middle of an access, which never
/// wait for the device's thread there.
#[derive(Default)]
struct PciFace {
    function: OnceLock<Weak<Mutex<VirtioPci>>>,
}

impl PciFace {
    fn with(&self, act: impl FnOnce(&mut VirtioPci)) {
        if let Some(function) = self.function.get().and_then(Weak::upgrade) {
            act(&mut function.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Transport for PciFace {
    fn queue_used(&self, index: u16) {
        self.with(|function| function.signal_queue(index));
    }
    fn needs_reset(&self) {
        self.with(VirtioPci::set_needs_reset);
    }
}

/// Moves the doorbells along with the BAR that they are in.
struct Placements {
    table: Arc<DoorbellTable>,
    bells: Vec<(Arc<Doorbell>, Option<u64>)>,
}

impl NotifyPlacement for Placements {
    fn placed(&mut self, index: u16, address: Option<u64>) {
        let Some((bell, placed)) = self.bells.get_mut(usize::from(index)) else { return };
        if let Some(old) = std::mem::replace(placed, address) {
            self.table.remove(Space::Mmio, old, bell);
        }
        if let Some(new) = address
            && let Err(error) = self.table.insert(Space::Mmio, new, Arc::clone(bell))
        {
            tracing::warn!(%error, "a doorbell costs an exit");
        }
    }
}

struct DiskLife(VhostDevice);

impl DeviceLife for DiskLife {
    fn start(&mut self) -> Result<(), LifeError> {
        Ok(())
    }
    fn stop(&mut self, deadline: Instant) -> Result<(), LifeError> {
        self.0.stop(deadline);
        Ok(())
    }
}
