//! Interrupt controllers and timers of the board, for CPUs that bring none of their own.
//!
//! Each chip is a plain state machine; [`chip::IrqChip`] owns them all and carries messages between them. Time enters as a
//! parameter, `now_ns`: guest time in nanoseconds, at which the TSC and the local APIC timers tick (1 GHz).

pub mod chip;
pub mod ioapic;
pub mod lapic;
pub mod msi;
pub mod pic;
pub mod pit;
#[cfg(test)]
mod tests;
pub mod vector_set;

pub use chip::{CpuSink, IrqChip, IrqChipState, SharedIrqChip};
pub use lapic::CpuSignal;
