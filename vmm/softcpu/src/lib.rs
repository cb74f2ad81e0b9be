//! A software x86-64 CPU.
//!
//! The crate knows guest memory and exits; it knows no device. Whoever owns the board implements [`World`] and calls
//! [`Cpu::run`]: accesses outside RAM, port I/O, interrupt acknowledgement and the MSRs of the local APIC come out
//! through that trait, synchronously, on the calling thread, so that the CPU always stops between two instructions.
//!
//! Instructions are decoded once (iced-x86) into fixed-size ops grouped in blocks; release builds run them by sibling
//! tail calls, other builds by a trampoline loop over the same handlers. SSE, x87 and their kin are re-encoded and run
//! on the host's own units (`native`).

mod breakpoint;
pub mod cpu;
pub mod cpuid;
mod descriptor;
mod exec;
mod far;
mod huge;
mod interrupt;
mod kvmclock;
mod mmu;
mod msr;
pub mod native;
#[cfg(any(test, feature = "oracle"))]
pub mod oracle;
pub mod ram;
mod segment;
mod stack;
pub mod state;
mod system;
#[cfg(test)]
mod test_machine;
pub mod tlb;
mod walk;
pub mod world;

pub use cpu::{Cpu, NmiState, TimeMode, reset_system};
pub use cpuid::{CpuModel, CpuidLeaf, Features, UnknownModel, VcpuTopology};
pub use ram::{GuestRam, RamRegion};
pub use state::{Exception, FpState, Regs, Segment, System};
pub use world::{Attention, Stop, World};
