//! What outlives the processes of an NVMe disk, and what can be seen in it: how far the device is, queue by queue.
//!
//! It is written by the device's own process (`atoll-nvme`, `record.rs`, which pins where each field is): whatever it says,
//! nothing but that device depends on it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};

use super::doorbells::Mapping;
use crate::backend::PassedFd;
use crate::lifecycle::QueueReport;
use crate::metrics::Account;

/// Bytes of a record: more than a process of ours needs, and nothing where it writes nothing.
const RECORD_LEN: u64 = 1 << 20;
/// In a record: how many commands were completed, how many are under way, the doorbells as they were rung and as they
/// were seen.
const COMPLETED_AT: usize = 8;
const UNDER_WAY_AT: usize = 16;
const RUNG_AT: usize = 0x1000;
const SEEN_AT: usize = 0x2000;
const DOORBELLS_LEN: usize = 0x1000;
/// The queues of either kind, the admin queues first; in each its entries, and how many were fetched or produced.
const QUEUES: usize = 65;
const QUEUE_LEN: usize = 64;
const SUBMISSIONS_AT: usize = 0x3000;
const COMPLETIONS_AT: usize = SUBMISSIONS_AT + QUEUES * QUEUE_LEN;
const SIZE_AT: usize = 0;
const FETCHED_AT: usize = 16;
const PRODUCED_AT: usize = 24;
/// Commands that were fetched: in each whether it waits for its answer, its queue, and its first word.
const SLOTS: usize = 1024;
const SLOT_LEN: usize = 128;
const SLOTS_AT: usize = COMPLETIONS_AT + QUEUES * QUEUE_LEN;
const SLOT_QUEUE_AT: usize = 4;
const SLOT_COMMAND_AT: usize = 32;
const SLOT_FREE: u32 = 0;
/// Asynchronous Event Request, which waits for an event and not for the device.
const EVENT: u32 = 0x0c;

/// What outlives the processes of a device.
#[derive(Debug)]
pub(super) struct Record {
    file: OwnedFd,
    map: Mapping,
}

/// How far a device is, as its record says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) completed: u64,
    pub(super) waiting: bool,
}

impl Record {
    pub(super) fn new() -> io::Result<Self> {
        let file = rustix::fs::memfd_create("atoll-record", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, RECORD_LEN)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let map = Mapping::new(&file).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, map })
    }

    fn word(&self, at: usize) -> u32 {
        self.map.word(at).map_or(0, |word| word.load(Ordering::Acquire))
    }
    fn long(&self, at: usize) -> u64 {
        self.map.long(at).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    pub(super) fn progress(&self) -> Progress {
        let rung = (0..DOORBELLS_LEN).step_by(4);
        let unseen = rung.into_iter().any(|at| self.word(RUNG_AT + at) != self.word(SEEN_AT + at));
        Progress { completed: self.long(COMPLETED_AT), waiting: unseen || self.long(UNDER_WAY_AT) > 0 }
    }

    pub(super) fn pass(&self) -> io::Result<PassedFd> {
        Ok(PassedFd { flag: "--record-fd".into(), fd: self.file.try_clone()? })
    }

    /// The queues that a driver has made, 0 the admin queue, with the commands in each that wait for the device: those that
    /// were rung for and not fetched, and those that were fetched and not answered.
    pub(super) fn queues(&self) -> Vec<QueueReport> {
        let mut fetched = [0_u32; QUEUES];
        for slot in (0..SLOTS).map(|slot| SLOTS_AT + slot * SLOT_LEN) {
            let queue = self.word(slot + SLOT_QUEUE_AT) as usize;
            let waits_for_event = queue == 0 && self.word(slot + SLOT_COMMAND_AT) & 0xff == EVENT;
            if self.word(slot) != SLOT_FREE
                && !waits_for_event
                && let Some(count) = fetched.get_mut(queue)
            {
                *count += 1;
            }
        }
        let report = |(number, fetched): (usize, u32)| {
            let queue = SUBMISSIONS_AT + number * QUEUE_LEN;
            let size = self.word(queue + SIZE_AT);
            let tail = u64::from(self.word(RUNG_AT + number * 8));
            let (entries, head) = (u64::from(size), self.long(queue + FETCHED_AT).checked_rem(size.into())?);
            let waiting = if tail < entries { (tail + entries - head) % entries } else { 0 };
            let in_flight = waiting.saturating_add(fetched.into()).min(u16::MAX.into()) as u16;
            let size = size.min(u16::MAX.into()) as u16;
            Some(QueueReport { index: number as u16, size, in_flight, kicks: None, calls: None })
        };
        fetched.into_iter().enumerate().filter_map(report).collect()
    }

    /// Commands that wait for the device.
    pub(super) fn in_flight(&self) -> u32 {
        self.queues().iter().map(|queue| u32::from(queue.in_flight)).sum()
    }

    /// Completions of each queue since the driver made it.
    fn produced(&self) -> BTreeMap<u16, u64> {
        let queues = (0..QUEUES).map(|number| (number as u16, COMPLETIONS_AT + number * QUEUE_LEN));
        let made = queues.filter(|(_, queue)| self.word(queue + SIZE_AT) != 0);
        made.map(|(number, queue)| (number, self.long(queue + PRODUCED_AT))).collect()
    }
}

/// What the queues of a device have completed, over all that its drivers made of them. What a driver had done between the
/// last look and the end of its queues is not in it.
#[derive(Debug)]
pub(super) struct RecordAccount {
    record: Arc<Record>,
    /// For each queue what it was at when it was last looked at, and the sum.
    seen: Mutex<BTreeMap<u16, (u64, u64)>>,
}

impl RecordAccount {
    pub(super) fn new(record: Arc<Record>) -> Self {
        Self { record, seen: Mutex::default() }
    }
}

impl Account for RecordAccount {
    fn completed(&self) -> BTreeMap<u16, u64> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for (queue, now) in self.record.produced() {
            let (last, sum) = seen.entry(queue).or_default();
            // One that is made anew begins with nothing.
            *sum = sum.wrapping_add(now.checked_sub(*last).unwrap_or(now));
            *last = now;
        }
        seen.iter().map(|(queue, (_, sum))| (*queue, *sum)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver rings for four commands, of which two were fetched and one is answered; its event request waits for
    /// something else. Then it makes its queues anew, and the count goes on.
    #[test]
    fn a_record_shows_what_its_queues_do() {
        let record = Arc::new(Record::new().unwrap());
        let account = RecordAccount::new(Arc::clone(&record));
        assert!(record.queues().is_empty() && account.completed().is_empty());
        let word = |at: usize, value: u32| record.map.word(at).unwrap().store(value, Ordering::Relaxed);
        let long = |at: usize, value: u64| record.map.long(at).unwrap().store(value, Ordering::Relaxed);
        let (submission, completion) = (SUBMISSIONS_AT + 2 * QUEUE_LEN, COMPLETIONS_AT + 2 * QUEUE_LEN);
        for at in [SUBMISSIONS_AT, COMPLETIONS_AT, submission, completion] {
            word(at + SIZE_AT, 8);
        }
        // 22 were fetched, 24 rung for; of those two slots one is answered.
        long(submission + FETCHED_AT, 22);
        word(RUNG_AT + 2 * 8, 24 % 8);
        long(completion + PRODUCED_AT, 21);
        word(SLOTS_AT, 1);
        word(SLOTS_AT + SLOT_QUEUE_AT, 2);
        word(SLOTS_AT + 5 * SLOT_LEN, 1);
        word(SLOTS_AT + 5 * SLOT_LEN + SLOT_COMMAND_AT, EVENT);
        let told: Vec<_> = record.queues().iter().map(|queue| (queue.index, queue.size, queue.in_flight)).collect();
        assert_eq!((told, record.in_flight()), (vec![(0, 8, 0), (2, 8, 3)], 3));
        assert_eq!(account.completed(), BTreeMap::from([(0, 0), (2, 21)]));
        long(completion + PRODUCED_AT, 4);
        assert_eq!(account.completed(), BTreeMap::from([(0, 0), (2, 25)]));
        // Whatever the process writes is a number and no more.
        for at in (0..RECORD_LEN as usize).step_by(4) {
            word(at, u32::MAX);
        }
        assert_eq!(record.queues().len(), QUEUES);
        account.completed();
    }
}
