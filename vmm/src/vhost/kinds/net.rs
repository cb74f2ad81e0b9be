//! Network cards: virtio-net in front; `atoll-net` on a TAP, a switch of this user, or anybody's vhost-user backend behind
//! (virtio 1.2, 5.1).

use std::ffi::OsString;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use atoll_devices::virtio::DeviceOffer;
use atoll_devices::virtio::device_class::NET;
use atoll_devices::virtio::input_config::Pages;
use atoll_protocol::sidecar::DeviceClass as SidecarClass;
use thiserror::Error;

use super::limits::rate_arguments;
use super::tap::NamedTap;
use super::user::UserMode;
use super::{Host, Kind, KindError, queue_size};
use crate::backend::PassedFd;
use crate::config::NetConfig;
use crate::vhost::class::{ConfigWish, DeviceClass, config_lengths, too_few_queues};
use crate::vhost::error::ConversationError;
use crate::vhost::session::Capabilities;
use crate::vhost::source::{BackendSource, ExternalSocket};
use crate::vhost::upgrade::Lone;

const QUEUE_SIZE: u16 = 256;
/// Most queue pairs of a card.
pub(super) const PAIRS_MAX: u16 = 8;

/// Offsets in the configuration space (virtio 1.2, 5.1.4).
const STATUS_AT: usize = 6;
const PAIRS_AT: usize = 8;
const MTU_AT: usize = 10;
const CONFIG_LEN: usize = 12;

/// Feature bits (virtio 1.2, 5.1.3).
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const STATUS: u64 = 1 << 16;
const CONTROL_QUEUE: u64 = 1 << 17;
const MULTI_QUEUE: u64 = 1 << 22;
/// What needs the control queue: offloads at run time, receive modes, VLAN filter, more modes, announcements, multi-queue,
/// MAC, coalescing, hash report, RSS.
const NEED_CONTROL_QUEUE: u64 = CONTROL_QUEUE
    | 1 << 2
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 21
    | MULTI_QUEUE
    | 1 << 23
    | 1 << 52
    | 1 << 53
    | 1 << 57
    | 1 << 60;

/// What is wrong with a card's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NetError {
    /// Not an address.
    #[error(
        "mac={0} is no address of one network card: give six bytes as in 52:54:00:12:34:56, the first of them even"
    )]
    Mac(String),
    /// Too many or too few queues.
    #[error("num_queues={0} is not possible: it counts both directions, an even number from 2 to {max}", max = 2 * PAIRS_MAX)]
    Queues(u16),
    /// Other descriptors than queue pairs.
    #[error("{descriptors} TAP descriptors came for {pairs} queue pairs: send one for each pair of num_queues")]
    Descriptors {
        /// How many came.
        descriptors: usize,
        /// How many are needed.
        pairs: u16,
    },
}

/// Address of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vhost) struct Mac([u8; 6]);

impl FromStr for Mac {
    type Err = NetError;
    fn from_str(text: &str) -> Result<Self, NetError> {
        let wrong = || NetError::Mac(text.into());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        // A group address names no card.
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// FNV-1a: stable over builds, unlike the standard library's hash.
fn hash(parts: [&str; 2]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

impl Mac {
    /// An address for a card that was given none: locally administered, the same for a VM's device at every start.
    pub(in crate::vhost) fn made_up(vm: &str, device: &str) -> Self {
        let [a, b, c, d, e, ..] = hash([vm, device]).to_le_bytes();
        Self([0x52, a, b, c, d, e])
    }
}

/// What a card is plugged into.
enum Way {
    /// An interface of the host, by name.
    Tap(String),
    /// An interface of the host, open already.
    Descriptors(Vec<Arc<OwnedFd>>),
    /// Nothing that needs rights: passt.
    User(UserMode),
    /// A port of a switch of ours that listens there.
    Switch(PathBuf),
    /// Somebody else's backend.
    Foreign(PathBuf),
}

/// A network card as it is configured, checked.
pub(in crate::vhost) struct Net {
    way: Way,
    mac: Mac,
    pairs: u16,
    config: NetConfig,
}

/// Where the switch of this name listens, in a user's run-time folder. A name with a slash is a path.
pub fn switch_socket(runtime_dir: &Path, name: &str) -> PathBuf {
    if name.contains('/') { PathBuf::from(name) } else { runtime_dir.join("switches").join(format!("{name}.sock")) }
}

impl Net {
    /// Takes a card that was checked ([`crate::config::DeviceConfig::check`]), of the VM `vm` whose device is called `id`.
    pub(in crate::vhost) fn new(config: &NetConfig, vm: &str, id: &str, runtime_dir: &Path) -> Result<Self, NetError> {
        let given = config.num_queues.unwrap_or(2);
        if !given.is_multiple_of(2) || !(1..=PAIRS_MAX).contains(&(given / 2)) {
            return Err(NetError::Queues(given));
        }
        let pairs = given / 2;
        let mac = match &config.mac {
            Some(text) => text.parse()?,
            None => Mac::made_up(vm, id),
        };
        let way = if let Some(socket) = &config.vhost_socket {
            Way::Foreign(socket.clone())
        } else if config.user {
            let through_net = config.pcap.is_some() || config.rate_limiter_config.is_some() || pairs > 1;
            Way::User(UserMode { forward: config.forward.clone(), mtu: config.mtu, through_net })
        } else if let Some(name) = &config.switch {
            Way::Switch(switch_socket(runtime_dir, name))
        } else if config.fds.is_some() || !config.descriptors.0.is_empty() {
            let descriptors = config.descriptors.0.clone();
            if descriptors.len() != usize::from(pairs) {
                return Err(NetError::Descriptors { descriptors: descriptors.len(), pairs });
            }
            Way::Descriptors(descriptors)
        } else {
            // An interface of its own has a name that a successor finds again.
            let made_up = || format!("atoll{:08x}", hash([vm, id]) as u32);
            Way::Tap(config.tap.clone().unwrap_or_else(made_up))
        };
        Ok(Self { way, mac, pairs, config: config.clone() })
    }

    /// How the host's end of an interface that is opened here shall be.
    fn host_end(&self) -> Vec<OsString> {
        let host_end = [("--host-ip", &self.config.ip), ("--host-mac", &self.config.host_mac)];
        // A mask without an address says nothing.
        let mask = self.config.ip.is_some().then_some(("--host-mask", &self.config.mask));
        let mtu = self.config.mtu.map(|mtu| mtu.to_string());
        let told = host_end.into_iter().chain(mask).chain([("--mtu", &mtu)]);
        told.flat_map(|(flag, value)| value.iter().flat_map(move |value| [flag.into(), value.into()])).collect()
    }

    fn arguments(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> =
            vec!["--queue-pairs".into(), self.pairs.to_string().into(), "--mac".into(), self.mac.to_string().into()];
        if let Some(mtu) = self.config.mtu {
            args.extend(["--mtu".into(), mtu.to_string().into()]);
        }
        if let Some(pcap) = &self.config.pcap {
            args.extend(["--pcap".into(), pcap.into()]);
        }
        if let Some(limits) = &self.config.rate_limiter_config {
            args.extend(rate_arguments(limits));
        }
        args
    }
}

impl Kind for Net {
    fn shown(&self) -> String {
        match &self.way {
            Way::Tap(name) => format!("--net tap={name}"),
            Way::Descriptors(_) => "--net fds".into(),
            Way::Switch(socket) => format!("--net switch={}", socket.display()),
            Way::User(_) => "--net user=on".into(),
            Way::Foreign(socket) => format!("--net socket={}", socket.display()),
        }
    }
    fn class(&self) -> Box<dyn DeviceClass> {
        Box::new(NetClass {
            mac: self.mac,
            pairs: self.pairs,
            mtu: self.config.mtu,
            size: queue_size(self.config.queue_size, QUEUE_SIZE),
            foreign: matches!(self.way, Way::Foreign(_)),
            told_mac: matches!(self.way, Way::Tap(_) | Way::Descriptors(_) | Way::User(_)),
        })
    }
    fn sidecar(&self) -> SidecarClass {
        SidecarClass::Net
    }
    fn own_queues(&self) -> Option<u16> {
        let ours = match &self.way {
            Way::Tap(_) | Way::Descriptors(_) => true,
            Way::User(wish) => wish.through_net,
            Way::Switch(_) | Way::Foreign(_) => false,
        };
        ours.then_some(2 * self.pairs + 1)
    }
    fn lone(&self) -> Option<Lone> {
        match self.way {
            Way::User(_) => Some(Lone::User),
            Way::Tap(_) | Way::Descriptors(_) | Way::Switch(_) | Way::Foreign(_) => None,
        }
    }
    fn source(&self, host: &Host) -> Result<Box<dyn BackendSource>, KindError> {
        let args = self.arguments();
        let descriptors = match &self.way {
            Way::Switch(socket) | Way::Foreign(socket) => return Ok(Box::new(ExternalSocket::new(socket))),
            Way::Tap(name) => {
                let tap = NamedTap::open(name, self.pairs, self.host_end(), host)?;
                return host.process("atoll-net", self.sidecar(), args, Box::new(move || Ok(tap.queues()?)));
            }
            Way::Descriptors(descriptors) => descriptors.clone(),
            Way::User(wish) => {
                let net = |descriptors| host.process("atoll-net", self.sidecar(), args, descriptors);
                return super::user::source(wish, host, net);
            }
        };
        let pass = move || {
            let copies = descriptors.iter().map(|fd| Ok(PassedFd { flag: "--fd".into(), fd: fd.try_clone()? }));
            Ok(copies.collect::<std::io::Result<Vec<_>>>()?)
        };
        host.process("atoll-net", self.sidecar(), args, Box::new(pass))
    }
}

/// What makes a network card of a vhost-user device.
struct NetClass {
    mac: Mac,
    pairs: u16,
    mtu: Option<u16>,
    size: u16,
    /// The backend is not ours: it has a control queue in its features at most, since its usual front ends serve that
    /// queue themselves.
    foreign: bool,
    /// The backend knows the address by its command line.
    told_mac: bool,
}

impl DeviceClass for NetClass {
    fn device_type(&self) -> u16 {
        NET
    }
    fn config(&self) -> ConfigWish {
        ConfigWish::AnyOf(config_lengths(NET))
    }
    fn offer(&self, backend: &Capabilities) -> Result<DeviceOffer, ConversationError> {
        let mut features = backend.features;
        if self.foreign || features & CONTROL_QUEUE == 0 {
            features &= !NEED_CONTROL_QUEUE;
        }
        let told = backend.config.get(PAIRS_AT..).and_then(|rest| rest.first_chunk::<2>());
        let pairs = match told {
            _ if features & MULTI_QUEUE == 0 => 1,
            Some(bytes) => u16::from_le_bytes(*bytes).min(self.pairs),
            None => 1,
        };
        if pairs < self.pairs {
            tracing::warn!(asked = 2 * self.pairs, served = 2 * pairs, "the network backend serves fewer queues");
        }
        if pairs == 1 {
            features &= !MULTI_QUEUE;
        }
        let control = u16::from(features & CONTROL_QUEUE != 0);
        // Some count pairs and some count queues; fewer than pairs is too few for both.
        if let Some(has) = backend.queues.filter(|has| *has < pairs) {
            return Err(too_few_queues(usize::from(2 * pairs), has));
        }
        let mut config = vec![0; CONFIG_LEN];
        for (to, from) in config.iter_mut().zip(&backend.config) {
            *to = *from;
        }
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = config.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        put(0, &self.mac.0);
        put(PAIRS_AT, &pairs.to_le_bytes());
        features |= MAC;
        if let Some(mtu) = self.mtu {
            put(MTU_AT, &mtu.to_le_bytes());
            features |= MTU;
        }
        if backend.config.len() < STATUS_AT + 2 {
            // The link is up for a driver that is not told otherwise.
            features &= !STATUS;
        }
        if backend.config.len() < MTU_AT + 2 && self.mtu.is_none() {
            features &= !MTU;
        }
        let queues = 2 * pairs + control;
        Ok(DeviceOffer {
            device_type: NET,
            features,
            queue_sizes: vec![self.size; usize::from(queues)],
            config,
            pages: Pages::default(),
        })
    }
    fn imprint(&self, backend: &Capabilities) -> Option<(u32, Vec<u8>)> {
        let knows = self.told_mac || self.foreign || backend.config.is_empty();
        (!knows).then(|| (0, self.mac.0.into()))
    }
    fn in_order(&self) -> bool {
        // Frames may be lost or repeated around a death; no descriptor is.
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::upgrade::UpgradeError;

    #[test]
    fn addresses_are_read_strictly() {
        assert_eq!("52:54:00:12:34:56".parse::<Mac>().unwrap().to_string(), "52:54:00:12:34:56");
        for text in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "53:54:00:12:34:56", "5:54:00:12:34:56", "00:00:00:00:00:00"]
        {
            assert_eq!(text.parse::<Mac>(), Err(NetError::Mac(text.into())));
        }
        let made_up = Mac::made_up("vm", "_net0");
        assert_eq!(made_up, Mac::made_up("vm", "_net0"));
        assert!(made_up != Mac::made_up("vm", "_net1") && made_up != Mac::made_up("vm_", "net0"));
        assert_eq!(made_up.0[0] & 3, 2, "locally administered, one card's");
    }

    /// An operator who wants to upgrade a card that has one process at a time hears why, and what to do.
    #[test]
    fn a_card_with_one_process_at_a_time_says_why() {
        let lone = |config: NetConfig| Net::new(&config, "vm", "_net0", Path::new("/run")).unwrap().lone();
        let tap = lone(NetConfig { tap: Some("tap0".into()), ..NetConfig::default() });
        let user = lone(NetConfig { user: true, ..NetConfig::default() });
        assert_eq!((tap, user), (None, Some(Lone::User)));
        for (lone, remedy) in [(Lone::User, "unplug"), (Lone::Foreign, "where the old one listened")] {
            let told = UpgradeError::from(lone).to_string();
            assert!(told.contains(remedy), "{told}");
        }
    }
}
