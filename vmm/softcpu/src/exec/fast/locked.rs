//! LOCK operations and XCHG with memory, as the host's own locked instructions.

use std::arch::asm;

use iced_x86::Mnemonic;

use super::super::dispatch::next;
use super::super::{Handler, Next, Op};
use super::memory::{Address, EaKind, write_host};
use super::word::{CARRY, Word};
use super::{Pick, for_address, for_width};
use crate::cpu::Cpu;

/// Flags of locked logic: AF is not taken from the host, which may leave it undefined.
const LOGIC: u64 = 0xc500;

/// Locked instructions of one width.
trait Locked: Word {
    /// # Safety
    /// All: the pointer came from the translation cache.
    unsafe fn add(host: *mut u8, b: Self) -> u64;
    unsafe fn sub(host: *mut u8, b: Self) -> u64;
    unsafe fn and(host: *mut u8, b: Self) -> u64;
    unsafe fn or(host: *mut u8, b: Self) -> u64;
    unsafe fn xor(host: *mut u8, b: Self) -> u64;
    unsafe fn inc(host: *mut u8, flags: u64) -> u64;
    unsafe fn dec(host: *mut u8, flags: u64) -> u64;
    unsafe fn exchange(host: *mut u8, b: Self) -> Self;
    unsafe fn exchange_add(host: *mut u8, b: Self) -> (Self, u64);
    /// BTS, BTR, BTC of a bit within the operand: CF.
    unsafe fn bit_set(host: *mut u8, bit: u64) -> bool;
    unsafe fn bit_reset(host: *mut u8, bit: u64) -> bool;
    unsafe fn bit_complement(host: *mut u8, bit: u64) -> bool;
    /// What was there, and flags.
    unsafe fn compare_exchange(host: *mut u8, old: Self, new: Self) -> (Self, u64);
}

macro_rules! simple {
    ($name:ident, $text:literal, $word:ty, $class:ident, $suffix:literal) => {
        #[inline(always)]
        unsafe fn $name(host: *mut u8, b: Self) -> u64 {
            let flags: u16;
            // SAFETY: by contract.
            unsafe {
                asm!(concat!("lock ", $text, " [{p}], {b", $suffix, "}"), "lahf", "seto al",
                    p = in(reg) host, b = in($class) b, out("ax") flags, options(nostack));
            }
            u64::from(flags)
        }
    };
}
macro_rules! bit {
    ($name:ident, $text:literal, $suffix:literal) => {
        #[inline(always)]
        unsafe fn $name(host: *mut u8, bit: u64) -> bool {
            let carry: u8;
            // SAFETY: by contract; the bit is within the operand.
            unsafe {
                asm!(concat!("lock ", $text, " [{p}], {b", $suffix, "}"), "setc {c}",
                    p = in(reg) host, b = in(reg) bit, c = out(reg_byte) carry, options(nostack));
            }
            carry != 0
        }
    };
}
macro_rules! locked {
    ($word:ty, $class:ident, $suffix:literal, $pointer:literal, $wide:literal) => {
        impl Locked for $word {
            simple!(add, "add", $word, $class, $suffix);
            simple!(sub, "sub", $word, $class, $suffix);
            simple!(and, "and", $word, $class, $suffix);
            simple!(or, "or", $word, $class, $suffix);
            simple!(xor, "xor", $word, $class, $suffix);
            bit!(bit_set, "bts", $wide);
            bit!(bit_reset, "btr", $wide);
            bit!(bit_complement, "btc", $wide);
            #[inline(always)]
            unsafe fn inc(host: *mut u8, flags: u64) -> u64 {
                let out: u16;
                // SAFETY: by contract.
                unsafe {
                    asm!("bt {f:e}, 8", concat!("lock inc ", $pointer, " ptr [{p}]"), "lahf", "seto al",
                        p = in(reg) host, f = in(reg) flags, out("ax") out, options(nostack));
                }
                u64::from(out)
            }
            #[inline(always)]
            unsafe fn dec(host: *mut u8, flags: u64) -> u64 {
                let out: u16;
                // SAFETY: by contract.
                unsafe {
                    asm!("bt {f:e}, 8", concat!("lock dec ", $pointer, " ptr [{p}]"), "lahf", "seto al",
                        p = in(reg) host, f = in(reg) flags, out("ax") out, options(nostack));
                }
                u64::from(out)
            }
            #[inline(always)]
            unsafe fn exchange(host: *mut u8, mut b: Self) -> Self {
                // SAFETY: by contract.
                unsafe {
                    asm!(concat!("xchg [{p}], {b", $suffix, "}"), p = in(reg) host, b = inout($class) b,
                        options(nostack, preserves_flags));
                }
                b
            }
            #[inline(always)]
            unsafe fn exchange_add(host: *mut u8, mut b: Self) -> (Self, u64) {
                let flags: u16;
                // SAFETY: by contract.
                unsafe {
                    asm!(concat!("lock xadd [{p}], {b", $suffix, "}"), "lahf", "seto al",
                        p = in(reg) host, b = inout($class) b, out("ax") flags, options(nostack));
                }
                (b, u64::from(flags))
            }
            #[inline(always)]
            unsafe fn compare_exchange(host: *mut u8, old: Self, new: Self) -> (Self, u64) {
                let mut seen = u64::from(old);
                let flags: u64;
                // SAFETY: by contract.
                unsafe {
                    asm!(concat!("lock cmpxchg [{p}], {b", $suffix, "}"), "mov {s}, rax", "lahf", "seto al",
                        "movzx eax, ax",
                        p = in(reg) host, b = in($class) new, s = out(reg) seen, inout("rax") seen => flags,
                        options(nostack));
                }
                (<$word>::narrow(seen), flags)
            }
        }
    };
}
// There are no bit operations on bytes: the decoder never asks for those.
locked!(u8, reg_byte, "", "byte", ":x");
locked!(u16, reg, ":x", "word", ":x");
locked!(u32, reg, ":e", "dword", ":e");
locked!(u64, reg, ":r", "qword", ":r");

/// What a locked operation does, as a constant.
const ADD: u8 = 0;
const SUB: u8 = 1;
const AND: u8 = 2;
const OR: u8 = 3;
const XOR: u8 = 4;
const INC: u8 = 5;
const DEC: u8 = 6;

unsafe extern "sysv64" fn alu<W: Locked, A: Address, const O: u8, const IMM: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let host = write_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let b = if IMM { W::narrow(i64::from((*op).imm) as u64) } else { W::get(cpu, (*op).r0) };
        match O {
            ADD => <W as Locked>::add(host, b),
            SUB => <W as Locked>::sub(host, b),
            AND => W::and(host, b) & LOGIC,
            OR => W::or(host, b) & LOGIC,
            XOR => W::xor(host, b) & LOGIC,
            INC => <W as Locked>::inc(host, flags),
            _ => <W as Locked>::dec(host, flags),
        }
    };
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn xchg<W: Locked, A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let host = write_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let old = W::exchange(host, W::get(cpu, (*op).r0));
        W::set(cpu, (*op).r0, old);
    }
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn xadd<W: Locked, A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let host = write_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let (old, flags) = W::exchange_add(host, W::get(cpu, (*op).r0));
        W::set(cpu, (*op).r0, old);
        flags
    };
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn cmpxchg<W: Locked, A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let host = write_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let old = W::get(cpu, 0);
        let (seen, flags) = W::compare_exchange(host, old, W::get(cpu, (*op).r0));
        if seen != old {
            W::set(cpu, 0, seen);
        }
        flags
    };
    next!(cpu, op, fuel, flags);
}

/// BTS (1), BTR (2), BTC (3) with an immediate.
unsafe extern "sysv64" fn bit_change<W: Locked, A: Address, const CHANGE: u8>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let host = write_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let bit = i64::from((*op).imm) as u64 & (W::BYTES * 8 - 1);
        let carry = match CHANGE {
            1 => W::bit_set(host, bit),
            2 => W::bit_reset(host, bit),
            _ => W::bit_complement(host, bit),
        };
        (flags & !CARRY) | (u64::from(carry) << 8)
    };
    next!(cpu, op, fuel, flags);
}
/// BTS, BTR, BTC of memory with an immediate, with or without LOCK.
pub(in crate::exec) fn pick_bit(mnemonic: Mnemonic, kind: EaKind, bytes: u32) -> Option<Pick> {
    macro_rules! widths {
        ($change:literal) => {
            match bytes {
                2 => for_address!(kind, A => bit_change::<u16, A, $change> as Handler),
                4 => for_address!(kind, A => bit_change::<u32, A, $change> as Handler),
                8 => for_address!(kind, A => bit_change::<u64, A, $change> as Handler),
                _ => return None,
            }
        };
    }
    let handler = match mnemonic {
        Mnemonic::Bts => widths!(1),
        Mnemonic::Btr => widths!(2),
        Mnemonic::Btc => widths!(3),
        _ => return None,
    };
    Some(Pick { loud: handler, quiet: None, observes: true, overwrites: false })
}

/// LOCK forms with a memory destination; `imm`: the source is an immediate. XCHG needs no prefix.
pub(in crate::exec) fn pick(mnemonic: Mnemonic, kind: EaKind, imm: bool, bytes: u32) -> Option<Pick> {
    macro_rules! operation {
        ($o:ident) => {
            for_width!(bytes, W => for_address!(kind, A => if imm {
                alu::<W, A, $o, true> as Handler
            } else {
                alu::<W, A, $o, false> as Handler
            }))
        };
    }
    let (handler, overwrites): (Handler, bool) = match mnemonic {
        Mnemonic::Add => (operation!(ADD), true),
        Mnemonic::Sub => (operation!(SUB), true),
        Mnemonic::And => (operation!(AND), true),
        Mnemonic::Or => (operation!(OR), true),
        Mnemonic::Xor => (operation!(XOR), true),
        Mnemonic::Inc => (operation!(INC), false),
        Mnemonic::Dec => (operation!(DEC), false),
        Mnemonic::Xchg => (for_width!(bytes, W => for_address!(kind, A => xchg::<W, A> as Handler)), false),
        Mnemonic::Xadd => (for_width!(bytes, W => for_address!(kind, A => xadd::<W, A> as Handler)), true),
        Mnemonic::Cmpxchg => (for_width!(bytes, W => for_address!(kind, A => cmpxchg::<W, A> as Handler)), true),
        _ => return None,
    };
    Some(Pick { loud: handler, quiet: None, observes: true, overwrites })
}
