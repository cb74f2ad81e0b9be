//! Messages over a stream socket that somebody else opened, with descriptors beside them.
//!
//! Each wait has a time limit, made with poll, so the socket's own flags stay as they are. A reader that times out in the
//! middle of a message goes on there the next time; a writer that does has torn the stream and refuses to write again.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use super::{DESCRIPTORS_MAX, HEADER_LEN, Header, PAYLOAD_MAX, WireError};

/// Why a message could not be moved.
#[derive(Debug, Error)]
pub enum ChannelError {
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
    Wire(#[from] WireError),
    /// The kernel's error.
    #[error("the connection failed: {0}")]
    Io(#[from] Errno),
}

impl ChannelError {
    /// Whether the peer is gone, rather than slow or wrong.
    #[must_use]
    pub fn is_hang_up(&self) -> bool {
        matches!(self, Self::Closed | Self::Io(Errno::CONNRESET | Errno::PIPE | Errno::NOTCONN))
    }
}

/// A message as it came: what follows its header is not decoded, its descriptors are owned.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows.
    pub payload: Vec<u8>,
    /// What came beside it, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
}

/// One connection.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    /// Bytes of the message that is coming in: header first, then the rest.
    partial: Vec<u8>,
    header: Option<Header>,
    descriptors: Vec<OwnedFd>,
    torn: bool,
}

type Deadline = Option<(Duration, Instant)>;

fn deadline(limit: Option<Duration>) -> Deadline {
    limit.map(|limit| (limit, Instant::now() + limit))
}

impl Channel {
    /// Takes a connected stream socket.
    #[must_use]
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        let (partial, descriptors) = (Vec::new(), Vec::new());
        Self { socket: socket.into(), partial, header: None, descriptors, torn: false }
    }

    /// Ends the connection: both ends see it at once.
    pub fn hang_up(&self) {
        // One that is gone needs no end.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Sends a message, and copies of `descriptors` beside it. The header's length is that of `payload`.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn send(
        &mut self,
        header: Header,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), ChannelError> {
        if self.torn {
            return Err(ChannelError::Torn);
        }
        let len = u32::try_from(payload.len()).ok().filter(|len| *len <= PAYLOAD_MAX);
        let len = len.ok_or(WireError::Length(u32::MAX))?;
        if descriptors.len() > DESCRIPTORS_MAX {
            return Err(ChannelError::Descriptors);
        }
        let mut bytes = Header { payload: len, ..header }.encode().to_vec();
        bytes.extend(payload);
        let deadline = deadline(Some(limit));
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let whole = rest.len() == bytes.len();
            match send_some(self.socket.as_fd(), rest, if whole { descriptors } else { &[] }) {
                Ok(moved) => rest = rest.get(moved..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Err(error) = wait(self.socket.as_fd(), PollFlags::OUT, deadline) {
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

    /// Waits for a whole message, `limit` at most.
    ///
    /// # Errors
    /// [`ChannelError`]; after [`ChannelError::Timeout`] it may be called again.
    pub fn receive(&mut self, limit: Duration) -> Result<Message, ChannelError> {
        let deadline = deadline(Some(limit));
        loop {
            if let Some(message) = self.take_whole()? {
                return Ok(message);
            }
            wait(self.socket.as_fd(), PollFlags::IN, deadline)?;
        }
    }

    /// A whole message, if one is there.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn try_receive(&mut self) -> Result<Option<Message>, ChannelError> {
        self.take_whole()
    }

    /// Takes what is there until a message is whole or nothing more comes.
    fn take_whole(&mut self) -> Result<Option<Message>, ChannelError> {
        loop {
            if self.header.is_none()
                && let Ok(bytes) = <&[u8; HEADER_LEN]>::try_from(self.partial.as_slice())
            {
                self.header = Some(Header::decode(bytes)?);
                self.partial.clear();
            }
            let wanted = match self.header {
                None => HEADER_LEN,
                Some(header) if self.partial.len() == header.payload as usize => {
                    self.header = None;
                    let payload = std::mem::take(&mut self.partial);
                    let descriptors = std::mem::take(&mut self.descriptors);
                    return Ok(Some(Message { header, payload, descriptors }));
                }
                Some(header) => header.payload as usize,
            };
            match self.take_some(wanted) {
                Ok(()) | Err(ChannelError::Io(Errno::INTR)) => {}
                Err(ChannelError::Io(Errno::AGAIN)) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn take_some(&mut self, wanted: usize) -> Result<(), ChannelError> {
        let have = self.partial.len();
        self.partial.resize(wanted, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(self.partial.get_mut(have..).unwrap_or_default())],
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
        self.partial.truncate(have.saturating_add(moved));
        let message = received?;
        if message.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > DESCRIPTORS_MAX {
            return Err(ChannelError::Descriptors);
        }
        if moved == 0 {
            return Err(ChannelError::Closed);
        }
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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

fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Deadline) -> Result<(), ChannelError> {
    let left = match deadline {
        None => None,
        Some((limit, deadline)) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ChannelError::Timeout(limit));
            }
            Some(Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }))
        }
    };
    match poll(&mut [PollFd::from_borrowed_fd(socket, events)], left.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
