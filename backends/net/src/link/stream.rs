//! A stream socket that carries frames, each behind its length (four bytes, big endian): how passt and QEMU's `stream`
//! network speak.
//!
//! What the socket does not take of a frame is kept, and no further frame is taken from the guest until it is gone. Frames that come are read in large pieces and wait in memory of
//! ours, a bounded part, until the guest has buffers.

#![allow(unsafe_code, reason = "vectored I/O on guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_kit::Wait;
use atoll_kit::inlet::Buffers;
use atoll_kit::memory::{Direction, Transfer};
use rustix::net::SendFlags;
use vm_memory::GuestMemory;

use super::connector::{Answer, Connector};
use super::iovec::Iovecs;
use super::{Link, Outgoing, Receiver, Sender};
use crate::face::{Face, dropped};
use crate::frame::{Frame, Takes, put};
use crate::header::{ETHERNET_BYTES, FRAME_MAX, Features, Header, Offloads};

/// Bytes before each frame.
const PREFIX_BYTES: usize = 4;
/// What is read at once, and kept at most.
const BUFFER_BYTES: usize = 4 * (FRAME_MAX + PREFIX_BYTES);
/// Frames of one turn; then the conversation is heard.
const TURN: u32 = 128;
/// Pause between two attempts to connect, at first and at most.
const PAUSE: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What to do when the other end is gone and cannot be had again.
pub type Lost = Box<dyn Fn() + Send + Sync>;

/// The connection, if there is one. Both halves use it; the receiving one replaces it.
#[derive(Default)]
struct Shared {
    now: Mutex<Option<Arc<UnixStream>>>,
}

impl Shared {
    fn get(&self) -> Option<Arc<UnixStream>> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, stream: Option<Arc<UnixStream>>) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

enum Origin {
    /// It is connected anew when it breaks.
    Path(Connector),
    /// It was inherited.
    Fd(Lost),
}

/// A stream for a card with one queue pair.
pub struct Stream {
    shared: Arc<Shared>,
    origin: Option<Origin>,
}

impl Stream {
    /// A stream to where `connector` leads.
    pub fn reconnecting(connector: Connector) -> Self {
        Self { shared: Arc::default(), origin: Some(Origin::Path(connector)) }
    }

    /// A connected stream; `lost` is called when its other end is gone.
    pub fn inherited(stream: UnixStream, lost: Lost) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let shared = Shared::default();
        shared.set(Some(Arc::new(stream)));
        Ok(Self { shared: Arc::new(shared), origin: Some(Origin::Fd(lost)) })
    }
}

impl Link for Stream {
    type Sender = StreamSender;
    type Receiver = StreamReceiver;

    fn offers(&self) -> Offloads {
        // There is no place for a header in the stream.
        Offloads::NONE
    }

    fn negotiated(&mut self, _features: Features) {}

    fn sender(&mut self, _pair: u16) -> StreamSender {
        let (shared, transfer) = (Arc::clone(&self.shared), Transfer::default());
        StreamSender { shared, transfer, begun: None, rest: Vec::new(), iovecs: Iovecs::default() }
    }

    fn receiver(&mut self, _pair: u16) -> StreamReceiver {
        StreamReceiver {
            shared: Arc::clone(&self.shared),
            origin: self.origin.take(),
            stream: self.shared.get(),
            asked: false,
            pause: PAUSE,
            not_before: Instant::now(),
            buffer: Box::default(),
            filled: 0,
            taken: 0,
            paid: false,
        }
    }
}

/// The half that writes.
pub struct StreamSender {
    shared: Arc<Shared>,
    transfer: Transfer,
    /// The stream on which a frame was begun whose end lies in `rest`.
    begun: Option<Arc<UnixStream>>,
    rest: Vec<u8>,
    iovecs: Iovecs,
}

impl StreamSender {
    /// Writes what is left of the frame that was begun; true when nothing is left, or nobody wants it any more.
    fn finish(&mut self) -> bool {
        let Some(stream) = &self.begun else { return true };
        while !self.rest.is_empty() {
            match rustix::net::send(stream, &self.rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => drop(self.rest.drain(..sent)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return false,
                // The receiving half notices, too, and connects anew.
                Err(_) => self.rest.clear(),
            }
        }
        self.begun = None;
        true
    }
}

impl Sender for StreamSender {
    type Turn<'a> = &'a mut Self;

    fn turn(&mut self) -> &mut Self {
        self
    }

    fn blocked(&mut self) -> Option<BorrowedFd<'_>> {
        if self.finish() { None } else { self.begun.as_deref().map(AsFd::as_fd) }
    }
}

impl Outgoing for &mut StreamSender {
    fn send<M: GuestMemory>(&mut self, _face: &Face, frame: &Frame<'_, M>) -> bool {
        let Some(stream) = self.shared.get() else { return false };
        if !self.finish()
            || self.transfer.set(frame.mem, frame.chain, frame.at, frame.len, Direction::FromGuest).is_err()
        {
            return false;
        }
        let mut prefix = (frame.len as u32).to_be_bytes();
        let whole = prefix.len() + frame.len as usize;
        let entries_max = libc::UIO_MAXIOV as u32 - 1;
        self.iovecs.clear().add(&mut prefix).add_guest(&self.transfer, entries_max);
        let Some(sent) = send_vectored(stream.as_raw_fd(), self.iovecs.list()) else { return false };
        if sent < whole {
            let mut bytes = Vec::new();
            if frame.copy_out(&mut bytes, frame.len).is_err() {
                return false;
            }
            self.rest.clear();
            self.rest.extend_from_slice(prefix.get(sent..).unwrap_or_default());
            let done = sent.saturating_sub(prefix.len());
            self.rest.extend_from_slice(bytes.get(done..).unwrap_or_default());
            self.begun = Some(stream);
        }
        true
    }

    fn is_blocked(&mut self) -> bool {
        self.blocked().is_some()
    }
}

/// Bytes that the socket took, none when it is broken. That nothing fits now is not broken.
fn send_vectored(fd: RawFd, iovecs: &[libc::iovec]) -> Option<usize> {
    // SAFETY: an all-zero message is a valid one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len();
    // SAFETY: the entries point to the prefix and into guest memory, which stay where they are during the call.
    let sent = unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    match usize::try_from(sent) {
        Ok(sent) => Some(sent),
        Err(_) => (io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock).then_some(0),
    }
}

/// The half that reads, and connects anew.
pub struct StreamReceiver {
    shared: Arc<Shared>,
    origin: Option<Origin>,
    stream: Option<Arc<UnixStream>>,
    /// A connection was asked for.
    asked: bool,
    pause: Duration,
    not_before: Instant,
    buffer: Box<[u8]>,
    /// Bytes in the buffer.
    filled: usize,
    /// Of those, how many were dealt with.
    taken: usize,
    /// The frame that comes next has been counted against the limit.
    paid: bool,
}

impl Receiver for StreamReceiver {
    fn receive<M: GuestMemory>(&mut self, face: &Face, buffers: &mut Buffers<'_, M>) -> Wait {
        if self.stream.is_none() {
            match self.connect() {
                None => face.set_up(true),
                Some(wait) => {
                    face.set_up(false);
                    return wait;
                }
            }
        }
        for _ in 0..TURN {
            match self.next(face) {
                Next::Frame(start, end) => {
                    let frame = self.buffer.get(start..end).unwrap_or_default();
                    let wanted = face.filter.accepts(&frame.first_chunk().copied().unwrap_or_default());
                    if wanted
                        && !std::mem::replace(&mut self.paid, true)
                        && let Err(moment) = face.admit(frame.len() as u64)
                    {
                        self.paid = false;
                        return Wait::Until(moment);
                    }
                    if !wanted {
                        self.taken = end;
                    } else if put(buffers, Takes::of(face), &Header::default(), frame) {
                        face.captures.received.iter().for_each(|capture| capture.frame(frame));
                        self.taken = end;
                        self.paid = false;
                    } else if fits_no_more(face, buffers, frame.len()) {
                        dropped(buffers.figures(), frame.len() as u64);
                        self.taken = end;
                        self.paid = false;
                    } else {
                        return Wait::Buffers;
                    }
                }
                Next::More => match self.read() {
                    Ok(()) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Wait::Source,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return self.broken(&error),
                },
                Next::Nonsense(bytes) => {
                    let reason = format!("a frame of {bytes} bytes was announced");
                    return self.broken(&io::Error::other(reason));
                }
            }
        }
        Wait::Again
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        match (&self.stream, &self.origin) {
            (Some(stream), _) => Some(stream.as_fd()),
            (None, Some(Origin::Path(connector))) => Some(connector.fd()),
            _ => None,
        }
    }
}

/// Whether a frame can never be put into the buffers of this guest: each must fit into one, and there is one.
fn fits_no_more<M: GuestMemory>(face: &Face, buffers: &mut Buffers<'_, M>, len: usize) -> bool {
    let features = face.features();
    let head = features.header_bytes();
    !features.mergeable()
        && buffers.gather(head, 1, head)
        && buffers.room(1).is_some_and(|(_, room)| room.bytes() < head + len as u64)
}

enum Next {
    /// A frame in the buffer, from here to there.
    Frame(usize, usize),
    /// More must be read.
    More,
    /// A length that cannot be.
    Nonsense(u32),
}

impl StreamReceiver {
    fn next(&self, _face: &Face) -> Next {
        let pending = self.buffer.get(self.taken..self.filled).unwrap_or_default();
        let Some((prefix, rest)) = pending.split_first_chunk::<PREFIX_BYTES>() else { return Next::More };
        let bytes = u32::from_be_bytes(*prefix);
        let len = bytes as usize;
        if !(ETHERNET_BYTES..=FRAME_MAX).contains(&len) {
            return Next::Nonsense(bytes);
        }
        let start = self.taken + PREFIX_BYTES;
        if rest.len() < len { Next::More } else { Next::Frame(start, start + len) }
    }

    fn read(&mut self) -> io::Result<()> {
        let Some(stream) = self.stream.clone() else { return Err(io::ErrorKind::NotConnected.into()) };
        if self.buffer.is_empty() {
            self.buffer = vec![0; BUFFER_BYTES].into();
        }
        // What is left of a frame moves to the front: less than one frame.
        self.buffer.copy_within(self.taken..self.filled, 0);
        self.filled -= self.taken;
        self.taken = 0;
        let room = self.buffer.get_mut(self.filled..).unwrap_or_default();
        match rustix::net::recv(&*stream, room, rustix::net::RecvFlags::DONTWAIT)?.0 {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end hung up")),
            bytes => {
                self.filled += bytes;
                self.pause = PAUSE;
                Ok(())
            }
        }
    }

    fn broken(&mut self, error: &io::Error) -> Wait {
        tracing::warn!(%error, "the stream is broken");
        self.shared.set(None);
        self.stream = None;
        (self.filled, self.taken, self.paid) = (0, 0, false);
        self.not_before = Instant::now() + self.pause;
        if let Some(Origin::Fd(lost)) = &self.origin {
            lost();
        }
        Wait::Again
    }

    /// Connects, or says what to wait for.
    fn connect(&mut self) -> Option<Wait> {
        let Some(Origin::Path(connector)) = &self.origin else { return Some(Wait::Nothing) };
        if !self.asked {
            if Instant::now() < self.not_before {
                return Some(Wait::Until(self.not_before));
            }
            if connector.ask().is_err() {
                return Some(Wait::Nothing);
            }
            self.asked = true;
        }
        match connector.answer() {
            Answer::Pending => Some(Wait::Source),
            Answer::Gone => {
                tracing::error!("the process that connects the stream is gone: the link stays down");
                self.asked = false;
                self.origin = None;
                Some(Wait::Nothing)
            }
            Answer::Refused => {
                self.asked = false;
                self.not_before = Instant::now() + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                Some(Wait::Until(self.not_before))
            }
            Answer::Connected(stream) => {
                self.asked = false;
                let stream = Arc::new(stream);
                self.shared.set(Some(Arc::clone(&stream)));
                self.stream = Some(stream);
                tracing::info!("the stream is connected");
                None
            }
        }
    }
}
