//! Choice of handlers: which instruction forms have a specialised one, and how their operands go into an op.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::super::fast::{EaKind, Pick, alu, branch, locked, moves, shift, system};
use super::super::general::{condition_of, segment_name, slot};
use super::super::{Mode, Op};
use super::{After, Builder, FlagUse, RIP, ZERO, bare_op};
use crate::exec::dispatch;

/// Where an instruction lies in the block and in its frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    /// Offset of the block in its frame.
    pub(super) start: usize,
    /// Offset of the instruction in the block.
    pub(super) offset: usize,
    /// Instructions before it.
    pub(super) ordinal: usize,
}

impl Builder {
    fn put_pick(&mut self, op: Op, pick: Pick) {
        self.uses.push(FlagUse {
            slot: self.slots.len(),
            observes: pick.observes,
            overwrites: pick.overwrites,
            quiet: pick.quiet,
        });
        self.slots.push(super::Slot { op: Op { handler: pick.loud, ..op } });
    }

    /// Puts a specialised op for an instruction of 64-bit code; `None` if there is none.
    pub(super) fn put_fast(&mut self, insn: &Instruction, at: At) -> Option<After> {
        if self.put_branch(insn, at)? {
            return Some(After::Ended);
        }
        let mut op = bare_op(dispatch::general, at.offset, at.ordinal);
        let pick = select(insn, &mut op, at)?;
        if let Some(pick) = pick {
            if insn.mnemonic() == Mnemonic::Sti {
                self.last_sti = Some(self.slots.len());
            }
            self.put_pick(op, pick);
        }
        Some(After::GoOn)
    }

    /// Puts a branch; `Some(false)`: it is none (or a conditional one that lets the block go on is not to be put here).
    fn put_branch(&mut self, insn: &Instruction, at: At) -> Option<bool> {
        let behind = at.offset + insn.len();
        let count = at.ordinal as u32 + 1;
        let mut op = bare_op(dispatch::general, at.offset, at.ordinal);
        op.disp = count as i32;
        op.imm = behind as i32;
        match (insn.mnemonic(), insn.op0_kind()) {
            (Mnemonic::Jmp, OpKind::NearBranch64) => {
                self.put_pick(op, branch::pick_jmp());
                self.put_exit(Mode::Bits64, at.start, relative(insn, at), count);
            }
            (Mnemonic::Call, OpKind::NearBranch64) => {
                self.put_pick(op, branch::pick_call());
                self.put_exit(Mode::Bits64, at.start, relative(insn, at), count);
                self.put_return_link();
            }
            (Mnemonic::Ret, _) => {
                if insn.stack_pointer_increment() < 8 {
                    return None;
                }
                op.imm = insn.stack_pointer_increment();
                self.put_pick(op, branch::pick_ret());
            }
            (Mnemonic::Jmp | Mnemonic::Call, OpKind::Register) => {
                let target = slot(insn.op0_register()).filter(|slot| slot.size == 8)?;
                op.r0 = target.offset;
                self.put_pick(op, branch::pick_jump_r(insn.mnemonic() == Mnemonic::Call));
                self.put_return_link();
            }
            (Mnemonic::Jmp | Mnemonic::Call, OpKind::Memory) => {
                if insn.memory_size().size() != 8 || insn.is_jmp_far_indirect() || insn.is_call_far_indirect() {
                    return None;
                }
                let kind = address(insn, &mut op, at)?;
                self.put_pick(op, branch::pick_jump_m(insn.mnemonic() == Mnemonic::Call, kind));
                self.put_return_link();
            }
            (Mnemonic::Jmp | Mnemonic::Call, _) => return None,
            _ => return Some(false),
        }
        Some(true)
    }

    /// Puts a conditional jump, fused with the CMP or TEST before it if that is given.
    pub(super) fn put_jcc(&mut self, insn: &Instruction, at: At, before: Option<(&Instruction, At)>) -> Option<()> {
        if insn.op0_kind() != OpKind::NearBranch64 {
            return None;
        }
        let count = at.ordinal as u32 + 1;
        let condition = condition_of(insn);
        match before {
            Some((compare, compare_at)) => {
                let (op, pick) = fused(compare, compare_at, condition)?;
                self.put_pick(op, pick);
            }
            None => {
                let op = bare_op(dispatch::general, at.offset, at.ordinal);
                self.put_pick(op, branch::pick_jcc(condition));
            }
        }
        self.put_exit(Mode::Bits64, at.start, relative(insn, at), count);
        Some(())
    }
}

/// Target of a near branch relative to the block's first instruction.
fn relative(insn: &Instruction, at: At) -> i64 {
    insn.near_branch_target().wrapping_sub(insn.ip()).wrapping_add(at.offset as u64) as i64
}

/// Whether an instruction can be fused with a Jcc behind it.
pub(super) fn fuses(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Cmp | Mnemonic::Test)
        && insn.op0_kind() == OpKind::Register
        && insn.op1_kind() != OpKind::Memory
}
fn fused(compare: &Instruction, at: At, condition: u8) -> Option<(Op, Pick)> {
    let mut op = bare_op(dispatch::general, at.offset, at.ordinal);
    let a = slot(compare.op0_register())?;
    op.r0 = a.offset;
    let imm = compare.op1_kind() != OpKind::Register;
    if imm {
        op.imm = immediate(compare, 1)?;
    } else {
        op.r1 = slot(compare.op1_register())?.offset;
    }
    let test = compare.mnemonic() == Mnemonic::Test;
    Some((op, branch::pick_fused(test, imm, u32::from(a.size), condition)))
}

/// An immediate as sign-extended 32 bits.
fn immediate(insn: &Instruction, n: u32) -> Option<i32> {
    match insn.op_kind(n) {
        OpKind::Immediate8 => Some(i32::from(insn.immediate8() as i8)),
        OpKind::Immediate16 => Some(i32::from(insn.immediate16() as i16)),
        OpKind::Immediate32 => Some(insn.immediate32() as i32),
        OpKind::Immediate8to16 => Some(i32::from(insn.immediate8to16())),
        OpKind::Immediate8to32 => Some(insn.immediate8to32()),
        OpKind::Immediate8to64 => i32::try_from(insn.immediate8to64()).ok(),
        OpKind::Immediate32to64 => i32::try_from(insn.immediate32to64()).ok(),
        _ => None,
    }
}

/// Puts the memory operand into an op; `None` if it takes the general interpreter (32-bit addresses, far-off
/// RIP-relative ones, absolute 64-bit ones).
pub(super) fn address(insn: &Instruction, op: &mut Op, at: At) -> Option<EaKind> {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let displacement = insn.memory_displacement64();
    if base == Register::RIP {
        op.base = RIP;
        // RIP's word holds the block's start while the block runs.
        let delta = displacement.wrapping_sub(insn.ip()).wrapping_add(at.offset as u64) as i64;
        op.disp = i32::try_from(delta).ok()?;
    } else {
        op.base = match slot(base) {
            Some(slot) if slot.size == 8 => slot.offset,
            None if base == Register::None => ZERO,
            _ => return None,
        };
        if base == Register::None && index == Register::None && insn.memory_displ_size() < 8 {
            return None;
        }
        op.disp = i32::try_from(displacement as i64).ok()?;
    }
    let segment = match insn.memory_segment() {
        Register::FS => 4,
        Register::GS => 5,
        _ => 0,
    };
    if index != Register::None {
        op.index = slot(index).filter(|slot| slot.size == 8)?.offset;
        op.scale = insn.memory_index_scale() as u8;
    }
    op.scale |= segment << 4;
    Some(match (segment, index) {
        (0, Register::None) => EaKind::Base,
        (0, _) => EaKind::Sib,
        _ => EaKind::Seg,
    })
}

/// The same for LEA, which takes no segment and cares for no fault.
fn register(insn: &Instruction, n: u32) -> Option<(u8, u32)> {
    if insn.op_kind(n) != OpKind::Register {
        return None;
    }
    slot(insn.op_register(n)).map(|slot| (slot.offset, u32::from(slot.size)))
}

/// Operand form of a two-operand instruction, with registers, immediate and address put into the op. The first operand
/// gives the size.
fn form(insn: &Instruction, op: &mut Op, at: At) -> Option<(alu::Form, u32)> {
    use alu::Form;
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            op.r1 = register(insn, 1)?.0;
            Some((Form::RegReg, size))
        }
        (OpKind::Register, OpKind::Memory) => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            Some((Form::RegMem(address(insn, op, at)?), size))
        }
        (OpKind::Memory, OpKind::Register) => {
            let (r0, size) = register(insn, 1)?;
            op.r0 = r0;
            Some((Form::MemReg(address(insn, op, at)?), size))
        }
        (OpKind::Register, _) => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            op.imm = immediate(insn, 1)?;
            Some((Form::RegImm, size))
        }
        (OpKind::Memory, _) => {
            op.imm = immediate(insn, 1)?;
            Some((Form::MemImm(address(insn, op, at)?), insn.memory_size().size() as u32))
        }
        _ => None,
    }
}

/// Address kind of operand `n` if it is memory, or `None` inside for a register whose slot goes to `r1`.
fn source(insn: &Instruction, op: &mut Op, at: At, n: u32) -> Option<Option<EaKind>> {
    if insn.op_kind(n) == OpKind::Memory {
        return address(insn, op, at).map(Some);
    }
    op.r1 = register(insn, n)?.0;
    Some(None)
}

/// The handlers of an instruction; outer `None`: the general interpreter has it, inner: nothing need be done.
fn select(insn: &Instruction, op: &mut Op, at: At) -> Option<Option<Pick>> {
    use Mnemonic as M;
    if insn.has_lock_prefix() {
        return select_locked(insn, op, at).map(Some);
    }
    let pick = match insn.mnemonic() {
        M::Nop | M::Endbr64 | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw => {
            return Some(None);
        }
        M::Mov => {
            if insn.op1_kind() == OpKind::Immediate64 {
                op.r0 = register(insn, 0)?.0;
                op.disp = insn.immediate64() as i32;
                op.imm = (insn.immediate64() >> 32) as i32;
                moves::pick_mov64()
            } else if insn.op1_kind() == OpKind::Register && insn.op1_register().is_segment_register() {
                let (r0, size) = register(insn, 0)?;
                op.r0 = r0;
                op.imm = segment_name(insn.op1_register()) as i32;
                system::pick_mov_from_segment(size)
            } else {
                let (form, size) = form(insn, op, at)?;
                moves::pick_mov(form, size)
            }
        }
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => {
            let (form, size) = form(insn, op, at)?;
            alu::pick(insn.mnemonic(), form, size)?
        }
        M::Inc | M::Dec | M::Neg | M::Not => {
            if insn.op0_kind() == OpKind::Memory {
                let kind = address(insn, op, at)?;
                alu::pick_unary(insn.mnemonic(), Some(kind), insn.memory_size().size() as u32)?
            } else {
                let (r0, size) = register(insn, 0)?;
                op.r0 = r0;
                alu::pick_unary(insn.mnemonic(), None, size)?
            }
        }
        M::Lea => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            let kind = match address(insn, op, at)? {
                EaKind::Seg => return None,
                kind => kind,
            };
            moves::pick_lea(kind, size)
        }
        M::Movzx | M::Movsx | M::Movsxd => {
            let (r0, to) = register(insn, 0)?;
            op.r0 = r0;
            let kind = source(insn, op, at, 1)?;
            let from = match kind {
                Some(_) => insn.memory_size().size() as u32,
                None => register(insn, 1)?.1,
            };
            moves::pick_extend(kind, to, from, insn.mnemonic() != M::Movzx)
        }
        M::Push if insn.stack_pointer_increment() == -8 => match insn.op0_kind() {
            OpKind::Register => {
                op.r0 = register(insn, 0)?.0;
                moves::pick_push_r()
            }
            OpKind::Memory => moves::pick_push_m(address(insn, op, at)?),
            _ => {
                op.imm = immediate(insn, 0)?;
                moves::pick_push_i()
            }
        },
        M::Pop if insn.stack_pointer_increment() == 8 => {
            op.r0 = register(insn, 0)?.0;
            moves::pick_pop_r()
        }
        M::Leave if insn.code() == iced_x86::Code::Leaveq => moves::pick_leave(),
        M::Xchg => {
            if insn.op0_kind() == OpKind::Memory || insn.op1_kind() == OpKind::Memory {
                return select_locked(insn, op, at).map(Some);
            }
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            op.r1 = register(insn, 1)?.0;
            moves::pick_xchg(size)
        }
        M::Cbw => moves::pick_widen_a(2),
        M::Cwde => moves::pick_widen_a(4),
        M::Cdqe => moves::pick_widen_a(8),
        M::Cwd => moves::pick_widen_d(2),
        M::Cdq => moves::pick_widen_d(4),
        M::Cqo => moves::pick_widen_d(8),
        M::Bswap => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            moves::pick_bswap(size)?
        }
        M::Seto
        | M::Setno
        | M::Setb
        | M::Setae
        | M::Sete
        | M::Setne
        | M::Setbe
        | M::Seta
        | M::Sets
        | M::Setns
        | M::Setp
        | M::Setnp
        | M::Setl
        | M::Setge
        | M::Setle
        | M::Setg => {
            if insn.op0_kind() == OpKind::Memory {
                moves::pick_setcc_m(condition_of(insn), address(insn, op, at)?)
            } else {
                op.r0 = register(insn, 0)?.0;
                moves::pick_setcc(condition_of(insn))
            }
        }
        M::Cmovo
        | M::Cmovno
        | M::Cmovb
        | M::Cmovae
        | M::Cmove
        | M::Cmovne
        | M::Cmovbe
        | M::Cmova
        | M::Cmovs
        | M::Cmovns
        | M::Cmovp
        | M::Cmovnp
        | M::Cmovl
        | M::Cmovge
        | M::Cmovle
        | M::Cmovg => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            let kind = source(insn, op, at, 1)?;
            moves::pick_cmov(condition_of(insn), kind, size)
        }
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            let by_cl = insn.op1_kind() == OpKind::Register;
            if !by_cl {
                let count = insn.immediate(1) as u32 & if size == 8 { 63 } else { 31 };
                if count == 0 || count >= size * 8 {
                    return None;
                }
                op.imm = count as i32;
            }
            shift::pick_shift(insn.mnemonic(), by_cl, size)?
        }
        M::Imul if insn.op_count() >= 2 => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            let kind = source(insn, op, at, 1)?;
            let imm = insn.op_count() == 3;
            if imm {
                op.imm = immediate(insn, 2)?;
            }
            shift::pick_imul(kind, imm, size)
        }
        M::Mul | M::Imul | M::Div | M::Idiv => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            match insn.mnemonic() {
                M::Mul => shift::pick_mul(false, size)?,
                M::Imul => shift::pick_mul(true, size)?,
                M::Div => shift::pick_div(false, size)?,
                _ => shift::pick_div(true, size)?,
            }
        }
        M::Bt | M::Bts | M::Btr | M::Btc => {
            let imm = insn.op1_kind() != OpKind::Register;
            if insn.op0_kind() == OpKind::Memory {
                if !imm {
                    return None;
                }
                op.imm = immediate(insn, 1)?;
                let kind = address(insn, op, at)?;
                let size = insn.memory_size().size() as u32;
                match insn.mnemonic() {
                    M::Bt => shift::pick_bit_test_m(kind, size),
                    change => locked::pick_bit(change, kind, size)?,
                }
            } else {
                let (r0, size) = register(insn, 0)?;
                op.r0 = r0;
                if imm {
                    op.imm = immediate(insn, 1)?;
                } else {
                    op.r1 = register(insn, 1)?.0;
                }
                shift::pick_bit_test(insn.mnemonic(), imm, size)?
            }
        }
        // Without LOCK they may be atomic all the same.
        M::Cmpxchg | M::Xadd if insn.op0_kind() == OpKind::Memory => return select_locked(insn, op, at).map(Some),
        M::Pushf if insn.stack_pointer_increment() == -8 => system::pick_pushf(),
        M::Cli => system::pick_cli(),
        M::Sti => system::pick_sti(),
        M::Bsf | M::Bsr => {
            let (r0, size) = register(insn, 0)?;
            op.r0 = r0;
            op.r1 = register(insn, 1)?.0;
            shift::pick_bit_scan(insn.mnemonic() == M::Bsr, size)
        }
        _ => return None,
    };
    Some(Some(pick))
}

/// LOCK forms, and XCHG with memory.
fn select_locked(insn: &Instruction, op: &mut Op, at: At) -> Option<Pick> {
    let memory = if insn.op0_kind() == OpKind::Memory { 0 } else { 1 };
    let kind = address(insn, op, at)?;
    let size = insn.memory_size().size() as u32;
    let imm = if insn.op_count() == 1 {
        false
    } else if insn.op_kind(1 - memory) == OpKind::Register {
        op.r0 = register(insn, 1 - memory)?.0;
        false
    } else {
        op.imm = immediate(insn, 1)?;
        true
    };
    if size > 8 {
        return None;
    }
    if imm && matches!(insn.mnemonic(), Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc) {
        return locked::pick_bit(insn.mnemonic(), kind, size);
    }
    locked::pick(insn.mnemonic(), kind, imm, size)
}
