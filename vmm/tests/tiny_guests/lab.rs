//! The bench: one vCPU, a little memory, and registers that tell the test what the guest does.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use atoll_devices::{Answer, RegisterDevice};
use atoll_softcpu::state::{Regs, Segment, SegmentName};
use atoll_vmm::actor::{RealClock, StopSignal};
use atoll_vmm::cpu::kvm::{Irqchip, KvmConfig, KvmProcessor};
use atoll_vmm::cpu::soft::{Pace, SoftConfig, SoftProcessor};
use atoll_vmm::cpu::{
    AddressSpace, CpuState, Exit, Kicks, Processor, Space, Stall, StallSink, VcpuBus, VcpuEnd, VcpuThread, reset_system,
};
use atoll_vmm::doorbell::DoorbellTable;
use atoll_vmm::machine::layout::ram;
use atoll_vmm::memory::GuestMemory;
use iced_x86::code_asm::CodeAssembler;
use vm_memory::{Bytes, GuestAddress};

/// Ports of the bench.
pub(crate) const PORT: u16 = 0x500;
/// Its registers in memory.
pub(crate) const MMIO: u64 = 0xd000_0000;
/// Where code is loaded.
pub(crate) const CODE: u64 = 0x8000;
/// Where page tables are.
const PAGE_TABLES: u64 = 0x10_0000;
/// Nothing takes that long, unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const RAM: u64 = 16 << 20;

/// Which CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cpu {
    Kvm,
    Soft,
}

/// A write that reached the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) space: Space,
    pub(crate) offset: u64,
    pub(crate) width: usize,
    pub(crate) value: u64,
}

/// A port write, as tests expect it.
pub(crate) fn out(offset: u64, width: usize, value: u64) -> Write {
    Write { space: Space::Pio, offset, width, value }
}

/// A write to memory-mapped registers.
pub(crate) fn store(offset: u64, width: usize, value: u64) -> Write {
    Write { space: Space::Mmio, offset, width, value }
}

struct Registers {
    space: Space,
    written: Sender<Write>,
}

/// What the bench answers: each byte tells its offset.
pub(crate) fn pattern(offset: u64) -> u8 {
    0xa0 ^ offset as u8
}

impl RegisterDevice for Registers {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Answer {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = pattern(offset + index as u64);
        }
        Answer::Now
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let _ = self.written.send(Write { space: self.space, offset, width: data.len(), value });
        Answer::Now
    }
}

struct NoStall;
impl StallSink for NoStall {
    fn device_stalled(&self, stall: Stall) {
        panic!("the bench answers at once: {stall:?}");
    }
}

/// The bench.
pub(crate) struct Lab {
    pub(crate) memory: GuestMemory,
    pub(crate) processor: Arc<dyn Processor>,
    pub(crate) kvm: Option<Arc<KvmProcessor>>,
    pub(crate) doorbells: Arc<DoorbellTable>,
    space: Arc<AddressSpace>,
    written: Receiver<Write>,
    ended: (Sender<VcpuEnd>, Receiver<VcpuEnd>),
    thread: Option<VcpuThread>,
}

/// Whether a missing KVM is an error.
fn kvm_is_missing() -> bool {
    let missing = !std::path::Path::new("/dev/kvm").exists();
    let allowed = std::env::var_os("ATOLL_ALLOW_SKIP").is_some_and(|value| value == "1");
    assert!(!missing || allowed, "/dev/kvm is missing; set ATOLL_ALLOW_SKIP=1 to leave its tests out");
    missing
}

impl Lab {
    /// A bench around a CPU; `None` where it is missing and may be.
    pub(crate) fn new(cpu: Cpu) -> Option<Self> {
        let memory = GuestMemory::new(&ram(RAM).unwrap()).unwrap();
        let model = "atoll-v1".to_owned();
        let mut kvm = None;
        let processor: Arc<dyn Processor> = match cpu {
            Cpu::Kvm if kvm_is_missing() => return None,
            Cpu::Kvm => {
                let made = Arc::new(
                    KvmProcessor::new(KvmConfig {
                        memory: memory.clone(),
                        model,
                        vcpus: 1,
                        trial: false,
                        irqchip: Irqchip::Kernel,
                    })
                    .unwrap(),
                );
                kvm = Some(Arc::clone(&made));
                made
            }
            Cpu::Soft => Arc::new(
                SoftProcessor::new(SoftConfig {
                    ram: memory.cpu_ram(),
                    model,
                    vcpus: 1,
                    pace: Pace::Real,
                    wall_base_ns: 0,
                })
                .unwrap(),
            ),
        };
        let doorbells = Arc::new(DoorbellTable::new(processor.doorbells()));
        let space = Arc::new(AddressSpace::new(Arc::clone(&doorbells)));
        let (sender, written) = channel();
        for (place, start, len) in [(Space::Pio, u64::from(PORT), 0x10), (Space::Mmio, MMIO, 0x1000)] {
            let registers = Registers { space: place, written: sender.clone() };
            space.insert(place, start, len, Arc::new(Mutex::new(registers))).unwrap();
        }
        Some(Self { memory, processor, kvm, doorbells, space, written, ended: channel(), thread: None })
    }

    /// Puts bytes into guest memory.
    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.mapped().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Assembles code and loads it at [`CODE`].
    pub(crate) fn load(&self, mut code: CodeAssembler) {
        let bytes = code.assemble(CODE).unwrap();
        self.put(CODE, &bytes);
    }

    /// Lets the vCPU go.
    pub(crate) fn start(&mut self, state: CpuState) {
        let bus = VcpuBus {
            vcpu: 0,
            space: Arc::clone(&self.space),
            stop: StopSignal::new(),
            stalls: Arc::new(NoStall),
            clock: Arc::new(RealClock::new()),
            budget: PATIENCE,
            counters: Arc::default(),
        };
        let ended = self.ended.0.clone();
        let report = move |end| {
            let _ = ended.send(end);
        };
        self.thread = Some(
            VcpuThread::spawn(Arc::clone(&self.processor), 0, Some(state), bus, &Kicks::default(), report).unwrap(),
        );
    }

    /// The vCPU's thread.
    pub(crate) fn vcpu(&self) -> &VcpuThread {
        self.thread.as_ref().expect("it has been started")
    }

    /// The next write that reaches the bench.
    pub(crate) fn next(&self) -> Write {
        self.written.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let ended = self.ended.1.try_recv();
            panic!("the guest wrote nothing more; its vCPU: {ended:?}")
        })
    }

    /// Whether the guest writes nothing for a moment.
    pub(crate) fn is_silent(&self) -> bool {
        self.written.recv_timeout(Duration::from_millis(100)).is_err()
    }

    /// How the vCPU ends by itself.
    pub(crate) fn end(&self) -> Exit {
        self.ended.1.recv_timeout(PATIENCE).expect("the vCPU goes on").exit.unwrap()
    }

    /// Stops the vCPU; how it ended.
    pub(crate) fn stop(&mut self) -> Exit {
        if let Some(mut thread) = self.thread.take() {
            thread.stop();
        }
        self.end()
    }
}

/// Flat segments for code of `bits`.
fn state(bits: u32) -> CpuState {
    let mut regs = Regs::default();
    regs.rip = CODE;
    regs.rflags = 2;
    regs.gpr[4] = CODE;
    let mut system = reset_system();
    let (code, data, limit) = match bits {
        16 => (0x9b, 0x93, 0xffff),
        32 => (0xc09b, 0xc093, u32::MAX),
        _ => (0xa09b, 0xc093, u32::MAX),
    };
    let selector = |selector: u16| if bits == 16 { 0 } else { selector };
    system.segments = [Segment { selector: selector(0x10), base: 0, limit, attributes: data }; 6];
    system.segments[SegmentName::Cs as usize] = Segment { selector: selector(8), base: 0, limit, attributes: code };
    if bits != 16 {
        system.cr0 |= 1;
    }
    CpuState { regs, system }
}

/// Real mode at [`CODE`].
pub(crate) fn real_mode() -> CpuState {
    state(16)
}

/// 32-bit protected mode, paging off.
pub(crate) fn protected_mode() -> CpuState {
    state(32)
}

/// Long mode with the first 4 GiB mapped onto themselves, and a descriptor table that IRETQ can return through.
pub(crate) fn long_mode(lab: &Lab) -> CpuState {
    const GDT: u64 = 0x600;
    lab.put(PAGE_TABLES, &(PAGE_TABLES + 0x1003).to_le_bytes());
    for gigabyte in 0..4_u64 {
        let table = PAGE_TABLES + 0x2000 + gigabyte * 0x1000;
        lab.put(PAGE_TABLES + 0x1000 + gigabyte * 8, &(table | 3).to_le_bytes());
        for page in 0..512_u64 {
            lab.put(table + page * 8, &(gigabyte << 30 | page << 21 | 0x83).to_le_bytes());
        }
    }
    for (index, entry) in [0_u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
        lab.put(GDT + index as u64 * 8, &entry.to_le_bytes());
    }
    let mut state = state(64);
    state.system.gdtr = atoll_softcpu::state::Table { base: GDT, limit: 23 };
    state.system.cr3 = PAGE_TABLES;
    state.system.cr4 = 1 << 5;
    state.system.cr0 |= 1 << 31;
    state.system.efer = 1 << 8 | 1 << 10;
    state
}

impl Lab {
    /// A word of guest memory.
    pub(crate) fn memory_word(&self, at: u64) -> u16 {
        self.memory.mapped().read_obj(GuestAddress(at)).unwrap()
    }
}

/// Makes a test of each story for each CPU.
macro_rules! on_both_cpus {
    ($($story:ident),+) => {
        mod kvm {
            $(#[test]
            fn $story() {
                super::$story(super::Cpu::Kvm);
            })+
        }
        mod soft {
            $(#[test]
            fn $story() {
                super::$story(super::Cpu::Soft);
            })+
        }
    };
}
pub(crate) use on_both_cpus;
