//! A limit on how often something may happen: logs that a guest can set off.

use std::sync::Arc;
use std::time::Duration;

use super::clock::{Clock, Moment};

/// A token bucket: `burst` at once, then one each `interval`.
#[derive(Debug)]
pub struct RateLimit {
    clock: Arc<dyn Clock>,
    interval: Duration,
    burst: u32,
    tokens: u32,
    filled: Moment,
    suppressed: u64,
}

impl RateLimit {
    /// A full bucket.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, burst: u32, interval: Duration) -> Self {
        let filled = clock.now();
        Self { clock, interval: interval.max(Duration::from_nanos(1)), burst, tokens: burst, filled, suppressed: 0 }
    }

    /// Takes a token: `Some(n)` when it may happen, where `n` is how many times it was suppressed since it last did.
    pub fn admit(&mut self) -> Option<u64> {
        let now = self.clock.now();
        let earned = now.since(self.filled).as_nanos() / self.interval.as_nanos();
        if let Ok(earned) = u32::try_from(earned) {
            if earned > 0 {
                self.tokens = self.tokens.saturating_add(earned).min(self.burst);
                // Saturating: with a burst of 2^32 the product is the elapsed time again.
                self.filled = self.filled.after(self.interval.saturating_mul(earned));
            }
        } else {
            self.tokens = self.burst;
            self.filled = now;
        }
        if self.tokens == 0 {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.tokens -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::super::clock::ManualClock;
    use super::*;

    /// A guest that writes to a missing register ten thousand times gets two lines, then one a second, which says how
    /// many were left out.
    #[test]
    fn burst_then_one_per_interval() {
        let clock = Arc::new(ManualClock::new());
        let mut limit = RateLimit::new(Arc::clone(&clock) as Arc<dyn Clock>, 2, Duration::from_secs(1));
        let admitted = (0..10_000).filter(|_| limit.admit().is_some()).count();
        assert_eq!(admitted, 2);
        clock.advance(Duration::from_millis(999));
        assert_eq!(limit.admit(), None);
        clock.advance(Duration::from_millis(1));
        assert_eq!(limit.admit(), Some(9_999));
        assert_eq!(limit.admit(), None);
        clock.advance(Duration::from_secs(1 << 40));
        assert_eq!(
            (0..10).filter(|_| limit.admit().is_some()).count(),
            2,
            "a long silence saves up no more than a burst"
        );
    }
}
