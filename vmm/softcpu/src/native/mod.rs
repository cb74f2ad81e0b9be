//! SSE, MMX, x87 and their kin, run on the host's own units.
//!
//! A guest instruction that was decoded and found on the allow list is encoded anew, with its memory operand at the
//! host pointer that the caller passes and its general purpose registers renamed; a few instructions around it load
//! the guest registers that it names and store those that it changes. No guest byte is ever executed. Identical
//! instructions share a thunk, so a guest kernel with its user space needs a few thousand. Instructions that only move
//! control state (FNSTENV, FXSAVE, LDMXCSR, …) are plain Rust behind the same function type.
//!
//! SSE arithmetic runs under the guest's MXCSR. While all its exceptions are masked the host's flags are the guest's;
//! when one is unmasked, the instruction runs on a copy of the state with everything masked, and an exception that the
//! guest wants is reported before anything is written. x87 instructions run between FXRSTOR64 and FXSAVE64 with the
//! guest's control word: a pending unmasked exception only fires at the next waiting instruction, as in silicon, and
//! that one is checked for before it runs.
#![allow(unsafe_code, reason = "calls machine code that the emitter made")]

mod arena;
mod control;
mod emit;
mod family;
mod normalise;
pub(crate) mod sse;

use crate::state::{Exception, Regs};
use iced_x86::{Encoder, Instruction, InstructionInfoFactory, Mnemonic};
use std::collections::HashMap;

/// A thunk's entry. Returns 0 when the instruction has retired, else the vector of the exception that it raises, in
/// which case neither registers nor memory have changed (except sticky flags of MXCSR, as the architecture says).
///
/// `mem` is the host address of the memory operand described by [`ThunkRef::mem`]; any value if there is none.
pub type ThunkFn = unsafe extern "sysv64" fn(regs: *mut Regs, mem: *mut u8) -> u64;

/// How a thunk uses its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MemAccess {
    /// No memory operand.
    None,
    /// Reads all of it.
    Read,
    /// Writes all of it.
    Write,
    /// Reads it, or writes only part of it: a caller that goes through a scratch buffer must fill it first.
    ReadWrite,
}

/// Which availability checks precede the instruction. The caller makes them, the thunk does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Unit {
    /// General registers only (POPCNT, CRC32): no check.
    Integer,
    /// x87: #NM if CR0.EM or CR0.TS.
    X87,
    /// FWAIT: #NM if CR0.MP and CR0.TS.
    Fwait,
    /// MMX: #UD if CR0.EM; #NM if CR0.TS.
    Mmx,
    /// SSE and later: #UD if CR0.EM or not CR4.OSFXSR; #NM if CR0.TS.
    Sse,
    /// FXSAVE and FXRSTOR: #NM if CR0.EM or CR0.TS.
    Fxsr,
}

/// A callable instruction and what its caller must know. Where the memory operand lies is the decoder's business;
/// [`ThunkRef::implicit_rdi`] tells of MASKMOVQ and MASKMOVDQU, whose operand is at seg:\[rDI\].
#[derive(Clone, Copy, Debug)]
pub struct ThunkRef {
    /// Code to call.
    pub entry: ThunkFn,
    /// Size of the memory operand in bytes (0 if there is none, at most 512).
    pub mem_size: u16,
    /// What happens to it.
    pub mem: MemAccess,
    /// Alignment that the architecture demands of its linear address, else #GP(0): 1 or 16.
    pub mem_align: u8,
    /// Checks to be made by the caller.
    pub unit: Unit,
    /// #MF comes first, before the operand is looked at, if an x87 exception is pending.
    pub waits: bool,
    /// RFLAGS must be folded into [`Regs::rflags`] before the call.
    pub reads_flags: bool,
    /// The thunk changes arithmetic flags in [`Regs::rflags`]; those that it leaves alone must be folded in before.
    pub writes_flags: bool,
    /// The memory operand is at seg:\[rDI\].
    pub implicit_rdi: bool,
}

impl ThunkRef {
    /// The exception for a non-zero result of [`ThunkFn`]. The caller turns #XM into #UD when CR4.OSXMMEXCPT is clear.
    pub fn exception(code: u64) -> Exception {
        match code {
            13 => Exception::gp(0),
            vector => Exception::plain(vector as u8),
        }
    }
}

/// Why an instruction has no thunk.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    /// Not an instruction of the families that run natively.
    #[error("{0:?} is not run natively")]
    Family(Mnemonic),
    /// The host has not the instruction-set extension; the CPU model must not offer it.
    #[error("{0:?} needs an instruction-set extension that this host lacks: choose a smaller CPU model")]
    Host(Mnemonic),
    /// The code buffer is full: forget every [`ThunkRef`], call [`Thunks::reset`], compile again.
    #[error("the thunk buffer is full")]
    Full,
    /// The host refuses executable memory.
    #[error("no executable memory for thunks: {0} (a seccomp or SELinux policy may forbid executable memfds)")]
    Memory(#[from] std::io::Error),
}

/// The thunks of one CPU.
#[derive(Default)]
pub struct Thunks {
    arena: Option<arena::Arena>,
    made: HashMap<Key, ThunkRef>,
}

/// What tells two thunks apart: the bytes of the normalised instruction and the registers around it.
type Key = (Vec<u8>, emit::Plan);

/// Room for about 30,000 thunks; pages are backed as they fill.
const ARENA_BYTES: usize = 4 << 20;

impl Thunks {
    /// No thunks yet; memory is mapped at the first [`Thunks::compile`] that needs any.
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps the memory for code now: whoever calls may not be allowed to, later.
    pub(crate) fn map(&mut self) -> std::io::Result<()> {
        if self.arena.is_none() {
            self.arena = Some(arena::Arena::new(ARENA_BYTES)?);
        }
        Ok(())
    }

    /// Finds or makes the thunk of a decoded instruction (16, 32 or 64-bit code).
    pub fn compile(&mut self, instruction: &Instruction) -> Result<ThunkRef, Unsupported> {
        let mnemonic = instruction.mnemonic();
        if let Some(control) = control::find(instruction) {
            return Ok(ThunkRef {
                entry: control.entry,
                mem_size: control.mem_size,
                mem: control.mem,
                mem_align: control.mem_align,
                unit: control.unit,
                waits: control.waits,
                reads_flags: false,
                writes_flags: false,
                implicit_rdi: false,
            });
        }
        let unit = family::classify(instruction).map_err(|refusal| match refusal {
            family::Refusal::Family => Unsupported::Family(mnemonic),
            family::Refusal::Host => Unsupported::Host(mnemonic),
        })?;
        let native = normalise::plan(instruction, unit, &mut InstructionInfoFactory::new())
            .ok_or(Unsupported::Family(mnemonic))?;
        let mut encoder = Encoder::new(64);
        encoder.encode(&native.instruction, 0).map_err(|_| Unsupported::Family(mnemonic))?;
        let key = (encoder.take_buffer(), native.plan);
        if let Some(made) = self.made.get(&key) {
            return Ok(*made);
        }
        let arena = match &mut self.arena {
            Some(arena) => arena,
            None => self.arena.insert(arena::Arena::new(ARENA_BYTES)?),
        };
        let code = emit::assemble(&native.instruction, &key.1, arena.next_address())
            .map_err(|_| Unsupported::Family(mnemonic))?;
        let entry = arena.push(&code).ok_or(Unsupported::Full)?;
        // SAFETY: the arena holds a complete function of this type there, until it is reset or dropped.
        let entry = unsafe { std::mem::transmute::<std::ptr::NonNull<u8>, ThunkFn>(entry) };
        let made = ThunkRef { entry, ..native.thunk };
        self.made.insert(key, made);
        Ok(made)
    }

    /// Forgets all thunks. Every [`ThunkRef`] made before is dead: drop the decoded blocks first.
    pub fn reset(&mut self) {
        self.made.clear();
        if let Some(arena) = &mut self.arena {
            arena.clear();
        }
    }

    /// Memory in use, in bytes.
    pub fn bytes(&self) -> usize {
        let entry = size_of::<Key>() + size_of::<ThunkRef>() + 64;
        self.arena.as_ref().map_or(0, arena::Arena::used) + self.made.capacity() * entry
    }
}

impl std::fmt::Debug for Thunks {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Thunks").field("count", &self.made.len()).field("bytes", &self.bytes()).finish()
    }
}
