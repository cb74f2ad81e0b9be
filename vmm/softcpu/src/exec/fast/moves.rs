//! Moves: registers, memory, extension, addresses, the stack, conditional moves and sets.

use super::super::dispatch::next;
use super::super::{Handler, Next, Op};
use super::memory::{Address, EaKind, read_host, write_host};
use super::word::{CARRY, PARITY, SIGN, Word, ZERO_FLAG};
use super::{Pick, for_address, for_condition, for_width};
use crate::cpu::Cpu;

/// RSP's byte offset.
const RSP: u8 = 32;
/// RBP's.
const RBP: u8 = 40;

unsafe extern "sysv64" fn mov_rr<W: Word>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe { W::set(cpu, (*op).r0, W::get(cpu, (*op).r1)) };
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn mov_ri<W: Word>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe { W::set(cpu, (*op).r0, W::narrow(i64::from((*op).imm) as u64)) };
    next!(cpu, op, fuel, flags);
}
/// A 64-bit immediate in displacement (low) and immediate (high).
unsafe extern "sysv64" fn mov_ri64(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let value = u64::from((*op).disp as u32) | (u64::from((*op).imm as u32) << 32);
        u64::set(cpu, (*op).r0, value);
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn mov_rm<W: Word, A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let host = read_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        W::set(cpu, (*op).r0, W::load(host));
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn mov_mr<W: Word, A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let host = write_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        W::store(host, W::get(cpu, (*op).r0));
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn mov_mi<W: Word, A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let host = write_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        W::store(host, W::narrow(i64::from((*op).imm) as u64));
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn lea<W: Word, A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe { W::set(cpu, (*op).r0, W::narrow(A::linear(cpu, op))) };
    next!(cpu, op, fuel, flags);
}

/// MOVZX and MOVSX (`SIGNED`) from `S` to `D`.
unsafe extern "sysv64" fn extend_rr<D: Word, S: Word, const SIGNED: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let value = S::get(cpu, (*op).r1);
        D::set(cpu, (*op).r0, D::narrow(if SIGNED { value.signed() as u64 } else { value.wide() }));
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn extend_rm<D: Word, S: Word, const SIGNED: bool, A: Address>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let host = read_host!(S, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let value = S::load(host);
        D::set(cpu, (*op).r0, D::narrow(if SIGNED { value.signed() as u64 } else { value.wide() }));
    }
    next!(cpu, op, fuel, flags);
}

unsafe extern "sysv64" fn push_r(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let top = u64::get(cpu, RSP).wrapping_sub(8);
        let host = write_host!(u64, cpu, op, fuel, flags, top, true);
        u64::store(host, u64::get(cpu, (*op).r0));
        u64::set(cpu, RSP, top);
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn push_i(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let top = u64::get(cpu, RSP).wrapping_sub(8);
        let host = write_host!(u64, cpu, op, fuel, flags, top, true);
        u64::store(host, i64::from((*op).imm) as u64);
        u64::set(cpu, RSP, top);
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn push_m<A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let from = read_host!(u64, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let top = u64::get(cpu, RSP).wrapping_sub(8);
        let host = write_host!(u64, cpu, op, fuel, flags, top, true);
        u64::store(host, u64::load(from));
        u64::set(cpu, RSP, top);
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn pop_r(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let top = u64::get(cpu, RSP);
        let host = read_host!(u64, cpu, op, fuel, flags, top, true);
        let value = u64::load(host);
        // POP RSP keeps the popped value.
        u64::set(cpu, RSP, top.wrapping_add(8));
        u64::set(cpu, (*op).r0, value);
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn leave_frame(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let frame = u64::get(cpu, RBP);
        let host = read_host!(u64, cpu, op, fuel, flags, frame, true);
        u64::set(cpu, RBP, u64::load(host));
        u64::set(cpu, RSP, frame.wrapping_add(8));
    }
    next!(cpu, op, fuel, flags);
}

/// A condition of flowing flags.
#[inline(always)]
pub(super) fn holds<const CONDITION: u8>(flags: u64) -> bool {
    // SF exclusive-or OF, in bit 0.
    let less = (flags >> 15) ^ flags;
    let base = match CONDITION >> 1 {
        0 => flags & 1 != 0,
        1 => flags & CARRY != 0,
        2 => flags & ZERO_FLAG != 0,
        3 => flags & (CARRY | ZERO_FLAG) != 0,
        4 => flags & SIGN != 0,
        5 => flags & PARITY != 0,
        6 => less & 1 != 0,
        _ => (less & 1) | (flags & ZERO_FLAG) != 0,
    };
    base != (CONDITION & 1 != 0)
}

unsafe extern "sysv64" fn setcc_r<const C: u8>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe { u8::set(cpu, (*op).r0, u8::from(holds::<C>(flags))) };
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn setcc_m<const C: u8, A: Address>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let host = write_host!(u8, cpu, op, fuel, flags, A::linear(cpu, op), true);
        u8::store(host, u8::from(holds::<C>(flags)));
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn cmov_rr<W: Word, const C: u8>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let source = W::get(cpu, (*op).r1);
        let target = W::get(cpu, (*op).r0);
        W::set(cpu, (*op).r0, if holds::<C>(flags) { source } else { target });
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn cmov_rm<W: Word, const C: u8, A: Address>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let host = read_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let source = W::load(host);
        let target = W::get(cpu, (*op).r0);
        W::set(cpu, (*op).r0, if holds::<C>(flags) { source } else { target });
    }
    next!(cpu, op, fuel, flags);
}

/// XCHG of registers.
unsafe extern "sysv64" fn xchg_rr<W: Word>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let (a, b) = (W::get(cpu, (*op).r0), W::get(cpu, (*op).r1));
        W::set(cpu, (*op).r0, b);
        W::set(cpu, (*op).r1, a);
    }
    next!(cpu, op, fuel, flags);
}
/// CDQE, CWDE, CBW: sign extension within RAX.
unsafe extern "sysv64" fn widen_a<D: Word, S: Word>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe { D::set(cpu, 0, D::narrow(S::get(cpu, 0).signed() as u64)) };
    next!(cpu, op, fuel, flags);
}
/// CQO, CDQ, CWD: RDX becomes the sign of RAX.
unsafe extern "sysv64" fn widen_d<W: Word>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe { W::set(cpu, 16, W::narrow((W::get(cpu, 0).signed() >> 63) as u64)) };
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn bswap32(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe { u32::set(cpu, (*op).r0, u32::get(cpu, (*op).r0).swap_bytes()) };
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn bswap64(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe { u64::set(cpu, (*op).r0, u64::get(cpu, (*op).r0).swap_bytes()) };
    next!(cpu, op, fuel, flags);
}

/// A pick that neither looks at flags nor changes them; `memory`: it may fault.
fn plain(handler: Handler, memory: bool) -> Pick {
    Pick { loud: handler, quiet: None, observes: memory, overwrites: false }
}

/// MOV forms.
pub(in crate::exec) fn pick_mov(form: super::alu::Form, bytes: u32) -> Pick {
    use super::alu::Form;
    match form {
        Form::RegReg => plain(for_width!(bytes, W => mov_rr::<W>), false),
        Form::RegImm => plain(for_width!(bytes, W => mov_ri::<W>), false),
        Form::RegMem(kind) => plain(for_width!(bytes, W => for_address!(kind, A => mov_rm::<W, A>)), true),
        Form::MemReg(kind) => plain(for_width!(bytes, W => for_address!(kind, A => mov_mr::<W, A>)), true),
        Form::MemImm(kind) => plain(for_width!(bytes, W => for_address!(kind, A => mov_mi::<W, A>)), true),
    }
}
/// MOV of a 64-bit immediate.
pub(in crate::exec) fn pick_mov64() -> Pick {
    plain(mov_ri64, false)
}
/// LEA to 2, 4 or 8 bytes.
pub(in crate::exec) fn pick_lea(kind: EaKind, bytes: u32) -> Pick {
    plain(for_width!(bytes, W => for_address!(kind, A => lea::<W, A>)), false)
}
/// MOVZX, MOVSX, MOVSXD.
pub(in crate::exec) fn pick_extend(kind: Option<EaKind>, to: u32, from: u32, signed: bool) -> Pick {
    macro_rules! forms {
        ($d:ty, $s:ty) => {
            match (kind, signed) {
                (None, false) => plain(extend_rr::<$d, $s, false>, false),
                (None, true) => plain(extend_rr::<$d, $s, true>, false),
                (Some(kind), false) => plain(for_address!(kind, A => extend_rm::<$d, $s, false, A>), true),
                (Some(kind), true) => plain(for_address!(kind, A => extend_rm::<$d, $s, true, A>), true),
            }
        };
    }
    match (to, from) {
        (2, 1) => forms!(u16, u8),
        (2, _) => forms!(u16, u16),
        (4, 1) => forms!(u32, u8),
        (4, 2) => forms!(u32, u16),
        (4, _) => forms!(u32, u32),
        (_, 1) => forms!(u64, u8),
        (_, 2) => forms!(u64, u16),
        _ => forms!(u64, u32),
    }
}
/// PUSH r64.
pub(in crate::exec) fn pick_push_r() -> Pick {
    plain(push_r, true)
}
/// PUSH imm.
pub(in crate::exec) fn pick_push_i() -> Pick {
    plain(push_i, true)
}
/// PUSH m64.
pub(in crate::exec) fn pick_push_m(kind: EaKind) -> Pick {
    plain(for_address!(kind, A => push_m::<A>), true)
}
/// POP r64.
pub(in crate::exec) fn pick_pop_r() -> Pick {
    plain(pop_r, true)
}
/// LEAVE.
pub(in crate::exec) fn pick_leave() -> Pick {
    plain(leave_frame, true)
}
/// SETcc r8.
pub(in crate::exec) fn pick_setcc(condition: u8) -> Pick {
    Pick { observes: true, ..plain(for_condition!(condition, C => setcc_r::<C>), false) }
}
/// SETcc m8.
pub(in crate::exec) fn pick_setcc_m(condition: u8, kind: EaKind) -> Pick {
    plain(for_condition!(condition, C => for_address!(kind, A => setcc_m::<C, A>)), true)
}
/// CMOVcc.
pub(in crate::exec) fn pick_cmov(condition: u8, kind: Option<EaKind>, bytes: u32) -> Pick {
    macro_rules! widths {
        ($w:ty) => {
            match kind {
                None => for_condition!(condition, C => cmov_rr::<$w, C> as Handler),
                Some(kind) => for_condition!(condition, C => for_address!(kind, A => cmov_rm::<$w, C, A> as Handler)),
            }
        };
    }
    let handler = match bytes {
        2 => widths!(u16),
        4 => widths!(u32),
        _ => widths!(u64),
    };
    Pick { observes: true, ..plain(handler, true) }
}
/// XCHG of registers.
pub(in crate::exec) fn pick_xchg(bytes: u32) -> Pick {
    plain(for_width!(bytes, W => xchg_rr::<W>), false)
}
/// CBW, CWDE, CDQE by the size of the result.
pub(in crate::exec) fn pick_widen_a(bytes: u32) -> Pick {
    plain(
        match bytes {
            2 => widen_a::<u16, u8>,
            4 => widen_a::<u32, u16>,
            _ => widen_a::<u64, u32>,
        },
        false,
    )
}
/// CWD, CDQ, CQO by the operand size.
pub(in crate::exec) fn pick_widen_d(bytes: u32) -> Pick {
    plain(for_width!(bytes, W => widen_d::<W>), false)
}
/// BSWAP.
pub(in crate::exec) fn pick_bswap(bytes: u32) -> Option<Pick> {
    match bytes {
        4 => Some(plain(bswap32, false)),
        8 => Some(plain(bswap64, false)),
        _ => None,
    }
}
