//! From a configuration to the builder of a device: the one place that knows all kinds.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use atoll_protocol::DeviceId;
use thiserror::Error;

use super::builder::{Described, VhostBuilder};
use super::device::Connected;
use super::kinds::{
    Console, ConsoleError, ConsoleLine, Disk, Fs, Generic, Gpu, Host, Input, Kind, Net, NetError, Rng, Vsock,
};
use super::parts::Care;
use super::patience::Ending;
use crate::backend::{Household, PolicyConfig};
use crate::config::{ConfigError, DeviceConfig, DeviceKind};
use crate::doorbell::Relay;
use crate::irq::InterruptFabric;
use crate::lifecycle::Story;
use crate::machine::{DeviceBuilder, Ground};
use crate::memory::GuestMemory;
use crate::screen::Joint;
use crate::vfio::{SharedSpace, Surroundings, VfioBuilder};
use crate::vfio_user::{Bare, Described as UserDescribed, Served, UserBuilder};

/// Numbers below are those of devices that the board always has.
const FIRST_NUMBER: u32 = 0x1_0000;
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
    debugged: Vec<String>,
    /// What functions of the host reach.
    dma: SharedSpace,
    /// Where GPU, display and input devices meet.
    joint: Arc<Joint>,
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
    /// It is asked for queues, which a function of the host has none of here.
    #[error("{id} is a function of the host, not a process: its queues are its own")]
    NoProcess {
        /// Which device.
        id: String,
    },
    /// A number that no PCI function can have.
    #[error("generic {id}: device_type={device_type} is no virtio device type: give 1 to 63")]
    DeviceType {
        /// Which device.
        id: String,
        /// The number.
        device_type: u32,
    },
}

impl FactoryError {
    /// Whether it is not the configuration that is wrong, but something that is not there.
    pub fn is_unsupported(&self) -> bool {
        match self {
            Self::Config(ConfigError::Unsupported(_)) => true,
            Self::Console(error) => matches!(error, ConsoleError::Unsupported(_)),
            Self::Net { .. } | Self::Config(_) | Self::NoProcess { .. } | Self::DeviceType { .. } => false,
        }
    }
}

impl DeviceFactory {
    /// A factory for one virtual machine.
    pub fn new(parts: FactoryParts) -> Self {
        let (named, console, debugged) = (Mutex::default(), ConsoleLine::default(), Vec::new());
        let (dma, joint) = (SharedSpace::default(), Arc::default());
        Self { parts, numbers: AtomicU32::new(FIRST_NUMBER), named, console, debugged, dma, joint }
    }

    /// Where GPU, display and input devices meet.
    #[must_use]
    pub fn joint(&self) -> &Arc<Joint> {
        &self.joint
    }

    /// Somebody debugs the processes of the devices of these names.
    #[must_use]
    pub fn debugging(mut self, names: Vec<String>) -> Self {
        self.debugged = names;
        self
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

    /// The builder of a device. Nothing is opened or started before it is prepared or builds.
    ///
    /// # Errors
    /// When the configuration is wrong in itself, or asks for what is not there.
    pub fn builder(&self, config: &DeviceConfig) -> Result<Box<dyn DeviceBuilder>, FactoryError> {
        if let DeviceConfig::Passthrough(function) = config {
            config.check()?;
            let name = self.name(config);
            let bdf = function.bdf().ok_or_else(|| FactoryError::NoProcess { id: name.clone() })?;
            let surroundings = Surroundings {
                shared: self.dma.clone(),
                story: self.parts.story.clone(),
                registry: self.parts.household.metrics().clone(),
            };
            return Ok(Box::new(VfioBuilder::new(name, bdf, function, surroundings)));
        }
        match self.user(config)? {
            Some(described) => Ok(Box::new(UserBuilder::new(described))),
            None => Ok(Box::new(VhostBuilder::new(self.described(config)?))),
        }
    }

    /// A device that is served over vfio-user, if this is one.
    fn user(&self, config: &DeviceConfig) -> Result<Option<UserDescribed>, FactoryError> {
        let served = match config {
            DeviceConfig::Nvme(nvme) => Served::Nvme(nvme.clone()),
            DeviceConfig::User(device) => Served::Foreign(device.clone()),
            _ => return Ok(None),
        };
        config.check()?;
        let name = self.name(config);
        Ok(Some(UserDescribed {
            number: self.number(),
            served,
            care: self.care(config, &name),
            on_failure: config.on_failure(),
            spawner: self.parts.household.spawner().clone(),
            backend_dir: self.parts.backend_dir.clone(),
            story: self.parts.story.clone(),
            registry: self.parts.household.metrics().clone(),
            name,
        }))
    }

    fn number(&self) -> DeviceId {
        DeviceId(self.numbers.fetch_add(1, Ordering::Relaxed))
    }

    /// What the user says of a device's deaths and stalls.
    fn care(&self, config: &DeviceConfig, name: &str) -> Care {
        let policy = PolicyConfig { start_attempts: config.start_attempts(), ..PolicyConfig::default() };
        let debugged = self.debugged.iter().any(|debugged| debugged == name);
        Care { stall: config.stall_timeout(), debugged, policy, standby: config.standby() }
    }

    /// A device with its first backend and without a board: for who drives its queues without a guest, as campaigns of
    /// faults do. Everything else is as on a board.
    ///
    /// # Errors
    /// When the configuration is wrong in itself or asks for what is not there, or there is no backend.
    pub fn connect(
        &self,
        config: &DeviceConfig,
        memory: GuestMemory,
        relay: Arc<Relay>,
    ) -> Result<Connected, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.described(config)?.connect(&Ground { memory, relay }, Ending::default())?)
    }

    /// The same for a device that is served over vfio-user, its vectors connected to `fabric`.
    ///
    /// # Errors
    /// As [`Self::connect`]; also for a device that is not served over vfio-user.
    pub fn connect_function(
        &self,
        config: &DeviceConfig,
        ground: &Ground,
        fabric: &dyn InterruptFabric,
    ) -> Result<Bare, Box<dyn std::error::Error + Send + Sync>> {
        let described = self.user(config)?.ok_or("it is not served over vfio-user")?;
        described.bare(ground, fabric)
    }

    fn described(&self, config: &DeviceConfig) -> Result<Described, FactoryError> {
        config.check()?;
        let id = self.name(config);
        let kind = config.kind();
        let device: Box<dyn Kind> = match config {
            DeviceConfig::Disk(disk) => Box::new(Disk(disk.clone())),
            DeviceConfig::Net(net) => {
                let made = Net::new(net, &self.parts.vm, &id, &self.parts.runtime_dir);
                Box::new(made.map_err(|source| FactoryError::Net { id: id.clone(), source })?)
            }
            DeviceConfig::Fs(fs) => Box::new(Fs(fs.clone())),
            DeviceConfig::Vsock(vsock) => Box::new(Vsock(vsock.clone())),
            DeviceConfig::Rng(rng) => Box::new(Rng(rng.clone())),
            DeviceConfig::Gpu(gpu) => Box::new(Gpu { config: gpu.clone(), joint: Arc::clone(&self.joint) }),
            DeviceConfig::Input(input) => Box::new(Input { config: input.clone(), joint: Arc::clone(&self.joint) }),
            DeviceConfig::Console(config) => {
                Console::check(config)?;
                Box::new(Console { config: config.clone(), line: self.console.clone() })
            }
            DeviceConfig::Passthrough(_) | DeviceConfig::Nvme(_) | DeviceConfig::User(_) => {
                return Err(FactoryError::NoProcess { id });
            }
            DeviceConfig::Generic(device) => {
                let device_type = u16::try_from(device.device_type).ok().filter(|number| (1..=63).contains(number));
                let device_type = device_type
                    .ok_or_else(|| FactoryError::DeviceType { id: id.clone(), device_type: device.device_type })?;
                Box::new(Generic { config: device.clone(), device_type })
            }
        };
        let host = Host {
            spawner: self.parts.household.spawner().clone(),
            backend_dir: self.parts.backend_dir.clone(),
            number: self.number(),
            name: id,
            meter: None,
            lone: device.lone(),
        };
        let (story, registry) = (self.parts.story.clone(), self.parts.household.metrics().clone());
        let (on_failure, track) = (config.on_failure(), config.track());
        let care = self.care(config, &host.name);
        let (iommu, isolation) = (config.iommu(), config.isolation());
        Ok(Described { kind, device, host, story, registry, on_failure, track, care, iommu, isolation })
    }

    /// A guest begins to print on the console.
    pub fn begin_console(&self) {
        self.console.begin();
    }
    /// The pseudo-terminal of the console, once a machine with one was built.
    pub fn console_terminal(&self) -> Option<PathBuf> {
        self.console.terminal()
    }
}
