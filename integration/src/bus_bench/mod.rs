//! How long an exit takes to a device and back, beside the least that the kernel needs to hand a turn to somebody else
//! and get it back.
//!
//! Three ways: *now* (a state machine, no hand-over), *later* (an actor of the VMM) and *elsewhere* (a process, over the
//! bus). Each goes through what a vCPU's thread really calls, [`atoll_vmm::cpu::VcpuBus`]. The floors are a ping-pong
//! of two threads on a futex and of two processes on eventfds. All take turns in each round, on the same processors.

mod floor;
mod path;
mod report;

pub use floor::echo;
pub use report::Report;

use anyhow::Result;

use crate::blk_bench::placement::{Placement, Processors};
use path::Way;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Rounds; each measures every way once.
    pub rounds: usize,
    /// Round trips of each measurement.
    pub trips: u32,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Median of a round trip, in microseconds.
    pub p50_us: f64,
    /// Processor time of everybody who takes part, for one round trip, in microseconds.
    pub cpu_us: f64,
}

/// Measures everything.
///
/// # Errors
/// When a process or thread cannot be had or does not answer.
pub fn run(plan: &Plan, mut progress: impl FnMut(&str)) -> Result<Report> {
    let processors = Processors::of_this_process()?;
    let mut ways = Way::all()?;
    let mut report = Report::default();
    for placement in Placement::ALL {
        progress(&format!("{placement}: {} rounds", plan.rounds));
        for way in &mut ways {
            way.place(&processors, placement)?;
        }
        for round in 0..plan.rounds {
            let mut samples = Vec::new();
            // Back and forth, so that no way always follows the same other one.
            let order: Vec<usize> =
                if round % 2 == 0 { (0..ways.len()).collect() } else { (0..ways.len()).rev().collect() };
            for index in order {
                if let Some(way) = ways.get_mut(index) {
                    samples.push((way.name(), way.measure(plan.trips)?));
                }
            }
            report.add(placement, samples);
        }
    }
    processors.place_driver(Placement::Free)?;
    Ok(report)
}
