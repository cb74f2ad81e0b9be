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

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const PART_ALIGN: usize = 64;
const VERSION: u16 = 1;

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
        Ok(Tracker { region: Arc::clone(self), base, queue, ring_size, counter: 0 })
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

/// The record of one queue.
#[derive(Debug)]
pub struct Tracker {
    region: Arc<Region>,
    base: usize,
    queue: u16,
    ring_size: u16,
    counter: u64,
}

impl Tracker {
    fn u8_at(&self, offset: usize) -> Option<&AtomicU8> {
        self.region.map.get_atomic_ref(self.base + offset).ok()
    }

    fn u16_at(&self, offset: usize) -> Option<&AtomicU16> {
        self.region.map.get_atomic_ref(self.base + offset).ok()
    }

    fn u64_at(&self, offset: usize) -> Option<&AtomicU64> {
        self.region.map.get_atomic_ref(self.base + offset).ok()
    }

    fn load_u16(&self, offset: usize) -> u16 {
        self.u16_at(offset).map_or(0, |cell| u16::from_le(cell.load(Ordering::Acquire)))
    }

    fn store_u16(&self, offset: usize, value: u16) {
        if let Some(cell) = self.u16_at(offset) {
            cell.store(value.to_le(), Ordering::Release);
        }
    }

    fn entry(head: u16) -> usize {
        HEADER_BYTES + ENTRY_BYTES * usize::from(head)
    }

    fn in_flight(&self, head: u16) -> bool {
        self.u8_at(Self::entry(head)).is_some_and(|cell| cell.load(Ordering::Acquire) != 0)
    }

    fn set_in_flight(&self, head: u16, value: bool) {
        if let Some(cell) = self.u8_at(Self::entry(head)) {
            cell.store(u8::from(value), Ordering::Release);
        }
    }

    /// Reads what a predecessor left, mends the last completion that it may not have finished recording,
    /// and says what must be submitted again. `used` is the index in the used ring.
    pub fn recover(&mut self, used: u16) -> Result<Recovered, InflightError> {
        let damaged = |what| InflightError::Damaged { queue: self.queue, what };
        let version = self.load_u16(8);
        if version == 0 {
            self.store_u16(10, self.ring_size);
            self.store_u16(12, 0);
            self.store_u16(14, used);
            // All of it, also what this ring does not reach: a later one may be larger.
            for head in 0..self.region.queue_size {
                self.set_in_flight(head, false);
            }
            self.store_u16(8, VERSION);
            return Ok(Recovered::default());
        }
        if version != VERSION {
            return Err(damaged("its version is unknown"));
        }
        let unfinished: Vec<u16> = (0..self.region.queue_size).filter(|head| self.in_flight(*head)).collect();
        let desc_num = self.load_u16(10);
        if desc_num != self.ring_size {
            if !unfinished.is_empty() {
                return Err(InflightError::QueueSize { queue: self.queue, region: desc_num, ring: self.ring_size });
            }
            // The guest has set the ring up anew with another size.
            self.store_u16(10, self.ring_size);
        }
        if unfinished.iter().any(|head| *head >= self.ring_size) {
            return Err(damaged("a request lies outside the ring"));
        }
        let behind = used.wrapping_sub(self.load_u16(14));
        if behind != 0 && !unfinished.is_empty() {
            // The last batch reached the used ring, but its entries were not cleared.
            if behind > self.ring_size {
                return Err(damaged("its used index is too far from the ring's"));
            }
            let mut head = self.load_u16(12);
            for _ in 0..behind {
                if head >= self.ring_size {
                    return Err(damaged("its last batch leaves the table"));
                }
                self.set_in_flight(head, false);
                head = self.load_u16(Self::entry(head) + 6);
            }
        }
        self.store_u16(14, used);
        let mut resubmit: Vec<(u64, u16)> = unfinished
            .into_iter()
            .filter(|head| self.in_flight(*head))
            .filter_map(|head| {
                let counter = self.u64_at(Self::entry(head) + 8)?.load(Ordering::Acquire);
                Some((u64::from_le(counter), head))
            })
            .collect();
        resubmit.sort_unstable();
        self.counter = resubmit.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Recovered { resubmit: resubmit.into_iter().map(|(_, head)| head).collect(), continued: true })
    }

    /// Records that `head` was taken from the avail ring.
    pub fn take(&mut self, head: u16) {
        if head >= self.ring_size {
            return;
        }
        if let Some(cell) = self.u64_at(Self::entry(head) + 8) {
            cell.store(self.counter.to_le(), Ordering::Release);
        }
        self.counter = self.counter.wrapping_add(1);
        self.set_in_flight(head, true);
    }

    /// Records that `head` is about to enter the used ring, together with those before and after it until
    /// [`Tracker::completed`].
    pub fn completing(&mut self, head: u16) {
        if head < self.ring_size {
            let last = self.load_u16(12);
            self.store_u16(Self::entry(head) + 6, last);
            self.store_u16(12, head);
        }
    }

    /// Records that the used ring's index is now `used` and `heads` are in it.
    pub fn completed(&mut self, heads: impl Iterator<Item = u16>, used: u16) {
        // The index last: until then a successor clears the whole batch.
        heads.filter(|head| *head < self.ring_size).for_each(|head| self.set_in_flight(head, false));
        self.store_u16(14, used);
    }

    /// Records that `head` was not taken after all.
    pub fn give_back(&mut self, head: u16) {
        if head < self.ring_size {
            self.set_in_flight(head, false);
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
                tracker.set_in_flight(3, false);
            }
            if died_after >= 4 {
                tracker.store_u16(14, used);
            }
            let left = region.tracker(0, 8).unwrap().recover(used).unwrap().resubmit;
            let expected: &[u16] = if died_after >= 2 { &[1] } else { &[3, 1] };
            assert_eq!(left, expected, "died after step {died_after}");
        }
    }

    #[test]
    fn a_damaged_region_is_refused() {
        type Damage = (&'static str, fn(&Tracker));
        let cases: &[Damage] = &[
            ("unknown version", |t| t.store_u16(8, 7)),
            ("other queue size", |t| t.store_u16(10, 4)),
            ("used index far away", |t| t.store_u16(14, 1000)),
            ("batch outside the table", |t| {
                t.store_u16(14, 9);
                t.store_u16(12, 4000);
            }),
        ];
        for (name, damage) in cases {
            let region = region();
            let mut tracker = region.tracker(0, 8).unwrap();
            tracker.recover(10).unwrap();
            tracker.take(3);
            damage(&tracker);
            assert!(region.tracker(0, 8).unwrap().recover(10).is_err(), "{name}");
        }
    }

    /// A region came with entries set and no version: they were cleared only as far as the ring went, and a
    /// successor with a larger ring found requests that nobody had made.
    #[test]
    fn a_fresh_region_is_cleared_beyond_a_small_ring() {
        let region = region();
        let small = region.tracker(0, 2);
        region.tracker(0, 8).unwrap().set_in_flight(5, true);
        assert_eq!(small.unwrap().recover(0).unwrap(), Recovered::default());
        assert!(region.tracker(0, 8).unwrap().recover(0).unwrap().resubmit.is_empty());
    }

    #[test]
    fn a_region_that_is_too_small_is_refused() {
        let file = create(1, 8).unwrap();
        assert!(matches!(Region::map(file, 0, 1 << 20, 4, 8), Err(InflightError::TooSmall { .. })));
    }
}
