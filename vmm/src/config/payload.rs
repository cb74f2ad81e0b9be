//! vCPUs, memory, what to boot, and what only Atoll has.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CpusConfig {
    /// At boot.
    pub boot_vcpus: u32,
    /// At most.
    pub max_vcpus: u32,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self { boot_vcpus: 1, max_vcpus: 1 }
    }
}

/// RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MemoryConfig {
    /// In bytes.
    pub size: u64,
    /// Bytes that may be added later; more than zero is not supported yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// Shared with device processes: always so, as devices are processes.
    pub shared: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: 512 << 20, hotplug_size: None, shared: true }
    }
}

/// What to boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct PayloadConfig {
    /// An ELF vmlinux with a PVH entry, or a bzImage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Firmware: not supported, refused by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
}

/// Which CPU runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CpuChoice {
    /// KVM where it can run a stock guest, else the software CPU.
    #[default]
    Auto,
    /// Hardware virtualisation.
    Kvm,
    /// The software CPU, which needs nothing of the host.
    Soft,
}

/// What is Atoll's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct PlatformConfig {
    /// Which CPU.
    pub cpu: CpuChoice,
    /// Name of the CPU model; `atoll-v1` when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    /// Guest time from retired instructions.
    pub deterministic: bool,
    /// Where the device processes' executables are; beside the VMM's by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_dir: Option<PathBuf>,
}

impl PlatformConfig {
    /// Nothing was said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
