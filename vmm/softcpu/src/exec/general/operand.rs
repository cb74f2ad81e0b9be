//! Operands of a decoded instruction: registers by name, effective addresses, guest memory.

use iced_x86::{Instruction, OpKind, Register};

use super::arith::mask;
use crate::cpu::Cpu;
use crate::exec::Mode;
use crate::mmu::HostRw;
use crate::state::{Exception, SegmentName};
use crate::world::World;

/// Where a general purpose register lives: byte offset into `Regs::gpr`, size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Byte offset (AH to BH are odd).
    pub(crate) offset: u8,
    /// 1, 2, 4 or 8.
    pub(crate) size: u8,
}

/// The slot of a general purpose register.
pub(crate) fn slot(register: Register) -> Option<Slot> {
    let number = register as usize;
    let from = |first: Register| (number - first as usize) as u8;
    if (Register::AL as usize..=Register::R15L as usize).contains(&number) {
        let n = from(Register::AL);
        // AL CL DL BL AH CH DH BH SPL BPL SIL DIL R8L …
        let offset = match n {
            0..=3 => n * 8,
            4..=7 => (n - 4) * 8 + 1,
            _ => (n - 4) * 8,
        };
        Some(Slot { offset, size: 1 })
    } else if (Register::AX as usize..=Register::R15W as usize).contains(&number) {
        Some(Slot { offset: from(Register::AX) * 8, size: 2 })
    } else if (Register::EAX as usize..=Register::R15D as usize).contains(&number) {
        Some(Slot { offset: from(Register::EAX) * 8, size: 4 })
    } else if (Register::RAX as usize..=Register::R15 as usize).contains(&number) {
        Some(Slot { offset: from(Register::RAX) * 8, size: 8 })
    } else {
        None
    }
}

/// The segment register of a decoded operand.
pub(crate) fn segment_name(register: Register) -> SegmentName {
    match register {
        Register::ES => SegmentName::Es,
        Register::CS => SegmentName::Cs,
        Register::SS => SegmentName::Ss,
        Register::FS => SegmentName::Fs,
        Register::GS => SegmentName::Gs,
        _ => SegmentName::Ds,
    }
}

/// An operand whose address has been computed and checked against its segment.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// A register.
    Reg(Slot),
    /// Memory at a linear address; `stack` turns #GP into #SS.
    Mem {
        /// Linear address.
        linear: u64,
        /// Through SS.
        stack: bool,
    },
}

impl Cpu {
    /// Value of a register slot, zero-extended.
    pub(crate) fn slot_value(&self, slot: Slot) -> u64 {
        let word = self.regs.gpr[usize::from(slot.offset / 8)];
        (word >> ((slot.offset & 7) * 8)) & mask(u32::from(slot.size))
    }
    /// Writes a register slot: 32-bit writes clear the upper half, narrower ones merge.
    pub(crate) fn set_slot(&mut self, slot: Slot, value: u64) {
        let word = &mut self.regs.gpr[usize::from(slot.offset / 8)];
        match slot.size {
            8 => *word = value,
            4 => *word = value & 0xffff_ffff,
            _ => {
                let shift = (slot.offset & 7) * 8;
                let field = mask(u32::from(slot.size)) << shift;
                *word = (*word & !field) | ((value << shift) & field);
            }
        }
    }
    /// Value of a general purpose register.
    pub(crate) fn register(&self, register: Register) -> u64 {
        slot(register).map_or(0, |slot| self.slot_value(slot))
    }
    /// Writes a general purpose register.
    pub(crate) fn set_register(&mut self, register: Register, value: u64) {
        if let Some(slot) = slot(register) {
            self.set_slot(slot, value);
        }
    }

    /// Offset part of the memory operand, and the segment it is taken through.
    pub(crate) fn effective_address(&self, insn: &Instruction) -> (SegmentName, u64) {
        let segment = segment_name(insn.memory_segment());
        let base = insn.memory_base();
        let index = insn.memory_index();
        let displacement = insn.memory_displacement64();
        if base == Register::RIP || base == Register::EIP {
            // The decoder has resolved it against the address at which this code was decoded; the same frame may run
            // at another one.
            let offset = displacement.wrapping_sub(insn.next_ip()).wrapping_add(self.regs.rip);
            return (segment, if base == Register::EIP { offset & 0xffff_ffff } else { offset });
        }
        let size = slot(base).or_else(|| slot(index)).map_or(insn.memory_displ_size(), |slot| u32::from(slot.size));
        let mut offset = displacement.wrapping_add(self.register(base));
        offset = offset.wrapping_add(self.register(index).wrapping_mul(u64::from(insn.memory_index_scale())));
        (segment, offset & mask(size))
    }
    /// Linear address of `len` bytes at segment:offset, limit and type checked outside 64-bit mode.
    pub(crate) fn linear(&self, segment: SegmentName, offset: u64, len: u32, write: bool) -> Result<u64, Exception> {
        if self.exec.mode == Mode::Bits64 {
            let base = match segment {
                SegmentName::Fs | SegmentName::Gs => self.sys.segments[segment as usize].base,
                _ => 0,
            };
            return Ok(offset.wrapping_add(base));
        }
        self.segment_linear(segment, offset, len, write)
    }
    /// The place of operand `n`, whose size is `size` bytes.
    pub(crate) fn operand_place(&self, insn: &Instruction, n: u32, size: u32, write: bool) -> Result<Place, Exception> {
        match insn.op_kind(n) {
            OpKind::Register => slot(insn.op_register(n)).map(Place::Reg).ok_or(Exception::ud()),
            OpKind::Memory => {
                let (segment, offset) = self.effective_address(insn);
                let linear = self.linear(segment, offset, size, write)?;
                Ok(Place::Mem { linear, stack: segment == SegmentName::Ss })
            }
            _ => Err(Exception::ud()),
        }
    }
    /// Size in bytes of operand `n`.
    pub(crate) fn operand_size(insn: &Instruction, n: u32) -> u32 {
        match insn.op_kind(n) {
            OpKind::Register => insn.op_register(n).size() as u32,
            OpKind::Memory => insn.memory_size().size() as u32,
            OpKind::Immediate8 => 1,
            OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
            OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
            _ => 8,
        }
    }
    /// Value of operand `n`, zero-extended from `size` bytes.
    pub(crate) fn operand(
        &mut self,
        world: &mut dyn World,
        insn: &Instruction,
        n: u32,
        size: u32,
    ) -> Result<u64, Exception> {
        match insn.op_kind(n) {
            OpKind::Register => Ok(self.register(insn.op_register(n))),
            OpKind::Memory => {
                let place = self.operand_place(insn, n, size, false)?;
                self.get_place(world, place, size)
            }
            _ => Ok(insn.immediate(n) & mask(size)),
        }
    }
    /// Reads a place.
    pub(crate) fn get_place(&mut self, world: &mut dyn World, place: Place, size: u32) -> Result<u64, Exception> {
        match place {
            Place::Reg(slot) => Ok(self.slot_value(slot)),
            Place::Mem { linear, stack } => self.load_value(world, linear, size, stack),
        }
    }
    /// Writes a place.
    pub(crate) fn put_place(
        &mut self,
        world: &mut dyn World,
        place: Place,
        size: u32,
        value: u64,
    ) -> Result<(), Exception> {
        match place {
            Place::Reg(slot) => {
                self.set_slot(slot, value);
                Ok(())
            }
            Place::Mem { linear, stack } => self.store_value(world, linear, size, value, stack),
        }
    }
    /// Loads `size` bytes (1, 2, 4 or 8) at a linear address.
    pub(crate) fn load_value(
        &mut self,
        world: &mut dyn World,
        linear: u64,
        size: u32,
        stack: bool,
    ) -> Result<u64, Exception> {
        if let Some(value) = self.load_fast(linear, size) {
            return Ok(value);
        }
        let mut bytes = [0; 8];
        let result = self.read_slow(world, linear, &mut bytes[..size as usize], self.exec.user);
        result.map_err(|fault| stack_fault(fault, stack))?;
        Ok(u64::from_le_bytes(bytes))
    }
    /// Stores `size` bytes at a linear address.
    pub(crate) fn store_value(
        &mut self,
        world: &mut dyn World,
        linear: u64,
        size: u32,
        value: u64,
        stack: bool,
    ) -> Result<(), Exception> {
        if self.store_fast(linear, size, value) {
            return Ok(());
        }
        let result = self.write_slow(world, linear, &value.to_le_bytes()[..size as usize], self.exec.user);
        result.map_err(|fault| stack_fault(fault, stack))
    }

    /// Reads, changes and writes a place; `change` returns the new value, or `None` to leave it (which still counts as
    /// a write for faults). With `lock` the change is one host atomic: it is retried until no other writer came between.
    ///
    /// A locked access that crosses a page, or to a device, is read and then written without atomicity: compilers and
    /// kernels align locks, and processors are about to fault on it (split-lock #AC).
    pub(crate) fn modify(
        &mut self,
        world: &mut dyn World,
        place: Place,
        size: u32,
        lock: bool,
        change: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> Result<(), Exception> {
        let (linear, stack) = match place {
            Place::Reg(slot) => {
                if let Some(value) = change(self.slot_value(slot)) {
                    self.set_slot(slot, value);
                }
                return Ok(());
            }
            Place::Mem { linear, stack } => (linear, stack),
        };
        let target = self.host_rw(linear, size as usize, self.exec.user);
        match target.map_err(|fault| stack_fault(fault, stack))? {
            HostRw::Ram { host, gpa, code } => {
                if lock {
                    super::atomic::update(host, size, change);
                } else {
                    super::atomic::update_plain(host, size, change);
                }
                if code {
                    self.code_written(gpa, size as usize);
                }
                Ok(())
            }
            HostRw::Slow => {
                let old = self.load_value(world, linear, size, stack)?;
                match change(old) {
                    Some(new) => self.store_value(world, linear, size, new, stack),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Faults of stack accesses: #GP becomes #SS.
pub(crate) fn stack_fault(fault: Exception, stack: bool) -> Exception {
    if stack { fault.into_stack_fault() } else { fault }
}
