//! What a front end says of the addresses that its guest has given to the device (vhost-user, "IOMMU support").
//!
//! Behind an IOMMU rings and requests hold I/O virtual addresses. The front end tells which of them lead where: as answers
//! to questions (IOTLB_MISS), or before anybody asks. What it takes back (INVALIDATE) is acknowledged when no request uses
//! it any more. The `vhost` crate has no such messages; they are taken from the socket before it sees them.
//!
//! A queue's thread that finds no translation asks on the back channel and waits for the answer, no longer than
//! [`ASK_MAX`]. Without an answer, or without leave, the access fails like one outside of memory: the request ends with an
//! error, or the ring rests.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use atoll_devices::iommu::{Access, IovaMap, IovaRange, Mapping, Rights};
use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::Permissions;

use crate::back_channel::BackChannel;

/// VIRTIO_F_ACCESS_PLATFORM: addresses are the IOMMU's.
pub(crate) const ACCESS_PLATFORM: u64 = 1 << 33;
/// Translations that are kept. A front end that gives more is refused.
pub(crate) const ENTRIES_MAX: usize = 1 << 17;
/// How long an answer is waited for. Shorter than any front end waits for a ring to stop.
pub(crate) const ASK_MAX: Duration = Duration::from_secs(1);

/// `struct vhost_iotlb_msg`: three addresses, permissions, type, and what the compiler puts behind them.
pub(crate) const BODY: usize = 32;
const HEADER: usize = 12;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// A message that cannot be right.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum IotlbError {
    /// Its header.
    #[error("an IOTLB message has a header that cannot be right (flags {flags:#x}, {size} bytes)")]
    Header {
        /// Flags of the message.
        flags: u32,
        /// Its length.
        size: u32,
    },
    /// A type that front ends do not send.
    #[error("an IOTLB message of type {0}")]
    Kind(u8),
    /// An empty range, or one beyond the address space.
    #[error("an IOTLB message for {size:#x} bytes at {iova:#x}")]
    Range {
        /// Where it begins.
        iova: u64,
        /// Its length.
        size: u64,
    },
    /// Too many.
    #[error("more than {ENTRIES_MAX} translations")]
    Full,
}

/// What a front end says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// This leads there, at addresses of the front end's.
    Update(Mapping),
    /// Nothing of this holds any longer.
    Invalidate(IovaRange),
}

/// A message, and whether it wants an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) word: Word,
    needs_answer: bool,
}

fn decode(flags: u32, size: u32, body: &[u8; BODY]) -> Result<Message, IotlbError> {
    if flags & VERSION_MASK != VERSION || flags & REPLY != 0 || size as usize != BODY {
        return Err(IotlbError::Header { flags, size });
    }
    let mut longs = body.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
    let mut long = || longs.next().unwrap_or(0);
    let (iova, size, user, rest) = (long(), long(), long(), long());
    let [permissions, kind, ..] = rest.to_le_bytes();
    let range = IovaRange::of_len(iova, size).ok_or(IotlbError::Range { iova, size })?;
    let word = match kind {
        UPDATE => {
            let rights = Rights { read: permissions & 1 != 0, write: permissions & 2 != 0 };
            Word::Update(Mapping::new(range, user, rights).ok_or(IotlbError::Range { iova: user, size })?)
        }
        INVALIDATE => Word::Invalidate(range),
        other => return Err(IotlbError::Kind(other)),
    };
    Ok(Message { word, needs_answer: flags & NEED_REPLY != 0 })
}

/// Takes the message, which is next on the socket.
pub(crate) fn take(mut stream: &UnixStream) -> io::Result<Message> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let [_, _, _, _, f0, f1, f2, f3, s0, s1, s2, s3] = header;
    let (flags, size) = (u32::from_le_bytes([f0, f1, f2, f3]), u32::from_le_bytes([s0, s1, s2, s3]));
    let mut body = [0; BODY];
    if size as usize == BODY {
        stream.read_exact(&mut body)?;
    }
    decode(flags, size, &body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

impl Message {
    /// Answers, if that was agreed on and asked for.
    pub(crate) fn answer(self, mut stream: &UnixStream, agreed: bool, done: bool) -> io::Result<()> {
        if !agreed || !self.needs_answer {
            return Ok(());
        }
        let words = [u32::from(FrontendReq::IOTLB_MSG), VERSION | REPLY, 8, u32::from(!done), 0];
        stream.write_all(&words.map(u32::to_le_bytes).concat())
    }
}

/// The body of a question.
fn question(iova: u64, access: Permissions) -> [u8; BODY] {
    let mut body = [0; BODY];
    body[..8].copy_from_slice(&iova.to_le_bytes());
    // One byte: the front end answers with as much as there is.
    body[8..16].copy_from_slice(&1_u64.to_le_bytes());
    body[24] = access as u8;
    body[25] = MISS;
    body
}

/// The translations of one front end, shared by the conversation and the queues' threads.
#[derive(Debug)]
pub(crate) struct Iotlb {
    map: RwLock<IovaMap>,
    /// Counts changes; who waits for a translation looks again after each.
    changes: Mutex<u64>,
    changed: Condvar,
    channel: BackChannel,
    /// The front end says yes or no to questions.
    acknowledge: AtomicBool,
    misses: AtomicU64,
    invalidations: AtomicU64,
    refused: AtomicU64,
}

impl Iotlb {
    pub(crate) fn new(channel: BackChannel) -> Self {
        Self {
            map: RwLock::new(IovaMap::new(ENTRIES_MAX)),
            changes: Mutex::default(),
            changed: Condvar::new(),
            channel,
            acknowledge: AtomicBool::new(false),
            misses: AtomicU64::new(0),
            invalidations: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Whether the front end answers questions with yes or no.
    pub(crate) fn set_acknowledge(&self, acknowledge: bool) {
        self.acknowledge.store(acknowledge, Ordering::Relaxed);
    }

    /// Takes a word over. Whether something was taken back, so that it has to be waited for those who use it.
    pub(crate) fn hear(&self, word: Word) -> Result<bool, IotlbError> {
        let range = match word {
            Word::Update(mapping) => mapping.iova(),
            Word::Invalidate(range) => range,
        };
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        // Whatever is touched goes as a whole; what of it still holds is asked for again.
        let first = map.within(range).next().map_or(range.first(), |mapping| mapping.iova().first().min(range.first()));
        let last = map.within(range).last().map_or(range.last(), |mapping| mapping.iova().last().max(range.last()));
        let had = match word {
            Word::Update(mapping) => map.within(range).any(|old| *old != mapping),
            Word::Invalidate(_) => map.within(range).next().is_some(),
        };
        if let Some(touched) = IovaRange::new(first, last) {
            // It covers every mapping that it touches.
            let _ = map.unmap(touched);
        }
        let taken = match word {
            Word::Update(mapping) => map.map(mapping).map_err(|_| IotlbError::Full),
            Word::Invalidate(_) => {
                self.invalidations.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        };
        drop(map);
        *self.changes.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
        taken.map(|()| had)
    }

    /// Forgets everything, for the next front end.
    pub(crate) fn clear(&self) {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        *map = IovaMap::new(ENTRIES_MAX);
        let count = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        let (misses, refused) = (count(&self.misses), count(&self.refused));
        let invalidations = count(&self.invalidations);
        if misses + invalidations > 0 {
            tracing::info!(misses, refused, invalidations, "translations of addresses");
        }
    }

    fn known(&self, iova: u64, access: Permissions) -> Option<Mapping> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let permits = |mapping: &&Mapping| {
            (!access.allow(Permissions::Read) || mapping.rights.permit(Access::Read))
                && (!access.allow(Permissions::Write) || mapping.rights.permit(Access::Write))
        };
        map.find(iova).filter(permits).copied()
    }

    /// The translation of `iova` for `access`; asks for it, if need be.
    pub(crate) fn find(&self, iova: u64, access: Permissions) -> Option<Mapping> {
        self.known(iova, access).or_else(|| self.ask(iova, access))
    }

    #[cold]
    fn ask(&self, iova: u64, access: Permissions) -> Option<Mapping> {
        let deadline = Instant::now() + ASK_MAX;
        self.misses.fetch_add(1, Ordering::Relaxed);
        let mut seen = *self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let granted =
            self.channel.ask_translation(&question(iova, access), self.acknowledge.load(Ordering::Relaxed), deadline);
        if !granted {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        loop {
            if let Some(found) = self.known(iova, access) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
            let Some(left) = left else {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return None;
            };
            let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.changed.wait_timeout_while(changes, left, |changes| *changes == seen);
            seen = *waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
