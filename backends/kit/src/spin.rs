//! When it pays to wait for the next request awake.
//!
//! A sleep ends with a wake-up, and what that costs depends on where the scheduler has put the two sides. On a quiet
//! host the driver runs on another processor and a wake-up crosses over: tens of microseconds, several times what a
//! request takes, and worth a spin. On a busy host both sides share a processor: going to sleep is what lets the
//! driver run, its kick comes back within microseconds, and a spin would burn the time that the driver needs.
//!
//! So the length of sleeps decides. While sleeps are short enough that a spin would have bridged them, but not as short
//! as a hand-over on one processor, the queue spins; a spin in vain ends that at once. As a spinning queue learns
//! nothing about sleeps, it goes back to sleeping for a few turns now and then.

use std::time::Duration;

/// Longest spin before a sleep. On a virtual host a wake-up that crosses to an idle processor was measured at 40 to 80 us;
/// with a ceiling of 50 us the queue gave up just before the kick came, and a request took three times as long.
pub const SPIN_MAX: Duration = Duration::from_micros(120);
/// A sleep this short is a hand-over on one processor.
const HAND_OVER: Duration = Duration::from_micros(6);
/// Sleeps of a trial.
const TRIAL: u32 = 8;
/// Successful spins between two trials.
const SPINS_MAX: u32 = 1024;

/// What one queue has learnt.
#[derive(Debug, Default)]
pub struct Spin {
    spinning: bool,
    turns: u32,
    /// Sleeps of this trial that a spin would have bridged.
    bridgeable: u32,
}

impl Spin {
    /// How long to spin before the next sleep.
    pub fn budget(&self) -> Duration {
        if self.spinning { SPIN_MAX } else { Duration::ZERO }
    }

    /// Work came while the queue was spinning.
    pub fn caught(&mut self) {
        self.turns += 1;
        if self.turns >= SPINS_MAX {
            *self = Self::default();
        }
    }

    /// The queue has slept for `time`, after a spin if it was to spin.
    pub fn slept(&mut self, time: Duration) {
        if self.spinning {
            *self = Self::default();
            return;
        }
        self.turns += 1;
        self.bridgeable += u32::from((HAND_OVER..SPIN_MAX).contains(&time));
        if self.turns >= TRIAL {
            // Most of them, not their mean: one sleep in which the host did something else says nothing.
            *self = Self { spinning: self.bridgeable > TRIAL / 2, ..Self::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(sleeps_us: u64, times: u32) -> Spin {
        let mut spin = Spin::default();
        for _ in 0..times {
            spin.slept(Duration::from_micros(sleeps_us));
        }
        spin
    }

    #[test]
    fn only_sleeps_that_a_spin_would_have_bridged_make_it_spin() {
        assert_eq!(after(10_000, TRIAL).budget(), Duration::ZERO, "idle");
        assert_eq!(after(2, TRIAL).budget(), Duration::ZERO, "hand-over on one processor");
        assert_eq!(after(30, TRIAL).budget(), SPIN_MAX, "wake-ups across processors");
    }

    #[test]
    fn a_spin_in_vain_ends_spinning() {
        let mut spin = after(30, TRIAL);
        assert_eq!(spin.budget(), SPIN_MAX);
        spin.slept(Duration::from_millis(5));
        assert_eq!(spin.budget(), Duration::ZERO);
    }

    #[test]
    fn a_spinning_queue_tries_sleeping_now_and_then() {
        let mut spin = after(30, TRIAL);
        assert_eq!(spin.budget(), SPIN_MAX);
        for _ in 0..SPINS_MAX {
            spin.caught();
        }
        assert_eq!(spin.budget(), Duration::ZERO);
    }
}
