//! `net-bench`: how many frames `atoll-net`'s switch carries from one guest to another, beside DPDK's testpmd between two
//! `net_vhost` ports (forwarding mode io), one driver for both.
//!
//! The driver is both guests at once: two vhost-user front ends with their rings in memfds, one thread that keeps the
//! sender's queue full and the receiver's buffers available, with EVENT_IDX and calls by eventfd. testpmd polls, and keeps
//! a processor busy even when nothing comes; `atoll-net` sleeps then. So each is stopped (SIGSTOP) while the other is
//! measured: neither competes with a bystander for processors, which the scheduler chooses. A round measures one after the
//! other, the order alternating. What counts is the ratio within a round; the table gives the median over the rounds and
//! the spread, and the processor time of the driver per frame besides, which tells whether it is the limit.
//!
//! Where testpmd is missing the yardstick is a floor: two threads that hand frames over by copying them into a ring of
//! slots and out of it, without descriptors, headers and notifications.

pub mod backend;
pub mod floor;
pub mod load;
pub mod report;

use anyhow::Result;
use backend::{Pair, Who};
use load::Sample;
use report::{Case, Report};

/// Frame lengths that are measured.
pub const LENGTHS: [u32; 2] = [64, 1500];

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Rounds of each load.
    pub rounds: u32,
    /// Milliseconds of each measurement.
    pub measure_ms: u64,
}

/// What Atoll is set beside.
enum Yardstick {
    Testpmd(Box<Pair>),
    Floor,
}

impl Yardstick {
    fn measure(&mut self, bytes: u32, ms: u64) -> Result<Sample> {
        match self {
            Self::Testpmd(pair) => alone(pair, bytes, ms),
            Self::Floor => floor::measure(bytes, ms),
        }
    }
}

/// Measures a process that is stopped otherwise.
fn alone(pair: &mut Pair, bytes: u32, ms: u64) -> Result<Sample> {
    pair.pause(false)?;
    let sample = load::measure(pair, bytes, ms);
    pair.pause(true)?;
    sample
}

/// Measures everything; the report judges it.
pub fn run(plan: &Plan, mut say: impl FnMut(&str)) -> Result<Report> {
    let mut atoll = Pair::start(Who::Atoll)?;
    let (name, mut yardstick) = if backend::testpmd_is_there() {
        let pair = Pair::start(Who::Testpmd)?;
        pair.pause(true)?;
        ("testpmd", Yardstick::Testpmd(Box::new(pair)))
    } else {
        say(
            "dpdk-testpmd is not installed (Debian: dpdk-dev and librte-net-vhost23): measuring beside two copying threads",
        );
        ("floor", Yardstick::Floor)
    };
    let mut report = Report { yardstick: name, cases: Vec::new(), idle_percent: 0.0 };
    for bytes in LENGTHS {
        let mut pairs = Vec::new();
        // The first round warms both up.
        for round in 0..=plan.rounds {
            let (a, y) = if round % 2 == 0 {
                let a = alone(&mut atoll, bytes, plan.measure_ms)?;
                (a, yardstick.measure(bytes, plan.measure_ms)?)
            } else {
                let y = yardstick.measure(bytes, plan.measure_ms)?;
                (alone(&mut atoll, bytes, plan.measure_ms)?, y)
            };
            if round > 0 {
                pairs.push((a, y));
            }
        }
        say(&format!("{bytes} bytes: done"));
        report.cases.push(Case { bytes, pairs });
    }
    atoll.pause(false)?;
    report.idle_percent = atoll.idle_cpu_percent()?;
    Ok(report)
}
