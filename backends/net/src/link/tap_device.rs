//! Opening a TAP interface: by name, or as descriptors that somebody else has opened.

#![allow(unsafe_code, reason = "ioctls of the TUN driver and of network interfaces")]

use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::filter::Mac;

const TUN: &str = "/dev/net/tun";
/// Longest name of an interface.
const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// How long an interface may still be in use. The ring of a process that was killed holds its descriptors until the kernel
/// has taken it down, some time after the process itself is gone.
const LEFT_MAX: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(2);

/// Why a TAP cannot be used. Each says what to do about it.
#[derive(Debug, Error)]
pub enum TapError {
    /// No such name can be.
    #[error("{0:?} is no name for an interface: use 1 to 15 bytes without space, slash and colon")]
    Name(String),
    /// The kernel has no TUN driver, or a container hides it.
    #[error("there is no /dev/net/tun: load the module `tun`, or let the container have the device")]
    NoTun,
    /// The device may not be opened.
    #[error("/dev/net/tun cannot be opened: {0}; this user needs access to it")]
    Device(#[source] io::Error),
    /// It is not there and may not be made.
    #[error(
        "there is no interface {name} and this user may not make one: run `ip tuntap add {name} mode tap user $USER` as root{hint}"
    )]
    Missing {
        /// Its name.
        name: String,
        /// More for several queues.
        hint: &'static str,
    },
    /// It is there and belongs to somebody else.
    #[error("interface {0} may not be used by this user: make it with `ip tuntap add {0} mode tap user $USER`")]
    Forbidden(String),
    /// Somebody else has it open.
    #[error("interface {0} is in use by another process: stop that one or choose another interface")]
    Busy(String),
    /// It is something else: a card of the host, a bridge, a TUN.
    #[error(
        "interface {0} is there and is no TAP: give the name of one, or one that is not taken yet (`ip tuntap add tap0 mode tap \
         user $USER`; to put the guest into {0}'s network, make {0} and a TAP ports of one bridge)"
    )]
    NoTap(String),
    /// It was made for another number of queues.
    #[error(
        "interface {name} cannot be a TAP with {pairs} queue pairs: make it with `ip tuntap add {name} mode tap{flag}`"
    )]
    Shape {
        /// Its name.
        name: String,
        /// Pairs that were asked for.
        pairs: u16,
        /// What it needs.
        flag: &'static str,
    },
    /// A descriptor is not what it should be.
    #[error("descriptor {fd} {what}: pass one opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// What is wrong.
        what: &'static str,
    },
    /// Anything else.
    #[error("cannot {what} interface {name}: {source}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// Its name.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// How the host's end of an interface shall be set up.
#[derive(Debug, Clone, Default)]
pub struct HostEnd {
    /// Its IPv4 address.
    pub ip: Option<Ipv4Addr>,
    /// Its netmask.
    pub mask: Option<Ipv4Addr>,
    /// Its Ethernet address.
    pub mac: Option<Mac>,
    /// Its largest packet.
    pub mtu: Option<u16>,
}

impl HostEnd {
    fn is_empty(&self) -> bool {
        self.ip.is_none() && self.mask.is_none() && self.mac.is_none() && self.mtu.is_none()
    }
}

/// A request with the name of an interface and a value behind it (`struct ifreq`).
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    value: [u8; 24],
}

impl Request {
    fn new(name: &str) -> Self {
        let mut request = Self { name: [0; libc::IFNAMSIZ], value: [0; 24] };
        for (to, from) in request.name.iter_mut().take(NAME_MAX).zip(name.bytes()) {
            *to = from;
        }
        request
    }

    fn with(mut self, value: &[u8]) -> Self {
        for (to, from) in self.value.iter_mut().zip(value) {
            *to = *from;
        }
        self
    }

    fn flags(&self) -> i16 {
        let [a, b, ..] = self.value;
        i16::from_ne_bytes([a, b])
    }

    fn send(&mut self, fd: &impl AsRawFd, request: u64) -> io::Result<()> {
        // SAFETY: all requests sent here take a `struct ifreq`, which has 40 bytes, as this has.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(self)) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Opens all queues of the interface `name`, which is made if that is permitted, and sets up the host's end.
pub fn open(name: &str, pairs: u16, host: &HostEnd) -> Result<Vec<File>, TapError> {
    let bad = |byte: u8| byte.is_ascii_whitespace() || matches!(byte, b'/' | b':' | 0);
    if name.is_empty() || name.len() > NAME_MAX || name.bytes().any(bad) || matches!(name, "." | "..") {
        return Err(TapError::Name(name.to_owned()));
    }
    let existed = exists(name);
    let queues = (0..pairs).map(|_| queue(name, pairs, existed)).collect::<Result<Vec<_>, _>>()?;
    if !existed || !host.is_empty() {
        set_up(name, host)?;
    }
    Ok(queues)
}

fn exists(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

/// Whether the interface of this name is a TAP.
fn is_tap(name: &str) -> bool {
    // A file that only TUN and TAP interfaces have: flags in hexadecimal digits.
    let flags = std::fs::read_to_string(Path::new("/sys/class/net").join(name).join("tun_flags")).unwrap_or_default();
    let flags = i32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap_or(0);
    flags & libc::IFF_TAP != 0
}

fn queue(name: &str, pairs: u16, existed: bool) -> Result<File, TapError> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN).map_err(|e| {
        if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENXIO) {
            TapError::NoTun
        } else {
            TapError::Device(e)
        }
    })?;
    let base = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let attach = |flags: i32| {
        let flags = flags as i16;
        let begun = Instant::now();
        loop {
            match Request::new(name).with(&flags.to_ne_bytes()).send(&file, libc::TUNSETIFF) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && begun.elapsed() < LEFT_MAX => {
                    std::thread::sleep(LOOK);
                }
                attached => return attached,
            }
        }
    };
    let mut attached = attach(if pairs > 1 { base | libc::IFF_MULTI_QUEUE } else { base });
    if pairs == 1 && attached.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
        // It was made for several queues; one of them is enough.
        attached = attach(base | libc::IFF_MULTI_QUEUE);
    }
    attached.map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) if existed => TapError::Forbidden(name.to_owned()),
        Some(libc::EPERM) => TapError::Missing {
            name: name.to_owned(),
            hint: if pairs > 1 { " (with `multi_queue` at its end)" } else { "" },
        },
        Some(libc::EBUSY) => TapError::Busy(name.to_owned()),
        Some(libc::EINVAL) if existed && !is_tap(name) => TapError::NoTap(name.to_owned()),
        Some(libc::EINVAL) => {
            TapError::Shape { name: name.to_owned(), pairs, flag: if pairs > 1 { " multi_queue" } else { "" } }
        }
        _ => TapError::Failed { what: "attach to", name: name.to_owned(), source },
    })?;
    Ok(file)
}

/// Takes over descriptors of an interface's queues.
pub fn adopt(fds: Vec<OwnedFd>) -> Result<Vec<File>, TapError> {
    fds.into_iter()
        .map(|fd| {
            let number = fd.as_raw_fd();
            let wrong = |what| TapError::Descriptor { fd: number, what };
            let mut request = Request::new("");
            request.send(&fd, libc::TUNGETIFF as _).map_err(|_| wrong("is no queue of a TAP interface"))?;
            let flags = i32::from(request.flags());
            if flags & libc::IFF_TAP == 0 {
                return Err(wrong("is a TUN, not a TAP"));
            }
            if flags & libc::IFF_NO_PI == 0 {
                return Err(wrong("was opened without IFF_NO_PI"));
            }
            if flags & libc::IFF_VNET_HDR == 0 {
                return Err(wrong("was opened without IFF_VNET_HDR"));
            }
            rustix::io::ioctl_fionbio(&fd, true).map_err(|_| wrong("cannot be made non-blocking"))?;
            Ok(File::from(fd))
        })
        .collect()
}

/// Brings the host's end up, with the addresses that were asked for.
fn set_up(name: &str, host: &HostEnd) -> Result<(), TapError> {
    let failed = |what| {
        let name = name.to_owned();
        move |source| TapError::Failed { what, name, source }
    };
    // SAFETY: a plain system call; the descriptor is owned on the next line.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(failed("set up")(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was made above and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = |ip: Ipv4Addr| {
        let mut value = [0_u8; 8];
        value[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        value[4..].copy_from_slice(&ip.octets());
        value
    };
    if let Some(mac) = host.mac {
        let mut value = [0_u8; 8];
        value[..2].copy_from_slice(&libc::ARPHRD_ETHER.to_ne_bytes());
        value[2..].copy_from_slice(&mac);
        Request::new(name).with(&value).send(&socket, libc::SIOCSIFHWADDR).map_err(failed("give an address to"))?;
    }
    if let Some(mtu) = host.mtu {
        let value = i32::from(mtu).to_ne_bytes();
        Request::new(name).with(&value).send(&socket, libc::SIOCSIFMTU).map_err(failed("set the MTU of"))?;
    }
    if let Some(ip) = host.ip {
        Request::new(name).with(&address(ip)).send(&socket, libc::SIOCSIFADDR).map_err(failed("give an address to"))?;
    }
    if let Some(mask) = host.mask {
        let sent = Request::new(name).with(&address(mask)).send(&socket, libc::SIOCSIFNETMASK);
        sent.map_err(failed("set the netmask of"))?;
    }
    let mut flags = Request::new(name);
    flags.send(&socket, libc::SIOCGIFFLAGS).map_err(failed("look at"))?;
    let up = flags.flags() | libc::IFF_UP as i16;
    Request::new(name).with(&up.to_ne_bytes()).send(&socket, libc::SIOCSIFFLAGS).map_err(failed("bring up"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_and_descriptors_of_other_things_are_refused() {
        for name in ["", ".", "a/b", "a b", "0123456789abcdef"] {
            assert!(matches!(open(name, 1, &HostEnd::default()), Err(TapError::Name(_))), "{name:?}");
        }
        let file = tempfile::tempfile().unwrap();
        let error = adopt(vec![file.into()]).unwrap_err().to_string();
        assert!(error.contains("is no queue of a TAP") && error.contains("IFF_VNET_HDR"), "{error}");
    }
}
