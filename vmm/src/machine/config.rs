//! A machine's configuration, already validated: what each user interface makes and the assembler reads.

use super::boot::BootSource;
use crate::cpu::kvm::Irqchip;

/// Which CPU runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuKind {
    /// KVM.
    Kvm,
    /// The software CPU.
    Soft,
}

/// Everything that makes one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// What to boot.
    pub boot: BootSource,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// vCPUs at boot.
    pub vcpus: u32,
    /// Which CPU.
    pub cpu: CpuKind,
    /// Name of the CPU model.
    pub cpu_model: String,
    /// On KVM: where the interrupt chips are.
    pub irqchip: Irqchip,
    /// Time from retired instructions: nanoseconds for 1000 of them.
    pub deterministic: Option<u32>,
    /// Whether there is a COM1.
    pub com1: bool,
}
