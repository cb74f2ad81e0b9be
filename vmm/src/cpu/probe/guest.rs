//! The tiny guest: in long mode, what a kernel's first seconds need that an interpreter may lack, then a loop that tells
//! hardware from interpretation by time alone.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use atoll_devices::{Answer, RegisterDevice};
use atoll_softcpu::state::{Regs, Segment, SegmentName, Table};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::actor::{RealClock, StopSignal};
use crate::cpu::kvm::{Irqchip, KvmConfig, KvmProcessor};
use crate::cpu::{
    AddressSpace, CpuError, CpuState, Exit, Kicks, Space, Stall, StallSink, VcpuBus, VcpuEnd, VcpuThread, reset_system,
};
use crate::doorbell::DoorbellTable;
use crate::machine::layout::{RAM_MIN, ram};
use crate::memory::{GuestMemory, MemoryError};

/// Why a stock guest would not run.
#[derive(Debug, Error)]
pub(super) enum Obstacle {
    /// KVM refuses.
    #[error("{0}")]
    Cpu(#[from] CpuError),
    /// No memory for it.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// It does not know an instruction.
    #[error("KVM on this host cannot run kernels: a test guest got stuck ({0})")]
    Stuck(String),
    /// It interprets.
    #[error("KVM on this host is slower than that: a test guest did not finish within {} ms", .0.as_millis())]
    Slow(Duration),
}

const CODE_AT: u64 = 0x8000;
const HANDLER_AT: u64 = 0x8080;
const IDT_AT: u64 = 0x9000;
const SCRATCH_AT: u64 = 0xa000;
const STACK_TOP: u64 = 0x8_0000;
const PAGE_TABLES: u64 = 0x1_0000;
const DONE_PORT: u16 = 0x500;
const BREAKPOINT: u64 = 3;

/// RDI points at scratch memory. The test below shows the source.
const CODE: &[u8] = &[
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
    0x66, 0x0f, 0x6f, 0x07, // movdqa xmm0, [rdi]
    0x66, 0x0f, 0xd4, 0xc0, // paddq xmm0, xmm0
    0x48, 0x0f, 0xae, 0x87, 0x00, 0x02, 0x00, 0x00, // fxsave64 [rdi + 0x200]
    0xcc, // int3
    0xb9, 0x80, 0x96, 0x98, 0x00, // mov ecx, 10_000_000
    0xff, 0xc9, // again: dec ecx
    0x75, 0xfc, // jne again
    0xba, 0x00, 0x05, 0x00, 0x00, // mov edx, DONE_PORT
    0xee, // out dx, al
    0xf4, // hlt
];
/// What the breakpoint leads to.
const HANDLER: &[u8] = &[0x48, 0xcf]; // iretq

/// Tells that the guest has come to its end.
struct Done(std::sync::mpsc::SyncSender<Result<(), Obstacle>>);

impl RegisterDevice for Done {
    fn read(&mut self, _offset: u64, data: &mut [u8]) -> Answer {
        data.fill(0xff);
        Answer::Now
    }
    fn write(&mut self, _offset: u64, _data: &[u8]) -> Answer {
        let _ = self.0.try_send(Ok(()));
        Answer::Now
    }
}

struct Ignore;
impl StallSink for Ignore {
    fn device_stalled(&self, _stall: Stall) {}
}

fn load(memory: &GuestMemory) {
    let put = |at: u64, bytes: &[u8]| {
        // The smallest machine has RAM at all of these places.
        let _ = memory.mapped().write_slice(bytes, GuestAddress(at));
    };
    put(CODE_AT, CODE);
    put(HANDLER_AT, HANDLER);
    let gate = HANDLER_AT & 0xffff | 8 << 16 | 0x8e00 << 32 | (HANDLER_AT >> 16 & 0xffff) << 48;
    put(IDT_AT + BREAKPOINT * 16, &gate.to_le_bytes());
    // Null, code, data, for IRETQ to load.
    for (index, entry) in [0_u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
        put(SCRATCH_AT + 0x800 + index as u64 * 8, &entry.to_le_bytes());
    }
    // The first 2 MiB, mapped onto themselves.
    put(PAGE_TABLES, &((PAGE_TABLES + 0x1000) | 3).to_le_bytes());
    put(PAGE_TABLES + 0x1000, &((PAGE_TABLES + 0x2000) | 3).to_le_bytes());
    put(PAGE_TABLES + 0x2000, &0x83_u64.to_le_bytes());
}

fn state() -> CpuState {
    let mut regs = Regs::default();
    regs.rip = CODE_AT;
    regs.rflags = 2;
    regs.gpr[4] = STACK_TOP;
    regs.gpr[7] = SCRATCH_AT;
    let mut system = reset_system();
    system.segments = [Segment { selector: 16, base: 0, limit: u32::MAX, attributes: 0xc093 }; 6];
    system.segments[SegmentName::Cs as usize] = Segment { selector: 8, base: 0, limit: u32::MAX, attributes: 0xa09b };
    system.gdtr = Table { base: SCRATCH_AT + 0x800, limit: 23 };
    system.idtr = Table { base: IDT_AT, limit: 0xfff };
    // PE, MP, ET, NE, PG; PAE, OSFXSR, OSXMMEXCPT; LME, LMA.
    system.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31;
    system.cr3 = PAGE_TABLES;
    system.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
    system.efer = 1 << 8 | 1 << 10;
    CpuState { regs, system }
}

fn obstacle(end: VcpuEnd) -> Obstacle {
    match end.exit {
        Ok(Exit::Stuck { rip, reason }) => {
            Obstacle::Stuck(format!("at offset {} of it: {reason}", rip.wrapping_sub(CODE_AT)))
        }
        Ok(Exit::TripleFault { rip }) => {
            let place = rip.map_or(String::new(), |rip| format!(" at offset {}", rip.wrapping_sub(CODE_AT)));
            Obstacle::Stuck(format!("triple fault{place} of it"))
        }
        Ok(Exit::Stopped) => Obstacle::Stuck("it was stopped".into()),
        Err(error) => Obstacle::Stuck(error.to_string()),
    }
}

/// Runs the guest to its end.
pub(super) fn run(time_max: Duration) -> Result<(), Obstacle> {
    let spans = ram(RAM_MIN).unwrap_or_default();
    let memory = GuestMemory::new(&spans)?;
    load(&memory);
    let processor = Arc::new(KvmProcessor::new(KvmConfig {
        memory,
        model: "atoll-v1".into(),
        vcpus: 1,
        trial: true,
        irqchip: Irqchip::Kernel,
    })?);
    let space = Arc::new(AddressSpace::new(Arc::new(DoorbellTable::new(None))));
    let (told, end) = sync_channel(4);
    let done: Arc<Mutex<Done>> = Arc::new(Mutex::new(Done(told.clone())));
    // An empty space takes any range.
    let _ = space.insert(Space::Pio, u64::from(DONE_PORT), 1, done);
    let bus = VcpuBus {
        vcpu: 0,
        space,
        stop: StopSignal::new(),
        stalls: Arc::new(Ignore),
        clock: Arc::new(RealClock::new()),
        budget: time_max,
        counters: Arc::default(),
    };
    let ended = move |end| {
        let _ = told.try_send(Err(obstacle(end)));
    };
    let mut vcpu = VcpuThread::spawn(processor, 0, Some(state()), bus, &Kicks::default(), ended)?;
    let outcome = end.recv_timeout(time_max);
    vcpu.stop();
    match outcome {
        Ok(outcome) => outcome,
        Err(RecvTimeoutError::Timeout) => Err(Obstacle::Slow(time_max)),
        Err(RecvTimeoutError::Disconnected) => Err(Obstacle::Stuck("its thread is gone".into())),
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::{CodeAssembler, al, dx, ecx, edx, ptr, rdi, xmm0, xmmword_ptr};

    use super::*;

    /// The bytes are what their comments say.
    #[test]
    fn code_is_its_source() {
        let mut code = CodeAssembler::new(64).unwrap();
        code.lock().cmpxchg16b(xmmword_ptr(rdi)).unwrap();
        code.movdqa(xmm0, xmmword_ptr(rdi)).unwrap();
        code.paddq(xmm0, xmm0).unwrap();
        code.fxsave64(ptr(rdi + 0x200)).unwrap();
        code.int3().unwrap();
        code.mov(ecx, 10_000_000).unwrap();
        let mut again = code.create_label();
        code.set_label(&mut again).unwrap();
        code.dec(ecx).unwrap();
        code.jne(again).unwrap();
        code.mov(edx, u32::from(DONE_PORT)).unwrap();
        code.out(dx, al).unwrap();
        code.hlt().unwrap();
        assert_eq!(code.assemble(CODE_AT).unwrap(), CODE);
    }

    /// The question itself must end in time, whatever this host's KVM is: it stands before each start of a machine.
    #[test]
    fn question_is_short() {
        let asked = std::time::Instant::now();
        let answer = run(Duration::from_millis(200));
        assert!(asked.elapsed() < Duration::from_secs(10), "{answer:?}");
        if let Err(error) = answer {
            assert!(!error.to_string().contains('\n'));
        }
    }
}
