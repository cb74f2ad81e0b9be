//! Stack instructions. RSP changes only after every access has succeeded.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::operand::{segment_name, slot};
use super::{Done, Flow, operand_size_of};
use crate::cpu::Cpu;
use crate::state::{Exception, SegmentName};
use crate::world::World;

const RSP: usize = 4;
const RBP: usize = 5;

impl Cpu {
    /// Linear address of `size` bytes at offset `offset` (wrapped to the stack's width) of the stack segment.
    fn stack_linear(&self, offset: u64, size: u32, write: bool) -> Result<u64, Exception> {
        self.linear(SegmentName::Ss, offset & self.stack_mask(), size, write)
    }
    fn set_sp(&mut self, value: u64) {
        let mask = self.stack_mask();
        self.regs.gpr[RSP] = (self.regs.gpr[RSP] & !mask) | (value & mask);
    }
    /// Adds to the stack pointer within the stack's width.
    pub(super) fn add_to_sp(&mut self, by: u64) {
        self.set_sp(self.regs.gpr[RSP].wrapping_add(by));
    }
    /// Reads `size` bytes `above` bytes above the top of the stack.
    pub(super) fn peek_stack(&mut self, world: &mut dyn World, above: u64, size: u32) -> Result<u64, Exception> {
        let linear = self.stack_linear(self.regs.gpr[RSP].wrapping_add(above), size, false)?;
        self.load_value(world, linear, size, true)
    }
    /// Pushes one value.
    pub(super) fn push_value(&mut self, world: &mut dyn World, size: u32, value: u64) -> Result<(), Exception> {
        let top = self.regs.gpr[RSP].wrapping_sub(u64::from(size));
        let linear = self.stack_linear(top, size, true)?;
        self.store_value(world, linear, size, value, true)?;
        self.set_sp(top);
        Ok(())
    }

    /// PUSH of a register, memory, immediate or segment register.
    pub(super) fn push_operand(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = insn.stack_pointer_increment().unsigned_abs();
        let value = match insn.op0_kind() {
            OpKind::Register if slot(insn.op0_register()).is_none() => {
                u64::from(self.sys.segments[segment_name(insn.op0_register()) as usize].selector)
            }
            _ => self.operand(world, insn, 0, size)?,
        };
        self.push_value(world, size, value)?;
        Ok(Flow::Next)
    }

    /// POP to a register, memory or segment register.
    pub(super) fn pop_operand(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = insn.stack_pointer_increment().unsigned_abs();
        let value = self.peek_stack(world, 0, size)?;
        match insn.op0_kind() {
            OpKind::Register => match slot(insn.op0_register()) {
                Some(target) => {
                    self.add_to_sp(u64::from(size));
                    self.set_slot(target, value);
                }
                None => {
                    let name = segment_name(insn.op0_register());
                    let mask = self.stack_mask();
                    self.load_segment(world, name, value as u16)?;
                    let sp = self.regs.gpr[RSP];
                    self.regs.gpr[RSP] = (sp & !mask) | (sp.wrapping_add(u64::from(size)) & mask);
                    self.sys.interrupt_shadow |= name == SegmentName::Ss;
                    return Ok(Flow::Boundary);
                }
            },
            _ => {
                // An address through RSP is computed with the value after the increment.
                let before = self.regs.gpr[RSP];
                self.add_to_sp(u64::from(size));
                let result = match self.operand_place(insn, 0, size, true) {
                    Ok(place) => self.put_place(world, place, size, value),
                    Err(fault) => Err(fault),
                };
                if let Err(fault) = result {
                    self.regs.gpr[RSP] = before;
                    return Err(fault);
                }
            }
        }
        Ok(Flow::Next)
    }

    /// PUSHA and PUSHAD.
    pub(super) fn pusha(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = if insn.code() == Code::Pushaw { 2u32 } else { 4 };
        let values = [7, 6, 5, 4, 3, 2, 1, 0].map(|n| self.regs.gpr[n]);
        let bottom = self.regs.gpr[RSP].wrapping_sub(u64::from(size) * 8);
        // Probe the far end first, so that a fault leaves nothing written that a restart would not write again.
        for (n, value) in values.into_iter().enumerate() {
            let linear = self.stack_linear(bottom.wrapping_add(n as u64 * u64::from(size)), size, true)?;
            self.store_value(world, linear, size, value, true)?;
        }
        self.set_sp(bottom);
        Ok(Flow::Next)
    }
    /// POPA and POPAD: the saved SP is skipped.
    pub(super) fn popa(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let (size, registers) = if insn.code() == Code::Popaw {
            (
                2u32,
                [
                    Register::DI,
                    Register::SI,
                    Register::BP,
                    Register::SP,
                    Register::BX,
                    Register::DX,
                    Register::CX,
                    Register::AX,
                ],
            )
        } else {
            (
                4,
                [
                    Register::EDI,
                    Register::ESI,
                    Register::EBP,
                    Register::ESP,
                    Register::EBX,
                    Register::EDX,
                    Register::ECX,
                    Register::EAX,
                ],
            )
        };
        let mut values = [0; 8];
        for (n, value) in values.iter_mut().enumerate() {
            *value = self.peek_stack(world, n as u64 * u64::from(size), size)?;
        }
        for (n, (register, value)) in registers.into_iter().zip(values).enumerate() {
            if n != 3 {
                self.set_register(register, value);
            }
        }
        self.add_to_sp(u64::from(size) * 8);
        Ok(Flow::Next)
    }

    /// PUSHF.
    pub(super) fn pushf(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = insn.stack_pointer_increment().unsigned_abs();
        if self.regs.rflags & (1 << 17) != 0 && self.regs.rflags >> 12 & 3 != 3 {
            return Err(Exception::gp(0));
        }
        let value = self.pushf_value();
        self.push_value(world, size, value)?;
        Ok(Flow::Next)
    }
    /// POPF.
    pub(super) fn popf_stack(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = insn.stack_pointer_increment().unsigned_abs();
        let value = self.peek_stack(world, 0, size)?;
        self.popf(value, operand_size_of(size))?;
        self.add_to_sp(u64::from(size));
        Ok(Flow::Boundary)
    }

    /// ENTER.
    pub(super) fn enter_frame(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = match insn.code() {
            Code::Enterw_imm16_imm8 => 2u32,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let step = u64::from(size);
        let locals = u64::from(insn.immediate16());
        let level = u64::from(insn.immediate8_2nd()) % 32;
        let (sp, bp) = (self.regs.gpr[RSP], self.regs.gpr[RBP]);
        let mut top = sp.wrapping_sub(step);
        let linear = self.stack_linear(top, size, true)?;
        self.store_value(world, linear, size, bp, true)?;
        let frame = top;
        for n in 1..=level {
            let value = if n == level {
                frame
            } else {
                let linear = self.stack_linear(bp.wrapping_sub(step * n), size, false)?;
                self.load_value(world, linear, size, true)?
            };
            top = top.wrapping_sub(step);
            let linear = self.stack_linear(top, size, true)?;
            self.store_value(world, linear, size, value, true)?;
        }
        let top = top.wrapping_sub(locals);
        // The new top must be writable, or the fault would come later at an instruction that is not restartable.
        let linear = self.stack_linear(top, size, true)?;
        self.check_write(linear, size as usize, self.exec.user).map_err(|fault| super::stack_fault(fault, true))?;
        self.set_sp(top);
        self.set_frame(size, frame);
        Ok(Flow::Next)
    }
    /// LEAVE.
    pub(super) fn leave(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = match insn.code() {
            Code::Leavew => 2u32,
            Code::Leaved => 4,
            _ => 8,
        };
        let frame = self.regs.gpr[RBP];
        let linear = self.stack_linear(frame, size, false)?;
        let saved = self.load_value(world, linear, size, true)?;
        self.set_sp(frame.wrapping_add(u64::from(size)));
        self.set_frame(size, saved);
        Ok(Flow::Next)
    }
    fn set_frame(&mut self, size: u32, value: u64) {
        let register = match size {
            2 => Register::BP,
            4 => Register::EBP,
            _ => Register::RBP,
        };
        self.set_register(register, value);
    }
}
