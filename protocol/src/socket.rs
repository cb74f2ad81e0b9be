//! Frames over a stream socket that somebody else opened: UNIX (with descriptors) or TCP (without).
//!
//! Each wait has a timeout, made with poll, so the socket's own flags stay as they are: the other holders of the open
//! file description are not surprised. A reader that times out in the middle of a frame goes on there the next time; a
//! writer that does has torn the stream and refuses to write again.
//!
//! A reader takes exactly one header, then exactly one body: the kernel joins data with and without descriptors in one
//! receive, so reading ahead would hand a frame the descriptors of the next.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};
use thiserror::Error;

use crate::frame::{self, FrameError, FrameHeader, HEADER_LEN};
use crate::message::{Kind, Message};

/// Room for the descriptors of any one frame.
const DESCRIPTORS_MAX: usize = 8;

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
        matches!(self, Self::Closed | Self::Cut | Self::Io(Errno::CONNRESET | Errno::PIPE | Errno::NOTCONN))
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
    /// Bytes of the frame that is coming in: header first, then body.
    partial: Vec<u8>,
    header: Option<FrameHeader>,
    descriptors: Vec<OwnedFd>,
}

/// The sending half.
#[derive(Debug)]
pub struct FrameWriter {
    socket: Arc<OwnedFd>,
    torn: bool,
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
            reader: FrameReader {
                socket: Arc::clone(&socket),
                partial: Vec::new(),
                header: None,
                descriptors: Vec::new(),
            },
            writer: FrameWriter { socket, torn: false },
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
        let deadline = timeout.map(|timeout| (timeout, Instant::now() + timeout));
        loop {
            if self.header.is_none()
                && let Ok(bytes) = <&[u8; HEADER_LEN]>::try_from(self.partial.as_slice())
            {
                self.header = Some(FrameHeader::decode(bytes)?);
                self.partial.clear();
            }
            let wanted = match self.header {
                None => HEADER_LEN,
                Some(header) if self.partial.len() == header.length() => return self.finish(header),
                Some(header) => header.length(),
            };
            match self.take_some(wanted) {
                Ok(()) => {}
                Err(SocketError::Io(Errno::AGAIN)) => wait(self.socket.as_fd(), PollFlags::IN, deadline)?,
                Err(SocketError::Io(Errno::INTR)) => {}
                Err(error) => return Err(error),
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

    fn take_some(&mut self, wanted: usize) -> Result<(), SocketError> {
        let have = self.partial.len();
        self.partial.resize(wanted, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            self.socket.as_fd(),
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
            let kind = self.header.map_or(Kind::SidecarOrder, |header| header.kind());
            return Err(FrameError::Descriptors { kind, found: DESCRIPTORS_MAX + 1, allowed: DESCRIPTORS_MAX }.into());
        }
        if moved == 0 {
            let between = self.header.is_none() && self.partial.is_empty();
            return Err(if between { SocketError::Closed } else { SocketError::Cut });
        }
        Ok(())
    }

    fn finish(&mut self, header: FrameHeader) -> Result<Frame, SocketError> {
        self.header = None;
        let body = std::mem::take(&mut self.partial);
        let descriptors = std::mem::take(&mut self.descriptors);
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
        if self.torn {
            return Err(SocketError::Torn);
        }
        let bytes = frame::encode(message, descriptors.len())?;
        let deadline = Some((timeout, Instant::now() + timeout));
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
}

fn send_some(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::TOOBIG);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

fn wait(socket: BorrowedFd<'_>, events: PollFlags, deadline: Option<(Duration, Instant)>) -> Result<(), SocketError> {
    let left = match deadline {
        None => None,
        Some((timeout, deadline)) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(SocketError::Timeout(timeout));
            }
            Some(Timespec::try_from(left).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 }))
        }
    };
    match poll(&mut [PollFd::from_borrowed_fd(socket, events)], left.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
