//! An idle disk whose process is killed again and again, and what is left of it: descriptors, sockets, threads, processes and
//! memory of the front end, before and after.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use atoll_kit::driver::disk::{self, Kind};
use atoll_kit::driver::{Driver, Options};
use atoll_vmm::config::{DeviceConfig, DiskConfig};
use atoll_vmm::vhost::{DeviceState, Fault};
use serde::{Deserialize, Serialize};

use crate::chaos::census::Census;
use crate::chaos::rig::{House, Rig};
use crate::chaos::stall::Spread;

const IMAGE: u64 = 1 << 20;
const MEMORY: u64 = 16 << 20;
/// How long a successor may take, on a host that has other things to do.
const SUCCESSOR_MAX: Duration = Duration::from_secs(60);
/// Restarts after which allocators and caches have what they keep.
const WARM_UP: u64 = 10;

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// Restarts that were counted.
    pub restarts: u64,
    /// Things that are there now and were not before: descriptors, threads, processes, and one for memory beyond its slack.
    pub leaked: u64,
    /// Open descriptors, threads, child processes, KiB of memory: before, and after.
    pub before: [u64; 4],
    /// See there.
    pub after: [u64; 4],
    /// From a kill to the rings in the hands of a successor, the policy's pause of up to 100 ms included, in ms.
    pub back_ms: [f64; 3],
}

fn numbers(census: &Census) -> [u64; 4] {
    [census.descriptors, census.threads, census.processes, census.memory_kib]
}

/// Kills the process of an idle disk `count` times, with the programs in `programs` and the policy as it is shipped; then
/// leaves the last one alone for `idle`, in which it must not die. Before and afterwards the disk must answer.
pub fn run(programs: &Path, count: u64, idle: Duration, mut done: impl FnMut(u64)) -> Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("image");
    File::create(&path)?.set_len(IMAGE)?;
    let house = House::new(programs)?;
    let config = DeviceConfig::Disk(DiskConfig { path: Some(path), ..DiskConfig::default() });
    let mut rig = house.device(&config, MEMORY)?;
    let mut driver = rig.start(Options { queues: 1, size: 64, memory: MEMORY as usize, ..Options::default() })?;
    answers(&mut driver).context("before")?;
    for _ in 0..WARM_UP {
        restart(&rig)?;
    }
    let before = Census::take()?;
    let mut back = Vec::new();
    for number in 1..=count {
        back.push(restart(&rig).with_context(|| format!("restart {number}"))?);
        done(number);
    }
    let after = Census::take()?;
    let (pid, lost) = (rig.status().pid, rig.lost());
    std::thread::sleep(idle);
    ensure!((rig.status().pid, rig.lost()) == (pid, lost), "an idle process ended: {:?}", rig.status());
    answers(&mut driver).context("after")?;
    ensure!(rig.needs_reset() == 0, "the driver was told to reset its device");
    let back = Spread::of(&back);
    Ok(Outcome {
        restarts: count,
        leaked: after.leaked_since(&before, count),
        before: numbers(&before),
        after: numbers(&after),
        back_ms: [back.p50, back.p99, back.max],
    })
}

/// Kills it, and waits until the successor has the rings; how long that took.
fn restart(rig: &Rig) -> Result<Duration> {
    let lost = rig.lost();
    let began = Instant::now();
    rig.device()?.inject(Fault::Kill, 0)?;
    loop {
        let status = rig.status();
        if status.lost > lost && status.state == DeviceState::Running && status.pid.is_some() {
            return Ok(began.elapsed());
        }
        ensure!(began.elapsed() < SUCCESSOR_MAX, "no successor: {status:?}");
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// The disk does a request.
fn answers(driver: &mut Driver) -> Result<()> {
    let (queue, guest) = driver.queue(0)?;
    let head = disk::add(queue, guest, Kind::In, 0, &[(MEMORY / 2, 4096)]).context("a free descriptor")?;
    queue.publish(guest)?;
    let deadline = Instant::now() + SUCCESSOR_MAX;
    while queue.take(guest).is_none() {
        ensure!(Instant::now() < deadline, "the disk does not answer");
        queue.wait(guest, Duration::from_millis(10))?;
    }
    ensure!(disk::status(queue, guest, head) == 0, "the request failed");
    Ok(())
}
