//! Messages of the display wire over a stream socket that somebody else opened.
//!
//! Each wait has a time limit, made with poll, so the socket's own flags stay as they are. A reader that times out in the
//! middle of a message goes on there the next time; a writer that does has torn the stream and refuses to write again. No
//! message here brings descriptors: the kernel closes those that come.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use thiserror::Error;

use super::{HEADER_LEN, Header, WireError};

/// Bytes that are asked for at a time: memory for a picture is taken as it comes, not as it is announced.
const PIECE: usize = 256 << 10;

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

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows.
    pub payload: Vec<u8>,
}

/// One connection.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    payload_max: u32,
    /// Bytes of the message that is coming in: header first, then the rest.
    partial: Vec<u8>,
    header: Option<Header>,
    torn: bool,
}

impl Channel {
    /// Takes a connected stream socket, for an end that takes `payload_max` bytes behind a header.
    #[must_use]
    pub fn new(socket: impl Into<OwnedFd>, payload_max: u32) -> Self {
        Self { socket: socket.into(), payload_max, partial: Vec::new(), header: None, torn: false }
    }

    /// Ends the connection: both ends see it at once.
    pub fn hang_up(&self) {
        // One that is gone needs no end.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Sends whole messages, as [`Request::put`](super::Request::put) and [`Reply::put`](super::Reply::put) write them.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn send(&mut self, messages: &[u8], limit: Duration) -> Result<(), ChannelError> {
        if self.torn {
            return Err(ChannelError::Torn);
        }
        let deadline = Instant::now() + limit;
        let mut rest = messages;
        while !rest.is_empty() {
            match send(&self.socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(moved) => rest = rest.get(moved..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Err(error) = wait(self.socket.as_fd(), PollFlags::OUT, limit, deadline) {
                        self.torn = rest.len() < messages.len();
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
        let deadline = Instant::now() + limit;
        loop {
            if let Some(message) = self.try_receive()? {
                return Ok(message);
            }
            wait(self.socket.as_fd(), PollFlags::IN, limit, deadline)?;
        }
    }

    /// A whole message, if one is there.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn try_receive(&mut self) -> Result<Option<Message>, ChannelError> {
        loop {
            if self.header.is_none()
                && let Ok(bytes) = <&[u8; HEADER_LEN]>::try_from(self.partial.as_slice())
            {
                self.header = Some(Header::decode(bytes, self.payload_max)?);
                self.partial.clear();
            }
            let wanted = match self.header {
                None => HEADER_LEN,
                Some(header) if self.partial.len() == header.payload as usize => {
                    self.header = None;
                    return Ok(Some(Message { header, payload: std::mem::take(&mut self.partial) }));
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
        self.partial.resize(wanted.min(have.saturating_add(PIECE)), 0);
        let room = self.partial.get_mut(have..).unwrap_or_default();
        let received = recv(&self.socket, room, RecvFlags::DONTWAIT).map(|(moved, _)| moved);
        self.partial.truncate(have.saturating_add(received.unwrap_or(0)));
        if received? == 0 { Err(ChannelError::Closed) } else { Ok(()) }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn wait(socket: BorrowedFd<'_>, events: PollFlags, limit: Duration, deadline: Instant) -> Result<(), ChannelError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ChannelError::Timeout(limit));
    }
    let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
    match poll(&mut [PollFd::from_borrowed_fd(socket, events)], Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
