//! The software CPU behind the seam: a thread around [`atoll_softcpu::Cpu`], and the interrupt chips that KVM would have.
//!
//! Registers that belong to the processor (local and I/O APIC, PIC, PIT) are answered here; everything else goes to the
//! bus. The chips have one lock, taken when the guest touches them or an interrupt moves, never while code runs: other
//! threads raise [`Attention`], at which the vCPU looks once a block, and wake it if it is halted. Timers and eventfds need
//! no thread while the vCPU runs: it looks at them itself every few microseconds, and waits for them when it is halted.

mod chips;
mod clock;
mod trace;
mod vcpu;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use atoll_devices::irq::chip::CpuSink;
use atoll_devices::{GuestClock, MsiMessage, MsiSink, WireSink};
use atoll_softcpu::{Attention, CpuModel, GuestRam, VcpuTopology};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{CpuError, DoorbellWatch, HOST_MODEL, Processor, Vcpu};
use crate::irq::{EventListener, EventRoute, InterruptFabric, IrqError, Signalled};
use chips::Chips;
pub use clock::Pace;
use clock::SoftClock;
use vcpu::SoftVcpu;

/// How to get one vCPU's notice.
struct Notice {
    attention: Attention,
    /// The vCPU is halted, and to be woken.
    asleep: AtomicBool,
    wake: EventFd,
}

impl Notice {
    fn new() -> std::io::Result<Self> {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self { attention: Attention::default(), asleep: AtomicBool::new(false), wake })
    }

    fn raise(&self, flags: u32) {
        self.attention.raise(flags);
        // The flags before the look; there it is the other way round.
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::SeqCst) {
            let _ = self.wake.write(1);
        }
    }
}

/// All vCPUs, as the chips reach them.
struct Notices(Vec<Arc<Notice>>);

impl CpuSink for Notices {
    fn kick(&self, cpu: usize) {
        if let Some(notice) = self.0.get(cpu) {
            notice.raise(Attention::INTERRUPT);
        }
    }
}

/// What the software CPUs of a machine are made from.
pub struct SoftConfig {
    /// Guest RAM.
    pub ram: GuestRam,
    /// Name of the CPU model.
    pub model: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Where guest time comes from.
    pub pace: Pace,
    /// UTC in nanoseconds at guest time zero.
    pub wall_base_ns: u64,
}

/// The software CPUs of one machine.
pub struct SoftProcessor {
    config: SoftConfig,
    notices: Arc<Notices>,
    chips: Arc<Chips>,
    clock: Arc<SoftClock>,
    fabric: Arc<SoftFabric>,
}

impl SoftProcessor {
    /// Makes the chips and starts the threads that wait for timers and eventfds.
    ///
    /// # Errors
    /// When the model is unknown, there is more than one vCPU, or a thread or eventfd cannot be had.
    pub fn new(config: SoftConfig) -> Result<Self, CpuError> {
        if config.vcpus != 1 {
            let found = config.vcpus;
            return Err(CpuError::Unsupported(format!(
                "the software CPU runs one vCPU and --cpus boot={found} asks for more; use --cpus boot=1 or --cpu kvm"
            )));
        }
        if config.model == HOST_MODEL {
            let names = CpuModel::NAMES.join(" or ");
            return Err(CpuError::Unsupported(format!(
                "--cpu-model {HOST_MODEL} shows the host's own processor, which the software CPU is not; use {names}"
            )));
        }
        let topology = VcpuTopology { index: 0, count: config.vcpus };
        CpuModel::named(&config.model, topology)?;
        let notices = (0..config.vcpus).map(|_| Notice::new().map(Arc::new)).collect::<std::io::Result<_>>();
        let notices =
            Arc::new(Notices(notices.map_err(|error| CpuError::Unsupported(format!("no eventfd: {error}")))?));
        let clock = Arc::new(SoftClock::new(config.pace));
        let chips = Arc::new(Chips::new(config.vcpus as usize, Arc::clone(&notices) as _, Arc::clone(&clock)));
        let signals = Arc::new(Signals { notices: Arc::clone(&notices), chips: Arc::clone(&chips) });
        let listener = EventListener::start(signals).map_err(|error| CpuError::Unsupported(error.to_string()))?;
        let fabric = Arc::new(SoftFabric { chips: Arc::clone(&chips), listener });
        Ok(Self { config, notices, chips, clock, fabric })
    }
}

impl Processor for SoftProcessor {
    fn name(&self) -> &'static str {
        "soft"
    }
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, CpuError> {
        let notice =
            self.notices.0.get(index as usize).ok_or_else(|| CpuError::Unsupported(format!("no vcpu{index}")))?;
        let topology = VcpuTopology { index, count: self.config.vcpus };
        let model = CpuModel::named(&self.config.model, topology)?;
        let vcpu = SoftVcpu::new(vcpu::Parts {
            index,
            ram: self.config.ram.clone(),
            model: Arc::new(model),
            notice: Arc::clone(notice),
            door: self.fabric.listener.door(),
            chips: Arc::clone(&self.chips),
            clock: Arc::clone(&self.clock),
            wall_base_ns: self.config.wall_base_ns,
        });
        Ok(Box::new(vcpu))
    }
    fn interrupts(&self) -> Arc<dyn InterruptFabric> {
        Arc::clone(&self.fabric) as _
    }
    fn doorbells(&self) -> Option<Arc<dyn DoorbellWatch>> {
        None
    }
    fn clock(&self) -> Arc<dyn GuestClock> {
        Arc::clone(&self.clock) as _
    }
}

/// Where interrupts end: the chips, with a thread for those that come as eventfds.
struct SoftFabric {
    chips: Arc<Chips>,
    listener: EventListener,
}

impl WireSink for SoftFabric {
    fn set_level(&self, line: u32, high: bool) {
        self.chips.set_line(line, high);
    }
}

impl MsiSink for SoftFabric {
    fn fire(&self, message: MsiMessage) {
        self.chips.fire(message);
    }
}

impl InterruptFabric for SoftFabric {
    fn connect(&self, event: &EventFd) -> Result<Box<dyn EventRoute>, IrqError> {
        self.listener.connect(event)
    }
    fn flush(&self, deadline: Instant) -> bool {
        self.listener.flush(deadline)
    }
}

/// What the listener's thread tells.
struct Signals {
    notices: Arc<Notices>,
    chips: Arc<Chips>,
}

impl Signalled for Signals {
    fn signalled(&self, message: MsiMessage) {
        // The backend may have overwritten code that is decoded already.
        for notice in &self.notices.0 {
            notice.attention.raise(Attention::DMA);
        }
        self.chips.fire(message);
    }
}
