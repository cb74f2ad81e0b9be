//! What kinds of devices there are.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Kind of a device: what it is called where a name must be made up, and in lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Disk.
    Disk,
    /// Network card.
    Net,
    /// Shared folder.
    Fs,
    /// Sockets.
    Vsock,
    /// Entropy.
    Rng,
    /// Console.
    Console,
    /// A serial port that is a process; nobody plugs it.
    Uart,
    /// NVMe disk.
    Nvme,
    /// PCI device of another process.
    User,
    /// GPU.
    Gpu,
    /// Keyboard, tablet or mouse.
    Input,
    /// What shows the GPU's pictures; nobody plugs it.
    Display,
    /// Any other.
    Generic,
    /// A PCI function of the host.
    Vfio,
}

impl DeviceKind {
    /// In lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Net => "net",
            Self::Fs => "fs",
            Self::Vsock => "vsock",
            Self::Rng => "rng",
            Self::Console => "console",
            Self::Uart => "uart",
            Self::Nvme => "nvme",
            Self::User => "user",
            Self::Gpu => "gpu",
            Self::Input => "input",
            Self::Display => "display",
            Self::Generic => "generic",
            Self::Vfio => "vfio",
        }
    }
}
