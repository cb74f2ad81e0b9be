//! A source of entropy under load: buffers that must come back once, filled, and nothing beside them.

use std::time::Instant;

use anyhow::{Context, Result};
use atoll_kit::driver::{Driver, Options};
use atoll_verify::blk::sector::{is_poison, poison};

use super::load::{Findings, Load};
use super::requests::{Requests, pending, place};
use super::rig::Rig;
use super::stall::StallWatch;

const SIZE: u16 = 256;
/// Buffers in flight.
const DEPTH: usize = 60;
/// Bytes of a buffer, and of what lies between two.
const BYTES: u64 = 2048;
const GUARD: u64 = 2048;

/// The guest.
pub struct EntropyLoad {
    driver: Driver,
    requests: Requests<u64>,
    findings: Findings,
    next: u64,
    scratch: Vec<u8>,
}

fn options() -> Options {
    Options { queues: 1, size: SIZE, memory: EntropyLoad::MEMORY as usize, ..Options::default() }
}

impl EntropyLoad {
    /// Guest memory that such a load needs, in bytes.
    pub const MEMORY: u64 = 16 << 20;

    /// Starts the load.
    pub fn start(rig: &mut Rig) -> Result<Self> {
        let driver = rig.start(options())?;
        let scratch = vec![0; (BYTES + GUARD) as usize];
        Ok(Self { driver, requests: Requests::new(0), findings: Findings::default(), next: 0, scratch })
    }

    fn ask(&mut self) -> Result<bool> {
        let (queue, guest) = self.driver.queue(0)?;
        let Some(head) = queue.next_head() else { return Ok(false) };
        let at = place(1, head, BYTES + GUARD)?;
        poison(&mut self.scratch, self.next);
        guest.write(at, &self.scratch);
        queue.add(guest, &[], &[(at, BYTES as u32)]).context("a free descriptor")?;
        self.requests.added(head, self.next, &mut self.findings);
        self.next += 1;
        Ok(true)
    }

    fn drain(&mut self) -> Result<()> {
        while !self.requests.is_empty() && !self.requests.is_stuck() {
            if !self.take()? {
                self.requests.wait(&mut self.driver, &mut self.findings)?;
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Result<bool> {
        let Some(done) = self.requests.take(&mut self.driver, &mut self.findings)? else { return Ok(false) };
        let (_, guest) = self.driver.queue(0)?;
        guest.read(place(1, done.head, BYTES + GUARD)?, &mut self.scratch);
        let (filled, rest) = self.scratch.split_at((done.written as usize).min(BYTES as usize));
        // Eight bytes of chance are the poison once in 2^64 buffers.
        let untouched = filled.as_chunks::<8>().0.iter().filter(|word| is_poison(&word[..], done.request)).count();
        if filled.is_empty() || untouched > 0 || !is_poison(&rest[filled.len().wrapping_neg() % 8..], done.request) {
            self.findings.corrupted += 1;
            self.findings.say(format!("buffer {}: {} bytes, {untouched} words untouched", done.request, done.written));
        }
        self.findings.requests += 1;
        Ok(true)
    }
}

impl Load for EntropyLoad {
    fn push(&mut self) -> Result<()> {
        for _ in 0..self.requests.room(DEPTH, usize::from(SIZE)) {
            if !self.ask()? {
                break;
            }
        }
        let (queue, guest) = self.driver.queue(0)?;
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
        let (queue, guest) = self.driver.queue(0)?;
        Ok(pending(queue.avail, queue.used_index(guest), guest))
    }
    fn used(&mut self) -> Result<u64> {
        let (queue, guest) = self.driver.queue(0)?;
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
        self.requests.killed(at);
    }
    fn stall(&self) -> &StallWatch {
        self.requests.stall()
    }
    fn is_stuck(&self) -> bool {
        self.requests.is_stuck()
    }
    fn begin_anew(&mut self, rig: &mut Rig) -> Result<()> {
        self.requests.forget();
        self.driver = rig.start(options())?;
        Ok(())
    }
    fn is_broken(&mut self) -> Result<bool> {
        self.drain()?;
        Ok(self.findings.broken() > 0)
    }
    fn accuse(&mut self, words: String) {
        self.findings.corrupted += 1;
        self.findings.say(words);
    }
    fn finish(mut self: Box<Self>) -> Result<Findings> {
        self.drain()?;
        Ok(self.findings)
    }
}
