//! The lane: words of the bus through memory that a VMM and a device process on the same host share.
//!
//! A word over a socket costs the kernel a buffer on each side, about as much again as the two wake-ups of a question
//! and its answer. On a lane it costs a copy of 64 bytes; a system call is made only to wake somebody who sleeps. What
//! is said is the same, encoded alike; the socket stays for its end, which each side sees there.
//!
//! The VMM makes the memory (a sealed memfd of [`LANE_BYTES`]) and two eventfds, and sends them beside
//! [`BusCall::Lane`](crate::bus::BusCall::Lane). Each direction is a ring of slots with one writer at a time:
//!
//! - Questions. The device process says in `idle` that it is about to sleep on the first eventfd, the *bell*; whoever
//!   asks takes that back and rings.
//! - Events. A thread of the VMM that waits for its answer counts itself in `waiting` and sleeps on `news`, a futex. While
//!   nobody waits, events ring the second eventfd, the *post*.
//!
//! Everything in the memory is written by the peer whenever it likes. A slot is copied before it is decoded, a position
//! is checked against one's own, and a peer that does not wake whom it should delays nobody but until the deadline.

#![allow(unsafe_code, reason = "maps shared memory, all of which is atomics, and waits on a futex in it")]

use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::thread::futex;
use thiserror::Error;

use crate::bus::{BusEvent, BusRequest};
use crate::frame::{FrameError, decode_body};
use crate::message::Message;

/// Slots of each direction: as many as a machine has vCPUs that could ask at once.
pub const SLOTS: u32 = 256;
const SLOT_WORDS: usize = 8;
/// Bytes of a slot: the length of the word in the first, the word behind it.
pub const SLOT_BYTES: usize = SLOT_WORDS * size_of::<u64>();
/// Bytes of the memory.
pub const LANE_BYTES: usize = size_of::<Memory>();

/// Why a lane cannot be had, or is of no more use.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LaneError {
    /// The memory can change its size under us.
    #[error("the memory of a lane is not sealed against shrinking")]
    Seals,
    /// The memory is too short.
    #[error("the memory of a lane has {0} bytes instead of {LANE_BYTES}")]
    Size(u64),
    /// The kernel's error.
    #[error("the memory of a lane cannot be used: {0}")]
    Io(#[from] Errno),
    /// The peer has read what was not written yet, or written over what was not read.
    #[error("the peer's position on the lane cannot be right")]
    Position,
    /// The peer does not read.
    #[error("the peer leaves {SLOTS} words on the lane unread")]
    Full,
    /// What is in a slot is no word of the bus.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// On a cache line of its own: each is written by one side.
#[derive(Debug)]
#[repr(C, align(64))]
struct Position(AtomicU32);

#[derive(Debug)]
#[repr(C)]
struct Ring {
    written: Position,
    read: Position,
    slots: [[AtomicU64; SLOT_WORDS]; SLOTS as usize],
}

#[derive(Debug)]
#[repr(C)]
struct Memory {
    questions: Ring,
    events: Ring,
    /// 1: the device process sleeps, or is about to.
    idle: Position,
    /// Threads of the VMM that wait for news.
    waiting: Position,
    /// Changes with each announcement.
    news: Position,
}

// The layout is part of the protocol.
const _: () = assert!(
    LANE_BYTES == 2 * (128 + SLOTS as usize * SLOT_BYTES) + 192 && offset_of!(Memory, idle) == LANE_BYTES - 192
);

/// The memory, mapped.
#[derive(Debug)]
pub struct Lane(NonNull<Memory>);

// SAFETY: the mapping belongs to this value alone, and all of it is atomics.
unsafe impl Send for Lane {}
// SAFETY: as above.
unsafe impl Sync for Lane {}

impl Lane {
    /// Maps the memory.
    ///
    /// # Errors
    /// [`LaneError::Seals`], [`LaneError::Size`] and [`LaneError::Io`].
    pub fn map(memory: BorrowedFd<'_>) -> Result<Arc<Self>, LaneError> {
        if !fcntl_get_seals(memory)?.contains(SealFlags::SHRINK) {
            return Err(LaneError::Seals);
        }
        let size = u64::try_from(fstat(memory)?.st_size).unwrap_or(0);
        if size != LANE_BYTES as u64 {
            return Err(LaneError::Size(size));
        }
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe { mmap(std::ptr::null_mut(), LANE_BYTES, protection, flags, memory, 0)? };
        NonNull::new(at.cast()).map(|at| Arc::new(Self(at))).ok_or(LaneError::Io(Errno::FAULT))
    }

    fn memory(&self) -> &Memory {
        // SAFETY: the mapping is as long as a `Memory`, page-aligned, cannot shrink, and lives as long as this value;
        // any bytes are valid atomics.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), LANE_BYTES) };
    }
}

fn write_slot<M: Message>(ring: &Ring, written: &mut u32, message: &M) -> Result<(), LaneError> {
    let unread = written.wrapping_sub(ring.read.0.load(Ordering::Acquire));
    match unread {
        0..SLOTS => {}
        SLOTS => return Err(LaneError::Full),
        _ => return Err(LaneError::Position),
    }
    let mut bytes = [0; SLOT_BYTES];
    let too_long = |length| FrameError::TooLong { kind: M::KIND, name: message.name(), length };
    let length = postcard::to_slice(message, &mut bytes[1..]).map_err(|_| too_long(SLOT_BYTES))?.len();
    // At most 63.
    bytes[0] = length as u8;
    if let Some(slot) = ring.slots.get((*written % SLOTS) as usize) {
        for (word, bytes) in slot.iter().zip(bytes.chunks_exact(8)).take(length / 8 + 1) {
            word.store(u64::from_le_bytes(bytes.try_into().unwrap_or_default()), Ordering::Relaxed);
        }
    }
    *written = written.wrapping_add(1);
    ring.written.0.store(*written, Ordering::Release);
    Ok(())
}

fn read_slot<M: Message>(ring: &Ring, read: &mut u32) -> Result<Option<M>, LaneError> {
    match ring.written.0.load(Ordering::Acquire).wrapping_sub(*read) {
        0 => return Ok(None),
        1..=SLOTS => {}
        _ => return Err(LaneError::Position),
    }
    let mut bytes = [0; SLOT_BYTES];
    if let Some(slot) = ring.slots.get((*read % SLOTS) as usize) {
        for (word, bytes) in slot.iter().zip(bytes.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
    }
    *read = read.wrapping_add(1);
    ring.read.0.store(*read, Ordering::Release);
    let [length, rest @ ..] = &bytes;
    let reason = || FrameError::Body { kind: M::KIND, reason: format!("a slot cannot hold {length} bytes") };
    let body = rest.get(..usize::from(*length)).ok_or_else(reason)?;
    Ok(Some(decode_body(M::KIND, body)?))
}

fn ring_bell(bell: &OwnedFd) {
    // Fails only when it is full, and then whoever it is for has not come to read it.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

/// The VMM's end.
#[derive(Debug)]
pub struct VmmEnd {
    lane: Arc<Lane>,
    bell: OwnedFd,
    post: Arc<OwnedFd>,
    asked: u32,
    heard: u32,
}

impl VmmEnd {
    /// The end of a lane that nobody has used.
    #[must_use]
    pub fn new(lane: Arc<Lane>, bell: OwnedFd, post: OwnedFd) -> Self {
        Self { lane, bell, post: Arc::new(post), asked: 0, heard: 0 }
    }

    /// Becomes readable when something has come that nobody waits for; to be read before [`Self::take`].
    #[must_use]
    pub fn post(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.post)
    }

    /// Asks, and wakes the device process if it sleeps.
    ///
    /// # Errors
    /// [`LaneError::Full`], [`LaneError::Position`] and what the encoder says.
    pub fn ask(&mut self, question: &BusRequest) -> Result<(), LaneError> {
        let memory = self.lane.memory();
        write_slot(&memory.questions, &mut self.asked, question)?;
        // The question before the look at whether somebody sleeps; there it is the other way round.
        fence(Ordering::SeqCst);
        if memory.idle.0.load(Ordering::Relaxed) != 0 {
            memory.idle.0.store(0, Ordering::Relaxed);
            ring_bell(&self.bell);
        }
        Ok(())
    }

    /// The next event, if there is one.
    ///
    /// # Errors
    /// What cannot be right.
    pub fn take(&mut self) -> Result<Option<BusEvent>, LaneError> {
        read_slot(&self.lane.memory().events, &mut self.heard)
    }

    /// A thread begins to wait. What comes from now on is news to it, and to be taken by it.
    #[must_use]
    pub fn watch(&self) -> Watch {
        let memory = self.lane.memory();
        memory.waiting.0.fetch_add(1, Ordering::SeqCst);
        Watch { seen: memory.news.0.load(Ordering::SeqCst), lane: Arc::clone(&self.lane) }
    }
}

/// A thread's wait for news. Once it is dropped, what came meanwhile is to be looked for once more.
#[derive(Debug)]
pub struct Watch {
    lane: Arc<Lane>,
    seen: u32,
}

impl Watch {
    /// News from now on.
    pub fn renew(&mut self) {
        self.seen = self.lane.memory().news.0.load(Ordering::SeqCst);
    }

    /// What to sleep on (a futex that processes share), and the value while there is no news.
    #[must_use]
    pub fn word(&self) -> (&AtomicU32, u32) {
        (&self.lane.memory().news.0, self.seen)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.lane.memory().waiting.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The device process's end.
#[derive(Debug)]
pub struct DeviceEnd {
    lane: Arc<Lane>,
    bell: OwnedFd,
    post: OwnedFd,
    heard: u32,
    said: u32,
    announced: u32,
}

impl DeviceEnd {
    /// The end of a lane that nobody has used: its memory, bell and post, as they came beside the question.
    ///
    /// # Errors
    /// As [`Lane::map`].
    pub fn new(memory: BorrowedFd<'_>, bell: OwnedFd, post: OwnedFd) -> Result<Self, LaneError> {
        Ok(Self { lane: Lane::map(memory)?, bell, post, heard: 0, said: 0, announced: 0 })
    }

    /// The next question, if there is one.
    ///
    /// # Errors
    /// What cannot be right.
    pub fn take(&mut self) -> Result<Option<BusRequest>, LaneError> {
        read_slot(&self.lane.memory().questions, &mut self.heard)
    }

    /// Says something, to be announced.
    ///
    /// # Errors
    /// [`LaneError::Full`], after which it may be said again; what the encoder says.
    pub fn say(&mut self, event: &BusEvent) -> Result<(), LaneError> {
        write_slot(&self.lane.memory().events, &mut self.said, event)
    }

    /// Wakes whoever is to hear what has been said since the last time.
    pub fn announce(&mut self) {
        if self.announced == self.said {
            return;
        }
        self.announced = self.said;
        let memory = self.lane.memory();
        memory.news.0.fetch_add(1, Ordering::SeqCst);
        if memory.waiting.0.load(Ordering::SeqCst) == 0 {
            return ring_bell(&self.post);
        }
        // Fails only for a word that is no memory.
        let _ = futex::wake(&memory.news.0, futex::Flags::empty(), i32::MAX as u32);
    }

    /// To be called before sleeping on the bell; false when a question has come.
    #[must_use]
    pub fn falls_asleep(&self) -> bool {
        let memory = self.lane.memory();
        memory.idle.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let asleep = memory.questions.written.0.load(Ordering::Acquire) == self.heard;
        if !asleep {
            memory.idle.0.store(0, Ordering::Relaxed);
        }
        asleep
    }

    /// What to sleep on: each ring of it is one edge, and it need not be read.
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;
    use crate::bus::{BusAnswer, BusCall};
    use crate::{CauseId, DeviceId, Generation, MsiMessage, RegionIndex, RequestId, Width};

    fn memory(bytes: u64, seals: SealFlags) -> OwnedFd {
        let memory = memfd_create("lane", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memory");
        ftruncate(&memory, bytes).expect("sized");
        fcntl_add_seals(&memory, seals).expect("sealed");
        memory
    }

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
    }

    fn ends() -> (VmmEnd, DeviceEnd) {
        let memory = memory(LANE_BYTES as u64, SealFlags::SHRINK);
        let (bell, post) = (event(), event());
        let copy = |fd: &OwnedFd| fd.try_clone().expect("a copy");
        let device = DeviceEnd::new(memory.as_fd(), copy(&bell), copy(&post)).expect("mapped");
        (VmmEnd::new(Lane::map(memory.as_fd()).expect("mapped"), bell, post), device)
    }

    fn count(event: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }

    fn question(id: u64) -> BusRequest {
        let call = BusCall::Write { region: RegionIndex(255), offset: u64::MAX, width: Width::Qword, value: u64::MAX };
        BusRequest {
            id: RequestId(id),
            cause: CauseId(u64::MAX),
            generation: Generation(u64::MAX),
            budget_us: u32::MAX,
            call,
        }
    }

    fn answer(id: u64) -> BusEvent {
        let (cause, generation) = (CauseId(u64::MAX), Generation(u64::MAX));
        BusEvent::Answer { id: RequestId(id), cause, generation, answer: BusAnswer::Value(u64::MAX) }
    }

    /// The longest words fit; each comes once, in order, around the ring several times; only who sleeps is woken.
    #[test]
    fn conversation() {
        let (mut vmm, mut device) = ends();
        for round in 0..u64::from(SLOTS) * 3 {
            let id = u64::MAX - round;
            assert!(device.falls_asleep());
            vmm.ask(&question(id)).expect("room");
            vmm.ask(&question(id - 1)).expect("room");
            assert_eq!(count(&device.bell), 1, "one ring for both");
            assert_eq!(device.take(), Ok(Some(question(id))));
            assert!(!device.falls_asleep(), "one is left");
            assert_eq!(device.take(), Ok(Some(question(id - 1))));
            assert_eq!(device.take(), Ok(None));
            let message = MsiMessage { address: u64::MAX, data: u32::MAX };
            let msi = BusEvent::Msi { generation: Generation(u64::MAX), cause: CauseId(u64::MAX), message };
            device.say(&msi).expect("room");
            device.say(&answer(id)).expect("room");
            let watch = (round % 2 == 0).then(|| vmm.watch());
            device.announce();
            device.announce();
            assert_eq!(count(&vmm.post), u64::from(watch.is_none()), "the post is for what nobody waits for");
            if let Some((word, seen)) = watch.as_ref().map(Watch::word) {
                assert_ne!(word.load(Ordering::SeqCst), seen, "whoever waits does not sleep");
            }
            assert_eq!(vmm.take(), Ok(Some(msi)));
            assert_eq!(vmm.take(), Ok(Some(answer(id))));
            assert_eq!(vmm.take(), Ok(None));
        }
    }

    #[test]
    fn a_peer_that_does_not_read_is_told_of() {
        let (mut vmm, mut device) = ends();
        for id in 0..u64::from(SLOTS) {
            vmm.ask(&question(id)).expect("room");
            device.say(&answer(id)).expect("room");
        }
        assert_eq!(vmm.ask(&question(0)), Err(LaneError::Full));
        assert_eq!(device.say(&answer(0)), Err(LaneError::Full));
        vmm.take().expect("there");
        device.say(&answer(0)).expect("room again");
    }

    #[test]
    fn memory_that_could_vanish_is_refused() {
        let bytes = LANE_BYTES as u64;
        let map = |memory: OwnedFd| Lane::map(memory.as_fd()).map(drop);
        assert_eq!(map(memory(bytes, SealFlags::GROW)), Err(LaneError::Seals));
        assert_eq!(map(memory(bytes - 1, SealFlags::SHRINK)), Err(LaneError::Size(bytes - 1)));
    }

    #[test]
    fn attach_fits_too() {
        let (mut vmm, _device) = ends();
        let call = BusCall::Attach { device: DeviceId(u32::MAX), generation: Generation(u64::MAX) };
        vmm.ask(&BusRequest { call, ..question(1) }).expect("room");
    }

    proptest! {
        /// A hostile device process writes what it likes, wherever it likes: words, refusals, never a panic and never
        /// more words than slots.
        #[test]
        fn hostile_memory(words in proptest::collection::vec((0..LANE_BYTES / 8, any::<u64>()), 1..200), written in any::<u32>()) {
            let (mut vmm, _device) = ends();
            let at = vmm.lane.0.cast::<AtomicU64>();
            for (index, value) in words {
                // SAFETY: within the mapping.
                unsafe { at.add(index).as_ref() }.store(value, Ordering::Relaxed);
            }
            vmm.lane.memory().events.written.0.store(written, Ordering::Relaxed);
            let mut taken = 0;
            while let Ok(Some(_)) = vmm.take() {
                taken += 1;
                prop_assert!(taken <= SLOTS);
            }
            let _ = vmm.ask(&question(1));
            drop(vmm.watch());
        }
    }
}
