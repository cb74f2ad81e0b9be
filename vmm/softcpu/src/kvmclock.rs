//! Guest time: the TSC, and KVM's paravirtual clock, which tells a guest what the TSC means without any calibration.
//!
//! Guest time counts nanoseconds from power-on, and the TSC ticks once a nanosecond of it, so the scale is exact: a
//! shift of 1 and a multiplier of one half. The structures are those of the Linux documentation's
//! `virt/kvm/x86/msr.rst`: the version is odd while the rest changes.

use std::sync::atomic::{Ordering, fence};

use crate::cpu::Cpu;
use crate::world::World;

/// Bit 0 of the system-time MSR.
const ENABLED: u64 = 1;
/// Flag: time never runs backwards between vCPUs.
const TSC_STABLE: u32 = 1;
/// Flag: the host has let the guest stand; the guest clears it, and forgives its watchdogs.
const GUEST_STOPPED: u32 = 2;
/// (tsc << 1) * 2^31 >> 32 = tsc.
const MULTIPLIER: u32 = 1 << 31;
const SHIFT: u32 = 1;

impl Cpu {
    /// Guest nanoseconds since power-on: the board's clock, or retired instructions in deterministic mode.
    #[inline]
    pub(crate) fn guest_ns(&mut self, world: &mut dyn World) -> u64 {
        match self.retired_ns() {
            Some(ns) => ns,
            None => world.now_ns(),
        }
    }

    /// The time-stamp counter.
    #[inline]
    pub(crate) fn tsc(&mut self, world: &mut dyn World) -> u64 {
        self.guest_ns(world).wrapping_add(self.sys.tsc_offset)
    }

    /// Sets the time-stamp counter, and tells the guest's clock of it.
    pub(crate) fn set_tsc(&mut self, world: &mut dyn World, value: u64) {
        self.sys.tsc_offset = value.wrapping_sub(self.guest_ns(world));
        self.refresh_clock(world);
    }

    /// Writes the system-time structure where the guest has asked for it; also to be called when the relation of TSC
    /// and guest time has changed from outside (restore).
    pub fn refresh_clock(&mut self, world: &mut dyn World) {
        self.write_clock(world, TSC_STABLE);
    }

    /// The guest has stood for a while, in which its time went on: tells it so where it has asked for the system-time
    /// structure, so that it does not take the pause for a processor that hangs.
    pub fn tell_stopped(&mut self, world: &mut dyn World) {
        self.write_clock(world, TSC_STABLE | GUEST_STOPPED);
    }

    fn write_clock(&mut self, world: &mut dyn World, flags: u32) {
        let msr = self.sys.kvm_system_time;
        if msr & ENABLED == 0 {
            return;
        }
        let now = self.guest_ns(world);
        let tsc = now.wrapping_add(self.sys.tsc_offset);
        let words = [0, tsc as u32, (tsc >> 32) as u32, now as u32, (now >> 32) as u32, MULTIPLIER, flags << 8 | SHIFT];
        self.write_versioned(msr & !ENABLED, &words);
    }

    /// Writes the wall-clock structure at `gpa`: UTC at guest time zero.
    pub(crate) fn write_wall_clock(&mut self, world: &mut dyn World, gpa: u64) {
        let ns = world.wall_clock_base_ns();
        self.write_versioned(gpa, &[(ns / 1_000_000_000) as u32, (ns % 1_000_000_000) as u32]);
    }

    /// Writes words after a version word: odd, words, even. Whatever lies outside RAM is left out; addresses are
    /// multiples of four, so a word never crosses a page.
    fn write_versioned(&mut self, gpa: u64, words: &[u32]) {
        let gpa = gpa & !3;
        let Some(old) = self.read_physical_word(gpa) else { return };
        let version = (old | 1).wrapping_add(if old & 1 == 0 { 0 } else { 2 });
        self.write_physical(gpa, &version.to_le_bytes());
        fence(Ordering::SeqCst);
        for (at, word) in (gpa + 4..).step_by(4).zip(words) {
            self.write_physical(at, &word.to_le_bytes());
        }
        fence(Ordering::SeqCst);
        self.write_physical(gpa, &version.wrapping_add(1).to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
