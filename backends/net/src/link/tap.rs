//! A TAP interface of the host. The kernel does what the driver left undone: each frame travels with its header.
//!
//! How long a frame is, is known only when it has been read. It is read into as many of the guest's buffers as frames
//! needed lately, and what does not fit spills into memory of ours: nothing is cut off, and nothing is copied twice as
//! long as the guess is right.

#![allow(unsafe_code, reason = "ioctls of the TUN driver; vectored I/O on guest memory")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use atoll_kit::Wait;
use atoll_kit::inlet::Buffers;
use atoll_kit::memory::{Direction, Transfer};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::GuestMemory;

use super::iovec::Iovecs;
use super::{Link, Outgoing, Receiver, Sender, Spreader};
use crate::face::{Face, dropped};
use crate::frame::Frame;
use crate::header::{FRAME_MAX, Features, HEADER_BYTES, Offloads};

/// Frames of one turn; then the conversation is heard.
const TURN: u32 = 128;
/// A frame of usual length.
const USUAL_BYTES: u64 = 1518;
/// Frames of usual length after which no longer ones are expected.
const CALM: u32 = 256;
/// How long an interface that fails is left alone.
const REST: Duration = Duration::from_millis(500);
/// Most entries of an iovec in one system call, less one for what spills.
const IOVECS_MAX: u32 = 1023;

/// An interface with its queues.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<Arc<Queue>>,
    /// Who switches queues holds it.
    switching: Arc<Mutex<()>>,
    told: Option<(u64, libc::c_int)>,
}

/// One queue. The kernel uses it only while the driver does.
#[derive(Debug)]
struct Queue {
    file: File,
    attached: AtomicBool,
    /// Written to when the queue is switched on.
    wake: OwnedFd,
}

impl Tap {
    /// An interface by its open queues, one for each pair.
    pub fn new(queues: Vec<File>) -> io::Result<Self> {
        let queue = |file| -> io::Result<Arc<Queue>> {
            let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            Ok(Arc::new(Queue { file, attached: AtomicBool::new(true), wake }))
        };
        let queues = queues.into_iter().map(queue).collect::<io::Result<Vec<_>>>()?;
        let tap = Self { queues, switching: Arc::default(), told: None };
        (tap.spreader())(1);
        Ok(tap)
    }
}

fn ioctl<T>(file: &File, request: u64, argument: T) -> io::Result<()> {
    // SAFETY: each request here takes either a number or a pointer to a structure that outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), request as _, argument) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl Link for Tap {
    type Sender = TapSender;
    type Receiver = TapReceiver;

    fn offers(&self) -> Offloads {
        Offloads::ALL
    }

    fn negotiated(&mut self, features: Features) {
        let takes = Offloads::to_driver(features);
        // Segments need checksums there as here.
        let bits = [
            (takes.csum, libc::TUN_F_CSUM),
            (takes.csum && takes.tso4, libc::TUN_F_TSO4),
            (takes.csum && takes.tso6, libc::TUN_F_TSO6),
            (takes.csum && (takes.tso4 || takes.tso6) && takes.ecn, libc::TUN_F_TSO_ECN),
        ];
        let offload = bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        let header = features.header_bytes() as libc::c_int;
        if self.told.replace((u64::from(offload), header)) == Some((u64::from(offload), header)) {
            return;
        }
        for queue in &self.queues {
            let told = ioctl(&queue.file, libc::TUNSETOFFLOAD, libc::c_ulong::from(offload))
                .and_then(|()| ioctl(&queue.file, libc::TUNSETVNETHDRSZ, &raw const header));
            if let Err(error) = told {
                tracing::error!(%error, "the TAP interface does not take what the driver has agreed to");
            }
        }
    }

    fn sender(&mut self, pair: u16) -> TapSender {
        TapSender { queue: self.queues.get(usize::from(pair)).cloned(), transfer: Transfer::default() }
    }

    fn receiver(&mut self, pair: u16) -> TapReceiver {
        TapReceiver {
            queue: self.queues.get(usize::from(pair)).cloned(),
            transfer: Transfer::default(),
            iovecs: Iovecs::default(),
            spill: Vec::new(),
            waiting: None,
            expected: USUAL_BYTES,
            calm: 0,
            failures: 0,
            copy: Vec::new(),
        }
    }

    fn spreader(&self) -> Spreader {
        if self.queues.len() < 2 {
            return Arc::new(|_| {});
        }
        let (queues, switching) = (self.queues.clone(), Arc::clone(&self.switching));
        Arc::new(move |pairs| {
            let _switching = switching.lock().unwrap_or_else(PoisonError::into_inner);
            for (pair, queue) in queues.iter().enumerate() {
                let wanted = pair < usize::from(pairs);
                if queue.attached.load(Ordering::Acquire) != wanted && attach(&queue.file, wanted) {
                    queue.attached.store(wanted, Ordering::Release);
                    let _ = rustix::io::write(&queue.wake, &1_u64.to_ne_bytes());
                }
            }
        })
    }
}

/// Lets the kernel use a queue of the interface, or not.
fn attach(queue: &File, on: bool) -> bool {
    let flags = if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE } as i16;
    let mut request = [0_u8; 40];
    for (to, from) in request.iter_mut().skip(libc::IFNAMSIZ).zip(flags.to_ne_bytes()) {
        *to = from;
    }
    let done = ioctl(queue, libc::TUNSETQUEUE, request.as_mut_ptr());
    if let Err(error) = &done {
        tracing::warn!(%error, on, "a queue of the TAP interface could not be switched");
    }
    done.is_ok()
}

/// One queue of an interface, towards the host.
#[derive(Debug)]
pub struct TapSender {
    queue: Option<Arc<Queue>>,
    transfer: Transfer,
}

impl Sender for TapSender {
    type Turn<'a> = &'a mut Self;

    fn turn(&mut self) -> &mut Self {
        self
    }
}

impl Outgoing for &mut TapSender {
    fn send<M: GuestMemory>(&mut self, face: &Face, frame: &Frame<'_, M>) -> bool {
        let Some(queue) = &self.queue else { return false };
        let whole = face.features().header_bytes() + frame.len;
        if self.transfer.set(frame.mem, frame.chain, 0, whole, Direction::FromGuest).is_err() {
            return false;
        }
        let (iovec, entries) = self.transfer.iovec();
        if entries > IOVECS_MAX {
            return false;
        }
        // SAFETY: the iovec points into guest memory, which stays mapped during the call. What the guest writes there
        // meanwhile is the kernel's to check, as it checks everything that comes through a TAP.
        let written = unsafe { libc::writev(queue.file.as_raw_fd(), iovec, entries as libc::c_int) };
        written.cast_unsigned() == whole as usize
    }
}

/// One queue of an interface, from the host.
pub struct TapReceiver {
    queue: Option<Arc<Queue>>,
    transfer: Transfer,
    iovecs: Iovecs,
    spill: Vec<u8>,
    /// A frame of so many bytes (with its header) of which only a part fitted: that part and the rest in `spill`.
    waiting: Option<(u64, u64)>,
    /// How long a frame may be without spilling.
    expected: u64,
    calm: u32,
    failures: u64,
    copy: Vec<u8>,
}

impl Receiver for TapReceiver {
    fn receive<M: GuestMemory>(&mut self, face: &Face, buffers: &mut Buffers<'_, M>) -> Wait {
        let Some(queue) = &self.queue else { return Wait::Nothing };
        if !queue.attached.load(Ordering::Acquire) {
            let _ = rustix::io::read(&queue.wake, &mut [0_u8; 8]);
            return if queue.attached.load(Ordering::Acquire) { Wait::Again } else { Wait::Source };
        }
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
            match self.read(face, buffers, head) {
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

    fn source(&self) -> Option<BorrowedFd<'_>> {
        let queue = self.queue.as_deref()?;
        Some(if queue.attached.load(Ordering::Acquire) { queue.file.as_fd() } else { queue.wake.as_fd() })
    }

    fn stopped(&mut self) {
        self.waiting = None;
    }
}

enum Read {
    /// So many bytes with the header, of which so many lie in the guest's buffers.
    Frame { len: u64, inside: u64 },
    /// A frame that the driver does not want, or none.
    Unwanted,
}

impl TapReceiver {
    /// Reads one frame into the buffers in the hand.
    fn read<M: GuestMemory>(&mut self, face: &Face, buffers: &mut Buffers<'_, M>, head: u64) -> io::Result<Read> {
        let Some(queue) = &self.queue else { return Err(io::ErrorKind::WouldBlock.into()) };
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
        let read = unsafe { libc::readv(queue.file.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int) };
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
    }
}
