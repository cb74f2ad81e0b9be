//! SSE instructions by their native thunks, without the detour through the general interpreter.
//!
//! The operand's host pointer goes straight to the thunk when it lies in one cached page. Whatever is in the way (a
//! disabled unit, a miss, a misaligned operand, an exception) is found again, and dealt with, by the general way.
#![allow(clippy::semicolon_if_nothing_returned, reason = "handlers return something in unoptimised builds")]

use super::super::dispatch::{THUNK_SLOTS, go, native};
use super::super::general::ThunkCall;
use super::super::{Handler, Next, Op};
use super::for_address;
use super::memory::{Address, EaKind};
use crate::cpu::Cpu;
use crate::native::{MemAccess, ThunkRef, Unit};
use crate::tlb::{TLB_ENTRIES, Tlb, TlbEntry};

/// Registers only.
unsafe extern "sysv64" fn registers(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    // SAFETY: by the contract of a handler; the decoder puts a thunk call behind this op.
    unsafe {
        let call = op.add(1).cast::<ThunkCall>();
        if (*cpu).exec.vectors && ((*call).thunk.entry)(&raw mut (*cpu).regs, std::ptr::dangling_mut()) == 0 {
            go!(cpu, op.add(THUNK_SLOTS), fuel, flags);
        }
        native(cpu, op, fuel, flags)
    }
}

/// With a memory operand.
unsafe extern "sysv64" fn memory<A: Address, const WRITE: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler; the decoder puts a thunk call behind this op. A hit in the translation cache
    // gives mapped (and, for the write table, writable) memory up to the page's end.
    unsafe {
        let call = op.add(1).cast::<ThunkCall>();
        let linear = A::linear(cpu, op);
        let tlb: *const Tlb = (*cpu).exec.tlb;
        let table = if WRITE { &raw const (*tlb).write } else { &raw const (*tlb).read };
        let entry = table.cast::<TlbEntry>().add((linear >> 12) as usize & (TLB_ENTRIES - 1));
        let last = linear.wrapping_add(u64::from((*call).thunk.mem_size) - 1);
        let aligned = linear & (u64::from((*call).thunk.mem_align) - 1) == 0;
        if (*entry).tag == last & !0xfff && aligned && (*cpu).exec.vectors {
            let host = (linear as usize).wrapping_add((*entry).addend) as *mut u8;
            if ((*call).thunk.entry)(&raw mut (*cpu).regs, host) == 0 {
                go!(cpu, op.add(THUNK_SLOTS), fuel, flags);
            }
        }
        native(cpu, op, fuel, flags)
    }
}

/// The handler of a thunk if it has one here; `kind` is that of its memory operand.
pub(in crate::exec) fn pick(thunk: &ThunkRef, kind: Option<EaKind>) -> Option<Handler> {
    if thunk.unit != Unit::Sse || thunk.reads_flags || thunk.writes_flags || thunk.implicit_rdi {
        return None;
    }
    match (thunk.mem, kind) {
        (MemAccess::None, _) => Some(registers),
        (_, None) => None,
        _ if thunk.mem_size == 0 || thunk.mem_align == 0 => None,
        (MemAccess::Read, Some(kind)) => Some(for_address!(kind, A => memory::<A, false>)),
        (_, Some(kind)) => Some(for_address!(kind, A => memory::<A, true>)),
    }
}
