//! Builds a machine from its configuration, runs it and takes it down again: loops over builders and devices.
//!
//! A reset makes a new board and a new processor around the same guest memory: whatever a device's builder says is said
//! again, so that nothing of the guest's earlier life can be left in a register. Processes that serve devices live on
//! where their device can hand them over ([`DeviceLife::survive`](super::DeviceLife::survive)).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use atoll_devices::pci::DevFn;
use atoll_devices::{PowerEvent, PowerSink};
use rustix::thread::CpuSet;

use super::acpi::{self, AcpiConfig};
use super::boot;
use super::config::{CpuKind, MachineConfig};
use super::end::{MachineError, MachineFigures};
use super::events::{EventSender, MachineEvent};
use super::ground::Ground;
use super::hotplug::Hotplug;
use super::layout;
use super::{Board, BoardParts, BuiltDevice, DeviceBuilder, UnplugEvent};
use crate::actor::{Clock, RealClock, StopSignal};
use crate::cpu::kvm::{KvmConfig, KvmProcessor};
use crate::cpu::soft::{Pace, SoftConfig, SoftProcessor};
use crate::cpu::{ANSWER_BUDGET, CpuError, CpuState, Kicks, Processor, VcpuBus, VcpuEnd, VcpuThread};
use crate::doorbell::Relay;
use crate::iommu::endpoint_id;
use crate::memory::GuestMemory;
use crate::metrics::Registry;

/// How long devices have to stop before they use force.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);

/// Hears the guest's wish for power-off or reset: no vCPU executes another instruction, and the loop is told. So the
/// last state of a deterministic run does not depend on how soon the loop wakes up.
struct PowerSwitch {
    kicks: Kicks,
    events: EventSender,
}

impl PowerSink for PowerSwitch {
    fn power_event(&self, event: PowerEvent) {
        self.kicks.halt_all();
        self.events.power_event(event);
    }
}

/// A built machine.
pub struct Machine {
    pub(super) config: MachineConfig,
    pub(super) board: Board,
    pub(super) devices: Vec<BuiltDevice>,
    pub(super) vcpus: Vec<VcpuThread>,
    pub(super) hotplug: Hotplug,
    /// What each life begins with.
    boot: Arc<boot::BootFiles>,
    kicks: Kicks,
    ended: Arc<Mutex<Vec<VcpuEnd>>>,
    boot_state: Option<CpuState>,
    /// What the vCPUs' threads are to be pinned to.
    pins: Vec<Option<CpuSet>>,
    pub(super) events: EventSender,
    clock: Arc<dyn Clock>,
    pub(super) metrics: Registry,
}

fn processor(config: &MachineConfig, memory: &GuestMemory, wall: u64) -> Result<Arc<dyn Processor>, CpuError> {
    match config.cpu {
        CpuKind::Kvm if config.deterministic.is_some() => {
            Err(CpuError::Unsupported("--deterministic counts instructions, which KVM does not; use --cpu soft".into()))
        }
        CpuKind::Kvm => Ok(Arc::new(KvmProcessor::new(KvmConfig {
            memory: memory.clone(),
            model: config.cpu_model.clone(),
            vcpus: config.vcpus,
            trial: false,
            irqchip: config.irqchip,
        })?)),
        CpuKind::Soft => {
            let pace = config.deterministic.map_or(Pace::Real, |ns_per_1000| Pace::Retired { ns_per_1000 });
            Ok(Arc::new(SoftProcessor::new(SoftConfig {
                ram: memory.cpu_ram(),
                model: config.cpu_model.clone(),
                vcpus: config.vcpus,
                pace,
                wall_base_ns: wall,
            })?))
        }
    }
}

/// UTC now, in nanoseconds; the deterministic mode starts at a fixed date.
fn wall_base_ns(config: &MachineConfig) -> u64 {
    /// 2024-01-01 00:00:00 UTC.
    const DETERMINISTIC_START_S: u64 = 1_704_067_200;
    if config.deterministic.is_some() {
        return DETERMINISTIC_START_S * 1_000_000_000;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What came of a reset.
pub struct Rebuilt {
    /// What the machine did until then.
    pub figures: MachineFigures,
    /// Devices that were on their way out, and are gone.
    pub gone: Vec<String>,
    /// The machine again, not started yet. When it could not be built nothing is left of it.
    pub next: Result<Machine, MachineError>,
}

/// What a reset carries over from one board to the next.
#[derive(Default)]
struct Estate {
    /// Builders of the devices whose processes live on, by name.
    survivors: BTreeMap<String, Box<dyn DeviceBuilder>>,
    /// Where each device was.
    places: BTreeMap<String, DevFn>,
    /// Devices that were to leave: they do.
    gone: Vec<String>,
    /// What the vCPUs' threads were pinned to: users pin them once, and do not hear of resets.
    pins: Vec<Option<CpuSet>>,
    /// What it was booted with.
    boot: Option<Arc<boot::BootFiles>>,
}

impl Machine {
    /// Builds a machine of `builders`, in their order. When one fails, those before it are taken down again.
    ///
    /// # Errors
    /// When anything is missing or does not fit.
    pub fn build(
        config: &MachineConfig,
        builders: Vec<Box<dyn DeviceBuilder>>,
        events: &EventSender,
    ) -> Result<Self, MachineError> {
        Self::build_on(Ground::new(config)?, config, builders, events)
    }

    /// [`build`](Self::build) where the ground is there already, and builders may have been prepared on it.
    ///
    /// # Errors
    /// When anything is missing or does not fit.
    pub fn build_on(
        ground: Ground,
        config: &MachineConfig,
        builders: Vec<Box<dyn DeviceBuilder>>,
        events: &EventSender,
    ) -> Result<Self, MachineError> {
        Self::assemble(config, ground, builders, events, &mut Estate::default())
    }

    /// What a device may be prepared on that is to be plugged in.
    pub fn ground(&self) -> Ground {
        Ground { memory: self.board.memory().clone(), relay: Arc::clone(self.board.relay()) }
    }

    /// A new board on this ground.
    fn assemble(
        config: &MachineConfig,
        ground: Ground,
        builders: Vec<Box<dyn DeviceBuilder>>,
        events: &EventSender,
        estate: &mut Estate,
    ) -> Result<Self, MachineError> {
        let Ground { memory, relay } = ground;
        let ram = layout::ram(config.memory_bytes)?;
        let tables = AcpiConfig {
            vcpus: u8::try_from(config.vcpus).map_err(|_| MachineError::TooManyVcpus(config.vcpus))?,
            com1: config.com1,
        };
        boot::low_memory(memory.mapped());
        let rsdp = acpi::write_tables(tables, None, memory.mapped())?;
        let boot = match estate.boot.take() {
            Some(files) => files,
            None => Arc::new(boot::BootFiles::open(&config.boot)?),
        };
        let boot_state = boot::load(&boot, &config.boot.command_line, memory.mapped(), &ram, rsdp)?;
        let wall_base_ns = wall_base_ns(config);
        let kicks = Kicks::default();
        let board = Board::new(BoardParts {
            processor: processor(config, &memory, wall_base_ns)?,
            memory,
            relay,
            power: Arc::new(PowerSwitch { kicks: kicks.clone(), events: events.clone() }),
            events: events.clone(),
            wall_base_ns,
        });
        let mut machine = Self {
            config: config.clone(),
            board,
            devices: Vec::with_capacity(builders.len()),
            hotplug: Hotplug::default(),
            vcpus: Vec::new(),
            boot,
            kicks,
            ended: Arc::default(),
            boot_state: Some(boot_state),
            pins: std::mem::take(&mut estate.pins),
            events: events.clone(),
            clock: Arc::new(RealClock::new()),
            metrics: Registry::default(),
        };
        for usual in builders {
            let name = usual.name();
            if estate.gone.contains(&name) {
                continue;
            }
            machine.board.use_slot(estate.places.get(&name).map(|place| place.slot()));
            let builder = estate.survivors.remove(&name).unwrap_or(usual);
            let device = builder.build(&mut machine.board)?;
            tracing::debug!(device = name, "built");
            machine.devices.push(device);
        }
        if let Some((place, endpoints)) = machine.board.iommu_topology() {
            // Who is behind the IOMMU is known only now; where the tables begin does not change.
            let topology = acpi::Topology { iommu: endpoint_id(place), endpoints };
            acpi::write_tables(tables, Some(&topology), machine.board.memory().mapped())?;
        }
        Ok(machine)
    }

    /// The board.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Has the vCPUs counted in `metrics`, from [`start`](Self::start) on. Without it nobody reads what they count.
    pub fn count_in(&mut self, metrics: &Registry) {
        self.metrics = metrics.clone();
    }

    /// Starts devices, then vCPUs.
    ///
    /// # Errors
    /// When one does not start; what has started is stopped when the machine is dropped.
    pub fn start(&mut self) -> Result<(), MachineError> {
        for device in &mut self.devices {
            device.life.start()?;
        }
        for index in 0..self.config.vcpus {
            let bus = VcpuBus {
                vcpu: index,
                space: Arc::clone(self.board.space()),
                stop: StopSignal::new(),
                stalls: Arc::new(self.events.clone()),
                clock: Arc::clone(&self.clock),
                budget: ANSWER_BUDGET,
                counters: self.metrics.vcpu(index),
            };
            let state = if index == 0 { self.boot_state.take() } else { None };
            let (ended, events) = (Arc::clone(&self.ended), self.events.clone());
            let report = move |end: VcpuEnd| {
                let exit = MachineEvent::VcpuEnded(end.clone());
                ended.lock().unwrap_or_else(PoisonError::into_inner).push(end);
                events.tell(exit);
            };
            let processor = Arc::clone(self.board.processor());
            let vcpu = VcpuThread::spawn(processor, index, state, bus, &self.kicks, report)?;
            if let Some(Some(processors)) = self.pins.get(index as usize) {
                vcpu.pin(processors);
            }
            self.vcpus.push(vcpu);
        }
        Ok(())
    }

    /// Ends the vCPUs' threads; what they have done.
    fn stop_vcpus(&mut self) -> MachineFigures {
        for vcpu in &mut self.vcpus {
            vcpu.stop();
        }
        self.vcpus.clear();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        MachineFigures {
            cpu: self.board.processor().name(),
            instructions: ended.iter().map(|end| end.figures.instructions).sum(),
            busy_ns: ended.iter().map(|end| end.busy_ns).sum(),
            cache_bytes: ended.iter().map(|end| end.figures.cache_bytes).sum(),
            trace_hash: ended.iter().find(|end| end.index == 0).and_then(|end| end.figures.trace_hash),
        }
    }

    /// Stops vCPUs, then devices in reverse order; errors are logged and do not keep the others from stopping.
    pub fn stop(&mut self) -> MachineFigures {
        let figures = self.stop_vcpus();
        self.finish_unplugs();
        let deadline = Instant::now() + STOP_TIME_MAX;
        while let Some(mut device) = self.devices.pop() {
            if let Err(error) = device.life.stop(deadline) {
                tracing::error!(device = device.name, %error, "a device did not stop cleanly");
            }
        }
        figures
    }

    /// Whether [`reset`](Self::reset) would find what the machine was booted with: asked before anything is stopped.
    ///
    /// # Errors
    /// When it would not.
    pub fn can_reset(&self) -> Result<(), MachineError> {
        Ok(self.boot.check()?)
    }

    /// Presses the reset button: this machine ends, and the next one starts from the same memory, with the same device
    /// processes where they can be handed over, every device in the place where it was. RAM keeps what the guest has
    /// left in it, as on a real board, but for what firmware would write anew. `builders` are the usual ones of all
    /// devices that the machine has now, by the names that it knows; `events` hears what the next one says.
    ///
    /// A device that was to leave leaves now.
    pub fn reset(mut self, builders: Vec<Box<dyn DeviceBuilder>>, events: &EventSender) -> Rebuilt {
        let pins = self.vcpus.iter().map(VcpuThread::pinning).collect();
        let figures = self.stop_vcpus();
        let deadline = Instant::now() + STOP_TIME_MAX;
        let mut estate = Estate { pins, boot: Some(Arc::clone(&self.boot)), ..Estate::default() };
        let gone = |event| match event {
            UnplugEvent::Gone { name, .. } => Some(name),
            UnplugEvent::Late { .. } => None,
        };
        estate.gone.extend(self.finish_unplugs().into_iter().filter_map(gone));
        while let Some(mut device) = self.devices.pop() {
            if self.is_leaving(&device.name) {
                if let Err(error) = device.life.stop(deadline) {
                    tracing::error!(device = device.name, %error, "a device did not stop cleanly");
                }
                estate.gone.push(device.name);
                continue;
            }
            if let Some(place) = device.place {
                estate.places.insert(device.name.clone(), place);
            }
            if let Some(builder) = device.life.survive(deadline) {
                estate.survivors.insert(device.name, builder);
            }
        }
        let (config, memory) = (self.config.clone(), self.board.memory().clone());
        // Before the next one: two machines of KVM, and two boards' threads, are never there at once.
        drop(self);
        let next = Relay::new()
            .map_err(MachineError::from)
            .and_then(|relay| Self::assemble(&config, Ground { memory, relay }, builders, events, &mut estate));
        Rebuilt { figures, gone: estate.gone, next }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}
