//! What the CPU asks of the board, and how the board and other threads interrupt it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The board, as one CPU sees it. All calls come from the thread that called `Cpu::run`, in the middle of an
/// instruction: they may block (the board holds the deadline) but must return.
pub trait World {
    /// Reads `data.len()` (1, 2, 4, 8; string operations may ask for more) bytes at a guest-physical address outside RAM.
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]);
    /// Writes at a guest-physical address outside RAM.
    fn mmio_write(&mut self, gpa: u64, data: &[u8]);
    /// IN: 1, 2 or 4 bytes.
    fn pio_in(&mut self, port: u16, data: &mut [u8]);
    /// OUT: 1, 2 or 4 bytes.
    fn pio_out(&mut self, port: u16, data: &[u8]);
    /// The vector to deliver now, if any; called at an instruction boundary with IF set and no interrupt shadow, after
    /// [`Attention::INTERRUPT`] was raised. Acknowledges it (LAPIC IRR to ISR, or PIC INTA). When another interrupt
    /// remains deliverable the board raises attention again.
    fn acknowledge_interrupt(&mut self) -> Option<u8>;
    /// RDMSR of an MSR that the CPU core does not own (APIC base, x2APIC range, TSC deadline, SPEC_CTRL, …). `None`
    /// gives #GP.
    fn read_msr(&mut self, msr: u32) -> Option<u64>;
    /// WRMSR, likewise; `false` gives #GP.
    fn write_msr(&mut self, msr: u32, value: u64) -> bool;
    /// A few microseconds of guest code have passed: the board looks at what nobody raises [`Attention`] for, such as
    /// timers. Called between two instructions.
    fn look(&mut self) {}
    /// CR8 (task priority, bits 7:4 of the TPR).
    fn read_cr8(&mut self) -> u64;
    /// Sets CR8.
    fn write_cr8(&mut self, value: u64);
    /// Guest time in nanoseconds since power-on; the TSC and kvmclock tick at 1 GHz of it. In deterministic mode the CPU
    /// core uses retired instructions instead and does not call this.
    fn now_ns(&mut self) -> u64;
    /// Nanoseconds of UTC wall clock at guest time zero, for kvmclock's wall-clock structure.
    fn wall_clock_base_ns(&mut self) -> u64;
}

/// Why [`Cpu::run`](crate::Cpu) returned. Never with an instruction half done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// HLT: wait for attention, then run again.
    Halted,
    /// [`Attention::STOP`] was raised. The flag is still raised; the board clears it.
    Requested,
    /// The instruction budget of this call is used up (deterministic mode and tests).
    Budget,
    /// Triple fault: the board resets or ends the machine.
    TripleFault,
}

/// A word that other threads raise to get a CPU's notice; the CPU looks once a block.
#[derive(Clone, Debug, Default)]
pub struct Attention {
    word: Arc<AtomicU32>,
}

impl Attention {
    /// An interrupt may be deliverable.
    pub const INTERRUPT: u32 = 1;
    /// Leave `run`.
    pub const STOP: u32 = 2;
    /// A backend has written guest memory: decoded pages must be re-checked (see `GuestRam`).
    pub const DMA: u32 = 4;
    /// A non-maskable interrupt is to be delivered.
    pub const NMI: u32 = 8;

    /// Raises flags; any thread.
    pub fn raise(&self, flags: u32) {
        self.word.fetch_or(flags, Ordering::Release);
    }
    /// Lowers flags and returns those that were raised among them.
    pub fn take(&self, flags: u32) -> u32 {
        self.word.fetch_and(!flags, Ordering::Acquire) & flags
    }
    /// The raised flags.
    pub fn peek(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }
}
