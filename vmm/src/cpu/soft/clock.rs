//! Guest time: the host's clock since power-on, or retired instructions.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use atoll_devices::GuestClock;

/// Where guest time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// The host's monotonic clock.
    Real,
    /// Retired instructions, so many nanoseconds for 1000 of them: two runs with the same inputs are identical.
    Retired {
        /// Nanoseconds.
        ns_per_1000: u32,
    },
}

/// The clock of the chips and of every timed device.
pub(super) struct SoftClock {
    pub(super) pace: Pace,
    power_on: Instant,
    retired_ns: AtomicU64,
}

impl SoftClock {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, power_on: Instant::now(), retired_ns: AtomicU64::new(0) }
    }
    /// Deterministic mode: what time the vCPU has come to. Between two calls devices see time stand still.
    pub(super) fn set_retired_ns(&self, now_ns: u64) {
        self.retired_ns.store(now_ns, Ordering::Relaxed);
    }
    /// Whether time passes by itself.
    pub(super) fn is_real(&self) -> bool {
        self.pace == Pace::Real
    }
}

impl GuestClock for SoftClock {
    fn now_ns(&self) -> u64 {
        match self.pace {
            Pace::Real => u64::try_from(self.power_on.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Pace::Retired { .. } => self.retired_ns.load(Ordering::Relaxed),
        }
    }
}
