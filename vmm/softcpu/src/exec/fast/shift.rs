//! Shifts, multiplication, division, bit tests and scans on registers.

use iced_x86::Mnemonic;

use super::super::dispatch::next;
use super::super::general::arith::{self, Shift};
use super::super::{Handler, Next, Op, fold, unfold};
use super::memory::{Address, EaKind, read_host, slow_leave};
use super::word::{CARRY, Word, ZERO_FLAG};
use super::{Pick, for_address, for_width};
use crate::cpu::Cpu;

const RAX: u8 = 0;
const RCX: u8 = 8;
const RDX: u8 = 16;

/// Which shift, as a type.
trait Kind {
    const KIND: Shift;
}
enum Shl {}
enum Shr {}
enum Sar {}
enum Rol {}
enum Ror {}
impl Kind for Shl {
    const KIND: Shift = Shift::Shl;
}
impl Kind for Shr {
    const KIND: Shift = Shift::Shr;
}
impl Kind for Sar {
    const KIND: Shift = Shift::Sar;
}
impl Kind for Rol {
    const KIND: Shift = Shift::Rol;
}
impl Kind for Ror {
    const KIND: Shift = Shift::Ror;
}

/// The value alone, for a count below the operand's width.
#[inline(always)]
fn shifted<K: Kind, W: Word>(a: W, count: u32) -> W {
    let bits = W::BYTES as u32 * 8;
    match K::KIND {
        Shift::Shl => W::narrow(a.wide().wrapping_shl(count)),
        Shift::Shr => W::narrow(a.wide().wrapping_shr(count)),
        Shift::Sar => W::narrow(a.signed().wrapping_shr(count) as u64),
        Shift::Rol if bits == 64 => W::narrow(a.wide().rotate_left(count)),
        Shift::Rol if bits == 32 => W::narrow(u64::from((a.wide() as u32).rotate_left(count))),
        _ if bits == 64 => W::narrow(a.wide().rotate_right(count)),
        _ if bits == 32 => W::narrow(u64::from((a.wide() as u32).rotate_right(count))),
        _ => {
            let (left, wide) = (K::KIND == Shift::Rol, a.wide());
            let by = count % bits;
            let by = if left { by } else { (bits - by) % bits };
            W::narrow((wide << by) | (wide >> ((bits - by) % bits)))
        }
    }
}

/// Flags after a rotation with this result: CF and OF change, the others stay.
#[inline(always)]
fn rotated<K: Kind, W: Word>(result: W, flags: u64) -> u64 {
    let top = (result.wide() >> (W::BYTES * 8 - 1)) & 1;
    let (carry, other) = match K::KIND {
        Shift::Rol => (result.wide() & 1, top),
        _ => (top, (result.wide() >> (W::BYTES * 8 - 2)) & 1),
    };
    (flags & !(CARRY | 1)) | (carry << 8) | (carry ^ other)
}

/// By an immediate: nonzero and below the width.
unsafe extern "sysv64" fn shift_i<K: Kind, W: Word, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let a = W::get(cpu, (*op).r0);
        let count = (*op).imm as u32;
        if LOUD {
            let (value, out) = arith::shift(K::KIND, a.wide(), u64::from(count), W::BYTES as u32, fold(0, flags));
            W::set(cpu, (*op).r0, W::narrow(value));
            unfold(out)
        } else {
            W::set(cpu, (*op).r0, shifted::<K, W>(a, count));
            flags
        }
    };
    next!(cpu, op, fuel, flags);
}
/// By CL.
unsafe extern "sysv64" fn shift_cl<K: Kind, W: Word, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let a = W::get(cpu, (*op).r0);
        let count = u64::from(u8::get(cpu, RCX));
        if W::BYTES < 4 {
            let (value, out) = arith::shift(K::KIND, a.wide(), count, W::BYTES as u32, fold(0, flags));
            W::set(cpu, (*op).r0, W::narrow(value));
            unfold(out)
        } else if LOUD {
            let count = count as u32 & (W::BYTES as u32 * 8 - 1);
            let (value, out) = match K::KIND {
                // A count of zero leaves the flags.
                _ if count == 0 => (a, flags),
                Shift::Shl => W::shl(a, count),
                Shift::Shr => W::shr(a, count),
                Shift::Sar => W::sar(a, count),
                _ => {
                    let value = shifted::<K, W>(a, count);
                    (value, rotated::<K, W>(value, flags))
                }
            };
            W::set(cpu, (*op).r0, value);
            out
        } else {
            let count = count as u32 & (W::BYTES as u32 * 8 - 1);
            W::set(cpu, (*op).r0, shifted::<K, W>(a, count));
            flags
        }
    };
    next!(cpu, op, fuel, flags);
}

/// IMUL r, r and IMUL r, r, imm.
unsafe extern "sysv64" fn imul<W: Word, const IMM: bool, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let (a, b) = if IMM {
            (W::get(cpu, (*op).r1), W::narrow(i64::from((*op).imm) as u64))
        } else {
            (W::get(cpu, (*op).r0), W::get(cpu, (*op).r1))
        };
        multiply::<W, LOUD>(cpu, op, a, b, flags)
    };
    next!(cpu, op, fuel, flags);
}
/// IMUL r, m and IMUL r, m, imm.
unsafe extern "sysv64" fn imul_m<W: Word, A: Address, const IMM: bool, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let host = read_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let b = if IMM { W::narrow(i64::from((*op).imm) as u64) } else { W::get(cpu, (*op).r0) };
        multiply::<W, LOUD>(cpu, op, W::load(host), b, flags)
    };
    next!(cpu, op, fuel, flags);
}
#[inline(always)]
unsafe fn multiply<W: Word, const LOUD: bool>(cpu: *mut Cpu, op: *const Op, a: W, b: W, flags: u64) -> u64 {
    // SAFETY: by the contract of a handler.
    unsafe {
        if LOUD {
            let low = W::narrow(a.wide().wrapping_mul(b.wide()));
            W::set(cpu, (*op).r0, low);
            W::logic(low) | if W::product_fits(a, b) { 0 } else { CARRY | 1 }
        } else {
            W::set(cpu, (*op).r0, W::narrow(a.wide().wrapping_mul(b.wide())));
            flags
        }
    }
}

/// MUL (`SIGNED`: IMUL) of rAX by a register, 32 or 64 bits.
unsafe extern "sysv64" fn mul_a<W: Word, const SIGNED: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let (a, b) = (W::get(cpu, RAX).wide(), W::get(cpu, (*op).r0).wide());
        let size = W::BYTES as u32;
        let (low, high, out) =
            if SIGNED { arith::imul(a, b, size, fold(0, flags)) } else { arith::mul(a, b, size, fold(0, flags)) };
        W::set(cpu, RAX, W::narrow(low));
        W::set(cpu, RDX, W::narrow(high));
        unfold(out)
    };
    next!(cpu, op, fuel, flags);
}
/// DIV (`SIGNED`: IDIV) by a register, 32 or 64 bits; #DE in the general interpreter.
unsafe extern "sysv64" fn div_a<W: Word, const SIGNED: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    unsafe {
        let (low, high, divisor) = (W::get(cpu, RAX).wide(), W::get(cpu, RDX).wide(), W::get(cpu, (*op).r0).wide());
        let size = W::BYTES as u32;
        // Most divisions fit the host's native ones.
        let result = match (SIGNED, W::BYTES) {
            (false, 4) if divisor != 0 => {
                let value = (high << 32) | low;
                let quotient = value / divisor;
                (quotient <= 0xffff_ffff).then_some((quotient, value % divisor))
            }
            (false, 8) if divisor != 0 && high == 0 => Some((low / divisor, low % divisor)),
            (false, _) => arith::div(high, low, divisor, size),
            _ => arith::idiv(high, low, divisor, size),
        };
        let Some((quotient, remainder)) = result else { return slow_leave(cpu, op, fuel, flags) };
        W::set(cpu, RAX, W::narrow(quotient));
        W::set(cpu, RDX, W::narrow(remainder));
    }
    next!(cpu, op, fuel, flags);
}

/// BT r, r / imm, and with `CHANGE` 1 BTS, 2 BTR, 3 BTC.
unsafe extern "sysv64" fn bit_test<W: Word, const IMM: bool, const CHANGE: u8>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let a = W::get(cpu, (*op).r0).wide();
        let at = if IMM { i64::from((*op).imm) as u64 } else { W::get(cpu, (*op).r1).wide() } & (W::BYTES * 8 - 1);
        let bit = 1u64 << at;
        match CHANGE {
            1 => W::set(cpu, (*op).r0, W::narrow(a | bit)),
            2 => W::set(cpu, (*op).r0, W::narrow(a & !bit)),
            3 => W::set(cpu, (*op).r0, W::narrow(a ^ bit)),
            _ => {}
        }
        (flags & !CARRY) | (((a >> at) & 1) << 8)
    };
    next!(cpu, op, fuel, flags);
}
/// BT m, imm.
unsafe extern "sysv64" fn bit_test_m<W: Word, A: Address>(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let host = read_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let at = i64::from((*op).imm) as u64 & (W::BYTES * 8 - 1);
        (flags & !CARRY) | (((W::load(host).wide() >> at) & 1) << 8)
    };
    next!(cpu, op, fuel, flags);
}
/// BSF, and BSR with `REVERSE`.
unsafe extern "sysv64" fn bit_scan<W: Word, const REVERSE: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let a = W::get(cpu, (*op).r1).wide();
        if a == 0 {
            flags | ZERO_FLAG
        } else {
            let index = if REVERSE { 63 - a.leading_zeros() } else { a.trailing_zeros() };
            W::set(cpu, (*op).r0, W::narrow(u64::from(index)));
            flags & !ZERO_FLAG
        }
    };
    next!(cpu, op, fuel, flags);
}

/// Shift of a register by an immediate or by CL.
pub(in crate::exec) fn pick_shift(mnemonic: Mnemonic, by_cl: bool, bytes: u32) -> Option<Pick> {
    macro_rules! kinds {
        ($k:ty) => {
            for_width!(bytes, W => if by_cl {
                (shift_cl::<$k, W, true> as Handler, shift_cl::<$k, W, false> as Handler)
            } else {
                (shift_i::<$k, W, true> as Handler, shift_i::<$k, W, false> as Handler)
            })
        };
    }
    let (loud, quiet) = match mnemonic {
        Mnemonic::Shl | Mnemonic::Sal => kinds!(Shl),
        Mnemonic::Shr => kinds!(Shr),
        Mnemonic::Sar => kinds!(Sar),
        Mnemonic::Rol => kinds!(Rol),
        Mnemonic::Ror => kinds!(Ror),
        _ => return None,
    };
    let rotate = matches!(mnemonic, Mnemonic::Rol | Mnemonic::Ror);
    Some(Pick { loud, quiet: Some(quiet), observes: false, overwrites: !rotate && !by_cl })
}
/// IMUL with two or three operands.
pub(in crate::exec) fn pick_imul(kind: Option<EaKind>, imm: bool, bytes: u32) -> Pick {
    macro_rules! widths {
        ($w:ty) => {
            match (kind, imm) {
                (None, false) => (imul::<$w, false, true> as Handler, imul::<$w, false, false> as Handler),
                (None, true) => (imul::<$w, true, true> as Handler, imul::<$w, true, false> as Handler),
                (Some(kind), false) => for_address!(kind, A =>
                    (imul_m::<$w, A, false, true> as Handler, imul_m::<$w, A, false, false> as Handler)),
                (Some(kind), true) => for_address!(kind, A =>
                    (imul_m::<$w, A, true, true> as Handler, imul_m::<$w, A, true, false> as Handler)),
            }
        };
    }
    let (loud, quiet) = match bytes {
        2 => widths!(u16),
        4 => widths!(u32),
        _ => widths!(u64),
    };
    Pick { loud, quiet: Some(quiet), observes: kind.is_some(), overwrites: true }
}
/// MUL or IMUL of rAX by a register of 4 or 8 bytes.
pub(in crate::exec) fn pick_mul(signed: bool, bytes: u32) -> Option<Pick> {
    let handler: Handler = match (signed, bytes) {
        (false, 4) => mul_a::<u32, false>,
        (true, 4) => mul_a::<u32, true>,
        (false, 8) => mul_a::<u64, false>,
        (true, 8) => mul_a::<u64, true>,
        _ => return None,
    };
    Some(Pick { loud: handler, quiet: None, observes: false, overwrites: true })
}
/// DIV or IDIV by a register of 4 or 8 bytes.
pub(in crate::exec) fn pick_div(signed: bool, bytes: u32) -> Option<Pick> {
    let handler: Handler = match (signed, bytes) {
        (false, 4) => div_a::<u32, false>,
        (true, 4) => div_a::<u32, true>,
        (false, 8) => div_a::<u64, false>,
        (true, 8) => div_a::<u64, true>,
        _ => return None,
    };
    Some(Pick { loud: handler, quiet: None, observes: true, overwrites: false })
}
/// BT, BTS, BTR, BTC of a register.
pub(in crate::exec) fn pick_bit_test(mnemonic: Mnemonic, imm: bool, bytes: u32) -> Option<Pick> {
    macro_rules! widths {
        ($change:literal) => {
            match (bytes, imm) {
                (2, false) => bit_test::<u16, false, $change> as Handler,
                (2, true) => bit_test::<u16, true, $change>,
                (4, false) => bit_test::<u32, false, $change>,
                (4, true) => bit_test::<u32, true, $change>,
                (_, false) => bit_test::<u64, false, $change>,
                (_, true) => bit_test::<u64, true, $change>,
            }
        };
    }
    let handler = match mnemonic {
        Mnemonic::Bt => widths!(0),
        Mnemonic::Bts => widths!(1),
        Mnemonic::Btr => widths!(2),
        Mnemonic::Btc => widths!(3),
        _ => return None,
    };
    Some(Pick { loud: handler, quiet: None, observes: false, overwrites: false })
}
/// BT m, imm.
pub(in crate::exec) fn pick_bit_test_m(kind: EaKind, bytes: u32) -> Pick {
    let handler = match bytes {
        2 => for_address!(kind, A => bit_test_m::<u16, A> as Handler),
        4 => for_address!(kind, A => bit_test_m::<u32, A> as Handler),
        _ => for_address!(kind, A => bit_test_m::<u64, A> as Handler),
    };
    Pick { loud: handler, quiet: None, observes: true, overwrites: false }
}
/// BSF and BSR of registers.
pub(in crate::exec) fn pick_bit_scan(reverse: bool, bytes: u32) -> Pick {
    let handler: Handler = match (bytes, reverse) {
        (2, false) => bit_scan::<u16, false>,
        (2, true) => bit_scan::<u16, true>,
        (4, false) => bit_scan::<u32, false>,
        (4, true) => bit_scan::<u32, true>,
        (_, false) => bit_scan::<u64, false>,
        (_, true) => bit_scan::<u64, true>,
    };
    Pick { loud: handler, quiet: None, observes: false, overwrites: false }
}
