//! A load on one queue: what the guests of simple classes have in common. A class says what a request is and what to make of
//! one that is done.

use std::time::Instant;

use anyhow::{Context, Result};
use atoll_kit::driver::{Driver, Guest, Options, Queue};

use super::load::{Findings, Load};
use super::requests::{Completed, Requests, place};
use super::rig::Rig;
use super::stall::StallWatch;

/// Guest memory that such a load needs, in bytes.
pub const MEMORY: u64 = 16 << 20;
/// Requests in flight.
const DEPTH: usize = 60;

/// What a class asks of its device.
pub trait Trade {
    /// Queues that the device has.
    const QUEUES: u16;
    /// Which of them is used.
    const QUEUE: usize;
    /// Entries of a queue.
    const SIZE: u16;
    /// Bytes of guest memory that a request has for itself.
    const BYTES: u64;

    /// Puts request `number` into the queue; its memory begins at `at`.
    fn ask(&mut self, queue: &mut Queue, guest: &Guest, at: u64, number: u64) -> Option<u16>;
    /// Looks at one that is done.
    fn look(&mut self, guest: &Guest, at: u64, done: &Completed<u64>, findings: &mut Findings);
    /// The backend was killed, or the device reset.
    fn broke(&mut self) {}
    /// Looks at what is left when nothing is in flight; so many requests were made.
    fn judge(&mut self, _made: u64, _findings: &mut Findings) -> Result<()> {
        Ok(())
    }
}

/// The guest.
pub struct OneQueue<T> {
    driver: Driver,
    requests: Requests<u64>,
    findings: Findings,
    next: u64,
    trade: T,
}

fn options<T: Trade>() -> Options {
    Options { queues: T::QUEUES, size: T::SIZE, memory: MEMORY as usize, ..Options::default() }
}

impl<T: Trade> OneQueue<T> {
    /// Starts the load.
    pub fn start(rig: &mut Rig, trade: T) -> Result<Self> {
        let driver = rig.start(options::<T>())?;
        Ok(Self { driver, requests: Requests::new(T::QUEUE), findings: Findings::default(), next: 0, trade })
    }

    fn ask(&mut self) -> Result<bool> {
        let (queue, guest) = self.driver.queue(T::QUEUE)?;
        let Some(head) = queue.next_head() else { return Ok(false) };
        let at = place(T::QUEUES, head, T::BYTES)?;
        self.trade.ask(queue, guest, at, self.next).context("a free descriptor")?;
        self.requests.added(head, self.next, &mut self.findings);
        self.next += 1;
        Ok(true)
    }

    fn take(&mut self) -> Result<bool> {
        let Some(done) = self.requests.take(&mut self.driver, &mut self.findings)? else { return Ok(false) };
        let (_, guest) = self.driver.queue(T::QUEUE)?;
        self.trade.look(guest, place(T::QUEUES, done.head, T::BYTES)?, &done, &mut self.findings);
        self.findings.requests += 1;
        Ok(true)
    }

    fn judge(&mut self) -> Result<()> {
        while !self.requests.is_empty() && !self.requests.is_stuck() {
            if !self.take()? {
                self.requests.wait(&mut self.driver, &mut self.findings)?;
            }
        }
        self.trade.judge(self.next, &mut self.findings)
    }
}

impl<T: Trade> Load for OneQueue<T> {
    fn push(&mut self) -> Result<()> {
        for _ in 0..self.requests.room(DEPTH, usize::from(T::SIZE)) {
            if !self.ask()? {
                break;
            }
        }
        let (queue, guest) = self.driver.queue(T::QUEUE)?;
        queue.publish(guest)
    }
    fn turn(&mut self) -> Result<()> {
        self.push()?;
        let mut any = false;
        while self.take()? {
            any = true;
        }
        if any { Ok(()) } else { self.requests.wait(&mut self.driver, &mut self.findings) }
    }
    fn poll(&mut self) -> Result<()> {
        while self.take()? {}
        Ok(())
    }
    fn pending(&mut self) -> Result<u32> {
        self.requests.pending(&mut self.driver)
    }
    fn used(&mut self) -> Result<u64> {
        let (queue, guest) = self.driver.queue(T::QUEUE)?;
        Ok(queue.used_index(guest).into())
    }
    fn completed(&self) -> u64 {
        self.requests.completed()
    }
    fn issued(&self) -> u64 {
        self.requests.issued()
    }
    fn lengthen(&mut self, long: bool) {
        self.requests.lengthen(long);
    }
    fn killed(&mut self, at: Instant) {
        self.trade.broke();
        self.requests.killed(at);
    }
    fn stall(&self) -> &StallWatch {
        self.requests.stall()
    }
    fn is_stuck(&self) -> bool {
        self.requests.is_stuck()
    }
    fn begin_anew(&mut self, rig: &mut Rig) -> Result<()> {
        self.trade.broke();
        self.requests.forget();
        self.driver = rig.start(options::<T>())?;
        Ok(())
    }
    fn is_broken(&mut self) -> Result<bool> {
        self.judge()?;
        Ok(self.findings.broken() > 0)
    }
    fn accuse(&mut self, words: String) {
        self.findings.corrupted += 1;
        self.findings.say(words);
    }
    fn finish(mut self: Box<Self>) -> Result<Findings> {
        self.judge()?;
        Ok(self.findings)
    }
}
