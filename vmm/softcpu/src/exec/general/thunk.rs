//! Instructions that run on the host's own units: availability checks, the memory operand, the call.
#![allow(unsafe_code, reason = "calls native thunks")]

use iced_x86::{Instruction, OpKind};

use super::arith::mask;
use super::operand::segment_name;
use super::{Done, Flow};
use crate::cpu::Cpu;
use crate::mmu::{HostRw, is_canonical};
use crate::native::{MemAccess, ThunkRef, Unit, Unsupported};
use crate::state::{Exception, SegmentName};
use crate::world::World;

const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// An instruction with its thunk, as a decoded block keeps it.
#[derive(Clone, Copy)]
pub(crate) struct ThunkCall {
    /// For the address of its operand.
    pub(crate) insn: Instruction,
    /// What to call.
    pub(crate) thunk: ThunkRef,
}

/// Where a memory operand goes that is not one stretch of RAM.
#[repr(C, align(64))]
struct Scratch([u8; 512]);

impl Cpu {
    /// Finds the thunk of an instruction and runs it; #UD if there is none.
    pub(super) fn native(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        match self.exec.thunks.compile(insn) {
            Ok(thunk) => self.run_thunk(world, insn, &thunk),
            Err(Unsupported::Full) => {
                // Blocks hold references into the buffer: they go too, and the block that runs now ends here.
                self.exec.forget_all_code();
                self.exec.thunks.reset();
                match self.exec.thunks.compile(insn) {
                    Ok(thunk) => self.run_thunk(world, insn, &thunk).map(|_| Flow::Boundary),
                    Err(_) => Err(Exception::ud()),
                }
            }
            Err(_) => Err(Exception::ud()),
        }
    }

    /// Checks that the unit is enabled.
    pub(crate) fn check_unit(&self, unit: Unit) -> Result<(), Exception> {
        let (cr0, cr4) = (self.sys.cr0, self.sys.cr4);
        let undefined = match unit {
            Unit::Mmx => cr0 & CR0_EM != 0,
            Unit::Sse => cr0 & CR0_EM != 0 || cr4 & CR4_OSFXSR == 0,
            _ => false,
        };
        if undefined {
            return Err(Exception::ud());
        }
        let absent = match unit {
            Unit::Integer => false,
            Unit::X87 | Unit::Fxsr => cr0 & (CR0_EM | CR0_TS) != 0,
            Unit::Fwait => cr0 & CR0_MP != 0 && cr0 & CR0_TS != 0,
            Unit::Mmx | Unit::Sse => cr0 & CR0_TS != 0,
        };
        if absent { Err(Exception::plain(7)) } else { Ok(()) }
    }

    fn call_thunk(&mut self, thunk: &ThunkRef, memory: *mut u8) -> Result<(), Exception> {
        // SAFETY: the thunk belongs to this CPU's buffer, which lives, and `memory` is valid for its operand.
        match unsafe { (thunk.entry)(&raw mut self.regs, memory) } {
            0 => Ok(()),
            19 if self.sys.cr4 & CR4_OSXMMEXCPT == 0 => Err(Exception::ud()),
            code => Err(ThunkRef::exception(code)),
        }
    }

    /// Runs a thunk.
    pub(crate) fn run_thunk(&mut self, world: &mut dyn World, insn: &Instruction, thunk: &ThunkRef) -> Done {
        self.check_unit(thunk.unit)?;
        if thunk.waits && self.regs.fp.pending() {
            // Before the operand is looked at.
            return Err(Exception::plain(16));
        }
        if thunk.mem == MemAccess::None {
            self.call_thunk(thunk, std::ptr::dangling_mut())?;
            return Ok(Flow::Next);
        }
        let size = u32::from(thunk.mem_size);
        let (segment, offset) = if thunk.implicit_rdi {
            let width = match insn.op0_kind() {
                OpKind::MemorySegDI => 2,
                OpKind::MemorySegEDI => 4,
                _ => 8,
            };
            (segment_name(insn.memory_segment()), self.regs.gpr[7] & mask(width))
        } else {
            self.effective_address(insn)
        };
        let stack = segment == SegmentName::Ss;
        let write = thunk.mem != MemAccess::Read;
        let linear = self.linear(segment, offset, size, write)?;
        if linear & u64::from(thunk.mem_align).wrapping_sub(1) != 0 {
            // Only the state images look whether the address is canonical before they look at its alignment.
            let beyond = thunk.unit == Unit::Fxsr && self.long_mode_active() && !is_canonical(linear);
            return Err(super::stack_fault(Exception::gp(0), stack && beyond));
        }
        if !write {
            if let Some(host) = self.host_read_fast(linear, size) {
                self.call_thunk(thunk, host)?;
                return Ok(Flow::Next);
            }
            let mut scratch = Scratch([0; 512]);
            let read = self.read_slow(world, linear, &mut scratch.0[..size as usize], self.exec.user);
            read.map_err(|fault| super::stack_fault(fault, stack))?;
            self.call_thunk(thunk, scratch.0.as_mut_ptr())?;
            return Ok(Flow::Next);
        }
        let target = self.host_rw(linear, size as usize, self.exec.user);
        match target.map_err(|fault| super::stack_fault(fault, stack))? {
            HostRw::Ram { host, gpa, code } => {
                self.call_thunk(thunk, host)?;
                if code {
                    self.code_written(gpa, size as usize);
                }
            }
            HostRw::Slow => {
                let mut scratch = Scratch([0; 512]);
                let bytes = &mut scratch.0[..size as usize];
                if thunk.mem == MemAccess::ReadWrite {
                    let read = self.read_slow(world, linear, bytes, self.exec.user);
                    read.map_err(|fault| super::stack_fault(fault, stack))?;
                }
                self.call_thunk(thunk, bytes.as_mut_ptr())?;
                let written = self.write_slow(world, linear, bytes, self.exec.user);
                written.map_err(|fault| super::stack_fault(fault, stack))?;
            }
        }
        Ok(Flow::Next)
    }
}
