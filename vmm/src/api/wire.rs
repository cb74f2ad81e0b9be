//! Bytes and descriptors over a connected UNIX stream socket, each wait with a deadline.
//!
//! Waits are made with poll and every transfer says `MSG_DONTWAIT`, so the flags of the open file description stay as they
//! are: a socket that was inherited may have other holders.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

/// Descriptors beside one request at most: a network card of 32 queue pairs has 32.
pub const DESCRIPTORS_MAX: usize = 64;

/// Bytes taken in one receive at most.
const PIECE: usize = 64 << 10;

/// Why nothing was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum WireError {
    /// The deadline passed.
    #[error("nothing moved within the time given")]
    Late,
    /// More came beside the bytes than there is room for; those that came were closed.
    #[error("more than {DESCRIPTORS_MAX} descriptors beside one request")]
    TooManyDescriptors,
    /// The kernel's error.
    #[error("{0}")]
    Io(#[from] Errno),
}

/// Waits until `events` or a hang-up; `None` waits as long as it takes.
pub(super) fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Option<Instant>) -> Result<(), WireError> {
    let left = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
        Some(Duration::ZERO) => return Err(WireError::Late),
        Some(left) => Some(Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })),
        None => None,
    };
    match poll(&mut [PollFd::from_borrowed_fd(socket, events)], left.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Appends at most `room` bytes to `bytes`, and what came beside them to `descriptors`; gives the number of bytes, zero
/// when the peer will send no more.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut Vec<u8>,
    room: usize,
    descriptors: &mut Vec<OwnedFd>,
    deadline: Option<Instant>,
) -> Result<usize, WireError> {
    loop {
        match receive_now(socket, bytes, room.min(PIECE), descriptors) {
            Err(WireError::Io(Errno::AGAIN)) => wait(socket, PollFlags::IN, deadline)?,
            Err(WireError::Io(Errno::INTR)) => {}
            // The peer went without reading everything: it sends no more either.
            Err(WireError::Io(Errno::CONNRESET)) => return Ok(0),
            other => return other,
        }
    }
}

fn receive_now(
    socket: BorrowedFd<'_>,
    bytes: &mut Vec<u8>,
    room: usize,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, WireError> {
    let have = bytes.len();
    bytes.resize(have.saturating_add(room), 0);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(bytes.get_mut(have..).unwrap_or_default())],
        &mut ancillary,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    );
    // Taken before anything else, so that they are closed whatever comes next.
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(found) = message {
            descriptors.extend(found);
        }
    }
    bytes.truncate(have.saturating_add(received.as_ref().map_or(0, |message| message.bytes)));
    let message = received?;
    if message.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > DESCRIPTORS_MAX {
        descriptors.clear();
        return Err(WireError::TooManyDescriptors);
    }
    Ok(message.bytes)
}

/// Sends all of `bytes`, with copies of `descriptors` beside the first of them: one system call, unless the socket's
/// buffer is too small for that.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), WireError> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let beside = if rest.len() == bytes.len() { descriptors } else { &[] };
        match send_now(socket, rest, beside) {
            Ok(moved) => rest = rest.get(moved..).unwrap_or_default(),
            Err(WireError::Io(Errno::INTR)) => {}
            Err(WireError::Io(Errno::AGAIN)) => wait(socket, PollFlags::OUT, Some(deadline))?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn send_now(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, WireError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(WireError::TooManyDescriptors);
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
}

/// Whether the peer has closed its end altogether; one that only sends no more still listens.
pub(super) fn is_gone(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
        && fds.first().is_some_and(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

/// Whether there is something to be read that nobody has read yet, be it the end.
pub(super) fn has_more(socket: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut [PollFd::from_borrowed_fd(socket, PollFlags::IN)], Some(&now)), Ok(1..))
}
