//! The processor: architectural state, its memory view, and the loop that runs it.
//!
//! One `Cpu` belongs to one thread at a time. What other threads may touch is guest RAM and the [`Attention`] word.

use std::sync::Arc;

use crate::cpuid::CpuModel;
use crate::exec::Exec;
use crate::huge::HugePages;
use crate::ram::GuestRam;
use crate::state::{Regs, Segment, SegmentName, StoredMsrs, System, Table};
use crate::tlb::Mmu;
use crate::world::Attention;

/// Address space for decoded code, which is thrown away before it gets so large, and for the other caches.
const CACHES_MAX: usize = 128 << 20;

/// Where guest time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeMode {
    /// The board's clock ([`World::now_ns`]).
    Real,
    /// Retired instructions: runs of the same guest with the same inputs are identical to the bit.
    Retired {
        /// Nanoseconds of guest time that 1000 retired instructions take.
        ns_per_1000: u32,
    },
}

/// Non-maskable interrupts (SDM vol. 3, 6.7): one may wait while another is handled, more fall together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NmiState {
    /// One waits.
    pub pending: bool,
    /// One has been delivered, and no IRET has ended its handler yet.
    pub masked: bool,
}

/// One logical processor executed in software.
pub struct Cpu {
    /// Registers that unprivileged code sees.
    pub regs: Regs,
    /// Privileged state.
    pub sys: System,
    /// Set by HLT, cleared when an interrupt is delivered: `run` returns [`Stop::Halted`] at once while it is set and
    /// nothing is deliverable. Part of the saved state.
    pub halted: bool,
    /// Part of the saved state.
    pub nmi: NmiState,
    pub(crate) ram: GuestRam,
    pub(crate) mmu: Mmu,
    pub(crate) model: Arc<CpuModel>,
    pub(crate) attention: Attention,
    pub(crate) time: TimeMode,
    pub(crate) exec: Exec,
    pub(crate) retired: u64,
    /// Deterministic mode: nanoseconds that passed while the processor was halted.
    idle_ns: u64,
}

impl Cpu {
    /// A processor in reset state.
    pub fn new(ram: GuestRam, model: Arc<CpuModel>, attention: Attention, time: TimeMode) -> Self {
        let pages = Arc::new(HugePages::reserve(CACHES_MAX));
        let mut cpu = Self {
            regs: Regs::default(),
            sys: reset_system(),
            halted: false,
            nmi: NmiState::default(),
            mmu: Mmu::new(&pages, ram.regions().iter().map(|region| (region.gpa(), region.len()))),
            ram,
            exec: Exec::new(&model, &pages),
            model,
            attention,
            time,
            retired: 0,
            idle_ns: 0,
        };
        cpu.reset();
        cpu
    }
    /// Puts the processor into the state after RESET# (SDM vol. 3, table 10-1). Retired instructions go on counting.
    pub fn reset(&mut self) {
        self.regs = Regs::default();
        self.regs.rip = 0xfff0;
        self.regs.rflags = 2;
        self.sys = reset_system();
        self.mmu.pdpte = None;
        self.mmu.flush_all();
        self.halted = false;
        self.nmi = NmiState::default();
    }
    /// Instructions retired since `new`.
    pub fn retired(&self) -> u64 {
        self.retired
    }
    /// Host memory held by decoded code, in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.exec.bytes() + self.mmu.cache_bytes()
    }
    /// Guest nanoseconds of the deterministic clock, or `None` when the board's clock rules.
    pub fn retired_ns(&self) -> Option<u64> {
        match self.time {
            TimeMode::Real => None,
            TimeMode::Retired { ns_per_1000 } => {
                let busy = (u128::from(self.retired) * u128::from(ns_per_1000) / 1000) as u64;
                Some(busy.saturating_add(self.idle_ns))
            }
        }
    }
    /// Deterministic mode: lets time pass in which nothing is executed, because the processor is halted.
    pub fn skip_ns(&mut self, ns: u64) {
        self.idle_ns = self.idle_ns.saturating_add(ns);
    }
}

/// Privileged state after RESET# (SDM vol. 3, table 10-1).
pub fn reset_system() -> System {
    let data = Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x93 };
    let mut segments = [data; 6];
    segments[SegmentName::Cs as usize] =
        Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attributes: 0x9b };
    let table = Table { base: 0, limit: 0xffff };
    System {
        segments,
        ldtr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x82 },
        tr: Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x8b },
        gdtr: table,
        idtr: table,
        cr0: 0x6000_0010,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
        efer: 0,
        star: 0,
        lstar: 0,
        cstar: 0,
        sfmask: 0,
        kernel_gs_base: 0,
        sysenter: [0; 3],
        tsc_aux: 0,
        pat: 0x0007_0406_0007_0406,
        tsc_offset: 0,
        kvm_system_time: 0,
        kvm_wall_clock: 0,
        stored: StoredMsrs::default(),
        interrupt_shadow: false,
    }
}
