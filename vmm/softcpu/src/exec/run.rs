//! The run loop: interrupts, budgets and single steps between stretches of blocks.

use iced_x86::{Instruction, Mnemonic};

use super::general::Flow;
use super::general::arith::{IF, TF};
use super::{Leave, Mode, NO_RETURN, Op, RETURNS};
use crate::cpu::{Cpu, NmiState};
use crate::interrupt::DR6_BS;
use crate::state::Exception;
use crate::world::{Attention, Stop, World};

/// Instructions after which the run loop looks around: a few microseconds.
const SLICE: u64 = 2048;
/// Turns of the run loop after which it does so at the latest: an instruction that leaves it may take long.
const TURNS: u32 = 8;
/// No block has more instructions than this.
pub(super) const BLOCK_MAX: u64 = 64;
/// Vector of the non-maskable interrupt.
const VECTOR_NMI: u8 = 2;
/// Resume flag: set until one instruction has completed.
const RF: u64 = 1 << 16;

/// A rolling hash of the register state at fixed distances.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trace {
    interval: u64,
    next: u64,
    hash: u64,
}

impl Cpu {
    /// Starts (or restarts) the rolling hash of (RIP, RFLAGS, general purpose registers), sampled each time that the
    /// number of retired instructions reaches a multiple of `interval`. Two deterministic runs of the same guest have
    /// equal hashes; the first sample that differs bounds where they part. Zero stops it.
    pub fn trace(&mut self, interval: u64) {
        self.exec.trace = (interval > 0).then(|| Trace {
            interval,
            next: (self.retired / interval + 1) * interval,
            hash: 0xcbf2_9ce4_8422_2325,
        });
    }
    /// The hash so far, if [`Cpu::trace`] is on.
    pub fn trace_hash(&self) -> Option<u64> {
        self.exec.trace.map(|trace| trace.hash)
    }
    fn sample(&mut self) {
        let retired = self.retired;
        let regs = &self.regs;
        if let Some(trace) = &mut self.exec.trace
            && retired >= trace.next
        {
            for word in [regs.rip, regs.rflags].iter().chain(&regs.gpr) {
                trace.hash = (trace.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
            }
            trace.next += trace.interval;
        }
    }

    /// Runs until something stops it; `budget` bounds the instructions of this call, exactly.
    pub fn run(&mut self, world: &mut dyn World, budget: Option<u64>) -> Stop {
        let end = budget.map(|budget| self.retired.saturating_add(budget));
        // SAFETY: only the lifetime changes; the pointer is cleared before `run` returns.
        self.exec.world = Some(unsafe { std::mem::transmute::<*mut dyn World, *mut (dyn World + 'static)>(world) });
        let stop = self.run_until(world, end);
        self.exec.world = None;
        stop
    }

    fn run_until(&mut self, world: &mut dyn World, end: Option<u64>) -> Stop {
        loop {
            self.settle_code();
            if !self.sys.interrupt_shadow
                && let Some(trap) = self.take_debug_trap(0)
                && self.deliver(world, trap).is_err()
            {
                return Stop::TripleFault;
            }
            if let Some(stop) = self.attend(world) {
                return stop;
            }
            let mut left = end.map_or(SLICE, |end| end.saturating_sub(self.retired));
            if left == 0 {
                return Stop::Budget;
            }
            if let Some(trace) = &self.exec.trace {
                left = left.min(trace.next.saturating_sub(self.retired).max(1));
            }
            self.refresh_mode();
            let alone = self.sys.interrupt_shadow || self.regs.rflags & (TF | RF) != 0 || self.breakpoints_armed();
            let outcome = if alone || left <= BLOCK_MAX {
                self.step(world)
            } else {
                self.run_blocks(world, (left.min(SLICE) - BLOCK_MAX) as i64)
            };
            if let Err(TripleFault) = outcome {
                return Stop::TripleFault;
            }
            if self.exec.trace.is_some() {
                self.sample();
            }
        }
    }

    /// Looks at what other threads and the last instruction have left to do.
    fn attend(&mut self, world: &mut dyn World) -> Option<Stop> {
        self.exec.turns += 1;
        if self.exec.turns >= TURNS || self.retired >= self.exec.next_look {
            self.exec.turns = 0;
            self.exec.next_look = self.retired + SLICE;
            world.look();
        }
        let raised = self.attention.peek();
        if raised & Attention::STOP != 0 {
            return Some(Stop::Requested);
        }
        if raised & Attention::DMA != 0 {
            self.attention.take(Attention::DMA);
            self.mmu.dma_epoch += 1;
            self.exec.cache.dma(self.mmu.dma_epoch);
        }
        if raised & Attention::NMI != 0 {
            self.attention.take(Attention::NMI);
            self.nmi.pending = true;
        }
        if self.nmi.pending && !self.nmi.masked && !self.sys.interrupt_shadow {
            self.nmi = NmiState { pending: false, masked: true };
            if self.deliver_interrupt(world, VECTOR_NMI).is_err() {
                return Some(Stop::TripleFault);
            }
        }
        if raised & Attention::INTERRUPT != 0 && self.regs.rflags & IF != 0 && !self.sys.interrupt_shadow {
            self.attention.take(Attention::INTERRUPT);
            if let Some(vector) = world.acknowledge_interrupt() {
                self.halted = false;
                if self.deliver_interrupt(world, vector).is_err() {
                    return Some(Stop::TripleFault);
                }
            }
        }
        if self.halted { Some(Stop::Halted) } else { None }
    }

    /// Housekeeping of decoded code while no block runs.
    fn settle_code(&mut self) {
        if self.exec.cache.is_over_limit() {
            self.exec.forget_all_code();
        }
        for page in std::mem::take(&mut self.exec.forgotten) {
            self.mmu.unprotect_code(page);
        }
        if self.exec.cache.free_buried() {
            self.exec.returns = [NO_RETURN; RETURNS];
        }
        self.exec.stale = false;
    }

    /// Runs blocks until the slice is used up or something needs the loop above.
    fn run_blocks(&mut self, world: &mut dyn World, slice: i64) -> Result<(), TripleFault> {
        self.exec.slice = slice;
        self.exec.base = self.retired;
        let mut fuel = slice;
        let mut link = None;
        loop {
            let known = if link.is_none() { self.known_block() } else { None };
            let (op, gpa) = match known.map_or_else(|| self.find_block(), |op| Ok(Some((op, 0)))) {
                Ok(Some(found)) => found,
                Ok(None) => return self.step(world),
                Err(fault) => return self.deliver_fault(world, fault),
            };
            if let Some((exit, burials)) = link.take()
                && burials == self.exec.cache.burials()
            {
                self.exec.cache.link(exit, op, gpa);
            }
            self.run_from(op, fuel);
            fuel = self.exec.fuel;
            self.retired = self.exec.base.wrapping_add((slice - fuel) as u64);
            match self.exec.left {
                Leave::Boundary => return Ok(()),
                Leave::Fault => {
                    let fault = self.exec.fault;
                    return self.deliver_fault(world, fault);
                }
                Leave::Step => return self.step(world),
                Leave::Lookup => {}
                Leave::Link(exit) => link = Some((exit, self.exec.cache.burials())),
            }
            if fuel < 0 || self.exec.stale {
                return Ok(());
            }
        }
    }

    /// Delivers a fault; `regs.rip` is at the instruction that caused it.
    fn deliver_fault(&mut self, world: &mut dyn World, fault: Exception) -> Result<(), TripleFault> {
        self.sys.interrupt_shadow = false;
        self.deliver(world, fault).map_err(|_| TripleFault)
    }

    /// Exactly one instruction (or one stretch of a string instruction) at `regs.rip`.
    fn step(&mut self, world: &mut dyn World) -> Result<(), TripleFault> {
        let shadow = std::mem::take(&mut self.sys.interrupt_shadow);
        let here = self.regs.rip;
        let mut trap = self.regs.rflags & TF != 0;
        let mut sti = false;
        let mut iret = false;
        let waiting = self.mmu.pending_debug;
        if self.breakpoints_armed() && self.regs.rflags & RF == 0 {
            let hits = self.execution_breakpoints(here.wrapping_add(self.exec.cs_base));
            if hits != 0 {
                let fault = self.debug_trap(hits);
                return self.deliver_fault(world, fault);
            }
        }
        let done = self.fetch(here).and_then(|insn| {
            trap &= !enters_handler(insn.mnemonic());
            sti = insn.mnemonic() == Mnemonic::Sti;
            iret = matches!(insn.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq);
            let next = here.wrapping_add(insn.len() as u64);
            self.regs.rip = if self.exec.mode == Mode::Bits64 { next } else { next & 0xffff_ffff };
            self.execute(world, &insn)
        });
        match done {
            Ok(Flow::Again) => {
                self.regs.rip = here;
                self.sys.interrupt_shadow = shadow && !self.wants_attention();
            }
            Ok(_) => {
                self.retired += 1;
                // RF protects one instruction only: not the IRET that sets it, but the one after.
                if !iret {
                    self.regs.rflags &= !RF;
                }
            }
            Err(fault) => {
                self.regs.rip = here;
                self.mmu.pending_debug = waiting;
                return self.deliver_fault(world, fault);
            }
        }
        // The shadow of a load of SS holds debug traps off too, that of STI does not.
        if (sti || !self.sys.interrupt_shadow)
            && let Some(trap) = self.take_debug_trap(if trap { DR6_BS } else { 0 })
        {
            return self.deliver(world, trap).map_err(|_| TripleFault);
        }
        Ok(())
    }

    /// Decodes the instruction at `rip`, across a page end if need be.
    pub(super) fn fetch(&mut self, rip: u64) -> Result<Instruction, Exception> {
        let linear = rip.wrapping_add(self.exec.cs_base);
        let limit = self.fetch_limit(rip)?;
        let mut bytes = [0; 15];
        let first = (0x1000 - (linear & 0xfff) as usize).min(limit);
        self.fetch_bytes(linear, &mut bytes[..first.min(15)])?;
        if first < 15 {
            if let Some(insn) = self.decode_one(rip, &bytes[..first]) {
                return Ok(insn);
            }
            if first == limit {
                return Err(Exception::gp(0));
            }
            let rest = limit.min(15);
            self.fetch_bytes(linear.wrapping_add(first as u64), &mut bytes[first..rest])?;
            return self.decode_one(rip, &bytes[..rest]).ok_or(Exception::gp(0));
        }
        // More than fifteen bytes of prefixes are #GP.
        self.decode_one(rip, &bytes).ok_or(Exception::gp(0))
    }
    /// Bytes that may be fetched at `rip` before the limit of CS (at most 4096 are asked for).
    pub(super) fn fetch_limit(&self, rip: u64) -> Result<usize, Exception> {
        if self.exec.mode == Mode::Bits64 {
            return Ok(4096);
        }
        let limit = u64::from(self.sys.segments[crate::state::SegmentName::Cs as usize].limit);
        match limit.checked_sub(rip) {
            Some(left) => Ok((left + 1).min(4096) as usize),
            None => Err(Exception::gp(0)),
        }
    }
    fn fetch_bytes(&mut self, linear: u64, bytes: &mut [u8]) -> Result<(), Exception> {
        let linear = if self.exec.mode == Mode::Bits64 { linear } else { linear & 0xffff_ffff };
        let page = self.fetch_page(linear, self.exec.user)?;
        // SAFETY: the page is 4096 mapped bytes, and no caller asks across its end.
        unsafe {
            std::ptr::copy(page.host.add((linear & 0xfff) as usize), bytes.as_mut_ptr(), bytes.len());
        }
        Ok(())
    }

    /// The block at `regs.rip` if the jump cache leads there, by the same rule as from block to block.
    fn known_block(&self) -> Option<*const Op> {
        if self.exec.mode != Mode::Bits64 {
            return None;
        }
        let rip = self.regs.rip;
        let tag = rip ^ self.exec.jump_keys[(rip >> 63) as usize];
        self.exec.cache.known_jump(super::dispatch::jump_index(rip), tag)
    }

    /// The block at `regs.rip`, decoded if it is new. `None`: the instruction there must be done alone.
    fn find_block(&mut self) -> Result<Option<(*const Op, u64)>, Exception> {
        let rip = self.regs.rip;
        let linear = rip.wrapping_add(self.exec.cs_base);
        let linear = if self.exec.mode == Mode::Bits64 {
            linear
        } else {
            // A block may reach to the end of its frame: all of that must be within the limit.
            let room = 0x1000 - (linear & 0xfff) as usize;
            if self.fetch_limit(rip)? < room {
                return Ok(None);
            }
            linear & 0xffff_ffff
        };
        let user = self.exec.user;
        let (gpa, host) = match self.mmu.tlb[usize::from(user)].lookup(crate::tlb::Kind::Exec, linear) {
            Some(entry) => {
                let index = crate::tlb::Tlb::index(linear);
                let gpa = self.mmu.tlb[usize::from(user)].frame(crate::tlb::Kind::Exec, index);
                (gpa, (linear & !0xfff).wrapping_add(entry.addend as u64) as *const u8)
            }
            None => {
                let page = self.fetch_page(linear, user)?;
                (page.gpa & !0xfff, page.host)
            }
        };
        let at = gpa | (linear & 0xfff);
        let mode = self.exec.mode as u8;
        // The kernel's code may be as old as its translation, other code not older than the last DMA.
        let since =
            if linear >> 63 == 0 { self.exec.cache.epoch() } else { self.mmu.tlb[usize::from(user)].filled(linear) };
        let op = match self.exec.cache.find(at, mode, since) {
            Some(op) => op,
            None => match self.decode_block(rip, at, host) {
                Some(op) => op,
                None => return Ok(None),
            },
        };
        if self.exec.mode == Mode::Bits64 {
            self.refresh_keys();
            self.mmu.remember_exec(user, linear);
            let key = self.exec.jump_keys[(rip >> 63) as usize];
            self.exec.cache.remember_jump(super::dispatch::jump_index(rip), rip ^ key, op);
        }
        Ok(Some((op, at)))
    }
}

/// Whether an instruction goes to a handler with TF cleared, so that no single-step trap follows it.
fn enters_handler(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Int
            | Mnemonic::Int1
            | Mnemonic::Int3
            | Mnemonic::Into
            | Mnemonic::Syscall
            | Mnemonic::Sysenter
            | Mnemonic::Sysret
            | Mnemonic::Sysretq
    )
}

/// The CPU has shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TripleFault;
