//! The input wire over a socket that somebody else opened. Nothing here waits: what the other end does not take is lost, and
//! who speaks is told so.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use thiserror::Error;

use super::{FRAME_MAX, Frame, WireError};

/// Why the wire is of no more use.
#[derive(Debug, Error)]
pub enum InputError {
    /// Nobody is at the other end.
    #[error("the other end of the input wire has hung up")]
    Closed,
    /// Half a frame went or came: a stream whose ends are torn.
    #[error("an input frame was cut in its middle: make the pair of sockets SOCK_SEQPACKET")]
    Torn,
    /// What came is no frame.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The kernel's error.
    #[error("the input wire failed: {0}")]
    Io(#[from] Errno),
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// It is on its way.
    Sent,
    /// The other end has not taken what was sent before: this one is lost.
    Lost,
}

/// The end that speaks.
#[derive(Debug)]
pub struct Speaker {
    socket: OwnedFd,
    /// Something was lost, perhaps the word that a key is up: a `Begin` comes first.
    owes_begin: bool,
}

impl Speaker {
    /// Takes a connected socket; the first frame will be a [`Frame::Begin`].
    #[must_use]
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        Self { socket: socket.into(), owes_begin: true }
    }

    /// Whether the other end has lost something, or has not heard of us: what is held down has to be said again.
    #[must_use]
    pub fn owes_begin(&self) -> bool {
        self.owes_begin
    }

    /// Says that we are here, if it has to be said.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn begin(&mut self) -> Result<Spoken, InputError> {
        if !self.owes_begin {
            return Ok(Spoken::Sent);
        }
        let spoken = self.put(&Frame::Begin)?;
        self.owes_begin = spoken == Spoken::Lost;
        Ok(spoken)
    }

    /// Says something, now or never.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn say(&mut self, frame: &Frame) -> Result<Spoken, InputError> {
        let spoken = match self.begin()? {
            Spoken::Sent => self.put(frame)?,
            Spoken::Lost => Spoken::Lost,
        };
        self.owes_begin |= spoken == Spoken::Lost;
        Ok(spoken)
    }

    fn put(&self, frame: &Frame) -> Result<Spoken, InputError> {
        let bytes = frame.encode();
        loop {
            match send(&self.socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) if sent == bytes.len() => return Ok(Spoken::Sent),
                // The kernel takes so few bytes as a whole or not at all.
                Ok(_) => return Err(InputError::Torn),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => return Ok(Spoken::Lost),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Err(InputError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Speaker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Bytes that are asked for at a time: more than one frame, so that a message is never cut.
const PIECE: usize = 16 * FRAME_MAX;

/// The end that listens.
#[derive(Debug)]
pub struct Hearer {
    socket: OwnedFd,
    /// What came and was not looked at; shorter than a piece and a frame.
    heard: Vec<u8>,
    at: usize,
}

impl Hearer {
    /// Takes a connected socket.
    #[must_use]
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        Self { socket: socket.into(), heard: Vec::new(), at: 0 }
    }

    /// Ends the conversation: the other end notices.
    pub fn hang_up(&self) {
        // One that is gone needs no end.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// A frame, if one is there.
    ///
    /// # Errors
    /// [`InputError`]; then nothing more will come.
    pub fn try_hear(&mut self) -> Result<Option<Frame>, InputError> {
        loop {
            let waiting = self.heard.get(self.at..).unwrap_or_default();
            if let Some((frame, len)) = Frame::decode(waiting)? {
                self.at += len;
                return Ok(Some(frame));
            }
            self.heard.drain(..self.at);
            self.at = 0;
            let have = self.heard.len();
            self.heard.resize(have + PIECE, 0);
            let room = self.heard.get_mut(have..).unwrap_or_default();
            let received = recv(&self.socket, room, RecvFlags::DONTWAIT).map(|(count, _)| count);
            self.heard.truncate(have + received.unwrap_or(0));
            match received {
                Ok(0) if have > 0 => return Err(InputError::Torn),
                Ok(0) => return Err(InputError::Closed),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::CONNRESET | Errno::NOTCONN) => return Err(InputError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Hearer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
