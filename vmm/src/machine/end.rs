//! How a machine ends, and why one does not come to be.

use thiserror::Error;

use super::boot::BootError;
use super::events::StopCause;
use super::layout::{self, MemorySizeError};
use super::{BuildError, LifeError};
use crate::cpu::{CpuError, Exit, VcpuEnd};
use crate::doorbell::RelayError;
use crate::memory::MemoryError;

/// Why a machine could not be built or started.
#[derive(Debug, Error)]
pub enum MachineError {
    /// Absurd amount of memory.
    #[error(transparent)]
    MemorySize(#[from] MemorySizeError),
    /// More vCPUs than the board has APIC ids.
    #[error("--cpus boot={0} is more than board {BOARD} can hold; the most is 255", BOARD = layout::BOARD)]
    TooManyVcpus(u32),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Nothing to boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No CPU.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// No relay for doorbells.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// No device.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A device did not start.
    #[error(transparent)]
    Life(#[from] LifeError),
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEnd {
    /// The guest switched it off.
    PowerOff,
    /// The guest wants to start again.
    Reset,
    /// Somebody outside wanted it.
    Stopped(StopCause),
    /// An operator ended the machine monitor.
    Asked,
    /// The guest cannot go on; the text says why.
    Failed(String),
}

/// What a machine has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineFigures {
    /// `soft` or `kvm`.
    pub cpu: &'static str,
    /// Instructions that were retired; zero where the CPU does not count them.
    pub instructions: u64,
    /// Processor time of all vCPU threads in nanoseconds.
    pub busy_ns: u64,
    /// Host memory that held decoded code at the end, in bytes.
    pub cache_bytes: u64,
    /// Deterministic mode: a hash of what the boot vCPU executed.
    pub trace_hash: Option<u64>,
}

impl MachineFigures {
    /// Adds those of the machine that came after: times add up, what is there at the end is the last one's.
    pub fn add(&mut self, next: &Self) {
        *self =
            Self { instructions: self.instructions + next.instructions, busy_ns: self.busy_ns + next.busy_ns, ..*next };
    }
}

/// What a vCPU's end means for the machine, if it is its end too.
pub fn failure(end: &VcpuEnd, cpu: &str) -> Option<String> {
    let vcpu = end.index;
    let remedy = if cpu == "kvm" { "run with --cpu soft" } else { "it is a limit of the software CPU" };
    match &end.exit {
        Ok(Exit::Stopped) => None,
        Ok(Exit::TripleFault { rip }) => Some(format!(
            "vcpu{vcpu} shut down by a triple fault{}: the guest faulted where it had no handler; \
             look at what it printed last",
            rip.map_or(String::new(), |rip| format!(" at rip {rip:#x}"))
        )),
        Ok(Exit::Stuck { rip, reason }) => Some(format!("vcpu{vcpu} cannot go on at rip {rip:#x}: {reason}; {remedy}")),
        Err(error) => Some(format!("vcpu{vcpu} failed: {error}")),
    }
}
