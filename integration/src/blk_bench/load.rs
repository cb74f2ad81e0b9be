//! The loads: what the driver keeps in flight, and what it measures.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::Guest;
use atoll_kit::driver::queue::{NEXT, Queue, WRITE};

use super::backend::{Backend, IMAGE_BYTES};

/// Guest address of the data.
const DATA: u64 = 8 << 20;

/// A kind of load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// For people.
    pub name: &'static str,
    /// Requests in flight.
    pub depth: u16,
    /// Bytes of each.
    pub bytes: u32,
    /// One after the other instead of anywhere.
    pub sequential: bool,
}

/// What one measurement gave.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Median time of a request, from before it is published until it is seen completed.
    pub p50_us: f64,
    /// Requests per second.
    pub iops: f64,
    /// Processor time of the back end per request.
    pub cpu_us: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
}

impl Load {
    /// One 4 KiB read at a time.
    pub const QD1: Self = Self { name: "qd1", depth: 1, bytes: 4096, sequential: false };
    /// 32 reads of 4 KiB.
    pub const QD32: Self = Self { name: "qd32", depth: 32, bytes: 4096, sequential: false };
    /// Four sequential reads of 128 KiB.
    pub const SEQUENTIAL: Self = Self { name: "seq128k", depth: 4, bytes: 128 << 10, sequential: true };

    /// Runs the load for about `ms` milliseconds.
    pub fn measure(&self, backend: &mut Backend, ms: u64) -> Result<Sample> {
        let cpu_before = backend.cpu_time()?;
        let (queue, guest) = backend.driver.queue(0)?;
        let mut pump = Pump { load: *self, queue, guest, state: 0x2545_f491_4f6c_dd1d, next: 0 };
        let mut times = Vec::with_capacity(1 << 20);
        let start = Instant::now();
        let end = start + Duration::from_millis(ms);
        let count = pump.run(end, &mut times)?;
        let elapsed = start.elapsed();
        let cpu = backend.cpu_time()? - cpu_before;
        ensure!(count > 0 && !times.is_empty(), "nothing was completed");
        let middle = times.len() / 2;
        let p50_ns = *times.select_nth_unstable(middle).1;
        let iops = count as f64 / elapsed.as_secs_f64();
        Ok(Sample {
            p50_us: f64::from(p50_ns) / 1000.0,
            iops,
            cpu_us: cpu.as_secs_f64() * 1e6 / count as f64,
            bytes_per_second: iops * f64::from(self.bytes),
        })
    }
}

/// Keeps `depth` requests going, each in a chain of its own that is written once.
struct Pump<'a> {
    load: Load,
    queue: &'a mut Queue,
    guest: &'a Guest,
    state: u64,
    next: u64,
}

impl Pump<'_> {
    fn run(&mut self, end: Instant, times: &mut Vec<u32>) -> Result<u64> {
        let depth = self.load.depth;
        let mut started = vec![Instant::now(); usize::from(depth)];
        for slot in 0..depth {
            self.describe(slot);
        }
        for slot in 0..depth {
            self.again(slot);
        }
        self.queue.publish(self.guest)?;
        let mut count = 0_u64;
        let mut stopping = false;
        let mut in_flight = depth;
        while in_flight > 0 {
            let mut batch = 0;
            let now = Instant::now();
            while let Some((head, _)) = self.queue.take(self.guest) {
                let slot = head / 3;
                let begun = started.get_mut(usize::from(slot)).context("a head of ours")?;
                times.push(now.duration_since(*begun).as_nanos().try_into().unwrap_or(u32::MAX));
                ensure!(self.guest.load::<u8>(self.status(slot)) == 0, "a request failed");
                count += 1;
                in_flight -= 1;
                if !stopping {
                    *begun = now;
                    self.again(slot);
                    in_flight += 1;
                    batch += 1;
                }
            }
            if batch > 0 {
                self.queue.publish(self.guest)?;
                stopping = now >= end;
            } else if in_flight > 0 {
                let before = self.queue.outstanding();
                self.queue.wait(self.guest, Duration::from_secs(5))?;
                ensure!(
                    before > 0 && now.elapsed() < Duration::from_secs(5),
                    "the back end has not answered for five seconds"
                );
            }
        }
        Ok(count)
    }

    fn header(&self, slot: u16) -> u64 {
        self.queue.small + 64 * u64::from(slot)
    }

    fn status(&self, slot: u16) -> u64 {
        self.header(slot) + 32
    }

    /// Writes the chain of a slot: header, data, status. Slot n has descriptors 3 n to 3 n + 2.
    fn describe(&self, slot: u16) {
        let (guest, queue, first) = (self.guest, &*self.queue, slot * 3);
        let data = DATA + u64::from(slot) * u64::from(self.load.bytes);
        guest.store(self.header(slot), 0_u64);
        queue.describe(guest, first, self.header(slot), 16, NEXT, first + 1);
        queue.describe(guest, first + 1, data, self.load.bytes, NEXT | WRITE, first + 2);
        queue.describe(guest, first + 2, self.status(slot), 1, WRITE, 0);
    }

    /// Makes a slot available for the next place on the disk.
    fn again(&mut self, slot: u16) {
        let places = IMAGE_BYTES / u64::from(self.load.bytes);
        let place = if self.load.sequential {
            self.next += 1;
            self.next % places
        } else {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            self.state % places
        };
        self.guest.store(self.header(slot) + 8, place * u64::from(self.load.bytes) / 512);
        self.queue.add_head(self.guest, slot * 3);
    }
}
