//! Shifts, rotates, bit tests and scans, byte order.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::arith::{self, CF, Shift, ZF, mask, sign_extend};
use super::operand::Place;
use super::{Done, Flow};
use crate::cpu::Cpu;
use crate::state::{Exception, SegmentName};
use crate::world::World;

impl Cpu {
    /// Shifts and rotates.
    pub(super) fn shift(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let count =
            if insn.op1_kind() == OpKind::Register { self.regs.gpr[1] & 0xff } else { insn.immediate(1) & 0xff };
        let kind = match insn.mnemonic() {
            Mnemonic::Shl | Mnemonic::Sal => Shift::Shl,
            Mnemonic::Shr => Shift::Shr,
            Mnemonic::Sar => Shift::Sar,
            Mnemonic::Rol => Shift::Rol,
            Mnemonic::Ror => Shift::Ror,
            Mnemonic::Rcl => Shift::Rcl,
            _ => Shift::Rcr,
        };
        let place = self.operand_place(insn, 0, size, true)?;
        let flags = self.regs.rflags;
        let mut out = flags;
        self.modify(world, place, size, false, &mut |a| {
            let (value, after) = arith::shift(kind, a, count, size, flags);
            out = after;
            Some(value)
        })?;
        self.regs.rflags = out;
        Ok(Flow::Next)
    }

    /// SHLD and SHRD.
    pub(super) fn double_shift(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let source = self.register(insn.op1_register());
        let count =
            if insn.op2_kind() == OpKind::Register { self.regs.gpr[1] & 0xff } else { insn.immediate(2) & 0xff };
        let left = insn.mnemonic() == Mnemonic::Shld;
        let place = self.operand_place(insn, 0, size, true)?;
        let flags = self.regs.rflags;
        let mut out = flags;
        self.modify(world, place, size, false, &mut |a| {
            let (value, after) = arith::double_shift(left, a, source, count, size, flags);
            out = after;
            Some(value)
        })?;
        self.regs.rflags = out;
        Ok(Flow::Next)
    }

    /// BT, BTS, BTR, BTC. A register bit offset into memory reaches beyond the operand, both ways.
    pub(super) fn bit_test(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let bits = u64::from(size) * 8;
        let mnemonic = insn.mnemonic();
        let write = mnemonic != Mnemonic::Bt;
        let (raw, from_register) = if insn.op1_kind() == OpKind::Register {
            (self.register(insn.op1_register()), true)
        } else {
            (insn.immediate(1) & 0xff, false)
        };
        let place = if insn.op0_kind() == OpKind::Memory && from_register {
            let (segment, offset) = self.effective_address(insn);
            let words = (sign_extend(raw, size) as i64) >> bits.trailing_zeros();
            let address_mask = mask(address_size(insn));
            let offset = offset.wrapping_add((words * i64::from(size)) as u64) & address_mask;
            let linear = self.linear(segment, offset, size, write)?;
            Place::Mem { linear, stack: segment == SegmentName::Ss }
        } else {
            self.operand_place(insn, 0, size, write)?
        };
        let bit = 1u64 << (raw & (bits - 1));
        let mut old = 0;
        if write {
            self.modify(world, place, size, insn.has_lock_prefix(), &mut |value| {
                old = value;
                Some(match mnemonic {
                    Mnemonic::Bts => value | bit,
                    Mnemonic::Btr => value & !bit,
                    _ => value ^ bit,
                })
            })?;
        } else {
            old = self.get_place(world, place, size)?;
        }
        self.regs.rflags = (self.regs.rflags & !CF) | if old & bit != 0 { CF } else { 0 };
        Ok(Flow::Next)
    }

    /// BSF and BSR. A zero source leaves the destination alone, as every 64-bit processor does.
    pub(super) fn bit_scan(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 1);
        let source = self.operand(world, insn, 1, size)?;
        if source == 0 {
            self.regs.rflags |= ZF;
            return Ok(Flow::Next);
        }
        let index =
            if insn.mnemonic() == Mnemonic::Bsf { source.trailing_zeros() } else { 63 - source.leading_zeros() };
        self.set_register(insn.op0_register(), u64::from(index));
        self.regs.rflags &= !ZF;
        Ok(Flow::Next)
    }

    /// BSWAP; of a 16-bit register (undefined) it gives zero, as processors do.
    pub(super) fn bswap(&mut self, insn: &Instruction) -> Done {
        let register = insn.op0_register();
        let value = self.register(register);
        let swapped = match register.size() {
            8 => value.swap_bytes(),
            4 => u64::from((value as u32).swap_bytes()),
            _ => 0,
        };
        self.set_register(register, swapped);
        Ok(Flow::Next)
    }

    /// MOVBE.
    pub(super) fn movbe(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        let size = Self::operand_size(insn, 0);
        let value = self.operand(world, insn, 1, size)?;
        let swapped = value.swap_bytes() >> (64 - size * 8);
        let place = self.operand_place(insn, 0, size, true)?;
        self.put_place(world, place, size, swapped)?;
        Ok(Flow::Next)
    }

    /// CLFLUSH and kin: the address must be readable, nothing else happens.
    pub(super) fn touch(&mut self, world: &mut dyn World, insn: &Instruction) -> Done {
        if insn.op0_kind() != OpKind::Memory {
            return Err(Exception::ud());
        }
        let place = self.operand_place(insn, 0, 1, false)?;
        self.get_place(world, place, 1)?;
        Ok(Flow::Next)
    }
}

/// Address size of the memory operand in bytes.
fn address_size(insn: &Instruction) -> u32 {
    let size = |register: iced_x86::Register| super::slot(register).map(|slot| u32::from(slot.size));
    size(insn.memory_base()).or_else(|| size(insn.memory_index())).unwrap_or_else(|| match insn.memory_displ_size() {
        0 => 8,
        size => size,
    })
}
