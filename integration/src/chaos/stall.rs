//! How long the guest stood still: from a kill until every request that was in flight at it has been completed.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde::Serialize;

/// A request as its ring knows it: queue and head.
pub type Key = (usize, u16);

/// Watches one kill at a time.
#[derive(Debug, Default)]
pub struct StallWatch {
    since: Option<Instant>,
    waiting: HashSet<Key>,
    last: Duration,
}

impl StallWatch {
    /// A kill happened at `at` with these in flight. Those that wait since an earlier kill are among them.
    pub fn killed(&mut self, at: Instant, in_flight: impl Iterator<Item = Key>) {
        self.since = Some(at);
        self.last = Duration::ZERO;
        self.waiting = in_flight.collect();
    }

    /// A request was completed.
    pub fn completed(&mut self, key: Key) {
        if let Some(since) = self.since
            && self.waiting.remove(&key)
        {
            self.last = since.elapsed();
        }
    }

    /// Those that are not in flight any more were completed where nobody looked.
    pub fn keep(&mut self, in_flight: impl Fn(&Key) -> bool) {
        let before = self.waiting.len();
        self.waiting.retain(in_flight);
        if let Some(since) = self.since.filter(|_| self.waiting.len() < before) {
            self.last = since.elapsed();
        }
    }

    /// How long the kill was felt; none while somebody waits.
    pub fn over(&self) -> Option<Duration> {
        self.waiting.is_empty().then_some(self.last)
    }

    /// Requests that wait since the kill.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

/// Some durations, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Half of them are not longer.
    pub p50: f64,
    /// 99 of 100 are not longer.
    pub p99: f64,
    /// None is longer.
    pub max: f64,
}

impl Spread {
    /// Of any number of durations; zeroes of none.
    pub fn of(durations: &[Duration]) -> Self {
        let mut sorted = durations.to_vec();
        sorted.sort_unstable();
        let at = |percent: usize| {
            // The smallest one that so many percent do not exceed.
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).map_or(0.0, |duration| (duration.as_secs_f64() * 1e5).round() / 100.0)
        };
        Self { p50: at(50), p99: at(99), max: at(100) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest_ones() {
        let durations: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!(Spread::of(&durations), Spread { p50: 100.0, p99: 198.0, max: 200.0 });
        assert_eq!(Spread::of(&durations[..1]), Spread { p50: 200.0, p99: 200.0, max: 200.0 });
        assert_eq!(Spread::of(&[]), Spread::default());
    }

    #[test]
    fn a_stall_lasts_until_the_last_one_is_back() {
        let mut watch = StallWatch::default();
        watch.killed(Instant::now(), [(0, 1), (0, 2)].into_iter());
        watch.completed((0, 1));
        watch.completed((0, 7));
        assert_eq!((watch.over(), watch.waiting()), (None, 1));
        watch.completed((0, 2));
        assert!(watch.over().is_some_and(|stall| stall > Duration::ZERO));
    }
}
