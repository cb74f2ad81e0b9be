//! The few system instructions that a kernel runs all the time: flags on the stack, CLI, STI, reading a segment register.

use super::super::dispatch::next;
use super::super::fold;
use super::super::general::arith::IF;
use super::super::{Next, Op};
use super::Pick;
use super::memory::{slow_simple, write_host};
use super::word::Word;
use crate::cpu::Cpu;

const RSP: u8 = 32;
/// RF and VM are not pushed.
const NOT_PUSHED: u64 = 3 << 16;

/// PUSHFQ.
unsafe extern "sysv64" fn pushf(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let top = u64::get(cpu, RSP).wrapping_sub(8);
        let host = write_host!(u64, cpu, op, fuel, flags, top, true);
        u64::store(host, fold((*cpu).regs.rflags, flags) & !NOT_PUSHED);
        u64::set(cpu, RSP, top);
    }
    next!(cpu, op, fuel, flags);
}
/// CLI where the privilege is plain.
unsafe extern "sysv64" fn cli(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        if (*cpu).exec.user {
            return slow_simple(cpu, op, fuel, flags);
        }
        (*cpu).regs.rflags &= !IF;
    }
    next!(cpu, op, fuel, flags);
}
/// STI behind which the block goes on (`imm` is not zero), where the privilege is plain and nobody wants attention. The next
/// instruction comes at once then: the shadow in which no interrupt may come between the two needs not be noted, and
/// the block needs not be left for it. A kernel does this with each lock that it gives back.
unsafe extern "sysv64" fn sti(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        if (*cpu).exec.user || (*op).imm == 0 || (*cpu).attention.peek() != 0 {
            return slow_simple(cpu, op, fuel, flags);
        }
        (*cpu).regs.rflags |= IF;
    }
    next!(cpu, op, fuel, flags);
}
/// MOV of a segment register (its number in `imm`) to a general one.
unsafe extern "sysv64" fn mov_from_segment<W: Word>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler; the decoder puts a number below six.
    unsafe {
        let segment = (*cpu).sys.segments.as_ptr().add((*op).imm as usize);
        W::set(cpu, (*op).r0, W::narrow(u64::from((*segment).selector)));
    }
    next!(cpu, op, fuel, flags);
}

/// PUSHFQ.
pub(in crate::exec) fn pick_pushf() -> Pick {
    Pick { loud: pushf, quiet: None, observes: true, overwrites: false }
}
/// CLI.
pub(in crate::exec) fn pick_cli() -> Pick {
    Pick { loud: cli, quiet: None, observes: true, overwrites: false }
}
/// STI.
pub(in crate::exec) fn pick_sti() -> Pick {
    Pick { loud: sti, quiet: None, observes: true, overwrites: false }
}
/// MOV r, Sreg.
pub(in crate::exec) fn pick_mov_from_segment(bytes: u32) -> Pick {
    let handler: super::Handler = match bytes {
        2 => mov_from_segment::<u16>,
        4 => mov_from_segment::<u32>,
        _ => mov_from_segment::<u64>,
    };
    Pick { loud: handler, quiet: None, observes: false, overwrites: false }
}
