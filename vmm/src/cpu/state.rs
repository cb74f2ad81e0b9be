//! The architectural state of a vCPU, the same for both CPUs.

pub use atoll_softcpu::reset_system;
use atoll_softcpu::state::{Regs, System};

/// Registers in and out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// What unprivileged code sees.
    pub regs: Regs,
    /// The rest.
    pub system: System,
}
