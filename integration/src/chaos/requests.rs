//! Requests of a simple class on one queue: what is in flight, since when, and who completed it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use atoll_kit::driver::queue::Woken;
use atoll_kit::driver::{Driver, Guest};

use super::disk::REQUEST_MAX;
use super::load::Findings;
use super::stall::StallWatch;

/// How long to wait for a completion before deadlines are looked at.
const TICK: Duration = Duration::from_millis(20);

/// The requests of queue `index`; `T` is what is known of each.
pub struct Requests<T> {
    index: usize,
    in_flight: HashMap<u16, (T, Instant)>,
    stall: StallWatch,
    stuck: bool,
    completed: u64,
    issued: u64,
    long: bool,
}

/// One that was completed.
pub struct Completed<T> {
    /// What is known of it.
    pub request: T,
    /// Its descriptor chain's head.
    pub head: u16,
    /// Bytes that the device says it has written.
    pub written: u32,
}

impl<T> Requests<T> {
    /// None yet.
    pub fn new(index: usize) -> Self {
        Self {
            index,
            in_flight: HashMap::new(),
            stall: StallWatch::default(),
            stuck: false,
            completed: 0,
            issued: 0,
            long: false,
        }
    }

    /// Requests in flight.
    pub fn len(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether none is in flight.
    pub fn is_empty(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Requests that were completed.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Requests that were made.
    pub fn issued(&self) -> u64 {
        self.issued
    }

    /// More at a time from now on, in heaps; or as usual.
    pub fn lengthen(&mut self, long: bool) {
        self.long = long;
    }

    /// How many more to make now, of `usual` at a time or `most` in heaps.
    pub fn room(&self, usual: usize, most: usize) -> usize {
        match self.len() {
            len if !self.long => usual.saturating_sub(len),
            len if len <= most / 2 => most - len,
            _ => 0,
        }
    }

    /// A deadline was missed.
    pub fn is_stuck(&self) -> bool {
        self.stuck
    }

    /// How the last kill was felt.
    pub fn stall(&self) -> &StallWatch {
        &self.stall
    }

    /// The backend is killed now.
    pub fn killed(&mut self, at: Instant) {
        self.stall.killed(at, self.in_flight.keys().map(|head| (self.index, *head)));
    }

    /// The device was reset: nobody will complete these.
    pub fn forget(&mut self) {
        self.in_flight.clear();
        self.stall = StallWatch::default();
    }

    /// A request was made available.
    pub fn added(&mut self, head: u16, request: T, findings: &mut Findings) {
        self.issued += 1;
        if self.in_flight.insert(head, (request, Instant::now())).is_some() {
            findings.duplicated += 1;
            findings.say(format!("head {head} was given back while its request was in flight"));
        }
    }

    /// Takes one that is completed.
    pub fn take(&mut self, driver: &mut Driver, findings: &mut Findings) -> Result<Option<Completed<T>>> {
        let (queue, guest) = driver.queue(self.index)?;
        while let Some((head, written)) = queue.take(guest) {
            self.stall.completed((self.index, head));
            match self.in_flight.remove(&head) {
                Some((request, _)) => {
                    self.completed += 1;
                    return Ok(Some(Completed { request, head, written }));
                }
                None => {
                    findings.duplicated += 1;
                    findings.say(format!("head {head} was completed and was not in flight"));
                }
            }
        }
        Ok(None)
    }

    /// Waits a moment for a completion, and looks at deadlines.
    pub fn wait(&mut self, driver: &mut Driver, findings: &mut Findings) -> Result<()> {
        let (queue, guest) = driver.queue(self.index)?;
        if queue.wait_for_call(guest, TICK)? == Woken::Uncalled {
            findings.uncalled += 1;
            findings.say(format!("queue {}: completed, and nobody was interrupted", self.index));
        }
        let late = self.in_flight.values().filter(|(_, since)| since.elapsed() > REQUEST_MAX).count();
        if late > 0 && !std::mem::replace(&mut self.stuck, true) {
            findings.lost += late as u64;
            findings.say(format!("queue {}: {late} requests missed their deadline", self.index));
        }
        Ok(())
    }

    /// Requests that the device has not completed, as the ring says.
    pub fn pending(&self, driver: &mut Driver) -> Result<u32> {
        let (queue, guest) = driver.queue(self.index)?;
        Ok(pending(queue.avail, queue.used_index(guest), guest))
    }
}

/// Requests between the two indices.
pub fn pending(avail: u64, used: u16, guest: &Guest) -> u32 {
    u32::from(u16::from_le(guest.load(avail + 2)).wrapping_sub(used))
}

/// A place of guest memory behind the rings: entry `number` of `bytes` bytes each.
pub fn place(queues: u16, number: u16, bytes: u64) -> Result<u64> {
    let first = u64::from(queues) * atoll_kit::driver::queue::QUEUE_BYTES;
    first.checked_add(u64::from(number) * bytes).context("guest memory is large enough")
}
