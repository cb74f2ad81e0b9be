//! Handlers for the common instructions of 64-bit code.
//!
//! Each is a copy, for one operand form and width, of what the general interpreter does. Memory goes through the
//! translation cache inline; a miss fills it and runs the op again, and what cannot be cached (MMIO, a page crossing, a
//! page with decoded code) is done by the general interpreter from the instruction's bytes.
//!
//! `LOUD` says whether the arithmetic flags are computed: the decoder knows where nobody looks at them.

pub(super) mod alu;
pub(super) mod branch;
pub(super) mod locked;
mod memory;
pub(super) mod moves;
pub(super) mod shift;
pub(super) mod system;
pub(super) mod vector;

mod word;

pub(super) use memory::EaKind;

use super::Handler;
use crate::cpu::Cpu;

/// Offset of the registers within the CPU.
const REGS: usize = std::mem::offset_of!(Cpu, regs);

/// Handlers of one instruction and what the decoder must know about its flags.
#[derive(Clone, Copy)]
pub(super) struct Pick {
    /// Computes flags.
    pub(super) loud: Handler,
    /// Leaves them unspecified; only where the instruction overwrites all of them or all that it touches.
    pub(super) quiet: Option<Handler>,
    /// Looks at flags, or may fault.
    pub(super) observes: bool,
    /// Overwrites all flags.
    pub(super) overwrites: bool,
}

/// Evaluates an expression with a type name bound to the operand width.
macro_rules! for_width {
    ($bytes:expr, $word:ident => $value:expr) => {
        match $bytes {
            1 => {
                type $word = u8;
                $value
            }
            2 => {
                type $word = u16;
                $value
            }
            4 => {
                type $word = u32;
                $value
            }
            _ => {
                type $word = u64;
                $value
            }
        }
    };
}
/// Evaluates an expression with a type name bound to the kind of address.
macro_rules! for_address {
    ($kind:expr, $address:ident => $value:expr) => {
        match $kind {
            crate::exec::fast::EaKind::Base => {
                type $address = crate::exec::fast::memory::Base;
                $value
            }
            crate::exec::fast::EaKind::Sib => {
                type $address = crate::exec::fast::memory::Sib;
                $value
            }
            crate::exec::fast::EaKind::Seg => {
                type $address = crate::exec::fast::memory::Seg;
                $value
            }
        }
    };
}
/// Evaluates an expression with a constant name bound to a condition code.
macro_rules! for_condition {
    ($code:expr, $name:ident => $value:expr) => {
        for_condition!(@ $code, $name, $value, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $code:expr, $name:ident, $value:expr, $($n:literal)*) => {
        match $code & 15 {
            $($n => {
                const $name: u8 = $n;
                $value
            })*
            _ => unreachable!("four bits"),
        }
    };
}
use {for_address, for_condition, for_width};
