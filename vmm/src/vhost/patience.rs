//! How long the device's thread waits for a backend.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How closely a wait is watched.
pub(super) const SLICE: Duration = Duration::from_millis(20);

/// Says that a device is being stopped: nobody waits for a new backend any more.
pub type Ending = Arc<AtomicBool>;

/// A wait of limited length, counted in slices that were really waited: a VMM that was stopped for a minute has not given
/// anybody a chance to answer.
#[derive(Debug)]
pub struct Patience {
    left: Duration,
    ending: Ending,
}

impl Patience {
    /// Waits at most `limit`, and less when `ending` is raised.
    pub fn new(limit: Duration, ending: &Ending) -> Self {
        Self { left: limit, ending: Arc::clone(ending) }
    }
    /// The next slice to wait; `None` when patience is at its end.
    pub fn slice(&mut self) -> Option<Duration> {
        if self.left.is_zero() || self.ending.load(Ordering::Relaxed) {
            return None;
        }
        let slice = self.left.min(SLICE);
        self.left -= slice;
        Some(slice)
    }
}
