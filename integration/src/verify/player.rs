//! Plays a load on a disk: guest and VMM in one, with its own rings and guest memory.
//!
//! One thread invokes, completes and judges, so the history is exact. Nothing of it is in the device's process, which may
//! be killed at any time: [`Player::died`] and [`Player::connect`] go on with its successor. Buffers are poisoned before a
//! request is published and after it is completed, go to the end of a queue, and are checked when their turn comes.
//!
//! From time to time everything is awaited and flushed, so that the judge can forget the past.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::disk::Kind as Request;
use atoll_kit::driver::queue::Woken;
use atoll_kit::driver::{Driver, Guest, Options};
use atoll_verify::blk::sector::{SECTOR, is_poison, poison};
use atoll_verify::blk::{Event, Judge, Kind, Operation, Outcome, Record, Verdict, Workload, history};
use atoll_verify::dice::{Dice, mix};

use super::disk_queues::{DiskQueues, QUEUE_BYTES, Range};
use crate::chaos::stall::StallWatch;

/// Bytes beside the data of a buffer that nobody may touch.
const GUARD: u64 = 64;
/// How long to wait for a completion before deadlines are looked at.
const TICK: Duration = Duration::from_millis(20);

/// How a load is played.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Queues.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Operations in flight.
    pub depth: usize,
    /// And where the queues are long ([`Player::lengthen`]).
    pub depth_long: usize,
    /// How long an operation may take.
    pub deadline: Duration,
    /// Operations between two settlements; the judge remembers all of them until then.
    pub segment: u64,
}

impl Default for Style {
    fn default() -> Self {
        Self {
            queues: 2,
            queue_size: 128,
            depth: 24,
            depth_long: 24,
            deadline: Duration::from_secs(20),
            segment: 20_000,
        }
    }
}

impl Style {
    /// A guest without a device for this load.
    pub fn driver(&self, load: &Workload) -> Result<Driver> {
        Driver::new(self.options(load))
    }

    /// What a guest for this load is made of.
    pub fn options(&self, load: &Workload) -> Options {
        let end = self.data() + self.stride(load) * self.buffers() as u64;
        let memory = end.next_multiple_of(1 << 20) as usize;
        Options { queues: self.queues, size: self.queue_size, memory, ..Options::default() }
    }

    fn data(&self) -> u64 {
        u64::from(self.queues) * QUEUE_BYTES
    }

    fn stride(&self, load: &Workload) -> u64 {
        (u64::from(load.sectors_max) * SECTOR as u64 + 2 * GUARD).next_multiple_of(4096)
    }

    fn buffers(&self) -> usize {
        2 * self.depth.max(self.depth_long) + 2
    }
}

/// A place in guest memory, and the operation that it was poisoned for.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    at: u64,
    owner: u64,
}

struct InFlight {
    operation: Operation,
    buffer: Buffer,
    since: Instant,
}

/// A load being played, on rings of virtio or on other queues.
pub struct Player<Q = Driver> {
    load: Workload,
    style: Style,
    driver: Q,
    connected: bool,
    judge: Judge,
    log: Option<Box<dyn Write>>,
    sequence: u64,
    start: Instant,
    next: u64,
    settled_at: u64,
    incarnation: u32,
    in_flight: HashMap<(usize, u16), InFlight>,
    free: VecDeque<Buffer>,
    scratch: Vec<u8>,
    stuck: bool,
    /// Counts deaths of which nobody tells the player.
    obituary: Option<Obituary>,
    deaths: u64,
    stall: StallWatch,
    /// Completions that came with nobody interrupted for them.
    uncalled: u64,
    completed: u64,
    issued: u64,
    long: bool,
}

/// Says how many backends a device has lost so far.
pub type Obituary = Box<dyn FnMut() -> u64>;

impl Player {
    /// A player without a device. The disk that comes must hold zeroes.
    pub fn new(load: Workload, style: Style) -> Result<Self> {
        let driver = style.driver(&load)?;
        Ok(Self::over(load, style, driver, None))
    }

    /// The guest and its rings, for devices that are not reached by a socket.
    pub fn driver(&mut self) -> &mut Driver {
        &mut self.driver
    }

    /// Starts on a device, or goes on with its successor.
    pub fn connect(&mut self, stream: UnixStream) -> Result<()> {
        self.driver.connect(stream)?;
        self.connected = true;
        Ok(())
    }

    /// The device has died: its process is gone, or it hung up. What it had completed counts.
    pub fn died(&mut self) -> Result<()> {
        self.collect()?;
        self.driver.disconnect();
        self.connected = false;
        self.incarnation += 1;
        self.record(Event::Death)
    }

    /// Guest and device are gone, and what was not flushed; the same load goes on in a new guest.
    pub fn power_lost(&mut self) -> Result<()> {
        self.record(Event::PowerLoss)?;
        self.in_flight.clear();
        self.driver = self.style.driver(&self.load)?;
        self.connected = false;
        self.incarnation += 1;
        self.lay_out();
        Ok(())
    }
}

impl<Q: DiskQueues> Player<Q> {
    /// A player on rings that a front end of its own serves, which replaces backends by itself. The disk must hold zeroes.
    pub fn over(load: Workload, style: Style, driver: Q, obituary: Option<Obituary>) -> Self {
        let mut player = Self {
            load,
            style,
            driver,
            connected: false,
            judge: Judge::new(),
            log: None,
            sequence: 0,
            start: Instant::now(),
            next: 0,
            settled_at: 0,
            incarnation: 0,
            in_flight: HashMap::new(),
            free: VecDeque::new(),
            scratch: Vec::new(),
            stuck: false,
            obituary,
            deaths: 0,
            stall: StallWatch::default(),
            uncalled: 0,
            completed: 0,
            issued: 0,
            long: false,
        };
        player.lay_out();
        player
    }

    /// The guest resets the device, which has given its rings back, and begins anew on `driver`: what was in flight has
    /// been done by now, or never will be.
    pub fn begin_anew(&mut self, driver: Q) -> Result<()> {
        self.notice_deaths()?;
        self.in_flight.clear();
        self.stall = StallWatch::default();
        self.driver = driver;
        self.incarnation += 1;
        self.lay_out();
        self.next = u64::from(self.incarnation) << 32;
        self.settled_at = self.next;
        self.start = Instant::now();
        self.record(Event::Begin(self.load, self.incarnation))
    }

    /// The power fails under guest and device; the same load goes on in a new guest on `driver`.
    pub fn lose_power(&mut self, driver: Q) -> Result<()> {
        self.notice_deaths()?;
        self.record(Event::PowerLoss)?;
        self.in_flight.clear();
        self.stall = StallWatch::default();
        self.driver = driver;
        self.incarnation += 1;
        self.lay_out();
        Ok(())
    }

    /// Another device from now on: it counts its own deaths.
    pub fn watch(&mut self, obituary: Obituary) {
        (self.obituary, self.deaths) = (Some(obituary), 0);
    }

    /// The backend is killed now.
    pub fn killed(&mut self, at: Instant) {
        self.stall.killed(at, self.in_flight.keys().copied());
    }

    /// How the last kill was felt.
    pub fn stall(&self) -> &StallWatch {
        &self.stall
    }

    /// Nothing was found wrong so far; sectors are judged when the player settles.
    pub fn is_ok_so_far(&self) -> bool {
        self.judge.ok_so_far()
    }

    /// Requests that were completed.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Requests that were put into the rings.
    pub fn issued(&self) -> u64 {
        self.issued
    }

    /// From now on more operations at a time, made in heaps when half of them are done; or as usual.
    pub fn lengthen(&mut self, long: bool) {
        self.long = long;
    }

    /// Completions that came with nobody interrupted for them.
    pub fn uncalled(&self) -> u64 {
        self.uncalled
    }

    /// Requests in the rings that the device has not completed, whatever the player knows.
    pub fn pending(&mut self) -> Result<u32> {
        let mut pending = 0;
        for index in 0..usize::from(self.style.queues) {
            let (available, used) = self.driver.counts(index)?;
            pending += u32::from(available.wrapping_sub(used));
        }
        Ok(pending)
    }

    /// The used indices of all rings, as one number.
    pub fn used(&mut self) -> Result<u64> {
        let mut used = 0;
        for index in 0..usize::from(self.style.queues) {
            used = used << 16 | u64::from(self.driver.counts(index)?.1);
        }
        Ok(used)
    }

    /// One turn: invokes what there is room for, takes what is completed, waits a moment when there is nothing.
    pub fn turn(&mut self) -> Result<()> {
        if self.next - self.settled_at >= self.style.segment {
            self.settle()?;
        }
        self.push()?;
        if self.collect()? == 0 {
            self.wait()?;
        }
        Ok(())
    }

    /// Invokes what there is room for.
    pub fn push(&mut self) -> Result<()> {
        let depth = if self.long { self.style.depth_long } else { self.style.depth };
        if self.long && self.in_flight.len() > depth / 2 {
            return Ok(());
        }
        while self.in_flight.len() < depth {
            let operation = self.load.operation(self.next);
            if !self.invoke(operation)? {
                break;
            }
            self.next += 1;
        }
        self.publish()
    }

    /// What is taken from the rings after this may come from a successor: the judge must have heard of the death before.
    fn notice_deaths(&mut self) -> Result<()> {
        let Some(obituary) = &mut self.obituary else { return Ok(()) };
        let deaths = obituary();
        if std::mem::replace(&mut self.deaths, deaths) != deaths {
            self.record(Event::Death)?;
        }
        Ok(())
    }

    /// Also writes the history as text.
    pub fn log_to(&mut self, log: Box<dyn Write>) {
        self.log = Some(log);
    }

    fn lay_out(&mut self) {
        let stride = self.style.stride(&self.load);
        self.scratch = vec![0; stride as usize];
        self.free = (0..self.style.buffers() as u64)
            .map(|number| Buffer { at: self.style.data() + number * stride, owner: 0 })
            .collect();
        poison(&mut self.scratch, 0);
        for buffer in &self.free {
            self.driver.guest().write(buffer.at, &self.scratch);
        }
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.next
    }

    /// A deadline was missed; there is no use in going on.
    pub fn is_stuck(&self) -> bool {
        self.stuck
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn record(&mut self, event: Event) -> Result<()> {
        let at_us = u64::try_from(self.start.elapsed().as_micros())?;
        if self.sequence == 0 {
            let begin = Record { at_us: 0, event: Event::Begin(self.load, 0) };
            self.tell(&begin)?;
        }
        self.tell(&Record { at_us, event })
    }

    fn tell(&mut self, record: &Record) -> Result<()> {
        if let Some(log) = &mut self.log {
            log.write_all(history::line(self.sequence, record).as_bytes())?;
        }
        self.sequence += 1;
        self.judge.feed(record);
        Ok(())
    }

    /// Plays until `enough` says so, or until a deadline is missed. It looks after each batch.
    pub fn play(&mut self, mut enough: impl FnMut(&Self) -> bool) -> Result<()> {
        while !self.stuck && !enough(self) {
            self.turn()?;
        }
        Ok(())
    }

    /// Awaits everything that is in flight.
    pub fn drain(&mut self) -> Result<()> {
        while !self.stuck && !self.in_flight.is_empty() {
            if self.collect()? == 0 {
                self.wait()?;
            }
        }
        Ok(())
    }

    fn one(&mut self, operation: Operation) -> Result<()> {
        while !self.stuck && !self.invoke(operation)? {
            self.wait()?;
            self.collect()?;
        }
        self.publish()
    }

    /// Awaits and flushes everything.
    pub fn settle(&mut self) -> Result<()> {
        self.drain()?;
        let flush = Operation { id: self.next, kind: Kind::Flush, lba: 0, sectors: 0, writer: 0 };
        self.next += 1;
        self.one(flush)?;
        self.drain()?;
        if !self.stuck {
            self.record(Event::Settled)?;
        }
        self.settled_at = self.next;
        Ok(())
    }

    /// Reads all sectors once.
    pub fn sweep(&mut self) -> Result<()> {
        for operation in self.load.sweep(self.next) {
            self.next += 1;
            while !self.stuck && self.in_flight.len() >= self.style.depth {
                self.wait()?;
                self.collect()?;
            }
            self.one(operation)?;
        }
        self.drain()
    }

    /// Ends the load: awaits everything, reads all sectors, checks buffers and rings, and judges.
    pub fn finish(mut self) -> Result<Verdict> {
        self.settle()?;
        self.sweep()?;
        for buffer in std::mem::take(&mut self.free) {
            self.check(buffer)?;
        }
        let end = self.rings()?;
        self.record(end)?;
        if let Some(log) = &mut self.log {
            log.flush()?;
        }
        Ok(self.judge.verdict())
    }

    fn rings(&mut self) -> Result<Event> {
        let (mut avail_sum, mut used_sum) = (0_u32, 0_u32);
        for index in 0..usize::from(self.style.queues) {
            let (avail, used) = self.driver.counts(index)?;
            avail_sum += u32::from(avail);
            used_sum += u32::from(used);
        }
        // A device that does not answer any longer is not asked: its verdict is known.
        let left = self.driver.left(self.connected && !self.stuck)?;
        Ok(Event::End { in_flight: self.in_flight.len() as u32 + left, avail: avail_sum, used: used_sum })
    }

    fn check(&mut self, buffer: Buffer) -> Result<()> {
        self.driver.guest().read(buffer.at, &mut self.scratch);
        if !is_poison(&self.scratch, buffer.owner) {
            self.record(Event::Late(buffer.owner))?;
        }
        Ok(())
    }

    /// Hands an operation to its writer's queue; false when there is no room for it.
    fn invoke(&mut self, operation: Operation) -> Result<bool> {
        let index = usize::from(operation.writer % self.style.queues);
        let Some(buffer) = self.free.pop_front() else { return Ok(false) };
        self.check(buffer)?;
        let (at, len) = (buffer.at + GUARD, operation.sectors * SECTOR as u32);
        poison(&mut self.scratch, operation.id);
        let data = GUARD as usize..GUARD as usize + len as usize;
        let mut dice = Dice::new(mix(operation.id, self.load.seed));
        let (request, parts) = match operation.kind {
            Kind::Read => (Request::In, split(at, len, &mut dice)),
            Kind::Write => {
                let bytes = self.scratch.get_mut(data).context("a buffer holds the longest operation")?;
                self.load.fill(&operation, self.incarnation, bytes);
                (Request::Out, split(at, len, &mut dice))
            }
            Kind::Flush => (Request::Flush, Vec::new()),
            Kind::Discard | Kind::Zeroes => {
                let range = self.scratch.get_mut(GUARD as usize..GUARD as usize + 16).context("16 bytes")?;
                range[..8].copy_from_slice(&operation.lba.to_le_bytes());
                range[8..12].copy_from_slice(&operation.sectors.to_le_bytes());
                // Zeroes: every other one may free the space.
                let unmap = u32::from(operation.kind == Kind::Zeroes && dice.below(2) == 0);
                range[12..].copy_from_slice(&unmap.to_le_bytes());
                let request = if operation.kind == Kind::Discard { Request::Discard } else { Request::WriteZeroes };
                (request, vec![(at, 16)])
            }
        };
        self.driver.guest().write(buffer.at, &self.scratch);
        let range = Range { sector: operation.lba, sectors: operation.sectors };
        let Some(head) = self.driver.add(index, request, range, &parts)? else {
            poison(&mut self.scratch, buffer.owner);
            self.driver.guest().write(buffer.at, &self.scratch);
            self.free.push_front(buffer);
            return Ok(false);
        };
        self.record(Event::Invoke(operation))?;
        let buffer = Buffer { at: buffer.at, owner: operation.id };
        let before = self.in_flight.insert((index, head), InFlight { operation, buffer, since: Instant::now() });
        ensure!(before.is_none(), "head {head} of queue {index} was given out twice");
        self.issued += 1;
        Ok(true)
    }

    fn publish(&mut self) -> Result<()> {
        for index in 0..usize::from(self.style.queues) {
            self.driver.publish(index)?;
        }
        Ok(())
    }

    /// Takes what is completed; says how much that was.
    pub fn collect(&mut self) -> Result<usize> {
        let mut count = 0;
        for index in 0..usize::from(self.style.queues) {
            loop {
                let Some((head, status)) = self.driver.take(index)? else { break };
                self.notice_deaths()?;
                self.stall.completed((index, head));
                count += 1;
                match (self.in_flight.remove(&(index, head)), status) {
                    (Some(done), Some(status)) => self.complete(&done, status)?,
                    (Some(still), None) => {
                        self.record(Event::Stray(head.into()))?;
                        // Its descriptors are gone all the same: it counts as ended.
                        self.complete(&still, 0xff)?;
                    }
                    (None, _) => self.record(Event::Stray(head.into()))?,
                }
            }
        }
        Ok(count)
    }

    fn complete(&mut self, done: &InFlight, status: u8) -> Result<()> {
        let &InFlight { operation, buffer, .. } = done;
        self.completed += 1;
        self.driver.guest().read(buffer.at, &mut self.scratch);
        let (guard, len) = (GUARD as usize, operation.sectors as usize * SECTOR);
        let used = match operation.kind {
            Kind::Read | Kind::Write => len,
            Kind::Flush => 0,
            Kind::Discard | Kind::Zeroes => 16,
        };
        let (before, rest) = self.scratch.split_at(guard);
        let (data, after) = rest.split_at(used);
        let guarded = is_poison(before, operation.id) && is_poison(after, operation.id);
        let seen = match operation.kind {
            Kind::Read if status == 0 => history::look(data, self.load.run(), operation.lba),
            _ => Vec::new(),
        };
        let outcome = if status == 0 { Outcome::Done } else { Outcome::Failed(status.into()) };
        self.record(Event::Complete(operation.id, outcome, seen))?;
        if !guarded {
            self.record(Event::Late(operation.id))?;
        }
        poison(&mut self.scratch, operation.id);
        self.driver.guest().write(buffer.at, &self.scratch);
        self.free.push_back(buffer);
        Ok(())
    }

    /// Waits a moment for a completion, and looks at the deadlines.
    fn wait(&mut self) -> Result<()> {
        let Some((&(oldest, _), _)) = self.in_flight.iter().min_by_key(|(_, request)| request.since) else {
            return Ok(());
        };
        // A short wait where several queues may complete first.
        let tick = if self.style.queues == 1 { TICK } else { TICK / 20 };
        if self.driver.wait(oldest, tick)? == Woken::Uncalled {
            self.uncalled += 1;
        }
        let late: Vec<u64> = self
            .in_flight
            .values()
            .filter(|request| request.since.elapsed() > self.style.deadline)
            .map(|request| request.operation.id)
            .collect();
        for op in late {
            self.stuck = true;
            self.record(Event::Overdue(op))?;
        }
        Ok(())
    }

    /// Guest memory.
    pub fn guest(&self) -> &Guest {
        self.driver.guest()
    }
}

/// One to three ranges that make up a buffer, cut at odd places.
fn split(at: u64, len: u32, dice: &mut Dice) -> Vec<(u64, u32)> {
    let mut cuts: Vec<u32> = (0..dice.below(3)).map(|_| 1 + dice.below(u64::from(len) - 1) as u32).collect();
    cuts.push(len);
    cuts.sort_unstable();
    cuts.dedup();
    let mut from = 0;
    cuts.into_iter()
        .map(|to| {
            let part = (at + u64::from(from), to - from);
            from = to;
            part
        })
        .collect()
}
