//! Moves, arithmetic, multiplication, exchange.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::arith::{self, AF, ARITH, CF, OF, PF, SF, ZF, mask, sign_extend};
use super::operand::{Place, Slot, segment_name, slot};
use super::{Done, Flow};
use crate::cpu::Cpu;
use crate::mmu::HostRw;
use crate::state::{Exception, SegmentName};
use crate::world::World;

impl Cpu {
    /// MOV in all forms but control and debug registers.
    pub(super) fn mov(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        if insn.op1_kind() == OpKind::Register && slot(insn.op1_register()).is_none() {
            let source = insn.op1_register();
            if source.is_segment_register() {
                let value = u64::from(self.sys.segments[segment_name(source) as usize].selector);
                let size = Self::operand_size(insn, 0);
                let place = self.operand_place(insn, 0, size, true)?;
                self.put_place(world, place, size, value)?;
                return Ok(Flow::Next);
            }
            return self.mov_system(world, insn);
        }
        if insn.op0_kind() == OpKind::Register && slot(insn.op0_register()).is_none() {
            let target = insn.op0_register();
            if target.is_segment_register() {
                let name = segment_name(target);
                if name == SegmentName::Cs {
                    return Err(Exception::ud());
                }
                let selector = self.operand(world, insn, 1, 2)? as u16;
                self.load_segment(world, name, selector)?;
                self.sys.interrupt_shadow |= name == SegmentName::Ss;
                return Ok(Flow::Boundary);
            }
            return self.mov_system(world, insn);
        }
        let size = Self::operand_size(insn, 0);
        let value = self.operand(world, insn, 1, size)?;
        let place = self.operand_place(insn, 0, size, true)?;
        self.put_place(world, place, size, value)?;
        Ok(Flow::Next)
    }

    /// The eight classic operations and TEST.
    pub(super) fn alu(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let b = self.operand(world, insn, 1, size)?;
        let flags = self.regs.rflags;
        let carry = flags & CF != 0;
        let mnemonic = insn.mnemonic();
        let apply = |a: u64| match mnemonic {
            Mnemonic::Add => arith::add(a, b, false, size, flags),
            Mnemonic::Adc => arith::add(a, b, carry, size, flags),
            Mnemonic::Sub | Mnemonic::Cmp => arith::sub(a, b, false, size, flags),
            Mnemonic::Sbb => arith::sub(a, b, carry, size, flags),
            Mnemonic::And | Mnemonic::Test => arith::logic(a & b, size, flags),
            Mnemonic::Or => arith::logic(a | b, size, flags),
            _ => arith::logic(a ^ b, size, flags),
        };
        if matches!(mnemonic, Mnemonic::Cmp | Mnemonic::Test) {
            let a = self.operand(world, insn, 0, size)?;
            self.regs.rflags = apply(a).1;
            return Ok(Flow::Next);
        }
        let place = self.operand_place(insn, 0, size, true)?;
        let mut out = flags;
        self.modify(world, place, size, insn.has_lock_prefix(), &mut |a| {
            let (value, after) = apply(a);
            out = after;
            Some(value)
        })?;
        self.regs.rflags = out;
        Ok(Flow::Next)
    }

    /// INC, DEC, NOT, NEG.
    pub(super) fn unary(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let place = self.operand_place(insn, 0, size, true)?;
        let flags = self.regs.rflags;
        let mnemonic = insn.mnemonic();
        let mut out = flags;
        self.modify(world, place, size, insn.has_lock_prefix(), &mut |a| {
            let (value, after) = match mnemonic {
                Mnemonic::Inc => arith::inc(a, size, flags),
                Mnemonic::Dec => arith::dec(a, size, flags),
                Mnemonic::Not => (!a & mask(size), flags),
                _ => arith::sub(0, a, false, size, flags),
            };
            out = after;
            Some(value)
        })?;
        self.regs.rflags = out;
        Ok(Flow::Next)
    }

    /// LEA.
    pub(super) fn lea(&mut self, insn: &Instruction) -> Done {
        let (_, offset) = self.effective_address(insn);
        self.set_register(insn.op0_register(), offset);
        Ok(Flow::Next)
    }

    /// MOVZX, MOVSX, MOVSXD.
    pub(super) fn extend(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 1);
        let mut value = self.operand(world, insn, 1, size)?;
        if insn.mnemonic() != Mnemonic::Movzx {
            value = sign_extend(value, size);
        }
        self.set_register(insn.op0_register(), value);
        Ok(Flow::Next)
    }

    /// XCHG: locked whenever memory takes part.
    pub(super) fn xchg(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        // One operand may be memory; which of the two differs between assemblers.
        let (memory, register) = if insn.op1_kind() == OpKind::Memory { (1, 0) } else { (0, 1) };
        let register = slot(insn.op_register(register)).ok_or(Exception::ud())?;
        let new = self.slot_value(register);
        let place = self.operand_place(insn, memory, size, true)?;
        let mut old = 0;
        self.modify(world, place, size, true, &mut |value| {
            old = value;
            Some(new)
        })?;
        self.set_slot(register, old);
        Ok(Flow::Next)
    }

    /// XADD.
    pub(super) fn xadd(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let source = slot(insn.op1_register()).ok_or(Exception::ud())?;
        let addend = self.slot_value(source);
        let place = self.operand_place(insn, 0, size, true)?;
        let flags = self.regs.rflags;
        let (mut old, mut sum, mut out) = (0, 0, flags);
        self.modify(world, place, size, insn.has_lock_prefix(), &mut |value| {
            old = value;
            (sum, out) = arith::add(value, addend, false, size, flags);
            Some(sum)
        })?;
        self.set_slot(source, old);
        if let Place::Reg(target) = place {
            // XADD of a register with itself keeps the sum.
            self.set_slot(target, sum);
        }
        self.regs.rflags = out;
        Ok(Flow::Next)
    }

    /// CMPXCHG.
    pub(super) fn cmpxchg(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let accumulator = Slot { offset: 0, size: size as u8 };
        let expected = self.slot_value(accumulator);
        let new = self.register(insn.op1_register());
        let place = self.operand_place(insn, 0, size, true)?;
        let mut seen = 0;
        self.modify(world, place, size, insn.has_lock_prefix(), &mut |value| {
            seen = value;
            (value == expected).then_some(new)
        })?;
        if seen != expected {
            self.set_slot(accumulator, seen);
        }
        self.regs.rflags = arith::sub(expected, seen, false, size, self.regs.rflags).1;
        Ok(Flow::Next)
    }

    /// CMPXCHG8B.
    pub(super) fn cmpxchg8b(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let place = self.operand_place(insn, 0, 8, true)?;
        let pair = |low: u64, high: u64| (low & 0xffff_ffff) | (high << 32);
        let [rax, rcx, rdx, rbx] = [0, 1, 2, 3].map(|n| self.regs.gpr[n]);
        let (expected, new) = (pair(rax, rdx), pair(rbx, rcx));
        let mut seen = 0;
        self.modify(world, place, 8, insn.has_lock_prefix(), &mut |value| {
            seen = value;
            (value == expected).then_some(new)
        })?;
        if seen == expected {
            self.regs.rflags |= ZF;
        } else {
            self.regs.rflags &= !ZF;
            self.set_register(Register::EAX, seen);
            self.set_register(Register::EDX, seen >> 32);
        }
        Ok(Flow::Next)
    }

    /// CMPXCHG16B.
    pub(super) fn cmpxchg16b(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let place = self.operand_place(insn, 0, 16, true)?;
        let Place::Mem { linear, stack } = place else { return Err(Exception::ud()) };
        if !linear.is_multiple_of(16) {
            return Err(Exception::gp(0));
        }
        let pair = |low: u64, high: u64| u128::from(low) | (u128::from(high) << 64);
        let [rax, rcx, rdx, rbx] = [0, 1, 2, 3].map(|n| self.regs.gpr[n]);
        let (expected, new) = (pair(rax, rdx), pair(rbx, rcx));
        let (equal, seen) = self.exchange_16(world, linear, stack, expected, new)?;
        if equal {
            self.regs.rflags |= ZF;
        } else {
            self.regs.rflags &= !ZF;
            self.regs.gpr[0] = seen as u64;
            self.regs.gpr[2] = (seen >> 64) as u64;
        }
        Ok(Flow::Next)
    }

    /// MUL and IMUL in all forms.
    pub(super) fn multiply(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        if insn.op_count() > 1 {
            let first = insn.op_count() - 2;
            let a = self.operand(world, insn, first, size)?;
            let b = self.operand(world, insn, first + 1, size)?;
            let (low, _, flags) = arith::imul(a, b, size, self.regs.rflags);
            self.set_register(insn.op0_register(), low);
            self.regs.rflags = flags;
            return Ok(Flow::Next);
        }
        let b = self.operand(world, insn, 0, size)?;
        let a = self.regs.gpr[0] & mask(size);
        let flags = self.regs.rflags;
        let (low, high, flags) = if insn.mnemonic() == Mnemonic::Mul {
            arith::mul(a, b, size, flags)
        } else {
            arith::imul(a, b, size, flags)
        };
        self.set_pair(size, low, high);
        self.regs.rflags = flags;
        Ok(Flow::Next)
    }

    /// DIV and IDIV.
    pub(super) fn divide(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let divisor = self.operand(world, insn, 0, size)?;
        let low = self.regs.gpr[0] & mask(size);
        let high = if size == 1 { self.regs.gpr[0] >> 8 & 0xff } else { self.regs.gpr[2] & mask(size) };
        let result = if insn.mnemonic() == Mnemonic::Div {
            arith::div(high, low, divisor, size)
        } else {
            arith::idiv(high, low, divisor, size)
        };
        let (quotient, remainder) = result.ok_or(Exception::plain(0))?;
        self.set_pair(size, quotient, remainder);
        Ok(Flow::Next)
    }
    /// Writes AX, DX:AX, EDX:EAX or RDX:RAX.
    fn set_pair(&mut self, size: u32, low: u64, high: u64) {
        if size == 1 {
            self.set_register(Register::AX, low | (high << 8));
            return;
        }
        self.set_slot(Slot { offset: 0, size: size as u8 }, low);
        self.set_slot(Slot { offset: 16, size: size as u8 }, high);
    }

    /// CBW, CWDE, CDQE, CWD, CDQ, CQO.
    pub(super) fn widen(&mut self, insn: &Instruction) -> Done {
        let rax = self.regs.gpr[0];
        let (register, value) = match insn.mnemonic() {
            Mnemonic::Cbw => (Register::AX, sign_extend(rax & 0xff, 1)),
            Mnemonic::Cwde => (Register::EAX, sign_extend(rax & 0xffff, 2)),
            Mnemonic::Cdqe => (Register::RAX, sign_extend(rax & 0xffff_ffff, 4)),
            Mnemonic::Cwd => (Register::DX, sign_extend(rax & 0xffff, 2) >> 16),
            Mnemonic::Cdq => (Register::EDX, sign_extend(rax & 0xffff_ffff, 4) >> 32),
            _ => (Register::RDX, ((rax as i64) >> 63) as u64),
        };
        self.set_register(register, value);
        Ok(Flow::Next)
    }

    /// SETcc.
    pub(super) fn setcc(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let value = arith::condition(condition_of(insn), self.regs.rflags);
        let place = self.operand_place(insn, 0, 1, true)?;
        self.put_place(world, place, 1, u64::from(value))?;
        Ok(Flow::Next)
    }
    /// CMOVcc: the source is read, and a 32-bit destination's upper half cleared, in any case.
    pub(super) fn cmov(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let source = self.operand(world, insn, 1, size)?;
        let target = insn.op0_register();
        let taken = arith::condition(condition_of(insn), self.regs.rflags);
        let value = if taken { source } else { self.register(target) };
        self.set_register(target, value);
        Ok(Flow::Next)
    }

    /// LAHF, SAHF, and single flags.
    pub(super) fn flag_op(&mut self, insn: &Instruction) -> Done {
        let flags = &mut self.regs.rflags;
        match insn.mnemonic() {
            Mnemonic::Clc => *flags &= !CF,
            Mnemonic::Stc => *flags |= CF,
            Mnemonic::Cmc => *flags ^= CF,
            Mnemonic::Cld => *flags &= !arith::DF,
            Mnemonic::Std => *flags |= arith::DF,
            Mnemonic::Lahf => {
                let value = (*flags & (ARITH & !OF)) | 2;
                self.set_register(Register::AH, value);
            }
            Mnemonic::Sahf => {
                let value = self.regs.gpr[0] >> 8;
                let low = SF | ZF | AF | PF | CF;
                *flags = (*flags & !low) | (value & low);
            }
            _ => {
                let value = if *flags & CF != 0 { 0xff } else { 0 };
                self.set_register(Register::AL, value);
            }
        }
        Ok(Flow::Next)
    }
}

/// Low four bits of the opcode of a conditional instruction.
pub(crate) fn condition_of(insn: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match insn.condition_code() {
        C::o | C::None => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    }
}

impl Cpu {
    /// The memory half of CMPXCHG16B: whether it was equal, and the value seen.
    fn exchange_16(
        &mut self,
        world: &mut dyn World,
        linear: u64,
        stack: bool,
        expected: u128,
        new: u128,
    ) -> Result<(bool, u128), Exception> {
        let target = self.host_rw(linear, 16, self.exec.user);
        match target.map_err(|fault| super::stack_fault(fault, stack))? {
            HostRw::Ram { host, gpa, code } => {
                let outcome = super::atomic::compare_exchange_16(host, expected, new);
                if code {
                    self.code_written(gpa, 16);
                }
                Ok(outcome)
            }
            HostRw::Slow => {
                let low = self.load_value(world, linear, 8, stack)?;
                let high = self.load_value(world, linear.wrapping_add(8), 8, stack)?;
                let seen = u128::from(low) | (u128::from(high) << 64);
                let value = if seen == expected { new } else { seen };
                self.store_value(world, linear, 8, value as u64, stack)?;
                self.store_value(world, linear.wrapping_add(8), 8, (value >> 64) as u64, stack)?;
                Ok((seen == expected, seen))
            }
        }
    }
}
