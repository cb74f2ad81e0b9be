//! Messages of the display wire over a stream socket that somebody else opened.
//!
//! Each wait has a time limit, made with poll, so the socket's own flags stay as they are. A reader that times out in the
//! middle of a message goes on there the next time; a writer that does has torn the stream and refuses to write again. Only a
//! screen takes descriptors (memory for frames); elsewhere the kernel closes those that come.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::PollFlags;

use super::{HEADER_LEN, Header, WireError};
use crate::stream::{self, Deadline, Incoming, Outgoing};

/// Why a message could not be moved.
pub type ChannelError = stream::ChannelError<WireError>;

impl From<WireError> for ChannelError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows.
    pub payload: Vec<u8>,
    /// What came beside it.
    pub descriptors: Vec<OwnedFd>,
}

/// One connection.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
    payload_max: u32,
    /// The message that is coming in: header first, then the rest.
    incoming: Incoming,
    header: Option<Header>,
    outgoing: Outgoing,
}

impl Channel {
    /// Takes a connected stream socket, for an end that takes `payload_max` bytes behind a header.
    #[must_use]
    pub fn new(socket: impl Into<OwnedFd>, payload_max: u32) -> Self {
        let (incoming, outgoing) = (Incoming::bytes_alone(), Outgoing::default());
        Self { socket: socket.into(), payload_max, incoming, header: None, outgoing }
    }

    /// The same for an end that takes descriptors, too.
    #[must_use]
    pub fn with_descriptors(socket: impl Into<OwnedFd>, payload_max: u32) -> Self {
        Self { incoming: Incoming::with_descriptors(), ..Self::new(socket, payload_max) }
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
        Ok(self.outgoing.send(self.socket.as_fd(), messages, &[], limit)?)
    }

    /// Sends a message with a descriptor beside it.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn send_beside(&mut self, message: &[u8], fd: BorrowedFd<'_>, limit: Duration) -> Result<(), ChannelError> {
        Ok(self.outgoing.send(self.socket.as_fd(), message, &[fd], limit)?)
    }

    /// Takes what followed a header and is read, so that the next message is received into it.
    pub fn give_back(&mut self, payload: Vec<u8>) {
        self.incoming.give_back(payload);
    }

    /// Waits for a whole message, `limit` at most.
    ///
    /// # Errors
    /// [`ChannelError`]; after [`ChannelError::Timeout`] it may be called again.
    pub fn receive(&mut self, limit: Duration) -> Result<Message, ChannelError> {
        let deadline = Deadline::after(limit);
        loop {
            if let Some(message) = self.try_receive()? {
                return Ok(message);
            }
            deadline.wait(self.socket.as_fd(), PollFlags::IN)?;
        }
    }

    /// A whole message, if one is there.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn try_receive(&mut self) -> Result<Option<Message>, ChannelError> {
        loop {
            let wanted = self.header.map_or(HEADER_LEN, |header| header.payload as usize);
            if !self.incoming.fill(self.socket.as_fd(), wanted)? {
                return Ok(None);
            }
            if let Some(header) = self.header.take() {
                let (payload, descriptors) = (self.incoming.take_bytes(), self.incoming.take_descriptors());
                return Ok(Some(Message { header, payload, descriptors }));
            }
            if let Ok(bytes) = self.incoming.bytes().try_into() {
                self.header = Some(Header::decode(bytes, self.payload_max)?);
                self.incoming.clear();
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
