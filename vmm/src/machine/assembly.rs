//! Builds a machine from its configuration, runs it and takes it down again: loops over builders and devices.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use atoll_devices::{PowerEvent, PowerSink};
use thiserror::Error;

use super::acpi::{self, AcpiConfig};
use super::boot::{self, BootError};
use super::config::{CpuKind, MachineConfig, SerialMode};
use super::events::{EventReceiver, EventSender, MachineEvent, StopCause};
use super::hotplug::Hotplug;
use super::layout::{self, MemorySizeError};
use super::{Board, BoardParts, BuildError, BuiltDevice, DeviceBuilder, LifeError};
use crate::actor::{Clock, RealClock, StopSignal};
use crate::cpu::kvm::{KvmConfig, KvmProcessor};
use crate::cpu::soft::{Pace, SoftConfig, SoftProcessor};
use crate::cpu::{ANSWER_BUDGET, CpuError, Exit, Kicks, Processor, VcpuBus, VcpuEnd, VcpuThread};
use crate::doorbell::{Relay, RelayError};
use crate::memory::{GuestMemory, MemoryError};

/// How long devices have to stop before they use force.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);

/// Why a machine could not be built or started.
#[derive(Debug, Error)]
pub enum MachineError {
    /// Absurd amount of memory.
    #[error(transparent)]
    MemorySize(#[from] MemorySizeError),
    /// More vCPUs than the board has APIC ids.
    #[error("--cpus boot={0} is more than board {BOARD} can hold; the most is 255", BOARD = layout::BOARD)]
    TooManyVcpus(u32),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Nothing to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No CPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// No relay for doorbells.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// No device.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A device did not start.
    #[error(transparent)]
    Life(#[from] LifeError),
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEnd {
    /// The guest switched it off.
    PowerOff,
    /// The guest wants to start again.
    Reset,
    /// Somebody outside wanted it.
    Stopped(StopCause),
    /// The guest cannot go on; the text says why.
    Failed(String),
}

/// What a machine has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineFigures {
    /// `soft` or `kvm`.
    pub cpu: &'static str,
    /// Instructions that were retired; zero where the CPU does not count them.
    pub instructions: u64,
    /// Processor time of all vCPU threads in nanoseconds.
    pub busy_ns: u64,
    /// Host memory that held decoded code at the end, in bytes.
    pub cache_bytes: u64,
    /// Deterministic mode: a hash of what the boot vCPU executed.
    pub trace_hash: Option<u64>,
}

impl MachineFigures {
    /// Adds those of the machine that came after: times add up, what is there at the end is the last one's.
    pub fn add(&mut self, next: &Self) {
        *self =
            Self { instructions: self.instructions + next.instructions, busy_ns: self.busy_ns + next.busy_ns, ..*next };
    }
}

/// Hears the guest's wish for power-off or reset: no vCPU executes another instruction, and the loop is told. So the
/// last state of a deterministic run does not depend on how soon the loop wakes up.
struct PowerSwitch {
    kicks: Kicks,
    events: EventSender,
}

impl PowerSink for PowerSwitch {
    fn power_event(&self, event: PowerEvent) {
        self.kicks.kick_all();
        self.events.power_event(event);
    }
}

/// A built machine.
pub struct Machine {
    pub(super) board: Board,
    pub(super) devices: Vec<BuiltDevice>,
    pub(super) hotplug: Hotplug,
    vcpus: Vec<VcpuThread>,
    kicks: Kicks,
    ended: Arc<Mutex<Vec<VcpuEnd>>>,
    boot_state: Option<crate::cpu::CpuState>,
    pub(super) events: EventSender,
    clock: Arc<dyn Clock>,
    vcpu_count: u32,
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
        let ram = layout::ram(config.memory_bytes)?;
        let memory = GuestMemory::new(&ram)?;
        let tables = AcpiConfig {
            vcpus: u8::try_from(config.vcpus).map_err(|_| MachineError::TooManyVcpus(config.vcpus))?,
            com1: config.serial != SerialMode::Off,
        };
        let rsdp = acpi::write_tables(tables, memory.mapped())?;
        let boot_state = boot::load(&config.boot, memory.mapped(), &ram, rsdp)?;
        let wall_base_ns = wall_base_ns(config);
        let kicks = Kicks::default();
        let board = Board::new(BoardParts {
            processor: processor(config, &memory, wall_base_ns)?,
            memory,
            relay: Relay::new()?,
            power: Arc::new(PowerSwitch { kicks: kicks.clone(), events: events.clone() }),
            events: events.clone(),
            wall_base_ns,
        });
        let mut machine = Self {
            board,
            devices: Vec::with_capacity(builders.len()),
            hotplug: Hotplug::default(),
            vcpus: Vec::new(),
            kicks,
            ended: Arc::default(),
            boot_state: Some(boot_state),
            events: events.clone(),
            clock: Arc::new(RealClock::new()),
            vcpu_count: config.vcpus,
        };
        for builder in builders {
            let name = builder.name();
            let device = builder.build(&mut machine.board)?;
            tracing::debug!(device = name, "built");
            machine.devices.push(device);
        }
        Ok(machine)
    }

    /// The board.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Starts devices, then vCPUs.
    ///
    /// # Errors
    /// When one does not start; what has started is stopped when the machine is dropped.
    pub fn start(&mut self) -> Result<(), MachineError> {
        for device in &mut self.devices {
            device.life.start()?;
        }
        for index in 0..self.vcpu_count {
            let bus = VcpuBus {
                vcpu: index,
                space: Arc::clone(self.board.space()),
                stop: StopSignal::new(),
                stalls: Arc::new(self.events.clone()),
                clock: Arc::clone(&self.clock),
                budget: ANSWER_BUDGET,
            };
            let state = if index == 0 { self.boot_state.take() } else { None };
            let (ended, events) = (Arc::clone(&self.ended), self.events.clone());
            let report = move |end: VcpuEnd| {
                let exit = MachineEvent::VcpuEnded(end.clone());
                ended.lock().unwrap_or_else(PoisonError::into_inner).push(end);
                events.tell(exit);
            };
            let processor = Arc::clone(self.board.processor());
            self.vcpus.push(VcpuThread::spawn(processor, index, state, bus, &self.kicks, report)?);
        }
        Ok(())
    }

    /// Waits until the machine ends.
    pub fn wait(&mut self, events: &EventReceiver) -> MachineEnd {
        loop {
            match events.next() {
                Ok(MachineEvent::Power(PowerEvent::PowerOff)) => return MachineEnd::PowerOff,
                Ok(MachineEvent::Power(PowerEvent::Reset)) => return MachineEnd::Reset,
                Ok(MachineEvent::Stop(cause)) => return MachineEnd::Stopped(cause),
                Ok(MachineEvent::Stalled(stall)) => {
                    let (vcpu, address) = (stall.vcpu, format!("{:?} {:#x}", stall.space, stall.address));
                    let waited_ms = stall.waited.as_millis();
                    tracing::warn!(vcpu, address, write = stall.write, waited_ms, "a device did not answer in time");
                }
                Ok(MachineEvent::Ejected(_) | MachineEvent::Departed) => {
                    for event in self.settle() {
                        tracing::info!(?event, "a device has left");
                    }
                }
                Ok(MachineEvent::VcpuEnded(end)) => {
                    if let Some(failure) = failure(&end, self.board.processor().name()) {
                        return MachineEnd::Failed(failure);
                    }
                }
                // This machine holds a sender itself.
                Err(_) => return MachineEnd::Failed("nobody is left who could end the machine".into()),
            }
        }
    }

    /// Stops vCPUs, then devices in reverse order; errors are logged and do not keep the others from stopping.
    pub fn stop(&mut self) -> MachineFigures {
        for vcpu in &mut self.vcpus {
            vcpu.stop();
        }
        self.vcpus.clear();
        self.finish_unplugs();
        let deadline = Instant::now() + STOP_TIME_MAX;
        while let Some(mut device) = self.devices.pop() {
            if let Err(error) = device.life.stop(deadline) {
                tracing::error!(device = device.name, %error, "a device did not stop cleanly");
            }
        }
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        MachineFigures {
            cpu: self.board.processor().name(),
            instructions: ended.iter().map(|end| end.figures.instructions).sum(),
            busy_ns: ended.iter().map(|end| end.busy_ns).sum(),
            cache_bytes: ended.iter().map(|end| end.figures.cache_bytes).sum(),
            trace_hash: ended.iter().find(|end| end.index == 0).and_then(|end| end.figures.trace_hash),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What a vCPU's end means for the machine, if it is its end too.
fn failure(end: &VcpuEnd, cpu: &str) -> Option<String> {
    let vcpu = end.index;
    let remedy = if cpu == "kvm" { "run with --cpu soft" } else { "it is a limit of the software CPU" };
    match &end.exit {
        Ok(Exit::Stopped) => None,
        Ok(Exit::TripleFault { rip }) => Some(format!(
            "vcpu{vcpu} shut down by a triple fault at rip {rip:#x}: the guest faulted where it had no handler; \
             look at what it printed last"
        )),
        Ok(Exit::Stuck { rip, reason }) => Some(format!("vcpu{vcpu} cannot go on at rip {rip:#x}: {reason}; {remedy}")),
        Err(error) => Some(format!("vcpu{vcpu} failed: {error}")),
    }
}
