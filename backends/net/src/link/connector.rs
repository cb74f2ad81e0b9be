//! A small process outside the jail that connects to one socket, again and again.
//!
//! A card that serves may not make sockets. When the other end of its stream goes away, it asks this process, which was
//! forked before the jail closed, for a new connection, and gets it as a descriptor. The process knows one path and no
//! guest memory, obeys nothing but "connect", and ends when the card does.

#![allow(unsafe_code, reason = "fork")]

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// The card's end.
#[derive(Debug)]
pub struct Connector {
    socket: UnixStream,
}

/// What became of a question.
#[derive(Debug)]
pub enum Answer {
    /// A connection.
    Connected(UnixStream),
    /// Nobody listens there.
    Refused,
    /// Not yet.
    Pending,
    /// The process is gone.
    Gone,
}

impl Connector {
    /// Starts the process. There must be no other thread yet.
    pub fn start(path: &Path) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        // SAFETY: there is one thread, so the child may go on as if it had been started anew.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(ours);
                connect_for_ever(&theirs, path);
                // SAFETY: nothing of the parent's must be cleaned up twice.
                unsafe { libc::_exit(0) }
            }
            _ => Ok(Self { socket: ours }),
        }
    }

    /// Asks for a connection.
    pub fn ask(&self) -> io::Result<()> {
        match rustix::io::write(&self.socket, b"c") {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The answer, which comes when [`Connector::fd`] can be read.
    pub fn answer(&self) -> Answer {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Answer::Pending,
            Err(_) => Answer::Gone,
            Ok(received) if received.bytes == 0 => Answer::Gone,
            Ok(_) => {
                let fd = control.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                    _ => None,
                });
                fd.map_or(Answer::Refused, |fd: OwnedFd| Answer::Connected(fd.into()))
            }
        }
    }

    /// Readable when there is an answer.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The life of the process.
fn connect_for_ever(mut card: &UnixStream, path: &Path) {
    // A signal for the card's whole group is for the card: this process ends when the card has.
    // SAFETY: it only changes what signals do.
    unsafe {
        libc::signal(libc::SIGINT, libc::SIG_IGN);
        libc::signal(libc::SIGTERM, libc::SIG_IGN);
        libc::prctl(libc::PR_SET_NAME, c"connector".as_ptr());
    }
    let fd = card.as_fd();
    keep_only(fd);
    while card.read(&mut [0]).is_ok_and(|bytes| bytes == 1) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let stream = UnixStream::connect(path);
        let fds = stream.as_ref().map(|stream| [stream.as_fd()]);
        if let Ok(fds) = &fds {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let answer = [u8::from(fds.is_ok())];
        if rustix::net::sendmsg(card, &[IoSlice::new(&answer)], &mut control, SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}

/// Closes what was inherited: it belongs to the card, and must be gone when the card is.
fn keep_only(keep: BorrowedFd<'_>) {
    use std::os::fd::AsRawFd;
    let keep = keep.as_raw_fd().cast_unsigned();
    // SAFETY: this process uses no other descriptor any more.
    unsafe {
        if keep > 3 {
            libc::syscall(libc::SYS_close_range, 3_u32, keep - 1, 0_u32);
        }
        libc::syscall(libc::SYS_close_range, keep + 1, u32::MAX, 0_u32);
    }
}
