//! What a successor of this process needs to know, in memory that outlives it: a memfd of the supervisor's.
//!
//! | page | what | who writes it |
//! |---|---|---|
//! | 0 | magic, how much is under way and was done; registers, features | this process |
//! | 1 | the doorbells, as they were rung, laid out as in BAR 0 | whoever rings them, also while there is no process |
//! | 2 | the doorbells, as they were seen | this process |
//! | 3 … | queues; commands that were fetched and not completed | this process |
//!
//! Every field is an atomic, so that nothing of what stands there (a predecessor died at any moment, or meant harm) is more
//! than a wrong number; it is checked where it is used. Nothing here decides: the order of the stores is `queues`' affair.

#![allow(unsafe_code, reason = "a structure in shared memory")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use thiserror::Error;

use crate::spec::Command;

/// Most I/O queues, of each kind.
pub const QUEUES_MAX: usize = 64;
/// Those and the admin queue.
pub const QUEUES: usize = QUEUES_MAX + 1;
/// Most commands under way at a time.
pub const SLOTS: usize = 1024;
/// Bytes of the record.
pub const RECORD_LEN: usize = size_of::<Layout>();
/// Where the doorbells are in it.
pub const DOORBELLS_AT: u64 = 0x1000;

const MAGIC: u64 = u64::from_le_bytes(*b"atnvme\0\x01");
const DOORBELLS: usize = 1024;

/// The record was refused.
#[derive(Debug, Error)]
pub enum RecordError {
    /// It could be cut while it is mapped, or is too short.
    #[error("the record must be a memfd of at least {RECORD_LEN} bytes that is sealed against shrinking")]
    Unsealed,
    /// It could not be made or mapped.
    #[error("cannot make or map the record: {0}")]
    Host(#[from] io::Error),
}

/// A submission queue.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Submission {
    /// Entries; zero for a queue that is not there.
    pub size: AtomicU32,
    /// Its completion queue.
    pub completion: AtomicU32,
    /// Where it is.
    pub base: AtomicU64,
    /// Commands that were taken out of it; its head is that modulo its size.
    pub fetched: AtomicU64,
}

/// A completion queue.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct CompletionQueue {
    /// Entries; zero for a queue that is not there.
    pub size: AtomicU32,
    /// Its vector.
    pub vector: AtomicU32,
    /// It interrupts.
    pub interrupts: AtomicU32,
    /// The last head that could be right.
    pub head: AtomicU32,
    /// Where it is.
    pub base: AtomicU64,
    /// Completions that were put into it; its tail is that modulo its size.
    pub produced: AtomicU64,
}

/// Nothing is in a slot.
pub const FREE: u32 = 0;
/// A command was fetched.
pub const TAKEN: u32 = 1;
/// Its completion is being written.
pub const ANSWERED: u32 = 2;

/// A command that was fetched.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Slot {
    /// [`FREE`], [`TAKEN`] or [`ANSWERED`].
    pub state: AtomicU32,
    /// Its submission queue.
    pub queue: AtomicU32,
    /// How many were fetched from that queue before it.
    pub number: AtomicU64,
    /// How many were put into the completion queue before its answer.
    pub position: AtomicU64,
    /// Its answer.
    pub status: AtomicU32,
    /// The same.
    pub result: AtomicU32,
    command: [AtomicU32; 16],
}

impl Slot {
    /// The command.
    pub fn command(&self) -> Command {
        let mut words = [0; 16];
        for (word, from) in words.iter_mut().zip(&self.command) {
            *word = from.load(Ordering::Relaxed);
        }
        Command(words)
    }
    /// Writes it down.
    pub fn set_command(&self, command: &Command) {
        for (to, word) in self.command.iter().zip(&command.0) {
            to.store(*word, Ordering::Relaxed);
        }
    }
}

/// Settings that a driver makes (5.21), in the order in which `features` numbers them.
pub const FEATURES: usize = 16;

#[repr(C, align(4096))]
struct Page<T>(T);

#[repr(C)]
struct Head {
    magic: AtomicU64,
    completed: AtomicU64,
    under_way: AtomicU64,
    cc: AtomicU32,
    csts: AtomicU32,
    aqa: AtomicU32,
    events: AtomicU32,
    events_masked: AtomicU32,
    asq: AtomicU64,
    acq: AtomicU64,
    features: [AtomicU32; FEATURES],
}

#[repr(C)]
struct Layout {
    head: Page<Head>,
    rung: Page<[AtomicU32; DOORBELLS]>,
    seen: Page<[AtomicU32; DOORBELLS]>,
    submissions: [Submission; QUEUES],
    completions: [CompletionQueue; QUEUES],
    slots: [Slot; SLOTS],
}

/// The mapped record.
#[derive(Debug)]
pub struct Record {
    file: OwnedFd,
    layout: *const Layout,
}

// SAFETY: all that is reached through the pointer are atomics.
unsafe impl Send for Record {}
// SAFETY: as above.
unsafe impl Sync for Record {}

impl Drop for Record {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and every reference into it borrows from `self`.
        let _ = unsafe { rustix::mm::munmap(self.layout.cast_mut().cast(), RECORD_LEN) };
    }
}

impl Record {
    /// A record of this process' own, for a client that keeps none.
    ///
    /// # Errors
    /// Without memory.
    pub fn new() -> Result<Self, RecordError> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("atoll-nvme-record", flags).map_err(io::Error::from)?;
        rustix::fs::ftruncate(&file, RECORD_LEN as u64).map_err(io::Error::from)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).map_err(io::Error::from)?;
        Self::map(file)
    }

    /// One that was given: what stands in it is gone on with. Anything that is no record becomes an empty one.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn map(file: OwnedFd) -> Result<Self, RecordError> {
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(io::Error::from)?;
        let len = rustix::fs::fstat(&file).map_err(io::Error::from)?.st_size;
        if !seals.contains(SealFlags::SHRINK) || usize::try_from(len).map_or(true, |len| len < RECORD_LEN) {
            return Err(RecordError::Unsealed);
        }
        // SAFETY: a fresh shared mapping of a file that is long enough and cannot be cut.
        let at = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                RECORD_LEN,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        let record = Self { file, layout: at.map_err(io::Error::from)?.cast() };
        if record.layout().head.0.magic.load(Ordering::Acquire) != MAGIC {
            record.clear();
            record.layout().head.0.magic.store(MAGIC, Ordering::Release);
        }
        Ok(record)
    }

    fn layout(&self) -> &Layout {
        // SAFETY: page-aligned, RECORD_LEN bytes, mapped as long as `self`; all bits of all fields are valid.
        unsafe { &*self.layout }
    }

    fn head(&self) -> &Head {
        &self.layout().head.0
    }

    /// As at power-on.
    pub fn clear(&self) {
        let head = self.head();
        for word in [&head.cc, &head.csts, &head.aqa] {
            word.store(0, Ordering::Release);
        }
        head.asq.store(0, Ordering::Relaxed);
        head.acq.store(0, Ordering::Relaxed);
        self.clear_queues();
    }

    /// No queue and no command; settings as at power-on.
    pub fn clear_queues(&self) {
        let (layout, head) = (self.layout(), self.head());
        layout.slots.iter().for_each(|slot| slot.state.store(FREE, Ordering::Release));
        layout.submissions.iter().for_each(|queue| queue.size.store(0, Ordering::Release));
        layout.completions.iter().for_each(|queue| queue.size.store(0, Ordering::Release));
        for word in layout.rung.0.iter().chain(&layout.seen.0).chain(&head.features) {
            word.store(0, Ordering::Relaxed);
        }
        head.events.store(0, Ordering::Relaxed);
        head.events_masked.store(0, Ordering::Relaxed);
        head.under_way.store(0, Ordering::Relaxed);
    }

    /// Controller configuration.
    pub fn cc(&self) -> &AtomicU32 {
        &self.head().cc
    }
    /// Controller status.
    pub fn csts(&self) -> &AtomicU32 {
        &self.head().csts
    }
    /// Sizes of the admin queues.
    pub fn aqa(&self) -> &AtomicU32 {
        &self.head().aqa
    }
    /// Base of the admin submission queue.
    pub fn asq(&self) -> &AtomicU64 {
        &self.head().asq
    }
    /// Base of the admin completion queue.
    pub fn acq(&self) -> &AtomicU64 {
        &self.head().acq
    }
    /// Events that were not told, each a bit.
    pub fn events(&self) -> &AtomicU32 {
        &self.head().events
    }
    /// Kinds of events that wait for their log page to be read.
    pub fn events_masked(&self) -> &AtomicU32 {
        &self.head().events_masked
    }
    /// A setting.
    pub fn feature(&self, number: usize) -> Option<&AtomicU32> {
        self.head().features.get(number)
    }
    /// A submission queue's entry, whether there is such a queue or not.
    pub fn submission(&self, number: usize) -> Option<&Submission> {
        self.layout().submissions.get(number)
    }
    /// A completion queue's.
    pub fn completion(&self, number: usize) -> Option<&CompletionQueue> {
        self.layout().completions.get(number)
    }
    /// A slot.
    pub fn slot(&self, number: u16) -> Option<&Slot> {
        self.layout().slots.get(usize::from(number))
    }
    /// A doorbell, as it was rung: twice a queue's number for the tail of a submission queue, one more for the head of a
    /// completion queue.
    pub fn doorbell(&self, number: usize) -> Option<&AtomicU32> {
        self.layout().rung.0.get(number)
    }
    /// The same, as it was seen.
    pub fn seen(&self, number: usize) -> Option<&AtomicU32> {
        self.layout().seen.0.get(number)
    }
    /// Tells whoever looks how many commands are under way.
    pub fn tell(&self, under_way: usize) {
        self.head().under_way.store(under_way as u64, Ordering::Relaxed);
    }
    /// One more is completed.
    pub fn count(&self) {
        self.head().completed.fetch_add(1, Ordering::Relaxed);
    }
    /// Commands that were completed since the record was made.
    pub fn completed(&self) -> u64 {
        self.head().completed.load(Ordering::Relaxed)
    }
}

impl AsFd for Record {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// A successor of another build reads what this one wrote: what moves needs another magic. The pages of doorbells are
    /// handed out, and what is told to the supervisor is read by it.
    #[test]
    fn fields_are_where_they_were() {
        assert_eq!(offset_of!(Layout, rung) as u64, DOORBELLS_AT);
        assert_eq!((offset_of!(Layout, seen), offset_of!(Layout, submissions)), (0x2000, 0x3000));
        assert_eq!((offset_of!(Head, completed), offset_of!(Head, under_way)), (8, 16));
        assert_eq!((size_of::<Submission>(), size_of::<CompletionQueue>(), size_of::<Slot>()), (64, 64, 128));
        assert_eq!((offset_of!(Layout, completions), offset_of!(Layout, slots)), (0x4040, 0x5080));
        assert_eq!((offset_of!(Submission, size), offset_of!(Submission, fetched)), (0, 16));
        assert_eq!((offset_of!(CompletionQueue, size), offset_of!(CompletionQueue, produced)), (0, 24));
        assert_eq!((offset_of!(Slot, state), offset_of!(Slot, queue), offset_of!(Slot, command)), (0, 4, 32));
        let record = Record::new().unwrap();
        record.cc().store(7, Ordering::Relaxed);
        let same = Record::map(record.file.try_clone().unwrap()).unwrap();
        assert_eq!(same.cc().load(Ordering::Relaxed), 7);
        same.head().magic.store(0, Ordering::Relaxed);
        let fresh = Record::map(record.file.try_clone().unwrap()).unwrap();
        assert_eq!(fresh.cc().load(Ordering::Relaxed), 0);
    }
}
