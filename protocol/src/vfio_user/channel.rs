//! Messages over a stream socket that somebody else opened, with descriptors beside them.
//!
//! Each wait has a time limit, made with poll, so the socket's own flags stay as they are. A reader that times out in the
//! middle of a message goes on there the next time; a writer that does has torn the stream and refuses to write again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::PollFlags;

use super::{DESCRIPTORS_MAX, HEADER_LEN, Header, PAYLOAD_MAX, WireError};
use crate::stream::{self, Deadline, Incoming, Outgoing};

/// Why a message could not be moved.
pub type ChannelError = stream::ChannelError<WireError>;

impl From<WireError> for ChannelError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
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
    /// The message that is coming in: header first, then the rest.
    incoming: Incoming,
    header: Option<Header>,
    outgoing: Outgoing,
}

impl Channel {
    /// Takes a connected stream socket.
    #[must_use]
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        let (incoming, outgoing) = (Incoming::with_descriptors(), Outgoing::default());
        Self { socket: socket.into(), incoming, header: None, outgoing }
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
        let len = u32::try_from(payload.len()).ok().filter(|len| *len <= PAYLOAD_MAX);
        let len = len.ok_or(WireError::Length(u32::MAX))?;
        if descriptors.len() > DESCRIPTORS_MAX {
            return Err(ChannelError::Descriptors);
        }
        let mut bytes = Header { payload: len, ..header }.encode().to_vec();
        bytes.extend(payload);
        Ok(self.outgoing.send(self.socket.as_fd(), &bytes, descriptors, limit)?)
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
                self.header = Some(Header::decode(bytes)?);
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
