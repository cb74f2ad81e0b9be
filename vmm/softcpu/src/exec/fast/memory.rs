//! Guest memory from handlers: effective addresses, the translation cache, misses.

use super::super::dispatch::{finish, go, next};
use super::super::general::Flow;
use super::super::{Leave, Next, Op, fold, unfold};
use super::word::Word;
use crate::cpu::Cpu;
use crate::tlb::{Kind, TLB_ENTRIES, Tlb};

/// What an effective address is made of; each has handlers of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::exec) enum EaKind {
    /// Base (or RIP, or nothing) and displacement.
    Base,
    /// Base, scaled index, displacement.
    Sib,
    /// The same and the base of FS or GS.
    Seg,
}

/// A kind of effective address.
pub(super) trait Address {
    /// The linear address of an op's operand.
    ///
    /// # Safety
    /// `cpu` and `op` are valid, and the op was made for this kind.
    unsafe fn linear(cpu: *const Cpu, op: *const Op) -> u64;
}
/// See [`EaKind::Base`].
pub(super) enum Base {}
/// See [`EaKind::Sib`].
pub(super) enum Sib {}
/// See [`EaKind::Seg`].
pub(super) enum Seg {}

impl Address for Base {
    #[inline(always)]
    unsafe fn linear(cpu: *const Cpu, op: *const Op) -> u64 {
        // SAFETY: by contract.
        unsafe { u64::get(cpu, (*op).base).wrapping_add_signed(i64::from((*op).disp)) }
    }
}
impl Address for Sib {
    #[inline(always)]
    unsafe fn linear(cpu: *const Cpu, op: *const Op) -> u64 {
        // SAFETY: by contract.
        unsafe {
            let index = u64::get(cpu, (*op).index).wrapping_mul(u64::from((*op).scale));
            Base::linear(cpu, op).wrapping_add(index)
        }
    }
}
impl Address for Seg {
    #[inline(always)]
    unsafe fn linear(cpu: *const Cpu, op: *const Op) -> u64 {
        // SAFETY: by contract; the upper half of `scale` is 4 (FS) or 5 (GS).
        unsafe {
            let index = u64::get(cpu, (*op).index).wrapping_mul(u64::from((*op).scale & 15));
            let segment = (*cpu).sys.segments.as_ptr().add(usize::from((*op).scale >> 4));
            Base::linear(cpu, op).wrapping_add(index).wrapping_add((*segment).base)
        }
    }
}

/// Whether `W` at a linear address is cached, and its host address if so.
///
/// # Safety
/// `cpu` is valid.
#[inline(always)]
pub(super) unsafe fn host<W: Word, const WRITE: bool>(cpu: *const Cpu, linear: u64) -> (bool, *mut u8) {
    // SAFETY: the table pointer is set while blocks run, and the index is cut to its size.
    unsafe {
        let tlb: *const Tlb = (*cpu).exec.tlb;
        let table = if WRITE { &raw const (*tlb).write } else { &raw const (*tlb).read };
        let entry = table.cast::<crate::tlb::TlbEntry>().add((linear >> 12) as usize & (TLB_ENTRIES - 1));
        // An access that crosses into the next page compares that page with this page's entry, and misses.
        let hit = (*entry).tag == linear.wrapping_add(W::BYTES - 1) & !0xfff;
        (hit, (linear as usize).wrapping_add((*entry).addend) as *mut u8)
    }
}

/// Host address for a read, or leaves the handler by way of a miss. `$simple`: the op is one instruction and the next
/// op follows it.
macro_rules! read_host {
    ($word:ty, $cpu:expr, $op:expr, $fuel:expr, $flags:expr, $linear:expr, $simple:literal) => {{
        let linear: u64 = $linear;
        let (hit, host) = crate::exec::fast::memory::host::<$word, false>($cpu, linear);
        if !hit {
            (*$cpu).exec.missed = linear;
            return crate::exec::fast::memory::miss::<$word, false, $simple>($cpu, $op, $fuel, $flags);
        }
        host
    }};
}
/// The same for a write.
macro_rules! write_host {
    ($word:ty, $cpu:expr, $op:expr, $fuel:expr, $flags:expr, $linear:expr, $simple:literal) => {{
        let linear: u64 = $linear;
        let (hit, host) = crate::exec::fast::memory::host::<$word, true>($cpu, linear);
        if !hit {
            (*$cpu).exec.missed = linear;
            return crate::exec::fast::memory::miss::<$word, true, $simple>($cpu, $op, $fuel, $flags);
        }
        host
    }};
}
pub(super) use {read_host, write_host};

/// Misses of one op in a row that are answered by filling.
const MISSES_MAX: u32 = 7;

/// Runs an op's first instruction in the general interpreter.
macro_rules! slow {
    ($cpu:ident, $op:ident, $fuel:ident, $flags:ident, $simple:expr) => {{
        // SAFETY: by the contract of a handler.
        let (on, flags) = unsafe { ((*$cpu).slow_op(&*$op, $fuel, $flags, $simple), unfold((*$cpu).regs.rflags)) };
        if on {
            next!($cpu, $op, $fuel, flags);
        }
        finish!();
    }};
}

/// The address in `exec.missed` is not cached: fill and run the op again, or do it slowly. Never inlined, so that the
/// handlers that jump here need no stack frame.
#[inline(never)]
pub(super) unsafe extern "sysv64" fn miss<W: Word, const WRITE: bool, const SIMPLE: bool>(
    cpu: *mut Cpu,
    op: *const Op,
    fuel: i64,
    flags: u64,
) -> Next {
    // SAFETY: by the contract of a handler.
    if unsafe { (*cpu).refill(op, W::BYTES, WRITE) } {
        go!(cpu, op, fuel, flags);
    }
    slow!(cpu, op, fuel, flags, SIMPLE)
}

/// For one-instruction handlers that find something other than a miss out of the ordinary.
#[inline(never)]
pub(super) unsafe extern "sysv64" fn slow_simple(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    slow!(cpu, op, fuel, flags, true)
}

/// The same for handlers behind which the block does not go on.
#[inline(never)]
pub(super) unsafe extern "sysv64" fn slow_leave(cpu: *mut Cpu, op: *const Op, fuel: i64, flags: u64) -> Next {
    slow!(cpu, op, fuel, flags, false)
}

impl Cpu {
    /// Makes a translation for `exec.missed`; true if the access will hit now. An op that misses again and again with no
    /// other miss in between may be one whose operands push each other out: after a few tries it is done slowly.
    #[inline(never)]
    fn refill(&mut self, op: *const Op, bytes: u64, write: bool) -> bool {
        let linear = self.exec.missed;
        if std::ptr::eq(self.exec.missed_by, op) {
            self.exec.misses += 1;
            if self.exec.misses > MISSES_MAX {
                self.exec.misses = 0;
                return false;
            }
        } else {
            self.exec.missed_by = op;
            self.exec.misses = 0;
        }
        if (linear & 0xfff) + bytes > 0x1000 {
            return false;
        }
        let user = self.exec.user;
        let kind = if write { Kind::Write } else { Kind::Read };
        self.host_ptr(linear, user, write).is_ok_and(|span| span.is_some())
            && self.mmu.tlb[usize::from(user)].lookup(kind, linear).is_some()
    }

    /// Does an op's first instruction from its bytes. With `simple`, returns true if the block can go on; otherwise
    /// everything is set for a return to the run loop.
    #[inline(never)]
    fn slow_op(&mut self, op: &Op, fuel: i64, flags: u64, simple: bool) -> bool {
        self.regs.rflags = fold(self.regs.rflags, flags);
        self.retired = self.exec.base.wrapping_add((self.exec.slice - fuel) as u64) + u64::from(op.ordinal);
        let start = self.regs.rip;
        let here = start.wrapping_add(u64::from(op.offset));
        let fuel = fuel - i64::from(op.ordinal);
        // SAFETY: the board outlives `run`, which put the pointer there, and nobody else uses it while a handler runs.
        let Some(world) = self.exec.world.map(|world| unsafe { &mut *world }) else { return false };
        let done = self.fetch(here).and_then(|insn| {
            self.regs.rip = here.wrapping_add(insn.len() as u64);
            self.execute(world, &insn)
        });
        self.exec.fuel = fuel - 1;
        match done {
            Ok(Flow::Next) if !self.exec.stale && !self.wants_attention() => {
                if simple {
                    self.regs.rip = start;
                    return true;
                }
                self.exec.left = Leave::Lookup;
            }
            Ok(Flow::Jump) => self.exec.left = Leave::Lookup,
            Ok(Flow::Next | Flow::Boundary) => self.exec.left = Leave::Boundary,
            Ok(Flow::Again) => {
                self.regs.rip = here;
                self.exec.fuel = fuel;
                self.exec.left = Leave::Boundary;
            }
            Err(fault) => {
                self.regs.rip = here;
                self.exec.fuel = fuel;
                self.exec.fault = fault;
                self.exec.left = Leave::Fault;
            }
        }
        false
    }
}
