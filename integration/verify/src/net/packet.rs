//! An end on a network interface of Linux, by a packet socket.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::frame::{ETHERTYPE, FRAME_MAX};
use super::stream::Promise;
use super::talker::{TalkVerdict, Talker};

/// What to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The interface, which must be up.
    pub interface: String,
    /// Everything follows from it; both ends have the same.
    pub seed: u64,
    /// 0 or 1.
    pub me: u8,
    /// Frames beyond what the other end has heard.
    pub window: u64,
    /// How long.
    pub length: Duration,
    /// It ends early when this file is there.
    pub stop: Option<PathBuf>,
    /// How long to wait for the other end to begin, and to end.
    pub grace: Duration,
    /// What to hold the network to.
    pub promise: Promise,
}

/// Talks, and says what was heard.
pub fn run(plan: &Plan) -> io::Result<TalkVerdict> {
    let socket = open(&plan.interface)?;
    let mut talker = Talker::new(plan.seed, plan.me, card(&plan.interface)?, plan.window);
    let start = Instant::now();
    // Time counts from the first word of the other end on.
    let mut close = start + plan.grace + plan.length;
    while !talker.is_done() && Instant::now() < close + plan.grace {
        if talker.heard().frames > 0 {
            close = close.min(Instant::now() + plan.length);
        }
        if plan.stop.as_ref().is_some_and(|path| path.exists()) {
            close = close.min(Instant::now());
        }
        if Instant::now() >= close {
            talker.close();
        }
        let now_ms = || start.elapsed().as_millis() as u64;
        while let Some(frame) = talker.speak(now_ms()) {
            send(&socket, &frame)?;
        }
        let mut buffer = [0; FRAME_MAX + 64];
        while let Some(len) = receive(&socket, &mut buffer)? {
            talker.listen(buffer.get(..len).unwrap_or_default(), now_ms());
        }
        let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&moment))?;
    }
    // The other end may not have heard our last word yet.
    for _ in 0..5 {
        if let Some(frame) = talker.speak(start.elapsed().as_millis() as u64) {
            send(&socket, &frame)?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(talker.verdict(&plan.promise))
}

/// A packet socket, for who moves frames in a loop of its own. A frame that the interface has no room for is lost, as is one
/// that comes while nobody serves the interface.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// On `interface`, which must be up.
    pub fn open(interface: &str) -> io::Result<Self> {
        open(interface).map(Self)
    }

    /// Sends a frame; whether it was taken.
    #[allow(unsafe_code, reason = "packet sockets have no safe wrapper")]
    pub fn send(&self, frame: &[u8]) -> io::Result<bool> {
        // SAFETY: the pointer and the length are those of the frame.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent >= 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            e if matches!(
                e.raw_os_error(),
                Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR | libc::ENETDOWN | libc::EIO)
            ) =>
            {
                Ok(false)
            }
            e => Err(e),
        }
    }

    /// The next frame, if one has come.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        receive(&self.0, buffer)
    }
}

fn card(interface: &str) -> io::Result<[u8; 6]> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{interface}/address"))?;
    let mut address = [0; 6];
    for (byte, word) in address.iter_mut().zip(text.trim().split(':')) {
        *byte = u8::from_str_radix(word, 16).map_err(io::Error::other)?;
    }
    Ok(address)
}

#[allow(unsafe_code, reason = "packet sockets have no safe wrapper")]
fn open(interface: &str) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(interface).map_err(io::Error::other)?;
    // Not by /sys, which may show another network namespace's.
    // SAFETY: the name ends with a zero byte and lives until the call returns.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) }.cast_signed();
    if index == 0 {
        return Err(io::Error::last_os_error());
    }
    let protocol = ETHERTYPE.to_be();
    // SAFETY: no pointers.
    let fd = unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, i32::from(protocol))
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor has just been made and is owned here alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all bit patterns, zeroes too, are addresses.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index;
    // SAFETY: the pointer and the length are those of the address.
    let bound = unsafe {
        let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size)
    };
    if bound == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// Sends one frame, waiting for room.
#[allow(unsafe_code, reason = "packet sockets have no safe wrapper")]
fn send(socket: &OwnedFd, frame: &[u8]) -> io::Result<()> {
    loop {
        // SAFETY: the pointer and the length are those of the frame.
        let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent >= 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR)) => {
                let moment = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
                poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&moment))?;
            }
            e => return Err(e),
        }
    }
}

#[allow(unsafe_code, reason = "packet sockets have no safe wrapper")]
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    // SAFETY: the pointer and the length are those of the buffer.
    let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_TRUNC) };
    match usize::try_from(got) {
        Ok(len) => Ok(Some(len.min(buffer.len()))),
        Err(_) => match io::Error::last_os_error() {
            e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(None),
            e => Err(e),
        },
    }
}
