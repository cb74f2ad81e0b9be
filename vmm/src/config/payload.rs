//! vCPUs, memory, what to boot, and what only Atoll has.

use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::de::{Deserializer, Error, Unexpected, Visitor};
use serde::{Deserialize, Serialize};

use crate::backend::JailPolicy;
use crate::cpu::kvm::Irqchip;

use super::keyvalue::{Bytes, OptionValue};

/// A number of bytes, or a text like `512M`.
fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    struct Amount;
    impl Visitor<'_> for Amount {
        type Value = u64;
        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a number of bytes, or a text like \"512M\"")
        }
        fn visit_u64<E: Error>(self, bytes: u64) -> Result<u64, E> {
            Ok(bytes)
        }
        fn visit_i64<E: Error>(self, bytes: i64) -> Result<u64, E> {
            u64::try_from(bytes).map_err(|_| E::invalid_value(Unexpected::Signed(bytes), &self))
        }
        fn visit_str<E: Error>(self, text: &str) -> Result<u64, E> {
            let bytes = Bytes::read(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))?;
            Ok(bytes.0)
        }
    }
    deserializer.deserialize_any(Amount)
}

/// vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "CpusWords")]
pub struct CpusConfig {
    /// At boot.
    pub boot_vcpus: u32,
    /// At most.
    pub max_vcpus: u32,
}

/// vCPUs as they are written: at most as many as at boot, unless something else is said.
#[derive(Deserialize, JsonSchema)]
#[schemars(rename = "CpusConfig")]
struct CpusWords {
    /// At boot; one when left out.
    #[serde(alias = "boot")]
    boot_vcpus: Option<u32>,
    /// At most; as many as at boot when left out.
    #[serde(alias = "max")]
    max_vcpus: Option<u32>,
}

impl From<CpusWords> for CpusConfig {
    fn from(words: CpusWords) -> Self {
        let boot_vcpus = words.boot_vcpus.unwrap_or(1);
        Self { boot_vcpus, max_vcpus: words.max_vcpus.unwrap_or(boot_vcpus) }
    }
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
    #[serde(deserialize_with = "bytes")]
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
    /// On KVM: where the interrupt chips are.
    #[serde(skip_serializing_if = "is_in_kernel")]
    pub irqchip: Irqchip,
    /// Guest time from retired instructions.
    pub deterministic: bool,
    /// Where the device processes' executables are; beside the VMM's by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_dir: Option<PathBuf>,
    /// Devices whose processes somebody debugs: one that stands is told of, and left alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub debug_devices: Vec<String>,
    /// Whoever has the operator's socket may do to devices what the world may do, as tests want to.
    #[serde(skip_serializing_if = "is_no")]
    pub allow_faults: bool,
    /// How device processes are jailed.
    #[serde(skip_serializing_if = "is_usual")]
    pub jail: JailPolicy,
}

fn is_in_kernel(irqchip: &Irqchip) -> bool {
    *irqchip == Irqchip::Kernel
}

fn is_no(flag: &bool) -> bool {
    !*flag
}

fn is_usual(jail: &JailPolicy) -> bool {
    *jail == JailPolicy::default()
}

impl PlatformConfig {
    /// Nothing was said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
