//! From a configuration to the builder of a device: the one place that knows all kinds.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use atoll_protocol::DeviceId;
use thiserror::Error;

use super::builder::VhostBuilder;
use super::kinds::{
    Console, ConsoleError, ConsoleLine, Disk, Fs, Generic, Host, Kind, Net, NetError, Rng, TAG_BYTES, Vsock,
};
use crate::backend::Household;
use crate::config::{ConfigError, DeviceConfig, DeviceKind};
use crate::lifecycle::Story;
use crate::machine::DeviceBuilder;

/// Numbers below are those of devices that the board always has.
const FIRST_NUMBER: u32 = 0x1_0000;
/// Most queues of a disk or a shared folder.
const QUEUES_MAX: u16 = 64;
/// Most queues of any device: ring numbers are one byte in the protocol's messages with a descriptor.
const RINGS_MAX: usize = 256;
/// Most entries of a split virtqueue (virtio 1.2, 2.7).
const SIZE_MAX: u16 = 1 << 15;

/// What all devices of a VMM are made with.
pub struct FactoryParts {
    /// Who starts and watches processes.
    pub household: Arc<Household>,
    /// Where the device processes' executables are, if not beside the VMM's.
    pub backend_dir: Option<PathBuf>,
    /// The user's run-time folder: the sockets of switches are there.
    pub runtime_dir: PathBuf,
    /// Name of the virtual machine: what is made up for a device is the same each time.
    pub vm: String,
    /// Where deaths and returns of device processes are told.
    pub story: Story,
}

/// Makes builders of devices that are processes of their own.
pub struct DeviceFactory {
    parts: FactoryParts,
    numbers: AtomicU32,
    /// How many devices of each kind were given a name here.
    named: Mutex<BTreeMap<DeviceKind, u32>>,
    console: ConsoleLine,
}

/// A device that cannot be made from its configuration alone.
#[derive(Debug, Error)]
pub enum FactoryError {
    /// It contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A network card.
    #[error("net {id}: {source}")]
    Net {
        /// Which.
        id: String,
        /// What is wrong with it.
        #[source]
        source: NetError,
    },
    /// The console.
    #[error("console: {0}")]
    Console(#[from] ConsoleError),
    /// Something else.
    #[error("{kind} {id}: {what}")]
    Device {
        /// What it is.
        kind: &'static str,
        /// Which.
        id: String,
        /// What is wrong with it, and the remedy.
        what: String,
    },
    /// Something that is not there, by name.
    #[error("{kind} {id}: {what}")]
    Unsupported {
        /// What the device is.
        kind: &'static str,
        /// Which.
        id: String,
        /// What is not there, and the remedy.
        what: &'static str,
    },
}

impl FactoryError {
    /// Whether it is not the configuration that is wrong, but something that is not there.
    pub fn is_unsupported(&self) -> bool {
        match self {
            Self::Unsupported { .. } | Self::Config(ConfigError::Unsupported(_)) => true,
            Self::Console(error) => matches!(error, ConsoleError::Unsupported(_)),
            Self::Net { source, .. } => matches!(source, NetError::User),
            Self::Config(_) | Self::Device { .. } => false,
        }
    }
}

impl DeviceFactory {
    /// A factory for one virtual machine.
    pub fn new(parts: FactoryParts) -> Self {
        Self { parts, numbers: AtomicU32::new(FIRST_NUMBER), named: Mutex::default(), console: ConsoleLine::default() }
    }

    /// The name that a device has, or gets: `_disk0` for the first disk without one.
    fn name(&self, config: &DeviceConfig) -> String {
        let made_up = || {
            let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
            let count = named.entry(config.kind()).or_default();
            *count += 1;
            format!("_{}{}", config.kind().name(), *count - 1)
        };
        config.id().map_or_else(made_up, str::to_owned)
    }

    /// The builder of a device. Nothing is opened or started before it builds.
    ///
    /// # Errors
    /// When the configuration is wrong in itself, or asks for what is not there.
    pub fn builder(&self, config: &DeviceConfig) -> Result<Box<dyn DeviceBuilder>, FactoryError> {
        config.check()?;
        let id = self.name(config);
        let kind = config.kind();
        let wrong = |what: String| FactoryError::Device { kind: kind.name(), id: id.clone(), what };
        let sized = |size: Option<u16>| match size {
            Some(size) if !size.is_power_of_two() || size > SIZE_MAX => {
                Err(wrong(format!("a queue of {size} is not possible: give a power of two up to {SIZE_MAX}")))
            }
            _ => Ok(()),
        };
        let counted = |queues: Option<u16>| match queues {
            Some(queues) if !(1..=QUEUES_MAX).contains(&queues) => {
                Err(wrong(format!("num_queues={queues} is not a number from 1 to {QUEUES_MAX}")))
            }
            _ => Ok(()),
        };
        let device: Box<dyn Kind> = match config {
            DeviceConfig::Disk(disk) => {
                counted(disk.num_queues)?;
                sized(disk.queue_size)?;
                Box::new(Disk(disk.clone()))
            }
            DeviceConfig::Net(net) => {
                sized(net.queue_size)?;
                let made = Net::new(net, &self.parts.vm, &id, &self.parts.runtime_dir);
                Box::new(made.map_err(|source| FactoryError::Net { id: id.clone(), source })?)
            }
            DeviceConfig::Fs(fs) => {
                counted(fs.num_queues)?;
                sized(fs.queue_size)?;
                if !(1..=TAG_BYTES).contains(&fs.tag.len()) || fs.tag.contains('\0') {
                    return Err(wrong(format!("tag={} must have 1 to {TAG_BYTES} bytes", fs.tag)));
                }
                Box::new(Fs(fs.clone()))
            }
            DeviceConfig::Vsock(vsock) if !vsock.vhost_user => {
                let what =
                    "a vsock without vhost_user=true is not supported: run vhost-device-vsock and name its socket";
                return Err(FactoryError::Unsupported { kind: kind.name(), id, what });
            }
            DeviceConfig::Vsock(vsock) => Box::new(Vsock(vsock.clone())),
            DeviceConfig::Rng(rng) => Box::new(Rng(rng.clone())),
            DeviceConfig::Console(config) => {
                Console::check(config)?;
                Box::new(Console { config: config.clone(), line: self.console.clone() })
            }
            DeviceConfig::Generic(device) => {
                let device_type = u16::try_from(device.device_type).ok().filter(|number| (1..=63).contains(number));
                let device_type = device_type.ok_or_else(|| {
                    wrong(format!("device_type={} is no virtio device type: give 1 to 63", device.device_type))
                })?;
                if device.queue_sizes.len() > RINGS_MAX {
                    return Err(wrong(format!(
                        "{} queues are too many: {RINGS_MAX} are possible",
                        device.queue_sizes.len()
                    )));
                }
                device.queue_sizes.iter().try_for_each(|size| sized(Some(*size)))?;
                Box::new(Generic { config: device.clone(), device_type })
            }
        };
        let host = Host {
            spawner: self.parts.household.spawner().clone(),
            backend_dir: self.parts.backend_dir.clone(),
            number: DeviceId(self.numbers.fetch_add(1, Ordering::Relaxed)),
            name: id,
            meter: None,
        };
        let (story, registry) = (self.parts.story.clone(), self.parts.household.metrics().clone());
        Ok(Box::new(VhostBuilder { kind, device, host, story, registry }))
    }

    /// The pseudo-terminal of the console, once a machine with one was built.
    pub fn console_terminal(&self) -> Option<PathBuf> {
        self.console.terminal()
    }
}
