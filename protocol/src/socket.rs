//! Frames over a stream socket that somebody else opened: UNIX (with descriptors) or TCP (without).
//!
//! A reader that times out in the middle of a frame goes on there the next time; a writer that does has torn the stream and
//! refuses to write again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use thiserror::Error;

use crate::frame::{self, FrameError, FrameHeader, HEADER_LEN};
use crate::message::{Kind, Message};
use crate::stream::{self, DESCRIPTORS_MAX, Deadline, Incoming, Outgoing, StreamError};

/// Why a frame could not be moved.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The peer closed its end, between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed its end in the middle of a frame.
    #[error("the peer closed the connection in the middle of a frame")]
    Cut,
    /// Not within the time given. A reader may try again.
    #[error("nothing moved within {0:?}")]
    Timeout(Duration),
    /// An earlier write ended in the middle of a frame; this connection is of no more use.
    #[error("an earlier frame was only half written: close this connection")]
    Torn,
    /// What came, or was to be sent, is not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The kernel's error.
    #[error("the connection failed: {0}")]
    Io(#[from] Errno),
}

impl SocketError {
    /// Whether the peer is gone, rather than slow or wrong.
    #[must_use]
    pub fn is_hang_up(&self) -> bool {
        match self {
            Self::Closed | Self::Cut => true,
            Self::Io(errno) => stream::is_gone(*errno),
            _ => false,
        }
    }
}

/// A frame as it came: not yet decoded, its descriptors owned.
#[derive(Debug)]
pub struct Frame {
    /// Kind of the body.
    pub kind: Kind,
    /// The encoded message.
    pub body: Vec<u8>,
    /// What came beside it, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
}

impl Frame {
    /// The message in it.
    ///
    /// # Errors
    /// As [`frame::decode_body`].
    pub fn decode<M: Message>(&self) -> Result<M, FrameError> {
        frame::decode_body(self.kind, &self.body)
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct FrameReader {
    socket: Arc<OwnedFd>,
    /// The frame that is coming in: header first, then body.
    incoming: Incoming,
    header: Option<FrameHeader>,
}

/// The sending half.
#[derive(Debug)]
pub struct FrameWriter {
    socket: Arc<OwnedFd>,
    outgoing: Outgoing,
}

/// Both halves of one connection.
#[derive(Debug)]
pub struct FrameSocket {
    /// Receives.
    pub reader: FrameReader,
    /// Sends.
    pub writer: FrameWriter,
}

/// Ends a connection from any thread: both halves, and the peer, see a hang-up at once.
#[derive(Clone, Debug)]
pub struct HangUp(Arc<OwnedFd>);

impl HangUp {
    /// Shuts both directions down. Doing it twice, or after the peer has, is no error.
    pub fn hang_up(&self) {
        let _ = shutdown(self.0.as_fd(), Shutdown::Both);
    }
}

impl FrameSocket {
    /// Takes a connected stream socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        let socket = Arc::new(socket);
        Self {
            reader: FrameReader { socket: Arc::clone(&socket), incoming: Incoming::with_descriptors(), header: None },
            writer: FrameWriter { socket, outgoing: Outgoing::default() },
        }
    }

    /// The halves, for two threads.
    #[must_use]
    pub fn split(self) -> (FrameReader, FrameWriter) {
        (self.reader, self.writer)
    }

    /// Sends a message and receives one of another kind: a small conversation.
    ///
    /// # Errors
    /// As [`FrameWriter::send`] and [`FrameReader::receive_message`]; the timeout holds for each.
    pub fn ask<Q: Message, A: Message>(&mut self, question: &Q, timeout: Duration) -> Result<A, SocketError> {
        self.writer.send(question, &[], timeout)?;
        self.reader.receive_message(Some(timeout))
    }
}

impl FrameReader {
    /// Ends the connection from elsewhere.
    #[must_use]
    pub fn hang_up_handle(&self) -> HangUp {
        HangUp(Arc::clone(&self.socket))
    }

    /// Waits for a whole frame: at most `timeout`, or, with `None`, until it comes or the connection ends.
    ///
    /// # Errors
    /// All of [`SocketError`]; after [`SocketError::Timeout`] it may be called again.
    pub fn receive(&mut self, timeout: Option<Duration>) -> Result<Frame, SocketError> {
        let deadline = Deadline::after(timeout);
        loop {
            let wanted = self.header.map_or(HEADER_LEN, |header| header.length());
            let whole = match self.incoming.fill(self.socket.as_fd(), wanted) {
                Ok(whole) => whole,
                Err(error) => return Err(self.name(error)),
            };
            if !whole {
                deadline.wait(self.socket.as_fd(), PollFlags::IN).map_err(|error| self.name(error))?;
            } else if let Some(header) = self.header.take() {
                return self.finish(header);
            } else if let Ok(bytes) = self.incoming.bytes().try_into() {
                self.header = Some(FrameHeader::decode(bytes)?);
                self.incoming.clear();
            }
        }
    }

    /// [`Self::receive`], and decodes a message that has no descriptors.
    ///
    /// # Errors
    /// As there, and what the decoder finds.
    pub fn receive_message<M: Message>(&mut self, timeout: Option<Duration>) -> Result<M, SocketError> {
        Ok(self.receive(timeout)?.decode()?)
    }

    /// What a failure of the stream is to the frame that was coming.
    fn name(&self, error: StreamError) -> SocketError {
        match error {
            StreamError::Closed if self.header.is_none() && self.incoming.bytes().is_empty() => SocketError::Closed,
            StreamError::Closed => SocketError::Cut,
            StreamError::Descriptors => {
                let kind = self.header.map_or(Kind::SidecarOrder, |header| header.kind());
                FrameError::Descriptors { kind, found: DESCRIPTORS_MAX + 1, allowed: DESCRIPTORS_MAX }.into()
            }
            StreamError::Timeout(limit) => SocketError::Timeout(limit),
            StreamError::Torn => SocketError::Torn,
            StreamError::Io(errno) => errno.into(),
        }
    }

    fn finish(&mut self, header: FrameHeader) -> Result<Frame, SocketError> {
        let (body, descriptors) = (self.incoming.take_bytes(), self.incoming.take_descriptors());
        if descriptors.len() != header.descriptors() {
            return Err(FrameError::Descriptors {
                kind: header.kind(),
                found: descriptors.len(),
                allowed: header.descriptors(),
            }
            .into());
        }
        Ok(Frame { kind: header.kind(), body, descriptors })
    }
}

impl AsFd for FrameReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl FrameWriter {
    /// Ends the connection from elsewhere.
    #[must_use]
    pub fn hang_up_handle(&self) -> HangUp {
        HangUp(Arc::clone(&self.socket))
    }

    /// Sends a message, and copies of `descriptors` beside it, within `timeout`.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] and [`FrameError::Descriptors`] before anything moved; all of [`SocketError`].
    pub fn send<M: Message>(
        &mut self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(), SocketError> {
        let bytes = frame::encode(message, descriptors.len())?;
        self.outgoing.send(self.socket.as_fd(), &bytes, descriptors, timeout).map_err(|error| match error {
            StreamError::Timeout(limit) => SocketError::Timeout(limit),
            StreamError::Torn => SocketError::Torn,
            StreamError::Io(errno) => errno.into(),
            // What only a reader is told.
            StreamError::Closed | StreamError::Descriptors => SocketError::Closed,
        })
    }
}
