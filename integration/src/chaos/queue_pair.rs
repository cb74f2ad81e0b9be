//! The driver's half of an NVMe queue pair (NVM Express 1.4, chapter 4), with hand-made entries.
//!
//! Command identifiers are given out in turn, so that one that is completed a second time is not in flight again yet.

use std::collections::VecDeque;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Result, ensure};
use atoll_devices::pci::SharedFunction;
use atoll_kit::driver::Guest;
use atoll_kit::driver::queue::{QUEUE_BYTES, Woken, wait_for_interrupt};
use vmm_sys_util::eventfd::EventFd;

use super::rig::await_answer;

/// Bytes of an entry of a submission queue, and of a completion queue.
const COMMAND: u64 = 64;
const COMPLETION: u64 = 16;
const PAGE: u64 = 4096;
/// Where the two queues are in what belongs to a pair, behind the lists: none is at address 0, which means that there is none.
const COMPLETIONS_AT: u64 = 0x8000;
const SUBMISSIONS_AT: u64 = 0xc000;
/// Bytes of a command's list: eight pages.
const LIST: u64 = 64;
/// Identifiers that are given out. Each has a list.
const IDENTIFIERS: u16 = 512;
/// The doorbell of the first queue in BAR 0.
const DOORBELLS: u64 = 0x1000;

const _: () = assert!(IDENTIFIERS as u64 * LIST <= COMPLETIONS_AT && SUBMISSIONS_AT + 1024 * COMMAND <= QUEUE_BYTES);

/// What the controller says of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    /// Its identifier; one that no command has where the entry is not of this queue.
    pub id: u16,
    /// Status code and type, 0 for success.
    pub status: u16,
    /// What it has found.
    pub result: u32,
}

/// A submission queue and its completion queue, in guest memory.
pub struct QueuePair {
    number: u16,
    size: u16,
    at: u64,
    function: SharedFunction,
    call: EventFd,
    tail: u16,
    tail_rung: u16,
    /// Up to here the controller has fetched, as it said last.
    fetched: u16,
    head: u16,
    head_rung: u16,
    phase: bool,
    free: VecDeque<u16>,
    submitted: u16,
    taken: u16,
}

impl QueuePair {
    /// Pair `number` of `size` entries at `at` in guest memory, where zeroes are, whose interrupts come by `call`.
    pub fn new(number: u16, size: u16, at: u64, function: SharedFunction, call: EventFd) -> Result<Self> {
        ensure!((2..=1024).contains(&size) && at.is_multiple_of(PAGE), "{size} entries at {at:#x}");
        Ok(Self {
            number,
            size,
            at,
            function,
            call,
            tail: 0,
            tail_rung: 0,
            fetched: 0,
            head: 0,
            head_rung: 0,
            phase: true,
            free: (0..IDENTIFIERS).collect(),
            submitted: 0,
            taken: 0,
        })
    }

    /// Where the submission queue is.
    pub fn submissions(&self) -> u64 {
        self.at + SUBMISSIONS_AT
    }

    /// Where the completion queue is.
    pub fn completions(&self) -> u64 {
        self.at + COMPLETIONS_AT
    }

    /// Puts a command behind the others, which the controller sees when it is [rung](Self::ring): words 0 (its identifier is
    /// filled in), 1 and 10 to 15 are the caller's, its data are `len` bytes at `data`. None when there is no room.
    pub fn add(&mut self, guest: &Guest, mut words: [u32; 16], data: u64, len: u64) -> Option<u16> {
        let next = (self.tail + 1) % self.size;
        if next == self.fetched {
            return None;
        }
        let id = self.free.pop_front()?;
        let (first, second) = self.pointers(guest, id, data, len);
        for (word, value) in [(6, first), (8, second)] {
            (words[word], words[word + 1]) = (value as u32, (value >> 32) as u32);
        }
        words[0] |= u32::from(id) << 16;
        let mut bytes = [0; COMMAND as usize];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        guest.write(self.submissions() + u64::from(self.tail) * COMMAND, &bytes);
        self.tail = next;
        self.submitted = self.submitted.wrapping_add(1);
        Some(id)
    }

    /// PRP entries of contiguous data (4.3): the second is a page, or a list of those behind the first.
    fn pointers(&self, guest: &Guest, id: u16, data: u64, len: u64) -> (u64, u64) {
        let second = (data / PAGE + 1) * PAGE;
        let pages = (data + len).saturating_sub(second).div_ceil(PAGE);
        match pages {
            0 => (data, 0),
            1 => (data, second),
            _ => {
                let list = self.at + u64::from(id) * LIST;
                for page in 0..pages.min(LIST / 8) {
                    guest.store(list + 8 * page, (second + page * PAGE).to_le());
                }
                (data, list)
            }
        }
    }

    /// Rings the doorbells whose queues have moved.
    pub fn ring(&mut self) -> Result<()> {
        let (tail, head) = (self.tail, self.head);
        if std::mem::replace(&mut self.tail_rung, tail) != tail {
            self.doorbell(0, tail)?;
        }
        if std::mem::replace(&mut self.head_rung, head) != head {
            self.doorbell(1, head)?;
        }
        Ok(())
    }

    fn doorbell(&self, which: u64, value: u16) -> Result<()> {
        let offset = DOORBELLS + 4 * (2 * u64::from(self.number) + which);
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = function.bar_write(0, offset, &u32::from(value).to_le_bytes());
        drop(function);
        await_answer(answer)
    }

    /// The last word of the completion entry `ahead` of those that were taken, if it is valid.
    fn entry(&self, guest: &Guest, ahead: u16) -> Option<(u64, u32)> {
        let place = u32::from(self.head) + u32::from(ahead);
        let (place, round) = (place % u32::from(self.size), place / u32::from(self.size));
        let at = self.completions() + u64::from(place) * COMPLETION;
        let last = u32::from_le(guest.load(at + 12));
        ((last >> 16 & 1 != 0) == (self.phase ^ (round % 2 != 0))).then_some((at, last))
    }

    /// Takes the next completion.
    ///
    /// # Errors
    /// When the controller says that it has fetched what was never submitted.
    pub fn take(&mut self, guest: &Guest) -> Result<Option<Completed>> {
        let Some((at, last)) = self.entry(guest, 0) else { return Ok(None) };
        let (result, where_from) = (u32::from_le(guest.load(at)), u32::from_le(guest.load(at + 8)));
        let (fetched, queue) = (where_from as u16, (where_from >> 16) as u16);
        self.head += 1;
        if self.head == self.size {
            (self.head, self.phase) = (0, !self.phase);
        }
        self.taken = self.taken.wrapping_add(1);
        let ahead = |of: u16| (of + self.size - self.fetched) % self.size;
        ensure!(
            fetched < self.size && ahead(fetched) <= ahead(self.tail),
            "queue {}: head {fetched} is not between {} and {}",
            self.number,
            self.fetched,
            self.tail
        );
        self.fetched = fetched;
        let id = last as u16;
        let id = if queue == self.number && id < IDENTIFIERS { id } else { u16::MAX };
        if id < IDENTIFIERS && !self.free.contains(&id) {
            self.free.push_back(id);
        }
        Ok(Some(Completed { id, status: (last >> 17) as u16, result }))
    }

    /// Commands that were submitted, and those that the controller has completed, whether they were taken or not.
    pub fn counts(&self, guest: &Guest) -> (u16, u16) {
        let there = (0..self.size).take_while(|ahead| self.entry(guest, *ahead).is_some()).count();
        (self.submitted, self.taken.wrapping_add(there as u16))
    }

    /// Waits for an interrupt, at most for `tick`; longer for one that is due.
    pub fn wait(&mut self, guest: &Guest, tick: Duration) -> Result<Woken> {
        self.ring()?;
        wait_for_interrupt(&self.call, tick, || self.entry(guest, 0).is_some())
    }
}
