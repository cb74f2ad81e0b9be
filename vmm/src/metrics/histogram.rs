//! A latency histogram, as it was read at one moment: log-linear buckets, four per doubling.

use std::time::Duration;

use atoll_protocol::stats::{BUCKETS, BUCKETS_PER_OCTAVE, bucket_end};

/// Requests by latency. The numbers may come from a process that lies; sums saturate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram([u64; BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

impl Histogram {
    /// Of these counts, bucket by bucket.
    pub fn new(buckets: [u64; BUCKETS]) -> Self {
        Self(buckets)
    }

    /// All requests.
    pub fn count(&self) -> u64 {
        self.0.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Adds those of another queue.
    pub fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum = sum.saturating_add(count);
        }
    }

    /// What has come since an earlier look.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut new = self.clone();
        for (count, before) in new.0.iter_mut().zip(earlier.0) {
            *count = count.saturating_sub(before);
        }
        new
    }

    /// No request took longer, within a quarter of it; none without a request.
    pub fn longest(&self) -> Option<Duration> {
        let bucket = self.0.iter().rposition(|requests| *requests > 0)?;
        // The last bucket has no end: what is there took at least as long as the one before says.
        bucket_end(bucket).or_else(|| bucket_end(bucket.checked_sub(1)?)).map(Duration::from_nanos)
    }

    /// The latency that this share of all requests (0 to 1) did not exceed, within a quarter of its value; none without a
    /// request.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = ((count as f64 * share.clamp(0.0, 1.0)).ceil() as u64).clamp(1, count);
        let mut below = 0_u64;
        let mut start = 0;
        for (bucket, requests) in self.0.iter().enumerate() {
            let end = bucket_end(bucket).unwrap_or(start);
            if below.saturating_add(*requests) >= rank {
                // As if the requests of a bucket were spread evenly over it.
                let part = (rank - below) as f64 / *requests as f64;
                return Some(Duration::from_nanos(start + ((end - start) as f64 * part) as u64));
            }
            below = below.saturating_add(*requests);
            start = end;
        }
        Some(Duration::from_nanos(start))
    }

    /// Upper ends of the doublings and how many requests lie below each.
    pub fn octaves(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let mut below = 0_u64;
        self.0.iter().enumerate().filter_map(move |(bucket, requests)| {
            below = below.saturating_add(*requests);
            (bucket % BUCKETS_PER_OCTAVE == 0).then_some(())?;
            Some((Duration::from_nanos(bucket_end(bucket)?), below))
        })
    }
}

#[cfg(test)]
mod tests {
    use atoll_protocol::stats::bucket;

    use super::*;

    fn of(latencies: &[(u64, u64)]) -> Histogram {
        let mut buckets = [0; BUCKETS];
        for (ns, count) in latencies {
            buckets[bucket(*ns)] += count;
        }
        Histogram::new(buckets)
    }

    /// 99 requests of 10 us and one of 3 ms: the median is near the one, the maximum near the other.
    #[test]
    fn quantiles_are_within_a_bucket_of_the_truth() {
        let histogram = of(&[(10_000, 99), (3_000_000, 1)]);
        let us = |share| histogram.quantile(share).unwrap().as_nanos() as f64 / 1000.0;
        assert!((8.0..12.6).contains(&us(0.5)), "{}", us(0.5));
        assert!((8.0..12.6).contains(&us(0.99)), "{}", us(0.99));
        assert!((2500.0..3700.0).contains(&us(1.0)), "{}", us(1.0));
        assert_eq!(Histogram::default().quantile(0.5), None);
        assert!((3000.0..3700.0).contains(&(histogram.longest().unwrap().as_nanos() as f64 / 1000.0)));
        assert_eq!(Histogram::default().longest(), None);
        assert!(of(&[(u64::MAX, 1)]).longest().unwrap() > Duration::from_secs(10));
        assert!(of(&[(u64::MAX, 3)]).quantile(0.5).unwrap() > Duration::from_secs(10));
        assert!(of(&[(0, 3)]).quantile(0.0).unwrap() < Duration::from_nanos(257));
    }

    #[test]
    fn octaves_grow_to_the_number_of_requests() {
        let histogram = of(&[(100, 1), (10_000, 2), (u64::MAX, 4)]);
        let octaves: Vec<_> = histogram.octaves().collect();
        assert_eq!(octaves.len(), 27);
        assert_eq!(octaves[0], (Duration::from_nanos(256), 1));
        assert!(octaves.is_sorted());
        assert_eq!(octaves.last().unwrap().1, 3, "the longest is above all of them");
        assert_eq!(histogram.since(&of(&[(10_000, 1)])).count(), 6);
    }
}
