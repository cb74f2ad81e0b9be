//! `blk-bench`: how `atoll-blk` compares with `qemu-storage-daemon`, one driver for both.
//!
//! The driver is a vhost-user front end with its rings in a memfd: one queue, EVENT_IDX, calls by eventfd (it sleeps when
//! nothing has come). Both back ends run all the time, on images of their own with the same contents; a round measures
//! one after the other, the order alternating. What counts is the ratio within a round; the table gives the median
//! over the rounds and the spread. Each load is measured in each [`placement`] of driver and back end.

pub mod backend;
pub mod load;
pub mod placement;
pub mod report;

use anyhow::Result;
use backend::{Backend, Medium, Who};
use load::{Load, Sample};
use placement::{Placement, Processors};
use report::{Case, Report};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Rounds of each load.
    pub rounds: u32,
    /// Milliseconds of each measurement.
    pub measure_ms: u64,
    /// Media to measure.
    pub media: Vec<Medium>,
    /// Folder on a disk for the O_DIRECT images.
    pub folder: std::path::PathBuf,
}

/// Measures everything; the report judges it.
pub fn run(plan: &Plan, mut say: impl FnMut(&str)) -> Result<Report> {
    let mut report = Report::default();
    let processors = Processors::of_this_process()?;
    for medium in &plan.media {
        say(&format!("{medium}: starting both back ends"));
        let mut atoll = Backend::start(Who::Atoll, *medium, &plan.folder)?;
        let mut qemu = Backend::start(Who::Qemu, *medium, &plan.folder)?;
        let loads = [Load::QD1, Load::QD32].map(|load| Placement::ALL.map(|placement| (load, placement)));
        for (load, placement) in loads.into_iter().flatten().chain([(Load::SEQUENTIAL, Placement::Free)]) {
            processors.place(placement, qemu.pid())?;
            processors.place(placement, atoll.pid())?;
            let mut pairs: Vec<(Sample, Sample)> = Vec::new();
            // The first round warms both up.
            for round in 0..=plan.rounds {
                let (a, q) = if round % 2 == 0 {
                    let a = load.measure(&mut atoll, plan.measure_ms)?;
                    (a, load.measure(&mut qemu, plan.measure_ms)?)
                } else {
                    let q = load.measure(&mut qemu, plan.measure_ms)?;
                    (load.measure(&mut atoll, plan.measure_ms)?, q)
                };
                if round > 0 {
                    pairs.push((a, q));
                }
            }
            say(&format!("{medium}: {} {placement} done", load.name));
            report.cases.push(Case { medium: *medium, load: load.name, placement, pairs });
        }
        report.memory.push((*medium, atoll.pss_without_guest_kib()?, qemu.pss_without_guest_kib()?));
        report.idle.push((*medium, atoll.idle_cpu_percent()?, qemu.idle_cpu_percent()?));
    }
    Ok(report)
}
