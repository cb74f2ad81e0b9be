//! Branches. A conditional jump's op has an exit record behind it for the taken way; the other way is the next op.

use super::super::dispatch::{go, go_far, jump_cached, leave, take_exit};
use super::super::general::arith;
use super::super::{Exit, Handler, Leave, Next, Op, RETURNS, Return};
use super::memory::{Address, EaKind, read_host, slow_leave, write_host};
use super::moves::holds;
use super::word::Word;
use super::{Pick, for_address, for_condition, for_width};
use crate::cpu::Cpu;

const RSP: u8 = 32;
/// Slots from a conditional jump to the op behind its exit.
const BEHIND_EXIT: usize = 2;

/// Goes to a computed address.
macro_rules! indirect {
    ($cpu:expr, $op:expr, $fuel:expr, $flags:expr, $target:expr) => {{
        let fuel = $fuel - i64::from((*$op).disp);
        (*$cpu).regs.rip = $target;
        if fuel < 0 {
            leave!($cpu, Leave::Lookup, fuel, $flags);
        }
        jump_cached!($cpu, fuel, $flags)
    }};
}

unsafe extern "sysv64" fn jcc<const C: u8>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: the decoder puts an exit behind this op, and another op behind that.
    unsafe {
        if holds::<C>(flags) {
            take_exit!(cpu, op.add(1).cast::<Exit>(), fuel, flags);
        }
        go!(cpu, op.add(BEHIND_EXIT), fuel, flags);
    }
}
unsafe extern "sysv64" fn jmp(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: the decoder puts an exit behind this op.
    unsafe { take_exit!(cpu, op.add(1).cast::<Exit>(), fuel, flags) }
}

/// Whether `CONDITION` holds after CMP a, b.
#[inline(always)]
fn holds_cmp<W: Word, const CONDITION: u8>(a: W, b: W) -> bool {
    match CONDITION {
        2 => a < b,
        3 => a >= b,
        4 => a == b,
        5 => a != b,
        6 => a <= b,
        7 => a > b,
        8 => W::narrow(a.wide().wrapping_sub(b.wide())).signed() < 0,
        9 => W::narrow(a.wide().wrapping_sub(b.wide())).signed() >= 0,
        12 => a.signed() < b.signed(),
        13 => a.signed() >= b.signed(),
        14 => a.signed() <= b.signed(),
        15 => a.signed() > b.signed(),
        _ => holds::<CONDITION>(W::sub(a, b).1),
    }
}
/// Whether `CONDITION` holds after a logical operation with this result.
#[inline(always)]
fn holds_test<W: Word, const CONDITION: u8>(value: W) -> bool {
    match CONDITION {
        0 | 2 => false,
        1 | 3 => true,
        4 | 6 => value.wide() == 0,
        5 | 7 => value.wide() != 0,
        8 | 12 => value.signed() < 0,
        9 | 13 => value.signed() >= 0,
        14 => value.signed() <= 0,
        15 => value.signed() > 0,
        _ => holds::<CONDITION>(W::logic(value)),
    }
}

/// CMP and Jcc in one. `LOUD`: somebody looks at the flags on the way through; the taken way always has them.
unsafe extern "sysv64" fn cmp_jcc<W: Word, const C: u8, const IMM: bool, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: as for `jcc`.
    unsafe {
        let a = W::get(cpu, (*op).r0);
        let b = if IMM { W::narrow(i64::from((*op).imm) as u64) } else { W::get(cpu, (*op).r1) };
        if holds_cmp::<W, C>(a, b) {
            take_exit!(cpu, op.add(1).cast::<Exit>(), fuel, W::sub(a, b).1);
        }
        go!(cpu, op.add(BEHIND_EXIT), fuel, if LOUD { W::sub(a, b).1 } else { flags });
    }
}
/// TEST and Jcc in one.
unsafe extern "sysv64" fn test_jcc<W: Word, const C: u8, const IMM: bool, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: as for `jcc`.
    unsafe {
        let a = W::get(cpu, (*op).r0);
        let b = if IMM { W::narrow(i64::from((*op).imm) as u64) } else { W::get(cpu, (*op).r1) };
        let value = W::narrow(a.wide() & b.wide());
        if holds_test::<W, C>(value) {
            take_exit!(cpu, op.add(1).cast::<Exit>(), fuel, W::logic(value));
        }
        go!(cpu, op.add(BEHIND_EXIT), fuel, if LOUD { W::logic(value) } else { flags });
    }
}

/// Notes a call, for its return: `link` is the slot of the far link behind the call.
#[inline(always)]
unsafe fn remember(cpu: *mut Cpu, back: u64, link: *const Op) {
    // SAFETY: the index is cut to the ring's size; the ring is cleared before the code that holds the link is freed.
    unsafe {
        let at = (*cpu).exec.return_at.wrapping_add(1) & (RETURNS - 1);
        (*cpu).exec.return_at = at;
        (&raw mut (*cpu).exec.returns)
            .cast::<Return>()
            .add(at)
            .write(Return { rip: back, link: link.cast_mut().cast() });
    }
}

/// CALL rel32: the exit record is behind the op; `imm` is the offset of the return address from the block's start.
unsafe extern "sysv64" fn call(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: the decoder puts an exit behind this op.
    unsafe {
        let top = u64::get(cpu, RSP).wrapping_sub(8);
        let host = write_host!(u64, cpu, op, fuel, flags, top, false);
        let back = (*cpu).regs.rip.wrapping_add_signed(i64::from((*op).imm));
        u64::store(host, back);
        u64::set(cpu, RSP, top);
        remember(cpu, back, op.add(2));
        take_exit!(cpu, op.add(1).cast::<Exit>(), fuel, flags);
    }
}
/// RET and RET imm16 (`imm` is what is added to RSP); `disp` is the number of instructions of the block.
unsafe extern "sysv64" fn ret(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let top = u64::get(cpu, RSP);
        let host = read_host!(u64, cpu, op, fuel, flags, top, false);
        let target = u64::load(host);
        if !super::super::general::is_canonical(target) {
            return slow_leave(cpu, op, fuel, flags);
        }
        u64::set(cpu, RSP, top.wrapping_add_signed(i64::from((*op).imm)));
        let fuel = fuel - i64::from((*op).disp);
        (*cpu).regs.rip = target;
        if fuel < 0 {
            leave!(cpu, Leave::Lookup, fuel, flags);
        }
        let at = (*cpu).exec.return_at & (RETURNS - 1);
        let call = (&raw const (*cpu).exec.returns).cast::<Return>().add(at);
        (*cpu).exec.return_at = at.wrapping_sub(1);
        if (*call).rip == target {
            go_far!(cpu, (*call).link, fuel, flags);
        }
        jump_cached!(cpu, fuel, flags);
    }
}
unsafe extern "sysv64" fn jmp_r(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let target = u64::get(cpu, (*op).r0);
        if !super::super::general::is_canonical(target) {
            return slow_leave(cpu, op, fuel, flags);
        }
        indirect!(cpu, op, fuel, flags, target);
    }
}
unsafe extern "sysv64" fn call_r(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let target = u64::get(cpu, (*op).r0);
        if !super::super::general::is_canonical(target) {
            return slow_leave(cpu, op, fuel, flags);
        }
        let top = u64::get(cpu, RSP).wrapping_sub(8);
        let host = write_host!(u64, cpu, op, fuel, flags, top, false);
        let back = (*cpu).regs.rip.wrapping_add_signed(i64::from((*op).imm));
        u64::store(host, back);
        u64::set(cpu, RSP, top);
        remember(cpu, back, op.add(1));
        indirect!(cpu, op, fuel, flags, target);
    }
}
/// JMP and CALL through memory: the count and the return offset share `imm`, because `disp` is the operand's.
unsafe extern "sysv64" fn jump_m<A: Address, const CALL: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let from = read_host!(u64, cpu, op, fuel, flags, A::linear(cpu, op), false);
        let target = u64::load(from);
        if !super::super::general::is_canonical(target) {
            return slow_leave(cpu, op, fuel, flags);
        }
        if CALL {
            let top = u64::get(cpu, RSP).wrapping_sub(8);
            let host = write_host!(u64, cpu, op, fuel, flags, top, false);
            let back = (*cpu).regs.rip.wrapping_add_signed(i64::from((*op).imm));
            u64::store(host, back);
            u64::set(cpu, RSP, top);
            remember(cpu, back, op.add(1));
        }
        let fuel = fuel - i64::from((*op).ordinal) - 1;
        (*cpu).regs.rip = target;
        if fuel < 0 {
            leave!(cpu, Leave::Lookup, fuel, flags);
        }
        jump_cached!(cpu, fuel, flags);
    }
}

fn exit_pick(handler: Handler) -> Pick {
    Pick { loud: handler, quiet: None, observes: true, overwrites: false }
}
/// Jcc.
pub(in crate::exec) fn pick_jcc(condition: u8) -> Pick {
    exit_pick(for_condition!(condition, C => jcc::<C>))
}
/// CMP or TEST of a register with a register or immediate, fused with Jcc.
pub(in crate::exec) fn pick_fused(test: bool, imm: bool, bytes: u32, condition: u8) -> Pick {
    macro_rules! both {
        ($name:ident, $imm:literal) => {
            for_condition!(condition, C => for_width!(bytes, W =>
                ($name::<W, C, $imm, true> as Handler, $name::<W, C, $imm, false> as Handler)))
        };
    }
    let (loud, quiet) = match (test, imm) {
        (false, false) => both!(cmp_jcc, false),
        (false, true) => both!(cmp_jcc, true),
        (true, false) => both!(test_jcc, false),
        (true, true) => both!(test_jcc, true),
    };
    Pick { loud, quiet: Some(quiet), observes: false, overwrites: true }
}
/// JMP rel.
pub(in crate::exec) fn pick_jmp() -> Pick {
    exit_pick(jmp)
}
/// CALL rel.
pub(in crate::exec) fn pick_call() -> Pick {
    exit_pick(call)
}
/// RET.
pub(in crate::exec) fn pick_ret() -> Pick {
    exit_pick(ret)
}
/// JMP or CALL of a register.
pub(in crate::exec) fn pick_jump_r(call: bool) -> Pick {
    exit_pick(if call { call_r } else { jmp_r })
}
/// JMP or CALL through memory.
pub(in crate::exec) fn pick_jump_m(call: bool, kind: EaKind) -> Pick {
    exit_pick(if call {
        for_address!(kind, A => jump_m::<A, true> as Handler)
    } else {
        for_address!(kind, A => jump_m::<A, false> as Handler)
    })
}

/// The decoder's conditions and these are numbered alike.
const _: () = assert!(arith::condition(4, arith::ZF));
