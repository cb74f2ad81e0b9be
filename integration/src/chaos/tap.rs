//! A TAP interface in a network namespace of this process's own: no right on the host is needed, and nothing is left.

#![allow(unsafe_code, reason = "namespaces and ioctls of the TUN driver")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

/// Its name: alone in its namespace.
const NAME: &str = "chaos0";

/// A request with the name of an interface and flags behind it (`struct ifreq`).
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

impl Request {
    fn new(flags: i32) -> Self {
        let mut name = [0; libc::IFNAMSIZ];
        name.iter_mut().zip(NAME.bytes()).for_each(|(to, from)| *to = from);
        Self { name, flags: flags as i16, rest: [0; 22] }
    }

    fn send(&mut self, fd: &impl AsRawFd, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: the requests sent here take a `struct ifreq`, which has 40 bytes, as this has.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(self)) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Moves this process, which must have one thread only, to a network of its own; who is not root becomes so there.
pub fn leave_network() -> Result<()> {
    let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
    let more = if user.is_root() { 0 } else { libc::CLONE_NEWUSER };
    // SAFETY: it changes what this process sees of the system, not its memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNET | more) } < 0 {
        let error = io::Error::last_os_error();
        bail!("no network namespace ({error}): run as root, or where users may have namespaces");
    }
    if more != 0 {
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("0 {} 1", user.as_raw()))?;
        std::fs::write("/proc/self/gid_map", format!("0 {} 1", group.as_raw()))?;
    }
    Ok(())
}

/// An interface that is up, held open as long as this lives.
pub struct Tap {
    descriptor: Arc<OwnedFd>,
}

impl Tap {
    /// Makes it.
    pub fn new() -> Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/net/tun");
        let file = file.context("/dev/net/tun cannot be opened: load the module `tun`")?;
        Request::new(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
            .send(&file, libc::TUNSETIFF)
            .context("no TAP interface")?;
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        let up = libc::IFF_UP | libc::IFF_RUNNING | libc::IFF_NOARP;
        Request::new(up).send(&socket, libc::SIOCSIFFLAGS).context("the TAP interface does not come up")?;
        rustix::io::ioctl_fionbio(&file, true)?;
        Ok(Self { descriptor: Arc::new(file.into()) })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        NAME
    }

    /// What a card is given of it.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.descriptor)
    }
}
