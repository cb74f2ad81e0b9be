//! Hardware breakpoints: DR0 to DR3 as DR7 arms them (SDM vol. 3, 17.2), and debug traps that wait for an instruction's
//! end.
//!
//! Nobody pays for them while none is armed. While one is, instructions run one by one, and pages with a watched
//! address have no data entry in the TLB, so that each access to them passes the slow path, which looks. Breakpoints on
//! I/O ports are kept and do not fire.

use crate::cpu::Cpu;
use crate::state::Exception;

/// Enable bits of DR7, two for each breakpoint.
const ENABLES: u64 = 0xff;
/// What a breakpoint is on: bits 16 and 17 of DR7, and so on.
const ON_EXECUTION: u64 = 0;
const ON_WRITE: u64 = 1;
const ON_ACCESS: u64 = 3;

/// An armed breakpoint.
#[derive(Clone, Copy, Debug)]
struct Breakpoint {
    /// Its bit in DR6.
    bit: u64,
    kind: u64,
    address: u64,
    len: u64,
}

impl Breakpoint {
    /// Whether any of `len` bytes at `linear` is watched.
    fn touches(self, linear: u64, len: u64) -> bool {
        linear.wrapping_sub(self.address) < self.len || self.address.wrapping_sub(linear) < len
    }
}

impl Cpu {
    /// Whether any breakpoint is armed.
    #[inline(always)]
    pub(crate) fn breakpoints_armed(&self) -> bool {
        self.sys.dr[7] & ENABLES != 0
    }

    fn armed(&self) -> impl Iterator<Item = Breakpoint> {
        let dr = self.sys.dr;
        (0..4usize).filter(move |n| dr[7] >> (2 * n) & 3 != 0).map(move |n| {
            let control = dr[7] >> (16 + 4 * n);
            let len = [1, 2, 8, 4][(control >> 2 & 3) as usize];
            Breakpoint { bit: 1 << n, kind: control & 3, address: dr[n] & !(len - 1), len }
        })
    }

    /// DR6 bits of the breakpoints on the instruction at a linear address.
    pub(crate) fn execution_breakpoints(&self, linear: u64) -> u64 {
        let hits = self.armed().filter(|point| point.kind == ON_EXECUTION && point.address == linear);
        hits.fold(0, |bits, point| bits | point.bit)
    }

    /// Whether a page holds watched data.
    pub(crate) fn page_is_watched(&self, linear: u64) -> bool {
        self.breakpoints_armed()
            && self
                .armed()
                .any(|point| matches!(point.kind, ON_WRITE | ON_ACCESS) && (point.address ^ linear) & !0xfff == 0)
    }

    /// Notes an access to data: what it hits is reported when the instruction is done.
    #[inline(always)]
    pub(crate) fn note_access(&mut self, linear: u64, len: usize, write: bool) {
        if self.breakpoints_armed() {
            let hits = self.armed().filter(|point| {
                (point.kind == ON_ACCESS || point.kind == ON_WRITE && write) && point.touches(linear, len as u64)
            });
            self.mmu.pending_debug |= hits.fold(0, |bits, point| bits | point.bit);
        }
    }

    /// The debug trap that waits, with whatever else causes one now; `None` if nothing does.
    pub(crate) fn take_debug_trap(&mut self, cause: u64) -> Option<Exception> {
        let cause = cause | std::mem::take(&mut self.mmu.pending_debug);
        (cause != 0).then(|| self.debug_trap(cause))
    }
}
