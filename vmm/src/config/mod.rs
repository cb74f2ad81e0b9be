//! What a user says about a virtual machine: the same words on the command line, in a TOML file and over REST.
//!
//! Names and shapes are Cloud Hypervisor's wherever the meaning is the same, because its clients send them and expect to
//! read back what they sent: a key that was not given is left out of the echo. Nothing here opens a file or starts a
//! process; [`VmConfig::check`] finds what can be found without either.

mod care;
mod check;
mod device;
mod device_flags;
mod disk;
mod file;
mod flags;
mod keyvalue;
mod kind;
mod limits;
mod net;
mod payload;
mod screen;
mod screen_flags;
mod user_device;

pub use care::{Isolation, OnFailure, Track};
pub use check::{ConfigError, QUEUE_SIZE_BEHIND_MAX};
pub use device::{
    ConsoleConfig, ConsoleMode, DeviceConfig, FsConfig, GenericVhostUserConfig, PassthroughConfig, RngConfig,
    VsockConfig,
};
pub use disk::{DiskConfig, ImageType};
pub use file::{FileError, MachineFile, RunWords};
pub use keyvalue::{FlagError, KeyError, PathOrFd, bytes_of};
pub use kind::DeviceKind;
pub use limits::{RateLimiterConfig, TokenBucketConfig};
pub use net::{Descriptors, NetConfig};
pub use payload::{CpuChoice, CpusConfig, MemoryConfig, PayloadConfig, PlatformConfig};
pub use screen::{DisplayConfig, GpuConfig, InputConfig, InputKind, Mode, ViewersAt};
pub use user_device::{NvmeConfig, UserDeviceConfig};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One virtual machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VmConfig {
    /// vCPUs.
    pub cpus: CpusConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// What to boot.
    pub payload: PayloadConfig,
    /// Disks, in the order of their PCI slots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// NVMe disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme: Option<Vec<NvmeConfig>>,
    /// PCI devices of other processes (vfio-user).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_devices: Option<Vec<UserDeviceConfig>>,
    /// Network cards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// Entropy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngConfig>,
    /// Shared folders.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Sockets between guest and host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// What draws.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuConfig>,
    /// What shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub display: Option<DisplayConfig>,
    /// Keyboard, tablet, mouse.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<Vec<InputConfig>>,
    /// Any other vhost-user device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// PCI functions of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<PassthroughConfig>>,
    /// COM1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<ConsoleConfig>,
    /// COM2, whose registers are served by a process of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial2: Option<ConsoleConfig>,
    /// The virtio console.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// What is Atoll's own: CPU, time, where device processes are.
    #[serde(skip_serializing_if = "PlatformConfig::is_default")]
    pub platform: PlatformConfig,
}

impl VmConfig {
    /// All devices of the PCI bus, in the order in which they take PCI slots.
    pub fn devices(&self) -> Vec<DeviceConfig> {
        let mut devices = Vec::new();
        devices.extend(self.rng.iter().cloned().map(DeviceConfig::Rng));
        let console = self.console.iter().filter(|console| console.mode != ConsoleMode::Off);
        devices.extend(console.cloned().map(DeviceConfig::Console));
        devices.extend(self.disks.iter().flatten().cloned().map(DeviceConfig::Disk));
        devices.extend(self.net.iter().flatten().cloned().map(DeviceConfig::Net));
        devices.extend(self.fs.iter().flatten().cloned().map(DeviceConfig::Fs));
        devices.extend(self.vsock.iter().cloned().map(DeviceConfig::Vsock));
        devices.extend(self.generic_vhost_user.iter().flatten().cloned().map(DeviceConfig::Generic));
        devices.extend(self.nvme.iter().flatten().cloned().map(DeviceConfig::Nvme));
        devices.extend(self.user_devices.iter().flatten().cloned().map(DeviceConfig::User));
        devices.extend(self.devices.iter().flatten().cloned().map(DeviceConfig::Passthrough));
        devices.extend(self.gpu.iter().cloned().map(DeviceConfig::Gpu));
        devices.extend(self.input.iter().flatten().cloned().map(DeviceConfig::Input));
        devices
    }
}
