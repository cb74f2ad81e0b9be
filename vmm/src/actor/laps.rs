//! How one waits until a thread that serves a list of events has gone through all that were there.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
struct Count {
    asked: u64,
    run: u64,
}

/// Laps of a thread's loop, asked for and run.
#[derive(Debug, Default)]
pub struct Laps {
    count: Mutex<Count>,
    ran: Condvar,
}

/// A lap that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lap(u64);

impl Laps {
    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a lap. To be followed by something that wakes the thread, behind the events that it is to have served.
    pub fn ask(&self) -> Lap {
        let mut count = self.count();
        count.asked += 1;
        Lap(count.asked)
    }

    /// On the thread, once woken: which lap its present one answers.
    pub fn begin(&self) -> Lap {
        Lap(self.count().asked)
    }

    /// On the thread: that lap is over.
    pub fn finish(&self, lap: Lap) {
        let mut count = self.count();
        count.run = count.run.max(lap.0);
        self.ran.notify_all();
    }

    /// Waits for it. Whether it was over by `deadline`.
    pub fn wait(&self, lap: Lap, deadline: Instant) -> bool {
        let mut count = self.count();
        while count.run < lap.0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            count = self.ran.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
