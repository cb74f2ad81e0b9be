//! Time as a parameter: deadlines and rate limits read a [`Clock`], so that a test can hold it in its hand.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A point in time of one clock, in nanoseconds since that clock began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// So long after the clock began.
    #[must_use]
    pub fn from_start(since: Duration) -> Self {
        Self(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    /// This much later; saturates after 584 years.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Time from `earlier` to here, or zero.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A source of time, and of how long to wait for it.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The present moment. Never goes back.
    fn now(&self) -> Moment;

    /// How long to wait in real time before looking at the clock again, when it is `now` and `until` is what is waited
    /// for. Whoever waits looks at [`Self::now`] afterwards and goes on waiting if it is too early.
    fn nap_from(&self, now: Moment, until: Moment) -> Duration;

    /// The same from the present moment on.
    fn nap(&self, until: Moment) -> Duration {
        self.nap_from(self.now(), until)
    }

    /// How long in real time ago `due` was, for whoever had a nap until then.
    fn overslept(&self, due: Moment) -> Duration;
}

/// The monotonic clock of the host.
#[derive(Clone, Copy, Debug)]
pub struct RealClock {
    start: Instant,
}

impl RealClock {
    /// A clock that begins now.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for RealClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for RealClock {
    fn now(&self) -> Moment {
        Moment::from_start(self.start.elapsed())
    }

    fn nap_from(&self, now: Moment, until: Moment) -> Duration {
        until.since(now)
    }

    fn overslept(&self, due: Moment) -> Duration {
        self.now().since(due)
    }
}

/// A clock that moves only when it is told to.
#[derive(Debug, Default)]
pub struct ManualClock {
    now: AtomicU64,
}

impl ManualClock {
    /// How often whoever waits for a moment of this clock looks at it, in real time.
    const LOOK: Duration = Duration::from_millis(1);

    /// A clock that stands at its beginning.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves it on.
    pub fn advance(&self, by: Duration) {
        let by = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        // The closure never declines, so the update cannot fail.
        let _ = self.now.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| Some(now.saturating_add(by)));
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Moment {
        Moment(self.now.load(Ordering::SeqCst))
    }

    fn nap_from(&self, _now: Moment, _until: Moment) -> Duration {
        Self::LOOK
    }

    fn overslept(&self, _due: Moment) -> Duration {
        Duration::ZERO
    }
}
