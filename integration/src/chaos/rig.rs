//! A device as a machine has it, with no guest in front: the shipped front end and restart policy, the backend's process,
//! guest memory and queues that a load drives by itself.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as Polling, Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use atoll_devices::virtio::{DeviceOffer, Intent, QueueConfig, VirtioFrontend};
use atoll_devices::{Answer, MsiMessage, MsiSink, WireSink};
use atoll_kit::driver::{Driver, Guest, Options};
use atoll_vmm::actor::RealClock;
use atoll_vmm::backend::Household;
use atoll_vmm::config::DeviceConfig;
use atoll_vmm::doorbell::Relay;
use atoll_vmm::irq::{EventRoute, InterruptFabric, IrqError, VectorTable};
use atoll_vmm::lifecycle::Story;
use atoll_vmm::machine::Ground;
use atoll_vmm::machine::layout::ram;
use atoll_vmm::memory::GuestMemory;
use atoll_vmm::vfio_user::Bare;
use atoll_vmm::vhost::{DeviceFactory, DeviceStatus, FactoryParts, Transport, VhostDevice, VhostFrontend};
use vmm_sys_util::eventfd::EventFd;

use super::nvme;
use crate::verify::disk_queues::DiskQueues;

/// How long a register write of a guest may wait for its device.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// VIRTIO_RING_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;

/// Nobody: interrupts stay counted in their eventfds, where the load finds them.
struct Nobody;

impl WireSink for Nobody {
    fn set_level(&self, _line: u32, _high: bool) {}
}
impl MsiSink for Nobody {
    fn fire(&self, _message: MsiMessage) {}
}
impl InterruptFabric for Nobody {
    fn connect(&self, _event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError> {
        Ok(Box::new(Self))
    }
}
impl EventRoute for Nobody {
    fn set(&self, _message: Option<MsiMessage>) -> Result<(), IrqError> {
        Ok(())
    }
}

/// What the front end tells its transport.
#[derive(Default)]
struct Told {
    needs_reset: AtomicU64,
}

impl Transport for Told {
    fn queue_used(&self, _index: u16) {}
    fn config_changed(&self, _config: &[u8]) {}
    fn needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::Relaxed);
    }
}

/// Devices of one campaign share the processes' parent.
pub struct House {
    household: Arc<Household>,
    factory: DeviceFactory,
    relay: Arc<Relay>,
}

impl House {
    /// With the backends' programs in `programs`.
    pub fn new(programs: &Path) -> Result<Self> {
        let household = Arc::new(Household::new(Arc::new(RealClock::new()))?);
        let factory = DeviceFactory::new(FactoryParts {
            household: Arc::clone(&household),
            backend_dir: Some(programs.to_owned()),
            runtime_dir: programs.to_owned(),
            vm: "chaos".into(),
            story: Story::default(),
        });
        Ok(Self { household, factory, relay: Relay::new()? })
    }

    /// A device with its first backend, in front of `bytes` of guest memory (a multiple of 1 MiB, at least 16).
    pub fn device(&self, config: &DeviceConfig, bytes: u64) -> Result<Rig> {
        let memory = GuestMemory::new(&ram(bytes)?)?;
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| anyhow::anyhow!("{error}");
        let front = if matches!(config, DeviceConfig::Nvme(_)) {
            let ground = Ground { memory: memory.clone(), relay: Arc::clone(&self.relay) };
            Front::Function(self.factory.connect_function(config, &ground, &Nobody).map_err(failed)?)
        } else {
            let connected = self.factory.connect(config, memory.clone(), Arc::clone(&self.relay)).map_err(failed)?;
            let offer = connected.offer().clone();
            let vectors = Arc::new(VectorTable::new(&Nobody, offer.vectors())?);
            let told = Arc::<Told>::default();
            let (device, frontend) = connected.attach(Arc::clone(&vectors), Arc::clone(&told) as _)?;
            Front::Rings(Box::new(Rings { device: Arc::new(device), frontend, vectors, told, offer }))
        };
        Ok(Rig { front, memory })
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.household.shutdown(Duration::from_secs(2));
    }
}

/// A virtio device.
struct Rings {
    device: Arc<VhostDevice>,
    frontend: VhostFrontend,
    vectors: Arc<VectorTable>,
    told: Arc<Told>,
    offer: DeviceOffer,
}

/// How a guest reaches its device.
enum Front {
    /// By the intents of a virtio transport.
    Rings(Box<Rings>),
    /// By the registers of a PCI function: an NVMe controller.
    Function(Bare),
}

/// One device.
pub struct Rig {
    front: Front,
    memory: GuestMemory,
}

impl Rig {
    /// What the device is at.
    pub fn status(&self) -> DeviceStatus {
        match &self.front {
            Front::Rings(rings) => rings.device.status(),
            Front::Function(bare) => bare.status(),
        }
    }

    /// Backends lost so far, as a load may ask at any time.
    pub fn lost(&self) -> u64 {
        self.status().lost
    }

    /// How often the driver was told that only a reset helps; nobody tells that to a driver of registers.
    pub fn needs_reset(&self) -> u64 {
        match &self.front {
            Front::Rings(rings) => rings.told.needs_reset.load(Ordering::Relaxed),
            Front::Function(_) => 0,
        }
    }

    fn rings(&self) -> Result<&Rings> {
        match &self.front {
            Front::Rings(rings) => Ok(rings),
            Front::Function(_) => bail!("it has no rings"),
        }
    }

    fn rings_mut(&mut self) -> Result<&mut Rings> {
        match &mut self.front {
            Front::Rings(rings) => Ok(rings),
            Front::Function(_) => bail!("it has no rings"),
        }
    }

    /// The device itself, if it is a virtio device.
    pub fn device(&self) -> Result<&VhostDevice> {
        Ok(&self.rings()?.device)
    }

    fn guest(&self) -> Result<Guest> {
        Guest::over(self.memory.file().try_clone()?, usize::try_from(self.memory.size())?)
    }

    /// Lays out rings and has the device take them, as a driver does at DRIVER_OK. Bits in `options.without` are not
    /// accepted.
    pub fn start(&mut self, options: Options) -> Result<Driver> {
        let guest = self.guest()?;
        let rings = self.rings_mut()?;
        let features = rings.offer.features & !options.without;
        let (queues, size) = (options.queues, options.size);
        let offered = rings.offer.queue_sizes.len();
        ensure!(usize::from(queues) <= offered, "the device offers {offered} queues");
        let mut driver = Driver::over(guest, options, features & EVENT_IDX != 0)?;
        let mut configs = Vec::new();
        for index in 0..queues {
            let bell = rings.frontend.doorbells().get(usize::from(index)).context("a doorbell")?;
            let (queue, _) = driver.queue(usize::from(index))?;
            queue.kick = bell.backend_event().try_clone()?;
            queue.call = rings.vectors.eventfd(index)?;
            configs.push(QueueConfig {
                index,
                size,
                descriptor_table: queue.desc,
                available_ring: queue.avail,
                used_ring: queue.used,
                vector: Some(index),
            });
        }
        let config_vector = Some(u16::try_from(offered)?);
        await_answer(rings.frontend.intent(Intent::Activate { features, queues: configs, config_vector }))?;
        Ok(driver)
    }

    /// Starts a disk, whatever its queues are.
    pub fn start_disk(&mut self, options: Options) -> Result<Box<dyn DiskQueues>> {
        match &self.front {
            Front::Rings(_) => Ok(Box::new(self.start(options)?)),
            Front::Function(bare) => Ok(Box::new(nvme::start(bare, self.guest()?, &options)?)),
        }
    }

    /// The driver resets the device; afterwards nothing touches guest memory.
    pub fn reset(&mut self) -> Result<()> {
        await_answer(self.begin_reset()?)
    }

    /// The driver begins to reset the device; the answer says when it is done, or for a controller when it knows.
    pub fn begin_reset(&mut self) -> Result<Answer> {
        match &mut self.front {
            Front::Rings(rings) => Ok(rings.frontend.intent(Intent::Reset)),
            Front::Function(bare) => nvme::begin_reset(bare),
        }
    }

    /// The driver begins to write the configuration space; the answer says when it is done. None without one.
    pub fn begin_write_config(&mut self, offset: u32, data: &[u8]) -> Option<Answer> {
        let rings = self.rings_mut().ok()?;
        Some(rings.frontend.intent(Intent::ConfigWrite { offset, data: data.to_vec() }))
    }

    /// Counts the backends that are lost. It does not keep the device.
    pub fn deaths(&self) -> Box<dyn FnMut() -> u64> {
        let mut known = 0;
        match &self.front {
            Front::Rings(rings) => {
                let device = Arc::downgrade(&rings.device);
                Box::new(move || {
                    known = device.upgrade().map_or(known, |device| device.status().lost);
                    known
                })
            }
            Front::Function(bare) => {
                let watch = bare.watch();
                Box::new(move || {
                    known = watch.status().map_or(known, |status| status.lost);
                    known
                })
            }
        }
    }
}

/// Waits as a vCPU does.
pub fn await_answer(answer: Answer) -> Result<()> {
    answered(answer).map(drop)
}

/// Waits as a vCPU does, for what is read; none of what was answered at once.
pub fn answered(answer: Answer) -> Result<Option<u64>> {
    let Answer::Later(mut deferred) = answer else { return Ok(None) };
    let deadline = Instant::now() + ANSWER_MAX;
    while Instant::now() < deadline {
        if let Poll::Ready(value) = Pin::new(&mut deferred).poll(&mut Polling::from_waker(Waker::noop())) {
            ensure!(value.is_some(), "the device did not answer its driver");
            return Ok(value);
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    bail!("the device keeps its driver waiting for more than {ANSWER_MAX:?}")
}
