//! A machine's configuration, already validated: what each user interface makes and the assembler reads.

use std::path::PathBuf;

use super::boot::BootSource;

/// Which CPU runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuKind {
    /// KVM.
    Kvm,
    /// The software CPU.
    Soft,
}

/// Where a serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialMode {
    /// Standard input and output.
    Tty,
    /// A file that gets what the guest prints.
    File(PathBuf),
    /// Nowhere; the port is there.
    Null,
    /// There is no port.
    Off,
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
    /// Time from retired instructions: nanoseconds for 1000 of them.
    pub deterministic: Option<u32>,
    /// COM1.
    pub serial: SerialMode,
}
