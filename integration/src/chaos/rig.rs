//! A device as a machine has it, with no guest in front: the shipped front end and restart policy, the backend's process,
//! guest memory and rings that a load drives by itself.

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
use atoll_vmm::machine::layout::ram;
use atoll_vmm::memory::GuestMemory;
use atoll_vmm::vhost::{DeviceFactory, DeviceStatus, FactoryParts, Transport, VhostDevice, VhostFrontend};
use vmm_sys_util::eventfd::EventFd;

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
        let connected = self
            .factory
            .connect(config, memory.clone(), Arc::clone(&self.relay))
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        let offer = connected.offer().clone();
        let vectors = Arc::new(VectorTable::new(&Nobody, offer.vectors())?);
        let told = Arc::<Told>::default();
        let (device, frontend) = connected.attach(Arc::clone(&vectors), Arc::clone(&told) as _)?;
        Ok(Rig { device: Arc::new(device), frontend, vectors, told, memory, offer })
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.household.shutdown(Duration::from_secs(2));
    }
}

/// One device.
pub struct Rig {
    device: Arc<VhostDevice>,
    frontend: VhostFrontend,
    vectors: Arc<VectorTable>,
    told: Arc<Told>,
    memory: GuestMemory,
    offer: DeviceOffer,
}

impl Rig {
    /// What the device is at.
    pub fn status(&self) -> DeviceStatus {
        self.device.status()
    }

    /// Backends lost so far, as a load may ask at any time.
    pub fn lost(&self) -> u64 {
        self.device.status().lost
    }

    /// How often the driver was told that only a reset helps.
    pub fn needs_reset(&self) -> u64 {
        self.told.needs_reset.load(Ordering::Relaxed)
    }

    /// The device itself.
    pub fn device(&self) -> &VhostDevice {
        &self.device
    }

    /// Queues that the device offers.
    pub fn queues(&self) -> u16 {
        u16::try_from(self.offer.queue_sizes.len()).unwrap_or(u16::MAX)
    }

    /// Lays out rings and has the device take them, as a driver does at DRIVER_OK. Bits in `options.without` are not
    /// accepted.
    pub fn start(&mut self, options: Options) -> Result<Driver> {
        let features = self.offer.features & !options.without;
        let guest = Guest::over(self.memory.file().try_clone()?, usize::try_from(self.memory.size())?)?;
        let (queues, size) = (options.queues, options.size);
        ensure!(queues <= self.queues(), "the device offers {} queues", self.queues());
        let mut driver = Driver::over(guest, options, features & EVENT_IDX != 0)?;
        let mut configs = Vec::new();
        for index in 0..queues {
            let bell = self.frontend.doorbells().get(usize::from(index)).context("a doorbell")?;
            let (queue, _) = driver.queue(usize::from(index))?;
            queue.kick = bell.backend_event().try_clone()?;
            queue.call = self.vectors.eventfd(index)?;
            configs.push(QueueConfig {
                index,
                size,
                descriptor_table: queue.desc,
                available_ring: queue.avail,
                used_ring: queue.used,
                vector: Some(index),
            });
        }
        let config_vector = Some(self.queues());
        self.ask(Intent::Activate { features, queues: configs, config_vector })?;
        Ok(driver)
    }

    /// The driver resets the device; afterwards nothing touches guest memory.
    pub fn reset(&mut self) -> Result<()> {
        self.ask(Intent::Reset)
    }

    /// The driver begins to reset the device; the answer says when it is done.
    pub fn begin_reset(&mut self) -> Answer {
        self.frontend.intent(Intent::Reset)
    }

    /// The driver begins to write the configuration space; the answer says when it is done.
    pub fn begin_write_config(&mut self, offset: u32, data: &[u8]) -> Answer {
        self.frontend.intent(Intent::ConfigWrite { offset, data: data.to_vec() })
    }

    fn ask(&mut self, intent: Intent) -> Result<()> {
        let answer = self.frontend.intent(intent);
        await_answer(answer)
    }

    /// Counts the backends that are lost. It does not keep the device.
    pub fn deaths(&self) -> Box<dyn FnMut() -> u64> {
        let (device, mut lost) = (Arc::downgrade(&self.device), 0);
        Box::new(move || {
            lost = device.upgrade().map_or(lost, |device| device.status().lost);
            lost
        })
    }
}

/// Waits as a vCPU does.
pub fn await_answer(answer: Answer) -> Result<()> {
    let Answer::Later(mut deferred) = answer else { return Ok(()) };
    let deadline = Instant::now() + ANSWER_MAX;
    while Instant::now() < deadline {
        if let Poll::Ready(value) = Pin::new(&mut deferred).poll(&mut Polling::from_waker(Waker::noop())) {
            ensure!(value.is_some(), "the device did not answer its driver");
            return Ok(());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    bail!("the device keeps its driver waiting for more than {ANSWER_MAX:?}")
}
