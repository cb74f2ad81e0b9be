//! Arithmetic and logic: register, immediate and memory forms.

use iced_x86::Mnemonic;

use super::super::dispatch::next;
use super::super::{Handler, Next, Op};
use super::memory::{Address, EaKind, read_host, write_host};
use super::word::{CARRY, Word};
use super::{Pick, for_address, for_width};
use crate::cpu::Cpu;

/// A two-operand operation.
trait Alu {
    /// Stores its result.
    const STORES: bool = true;
    /// The result alone.
    fn quiet<W: Word>(a: W, b: W, flags: u64) -> W;
    /// Result and flags.
    fn loud<W: Word>(a: W, b: W, flags: u64) -> (W, u64);
}
enum Add {}
enum Or {}
enum Adc {}
enum Sbb {}
enum And {}
enum Sub {}
enum Xor {}
enum Cmp {}
enum Test {}

macro_rules! alu {
    ($name:ty, $quiet:expr, $loud:expr $(, $stores:literal)?) => {
        impl Alu for $name {
            $(const STORES: bool = $stores;)?
            #[inline(always)]
            fn quiet<W: Word>(a: W, b: W, flags: u64) -> W {
                let _ = flags;
                let compute: fn(u64, u64, u64) -> u64 = $quiet;
                W::narrow(compute(a.wide(), b.wide(), flags))
            }
            #[inline(always)]
            fn loud<W: Word>(a: W, b: W, flags: u64) -> (W, u64) {
                let _ = flags;
                ($loud)(a, b, flags)
            }
        }
    };
}
#[inline(always)]
fn logic<W: Word>(value: u64) -> (W, u64) {
    let value = W::narrow(value);
    (value, W::logic(value))
}
alu!(Add, |a, b, _| a.wrapping_add(b), |a, b, _| W::add(a, b));
alu!(Sub, |a, b, _| a.wrapping_sub(b), |a, b, _| W::sub(a, b));
alu!(Adc, |a, b, f| a.wrapping_add(b).wrapping_add(u64::from(f & CARRY != 0)), |a, b, f| W::adc(a, b, f));
alu!(Sbb, |a, b, f| a.wrapping_sub(b).wrapping_sub(u64::from(f & CARRY != 0)), |a, b, f| W::sbb(a, b, f));
alu!(And, |a, b, _| a & b, |a: W, b: W, _| logic::<W>(a.wide() & b.wide()));
alu!(Or, |a, b, _| a | b, |a: W, b: W, _| logic::<W>(a.wide() | b.wide()));
alu!(Xor, |a, b, _| a ^ b, |a: W, b: W, _| logic::<W>(a.wide() ^ b.wide()));
alu!(Cmp, |a, _, _| a, |a, b, _| W::sub(a, b), false);
alu!(Test, |a, _, _| a, |a: W, b: W, _| logic::<W>(a.wide() & b.wide()), false);

#[inline(always)]
fn compute<O: Alu, W: Word, const LOUD: bool>(a: W, b: W, flags: u64) -> (W, u64) {
    if LOUD { O::loud(a, b, flags) } else { (O::quiet(a, b, flags), flags) }
}

/// Register with register.
unsafe extern "sysv64" fn rr<O: Alu, W: Word, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let (value, flags) = compute::<O, W, LOUD>(W::get(cpu, (*op).r0), W::get(cpu, (*op).r1), flags);
        if O::STORES {
            W::set(cpu, (*op).r0, value);
        }
        flags
    };
    next!(cpu, op, fuel, flags);
}
/// Register with immediate.
unsafe extern "sysv64" fn ri<O: Alu, W: Word, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let b = W::narrow(i64::from((*op).imm) as u64);
        let (value, flags) = compute::<O, W, LOUD>(W::get(cpu, (*op).r0), b, flags);
        if O::STORES {
            W::set(cpu, (*op).r0, value);
        }
        flags
    };
    next!(cpu, op, fuel, flags);
}
/// Register with memory.
unsafe extern "sysv64" fn rm<O: Alu, W: Word, A: Address, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let host = read_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let (value, flags) = compute::<O, W, LOUD>(W::get(cpu, (*op).r0), W::load(host), flags);
        if O::STORES {
            W::set(cpu, (*op).r0, value);
        }
        flags
    };
    next!(cpu, op, fuel, flags);
}
/// Memory with register (`IMM` false) or immediate.
unsafe extern "sysv64" fn mx<O: Alu, W: Word, A: Address, const IMM: bool, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let linear = A::linear(cpu, op);
        let host = if O::STORES {
            write_host!(W, cpu, op, fuel, flags, linear, true)
        } else {
            read_host!(W, cpu, op, fuel, flags, linear, true)
        };
        let b = if IMM { W::narrow(i64::from((*op).imm) as u64) } else { W::get(cpu, (*op).r0) };
        let (value, flags) = compute::<O, W, LOUD>(W::load(host), b, flags);
        if O::STORES {
            W::store(host, value);
        }
        flags
    };
    next!(cpu, op, fuel, flags);
}

/// Operand forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::exec) enum Form {
    RegReg,
    RegImm,
    RegMem(EaKind),
    MemReg(EaKind),
    MemImm(EaKind),
}

macro_rules! for_operation {
    ($mnemonic:expr, $name:ident => $value:expr) => {
        match $mnemonic {
            Mnemonic::Add => {
                type $name = Add;
                $value
            }
            Mnemonic::Or => {
                type $name = Or;
                $value
            }
            Mnemonic::Adc => {
                type $name = Adc;
                $value
            }
            Mnemonic::Sbb => {
                type $name = Sbb;
                $value
            }
            Mnemonic::And => {
                type $name = And;
                $value
            }
            Mnemonic::Sub => {
                type $name = Sub;
                $value
            }
            Mnemonic::Xor => {
                type $name = Xor;
                $value
            }
            Mnemonic::Cmp => {
                type $name = Cmp;
                $value
            }
            Mnemonic::Test => {
                type $name = Test;
                $value
            }
            _ => return None,
        }
    };
}

/// Handlers of one of the nine operations.
pub(in crate::exec) fn pick(mnemonic: Mnemonic, form: Form, bytes: u32) -> Option<Pick> {
    let pair: (Handler, Handler) = match form {
        Form::RegReg => for_operation!(mnemonic, O => for_width!(bytes, W => (rr::<O, W, true>, rr::<O, W, false>))),
        Form::RegImm => for_operation!(mnemonic, O => for_width!(bytes, W => (ri::<O, W, true>, ri::<O, W, false>))),
        Form::RegMem(kind) => for_operation!(mnemonic, O => for_width!(bytes, W => for_address!(kind, A =>
            (rm::<O, W, A, true>, rm::<O, W, A, false>)))),
        Form::MemReg(kind) => for_operation!(mnemonic, O => for_width!(bytes, W => for_address!(kind, A =>
            (mx::<O, W, A, false, true>, mx::<O, W, A, false, false>)))),
        Form::MemImm(kind) => for_operation!(mnemonic, O => for_width!(bytes, W => for_address!(kind, A =>
            (mx::<O, W, A, true, true>, mx::<O, W, A, true, false>)))),
    };
    let memory = !matches!(form, Form::RegReg | Form::RegImm);
    let observes = memory || matches!(mnemonic, Mnemonic::Adc | Mnemonic::Sbb);
    Some(Pick { loud: pair.0, quiet: Some(pair.1), observes, overwrites: true })
}

/// INC, DEC, NEG, NOT of a register or of memory.
trait Unary {
    fn quiet<W: Word>(a: W) -> W;
    fn loud<W: Word>(a: W, flags: u64) -> (W, u64);
}
enum Inc {}
enum Dec {}
enum Neg {}
enum Not {}
impl Unary for Inc {
    #[inline(always)]
    fn quiet<W: Word>(a: W) -> W {
        W::narrow(a.wide().wrapping_add(1))
    }
    #[inline(always)]
    fn loud<W: Word>(a: W, flags: u64) -> (W, u64) {
        W::inc(a, flags)
    }
}
impl Unary for Dec {
    #[inline(always)]
    fn quiet<W: Word>(a: W) -> W {
        W::narrow(a.wide().wrapping_sub(1))
    }
    #[inline(always)]
    fn loud<W: Word>(a: W, flags: u64) -> (W, u64) {
        W::dec(a, flags)
    }
}
impl Unary for Neg {
    #[inline(always)]
    fn quiet<W: Word>(a: W) -> W {
        W::narrow(a.wide().wrapping_neg())
    }
    #[inline(always)]
    fn loud<W: Word>(a: W, _flags: u64) -> (W, u64) {
        W::sub(W::narrow(0), a)
    }
}
impl Unary for Not {
    #[inline(always)]
    fn quiet<W: Word>(a: W) -> W {
        W::narrow(!a.wide())
    }
    #[inline(always)]
    fn loud<W: Word>(a: W, flags: u64) -> (W, u64) {
        (Self::quiet(a), flags)
    }
}
unsafe extern "sysv64" fn unary_r<O: Unary, W: Word, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let a = W::get(cpu, (*op).r0);
        let (value, flags) = if LOUD { O::loud(a, flags) } else { (O::quiet(a), flags) };
        W::set(cpu, (*op).r0, value);
        flags
    };
    next!(cpu, op, fuel, flags);
}
unsafe extern "sysv64" fn unary_m<O: Unary, W: Word, A: Address, const LOUD: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    let flags = unsafe {
        let host = write_host!(W, cpu, op, fuel, flags, A::linear(cpu, op), true);
        let a = W::load(host);
        let (value, flags) = if LOUD { O::loud(a, flags) } else { (O::quiet(a), flags) };
        W::store(host, value);
        flags
    };
    next!(cpu, op, fuel, flags);
}

/// Handlers of a one-operand operation; no `kind` means a register.
pub(in crate::exec) fn pick_unary(mnemonic: Mnemonic, kind: Option<EaKind>, bytes: u32) -> Option<Pick> {
    macro_rules! both {
        ($op:ty) => {
            match kind {
                None => for_width!(bytes, W => (unary_r::<$op, W, true> as Handler, unary_r::<$op, W, false> as Handler)),
                Some(kind) => for_width!(bytes, W => for_address!(kind, A =>
                    (unary_m::<$op, W, A, true> as Handler, unary_m::<$op, W, A, false> as Handler))),
            }
        };
    }
    let (loud, quiet) = match mnemonic {
        Mnemonic::Inc => both!(Inc),
        Mnemonic::Dec => both!(Dec),
        Mnemonic::Neg => both!(Neg),
        Mnemonic::Not => both!(Not),
        _ => return None,
    };
    Some(Pick { loud, quiet: Some(quiet), observes: kind.is_some(), overwrites: mnemonic == Mnemonic::Neg })
}
