//! Bytes over a stream socket that somebody else opened, and descriptors beside them: what every wire here stands on.
//!
//! Each wait has a time limit, made with poll, so the socket's own flags stay as they are: the other holders of the open file
//! description are not surprised. A reader that times out in the middle goes on there the next time; a writer that does has
//! torn the stream and refuses to write again.
//!
//! A reader asks for exactly what it needs next: the kernel joins data with and without descriptors in one receive, so reading
//! ahead would hand a message the descriptors of the next.

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

/// Most descriptors beside one message, on any wire.
pub(crate) const DESCRIPTORS_MAX: usize = 8;
/// Bytes that are asked for at a time: memory for a picture is taken as it comes, not as it is announced.
const PIECE: usize = 256 << 10;
/// Bytes that are kept from one message to the next, at most.
const KEPT_MAX: usize = 16 << 20;

/// Why bytes could not be moved.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StreamError {
    /// The peer closed its end.
    Closed,
    /// Not within the time given.
    Timeout(Duration),
    /// An earlier write ended in the middle.
    Torn,
    /// More descriptors than a message may have.
    Descriptors,
    /// The kernel's error.
    Io(Errno),
}

impl From<Errno> for StreamError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno)
    }
}

/// Why a message could not be moved; `W` says what of it was none.
#[derive(Debug, Error)]
pub enum ChannelError<W: std::error::Error> {
    /// The peer closed its end.
    #[error("the peer has hung up")]
    Closed,
    /// Not within the time given.
    #[error("nothing came or went within {0:?}")]
    Timeout(Duration),
    /// An earlier write ended in the middle of a message.
    #[error("an earlier message was only half written: close this connection")]
    Torn,
    /// More descriptors than a message has.
    #[error("more than {DESCRIPTORS_MAX} descriptors beside one message")]
    Descriptors,
    /// What came is no message.
    #[error(transparent)]
    Wire(W),
    /// The kernel's error.
    #[error("the connection failed: {0}")]
    Io(#[source] Errno),
}

impl<W: std::error::Error> ChannelError<W> {
    /// Whether the peer is gone, rather than slow or wrong.
    #[must_use]
    pub fn is_hang_up(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Io(errno) => is_gone(*errno),
            _ => false,
        }
    }
}

impl<W: std::error::Error> From<StreamError> for ChannelError<W> {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Closed => Self::Closed,
            StreamError::Timeout(limit) => Self::Timeout(limit),
            StreamError::Torn => Self::Torn,
            StreamError::Descriptors => Self::Descriptors,
            StreamError::Io(errno) => Self::Io(errno),
        }
    }
}

/// Whether an error of the kernel's says that the peer is gone.
pub(crate) const fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::CONNRESET | Errno::PIPE | Errno::NOTCONN)
}

/// A limit, and when it is over; none for a wait until something comes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Option<(Duration, Instant)>);

impl Deadline {
    /// So long from now.
    pub(crate) fn after(limit: impl Into<Option<Duration>>) -> Self {
        Self(limit.into().map(|limit| (limit, Instant::now() + limit)))
    }

    /// Waits for the socket, or until this is over.
    pub(crate) fn wait(self, socket: BorrowedFd<'_>, events: PollFlags) -> Result<(), StreamError> {
        let left = match self.0 {
            None => None,
            Some((limit, at)) => {
                let left = at.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(StreamError::Timeout(limit));
                }
                Some(Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }))
            }
        };
        match poll(&mut [PollFd::from_borrowed_fd(socket, events)], left.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// What has come of the next message.
///
/// Memory grows by a piece when what is there is full. Bytes that are given back are received into again: they are filled
/// with zeroes once, not for each message.
#[derive(Debug)]
pub(crate) struct Incoming {
    room: Vec<u8>,
    /// How much of the room is the message's.
    filled: usize,
    descriptors: Vec<OwnedFd>,
    takes_descriptors: bool,
}

impl Incoming {
    /// With the descriptors that come beside it.
    pub(crate) const fn with_descriptors() -> Self {
        Self { room: Vec::new(), filled: 0, descriptors: Vec::new(), takes_descriptors: true }
    }

    /// Bytes alone: the kernel closes the descriptors that come.
    pub(crate) const fn bytes_alone() -> Self {
        Self { room: Vec::new(), filled: 0, descriptors: Vec::new(), takes_descriptors: false }
    }

    /// What is there of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.room.get(..self.filled).unwrap_or_default()
    }

    /// Hands out what is there, and begins anew.
    pub(crate) fn take_bytes(&mut self) -> Vec<u8> {
        let filled = std::mem::take(&mut self.filled);
        if filled < self.room.len() / 2 {
            // The room stays for one that needs it.
            return self.room.get(..filled).unwrap_or_default().to_vec();
        }
        self.room.truncate(filled);
        std::mem::take(&mut self.room)
    }

    /// Takes bytes that nobody needs any more, to receive into.
    pub(crate) fn give_back(&mut self, bytes: Vec<u8>) {
        if self.filled == 0 && self.room.len() < bytes.len() && bytes.len() <= KEPT_MAX {
            self.room = bytes;
        }
    }

    /// Forgets the bytes: what they said is known.
    pub(crate) fn clear(&mut self) {
        self.filled = 0;
    }

    /// Hands out the descriptors.
    pub(crate) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }

    /// Takes what has come without waiting, up to `wanted` bytes in all; whether they are complete.
    pub(crate) fn fill(&mut self, socket: BorrowedFd<'_>, wanted: usize) -> Result<bool, StreamError> {
        while self.filled < wanted {
            match self.take_some(socket, wanted) {
                Ok(()) | Err(StreamError::Io(Errno::INTR)) => {}
                Err(StreamError::Io(Errno::AGAIN)) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn take_some(&mut self, socket: BorrowedFd<'_>, wanted: usize) -> Result<(), StreamError> {
        let have = self.filled;
        let least = wanted.min(have.saturating_add(PIECE));
        if self.room.len() < least {
            self.room.resize(least, 0);
        }
        let end = wanted.min(self.room.len());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut none = [];
        let mut ancillary = RecvAncillaryBuffer::new(if self.takes_descriptors { &mut space } else { &mut none });
        let received = recvmsg(
            socket,
            &mut [IoSliceMut::new(self.room.get_mut(have..end).unwrap_or_default())],
            &mut ancillary,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        );
        // Taken before anything else, so that they are closed whatever comes next.
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        let moved = received.as_ref().map_or(0, |message| message.bytes);
        self.filled = have.saturating_add(moved).min(end);
        let cut = received?.flags.contains(ReturnFlags::CTRUNC) && self.takes_descriptors;
        if cut || self.descriptors.len() > DESCRIPTORS_MAX {
            return Err(StreamError::Descriptors);
        }
        if moved == 0 { Err(StreamError::Closed) } else { Ok(()) }
    }
}

/// What is said of the writing end: whether it has ended in the middle of a message.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    torn: bool,
}

impl Outgoing {
    /// Sends all of `bytes`, and copies of `descriptors` beside the first of them.
    pub(crate) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), StreamError> {
        if self.torn {
            return Err(StreamError::Torn);
        }
        let deadline = Deadline::after(limit);
        let mut rest = bytes;
        while !rest.is_empty() {
            let whole = rest.len() == bytes.len();
            match send_some(socket, rest, if whole { descriptors } else { &[] }) {
                Ok(moved) => rest = rest.get(moved..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Err(error) = deadline.wait(socket, PollFlags::OUT) {
                        self.torn = !whole;
                        return Err(error);
                    }
                }
                Err(errno) => {
                    self.torn = true;
                    return Err(errno.into());
                }
            }
        }
        Ok(())
    }
}

fn send_some(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::TOOBIG);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}
