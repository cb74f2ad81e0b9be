//! Execution: ops, their dispatch, and the state of the run loop.
//!
//! A block is an array of 24-byte [`Op`]s made from consecutive guest instructions of one frame. Each op holds its handler;
//! a handler does its work and jumps to the next op's handler. Optimised builds do that by a sibling call, which the
//! compiler turns into a jump (a test proves it); other builds return the next op to a trampoline loop.
//!
//! What flows from handler to handler in registers: the CPU, the op, `fuel` (instructions left in this slice, charged once
//! a block) and `flags` (the arithmetic flags in the form that LAHF and SETO give: AH above OF). `regs.rip` stays at
//! the first instruction of the running block; an op knows its offset from there.
//!
//! A handler that meets anything out of the ordinary hands its instruction to [`general`], which decodes it again and
//! does it slowly.
#![allow(unsafe_code, reason = "handlers work on raw pointers to the CPU and to ops, for speed")]

mod cache;
mod chunks;
mod decode;
mod dispatch;
mod fast;
mod general;
mod run;

use std::sync::Arc;

use crate::cpu::Cpu;
use crate::huge::HugePages;
use crate::native::Thunks;
use crate::state::{Exception, SegmentName};
use crate::tlb::{Kind, Tlb};
use crate::world::{Attention, World};

pub(crate) use cache::{CodeCache, Jump, Written};

/// Width of code: what the CS descriptor and EFER.LMA say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    /// 16-bit code.
    Bits16 = 0,
    /// 32-bit code.
    Bits32 = 1,
    /// 64-bit code.
    Bits64 = 2,
}

impl Mode {
    /// For the decoder.
    fn bitness(self) -> u32 {
        match self {
            Mode::Bits16 => 16,
            Mode::Bits32 => 32,
            Mode::Bits64 => 64,
        }
    }
    /// In 64-bit code overrides of ES, CS, SS and DS mean nothing: the base register alone tells whether an operand
    /// is on the stack, and so whether it faults with #SS or #GP.
    fn drop_null_override(self, insn: &mut iced_x86::Instruction) {
        use iced_x86::Register;
        if self == Mode::Bits64 && !matches!(insn.segment_prefix(), Register::None | Register::FS | Register::GS) {
            insn.set_segment_prefix(Register::None);
        }
    }
}

/// What a handler returns: nothing where it jumps on, the state for the trampoline elsewhere.
#[cfg(not(debug_assertions))]
pub(crate) type Next = ();
/// What a handler returns: nothing where it jumps on, the state for the trampoline elsewhere.
#[cfg(debug_assertions)]
#[repr(C)]
pub(crate) struct Next {
    op: *const Op,
    /// Fuel in the low half (a slice fits 32 bits), flags above.
    rest: u64,
}

/// A handler.
///
/// # Safety
/// `cpu` is the running CPU with no reference to it alive elsewhere, `op` an op of a live block.
pub(crate) type Handler = unsafe extern "sysv64" fn(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next;

/// One decoded instruction (or two fused).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    handler: Handler,
    /// First register: byte offset into `Regs`.
    r0: u8,
    /// Second register.
    r1: u8,
    /// Base register of the memory operand (the zero word if none, RIP's word for RIP-relative).
    base: u8,
    /// Index register (the zero word if none).
    index: u8,
    /// Displacement.
    disp: i32,
    /// Immediate.
    imm: i32,
    /// Offset of the instruction from the block's first.
    offset: u16,
    /// Instructions of the block before this one.
    ordinal: u8,
    /// Factor of the index (1, 2, 4 or 8), and in the high half the segment whose base is added (0: none).
    scale: u8,
}

const _: () = assert!(size_of::<Op>() == 24);

/// A way out of a block: lies behind the op that takes it, in an op's place.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Exit {
    /// Runs when control goes to this record itself: while nothing better is linked.
    handler: Handler,
    /// Instructions retired when leaving here.
    count: u32,
    /// Target, relative to the first instruction of this block.
    delta: i32,
    /// Block to go on with; this record itself until one is known.
    link: *const Op,
}

const _: () = assert!(size_of::<Exit>() == size_of::<Op>() && align_of::<Exit>() == align_of::<Op>());

/// A block in another frame, behind an [`Exit`] that leads there: good while address and key are the present ones.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct FarLink {
    rip: u64,
    key: u64,
    op: *const Op,
}

/// Where a call expects its return, and the link to what runs there.
#[derive(Clone, Copy)]
#[repr(C)]
struct Return {
    rip: u64,
    link: *mut FarLink,
}

/// Calls remembered.
const RETURNS: usize = 16;
/// No call: not canonical, so no return goes there.
const NO_RETURN: Return = Return { rip: 1 << 63, link: std::ptr::null_mut() };

/// A key that never is the present one.
pub(crate) const NO_KEY: u64 = !0;

/// What a block is an array of.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) union Slot {
    op: Op,
    exit: Exit,
    far: FarLink,
    /// Two such hold the instruction behind an op that needs all of it.
    raw: [u64; 3],
}

/// Why control came back to the run loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// `regs.rip` is where to go on; nothing else has changed.
    Lookup,
    /// The instruction at `regs.rip` is to be done alone, without a block.
    Step,
    /// As `Lookup`, and this exit wants to be linked.
    Link(*const Exit),
    /// `exec.fault` is to be delivered; `regs.rip` is at the faulting instruction.
    Fault,
    /// State of the system may have changed.
    Boundary,
}

/// Execution state that is not architectural.
pub(crate) struct Exec {
    /// CPL is 3.
    pub(crate) user: bool,
    /// SSE is enabled: neither emulated nor lazily switched off, and the system has said that it saves its state.
    vectors: bool,
    /// Width of code.
    pub(crate) mode: Mode,
    /// Native thunks.
    pub(crate) thunks: Thunks,
    /// Decoded code.
    cache: CodeCache,
    /// The board, while `run` runs.
    world: Option<*mut dyn World>,
    /// Tables of the present privilege, while `run` runs.
    tlb: *mut Tlb,
    /// Base of the jump cache.
    jumps: *mut Jump,
    /// Keys of the jump cache for the lower and the upper half.
    jump_keys: [u64; 2],
    /// Keys of links to other frames.
    link_keys: [u64; 2],
    /// The latest calls, a ring.
    returns: [Return; RETURNS],
    /// Index of the latest.
    return_at: usize,
    /// Base of CS outside 64-bit mode.
    cs_base: u64,
    /// Set when the running block may have been overwritten: leave it after the present instruction.
    stale: bool,
    /// Linear address that the translation cache did not hold.
    missed: u64,
    /// The op that missed last, and how often in a row.
    missed_by: *const Op,
    misses: u32,
    /// Why the last block was left.
    left: Leave,
    /// The fault that goes with [`Leave::Fault`].
    fault: Exception,
    /// Fuel with which the block was entered.
    slice: i64,
    /// What was left of it.
    fuel: i64,
    /// Retired instructions when it was full.
    base: u64,
    /// Translation epochs that the jump cache knows.
    epochs: [u64; 2],
    /// Frames whose code was thrown away as a whole; their protection is lifted by the run loop.
    forgotten: Vec<u64>,
    /// Instructions decoded alone.
    decoded: decode::Decoded,
    /// What the CPU model lets through the decoder.
    offered: decode::Offered,
    /// Rolling hash of the register state.
    trace: Option<run::Trace>,
    /// Number of retired instructions at which the world is to look around.
    next_look: u64,
    /// Turns of the run loop since it did.
    turns: u32,
    /// Reused by the decoder.
    builder: decode::Builder,
}

// SAFETY: the pointers lead to memory that this structure owns, to guest RAM (which may be used from any thread), or are
// set anew by each `run`.
unsafe impl Send for Exec {}

impl Exec {
    pub(crate) fn new(model: &crate::cpuid::CpuModel, pages: &Arc<HugePages>) -> Self {
        let mut cache = CodeCache::new(pages);
        Self {
            user: false,
            vectors: false,
            mode: Mode::Bits16,
            thunks: Thunks::new(),
            jumps: cache.jumps(),
            cache,
            world: None,
            tlb: std::ptr::null_mut(),
            jump_keys: [0; 2],
            link_keys: [0; 2],
            returns: [NO_RETURN; RETURNS],
            return_at: 0,
            cs_base: 0,
            stale: false,
            missed: 0,
            missed_by: std::ptr::null(),
            misses: 0,
            left: Leave::Boundary,
            fault: Exception::ud(),
            slice: 0,
            fuel: 0,
            base: 0,
            epochs: [0; 2],
            forgotten: Vec::new(),
            decoded: decode::Decoded::new(),
            offered: decode::Offered::new(model),
            trace: None,
            next_look: 0,
            turns: 0,
            builder: decode::Builder::default(),
        }
    }
    /// Host memory of decoded code and thunks.
    pub(crate) fn bytes(&self) -> usize {
        self.cache.bytes() + self.thunks.bytes()
    }
    /// Throws all decoded code away; the running block ends after its present instruction.
    fn forget_all_code(&mut self) {
        let pages = self.cache.clear();
        self.forgotten.extend(pages);
        self.stale = true;
    }
}

/// The arithmetic flags of RFLAGS in the form that flows between handlers.
#[inline(always)]
pub(crate) fn unfold(rflags: u64) -> u64 {
    ((rflags & 0xd5) << 8) | (rflags >> 11 & 1)
}
/// RFLAGS with its arithmetic flags replaced.
#[inline(always)]
pub(crate) fn fold(rflags: u64, flags: u64) -> u64 {
    (rflags & !general::arith::ARITH) | (flags >> 8 & 0xd5) | ((flags & 1) << 11)
}

impl Cpu {
    /// Maps the memory that native code is put into, which otherwise happens at the first instruction that needs some. A
    /// thread that may not make memory executable while it runs a guest calls this before.
    ///
    /// # Errors
    /// The host refuses executable memory; guest code that needs it will find the same.
    pub fn map_code(&mut self) -> std::io::Result<()> {
        self.exec.thunks.map()
    }

    /// Reports a write to guest-physical memory that may hold decoded code.
    pub(crate) fn code_written(&mut self, gpa: u64, len: usize) {
        match self.exec.cache.written(gpa, len) {
            Written::Beside => return,
            Written::Nothing => {}
            Written::Over => self.exec.stale = true,
        }
        self.mmu.unprotect_code(gpa & !0xfff);
    }
    /// Whether something wants the run loop's notice at the next instruction boundary.
    pub(crate) fn wants_attention(&self) -> bool {
        let raised = self.attention.peek();
        raised & (Attention::STOP | Attention::DMA) != 0
            || (raised & Attention::INTERRUPT != 0 && self.regs.rflags & general::arith::IF != 0)
    }

    /// Reads by the translation cache alone.
    #[inline]
    fn load_fast(&self, linear: u64, size: u32) -> Option<u64> {
        let host = self.host_read_fast(linear, size)?;
        // SAFETY: an entry exists only for mapped RAM, and the access ends within its page.
        Some(unsafe {
            match size {
                1 => u64::from(host.read()),
                2 => u64::from(host.cast::<u16>().read_unaligned()),
                4 => u64::from(host.cast::<u32>().read_unaligned()),
                _ => host.cast::<u64>().read_unaligned(),
            }
        })
    }
    /// Host address of `size` readable bytes within one cached page.
    #[inline]
    fn host_read_fast(&self, linear: u64, size: u32) -> Option<*mut u8> {
        if (linear & 0xfff) + u64::from(size) > 0x1000 {
            return None;
        }
        let entry = self.mmu.tlb[usize::from(self.exec.user)].lookup(Kind::Read, linear)?;
        Some((linear as usize).wrapping_add(entry.addend) as *mut u8)
    }
    /// Writes by the translation cache alone; false if it cannot.
    #[inline]
    fn store_fast(&mut self, linear: u64, size: u32, value: u64) -> bool {
        if (linear & 0xfff) + u64::from(size) > 0x1000 {
            return false;
        }
        let Some(entry) = self.mmu.tlb[usize::from(self.exec.user)].lookup(Kind::Write, linear) else { return false };
        let host = (linear as usize).wrapping_add(entry.addend) as *mut u8;
        // SAFETY: an entry exists only for mapped, writable RAM, and the access ends within its page.
        unsafe {
            match size {
                1 => host.write(value as u8),
                2 => host.cast::<u16>().write_unaligned(value as u16),
                4 => host.cast::<u32>().write_unaligned(value as u32),
                _ => host.cast::<u64>().write_unaligned(value),
            }
        }
        true
    }
    /// Takes over what CS, EFER and CPL say; to be called whenever they may have changed.
    fn refresh_mode(&mut self) {
        let cs = self.sys.segments[SegmentName::Cs as usize];
        let long = self.long_mode_active();
        self.exec.mode = if long && cs.attributes & (1 << 13) != 0 {
            Mode::Bits64
        } else if cs.attributes & (1 << 14) != 0 {
            Mode::Bits32
        } else {
            Mode::Bits16
        };
        self.exec.cs_base = if self.exec.mode == Mode::Bits64 { 0 } else { cs.base };
        self.exec.user = self.cpl() == 3;
        self.exec.vectors = self.check_unit(crate::native::Unit::Sse).is_ok();
        self.exec.tlb = &raw mut self.mmu.tlb[usize::from(self.exec.user)];
        for half in 0..2 {
            if self.exec.epochs[half] != self.mmu.exec_epochs[half] {
                self.exec.epochs[half] = self.mmu.exec_epochs[half];
                self.exec.cache.forget_jumps(half);
            }
        }
        self.refresh_keys();
    }
    /// Takes over the jump cache's generations.
    fn refresh_keys(&mut self) {
        self.exec.jumps = self.exec.cache.jumps();
        let (mode, user) = (self.exec.mode as u8, self.exec.user);
        self.exec.jump_keys = self.exec.cache.jump_keys(mode, user);
        self.exec.link_keys = self.exec.cache.link_keys(mode, user);
    }
}
