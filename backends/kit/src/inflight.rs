//! The record of requests in flight (vhost-user, "Inflight I/O tracking", split virtqueues).
//!
//! The region is shared with the front end and outlives this process: a successor finds in it which
//! requests were taken from the avail ring and not completed, and in which order. Layout per queue, little
//! endian, each queue's part rounded up to 64 bytes:
//!
//! | offset | field |
//! |---|---|
//! | 0 | features: u64, 0 |
//! | 8 | version: u16, 1 once initialised |
//! | 10 | desc_num: u16 |
//! | 12 | last_batch_head: u16 |
//! | 14 | used_idx: u16 |
//! | 16 + 16 n | inflight: u8, padding: 5 bytes, next: u16, counter: u64 |
//!
//! What a successor reads is hostile input: a dead process may have been stopped anywhere or have gone
//! wrong before it died. Every index is checked and every walk is bounded by the queue size.
//!
//! All accesses are atomic and go to shared memory in program order (release stores on x86-64), so that a
//! process killed between any two of them leaves a state that [`Tracker::recover`] understands.
//!
//! A device that completes in the order of taking needs no marks: what is unfinished is what the avail ring holds from the
//! used index on. Its record says that nothing is in flight, and a successor begins at the used index
//! ([`Tracker::recover_in_order`]).

#![allow(unsafe_code, reason = "a mapped region is looked at as the structures that it holds")]

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

use crate::step::{Sabotage, strikes};

const HEADER_BYTES: usize = size_of::<Head>();
const ENTRY_BYTES: usize = size_of::<Entry>();
const PART_ALIGN: usize = 64;
const VERSION: u16 = 1;

/// The head of one queue's part. All fields are little endian.
#[repr(C)]
struct Head {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

/// What is recorded of one descriptor.
#[repr(C)]
struct Entry {
    inflight: AtomicU8,
    padding: [AtomicU8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

/// Why a region was refused.
#[derive(Debug, Error)]
pub enum InflightError {
    /// The region is too small for its queues.
    #[error("an in-flight region for {queues} queues of {size} needs {need} bytes, the front end gave {have}")]
    TooSmall {
        /// Queues.
        queues: u16,
        /// Entries of each.
        size: u16,
        /// Bytes needed.
        need: u64,
        /// Bytes given, or length of the file.
        have: u64,
    },
    /// The region could not be made or mapped.
    #[error("cannot {what} the in-flight region: {reason}")]
    Map {
        /// Make, seal or map.
        what: &'static str,
        /// What the kernel said.
        reason: String,
    },
    /// The region's queue size is not the ring's.
    #[error("queue {queue}: the in-flight region is for {region} descriptors, the ring has {ring}")]
    QueueSize {
        /// The queue.
        queue: u16,
        /// desc_num of the region.
        region: u16,
        /// Size of the ring.
        ring: u16,
    },
    /// The region contradicts itself or the used ring.
    #[error("queue {queue}: the in-flight region is damaged: {what}; only a device reset clears it")]
    Damaged {
        /// The queue.
        queue: u16,
        /// What does not fit.
        what: &'static str,
    },
}

/// Bytes of one queue's part.
fn part_bytes(queue_size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(queue_size)).next_multiple_of(PART_ALIGN)
}

/// Bytes of a region for `queues` queues of `queue_size` entries.
pub fn region_bytes(queues: u16, queue_size: u16) -> u64 {
    part_bytes(queue_size) as u64 * u64::from(queues)
}

/// Makes an empty region for GET_INFLIGHT_FD: a memfd of fixed length that nobody can shrink under us.
pub fn create(queues: u16, queue_size: u16) -> Result<File, InflightError> {
    let failed = |what, e: rustix::io::Errno| InflightError::Map { what, reason: e.to_string() };
    let fd = rustix::fs::memfd_create(c"atoll-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|e| failed("create", e))?;
    rustix::fs::ftruncate(&fd, region_bytes(queues, queue_size)).map_err(|e| failed("size", e))?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|e| failed("seal", e))?;
    Ok(File::from(fd))
}

/// A mapped region, shared by the queues.
#[derive(Debug)]
pub struct Region {
    map: MmapRegion<()>,
    queues: u16,
    queue_size: u16,
}

impl Region {
    /// Maps what SET_INFLIGHT_FD brought.
    pub fn map(file: File, offset: u64, size: u64, queues: u16, queue_size: u16) -> Result<Arc<Self>, InflightError> {
        let need = region_bytes(queues, queue_size);
        let failed = |reason: String| InflightError::Map { what: "map", reason };
        let file_bytes = rustix::fs::fstat(file.as_fd()).map_err(|e| failed(e.to_string()))?.st_size.cast_unsigned();
        let have = size.min(file_bytes.saturating_sub(offset));
        if have < need {
            return Err(InflightError::TooSmall { queues, size: queue_size, need, have });
        }
        let len = usize::try_from(need).map_err(|e| failed(e.to_string()))?;
        let map = MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(|e| failed(e.to_string()))?;
        Ok(Arc::new(Self { map, queues, queue_size }))
    }

    /// The record of one queue, for a ring of `ring_size` entries.
    pub fn tracker(self: &Arc<Self>, queue: u16, ring_size: u16) -> Result<Tracker, InflightError> {
        if queue >= self.queues || ring_size > self.queue_size {
            return Err(InflightError::QueueSize { queue, region: self.queue_size, ring: ring_size });
        }
        let base = part_bytes(self.queue_size) * usize::from(queue);
        Ok(Tracker::new(Part { region: Arc::clone(self), base }, queue, ring_size))
    }
}

/// What a successor has to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Heads of unfinished requests, in the order in which they were taken.
    pub resubmit: Vec<u16>,
    /// The region had been in use before.
    pub continued: bool,
}

/// A number of the head of a queue's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// 1 once it is initialised.
    Version,
    /// Entries of the ring.
    DescNum,
    /// The head that was put into the used ring last, with which a batch of them begins.
    LastBatchHead,
    /// The used index that the record knows.
    UsedIdx,
}

/// One queue's part, as its rules read and write it: each write is one step, after which the process may be gone, and what
/// was written before it is there. Of entries that there are not, nothing is in flight.
pub trait Record {
    /// Entries.
    fn entries(&self) -> u16;
    /// Reads a number of its head.
    fn field(&self, field: Field) -> u16;
    /// Writes one.
    fn set_field(&mut self, field: Field, value: u16);
    /// Whether an entry's request is in flight.
    fn is_in_flight(&self, head: u16) -> bool;
    /// Writes that down.
    fn set_in_flight(&mut self, head: u16, value: bool);
    /// The entry that went into the used ring before this one, in the same batch.
    fn next(&self, head: u16) -> u16;
    /// Writes that down.
    fn set_next(&mut self, head: u16, value: u16);
    /// When it was taken, counted.
    fn counter(&self, head: u16) -> u64;
    /// Writes that down.
    fn set_counter(&mut self, head: u16, value: u64);
}

/// The record of one queue, with what its owner knows of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tracker<R = Part> {
    record: R,
    queue: u16,
    ring_size: u16,
    counter: u64,
}

/// One queue's part of a mapped region.
#[derive(Debug)]
pub struct Part {
    region: Arc<Region>,
    base: usize,
}

#[inline]
fn load(cell: &AtomicU16) -> u16 {
    u16::from_le(cell.load(Ordering::Acquire))
}

#[inline]
fn store(cell: &AtomicU16, value: u16) {
    cell.store(value.to_le(), Ordering::Release);
}

impl Part {
    #[inline]
    fn head(&self) -> &Head {
        // SAFETY: `base` and a whole part from there on lie within the mapping (`Region::map`, `Region::tracker`), which
        // begins at a page's boundary and stays as long as the region that is held here; `base` is a multiple of 64. The
        // structure is made of atomics only, for which every bit pattern is a value, so others may write it at any time.
        unsafe { &*self.region.map.as_ptr().add(self.base).cast::<Head>() }
    }

    /// The entry of a descriptor.
    #[inline]
    fn entry(&self, head: u16) -> Option<&Entry> {
        // SAFETY: as many entries as the region's queues have lie behind the head in each part (`part_bytes`); for the rest
        // see `head`.
        let entries = unsafe {
            let first = self.region.map.as_ptr().add(self.base + HEADER_BYTES).cast::<Entry>();
            std::slice::from_raw_parts(first, usize::from(self.region.queue_size))
        };
        entries.get(usize::from(head))
    }

    #[inline]
    fn cell(&self, field: Field) -> &AtomicU16 {
        let head = self.head();
        match field {
            Field::Version => &head.version,
            Field::DescNum => &head.desc_num,
            Field::LastBatchHead => &head.last_batch_head,
            Field::UsedIdx => &head.used_idx,
        }
    }
}

impl Record for Part {
    fn entries(&self) -> u16 {
        self.region.queue_size
    }
    #[inline]
    fn field(&self, field: Field) -> u16 {
        load(self.cell(field))
    }
    #[inline]
    fn set_field(&mut self, field: Field, value: u16) {
        store(self.cell(field), value);
    }
    #[inline]
    fn is_in_flight(&self, head: u16) -> bool {
        self.entry(head).is_some_and(|entry| entry.inflight.load(Ordering::Acquire) != 0)
    }
    #[inline]
    fn set_in_flight(&mut self, head: u16, value: bool) {
        if let Some(entry) = self.entry(head) {
            entry.inflight.store(u8::from(value), Ordering::Release);
        }
    }
    #[inline]
    fn next(&self, head: u16) -> u16 {
        self.entry(head).map_or(0, |entry| load(&entry.next))
    }
    #[inline]
    fn set_next(&mut self, head: u16, value: u16) {
        if let Some(entry) = self.entry(head) {
            store(&entry.next, value);
        }
    }
    fn counter(&self, head: u16) -> u64 {
        self.entry(head).map_or(0, |entry| u64::from_le(entry.counter.load(Ordering::Acquire)))
    }
    #[inline]
    fn set_counter(&mut self, head: u16, value: u64) {
        if let Some(entry) = self.entry(head) {
            entry.counter.store(value.to_le(), Ordering::Release);
        }
    }
}

impl<R: Record> Tracker<R> {
    /// The record of queue `queue`, whose ring has `ring_size` entries.
    pub fn new(record: R, queue: u16, ring_size: u16) -> Self {
        Self { record, queue, ring_size, counter: 0 }
    }

    /// Gives the record away.
    pub fn into_record(self) -> R {
        self.record
    }

    /// Heads whose requests are in flight, also those that the ring does not reach.
    fn unfinished(&self) -> impl Iterator<Item = u16> {
        (0..self.record.entries()).filter(|head| self.record.is_in_flight(*head))
    }

    /// Reads what a predecessor left, mends the last completion that it may not have finished recording,
    /// and says what must be submitted again. `used` is the index in the used ring.
    pub fn recover(&mut self, used: u16) -> Result<Recovered, InflightError> {
        let queue = self.queue;
        let damaged = |what| InflightError::Damaged { queue, what };
        let version = self.record.field(Field::Version);
        if version == 0 {
            self.record.set_field(Field::DescNum, self.ring_size);
            self.record.set_field(Field::LastBatchHead, 0);
            self.record.set_field(Field::UsedIdx, used);
            // All of it, also what this ring does not reach: a later one may be larger.
            self.clear();
            self.record.set_field(Field::Version, VERSION);
            return Ok(Recovered::default());
        }
        if version != VERSION {
            return Err(damaged("its version is unknown"));
        }
        let desc_num = self.record.field(Field::DescNum);
        if desc_num != self.ring_size {
            if self.unfinished().next().is_some() {
                return Err(InflightError::QueueSize { queue, region: desc_num, ring: self.ring_size });
            }
            // The guest has set the ring up anew with another size.
            self.record.set_field(Field::DescNum, self.ring_size);
        }
        if self.unfinished().any(|head| head >= self.ring_size) {
            return Err(damaged("a request lies outside the ring"));
        }
        let behind = used.wrapping_sub(self.record.field(Field::UsedIdx));
        if behind != 0 && self.unfinished().next().is_some() {
            // The last batch reached the used ring, but its entries were not cleared.
            if behind > self.ring_size {
                return Err(damaged("its used index is too far from the ring's"));
            }
            let mut head = self.record.field(Field::LastBatchHead);
            for _ in 0..behind {
                if head >= self.ring_size {
                    return Err(damaged("its last batch leaves the table"));
                }
                self.record.set_in_flight(head, false);
                head = self.record.next(head);
            }
        }
        self.record.set_field(Field::UsedIdx, used);
        let mut resubmit: Vec<(u64, u16)> = self.unfinished().map(|head| (self.record.counter(head), head)).collect();
        resubmit.sort_unstable();
        if strikes(Sabotage::ReplayOutOfOrder) {
            resubmit.reverse();
        }
        self.counter = resubmit.iter().max().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Recovered { resubmit: resubmit.into_iter().map(|(_, head)| head).collect(), continued: true })
    }

    fn clear(&mut self) {
        (0..self.record.entries()).for_each(|head| self.record.set_in_flight(head, false));
    }

    /// The same for a device that completes in the order of taking: what a predecessor has recorded as taken is forgotten,
    /// because the avail ring still holds all of it from the used index on. How many those were.
    pub fn recover_in_order(&mut self, used: u16) -> Result<Recovered, InflightError> {
        let recovered = self.recover(used)?;
        self.clear();
        Ok(recovered)
    }

    /// Records that `head` was taken from the avail ring.
    #[inline]
    pub fn take(&mut self, head: u16) {
        if head >= self.ring_size {
            return;
        }
        self.record.set_counter(head, self.counter);
        self.record.set_in_flight(head, true);
        self.counter = self.counter.wrapping_add(1);
    }

    /// Records that `head` is about to enter the used ring, together with those before and after it until
    /// [`Tracker::completed`].
    #[inline]
    pub fn completing(&mut self, head: u16) {
        if head < self.ring_size {
            self.record.set_next(head, self.record.field(Field::LastBatchHead));
            self.record.set_field(Field::LastBatchHead, head);
        }
    }

    /// Records that the used ring's index is now `used` and `heads` are in it.
    #[inline]
    pub fn completed(&mut self, heads: impl Iterator<Item = u16>, used: u16) {
        // The index last: until then a successor clears the whole batch.
        heads.filter(|head| *head < self.ring_size).for_each(|head| self.record.set_in_flight(head, false));
        self.settled(used);
    }

    /// Records that the used ring's index is now `used`, for a device without marks.
    #[inline]
    pub fn settled(&mut self, used: u16) {
        self.record.set_field(Field::UsedIdx, used);
    }

    /// Records that `head` was not taken after all.
    pub fn give_back(&mut self, head: u16) {
        if head < self.ring_size {
            self.record.set_in_flight(head, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> Arc<Region> {
        Region::map(create(2, 8).unwrap(), 0, region_bytes(2, 8), 2, 8).unwrap()
    }

    #[test]
    fn a_successor_resubmits_in_the_order_of_taking() {
        let region = region();
        let mut first = region.tracker(1, 8).unwrap();
        assert_eq!(first.recover(5).unwrap(), Recovered::default());
        for head in [6, 2, 7, 0] {
            first.take(head);
        }
        first.completing(2);
        first.completed([2].into_iter(), 6);
        let mut second = region.tracker(1, 8).unwrap();
        assert_eq!(second.recover(6).unwrap(), Recovered { resubmit: vec![6, 7, 0], continued: true });
        // The other queue knows nothing of it.
        assert_eq!(region.tracker(0, 8).unwrap().recover(0).unwrap(), Recovered::default());
    }

    #[test]
    fn a_death_between_any_two_steps_of_a_completion_neither_loses_nor_doubles_it() {
        // Steps of completing head 3 while head 1 stays in flight; the used ring counts from 10.
        for died_after in 0..=4 {
            let region = region();
            let mut tracker = region.tracker(0, 8).unwrap();
            tracker.recover(10).unwrap();
            tracker.take(3);
            tracker.take(1);
            let mut used = 10;
            if died_after >= 1 {
                tracker.completing(3);
            }
            if died_after >= 2 {
                used = 11;
            }
            if died_after >= 3 {
                tracker.record.set_in_flight(3, false);
            }
            if died_after >= 4 {
                tracker.settled(used);
            }
            let left = region.tracker(0, 8).unwrap().recover(used).unwrap().resubmit;
            let expected: &[u16] = if died_after >= 2 { &[1] } else { &[3, 1] };
            assert_eq!(left, expected, "died after step {died_after}");
        }
    }

    #[test]
    fn a_damaged_region_is_refused() {
        type Damage = (&'static str, fn(&mut Tracker));
        let cases: &[Damage] = &[
            ("unknown version", |t| t.record.set_field(Field::Version, 7)),
            ("other queue size", |t| t.record.set_field(Field::DescNum, 4)),
            ("used index far away", |t| t.record.set_field(Field::UsedIdx, 1000)),
            ("batch outside the table", |t| {
                t.record.set_field(Field::UsedIdx, 9);
                t.record.set_field(Field::LastBatchHead, 4000);
            }),
        ];
        for (name, damage) in cases {
            let region = region();
            let mut tracker = region.tracker(0, 8).unwrap();
            tracker.recover(10).unwrap();
            tracker.take(3);
            damage(&mut tracker);
            assert!(region.tracker(0, 8).unwrap().recover(10).is_err(), "{name}");
        }
    }

    /// A predecessor kept marks, its successor does without them: what was taken is in the avail ring from the used index on.
    #[test]
    fn a_successor_that_completes_in_order_forgets_the_marks() {
        let region = region();
        let mut first = region.tracker(0, 8).unwrap();
        first.recover(5).unwrap();
        first.take(6);
        first.take(2);
        let mut second = region.tracker(0, 8).unwrap();
        assert_eq!(second.recover_in_order(5).unwrap().resubmit, [6, 2]);
        second.settled(7);
        assert_eq!(region.tracker(0, 8).unwrap().recover(7).unwrap(), Recovered { resubmit: vec![], continued: true });
    }

    /// A region came with entries set and no version: they were cleared only as far as the ring went, and a
    /// successor with a larger ring found requests that nobody had made.
    #[test]
    fn a_fresh_region_is_cleared_beyond_a_small_ring() {
        let region = region();
        let small = region.tracker(0, 2);
        region.tracker(0, 8).unwrap().record.set_in_flight(5, true);
        assert_eq!(small.unwrap().recover(0).unwrap(), Recovered::default());
        assert!(region.tracker(0, 8).unwrap().recover(0).unwrap().resubmit.is_empty());
    }

    #[test]
    fn a_region_that_is_too_small_is_refused() {
        let file = create(1, 8).unwrap();
        assert!(matches!(Region::map(file, 0, 1 << 20, 4, 8), Err(InflightError::TooSmall { .. })));
    }
}
