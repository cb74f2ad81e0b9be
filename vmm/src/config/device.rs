//! Devices that are processes, ours or somebody else's.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::care::{Isolation, OnFailure, STALL_TIMEOUT_SECONDS, Track, is_false};
use super::disk::DiskConfig;
use super::kind::DeviceKind;
use super::net::{Descriptors, NetConfig};
use super::screen::{GpuConfig, InputConfig};
use super::user_device::{NvmeConfig, UserDeviceConfig};
use crate::backend::START_ATTEMPTS;
use crate::passthrough::Bdf;

/// A shared folder, served by virtiofsd or another vhost-user backend.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FsConfig {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// What the guest mounts.
    pub tag: String,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// Request queues; one when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Descriptors of each queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// What becomes of it when its backend cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// Seconds for which a queue may stand with work in it before its backend is replaced; 0: for ever. 30 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<u32>,
    /// Who keeps account of requests in flight, where somebody else's backend does not.
    #[serde(default, skip_serializing_if = "Track::is_default")]
    pub track: Track,
    /// It is behind the machine's virtual IOMMU: it reaches what the guest's driver has mapped for it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// What its backend has of the guest's memory.
    #[serde(default, skip_serializing_if = "Isolation::is_default")]
    pub isolation: Isolation,
}

/// Sockets between guest and host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VsockConfig {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The guest's context id: 3 or more.
    pub cid: u64,
    /// The UNIX socket of the host's side (`CONNECT port`), or that of a vhost-user backend.
    pub socket: PathBuf,
    /// `socket` is that of a vhost-user backend that somebody else runs.
    #[serde(default, skip_serializing_if = "is_false")]
    pub vhost_user: bool,
    /// What becomes of it when its backend cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// Seconds for which a queue may stand with work in it before its backend is replaced; 0: for ever. 30 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<u32>,
    /// Starts of a process of ours in a row that may fail before the device is given up; 0: any number. 20 when left out, which
    /// with the pauses between them is not quite half a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_attempts: Option<u32>,
    /// A spare process waits beside the one that serves, and takes its place at once when it dies.
    #[serde(default, skip_serializing_if = "is_false")]
    pub standby: bool,
    /// Who keeps account of requests in flight, where somebody else's backend does not.
    #[serde(default, skip_serializing_if = "Track::is_default")]
    pub track: Track,
    /// It is behind the machine's virtual IOMMU: it reaches what the guest's driver has mapped for it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// What its backend has of the guest's memory.
    #[serde(default, skip_serializing_if = "Isolation::is_default")]
    pub isolation: Isolation,
}

/// Any vhost-user device, by its virtio device type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GenericVhostUserConfig {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Virtio device type (virtio 1.2, section 5).
    #[serde(alias = "virtio_id")]
    pub device_type: u32,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// Descriptors of each queue; its length is the number of queues.
    #[serde(alias = "queue_size")]
    pub queue_sizes: Vec<u16>,
    /// What becomes of it when its backend cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// Seconds for which a queue may stand with work in it before its backend is replaced; 0: for ever. 30 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<u32>,
    /// Who keeps account of requests in flight, where somebody else's backend does not.
    #[serde(default, skip_serializing_if = "Track::is_default")]
    pub track: Track,
    /// It is behind the machine's virtual IOMMU: it reaches what the guest's driver has mapped for it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// What its backend has of the guest's memory.
    #[serde(default, skip_serializing_if = "Isolation::is_default")]
    pub isolation: Isolation,
}

/// A PCI function of the host that the guest drives itself (VFIO).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PassthroughConfig {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its folder in sysfs, `/sys/bus/pci/devices/0000:01:00.0`; it is bound to `vfio-pci`.
    pub path: PathBuf,
    /// It is behind the machine's virtual IOMMU: it reaches what the guest has mapped for it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// Its group (`/dev/vfio/GROUP`), open, as the client numbers it; the one that came beside the request is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// The descriptor itself, as it came beside the request.
    #[serde(skip)]
    pub group: Descriptors,
}

impl PassthroughConfig {
    /// Where the function is, by the name of its folder; none of a path that is not one.
    pub fn bdf(&self) -> Option<Bdf> {
        self.path.file_name()?.to_str()?.parse().ok()
    }
}

/// Entropy, served by a process of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RngConfig {
    /// Where it comes from.
    pub src: PathBuf,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// What becomes of it when its backend cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// Seconds for which a queue may stand with work in it before its backend is replaced; 0: for ever. 30 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<u32>,
    /// Starts of a process of ours in a row that may fail before the device is given up; 0: any number. 20 when left out, which
    /// with the pauses between them is not quite half a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_attempts: Option<u32>,
    /// It is behind the machine's virtual IOMMU: it reaches what the guest's driver has mapped for it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// What its backend has of the guest's memory.
    #[serde(default, skip_serializing_if = "Isolation::is_default")]
    pub isolation: Isolation,
}

/// Where a port leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConsoleMode {
    /// There is no port.
    #[default]
    #[serde(alias = "off")]
    Off,
    /// Nowhere; the port is there.
    #[serde(alias = "null")]
    Null,
    /// Standard input and output.
    #[serde(alias = "tty")]
    Tty,
    /// A new pseudo terminal, whose name is told in `file`.
    #[serde(alias = "pty")]
    Pty,
    /// A file that gets what the guest prints.
    #[serde(alias = "file")]
    File,
    /// A UNIX socket that one client at a time connects to.
    #[serde(alias = "socket")]
    Socket,
}

/// A serial port or console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsoleConfig {
    /// Where it leads.
    pub mode: ConsoleMode,
    /// The file; for a pseudo terminal its name, filled in by Atoll.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// What becomes of a virtio console when its backend cannot be had again.
    #[serde(default, skip_serializing_if = "OnFailure::is_default")]
    pub on_failure: OnFailure,
    /// Seconds for which a queue of a virtio console may stand with work in it before its backend is replaced; 0: for ever. 30 when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stall_timeout: Option<u32>,
    /// Starts of a process of ours in a row that may fail before the device is given up; 0: any number. 20 when left out, which
    /// with the pauses between them is not quite half a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_attempts: Option<u32>,
}

/// One device, as it can be built or plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig {
    /// Disk.
    Disk(DiskConfig),
    /// Network card.
    Net(NetConfig),
    /// Shared folder.
    Fs(FsConfig),
    /// Sockets.
    Vsock(VsockConfig),
    /// Entropy.
    Rng(RngConfig),
    /// Console.
    Console(ConsoleConfig),
    /// NVMe disk.
    Nvme(NvmeConfig),
    /// PCI device of another process.
    User(UserDeviceConfig),
    /// GPU.
    Gpu(GpuConfig),
    /// Keyboard, tablet or mouse.
    Input(InputConfig),
    /// Any other.
    Generic(GenericVhostUserConfig),
    /// A PCI function of the host.
    Passthrough(PassthroughConfig),
}

impl DeviceConfig {
    /// What it is.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Disk(_) => DeviceKind::Disk,
            Self::Net(_) => DeviceKind::Net,
            Self::Fs(_) => DeviceKind::Fs,
            Self::Vsock(_) => DeviceKind::Vsock,
            Self::Rng(_) => DeviceKind::Rng,
            Self::Console(_) => DeviceKind::Console,
            Self::Nvme(_) => DeviceKind::Nvme,
            Self::User(_) => DeviceKind::User,
            Self::Gpu(_) => DeviceKind::Gpu,
            Self::Input(_) => DeviceKind::Input,
            Self::Generic(_) => DeviceKind::Generic,
            Self::Passthrough(_) => DeviceKind::Vfio,
        }
    }

    /// The name that the user gave it.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Disk(disk) => disk.id.as_deref(),
            Self::Net(net) => net.id.as_deref(),
            Self::Fs(fs) => fs.id.as_deref(),
            Self::Vsock(vsock) => vsock.id.as_deref(),
            Self::Rng(rng) => rng.id.as_deref(),
            Self::Console(_) => Some("_console"),
            Self::Gpu(gpu) => gpu.id.as_deref(),
            Self::Input(input) => input.id.as_deref(),
            Self::Generic(device) => device.id.as_deref(),
            Self::Nvme(nvme) => nvme.id.as_deref(),
            Self::User(device) => device.id.as_deref(),
            Self::Passthrough(function) => function.id.as_deref(),
        }
    }

    /// Whether a spare process waits beside the one that serves.
    pub fn standby(&self) -> bool {
        match self {
            Self::Disk(disk) => disk.standby,
            Self::Net(net) => net.standby,
            Self::Vsock(vsock) => vsock.standby,
            Self::Rng(_) | Self::Fs(_) | Self::Console(_) | Self::Generic(_) | Self::Passthrough(_) => false,
            // What a process knows of its commands cannot be handed over while it serves.
            Self::Nvme(_) | Self::User(_) => false,
            // Each of them is fed by one socket.
            Self::Gpu(_) | Self::Input(_) => false,
        }
    }

    /// Whether it is behind the machine's virtual IOMMU.
    pub fn iommu(&self) -> bool {
        match self {
            Self::Disk(disk) => disk.iommu,
            Self::Net(net) => net.iommu,
            Self::Fs(fs) => fs.iommu,
            Self::Vsock(vsock) => vsock.iommu,
            Self::Rng(rng) => rng.iommu,
            Self::Gpu(gpu) => gpu.iommu,
            Self::Input(input) => input.iommu,
            Self::Generic(device) => device.iommu,
            Self::Passthrough(function) => function.iommu,
            Self::Console(_) | Self::Nvme(_) | Self::User(_) => false,
        }
    }

    /// What its backend has of the guest's memory.
    pub fn isolation(&self) -> Isolation {
        match self {
            Self::Disk(disk) => disk.isolation,
            Self::Net(net) => net.isolation,
            Self::Fs(fs) => fs.isolation,
            Self::Vsock(vsock) => vsock.isolation,
            Self::Rng(rng) => rng.isolation,
            Self::Generic(device) => device.isolation,
            Self::Passthrough(_) | Self::Console(_) | Self::Nvme(_) | Self::User(_) => Isolation::default(),
            Self::Gpu(_) | Self::Input(_) => Isolation::default(),
        }
    }

    /// What becomes of it when its backend cannot be had again.
    pub fn on_failure(&self) -> OnFailure {
        match self {
            Self::Disk(disk) => disk.on_failure,
            Self::Net(net) => net.on_failure,
            Self::Fs(fs) => fs.on_failure,
            Self::Vsock(vsock) => vsock.on_failure,
            Self::Rng(rng) => rng.on_failure,
            Self::Gpu(gpu) => gpu.on_failure,
            Self::Input(input) => input.on_failure,
            Self::Generic(device) => device.on_failure,
            Self::Nvme(nvme) => nvme.on_failure,
            Self::User(device) => device.on_failure,
            Self::Passthrough(_) => OnFailure::default(),
            Self::Console(console) => console.on_failure,
        }
    }

    /// How long a queue of it may stand with work in it; `None`: for ever.
    pub fn stall_timeout(&self) -> Option<Duration> {
        let seconds = match self {
            Self::Disk(disk) => disk.stall_timeout,
            Self::Net(net) => net.stall_timeout,
            Self::Gpu(gpu) => gpu.stall_timeout,
            // Nobody types for as long as they like.
            Self::Input(_) => Some(0),
            Self::Generic(device) => device.stall_timeout,
            Self::Nvme(nvme) => nvme.stall_timeout,
            // Nobody sees what it has to do.
            Self::User(_) => Some(0),
            Self::Fs(fs) => fs.stall_timeout,
            Self::Vsock(vsock) => vsock.stall_timeout,
            Self::Rng(rng) => rng.stall_timeout,
            Self::Console(console) => console.stall_timeout,
            // It has no process.
            Self::Passthrough(_) => Some(0),
        };
        let seconds = seconds.unwrap_or(STALL_TIMEOUT_SECONDS);
        (seconds != 0).then_some(Duration::from_secs(seconds.into()))
    }

    /// How many starts in a row may fail before it is given up; `None`: any number.
    pub fn start_attempts(&self) -> Option<u32> {
        let attempts = match self {
            Self::Disk(disk) => disk.start_attempts,
            Self::Net(net) => net.start_attempts,
            Self::Vsock(vsock) => vsock.start_attempts,
            Self::Rng(rng) => rng.start_attempts,
            Self::Console(console) => console.start_attempts,
            Self::Nvme(nvme) => nvme.start_attempts,
            Self::Gpu(gpu) if gpu.socket.is_none() => gpu.start_attempts,
            Self::Input(input) => input.start_attempts,
            // Nobody here starts those.
            Self::Fs(_) | Self::Generic(_) | Self::Passthrough(_) | Self::User(_) | Self::Gpu(_) => Some(0),
        };
        let attempts = attempts.unwrap_or(START_ATTEMPTS);
        (attempts != 0).then_some(attempts)
    }

    /// Who keeps account of its requests.
    pub fn track(&self) -> Track {
        match self {
            Self::Disk(disk) => disk.track,
            Self::Net(net) => net.track,
            Self::Fs(fs) => fs.track,
            Self::Vsock(vsock) => vsock.track,
            Self::Generic(device) => device.track,
            Self::Rng(_) | Self::Console(_) | Self::Passthrough(_) | Self::Nvme(_) | Self::User(_) => Track::default(),
            Self::Gpu(_) | Self::Input(_) => Track::default(),
        }
    }

    /// Gives it a name where it has none.
    pub fn name_it(&mut self, name: impl FnOnce() -> String) {
        let id = match self {
            Self::Disk(disk) => &mut disk.id,
            Self::Net(net) => &mut net.id,
            Self::Fs(fs) => &mut fs.id,
            Self::Vsock(vsock) => &mut vsock.id,
            Self::Rng(rng) => &mut rng.id,
            Self::Gpu(gpu) => &mut gpu.id,
            Self::Input(input) => &mut input.id,
            Self::Generic(device) => &mut device.id,
            Self::Nvme(nvme) => &mut nvme.id,
            Self::User(device) => &mut device.id,
            Self::Passthrough(function) => &mut function.id,
            Self::Console(_) => return,
        };
        id.get_or_insert_with(name);
    }
}
