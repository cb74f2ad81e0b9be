//! What a queue thread counts: requests, their latency, how it was woken and how often it interrupted the guest.
//!
//! A clock costs more than anything else here, so it is read as seldom as the histogram allows. Requests that wait for an
//! operation share the moment of the batch in which they were taken, and that of the batch in which they ended. Requests
//! that are finished on this thread are timed in groups of [`GROUP`], whose mean stands for each of them; where requests
//! are so slow that a clock does not matter, each is a group of its own.

use std::time::Instant;

use atoll_protocol::stats::bucket;

use crate::stats::{Part, add};

/// Requests of one group.
const GROUP: u32 = 8;
/// Requests of one group when they are so short that reading a clock is a good part of one.
const GROUP_SHORT: u32 = 32;
/// With a mean below this, they are.
const SHORT_NS: u64 = 500;
/// With a mean above this, each request is timed by itself.
const SLOW_NS: u64 = 4000;

/// One queue's figures, held by its thread.
#[derive(Debug)]
pub struct Meter {
    stats: Part,
    start: Instant,
    /// Nanoseconds from `start` at which requests under way were taken, by head.
    taken: Vec<u64>,
    /// When the present group began, or the present batch.
    since: u64,
    /// Requests of the present group that are finished.
    finished: u32,
    group: u32,
}

impl Meter {
    /// Counts in this part of a page.
    pub fn new(stats: Part) -> Self {
        Self { stats, start: Instant::now(), taken: Vec::new(), since: 0, finished: 0, group: GROUP }
    }

    /// A ring of `size` entries starts.
    pub fn ring(&mut self, size: u16) {
        self.taken = vec![0; usize::from(size)];
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// Requests are about to be taken or finished: looks at the clock.
    pub fn batch(&mut self) {
        self.since = self.now();
        self.finished = 0;
    }

    /// A request of this batch waits for an operation.
    #[inline]
    pub fn pending(&mut self, head: u16) {
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = self.since;
        }
    }

    /// A request of this batch was finished as soon as it was taken.
    #[inline]
    pub fn finished(&mut self) {
        self.finished += 1;
        if self.finished >= self.group {
            self.settle();
        }
    }

    /// A request that waited for an operation has ended in this batch.
    pub fn ended(&mut self, head: u16) {
        let taken = self.taken.get(usize::from(head)).copied().unwrap_or(self.since);
        self.count(self.since.saturating_sub(taken), 1);
    }

    /// The batch is over.
    pub fn settle(&mut self) {
        let count = u64::from(std::mem::take(&mut self.finished));
        if count == 0 {
            return;
        }
        let now = self.now();
        let mean = now.saturating_sub(self.since) / count;
        self.since = now;
        self.count(mean, count);
        self.group = match mean {
            0..SHORT_NS => GROUP_SHORT,
            SHORT_NS..=SLOW_NS => GROUP,
            _ => 1,
        };
    }

    fn count(&self, ns: u64, requests: u64) {
        let stats = &self.stats;
        add(&stats.requests, requests);
        add(&stats.latency_sum_ns, ns.wrapping_mul(requests));
        if let Some(cell) = stats.latency.get(bucket(ns)) {
            add(cell, requests);
        }
    }

    /// A chain made no sense.
    pub fn malformed(&self) {
        add(&self.stats.malformed, 1);
    }

    /// A sleep has ended.
    pub fn woken(&self) {
        add(&self.stats.wakeups, 1);
    }

    /// Work came during a spin.
    pub fn spun(&self) {
        add(&self.stats.spins, 1);
    }

    /// The guest was interrupted.
    pub fn called(&self) {
        add(&self.stats.calls, 1);
    }

    /// A request has waited for so long because of a rate limit.
    pub fn throttled(&self, ns: u64) {
        add(&self.stats.throttled, 1);
        add(&self.stats.throttled_ns, ns);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use super::*;
    use crate::stats::StatsPage;

    fn load(cell: &std::sync::atomic::AtomicU64) -> u64 {
        cell.load(Ordering::Relaxed)
    }

    /// Whatever the way of a request, it is in the histogram once, and the sum is that of what was seen.
    #[test]
    fn each_request_is_counted_once_with_its_time() {
        let page = StatsPage::private(1).unwrap();
        let mut meter = Meter::new(page.part(0).unwrap());
        meter.ring(4);
        meter.batch();
        for _ in 0..GROUP + 3 {
            meter.finished();
        }
        meter.pending(2);
        meter.settle();
        std::thread::sleep(Duration::from_millis(3));
        meter.batch();
        meter.ended(2);
        let stats = page.part(0).unwrap();
        let buckets: Vec<u64> = stats.latency.iter().map(load).collect();
        assert_eq!(load(&stats.requests), u64::from(GROUP) + 4);
        assert_eq!(buckets.iter().sum::<u64>(), u64::from(GROUP) + 4);
        let slow: u64 = buckets.iter().skip(bucket(3_000_000)).sum();
        assert!(slow >= 1, "the one that waited took three milliseconds");
        assert!(load(&stats.latency_sum_ns) >= 3_000_000);
        assert_eq!(Arc::strong_count(&page), 3);
    }
}
