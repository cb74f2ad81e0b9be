//! The machine in a world of its own: fake processes that die at any step, fake time, seeded schedules. Safety first:
//! nothing is completed twice, or undone, or for a driver that is gone; no two have the rings; nobody gets them before the
//! fence, during a pause, or without offering what was shown. Then the world heals, and everything must come to its end.
//!
//! A seed that fails is repeated by `run(seed, None)`. That the simulation can fail is shown with mistakes made on purpose.

mod mistake;
mod rng;
mod schedule;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};

use mistake::Mistake;
use schedule::{Outcome, run};

/// Schedules of a test run.
const SCHEDULES: u64 = 100_000;
/// Schedules within which each mistake must show.
const MISTAKE_SHOWS_WITHIN: u64 = 20_000;

/// Runs schedules on two threads; gives what they added up to, and the first complaint.
fn run_all(seeds: std::ops::Range<u64>) -> (Outcome, Option<(u64, &'static str)>) {
    let next = AtomicU64::new(seeds.start);
    let work = || {
        let (mut sum, mut first) = (Outcome::default(), None);
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || first.is_some() {
                return (sum, first);
            }
            let outcome = run(seed, None);
            sum.add(&outcome);
            first = outcome.complaint.map(|complaint| (seed, complaint));
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let (mut sum, first) = work();
        let (more, other) = other.join().expect("no panic");
        sum.add(&more);
        (sum, first.or(other))
    })
}

/// A hundred thousand lives of a device.
#[test]
fn every_schedule_is_safe_and_comes_to_an_end() {
    let (sum, complaint) = run_all(0..SCHEDULES);
    assert_eq!(complaint, None, "repeat it with run(seed, None)");
    // The schedules do what they are for.
    assert!(sum.deaths > SCHEDULES && sum.hand_overs > SCHEDULES && sum.quarantines > SCHEDULES / 10, "{sum:?}");
    assert!(sum.completed as u64 > 2 * SCHEDULES, "{sum:?}");
    assert!(sum.rolled_back > SCHEDULES / 50, "{sum:?}");
    assert!(sum.upgrades > SCHEDULES / 4 && sum.refusals > SCHEDULES / 2 && sum.takeovers > SCHEDULES / 4, "{sum:?}");
}

/// Each mistake is caught.
#[test]
#[allow(clippy::print_stdout, reason = "what each mistake takes is for people who run it")]
fn the_simulation_can_fail() {
    for mistake in Mistake::ALL {
        let caught = (0..MISTAKE_SHOWS_WITHIN).find_map(|seed| Some((seed, run(seed, Some(mistake)).complaint?)));
        let Some((seed, complaint)) = caught else {
            panic!("{mistake:?} shows in none of {MISTAKE_SHOWS_WITHIN} schedules")
        };
        println!("{mistake:?}: schedule {seed}: {complaint}");
    }
}
