//! Rate limits: token buckets for bytes and for operations, shared by the queues of a device.
//!
//! A bucket holds `size` tokens and fills up in `refill`; beyond that it has tokens that are spent once and never come back
//! (`burst`). Time is counted in exact fractions of a token, so that a limit neither drifts nor depends on how often one
//! looks. A request larger than the bucket goes when the bucket is full and leaves a debt, so that the rate holds for it too.
//!
//! Whoever has no tokens learns when there will be some, and sleeps until then; nothing runs in the meantime. The clock is
//! a parameter.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

/// Whoever waits looks again after this long at the latest.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// A source of time.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The present moment; never goes back.
    fn now(&self) -> Instant;
}

/// The monotonic clock of the host.
#[derive(Debug, Clone, Copy, Default)]
pub struct MonotonicClock;

impl Clock for MonotonicClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// What a bucket is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketConfig {
    size: u64,
    refill: Duration,
    burst: u64,
}

/// What is wrong with a limit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BucketError {
    /// Not three numbers.
    #[error("{0} is no limit: write SIZE,REFILL_MS or SIZE,REFILL_MS,BURST, for example 1048576,100")]
    Form(String),
    /// Nothing could ever pass.
    #[error("a limit needs a size and a refill time above zero; leave it out for none")]
    Zero,
}

impl BucketConfig {
    /// `size` tokens that come back in `refill`, and `burst` that are spent once.
    pub fn new(size: u64, refill: Duration, burst: u64) -> Result<Self, BucketError> {
        if size == 0 || refill.is_zero() {
            return Err(BucketError::Zero);
        }
        Ok(Self { size, refill, burst })
    }
}

impl FromStr for BucketConfig {
    type Err = BucketError;

    /// `SIZE,REFILL_MS[,BURST]`.
    fn from_str(text: &str) -> Result<Self, BucketError> {
        let numbers: Option<Vec<u64>> = text.split(',').map(|part| part.trim().parse().ok()).collect();
        match numbers.as_deref() {
            Some([size, refill]) => Self::new(*size, Duration::from_millis(*refill), 0),
            Some([size, refill, burst]) => Self::new(*size, Duration::from_millis(*refill), *burst),
            _ => Err(BucketError::Form(text.to_owned())),
        }
    }
}

/// One bucket.
#[derive(Debug)]
pub struct TokenBucket {
    config: BucketConfig,
    burst: u64,
    /// Tokens now; below zero after a request larger than the bucket.
    tokens: i128,
    /// Parts of a token that have come, in nanoseconds of `refill` times tokens of `size`.
    part: u128,
    seen: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(config: BucketConfig, now: Instant) -> Self {
        Self { config, burst: config.burst, tokens: config.size.into(), part: 0, seen: now }
    }

    fn refill(&mut self, now: Instant) {
        let size = i128::from(self.config.size);
        let elapsed = now.saturating_duration_since(self.seen);
        self.seen = self.seen.max(now);
        if self.tokens >= size {
            return;
        }
        let refill = self.config.refill.as_nanos();
        let part = elapsed.as_nanos().saturating_mul(u128::from(self.config.size)).saturating_add(self.part);
        let come = i128::try_from(part / refill).unwrap_or(i128::MAX);
        self.tokens = self.tokens.saturating_add(come);
        self.part = part % refill;
        if self.tokens >= size {
            (self.tokens, self.part) = (size, 0);
        }
    }

    /// How long until `count` tokens can be spent; zero when they can be now.
    pub fn wait(&mut self, count: u64, now: Instant) -> Duration {
        self.refill(now);
        // What is larger than the bucket waits until it is full.
        let needed = i128::from(count.saturating_sub(self.burst).min(self.config.size));
        let missing = needed.saturating_sub(self.tokens);
        if needed == 0 || missing <= 0 {
            return Duration::ZERO;
        }
        let refill = self.config.refill.as_nanos();
        let parts = missing.unsigned_abs().saturating_mul(refill).saturating_sub(self.part);
        let ns = parts.div_ceil(u128::from(self.config.size));
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX)).min(WAIT_MAX)
    }

    /// Spends tokens, which [`TokenBucket::wait`] has found to be there.
    pub fn spend(&mut self, count: u64) {
        let from_burst = count.min(self.burst);
        self.burst -= from_burst;
        self.tokens = self.tokens.saturating_sub(i128::from(count - from_burst));
    }
}

/// What a request costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that it moves.
    pub bytes: u64,
    /// Operations, or frames.
    pub operations: u64,
}

#[derive(Debug)]
struct Buckets {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

/// The limits of a device.
#[derive(Debug)]
pub struct Limiter {
    clock: Box<dyn Clock>,
    buckets: Mutex<Buckets>,
}

impl Limiter {
    /// Limits by the host's clock; none when neither is limited.
    pub fn new(bytes: Option<BucketConfig>, operations: Option<BucketConfig>) -> Option<Arc<Self>> {
        (bytes.is_some() || operations.is_some()).then(|| Self::by(Box::new(MonotonicClock), bytes, operations))
    }

    /// Limits by `clock`.
    pub fn by(clock: Box<dyn Clock>, bytes: Option<BucketConfig>, operations: Option<BucketConfig>) -> Arc<Self> {
        let now = clock.now();
        let full = |config| TokenBucket::new(config, now);
        let buckets = Mutex::new(Buckets { bytes: bytes.map(full), operations: operations.map(full) });
        Arc::new(Self { clock, buckets })
    }

    /// The present moment of its clock.
    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Pays for a request, or says when to try again. Nothing is spent then.
    pub fn admit(&self, cost: Cost) -> Result<(), Instant> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        let wait = |bucket: &mut Option<TokenBucket>, count| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(count, now))
        };
        let wait = wait(&mut buckets.bytes, cost.bytes).max(wait(&mut buckets.operations, cost.operations));
        if !wait.is_zero() {
            return Err(now.checked_add(wait).unwrap_or(now));
        }
        if let Some(bytes) = &mut buckets.bytes {
            bytes.spend(cost.bytes);
        }
        if let Some(operations) = &mut buckets.operations {
            operations.spend(cost.operations);
        }
        Ok(())
    }
}

/// What one queue knows of its limits.
#[derive(Debug, Default)]
pub(crate) struct Toll {
    limiter: Option<Arc<Limiter>>,
    /// The next request cannot pass before.
    until: Option<Instant>,
    /// It has been waiting since.
    since: Option<Instant>,
}

impl Toll {
    pub(crate) fn new(limiter: Option<Arc<Limiter>>) -> Self {
        Self { limiter, until: None, since: None }
    }

    /// When to look again, while a request waits.
    pub(crate) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Whether looking at requests is of no use yet.
    pub(crate) fn is_closed(&self) -> bool {
        self.until.zip(self.limiter.as_ref()).is_some_and(|(until, limiter)| limiter.now() < until)
    }

    /// Pays for the next request: how long it has waited, or none when it has to go on waiting.
    #[inline]
    pub(crate) fn pay(&mut self, cost: impl FnOnce() -> Cost) -> Option<Duration> {
        if self.limiter.is_none() { Some(Duration::ZERO) } else { self.charge(cost()) }
    }

    fn charge(&mut self, cost: Cost) -> Option<Duration> {
        let limiter = self.limiter.as_ref()?;
        match limiter.admit(cost) {
            Ok(()) => {
                self.until = None;
                Some(self.since.take().map_or(Duration::ZERO, |since| limiter.now().saturating_duration_since(since)))
            }
            Err(until) => {
                self.until = Some(until);
                self.since.get_or_insert_with(|| limiter.now());
                None
            }
        }
    }

    /// The ring has stopped: what waited is not ours any more.
    pub(crate) fn forget(&mut self) {
        (self.until, self.since) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone)]
    struct Hand(Arc<Mutex<Instant>>);

    impl Clock for Hand {
        fn now(&self) -> Instant {
            *self.0.lock().unwrap()
        }
    }

    fn limiter(bytes: &str, operations: Option<&str>) -> (Arc<Limiter>, Arc<Mutex<Instant>>) {
        let now = Arc::new(Mutex::new(Instant::now()));
        let operations = operations.map(|text| text.parse().unwrap());
        (Limiter::by(Box::new(Hand(Arc::clone(&now))), Some(bytes.parse().unwrap()), operations), now)
    }

    fn bytes(bytes: u64) -> Cost {
        Cost { bytes, operations: 1 }
    }

    /// However unevenly one looks at the clock, in an hour as much passes as the limit says, to the byte.
    #[test]
    fn a_limit_does_not_drift() {
        let (limiter, now) = limiter("1000003,997,5000", None);
        let start = limiter.now();
        let (mut passed, mut looks) = (0_u64, 0_u64);
        while limiter.now() - start < Duration::from_secs(3600) {
            looks += 1;
            match limiter.admit(bytes(7919)) {
                Ok(()) => passed += 7919,
                // Sometimes at the moment that was told, sometimes at odd ones.
                Err(at) => {
                    let mut now = now.lock().unwrap();
                    *now = if looks % 3 == 0 { at } else { *now + Duration::from_nanos(1 + looks % 7_000_001) };
                }
            }
        }
        let fair = 1_000_003 + 5000 + 3600_u128 * 1_000_000_000 * 1_000_003 / 997_000_000;
        let error = i128::from(passed) - fair as i128;
        assert!((-16_000..=0).contains(&error), "{error} bytes of {fair} after {looks} looks");
    }

    /// The moment that is told is the first at which the request passes.
    #[test]
    fn the_moment_told_is_neither_early_nor_late() {
        let (limiter, now) = limiter("3,1000", None);
        assert_eq!(limiter.admit(bytes(3)), Ok(()));
        let at = limiter.admit(bytes(2)).unwrap_err();
        *now.lock().unwrap() = at - Duration::from_nanos(1);
        assert_eq!(limiter.admit(bytes(2)), Err(at));
        *now.lock().unwrap() = at;
        assert_eq!(limiter.admit(bytes(2)), Ok(()));
    }

    #[test]
    fn a_burst_is_spent_once_and_a_giant_leaves_a_debt() {
        let (limiter, now) = limiter("100,1000,50", None);
        assert_eq!(limiter.admit(bytes(150)), Ok(()), "bucket and burst");
        assert!(limiter.admit(bytes(1)).is_err());
        *now.lock().unwrap() += Duration::from_secs(60);
        assert_eq!(limiter.admit(bytes(1000)), Ok(()), "larger than the bucket, which is full");
        let at = limiter.admit(bytes(1)).unwrap_err();
        assert_eq!(at - limiter.now(), Duration::from_millis(9010), "the debt of 900 and one more");
    }

    /// Nothing is spent of one bucket while the other is empty.
    #[test]
    fn both_limits_hold() {
        let (limiter, now) = limiter("1000,1000", Some("2,1000"));
        assert_eq!(limiter.admit(bytes(100)), Ok(()));
        assert_eq!(limiter.admit(bytes(100)), Ok(()));
        for _ in 0..10 {
            assert!(limiter.admit(bytes(100)).is_err(), "two operations a second");
        }
        *now.lock().unwrap() += Duration::from_millis(500);
        assert_eq!(limiter.admit(bytes(800)), Ok(()), "the eight hundred are still there");
    }

    #[test]
    fn absurd_limits_overflow_nothing() {
        let max = u64::MAX;
        for config in [format!("{max},{max},{max}"), format!("1,{max},0"), format!("{max},1,0"), format!("1,1,{max}")] {
            let (limiter, now) = limiter(&config, Some(&config));
            for _ in 0..50 {
                let giant = Cost { bytes: max, operations: max };
                if let Err(at) = limiter.admit(giant) {
                    assert!(at > limiter.now(), "{config}");
                    *now.lock().unwrap() = at;
                }
                let _ = limiter.admit(bytes(0));
            }
        }
        let errors = ["", "1", "0,1", "1,0", "a,b", "1,2,3,4", "-1,5", "18446744073709551616,1"];
        assert!(errors.iter().all(|text| text.parse::<BucketConfig>().is_err()));
    }
}
