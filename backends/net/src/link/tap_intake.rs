//! The reading end of a TAP queue, which the threads of both queues of a pair share.
//!
//! What the guest sends is mostly answered at once: the host's stack runs inside of the call that writes a frame, and its
//! answer lies in the TAP when that call returns. So the thread of the transmit queue, which is awake, reads it, and is
//! the one to wait for frames while both queues rest: one thread is woken for a round trip, not two. The thread of the
//! receive queue waits for what only it hears of, which is buffers of the guest and the end of a rate limit's pause; then
//! it reads until there is nothing more, and hands the waiting over.
//!
//! Frames are read by whoever is in the receive queue ([`Inlet`]), so never by two, and stay in their order.
//!
//! How long a frame is, is known only when it has been read. It is read into as many of the guest's buffers as frames
//! needed lately, and what does not fit spills into memory of ours: nothing is cut off, and nothing is copied twice as
//! long as the guess is right.

#![allow(unsafe_code, reason = "vectored I/O on guest memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use atoll_kit::inlet::{Buffers, Inlet};
use atoll_kit::memory::{Direction, GuestRam, Transfer};
use atoll_kit::{Fetched, Wait};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::GuestMemory;

use super::iovec::Iovecs;
use super::tap::Queue;
use crate::face::{Face, dropped};
use crate::header::{FRAME_MAX, HEADER_BYTES};

/// Frames of one turn; then the conversation is heard.
const TURN: u32 = 128;
/// Frames that a TAP keeps at most, mostly (`txqueuelen`), several times.
const DISCARD_MAX: u32 = 1 << 14;
/// A frame of usual length.
const USUAL_BYTES: u64 = 1518;
/// Frames of usual length after which no longer ones are expected.
const CALM: u32 = 256;
/// How long an interface that fails is left alone.
const REST: Duration = Duration::from_millis(500);
/// Most entries of an iovec in one system call, less one for what spills.
pub(super) const IOVECS_MAX: u32 = 1023;

/// The reading end of one queue.
pub(super) struct Intake {
    queue: Arc<Queue>,
    /// The receive queue, once it is open.
    inlet: OnceLock<Arc<Inlet<GuestRam>>>,
    /// Used by who is in the receive queue.
    reader: Mutex<Reader>,
    /// The thread of the transmit queue waits for frames.
    handed: AtomicBool,
    /// Wakes it to do so.
    hand: OwnedFd,
    /// It waits for that.
    waits_for_hand: AtomicBool,
    /// Wakes the thread of the receive queue.
    back: OwnedFd,
}

impl Intake {
    pub(super) fn new(queue: Arc<Queue>) -> io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self {
            queue,
            inlet: OnceLock::new(),
            reader: Mutex::default(),
            handed: AtomicBool::new(false),
            hand: event()?,
            waits_for_hand: AtomicBool::new(false),
            back: event()?,
        })
    }

    fn reader(&self) -> MutexGuard<'_, Reader> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The receive queue can be entered.
    pub(super) fn opened(&self, inlet: &Arc<Inlet<GuestRam>>) {
        let _ = self.inlet.set(Arc::clone(inlet));
    }

    /// The ring has stopped.
    pub(super) fn stopped(&self) {
        self.reader().waiting = None;
    }

    /// Throws away what lies in the TAP. To be called while nobody can be in the receive queue.
    pub(super) fn discard(&self) {
        self.reader().waiting = None;
        // A frame is gone with the first bytes that are read of it, which must be its header. Who sends without a pause is not
        // waited for.
        let mut head = [0; 64];
        for _ in 0..DISCARD_MAX {
            if rustix::io::read(self.queue.file(), &mut head).is_err() {
                break;
            }
        }
    }

    /// On the receive queue's thread: reads, and leaves the waiting for more to the other one.
    pub(super) fn receive<M: GuestMemory>(&self, face: &Face, buffers: &mut Buffers<'_, M>) -> Wait {
        drain(&self.back);
        let wait = self.read(face, buffers);
        if wait == Wait::Source && !self.handed.swap(true, Ordering::SeqCst) {
            signal(&self.hand);
        }
        wait
    }

    /// What the receive queue's thread waits for when there are no frames.
    pub(super) fn back(&self) -> BorrowedFd<'_> {
        self.back.as_fd()
    }

    /// What the transmit queue's thread waits for: frames, or that the waiting for them is handed to it.
    pub(super) fn source(&self) -> BorrowedFd<'_> {
        let handed = self.handed.load(Ordering::SeqCst);
        self.waits_for_hand.store(!handed, Ordering::Relaxed);
        if handed { self.queue.source() } else { self.hand.as_fd() }
    }

    /// On the transmit queue's thread: reads, if it is the one to do so.
    pub(super) fn fetch(&self, face: &Face, readable: bool) -> Fetched {
        // A poll that has not been reported yet would miss what is drained before.
        if readable && self.waits_for_hand.swap(false, Ordering::Relaxed) {
            drain(&self.hand);
        }
        // Whoever comes in between hands it over anew.
        if !self.handed.swap(false, Ordering::SeqCst) {
            return Fetched::default();
        }
        let Some(inlet) = self.inlet.get() else { return Fetched::default() };
        let mut frames = 0;
        let wait = inlet.fill(|buffers| {
            let before = self.reader().frames;
            let wait = self.read(face, buffers);
            frames = self.reader().frames - before;
            if matches!(wait, Wait::Source | Wait::Again) {
                self.handed.store(true, Ordering::SeqCst);
            }
            wait
        });
        let more = wait == Some(Wait::Again);
        match wait {
            Some(Wait::Again) => self.handed.store(true, Ordering::SeqCst),
            Some(Wait::Until(_)) => signal(&self.back),
            // Of buffers the receive queue's thread hears, and of a queue that runs again: it reads then, and hands over.
            Some(Wait::Source | Wait::Buffers | Wait::Nothing) | None => {}
        }
        // A driver that takes frames frees what was sent, too.
        Fetched { tells_guest: frames > 0, more }
    }

    fn read<M: GuestMemory>(&self, face: &Face, buffers: &mut Buffers<'_, M>) -> Wait {
        let wait = self.reader().receive(&self.queue, face, buffers);
        face.captures.received.iter().for_each(|capture| capture.flush());
        wait
    }
}

fn signal(event: &OwnedFd) {
    // It fails only when the count is full, and then the other side is awake.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

fn drain(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0_u8; 8]);
}

/// Reads frames.
#[derive(Default)]
struct Reader {
    transfer: Transfer,
    iovecs: Iovecs,
    spill: Vec<u8>,
    /// A frame of so many bytes (with its header) of which only a part fitted: that part and the rest in `spill`.
    waiting: Option<(u64, u64)>,
    /// How long a frame may be without spilling; zero at first.
    expected: u64,
    calm: u32,
    failures: u64,
    /// Frames that were delivered.
    frames: u64,
    copy: Vec<u8>,
}

impl Reader {
    fn receive<M: GuestMemory>(&mut self, queue: &Queue, face: &Face, buffers: &mut Buffers<'_, M>) -> Wait {
        if !queue.is_attached() {
            queue.forget_wake();
            return if queue.is_attached() { Wait::Again } else { Wait::Source };
        }
        self.expected = self.expected.max(USUAL_BYTES);
        let features = face.features();
        let head = features.header_bytes();
        let chains_max = if features.mergeable() { usize::from(u16::MAX) } else { 1 };
        for _ in 0..TURN {
            if let Some((len, inside)) = self.waiting {
                if !buffers.gather(len, chains_max, head) {
                    if chains_max > 1 {
                        return Wait::Buffers;
                    }
                    // It will never fit.
                    dropped(buffers.figures(), len - head);
                    self.waiting = None;
                    continue;
                }
                if let Err(moment) = face.admit(len - head) {
                    return Wait::Until(moment);
                }
                let rest = self.spill.get(..(len - inside) as usize).unwrap_or_default();
                let _ = buffers.write(buffers.count(len), inside, rest);
                self.waiting = None;
                self.deliver(face, buffers, head, len);
                continue;
            }
            if !buffers.gather(head + self.expected, chains_max, head) && !buffers.gather(head, chains_max, head) {
                return Wait::Buffers;
            }
            match self.read(queue, face, buffers, head) {
                Ok(Read::Frame { len, inside }) if len > inside => {
                    self.expected = FRAME_MAX as u64;
                    self.calm = 0;
                    self.waiting = Some((len, inside));
                }
                Ok(Read::Frame { len, inside }) if face.limiter.is_some() => self.waiting = Some((len, inside)),
                Ok(Read::Frame { len, .. }) => {
                    self.calm = if len > head + USUAL_BYTES { 0 } else { self.calm + 1 };
                    if self.calm >= CALM {
                        self.expected = USUAL_BYTES;
                    }
                    self.deliver(face, buffers, head, len);
                }
                Ok(Read::Unwanted) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Wait::Source,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.failures += 1;
                    if self.failures.is_power_of_two() {
                        tracing::warn!(%error, failures = self.failures, "the TAP interface cannot be read");
                    }
                    return Wait::Until(Instant::now() + REST);
                }
            }
        }
        Wait::Again
    }
}

enum Read {
    /// So many bytes with the header, of which so many lie in the guest's buffers.
    Frame { len: u64, inside: u64 },
    /// A frame that the driver does not want, or none.
    Unwanted,
}

impl Reader {
    /// Reads one frame into the buffers in the hand.
    fn read<M: GuestMemory>(
        &mut self,
        queue: &Queue,
        face: &Face,
        buffers: &mut Buffers<'_, M>,
        head: u64,
    ) -> io::Result<Read> {
        let chains = buffers.count(head + self.expected);
        let Some((mem, room)) = buffers.room(chains) else { return Ok(Read::Unwanted) };
        let bytes = room.bytes();
        if self.transfer.set(mem, room, 0, bytes, Direction::IntoGuest).is_err() {
            // Buffers outside guest memory: given back, empty.
            buffers.finish(chains, 0);
            return Ok(Read::Unwanted);
        }
        self.spill.resize(FRAME_MAX + HEADER_BYTES, 0);
        let inside = self.iovecs.clear().add_guest(&self.transfer, IOVECS_MAX);
        let list = self.iovecs.add(&mut self.spill).list();
        // SAFETY: the entries point into guest memory, which stays mapped while the ring is entered, and to `spill`.
        let read = unsafe { libc::readv(queue.file().as_raw_fd(), list.as_ptr(), list.len() as libc::c_int) };
        if read < 0 {
            return Err(io::Error::last_os_error());
        }
        let len = read.cast_unsigned() as u64;
        let (mem, room) = buffers.room(chains).ok_or(io::ErrorKind::WouldBlock)?;
        self.transfer.landed(mem);
        let mut to = [0; 6];
        let inside = len.min(inside as u64);
        if len < head + 14 {
            return Ok(Read::Unwanted);
        }
        if room.read_at(mem, head, &mut to).is_ok() && !face.filter.accepts(&to) {
            return Ok(Read::Unwanted);
        }
        Ok(Read::Frame { len, inside })
    }

    /// Gives a frame, which lies in the buffers in the hand, to the guest.
    fn deliver<M: GuestMemory>(&mut self, face: &Face, buffers: &mut Buffers<'_, M>, head: u64, len: u64) {
        let chains = buffers.count(len);
        if head == HEADER_BYTES as u64 {
            let _ = buffers.write(chains, head - 2, &(chains as u16).to_le_bytes());
        }
        if !face.captures.received.is_empty()
            && let Some((mem, room)) = buffers.room(chains)
        {
            self.copy.resize((len - head) as usize, 0);
            if room.read_at(mem, head, &mut self.copy).is_ok() {
                face.captures.received.iter().for_each(|capture| capture.frame(&self.copy));
            }
        }
        buffers.finish(chains, len);
        self.frames += 1;
    }
}
