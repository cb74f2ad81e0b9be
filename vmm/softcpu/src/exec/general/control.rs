//! Jumps, calls, returns, loops: near ones. Far ones go to the segment unit.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::arith::{self, ZF, mask};
use super::integer::condition_of;
use super::operand::{Place, Slot};
use super::{Done, Flow, operand_size_of};
use crate::cpu::Cpu;
use crate::exec::Mode;
use crate::state::{Exception, SegmentName};
use crate::world::World;

impl Cpu {
    /// #GP(0) if a near branch may not go to `target`.
    pub(crate) fn check_branch(&self, target: u64) -> Result<(), Exception> {
        let good = if self.exec.mode == Mode::Bits64 {
            is_canonical(target)
        } else {
            target <= u64::from(self.sys.segments[SegmentName::Cs as usize].limit)
        };
        if good { Ok(()) } else { Err(Exception::gp(0)) }
    }
    /// Target of a relative branch: relative to where the code runs, which need not be where it was decoded.
    pub(super) fn near_target(&self, insn: &Instruction) -> u64 {
        let size = match insn.op0_kind() {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            _ => 8,
        };
        insn.near_branch_target().wrapping_sub(insn.next_ip()).wrapping_add(self.regs.rip) & mask(size)
    }
    fn go(&mut self, target: u64) -> Done {
        self.check_branch(target)?;
        self.regs.rip = target;
        Ok(Flow::Jump)
    }

    /// Jcc.
    pub(super) fn jcc(&mut self, insn: &Instruction) -> Done {
        if arith::condition(condition_of(insn), self.regs.rflags) {
            let target = self.near_target(insn);
            return self.go(target);
        }
        Ok(Flow::Next)
    }

    /// JMP.
    pub(super) fn jmp(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        if let Some((selector, offset, size)) = self.far_operand(world, insn)? {
            self.far_jump(world, selector, offset, operand_size_of(size))?;
            return Ok(Flow::Boundary);
        }
        let target = self.branch_operand(world, insn)?;
        self.go(target)
    }
    /// CALL.
    pub(super) fn call(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        if let Some((selector, offset, size)) = self.far_operand(world, insn)? {
            self.far_call(world, selector, offset, operand_size_of(size))?;
            return Ok(Flow::Boundary);
        }
        let target = self.branch_operand(world, insn)?;
        self.check_branch(target)?;
        let size = insn.stack_pointer_increment().unsigned_abs();
        self.push_value(world, size, self.regs.rip)?;
        self.regs.rip = target;
        Ok(Flow::Jump)
    }
    /// Target of a near JMP or CALL.
    fn branch_operand(&mut self, world: &mut dyn World, insn: &Instruction) -> Result<u64, Exception> {
        match insn.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Ok(self.near_target(insn)),
            _ => self.operand(world, insn, 0, Self::operand_size(insn, 0)),
        }
    }
    /// Selector, offset and operand size of a far JMP or CALL.
    fn far_operand(&mut self, world: &mut dyn World, insn: &Instruction) -> Result<Option<(u16, u64, u32)>, Exception> {
        let size = match insn.code() {
            Code::Jmp_ptr1616 | Code::Call_ptr1616 => {
                return Ok(Some((insn.far_branch_selector(), u64::from(insn.far_branch16()), 2)));
            }
            Code::Jmp_ptr1632 | Code::Call_ptr1632 => {
                return Ok(Some((insn.far_branch_selector(), u64::from(insn.far_branch32()), 4)));
            }
            Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_m1632 | Code::Call_m1632 => 4,
            Code::Jmp_m1664 | Code::Call_m1664 => 8,
            _ => return Ok(None),
        };
        let (offset, selector) = self.far_pointer(world, insn, size)?;
        Ok(Some((selector, offset, size)))
    }
    /// A far pointer in memory: offset of `size` bytes, then the selector.
    pub(super) fn far_pointer(
        &mut self,
        world: &mut dyn World,
        insn: &Instruction,
        size: u32,
    ) -> Result<(u64, u16), Exception> {
        let (segment, offset) = self.effective_address(insn);
        let stack = segment == SegmentName::Ss;
        let linear = self.linear(segment, offset, size + 2, false)?;
        let pointer = self.load_value(world, linear, size, stack)?;
        let selector = self.load_value(world, linear.wrapping_add(u64::from(size)), 2, stack)?;
        Ok((pointer, selector as u16))
    }

    /// RET, RETF and IRET share a mnemonic table only in part: this is near RET.
    pub(super) fn ret(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let extra = if insn.op_count() == 1 { u64::from(insn.immediate16()) } else { 0 };
        let size = match insn.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let target = self.peek_stack(world, 0, size)?;
        self.check_branch(target)?;
        self.add_to_sp(u64::from(size) + extra);
        self.regs.rip = target;
        Ok(Flow::Jump)
    }

    /// LOOP, LOOPE, LOOPNE, JCXZ and their wider forms.
    pub(super) fn loop_(&mut self, insn: &Instruction) -> Done {
        let size = match insn.code() {
            Code::Jcxz_rel8_16
            | Code::Jcxz_rel8_32
            | Code::Loop_rel8_16_CX
            | Code::Loop_rel8_32_CX
            | Code::Loope_rel8_16_CX
            | Code::Loope_rel8_32_CX
            | Code::Loopne_rel8_16_CX
            | Code::Loopne_rel8_32_CX => 2,
            Code::Jrcxz_rel8_16
            | Code::Jrcxz_rel8_64
            | Code::Loop_rel8_16_RCX
            | Code::Loop_rel8_64_RCX
            | Code::Loope_rel8_16_RCX
            | Code::Loope_rel8_64_RCX
            | Code::Loopne_rel8_16_RCX
            | Code::Loopne_rel8_64_RCX => 8,
            _ => 4,
        };
        let counter = Slot { offset: 8, size };
        let count = self.slot_value(counter);
        let zero = self.regs.rflags & ZF != 0;
        let next = count.wrapping_sub(1) & mask(u32::from(size));
        let (taken, counts) = match insn.mnemonic() {
            Mnemonic::Loop => (next != 0, true),
            Mnemonic::Loope => (next != 0 && zero, true),
            Mnemonic::Loopne => (next != 0 && !zero, true),
            _ => (count == 0, false),
        };
        let target = self.near_target(insn);
        if taken {
            self.check_branch(target)?;
        }
        if counts {
            self.set_slot(counter, next);
        }
        if taken {
            self.regs.rip = target;
            return Ok(Flow::Jump);
        }
        Ok(Flow::Next)
    }

    /// BOUND: signed array index check, legacy modes.
    pub(super) fn bound(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = insn.op0_register().size() as u32;
        let place = self.operand_place(insn, 1, size * 2, false)?;
        let Place::Mem { linear, stack } = place else { return Err(Exception::ud()) };
        let lower = self.load_value(world, linear, size, stack)?;
        let upper = self.load_value(world, linear.wrapping_add(u64::from(size)), size, stack)?;
        let [lower, upper, index] =
            [lower, upper, self.register(insn.op0_register())].map(|value| arith::sign_extend(value, size) as i64);
        if index < lower || index > upper { Err(Exception::plain(5)) } else { Ok(Flow::Next) }
    }

    /// XLAT: the table's base is rBX in the address size.
    pub(super) fn xlat(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let (size, base) = match insn.memory_base() {
            Register::BX => (2, self.regs.gpr[3]),
            Register::EBX => (4, self.regs.gpr[3]),
            _ => (8, self.regs.gpr[3]),
        };
        let offset = base.wrapping_add(self.regs.gpr[0] & 0xff) & mask(size);
        let segment = super::segment_name(insn.memory_segment());
        let linear = self.linear(segment, offset, 1, false)?;
        let value = self.load_value(world, linear, 1, segment == SegmentName::Ss)?;
        self.set_register(Register::AL, value);
        Ok(Flow::Next)
    }
}

/// Whether an address is canonical with 48 bits.
pub(crate) fn is_canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}
