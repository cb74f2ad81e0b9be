//! Queues, and the order of stores that makes a command complete exactly once over deaths of this process at any moment.
//!
//! **Fetching.** The command is written into a free slot with its number in its queue, the slot is marked taken, and then the
//! queue's count goes up. Dead before the last step, the count says less than the slot: the successor raises it, so that
//! nothing is fetched twice.
//!
//! **Completing.** The answer and its position in the completion queue are written into the slot, the slot is marked
//! answered, the entry is written into guest memory (its last word, with the phase, last), the queue's count goes up, the slot
//! is free. Dead in between, the count says whether the entry may be missing: then the successor writes the same entry at
//! the same place again. A slot that is taken and not answered is carried out again from the start.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use atoll_kit::step::{Sabotage, Step, step, strikes};

use crate::prp::Dma;
use crate::record::{ANSWERED, FREE, QUEUES, Record, SLOTS, Slot, TAKEN};
use crate::spec::{COMMAND_LEN, COMPLETION_LEN, Command, Completion, ENTRIES_MAX, Status};

/// Something in the driver's memory is not where the driver says: the controller cannot go on (CSTS.CFS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fatal;

/// Slots that only the admin queue takes, so that I/O never keeps it waiting.
const ADMIN_SLOTS: u16 = 16;

/// A submission queue that is there.
#[derive(Clone, Copy, Debug)]
pub struct SubmissionView {
    /// Entries, 2 to 1024.
    pub size: u32,
    /// Its completion queue's number.
    pub completion: usize,
    base: u64,
    fetched: u64,
}

/// Where a completion could not be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// It is there; this vector is to be raised, if any.
    Done(Option<u16>),
    /// The queue is full: the driver has to take something out of it first.
    Full,
}

/// The queues of a record.
#[derive(Debug)]
pub struct Queues {
    /// What they are kept in.
    pub record: std::sync::Arc<Record>,
    /// Slots that are free.
    free: Vec<u16>,
    /// The next queue that may fetch.
    turn: usize,
}

fn doorbell_value(record: &Record, number: usize) -> u32 {
    let rung = record.doorbell(number).map_or(0, |bell| bell.load(Acquire));
    if let Some(seen) = record.seen(number) {
        seen.store(rung, Relaxed);
    }
    rung
}

impl Queues {
    /// The queues of `record`; all slots count as free until [`Self::adopt`] has looked.
    pub fn new(record: std::sync::Arc<Record>) -> Self {
        Self { record, free: (0..SLOTS as u16).rev().collect(), turn: 0 }
    }

    /// Forgets every queue and slot.
    pub fn clear(&mut self) {
        self.record.clear_queues();
        self.free = (0..SLOTS as u16).rev().collect();
        self.turn = 0;
    }

    /// A submission queue that is there and can be right.
    pub fn submission(&self, number: usize) -> Option<SubmissionView> {
        let queue = self.record.submission(number)?;
        let (size, completion) = (queue.size.load(Acquire), queue.completion.load(Relaxed) as usize);
        let sound = (2..=ENTRIES_MAX).contains(&size) && self.is_completion(completion);
        sound.then(|| SubmissionView {
            size,
            completion,
            base: queue.base.load(Relaxed),
            fetched: queue.fetched.load(Acquire),
        })
    }

    /// Whether there is such a completion queue.
    pub fn is_completion(&self, number: usize) -> bool {
        let size = self.record.completion(number).map_or(0, |queue| queue.size.load(Acquire));
        (2..=ENTRIES_MAX).contains(&size)
    }

    /// Whether some submission queue uses it.
    pub fn is_used(&self, completion: usize) -> bool {
        (0..QUEUES).any(|number| self.submission(number).is_some_and(|queue| queue.completion == completion))
    }

    /// Makes a submission queue.
    pub fn create_submission(&self, number: usize, size: u32, base: u64, completion: usize) {
        let Some(queue) = self.record.submission(number) else { return };
        queue.base.store(base, Relaxed);
        queue.completion.store(completion as u32, Relaxed);
        queue.fetched.store(0, Relaxed);
        self.silence(number * 2);
        queue.size.store(size, Release);
    }

    /// Makes a completion queue; its vector, if it interrupts.
    pub fn create_completion(&self, number: usize, size: u32, base: u64, vector: Option<u16>) {
        let Some(queue) = self.record.completion(number) else { return };
        queue.base.store(base, Relaxed);
        queue.vector.store(u32::from(vector.unwrap_or(0)), Relaxed);
        queue.interrupts.store(u32::from(vector.is_some()), Relaxed);
        queue.produced.store(0, Relaxed);
        queue.head.store(0, Relaxed);
        self.silence(number * 2 + 1);
        queue.size.store(size, Release);
    }

    /// Whether a queue like that is there, which a predecessor made without saying so.
    pub fn has_submission(&self, number: usize, size: u32, base: u64, completion: usize) -> bool {
        self.submission(number)
            .is_some_and(|queue| (queue.size, queue.base, queue.completion) == (size, base, completion))
    }

    /// The same for a completion queue.
    pub fn has_completion(&self, number: usize, size: u32, base: u64) -> bool {
        let Some(queue) = self.record.completion(number) else { return false };
        (queue.size.load(Acquire), queue.base.load(Relaxed)) == (size, base)
    }

    /// Takes a submission queue away; what it holds goes with it.
    pub fn delete_submission(&self, number: usize) {
        if let Some(queue) = self.record.submission(number) {
            queue.size.store(0, Release);
            self.silence(number * 2);
        }
    }

    /// Takes a completion queue away.
    pub fn delete_completion(&self, number: usize) {
        if let Some(queue) = self.record.completion(number) {
            queue.size.store(0, Release);
            self.silence(number * 2 + 1);
        }
    }

    fn silence(&self, number: usize) {
        for bell in [self.record.doorbell(number), self.record.seen(number)].into_iter().flatten() {
            bell.store(0, Release);
        }
    }

    /// Goes on where a predecessor was: mends what it was in the middle of. Gives the slots to be carried out, in the order
    /// in which they were fetched, and vectors to be raised.
    ///
    /// # Errors
    /// [`Fatal`] when a completion queue is not in memory.
    pub fn adopt(&mut self, dma: &dyn Dma) -> Result<(Vec<u16>, Vec<u16>), Fatal> {
        let record = std::sync::Arc::clone(&self.record);
        let (mut again, mut vectors) = (Vec::new(), Vec::new());
        self.free.clear();
        for number in (0..SLOTS as u16).rev() {
            let Some(slot) = record.slot(number) else { continue };
            let queue = slot.queue.load(Relaxed) as usize;
            let view = self.submission(queue);
            let order = slot.number.load(Relaxed);
            match (slot.state.load(Acquire), view) {
                (TAKEN, Some(view)) if order <= view.fetched => {
                    if order == view.fetched
                        && let Some(queue) = record.submission(queue)
                    {
                        queue.fetched.store(order.wrapping_add(1), Release);
                    }
                    again.push((queue, order, number));
                    continue;
                }
                (ANSWERED, Some(view)) => {
                    let produced = record.completion(view.completion).map_or(0, |queue| queue.produced.load(Acquire));
                    if slot.position.load(Relaxed) == produced {
                        vectors.extend(self.write_completion(slot, view.completion, produced, dma)?);
                    }
                }
                _ => {}
            }
            slot.state.store(FREE, Release);
            self.free.push(number);
        }
        again.sort_unstable();
        if strikes(Sabotage::ReplayElsewhere) {
            self.skip_one();
        }
        Ok((again.into_iter().map(|(_, _, number)| number).collect(), vectors))
    }

    /// Forgets a command that nobody has taken: a fault that is planted, never in a product.
    fn skip_one(&self) {
        for number in 1..QUEUES {
            let (Some(view), Some(entry)) = (self.submission(number), self.record.submission(number)) else { continue };
            if doorbell_value(&self.record, number * 2) != (view.fetched % u64::from(view.size)) as u32 {
                entry.fetched.store(view.fetched.wrapping_add(1), Release);
            }
        }
    }

    /// The slot's command and its queue.
    pub fn command(&self, slot: u16) -> Option<(usize, Command)> {
        let slot = self.record.slot(slot)?;
        Some((slot.queue.load(Relaxed) as usize, slot.command()))
    }

    /// Whether any slot holds a command of this queue, but for those that do not count.
    pub fn has_taken(&self, queue: usize, but: &[u16]) -> bool {
        (0..SLOTS as u16).filter(|number| !but.contains(number)).any(|number| {
            self.record
                .slot(number)
                .is_some_and(|slot| slot.state.load(Acquire) != FREE && slot.queue.load(Relaxed) as usize == queue)
        })
    }

    /// Slots that hold a command.
    pub fn taken(&self) -> usize {
        SLOTS - self.free.len()
    }

    /// Takes the next command of any queue that may fetch, in turns. `Ok(None)` when there is none, or no room for one.
    ///
    /// # Errors
    /// [`Fatal`] when a queue is not in memory.
    pub fn fetch(&mut self, dma: &dyn Dma, may: impl Fn(usize) -> bool) -> Result<Option<u16>, Fatal> {
        for offset in 0..QUEUES {
            let number = (self.turn + offset) % QUEUES;
            let reserved = if number == 0 { 0 } else { usize::from(ADMIN_SLOTS) };
            if self.free.len() <= reserved || !may(number) {
                continue;
            }
            let Some(queue) = self.submission(number) else { continue };
            let tail = doorbell_value(&self.record, number * 2);
            let head = (queue.fetched % u64::from(queue.size)) as u32;
            if tail >= queue.size || tail == head {
                continue;
            }
            let mut bytes = [0; COMMAND_LEN as usize];
            let at = queue.base.checked_add(u64::from(head) * COMMAND_LEN).ok_or(Fatal)?;
            if !dma.read(at, &mut bytes) {
                return Err(Fatal);
            }
            step(Step::Fetch);
            let Some(number_of_slot) = self.free.pop() else { return Ok(None) };
            let (Some(slot), Some(entry)) = (self.record.slot(number_of_slot), self.record.submission(number)) else {
                return Ok(None);
            };
            slot.set_command(&Command::from_bytes(&bytes));
            slot.queue.store(number as u32, Relaxed);
            slot.number.store(queue.fetched, Relaxed);
            slot.state.store(TAKEN, Release);
            step(Step::Mark);
            entry.fetched.store(queue.fetched.wrapping_add(1), Release);
            self.turn = (number + 1) % QUEUES;
            return Ok(Some(number_of_slot));
        }
        Ok(None)
    }

    /// Takes note of what was rung.
    pub fn note_doorbells(&self) {
        (0..QUEUES * 2).for_each(|number| {
            doorbell_value(&self.record, number);
        });
    }

    /// Doorbells that were rung wrongly since the last look: one of no queue, one with a value that it cannot have. They are
    /// silenced.
    pub fn wrong_doorbells(&self) -> (bool, bool) {
        let (mut register, mut value) = (false, false);
        for number in 0..QUEUES * 2 {
            let Some(bell) = self.record.doorbell(number) else { break };
            let rung = doorbell_value(&self.record, number);
            if rung == 0 {
                continue;
            }
            let size = if number % 2 == 0 {
                self.submission(number / 2).map_or(0, |queue| queue.size)
            } else {
                self.record.completion(number / 2).map_or(0, |queue| queue.size.load(Acquire))
            };
            if rung < size {
                continue;
            }
            register |= size == 0;
            value |= size != 0;
            // What it last said that could be right.
            let right = match number % 2 {
                _ if size == 0 => 0,
                0 => self.submission(number / 2).map_or(0, |queue| (queue.fetched % u64::from(queue.size)) as u32),
                _ => self.record.completion(number / 2).map_or(0, |queue| queue.head.load(Relaxed)),
            };
            // Only if nobody has rung it meanwhile.
            let _ = bell.compare_exchange(rung, right, Release, Relaxed);
            doorbell_value(&self.record, number);
        }
        (register, value)
    }

    /// Answers a slot and frees it.
    ///
    /// # Errors
    /// [`Fatal`] when the completion queue is not in memory.
    pub fn complete(&mut self, number: u16, status: Status, result: u32, dma: &dyn Dma) -> Result<Posted, Fatal> {
        let record = std::sync::Arc::clone(&self.record);
        let Some(slot) = record.slot(number).filter(|slot| slot.state.load(Acquire) == TAKEN) else {
            return Ok(Posted::Done(None));
        };
        let Some(view) = self.submission(slot.queue.load(Relaxed) as usize) else {
            slot.state.store(FREE, Release);
            self.free.push(number);
            return Ok(Posted::Done(None));
        };
        let Some(queue) = record.completion(view.completion) else { return Err(Fatal) };
        let size = queue.size.load(Acquire).max(2);
        let rung = doorbell_value(&record, view.completion * 2 + 1);
        if rung < size {
            queue.head.store(rung, Relaxed);
        }
        let produced = queue.produced.load(Acquire);
        let next = ((produced + 1) % u64::from(size)) as u32;
        if next == queue.head.load(Relaxed) {
            return Ok(Posted::Full);
        }
        slot.status.store(u32::from(status.0), Relaxed);
        slot.result.store(result, Relaxed);
        slot.position.store(produced, Relaxed);
        slot.state.store(ANSWERED, Release);
        step(Step::Status);
        let vector = self.write_completion(slot, view.completion, produced, dma)?;
        if strikes(Sabotage::CompleteTwice) {
            self.write_completion(slot, view.completion, produced.wrapping_add(1), dma)?;
        }
        step(Step::Counted);
        slot.state.store(FREE, Release);
        step(Step::Unmarked);
        self.free.push(number);
        Ok(Posted::Done(vector))
    }

    /// Writes the entry of an answered slot and counts it.
    fn write_completion(
        &self,
        slot: &Slot,
        completion: usize,
        produced: u64,
        dma: &dyn Dma,
    ) -> Result<Option<u16>, Fatal> {
        let number = slot.queue.load(Relaxed) as usize;
        let (Some(view), Some(queue)) = (self.submission(number), self.record.completion(completion)) else {
            return Err(Fatal);
        };
        let size = u64::from(queue.size.load(Acquire).max(2));
        let entry = Completion {
            result: slot.result.load(Relaxed),
            head: (view.fetched % u64::from(view.size)) as u16,
            queue: number as u16,
            id: slot.command().id(),
            status: Status(slot.status.load(Relaxed) as u16),
        };
        // The first time round the phase is one.
        let phase = (produced / size).is_multiple_of(2);
        let at = queue.base.load(Relaxed).checked_add(produced % size * COMPLETION_LEN).ok_or(Fatal)?;
        let last = at.checked_add(12).ok_or(Fatal)?;
        if !dma.write(at, &entry.front()) {
            return Err(Fatal);
        }
        step(Step::UsedElement);
        if !dma.publish(last, entry.last(phase)) {
            return Err(Fatal);
        }
        step(Step::UsedIndex);
        queue.produced.store(produced.wrapping_add(1), Release);
        self.record.count();
        let interrupts = queue.interrupts.load(Relaxed) != 0;
        Ok(interrupts.then(|| queue.vector.load(Relaxed) as u16))
    }
}
