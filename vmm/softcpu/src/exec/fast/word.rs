//! Operand widths: register access and arithmetic whose flags come from the host's own.
//!
//! Flags have the form in which they flow between handlers: AH as LAHF gives it, above OF in bit 0.

#![allow(clippy::cast_lossless, reason = "one macro for all widths")]

use std::arch::asm;

use super::REGS;
use crate::cpu::Cpu;

/// CF in flowing flags.
pub(super) const CARRY: u64 = 1 << 8;
/// PF.
pub(super) const PARITY: u64 = 1 << 10;
/// ZF.
pub(super) const ZERO_FLAG: u64 = 1 << 14;
/// SF.
pub(super) const SIGN: u64 = 1 << 15;

/// An operand width.
pub(super) trait Word: Copy + PartialEq + PartialOrd {
    /// Size in bytes.
    const BYTES: u64;
    /// Zero-extended.
    fn wide(self) -> u64;
    /// Truncated.
    fn narrow(value: u64) -> Self;
    /// Sign-extended.
    fn signed(self) -> i64;
    /// ADD.
    fn add(a: Self, b: Self) -> (Self, u64);
    /// SUB.
    fn sub(a: Self, b: Self) -> (Self, u64);
    /// ADC.
    fn adc(a: Self, b: Self, flags: u64) -> (Self, u64);
    /// SBB.
    fn sbb(a: Self, b: Self, flags: u64) -> (Self, u64);
    /// INC: CF is kept.
    fn inc(a: Self, flags: u64) -> (Self, u64);
    /// DEC: CF is kept.
    fn dec(a: Self, flags: u64) -> (Self, u64);
    /// SHL by a count between one and the width less one. OF and AF as the general interpreter defines them, not as the
    /// host happens to.
    fn shl(a: Self, count: u32) -> (Self, u64);
    /// SHR, likewise.
    fn shr(a: Self, count: u32) -> (Self, u64);
    /// SAR, likewise.
    fn sar(a: Self, count: u32) -> (Self, u64);
    /// Whether the signed product fits.
    fn product_fits(a: Self, b: Self) -> bool;
    /// Flags of a logical result.
    fn logic(a: Self) -> u64;
    /// Value of a register at a byte offset in `Regs`.
    ///
    /// # Safety
    /// `cpu` is valid, the offset that of a register.
    unsafe fn get(cpu: *const Cpu, offset: u8) -> Self;
    /// Writes a register; 32 bits clear the upper half.
    ///
    /// # Safety
    /// As for `get`.
    unsafe fn set(cpu: *mut Cpu, offset: u8, value: Self);
    /// Reads guest memory.
    ///
    /// # Safety
    /// The pointer came from the translation cache.
    unsafe fn load(host: *const u8) -> Self;
    /// Writes guest memory.
    ///
    /// # Safety
    /// The pointer came from the translation cache.
    unsafe fn store(host: *mut u8, value: Self);
}

macro_rules! word {
    ($word:ty, $signed:ty, $class:ident, $suffix:literal, $set:ty) => {
        impl Word for $word {
            const BYTES: u64 = size_of::<$word>() as u64;
            #[inline(always)]
            fn wide(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn narrow(value: u64) -> Self {
                value as $word
            }
            #[inline(always)]
            fn signed(self) -> i64 {
                i64::from(self as $signed)
            }
            #[inline(always)]
            fn add(mut a: Self, b: Self) -> (Self, u64) {
                let flags: u16;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!(concat!("add {a", $suffix, "}, {b", $suffix, "}"), "lahf", "seto al",
                        a = inout($class) a, b = in($class) b, out("ax") flags, options(pure, nomem, nostack));
                }
                (a, u64::from(flags))
            }
            #[inline(always)]
            fn sub(mut a: Self, b: Self) -> (Self, u64) {
                let flags: u16;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!(concat!("sub {a", $suffix, "}, {b", $suffix, "}"), "lahf", "seto al",
                        a = inout($class) a, b = in($class) b, out("ax") flags, options(pure, nomem, nostack));
                }
                (a, u64::from(flags))
            }
            #[inline(always)]
            fn adc(mut a: Self, b: Self, flags: u64) -> (Self, u64) {
                let out: u16;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!("bt {f:e}, 8", concat!("adc {a", $suffix, "}, {b", $suffix, "}"), "lahf", "seto al",
                        a = inout($class) a, b = in($class) b, f = in(reg) flags, out("ax") out,
                        options(pure, nomem, nostack));
                }
                (a, u64::from(out))
            }
            #[inline(always)]
            fn sbb(mut a: Self, b: Self, flags: u64) -> (Self, u64) {
                let out: u16;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!("bt {f:e}, 8", concat!("sbb {a", $suffix, "}, {b", $suffix, "}"), "lahf", "seto al",
                        a = inout($class) a, b = in($class) b, f = in(reg) flags, out("ax") out,
                        options(pure, nomem, nostack));
                }
                (a, u64::from(out))
            }
            #[inline(always)]
            fn inc(mut a: Self, flags: u64) -> (Self, u64) {
                let out: u16;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!("bt {f:e}, 8", concat!("inc {a", $suffix, "}"), "lahf", "seto al",
                        a = inout($class) a, f = in(reg) flags, out("ax") out, options(pure, nomem, nostack));
                }
                (a, u64::from(out))
            }
            #[inline(always)]
            fn dec(mut a: Self, flags: u64) -> (Self, u64) {
                let out: u16;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!("bt {f:e}, 8", concat!("dec {a", $suffix, "}"), "lahf", "seto al",
                        a = inout($class) a, f = in(reg) flags, out("ax") out, options(pure, nomem, nostack));
                }
                (a, u64::from(out))
            }
            #[inline(always)]
            fn shl(mut a: Self, count: u32) -> (Self, u64) {
                let out: u64;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!(concat!("shl {a", $suffix, "}, cl"), "lahf", "and eax, 0xc500",
                        a = inout($class) a, in("ecx") count, out("rax") out, options(pure, nomem, nostack));
                }
                (a, out | ((out >> 15) ^ (out >> 8)) & 1)
            }
            #[inline(always)]
            fn shr(mut a: Self, count: u32) -> (Self, u64) {
                let top = (a as u64 >> (Self::BYTES * 8 - 1)) & u64::from(count == 1);
                let out: u64;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!(concat!("shr {a", $suffix, "}, cl"), "lahf", "and eax, 0xc500",
                        a = inout($class) a, in("ecx") count, out("rax") out, options(pure, nomem, nostack));
                }
                (a, out | top)
            }
            #[inline(always)]
            fn sar(mut a: Self, count: u32) -> (Self, u64) {
                let out: u64;
                // SAFETY: arithmetic on registers only.
                unsafe {
                    asm!(concat!("sar {a", $suffix, "}, cl"), "lahf", "and eax, 0xc500",
                        a = inout($class) a, in("ecx") count, out("rax") out, options(pure, nomem, nostack));
                }
                (a, out)
            }
            #[inline(always)]
            fn product_fits(a: Self, b: Self) -> bool {
                !(a as $signed).overflowing_mul(b as $signed).1
            }
            #[inline(always)]
            fn logic(a: Self) -> u64 {
                let flags: u64;
                // SAFETY: arithmetic on registers only. AF is not taken from the host, which may leave it undefined.
                unsafe {
                    asm!(concat!("test {a", $suffix, "}, {a", $suffix, "}"), "lahf", "and eax, 0xc500",
                        a = in($class) a, out("rax") flags, options(pure, nomem, nostack));
                }
                flags
            }
            #[inline(always)]
            unsafe fn get(cpu: *const Cpu, offset: u8) -> Self {
                // SAFETY: by contract.
                unsafe { cpu.cast::<u8>().add(REGS + offset as usize).cast::<$word>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn set(cpu: *mut Cpu, offset: u8, value: Self) {
                // SAFETY: by contract.
                unsafe { cpu.cast::<u8>().add(REGS + offset as usize).cast::<$set>().write_unaligned(value as $set) }
            }
            #[inline(always)]
            unsafe fn load(host: *const u8) -> Self {
                // SAFETY: by contract.
                unsafe { host.cast::<$word>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn store(host: *mut u8, value: Self) {
                // SAFETY: by contract.
                unsafe { host.cast::<$word>().write_unaligned(value) }
            }
        }
    };
}

word!(u8, i8, reg_byte, "", u8);
word!(u16, i16, reg, ":x", u16);
word!(u32, i32, reg, ":e", u64);
word!(u64, i64, reg, ":r", u64);
