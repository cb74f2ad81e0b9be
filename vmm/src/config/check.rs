//! What can be wrong with a configuration by itself.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::Path;

use thiserror::Error;

use super::{ConsoleMode, DeviceConfig, DiskConfig, ImageType, Isolation, NetConfig, OnFailure, Track, VmConfig};
use crate::unix_socket::PATH_BYTES_MAX;

/// Most request queues of a disk, and pairs of a network card times two.
const QUEUES_MAX: u16 = 64;
/// Most bytes of a disk's serial (virtio 1.2, 5.2.6: GET_ID).
const SERIAL_BYTES_MAX: usize = 20;
/// Most bytes of an interface's name (IFNAMSIZ without the final zero).
const INTERFACE_BYTES_MAX: usize = 15;
/// Most bytes of a device's name.
const ID_BYTES_MAX: usize = 64;
/// Most bytes of a shared folder's tag (virtio 1.2, 5.11.4).
const TAG_BYTES_MAX: usize = 36;

/// A configuration that no machine can be built from. The text names the thing and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// Nothing to boot.
    #[error("there is no kernel: give --kernel FILE, or payload.kernel over the API")]
    NoKernel,
    /// A kind of payload that is not there.
    #[error("firmware is not supported: boot a kernel directly with payload.kernel")]
    Firmware,
    /// Two devices of one name.
    #[error("two devices have the id '{0}': give each its own")]
    DuplicateId(String),
    /// A device that contradicts itself.
    #[error("{device}: {what}")]
    Device {
        /// Which.
        device: String,
        /// What is the matter, and the remedy.
        what: String,
    },
    /// Something that is not there yet.
    #[error("{0}")]
    Unsupported(String),
}

/// What is wrong with one device, for its name to be put before.
pub(super) type Wrong = Result<(), String>;

impl VmConfig {
    /// Finds what is wrong without opening anything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.payload.firmware.is_some() {
            return Err(ConfigError::Firmware);
        }
        if self.payload.kernel.is_none() {
            return Err(ConfigError::NoKernel);
        }
        self.check_devices()
    }

    /// As [`Self::check`], for a machine that has no kernel yet.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check_devices(&self) -> Result<(), ConfigError> {
        crate::machine::layout::ram(self.memory.size).map_err(|error| ConfigError::Unsupported(error.to_string()))?;
        if let Some(model) = &self.platform.cpu_model {
            crate::cpu::check_model(model).map_err(|error| ConfigError::Unsupported(error.to_string()))?;
        }
        if self.memory.hotplug_size.is_some_and(|size| size > 0) {
            return Err(ConfigError::Unsupported(
                "memory hotplug is not supported: leave memory.hotplug_size out and give all of it as size".into(),
            ));
        }
        if self.cpus.boot_vcpus == 0 {
            return Err(ConfigError::Unsupported("a machine has at least one vCPU: give cpus.boot_vcpus".into()));
        }
        if self.cpus.max_vcpus != self.cpus.boot_vcpus {
            return Err(ConfigError::Unsupported(
                "vCPU hotplug is not supported: give cpus.max_vcpus the value of cpus.boot_vcpus".into(),
            ));
        }
        self.check_ports()?;
        self.check_screen()?;
        let mut seen = BTreeSet::new();
        for device in self.devices() {
            device.check()?;
            if let Some(id) = device.id()
                && !seen.insert(id.to_owned())
            {
                return Err(ConfigError::DuplicateId(id.to_owned()));
            }
        }
        Ok(())
    }

    /// One display shows one GPU and has one of each kind of input device at its hands.
    fn check_screen(&self) -> Result<(), ConfigError> {
        let wrong = |device: &str, what: String| Err(ConfigError::Device { device: device.into(), what });
        if let Some(display) = &self.display {
            display.check().or_else(|what| wrong("display", what))?;
            if self.gpu.is_none() {
                return wrong("display", "it shows a GPU's pictures, and there is none: add --gpu on".into());
            }
        }
        let mut kinds = BTreeSet::new();
        for input in self.input.iter().flatten() {
            if !kinds.insert(input.kind) {
                return wrong("input", format!("there are two of kind {}: a machine has one", input.kind.name()));
            }
            if self.display.is_none() {
                return wrong("input", "what is typed comes from the display, and there is none: add --display".into());
            }
        }
        Ok(())
    }

    fn check_ports(&self) -> Result<(), ConfigError> {
        let ports = [("serial", &self.serial), ("serial2", &self.serial2), ("console", &self.console)];
        let wrong = |name: &str, what: String| Err(ConfigError::Device { device: name.into(), what });
        let mut terminal = None;
        for (name, port) in ports {
            let Some(port) = port else { continue };
            let served =
                name != "serial2" || matches!(port.mode, ConsoleMode::Off | ConsoleMode::File | ConsoleMode::Pty);
            if !served {
                return wrong(name, "the second serial port leads to a file, a pty or is off".into());
            }
            let cared = port.stall_timeout.is_some() || port.start_attempts.is_some();
            if name != "console" && (cared || port.on_failure != OnFailure::default()) {
                let what = "stall_timeout, start_attempts and on_failure are for virtio devices: leave them out here";
                return wrong(name, what.into());
            }
            match port.mode {
                ConsoleMode::Tty => {
                    if let Some(other) = terminal.replace(name) {
                        return wrong(name, format!("{other} has the terminal already: give it another mode"));
                    }
                }
                ConsoleMode::File if port.file.is_none() => return wrong(name, "mode File needs file".into()),
                ConsoleMode::Socket => match &port.socket {
                    None => return wrong(name, "mode Socket needs socket".into()),
                    Some(path) => check_socket(path).or_else(|what| wrong(name, what))?,
                },
                _ => {}
            }
        }
        Ok(())
    }
}

impl DeviceConfig {
    /// Finds what is wrong with a device without opening anything.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.id().map_or(Ok(()), check_id).and_then(|()| self.check_kind()).map_err(|what| {
            let kind = self.kind().name();
            let device = self.id().map_or_else(|| kind.to_owned(), |id| format!("{kind} {id}"));
            ConfigError::Device { device, what }
        })
    }

    fn check_kind(&self) -> Wrong {
        let foreign = match self {
            Self::Disk(disk) => disk.vhost_user,
            Self::Net(net) => net.vhost_user,
            Self::Vsock(vsock) => vsock.vhost_user,
            Self::Fs(_) | Self::Generic(_) | Self::User(_) => true,
            Self::Gpu(gpu) => gpu.socket.is_some(),
            Self::Input(_) => false,
            Self::Rng(_) | Self::Console(_) | Self::Passthrough(_) | Self::Nvme(_) => false,
        };
        if !foreign && self.track() == Track::Shadow {
            return Err(
                "track=shadow is for backends behind a socket: a device process of Atoll's keeps that record by \
                        itself"
                    .into(),
            );
        }
        if self.standby() && foreign {
            return Err(
                "standby=on is for device processes that this machine starts: start a second one of your own".into()
            );
        }
        if let Self::Net(net) = self
            && net.standby
            && net.fds.is_none()
            && net.descriptors.0.is_empty()
        {
            return Err(
                "standby=on needs the card's TAP as descriptors (fd=), which two processes can have at a time".into()
            );
        }
        let chosen = match self {
            Self::Disk(disk) => disk.queue_size,
            Self::Net(net) => net.queue_size,
            Self::Fs(fs) => fs.queue_size,
            Self::Generic(device) => device.queue_sizes.iter().copied().max(),
            _ => None,
        };
        if self.iommu() && chosen.is_some_and(|size| size > QUEUE_SIZE_BEHIND_MAX) {
            return Err(format!(
                "with iommu=on a queue has at most {QUEUE_SIZE_BEHIND_MAX} entries: larger rings need not lie in one piece of memory"
            ));
        }
        match self {
            Self::Disk(disk) => disk.check_kind(),
            Self::Net(net) => net.check_kind(),
            Self::Fs(fs) => {
                if fs.tag.is_empty() || fs.tag.len() > TAG_BYTES_MAX {
                    return Err(format!("tag has 1 to {TAG_BYTES_MAX} bytes"));
                }
                check_queues(fs.num_queues, fs.queue_size)?;
                check_socket(&fs.socket)
            }
            Self::Vsock(vsock) => {
                if vsock.cid < 3 || vsock.cid >= u64::from(u32::MAX) {
                    return Err("cid is a number from 3 to 4294967294".into());
                }
                // Programs of the host listen at this path, an underscore and a port of up to ten digits.
                let bytes = vsock.socket.as_os_str().len();
                if !vsock.vhost_user && bytes > PATH_BYTES_MAX - 11 {
                    return Err(format!(
                        "socket has {bytes} bytes, and with a port behind it a socket's path holds {}: choose a shorter one",
                        PATH_BYTES_MAX
                    ));
                }
                check_socket(&vsock.socket)
            }
            Self::Generic(device) => {
                if device.isolation == Isolation::Copy && SPEAKS_OF_MEMORY.contains(&device.device_type) {
                    return Err(format!(
                        "isolation=copy cannot serve a device of type {}: its requests name guest memory by address",
                        device.device_type
                    ));
                }
                if device.queue_sizes.is_empty() {
                    return Err("it has no queues: give queue_sizes=[256] with one size a queue".into());
                }
                if device.queue_sizes.len() > usize::from(QUEUES_MAX) {
                    return Err(format!("it has more than {QUEUES_MAX} queues; give fewer queue_sizes"));
                }
                for size in &device.queue_sizes {
                    check_queues(None, Some(*size))?;
                }
                check_socket(&device.socket)
            }
            Self::Nvme(nvme) => {
                check_unplug(nvme.on_failure)?;
                if nvme.image_type == Some(ImageType::Qcow2) {
                    return Err("an NVMe disk has a raw image: use --disk for qcow2".into());
                }
                if !(1..=QUEUES_MAX).contains(&nvme.queues()) {
                    return Err(format!("num_queues is a number from 1 to {QUEUES_MAX}"));
                }
                let fits = |serial: &String| {
                    (1..=SERIAL_BYTES_MAX).contains(&serial.len()) && serial.chars().all(|c| c.is_ascii_graphic())
                };
                if nvme.serial.as_ref().is_some_and(|serial| !fits(serial)) {
                    return Err(format!("serial has 1 to {SERIAL_BYTES_MAX} bytes, printable and without spaces"));
                }
                Ok(())
            }
            Self::User(device) => {
                check_unplug(device.on_failure)?;
                if let Some(segment) = device.pci_segment.filter(|segment| *segment != 0) {
                    return Err(format!(
                        "pci_segment={segment} is not supported: there is one PCI segment; leave it out"
                    ));
                }
                if let Some(slot) = device.pci_device_id {
                    return Err(format!(
                        "pci_device_id={slot} is not supported: devices get the next free slot; leave it out"
                    ));
                }
                if device.iommu {
                    return Err("iommu=true is not supported: a vfio-user device reaches all of the guest's memory; \
                                leave it out"
                        .into());
                }
                check_socket(&device.socket)
            }
            Self::Passthrough(function) => match function.bdf() {
                Some(bdf) if function.path.parent().is_none_or(|folder| folder.as_os_str().is_empty()) => Err(format!(
                    "path={} is a function's address, and its folder is wanted: path=/sys/bus/pci/devices/{bdf}",
                    function.path.display()
                )),
                Some(_) => Ok(()),
                None if [IOMMUFD, VFIO_FILES].iter().any(|at| function.path.starts_with(at)) => Err(format!(
                    "path={} is a file of iommufd, which is not supported: give the function's folder, \
                     /sys/bus/pci/devices/0000:01:00.0, which is reached through its group, and fd= for a group that is open",
                    function.path.display()
                )),
                None => Err(format!(
                    "path={} is no PCI function's folder: give /sys/bus/pci/devices/0000:01:00.0; `atoll vfio check` lists them",
                    function.path.display()
                )),
            },
            Self::Gpu(gpu) => gpu.check_kind(),
            Self::Rng(_) | Self::Console(_) | Self::Input(_) => Ok(()),
        }
    }
}

/// Files of iommufd, and of VFIO's devices by themselves.
const IOMMUFD: &str = "/dev/iommu";
const VFIO_FILES: &str = "/dev/vfio";

/// Device types whose requests or answers hold addresses of guest memory beside those of their descriptors: balloons, GPUs,
/// IOMMUs, memory and persistent memory.
const SPEAKS_OF_MEMORY: [u32; 6] = [5, 13, 16, 23, 24, 27];

/// A name goes into paths, logs and URLs.
fn check_id(id: &str) -> Wrong {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if id.is_empty() || id.len() > ID_BYTES_MAX || !id.bytes().all(plain) {
        return Err(format!("an id has 1 to {ID_BYTES_MAX} letters, digits, dots, hyphens and underscores"));
    }
    Ok(())
}

/// Largest queue behind the IOMMU: descriptors and used ring of this one fill a page each, and what is larger the guest may put
/// together from pages that lie anywhere.
pub const QUEUE_SIZE_BEHIND_MAX: u16 = 256;

fn check_queues(count: Option<u16>, size: Option<u16>) -> Wrong {
    if count.is_some_and(|count| !(1..=QUEUES_MAX).contains(&count)) {
        return Err(format!("num_queues is a number from 1 to {QUEUES_MAX}"));
    }
    if size.is_some_and(|size| !size.is_power_of_two() || !(2..=32768).contains(&size)) {
        return Err("a queue's size is a power of two from 2 to 32768".into());
    }
    Ok(())
}

fn check_unplug(on_failure: OnFailure) -> Wrong {
    if on_failure == OnFailure::Unplug {
        return Err("on_failure=unplug is not supported for PCI devices over vfio-user: error or wait".into());
    }
    Ok(())
}

pub(super) fn check_socket(path: &Path) -> Wrong {
    let bytes = path.as_os_str().len();
    if bytes == 0 {
        return Err("socket needs a path".into());
    }
    if bytes > PATH_BYTES_MAX {
        return Err(format!(
            "the socket path has {bytes} bytes and a UNIX socket holds {PATH_BYTES_MAX}; choose a shorter one"
        ));
    }
    Ok(())
}

impl DiskConfig {
    fn check_kind(&self) -> Wrong {
        match (&self.path, self.vhost_user, &self.vhost_socket) {
            (None, false, None) => return Err("it has no image: give path=FILE, or vhost_user=true,socket=PATH".into()),
            (_, false, Some(_)) => return Err("a socket needs vhost_user=true".into()),
            (_, true, None) => return Err("vhost_user=true needs socket=PATH".into()),
            (_, true, Some(socket)) => {
                let given = [
                    (self.path.is_some(), "path"),
                    (self.image_type.is_some(), "image_type"),
                    (self.backing_files, "backing_files"),
                    (self.readonly, "readonly"),
                    (self.direct, "direct"),
                    (self.serial.is_some(), "serial"),
                    (self.rate_limiter_config.is_some(), "a rate limit"),
                ];
                if let Some((_, key)) = given.into_iter().find(|(given, _)| *given) {
                    return Err(format!("{key} does not go with vhost_user=true: what serves the socket decides that"));
                }
                check_socket(socket)?;
            }
            (Some(_), false, None) if self.backing_files && self.image_type != Some(ImageType::Qcow2) => {
                return Err("backing_files=on needs image_type=qcow2: a raw image names no others".into());
            }
            (Some(_), false, None) => {}
        }
        if self.serial.as_ref().is_some_and(|serial| serial.len() > SERIAL_BYTES_MAX) {
            return Err(format!("serial has at most {SERIAL_BYTES_MAX} bytes"));
        }
        check_queues(self.num_queues, self.queue_size)
    }
}

/// Six bytes, not those of a multicast.
fn check_mac(key: &str, text: &str) -> Wrong {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+')))
        .collect();
    match bytes.as_deref() {
        Some([first, _, _, _, _, _]) if first & 1 == 0 => Ok(()),
        Some([_, _, _, _, _, _]) => Err(format!("{key}={text} is a multicast address: its first byte must be even")),
        _ => Err(format!("{key}={text} is no address: six bytes like 52:54:00:12:34:56 are expected")),
    }
}

/// `[tcp:|udp:]HOSTPORT:GUESTPORT`.
fn check_forward(rule: &str) -> Wrong {
    let ports = rule.strip_prefix("udp:").or_else(|| rule.strip_prefix("tcp:")).unwrap_or(rule);
    let port = |text: &str| text.parse::<u16>().is_ok_and(|port| port > 0) && !text.starts_with('+');
    match ports.split_once(':') {
        Some((host, guest)) if port(host) && port(guest) => Ok(()),
        _ => Err(format!(
            "forward={rule}: HOSTPORT:GUESTPORT or udp:HOSTPORT:GUESTPORT with ports from 1 to 65535 is expected"
        )),
    }
}

impl NetConfig {
    fn check_kind(&self) -> Wrong {
        self.check_way()?;
        let tap = self.tap.is_some() || self.fds.is_some();
        if self.num_queues.is_some_and(|queues| queues == 0 || queues % 2 != 0) {
            return Err("num_queues counts both directions: an even number from 2 on".into());
        }
        check_queues(self.num_queues, self.queue_size)?;
        for (key, mac) in [("mac", &self.mac), ("host_mac", &self.host_mac)] {
            mac.as_deref().map_or(Ok(()), |mac| check_mac(key, mac))?;
        }
        for (key, address) in [("ip", &self.ip), ("mask", &self.mask)] {
            if let Some(text) = address {
                text.parse::<Ipv4Addr>().map_err(|_| format!("{key}={text} is no IPv4 address like 192.168.249.1"))?;
            }
        }
        let made = !self.user && self.switch.is_none() && !self.vhost_user;
        let host_side = self.ip.is_some() || self.mask.is_some() || self.host_mac.is_some();
        if host_side && (!made || self.fds.is_some()) {
            return Err("ip, mask and host_mac are those of a TAP that Atoll opens: they need tap=NAME".into());
        }
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err("mtu is a number from 68 to 65535".into());
        }
        if let Some(name) = &self.tap {
            let odd = |character: char| character == '/' || character.is_whitespace();
            if name.is_empty() || name.len() > INTERFACE_BYTES_MAX || name.contains(odd) {
                return Err(format!(
                    "tap={name}: an interface's name has 1 to {INTERFACE_BYTES_MAX} bytes without slash and space"
                ));
            }
        }
        if tap && self.tap.is_some() && self.fds.is_some() {
            return Err("tap and descriptors exclude each other: give one of them".into());
        }
        if let Some(switch) = &self.switch {
            if switch.contains('/') { check_socket(Path::new(switch))? } else { check_id(switch)? }
        }
        if let Some(socket) = &self.vhost_socket {
            check_socket(socket)?;
        }
        for rule in &self.forward {
            check_forward(rule)?;
        }
        self.check_foreign()
    }

    /// What only a process of this card's own could do.
    fn check_foreign(&self) -> Wrong {
        let (pcap, limit) = (self.pcap.is_some(), self.rate_limiter_config.is_some());
        match (&self.switch, self.vhost_user) {
            (Some(switch), _) if pcap => {
                Err(format!("the switch sees the frames: capture them there, with atoll switch {switch} --pcap FILE"))
            }
            (Some(_), _) if limit => Err("rate limits do not go with switch: limit a card on a TAP instead".into()),
            (None, true) if pcap || limit => {
                Err("pcap and rate limits do not go with vhost_user=true: what serves the socket decides that".into())
            }
            _ => Ok(()),
        }
    }

    fn check_way(&self) -> Wrong {
        let tap = self.tap.is_some() || self.fds.is_some();
        let ways = [tap, self.user, self.switch.is_some(), self.vhost_user];
        if ways.iter().filter(|way| **way).count() > 1 {
            return Err("tap or fds, user, switch and vhost_user exclude each other: give one of them".into());
        }
        if self.vhost_user != self.vhost_socket.is_some() {
            return Err("vhost_user=true and socket=PATH go together".into());
        }
        if !self.forward.is_empty() && !self.user {
            return Err("forward needs user=on".into());
        }
        Ok(())
    }
}
