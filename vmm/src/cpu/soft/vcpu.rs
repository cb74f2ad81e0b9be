//! One software vCPU: runs, waits while halted, and leaves when it is kicked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use atoll_softcpu::{Attention, Cpu, CpuModel, GuestRam, Stop, TimeMode};

use super::Notice;
use super::chips::Chips;
use super::clock::{Pace, SoftClock};
use super::trace::TraceHash;
use super::world::BoardWorld;
use crate::cpu::{CpuError, CpuState, Exit, GuestBus, Kick, Vcpu, VcpuFigures};
use crate::irq::{Door, Doorstep};

/// RFLAGS.IF.
const INTERRUPTS_ENABLED: u64 = 1 << 9;
/// Deterministic mode: instructions between two looks at the clock, at most. Devices see time in steps of it.
const SLICE: u64 = 20_000;

/// What a vCPU is made from.
pub(super) struct Parts {
    pub(super) index: u32,
    pub(super) ram: GuestRam,
    pub(super) model: Arc<CpuModel>,
    pub(super) notice: Arc<Notice>,
    pub(super) door: Door,
    pub(super) chips: Arc<Chips>,
    pub(super) clock: Arc<SoftClock>,
    pub(super) wall_base_ns: u64,
}

/// Asks the vCPU to leave; the flag stays until it has.
struct SoftKick {
    notice: Arc<Notice>,
    asked: AtomicBool,
}

impl Kick for SoftKick {
    fn kick(&self) {
        self.asked.store(true, Ordering::Release);
        self.notice.raise(Attention::STOP);
    }
}

pub(super) struct SoftVcpu {
    index: u32,
    cpu: Cpu,
    notice: Arc<Notice>,
    door: Door,
    kick: Arc<SoftKick>,
    chips: Arc<Chips>,
    clock: Arc<SoftClock>,
    wall_base_ns: u64,
    trace: TraceHash,
    /// It has stood; the guest does not know yet.
    has_stood: bool,
    /// Deterministic mode: number of retired instructions at which the present slice ends, wherever a kick interrupts it.
    slice_end: u64,
}

impl SoftVcpu {
    pub(super) fn new(parts: Parts) -> Self {
        let time = match parts.clock.pace {
            Pace::Real => TimeMode::Real,
            Pace::Retired { ns_per_1000 } => TimeMode::Retired { ns_per_1000 },
        };
        let kick = Arc::new(SoftKick { notice: Arc::clone(&parts.notice), asked: AtomicBool::new(false) });
        let mut cpu = Cpu::new(parts.ram, parts.model, parts.notice.attention.clone(), time);
        // Its thread will not be allowed to (`seccomp`).
        if let Err(error) = cpu.map_code() {
            tracing::warn!(%error, "no executable memory: a guest that uses vector instructions will stop");
        }
        Self {
            index: parts.index,
            cpu,
            notice: parts.notice,
            door: parts.door,
            kick,
            chips: parts.chips,
            clock: parts.clock,
            wall_base_ns: parts.wall_base_ns,
            trace: TraceHash::new(),
            has_stood: false,
            slice_end: 0,
        }
    }

    /// Whether a raised flag is a reason to run a halted processor.
    fn wakes(&self) -> bool {
        let raised = self.notice.attention.peek();
        let enabled = self.cpu.regs.rflags & INTERRUPTS_ENABLED != 0;
        raised & !Attention::INTERRUPT != 0 || (raised & Attention::INTERRUPT != 0 && enabled)
    }

    /// Sleeps until something happens. It does not stay awake for an answer, not even for one that will come soon: the
    /// backend is as often as not the next on this very processor, and gets it the sooner.
    fn wait(&mut self, doorstep: &Doorstep<'_>) {
        while !self.wakes() {
            let Some(deadline) = self.chips.next_deadline() else {
                self.sleep(doorstep, None);
                continue;
            };
            match deadline.checked_sub(self.chips.now_ns()).filter(|left| *left > 0) {
                Some(_) if !self.clock.is_real() => self.skip_to(deadline),
                Some(left) => self.sleep(doorstep, Some(Duration::from_nanos(left))),
                None => self.chips.expire(),
            }
        }
    }

    /// Sleeps until it is woken, until a backend interrupts, or for `limit`; not at all if it has been woken meanwhile.
    fn sleep(&self, doorstep: &Doorstep<'_>, limit: Option<Duration>) {
        self.notice.asleep.store(true, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::SeqCst);
        let signalled = !self.wakes() && doorstep.wait(&self.notice.wake, limit);
        // Before the delivery, which is not to wake this thread once more.
        self.notice.asleep.store(false, Ordering::Relaxed);
        if signalled {
            doorstep.deliver();
        }
    }

    /// Deterministic mode: nothing happens before the deadline, so it is now.
    fn skip_to(&mut self, deadline: u64) {
        let now = self.cpu.retired_ns().unwrap_or(0);
        self.cpu.skip_ns(deadline.saturating_sub(now));
        self.clock.set_retired_ns(deadline.max(now));
    }

    /// Instructions until the next deadline, in deterministic mode. A slice that a kick has cut short is finished first:
    /// devices must not see when the operator paused.
    fn budget(&mut self) -> Option<u64> {
        let Pace::Retired { ns_per_1000 } = self.clock.pace else { return None };
        let done = self.cpu.retired();
        if let Some(rest) = self.slice_end.checked_sub(done).filter(|rest| *rest > 0) {
            return Some(rest);
        }
        let left = self.chips.next_deadline().map(|deadline| deadline.saturating_sub(self.chips.now_ns()));
        let instructions = left.map(|left| left.saturating_mul(1000) / u64::from(ns_per_1000.max(1)));
        let slice = instructions.map_or(SLICE, |count| count.clamp(1, SLICE));
        let slice = slice.min(TraceHash::until_sample(done));
        self.slice_end = done + slice;
        Some(slice)
    }

    /// Deterministic mode: time has passed with the instructions of the last slice.
    fn slice_done(&mut self) {
        if let Some(now) = self.cpu.retired_ns() {
            self.trace.sample(&self.cpu);
            self.clock.set_retired_ns(now);
            if self.chips.next_deadline().is_some_and(|deadline| deadline <= now) {
                self.chips.expire();
            }
        }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, bus: &mut dyn GuestBus) -> Result<Exit, CpuError> {
        // The doorstep is this thread's until it leaves.
        let door = self.door.clone();
        let doorstep = door.step();
        loop {
            if self.kick.asked.swap(false, Ordering::AcqRel) {
                self.notice.attention.take(Attention::STOP);
                return Ok(Exit::Stopped);
            }
            let budget = self.budget();
            let mut world = BoardWorld {
                cpu: self.index as usize,
                chips: &self.chips,
                doorstep: &doorstep,
                next_look_ns: 0,
                timers: self.clock.is_real(),
                bus: &mut *bus,
                wall_base_ns: self.wall_base_ns,
            };
            if std::mem::take(&mut self.has_stood) && self.clock.is_real() {
                self.cpu.tell_stopped(&mut world);
            }
            let stop = self.cpu.run(&mut world, budget);
            if stop != Stop::Requested || self.cpu.retired() >= self.slice_end {
                self.slice_end = 0;
                self.slice_done();
            }
            match stop {
                Stop::Halted => self.wait(&doorstep),
                Stop::Budget => {}
                // A stop without a kick is left over from one that has been answered already.
                Stop::Requested => {
                    self.notice.attention.take(Attention::STOP);
                }
                Stop::TripleFault => return Ok(Exit::TripleFault { rip: Some(self.cpu.regs.rip) }),
            }
        }
    }

    fn state(&mut self) -> Result<CpuState, CpuError> {
        Ok(CpuState { regs: self.cpu.regs.clone(), system: self.cpu.sys.clone() })
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), CpuError> {
        self.cpu.reset();
        self.cpu.regs = state.regs.clone();
        self.cpu.sys = state.system.clone();
        Ok(())
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as _
    }

    fn figures(&self) -> VcpuFigures {
        VcpuFigures {
            returns: 0,
            instructions: self.cpu.retired(),
            cache_bytes: self.cpu.cache_bytes() as u64,
            trace_hash: (!self.clock.is_real()).then(|| self.trace.finish(&self.cpu)),
        }
    }

    fn stood(&mut self) -> Result<(), CpuError> {
        self.has_stood = true;
        Ok(())
    }

    fn nmi(&mut self) -> Result<(), CpuError> {
        self.notice.attention.raise(Attention::NMI);
        Ok(())
    }
}
